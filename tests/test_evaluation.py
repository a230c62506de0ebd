# SPDX-License-Identifier: Apache-2.0
"""The evaluation's commands from prompts to scores, interrupted and on bad input; data sets converted and filtered."""

import hashlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import data_sets
import datasets
import filter_dataset
import numpy as np
import ocr
import pytest
import score_images
import scoring
from accelerate.state import AcceleratorState
from harness import ROOT
from PIL import Image, ImageDraw, ImageFont
from runs import read_rows
from safetensors.torch import load_file, save_file

import train_sd3_soar
from data_utils import decode_image, inspect_rows


HERE = ROOT / "examples" / "evaluation"
PROMPTS = ROOT / "tests" / "data"


@pytest.fixture
def call(capfd):
    """Run a script in this process by its command line; returns what it said, its last word included."""

    def run_script(script, *arguments, expect=0):
        module = importlib.import_module(script)
        AcceleratorState._reset_state(reset_partial_state=True)  # as in a new process
        try:
            code = module.main(list(map(str, arguments))) or 0
        except SystemExit as error:
            code = error.code
        output = "".join(capfd.readouterr()) + (code if isinstance(code, str) else "")
        assert (1 if isinstance(code, str) else code or 0) == expect, output
        return output

    return run_script


def complaint(output):
    """The one line of an error."""
    (line,) = [line for line in output.splitlines() if "error: " in line]
    return line


def written(text, side=256):
    """A picture of a text."""
    image = Image.new("RGB", (side, side), (240, 235, 220))
    font = ImageFont.load_default(side // 8)
    ImageDraw.Draw(image).text((side // 2, side // 2), text, (20, 20, 60), font, anchor="mm")
    return image


@pytest.fixture
def run_folder(tmp_path):
    """A folder as generate_images.py writes it: pictures of one word each, the third another than asked."""
    folder = tmp_path / "run"
    (folder / "images").mkdir(parents=True)
    words = {"BREAD": "BREAD", "open": "open", "TEA": "TEN", "coffee": "coffee"}
    with open(folder / "metadata.jsonl", "w") as file:
        for i, (wanted, shown) in enumerate(words.items()):
            name = f"images/{i:05d}-0.png"
            written(shown).save(folder / name)
            row = {"file_name": name, "text": f'A sign that says "{wanted}".', "prompt_index": i, "image_index": 0}
            file.write(json.dumps(row) + "\n")
    return folder


def test_runs_are_named_by_relative_paths_too(run_folder, monkeypatch):
    """As in the README's commands."""
    monkeypatch.chdir(run_folder.parent)
    assert len(read_rows("run")) == len(read_rows(run_folder)) == 4


def test_words_are_read_and_scored(call, run_folder, monkeypatch):
    """Real weights. The summary is the mean of the scores, a second call scores nothing, and the mean lies inside."""
    output = call("score_images", run_folder, "--metrics", "ocr")
    rows = [json.loads(line) for line in (run_folder / "scores" / "ocr.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows] == [1, 1, pytest.approx(2 / 3), 1]
    summary = json.loads((run_folder / "scores.json").read_text())["ocr"]
    assert summary["mean"] == pytest.approx(11 / 12) and summary["images"] == 4
    assert summary["low"] < summary["mean"] <= summary["high"] == 1
    assert "ocr 0.9167" in output
    before = (run_folder / "scores" / "ocr.jsonl").read_bytes()
    (run_folder / "scores" / "ocr.jsonl").write_bytes(before[:-10])  # cut off within the last line
    call("score_images", run_folder, "--metrics", "ocr")
    assert (run_folder / "scores" / "ocr.jsonl").read_bytes() == before
    written("TEA").save(run_folder / "images" / "00002-0.png")  # another image of that name
    assert "ocr 1.0000" in call("score_images", run_folder, "--metrics", "ocr")
    rows = [json.loads(line) for line in (run_folder / "scores" / "ocr.jsonl").read_text().splitlines()]
    assert sorted(row["file_name"] for row in rows) == [f"images/{i:05d}-0.png" for i in range(4)]  # none of what was
    monkeypatch.setattr(ocr, "OCR", None)  # what is scored needs no scorer
    call("score_images", run_folder, "--metrics", "ocr")


def test_scoring_goes_on_after_what_is_bad(call, run_folder):
    """A truncated and a missing image are named and have no score; the others have theirs; the exit code says it."""
    name = run_folder / "images" / "00001-0.png"
    name.write_bytes(name.read_bytes()[:200])
    (run_folder / "images" / "00002-0.png").unlink()
    Image.new("RGB", (400, 2)).save(run_folder / "images" / "00003-0.png")  # the scorer refuses it, not its batch
    output = call("score_images", run_folder, "--metrics", "ocr", expect=1)
    assert output.count("not scored: ") == 3 and "00001-0.png: OSError" in output and "00002-0.png" in output
    assert "00003-0.png: ValueError: an image of 400 x 2 pixels" in output
    assert json.loads((run_folder / "scores.json").read_text())["ocr"]["images"] == 1


@pytest.fixture
def rated(monkeypatch):
    """`rated(values)` has the aesthetic scorer give the images these scores in turn; then again the last one."""

    def rate(*values):
        values = list(values)

        class Scorer:
            files, packages = [], []

            def __init__(self, device):
                pass

            def __call__(self, images, records):
                return [{"score": values.pop(0) if len(values) > 1 else values[0]} for _ in images]

        monkeypatch.setattr("preference.Aesthetic", Scorer)

    return rate


def strict_json(text):
    """JSON as other programs read it, without `NaN` and `Infinity`."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_no_number(value, call, rated, run_folder):
    """Has no line, no part in the mean, and is named and counted; a later call scores the image again."""
    rated(1.0, value, 3.0, 5.0)
    output = call("score_images", run_folder, "--metrics", "aesthetic", expect=1)
    assert re.search(rf"not scored: .*images/00001-0\.png: .*{value}", output) and "aesthetic 3.0000 [" in output
    assert "3 images, 1 without a score" in output
    lines = (run_folder / "scores" / "aesthetic.jsonl").read_text().splitlines()
    assert [strict_json(line)["score"] for line in lines] == [1.0, 3.0, 5.0]
    summary = strict_json((run_folder / "scores.json").read_text())["aesthetic"]
    assert (summary["mean"], summary["images"], summary["missing"]) == (3.0, 3, 1)
    rated(7.0)
    assert "aesthetic 4.0000 [" in call("score_images", run_folder, "--metrics", "aesthetic")


def test_what_a_score_depends_on(call, rated, run_folder, tmp_path):
    """Of another prompt it is another; those of images that a call does not ask for stay; each metric's mean stays."""
    call("score_images", run_folder, "--metrics", "ocr")
    rated(1.0, 2.0, 3.0, 4.0, 9.0)
    call("score_images", run_folder, "--metrics", "aesthetic")
    metadata, path = run_folder / "metadata.jsonl", run_folder / "scores" / "aesthetic.jsonl"
    metadata.write_text(metadata.read_text().replace("coffee", "tea"))
    output = call("score_images", run_folder, "--metrics", "aesthetic")
    assert "aesthetic 3.7500 [" in output
    summaries = json.loads((run_folder / "scores.json").read_text())
    assert (summaries["ocr"]["images"], summaries["ocr"]["missing"], summaries["aesthetic"]["missing"]) == (3, 1, 0)
    source = ["--train_data_dir", run_folder, "--metrics", "aesthetic", "--output_dir", tmp_path / "set"]
    rated(1.0, 2.0, 3.0, 4.0)
    call("score_images", *source)
    rated(7.0)
    assert "aesthetic 1.5000 [" in call("score_images", *source, "--max_train_samples", 2)
    assert "aesthetic 2.5000 [" in call("score_images", *source)
    assert [json.loads(line)["score"] for line in path.read_text().splitlines()] == [1.0, 2.0, 3.0, 9.0]


def test_the_reader_gets_blue_first(monkeypatch):
    """As OpenCV has it, and PP-OCR learnt."""
    scorer, seen = ocr.OCR.__new__(ocr.OCR), []
    scorer.reader = lambda pixels: seen.append(pixels) or SimpleNamespace(txts=["A"])
    scorer([Image.new("RGB", (4, 2), (1, 2, 3))], [{"text": 'an "A"'}])
    assert seen[0].shape == (2, 4, 3) and seen[0][0, 0].tolist() == [3, 2, 1]


def test_scores_without_numbers_in_a_file(call, rated, run_folder):
    """Of an earlier version, or an editor: scored again, and gone from the file."""
    rated(1.0)
    call("score_images", run_folder, "--metrics", "aesthetic")
    path = run_folder / "scores" / "aesthetic.jsonl"
    values = iter(["NaN", "null", '"high"', "1" + "0" * 400])
    path.write_text(re.sub(r"1\.0", lambda match: next(values, match[0]), path.read_text()))
    rated(2.0)
    assert "aesthetic 2.0000 [" in call("score_images", run_folder, "--metrics", "aesthetic")
    rows = [strict_json(line) for line in path.read_text().splitlines()]
    assert [row["score"] for row in rows] == [2.0] * 4
    path.unlink()
    path.mkdir()
    assert str(path) in complaint(call("score_images", run_folder, "--metrics", "aesthetic", expect=1))


def test_filtered_by_scores_of_which_one_is_no_number(call, rated, run_folder, tmp_path):
    """It is named and not kept, the others are cut as they would be without it."""
    rated(1.0, float("nan"), 3.0, 5.0)
    flags = ["--metric", "aesthetic", "--top_fraction", 0.67, "--output_dir", tmp_path / "kept"]
    output = call("filter_dataset", "--train_data_dir", run_folder, *flags, expect=1)
    assert "not scored: images/00001-0.png" in output and "2 of 4 images" in output
    rows = [strict_json(line) for line in (tmp_path / "kept" / "metadata.jsonl").read_text().splitlines()]
    assert [row["aesthetic"] for row in rows] == [3.0, 5.0]


@pytest.mark.parametrize(
    ("wanted", "read", "score"),
    [
        ("Open", "we are o p e n", 1),
        ("abcd", "abcx", 0.75),
        ("abcd", "", 0),
        ("ab", "xyzuvw", 0),
        ("abc", "acb", 1 / 3),
    ],
)
def test_text_score(wanted, read, score):
    assert ocr.text_score(wanted, read) == pytest.approx(score)


def test_wanted_text():
    assert ocr.wanted_text({"text": 'a sign, "Open Late", and "no"'}) == "Open Late"
    assert ocr.wanted_text({"text": "a sign, “Open”"}) == "Open"
    assert ocr.wanted_text({"text": "picture of c a t", "wanted_text": "CAT"}) == "CAT"
    for record in ({"text": "a sign"}, {"text": 'a sign " '}, {"text": 'a "" sign'}):
        with pytest.raises(ValueError, match="double quotes"):
            ocr.wanted_text(record)


def test_published_ocr_prompts_have_texts():
    lines = (PROMPTS / "ocr_prompts.txt").read_text().splitlines()
    assert len(lines) > 1000 and all(ocr.wanted_text({"text": line}) for line in lines)


def test_intervals():
    """Of a mean over prompts with several images, against the known standard error; of GenEval, over its tasks."""
    rng = np.random.default_rng(1)
    rows, scores = [], {}
    for prompt in range(400):
        value = rng.normal()
        for image in range(3):  # the images of a prompt are alike: there are 400 draws here, not 1200
            name = f"{prompt}-{image}"
            tag = "colors" if prompt < 100 else "position"
            rows.append({"digest": name, "file_name": name, "text": str(prompt), "tag": tag, "prompt_index": prompt})
            scores[name] = {"score": value, "strict": value - (prompt < 100)}
    summary = score_images.summarise_metric("clipscore", rows, scores)
    values = [score["score"] for score in scores.values()]
    assert summary["mean"] == pytest.approx(np.mean(values))
    half = 1.96 * np.std(values) / 400**0.5
    assert summary["high"] - summary["mean"] == pytest.approx(half, rel=0.1)
    assert summary["mean"] - summary["low"] == pytest.approx(half, rel=0.1)
    summary = score_images.summarise_metric("geneval", rows, scores)
    means = {"colors": np.mean(values[:300]), "position": np.mean(values[300:])}
    assert {task: part["mean"] for task, part in summary["tasks"].items()} == pytest.approx(means)
    assert summary["mean"] == pytest.approx(sum(means.values()) / 2)
    assert summary["strict"]["mean"] == pytest.approx(summary["mean"] - 0.5)
    assert f"{summary['strict']['mean']:.4f} by the strict reading" in score_images.format_summary("geneval", summary)
    for row in rows:  # a data set, all of one caption: its images are drawn again, each by itself
        row["text"] = "a photo"
        del row["prompt_index"]
    summary = score_images.summarise_metric("clipscore", rows, scores)
    assert summary["high"] - summary["low"] == pytest.approx(2 * 1.96 * np.std(values) / 1200**0.5, rel=0.1)


@pytest.fixture
def generate(call, pipeline, tmp_path):
    """Draw with the tiny pipeline; returns the folder and what was said."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": "a red circle", "tag": "colors", "include": [{"class": "circle", "position": ["left of", 0]}]},
        {"prompt": 'a sign "A"', "tag": "word", "file_name": "x", "image": "y", "text": "z", "include": "none"},
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fixed = ["--num_inference_steps", 2, "--resolution", 32, "--images_per_prompt", 2]

    def generate(name, *arguments, expect=0, prompts=prompts):
        source = ["--pretrained_model_name_or_path", pipeline, "--prompts", prompts]
        output = call("generate_images", *source, *fixed, "--output_dir", tmp_path / name, *arguments, expect=expect)
        return tmp_path / name, output

    return generate


def test_from_prompts_to_images(generate):
    """Every image from its own noise; the folder trains and scores; what is there and whole is not drawn again."""
    folder, output = generate("run")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["a red circle"] * 2 + ['a sign "A"'] * 2
    assert [row["tag"] for row in rows] == ["colors"] * 2 + ["word"] * 2
    assert rows[2]["file_name"] == "images/00001-0.png" and len({row["seed"] for row in rows}) == 4
    scored = scoring.read_run(folder)
    include = [{"class": "circle", "position": ["left of", 0]}]
    assert [row["include"] for row in scored] == [include] * 2 + ["none"] * 2
    assert [row["text"] for row in scored] == [row["text"] for row in rows] and "image" not in rows[2]
    assert json.loads(rows[2]["prompt_fields"])["text"] == "z"
    pictures = {row["file_name"]: (folder / row["file_name"]).read_bytes() for row in rows}
    assert len(set(pictures.values())) == 4
    args = train_sd3_soar.parse_args(["--pretrained_model_name_or_path", "x", "--train_data_dir", str(folder)])
    assert train_sd3_soar.load_images(args)["captions"] == [[row["text"]] for row in rows]

    whole, cut, gone = (folder / row["file_name"] for row in rows[:3])
    cut.write_bytes(cut.read_bytes()[:-40])
    gone.unlink()
    before = whole.stat().st_mtime_ns
    _, output = generate("run", "--batch_size", 1)
    assert "4 images, 2 of them there" in output and whole.stat().st_mtime_ns == before
    drawn = [np.asarray(Image.open(folder / row["file_name"]), dtype=int) for row in rows]
    for image, (name, data) in zip(drawn, pictures.items(), strict=True):
        (folder / "x.png").write_bytes(data)
        assert abs(image - np.asarray(Image.open(folder / "x.png"), dtype=int)).max() <= 1, (
            name
        )  # batches round otherwise


def test_a_column_of_a_data_set_is_drawn(call, pipeline, tmp_path):
    """Of a folder as of the hub; the first prompts only, in bfloat16, their T5 tokens cut off."""
    (tmp_path / "set").mkdir()
    prompts = [f"a photo of {'one very ' * n}long road" for n in (20, 0, 1)]
    (tmp_path / "set" / "test.csv").write_text("Prompts,Category\n" + "".join(f"{p},x\n" for p in prompts))
    source = ["--pretrained_model_name_or_path", pipeline, "--dataset_name", tmp_path / "set"]
    fixed = ["--dataset_split", "test", "--max_prompts", 2, "--num_inference_steps", 1, "--resolution", 32]

    def draw(name, *arguments, expect=0):
        return call("generate_images", *source, *fixed, *arguments, "--output_dir", tmp_path / name, expect=expect)

    assert "--prompt_column prompt: " in complaint(draw("none", expect=1))
    column, pictures = ["--prompt_column", "Prompts"], {}
    for name, flags in {
        "full": [],
        "bf16": ["--mixed_precision", "bf16"],
        "cut": ["--max_sequence_length", 16],
        "offload": ["--offload"],
    }.items():
        draw(name, *column, *flags)
        rows = [json.loads(line) for line in (tmp_path / name / "metadata.jsonl").read_text().splitlines()]
        assert [row["text"] for row in rows] == prompts[:2]
        pictures[name] = [np.asarray(Image.open(tmp_path / name / row["file_name"]), dtype=int) for row in rows]
    assert 0 < abs(pictures["bf16"][0] - pictures["full"][0]).mean() < 40
    assert (pictures["cut"][0] != pictures["full"][0]).any()
    assert abs(pictures["offload"][0] - pictures["full"][0]).max() <= 1
    assert "`variant=nonsense`" in complaint(draw("none", *column, "--variant", "nonsense", expect=1))


def test_other_weights_draw_other_images_from_the_same_noise(generate, run, pipeline):
    """A full fine-tune and a LoRA with its scale; none of them goes into another's folder."""
    full = run("train_sd3_soar", "--max_train_steps", 1, "--learning_rate", 0.01, "--resolution", 32)
    base, _ = generate("base")
    tuned, _ = generate("tuned", "--transformer", full)
    seeds = [
        [json.loads(line)["seed"] for line in (f / "metadata.jsonl").read_text().splitlines()] for f in (base, tuned)
    ]
    assert seeds[0] == seeds[1]
    pictures = [(folder / "images" / "00000-0.png").read_bytes() for folder in (base, tuned)]
    assert pictures[0] != pictures[1]
    _, output = generate("base", "--transformer", full, expect=1)
    assert f"transformer was None, is '{full}'" in complaint(output)
    weights = full / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    _, output = generate("tuned", "--transformer", full, expect=1)  # trained again, as it were
    assert "weights_digest was" in complaint(output)
    _, output = generate("inner", "--transformer", full / "transformer", expect=1)
    assert "no transformer/*.safetensors in that folder" in complaint(output)


def first_pictures(folder):
    """The first image of each prompt."""
    return [np.asarray(Image.open(folder / "images" / f"{i:05d}-0.png"), dtype=int) for i in range(2)]


def test_every_setting_changes_the_images(generate):
    """The seed by the noise of each; a folder that was drawn with another is refused."""
    usual, _ = generate("usual")
    for flag, value in (("--seed", 1), ("--guidance_scale", 2), ("--num_inference_steps", 3), ("--resolution", 48)):
        folder, _ = generate(flag.strip("-"), flag, value)
        for one, other in zip(first_pictures(usual), first_pictures(folder), strict=True):
            assert one.shape != other.shape or abs(one - other).max() > 1, flag
        seeds = [{json.loads(line)["seed"] for line in open(f / "metadata.jsonl")} for f in (usual, folder)]
        assert len(seeds[1]) == 4 and (seeds[0] & seeds[1] == set() if flag == "--seed" else seeds[0] == seeds[1])
        _, output = generate("usual", flag, value, expect=1)
        assert f"{flag.strip('-')} was" in complaint(output)


def test_other_prompts_of_the_same_number_are_refused(generate, tmp_path):
    folder, _ = generate("run")
    before = (folder / "metadata.jsonl").read_bytes()
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(prompts.read_text().replace("red", "blue"))
    _, output = generate("run", expect=1)
    assert "rows_digest was" in complaint(output) and (folder / "metadata.jsonl").read_bytes() == before


def test_a_lora_that_lies_on_another(generate, run, tmp_path):
    """What `--lora` was trained on top of is there with it, and alone where its scale is 0; either may change."""
    flags = ("--max_train_steps", 1, "--learning_rate", 1, "--trajectory_length", 1)
    one, two = (run("train_sd3_soar_lora", *flags, "--seed", i, "--output_dir", tmp_path / f"lora{i}") for i in (0, 1))
    drawn = {
        name: first_pictures(generate(name, *arguments)[0])[0]
        for name, arguments in {
            "base": [],
            "one": ["--lora", one],
            "two": ["--lora", two],
            "start": ["--start_lora", one, "--lora", two, "--lora_scale", 0],
            "both": ["--start_lora", one, "--lora", two],
        }.items()
    }
    assert abs(drawn["start"] - drawn["one"]).max() <= 1
    for name in ("base", "one", "two"):
        assert abs(drawn["both"] - drawn[name]).max() > 1
    for name, changed in (("one", one), ("both", one), ("both", two)):
        before = (changed / "pytorch_lora_weights.safetensors").read_bytes()
        state = load_file(changed / "pytorch_lora_weights.safetensors")
        save_file({key: 2 * tensor for key, tensor in state.items()}, changed / "pytorch_lora_weights.safetensors")
        arguments = ["--lora", one] if name == "one" else ["--start_lora", one, "--lora", two]
        _, output = generate(name, *arguments, expect=1)
        assert "weights_digest was" in complaint(output)
        (changed / "pytorch_lora_weights.safetensors").write_bytes(before)
        generate(name, *arguments)


def test_a_base_that_changes_and_a_list_that_does_not(generate, pipeline, tmp_path, monkeypatch):
    """Other weights in the base's own folder are refused; the same prompts by another path are not."""
    base = shutil.copytree(pipeline, tmp_path / "base")
    generate("run", "--pretrained_model_name_or_path", base)
    monkeypatch.chdir(tmp_path)
    _, output = generate("run", "--pretrained_model_name_or_path", base, "--prompts", "prompts.jsonl")
    assert "4 images, 4 of them there" in output
    weights = base / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    _, output = generate("run", "--pretrained_model_name_or_path", base, expect=1)
    assert "weights_digest was" in complaint(output)


def test_a_prompt_a_line(generate, tmp_path):
    """Lines end where text editors end them, with a carriage return or without."""
    (tmp_path / "p.txt").write_bytes("one\u2028 still one\r\n\ntwo\x0c still two\n".encode())
    folder, _ = generate("run", prompts=tmp_path / "p.txt")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().split("\n")[:-1]]
    assert [row["text"] for row in rows[::2]] == ["one\u2028 still one", "two\x0c still two"]


def test_lora_scale(generate, run):
    """A LoRA at scale 0 is the base; at scale 1 it is not."""
    lora = run("train_sd3_soar_lora", "--max_train_steps", 2, "--learning_rate", 1, "--resolution", 32)
    folders = [
        generate(name, *arguments)[0]
        for name, arguments in [
            ("base", []),
            ("zero", ["--lora", lora, "--lora_scale", 0]),
            ("one", ["--lora", lora]),
        ]
    ]
    base, zero, one = (np.asarray(Image.open(folder / "images" / "00000-0.png"), dtype=int) for folder in folders)
    assert abs(base - zero).max() <= 1 < abs(base - one).max()


def test_two_processes_draw_what_one_draws(generate, tmp_path):
    one, _ = generate("one")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    settings = json.loads((one / "generation.json").read_text())
    arguments = ["--pretrained_model_name_or_path", settings["pretrained_model_name_or_path"]]
    arguments += ["--prompts", settings["prompts"], "--num_inference_steps", "2", "--resolution", "32"]
    arguments += ["--images_per_prompt", "2", "--batch_size", "1", "--output_dir", str(tmp_path / "two")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, HERE / "generate_images.py", *arguments]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert re.search(r"Drawing: 100%.* 2/2 ", done.stderr)  # half of the four images
    assert (tmp_path / "two" / "metadata.jsonl").read_text() == (one / "metadata.jsonl").read_text()
    for path in (one / "images").iterdir():
        images = [np.asarray(Image.open(p), dtype=int) for p in (path, tmp_path / "two" / "images" / path.name)]
        assert abs(images[0] - images[1]).max() <= 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', "p.jsonl, line 2: no text in 'prompt'"),
        ("p.jsonl", '{"prompt": "a"}\nnonsense\n', "p.jsonl, line 2 is not JSON"),
        ("p.txt", "\n\n", "p.txt: no prompts"),
        ("p.txt", b"\xff\xfe\xfa", "p.txt is no text file"),
        ("p.txt", None, "p.txt: no such file"),
        ("p.csv", "prompt\na\n", "p.csv: want .txt"),
    ],
)
def test_bad_prompts(generate, tmp_path, name, content, words):
    """One line that names the file and the line, before a model loads."""
    prompts = tmp_path / name
    if content is not None:
        prompts.write_bytes(content if isinstance(content, bytes) else content.encode())
    folder, output = generate("run", prompts=prompts, expect=1)
    assert words in complaint(output) and not folder.exists()


def test_bad_places(call, generate, tmp_path):
    """Folders that hold something else, missing weights, metrics that do not exist, prompts that ask for no text."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    (tmp_path / "foreign" / "images").mkdir(parents=True)
    written("x", 32).save(tmp_path / "foreign" / "images" / "00000-0.png")
    _, output = generate("foreign", expect=1)
    assert "has images but no generation.json" in complaint(output)
    _, output = generate("other", expect=1)
    assert "holds something else" in complaint(output)
    for flag, value in (("--resolution", 100), ("--max_sequence_length", 1000), ("--lora", tmp_path / "other")):
        _, output = generate("run", flag, value, expect=2)
        assert flag in complaint(output)
    folder, output = generate("run", "--transformer", tmp_path / "nowhere", expect=1)
    assert f"--transformer {tmp_path / 'nowhere'}" in complaint(output) and not (folder / "metadata.jsonl").exists()
    _, output = generate("other/file", expect=1)
    assert f"--output_dir {tmp_path / 'other' / 'file'}" in complaint(output)
    assert "has no metadata.jsonl" in complaint(call("score_images", tmp_path / "other", "--metrics", "ocr", expect=1))
    assert "choose from ocr" in complaint(call("score_images", tmp_path, "--metrics", "nice", expect=2))
    folder, _ = generate("run")
    output = call("score_images", folder, "--metrics", "ocr", expect=1)
    assert "'a red circle' has no text in double quotes" in complaint(output)


def test_more_pixels_than_the_model_has_positions_for(generate, monkeypatch):
    """Is one line that names the flag and the limit, before weights load; up to there it draws."""
    generate("run", "--resolution", 256, "--num_inference_steps", 1, "--images_per_prompt", 1, "--max_prompts", 1)
    monkeypatch.setattr("generate_images.load_trained", lambda *_, **__: pytest.fail("weights were loaded"))
    _, output = generate("other", "--resolution", 272, expect=1)
    assert "--resolution 272: " in complaint(output) and "at most 256 pixels" in complaint(output)


def test_numbers_that_are_not_finite_are_not_drawn(generate):
    """Not as a black image either."""
    folder, output = generate("run", "--guidance_scale", 1e38, expect=1)
    assert "images/00000-0.png to " in complaint(output) and "not finite" in complaint(output)
    assert not list((folder / "images").iterdir()) and not (folder / "metadata.jsonl").exists()


@pytest.mark.parametrize("command", ["generate", "score", "convert"])
def test_a_full_disk_is_one_line(command, call, generate, rated, run_folder, tmp_path, monkeypatch):
    """That names the folder or the file; what is whole stays, and nothing half."""

    def full(*_):
        raise OSError(28, "No space left on device")

    if command == "generate":
        monkeypatch.setattr("generate_images.write_whole", lambda path, _: path.suffix == ".png" and full())
        folder, output = generate("new", expect=1)
        assert f"--output_dir {folder}" in complaint(output) and not (folder / "metadata.jsonl").exists()
    elif command == "score":
        rated(1.0)
        files = {"a": FullFile}
        monkeypatch.setattr("scoring.open", lambda *a, **b: files.get(a[1], lambda: open(*a, **b))(), raising=False)
        output = call("score_images", run_folder, "--metrics", "aesthetic", expect=1)
        assert str(run_folder / "scores" / "aesthetic.jsonl") in complaint(output)
    else:
        monkeypatch.setattr("data_sets.place", full)
        output = call("convert_jsonl", "--train_data_dir", run_folder, "--output_dir", tmp_path / "new", expect=1)
        assert f"--output_dir {tmp_path / 'new'}" in complaint(output)
        assert not [path for path in tmp_path.iterdir() if "new" in path.name]
    assert "No space left" in complaint(output)


class FullFile(io.StringIO):
    """What was written is still to be written when it is closed."""

    def flush(self):
        raise OSError(28, "No space left on device")

    def close(self):
        self.flush()


def test_missing_weights_leave_the_other_metrics(run_folder, tmp_path):
    """Offline and with an empty cache: one line with the command that fetches the files, and OCR is still scored."""
    environment = os.environ | {"HF_HOME": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, HERE / "score_images.py", run_folder, "--metrics", "pickscore,ocr"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    command = re.search(r"hf download yuvalkirstain/PickScore_v1 (.*)", complaint(done.stderr))[1]
    assert re.fullmatch(r"--include '\*\.json' --include '\*\.txt' --include 'model[\w.-]*'.*", command)
    assert command.count("'") == 2 * command.count("--include")  # a flag takes one pattern
    assert set(json.loads((run_folder / "scores.json").read_text())) == {"ocr"}


def read_back(*arguments):
    """What the training scripts read: captions, sizes and digests, sorted."""
    args = train_sd3_soar.parse_args(["--pretrained_model_name_or_path", "x", *map(str, arguments)])
    rows = train_sd3_soar.load_images(args)
    images = inspect_rows(rows)
    read = zip(rows, images, strict=True)
    return sorted((row["captions"][0], row["height"], row["width"], image["digest"]) for row, image in read)


def test_a_data_set_of_the_hub(call, tmp_path):
    """Images within a table: scored, filtered and converted, none of their bytes kept in between."""
    shown = ["TEA", "TEN", "BREAD", "TEA"]
    table = datasets.Dataset.from_dict({"picture": [written(text) for text in shown], "says": ['It says "TEA".'] * 4})
    table = table.cast_column("picture", datasets.Image())
    (tmp_path / "set").mkdir()
    table.to_parquet(tmp_path / "set" / "train.parquet")
    source = ["--dataset_name", tmp_path / "set", "--image_column", "picture", "--caption_column", "says"]
    output = call("score_images", *source, "--metrics", "ocr", "--output_dir", tmp_path / "scores")
    scores = [
        json.loads(line)["score"]
        for line in (tmp_path / "scores" / "scores" / "ocr.jsonl").read_text().split("\n")[:-1]
    ]
    assert [*scores[:2], scores[3]] == [1, pytest.approx(2 / 3), 1] and scores[2] < 0.5 and len(scores) == 4
    summary = json.loads((tmp_path / "scores" / "scores.json").read_text())["ocr"]
    assert summary["low"] < summary["mean"] < summary["high"] and f"ocr {summary['mean']:.4f}" in output
    call("filter_dataset", *source, "--metric", "ocr", "--top_fraction", 0.25, "--scores_dir", tmp_path / "scores",
         "--to", "jsonl", "--resolution", 256, "--output_dir", tmp_path / "best")  # fmt: skip
    best = ["--jsonl_path", tmp_path / "best" / "data.jsonl", "--image_dir", tmp_path / "best" / "images"]
    assert [row[:3] for row in read_back(*best)] == [('It says "TEA".', 256, 256)] * 2  # a tie
    args = train_sd3_soar.parse_args(["--pretrained_model_name_or_path", "x", *map(str, source)])
    assert all(isinstance(row["image"], tuple) for row in data_sets.read_data(args))
    output = call("filter_dataset", *best, "--metric", "ocr", "--min_score", 1, "--output_dir", tmp_path / "again")
    assert "2 of 2 images" in output


def test_a_folder_of_links(call, photos, tmp_path):
    """By the names that the folder has for its pictures, wherever they are."""
    (tmp_path / "links").mkdir()
    for path in photos.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    call("convert_jsonl", "--train_data_dir", tmp_path / "links", "--copy", "--output_dir", tmp_path / "data")
    assert read_back("--train_data_dir", tmp_path / "data") == read_back("--train_data_dir", photos)


def test_converted_data_are_the_same_data(call, photos, tmp_path):
    """Image folder to JSONL to image folder: same captions and bytes, in links; sizes are the nearest buckets'."""
    first, second = tmp_path / "jsonl", tmp_path / "folder"
    buckets = ["--aspect_ratio_buckets", "512,512;416,608"]
    call("convert_jsonl", "--train_data_dir", photos, "--to", "jsonl", *buckets, "--output_dir", first)
    source = read_back("--train_data_dir", photos)
    jsonl = read_back("--jsonl_path", first / "data.jsonl", "--image_dir", first / "images")
    assert [(row[0], row[3]) for row in jsonl] == [(row[0], row[3]) for row in source]
    wide = {"a cat looking to the side", "a cup of coffee on a wooden table", "a rocket on its launch pad"}
    wide |= {"old coins in rows"}  # nearer to 3:2 than to a square
    assert {row[0]: row[1:3] for row in jsonl} == {
        row[0]: (416, 608) if row[0] in wide else (512, 512) for row in jsonl
    }
    for line in (first / "data.jsonl").read_text().splitlines():
        (path,) = (first / "images").glob(json.loads(line)["md5"] + ".*")
        assert hashlib.md5(path.read_bytes()).hexdigest() == path.stem and path.stat().st_nlink == 2
    call("convert_jsonl", "--jsonl_path", first / "data.jsonl", "--image_dir", first / "images", "--copy",
         "--output_dir", second)  # fmt: skip
    assert read_back("--train_data_dir", second) == source
    assert all(path.stat().st_nlink == 1 for path in (second / "images").iterdir())
    source = ["--jsonl_path", first / "data.jsonl", "--image_dir", first / "images", "--to", "jsonl"]
    for name, flags in (("kept", []), ("square", ["--resolution", 256])):  # its own sizes, or those that are asked for
        call("convert_jsonl", *source, *flags, "--output_dir", tmp_path / name)
        sizes = [row[1:3] for row in read_back("--jsonl_path", tmp_path / name / "data.jsonl", *source[2:4])]
        assert sizes == ([row[1:3] for row in jsonl] if name == "kept" else [(256, 256)] * len(jsonl))
    output = call("convert_jsonl", "--train_data_dir", photos, "--output_dir", second, expect=2)
    assert "exists: choose another folder" in complaint(output)


def test_converted_bare_images(call, photos, tmp_path):
    """A caption beside an image goes along, --instance_prompt is that of the others."""
    source = tmp_path / "bare"
    shutil.copytree(photos, source, ignore=shutil.ignore_patterns("metadata.jsonl"))
    first, *others = sorted(source.iterdir())
    first.with_suffix(".txt").write_text("its own")
    prompt = ["--instance_prompt", "a photo of sks dog"]
    call("convert_jsonl", "--train_data_dir", source, *prompt, "--output_dir", tmp_path / "data")
    captions = [row[0] for row in read_back("--train_data_dir", tmp_path / "data")]
    assert sorted(captions) == ["a photo of sks dog"] * len(others) + ["its own"]


@pytest.mark.parametrize(
    ("to", "name", "field"), [("image_folder", "metadata", "text"), ("jsonl", "data", "caption_en")]
)
def test_all_captions_of_an_image_are_kept(to, name, field, call, tmp_path):
    """Each of several; and an image that cannot be read is named, counted and left out."""
    source = tmp_path / "source"
    source.mkdir()
    captions = {"a.png": ["one", "two"], "b.png": "three", "c.png": "broken"}
    for i, file in enumerate(captions):
        Image.new("RGB", (32, 32), (0, 0, i)).save(source / file)
    (source / "c.png").write_bytes(b"no image")
    lines = [json.dumps({"file_name": file, "text": text}) + "\n" for file, text in captions.items()]
    (source / "metadata.jsonl").write_text("".join(lines))
    flags = ["--to", to, "--resolution", 32, "--output_dir", tmp_path / "out"]
    output = call("convert_jsonl", "--train_data_dir", source, *flags, expect=1)
    assert "left out: c.png: " in output and "2 images in" in output and "1 left out" in output
    rows = [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
    assert [row[field] for row in rows] == [["one", "two"], "three"]


def test_conversion_touches_nothing_else(call, photos, tmp_path, caplog):
    """A source that is called as a partial output would be; an output among the data; an image that is not listed."""
    source = tmp_path / "data.partial"
    shutil.copytree(photos, source)
    written("unlisted").save(source / "unlisted.png")
    output = call("convert_jsonl", "--train_data_dir", source, "--output_dir", tmp_path / "data")
    assert "8 images in" in output and "1 images in" in caplog.text and "are not listed" in caplog.text
    assert len(read_back("--train_data_dir", tmp_path / "data")) == 8
    assert len(list(source.iterdir())) == 10
    output = call("convert_jsonl", "--train_data_dir", source, "--output_dir", source / "more", expect=2)
    assert "is inside" in complaint(output)
    output = call("convert_jsonl", "--dataset_name", source, "--output_dir", source / "more", expect=2)
    assert "is inside" in complaint(output)
    arguments = ["--metric", "ocr", "--min_score", 1, "--scores_dir", source / "scores"]
    output = call("filter_dataset", "--train_data_dir", source, *arguments, "--output_dir", tmp_path / "x", expect=2)
    assert f"{source / 'scores'} is inside" in complaint(output)
    arguments = ["--metrics", "ocr", "--output_dir", tmp_path / "empty"]
    output = call("score_images", "--train_data_dir", source, *arguments, "--max_train_samples", 1, expect=1)
    assert "has no text in double quotes" in complaint(output)
    (tmp_path / "no images").mkdir()
    arguments = ["--metric", "ocr", "--min_score", 1, "--output_dir", tmp_path / "x"]
    output = call("filter_dataset", "--train_data_dir", tmp_path / "no images", *arguments, expect=1)
    assert "no images" in complaint(output) and not (tmp_path / "x-scores").exists()
    (tmp_path / "file").touch()
    output = call("convert_jsonl", "--train_data_dir", source, "--output_dir", tmp_path / "file" / "x", expect=1)
    assert "--output_dir" in complaint(output)
    arguments = ["--metrics", "ocr", "--output_dir", tmp_path / "file"]
    output = call("score_images", "--train_data_dir", source, *arguments, expect=1)
    assert f"{tmp_path / 'file'} cannot hold scores" in complaint(output)


def test_what_is_converted_is_what_training_sees(call, tmp_path):
    """Of a format that the JSONL does not have: 16 bits of grey, and an orientation in EXIF."""
    source = tmp_path / "source"
    source.mkdir()
    ramp = np.linspace(0, 65535, 64 * 32).reshape(32, 64).astype(np.uint16)
    Image.fromarray(ramp).save(source / "grey.tiff")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    written("up", 64).crop((0, 16, 64, 48)).save(source / "turned.tiff", exif=exif)
    lines = [json.dumps({"file_name": name, "text": name}) + "\n" for name in ("grey.tiff", "turned.tiff")]
    (source / "metadata.jsonl").write_text("".join(lines))
    call("convert_jsonl", "--train_data_dir", source, "--to", "jsonl", "--output_dir", tmp_path / "out")
    records = [json.loads(line) for line in (tmp_path / "out" / "data.jsonl").read_text().splitlines()]
    assert [record["caption_en"] for record in records] == ["grey.tiff", "turned.tiff"]
    for record in records:
        seen = decode_image((source / record["caption_en"]).read_bytes())
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "images" / f"{record['md5']}.png")), seen)


def test_filtered_by_score(call, run_folder, tmp_path):
    """By a least score and by a fraction; scores are reused, broken images reported, the histogram is a picture."""
    (run_folder / "images" / "00003-0.png").write_bytes(b"no image")
    kept = tmp_path / "kept"
    arguments = ["--train_data_dir", run_folder, "--metric", "ocr", "--scores_dir", tmp_path / "scores"]
    output = call("filter_dataset", *arguments, "--min_score", 0.9, "--output_dir", kept, expect=1)
    assert "not scored: images/00003-0.png" in output and "2 of 4 images" in output
    rows = [json.loads(line) for line in (kept / "metadata.jsonl").read_text().splitlines()]
    assert [(row["text"].split('"')[1], row["ocr"]) for row in rows] == [("BREAD", 1), ("open", 1)]
    assert len(read_back("--train_data_dir", kept)) == 2
    assert Image.open(tmp_path / "scores" / "ocr.png").size[0] > 300
    before = (tmp_path / "scores" / "scores" / "ocr.jsonl").read_bytes()
    arguments += ["--to", "jsonl", "--output_dir", tmp_path / "all"]
    call("filter_dataset", *arguments, "--top_fraction", 1, expect=1)  # of those that have a score
    arguments = arguments[:6]
    assert (tmp_path / "scores" / "scores" / "ocr.jsonl").read_bytes() == before
    assert len((tmp_path / "all" / "data.jsonl").read_text().splitlines()) == 3
    output = call("filter_dataset", *arguments, "--min_score", 1.5, "--output_dir", tmp_path / "none", expect=1)
    assert "no image scores at least 1.5; the best has 1" in complaint(output) and not (tmp_path / "none").exists()


def test_top_fraction():
    assert filter_dataset.choose([3.0, 1.0, 2.0, 4.0], None, 0.5) == 3.0
    assert filter_dataset.choose([3.0, 1.0], None, 1e-9) == 3.0
    assert filter_dataset.choose([3.0, 1.0], 2.5, None) == 2.5


def test_flags_of_the_readme_exist():
    """Every flag of a command in the README is one of its script's."""
    text = re.sub(r"\\\n\s*", " ", (HERE / "README.md").read_text())
    found = re.findall(r"evaluation/(\w+)\.py (.*)", text)
    assert {"generate_images", "score_images", "compare", "filter_dataset", "convert_jsonl"} <= {
        name for name, _ in found
    }
    shared = (HERE / "data_sets.py").read_text()
    for name, arguments in found:
        source = (HERE / f"{name}.py").read_text()
        source += shared if name in ("filter_dataset", "convert_jsonl") else ""
        for flag in re.findall(r"--\w+", arguments):
            assert f'"{flag}"' in source, (name, flag)
