# SPDX-License-Identifier: Apache-2.0
"""`examples/paper`: its plan against the benchmark's counts, and the toy experiment from nothing to the report."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, run_forked


HERE = ROOT / "examples" / "paper"
sys.path.insert(0, str(HERE))
import paper  # noqa: E402
import report_paper  # noqa: E402


def test_costs_are_those_of_the_benchmark():
    """Forwards of a sample and step, and operations of a forward, as `../benchmark` counts them at full size."""
    counted = {}
    for name in ("count_step", "count_small"):
        results = json.loads((ROOT / "examples" / "benchmark" / "results" / f"{name}.json").read_text())["results"]
        counted |= {result["configuration"]: result["counted"] for result in results}
    cached = "--mixed_precision bf16 --cache_latents --cache_prompt_embeds"
    for method in ("sft", "soar"):
        found = counted[f"{method} {cached} --gradient_checkpointing"]
        assert found["forward_equivalents"] == pytest.approx(paper.FORWARDS[method], abs=0.05)
        forward = found["tflop"] / found["forward_equivalents"] / 4
        assert json.loads((HERE / "models.json").read_text())[paper.MEDIUM] == pytest.approx(forward, rel=1e-6)
    (lora,) = (
        value for key, value in counted.items() if re.fullmatch("soar_lora .*512 --gradient_checkpointing", key)
    )
    assert lora["forward_equivalents"] == pytest.approx(paper.FORWARDS["soar_lora"], abs=0.6)


@pytest.mark.parametrize("gpus", [1, 8])
def test_plan_of_the_full_size(gpus, monkeypatch):
    """Every command is one that its script takes; sums are of counts that must hold; the licences are named."""
    monkeypatch.chdir(ROOT)
    stages = {stage.name: stage for stage in paper.plan("full", "outputs/paper", "--dataset_name owner/name", gpus)}
    assert stages["train-sft"].forwards == 10_000 * 32 * 4 and stages["train-soar"].forwards == 10_000 * 32 * 29
    assert stages["train-sft-at-soars-cost"].forwards == stages["train-soar"].forwards
    assert stages["draw-geneval-base"].forwards == 553 * 4 * 40 * 2
    pictures = 48 * 24
    assert stages["train-flow-grpo-aesthetic"].forwards == 1000 * pictures * (2 * 10 + 2 * 9 * 3 + 2 * 9)
    for name in ("train-sft", "train-soar"):
        words = shlex.split(stages[name].command)
        script = __import__(words[0].removesuffix(".py"))
        args = script.parse_args(words[1:])
        assert args.train_batch_size * args.gradient_accumulation_steps * gpus == 32
        assert (args.max_train_steps, args.learning_rate, args.lr_scheduler) == (10_000, 2e-5, "constant")
    for stage in stages.values():
        assert all(name in stages for name in stage.after) and (ROOT / stage.command.split()[0]).exists()
    gated = {model for stage in stages.values() for model in stage.downloads if "/" in model}
    assert gated == set(paper.LICENCES)


@pytest.mark.parametrize("size", ["one", "full"])
def test_sums_of_the_readme(size, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert paper.summary(paper.plan(size, "outputs/paper", "--train_data_dir x")) in (HERE / "README.md").read_text()


def test_what_cannot_run_is_named_and_tried_again(tmp_path, monkeypatch, capsys):
    """With all that needs it; the others run; and when it can be had, it and the report are all that runs."""
    monkeypatch.chdir(ROOT)
    stages, called = paper.plan("one", str(tmp_path), "--train_data_dir x"), []
    names = {stage.command: stage.name for stage in stages}

    def call(command):
        called.append(shlex.join(command[1:]))
        fails = gone and ("--metric aesthetic" in called[-1] or "FLUX" in called[-1])
        return (1, "no such weights") if fails else (0, "")

    monkeypatch.setattr(paper, "call", call)
    gone = True
    assert paper.run(stages, str(tmp_path), "") == 0
    missing = json.loads((tmp_path / "missing.json").read_text())
    assert missing["filter-aesthetic"] == missing["draw-geneval-FLUX.1-dev"] == "no such weights"
    assert missing["train-soar-aesthetic"] == "needs filter-aesthetic"
    assert missing["train-soar-then-flow-grpo-aesthetic"] == "needs train-soar-aesthetic"
    assert missing["draw-ocr-sft-aesthetic"] == "needs train-sft-aesthetic"
    assert not any("clipscore" in name or name.endswith("-soar") for name in missing)
    assert "missing: draw-ocr-FLUX.1-dev: no such weights" in capsys.readouterr().out
    gone, before = False, len(called)
    assert paper.run(stages, str(tmp_path), "") == 0
    again = [names[command] for command in called[before:]]
    assert again == [stage.name for stage in stages if stage.name in missing or stage.name == "report"]
    before = len(called)
    assert paper.run(stages, str(tmp_path), "") == 0 and len(called) == before


def test_curves_and_cells_of_the_report(tmp_path):
    """The means that `score_images.py` wrote, of the images that have scores; the number of the others is said."""
    for step, mean in ((4, 6.0), (2, 5.0)):
        folder = tmp_path / "images" / "curves" / "aesthetic" / f"sft-aesthetic-{step}"
        (folder / "scores").mkdir(parents=True)
        (folder / "scores" / "aesthetic.jsonl").write_text('{"score": NaN}\n')
        summary = {"mean": mean, "low": 4.5, "high": 6.5, "images": 1, "prompts": 1, "missing": step}
        (folder / "scores.json").write_text(json.dumps({"aesthetic": summary}))
    assert report_paper.curves(tmp_path, "aesthetic") == {"sft-aesthetic": [(2, 5.0), (4, 6.0)]}
    assert report_paper.curves(tmp_path, "clipscore") == {}
    assert "6.000<br><small>[4.500, 6.500], 4 images missing" in report_paper.cell(
        summary | {"mean": 6, "missing": 4}, ".3f"
    )


def test_the_toy_experiment(tmp_path, monkeypatch, capsys):
    """From nothing to the report, killed in the middle; a second run does nothing; what is missing is named."""
    out, called, killed = tmp_path / "out", [], []

    def call(command):
        name = Path(command[1]).stem
        called.append(name)
        with open(tmp_path / "log", "a") as log:
            watcher = None
            if name == "train_sd3_soar" and not killed:
                killed.append(name)
                watcher = subprocess.Popen([sys.executable, "-c", WATCH, str(os.getpid()), str(out)])
            done = run_forked(command, log, log, os.environ | {"OMP_NUM_THREADS": "1"}, ROOT)
            if watcher:
                watcher.wait()
        return done.returncode, "its last line"

    monkeypatch.setattr(paper, "call", call)
    monkeypatch.chdir(ROOT)
    assert paper.main(["tiny", "--out", str(out)]) == 1  # killed
    assert called[-1] == "train_sd3_soar" and not (out / "report.html").exists()
    before = len(called)
    assert paper.main(["tiny", "--out", str(out)]) == 0, (tmp_path / "log").read_text()[-3000:]
    assert called[before] == "train_sd3_soar" and "make_tiny_sd3" not in called[before:]
    before = len(called)
    assert paper.main(["tiny", "--out", str(out)]) == 0 and len(called) == before

    stages = paper.plan("tiny", str(out), "")
    arms = [stage.name.removeprefix("train-") for stage in stages if stage.name.startswith("train-")]
    page = (out / "report.html").read_text()
    assert "toy" in page and "Nothing." in page.split("<h2>Missing</h2>")[1]
    for arm in ("base", *arms):
        row = re.search(f"<tr><td>{arm}</td>(.*?)</tr>", page)[1]
        assert re.search(r"\d\.\d{3}<br><small>\[\d\.\d{3}, \d\.\d{3}\]", row), arm
    for arm in [arm for arm in arms if arm.endswith("-ocr")]:
        points = list((out / "images" / "curves" / "ocr").glob(f"{arm}-[0-9]/scores.json"))
        assert len(points) == 2, arm
    assert page.count("data:image/png") == 2 and "0.67" in page  # a curve, exposure bias, and what was published


# Kill the youngest child of a process once the run has written its first checkpoint.
WATCH = """
import os, signal, sys, time
from pathlib import Path
parent, out = int(sys.argv[1]), Path(sys.argv[2])
for _ in range(1200):
    time.sleep(0.05)
    if (out / "runs" / "soar" / "checkpoint-2").exists():
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        own = [child for child in map(int, children) if child != os.getpid()]
        os.kill(max(own), signal.SIGKILL)
        break
"""
