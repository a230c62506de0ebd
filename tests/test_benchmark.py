# SPDX-License-Identifier: Apache-2.0
"""What a step costs: calls, operations, bytes alive, host reads; and the benchmark's own parts."""

import json
import re
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import benchmark_step
import pytest
import reference_step
import rehearse
import startup
import torch
from accelerate import Accelerator
from benchmark_step import Configuration, LiveBytes, cuda_autocast
from diffusers import SD3Transformer2DModel
from harness import ROOT, run_python
from PIL import Image
from torch._subclasses.fake_tensor import DataDependentOutputException

import train_sd3_sft
import train_sd3_soar
from data_utils import inspect_rows


BENCHMARK = ROOT / "examples" / "benchmark"
CACHED = "--cache_latents --cache_prompt_embeds"


@pytest.fixture(scope="module")
def counted(pipeline):
    """A function that counts a configuration once, at 128 pixels and 32 + 77 tokens."""
    results = {}

    def count(text):
        if text not in results:
            text_with_sizes = f"{text} --resolution 128 --max_sequence_length 32"
            results[text] = Configuration(text_with_sizes, pipeline).count()
        return results[text]

    return count


@pytest.mark.parametrize(
    ("text", "forwards"),
    [
        (f"sft {CACHED}", 3),
        (f"soar {CACHED} --trajectory_length 2", 10),
        (f"soar {CACHED} --trajectory_length 1 --num_rollout_paths 2", 10),
        (f"soar {CACHED} --trajectory_length 2 --cfg_scale_sampling 1", 9),
        (f"soar {CACHED} --trajectory_length 1 --gradient_checkpointing", 9),
        ("reference --trajectory_length 2", 11),
        ("reference --trajectory_length 1 --gradient_checkpointing", 10),
    ],
)
def test_forward_equivalents(text, forwards, counted):
    """3 a state with gradient, 1 without, 4 with checkpointing of the blocks."""
    assert counted(text)["forward_equivalents"] == pytest.approx(forwards, rel=0.02)


def test_a_lora_step_has_no_gradient_of_the_base(counted):
    """Linear layers cost 2 forward-equivalents a state instead of 3; attention, which has no weights, still 3."""
    lora = counted(f"soar_lora {CACHED} --trajectory_length 2 --rank 1")["forward_equivalents"]
    assert 7 < lora < counted(f"soar {CACHED} --trajectory_length 2")["forward_equivalents"] - 1.2


def activations(count):
    """What a step needs beside the state: float32 weights, and in training their gradients and two moments."""
    return count["peak"] - count["weights"] - 3 * 4 * count["trained"]


def test_memory_of_a_step(pipeline):
    """SOAR keeps one graph, as SFT does; the reference keeps one for every state, and one that nobody uses."""

    def memory(text):
        text += f" {CACHED} --resolution 128 --max_sequence_length 32"
        return Configuration(text, pipeline).count_once(operations=False)

    few = "--trajectory_length 2"
    sft, soar, reference = memory("sft"), memory(f"soar {few}"), memory(f"reference {few}")
    assert soar["weights"] == sft["weights"]
    # Between its backwards SOAR keeps the gradient, as does SFT with gradient accumulation.
    assert soar["peak"] - 4 * soar["trained"] < 1.1 * sft["peak"]
    lora, lora_sft = (memory(f"soar_lora {few} --rank 1 --lambda_aux {weight}") for weight in (1, 0))
    assert lora["peak"] < 1.15 * lora_sft["peak"]  # the states themselves weigh something in so small a model
    assert activations(reference) > 2.7 * activations(soar) > 0
    assert activations(memory(f"soar {few} --aux_batch_size 8")) > 1.8 * activations(soar)
    assert activations(memory(f"soar {few} --aux_batch_size 2")) < 0.9 * activations(soar)
    assert activations(memory(f"soar {few} --gradient_checkpointing")) < 0.6 * activations(soar)


def test_bytes_alive_are_those_of_the_tensors():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a + 1
        view = a[10:]
        del a
        assert live.now == live.peak == 8000
        del view
        assert live.now == 4000
        c = b * 2
        assert (live.now, live.peak) == (8000, 8000) and len(b) == len(c)


@pytest.mark.parametrize("flags", ["", "--gradient_checkpointing", "--mixed_precision bf16"])
def test_counted_bytes_are_those_of_a_real_step(flags, pipeline):
    text = f"soar {CACHED} {flags} --resolution 128 --max_sequence_length 32 --trajectory_length 2"
    configuration = Configuration(text, pipeline)
    counted = configuration.count()["peak_gib"] * 2**30
    with cuda_autocast(), LiveBytes() as live:
        accelerator = configuration.make_accelerator(cpu=True)
        transformer, optimizer, parameters = configuration.prepare(accelerator, configuration.load(compile=False))
        for tensor in (*parameters, *transformer.buffers()):
            live.add(tensor.untyped_storage())
        vae = SimpleNamespace(config=SimpleNamespace(**configuration.vae_scale))
        cpu, batch = torch.device("cpu"), configuration.make_batch()
        batch = configuration.script.prepare_batch(batch, configuration.null_embeds(), vae, None, 32, cpu)
        for _ in range(2):
            live.peak = live.now
            configuration.backward(accelerator, transformer, batch)
            optimizer.step()
            optimizer.zero_grad()
    assert live.peak == pytest.approx(counted, rel=0.01)


def test_the_reference_is_the_same_step(pipeline, photos):
    """Equal loss and gradient for equal draws: only the way there differs."""
    arguments = f"--pretrained_model_name_or_path {pipeline} --train_data_dir {photos} --lambda_aux 0.7"
    args = train_sd3_soar.parse_args(arguments.split())
    found = []
    for module in (train_sd3_soar, reference_step):
        transformer = SD3Transformer2DModel.from_pretrained(pipeline, subfolder="transformer")
        torch.manual_seed(0)
        batch = {
            "prompt_embeds": torch.randn(2, 9, 64),
            "pooled_prompt_embeds": torch.randn(2, 48),
            "null_prompt_embeds": torch.randn(1, 9, 64).expand(2, -1, -1),
            "null_pooled_prompt_embeds": torch.randn(1, 48).expand(2, -1),
        }
        latents = torch.randn(2, 16, 8, 8)
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        predict = partial(train_sd3_soar.predict_velocity, transformer, batch)
        total, logs = 0.0, Counter()
        for loss, shares in module.training_losses(args, predict, latents, generators, 3.0, nullcontext):
            loss.backward()
            total += loss.item()
            logs.update({name: share.item() for name, share in shares.items()})
        gradient = torch.cat([p.grad.flatten() for p in transformer.parameters() if p.grad is not None])
        found.append((total, logs, gradient))
    (ours, our_logs, our_gradient), (theirs, their_logs, their_gradient) = found
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert our_logs == pytest.approx(their_logs, rel=1e-5)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-4 * their_gradient.abs().max().item())


# Host synchronisation


@pytest.mark.parametrize(
    "text", ["sft", "soar --trajectory_length 1 --num_rollout_paths 2", "soar_lora --trajectory_length 1"]
)
@pytest.mark.parametrize("planted", [False, True])
def test_no_host_read_inside_the_step(text, planted, pipeline, monkeypatch):
    """
    The whole step, with clipping and AdamW, runs on tensors that have no values: whatever reads one raises. A planted
    read shows that it would.
    """
    configuration = Configuration(f"{text} {CACHED} --resolution 32 --max_sequence_length 16", pipeline)
    if planted:
        plain = configuration.training_losses

        def reading(*inputs):
            for loss, values in plain(*inputs):
                yield loss * (1.0 if loss > 0 else 2.0), values

        configuration.training_losses = reading
        with pytest.raises(DataDependentOutputException):
            configuration.count()
    else:
        configuration.count()


@pytest.mark.parametrize("script", ["train_sd3_sft", "train_sd3_soar", "train_sd3_soar_lora"])
def test_one_host_read_a_step(script, run, monkeypatch):
    """In the loop of the real script: the values to log and to check, once per optimizer step, however many states."""
    reads, steps = Counter(), []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def counting(self, *inputs, name=name, original=original, **more):
            reads[name] += 1
            return original(self, *inputs, **more)

        monkeypatch.setattr(torch.Tensor, name, counting)

    def log(self, logs, step):
        steps.append(dict(reads))
        reads.clear()

    monkeypatch.setattr(Accelerator, "log", log)
    # The images are read in another process, as they should be.
    run(script, *f"--max_train_steps 4 --train_batch_size 1 {CACHED} --dataloader_num_workers 1".split())
    assert steps[1:] == [{"tolist": 1}] * 3  # what comes before the first step is not the loop's


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_synchronisation_on_a_gpu(pipeline):
    """The same on a GPU, by PyTorch's own check."""
    configuration = Configuration(f"soar {CACHED} --mixed_precision bf16 --resolution 32", pipeline)
    accelerator = configuration.make_accelerator()
    transformer, optimizer, parameters = configuration.prepare(accelerator, configuration.load(compile=False))
    null_embeds = {name: tensor.cuda() for name, tensor in configuration.null_embeds().items()}
    vae = SimpleNamespace(config=SimpleNamespace(**configuration.vae_scale))
    length, cpu_batch = configuration.args.max_sequence_length, configuration.make_batch()

    def step():
        batch = configuration.script.prepare_batch(dict(cpu_batch), null_embeds, vae, None, length, accelerator.device)
        configuration.backward(accelerator, transformer, batch)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# The example


def test_benchmark_and_report(pipeline, tmp_path):
    """From the command line: a JSON with ratios that can be, a table and a picture."""
    command = [sys.executable, BENCHMARK / "benchmark_step.py", pipeline, "--output", tmp_path / "results" / "a.json"]
    command += ["--steps", "2", "--warmup", "1"]
    command += [
        f"{configuration} --resolution 32 --max_sequence_length 16"
        for configuration in (
            "reference --trajectory_length 1",
            f"soar {CACHED} --trajectory_length 1",
            f"sft {CACHED}",
        )
    ]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads((tmp_path / "results" / "a.json").read_text())
    reference, soar, sft = document["results"]
    assert soar["counted"]["forward_equivalents"] < reference["counted"]["forward_equivalents"]
    for result in (reference, soar, sft):
        assert result["measured"]["step_s"] > 0 and 0 < result["measured"]["model_flop_utilisation"] < 1
        assert result["measured"]["peak_allocated_gib"] is None  # not known on a CPU
    command = [sys.executable, BENCHMARK / "report_benchmark.py", tmp_path / "results"]
    done = run_python(command)
    (row,) = re.findall(r"`soar --trajectory_length 1 [^`]*` \| [\d.]+ \| (.*) \|", done.stdout)
    steps = [result["measured"]["step_s"] for result in (soar, sft)]
    assert float(row.split(" | ")[0]) == pytest.approx(steps[0] / steps[1], abs=0.01)
    assert (tmp_path / "results" / "report.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere", "soar"], "/nowhere holds no transformer/config.json"),
        (["PIPELINE", "sour --x"], "the first word must be one of sft, soar"),
        (["PIPELINE", "reference --aux_batch_size 2"], "the reference step does not know --aux_batch_size"),
        (["PIPELINE", "soar", "--profile"], "--profile lists the kernels of a GPU"),
    ],
)
def test_benchmark_of_nothing(arguments, message, pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = [str(pipeline) if a == "PIPELINE" else a for a in arguments]
    monkeypatch.setattr(sys, "argv", ["benchmark_step.py", *arguments, "--output", str(tmp_path / "a.json")])
    with pytest.raises(SystemExit) as error:
        benchmark_step.main()
    assert error.value.code and message in f"{error.value.code}{capsys.readouterr().err}"
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize("kind", ["folder", "jsonl", "datasets"])
def test_data_for_the_start(kind, pipeline, tmp_path):
    """Pictures that all differ, with captions, as each of the scripts' sources; made once."""
    flags = startup.make_data(kind, tmp_path, 3, 16)
    args = train_sd3_sft.parse_args(["--pretrained_model_name_or_path", str(pipeline), *flags])
    rows = train_sd3_sft.load_images(args)
    assert rows["captions"][:] == [[f"picture number {i} of 3"] for i in range(3)]
    assert len({found["digest"] for found in inspect_rows(rows)}) == 3
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert startup.make_data(kind, tmp_path, 3, 16) == flags
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_report_of_the_start(tmp_path):
    """The cost of a further image is the slope between the fewest and the most; the picture shows every kind."""
    costs = {"checked": 0.01, "first": 0.1, "second": 0.001, "resumed": 0.002}
    results = [
        {"kind": kind, "images": images, "cache_files": images / 500, "decoding": 0.004}
        | {start: {"seconds": 10 + cost * images, "gib": 1 + images / 10**6} for start, cost in costs.items()}
        for kind in ("folder", "jsonl")
        for images in (3000, 1000)
    ]
    rates = [
        {"resolution": resolution, "cached": cached, "workers": 2, "samples_per_second": resolution * (1 + cached)}
        for resolution in (1024, 512)
        for cached in (False, True)
    ]
    measured = {"results": results, "worker_mib": [[1000, 2.5], [3000, 2.6]], "loader": rates}
    lines = startup.report(measured).splitlines()
    row = "| jsonl, 1,000 to 3,000 | 4.00 ms | 10.000 ms | 100.000 ms | 1.000 ms | 2.000 ms | 1000 s |"
    assert row in lines and row.replace("jsonl", "folder") in lines
    assert "| jsonl | 1.00 GiB | 2.00 |" in lines
    assert "| cached, 2 workers | 1024 | 2048 |" in lines
    assert "A worker's own memory: 2.5 MiB with 1,000 images, 2.6 with 3,000." in lines
    startup.draw(measured, tmp_path / "startup.png")
    with Image.open(tmp_path / "startup.png") as picture:
        assert picture.width == 960 and len(picture.convert("RGB").getcolors(10**6)) > 50


def test_the_loader_alone(pipeline, tmp_path):
    """Cached tensors of SD3.5's size, or pictures, are loaded; and a worker counts what it has for itself."""
    args = SimpleNamespace(folder=tmp_path, pipeline=pipeline, batches=1)
    for cached in (True, False):
        rate = startup.loader(args, 512, cached, 0, number=8)
        assert rate["samples_per_second"] > 0 and rate["cached"] == cached
    assert sum(path.stat().st_size for path in (tmp_path / "loader_512" / "cache").rglob("*")) > 8 * 3.2e6
    assert 0 < startup.worker_memory(tmp_path / "index", 100) < 500


def test_rehearsal(pipeline, small_photos, tmp_path, monkeypatch):
    """A run and its resumption by the script's command line; what does not fit is named before anything runs."""
    commands = []

    def run(command, log):
        commands.append(run_python(command).args)
        return 2.0, 1.5

    monkeypatch.setattr(rehearse, "run", run)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    flags = f"{rehearse.FLAGS} --rank 2 --max_sequence_length 16"
    found = rehearse.rehearse(f"soar_lora {flags}", pipeline, small_photos, 32, tmp_path)
    assert found["same_bits"] and found["counted_gib"] > 0 and found["step_s"] > 0
    assert found["resident_gib"] == 1.5 and [*tmp_path.glob("straight*")] == []
    assert len(commands) == 2 and "--resume_from_checkpoint" in commands[1]
    document = {"results": [found, found | {"same_bits": False}]}
    assert [row.split("|")[-2].strip() for row in rehearse.table(document).splitlines()[2:]] == ["yes", "NO"]
    monkeypatch.setattr(rehearse.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))
    assert "GiB of memory, and 1 are free" in rehearse.rehearse(
        f"soar_lora {flags}", pipeline, small_photos, 32, tmp_path
    )
    assert len(commands) == 2


def test_the_start_is_that_of_the_results():
    """Every table of the README's section is what `startup.py --report` makes of the committed results."""
    measured = json.loads((BENCHMARK / "results" / "startup.json").read_text())
    assert startup.report(measured) in (BENCHMARK / "README.md").read_text()


def test_the_tables_are_those_of_the_results():
    """Every table of the benchmark's README is what `report_benchmark.py` makes of the committed results."""
    command = [sys.executable, str(BENCHMARK / "report_benchmark.py"), str(BENCHMARK / "results"), "--no_picture"]
    report = run_python(command).stdout
    readme = (BENCHMARK / "README.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", report, flags=re.MULTILINE)
    assert len(tables) >= 3
    for table in tables:
        assert table in readme


def test_figures_of_the_readme():
    """Every figure of memory in the README's table, and the ratios below it, are in the committed results."""
    files = {path.stem: json.loads(path.read_text()) for path in (BENCHMARK / "results").glob("*.json")}
    runs = [(f"{run['limit_gib']:g}", f"{run['peak_reserved_gib']:.1f}") for run in files.values() if "run" in run]
    step = next(r for r in files["gpu_step"]["results"] if r["configuration"].endswith(CACHED))
    section = (ROOT / "README.md").read_text().split("## Train\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) GB .*", section, flags=re.MULTILINE)
    figures = [
        (card, figure)
        for card, row in zip(rows, re.findall(r"^\| \d+ GB (.*)", section, flags=re.MULTILINE), strict=True)
        for figure in re.findall(r"\| ([\d.]+) GiB", row)
    ]
    assert sorted(figures) == sorted([*runs, ("80", f"{step['measured']['peak_reserved_gib']:.1f}")])

    text = " ".join(section.split())
    for name, flags in (
        ("cpu_step", f"{CACHED} --resolution 64"),
        ("gpu_compiled", f"--mixed_precision bf16 {CACHED}"),
    ):
        results = {r["configuration"]: r["measured"] for r in files[name]["results"]}
        compiled = results[f"soar {flags} --torch_compile"]
        sft, soar = (results[f"{method} {flags}"]["step_s"] for method in ("sft", "soar"))
        assert f"{soar / sft:.1f} times" in text and f"{compiled['step_s'] / soar:.2f}" in text
    assert f"a first step of {compiled['first_step_s']:.0f} s" in text
    plain, compiled = (result["measured"]["step_s"] for result in files["gpu_lora"]["results"])
    assert f"{compiled / plain:.2f} of a LoRA's" in text
