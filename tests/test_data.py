# SPDX-License-Identifier: Apache-2.0
"""What reaches the model: images, captions and their order, from each data source, encoded online or from a cache."""

import hashlib
import io
import json
import logging
import math
import os
import shlex
import shutil
import time
import unicodedata
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import skimage.data
import torch
from accelerate import PartialState
from diffusers import StableDiffusion3Pipeline
from harness import PHOTOS, cached, weights
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save, save_file

import data_utils
import train_sd3_soar as script
from data_utils import Cache


RED, GREEN, BLUE = (250, 10, 20), (10, 250, 20), (20, 10, 250)


@pytest.fixture
def samples(pipeline, tmp_path, caplog):
    """A function that reads the data of a command line as the scripts do, and returns their `TrainingImages`."""

    def read(*arguments, resolution=32):
        PartialState()
        caplog.set_level(logging.INFO)
        arguments = ["--pretrained_model_name_or_path", pipeline, "--resolution", resolution, "--seed", 0, *arguments]
        args = script.parse_args([str(argument) for argument in arguments])
        args.cache_dir = tmp_path / "cache"
        rows = script.load_images(args)
        return script.TrainingImages(args, rows, script.inspect_images(args, script.check_model(args), rows), None)

    return read


def solid(color, mode="RGB", size=(40, 40)):
    return Image.new("RGB", size, color).convert(mode)


def color(sample):
    """Mean colour of the pixels of a sample."""
    return sample["pixels"].float().mean((1, 2)).tolist()


def positions(width, height):
    """An image whose pixel at (x, y) has the colour (x, y, 7)."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, np.full_like(x, 7)], -1).astype(np.uint8))


def folder_of(folder, images, **captions):
    """Write an image folder of PIL images by file name."""
    folder.mkdir()
    with open(folder / "metadata.jsonl", "w") as metadata:
        for name, image in images.items():
            image.save(folder / name)
            metadata.write(json.dumps({"file_name": name, "text": captions.get(name, name)}) + "\n")
    return folder


# Sources


@pytest.mark.parametrize("embedded", [True, False])
def test_dataset_name(embedded, samples, tmp_path):
    """A folder of parquet files, as on the hub: bytes of many kinds of image, or paths, with columns of any name."""
    sixteen = Image.fromarray(np.full((40, 40), 128 * 257, np.uint16))
    kinds = {
        "rgb.png": (solid(RED), RED),
        "rgba.png": (solid(GREEN, "RGBA"), GREEN),
        "grey.png": (Image.new("L", (40, 40), 90), (90, 90, 90)),
        "sixteen.png": (sixteen, (128, 128, 128)),
        "palette.gif": (solid(BLUE, "P"), BLUE),
        "cmyk.jpg": (Image.new("CMYK", (40, 40), (0, 255, 255, 0)), (255, 0, 0)),
    }
    files = []
    for name, (image, _) in kinds.items():
        file = io.BytesIO()
        image.save(file, {"jpg": "jpeg"}.get(name[-3:], name[-3:]))
        (tmp_path / name).write_bytes(file.getvalue())
        files.append({"bytes": file.getvalue(), "path": name} if embedded else str(tmp_path / name))
    rows = datasets.Dataset.from_dict({"words": [f"a {name}" for name in kinds], "picture": files})
    rows = rows.cast_column("picture", datasets.Image())
    (tmp_path / "set" / "data").mkdir(parents=True)
    rows.to_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    images = samples("--dataset_name", tmp_path / "set", "--image_column", "picture", "--caption_column", "words")
    assert len(images) == len(kinds)
    for index, (name, (_, expected)) in enumerate(kinds.items()):
        sample = images[index, index]
        assert sample["caption"] == f"a {name}" and name in sample["name"]
        assert sample["pixels"].shape == (3, 32, 32) and sample["pixels"].dtype == torch.uint8
        assert color(sample) == pytest.approx(expected, abs=12), name


def test_dataset_config_name(samples, tmp_path):
    """It chooses among the configurations that a data set declares."""
    (tmp_path / "set").mkdir()
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("one", "two"))
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name, value in (("one", RED), ("two", BLUE)):
        rows = datasets.Dataset.from_dict({"image": [solid(value)], "text": [name]})
        rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "set" / f"{name}.parquet")
    for name, value in (("one", RED), ("two", BLUE)):
        images = samples("--dataset_name", tmp_path / "set", "--dataset_config_name", name)
        assert images[0, 0]["caption"] == name and color(images[0, 0]) == pytest.approx(value)


def test_dataset_split(samples, tmp_path):
    """Of a data set that has no `train`."""
    (tmp_path / "set").mkdir()
    for split, value in (("test", RED), ("validation", BLUE)):
        rows = datasets.Dataset.from_dict({"image": [solid(value)], "text": [split]})
        rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "set" / f"{split}-00000-of-00001.parquet")
        images = samples("--dataset_name", tmp_path / "set", "--dataset_split", split)
        assert images[0, 0]["caption"] == split and color(images[0, 0]) == pytest.approx(value)


def test_save_to_disk(samples, tmp_path):
    """A data set that was kept so, with or without splits."""
    rows = datasets.Dataset.from_dict({"image": [solid(RED), solid(BLUE)], "text": ["red", "blue"]})
    rows = rows.cast_column("image", datasets.Image())
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "two")
    for folder, split, texts in (("one", "train", ["red", "blue"]), ("two", "train", ["red", "blue"])):
        images = samples("--dataset_name", tmp_path / folder, "--dataset_split", split)
        assert [images[i, i]["caption"] for i in range(len(images))] == texts
        assert color(images[0, 0]) == pytest.approx(RED)
    images = samples("--dataset_name", tmp_path / "two", "--dataset_split", "test")
    assert len(images) == 1 and images[0, 0]["caption"] == "blue" and color(images[0, 0]) == pytest.approx(BLUE)
    images = samples("--dataset_name", tmp_path / "one", "--max_train_samples", 1)
    assert len(images) == 1 and images[0, 0]["caption"] == "red"


def test_names_of_classes_are_captions(samples, tmp_path):
    """Of a column of classes, or of several each; none where there is no label."""
    classes = datasets.ClassLabel(names=["a cat", "a dog"])
    features = {"image": datasets.Image(), "label": classes, "tags": datasets.List(classes)}
    rows = {"image": [solid(RED)] * 4, "label": [1, 0, None, -1], "tags": [[0, 1], [1], [], [0]]}
    rows = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    rows.save_to_disk(tmp_path / "set")
    arguments = ("--dataset_name", tmp_path / "set", "--instance_prompt", "a pet", "--caption_column")
    found = [item["captions"] for item in samples(*arguments, "label").inspected]
    assert found == [["a dog"], ["a cat"], ["a pet"], ["a pet"]]
    found = [item["captions"] for item in samples(*arguments, "tags").inspected]
    assert found == [["a cat", "a dog"], ["a dog"], ["a pet"], ["a cat"]]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_train_data_dir(kind, samples, tmp_path, caplog):
    """Captions belong to their file, in subfolders too; images that the metadata leaves out are counted, not used."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    listed = {"a.png": RED, "more/b.png": GREEN, "c.png": BLUE}
    for name, value in {**listed, "d.png": RED, "more/e.png": RED}.items():
        solid(value).save(folder / name)
    lines = [f'{name},"a {name}, here"' for name in reversed(listed)]
    if kind == "jsonl":
        lines = [json.dumps({"file_name": name, "text": f"a {name}, here"}) for name in reversed(listed)]
    (folder / f"metadata.{kind}").write_text("\n".join(["file_name,text"] * (kind == "csv") + lines))
    images = samples("--train_data_dir", folder)
    found = {images[i, i]["caption"]: color(images[i, i]) for i in range(len(images))}
    assert found == {f"a {name}, here": pytest.approx(value) for name, value in listed.items()}
    assert {images[i, i]["name"] for i in range(len(images))} == {str(folder / name) for name in listed}
    assert "2 images" in caplog.text and "not listed" in caplog.text


def test_metadata_of_two_folders(samples, tmp_path, caplog):
    """Each lists its own; an image that one of them lists twice is there twice."""
    for folder in ("a", "b"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        for name in ("1.png", "2.png"):
            solid(RED).save(tmp_path / "images" / folder / name)
    (tmp_path / "images" / "a" / "metadata.csv").write_text("file_name, text\n1.png, first\n1.png, second\n")
    (tmp_path / "images" / "b" / "metadata.jsonl").write_text('{"file_name": "1.png", "text": 7}')
    images = samples("--train_data_dir", tmp_path / "images")
    assert [item["captions"] for item in images.inspected] == [["first"], ["second"], ["7"]]
    assert "2 images" in caplog.text and "not listed" in caplog.text


def test_authors_format(samples, tmp_path):
    """Four kinds of file, captions as text or as an object in a text, and a size for each image."""
    long, medium, short = ({f"{kind}_caption": kind} for kind in ("long", "medium", "short"))
    captions = {
        "a": ("jpg", "plain", "plain"),
        "b": ("jpeg", "{not an object", "{not an object"),
        "c": ("png", json.dumps({"text": "text", **short, **medium, **long}), "long"),
        "d": ("webp", json.dumps({"text": "text", **short, **medium, "long_caption": ""}), "medium"),
        "e": ("png", json.dumps({"text": "text", **short, "medium_caption": None}), "short"),
        "f": ("png", json.dumps({"text": "text", "short_caption": "  "}), "text"),
        "g": ("png", {"text": "text", "other": "other"}, "text"),
        "h": ("png", json.dumps({"text": "", "other": "other"}), ""),
        "i": ("JPG", ["one of", "one of"], "one of"),
        "j": ("png", json.dumps({"long_caption": math.nan, **short}), "short"),
        "k": ("png", math.nan, ""),
    }
    (tmp_path / "images").mkdir()
    with open(tmp_path / "data.jsonl", "w") as file:
        for number, (name, (suffix, caption, _)) in enumerate(captions.items()):
            solid((20 * number, 0, 0)).save(tmp_path / "images" / f"{name}.{suffix}")
            size = {"bw": 48, "bh": 32} if name != "b" else {}
            file.write(json.dumps({"md5": name, "caption_en": caption, **size}) + "\n\n")
    images = samples("--jsonl_path", tmp_path / "data.jsonl", "--image_dir", tmp_path / "images", resolution=64)
    assert len(images) == len(captions)
    for number, (name, (suffix, _, expected)) in enumerate(captions.items()):
        sample = images[number, number]
        assert sample["caption"] == expected
        assert Path(sample["name"]).name == f"{name}.{suffix}"
        assert color(sample)[0] == pytest.approx(20 * number, abs=3)
        assert sample["pixels"].shape == ((3, 64, 64) if name == "b" else (3, 32, 48))


def caption_files(folder, **texts):
    """Images with the bytes of a text file beside each, where they are not `None`."""
    for name, text in texts.items():
        path = folder / f"{name.replace('__', '/')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        solid(RED).save(path)
        if text is not None:
            path.with_suffix(".txt").write_bytes(text)
    return folder


def captions(images):
    return {Path(item["name"]).stem: item["captions"][0] for item in images.inspected}


@pytest.mark.parametrize("slash", ["", "/"])
def test_captions_beside_the_images(slash, samples, tmp_path, caplog):
    """As other trainers keep them, whatever editor wrote them; the names of folders mean nothing."""
    texts = {
        "a": b"a red square",
        "b": b"\xef\xbb\xbfa square\r\nin red\r\n",
        "10_mycat__c": "ein rotes Quadrat, grün gemeint\n".encode(),
        "10_mycat__deep__d": b"",
    }
    folder = caption_files(tmp_path / "images", **texts)
    (folder / ".hidden.png").write_bytes(b"no image")
    (folder / ".trash").mkdir()
    (folder / ".trash" / "e.png").write_bytes(b"no image")
    (folder / "10_mycat" / ".ipynb_checkpoints").mkdir()
    (folder / "10_mycat" / ".ipynb_checkpoints" / "c-checkpoint.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("of no image")
    (folder / "a.txt").rename(folder / "a.caption")
    images = samples("--train_data_dir", f"{folder}{slash}")
    expected = {"a": "a red square", "b": "a square in red", "c": "ein rotes Quadrat, grün gemeint", "d": ""}
    assert captions(images) == expected
    assert "such as 10_name, mean nothing here" in caplog.text and "1 of 4 captions are empty" in caplog.text
    assert captions(samples("--train_data_dir", folder, "--max_train_samples", 2)).keys() == {"a", "b"}


def test_what_is_passed_over_is_named(samples, tmp_path, caplog, monkeypatch):
    """Captions by other names, pictures of other formats, folders that are links or unreadable: number and name."""
    folder, scandir = caption_files(tmp_path / "images", a=b"a red square", b=None, locked__c=None), os.scandir
    for name in ("a.json", "b.png.txt", "c.jxl", "d.jxl"):
        (folder / name).write_text("something")
    caption_files(tmp_path / "others", e=None)
    (folder / "linked").symlink_to(tmp_path / "others")

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    images = samples("--train_data_dir", folder, "--instance_prompt", "a thing")
    assert captions(images) == {"a": "a red square", "b": "a thing"}
    (line,) = (record.getMessage() for record in caplog.records if "Not used" in record.getMessage())
    assert all(f"{number} like {folder / name}" in line for number, name in ((1, "a.json"), (2, "c.jxl")))
    assert f"1 like {folder / 'b.png.txt'}" in line and "a.txt" not in line
    (line,) = (record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage())
    assert "2 folders" in line and str(folder / "linked") in line and str(folder / "locked") in line


def test_pictures_that_are_links(samples, tmp_path):
    """A folder of links, by each source that reads one; a snapshot in the hub's cache is made of them."""
    (tmp_path / "blobs").mkdir()
    folder = tmp_path / "snapshots" / "main"
    folder.mkdir(parents=True)
    metadata, lines = tmp_path / "blobs" / "metadata", []
    for name, value in (("a", RED), ("b", BLUE)):
        solid(value).save(tmp_path / "blobs" / name, "PNG")
        (folder / f"{name}.png").symlink_to(f"../../blobs/{name}")
        lines.append(json.dumps({"file_name": f"{name}.png", "text": name, "md5": name, "caption_en": name}))
    metadata.write_text("\n".join(lines))
    found = {"txt": samples("--train_data_dir", folder, "--instance_prompt", "x")}
    found["jsonl"] = samples("--jsonl_path", metadata, "--image_dir", folder)
    (folder / "metadata.jsonl").symlink_to("../../blobs/metadata")
    found["metadata"] = samples("--train_data_dir", folder)
    for kind, images in found.items():
        assert [color(images[i, i]) for i in range(2)] == [pytest.approx(RED), pytest.approx(BLUE)], kind
        assert kind == "txt" or captions(images) == {"a": "a", "b": "b"}


def test_instance_prompt(samples, tmp_path):
    """--instance_prompt is the caption of every image that has none: alone it is DreamBooth's form."""
    folder = caption_files(tmp_path / "images", a=b"a red square", b=None, c=b"")
    prompt = ("--instance_prompt", "a photo of sks dog")
    dog = "a photo of sks dog"
    assert captions(samples("--train_data_dir", folder, *prompt)) == {"a": "a red square", "b": dog, "c": dog}
    for name in ("a.txt", "c.txt"):
        (folder / name).unlink()
    assert captions(samples("--train_data_dir", folder, *prompt)) == dict.fromkeys("abc", dog)
    lines = [{"file_name": "a.png", "text": "a red square"}, {"file_name": "b.png", "text": None}]
    lines.append({"file_name": "c.png", "text": math.nan})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert captions(samples("--train_data_dir", folder, *prompt)) == {"a": "a red square", "b": dog, "c": dog}
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": f"{n}.png"}) for n in "abc"))
    assert captions(samples("--train_data_dir", folder, *prompt)) == dict.fromkeys("abc", dog)
    rows = datasets.Dataset.from_dict({"image": [str(folder / "a.png")] * 2, "text": ["a red square", None]})
    (tmp_path / "set").mkdir()
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "set" / "train.parquet")
    images = samples("--dataset_name", tmp_path / "set", *prompt)
    assert [item["captions"] for item in images.inspected] == [["a red square"], [dog]]


@pytest.mark.parametrize("source", ["--train_data_dir", "--dataset_name", "--jsonl_path"])
def test_several_captions(source, samples, tmp_path):
    """A list has several captions of an image: each visit draws one by its seed; one is drawn as it was alone."""
    texts = ["a red square", "a square", "red"]
    brace = json.dumps({"text": "b"})  # an object in a text means something in the authors' format alone
    folder = folder_of(tmp_path / "images", {"a.png": solid(RED), "b.png": solid(RED)})
    arguments = (source, folder)
    if source == "--train_data_dir":
        lines = [{"file_name": "a.png", "text": texts}, {"file_name": "b.png", "text": brace}]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    elif source == "--jsonl_path":
        lines = [{"md5": "a", "caption_en": {"long_caption": texts}}, {"md5": "b", "caption_en": brace}]
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
        arguments = (source, tmp_path / "data.jsonl", "--image_dir", folder)
    else:
        rows = {"image": [str(folder / "a.png"), str(folder / "b.png")], "text": [texts, [brace]]}
        rows = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        (tmp_path / "set").mkdir()
        rows.to_parquet(tmp_path / "set" / "train.parquet")
        arguments = (source, tmp_path / "set")
    images = samples(*arguments)
    other = "b" if source == "--jsonl_path" else brace
    assert [item["captions"] for item in images.inspected] == [texts, [other]]
    drawn = [images[0, position]["caption"] for position in range(300)]
    assert drawn == [images[0, position]["caption"] for position in range(300)]
    assert all(80 < drawn.count(text) < 120 for text in texts)
    assert {images[1, position]["caption"] for position in range(10)} == {other}


def test_names_that_macos_has_taken_apart(samples, tmp_path):
    """Metadata written on one system, files on another: an accent is a character there, and a second one here."""
    name, apart = (unicodedata.normalize(form, "caf\u00e9.png") for form in ("NFC", "NFD"))
    folder = folder_of(tmp_path / "brackets [v2]", {apart: solid(RED)})
    assert name != apart and not (folder / name).exists()
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a cup"}))
    assert samples("--train_data_dir", folder)[0, 0]["caption"] == "a cup"


def test_min_image_side(samples, tmp_path, caplog):
    """The shorter side counts; what is dropped is counted."""
    sizes = {"a.png": (40, 40), "b.png": (40, 31), "c.png": (31, 90), "d.png": (32, 32)}
    folder = folder_of(tmp_path / "images", {name: solid(RED, size=size) for name, size in sizes.items()})
    images = samples("--train_data_dir", folder, "--min_image_side", 32)
    assert [Path(item["name"]).name for item in images.inspected] == ["a.png", "d.png"]
    assert "2 images have a side below --min_image_side and are dropped" in caplog.text
    assert "2 images, 2 dropped" in caplog.text and len(samples("--train_data_dir", folder)) == 4


def test_max_train_samples(samples, photos, tmp_path):
    """The first N, and all where there are fewer."""
    rows = {"image": [str(photos / f"{name}.png") for name in PHOTOS], "text": [*PHOTOS.values()]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "set")
    assert len(samples("--dataset_name", tmp_path / "set", "--max_train_samples", 3)) == 3
    images = samples("--train_data_dir", photos, "--max_train_samples", 3)
    assert [images[i, i]["caption"] for i in range(len(images))] == list(PHOTOS.values())[:3]
    assert len(samples("--train_data_dir", photos, "--max_train_samples", 30)) == 8


@pytest.mark.parametrize("cached", [False, True])
def test_what_reaches_the_model(cached, run, monkeypatch, photos, pipeline):
    """Each photograph and caption is encoded once an epoch; a sample has the latents and embeddings of one pair."""
    pixels, prompts, batches = [], [], []
    encode_images, encode_prompts, prepare_batch = script.encode_images, script.encode_prompts, script.prepare_batch

    def see_images(vae, tensor, device):
        pixels.append(tensor.clone())
        return encode_images(vae, tensor, device)

    def see_prompts(text_encoders, texts, *rest):
        prompts.append(texts)
        return encode_prompts(text_encoders, texts, *rest)

    def see_batch(*inputs):
        batches.append(prepare_batch(*inputs))
        return batches[-1]

    monkeypatch.setattr(script, "encode_images", see_images)
    monkeypatch.setattr(script, "encode_prompts", see_prompts)
    monkeypatch.setattr(script, "prepare_batch", see_batch)
    flags = ["--cache_latents", "--cache_prompt_embeds"] if cached else []
    run("train_sd3_soar", "--trajectory_length", 0, "--center_crop", "--max_train_steps", 4, *flags)

    expected = {}
    for name in PHOTOS:
        image = Image.open(photos / f"{name}.png").convert("RGB")
        scale = 32 / min(image.size)
        size = [max(32, round(side * scale)) for side in image.size]
        left, top = ((side - 32) / 2 for side in size)
        small = np.array(image.resize(size, Image.Resampling.LANCZOS))
        expected[name] = small[round(top) : round(top) + 32, round(left) : round(left) + 32]
    seen = [image.permute(1, 2, 0).numpy() for tensor in pixels for image in tensor]
    captions = [text for texts in prompts for text in texts if text]
    assert sorted(captions) == sorted(PHOTOS.values())
    assert len(seen) == 8
    for name, image in expected.items():
        assert sum(np.array_equal(image, other) for other in seen) == 1, name

    pipe = StableDiffusion3Pipeline.from_pretrained(pipeline)
    for batch in batches:
        for i, file in enumerate(batch["name"]):
            name = Path(file).stem
            with torch.no_grad():
                embeds, _, pooled, _ = pipe.encode_prompt(
                    *[PHOTOS[name]] * 3, do_classifier_free_guidance=False, max_sequence_length=16
                )
                image = torch.from_numpy(expected[name]).permute(2, 0, 1)[None] / 127.5 - 1
                distribution = pipe.vae.encode(image).latent_dist
            torch.testing.assert_close(batch["prompt_embeds"][i], embeds[0], rtol=0, atol=1e-4)
            torch.testing.assert_close(batch["pooled_prompt_embeds"][i], pooled[0], rtol=0, atol=1e-4)
            generator = torch.Generator().manual_seed(batch["seed"][i])  # the noise of the latents is its first draw
            noise = torch.randn(distribution.mean[0].shape, generator=generator)
            drawn = distribution.mean[0] + distribution.std[0] * noise
            drawn = (drawn - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
            torch.testing.assert_close(batch["latents"][i], drawn, rtol=0, atol=1e-4)


# Pixels


def test_exif_rotation(samples, tmp_path):
    """A photograph that a camera stored on its side: upright before its size and crop are chosen."""
    upright = positions(96, 32)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show it
    (tmp_path / "images").mkdir()
    upright.rotate(90, expand=True).save(tmp_path / "images" / "a.png", exif=exif)
    (tmp_path / "images" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}')
    images = samples("--train_data_dir", tmp_path / "images", "--aspect_ratio_buckets", "32,96;96,32")
    assert torch.equal(images[0, 0]["pixels"], torch.from_numpy(np.array(upright)).permute(2, 0, 1))


def decoded(name):
    """A picture that scikit-image ships, as the scripts see it and as it is stored."""
    path = Path(skimage.data.__file__).parent / name
    return data_utils.decode_image(path.read_bytes()), Image.open(path)


def test_colour_profile():
    """A photograph in Adobe RGB, converted as the two standards define their primaries and curves; D65 both."""
    image, stored = decoded("rocket.jpg")
    assert image.info["notes"] == ["were converted to sRGB from another colour profile"] and image.mode == "RGB"
    light = (np.asarray(stored) / 255.0) ** (563 / 256)
    adobe = [[0.57667, 0.18556, 0.18823], [0.29734, 0.62736, 0.07529], [0.02703, 0.07069, 0.99134]]
    srgb = [[0.41239, 0.35758, 0.18048], [0.21264, 0.71517, 0.07219], [0.01933, 0.11919, 0.95053]]
    light = (light @ np.array(adobe).T @ np.linalg.inv(srgb).T).clip(0, 1)
    expected = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    difference = np.abs(np.asarray(image) - expected)
    assert difference.mean() < 0.5 and np.quantile(difference, 0.999) < 4
    assert np.abs(np.asarray(image) - np.asarray(stored).astype(float)).mean() > 2  # it does something


@pytest.mark.parametrize("name", ["astronaut.png", "hubble_deep_field.jpg", "coffee.png", "camera.png"])
def test_colours_that_are_srgb(name):
    """With such a profile, or with none, the numbers stay."""
    image, stored = decoded(name)
    assert image.info["notes"] == [] and np.array_equal(np.asarray(image), np.asarray(stored.convert("RGB")))


def test_profile_of_a_scan_and_one_that_is_broken(samples, tmp_path, caplog):
    """A grey page with the curve of a printing press becomes what a viewer shows; rubbish is taken as sRGB."""
    image, stored = decoded("page.png")
    assert image.mode == "RGB" and image.info["notes"] == ["were converted to sRGB from another colour profile"]
    grey, before = np.asarray(image).astype(float), np.asarray(stored).astype(float)
    assert np.ptp(grey, axis=-1).max() <= 1  # still grey
    order = np.argsort(before, axis=None)
    assert (np.diff(grey[..., 0].flatten()[order]) >= 0).all() and np.abs(grey[..., 0] - before).mean() > 2
    (tmp_path / "images").mkdir()
    for name, profile in (("a", b"no profile"), ("b", stored.info["icc_profile"])):
        solid(RED).save(tmp_path / "images" / f"{name}.png", icc_profile=profile)  # and one for grey, on colours
    images = samples("--train_data_dir", tmp_path / "images", "--instance_prompt", "a")
    assert "2 images have a colour profile that cannot be read, and are taken as sRGB." in caplog.text
    assert [color(images[i, 0]) for i in range(2)] == [pytest.approx(RED)] * 2


@pytest.mark.parametrize("name", ["horse.png", "logo.png"])
def test_transparency(name):
    """A cut-out lies on white, in proportion where it is half transparent."""
    image, stored = decoded(name)
    pixels = np.asarray(stored).astype(float)
    alpha = pixels[..., 3:] / 255
    assert np.abs(np.asarray(image) - (pixels[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1
    assert ("are transparent in parts, which are laid over white" in image.info["notes"]) == (alpha.min() < 1)


def test_transparent_colours_of_a_palette(samples, tmp_path, caplog):
    """Whatever lies under the transparent pixels; and an alpha channel that is full changes nothing."""
    image = Image.fromarray(np.zeros((40, 40), np.uint8), "P")
    image.putpalette([0, 0, 0, *RED])
    image.paste(1, (0, 0, 40, 20))
    (tmp_path / "images").mkdir()
    image.save(tmp_path / "images" / "a.png", transparency=0)
    solid(GREEN, "RGBA").save(tmp_path / "images" / "b.png")
    images = samples("--train_data_dir", tmp_path / "images", "--instance_prompt", "a")
    assert (
        images[0, 0]["pixels"][:, 0, 0].tolist() == [*RED] and images[0, 0]["pixels"][:, -1, 0].tolist() == [255] * 3
    )
    assert color(images[1, 0]) == pytest.approx(GREEN)
    assert "1 images are transparent in parts, which are laid over white." in caplog.text


def test_transparent_grey_of_16_bits(samples, tmp_path, caplog):
    """White where the file's one transparent level is, and the other levels at their brightness."""
    levels = np.full((40, 40), 100 * 257, np.uint16)
    levels[:20] = 30_000
    (tmp_path / "images").mkdir()
    Image.fromarray(levels).save(tmp_path / "images" / "a.png", transparency=30_000)
    with Image.open(tmp_path / "images" / "a.png") as stored:
        assert stored.mode == "I;16" and stored.has_transparency_data
    images = samples("--train_data_dir", tmp_path / "images", "--instance_prompt", "a")
    assert images[0, 0]["pixels"][:, [0, -1], 0].tolist() == [[255, 100]] * 3
    assert "1 images are transparent in parts, which are laid over white." in caplog.text


def test_enlarged_images_are_counted(samples, tmp_path, caplog):
    images = {"a.png": positions(32, 32), "b.png": positions(16, 20), "c.png": positions(64, 31)}
    samples("--train_data_dir", folder_of(tmp_path / "images", images))
    assert "2 images are smaller than they are trained at: enlarged up to 2.0 x." in caplog.text


@pytest.mark.parametrize(("width", "height", "left", "top"), [(48, 32, 8, 0), (32, 62, 0, 15), (35, 32, 2, 0)])
def test_center_crop(width, height, left, top, samples, tmp_path):
    """Exactly the middle where the image needs no resizing; the same at every position of the run."""
    folder = folder_of(tmp_path / "images", {"a.png": positions(width, height)})
    images = samples("--train_data_dir", folder, "--center_crop")
    for position in (0, 1, 2):
        pixels = images[0, position]["pixels"]
        assert pixels[0, 0].tolist() == list(range(left, left + 32))
        assert pixels[1, :, 0].tolist() == list(range(top, top + 32))


def test_resize(samples, tmp_path):
    """The shorter side fills the size, the aspect ratio stays, for images larger and smaller than it."""
    folder = folder_of(tmp_path / "images", {"a.png": positions(192, 128), "b.png": positions(24, 16)})
    images = samples("--train_data_dir", folder, "--center_crop")
    for index, scale in ((0, 4), (1, 0.5)):
        pixels = images[index, 0]["pixels"].float()
        middle = (torch.arange(32) + 8 + 0.5) * scale - 0.5
        assert (pixels[0].mean(0) - middle).abs()[2:-2].max() < 1
        middle = (torch.arange(32) + 0.5) * scale - 0.5
        assert (pixels[1].mean(1) - middle).abs()[2:-2].max() < 1


def test_random_crop(samples, tmp_path):
    """Every part of the image comes up, whole and unscaled; a position of the run always gives the same one."""
    folder = folder_of(tmp_path / "images", {"a.png": positions(48, 32), "b.png": positions(32, 48)})
    images = samples("--train_data_dir", folder)
    for index, channel in ((0, 0), (1, 1)):
        offsets = []
        for position in range(200):
            pixels = images[index, position]["pixels"]
            offsets.append(int(pixels[channel].min()))
            line = pixels[0, 0] if channel == 0 else pixels[1, :, 0]
            assert line.tolist() == list(range(offsets[-1], offsets[-1] + 32))
        assert set(offsets) == set(range(17))
        assert torch.equal(images[index, 5]["pixels"], images[index, 5]["pixels"])


def test_random_flip(samples, tmp_path):
    """Half of the samples, mirrored left to right; none without the flag."""
    folder = folder_of(tmp_path / "images", {"a.png": positions(32, 32)})
    straight = torch.from_numpy(np.array(positions(32, 32))).permute(2, 0, 1)
    images = samples("--train_data_dir", folder, "--random_flip")
    flipped = 0
    for position in range(200):
        pixels = images[0, position]["pixels"]
        flipped += torch.equal(pixels, straight.flip(2))
        assert torch.equal(pixels, straight) or torch.equal(pixels, straight.flip(2))
    assert 70 < flipped < 130
    images = samples("--train_data_dir", folder)
    assert all(torch.equal(images[0, position]["pixels"], straight) for position in range(20))


@pytest.mark.parametrize("flags", [["--use_aspect_ratio_buckets"], ["--aspect_ratio_buckets", "32,64;64,32;48,48"]])
def test_aspect_ratio_buckets(flags, samples, tmp_path, caplog):
    """Every image in the shape nearest to its own; a batch holds one shape; the log counts them all."""
    shapes = {"wide": (120, 60), "tall": (60, 120), "square": (80, 80), "wider": (160, 60)}
    folder = folder_of(tmp_path / "images", {f"{n}{i}.png": solid(RED, size=shapes[n]) for n in shapes for i in "01"})
    images = samples("--train_data_dir", folder, *flags, resolution=48)
    sizes = {item["name"].rpartition("/")[2][:-5]: tuple(item["size"]) for item in images.inspected}
    assert sizes["wide"][0] < sizes["wide"][1] and sizes["tall"][0] > sizes["tall"][1]
    assert sizes["square"] == (48, 48)
    assert sizes["wider"][1] / sizes["wider"][0] >= sizes["wide"][1] / sizes["wide"][0]
    if len(flags) == 2:
        assert sizes == {"wide": (32, 64), "tall": (64, 32), "square": (48, 48), "wider": (32, 64)}
    assert all(side % 16 == 0 for size in sizes.values() for side in size)
    assert all(48 * 48 * 0.6 < height * width < 48 * 48 * 1.6 for height, width in sizes.values())
    sampler = data_utils.BucketBatchSampler([tuple(item["size"]) for item in images.inspected], 2, seed=0)
    for keys in islice(sampler, 8):
        batch = script.collate([images[key] for key in keys])
        height, width = images.inspected[keys[0][0]]["size"]
        assert batch["pixels"].shape == (2, 3, height, width)
    assert "8 images, 0 dropped" in caplog.text and "48x48" in caplog.text


def test_all_that_is_random_about_a_sample_is_independent(samples, tmp_path):
    """Crop, flip, dropout, caption: each with the wanted share; none tells of another, nor of another seed's."""
    folder = folder_of(tmp_path / "images", {"a.png": positions(64, 32), "b.png": positions(32, 64)})
    lines = [{"file_name": name, "text": ["one", "two"]} for name in ("a.png", "b.png")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags, number = ["--random_flip", "--cond_dropout_rate", 0.5], 500

    def drawn(seed):
        images, values = samples("--train_data_dir", folder, *flags, "--seed", seed), []
        for position in range(number):
            wide, tall = (images[index, position] for index in (0, 1))
            line = wide["pixels"][0, 0].tolist()
            noise = torch.rand((), generator=torch.Generator().manual_seed(wide["seed"])).item()
            choice = wide["caption"] == "two"
            values.append([min(line), tall["pixels"][1].min(), line[0] > line[-1], wide["drop"], choice, noise])
        return np.array(values, float)

    one, other = drawn(0), drawn(1)
    assert abs(one[:, 2:5].mean(0) - 0.5).max() < 0.1 and abs(one[:, :2].mean(0) - 16).max() < 2
    correlations = np.corrcoef(np.hstack([one, other]).T) - np.eye(12)
    assert abs(correlations).max() < 5 / math.sqrt(number)


def test_noise_depends_on_the_seed_and_the_position_alone(samples, tmp_path):
    folder = folder_of(tmp_path / "images", {"a.png": solid(RED), "b.png": solid(RED)})
    runs = [samples("--train_data_dir", folder, "--seed", seed) for seed in (0, 0, 1)]
    first, again, other = ([images[0, position]["seed"] for position in range(4)] for images in runs)
    assert first == again == [runs[0][1, position]["seed"] for position in range(4)]
    assert len({*first, *other}) == 8


# Caches


@pytest.fixture
def encoded(monkeypatch):
    """A dictionary that counts images and prompts that are encoded, and loadings of the text encoders."""
    import train_sd3_sft

    counts = {"images": 0, "prompts": 0, "loadings": 0}
    encode_images, encode_prompt = train_sd3_sft.encode_images, StableDiffusion3Pipeline.encode_prompt
    load = StableDiffusion3Pipeline.from_pretrained

    def count_images(vae, pixels, device):
        counts["images"] += len(pixels)
        return encode_images(vae, pixels, device)

    def count_prompts(self, prompt, *inputs, **more):
        counts["prompts"] += 0 if prompt is None else len(prompt)
        return encode_prompt(self, prompt, *inputs, **more)

    def count_loadings(*inputs, **parts):
        counts["loadings"] += parts.get("text_encoder", True) is not None
        return load(*inputs, **parts)

    monkeypatch.setattr(train_sd3_sft, "encode_images", count_images)
    monkeypatch.setattr(StableDiffusion3Pipeline, "encode_prompt", count_prompts)
    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", count_loadings)
    return counts


CACHED = ("train_sd3_sft", "--cache_latents", "--cache_prompt_embeds", "--max_train_steps", 1)


@pytest.fixture
def filled(run, photos, tmp_path, tmp_path_factory, request):
    """A cache of the photographs and their captions, and an own copy of both: `(cache folder, image folder)`."""
    store = request.module.__dict__.setdefault("filled_cache", tmp_path_factory.getbasetemp() / "filled_cache")
    if not store.exists():
        run(*CACHED, "--cache_dir", store, "--output_dir", tmp_path / "first")
    shutil.copytree(store, tmp_path / "cache")
    shutil.copytree(photos, tmp_path / "photos")
    return tmp_path / "cache", tmp_path / "photos"


def rename(folder, model):
    (folder / "rocket.png").rename(folder / "another name.png")
    metadata = folder / "metadata.jsonl"
    lines = metadata.read_text().replace("rocket.png", "another name.png").splitlines()
    metadata.write_text("\n".join(reversed(lines)))


def change_caption(folder, model):
    metadata = folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("a rocket on", "a missile on"))


def change_image(folder, model):
    image = Image.open(folder / "rocket.png")
    image.putpixel((9, 9), (1, 2, 3))
    image.save(folder / "rocket.png")


def change_weights(folder, model, part):
    (file,) = (model / part).glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    tensors[name] = tensors[name] + 0.5
    save_file(tensors, file, {"format": "pt"})


def change_vae(folder, model):
    change_weights(folder, model, "vae")


def change_text_encoder(folder, model):
    change_weights(folder, model, "text_encoder_3")


def nothing(folder, model):
    pass


@pytest.mark.parametrize(
    ("change", "flags", "images", "prompts"),
    [
        (nothing, [], 0, 0),
        (rename, [], 0, 0),
        (nothing, ["--seed", 0, "--learning_rate", 0.5, "--train_batch_size", 1], 0, 0),
        (change_caption, [], 0, 1),
        (change_image, [], 1, 0),
        (change_vae, [], 8, 0),
        (change_text_encoder, [], 0, 9),
        (nothing, ["--max_sequence_length", 8], 0, 9),
        (nothing, ["--no_text_encoder_3"], 0, 9),
        (nothing, ["--mixed_precision", "bf16"], 0, 9),
        (nothing, ["--center_crop"], 8, 0),
        (nothing, ["--seed", 1], 8, 0),
        (nothing, ["--random_flip"], 8, 0),
        (nothing, ["--resolution", 48], 8, 0),
        (nothing, ["--aspect_ratio_buckets", "32,48;32,32"], None, 0),
        (nothing, ["--validation_prompt", "a dog", "--skip_final_inference"], 0, 1),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_caches_are_keyed_by_content(change, flags, images, prompts, run, filled, encoded, pipeline, tmp_path):
    """Only what changed is encoded again; where nothing did, the text encoders are not even loaded."""
    cache, folder = filled
    model = tmp_path / "model"
    shutil.copytree(pipeline, model)
    change(folder, model)
    arguments = ["--train_data_dir", folder, "--pretrained_model_name_or_path", model, "--cache_dir", cache, *flags]
    encoded.update(dict.fromkeys(encoded, 0))
    run(*CACHED, *arguments)
    assert encoded["prompts"] == prompts and encoded["loadings"] == (prompts > 0)
    if images is None:  # some shapes stay as they were
        assert 0 < encoded["images"] < 8
    else:
        assert encoded["images"] == images


def test_the_one_crop_of_cached_latents(samples, tmp_path):
    """Of each image another one, by the seed; the centre, where that is asked for, is the same for every seed."""
    names = [f"{number}.png" for number in range(40)]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8))
    folder = folder_of(tmp_path / "images", dict.fromkeys(names, image))
    for number, name in enumerate(names):
        image.putpixel((0, 0), (number, 0, 0))
        image.save(folder / name)

    def crops(*flags):
        images = samples("--train_data_dir", folder, *flags)
        images.encoder_digests = {"vae": ""}
        digests = [item["digest"] for item in images.inspected]
        return [images.crop(digest) for digest in digests], {images.latents_key(d, (32, 32), False) for d in digests}

    (one, keys), (again, _), (other, other_keys) = (crops("--seed", seed) for seed in (0, 0, 1))
    assert one == again and len({place for crop in one + other for place in crop}) == 160
    (centres, centre_keys), (_, same) = (crops("--center_crop", "--seed", seed) for seed in (0, 1))
    assert centres == [(0.5, 0.5)] * 40 and centre_keys == same
    assert len(keys | other_keys | centre_keys) == 120
    assert abs(np.corrcoef(np.hstack([one, other]).T) - np.eye(4)).max() < 0.6


def test_every_one_of_several_captions_is_cached(run, photos, tmp_path):
    (tmp_path / "images").mkdir()
    shutil.copy(photos / "coins.png", tmp_path / "images")
    texts = ["old coins", "coins in rows", "grey coins"]
    (tmp_path / "images" / "metadata.jsonl").write_text(json.dumps({"file_name": "coins.png", "text": texts}))
    data = ("--train_data_dir", tmp_path / "images", "--cache_prompt_embeds", "--train_batch_size", 1)
    out = run("train_sd3_sft", *data, "--max_train_steps", 12)
    assert len(cached(out / "cache" / "prompt_embeds")) == 4  # and the empty one


def test_an_interrupted_cache_is_completed(run, filled, encoded):
    """A file that is missing is made; a leftover of an interrupted writing is not taken for one."""
    cache, folder = filled
    (file,) = (cache / "latents").iterdir()
    entries = [(key, save(tensors)) for key, tensors in cached(cache / "latents").items()]
    file.rename(file.with_suffix(".unfinished"))
    Cache(cache, "latents").write(entries[1:])
    encoded.update(dict.fromkeys(encoded, 0))
    run(*CACHED, "--train_data_dir", folder, "--cache_dir", cache)
    assert encoded == {"images": 1, "prompts": 0, "loadings": 0}
    assert {key: save(tensors) for key, tensors in cached(cache / "latents").items()} == dict(entries)


def test_cached_and_online_runs_agree(run, tmp_path):
    """The same samples, noise and flips, whether encoded online or from the cache."""
    arguments = ("train_sd3_soar", "--center_crop", "--random_flip", "--max_train_steps", 3)
    arguments += ("--cond_dropout_rate", 0.3, "--adam_epsilon", 1e-3)
    online = weights(run(*arguments, "--output_dir", tmp_path / "online"))
    cached = weights(run(*arguments, *CACHED[1:3], "--output_dir", tmp_path / "cached"))
    for name, tensor in online.items():
        torch.testing.assert_close(tensor, cached[name], rtol=0, atol=1e-5)


def test_cached_latents_are_drawn_afresh(run, monkeypatch, tmp_path):
    """Mean and log-variance are cached, not one draw: an image has other latents in every epoch."""
    import train_sd3_sft

    drawn, encode_latents = [], train_sd3_sft.encode_latents

    def see(vae, moments, generators):
        drawn.append((moments, encode_latents(vae, moments, generators)))
        return drawn[-1][1]

    monkeypatch.setattr(train_sd3_sft, "encode_latents", see)
    folder = folder_of(tmp_path / "images", {"a.png": positions(32, 32)})
    arguments = ("--cache_latents", "--train_batch_size", 1, "--max_train_steps", 3, "--train_data_dir", folder)
    run("train_sd3_sft", *arguments)
    (moments, first), (others, second), _ = drawn
    assert torch.equal(moments, others) and not torch.equal(first, second)


@pytest.mark.parametrize("flags", [["--no_text_encoder_3"], ["--random_flip", "--mixed_precision", "bf16"]])
def test_size_estimate_of_the_caches(flags, run, tmp_path, monkeypatch):
    """Exactly the bytes of the tensors: a disk with one byte less is refused, before anything is encoded."""
    files = run(*CACHED, *flags) / "cache"
    tensors = [t for kind in ("latents", "prompt_embeds") for ts in cached(files / kind).values() for t in ts.values()]
    size = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    usage = shutil.disk_usage(tmp_path)
    again = ("--output_dir", tmp_path / "again", *flags)

    def free(path):
        return usage._replace(free=size - 1) if Path(path).name == "cache" else usage

    monkeypatch.setattr(shutil, "disk_usage", free)
    with pytest.raises(SystemExit, match=f"--cache_dir {tmp_path / 'again' / 'cache'}.*GiB"):
        run(*CACHED, *again)
    assert {path.parent.name for path in (tmp_path / "again").rglob("*.arrow")} == {"checks"}
    size += 1
    run(*CACHED, *again)


# What a start remembers


@pytest.fixture
def looked_at(monkeypatch):
    """A list of the images that a run in this process decodes, by the digest of their bytes."""
    seen, decode = [], data_utils.decode_image

    def count(data):
        seen.append(hashlib.sha256(data).hexdigest())
        return decode(data)

    monkeypatch.setattr(data_utils, "decode_image", count)
    return seen


def put_back(folder):
    """Another picture with the old one's time, as an unpacked archive has."""
    times = os.stat(folder / "rocket.png")
    change_image(folder, None)
    os.utime(folder / "rocket.png", ns=(times.st_atime_ns, times.st_mtime_ns))


def touch(folder):
    (folder / "rocket.png").touch()


def replace(folder):
    shutil.copy(folder / "rocket.png", folder / "new")
    os.replace(folder / "new", folder / "rocket.png")


@pytest.mark.parametrize(("change", "again"), [(None, 0), (touch, 1), (replace, 1), (put_back, 1)])
def test_only_what_may_have_changed_is_looked_at_again(change, again, filled, looked_at):
    """A file that was touched, replaced by its copy, or by another with the old one's times; all, if asked for."""
    cache, folder = filled
    arguments = ["--pretrained_model_name_or_path", "x", "--train_data_dir", folder, "--cache_dir", cache]
    args = script.parse_args([str(word) for word in arguments])

    def looks(**more):
        looked_at.clear()
        assert script.check_images(args, script.load_images(args), **more)[1] == {}
        return len(looked_at)

    assert looks() == 8 and looks() == 0  # `filled` has copied the files
    if change is not None:
        time.sleep(0.02)
        change(folder)
    assert looks() == again and looks() == 0 and looks(again=True) == 8


def test_images_are_looked_at_once(run, filled, looked_at):
    """A second start decodes nothing, and finds the latents; what has changed is decoded to check and to encode it."""
    cache, folder = filled
    arguments = [*CACHED, "--cache_dir", cache, "--train_data_dir", folder, "--overwrite_output_dir"]
    run(*arguments)
    for change, decodings in ((None, 0), (put_back, 2)):
        looked_at.clear()
        if change is not None:
            change(folder)
        run(*arguments)
        assert len(looked_at) == decodings
    looked_at.clear()
    run(*arguments, "--check_images")
    assert len(looked_at) == 8


def test_a_bad_image_is_not_remembered(run, photos, tmp_path, looked_at):
    """It may be mended, or its decoder installed. One line names the first, and says how many there are."""
    folder = tmp_path / "images"
    shutil.copytree(photos, folder)
    for name in ("coffee.png", "rocket.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:1000])
    for attempts in (8 + 2, 2 + 2):  # good ones once; what is missing at the end, once more
        looked_at.clear()
        with pytest.raises(SystemExit, match="coffee.png cannot be read .*, nor can 1 more; mend it"):
            run("train_sd3_sft", "--train_data_dir", folder, "--cache_dir", tmp_path / "cache")
        assert len(looked_at) == attempts


def test_data_sets_are_looked_at_once(run, photos, tmp_path, looked_at):
    """By the data set's fingerprint and the row; other rows, another one."""
    rows = [{"image": str(photos / f"{name}.png"), "text": text} for name, text in PHOTOS.items()]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})

    def save_rows(rows):
        datasets.Dataset.from_list(rows).cast(features).map(lambda row: row).to_parquet(
            tmp_path / "data" / "a.parquet"
        )

    (tmp_path / "data").mkdir()
    save_rows(rows)
    arguments = ["train_sd3_sft", "--dataset_name", tmp_path / "data", "--cache_dir", tmp_path / "cache"]
    arguments += ["--cache_latents", "--overwrite_output_dir", "--center_crop"]
    run(*arguments)
    assert len(looked_at) == 16  # checked, and encoded
    looked_at.clear()
    run(*arguments)
    assert looked_at == []
    save_rows(rows[1:])
    run(*arguments)
    assert len(looked_at) == 7  # of another data set, whose pictures are known


def test_a_file_behind_a_data_set_is_looked_at_again(run, filled, looked_at):
    """The data set holds its path, and is the same."""
    cache, folder = filled
    rows = {"image": [str(folder / f"{name}.png") for name in PHOTOS], "text": [*PHOTOS.values()]}
    datasets.Dataset.from_dict(rows).to_parquet(folder / "set" / "train.parquet")
    arguments = ["train_sd3_sft", "--dataset_name", folder / "set", "--cache_dir", cache, "--overwrite_output_dir"]
    arguments += ["--cache_latents", "--max_train_steps", 1]
    for change, decodings in ((None, 8), (None, 0), (put_back, 2)):  # as a data set they are new; the latents are not
        looked_at.clear()
        if change is not None:
            change(folder)
        run(*arguments)
        assert len(looked_at) == decodings


def test_each_process_checks_its_share(samples, photos, looked_at, tmp_path):
    """All images, each once; a process that finds a gap fills it."""
    arguments = [
        "--pretrained_model_name_or_path",
        "x",
        "--train_data_dir",
        photos,
        "--cache_dir",
        tmp_path / "shared",
    ]
    args = script.parse_args([str(word) for word in arguments])
    rows, counts = script.load_images(args), []
    for process in (2, 0, 1):
        looked_at.clear()
        checks, bad = script.check_images(args, rows, process, 3)
        counts.append(len(looked_at))
        assert bad == {}
    assert counts == [2, 3, 3] and (checks.find(rows["key"][:]) >= 0).all()
    looked_at.clear()
    assert script.check_images(args, rows)[1] == {} and looked_at == []


@pytest.mark.parametrize("flags", [[], ["--aspect_ratio_buckets", "32,48;32,32", "--random_flip"]])
def test_cache_batch_size(flags, run, photos, tmp_path, monkeypatch):
    """Images of one size, and captions, are encoded together; that moves no value by more than 1e-5."""
    import train_sd3_sft

    shapes, encode_images = [], train_sd3_sft.encode_images

    def see(vae, pixels, device):
        shapes.append(tuple(pixels.shape))
        return encode_images(vae, pixels, device)

    monkeypatch.setattr(train_sd3_sft, "encode_images", see)
    outs = {
        size: run(*CACHED, *flags, "--cache_batch_size", size, "--output_dir", tmp_path / str(size)) for size in (1, 3)
    }
    images = 8 * (1 + ("--random_flip" in flags))
    assert sum(shape[0] for shape in shapes) == 2 * images and len(shapes) < 2 * images and max(shapes)[0] == 3
    for kind in ("latents", "prompt_embeds"):
        one, three = (cached(out / "cache" / kind) for out in outs.values())
        assert one.keys() == three.keys() and len(one) >= 8
        for key, tensors in one.items():
            for name, tensor in tensors.items():
                torch.testing.assert_close(tensor, three[key][name], rtol=0, atol=1e-5)


def test_caches_of_an_older_version_are_named(run, tmp_path, caplog):
    (tmp_path / "cache" / "latents" / "0f").mkdir(parents=True)
    run("train_sd3_sft", "--cache_latents", "--cache_dir", tmp_path / "cache")
    assert f"{tmp_path}/cache/latents has folders 00 to ff of an older version" in caplog.text


def test_captions_are_counted_once(run, tmp_path, monkeypatch, caplog):
    """The same captions and the same length: the report is remembered."""
    import train_sd3_sft

    def counted(*flags):
        calls.clear()
        run("train_sd3_sft", "--cache_dir", tmp_path / "cache", "--overwrite_output_dir", *flags)
        return len(calls)

    calls, bar = [], train_sd3_sft.tqdm
    see = lambda *inputs, **more: calls.append(more["desc"]) if "tokens" in more.get("desc", "") else None  # noqa: E731
    monkeypatch.setattr(train_sd3_sft, "tqdm", lambda *inputs, **more: see(**more) or bar(*inputs, **more))
    assert counted() == 2 and counted() == 0
    assert counted("--max_sequence_length", 15) == 1 and counted("--no_text_encoder_3") == 0
    assert counted("--max_train_samples", 7) == 2
    assert caplog.text.count("that CLIP reads") == 5


def test_truncated_captions_are_counted(run, tmp_path, caplog):
    """For CLIP, which reads 77 tokens, and for T5, which reads --max_sequence_length."""
    caplog.set_level(logging.INFO)
    captions = {"a.png": "red circle", "b.png": " ".join(["red"] * 30), "c.png": " ".join(["red"] * 100)}
    folder = folder_of(tmp_path / "images", dict.fromkeys(captions, positions(32, 32)), **captions)
    run("train_sd3_sft", "--train_data_dir", folder, "--max_train_steps", 1)
    assert "1 of 3 captions are longer than the 77 tokens that CLIP reads" in caplog.text
    assert "2 of 3 captions are longer than the 16 tokens that T5 reads" in caplog.text
    caplog.clear()
    run("train_sd3_sft", "--train_data_dir", folder, "--no_text_encoder_3", "--output_dir", tmp_path / "no_t5")
    assert "CLIP" in caplog.text and "T5 reads" not in caplog.text


def test_empty_captions_are_counted(samples, tmp_path, caplog):
    """They train the unconditional model, which the user should know of."""
    images = dict.fromkeys(["a.png", "b.png", "c.png"], positions(32, 32))
    samples("--train_data_dir", folder_of(tmp_path / "images", images, **{"b.png": ""}))
    assert "1 of 3 captions are empty" in caplog.text
    lines = [{"file_name": name, "text": ["", "a thing"]} for name in images]  # one of several is
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert len(samples("--train_data_dir", tmp_path / "images")) == 3
    assert "3 of 3 captions are empty" in caplog.text


# The command that the authors published


AUTHORS_COMMAND = """
    --pretrained_model_name_or_path {P} --jsonl_path {J} --image_dir {I} --output_dir {O} --resolution 512
    --train_batch_size 4 --gradient_accumulation_steps 1 --max_train_steps 5000 --checkpointing_steps 1000 --seed 42
    --learning_rate 2e-5 --lr_scheduler constant --lr_warmup_steps 0 --adam_weight_decay 1e-2 --max_grad_norm 1.0
    --weighting_scheme logit_normal --mixed_precision bf16 --dataloader_num_workers 16 --gradient_checkpointing
    --allow_tf32 --report_to tensorboard --num_rollout_paths 1 --trajectory_length 6 --num_sampling_steps 40
    --sde_rollout_type flow_sde --sde_noise_scale 0.5 --lambda_aux 1.0 --cfg_scale_sampling 4.5
"""


@pytest.mark.parametrize("name", ["train_sd3_soar", "train_sd3_soar_lora"])
def test_the_authors_command(name, run, pipeline, tmp_path):
    """Unchanged it parses; with small numbers in the places of large ones, it trains."""
    (tmp_path / "I").mkdir()
    with open(tmp_path / "J", "w") as file:
        for number in range(4):
            solid((number, 0, 0)).save(tmp_path / "I" / f"{number}.jpg")
            line = {"md5": str(number), "caption_en": json.dumps({"long_caption": "a red circle"}), "bw": 32, "bh": 32}
            file.write(json.dumps(line) + "\n")
    command = AUTHORS_COMMAND.format(P=pipeline, J=tmp_path / "J", I=tmp_path / "I", O=tmp_path / "O")
    args = script.parse_args(shlex.split(command))
    assert (args.resolution, args.max_train_steps, args.learning_rate, args.lambda_aux) == (512, 5000, 2e-5, 1)
    smaller = {"--resolution 512": "--resolution 32", "steps 5000": "steps 1", "workers 16": "workers 2"}
    for large, small in smaller.items():
        assert large in command
        command = command.replace(large, small)
    out = run(name, *shlex.split(command), "--save_dtype", "fp32")
    base = load_file(pipeline / "transformer" / "diffusion_pytorch_model.safetensors")
    trained = weights(out)
    assert all(tensor.isfinite().all() for tensor in trained.values())
    if name == "train_sd3_soar":
        assert not all(torch.equal(tensor, base[key]) for key, tensor in trained.items())
        assert max((tensor - base[key]).abs().max() for key, tensor in trained.items()) < math.ldexp(1, -10)
    assert list((out / "logs").rglob("events*"))


# Pictures of odd kinds


def test_a_strip_takes_no_memory(samples, tmp_path):
    """Of a picture of 1 x 20,000 pixels only the part that is kept is enlarged, and it is the right one."""
    ramp = Image.fromarray(np.repeat(np.arange(20000)[:, None] / 80, 3, 1).astype(np.uint8)[:, None])
    images = samples("--train_data_dir", folder_of(tmp_path / "images", {"a.png": ramp}), resolution=256)
    assert ramp.size == (1, 20000) and len(images) == 1
    sizes = []
    resize = Image.Image.resize

    def watch(image, size, *more, **options):
        sizes.append(size)
        return resize(image, size, *more, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", watch)
        for top, value in ((0, 0), (0.5, 125), (1, 249)):
            pixels = images.pixels(images.inspected[0], top, 0.5, False).float()
            assert pixels.shape == (3, 256, 256) and abs(pixels.mean() - value) < 1
    assert sizes == [(256, 256)] * 3


def test_pictures_of_odd_kinds(tmp_path, samples, caplog):
    """What generators, scanners and phones write is read as meant, or refused with what to do."""
    folder = tmp_path / "images"
    folder.mkdir()
    workflow = PngInfo()
    workflow.add_text("workflow", "x" * 3_000_000, zip=True)
    positions(40, 40).save(folder / "comfy.png", pnginfo=workflow)
    solid(RED).save(folder / "plain.png")
    Image.new("L", (12000, 9000), 77).save(folder / "phone.jpg")
    images = samples("--train_data_dir", folder, "--instance_prompt", "a thing")
    assert [Path(item["name"]).name for item in images.inspected] == ["comfy.png", "phone.jpg", "plain.png"]
    assert "2 images are of one colour throughout" in caplog.text  # a JPEG is, to the bit
    assert color(images[1, 0]) == pytest.approx([77] * 3, abs=1)
    for name, image, words in (
        ("float.tiff", Image.fromarray(np.full((40, 40), 0.5, np.float32)), "mode F; make it smaller, with 8 bits"),
        ("deep.tiff", Image.fromarray(np.full((40, 40), 70000, np.int32)), "of more than 16 bits a pixel"),
        ("giant.png", Image.new("1", (9500, 9500)), "pixels of mode 1; make it smaller"),
        ("phone.heic", None, "Pillow does not read its format, or so many pixels; make a JPEG of it"),
    ):
        image.save(folder / name) if image else (folder / name).write_bytes(b"ftypheic")
        with pytest.raises(SystemExit, match=f"{name} cannot be read .*{words}"):
            samples("--train_data_dir", folder, "--instance_prompt", "a thing")
        (folder / name).unlink()
