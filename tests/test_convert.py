# SPDX-License-Identifier: Apache-2.0
"""What other programs make of the results: the table of names, ComfyUI's own numbers, and PEFT's merged weights."""

import json

import convert_for_ui
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from harness import ROOT, weights
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file


DATA = ROOT / "tests" / "data" / "comfyui"
NAMES = json.loads((DATA / "mmdit_names.json").read_text())
EVERYTHING = "attn.to_q,attn.to_k,attn.to_v,attn.to_out.0,attn.add_q_proj,attn.add_k_proj,attn.add_v_proj,"
EVERYTHING += "attn.to_add_out,attn2.to_q,attn2.to_k,attn2.to_v,attn2.to_out.0,ff.net.0.proj,ff.net.2,proj_out,"
EVERYTHING += "ff_context.net.0.proj,ff_context.net.2,norm1.linear,norm1_context.linear,norm_out.linear"


def test_a_transformer_in_mmdit_names_and_back():
    """Row by row of a table whose every row was loaded in ComfyUI; no tensor is left over, or lost."""
    torch.manual_seed(0)
    state = SD3Transformer2DModel.from_config(NAMES["config"]).state_dict()
    state = {name: torch.randn_like(tensor) for name, tensor in state.items()}
    converted = convert_for_ui.convert_transformer(state)
    rows = {name: (key, start, end, note) for name, key, start, end, note in NAMES["names"]}
    assert rows.keys() == state.keys() and {row[0] for row in rows.values()} == converted.keys()
    for name, (key, start, end, note) in rows.items():
        back = converted[key][start:end]
        if "halves swapped" in note:
            back = torch.cat([back[len(back) // 2 :], back[: len(back) // 2]])
        assert torch.equal(back, state[name]), name


def update(converted, key):
    """What a program that applies alpha adds to the weight `key` of MMDiT."""
    name = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
    down, up = converted[f"{name}.lora_down.weight"].float(), converted[f"{name}.lora_up.weight"].float()
    return converted[f"{name}.alpha"].item() / len(down) * (up.flatten(1) @ down.flatten(1))


def test_comfyuis_numbers():
    """Its patched weights of five layers, from a file of ours with alpha 6 and rank 2, once it applies them."""
    expected = json.loads((DATA / "lora_expect.json").read_text())
    base = load_file(DATA / "tiny_base_layers.safetensors")
    path = DATA / "tiny_lora_alpha6_rank2.safetensors"
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    converted = convert_for_ui.convert_lora(load_file(path), metadata)
    assert len(expected["layers"]) == 5
    for layer, found in expected["layers"].items():
        rows = update(converted, found["mmdit_key"])[found["start_row"] : found["end_row"]]
        assert rows.norm().item() == pytest.approx(found["norm_of_update"], rel=1e-5)
        patched = (base[f"{layer}.weight"].float() + rows).flatten()
        wanted = torch.tensor(found["patched_value"])
        assert (patched[found["flat_index"]] - wanted).abs().max() < 1e-5 * found["norm_of_update"]
        assert patched.norm().item() == pytest.approx(found["norm_of_patched"], rel=1e-5)


@pytest.fixture
def lora(run, tmp_path):
    """A LoRA on every kind of layer, of alpha 9 and rank 4, whose checkpoint is kept."""
    flags = ("--rank", 4, "--lora_alpha", 9, "--lora_layers", EVERYTHING, "--learning_rate", 1e-2)
    return run("train_sd3_soar_lora", *flags, "--checkpointing_steps", 2, "--trajectory_length", 1)


def merged(pipeline, folder):
    """The base's transformer with a LoRA merged into it by PEFT."""
    pipe = StableDiffusion3Pipeline.from_pretrained(pipeline)
    pipe.load_lora_weights(folder)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe.transformer.state_dict()


@pytest.mark.parametrize("kind", ["result", "checkpoint"])
def test_a_lora_in_kohyas_names_is_what_peft_makes_of_it(kind, lora, pipeline):
    """In every layer; the result has its strength in its weights, the checkpoint in its metadata."""
    folder = lora if kind == "result" else lora / "checkpoint-2"
    metadata = metadata_of(folder)
    assert metadata["transformer.lora_alpha"] == (4 if kind == "result" else 9)
    assert check_against_peft(folder, pipeline) > 20


def metadata_of(folder):
    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        return json.loads(file.metadata()["lora_adapter_metadata"])


def check_against_peft(folder, pipeline):
    """The converted LoRA changes what PEFT's does, and as much; returns how many weights."""
    converted = convert_for_ui.convert_lora(weights(folder), metadata_of(folder))
    base = convert_for_ui.convert_transformer(weights(pipeline))
    wanted = convert_for_ui.convert_transformer(merged(pipeline, folder))
    names = {name.rpartition(".")[0] for name in converted if not name.endswith(".alpha")}
    names = {name.rpartition(".")[0] for name in names}
    changed = 0
    for key in base:
        if f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}" in names and key.endswith(".weight"):
            change = (wanted[key] - base[key]).flatten(1)
            torch.testing.assert_close(update(converted, key), change, rtol=0, atol=1e-6)
            changed += change.abs().max() > 1e-5
        else:
            assert torch.equal(wanted[key], base[key])
    assert changed == len(names)
    return changed


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_strengths_of_their_own(rslora, pipeline, tmp_path):
    """Of single layers, and by PEFT's patterns of the ends of their names; and of a scale by the rank's root."""
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.2", "proj_out"],
        rank_pattern={"transformer_blocks.1.attn.to_q": 2, "attn.to_out.0": 3, "proj_out": 5},
        alpha_pattern={"transformer_blocks.1.attn.to_q": 9, "to_k": 1, "transformer_blocks.0.ff.net.2": 20},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel.from_pretrained(pipeline, subfolder="transformer")
    transformer.add_adapter(config)
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )
    assert metadata_of(tmp_path)["transformer.alpha_pattern"]["to_k"] == 1
    assert check_against_peft(tmp_path, pipeline) == 3 * 3 + 1


def test_some_of_query_key_and_value(run, pipeline):
    """The others' rows are zero; rank and alpha are those of the ones that there are."""
    out = run("train_sd3_soar_lora", "--rank", 2, "--lora_layers", "attn.to_v,attn.to_q", "--learning_rate", 1e-2)
    converted = convert_for_ui.convert_lora(weights(out))
    key = "joint_blocks.1.x_block.attn.qkv.weight"
    assert converted["lora_unet_joint_blocks_1_x_block_attn_qkv.alpha"] == 4
    change = (convert_for_ui.convert_transformer(merged(pipeline, out))[key] - weights_of(pipeline)[key]).flatten(1)
    torch.testing.assert_close(update(converted, key), change, rtol=0, atol=1e-6)
    assert (change[32:64] == 0).all() and change[:32].any() and change[64:].any()


def test_a_lora_in_kohyas_names_and_back(lora, pipeline, run, tmp_path, capsys):
    """What training goes on with has the effect of the file, to the last of its ranks."""
    with safe_open(lora / "checkpoint-2" / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    state = convert_for_ui.convert_lora(weights(lora / "checkpoint-2"), metadata)
    key = "lora_unet_joint_blocks_0_x_block_mlp_fc1"
    for name in (key, "lora_unet_joint_blocks_1_x_block_attn_qkv"):  # its strength elsewhere: the same effect
        state[f"{name}.lora_up.weight"] *= 4
        state[f"{name}.alpha"] /= 4
    del state["lora_unet_joint_blocks_1_context_block_mlp_fc1.alpha"]  # none is 1
    save_file(state | {"lora_te1_text_model.lora_down.weight": torch.ones(2, 2)}, tmp_path / "kohya.safetensors")
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    file.parent.mkdir()
    convert_for_ui.main([str(tmp_path / "kohya.safetensors"), str(file)])
    assert "1 tensors of text encoders are left out" in capsys.readouterr().out
    back, trained = weights(file.parent), weights(lora)
    trained = {name: t for name, t in trained.items() if "2.attn.add_q_proj" not in name}  # it has no effect, ever
    assert {name: tensor.shape for name, tensor in back.items()} == {name: t.shape for name, t in trained.items()}
    one, other = merged(pipeline, file.parent), merged(pipeline, lora)
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=1e-6) for name in one)
    out = run("train_sd3_soar_lora", "--lora", file.parent, "--learning_rate", 0, "--output_dir", tmp_path / "out2")
    assert all(torch.equal(tensor, back[name]) for name, tensor in weights(out).items())
    for name in (f"{key}.dora_scale", f"{key}.hada_w1_a", "lora_unet_input_blocks_1.lora_down.weight"):
        save_file(state | {name: torch.ones(2, 2)}, tmp_path / "kohya.safetensors")
        with pytest.raises(SystemExit):
            convert_for_ui.main([str(tmp_path / "kohya.safetensors"), str(tmp_path / "no.safetensors")])
        message = capsys.readouterr().err
        assert f"no LoRA of a Stable Diffusion 3 transformer in kohya's names: {name}" in message


def weights_of(pipeline):
    return convert_for_ui.convert_transformer(weights(pipeline))


def test_the_same_run_writes_the_same_bytes(run, tmp_path):
    """The order of a set, which differs from process to process, is in no file."""
    for name in ("one", "two"):
        run("train_sd3_soar_lora", "--max_train_steps", 1, "--output_dir", tmp_path / name)
    one, two = ((tmp_path / name / "pytorch_lora_weights.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    with safe_open(tmp_path / "one" / "pytorch_lora_weights.safetensors", "pt") as file:
        layers = json.loads(file.metadata()["lora_adapter_metadata"])["transformer.target_modules"]
        assert layers == sorted(layers) and len(layers) > 5 and not any(key.endswith(".alpha") for key in file.keys())


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_commands(kind, run, pipeline, tmp_path, capsys):
    """The three of the docstring: a LoRA, a full fine-tune, and a DoRA that has to be merged."""
    script = "train_sd3_soar" if kind == "full" else "train_sd3_soar_lora"
    out = run(script, *(["--use_dora"] if kind == "dora" else []), "--learning_rate", 1e-2)
    file = tmp_path / "converted.safetensors"
    if kind == "dora":
        with pytest.raises(SystemExit):
            convert_for_ui.main([str(out), str(file)])
        assert "a DoRA cannot be told in these names: merge it, by --merge_into" in capsys.readouterr().err
        assert not file.exists()
        convert_for_ui.main([str(out), str(file), "--merge_into", str(pipeline)])
        wanted = {name: t.bfloat16() for name, t in convert_for_ui.convert_transformer(merged(pipeline, out)).items()}
    else:
        convert_for_ui.main([str(out), str(file)])
        convert = convert_for_ui.convert_transformer if kind == "full" else convert_for_ui.convert_lora
        wanted = convert(weights(out))
    found = load_file(file)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(SystemExit):
        convert_for_ui.main([str(out), str(file)])
    assert "give a new file" in capsys.readouterr().err


def test_a_lora_on_a_full_fine_tune_is_merged_into_it(run, pipeline, tmp_path):
    """`--transformer` names what the LoRA was trained on; neither is in the pipeline."""
    full = run("train_sd3_sft", "--learning_rate", 1e-2, "--output_dir", tmp_path / "full")
    flags = ("--transformer", full, "--rank", 2, "--learning_rate", 1e-2, "--output_dir", tmp_path / "lora")
    lora, file = run("train_sd3_soar_lora", *flags, "--trajectory_length", 1), tmp_path / "merged.safetensors"
    convert_for_ui.main([str(lora), str(file), "--merge_into", str(pipeline), "--transformer", str(full)])
    pipe = StableDiffusion3Pipeline.from_pretrained(
        pipeline, transformer=SD3Transformer2DModel.from_pretrained(full, subfolder="transformer")
    )
    pipe.load_lora_weights(lora)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    wanted, found = convert_for_ui.convert_transformer(pipe.transformer.state_dict()), load_file(file)
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in wanted.items())
    base, tuned = weights_of(pipeline), weights_of(full)
    key = "joint_blocks.1.x_block.attn.qkv.weight"
    assert not torch.equal(found[key], tuned[key].bfloat16()) and not torch.equal(found[key], base[key].bfloat16())
    key = "final_layer.linear.bias"  # which has no LoRA
    assert torch.equal(found[key], tuned[key].bfloat16()) and not torch.equal(found[key], base[key].bfloat16())


def test_a_model_in_several_files(pipeline, tmp_path):
    """All of them are read."""
    transformer = SD3Transformer2DModel.from_pretrained(pipeline, subfolder="transformer")
    transformer.save_pretrained(tmp_path / "model" / "transformer", max_shard_size="200KB")
    assert len(list((tmp_path / "model" / "transformer").glob("*.safetensors"))) > 2
    convert_for_ui.main([str(tmp_path / "model"), str(tmp_path / "x.safetensors")])
    found, wanted = load_file(tmp_path / "x.safetensors"), weights_of(pipeline)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.fixture
def refused(capsys):
    """What the script says to arguments that it refuses: one line beside the usage."""

    def run_script(*arguments):
        with pytest.raises(SystemExit) as exit:
            convert_for_ui.main(list(map(str, arguments)))
        *usage, line = capsys.readouterr().err.splitlines()
        assert exit.value.code in (1, 2) and "error: " in line and not any("error" in other for other in usage)
        return line

    return run_script


def test_a_file_of_something_else(tmp_path, refused):
    """Is named with what is wrong in it, and nothing is written: not even a file without tensors."""
    layer, small = "transformer.transformer_blocks.0.attn.to_q", torch.zeros(2, 2)
    down, up = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
    loras = {
        "is not there": {down: small},
        "no layer of a Stable Diffusion 3 transformer: text_encoder": {
            f"text_encoder.x.lora_{c}.weight": small for c in "AB"
        },
        f"{layer}.alpha is no tensor of a LoRA in diffusers' names": {down: small, up: small, f"{layer}.alpha": small},
        "lokr_w1 is no tensor": {"lycoris_transformer_blocks_0_attn_to_q.lokr_w1": small},
        "lora_down.weight is no tensor": {"lora_unet_joint_blocks_0_x_block_attn_proj.lora_down.weight": small},
        "holds no LoRA": {},
    }
    models = {
        "no layer of a Stable Diffusion 3 transformer": {"blocks.0.weight": small},
        "transformer_blocks.0.norm1.linear.weight is not there": {"transformer_blocks.0.norm1.linear.bias": small[0]},
    }
    lora, model = tmp_path / "lora", tmp_path / "model"
    for source, file, contents in (
        (lora, lora / "pytorch_lora_weights.safetensors", loras),
        (model, model / "transformer" / "model.safetensors", models),
    ):
        file.parent.mkdir(parents=True)
        for message, state in contents.items():
            save_file({name: tensor.clone() for name, tensor in state.items()}, file)
            said = refused(source, tmp_path / "out.safetensors")
            assert message in said and str(source) in said
        file.write_bytes(b"nonsense")
        assert str(source) in refused(source, tmp_path / "out.safetensors")
    assert "no such folder" in refused(tmp_path / "x", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_where_the_output_goes(run, pipeline, tmp_path, refused, monkeypatch):
    """Its folder is made; where it cannot be, or the name cannot be written, that is said before weights are read."""
    run("train_sd3_soar_lora", "--output_dir", tmp_path / "lora", "--max_train_steps", 1)
    convert_for_ui.main([str(tmp_path / "lora"), str(tmp_path / "new" / "folder" / "x.safetensors")])
    assert load_file(tmp_path / "new" / "folder" / "x.safetensors")
    assert str(tmp_path / ("x" * 250)) in refused(tmp_path / "lora", tmp_path / f"{'x' * 250}.safetensors")
    for name in ("load_file", "load_trained"):
        monkeypatch.setattr(convert_for_ui, name, lambda *_: pytest.fail("weights were read"))
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "x.safetensors"
    for more in ([], ["--merge_into", pipeline]):
        assert str(tmp_path / "file") in refused(tmp_path / "lora", output, *more)
    output, flag = tmp_path / "x.safetensors", ["--transformer", pipeline]
    assert "--transformer" in refused(tmp_path / "lora", output, *flag)  # nothing is merged
    assert "--transformer" in refused(pipeline, output, "--merge_into", pipeline, *flag)  # no LoRA


def test_a_pipeline_that_is_none_is_named(run, tmp_path, refused):
    run("train_sd3_soar_lora", "--output_dir", tmp_path / "lora", "--max_train_steps", 1)
    (tmp_path / "empty").mkdir()
    said = refused(tmp_path / "lora", tmp_path / "x.safetensors", "--merge_into", tmp_path / "empty")
    assert f"--merge_into {tmp_path / 'empty'}" in said and len(said) < 1000


@pytest.mark.parametrize("dtype", [None, "fp16", "fp32"])
@pytest.mark.parametrize("script", ["train_sd3_soar", "train_sd3_soar_lora"])
def test_a_result_is_one_file_of_its_type(dtype, script, run, tmp_path):
    """bf16 after mixed precision unless another is asked for; checkpoints keep float32."""
    flags = ["--save_dtype", dtype] if dtype else []
    out = run(script, "--mixed_precision", "bf16", "--checkpointing_steps", 2, *flags)
    wanted = {None: torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    assert {tensor.dtype for tensor in weights(out).values()} == {wanted}
    assert {tensor.dtype for tensor in weights(out / "checkpoint-2").values()} == {torch.float32}
    found, trained = weights(out), weights(out / "checkpoint-2")
    assert all(torch.equal(found[name], trained[name].to(wanted)) for name in found)
    if script == "train_sd3_soar":
        assert [path.name for path in sorted((out / "transformer").iterdir())] == [
            "config.json",
            "diffusion_pytorch_model.safetensors",
        ]
        assert "pos_embed.pos_embed" in found and np.isfinite(found["pos_embed.pos_embed"].float().numpy()).all()
