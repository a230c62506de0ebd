# SPDX-License-Identifier: Apache-2.0
"""
The scripts against a hub: what they download, what they do when it fails or refuses, and what they upload. The clients
are the real ones, in processes of their own.
"""

import json
import os
import shutil
import subprocess
import sys

import datasets
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from harness import ROOT, SCRIPTS, weights
from hub import Hub
from PIL import Image
from safetensors.torch import load_file, save_file


# A process that has imported the scripts, with the hub in place of the real one. For each line of standard input it
# forks one that runs command lines one after the other, or Python code, and says how each ended.
DRIVER = """
import importlib, json, os, sys, time
sys.path.insert(0, {tests!r})
from harness import SCRIPTS, reset_accelerate
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.1))
modules = {{script: importlib.import_module(script) for script in SCRIPTS}}
for line in sys.stdin:
    task = json.loads(line)
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        print("DONE", flush=True)
        continue
    os.environ.update(task["environment"])
    os.dup2(os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    for script, *arguments in task["commands"]:
        ended = ""
        try:
            if script == "exec":
                exec(arguments[0], {{}})
            else:
                reset_accelerate()
                sys.argv = [script + ".py", *arguments]
                modules[script].run(modules[script].parse_args())
        except SystemExit as error:
            ended = str(error)
        print(json.dumps(ended), flush=True)
    os._exit(0)
"""
SHORT = "--resolution 32 --max_sequence_length 16 --train_batch_size 2 --max_train_steps 1 --seed 0".split()
SHORT += ["--report_to", "none"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    hub = Hub(tmp_path_factory.mktemp("hub"))
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def driver(hub, tmp_path_factory):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **hub.environment, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DRIVER.format(tests=str(ROOT / "tests"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, cwd=tmp_path_factory.mktemp("driver"), **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def clients(hub, driver, small_photos, tmp_path):
    """
    Run command lines with the hub in place of the real one; returns how each ended, and all that they showed. In each
    `MODEL` comes first; what every one needs is added.
    """
    hub.requests.clear()

    def run_clients(*commands, **environment):
        lines = []
        for number, (script, model, *arguments) in enumerate(commands):
            if script == "exec":
                lines.append((script, model))
                continue
            line = [script, "--pretrained_model_name_or_path", model, *SHORT, *map(str, arguments)]
            line += [] if "--output_dir" in line else ["--output_dir", str(tmp_path / f"out{number}")]
            line += [] if "--dataset_name" in line else ["--train_data_dir", str(small_photos)]
            lines.append(line)
        task = {"commands": lines, "environment": environment, "log": str(tmp_path / "log")}
        driver.stdin.write(json.dumps(task) + "\n")
        driver.stdin.flush()
        ended = list(iter(lambda: driver.stdout.readline().strip(), "DONE"))
        shown = (tmp_path / "log").read_text()
        assert len(ended) == len(lines), shown[-3000:]
        return [json.loads(line) for line in ended], shown

    return run_clients


@pytest.fixture(scope="module")
def repository(pipeline, tmp_path_factory):
    """The tiny pipeline laid out as Stability's repository is: what is not to be downloaded stands beside the rest."""
    folder = tmp_path_factory.mktemp("repository") / "model"
    shutil.copytree(pipeline, folder)
    pipe = StableDiffusion3Pipeline.from_pretrained(pipeline)
    shutil.rmtree(folder / "text_encoder_3")
    pipe.text_encoder_3.save_pretrained(folder / "text_encoder_3", max_shard_size="100KB")
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae"):
        getattr(pipe, name).half().save_pretrained(folder / name, variant="fp16")
    for name in ("tokenizer", "tokenizer_2"):
        state = json.loads((folder / name / "tokenizer.json").read_text())["model"]
        (folder / name / "vocab.json").write_text(json.dumps(state["vocab"], ensure_ascii=False))
        merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in state["merges"]]
        (folder / name / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        (folder / name / "tokenizer.json").unlink()
    (folder / "text_encoders").mkdir()
    for name in ("sd3.5_tiny.safetensors", "text_encoders/clip_l.safetensors", "LICENSE.md", "README.md", "demo.png"):
        (folder / name).write_bytes(b"not for us")
    assert len(list((folder / "text_encoder_3").glob("model-*.safetensors"))) > 1
    return folder


def test_what_is_downloaded(hub, clients, repository, pipeline, tmp_path):
    """What a run needs and nothing else, once; the next start asks for no file, and needs no hub."""
    hub.add("someone/tiny", repository)
    runs = [(script, "someone/tiny", "--output_dir", tmp_path / script) for script in SCRIPTS]
    ended, shown = clients((*runs[0], "--no_text_encoder_3"))
    assert ended == [""]
    needed = {
        path.relative_to(repository).as_posix()
        for path in repository.rglob("*")
        if path.parent != repository and path.parent.name != "text_encoders" and ".fp16" not in path.name
    }
    needed = {name for name in needed if (repository / name).is_file()} | {"model_index.json"}
    first = {name for name in needed if "_3/" not in name or name.endswith(".json")}
    assert set(hub.downloads()) - first == set() and set(hub.downloads().values()) == {1}
    assert {name for name in first if name.endswith(".safetensors")} <= hub.downloads().keys()
    # What is on the screen is ours: no requests, no remarks of libraries on what is not used.
    lines = [line for line in shown.replace("\r", "\n").splitlines() if line.strip()]
    odd = [line for line in lines if "%|" not in line and " INFO " not in line and "s]" not in line]
    assert odd == [] and not any("HTTP" in line for line in lines)

    ended, _ = clients(*((*run[:3], f"{run[3]}-2") for run in runs))
    assert ended == [""] * 3
    downloads, contents = hub.downloads(), {name: (repository / name).read_bytes() for name in needed}
    assert downloads.keys() <= needed and set(downloads.values()) == {1}
    assert {contents[name] for name in downloads} == {*contents.values()}  # what two tokenizers share comes once
    base = load_file(pipeline / "transformer" / "diffusion_pytorch_model.safetensors")
    trained = weights(tmp_path / "train_sd3_sft-2")
    assert any(not torch.equal(trained[name], base[name]) for name in base)

    hub.requests.clear()
    ended, _ = clients((*runs[0][:3], tmp_path / "again"))
    assert ended == [""] and not hub.downloads() and len(hub.requests) < 10
    with hub.away():
        ended, shown = clients((*runs[0][:3], tmp_path / "alone"), ("train_sd3_sft", "someone/new"))
    assert ended[0] == "" and "--pretrained_model_name_or_path someone/new cannot be loaded" in ended[1]
    assert len(ended[1]) < 800 and "\n" not in ended[1]
    assert [f"in {pause} seconds" in shown for pause in (2, 8, 30)] == [True] * 3


def test_who_may_not_and_what_is_not_there(hub, clients, pipeline, tmp_path):
    """One line each, which is true and says what to do; who may, trains."""
    hub.add("someone/gated", pipeline, gated=True)
    hub.add("someone/open", pipeline)
    commands = [
        ("train_sd3_sft", "someone/gated"),
        ("train_sd3_sft", "someone/gated", "--hub_token", "hf_known"),
        ("train_sd3_soar_lora", "someone/nothing", "--hub_token", "hf_known"),
        ("train_sd3_sft", "someone/open", "--revision", "other"),
        ("train_sd3_sft", "someone/open", "--transformer", "someone/gated"),
        ("train_sd3_sft", "someone/open", "--dataset_name", "someone/nothing"),
        ("train_sd3_sft", "someone/gated", "--hub_token", "hf_allowed"),
    ]
    ended, _ = clients(*commands)
    gated = "it is gated. Accept its licence on https://huggingface.co/someone/gated, then `hf auth login`"
    for line in ended[:2]:
        assert line == f"error: --pretrained_model_name_or_path someone/gated cannot be loaded: {gated}"
    assert "--pretrained_model_name_or_path someone/nothing" in ended[2] and "Not Found" in ended[2]
    assert "--pretrained_model_name_or_path someone/open" in ended[3] and "Revision Not Found" in ended[3]
    assert ended[4] == f"error: --transformer someone/gated cannot be loaded: {gated}"
    assert "--dataset_name someone/nothing" in ended[5] and "doesn't exist" in ended[5]
    assert ended[6] == ""
    assert all("\n" not in line and len(line) < 800 for line in ended)


def test_a_hub_that_fails(hub, clients, pipeline, tmp_path):
    """Answers of 503, and connections that break in the middle of a file: tried again, and the file goes on."""
    hub.add("someone/failing", pipeline)
    hub.failures = {"/api/models/someone/failing": [503], "transformer/diffusion_pytorch_model": ["cut", 503, "cut"]}
    ended, shown = clients(("train_sd3_sft", "someone/failing"))
    assert ended == [""] and not any(hub.failures.values())
    assert "trying again in 2 seconds" in shown


def test_a_data_set_of_the_hub(hub, clients, pipeline, small_photos, tmp_path):
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    rows = [json.loads(line) for line in (small_photos / "metadata.jsonl").read_text().splitlines()]
    images = [Image.open(small_photos / row["file_name"]) for row in rows]
    table = datasets.Dataset.from_dict({"image": images, "text": [row["text"] for row in rows]})
    table.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    hub.add("someone/photos", folder, kind="datasets")
    hub.add("someone/open", pipeline)
    ended, _ = clients(("train_sd3_sft", "someone/open", "--dataset_name", "someone/photos"))
    assert ended == [""] and hub.downloads()["data/train-00000-of-00001.parquet"] == 1


def test_a_lora_of_the_hub(hub, clients, pipeline, tmp_path):
    """Of its repository the weights alone; what is none is refused before the model's weights are sent."""
    layer = "transformer.transformer_blocks.0.attn.to_q"
    state = {f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight": torch.ones(32, 2)}
    for name, tensors in (("lora", state), ("none", {f"{layer}.lokr_w1": torch.ones(2, 2)})):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "pytorch_lora_weights.safetensors")
        (tmp_path / name / "picture.png").write_bytes(b"not for us")
        hub.add(f"someone/{name}", tmp_path / name)
    hub.add("someone/lora_base", pipeline)
    ended, _ = clients(("train_sd3_soar_lora", "someone/lora_base", "--lora", "someone/none"))
    assert ended[0].startswith("error: --lora someone/none: ") and "lokr_w1 is no LoRA" in ended[0]
    assert [name for name in hub.downloads() if not name.endswith(".json")] == ["pytorch_lora_weights.safetensors"]
    base = ("train_sd3_soar_lora", "someone/lora_base", "--lora")
    ended, _ = clients((*base, "someone/lora"), (*base, "someone/no"))
    assert ended[0] == "" and ended[1].startswith("error: --lora someone/no cannot be loaded: ")
    assert weights(tmp_path / "out0").keys() == state.keys() and "picture.png" not in hub.downloads()


def test_a_transformer_in_place_of_the_models(hub, clients, pipeline, tmp_path):
    """The model's own is not sent, the largest of its files."""
    (tmp_path / "tuned").mkdir()
    shutil.copytree(pipeline / "transformer", tmp_path / "tuned" / "transformer")
    hub.add("someone/whole", pipeline)
    ended, _ = clients(("train_sd3_sft", "someone/whole", "--transformer", str(tmp_path / "tuned")))
    assert ended == [""] and "vae/diffusion_pytorch_model.safetensors" in hub.downloads()
    assert not any(name.startswith("transformer/diffusion") for name in hub.downloads())


def test_a_variant_of_some_parts(hub, clients, pipeline, tmp_path):
    """Of each part one file is sent."""
    model, pipe = tmp_path / "model", StableDiffusion3Pipeline.from_pretrained(pipeline)
    shutil.copytree(pipeline, model)
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    for name in names:
        getattr(pipe, name).save_pretrained(model / name, variant="fp16")
    hub.add("someone/mixed", model)
    script = ("train_sd3_sft", "someone/mixed", "--variant")
    ended, _ = clients((*script, "fp16"), (*script, "bf16"))
    assert ended[0] == "" and "someone/mixed" in ended[1] and "variant=bf16" in ended[1] and "\n" not in ended[1]
    files = {f"{name}/diffusion_pytorch_model.safetensors" for name in ("transformer", "vae")}
    files |= {f"{name}/model.fp16.safetensors" for name in names}
    assert {name for name in hub.downloads() if name.endswith(".safetensors")} == files


@pytest.mark.parametrize("script", ["train_sd3_soar", "train_sd3_soar_lora"])
def test_what_is_uploaded(script, hub, clients, pipeline, tmp_path):
    """The result and its card, from which a stock pipeline draws; no secret is in any file, here or there."""
    hub.add("someone/open", pipeline)
    flags = ("--push_to_hub", "--hub_token", "hf_known", "--hub_model_id", f"mine-{script}", "--cache_latents")
    flags += ("--validation_prompt", "a cat", "--checkpointing_steps", 1, "--report_to", "tensorboard")
    flags += ("--hub_private", "--num_inference_steps", 2, "--num_validation_images", 1)
    named = ("--push_to_hub", "--hub_token=hf_known", "--output_dir", tmp_path / f"named-{script}")
    ended, shown = clients((script, "someone/open", *flags), (script, "someone/open", *named), HF_TOKEN="hf_known")
    assert ended == ["", ""] and "hf_known" not in shown
    assert {f"me/mine-{script}", f"me/named-{script}"} <= hub.uploaded.keys()
    asked = (json.dumps(hub.uploaded[f"me/{name}-{script}"]) for name in ("mine", "named"))
    assert ["private" in text for text in asked] == [True, False]
    uploaded = hub.root / "me" / f"mine-{script}"
    files = {path.relative_to(uploaded).as_posix() for path in uploaded.rglob("*") if path.is_file()}
    parts = {"transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"}
    parts = {"pytorch_lora_weights.safetensors"} if script.endswith("lora") else parts
    assert files == {"README.md", "training_args.json", "samples/0-0.png"} | parts
    for folder in (uploaded, tmp_path / "out0", tmp_path / f"named-{script}"):
        assert not any(b"hf_known" in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    card = (uploaded / "README.md").read_text()
    header = card.split("---")[1]
    assert "base_model:\n- someone/open" in header and "license: other" in header
    assert "widget:" in header and "url: samples/0-0.png" in header and "text: a cat" in header
    hub.requests.clear()
    code = card.split("```python\n")[1].split("```")[0].replace("'mine-", "'me/mine-")
    code += f"\nimage.resize((8, 8)).save({str(tmp_path / 'drawn.png')!r})"
    ended, shown = clients(("exec", code), HF_TOKEN="hf_known")
    assert ended == [""] and (tmp_path / "drawn.png").exists(), shown[-2000:]
    assert any(f"me/mine-{script}" in path for _, path in hub.requests)


def test_where_nothing_may_be_uploaded(hub, clients, pipeline, tmp_path):
    """Without a login, without rights or with an impossible name: one line, before anything is trained."""
    hub.add("someone/open", pipeline)
    hub.add("someone/else", tmp_path)
    hub.readable.add("someone/else")
    push = ("train_sd3_sft", "someone/open", "--push_to_hub")
    commands = [
        (*push, "--hub_model_id", "mine"),
        (*push, "--hub_model_id", "someone/else", "--hub_token", "hf_known"),
        (*push, "--output_dir", tmp_path / "two words", "--hub_token", "hf_known"),
    ]
    ended, shown = clients(*commands, HF_TOKEN="")
    assert "Training" not in shown and not list(tmp_path.glob("*/transformer"))
    for line, name in zip(ended, ("mine", "someone/else", "two words"), strict=True):
        assert line.startswith(f"error: --push_to_hub {name}: ") and "\n" not in line and len(line) < 800


def test_a_hub_that_asks_to_wait(hub, clients, pipeline):
    """429, when the repository is made and when the result is committed: tried again."""
    hub.add("someone/open", pipeline)
    hub.failures = {"/api/repos/create": [429], "/commit/main": [429]}
    flags = ("--push_to_hub", "--hub_model_id", "patient", "--hub_token", "hf_known")
    ended, shown = clients(("train_sd3_sft", "someone/open", *flags))
    assert ended == [""] and not any(hub.failures.values()) and "trying again" in shown
    assert (hub.root / "me" / "patient" / "transformer" / "config.json").exists()


def test_an_upload_that_fails_leaves_the_result(hub, clients, pipeline, tmp_path):
    """A warning, after the result was written."""
    hub.add("someone/open", pipeline)
    hub.failures = {"/commit/main": [500] * 4}
    ended, shown = clients(("train_sd3_soar_lora", "someone/open", "--push_to_hub", "--hub_token", "hf_known"))
    assert ended == [""] and not any(hub.failures.values()) and "the result is safe in" in shown
    assert (tmp_path / "out0" / "pytorch_lora_weights.safetensors").exists()
