# SPDX-License-Identifier: Apache-2.0
"""
Score images against their prompts: a folder of generate_images.py, or any data set in the training scripts' formats.

    python examples/evaluation/score_images.py runs/base runs/soar --metrics ocr,geneval,clipscore
    python examples/evaluation/score_images.py --train_data_dir photos --output_dir photos-scores --metrics aesthetic

One scorer is in memory at a time. Of each metric it says first which hub files it needs and their size; where one
cannot be had, the others are still scored, and the exit code is 1. Scores are appended to

    scores/METRIC.jsonl   a row an image: file_name, score, and what the metric found
    scores.json           the means, with 95 % bootstrap intervals over the prompts

in the folder itself (a data set's go to --output_dir), and an image that has its score is not scored again.
"""

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import compare
import generate_images
import huggingface_hub
import torch
from accelerate import PartialState
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_sd3_soar as script  # noqa: E402


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


def add_data_arguments(parser):
    """The flags of the training scripts that name a data set."""
    data = parser.add_argument_group("data set (as in the training scripts)")
    add = data.add_argument
    add("--dataset_name", help="Hub id or folder for `datasets.load_dataset`, split `train`.")
    add("--dataset_config_name", help="Configuration of --dataset_name.")
    add("--train_data_dir", help="Folder of images with `metadata.jsonl` or `metadata.csv`.")
    add("--jsonl_path", help='Lines {"md5": ..., "caption_en": ..., "bw": 512, "bh": 512}; images `{md5}.jpg`.')
    add("--image_dir", help="Folder of the images of --jsonl_path.")
    add("--image_column", default="image")
    add("--caption_column", default="text")
    add("--max_train_samples", type=script.at_least(1), help="Use the first N images.")


def check_data_arguments(parser, args):
    """Refuse what names no data set, or more than one; returns whether there is one."""
    given = [flag for flag in ("dataset_name", "train_data_dir", "jsonl_path") if getattr(args, flag)]
    if len(given) > 1 or (args.jsonl_path is None) != (args.image_dir is None):
        parser.error("give one of --dataset_name, --train_data_dir, and --jsonl_path with --image_dir")
    for flag in ("train_data_dir", "image_dir", "jsonl_path"):
        path, is_there = getattr(args, flag), os.path.isfile if flag == "jsonl_path" else os.path.isdir
        if path is not None and not is_there(path):
            parser.error(f"--{flag} {path}: no such {'file' if flag == 'jsonl_path' else 'folder'}")
    return bool(given)


def read_run(folder):
    """The rows of a folder of generate_images.py, `list[dict]`, each with its file under `image`."""
    path = Path(folder) / "metadata.jsonl"
    if not path.is_file():
        script.fail(f"{folder} has no metadata.jsonl: run generate_images.py to its end first")
    rows = []
    for where, row in tqdm(list(script.read_json_lines(path)), desc=f"Reading {folder}", unit="image"):
        if not isinstance(row.get("file_name"), str) or not isinstance(row.get("text"), str):
            script.fail(f"{where} needs the fields `file_name` and `text`")
        if not script.is_inside(Path(folder, row["file_name"]), folder):
            script.fail(f"{where}: {row['file_name']} leads out of {folder}")
        with script.failing_with(f"{where}: {generate_images.NESTED} is no JSON object"):
            row = dict(json.loads(row.pop(generate_images.NESTED, "{}"))) | row
        rows.append(identify(row | {"image": {"path": str(Path(folder, row["file_name"])), "bytes": None}}))
    return rows


def read_data(args):
    """The rows of a data set, `list[dict]`: `file_name`, `text`, `image`, and the `height` and `width` asked for."""
    rows, table = [], script.load_images(args)
    for index, row in enumerate(tqdm(table, desc="Reading", unit="image")):
        row["text"] = row.pop("caption") or ""
        row["file_name"] = name_of(args, index, row["image"])
        row = identify(row)
        if row["image"] and row["image"]["bytes"] is not None:
            row["image"] = (table, index)  # not its bytes: a data set is larger than the memory
        rows.append(row)
    return rows


def file_of(row):
    """A row's image as a `dict` of the `bytes` of its file, or its `path`; `None` where it has none."""
    if not isinstance(row["image"], tuple):
        return row["image"]
    table, index = row["image"]
    return table[index]["image"]


def identify(row):
    """Add to a row a `digest` of its image and of all its fields: a score is reused for the very same only."""
    image = row["image"] or {"path": None, "bytes": None}
    if image["bytes"] is not None:
        content = hashlib.sha256(image["bytes"]).hexdigest()
    elif image["path"] and os.path.isfile(image["path"]):
        with open(image["path"], "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    else:
        content = None
    fields = json.dumps({key: value for key, value in row.items() if key != "image"}, sort_keys=True)
    return row | {"digest": f"{script.derive_seed('score', content, fields):016x}"}


def name_of(args, index, image):
    """What a row of a data set is called in its scores: its place in the folder, or its number."""
    folder = args.train_data_dir or args.image_dir
    path = (image or {}).get("path")
    if folder and path:
        return Path(path).resolve().relative_to(Path(folder).resolve()).as_posix()
    return f"{index:06d}"


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
    """The rows of a scores file, by digest; none of one that ends within a line: another process is at work on it."""
    if not path.exists() or not path.read_bytes().endswith(b"\n"):
        return {}
    return {row.get("digest"): row for _, row in script.read_json_lines(path)}


def unscored(metric, rows, folder):
    """
    The rows whose images have no score of a metric in a folder yet. From its file go a last line that an interruption
    cut off, and scores of what a file once was.
    """
    path = folder / "scores" / f"{metric}.jsonl"
    if path.exists() and not (data := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
    done, current, names = read_scores(path), {row["digest"] for row in rows}, {row["file_name"] for row in rows}
    kept = [row for digest, row in done.items() if digest in current or row.get("file_name") not in names]
    if len(kept) < len(done):
        generate_images.write_whole(path, lambda p: p.write_text("".join(map(to_line, kept)), encoding="utf-8"))
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
        `list[str]`: what is wrong with the images that could not be read. They have no score.
    """
    path = folder / "scores" / f"{metric}.jsonl"
    broken = []
    with open(path, "a", encoding="utf-8") as file, tqdm(total=len(rows), desc=metric, unit="image") as bar:
        for start in range(0, len(rows), batch_size):
            batch, images = [], []
            for row in rows[start : start + batch_size]:
                try:
                    images.append(script.read_image(file_of(row))[0])
                    batch.append(row)
                except Exception as error:  # a broken file raises whatever its decoder raises; reported, not scored
                    broken.append(f"{row['file_name']}: {type(error).__name__}: {error}")
            for row, result in score_batch(scorer, images, batch):
                if "error" in result:
                    broken.append(f"{row['file_name']}: {result['error']}")
                else:
                    line = {"file_name": row["file_name"], "digest": row["digest"]} | result
                    file.write(to_line(line))
            file.flush()
            bar.update(min(batch_size, len(rows) - start))
    return broken


def summarise(metric, rows, scores):
    """
    The mean over the images that have a score, with its 95 % bootstrap interval; of GenEval, that of its tasks' means,
    and "strict", the same by its strict reading. Prompts are drawn again, or of a data set, which has none, images.

    Args:
        metric (`str`): Its name.
        rows (`list[dict]`): The images.
        scores (`dict[str, dict]`): Of [`read_scores`].

    Returns:
        `dict`: what [`compare.summarise`] returns.
    """
    keys = [(row["text" if "prompt_index" in row else "file_name"], row["digest"]) for row in rows]
    rows = {key: row for key, row in zip(keys, rows, strict=True) if row["digest"] in scores}
    tags = {key: row["tag"] for key, row in rows.items()} if metric == "geneval" else None

    def mean_of(field):
        return compare.summarise({key: scores[row["digest"]][field] for key, row in rows.items()}, tags)

    return mean_of("score") | ({"strict": mean_of("strict")} if metric == "geneval" else {})


def write_summaries(folder, rows):
    """Write `scores.json` from all scores of a folder, those of another process at work there included."""
    summaries = {}
    for metric in METRICS:
        scores = read_scores(folder / "scores" / f"{metric}.jsonl")
        if any(row["digest"] in scores for row in rows):
            summaries[metric] = summarise(metric, rows, scores)
    path = folder / "scores.json"
    generate_images.write_whole(path, lambda p: p.write_text(json.dumps(summaries, indent=2) + "\n"))
    return summaries


def format_summary(metric, summary):
    """A line on a metric: mean, interval, number of images."""
    ends = [f"{end:.4f}" for end in (summary["low"], summary["high"]) if end is not None]
    strict = f", {summary['strict']['mean']:.4f} by the strict reading" if "strict" in summary else ""
    return f"{metric} {summary['mean']:.4f} [{', '.join(ends) or 'of one, none'}]{strict}, {summary['images']} images"


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="*", type=Path, help="Folders of generate_images.py.")
    parser.add_argument("--metrics", required=True, help=f"Some of {','.join(METRICS)}.")
    parser.add_argument("--batch_size", type=script.at_least(1), default=16, help="Images at once.")
    parser.add_argument("--output_dir", type=Path, help="Where the scores of a data set go.")
    add_data_arguments(parser)
    args = parser.parse_args(input_args)
    metrics = list(dict.fromkeys(args.metrics.split(",")))
    if unknown := [metric for metric in metrics if metric not in METRICS]:
        parser.error(f"--metrics {','.join(unknown)}: choose from {','.join(METRICS)}")
    if check_data_arguments(parser, args) == bool(args.runs):
        parser.error("give either folders of generate_images.py or a data set")
    if bool(args.runs) == bool(args.output_dir):
        parser.error("--output_dir goes with a data set, and only with one")

    PartialState()  # for the log
    sets = {run: read_run(run) for run in args.runs} or {args.output_dir: read_data(args)}
    if empty := [str(folder) for folder, rows in sets.items() if not rows]:
        script.fail(f"{', '.join(empty)}: no images")
    for folder in sets:
        make_folder(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    failed, broken = [], []
    for metric in metrics:
        try:
            missing = {folder: unscored(metric, rows, folder) for folder, rows in sets.items()}
            if any(missing.values()):
                scorer = load_scorer(metric, device, [row for rows in missing.values() for row in rows])
                for folder, rows in missing.items():
                    broken += [f"{folder}: {line}" for line in score(scorer, metric, rows, folder, args.batch_size)]
                del scorer  # before the next one is loaded
        except Unavailable as error:
            failed.append(f"{metric}: {error}")
            continue
        for folder, rows in sets.items():
            if summary := write_summaries(folder, rows).get(metric):
                print(f"{folder}: {format_summary(metric, summary)}")
    for line in dict.fromkeys(broken):
        print(f"not scored: {line}", file=sys.stderr)
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(1 if failed or broken else 0)


if __name__ == "__main__":
    main()
