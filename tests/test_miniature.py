# SPDX-License-Identifier: Apache-2.0
"""The experiment in miniature: its world and detector, its controls, and the way from scenes to the table."""

import itertools
import json
import random
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import evaluate
import experiment
import numpy as np
import pytest
import report
import torch
import train_control
import words
import world
from diffusers import training_utils
from harness import ROOT, run_forked, run_python
from PIL import Image
from safetensors.torch import save_file

import soar_utils


HERE = ROOT / "examples" / "miniature"


def scenes(part, count, seed=0):
    rng = random.Random(seed)
    for task in world.TASKS:
        for _ in range(count):
            prompt = rng.choice(world.split(task)[part])
            yield prompt, world.realise(prompt, rng), rng


@pytest.mark.parametrize(("noise", "size"), [(0, 32), (12, 32), (12, 64)])
def test_the_truth_scores_one(noise, size):
    """Every true picture, with noise of 5 % of the range, is right in every respect."""
    generator = np.random.default_rng(0)
    for prompt, things, _ in scenes("test", 60):
        pixels = np.asarray(world.draw(things, size=size), dtype=float)
        assert pixels.shape == (size, size, 3)
        image = Image.fromarray((pixels + generator.normal(0, noise, pixels.shape)).clip(0, 255).astype(np.uint8))
        found, broken = world.detect(image)
        assert sorted(map(repr, found)) == sorted(map(repr, things)) and broken == 0
        assert world.score(prompt, found, broken) == (True, True)


def test_other_prompts_score_little():
    """A true picture of another prompt of the task fits by chance only."""
    hits = []
    for prompt, things, rng in scenes("test", 100):
        others = [other for other in world.split(prompt.task)["test"] if other.text != prompt.text]
        found, broken = world.detect(world.draw(things))
        hits.append(world.score(rng.choice(others), found, broken)[0])
    assert np.mean(hits) < 0.1


def test_rewards_of_what_is_drawn(tmp_path):
    """True pictures of the prompts' own files get 1, others' little; a broken one, half."""
    for module, part in ((world, "train"), (words, "train")):
        module.write_prompts(tmp_path / "prompts.jsonl", part, 2)
        prompts, rows = module.read_prompts(tmp_path / "prompts.jsonl")
        truth = [module.draw_truth(prompt, random.Random(i)) for i, prompt in enumerate(prompts)]
        assert module.reward(truth, rows) == [1.0] * len(rows)
        assert np.mean(module.reward(truth[1:] + truth[:1], rows)) < 0.5
    things = [world.Thing("square", "red", world.CELLS[0]), world.Thing("circle", "blue", world.CELLS[-1])]
    row = {"task": "colors", "things": [["square", "red"]], "relation": None}
    assert world.reward([world.draw(things), world.draw(things[1:])], [row, row]) == [0.5, 0.0]


def test_near_misses_score_zero():
    """One thing wrong: the shape, the colour, the number, the side, half an object, one object more (strict)."""
    counted = {"wrong": 0, "more": 0, "broken": 0}
    for prompt, things, rng in scenes("test", 40):
        thing = things[0]
        rest = things[1:]
        shape = rng.choice([s for s in world.SHAPES if s not in [wanted.shape for wanted in prompt.things]])
        misses = [[world.Thing(shape, thing.color, thing.cell), *rest]]
        if prompt.things[0].color:
            colors = [c for c in world.COLORS if c not in [wanted.color for wanted in prompt.things]]
            misses.append([world.Thing(thing.shape, rng.choice(colors), thing.cell), *rest])
        if prompt.task == "counting":
            misses.append(rest)
        if prompt.task == "position":
            misses.append([world.Thing(a.shape, a.color, b.cell) for a, b in (things, things[::-1])])
        for miss in misses:
            assert not world.score(prompt, *world.detect(world.draw(miss)))[0], (prompt, miss)
            counted["wrong"] += 1
        free = [cell for cell in world.CELLS if cell not in [t.cell for t in things]]
        if free:
            more = [*things, world.Thing(shape, "red", free[0])]
            assert world.score(prompt, *world.detect(world.draw(more))) == (True, False)
            counted["more"] += 1
        half = np.asarray(world.draw(things)).copy()
        top, left = thing.cell[0] * world.CELL, thing.cell[1] * world.CELL
        half[top : top + world.CELL, left : left + world.CELL // 2] = world.PAPER
        found, broken = world.detect(Image.fromarray(half))
        assert not world.score(prompt, found, broken)[1]
        counted["broken"] += broken
    assert min(counted.values()) > 100


def test_splits_do_not_share_prompts():
    """Where there are many; pairs of shape and colour that are held out are asked for in the test alone."""
    for task in world.TASKS:
        parts = world.split(task)
        assert not any(prompt.held_out for part in ("train", "validation") for prompt in parts[part])
        texts = {part: {prompt.text for prompt in prompts} for part, prompts in parts.items()}
        if len(world.all_prompts(task)) > 100:
            for one, other in itertools.combinations(texts.values(), 2):
                assert not one & other
    assert any(prompt.held_out for prompt in world.split("colors")["test"])
    assert len(world.HELD_OUT) == 6


def test_words_are_read():
    """Real OCR reads true pictures; other words and an empty page score by chance, noisy pictures in between."""
    chosen = words.split()["test"][:60]
    assert [words.read(words.draw(word)) for word in chosen] == chosen
    others = words.outcomes(chosen, [words.draw(word) for word in chosen[1:] + chosen[:1]])["letters"]
    assert np.mean([int(c) for c in others]) < 0.8  # of three
    assert words.outcomes(["BUG"], [Image.new("RGB", (32, 32), world.PAPER)]) == {"letters": "0"}
    rng = random.Random(0)
    noisy = words.outcomes(chosen, [words.draw(word, rng) for word in chosen])["letters"]
    assert 1.5 < np.mean([int(c) for c in noisy]) < 3


@pytest.mark.parametrize(
    ("text", "right"),
    [("BUG", 3), ("b u g", 3), ("BUGS", 3), ("BUS", 2), ("UG", 2), ("GUB", 1), ("", 0)],
)
def test_letters_right(text, right):
    assert words.letters_right("BUG", text) == right


def test_words_do_not_share():
    """Every word is in one split; captions spell the word."""
    parts = words.split()
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == 18 * 4 * 18
    image, caption = words.make_word(random.Random(0), noisy=False)
    spelled = caption.removeprefix("picture of ").replace(" ", "").upper()
    assert spelled in parts["train"] and words.read(image) == spelled


def test_checkpoints_are_scored_by_their_average(tmp_path):
    """`ema.safetensors` has the averaged weights in the order of the parameters."""
    base = tmp_path / "base"
    make = [sys.executable, ROOT / "examples" / "make_tiny_sd3.py", base, "--size", "mini"]
    run_python(make)
    whole = evaluate.load_pipeline(base, base).transformer
    checkpoint = tmp_path / "checkpoint-1"
    whole.save_pretrained(checkpoint / "transformer")
    average = {str(i): parameter + i for i, parameter in enumerate(whole.parameters())}
    save_file(average, checkpoint / "ema.safetensors")
    loaded = evaluate.load_pipeline(base, checkpoint).transformer
    for i, parameter in enumerate(loaded.parameters()):
        assert torch.equal(parameter, average[str(i)])


def test_frechet_distance_and_diversity():
    """Known values for Gaussians, nothing between a set and itself, and blur and collapse are seen."""
    one = torch.randn(20000, 3, generator=torch.Generator().manual_seed(0)).double()
    assert evaluate.frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    assert evaluate.frechet_distance(one, one + 2) == pytest.approx(12, rel=1e-6)
    assert evaluate.frechet_distance(one, 3 * one) == pytest.approx(3 * 4, rel=0.05)
    prompts = [world.Prompt("single_object", (world.Thing("star"),))] * 40
    rng = random.Random(0)
    images = [world.draw(world.realise(prompt, rng)) for prompt in prompts]
    records = [{"prompt": prompt.text} for prompt in prompts]
    truth = evaluate.diversity(evaluate.features(images), records)
    assert evaluate.diversity(evaluate.features([images[0]] * 40), records) == 0
    faded = [Image.blend(image, images[0], 0.5) for image in images]
    assert 0.1 < evaluate.diversity(evaluate.features(faded), records) / truth < 0.6


def test_true_state_has_no_rollout(monkeypatch):
    """Its auxiliary states are ideal ones, of the same latents, noise and levels, whatever the velocity is."""
    for name in ("add_noise", "rollout_step"):
        monkeypatch.setattr(soar_utils, name, getattr(soar_utils, name))  # put back afterwards
    train_control.true_state()
    latents, noise, velocity = torch.randn(3, 2, 4, 5, 5)
    sigma, sigma_next, sigma_aux = torch.tensor([[0.8, 0.5], [0.7, 0.4], [0.9, 0.6]])
    noisy_latents = soar_utils.add_noise(latents, noise, sigma)
    end = soar_utils.rollout_step(noisy_latents, velocity, sigma, sigma_next, "ode", 0.5, None)
    aux_latents = soar_utils.renoise(end, noise, sigma_next, sigma_aux)
    torch.testing.assert_close(aux_latents, soar_utils.add_noise(latents, noise, sigma_aux))
    torch.testing.assert_close(soar_utils.correction_target(aux_latents, latents, sigma_aux), noise - latents)


def test_sigma_mixture_is_soars(monkeypatch):
    """The levels of 20,000 SFT samples against those of SOAR's states, drawn by its own formulas."""
    name = "compute_density_for_timestep_sampling"
    monkeypatch.setattr(training_utils, name, getattr(training_utils, name))  # put back afterwards
    train_control.sigma_mixture()
    generator = torch.Generator().manual_seed(0)
    density = ("logit_normal", 1, 0.0, 1.0, 1.29)
    drawn = torch.cat(
        [training_utils.compute_density_for_timestep_sampling(*density, generator=generator) for _ in range(20000)]
    )
    sigma = soar_utils.shift_sigma(drawn, 3.0)
    base = soar_utils.shift_sigma(torch.sigmoid(torch.randn(70000, generator=generator)), 3.0)
    after = soar_utils.next_sigma(base, 40, 3.0)
    aux = after + torch.rand(70000, generator=generator) * (1 - after)
    expected = torch.cat([base[:10000], aux[:60000]])
    quantiles = torch.linspace(0.01, 0.99, 33)
    torch.testing.assert_close(sigma.quantile(quantiles), expected.quantile(quantiles), rtol=0, atol=0.015)
    assert abs(sigma.mean() - base.mean()) > 0.05  # and is another one than SFT's


def test_from_scenes_to_the_table(tmp_path, monkeypatch):
    """Two arms, a few steps each, by the scripts' command lines; the table has them and a second call runs nothing."""
    monkeypatch.setattr(experiment, "subprocess", SimpleNamespace(run=run_forked, STDOUT=subprocess.STDOUT))
    for name in ("SETTINGS", "GUIDANCES"):  # fewer, which forks know, too
        few = {setting: n for setting, n in getattr(experiment, name).items() if setting in [(4.5, 20), (4.5, 5)]}
        monkeypatch.setattr(experiment, name, few)
    out, results = tmp_path / "out", tmp_path / "results"
    run_python([sys.executable, HERE / "world.py", out / "world", "--noisy", "64", "--curated", "64"])
    make = [sys.executable, ROOT / "examples" / "make_tiny_sd3.py", out / "raw_world", "--size", "mini"]
    run_python(make)
    for part in ("test", "validation"):  # two pictures a task, of one prompt where it comes twice
        file = out / "world" / f"{part}.jsonl"
        lines, kept = file.read_text().splitlines(), []
        each = len(lines) // 6
        for task in range(6):
            own = lines[task * each : (task + 1) * each]
            prompts = [json.loads(line)["prompt"] for line in own]
            kept += [own[0], own[prompts.index(prompts[0], 1) if prompts.count(prompts[0]) > 1 else 1]]
        file.write_text("\n".join(kept) + "\n")
    experiment.make_base(out, 0, 2)
    experiment.score(out, results, 0, out / "base_0", "base0")
    runs = [experiment.Run(arm, 0.1, 0, 0) for arm in ("SFT", "true state")]
    for run in runs:
        folder = experiment.train(out, run, 3)
        assert json.loads((folder / "training_args.json").read_text())["max_train_steps"] == 3
        experiment.score(out, results, 0, folder, run.name)
    before = {path: path.stat().st_mtime_ns for path in (*out.rglob("*.safetensors"), *results.rglob("*.json"))}
    for run in runs:
        experiment.score(out, results, 0, experiment.train(out, run, 3), run.name)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    table = run_python([sys.executable, HERE / "report.py", results]).stdout
    scores = json.loads((results / f"{runs[0].name}.json").read_text())["test"]["guidance 4.5, 20 steps"]
    (row,) = re.findall(r"^\| SFT \| 1 \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", table, flags=re.MULTILINE)
    expected = [f"{np.mean([int(c) for c in scores[key]]):.3f}" for key in ("lenient", "strict", "broken")]
    assert list(row) == expected and "| true state | 1 |" in table
    for name in ("scores", "steps", "samples"):
        assert (results / f"{name}.png").exists()


def test_paired_differences():
    """Mean, interval and signs against the plain loops; of an arm with itself there is nothing to tell."""
    rng, tasks, prompts = np.random.default_rng(0), 6, 100
    arms = []
    for rates in ([0.5, 0.5, 0.5], [0.4, 0.6, 0.2]):
        hits = [rng.random(tasks * prompts) < rate for rate in rates]
        scores = [{"test": {"here": {"lenient": "".join(map(str, map(int, run)))}}} for run in hits]
        arms.append(({(0, seed): run for seed, run in enumerate(scores)}, np.reshape(hits, (3, tasks, prompts)) * 1.0))
    (one, first), (other, second) = arms
    means = []
    for _ in range(1500):
        runs, columns = rng.integers(3, size=3), rng.integers(prompts, size=(tasks, prompts))
        drawn = [(first - second)[run, task][columns[task]].mean() for run in runs for task in range(tasks)]
        means.append(np.mean(drawn))
    text = report.difference(one, other, "here", "lenient")
    found = re.fullmatch(r"(\S+) \[(\S+), (\S+)\], 2 of 3", text)
    assert float(found[1]) == pytest.approx((first - second).mean(), abs=6e-4)
    assert [float(found[2]), float(found[3])] == pytest.approx(list(np.quantile(means, [0.025, 0.975])), abs=0.015)
    assert report.difference(one, one, "here", "lenient") == "+0.000 [+0.000, +0.000], 3 of 3"


def test_undefined_gaps(tmp_path):
    """What `measure_exposure_bias.py` found no number for is no number in the table, and left out of the picture."""
    gaps = report.read_gaps(HERE / "results", 0.1)
    for gap in gaps[1:]:
        for record in gap["summary"] + gap["levels"]:
            if (record["model"], record["num_own_steps"]) == ("sft", 1):
                record |= dict.fromkeys(("gap_change", "ratio"))
    before, after = (report.gap_table(found).splitlines() for found in (report.read_gaps(HERE / "results", 0.1), gaps))
    assert "undefined" not in str(before) and before[:2] + before[3:] == after[:2] + after[3:]
    cells, others = after[2].split(" | "), before[2].split(" | ")
    assert cells[3] == "undefined" and cells[:3] + cells[4:] == others[:3] + others[4:]
    report.draw_gap(gaps, tmp_path / "gap.png")


def test_nothing_is_missing(tmp_path, monkeypatch):
    """The committed results are the whole experiment: `full` has nothing to do; where a file is missing, it has."""
    results, made = tmp_path / "results", []
    results.mkdir()
    for path in (HERE / "results").glob("*.json"):
        shutil.copy(path, results)
    monkeypatch.chdir(ROOT)  # main changes the folder, too
    monkeypatch.setattr(experiment, "make_raw", lambda out, world, *_, threads: made.append(world))
    monkeypatch.setattr(experiment, "make_base", lambda out, name, *_, threads: made.append(name))
    monkeypatch.setattr(experiment, "do", lambda out, results, run, *_: made.append(run))
    monkeypatch.setattr(sys, "argv", ["experiment.py", "full", "--out", f"{tmp_path}/out", "--results", str(results)])
    experiment.main()
    assert made == []
    (results / "sft-dropout0-base1-seed2-step250.json").unlink()
    experiment.main()
    run = experiment.Run("SFT", 0.0, 1, 2)
    assert made == ["world", 1, 1, run]
    (results / f"{run.gap}.json").unlink()
    experiment.main()
    assert set(made[4:]) == {"world", 1, *(experiment.Run(arm, 0.0, 1, 2) for arm in experiment.MAIN_ARMS)}


def test_figures_of_the_text():
    """Every figure that the text of a README names about the experiment is in one of its tables."""
    readme = (HERE / "README.md").read_text()
    results = readme.split("## Results")[1].split("## Set-up")[0]
    tables = "\n".join(re.findall(r"^\|.*", readme, flags=re.MULTILINE))
    text = re.sub(r"^\|.*", "", results, flags=re.MULTILINE)
    intervals = re.findall(r"[+-]0\.\d{3}\s\[[^]]*\]", text)
    assert len(intervals) > 3 and [i for i in intervals if " ".join(i.split()) not in tables] == []
    figures = re.findall(r"[+-]?0\.\d{2,3}", text)
    assert len(figures) > 5 and [figure for figure in figures if figure not in tables] == []


def test_sentences_of_the_readme():
    """What the main README says of the committed results holds: by intervals, and of the gap in each group of runs."""
    runs, bases = report.read(HERE / "results", "world")
    arms = {(arm, d): report.finished(runs, bases, arm, d) for arm in report.MAIN_ARMS for d in report.DROPOUTS}

    def interval(one, other, setting=report.MAIN_SETTING, dropout=0.1):
        text = report.difference(arms[one, dropout], arms[other, dropout], setting, "lenient")
        return [float(end) for end in re.search(r"\[(\S+), (\S+)\]", text).groups()]

    assert all(len(found) == 6 for found in arms.values())
    lead = report.difference(arms["SOAR K=40", 0.1], arms["SFT", 0.1], report.MAIN_SETTING, "lenient")
    mean, brackets = re.match(r"(\S+) (\[[^]]*\])", lead).groups()
    assert f"SOAR is ahead of SFT: {mean} of score {brackets}." in (ROOT / "README.md").read_text()
    assert interval("SOAR K=40", "SFT")[0] > 0 > interval("SOAR K=40", "SFT x 7")[1]
    low, high = interval("SOAR K=40", "SFT", report.BEST)
    assert low < 0 < high and interval("SOAR K=40", "SFT x 7", report.BEST)[1] < 0
    low, high = interval("SOAR K=40", "true state")
    assert -0.02 < low < 0 < high < 0.02
    low, high = interval("SOAR K=40", "SFT", dropout=0)
    assert low < 0 < high and interval("SOAR K=40", "SFT x 7", dropout=0)[1] < 0
    gaps = report.read_gaps(HERE / "results", 0.1)
    assert len(gaps) == 6
    for gap in gaps:
        records = [r for r in gap["summary"] if r["num_own_steps"] == 4 and r["model"] != "base"]
        ideal, own = ({r["model"]: r[f"{error}_change"] for r in records} for error in ("ideal", "own"))
        assert own["soar_k10"] < own["sft"] < own["soar_k40"] < own["true_state"]
        assert ideal["sft"] < ideal["soar_k40"] == pytest.approx(ideal["true_state"], abs=0.01)


def test_tables_of_the_readme():
    """Every table of the report on the committed results is in the README, and no other table of figures is."""
    report = [sys.executable, HERE / "report.py", HERE / "results", "--no_pictures"]
    printed = run_python(report).stdout
    tables = re.findall(r"(?:^\|.*\n)+", printed, flags=re.MULTILINE)
    readme = (HERE / "README.md").read_text()
    assert len(tables) >= 3
    assert [t for t in re.findall(r"(?:^\|.*\n)+", readme, flags=re.MULTILINE) if "--:" in t] == tables
