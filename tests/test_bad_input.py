# SPDX-License-Identifier: Apache-2.0
"""A user's mistake gives one line that names it, before any weights load, and nothing that was there is changed."""

import contextlib
import importlib
import json
import logging
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import filelock
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
)
from harness import ROOT, SCRIPTS, equal, finish, start_two
from PIL import Image, ImageFile
from safetensors.torch import load_file, save_file


SFT, SOAR, LORA = SCRIPTS


def contents(folder):
    """Every file below `folder` with its bytes, but what is remembered of the check of images, and an empty lock."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.parent.name != "checks"]
    return {path: path.read_bytes() for path in files if path.name != ".lock"}


def forbid_weights(patch):
    """Fail the test when a model loads. Tokenizers may: captions are counted with them."""
    load_pipeline = StableDiffusion3Pipeline.from_pretrained

    def load(*inputs, **parts):
        if "text_encoder" in parts and parts["text_encoder"] is None:
            return load_pipeline(*inputs, **parts)
        pytest.fail("text encoders were loaded")

    patch.setattr(StableDiffusion3Pipeline, "from_pretrained", load)
    for part in (AutoencoderKL, SD3Transformer2DModel):
        patch.setattr(part, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))


@pytest.fixture(scope="module")
def photos(small_photos):
    """Decoding large photographs would take most of the time here."""
    return small_photos


@pytest.fixture
def refuse(run, monkeypatch, capsys, tmp_path):
    """
    Run a script that must end with one line, and return that line.

    `code` is 2 where the command line itself is wrong, else 1. No weights may load, unless `after_loading`; every
    file below `tmp_path` must stay as it was, but for what `cache/checks` remembers of good images.
    """

    def refuse_run(script, *arguments, code=1, after_loading=False):
        before = contents(tmp_path)
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
            if not after_loading:
                forbid_weights(patch)
            run(script, *arguments)
        assert contents(tmp_path) == before
        if code == 2:
            assert exit.value.code == 2
            usage, message = capsys.readouterr().err.splitlines()
            assert usage == f"usage: {Path(sys.argv[0]).name} ARGUMENTS, see --help"
        else:
            message = exit.value.code  # Python prints a text and exits with 1
            assert isinstance(message, str) and message.startswith("error: ")
        assert "\n" not in message and len(message) < 1000
        return message

    return refuse_run


@pytest.fixture
def images(tmp_path):
    """A function that writes an image folder: `images({"a.png": "a caption"}, column="text")`."""

    def write(captions, column="text", name="images"):
        folder = tmp_path / name
        folder.mkdir()
        with open(folder / "metadata.jsonl", "w") as metadata:
            for number, (file, caption) in enumerate(captions.items()):
                Image.new("RGB", (40, 40), (number, 0, 0)).save(folder / file)
                metadata.write(json.dumps({"file_name": file, column: caption}) + "\n")
        return folder

    return write


@pytest.fixture
def authors(tmp_path):
    """A function that writes `--jsonl_path` with the given lines, and four images to name in them: a, b, c, d."""

    def write(*lines):
        folder = tmp_path / "image_dir"
        folder.mkdir()
        for number, name in enumerate("abcd"):
            Image.new("RGB", (40, 40), (number, 0, 0)).save(folder / f"{name}.png")
        path = tmp_path / "data.jsonl"
        lines = [json.dumps(line).encode() if isinstance(line, dict) else line for line in lines]
        path.write_bytes(b"\n".join(lines) + b"\n")
        return "--jsonl_path", path, "--image_dir", folder

    return write


def altered(pipeline, folder, file, **changes):
    """A copy of the pipeline in `folder`, with other values in one of its JSON files; `None` removes a key."""
    shutil.copytree(pipeline, folder)
    path = folder / file
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


# The command line


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("sources", [[], ["--train_data_dir", ".", "--dataset_name", "x"]])
def test_exactly_one_data_source(script, sources, capsys):
    module = __import__(script)
    with pytest.raises(SystemExit) as exit:
        module.parse_args(["--pretrained_model_name_or_path", "x", *sources])
    assert exit.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "exactly one of --dataset_name, --train_data_dir and --jsonl_path" in message


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--train_data_dir", "nowhere"], ["--train_data_dir nowhere", "no such folder"]),
        (["--jsonl_path", "nowhere", "--image_dir", "."], ["--jsonl_path nowhere", "no such file"]),
        (["--jsonl_path", __file__, "--image_dir", "nowhere"], ["--image_dir nowhere", "no such folder"]),
        (["--jsonl_path", __file__], ["--jsonl_path and --image_dir"]),
        (["--image_dir", "."], ["--image_dir has no effect without --jsonl_path"]),
        (["--dataset_split", "test"], ["--dataset_split has no effect without --dataset_name"]),
        (["--train_data_dir", ".", "--output_dir", "out"], ["--output_dir out is inside of ."]),
        (["--train_data_dir", "tests/", "--output_dir", "tests"], ["--output_dir tests is inside"]),
        (["--dataset_name", "tests", "--output_dir", "tests/out"], ["--output_dir tests/out is inside of tests"]),
        (
            ["--allow_resume_changes", "seed"],
            ["no effect without --resume_from_checkpoint"],
        ),
        (["--resume_from_checkpoint", "latest", "--allow_resume_changes", "seed,sed"], ["sed: no such flag"]),
        (["--resume_from_checkpoint", "latest", "--allow_resume_changes", "use_ema"], ["use_ema", "keeps as it was"]),
        (["--resolution", "40"], ["--resolution", "divisible by 16"]),
        (["--resolution", "0"], ["--resolution", "from 16"]),
        (["--aspect_ratio_buckets", "32,40"], ["--aspect_ratio_buckets", "divisible by 16"]),
        (["--aspect_ratio_buckets", "32x32"], ["--aspect_ratio_buckets", "32x32"]),
        (["--train_batch_size", "two"], ["--train_batch_size", "two"]),
        (["--train_batch_size", "0"], ["--train_batch_size", "from 1"]),
        (["--learning_rate", "nan"], ["--learning_rate", "nan"]),
        (["--learning_rate", "-1"], ["--learning_rate", "from 0"]),
        (["--cond_dropout_rate", "1.5"], ["--cond_dropout_rate", "from 0 to 1"]),
        (["--adam_beta1", "1"], ["--adam_beta1"]),
        (["--adam_beta2", "1"], ["--adam_beta2"]),
        (["--max_sequence_length", "513"], ["--max_sequence_length", "512"]),  # the pipeline's limit
        (["--lambda_aux", "inf"], ["--lambda_aux", "inf"]),
        (["--logit_mean", "nan"], ["--logit_mean", "nan"]),
        (["--sigma_upper_ratio", "0.5"], ["--sigma_upper_ratio", "from 1"]),
        (["--sde_rollout_type", "euler"], ["--sde_rollout_type", "euler", "flow_sde"]),
        (["--weighting_scheme", "cosine"], ["--weighting_scheme", "cosine", "cosmap"]),
        (["--optimizer", "prodigy", "--use_8bit_adam"], ["--use_8bit_adam", "prodigy"]),
        (["--full_bf16", "--use_8bit_adam"], ["--full_bf16", "--use_8bit_adam", "give one of them"]),
        (["--full_bf16", "--optimizer", "prodigy"], ["--full_bf16", "--optimizer prodigy", "give one of them"]),
        (["--hub_token", "hf_x", "--report_to", "wandb"], ["--hub_token", "hf auth login"]),
        (["--hub_token", "hf_x", "--report_to", "all"], ["--hub_token", "hf auth login"]),
        (["--num_sampling_steps", "1001"], ["--num_sampling_steps", "1000"]),
        (["--seed", str(2**63)], ["--seed", "from 0 to 9223372036854775807"]),
        (["--sde_rollout_type", "cps"], ["--sde_rollout_type has no effect without --num_rollout_paths"]),
        (["--sde_noise_scale", "0.7"], ["--sde_noise_scale has no effect without --num_rollout_paths"]),
        (
            ["--num_rollout_paths", "2", "--sde_rollout_type", "sde", "--sde_noise_scale", "0.7"],
            ["--sde_noise_scale has no effect with --sde_rollout_type sde"],
        ),
        (["--report_to", "notes"], ["--report_to", "'notes'", "'tensorboard'"]),
        (["--report_to", "trackio"], ["--report_to trackio", "pip install trackio"]),
        (["--max_train_step", "5"], ["--max_train_step"]),
        (["--lora_rank", "5"], ["--lora_rank"]),
    ],
    ids=" ".join,
)
def test_command_line(arguments, named, refuse, monkeypatch):
    """Code 2, and the argument with its value in the line."""
    monkeypatch.setattr("train_sd3_soar.get_available_trackers", list)
    data = ["--train_data_dir", "."] if "--image_dir" in arguments and "--jsonl_path" not in arguments else []
    message = refuse(SOAR, *arguments, *data, code=2)
    assert all(part in message for part in named), message


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--lr_step_rules None"),
        (["--lr_step_rules", "1:10;0.1"], "--lr_step_rules 1:10;0.1"),
    ],
)
def test_rules_of_a_schedule(arguments, named, refuse):
    message = refuse(SFT, "--lr_scheduler", "piecewise_constant", *arguments)
    assert "--lr_scheduler piecewise_constant" in message and named in message


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        ([], 2, "exactly one of --dataset_name, --train_data_dir and --jsonl_path"),
        (["--train_data_dir", "{empty}"], 1, "{empty} has no images"),
    ],
)
def test_as_a_process(arguments, code, named, pipeline, tmp_path):
    """What a shell sees: the code, one line on stderr, no traceback."""
    (tmp_path / "empty").mkdir()
    arguments = [argument.format(empty=tmp_path / "empty") for argument in arguments]
    command = [sys.executable, ROOT / "train_sd3_soar_lora.py", "--pretrained_model_name_or_path", pipeline]
    command += ["--output_dir", tmp_path / "out", "--resolution", "32", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code
    assert named.format(empty=tmp_path / "empty") in done.stderr.splitlines()[-1]
    assert "error: " in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_without_effect(script, tmp_path, capsys, monkeypatch):
    """A flag that acts only beside another, by its own help, is refused without it, and taken with it."""
    module, parsers = importlib.import_module(script), []
    check = module.check_args
    monkeypatch.setattr(module, "check_args", lambda parser, args: parsers.append(parser) or check(parser, args))
    needed = ["--pretrained_model_name_or_path", "x", "--train_data_dir", str(tmp_path)]
    module.parse_args(needed)
    names = []
    for action in parsers[0]._actions:
        for flag, needs in re.findall(r"^With --(\w+) ?(\w*):", action.help or ""):
            name = action.option_strings[-1]  # of a pair the one that is not the default
            fraction = name in ("--prodigy_beta3", "--ema_decay", "--sde_noise_scale")
            value = "0.25" if fraction else "cps" if action.choices else "16"
            given = [name] if action.nargs == 0 else [name, value]
            names.append(action.option_strings[0])
            with pytest.raises(SystemExit, match="2"):
                # The noise levels' default is what two of the flags belong to.
                module.parse_args(
                    [*needed, *given, *(["--weighting_scheme", "none"] if needs == "logit_normal" else [])]
                )
            without = f"--{flag} {needs}".strip()
            assert f"{names[-1]} has no effect without {without}" in capsys.readouterr().err
            other = {"use_ema": [], "push_to_hub": [], "num_rollout_paths": ["2"]}.get(flag, [needs or "x"])
            with contextlib.suppress(SystemExit):  # for another reason, such as two data sets
                module.parse_args([*needed, *given, f"--{flag}", *other])
            assert "has no effect" not in capsys.readouterr().err
    assert len(names) > 20 and {"--lr_power", "--ema_decay", "--validation_steps", "--prodigy_decouple"} <= {*names}
    for schedule in ("constant", "piecewise_constant"):
        with pytest.raises(SystemExit, match="2"):
            module.parse_args([*needed, "--lr_scheduler", schedule, "--lr_warmup_steps", "3"])
        assert "--lr_warmup_steps has no effect without another --lr_scheduler" in capsys.readouterr().err


def test_a_start_is_quiet(pipeline, photos, tmp_path):
    """On the screen are this script's lines and progress bars, not what libraries remark on what it does not use."""
    command = [sys.executable, ROOT / "train_sd3_soar_lora.py", "--pretrained_model_name_or_path", pipeline]
    command += ["--train_data_dir", photos, "--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache"]
    command += "--resolution 96 --max_sequence_length 16 --max_train_steps 1 --report_to none".split()
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == ""
    lines = [line.split("\r")[-1].strip() for line in done.stderr.splitlines()]
    said = [re.sub(r"^\d\d:\d\d:\d\d (INFO|WARNING) (\[RANK 0\] )?", "", line) for line in lines]
    bars = r"^(Checking images|Counting CLIP tokens|Counting T5 tokens|Loading.*|Training|Validation): .*"
    said = [line for line in said if line and not re.match(bars, line)]
    expected = [
        r"Seed \d+, 1 processes on cpu, float32, global batch 4",
        r"8 images, 0 dropped; sizes \{'96x96': 8\}\.",
        r"8 images are smaller than they are trained at: enlarged up to [\d.]+ x\.",
        rf"0 checkpoints of 0\.0 GiB and the result, 0\.0 GiB, in {tmp_path}/out; [\d.]+ GiB are free\. "
        rf"Caches: {tmp_path}/cache",
        r"0 of 8 captions are longer than the 77 tokens that CLIP reads\.",
        r"\d of 8 captions are longer than the 16 tokens that T5 reads\.",
        r"[\d,]+ trained parameters, 1 steps, 0\.5 epochs",
        rf"Saved the result in {tmp_path}/out",
    ]
    assert len(said) == len(expected), "\n".join(said)
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(expected, said, strict=True)), said


def test_a_single_file_as_model(refuse, tmp_path):
    """It says how to make a folder of it: for scripts, `from_single_file` asks the hub for configs of its own."""
    file = tmp_path / "sd3.5_medium.safetensors"
    file.write_bytes(b"")
    for flag in ("--pretrained_model_name_or_path", "--transformer"):
        message = refuse(SFT, flag, file)
        assert message.startswith(f"error: {flag} {file} is one file.") and "P.from_single_file" in message
        assert f"({str(file)!r}).save_pretrained('FOLDER')" in message


# The data


@pytest.mark.parametrize("flag", ["image_column", "caption_column"])
def test_missing_column(flag, refuse, photos):
    """The line lists the columns that there are."""
    for source, columns in (("--train_data_dir", "file_name, text"), ("--dataset_name", "image, text")):
        message = refuse(SFT, f"--{flag}", "nothing", source, photos)
        assert f"--{flag} nothing" in message and columns in message and "give the one that is meant" in message


def test_columns_of_another_kind(refuse, photos, tmp_path):
    import datasets

    rows = {"file": [str(photos / "coins.png")] * 2, "number": [1, 2], "tags": [{"a": 1}, {"b": 2}]}
    rows |= {"score": [0.5, None], "good": [True, False]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "data" / "train.parquet")
    data = ("--dataset_name", tmp_path / "data")
    assert "--image_column number" in refuse(SFT, *data, "--image_column", "number", "--caption_column", "tags")
    for column in ("tags", "score", "good"):
        message = refuse(SFT, *data, "--image_column", "file", "--caption_column", column)
        assert f"--caption_column {column} of {tmp_path / 'data'}, row 0: the caption is neither a text nor" in message


@pytest.mark.parametrize("value", ["https://example.org/cat.jpg", "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAgGBgcG" * 300])
def test_columns_of_other_texts(value, refuse, photos, tmp_path):
    """URLs, or the files themselves as base64: a short line says what the column holds, and what is wanted."""
    import datasets

    rows = datasets.Dataset.from_dict({"image": [value, value + "x"], "text": ["a", "b"]})
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    message = refuse(SFT, "--dataset_name", tmp_path / "data")
    assert f"--image_column image of {tmp_path / 'data'} holds texts such as" in message and value[:20] in message
    assert "images are wanted, or paths" in message and len(message) < 400
    rows = datasets.Dataset.from_dict({"image": [str(photos / "coins.png"), value], "text": ["a", "b"]})
    rows.to_parquet(tmp_path / "data" / "train.parquet")  # one of them is no path
    message = refuse(SFT, "--dataset_name", tmp_path / "data")
    assert "cannot be read" in message and len(message) < 600


def test_splits(refuse, tmp_path):
    """The line names those that there are."""
    import datasets

    rows = datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["a"]})})
    rows.save_to_disk(tmp_path / "saved")
    (tmp_path / "data").mkdir()
    rows["test"].to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    for folder in (tmp_path / "saved", tmp_path / "data"):
        message = refuse(SFT, "--dataset_name", folder)
        assert f"--dataset_name {folder} --dataset_split train" in message and "test" in message.split(folder.name)[1]


def test_image_folder_without_captions(refuse, tmp_path, images):
    folder = images({"a.png": "a", "b.png": "b"})
    (folder / "metadata.jsonl").unlink()
    message = refuse(SFT, "--train_data_dir", folder)
    assert f"{folder / 'a.png'} has no caption: write a.txt" in message and "--instance_prompt" in message


def test_two_kinds_of_captions(refuse, images):
    """No guess which of them is meant."""
    folder = images({"a.png": "a", "b.png": "b"})
    (folder / "b.txt").write_text("another b")
    message = refuse(SFT, "--train_data_dir", folder)
    assert f"{folder / 'metadata.jsonl'} and {folder / 'b.txt'} both hold captions: remove one of them" in message
    (folder / "metadata.jsonl").unlink()
    (folder / "b.caption").write_text("a third b")
    message = refuse(SFT, "--train_data_dir", folder)
    assert str(folder / "b.txt") in message and str(folder / "b.caption") in message and "remove one" in message


def test_two_metadata_files(refuse, images):
    """One beside the other, or in two folders, of the same image by different names."""
    folder = images({"a.png": "a", "b.png": "b"})
    (folder / "metadata.csv").write_text("file_name,text\na.png,another a\n")
    assert f"{folder / 'metadata.csv'} lies beside metadata.jsonl" in refuse(SFT, "--train_data_dir", folder)
    (folder / "more").mkdir()
    (folder / "metadata.csv").rename(folder / "more" / "metadata.csv")
    (folder / "more" / "metadata.csv").write_text("file_name,text\n../more/./../a.png,another a\n")
    message = refuse(SFT, "--train_data_dir", folder)
    assert "more/metadata.csv, line 2" in message and f"listed in {folder / 'metadata.jsonl'}, too" in message


@pytest.mark.parametrize("caption", [{"other": "a"}, [["a"]], [{"text": "a"}], True, [False], 0.5, [math.nan]])
def test_captions_of_another_shape(caption, refuse, images):
    """They are not emptied: the line is named, and what is wanted, in each format."""
    folder = images({"a.png": "a", "b.png": "b"})
    lines = [{"file_name": "a.png", "text": "a"}, {"file_name": "b.png", "text": caption}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    want = "line 2: the caption is neither a text nor a list of texts: "
    assert f"{folder / 'metadata.jsonl'}, {want}{caption}" in refuse(SFT, "--train_data_dir", folder)
    lines = [{"md5": name, "caption_en": value} for name, value in (("a", "a"), ("b", caption))]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    message = refuse(SFT, "--jsonl_path", folder / "data.jsonl", "--image_dir", folder)
    assert f"{folder / 'data.jsonl'}, {want}{caption}" in message


def test_a_pipeline_without_t5(refuse, pipeline, tmp_path):
    """As `save_pretrained` writes it after `text_encoder_3=None`."""
    shutil.copytree(pipeline, tmp_path / "small")
    index = tmp_path / "small" / "model_index.json"
    parts = json.loads(index.read_text()) | {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    index.write_text(json.dumps(parts))
    message = refuse(SFT, "--pretrained_model_name_or_path", tmp_path / "small")
    assert message.endswith("it has no T5: give --no_text_encoder_3")


def test_caption_that_is_no_text(refuse, images):
    folder = images({"a.png": "a", "b.png": "b"})
    (folder / "metadata.jsonl").unlink()
    (folder / "a.txt").write_text("a")
    (folder / "b.txt").write_bytes("ein Käfer".encode("latin-1"))
    message = refuse(SFT, "--train_data_dir", folder)
    assert f"{folder / 'b.txt'} is no text in UTF-8" in message
    (folder / "b.txt").unlink()
    (folder / "a.txt").unlink()
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": ["a", {"b": 1}]}\n')
    assert "metadata.jsonl, line 1: the caption is neither a text nor" in refuse(SFT, "--train_data_dir", folder)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("file_name,text\na.png,one, two\n", "line 2: other fields than the header's; quote texts with commas"),
        ("file_name,text\na.png\n", "line 2: other fields"),
        ("file_name,text\na.png,\xe4\n", "is no CSV file in UTF-8"),
        ("file;text\na.png;one\n", "line 2 has file;text"),
    ],
)
def test_bad_csv(text, named, refuse, images):
    folder = images({"a.png": "a"})
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text(text, encoding="latin-1")
    message = refuse(SFT, "--train_data_dir", folder)
    assert "metadata.csv" in message and named in message


def test_metadata_names_a_missing_file(refuse, images):
    folder = images({"a.png": "a", "b.png": "b"})
    (folder / "b.png").unlink()
    message = refuse(SFT, "--train_data_dir", folder)
    assert str(folder / "b.png") in message and "--skip_bad_images" in message


@pytest.mark.parametrize("kind", ["truncated", "text", "empty"])
def test_undecodable_image(kind, refuse, run, images, caplog):
    """The file is named; with --skip_bad_images it is dropped and counted, and the others train."""
    folder = images({f"{name}.png": name for name in "abc"})
    broken = folder / "b.png"
    Image.effect_noise((64, 64), 50).convert("RGB").save(broken)
    broken.write_bytes({"truncated": broken.read_bytes()[:2000], "text": b"no image", "empty": b""}[kind])
    message = refuse(SFT, "--train_data_dir", folder)
    assert str(broken) in message and "--skip_bad_images" in message
    caplog.set_level(logging.INFO)
    run(SFT, "--train_data_dir", folder, "--skip_bad_images", "--max_train_steps", 1)
    assert f"Dropped {broken}" in caplog.text and "2 images, 1 dropped" in caplog.text


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n", "git lfs pull"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html>\n<HTML lang=en>...", "HTML page"),
    ],
)
def test_other_files_by_the_name_of_a_picture(data, named, refuse, images):
    """Said as what they are, so that nobody looks for a converter."""
    folder = images({"a.png": "a", "b.png": "b"})
    (folder / "b.png").write_bytes(data)
    message = refuse(SFT, "--train_data_dir", folder)
    assert f"{folder / 'b.png'} cannot be read" in message and named in message and "JPEG" not in message


@pytest.mark.parametrize("source", ["--train_data_dir", "--jsonl_path"])
def test_names_that_are_not_unicode(source, refuse, tmp_path):
    """As an archive of Latin-1 leaves them, of a file or of its folder: the bytes are shown."""
    folder = tmp_path / os.fsdecode(b"K\xe4fer")
    folder.mkdir()
    data = [source, folder]
    if source == "--jsonl_path":
        (tmp_path / "data.jsonl").write_text('{"md5": "a", "caption_en": "a"}')
        data = [source, tmp_path / "data.jsonl", "--image_dir", folder]
    Image.new("RGB", (40, 40)).save(folder / "a.png")
    message = refuse(SFT, *data, "--instance_prompt", "a")
    assert r"K\xe4fer/a.png" in message and "not UTF-8; rename it" in message
    assert "can't encode character" in refuse(SFT, "--dataset_name", folder, "--instance_prompt", "a")


def test_missing_image_of_the_jsonl(refuse, authors):
    lines = [{"md5": name, "caption_en": name} for name in ("a", "missing")]
    message = refuse(SFT, *authors(*lines))
    assert "missing.jpg" in message and "--skip_bad_images" in message


def png(width, height):
    """A PNG file that claims a size and holds next to nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 20_000])  # PIL warns of the one and refuses the other
def test_decompression_bomb(side, refuse, images, monkeypatch):
    """A file that would fill the memory is refused by its header."""
    folder = images({f"{name}.png": name for name in "abc"})
    (folder / "b.png").write_bytes(png(side, side))
    load, loaded = ImageFile.ImageFile.load, []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: loaded.append(self.size) or load(self))
    message = refuse(SFT, "--train_data_dir", folder)
    reason = f"({side}, {side}) pixels of mode RGB; make it smaller" if side == 10_000 else "or so many pixels"
    assert str(folder / "b.png") in message and reason in message
    assert (side, side) not in loaded and loaded


def test_empty_data_set(refuse, authors, tmp_path):
    assert "data.jsonl has no images" in refuse(SFT, *authors(b"", b"  "))
    (tmp_path / "nothing").mkdir()
    assert f"{tmp_path / 'nothing'} has no images" in refuse(SFT, "--train_data_dir", tmp_path / "nothing")


def test_fewer_images_than_a_global_batch(refuse, photos):
    arguments = ("--train_batch_size", 3, "--gradient_accumulation_steps", 3, "--train_data_dir", photos)
    message = refuse(SOAR, *arguments)
    assert "8 images" in message and "global batch of 9" in message


def test_skipped_images_may_leave_too_few(refuse, images):
    folder = images({"a.png": "a", "b.png": "b"})
    (folder / "b.png").write_bytes(b"no image")
    assert "1 images" in refuse(SFT, "--train_data_dir", folder, "--skip_bad_images")


@pytest.mark.parametrize("caption", ["", "  ", None])
def test_empty_captions(caption, refuse, images):
    folder = images(dict.fromkeys(["a.png", "b.png"], caption))
    message = refuse(SFT, "--train_data_dir", folder)
    assert "every caption is empty" in message and "--caption_column" in message


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b'{"md5": "b", "caption_en": "x"', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'["b", "x"]', "JSON"),
        (b'{"caption_en": "x"}', "`md5`"),
        (b'{"md5": 5, "caption_en": "x"}', "`md5`"),
        (b'{"md5": "b"}', "`caption_en`"),
        (b'{"md5": "b", "caption_en": "x", "bw": 40, "bh": 32}', "`bw`"),
        (b'{"md5": "b", "caption_en": "x", "bw": 32, "bh": 33}', "`bh`"),
        (b'{"md5": "b", "caption_en": "x", "bw": -16, "bh": 32}', "`bw`"),
        (b'{"md5": "b", "caption_en": "x", "bw": "32", "bh": 32}', "`bw`"),
        (b'{"md5": "b", "caption_en": "x", "bw": 32.5, "bh": 32}', "`bw`"),
        (b'{"md5": "b", "caption_en": "x", "bw": 32}', "`bw` and `bh`"),
        (b'{"md5": "../secret", "caption_en": "x"}', "../secret"),
        (b'{"md5": "%(folder)s/secret", "caption_en": "x"}', "secret"),
        (b'{"md5": "linked/secret", "caption_en": "x"}', "linked/secret"),
        (b'{"md5": "b\\u0000", "caption_en": "x"}', "`md5`"),
        (b'{"md5": "%(long)s", "caption_en": "x"}', "`md5`"),
    ],
    ids=str,
)
def test_bad_line_in_the_jsonl(line, named, refuse, authors, tmp_path):
    """The line's number and what is wrong; a name that leads out of --image_dir is never opened."""
    Image.new("RGB", (40, 40)).save(tmp_path / "secret.png")
    line = line.replace(b"%(folder)s", str(tmp_path).encode()).replace(b"%(long)s", b"b" * 300)
    arguments = authors({"md5": "a", "caption_en": "x"}, b"", line, {"md5": "c", "caption_en": "x"})
    (tmp_path / "image_dir" / "linked").symlink_to(tmp_path)
    message = refuse(SFT, *arguments)
    assert f"{tmp_path / 'data.jsonl'}, line 3" in message and named in message


def test_size_that_the_model_cannot_take(refuse, authors):
    """The tiny pipeline has positions for 256 pixels."""
    lines = [{"md5": name, "caption_en": name, "bw": side, "bh": 32} for name, side in (("a", 32), ("b", 512))]
    message = refuse(SFT, *authors(*lines))
    assert "b.png" in message and "512" in message and "256" in message
    assert "--resolution" in refuse(SFT, "--resolution", 512)


@pytest.mark.parametrize("name", ["nobody/nothing", "a/b/c/d"])
def test_data_set_that_does_not_exist(name, refuse):
    assert f"--dataset_name {name}" in refuse(SFT, "--dataset_name", name)


# The model


@pytest.mark.parametrize("script", SCRIPTS)
def test_scheduler_with_dynamic_shifting(script, refuse, pipeline, tmp_path):
    model = altered(pipeline, tmp_path / "model", "scheduler/scheduler_config.json", use_dynamic_shifting=True)
    message = refuse(script, "--pretrained_model_name_or_path", model)
    assert str(model) in message and "dynamic shifting" in message


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}),
        ("model_index.json", None),
        ("scheduler/scheduler_config.json", None),
        ("transformer/config.json", None),
        ("transformer/config.json", {"pos_embed_max_size": None, "_class_name": "FluxTransformer2DModel"}),
    ],
    ids=str,
)
def test_no_pipeline(file, changes, refuse, pipeline, tmp_path):
    """Another pipeline, a missing config, or another model under a familiar name."""
    model = altered(pipeline, tmp_path / "model", file, **(changes or {}))
    if changes is None:
        (model / file).unlink()
    message = refuse(SFT, "--pretrained_model_name_or_path", model)
    assert f"--pretrained_model_name_or_path {model}" in message and "Stable Diffusion 3 pipeline" in message


@pytest.mark.parametrize("name", ["nobody/nothing", "nowhere", "a/b/c"])
def test_model_that_does_not_exist(name, refuse):
    assert f"--pretrained_model_name_or_path {name}" in refuse(SFT, "--pretrained_model_name_or_path", name)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "transformer"])
def test_pickle_is_never_loaded(part, refuse, pipeline, tmp_path, monkeypatch):
    """A model folder with `.bin` weights runs no code of theirs."""
    model = tmp_path / "model"
    shutil.copytree(pipeline, model)
    (file,) = (model / part).glob("*.safetensors")
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(load_file(file), file.with_name(name))
    file.unlink()
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was loaded"))
    message = refuse(SFT, "--pretrained_model_name_or_path", model)
    assert f"--pretrained_model_name_or_path {model}" in message and "safetensors" in message


def test_damaged_weights(refuse, pipeline, tmp_path):
    """A download that broke off."""
    model = tmp_path / "model"
    shutil.copytree(pipeline, model)
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    message = refuse(SFT, "--pretrained_model_name_or_path", model, after_loading=True)
    assert f"--pretrained_model_name_or_path {model}" in message


@pytest.mark.parametrize("script", [SFT, LORA])
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_3"])
def test_weights_without_one_tensor(part, script, refuse, pipeline, tmp_path):
    """Neither left empty nor drawn at random, as the libraries would: the folder and the tensor are named."""
    model = tmp_path / "model"
    shutil.copytree(pipeline, model)
    (file,) = (model / part).glob("*.safetensors")
    state = load_file(file)
    lost = sorted(state)[len(state) // 2]
    save_file({name: tensor for name, tensor in state.items() if name != lost}, file, {"format": "pt"})
    message = refuse(script, "--pretrained_model_name_or_path", model, after_loading=True)
    assert f"--pretrained_model_name_or_path {model}" in message
    assert f"the weights in {model / part} lack {lost}" in message


@pytest.mark.parametrize("script", [SFT, LORA])
def test_a_variant_that_no_part_has(script, refuse, pipeline):
    message = refuse(script, "--variant", "fp17")
    assert message == f"error: --variant fp17: {pipeline} has no weights of that name"


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (EulerDiscreteScheduler(), "its EulerDiscreteScheduler has no shift"),
        (DPMSolverMultistepScheduler(), "its DPMSolverMultistepScheduler has no shift"),
        (UniPCMultistepScheduler(use_flow_sigmas=True, use_dynamic_shifting=True), "dynamic shifting"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_scheduler_without_a_shift(scheduler, reason, refuse, pipeline, tmp_path):
    """No noise levels are guessed for a pipeline whose own are not those of a flow, or no constant ones."""
    model = tmp_path / "model"
    shutil.copytree(pipeline, model)
    StableDiffusion3Pipeline.from_pretrained(pipeline, scheduler=scheduler).save_pretrained(model)
    message = refuse(SFT, "--pretrained_model_name_or_path", model)
    assert str(model) in message and reason in message


@pytest.mark.parametrize("script", SCRIPTS)
def test_accelerates_compiler(script, refuse, monkeypatch):
    """It would give all saved weights names that no program knows."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    message = refuse(script)
    assert "--torch_compile" in message and "dynamo_config" in message and "ACCELERATE_DYNAMO_BACKEND" in message


LAYER = "transformer_blocks.0.attn.to_q"
SHAPES = {"A": (2, 32), "B": (32, 2)}
ONE = {f"transformer.{LAYER}.lora_{part}.weight": torch.ones(shape) for part, shape in SHAPES.items()}
MAGNITUDE = {f"transformer.{LAYER}.lora_magnitude_vector": torch.ones(32)}
OTHER = {name.replace("to_q", "to_k"): tensor.clone() for name, tensor in ONE.items()}
FLUX = {name.replace("transformer_b", "single_transformer_b"): tensor.clone() for name, tensor in ONE.items()}
NO_LORA, ELSE = "is no LoRA of a layer of this model", "it is of another kind, or not whole"
LORAS = {
    "LoKr": ({f"transformer.{LAYER}.lokr_w{i}": torch.ones(4, 4) for i in (1, 2)}, NO_LORA),
    "LoHa": ({f"transformer.{LAYER}.hada_w{i}": torch.ones(2, 32) for i in ("1_a", "1_b", "2_a", "2_b")}, NO_LORA),
    "kohya": ({"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": torch.ones(2, 32)}, "convert_for_ui.py"),
    "LyCORIS": ({f"lycoris_{LAYER.replace('.', '_')}.lora_down.weight": torch.ones(2, 32)}, NO_LORA),
    "another model": (ONE | FLUX, NO_LORA),
    "another width": ({k: torch.ones([3 * n // 2 for n in v.shape]) for k, v in ONE.items()}, "size mismatch"),
    "text encoders": ({k.replace("transformer.", "text_encoder.", 1): v for k, v in ONE.items()}, "holds nothing"),
    "nothing": ({}, "holds nothing"),
    "no B": (dict([*ONE.items()][:1]), NO_LORA),
    "no A": (ONE | dict([*OTHER.items()][1:]), ELSE),
    "a part of a DoRA": (ONE | OTHER | MAGNITUDE, ELSE),
    "alpha of nothing": (ONE | {"transformer.proj_out.alpha": torch.tensor(1.0)}, NO_LORA),
}


@pytest.mark.parametrize("kind", LORAS)
@pytest.mark.parametrize("resumed", [False, True])
def test_a_lora_that_is_none(kind, resumed, refuse, tmp_path):
    """What would be dropped, drawn at random, or trained to what no pipeline loads is refused by the flag's name."""
    (tmp_path / "lora").mkdir()
    save_file(LORAS[kind][0], tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    more = ["--resume_from_checkpoint", "latest"] if resumed else []
    message = refuse(LORA, "--lora", tmp_path / "lora", *more)
    assert message.startswith(f"error: --lora {tmp_path / 'lora'}: ") and LORAS[kind][1] in message


def test_a_lora_that_cannot_be_read(refuse, tmp_path):
    """A file under another name, one that is pickled, damaged ones, and a name that the hub does not have."""
    folder = tmp_path / "lora"
    folder.mkdir()
    file = folder / "pytorch_lora_weights.safetensors"
    save_file(ONE, folder / "mine.safetensors")
    torch.save(ONE, folder / "pytorch_lora_weights.bin")
    assert "if it has another name, give the file" in refuse(LORA, "--lora", folder)
    assert "header" in refuse(LORA, "--lora", folder / "pytorch_lora_weights.bin")
    file.write_bytes(b"damaged")
    assert refuse(LORA, "--lora", folder).startswith(f"error: --lora {folder}: ")
    save_file(ONE, file, {"lora_adapter_metadata": json.dumps({"transformer.r": 3})})
    assert "size mismatch" in refuse(LORA, "--lora", folder)
    save_file(ONE, file, {"lora_adapter_metadata": "{"})
    assert refuse(LORA, "--lora", folder).startswith(f"error: --lora {folder}: ")
    file.unlink()
    save_file(ONE, folder / "adapter_model.safetensors")
    assert "adapter_config.json" in refuse(LORA, "--lora", folder)
    assert refuse(LORA, "--lora", "nobody/nothing").startswith("error: --lora nobody/nothing cannot be loaded")


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["--lora", "{lora}", "--use_dora"], 1, "leave out --rank and all --lora_ flags and --use_dora"),
        (["--lora", "{lora}", "--rank", "4"], 1, "leave out --rank and all --lora_ flags"),
        (["--lora", "{lora}", "--lora_alpha", "32"], 1, "leave out --rank and all --lora_ flags"),
        (["--lora", "{lora}", "--lora_dropout", "0.1"], 1, "leave out --rank and all --lora_ flags"),
        (["--lora", "{lora}", "--lora_layers", "attn.to_q"], 1, "leave out --rank and all --lora_ flags"),
        (["--lora", "{lora}", "--lora_blocks", "0"], 1, "leave out --rank and all --lora_ flags"),
        (["--lora_alpha", "0"], 2, "--lora_alpha"),
        (["--lora_dropout", "1"], 2, "--lora_dropout"),
    ],
    ids=str,
)
def test_a_lora_that_would_not_train(arguments, code, named, refuse, tmp_path):
    """With an alpha of 0 or all of the input dropped, B stays 0 while the loss looks as it should."""
    (tmp_path / "lora").mkdir()
    save_file(ONE, tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert named in refuse(LORA, *(word.format(lora=tmp_path / "lora") for word in arguments), code=code)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--lora_layers", "attn.to_q,attn.query"], "attn.query"),
        (["--lora_layers", "nothing"], "nothing"),
        (["--lora_layers", "attn"], "--lora_layers attn"),
        (["--lora_layers", "attn2.to_q", "--lora_blocks", "2"], "attn2.to_q"),
        (["--lora_blocks", "0,7"], "--lora_blocks 0,7"),
        (["--lora_blocks", "first"], "--lora_blocks first"),
        (["--bnb_quantization_config_path", __file__], "--bnb_quantization_config_path"),
    ],
    ids=str,
)
def test_lora_that_cannot_be(arguments, named, refuse):
    """Layers and blocks that the model does not have (attn2 is in blocks 0 and 1), and 4-bit weights without a GPU."""
    message = refuse(LORA, *arguments)
    assert arguments[0] in message and named in message


@pytest.mark.parametrize("text", [None, "{", "[]", '{"load_in_4bit": "yes"}', '{"bits": 4}'])
def test_bad_quantization_config(text, refuse, tmp_path, monkeypatch):
    """Refused where there is a GPU, too: a missing file, no JSON, no object, a wrong value, an unknown name."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    path = tmp_path / "bnb.json"
    if text is not None:
        path.write_text(text)
    assert f"--bnb_quantization_config_path {path}" in refuse(LORA, "--bnb_quantization_config_path", path)


def test_half_precision_without_a_gpu(refuse):
    assert "--mixed_precision" in refuse(SFT, "--mixed_precision", "fp16")
    assert "--full_bf16 needs --mixed_precision bf16" in refuse(SFT, "--full_bf16")


# Folders and checkpoints


@pytest.mark.parametrize("flag", ["--output_dir", "--cache_dir"])
@pytest.mark.parametrize("path", ["file", "file/out"])
def test_folder_that_cannot_be_written(flag, path, refuse, tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = refuse(SFT, flag, tmp_path / path)
    assert flag in message and str(tmp_path / path) in message


def test_cache_that_does_not_fit(refuse, photos, tmp_path, monkeypatch):
    """Before any work: nothing is encoded, nothing is written."""
    usage = shutil.disk_usage
    full = usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full if Path(path) == tmp_path / "cache" else usage(path))
    for part in ("encode", "decode"):
        monkeypatch.setattr(AutoencoderKL, part, lambda *_, **__: pytest.fail("an image was encoded"))
    monkeypatch.setattr(StableDiffusion3Pipeline, "encode_prompt", lambda *_, **__: pytest.fail("encoded"))
    arguments = ("--cache_latents", "--cache_prompt_embeds", "--cache_dir", tmp_path / "cache")
    message = refuse(SFT, *arguments, after_loading=True)
    assert f"--cache_dir {tmp_path / 'cache'}" in message and "free" in message


@pytest.mark.parametrize("script", SCRIPTS)
def test_another_run_is_not_written_over(script, run, refuse):
    """Neither its result nor its checkpoints, unless asked to."""
    out = run(script, "--max_train_steps", 1, "--checkpointing_steps", 1)
    message = refuse(script)
    assert f"--output_dir {out}" in message and "--overwrite_output_dir" in message
    shutil.rmtree(out / "checkpoint-1")
    assert f"--output_dir {out}" in refuse(script)
    before = contents(out)
    with pytest.raises(SystemExit, match="fewer than one global batch"):
        run(script, "--overwrite_output_dir", "--train_batch_size", 9)
    assert contents(out) == before  # not yet
    shutil.copytree(out, out.with_name("before"))
    assert not equal(run(script, "--overwrite_output_dir"), out.with_name("before"))


@pytest.mark.parametrize("wanted", ["checkpoint-7", "nowhere", "{out}/checkpoint-3"])
def test_checkpoint_that_does_not_exist(wanted, refuse, tmp_path):
    """Nor does an unfinished one count, without `trainer_state.json`."""
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-3" / "random_states_0.pkl").write_text("")
    wanted = wanted.format(out=tmp_path / "out")
    assert f"--resume_from_checkpoint {wanted}" in refuse(SFT, "--resume_from_checkpoint", wanted)


@pytest.mark.parametrize("flags", [[], ["--overwrite_output_dir"], ["--resume_from_checkpoint", "latest"]])
def test_two_runs_in_one_folder(flags, run, refuse, tmp_path):
    """The second is refused, whatever it wants, as long as the first goes on and no longer."""
    with filelock.FileLock(tmp_path / "out" / ".lock"):
        assert "another run is writing there" in refuse(SFT, "--output_dir", tmp_path / "out", *flags)
    run(SFT, "--output_dir", tmp_path / "out", "--max_train_steps", 1, *flags)
    filelock.FileLock(tmp_path / "out" / ".lock", blocking=False).acquire()


def test_processes_that_do_not_see_each_other(pipeline, photos, tmp_path):
    """As where a launcher starts a process a GPU, and PyTorch sees none: each would take itself for the only one."""
    arguments = ["--pretrained_model_name_or_path", pipeline, "--train_data_dir", photos, "--output_dir", "nowhere"]
    log = tmp_path / "log"
    for process in start_two("train_sd3_soar", arguments, log, lambda: os.environ.pop("ACCELERATE_USE_CPU")):
        finish(process, log, code=1)
    assert "the launcher started 2 processes" in log.read_text() and not Path("nowhere").exists()


@pytest.mark.parametrize("missing", ["transformer", "optimizer.bin", "ema.safetensors"])
def test_damaged_checkpoint(missing, run, refuse, tmp_path):
    """The line names the checkpoint, not the model."""
    out = run(SFT, "--use_ema", "--max_train_steps", 1, "--checkpointing_steps", 1)
    part = out / "checkpoint-1" / missing
    shutil.rmtree(part) if part.is_dir() else part.unlink()
    message = refuse(SFT, "--use_ema", "--resume_from_checkpoint", "latest", after_loading=True)
    assert "checkpoint-1" in message.split(":")[1], message
