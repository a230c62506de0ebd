# SPDX-License-Identifier: Apache-2.0
"""The measurement of exposure bias: what must come out for models whose errors are known, and its command line."""

import json
import math
import re
import shlex
import shutil
import sys

import measure_exposure_bias
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from harness import PHOTOS, ROOT, run_python
from measure_exposure_bias import measure_batch, summarise
from PIL import Image
from safetensors.torch import save_file
from trained import find_trained, load_trained

import soar_utils
import train_sd3_soar


EXAMPLES = ROOT / "examples"
GRID = soar_utils.shift_sigma(1 - torch.arange(10) / 10, 3.0)
POINTS, OWN_STEPS = [4, 6, 9], [1, 4]


@pytest.fixture
def batch():
    """Random samples whose captions are ones and whose empty caption is zeros."""
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(3, 16, 8, 8, generator=generator) for name in ("latents", "noise")}
    drawn |= {"prompt_embeds": torch.ones(3, 9, 64), "pooled_prompt_embeds": torch.ones(3, 48)}
    return drawn | {
        f"null_{name}": torch.zeros_like(drawn[name]) for name in ("prompt_embeds", "pooled_prompt_embeds")
    }


class Model:
    """Predicts what the function `velocity(state, sigma, is_caption)` returns; `sigma` broadcasts against `state`."""

    dtype = torch.float32

    def __init__(self, velocity):
        self.velocity, self.calls = velocity, []

    def __call__(self, hidden_states, timestep, encoder_hidden_states, pooled_projections, return_dict):
        is_caption = bool(encoder_hidden_states.all())
        assert is_caption == bool(pooled_projections.all())
        self.calls.append(is_caption)
        return (self.velocity(hidden_states, timestep.view(-1, 1, 1, 1) / 1000, is_caption),)


# What the numbers must be


def test_an_exact_model_has_no_error(batch, tmp_path):
    """Its own states are the ideal ones, and a ratio of roundings is nowhere shown as a number."""
    model = Model(lambda state, sigma, is_caption: batch["noise"] - batch["latents"])
    ideal, start, own, growth = measured = measure_batch(model, batch, GRID, POINTS, OWN_STEPS, 4.5)
    assert measured.shape == (4, 3, 2, 3)
    assert max(ideal.max(), start.max(), own.max()) < 1e-11
    torch.testing.assert_close(growth, torch.ones_like(growth), rtol=1e-6, atol=0)
    summary, levels = summarise(GRID[POINTS].tolist(), OWN_STEPS, {"exact": measured})
    assert {record["ratio"] for record in levels} == {record["gap"] for record in summary} == {None}
    arguments = {"num_own_steps": OWN_STEPS, "guidance_scale": 4.5, "num_inference_steps": 10}
    report = {"arguments": arguments, "num_images": 3, "summary": summary, "levels": levels}
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert measure_exposure_bias.format_table(report).count("undefined") == 4 * len(summary) + len(levels)
    measure_exposure_bias.draw(report, tmp_path / "exact.png")


def test_without_own_steps_own_is_ideal(batch):
    model = Model(lambda state, sigma, is_caption: torch.sin(3 * state) + sigma)
    ideal, start, own, growth = measure_batch(model, batch, GRID, [0, 5], [0], 4.5)
    assert ideal.min() > 0.01 and torch.equal(own, ideal) and torch.equal(start, ideal)
    assert torch.equal(growth, torch.ones_like(growth))


@pytest.mark.parametrize("guidance_scale", [1, 4.5])
def test_a_constant_bias_has_the_error_of_the_formula(guidance_scale, batch):
    """
    With the velocity off by b, and b_uncond under the empty caption, k guided steps from sigma_start leave the state
    off by `b_cfg * (sigma - sigma_start)`, and the predicted latents by that minus `sigma * b`.
    """
    b, b_uncond = 0.2, 0.15
    model = Model(lambda state, sigma, is_caption: batch["noise"] - batch["latents"] + (b if is_caption else b_uncond))
    ideal, start, own, growth = measure_batch(model, batch, GRID, POINTS, OWN_STEPS, guidance_scale)
    b_cfg = b_uncond + guidance_scale * (b - b_uncond)
    for i, point in enumerate(POINTS):
        for j, k in enumerate(OWN_STEPS):
            sigma, sigma_start = GRID[point].item(), GRID[point - k].item()
            assert ideal[i, j].tolist() == pytest.approx([(sigma * b) ** 2] * 3, rel=1e-4)
            assert start[i, j].tolist() == pytest.approx([(sigma_start * b) ** 2] * 3, rel=1e-4)
            expected = (b_cfg * (sigma_start - sigma) + sigma * b) ** 2
            assert own[i, j].tolist() == pytest.approx([expected] * 3, rel=1e-4)
    if guidance_scale == 1:
        torch.testing.assert_close(own, start, rtol=1e-4, atol=0)  # what was wrong before the steps is wrong after
        assert all(model.calls)
    # A forward for the ideal state, one for the start, and one or two for each step.
    assert len(model.calls) == sum(1 + sum(1 + k * (1 + (guidance_scale != 1)) for k in OWN_STEPS) for _ in POINTS)


def test_every_step_is_conditioned_on_its_own_level(batch):
    """A bias that depends on sigma: the state's offset is the sum over the steps' levels."""
    model = Model(lambda state, sigma, is_caption: batch["noise"] - batch["latents"] + sigma**2)
    _, _, own, _ = measure_batch(model, batch, GRID, POINTS, OWN_STEPS, 3.0)
    for i, point in enumerate(POINTS):
        for j, k in enumerate(OWN_STEPS):
            offset = sum(GRID[step] ** 2 * (GRID[step + 1] - GRID[step]) for step in range(point - k, point))
            assert own[i, j, 0].item() == pytest.approx((offset - GRID[point] ** 3).item() ** 2, rel=1e-4)


def test_own_states_are_those_of_the_sampler(batch, pipeline):
    """The same with diffusers' scheduler and pipeline arithmetic, and SOAR's correction loss for the error."""
    transformer = SD3Transformer2DModel.from_pretrained(pipeline, subfolder="transformer")
    own, growth = measure_batch(transformer, batch, GRID, [7], [3], 4.5)[2:, 0, 0]
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(pipeline, subfolder="scheduler")
    scheduler.set_timesteps(sigmas=[1 - i / 10 for i in range(10)])
    torch.testing.assert_close(scheduler.sigmas[:-1], GRID)
    torch.testing.assert_close(soar_utils.next_sigma(GRID[:-1], 10, 3.0), GRID[1:])
    embeds, pooled = (
        torch.cat([batch[f"null_{name}"], batch[name]]) for name in ("prompt_embeds", "pooled_prompt_embeds")
    )
    ideal_state, state = (GRID[point] * batch["noise"] + (1 - GRID[point]) * batch["latents"] for point in (7, 4))
    with torch.no_grad():
        for timestep in scheduler.timesteps[4:8]:
            both = transformer(torch.cat([state, state]), embeds, pooled, timestep.expand(6), return_dict=False)[0]
            velocity_uncond, velocity = both.chunk(2)
            if timestep > scheduler.timesteps[7]:
                guided = velocity_uncond + 4.5 * (velocity - velocity_uncond)
                state = scheduler.step(guided, timestep, state, return_dict=False)[0]
    sigma = GRID[7].expand(3)
    loss = soar_utils.flow_matching_loss(velocity, soar_utils.correction_target(state, batch["latents"], sigma))
    torch.testing.assert_close(own, (sigma**2 * loss).double(), rtol=1e-4, atol=0)
    expected = torch.stack([one.std() / other.std() for one, other in zip(state, ideal_state, strict=True)])
    torch.testing.assert_close(growth, expected.double(), rtol=1e-5, atol=0)


def test_a_perfect_model_has_a_ratio_above_one():
    """
    Of latents that are unit noise the best prediction is known, and its error `sigma^2 / (sigma^2 + (1 - sigma)^2)`.
    Its own steps do not go below the error of the state that they started from: the ratio is no fault of the model.
    """
    generator = torch.Generator().manual_seed(0)
    batch = {name: torch.randn(4, 16, 64, 64, generator=generator) for name in ("latents", "noise")}
    batch |= {"prompt_embeds": torch.ones(4, 1, 1), "pooled_prompt_embeds": torch.ones(4, 1)}
    model = Model(lambda state, sigma, is_caption: (2 * sigma - 1) / (sigma**2 + (1 - sigma) ** 2) * state)
    ideal, start, own, growth = measure_batch(model, batch, GRID, POINTS, OWN_STEPS, 1.0)
    least = GRID**2 / (GRID**2 + (1 - GRID) ** 2)
    for i, point in enumerate(POINTS):
        assert ideal[i].mean().item() == pytest.approx(least[point].item(), rel=0.01)
        for j, k in enumerate(OWN_STEPS):
            assert start[i, j].mean().item() == pytest.approx(least[point - k].item(), rel=0.01)
    assert (own > 0.999 * start).all() and (own > ideal).all()
    assert (own[-1, 1] > 10 * ideal[-1, 1]).all()


def test_summary_is_paired():
    """A model whose own errors are nine tenths of the first's has that change exactly, however the images differ."""
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(4, 3, 2, 20, generator=generator, dtype=torch.float64) + 0.1
    better = base.clone()
    better[2] *= 0.9
    summary, levels = summarise([0.9, 0.5, 0.1], [1, 4], {"base": base, "better": better})
    assert [(r["model"], r["num_own_steps"]) for r in summary] == [(m, k) for m in ("base", "better") for k in (1, 4)]
    assert len(levels) == 2 * 2 * 3
    gaps = (base[2] / base[0]).log()[:, 1].mean(dim=0)
    assert summary[1]["gap"] == pytest.approx(gaps.mean().item())
    assert summary[1]["gap_se"] == pytest.approx(gaps.std().item() / math.sqrt(20))
    for record, change in zip(summary, (0, 0, math.log(0.9), math.log(0.9)), strict=True):
        for key in ("gap", "own"):
            assert record[f"{key}_change"] == pytest.approx(change)
            assert record[f"{key}_change_interval"] == pytest.approx([change, change])
        assert record["ideal_change"] == 0
    level = levels[4]
    assert (level["model"], level["num_own_steps"], level["sigma"]) == ("base", 4, 0.5)
    assert level["own"] == pytest.approx(base[2, 1, 1].mean().item())
    assert level["own_se"] == pytest.approx(base[2, 1, 1].std().item() / math.sqrt(20))
    assert level["growth"] == pytest.approx(base[3, 1, 1].mean().item())
    assert level["ratio"] == pytest.approx((base[2] / base[0])[1, 1].log().mean().exp().item())
    for k, gap in ((1, summary[0]["gap"]), (4, summary[1]["gap"])):
        ratios = [r["ratio"] for r in levels if r["model"] == "base" and r["num_own_steps"] == k]
        assert gap == pytest.approx(sum(map(math.log, ratios)) / 3)  # the gap is that of the table's ratios


def test_interval_covers_95_of_100():
    """Over many repetitions with 40 images, where the true change is known."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        base = torch.ones(4, 1, 1, 40, dtype=torch.float64)
        other = base.clone()
        other[2] = (0.3 * torch.randn(40, generator=generator, dtype=torch.float64) - 0.1).exp()
        low, high = summarise([0.5], [1], {"base": base, "other": other})[0][1]["gap_change_interval"]
        covered += low < -0.1 < high
    assert 0.92 < covered / 400 < 0.97


# The command line


@pytest.fixture
def command(pipeline, small_photos, tmp_path):
    """Arguments of a short measurement of the base; those that are given come last, and win."""

    def make(*arguments, models=None):
        arguments = [str(argument) for argument in arguments]
        source = [] if {"--jsonl_path", "--dataset_name"} & set(arguments) else ["--train_data_dir", str(small_photos)]
        models = [f"{name}={path}" for name, path in (models or {"base": pipeline}).items()]
        short = "--resolution 32 --max_sequence_length 16 --num_inference_steps 8 --num_sigmas 2 --num_own_steps 1 3"
        base = ["--pretrained_model_name_or_path", str(pipeline), "--output_dir", str(tmp_path / "bias")]
        return [*base, "--models", *models, *source, *short.split(), *arguments]

    return make


@pytest.fixture
def measure(command, tmp_path, monkeypatch):
    """Measure in this process, without the picture, and return the report."""
    monkeypatch.setattr(measure_exposure_bias, "draw", lambda report, path: None)  # a second each time

    def run_example(*arguments, models=None):
        AcceleratorState._reset_state(reset_partial_state=True)
        measure_exposure_bias.main(measure_exposure_bias.parse_args(command(*arguments, models=models)))
        return json.loads((tmp_path / "bias" / "exposure_bias.json").read_text())

    return run_example


def test_full_model_and_lora_from_the_command_line(run, command, measure, pipeline, tmp_path):
    full = run("train_sd3_soar", "--output_dir", tmp_path / "full")
    lora = run("train_sd3_soar_lora", "--output_dir", tmp_path / "lora", "--rank", 4)
    models = {"base": pipeline, "SOAR": full, "SOAR-LoRA": lora}
    script = [sys.executable, EXAMPLES / "measure_exposure_bias.py", *command(models=models)]
    done = run_python(script, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    output = tmp_path / "bias"
    table, written = (output / "exposure_bias.md").read_text(), (output / "exposure_bias.json").read_bytes()
    assert done.stdout.strip() == table.strip()
    with Image.open(output / "exposure_bias.png") as picture:
        assert picture.width > 500 and len(picture.convert("RGB").getcolors(10**6)) > 50

    report = json.loads(written)
    summary, levels = report["summary"], report["levels"]
    assert report["num_images"] == len(PHOTOS)
    assert list(dict.fromkeys(record["model"] for record in levels)) == list(models)
    sigmas = soar_utils.shift_sigma(1 - torch.tensor([3, 7]) / 8, 3.0).tolist()
    assert [record["sigma"] for record in levels] == pytest.approx(sigmas * 6)
    for record in summary[:2]:
        assert record["gap_change"] == record["own_change"] == record["ideal_change"] == 0
    for record in summary[2:]:
        assert record["gap_change"] != 0 and record["gap_change"] == pytest.approx(
            record["own_change"] - record["ideal_change"]
        )

    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if re.match(r"\| (base|SOAR)", line)]
    assert len(rows) == len(summary) + len(levels)
    for row, record in zip(rows, summary + levels, strict=True):
        numbers = [record["num_own_steps"]]
        if "sigma" in record:
            keys = ("ideal", "own", "ratio", "start", "growth")
            numbers += [record["sigma"], *(record[key + end] for key in keys for end in ("", "_se"))]
        else:
            numbers += [record["gap"], record["gap_se"]]
            for key in ("gap", "own", "ideal"):
                numbers += [record[f"{key}_change"], *record[f"{key}_change_interval"]]
        shown = re.findall(r"-?\d+\.?\d*", " ".join(row[1:]))
        assert row[0] == record["model"]
        assert [float(number) for number in shown] == pytest.approx(numbers, abs=5.1e-5)

    measure(models=models)
    assert (output / "exposure_bias.json").read_bytes() == written


def test_untrained_lora_is_the_base(run, measure, pipeline, tmp_path):
    lora = run("train_sd3_soar_lora", "--learning_rate", 0, "--max_train_steps", 1)
    report = measure(models={"base": pipeline, "LoRA": lora})
    base, same = ([r for r in report["levels"] if r["model"] == name] for name in ("base", "LoRA"))
    assert [record | {"model": "base"} for record in same] == base
    for record in report["summary"]:
        assert record["gap_change_interval"] == [0, 0]


@pytest.mark.parametrize("kind", [[], ["--use_dora"]])
def test_lora_is_what_the_pipeline_makes_of_it(kind, run, batch, pipeline):
    """With its alpha, and without its dropout."""
    lora = run("train_sd3_soar_lora", "--rank", 4, "--lora_alpha", 9, "--lora_dropout", 0.5, *kind)
    whole = StableDiffusion3Pipeline.from_pretrained(pipeline)
    whole.load_lora_weights(lora)
    whole.transformer.eval()
    base = SD3Transformer2DModel.from_pretrained(pipeline, subfolder="transformer")
    inputs = batch["noise"], batch["prompt_embeds"], batch["pooled_prompt_embeds"], torch.tensor([500.0] * 3)
    with torch.no_grad():
        ours, theirs, without = (
            transformer(*inputs, return_dict=False)[0]
            for transformer in (load_trained(pipeline, **find_trained(lora)).transformer, whole.transformer, base)
        )
    torch.testing.assert_close(ours, theirs)
    assert (ours - without).abs().max() > 1e-4


CHANGES = """
    --guidance_scale 1
    --num_inference_steps 12
    --num_own_steps 2
    --num_sigmas 3
    --num_samples 5
    --seed 1
    --center_crop
    --max_sequence_length 4
    --no_text_encoder_3
    --mixed_precision bf16
    --resolution 48
    --aspect_ratio_buckets 32,48;48,32
"""


def test_every_flag_changes_the_numbers(measure):
    usual = measure()["levels"]
    for flags in CHANGES.strip().splitlines():
        assert measure(*flags.split())["levels"] != usual, flags


def test_batches_are_no_part_of_the_result(measure):
    """Nor are the data loader's workers: all that is random belongs to a sample."""
    one, other = measure(), measure("--batch_size", 3, "--dataloader_num_workers", 1)
    for record, same in zip(one["levels"], other["levels"], strict=True):
        assert same.pop("model") == record.pop("model")
        assert same == pytest.approx(record, rel=1e-4)


def test_bf16_is_close_to_float32(measure):
    """A rounded forward in an otherwise float32 measurement: no more than the rounding shows."""
    for record, rounded in zip(measure()["levels"], measure("--mixed_precision", "bf16")["levels"], strict=True):
        for key in ("ideal", "own", "ratio", "growth"):
            assert rounded[key] == pytest.approx(record[key], rel=0.05)


def test_samples_are_encoded_in_batches_of_one_size(command, small_photos, tmp_path):
    """Latents and noise in float32 whatever the models compute in; noise of its own for every sample."""
    records = [
        {"md5": name, "caption_en": text, "bw": 32 + 16 * (i % 2)} for i, (name, text) in enumerate(PHOTOS.items())
    ]
    (tmp_path / "sizes.jsonl").write_text("\n".join(json.dumps(record | {"bh": 32}) for record in records))
    source = ["--jsonl_path", tmp_path / "sizes.jsonl", "--image_dir", small_photos]
    args = measure_exposure_bias.parse_args(command(*source, "--batch_size", 3))
    PartialState()  # the script's log asks for it
    model, rows = train_sd3_soar.check_model(args), train_sd3_soar.load_images(args)
    args.cache_dir = tmp_path / "cache"
    images = train_sd3_soar.TrainingImages(args, rows, train_sd3_soar.inspect_images(args, model, rows), {})
    batches = measure_exposure_bias.encode_samples(args, model, images, torch.bfloat16, torch.device("cpu"))
    shapes = [tuple(batch["latents"].shape) for batch in batches]
    assert [(shape[0], shape[-1]) for shape in shapes] == [(3, 4), (1, 4), (3, 6), (1, 6)]
    assert shapes == [tuple(batch["noise"].shape) for batch in batches]
    for batch in batches:
        assert batch["latents"].dtype == batch["noise"].dtype == torch.float32
        assert batch["prompt_embeds"].dtype == batch["null_pooled_prompt_embeds"].dtype == torch.bfloat16
        assert not torch.equal(batch["prompt_embeds"], batch["null_prompt_embeds"])
    noise = torch.cat([batch["noise"][..., :4].flatten(1) for batch in batches])
    assert (torch.corrcoef(noise) - torch.eye(8)).abs().max() < 0.4  # of 256 numbers each


def test_images_are_drawn_by_the_seed(command, monkeypatch):
    class Seen(Exception):
        pass

    def see(args, model, images, dtype, device):
        raise Seen(tuple(item["name"] for item in images.inspected))

    monkeypatch.setattr(measure_exposure_bias, "encode_samples", see)
    found = []
    for seed in (0, 1, 2, 0):
        with pytest.raises(Seen) as seen:
            measure_exposure_bias.main(measure_exposure_bias.parse_args(command("--num_samples", 3, "--seed", seed)))
        found.append(seen.value.args[0])
    assert found[0] == found[3] and len(set(found)) > 1
    assert all(len(set(names)) == 3 for names in found)


def test_command_in_the_docstring_is_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held_out_images").mkdir()
    (arguments,) = re.findall(r"measure_exposure_bias.py (--.*)", measure_exposure_bias.__doc__.replace("\\\n", " "))
    args = measure_exposure_bias.parse_args(shlex.split(arguments))
    assert [item.partition("=")[0] for item in args.models] == ["base", "SFT", "SOAR", "SOAR-LoRA"]


def test_three_formats_are_one_data_set(measure, small_photos, tmp_path):
    """And a file that gives sizes is measured at these, in batches of one size each."""
    expected = measure()["levels"]
    assert measure("--dataset_name", small_photos)["levels"] == expected
    lines = {"same.jsonl": [], "sizes.jsonl": []}
    for i, line in enumerate((small_photos / "metadata.jsonl").read_text().splitlines()):
        row = json.loads(line)
        record = {"md5": row["file_name"].removesuffix(".png"), "caption_en": row["text"]}
        lines["same.jsonl"].append(record)
        lines["sizes.jsonl"].append(record | {"bw": 32 + 16 * (i % 2), "bh": 32})
    found = []
    for name, records in lines.items():
        (tmp_path / name).write_text("\n".join(map(json.dumps, records)))
        found.append(measure("--jsonl_path", tmp_path / name, "--image_dir", small_photos))
    assert found[0]["levels"] == expected
    assert found[1]["num_images"] == len(PHOTOS) and found[1]["levels"] != expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "base=/nowhere/model"], "--models base=/nowhere/model is no folder, and no model of the hub"),
        (["--models", "base"], "--models base: want NAME=PATH"),
        (["--models", "a=PIPELINE", "a=PIPELINE"], "--models a=PIPELINE: want NAME=PATH, every name once"),
        (["--models", "base=PHOTOS"], "--models base=PHOTOS: neither transformer/*.safetensors nor pytorch_lora"),
        (["--models", "base=PROMPTS"], "takes other latents or prompts than --pretrained_model_name_or_path"),
        (["--models", "base=LATENTS"], "takes other latents or prompts than --pretrained_model_name_or_path"),
        (["--num_own_steps", 8, "--num_sigmas", 1], "--num_own_steps 8 and --num_sigmas 1 do not fit into"),
        (["--num_own_steps", 3, "--num_sigmas", 6], "--num_own_steps 3 and --num_sigmas 6 do not fit into"),
        (["--num_own_steps", 0], "--num_own_steps: must be a finite number from 1 to inf, got 0"),
        (["--learning_rate", 1], "unknown arguments: --learning_rate"),
        (["--train_data_dir", "/nowhere"], "--train_data_dir /nowhere: no such folder"),
        (["--train_data_dir", "EMPTY"], "error: EMPTY has no images"),
        (["--num_samples", 1], "--num_samples: must be a finite number from 2 to inf, got 1"),
        (["--jsonl_path", "ONE.jsonl", "--image_dir", "PHOTOS"], "1 images are not enough for a standard error"),
        (["--jsonl_path", "NONE.jsonl", "--image_dir", "PHOTOS"], "NONE.jsonl has no images"),
        (["--pretrained_model_name_or_path", "PHOTOS"], "PHOTOS is not a Stable Diffusion 3 pipeline"),
        (["--resolution", 40], "must be divisible by 16"),
        (["--output_dir", "ONE.jsonl"], "--output_dir cannot be written"),
    ],
)
def test_mistake_gives_one_line(arguments, message, command, pipeline, small_photos, tmp_path, monkeypatch, capsys):
    """That names it, before any weights load."""
    places = {"PIPELINE": pipeline, "PHOTOS": small_photos, "EMPTY": tmp_path / "empty"}
    places |= {name: tmp_path / name for name in ("ONE.jsonl", "NONE.jsonl", "PROMPTS", "LATENTS")}
    places["EMPTY"].mkdir()
    places["NONE.jsonl"].write_text("\n")
    places["ONE.jsonl"].write_text(json.dumps({"md5": "chelsea", "caption_en": "a cat"}))
    for name, key, value in (("PROMPTS", "joint_attention_dim", 96), ("LATENTS", "in_channels", 4)):
        shutil.copytree(pipeline / "transformer", places[name] / "transformer")
        config = places[name] / "transformer" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))

    def fill(text):
        return re.sub("|".join(map(re.escape, places)), lambda match: str(places[match[0]]), str(text))

    for part in (AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline):
        monkeypatch.setattr(part, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(SystemExit) as exit:
        measure_exposure_bias.main(measure_exposure_bias.parse_args(command(*map(fill, arguments))))
    shown = capsys.readouterr().err.splitlines()[-1] if exit.value.code == 2 else exit.value.code
    assert fill(message) in shown and "\n" not in shown and len(shown) < 1000


def test_damaged_lora_gives_one_line(measure, pipeline, tmp_path):
    of_another = {f"unet.to_q.lora_{part}.weight": torch.zeros(2, 2) for part in "AB"}
    cases = {"Invalid LoRA checkpoint": {"other.weight": torch.zeros(2)}, "holds nothing for": of_another, "": None}
    for message, content in cases.items():
        save_file(content or {}, tmp_path / "pytorch_lora_weights.safetensors")
        if content is None:
            (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"no weights")
        with pytest.raises(SystemExit, match=f"error: --models LoRA cannot be loaded: .*{message}"):
            measure(models={"LoRA": tmp_path})
    assert not (tmp_path / "bias" / "exposure_bias.json").exists()
