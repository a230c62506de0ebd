# SPDX-License-Identifier: Apache-2.0
"""The experiment in miniature: its world and detector, its controls, and the way from scenes to the table."""

import importlib
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


PROMPTS = {prompt.text: prompt for task in world.TASKS for prompt in world.all_prompts(task)}


def test_sets_of_pictures(tmp_path):
    """Clean ones show what their captions say; each set is of its own prompts, and all are functions of the seed."""
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        numbers = ["--noisy", "40", "--curated", "80", "--unseen", "80", "--seed", str(seed)]
        run_python([sys.executable, HERE / "world.py", tmp_path / name, *numbers])
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*")]
    assert len(files) == 40 + 80 + 80 + 3 + 2
    for file in files:
        one, again, other = ((tmp_path / name / file).read_bytes() for name in ("one", "again", "other"))
        assert one == again
    captions = {}
    for name in ("one", "other"):
        for part in ("noisy", "curated", "unseen"):
            folder = tmp_path / name / part
            rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
            captions[name, part] = [row["text"] for row in rows]
            for row in rows if part != "noisy" else ():
                found, broken = world.detect(Image.open(folder / row["file_name"]))
                assert world.score(PROMPTS[row["text"]], found, broken) == (True, True)
    assert len(set(map(tuple, captions.values()))) == 6
    train, test = ({p.text for task in world.TASKS for p in world.split(task)[part]} for part in ("train", "test"))
    assert set(captions["one", "noisy"]) | set(captions["one", "curated"]) <= train
    assert set(captions["one", "unseen"]) <= test and not set(captions["one", "unseen"]) <= train


def test_noisy_pictures(tmp_path, monkeypatch):
    """Of these alone a fifth have captions of others, some show things that nobody asked for, and none is clean."""

    def make(rng, noisy):
        made.append(noisy)
        return Image.new("RGB", (4, 4)), str(len(made) - 1)

    for noisy, wrong in ((False, 0), (True, 20)):
        made = []
        world.write_pictures(tmp_path / str(noisy), 100, make, random.Random(0), noisy)
        lines = (tmp_path / str(noisy) / "metadata.jsonl").read_text().splitlines()
        captions = [int(json.loads(line)["text"]) for line in lines]
        assert made == [noisy] * 100
        assert sum(caption != i for i, caption in enumerate(captions)) == wrong
    drawn = []
    monkeypatch.setattr(world, "draw", lambda things, rng, size: drawn.append((len(things), rng)))
    for noisy in (False, True):
        drawn.clear()
        texts = [world.make_scene(random.Random(i), noisy)[1] for i in range(200)]
        more = [number - len(PROMPTS[text].things) for text, (number, _) in zip(texts, drawn, strict=True)]
        assert all((rng is not None) == noisy for _, rng in drawn)
        assert (max(more) > 0) == noisy and min(more) == 0


@pytest.mark.parametrize("module", [world, words])
def test_prompts_have_noise_of_their_own(module, tmp_path):
    """Each a seed, no two the same, in any part."""
    seeds = []
    for part in ("validation", "test"):
        module.write_prompts(tmp_path / f"{part}.jsonl", part, 30)
        _, records = module.read_prompts(tmp_path / f"{part}.jsonl")
        seeds += [record["seed"] for record in records]
        assert len(records) == 30 * len(module.TASKS) * module.TIMES
    assert len(set(seeds)) == len(seeds)


def test_one_broken_thing_is_enough():
    """For a picture to count as broken, and not to be right strictly."""
    prompt = world.Prompt("single_object", (world.Thing("star"),))
    things = [world.Thing("star", "red", world.CELLS[0]), world.Thing("circle", "blue", world.CELLS[3])]
    pixels = np.asarray(world.draw(things)).copy()
    pixels[world.CELL : world.CELL + world.CELL // 2, world.CELL :] = world.PAPER  # half of the circle
    pictures = [world.draw(things[:1]), Image.fromarray(pixels), world.draw(things), world.draw(things[1:])]
    expected = {"lenient": "1110", "strict": "1000", "broken": "0100"}
    assert world.outcomes([prompt] * 4, pictures) == expected


def test_the_reader_gets_blue_first(monkeypatch):
    """As OpenCV has it, and PP-OCR learnt; one line that fills the page but for its margin."""
    seen = []
    monkeypatch.setattr(words, "reader", lambda: lambda page, **more: seen.append(page) or SimpleNamespace(txts=["A"]))
    assert words.read(Image.new("RGB", (32, 32), (1, 2, 3))) == "A"
    assert seen[0].shape == (192, 192, 3) and (seen[0] == (3, 2, 1)).all()


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
    assert image.tobytes() == words.draw(spelled).tobytes()
    assert words.make_word(random.Random(0), noisy=True)[0].tobytes() != image.tobytes()
    for part in ("validation", "test"):
        assert {words.make_word(random.Random(i), False, part)[1] for i in range(50)} <= set(
            map(words.caption, parts[part])
        )


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


def test_features_are_always_the_same():
    """Whatever was drawn before: runs are compared by them that were scored by other processes."""
    images = [world.draw(things) for _, things, _ in scenes("test", 2)]
    torch.manual_seed(0)
    one = evaluate.features(images)
    torch.manual_seed(1)
    assert torch.equal(evaluate.features(images), one) and one.shape == (12, 128)


def test_how_pictures_are_drawn():
    """Each from its record's noise, under its prompt, with the guidance and the number of steps of the setting."""
    calls = []

    class Pipeline:
        def __call__(self, **options):
            calls.append(options)
            self.images = [generator.initial_seed() for generator in options["generator"]]
            return self

    records = [{"prompt": f"{i % 7}", "seed": 1000 + i} for i in range(evaluate.BATCH + 5)]
    embeds = {f"{i}": (torch.full((4, 3), i + 1.0), torch.full((2,), i + 1.0)) for i in range(7)}
    embeds[""] = torch.zeros(4, 3), torch.zeros(2)
    assert evaluate.sample(Pipeline(), records, embeds, 2.5, 7) == [record["seed"] for record in records]
    assert [len(call["generator"]) for call in calls] == [evaluate.BATCH, 5]
    for call in calls:
        assert (call["guidance_scale"], call["num_inference_steps"]) == (2.5, 7)
        assert not call["negative_prompt_embeds"].any() and not call["negative_pooled_prompt_embeds"].any()
    drawn = torch.cat([call["pooled_prompt_embeds"][:, 0] for call in calls])
    assert drawn.tolist() == [int(record["prompt"]) + 1 for record in records]
    assert torch.equal(torch.cat([call["prompt_embeds"][:, 0, 0] for call in calls]), drawn)


@pytest.mark.parametrize("kind", ["--quick", "--checkpoint"])
def test_which_prompts_are_scored(kind, tmp_path, monkeypatch):
    """As many of each task in each setting as the plan says, each picture against its own prompt; a third if quick."""
    (tmp_path / "world").mkdir()
    world.write_prompts(tmp_path / "world" / "validation.jsonl", "validation", 30)
    world.write_prompts(tmp_path / "world" / "test.jsonl", "test", 100)
    asked = []

    def sample(pipeline, records, embeds, guidance, steps):
        asked.append((guidance, steps, [record["task"] for record in records]))
        return [
            world.draw(world.realise(world.prompt_of(record), random.Random(i))) for i, record in enumerate(records)
        ]

    monkeypatch.setattr(evaluate, "load_pipeline", lambda *_: None)
    monkeypatch.setattr(evaluate, "encode", lambda *_: {})
    monkeypatch.setattr(evaluate, "sample", sample)
    paths = ["--base", "x", "--run", "x", "--world", tmp_path / "world", "--output", tmp_path / "x.json"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, paths), *filter(None, [kind])])
    evaluate.main()
    part = 1 / 3 if kind == "--quick" else 1
    wanted = {
        ("test", *s): count if s == experiment.MAIN else round(part * count)
        for s, count in experiment.SETTINGS.items()
    }
    wanted |= {("validation", *s): round(part * count) for s, count in experiment.GUIDANCES.items()}
    if kind == "--checkpoint":
        wanted = {("test", *experiment.MAIN): 50}
    scores, found = json.loads((tmp_path / "x.json").read_text()), {}
    for (name, guidance, steps), count in wanted.items():
        measured = scores[name].pop(experiment.name_of(guidance, steps))
        assert measured["lenient"] == measured["strict"] == "1" * (6 * count) and measured["broken"] == "0" * (
            6 * count
        )
        assert 0.5 < measured["diversity"] < 2 and measured["frechet"] < 0.5
        found.setdefault((guidance, steps), []).append([task for task in world.TASKS for _ in range(count)])
    assert not any(scores.values())
    for guidance, steps, tasks in asked:
        assert tasks == found[guidance, steps].pop(0)
    assert (tmp_path / "x.png").exists() == (kind != "--checkpoint")


def test_frechet_distance_and_diversity(monkeypatch):
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
    monkeypatch.setattr(evaluate, "sample", lambda *_: faded)
    measured, drawn = evaluate.measure(world, None, prompts, records, images, {}, 1.0, 1)
    assert drawn is faded and measured["diversity"] < 0.6  # of the true pictures'


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


def test_flags_of_every_run(tmp_path, monkeypatch):
    """Seeds, base, data and dropout are those of the run; the scripts understand all of them."""
    calls = []
    monkeypatch.setattr(experiment, "call", lambda log, *command, **more: calls.append([*map(str, command)]))
    for name in ("world", "words"):
        (tmp_path / f"raw_{name}" / "transformer").mkdir(parents=True)
        (tmp_path / f"raw_{name}" / "transformer" / "config.json").write_text('{"sample_size": 8}')
        for part in ("noisy", "curated"):
            (tmp_path / name / part).mkdir(parents=True)
    runs = {run: None for size in ("full", "schedule") for run in experiment.plan(size)}
    for run in runs:
        experiment.train(tmp_path, run, 1000)
    for base in (0, 1, "words"):
        experiment.make_base(tmp_path, base, 6000)
    given = []
    for command in calls:
        script = next(word for word in command if word.startswith("train_sd3_"))
        given.append(importlib.import_module(script[:-3]).parse_args(command[command.index(script) + 1 :]))
    for run, args, command in zip(runs, given, calls, strict=False):
        script, _, control = experiment.ARMS[run.arm]
        of_world = "words" if run.base == "words" else "world"
        assert script in command and (control is None or control in command)
        assert args.seed == 100 + run.seed and args.cond_dropout_rate == run.dropout
        assert args.transformer == f"{tmp_path}/base_{run.base}"
        assert args.train_data_dir == f"{tmp_path}/{of_world}/curated"
        assert args.pretrained_model_name_or_path == f"{tmp_path}/raw_{of_world}"
        assert args.output_dir == f"{tmp_path}/runs/{run.name}"
        assert (args.max_train_steps, args.use_ema, args.ema_decay) == (1000, True, 0.99)
    assert len({args.output_dir for args in given}) == len(given) == len(runs) + 3
    for base, args in zip((0, 1, "words"), given[-3:], strict=True):
        of_world = "words" if base == "words" else "world"
        assert args.seed == (0 if base == "words" else base) and args.cond_dropout_rate == 0.1
        assert args.train_data_dir == f"{tmp_path}/{of_world}/noisy" and args.transformer is None
        assert (args.max_train_steps, args.output_dir) == (6000, f"{tmp_path}/base_{base}")


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
