# SPDX-License-Identifier: Apache-2.0
"""
Random folders, each with what it says written down beside it: a run trains just that, or one line names the culprit.

    FUZZ_CASES=1000 FUZZ_SEED=1 python -m pytest -q -s tests/test_fuzz.py
"""

import csv
import json
import os
import random
import re
import resource
import time
import unicodedata
from collections import Counter

import numpy as np
import pytest
from accelerate import PartialState
from PIL import Image

import train_sd3_soar as script


STEMS = ["a b", "train_station", "brackets [v2]", "café", "日本", "dots.in.it", "UPPER", "100%", "-dash", "#1 {x}"]
FOLDERS = ["", "", "", "sub", "10_mycat", "deep/er [1]", "ünder"]
CAPTIONS = ["a cat", "None", "nan", "007", "{brace", 'say "hi", twice', "Käfer, grün", "日本の猫", "a\tb"]
SIZES = [(40, 40), (64, 33), (17, 90), (1, 3000), (200, 120), (16, 16)]
MODES = {
    ".png": ["RGB", "L", "RGBA", "LA", "P", "1", "I;16"],
    ".jpg": ["RGB", "L", "CMYK"],
    ".webp": ["RGB", "RGBA"],
    ".tiff": ["RGB", "L", "RGBA", "CMYK", "1", "I;16"],
}
FAULTS = ["truncated", "text", "float", "heic"]


def picture(mode, size, color, alpha):
    """A picture of one colour in a mode, and the colour that a viewer shows of it, over white."""
    grey = round(0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2])
    if mode == "I;16":
        return Image.fromarray(np.full(size[::-1], grey * 257, np.uint16)), [grey] * 3
    if mode == "1":
        return Image.new("1", size, grey > 127), [255 * (grey > 127)] * 3
    if mode in ("RGBA", "LA"):
        shown = color if mode == "RGBA" else [grey] * 3
        image = Image.new("RGBA", size, (*color, alpha)).convert(mode)
        return image, [(value * alpha + 255 * (255 - alpha)) / 255 for value in shown]
    image = Image.new("RGB", size, tuple(color))
    return image.quantize(4) if mode == "P" else image.convert(mode), [grey] * 3 if mode == "L" else color


def write_image(path, rng):
    """Write a picture to `path`, upright or turned; returns the colour and the upright size that are to be seen."""
    mode, size = rng.choice(MODES[path.suffix.lower()]), rng.choice(SIZES)
    path.parent.mkdir(parents=True, exist_ok=True)
    image, shown = picture(mode, size, [rng.randrange(256) for _ in range(3)], rng.choice([0, 100, 255]))
    exif = Image.Exif()
    if path.suffix == ".jpg" and rng.random() < 0.5:
        exif[0x0112] = 6  # a quarter turn
        size = size[::-1]
    image.save(path, lossless=True, **({"exif": exif} if exif else {}))
    return shown, size


def spoil(path, fault):
    """Make a file that is no picture any more."""
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:30])
    elif fault == "float":
        Image.fromarray(np.full((20, 20), 0.5, np.float32)).save(path, "TIFF")
    else:
        path.write_bytes(b"no picture" if fault == "text" else b"\0\0\0\x18ftypheic")


def write_folder(folder, rng):
    """
    Write a folder. Returns the flags that it takes, what is to be trained, `(path, captions, colour, size)` in order,
    and a pattern for the line that the run must end with, or `None`.
    """
    kind = rng.choice(["txt", "jsonl", "csv", "bare"])
    stems, images = rng.sample(STEMS, rng.randint(1, 5)), []
    for stem in stems:
        form = rng.choice(["NFC", "NFD"])
        name = f"{rng.choice(FOLDERS)}/{stem}{rng.choice(['.png', '.jpg', '.JPG', '.webp', '.tiff', '.PNG'])}"
        path = folder / unicodedata.normalize(form, name.strip("/"))
        shown, size = write_image(path, rng)
        images.append([path, [rng.choice(CAPTIONS)], shown, size])
    flags, ends, listed = ["--train_data_dir", folder], None, list(images)
    if kind in ("jsonl", "csv"):
        rng.shuffle(listed)
        listed = listed[: rng.randint(1, len(listed))]
        rows = []
        for path, captions, *_ in listed:
            if kind == "jsonl" and rng.random() < 0.3:
                captions[:] = rng.sample(CAPTIONS, 3)
            name = unicodedata.normalize(rng.choice(["NFC", "NFD"]), path.relative_to(folder).as_posix())
            rows.append({"file_name": name, "text": captions if len(captions) > 1 else captions[0], "other": 1})
        column = "text" if rng.random() < 0.7 else "caption"
        rows = [{column if key == "text" else key: value for key, value in row.items()} for row in rows]
        flags += ["--caption_column", column] if column != "text" else []
        with open(folder / f"metadata.{kind}", "w", encoding=rng.choice(["utf-8", "utf-8-sig"]), newline="") as file:
            if kind == "jsonl":
                file.writelines(json.dumps(row, ensure_ascii=rng.random() < 0.5) + "\n" for row in rows)
            else:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        fault = rng.random()
        if fault < 0.1:
            words = "file_name,words\na.png,x\n" if kind == "csv" else '{"words": 1}\n'
            (folder / f"metadata.{kind}").write_text(words)
            ends = "--image_column file_name|--caption_column"
        elif fault < 0.2:
            listed[0][0].unlink()
            ends = re.escape(str(listed[0][0].name))
        elif fault < 0.25:
            (folder / f"{images[0][0].with_suffix('')}.txt").write_text("beside")
            ends = "both hold captions: remove one of them"
    else:
        # In the order of a walk: folder by folder, names sorted.
        listed.sort(key=lambda item: (str(item[0].parent), item[0].name))
        if kind == "txt":
            for path, captions, *_ in listed:
                text = captions[0].replace("\t", " ")
                captions[:] = [text]
                end = rng.choice(["", "\n", "\r\n"])
                path.with_suffix(".txt").write_bytes(rng.choice([b"", b"\xef\xbb\xbf"]) + (text + end).encode())
        if kind == "bare" or rng.random() < 0.3:
            flags += ["--instance_prompt", "a photo of sks dog"]
            for item in listed if kind == "bare" else listed[:1]:
                item[0].with_suffix(".txt").unlink(missing_ok=True)
                item[1][:] = ["a photo of sks dog"]
        elif rng.random() < 0.2:
            listed[0][0].with_suffix(".txt").unlink()
            ends = re.escape(f"{listed[0][0]} has no caption")
    if ends is None and rng.random() < 0.25:
        bad = rng.choice(listed)
        spoil(bad[0], rng.choice(FAULTS))
        if rng.random() < 0.5:
            flags.append("--skip_bad_images")
            listed.remove(bad)
            ends = None if listed else "no image|usable|fewer"
        else:
            ends = re.escape(f"{bad[0]} cannot be read") + ".*(mend it|drop such images)"
    return flags, listed, ends


def test_a_run_trains_what_the_folder_says(pipeline, tmp_path):
    """Paths, captions, shapes and colours, as they were written down; or one line that names the fault."""
    PartialState()  # the scripts' logger needs it
    cases, seed = int(os.environ.get("FUZZ_CASES", 80)), int(os.environ.get("FUZZ_SEED", time.time_ns() % 2**32))
    print(f"FUZZ_CASES={cases} FUZZ_SEED={seed}")
    seen = Counter()
    for number in range(cases):
        rng = random.Random(f"{seed} {number}")
        folder = tmp_path / f"{number} [é]"
        folder.mkdir()
        flags, expected, ends = write_folder(folder, rng)
        command = [*flags, "--pretrained_model_name_or_path", pipeline, "--center_crop", "--resolution", 32]
        command += ["--seed", 0]
        args = script.parse_args([str(word) for word in [*command, "--cache_dir", tmp_path / "cache"]])
        try:
            rows = script.load_images(args)
            inspected = script.inspect_images(args, script.check_model(args), rows)
        except SystemExit as error:
            assert ends is not None, (number, error)
            line, ends = (unicodedata.normalize("NFC", text) for text in (str(error), ends))
            assert line.startswith("error: ") and "\n" not in line and re.search(ends, line), (number, line)
            seen["ended with its line"] += 1
            continue
        assert ends is None or not expected, (number, ends)
        found = [(item["name"], item["captions"]) for item in inspected]
        assert found == [(str(path), captions) for path, captions, *_ in expected], number
        images = script.TrainingImages(args, rows, inspected, None)
        for index, (path, _, shown, _) in enumerate(expected):
            pixels = images[index, index]["pixels"].float()
            assert pixels.shape == (3, 32, 32)
            assert pixels.mean((1, 2)).tolist() == pytest.approx(shown, abs=8), (number, path)
        seen["images trained"] += len(expected)
    print(dict(seen), f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB at most")
    assert seen["ended with its line"] > cases / 20 and seen["images trained"] > cases
