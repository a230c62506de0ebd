# SPDX-License-Identifier: Apache-2.0
"""
The ground that the commands of this folder stand on: what is in a run, a folder of generate_images.py, and the mean of
its scores with an interval.
"""

import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np


sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]  # for `trained` and the training script
import data_utils  # noqa: E402
import train_sd3_soar as script  # noqa: E402


NESTED = "prompt_fields"  # of metadata.jsonl: as JSON, for a table has one type a column, and may use their names
DRAWS, SEED = 2000, 0  # of the bootstrap


def read_rows(folder):
    """The rows of a run, `metadata.jsonl`, `list[dict]`: each has a `text`, and a `file_name` inside of the folder."""
    path = Path(folder) / "metadata.jsonl"
    if not path.is_file():
        script.fail(f"{folder} has no metadata.jsonl: run generate_images.py to its end first")
    rows = {}
    for where, row in data_utils.read_json_lines(path):
        name = row.get("file_name")
        if not isinstance(name, str) or not isinstance(row.get("text"), str):
            script.fail(f"{where} needs the fields `file_name` and `text`")
        if not data_utils.is_inside(Path(folder, name), folder):
            script.fail(f"{where}: {name} leads out of {folder}")
        if name in rows:
            script.fail(f"{path}: {name} is twice there")
        rows[name] = row
    return list(rows.values())


def is_number(value):
    """Whether a score is one, and sums of it are numbers, too."""
    return isinstance(value, int | float) and abs(value) < 1e300


def summarise(values, tags=None):
    """
    Mean and 95 % percentile bootstrap interval.

    Args:
        values (`dict[tuple, float]`): Scores, or differences of scores, by image; a key's first item is the prompt.
        tags (`dict[tuple, str]`, *optional*): Task of each image. The mean is then that of the tasks' means.

    Returns:
        `dict`: "mean", "low", "high" (the latter `None` where a task has only one prompt), "images", "prompts", and
        with `tags` "tasks", the same of each.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993; the mean of GenEval is that of
    arXiv 2310.11513, github.com/djghosh13/geneval.
    """
    tasks = defaultdict(lambda: defaultdict(list))
    for key, value in values.items():
        tasks[tags and tags[key]][key[0]].append(value)
    rng, means, drawn, num_prompts = np.random.default_rng(SEED), [], np.zeros(DRAWS), []
    for prompts in tasks.values():
        sums, counts = np.array([(sum(group), len(group)) for group in prompts.values()]).T
        chosen = rng.integers(len(prompts), size=(DRAWS, len(prompts)))
        means.append(sums.sum() / counts.sum())
        drawn += sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1) / len(tasks)
        num_prompts.append(len(prompts))
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist() if min(num_prompts) > 1 else (None, None)
    summary = {"mean": float(np.mean(means)), "low": low, "high": high}
    summary |= {"images": len(values), "prompts": sum(num_prompts)}
    if tags:
        parts = {task: {key: value for key, value in values.items() if tags[key] == task} for task in tasks}
        summary["tasks"] = {task: summarise(part) for task, part in parts.items()}
    return summary


def write_whole(path, write):
    """Have `write(partial)` write a file beside `path`, then rename it: there is never half a file."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    write(partial)
    os.replace(partial, path)
