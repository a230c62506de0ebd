# SPDX-License-Identifier: Apache-2.0
"""Score the images of runs and data sets, and remember the scores."""

import hashlib
import importlib
import importlib.util
import json
import os
from collections import defaultdict
from pathlib import Path

import huggingface_hub
import torch
from data_sets import file_of
from runs import NESTED, data_utils, is_number, read_rows, script, write_whole
from tqdm.auto import tqdm


# Each metric's module and class here.
METRICS = {
    "ocr": ("ocr", "OCR"),
    "geneval": ("geneval", "GenEval"),
    "clipscore": ("preference", "CLIPScore"),
    "pickscore": ("preference", "PickScore"),
    "aesthetic": ("preference", "Aesthetic"),
    "hpsv2": ("preference", "HPSv2"),
    "imagereward": ("preference", "ImageReward"),
}


class Unavailable(Exception):
    """A metric cannot be had: a package or a file is missing, or the prompts do not have what it needs."""


def read_run(folder):
    """The rows of a run, `list[dict]`, with the other fields of their prompts and their files under `image`."""
    rows = []
    for row in tqdm(read_rows(folder), desc=f"Reading {folder}", unit="image"):
        with script.failing_with(f"{folder}: {NESTED} of {row['file_name']} is no JSON object"):
            row = dict(json.loads(row.pop(NESTED, "{}"))) | row
        rows.append(identify(row | {"image": {"path": str(Path(folder, row["file_name"])), "bytes": None}}))
    return rows


def identify(row):
    """Add to a row a `digest` of its image and of all its fields: a score is reused for the very same only."""
    image = file_of(row) or {"path": None, "bytes": None}
    if image["bytes"] is not None:
        content = hashlib.sha256(image["bytes"]).hexdigest()
    elif image["path"] and os.path.isfile(image["path"]):
        with open(image["path"], "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    else:
        content = None
    fields = json.dumps({key: value for key, value in row.items() if key != "image"}, sort_keys=True)
    return row | {"digest": f"{data_utils.derive_seed('score', content, fields):016x}"}


def load_scorer(metric, device, rows):
    """
    The scorer of a metric, after saying what it downloads.

    Raises:
        `Unavailable`: With one line that says why, and what to do.
    """
    module, name = METRICS[metric]
    scorer = getattr(importlib.import_module(module), name)
    for package in scorer.packages:
        if importlib.util.find_spec(package) is None:
            raise Unavailable(f"needs the package {package}: pip install -r examples/evaluation/requirements.txt")
    if hasattr(scorer, "check"):  # whether the prompts have what the metric asks for
        try:
            scorer.check(rows)
        except ValueError as error:
            raise Unavailable(str(error)) from error
    for repository, file, gigabytes in scorer.files:
        cached = isinstance(huggingface_hub.try_to_load_from_cache(repository, file), str)
        print(f"{metric}: {repository}/{file}, {gigabytes} GB, {'cached' if cached else 'downloads now'}", flush=True)
    try:
        return scorer(device)
    except Exception as error:  # offline, broken off, disk full, other weights: every library has its own words
        repositories = defaultdict(list)
        for repository, file, _ in scorer.files:
            repositories[repository].append(file)
        commands = [
            " ".join([f"hf download {name}", *(f"--include '{file}'" for file in ("*.json", "*.txt", *files))])
            for name, files in repositories.items()
        ]
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise Unavailable(f"cannot be loaded ({reason}); to fetch its files: {'; '.join(commands)}") from error


def read_scores(path):
    """
    The rows of a scores file that have a number for a score, by digest; none of a file that ends within a line:
    another process is at work on it.
    """
    if not path.exists() or not path.read_bytes().endswith(b"\n"):
        return {}
    rows = [row for _, row in data_utils.read_json_lines(path) if is_number(row.get("score"))]
    return {row["digest"]: row for row in rows if isinstance(row.get("digest"), str)}


def unscored(metric, rows, folder):
    """
    The rows whose images have no score of a metric in a folder yet. From its file go a last line that an interruption
    cut off, scores that are no numbers, and scores of what a file once was.
    """
    path, data = folder / "scores" / f"{metric}.jsonl", b""
    if path.exists():
        with script.failing_with(f"{path} cannot hold scores"), open(path, "r+b") as file:
            data = file.read()
            if not data.endswith(b"\n"):
                file.truncate(data.rfind(b"\n") + 1)
    done, current, names = read_scores(path), {row["digest"] for row in rows}, {row["file_name"] for row in rows}
    kept = [row for digest, row in done.items() if digest in current or row.get("file_name") not in names]
    if len(kept) < data.count(b"\n"):
        write_whole(path, lambda p: p.write_text("".join(map(to_line, kept)), encoding="utf-8"))
    return [row for row in rows if row["digest"] not in done]


def to_line(row):
    return json.dumps(row, ensure_ascii=False) + "\n"


def make_folder(folder):
    """The place of the scores in a folder; that it cannot be is said before a model loads."""
    with script.failing_with(f"{folder} cannot hold scores"):
        (folder / "scores").mkdir(parents=True, exist_ok=True)


def score_batch(scorer, images, rows):
    """Pairs of row and result; where the scorer fails on a batch, image by image, with an `error` for a result."""
    try:
        with torch.no_grad():
            return list(zip(rows, scorer(images, rows) if rows else [], strict=True))
    except Exception as error:  # whatever a model or a reader raises on an image of an odd shape; reported
        if len(rows) == 1:
            return [(rows[0], {"error": f"{type(error).__name__}: {error}"})]
    return [pair for image, row in zip(images, rows, strict=True) for pair in score_batch(scorer, [image], [row])]


def score(scorer, metric, rows, folder, batch_size):
    """
    Score images, and append their scores to the metric's file.

    Args:
        scorer: Of [`load_scorer`].
        metric (`str`): Its name.
        rows (`list[dict]`): Of [`unscored`].
        folder (`pathlib.Path`): Where the scores are kept.
        batch_size (`int`): Images at once.

    Returns:
        `list[str]`: what is wrong with the images that could not be read, or whose score is no number. They have no
        score.
    """
    path = folder / "scores" / f"{metric}.jsonl"
    broken = []
    with (
        script.failing_with(f"{path} cannot hold scores"),  # where the disk is full, also of what its end writes
        open(path, "a", encoding="utf-8") as file,
        tqdm(total=len(rows), desc=metric, unit="image") as bar,
    ):
        for start in range(0, len(rows), batch_size):
            batch, images = [], []
            for row in rows[start : start + batch_size]:
                try:
                    images.append(data_utils.decode_image(data_utils.file_bytes(file_of(row))))
                    batch.append(row)
                except Exception as error:  # a broken file raises whatever its decoder raises; reported, not scored
                    broken.append(f"{row['file_name']}: {type(error).__name__}: {error}")
            for row, result in score_batch(scorer, images, batch):
                if "error" not in result and not is_number(result["score"]):
                    result = {"error": f"its score is {result['score']}"}
                if "error" in result:
                    broken.append(f"{row['file_name']}: {result['error']}")
                else:
                    line = {"file_name": row["file_name"], "digest": row["digest"]} | result
                    file.write(to_line(line))
            file.flush()
            bar.update(min(batch_size, len(rows) - start))
    return broken
