# SPDX-License-Identifier: Apache-2.0
"""Every flag of every script changes what it says, and nothing that it should leave alone."""

import ast
import importlib
import itertools
import json
import logging
import math
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
import torchao.optim
from accelerate import PartialState
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
)
from diffusers.models.attention import JointTransformerBlock
from diffusers.training_utils import EMAModel
from harness import ROOT, SCRIPTS, cached, equal, finish, start_two, weights
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


SFT, SOAR, LORA = SCRIPTS
COVERED = set()


def covers(*flags):
    """Mark a test as the one that shows what these flags do."""
    COVERED.update(flags)
    return lambda test: test


# Flags that a test of another file shows at work.
ELSEWHERE = {
    "--pretrained_model_name_or_path": "test_bad_input.test_model_that_does_not_exist",
    "--dataset_name": "test_data.test_dataset_name",
    "--dataset_config_name": "test_data.test_dataset_config_name",
    "--dataset_split": "test_data.test_dataset_split",
    "--train_data_dir": "test_data.test_train_data_dir",
    "--jsonl_path": "test_data.test_authors_format",
    "--image_dir": "test_data.test_authors_format",
    "--image_column": "test_data.test_dataset_name",
    "--caption_column": "test_data.test_dataset_name",
    "--instance_prompt": "test_data.test_instance_prompt",
    "--max_train_samples": "test_data.test_max_train_samples",
    "--skip_bad_images": "test_bad_input.test_undecodable_image",
    "--center_crop": "test_data.test_center_crop",
    "--random_flip": "test_data.test_random_flip",
    "--use_aspect_ratio_buckets": "test_data.test_aspect_ratio_buckets",
    "--aspect_ratio_buckets": "test_data.test_aspect_ratio_buckets",
    "--cache_dir": "test_data.test_caches_are_keyed_by_content",
    "--cache_batch_size": "test_data.test_cache_batch_size",
    "--check_images": "test_data.test_images_are_looked_at_once",
    "--overwrite_output_dir": "test_bad_input.test_another_run_is_not_written_over",
    "--max_skipped_steps": "test_faults.test_steps_that_are_not_finite_may_be_skipped",
    "--push_to_hub": "test_hub.test_what_is_uploaded",
    "--hub_model_id": "test_hub.test_what_is_uploaded",
    "--hub_private": "test_hub.test_what_is_uploaded",
    "--hub_token": "test_hub.test_what_is_uploaded",
    "--min_image_side": "test_data.test_min_image_side",
    "--allow_resume_changes": "test_faults.test_changes_that_are_meant",
}


def flags_of(script, monkeypatch):
    module, parsers = importlib.import_module(script), []
    with monkeypatch.context() as patch:
        patch.setattr(module, "check_args", lambda parser, args: parsers.append(parser))
        module.parse_args(["--pretrained_model_name_or_path", "x"])
    return {action.option_strings[0] for action in parsers[0]._actions} - {"-h"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_test(script, monkeypatch):
    flags = flags_of(script, monkeypatch)
    assert len(flags) > 60
    assert not flags - COVERED - ELSEWHERE.keys()
    assert not ELSEWHERE.keys() - flags and not ELSEWHERE.keys() & COVERED
    for flag, place in ELSEWHERE.items():
        file, name = place.split(".")
        source = (ROOT / "tests" / f"{file}.py").read_text()
        (test,) = (node for node in ast.parse(source).body if getattr(node, "name", "") == name)
        assert flag in ast.unparse(test)


# Flags that change what is trained, by themselves: a resumed run must have them as they were.
FIXED_ON_RESUME = """
    adam_beta1 adam_beta2 adam_epsilon adam_weight_decay allow_tf32 aspect_ratio_buckets bnb_quantization_config_path
    cache_latents center_crop cfg_scale_sampling cond_dropout_rate ema_decay full_bf16 lambda_aux learning_rate
    logit_mean logit_std lora lora_alpha lora_blocks lora_dropout lora_layers lr_num_cycles lr_power lr_scheduler
    lr_step_rules lr_warmup_steps max_grad_norm max_sequence_length mixed_precision mode_scale no_text_encoder_3
    num_rollout_paths num_sampling_steps optimizer pretrained_model_name_or_path prodigy_beta3 prodigy_decouple
    prodigy_safeguard_warmup prodigy_use_bias_correction random_flip rank resolution revision sde_noise_scale
    sde_rollout_type seed sigma_upper_ratio train_batch_size trajectory_length use_8bit_adam use_aspect_ratio_buckets
    transformer use_dora use_ema variant weighting_scheme
""".split()


def test_every_flag_is_free_or_fixed_on_resume(monkeypatch):
    """And no other names are in the lists."""
    flags = {flag.strip("-") for script in SCRIPTS for flag in flags_of(script, monkeypatch)}
    for script in SCRIPTS:
        free = importlib.import_module(script).FREE_ON_RESUME
        packages = {"accelerate", "diffusers", "torch", "transformers"}
        assert flags | packages == {*free} | {*FIXED_ON_RESUME} and not {*free} & {*FIXED_ON_RESUME}


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_free_flags_may_differ_on_resume(script, monkeypatch):
    """Each by itself, also against a checkpoint of before the flag was there; the message has both values."""
    module = importlib.import_module(script)
    names = {flag.strip("-") for flag in flags_of(script, monkeypatch)} - {"hub_token"}
    values = dict.fromkeys(names, 1) | {"lr_scheduler": "constant"}
    values["allow_resume_changes"] = None
    before = {"compared": values, "step": 1, "changes": []}
    PartialState()
    for name in names:
        changed = {"compared": values | {name: "constant_with_warmup"}}
        absent = {"compared": {key: value for key, value in values.items() if key != name}}
        for saved, now in ((before, before | changed), (before | absent, before)):
            if name in module.FREE_ON_RESUME:
                module.check_resume("there", saved, now)
                continue
            was = saved["compared"].get(name)
            with pytest.raises(SystemExit, match=f"{name} was {was} there and is {now['compared'][name]} now"):
                module.check_resume("there", saved, now)


@pytest.fixture(scope="module")
def photos(small_photos):
    """Decoding large photographs would take most of the time here."""
    return small_photos


DEFAULT_RUNS = {}


@pytest.fixture
def default(run, pipeline, tmp_path_factory):
    """A function that makes a run once for all tests of this file, and returns its folder."""

    def make(script, *arguments):
        key = (script, *map(str, arguments))
        if key not in DEFAULT_RUNS:
            folder = tmp_path_factory.mktemp("default") / "out"
            DEFAULT_RUNS[key] = run(script, *arguments, "--output_dir", folder)
        return DEFAULT_RUNS[key]

    make.pipeline = pipeline
    return make


@pytest.fixture
def forwards(monkeypatch):
    """The transformer's calls: its inputs and its `output`, and whether it had `grad`."""
    calls, forward = [], SD3Transformer2DModel.forward

    def see(self, **inputs):
        (output,) = forward(self, **inputs)
        calls.append(inputs | {"output": output.detach(), "grad": torch.is_grad_enabled()})
        return (output,)

    monkeypatch.setattr(SD3Transformer2DModel, "forward", see)
    return calls


def seen(monkeypatch, owner, name):
    """Record the calls of a function, as tuples of its arguments and result."""
    calls, function = [], getattr(owner, name)

    def see(*inputs, **more):
        result = function(*inputs, **more)
        calls.append((inputs, more, result))
        return result

    monkeypatch.setattr(owner, name, see)
    return calls


def close(one, other, tolerance):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=tolerance)


# Flags of which other trained weights are the effect: (script, arguments of both runs, flag and value of the second).
TWO_PATHS = ("--num_rollout_paths", 2, "--trajectory_length", 1)
PRODIGY = ("--optimizer", "prodigy", "--learning_rate", 1, "--max_train_steps", 6)
CHANGES = [
    (SFT, (), ("--seed", 1)),
    (SFT, (), ("--resolution", 48)),
    (SFT, (), ("--max_sequence_length", 8)),
    (SFT, (), ("--no_text_encoder_3",)),
    (SFT, (), ("--cond_dropout_rate", 0.9)),
    (SFT, (), ("--center_crop",)),
    (SFT, (), ("--random_flip",)),
    (SFT, (), ("--max_train_samples", 3)),
    (SFT, (), ("--aspect_ratio_buckets", "32,48;48,32")),
    (SFT, (), ("--mixed_precision", "bf16")),
    (SFT, (), ("--train_batch_size", 3)),
    (SFT, (), ("--gradient_accumulation_steps", 2)),
    (SFT, (), ("--max_train_steps", 3)),
    (SFT, (), ("--learning_rate", 1e-2)),
    (SFT, (), ("--adam_beta1", 0.5)),
    (SFT, (), ("--adam_beta2", 0.5)),
    (SFT, (), ("--adam_weight_decay", 0.9)),
    (SFT, (), ("--adam_epsilon", 0.1)),
    (SFT, (), ("--max_grad_norm", 0.01)),
    (SFT, (), ("--optimizer", "prodigy")),
    (SFT, PRODIGY, ("--no-prodigy_decouple",)),
    (SFT, PRODIGY, ("--no-prodigy_use_bias_correction",)),
    (SFT, (), ("--use_ema",)),
    (SFT, ("--use_ema",), ("--ema_decay", 0.1)),
    (SFT, (), ("--weighting_scheme", "none")),
    (SFT, (), ("--weighting_scheme", "sigma_sqrt")),
    (SFT, (), ("--weighting_scheme", "mode")),
    (SFT, (), ("--weighting_scheme", "cosmap")),
    (SFT, (), ("--logit_mean", 1)),
    (SFT, (), ("--logit_std", 2)),
    (SFT, ("--weighting_scheme", "mode"), ("--mode_scale", 0.5)),
    (SOAR, (), ("--lambda_aux", 0.5)),
    (SOAR, (), ("--trajectory_length", 2)),
    (SOAR, (), ("--num_rollout_paths", 2)),
    (SOAR, (), ("--num_sampling_steps", 5)),
    (SOAR, (), ("--cfg_scale_sampling", 2)),
    (SOAR, (), ("--sigma_upper_ratio", 1.5)),
    (SOAR, TWO_PATHS, ("--sde_rollout_type", "simple")),
    (SOAR, TWO_PATHS, ("--sde_rollout_type", "sde")),
    (SOAR, TWO_PATHS, ("--sde_rollout_type", "cps")),
    (SOAR, TWO_PATHS, ("--sde_noise_scale", 0.2)),
    (LORA, (), ("--lora_alpha", 8)),
    (LORA, (), ("--lora_dropout", 0.5)),
]
COVERED |= {flag for *_, (flag, *_) in CHANGES if not flag.startswith("--no-")} - ELSEWHERE.keys()


@pytest.mark.parametrize(("script", "base", "change"), CHANGES, ids=str)
def test_flag_changes_the_weights(script, base, change, default, run):
    """And the same command gives the same weights: the difference is the flag's."""
    one, other = default(script, *base), run(script, *base, *change)
    assert not equal(one, other)
    assert all(tensor.isfinite().all() for tensor in weights(other).values())


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_same_command_gives_the_same_weights(script, default, run):
    assert equal(default(script), run(script))


# Model


@covers("--gradient_checkpointing")
@pytest.mark.parametrize("script", SCRIPTS)
def test_gradient_checkpointing(script, default, run, monkeypatch):
    """Activations are computed again, to the same gradients, dropout included."""
    more = ("--lora_dropout", 0.5) if script == LORA else ()
    base = default(script, *more)
    started, forward = [], JointTransformerBlock.forward
    monkeypatch.setattr(
        JointTransformerBlock, "forward", lambda *inputs, **more: started.append(1) or forward(*inputs, **more)
    )
    assert equal(run(script, *more), base)
    count = len(started)
    out = run(script, *more, "--gradient_checkpointing", "--overwrite_output_dir")
    close(out, base, 1e-6)
    assert len(started) - count > 1.5 * count


@covers("--torch_compile")
@pytest.mark.parametrize(
    ("script", "flags", "kinds"),
    [
        (SFT, "", 2),  # blocks with a second attention, and the last, which has no text output
        (
            SOAR,
            "--gradient_checkpointing --aspect_ratio_buckets 32,48;48,64 --mixed_precision bf16",
            2 + 2,
        ),  # no grad
        (LORA, "--gradient_checkpointing --aspect_ratio_buckets 32,48;48,64 --lora_dropout 0.1", 3 + 2),
        # The first block of a frozen base has an input without gradient.
    ],
)
def test_torch_compile(script, flags, kinds, default, run, compiled):
    """Every kind of block is one graph, compiled once a size, to the result of the uncompiled run."""
    arguments = (*flags.split(), "--adam_epsilon", 1e-3, "--max_train_steps", 8)  # two epochs
    base = default(script, *arguments)
    assert not compiled
    close(run(script, *arguments, "--torch_compile"), base, 1e-3 if "bf16" in flags else 1e-5)
    assert len(compiled) == kinds * (2 if flags else 1)
    assert not torch._dynamo.config.optimize_ddp
    assert not torch._dynamo.utils.counters["graph_break"]


def test_torch_compile_with_the_real_compiler(default, run):
    """And with the default one, which needs a C++ compiler or a GPU."""
    torch.compiler.reset()
    arguments = ("--adam_epsilon", 1e-3)
    close(run(SFT, *arguments, "--torch_compile"), default(SFT, *arguments), 1e-5)
    graphs = torch._dynamo.utils.counters["inductor"]
    assert graphs["fxgraph_cache_miss"] + graphs["fxgraph_cache_hit"] > 0


@covers("--allow_tf32")
def test_allow_tf32(run):
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        run(SFT, "--allow_tf32", "--max_train_steps", 1)
        assert torch.backends.cuda.matmul.allow_tf32
        run(SFT, "--max_train_steps", 1, "--overwrite_output_dir")
        assert not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("script", [SFT, LORA])
@covers("--mixed_precision")
def test_mixed_precision(script, run, forwards, monkeypatch):
    """The model computes in bf16; latents, targets and the trained weights stay float32."""
    encoders = seen(monkeypatch, importlib.import_module(script), "load_text_encoders")
    out = run(script, "--mixed_precision", "bf16", "--checkpointing_steps", 2)
    assert {call["hidden_states"].dtype for call in forwards} == {torch.float32}
    assert {tensor.dtype for tensor in weights(out / "checkpoint-2").values()} == {torch.float32}
    assert encoders[-1][2].text_encoder.dtype == torch.bfloat16
    run(script, "--mixed_precision", "no", "--overwrite_output_dir")
    assert encoders[-1][2].text_encoder.dtype == torch.float32


@covers("--variant")
def test_variant(run, pipeline, tmp_path):
    """Weight files of that variant are read, the only ones there."""
    model = tmp_path / "model"
    pipe = StableDiffusion3Pipeline.from_pretrained(pipeline)
    with torch.no_grad():
        pipe.transformer.proj_out.bias += 1
    pipe.save_pretrained(model, variant="fp16")
    out = run(LORA, "--pretrained_model_name_or_path", model, "--variant", "fp16")
    plain = run(LORA, "--output_dir", tmp_path / "plain")
    assert not equal(out, plain)
    with pytest.raises(SystemExit, match=f"--pretrained_model_name_or_path {model}"):
        run(LORA, "--pretrained_model_name_or_path", model, "--output_dir", tmp_path / "without")


@pytest.mark.parametrize("parts", [["text_encoder", "text_encoder_3"], ["transformer"], ["vae"]], ids=str)
@pytest.mark.parametrize("script", [SFT, LORA])
def test_variant_of_some_parts(script, parts, run, default, pipeline, tmp_path):
    """As a pipeline loads it: files of the variant where there are some, the usual ones elsewhere."""
    model = tmp_path / "model"
    shutil.copytree(pipeline, model)
    for part in parts:
        (file,) = (model / part).glob("*.safetensors")
        file.rename(file.with_suffix(".fp16.safetensors"))
    StableDiffusion3Pipeline.from_pretrained(model, variant="fp16")
    assert equal(run(script, "--pretrained_model_name_or_path", model, "--variant", "fp16"), default(script))


@pytest.mark.parametrize("script", [SFT, LORA])
def test_the_variant_is_of_the_model(script, run, default, pipeline, tmp_path):
    """And not of --transformer, of which a folder may have another variant of another training."""
    model, tuned = tmp_path / "model", default(SFT)
    shutil.copytree(pipeline, model)
    (file,) = (model / "vae").glob("*.safetensors")
    file.rename(file.with_suffix(".fp16.safetensors"))
    shutil.copytree(tuned, tmp_path / "tuned")
    name = "transformer/diffusion_pytorch_model"
    shutil.copy(pipeline / f"{name}.safetensors", tmp_path / "tuned" / f"{name}.fp16.safetensors")
    flags = ("--pretrained_model_name_or_path", model, "--variant", "fp16", "--transformer", tmp_path / "tuned")
    assert equal(run(script, *flags), default(script, "--transformer", tuned))


SCHEDULERS = [
    (DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0), True),
    (UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0), True),
    (FlowMatchHeunDiscreteScheduler(shift=3.0), True),
    (DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0), False),
    (FlowMatchEulerDiscreteScheduler(shift=2.0), False),
]


@pytest.mark.parametrize(("scheduler", "same"), SCHEDULERS, ids=lambda value: type(value).__name__)
def test_the_shift_of_any_sampler(scheduler, same, run, default, pipeline, tmp_path):
    """The noise levels of training and of validation are those of a pipeline that was saved with another sampler."""
    model, arguments = tmp_path / "model", (SFT, "--validation_prompt", "a cat")
    shutil.copytree(pipeline, model)
    StableDiffusion3Pipeline.from_pretrained(pipeline, scheduler=scheduler).save_pretrained(model)
    base, out = default(*arguments), run(*arguments, "--pretrained_model_name_or_path", model)
    assert equal(out, base) == same
    first, second = (np.asarray(Image.open(folder / "samples" / "0-0.png")) for folder in (base, out))
    assert np.array_equal(first, second) == same
    # And the levels of validation by themselves: with the same weights.
    run(*arguments, "--pretrained_model_name_or_path", model, "--learning_rate", 0, "--output_dir", tmp_path / "zero")
    first, second = (
        np.asarray(Image.open(folder / "samples" / "0-0.png"))
        for folder in (default(*arguments, "--learning_rate", 0), tmp_path / "zero")
    )
    assert np.array_equal(first, second) == same


@covers("--revision")
def test_revision(run, pipeline, tmp_path, monkeypatch):
    """A model of the hub, in its local cache, at a revision with other weights."""
    repo = tmp_path / "hub" / "models--someone--tiny"
    (repo / "refs").mkdir(parents=True)
    commits = {"main": "0" * 40, "second": "1" * 40}
    for name, commit in commits.items():
        (repo / "refs" / name).write_text(commit)
        shutil.copytree(pipeline, repo / "snapshots" / commit)
    transformer = SD3Transformer2DModel.from_pretrained(pipeline, subfolder="transformer")
    with torch.no_grad():
        transformer.proj_out.bias += 1
    transformer.save_pretrained(repo / "snapshots" / commits["second"] / "transformer")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in commits:
        revision = ("--revision", name) if name != "main" else ()
        hub = run(LORA, "--pretrained_model_name_or_path", "someone/tiny", *revision, "--output_dir", tmp_path / name)
        folder = repo / "snapshots" / commits[name]
        local = run(LORA, "--pretrained_model_name_or_path", folder, "--output_dir", tmp_path / f"{name}-local")
        assert equal(hub, local)
    assert not equal(tmp_path / "main", tmp_path / "second")


@covers("--no_text_encoder_3", "--max_sequence_length")
def test_text_of_the_transformer(run, forwards, monkeypatch):
    """77 CLIP tokens and --max_sequence_length of T5; zeros in the place of T5 without it, which is not loaded."""
    encoders = seen(monkeypatch, importlib.import_module(SFT), "load_text_encoders")
    run(SFT, "--max_train_steps", 1, "--max_sequence_length", 24)
    assert forwards[0]["encoder_hidden_states"].shape[1] == 77 + 24
    assert forwards[0]["encoder_hidden_states"][:, 77:].abs().max() > 0
    assert encoders[-1][2].text_encoder_3 is not None
    run(SFT, "--max_train_steps", 1, "--no_text_encoder_3", "--overwrite_output_dir")
    assert (forwards[1]["encoder_hidden_states"][:, 77:] == 0).all()
    assert encoders[-1][2].text_encoder_3 is None


@covers("--transformer")
def test_transformer(run, default, tmp_path, caplog):
    """SFT, SOAR after it, and a LoRA on that: three commands, each from the result of the one before."""
    caplog.set_level(logging.INFO)
    sft, lower = default(SFT), ("--learning_rate", 0)
    soar = run(SOAR, "--transformer", sft, *lower, "--output_dir", tmp_path / "soar")
    assert equal(soar, sft) and not equal(sft, default(SFT, *lower))
    trained = run(SOAR, "--transformer", sft, "--output_dir", tmp_path / "trained", "--checkpointing_steps", 1)
    assert not equal(trained, soar)
    card = (trained / "README.md").read_text()
    assert f"Trained from `{default.pipeline}`, `{sft}` with" in card
    shutil.copytree(trained / "checkpoint-1", tmp_path / "resumed" / "checkpoint-1")
    more = ("--resume_from_checkpoint", "latest", "--output_dir", tmp_path / "resumed")
    assert equal(run(SOAR, "--transformer", sft, *more), trained)

    lora = run(LORA, "--transformer", trained, "--output_dir", tmp_path / "lora", "--learning_rate", 1e-2)
    assert not equal(lora, default(LORA, "--learning_rate", 1e-2))
    # The card's own lines make the pipeline: of the base, with that transformer and the LoRA on it.
    code = (lora / "README.md").read_text().split("```python\n")[1].split("pipeline.load_lora")[0]
    names = {}
    exec(code, names)
    state = names["pipeline"].transformer.state_dict()
    assert all(torch.equal(tensor.bfloat16(), state[name]) for name, tensor in weights(trained).items())


# Data


@covers("--resolution")
def test_resolution(run, forwards, default, tmp_path):
    """In pixels, of training and of the validation images."""
    arguments = ("--validation_prompt", "a cat", "--max_train_steps", 1)
    for resolution in (32, 48):
        out = run(SFT, "--resolution", resolution, *arguments, "--output_dir", tmp_path / str(resolution))
        assert Image.open(out / "samples" / "0-0.png").size == (resolution, resolution)
        assert forwards[0]["hidden_states"].shape[2:] == (resolution // 8, resolution // 8)
        forwards.clear()


@covers("--cond_dropout_rate")
def test_caption_dropout(run, forwards, photos, tmp_path):
    """Each sample by itself: batches hold both kinds, a rate of 1 is training on empty captions, 0 drops none."""
    arguments = (SFT, "--train_batch_size", 4, "--max_train_steps", 16)
    run(*arguments, "--cond_dropout_rate", 0.5, "--output_dir", tmp_path / "half")
    embeds = [call["encoder_hidden_states"] for call in forwards]
    every = torch.cat(embeds)
    null = max(every, key=lambda embed: sum(torch.equal(embed, other) for other in every))
    dropped = [[torch.equal(embed, null) for embed in batch] for batch in embeds]
    assert 18 < sum(map(sum, dropped)) < 46
    assert sum(0 < sum(batch) < 4 for batch in dropped) > 8
    pooled = torch.cat([call["pooled_projections"] for call in forwards])[torch.tensor(dropped).flatten()]
    assert (pooled == pooled[0]).all()

    folder = tmp_path / "without"
    shutil.copytree(photos, folder)
    lines = [json.loads(line) | {"text": " "} for line in (folder / "metadata.jsonl").read_text().splitlines()]
    lines[0]["text"] = "kept, so that the data set is not without captions"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    forwards.clear()
    run(*arguments[:-1], 1, "--cond_dropout_rate", 1, "--output_dir", tmp_path / "one")
    assert all(torch.equal(embed, null) for embed in forwards[0]["encoder_hidden_states"])
    forwards.clear()
    run(*arguments[:-1], 4, "--cond_dropout_rate", 0, "--output_dir", tmp_path / "none")
    assert not any(torch.equal(embed, null) for call in forwards for embed in call["encoder_hidden_states"])


@covers("--cache_latents", "--cache_prompt_embeds")
@pytest.mark.parametrize(
    ("flag", "kind"), [("--cache_latents", "latents"), ("--cache_prompt_embeds", "prompt_embeds")]
)
def test_caches(flag, kind, run, default):
    """Written to OUTPUT_DIR/cache, to the same result."""
    base = default(SFT, "--center_crop", "--adam_epsilon", 1e-3)
    out = run(SFT, "--center_crop", f"--cache_{kind}", "--adam_epsilon", 1e-3)
    close(out, base, 1e-5)
    assert {folder.name for folder in (out / "cache").iterdir()} == {"checks", kind}
    assert len(cached(out / "cache" / kind)) in (8, 9)


@covers("--offload")
def test_offload(default, run, monkeypatch):
    """The VAE waits on the CPU, the text encoders visit the device layer by layer, and the result is the same."""
    moves = seen(monkeypatch, AutoencoderKL, "to")
    layers = seen(monkeypatch, importlib.import_module(SFT), "apply_group_offloading")
    assert equal(default(SFT), run(SFT, "--offload"))
    assert "cpu" in [where for (_, *to), _, _ in moves for where in to if isinstance(where, str)]
    assert [type(inputs[0]).__name__ for inputs, _, _ in layers] == ["CLIPTextModelWithProjection"] * 2 + [
        "T5EncoderModel"
    ]
    assert all(inputs[1] == torch.device("cpu") and more["offload_type"] == "leaf_level" for inputs, more, _ in layers)
    for flag in ("--cache_prompt_embeds", "--cache_latents"):
        out = run(SFT, "--center_crop", "--offload", flag, "--adam_epsilon", 1e-3, "--overwrite_output_dir")
        close(out, default(SFT, "--center_crop", "--adam_epsilon", 1e-3), 1e-5)
    moves.clear(), layers.clear()
    run(SFT, "--overwrite_output_dir")
    assert not layers and not [where for (_, *to), _, _ in moves for where in to if isinstance(where, str)]


@covers("--dataloader_num_workers")
def test_dataloader_num_workers(default, run, monkeypatch):
    """Other processes read the images, to the same result."""
    loaders = seen(monkeypatch, importlib.import_module(SFT), "make_dataloader")
    assert equal(default(SFT, "--random_flip"), run(SFT, "--random_flip", "--dataloader_num_workers", 2))
    assert loaders[-1][2].num_workers == 2


# Training


@covers("--output_dir")
@pytest.mark.parametrize("script", SCRIPTS)
def test_default_output_dir(script, run, tmp_path, monkeypatch):
    """Named after the method; everything is written below it."""
    monkeypatch.chdir(tmp_path)
    run(script, "--output_dir", "here")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    args = importlib.import_module(script).parse_args(
        ["--pretrained_model_name_or_path", "x", "--train_data_dir", str(tmp_path / "here")]
    )
    assert args.output_dir == script.removeprefix("train_").replace("_", "-")


@covers("--seed")
def test_seed_is_drawn_and_logged(run, caplog, tmp_path):
    """Another run each time without the flag, which can be repeated with the seed that was logged."""
    caplog.set_level(logging.INFO)
    one, other = (run(SFT, "--output_dir", tmp_path / name, omit=["--seed"]) for name in ("one", "other"))
    assert not equal(one, other)
    seed = json.loads((one / "training_args.json").read_text())["seed"]
    assert f"Seed {seed}" in caplog.text
    assert equal(one, run(SFT, "--seed", seed, "--output_dir", tmp_path / "again"))


@covers("--gradient_accumulation_steps", "--train_batch_size")
@pytest.mark.parametrize("script", SCRIPTS)
def test_accumulation_is_a_larger_batch(script, run, forwards, tmp_path):
    """Two batches of two are one batch of four, in the gradient and in the number of samples."""
    arguments = (script, "--adam_epsilon", 1e-2, "--cond_dropout_rate", 0.3)
    one = run(*arguments, "--train_batch_size", 4, "--output_dir", tmp_path / "one")
    assert max(len(call["hidden_states"]) for call in forwards) == 4
    forwards.clear()
    other = run(*arguments, "--gradient_accumulation_steps", 2, "--output_dir", tmp_path / "other")
    assert max(len(call["hidden_states"]) for call in forwards) == 2
    close(one, other, 1e-5)


@covers("--num_train_epochs", "--max_train_steps")
def test_length_of_the_run(run, logged, tmp_path):
    """Eight photographs in batches of two: four steps an epoch; --max_train_steps counts where it is given."""
    for epochs in (1, 2):
        logged.clear()
        run(SFT, "--num_train_epochs", epochs, "--output_dir", tmp_path / str(epochs), omit=["--max_train_steps"])
        assert [logs["step"] for logs in logged] == list(range(1, 4 * epochs + 1))
    logged.clear()
    run(SFT, "--num_train_epochs", 2, "--max_train_steps", 3)
    assert len(logged) == 3


N, WARMUP = 8, 2


def progress(k):
    return (k - WARMUP) / (N - WARMUP)


SCHEDULES = {
    "constant": (["--lr_warmup_steps", 0], lambda k: 1),
    "constant_with_warmup": ([], lambda k: min(1, k / WARMUP)),
    "linear": ([], lambda k: k / WARMUP if k < WARMUP else 1 - progress(k)),
    "cosine": ([], lambda k: k / WARMUP if k < WARMUP else (1 + math.cos(math.pi * progress(k))) / 2),
    "cosine_with_restarts": (
        ["--lr_num_cycles", 3],
        lambda k: k / WARMUP if k < WARMUP else (1 + math.cos(math.pi * (3 * progress(k) % 1))) / 2,
    ),
    "polynomial": (
        ["--lr_power", 2],
        lambda k: k / WARMUP if k < WARMUP else (1 - 1e-6) * (1 - progress(k)) ** 2 + 1e-6,
    ),
    "piecewise_constant": (
        ["--lr_warmup_steps", 0, "--lr_step_rules", "1:3,0.5:5,0.1"],
        lambda k: 1 if k < 3 else 0.5 if k < 5 else 0.1,
    ),
}


@covers("--lr_scheduler", "--lr_warmup_steps", "--lr_num_cycles", "--lr_power", "--lr_step_rules")
@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rate_schedules(name, run, logged, monkeypatch, tmp_path):
    """The logged rate is the schedule's, from the first step on, and it is the optimizer's."""
    flags, multiple = SCHEDULES[name]
    used, step = [], torch.optim.AdamW.step

    def see(self, *inputs, **more):
        used.append(self.param_groups[0]["lr"])
        return step(self, *inputs, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", see)
    arguments = ("--lr_scheduler", name, "--lr_warmup_steps", WARMUP, "--max_train_steps", N, "--learning_rate", 0.1)
    run(SFT, *arguments, *flags, "--train_batch_size", 1)
    expected = [0.1 * multiple(k) for k in range(N)]
    assert [logs["lr"] for logs in logged] == pytest.approx(expected, abs=1e-9)
    assert used == pytest.approx(expected, abs=1e-9)
    if name in ("cosine_with_restarts", "polynomial"):
        logged.clear()
        run(SFT, *arguments, "--train_batch_size", 1, "--output_dir", tmp_path / "default")
        assert [logs["lr"] for logs in logged] != pytest.approx(expected, abs=1e-9)


@covers("--optimizer", "--use_8bit_adam", "--learning_rate", "--adam_beta1", "--adam_beta2", "--adam_weight_decay")
@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ([], "AdamW"),
        (["--use_8bit_adam"], "AdamW8bit"),
        (["--full_bf16", "--mixed_precision", "bf16"], "AdamW8bit"),
        (["--optimizer", "prodigy"], "Prodigy"),
    ],
)
def test_optimizers(flags, name, run, uncompiled, monkeypatch):
    """Each with its parameters; 8-bit state where the tensor is large enough for it."""
    made = seen(monkeypatch, importlib.import_module(SFT), "make_optimizer")
    values = {"learning_rate": 2e-3, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_weight_decay": 0.1}
    arguments = [word for flag, value in values.items() for word in (f"--{flag}", value)]
    run(SFT, *flags, *arguments, "--adam_epsilon", 1e-6)
    optimizer = made[0][2]
    assert type(optimizer).__name__ == name
    group = optimizer.param_groups[0]
    found = float(group["lr"]), *group["betas"], group["weight_decay"], group["eps"]
    assert found == pytest.approx((2e-3, 0.8, 0.9, 0.1, 1e-6))
    state = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    eight_bit = [getattr(tensor, "codes", tensor).dtype == torch.uint8 for tensor in state]
    assert any(eight_bit) == (name == "AdamW8bit") and not all(eight_bit)


@covers("--prodigy_beta3", "--prodigy_decouple", "--prodigy_use_bias_correction", "--prodigy_safeguard_warmup")
def test_prodigy(run, monkeypatch):
    """Its flags are its arguments; their defaults are those that its authors recommend for diffusion models."""
    made = seen(monkeypatch, importlib.import_module(SFT), "make_optimizer")
    run(SFT, "--optimizer", "prodigy", "--max_train_steps", 1)
    names = ("beta3", "decouple", "use_bias_correction", "safeguard_warmup")
    group = made[0][2].param_groups[0]
    assert [group.get(name) for name in names] == [None, True, True, True]
    flags = ("--no-prodigy_decouple", "--no-prodigy_use_bias_correction", "--no-prodigy_safeguard_warmup")
    run(SFT, *PRODIGY, "--max_train_steps", 1, "--prodigy_beta3", 0.5, *flags, "--overwrite_output_dir")
    group = made[1][2].param_groups[0]
    assert [group.get(name) for name in names] == [0.5, False, False, False]


@pytest.mark.parametrize("script", [SFT, LORA])
def test_the_rate_of_prodigy(script, run, logged, caplog, tmp_path):
    """It multiplies the rate by its own: 1 is the default, the product is logged, and far less is warned of."""
    fast = ["--trajectory_length", 1] if script == LORA else []
    run(script, "--optimizer", "prodigy", "--max_train_steps", 40, *fast, omit=["--learning_rate"])
    arguments = json.loads((tmp_path / "out" / "training_args.json").read_text())
    rates = [values["lr"] for values in logged]
    assert arguments["learning_rate"] == 1 and rates[0] == pytest.approx(1e-6) and rates[-1] > 1e-6
    assert "Prodigy multiplies" not in caplog.text
    run(script, "--optimizer", "prodigy", "--learning_rate", 1e-4, "--output_dir", tmp_path / "low")
    assert "Prodigy multiplies --learning_rate 0.0001 by what it finds; 1 is usual" in caplog.text
    one = (
        "--max_train_steps",
        1,
        "--lr_warmup_steps",
        1,
        "--lr_scheduler",
        "cosine",
        "--output_dir",
        tmp_path / "adamw",
    )
    run(script, *one, omit=["--learning_rate"])
    assert "--lr_warmup_steps 1 outlasts the run of 1 steps" in caplog.text
    default = json.loads((tmp_path / "adamw" / "training_args.json").read_text())["learning_rate"]
    assert default == (1e-4 if script == LORA else 2e-5)


@covers("--max_grad_norm")
def test_max_grad_norm(run, logged, pipeline, tmp_path):
    """The norm is logged as it was before clipping; plain gradients, seen through a huge epsilon, end at the limit."""
    arguments = (SFT, "--adam_epsilon", 1e6, "--adam_weight_decay", 0, "--max_train_steps", 1, "--learning_rate", 1e6)
    free = run(*arguments, "--max_grad_norm", 1e6, "--output_dir", tmp_path / "free")
    clipped = run(*arguments, "--max_grad_norm", 0.01, "--output_dir", tmp_path / "clipped")
    norm = logged[0]["grad_norm"]
    assert norm > 0.1 and logged[1]["grad_norm"] == pytest.approx(norm)
    base, changes = weights(pipeline), []
    for folder in (free, clipped):
        trained = weights(folder)
        changes.append(math.sqrt(sum((trained[n].double() - base[n].double()).square().sum() for n in base)))
    assert changes[1] / changes[0] == pytest.approx(0.01 / norm, rel=0.1)
    assert equal(run(*arguments, "--max_grad_norm", 0, "--output_dir", tmp_path / "zero"), free)  # it does not clip


def noise_levels(forwards):
    return torch.cat([call["timestep"] for call in forwards if call["grad"]]) / 1000


@covers("--logit_mean", "--logit_std", "--mode_scale", "--weighting_scheme")
def test_noise_levels(run, forwards, tmp_path):
    """A positive mean leans to noise (sigma 1), a smaller deviation gathers, `mode` follows its definition."""
    found = {}
    for flags in ("--logit_mean 1", "--logit_mean -1", "--logit_std 0.1", "--logit_std 2", "--weighting_scheme none"):
        forwards.clear()
        run(SFT, *flags.split(), "--train_batch_size", 8, "--max_train_steps", 12, "--output_dir", tmp_path / flags)
        found[flags] = noise_levels(forwards)
        found[flags] = found[flags] / (3 - 2 * found[flags])  # without the shift
    assert found["--logit_mean 1"].mean() == pytest.approx(0.70, abs=0.06)
    assert found["--logit_mean -1"].mean() == pytest.approx(0.30, abs=0.06)
    assert found["--logit_std 0.1"].std() < 0.05 and found["--logit_std 2"].std() > 0.25
    assert found["--weighting_scheme none"].mean() == pytest.approx(0.5, abs=0.09)
    for scale in (0.5, 1.29):
        forwards.clear()
        arguments = ("--weighting_scheme", "mode", "--mode_scale", scale, "--output_dir", tmp_path / f"mode{scale}")
        run(SFT, *arguments, "--train_batch_size", 8, "--max_train_steps", 12)
        sigma = noise_levels(forwards)
        uniform = found["--weighting_scheme none"]  # the same draws
        expected = 1 - uniform - scale * (torch.cos(math.pi * uniform / 2) ** 2 - 1 + uniform)
        torch.testing.assert_close(sigma / (3 - 2 * sigma), expected.clamp(1e-3, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("script", [SFT, SOAR])
def test_loss_weights(script, run, forwards, logged, tmp_path):
    """`sigma_sqrt` weights by 1 / sigma^2, `cosmap` by 2 / (pi (1 - 2 sigma + 2 sigma^2)), each at its own sigma."""
    weight = {
        "none": torch.ones_like,
        "sigma_sqrt": lambda sigma: sigma**-2,
        "cosmap": lambda sigma: 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2)),
    }
    arguments = ("--train_batch_size", 1, "--max_train_steps", 1)
    arguments += ("--trajectory_length", 1) if script == SOAR else ()
    for scheme in weight:
        run(script, *arguments, "--weighting_scheme", scheme, "--output_dir", tmp_path / scheme)
    sigmas = noise_levels(forwards).view(3, -1)
    assert torch.equal(sigmas[0], sigmas[1]) and torch.equal(sigmas[0], sigmas[2])
    for number, scheme in enumerate(weight):
        factors = weight[scheme](sigmas[0])
        for name, factor in zip(["loss_base", "loss_aux"], factors, strict=False):
            assert logged[number][name] == pytest.approx(logged[0][name] * factor.item(), rel=1e-3)
        terms = [logged[number][name] for name in ["loss_base", "loss_aux"][: len(factors)]]
        assert logged[number]["loss"] == pytest.approx(sum(terms) / len(terms), rel=1e-3)


@pytest.fixture
def uncompiled(monkeypatch):
    """torchao compiles its update for every shape: correct without, and much faster for so small a model."""
    monkeypatch.setattr(torch, "compile", lambda function, **unused: function)


BF16 = ("--full_bf16", "--mixed_precision", "bf16")


@covers("--full_bf16")
@pytest.mark.parametrize("script", [SFT, SOAR])
def test_full_bf16(script, run, default, uncompiled, monkeypatch, tmp_path):
    """Weights, gradients and the result in bf16, the state in 8 bits; on average the steps of the float32 run."""
    optimizers = seen(monkeypatch, importlib.import_module(script), "make_optimizer")
    arguments = ("--mixed_precision", "bf16", "--max_train_steps", 8, "--learning_rate", 1e-4)
    out = run(script, *arguments, "--full_bf16", "--checkpointing_steps", 4)
    optimizer = optimizers[-1][2]
    assert type(optimizer).__module__.startswith("torchao")
    states = {type(state["exp_avg"]).__name__ for state in optimizer.state.values()}
    assert states == {"OptimState8bit", "Tensor"}  # the second for tensors of less than 4096 numbers
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.bfloat16}
    part = run(script, *arguments, "--full_bf16", "--output_dir", tmp_path / "part", "--max_train_steps", 4)
    run(script, *arguments, "--full_bf16", "--output_dir", part, "--resume_from_checkpoint", out / "checkpoint-4")
    assert equal(part, out)

    moved = []
    start = SD3Transformer2DModel.from_pretrained(default.pipeline, subfolder="transformer").state_dict()
    for folder in (out, default(script, *arguments, "--save_dtype", "fp32")):
        moved.append(torch.cat([(w.float() - start[n]).flatten() for n, w in weights(folder).items()]))
    assert moved[0].dot(moved[1]) / moved[1].square().sum() == pytest.approx(1, abs=0.15)


def test_stochastic_rounding_keeps_small_updates(uncompiled, photos):
    """At a learning rate of 2e-5 AdamW in plain bf16 leaves most weights where they are; this one moves the mean."""
    module = importlib.import_module(SFT)
    arguments = f"--pretrained_model_name_or_path x --train_data_dir {photos} --full_bf16 --adam_weight_decay 0"
    args = module.parse_args(arguments.split())
    assert args.learning_rate == 2e-5
    start = 0.02 * torch.randn(4096, generator=torch.Generator().manual_seed(0))  # the size of a network's weights
    start = start.bfloat16()
    steps, moved = 50, {}
    for name in ("float32", "plain", "stochastic"):
        weight = torch.nn.Parameter(start.float() if name == "float32" else start.clone())
        optimizer = torch.optim.AdamW([weight], lr=2e-5, weight_decay=0)
        if name == "stochastic":
            optimizer = module.make_optimizer(args, [weight])
        for step in range(steps):
            torch.manual_seed(step)
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[name] = start.float() - weight.detach().float()
    torch.testing.assert_close(moved["float32"], torch.full((4096,), steps * 2e-5), rtol=1e-2, atol=1e-6)
    assert (moved["plain"] == 0).float().mean() > 0.6
    assert moved["stochastic"].mean() == pytest.approx(steps * 2e-5, rel=0.1)


def test_full_bf16_is_alike_on_all_processes(pipeline, photos, tmp_path, uncompiled):
    """The random rounding too: else the copies of the model would drift apart."""
    arguments = f"""--pretrained_model_name_or_path {pipeline} --train_data_dir {photos} --resolution 32 --seed 0
        --max_sequence_length 16 --max_train_steps 3 --report_to none --learning_rate 1e-3""".split()
    log = tmp_path / "log"
    folder, copies = tmp_path / "out", tmp_path / "copies"
    copies.mkdir()

    def keep_copies():
        module = importlib.import_module(SFT)
        save = module.save_transformer

        def save_every(accelerator, *inputs):
            state = {name: tensor.clone() for name, tensor in accelerator.get_state_dict(inputs[0]).items()}
            save_file(state, copies / f"{accelerator.process_index}.safetensors")
            return save(accelerator, *inputs)

        module.save_transformer = save_every

    for process in start_two(SFT, [*arguments, *BF16, "--output_dir", folder], log, keep_copies):
        finish(process, log)
    one, two = (load_file(copies / f"{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_full_bf16_rounds_anew_at_every_step(run, uncompiled, monkeypatch, tmp_path):
    """With numbers that depend on the seed and the step alone."""
    drawn, step = [], torchao.optim.AdamW8bit.step

    def see(self, *inputs, **more):
        drawn.append(torch.get_rng_state().numpy().tobytes())
        return step(self, *inputs, **more)

    monkeypatch.setattr(torchao.optim.AdamW8bit, "step", see)
    out = run(SFT, *BF16, "--max_train_steps", 3, "--checkpointing_steps", 1)
    first, second, third = drawn
    assert len({*drawn}) == 3
    run(SFT, *BF16, "--max_train_steps", 3, "--resume_from_checkpoint", out / "checkpoint-1", "--output_dir", tmp_path)
    assert drawn[3:] == [second, third]
    run(SFT, *BF16, "--max_train_steps", 1, "--seed", 1, "--output_dir", tmp_path / "other")
    assert drawn[5] != first


def test_full_bf16_average_is_float32(run, uncompiled, monkeypatch):
    """A bf16 average would not take steps of 1e-4 of a difference."""
    averages = seen(monkeypatch, EMAModel, "to")
    run(SFT, *BF16, "--use_ema")
    assert {tensor.dtype for inputs, _, _ in averages for tensor in inputs[0].shadow_params} == {torch.float32}


@covers("--use_ema", "--ema_decay")
def test_ema(run, tmp_path):
    """The saved model is the average by its definition; checkpoints hold the weights themselves."""
    out = run(SFT, "--checkpointing_steps", 1, "--use_ema", "--output_dir", tmp_path / "ema")
    low = run(SFT, "--use_ema", "--ema_decay", 0.1, "--output_dir", tmp_path / "low")
    one, two = (weights(out / f"checkpoint-{step}") for step in (1, 2))
    for folder, decay in ((out, 2 / 11), (low, 0.1)):  # warms up as (1 + n) / (10 + n)
        for name, tensor in weights(folder).items():
            torch.testing.assert_close(tensor, decay * one[name] + (1 - decay) * two[name], rtol=0, atol=1e-6)
    assert not equal(out, out / "checkpoint-2")


def test_validation_sees_the_average_and_training_does_not(run, monkeypatch, tmp_path):
    """In the middle of a run, too; the weights that are trained are those of a run without validation or average."""
    module, sampled = importlib.import_module(SFT), []
    validate = module.log_validation

    def see(args, accelerator, transformer, *inputs):
        state = accelerator.unwrap_model(transformer).state_dict()
        sampled.append({name: tensor.clone() for name, tensor in state.items()})
        return validate(args, accelerator, transformer, *inputs)

    monkeypatch.setattr(module, "log_validation", see)
    arguments = (SFT, "--max_train_steps", 3, "--checkpointing_steps", 1)
    validation = ("--validation_prompt", "a cat", "--validation_steps", 2)
    out = run(*arguments, "--use_ema", *validation)
    one, two = (weights(out / f"checkpoint-{step}") for step in (1, 2))
    for name, tensor in one.items():
        average = 2 / 11 * tensor + 9 / 11 * two[name]
        torch.testing.assert_close(sampled[0][name], average, rtol=0, atol=1e-6)
    plain = run(*arguments, "--output_dir", tmp_path / "plain")
    assert equal(out / "checkpoint-3", plain / "checkpoint-3") and not equal(out, plain)


def test_skipped_steps_are_not_averaged(run, monkeypatch):
    module, number = importlib.import_module(SFT), itertools.count(1)
    losses = module.training_losses

    def poisoned(*inputs):
        factor = math.nan if next(number) in (2, 3) else 1
        for loss, shares in losses(*inputs):
            yield loss * factor, shares

    monkeypatch.setattr(module, "training_losses", poisoned)
    arguments = ("--max_train_steps", 4, "--checkpointing_steps", 1, "--max_skipped_steps", 2)
    out = run(SFT, *arguments, "--use_ema")
    one, four = (weights(out / f"checkpoint-{step}") for step in (1, 4))
    for name, tensor in weights(out).items():
        torch.testing.assert_close(tensor, 2 / 11 * one[name] + 9 / 11 * four[name], rtol=0, atol=1e-6)


@covers("--offload_ema")
def test_offload_ema(default, run, monkeypatch):
    """The average goes to the CPU after every step, to the same result."""
    moves = seen(monkeypatch, EMAModel, "to")
    assert equal(default(SFT, "--use_ema"), run(SFT, "--use_ema", "--offload_ema"))
    places = [inputs[1] for inputs, _, _ in moves if inputs[1] == "cpu"]
    assert len(places) >= 3  # at the start and after each of two steps
    moves.clear()
    run(SFT, "--use_ema", "--overwrite_output_dir")
    assert not [inputs for inputs, _, _ in moves if isinstance(inputs[1], str)]


# SOAR


@covers("--trajectory_length", "--num_rollout_paths", "--lambda_aux", "--aux_batch_size")
def test_auxiliary_points(run, forwards, logged, tmp_path):
    """M * N points a sample, cut as --aux_batch_size says; the loss is the weighted mean of the two kinds."""
    arguments = ("--num_rollout_paths", 2, "--trajectory_length", 3, "--max_train_steps", 1, "--adam_epsilon", 1e-2)
    one = run(SOAR, *arguments, "--lambda_aux", 0.5, "--output_dir", tmp_path / "one")
    assert [len(call["hidden_states"]) for call in forwards] == [2] * 8
    (logs,) = logged
    n_base, n_aux = 2, 12
    mean = (n_base * logs["loss_base"] + 0.5 * n_aux * logs["loss_aux"]) / (n_base + 0.5 * n_aux)
    assert logs["loss"] == pytest.approx(mean, rel=1e-5)
    forwards.clear()
    chunks = ("--lambda_aux", 0.5, "--aux_batch_size", 5, "--output_dir", tmp_path / "other")
    close(one, run(SOAR, *arguments, *chunks), 1e-6)
    assert [len(call["hidden_states"]) for call in forwards] == [2, 2, 5, 5, 2]


@covers("--num_sampling_steps", "--sigma_upper_ratio")
def test_auxiliary_noise_levels(run, forwards, tmp_path):
    """From one inference step down (of K) up to 1, or up to RATIO * sigma."""

    def sigmas(*flags):
        forwards.clear()
        name = "_".join(map(str, flags)) or "default"
        arguments = ("--trajectory_length", 64, "--aux_batch_size", 64, "--train_batch_size", 1)
        run(SOAR, *arguments, *flags, "--output_dir", tmp_path / name)
        found = noise_levels(forwards).view(2, 65)  # two steps, each the base and 64 points
        return found[:, 0], found[:, 1:].amin(1), found[:, 1:].amax(1)

    def step_down(sigma, steps):
        u = (sigma / (3 - 2 * sigma) - 1 / steps).clamp(min=1e-3)
        return 3 * u / (1 + 2 * u)

    for flag, steps, ratio in ((None, 40, None), ("--num_sampling_steps", 4, None), ("--sigma_upper_ratio", 40, 1.1)):
        sigma, low, high = sigmas(*([flag, ratio or steps] if flag else []))
        bottom = step_down(sigma, steps)
        top = torch.ones(2) if ratio is None else (ratio * sigma).clamp(max=1)
        assert (low >= bottom - 1e-6).all() and (high <= top + 1e-6).all()
        assert (low < bottom + 0.15 * (top - bottom)).all() and (high > top - 0.15 * (top - bottom)).all()


@covers("--cfg_scale_sampling", "--sde_rollout_type", "--sde_noise_scale")
def test_rollout(run, monkeypatch, tmp_path):
    """Path 0 is the ODE step, the others are of the chosen type and strength, along the guided velocity."""
    import soar_utils

    steps, guidance = (seen(monkeypatch, soar_utils, name) for name in ("rollout_step", "apply_guidance"))
    arguments = (SOAR, "--max_train_steps", 1, "--num_rollout_paths", 3, "--trajectory_length", 1)
    run(*arguments, "--output_dir", tmp_path / "default")
    run(*arguments, "--sde_rollout_type", "cps", "--sde_noise_scale", 0.3, "--cfg_scale_sampling", 2)
    shown = [inputs[4:6] for inputs, _, _ in steps]  # the ODE step is the default
    assert shown == [(), ("flow_sde", 0.5), ("flow_sde", 0.5), (), ("cps", 0.3), ("cps", 0.3)]
    assert [inputs[2] for inputs, _, _ in guidance] == [4.5, 2.0]
    assert not torch.equal(steps[1][0][6], steps[2][0][6])  # each path draws its own noise
    assert all(torch.equal(inputs[1], guidance[i // 3][2]) for i, (inputs, _, _) in enumerate(steps))


# LoRA


def metadata(folder):
    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        return json.loads(file.metadata()["lora_adapter_metadata"])


def generate(pipe):
    pipe.set_progress_bar_config(disable=True)
    inputs = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
    return pipe("a cat", generator=torch.Generator().manual_seed(0), **inputs).images


@covers("--rank", "--lora_alpha")
@pytest.mark.parametrize(
    ("flags", "rank", "alpha"), [([], 32, 32), (["--rank", 4], 4, 4), (["--lora_alpha", 8], 32, 8)]
)
def test_rank_and_alpha(flags, rank, alpha, run, pipeline):
    """The strength is in the result's weights, for programs that read no metadata; a checkpoint is as in training."""
    out = run(LORA, *flags, "--checkpointing_steps", 2)
    assert {tensor.shape[0] for name, tensor in weights(out).items() if "lora_A" in name} == {rank}
    for folder, strength in ((out, rank), (out / "checkpoint-2", alpha)):
        found = metadata(folder)
        assert (found["transformer.r"], found["transformer.lora_alpha"]) == (rank, strength)
    trained = weights(out / "checkpoint-2")
    for name, tensor in weights(out).items():
        assert torch.equal(tensor, trained[name] * (alpha / rank if "lora_B" in name else 1))
    drawn = []
    for folder in (out, out / "checkpoint-2"):
        pipe = StableDiffusion3Pipeline.from_pretrained(pipeline)
        pipe.load_lora_weights(folder)
        drawn.append(generate(pipe))
    assert np.abs(drawn[0] - drawn[1]).max() < 1e-5


def test_a_new_lora(run):
    """Its effect is none, and its A is drawn from a normal distribution of deviation 1 / rank, by the seed."""
    out = run(LORA, "--rank", 4, "--learning_rate", 0)
    state = weights(out)
    assert all((tensor == 0).all() for name, tensor in state.items() if "lora_B" in name)
    drawn = torch.cat([tensor.flatten() for name, tensor in state.items() if "lora_A" in name])
    assert drawn.std().item() == pytest.approx(1 / 4, rel=0.05) and drawn.abs().max() > 0.6
    assert not torch.equal(drawn[:128], drawn[128:256])
    other = run(LORA, "--rank", 4, "--learning_rate", 0, "--seed", 1, "--overwrite_output_dir")
    assert not any(torch.equal(tensor, state[name]) for name, tensor in weights(other).items() if "lora_A" in name)


@covers("--lora_dropout")
def test_lora_dropout(run, pipeline, monkeypatch, tmp_path):
    """Active in training, not in validation, after which it is again, and not in the file's effect."""
    made = seen(monkeypatch, importlib.import_module(LORA), "load_transformer")
    out = run(LORA, "--lora_dropout", 0.25, "--learning_rate", 1e-2)
    rates = {m.p for m in made[0][2].modules() if isinstance(m, torch.nn.Dropout) and m.p}
    assert rates == {0.25}
    pipe = StableDiffusion3Pipeline.from_pretrained(pipeline)
    pipe.load_lora_weights(out)
    assert np.array_equal(generate(pipe), generate(pipe))
    training, forward = [], SD3Transformer2DModel.forward

    def see(self, **inputs):
        layers = [module.training for module in self.modules()]
        training.append((any(layers), all(layers)))
        return forward(self, **inputs)

    monkeypatch.setattr(SD3Transformer2DModel, "forward", see)
    flags = ("--lora_dropout", 0.25, "--trajectory_length", 0, "--max_train_steps", 3, "--validation_steps", 2)
    run(LORA, *flags, "--validation_prompt", "a cat", "--output_dir", tmp_path / "validated")
    step, sampling = (True, True), (False, False)
    assert training == [step] * 2 + [sampling] * 2 + [step] + [sampling] * 2


ATTENTION = {f"attn.{name}" for name in "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()}
SECOND = {f"attn2.{name}" for name in "to_q to_k to_v to_out.0".split()}


def layers_of(blocks, layers):
    return {(block, layer) for block in blocks for layer in layers}


@covers("--lora_layers", "--lora_blocks")
@pytest.mark.parametrize(
    ("flags", "layers"),
    [
        # The last block has no text output, and only the first two have a second attention.
        ([], layers_of("012", ATTENTION) - {("2", "attn.to_add_out")} | layers_of("01", SECOND)),
        (["--lora_layers", "attn.to_q, ff.net.2"], layers_of("012", ["attn.to_q", "ff.net.2"])),
        (["--lora_layers", "to_k"], layers_of("012", ["attn.to_k"]) | layers_of("01", ["attn2.to_k"])),
        (["--lora_blocks", "1"], layers_of("1", ATTENTION | SECOND)),
        (["--lora_blocks", "0, 2", "--lora_layers", "attn.to_k"], layers_of("02", ["attn.to_k"])),
        (["--lora_blocks", "1, 2", "--lora_layers", "to_k"], layers_of("12", ["attn.to_k"]) | {("1", "attn2.to_k")}),
    ],
    ids=lambda value: None if isinstance(value, set) else str(value),
)
def test_lora_layers(flags, layers, run):
    """Exactly the layers that were named have a LoRA; by default all attention layers, the second ones too."""
    out = run(LORA, *flags)
    names = {name.removeprefix("transformer.transformer_blocks.").rpartition(".lora_")[0] for name in weights(out)}
    assert {tuple(name.split(".", 1)) for name in names} == layers


@covers("--lora")
def test_lora(run, default, pipeline, tmp_path):
    """Goes on from an adapter: its layers, ranks and strength; also on a resumed run."""
    shape = ("--rank", 4, "--lora_alpha", 8, "--lora_layers", "attn.to_q", "--lora_dropout", 0.1)
    one = run(LORA, *shape, "--output_dir", tmp_path / "one")
    same = run(LORA, "--lora", one, "--learning_rate", 0, "--output_dir", tmp_path / "same")
    assert equal(one, same) and metadata(one) == metadata(same)
    mixed = ("--mixed_precision", "bf16", "--save_dtype", "fp32", "--output_dir", tmp_path / "mixed")
    assert equal(one, run(LORA, "--lora", one, "--learning_rate", 0, *mixed))  # not by way of the base's bf16
    out = run(LORA, "--lora", one, "--checkpointing_steps", 1, "--output_dir", tmp_path / "two")
    assert weights(out).keys() == weights(one).keys() and not equal(out, one)
    resumed = tmp_path / "resumed"
    shutil.copytree(out / "checkpoint-1", resumed / "checkpoint-1")
    run(LORA, "--lora", one, "--resume_from_checkpoint", "latest", "--output_dir", resumed)
    assert equal(resumed, out)
    with pytest.raises(SystemExit, match="leave out --rank and all --lora_ flags"):
        run(LORA, "--lora", one, "--rank", 8, "--output_dir", tmp_path / "refused")
    card = (out / "README.md").read_text()
    assert f"Trained from `{pipeline}`, `{one}` with" in card


def tensors_of(adapter):
    """By diffusers' names, without a prefix."""
    return {name.removeprefix("base_model.model."): t for name, t in get_peft_model_state_dict(adapter).items()}


def write_peft(adapter, folder):
    """PEFT's own format, with patterns for the layers' names, and frozen."""
    adapter.save_pretrained(folder)
    return folder


def write_metadata(adapter, folder):
    """As diffusers' training scripts do."""
    config = adapter.peft_config["default"].to_dict() | {"target_modules": ["attn.to_q", "attn.to_v"]}
    StableDiffusion3Pipeline.save_lora_weights(folder, tensors_of(adapter), transformer_lora_adapter_metadata=config)
    return folder


def write_unprefixed(adapter, folder):
    """By `transformer.save_lora_adapter`."""
    model = adapter.base_model.model
    model.peft_config, model._hf_peft_config_loaded = adapter.peft_config, True
    model.save_lora_adapter(folder)
    return folder


def with_alphas(adapter):
    """With a tensor of each layer's strength."""
    state = {f"transformer.{name}": tensor for name, tensor in tensors_of(adapter).items()}
    for layer in {name.partition(".lora_")[0] for name in state}:
        state[f"{layer}.alpha"] = torch.tensor(3.0 if layer.endswith("to_v") else 16.0)
    return state


def write_alphas(adapter, folder):
    folder.mkdir()
    save_file(with_alphas(adapter), folder / "pytorch_lora_weights.safetensors")
    return folder


def write_both(adapter, folder):
    """Strength in the metadata, and in tensors: it counts once."""
    write_metadata(adapter, folder)
    file = folder / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        save_file(with_alphas(adapter), file, opened.metadata())
    return folder


def write_file(adapter, folder):
    """Of any name, with what it trained of a text encoder, and the names that diffusers had before PEFT."""
    folder.mkdir()
    state = {name.replace("lora_A", "lora.down"): tensor for name, tensor in with_alphas(adapter).items()}
    state = {name.replace("lora_B", "lora.up"): tensor for name, tensor in state.items()}
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    state |= {f"{layer}.{name}.weight": torch.ones(2, 2) for name in ("lora_A", "lora_B")}
    save_file(state, folder / "mine.safetensors")
    return folder / "mine.safetensors"


@pytest.mark.parametrize(
    ("write", "options"),
    [
        (write_peft, {}),
        (write_peft, {"use_rslora": True}),
        (write_peft, {"use_dora": True}),
        (write_metadata, {}),
        (write_metadata, {"use_rslora": True}),
        (write_unprefixed, {}),
        (write_alphas, {}),
        (write_both, {}),
        (write_file, {}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_loras_of_other_programs(write, options, run, pipeline, tmp_path, caplog):
    """
    Two ranks and two strengths on two kinds of layers, told in every way. The run begins with PEFT's own effect, and
    its result has it, and no word of where the LoRA was made.
    """
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel.from_pretrained(pipeline, subfolder="transformer")
    layers = {
        "target_modules": r".*\.attn\.to_[qv]",
        "rank_pattern": {"attn.to_v": 2},
        "alpha_pattern": {"attn.to_v": 3},
    }
    adapter = get_peft_model(transformer, LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, **layers, **options))
    adapter.peft_config["default"].base_model_name_or_path = "/home/someone/models/sd3"
    source = write(adapter, tmp_path / "adapter")
    size = sum(tensor.numel() for tensor in tensors_of(adapter).values())
    out = run(LORA, "--lora", source, "--learning_rate", 0, "--checkpointing_steps", 1)
    found = metadata(out)
    assert found["transformer.target_modules"] == sorted(
        f"transformer_blocks.{block}.attn.{layer}" for block in range(3) for layer in ("to_q", "to_v")
    )
    assert found["transformer.base_model_name_or_path"] is None
    assert sum(tensor.numel() for tensor in weights(out).values()) == size
    assert f"{size:,} trained parameters" in caplog.text
    merged = adapter.merge_and_unload().state_dict()
    for folder in (out, out / "checkpoint-2"):
        pipe = StableDiffusion3Pipeline.from_pretrained(pipeline)
        pipe.load_lora_weights(folder)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        state = pipe.transformer.state_dict()
        changed = 0
        for name, tensor in weights(pipeline).items():
            torch.testing.assert_close(state[name], merged[name], rtol=0, atol=1e-5)
            changed += not torch.allclose(merged[name], tensor, atol=1e-3)
        assert changed == 2 * 3
    shutil.copytree(out / "checkpoint-1", tmp_path / "resumed" / "checkpoint-1")
    more = ("--resume_from_checkpoint", "latest", "--output_dir", tmp_path / "resumed", "--learning_rate", 0)
    assert equal(run(LORA, "--lora", source, *more), out)
    trained = run(LORA, "--lora", source, "--output_dir", tmp_path / "trained", "--save_dtype", "fp32")
    assert weights(trained).keys() == weights(out).keys() and not equal(trained, out)
    said = [record for record in caplog.records if "2 tensors of text encoders are left out" in record.message]
    assert len(said) == 3 * (write is write_file)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_same_run_gives_the_same_files(script, run, default):
    """To the byte: what PEFT keeps as a set has no order."""
    result = ["pytorch_lora_weights.safetensors", "transformer/diffusion_pytorch_model.safetensors"]
    one, other = default(script), run(script)
    same = [(one / name).read_bytes() == (other / name).read_bytes() for name in result if (one / name).exists()]
    assert same == [True]


@covers("--save_dtype")
@pytest.mark.parametrize("script", [SOAR, LORA])
def test_save_dtype(script, run, default, tmp_path):
    """Of the result: what was trained, rounded once; float32 without mixed precision, else bf16; in one file."""
    trained = weights(default(script))
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        out = weights(run(script, "--save_dtype", name, "--output_dir", tmp_path / name))
        assert all(torch.equal(tensor, trained[key].to(dtype)) for key, tensor in out.items())
    mixed = run(script, "--mixed_precision", "bf16", "--output_dir", tmp_path / "mixed")
    assert {tensor.dtype for tensor in weights(mixed).values()} == {torch.bfloat16}


@covers("--use_dora")
def test_dora(run, default, pipeline):
    """Magnitudes are trained and saved, and change what a pipeline that loads the file draws."""
    out = run(LORA, "--use_dora", "--learning_rate", 1e-2)
    magnitudes = [name for name in weights(out) if "lora_magnitude_vector" in name]
    assert magnitudes and metadata(out)["transformer.use_dora"]
    pipe = StableDiffusion3Pipeline.from_pretrained(pipeline)
    before = generate(pipe)
    pipe.load_lora_weights(out)
    after = generate(pipe)
    assert np.abs(after - before).max() > 1e-3
    state = {name: tensor for name, tensor in pipe.transformer.state_dict().items() if "lora_magnitude_vector" in name}
    assert len(state) == len(magnitudes)
    plain = default(LORA, "--learning_rate", 1e-2)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(plain)
    assert np.abs(after - generate(pipe)).max() > 1e-4


@covers("--bnb_quantization_config_path")
def test_four_bit_base(run, monkeypatch, tmp_path, pipeline):
    """QLoRA: 4-bit frozen weights, a float32 LoRA that trains on them and loads on the full-precision model."""
    from bitsandbytes.nn import Linear4bit
    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer

    # bitsandbytes computes on a CPU too; diffusers only wants to see a GPU.
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "update_device_map", lambda self, device_map: {"": "cpu"})
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    made = seen(monkeypatch, importlib.import_module(LORA), "load_transformer")
    config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    path = tmp_path / "nf4.json"
    path.write_text(json.dumps(config | {"bnb_4bit_use_double_quant": True}))
    out = run(LORA, "--bnb_quantization_config_path", path, "--mixed_precision", "bf16")
    transformer = made[0][2]
    quantized = [module for module in transformer.modules() if isinstance(module, Linear4bit)]
    assert quantized and {module.weight.quant_type for module in quantized} == {"nf4"}
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    assert trained and {parameter.dtype for parameter in trained} == {torch.float32}
    pipe = StableDiffusion3Pipeline.from_pretrained(pipeline)
    before = generate(pipe)
    pipe.load_lora_weights(out)
    assert np.abs(generate(pipe) - before).max() > 1e-3
    flags = ("--bnb_quantization_config_path", path, "--mixed_precision", "bf16", "--lora", out, "--learning_rate", 0)
    assert equal(run(LORA, *flags, "--output_dir", tmp_path / "again"), out)


# Checkpoints


@covers("--checkpointing_steps", "--checkpoints_total_limit", "--resume_from_checkpoint")
def test_checkpoints(run, tmp_path, logged):
    """Every N steps, the newest are kept; a run goes on from a path as from `latest`."""
    arguments = (SFT, "--max_train_steps", 5)

    def kept(folder):
        return sorted(path.name for path in folder.glob("checkpoint-*"))

    out = run(*arguments, "--checkpointing_steps", 2)
    assert kept(out) == ["checkpoint-2", "checkpoint-4"]
    limited = run(
        *arguments, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2, "--output_dir", tmp_path / "b"
    )
    assert kept(limited) == ["checkpoint-4", "checkpoint-5"]
    for wanted, first in ((out / "checkpoint-2", 3), ("checkpoint-4", 5)):
        logged.clear()
        resumed = tmp_path / f"from-{first}"
        if first == 5:
            shutil.copytree(out, resumed)
        run(*arguments, "--resume_from_checkpoint", wanted, "--output_dir", resumed)
        assert [logs["step"] for logs in logged] == list(range(first, 6))
        assert equal(resumed, out)


# Validation


@covers("--validation_prompt", "--num_validation_images", "--validation_steps", "--skip_final_inference")
@covers("--num_inference_steps", "--guidance_scale")
def test_validation(run, monkeypatch, tmp_path):
    """How often, of what, how many and how; the same seeds and prompts every time."""
    calls = seen(monkeypatch, StableDiffusion3Pipeline, "__call__")
    arguments = (SFT, "--validation_prompt", "a cat", "--validation_prompt", "a dog", "--max_train_steps", 3)
    arguments += ("--num_validation_images", 3, "--validation_steps", 2)
    out = run(*arguments, "--num_inference_steps", 3, "--guidance_scale", 2)
    assert sorted(path.name for path in (out / "validation").iterdir()) == ["step-2.png", "step-3.png"]
    assert Image.open(out / "validation" / "step-2.png").size == (3 * 32, 2 * 32)
    assert len(list((out / "samples").iterdir())) == 6
    assert len(calls) == 2 * 2 * 3
    assert {(more["num_inference_steps"], more["guidance_scale"]) for _, more, _ in calls} == {(3, 2.0)}
    seeds = [more["generator"].initial_seed() for _, more, _ in calls]
    assert len(set(seeds[:3])) == 3 and seeds == seeds[:3] * 4
    assert not torch.equal(calls[0][1]["prompt_embeds"], calls[3][1]["prompt_embeds"])
    calls.clear()
    out = run(*arguments, "--skip_final_inference", "--output_dir", tmp_path / "skip")
    assert [path.name for path in (out / "validation").iterdir()] == ["step-2.png"] and len(calls) == 6
    assert not (out / "samples").exists()
    calls.clear()
    for number, flags in enumerate([(), ("--skip_final_inference",), ("--num_validation_images", 0)]):
        run(SFT, *flags, "--output_dir", tmp_path / f"none{number}")  # it asks for nothing: no effect to be missed
    assert not calls


@covers("--validation_height", "--validation_width")
def test_validation_size(run, tmp_path):
    """Each in pixels; the other is that of the training."""
    arguments = (SFT, "--validation_prompt", "a cat", "--max_train_steps", 1)
    for flag, size in (("--validation_height", (32, 48)), ("--validation_width", (48, 32))):
        out = run(*arguments, flag, 48, "--output_dir", tmp_path / flag)
        assert Image.open(out / "validation" / "step-1.png").size == size


def test_the_same_prompt_twice(run):
    out = run(SFT, "--validation_prompt", "a cat", "--validation_prompt", "a cat", "--max_train_steps", 1)
    assert (out / "validation" / "step-1.png").exists()


def test_validation_does_not_disturb_the_training(default, run):
    assert equal(default(SFT), run(SFT, "--validation_prompt", "a cat", "--validation_steps", 1))


# Logging and hub


@covers("--report_to")
def test_report_to(run, default):
    """TensorBoard has the curves and the validation images; `none` writes no log."""
    arguments = ("--report_to", "tensorboard", "--validation_prompt", "a cat", "--validation_steps", 1)
    out = run(SOAR, *arguments, "--num_validation_images", 2)
    (file,) = (out / "logs" / SOAR).glob("events.out.tfevents.*")  # hyperparameters have a folder below
    events = EventAccumulator(str(file), {"images": 0, "scalars": 0})
    events.Reload()
    for name in ("loss", "loss_base", "loss_aux", "grad_norm", "lr", "samples_per_second"):
        points = events.Scalars(name)
        assert [point.step for point in points] == [1, 2] and all(math.isfinite(point.value) for point in points)
    assert events.Scalars("lr")[0].value == pytest.approx(1e-3)
    assert [image.step for image in events.Images("validation")] == [1, 2]
    assert not list(default(SOAR).rglob("events*"))
