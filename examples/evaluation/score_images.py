# SPDX-License-Identifier: Apache-2.0
"""
Score images against their prompts: a folder of generate_images.py, or any data set in the training scripts' formats.

    python examples/evaluation/score_images.py runs/base runs/soar --metrics ocr,geneval,clipscore
    python examples/evaluation/score_images.py --train_data_dir photos --output_dir photos-scores --metrics aesthetic

One scorer is in memory at a time. Of each metric it says first which hub files it needs and their size; where one
cannot be had, the others are still scored, and the exit code is 1. Scores are appended to

    scores/METRIC.jsonl   a row an image: file_name, score, and what the metric found
    scores.json           the means, with 95 % bootstrap intervals over the prompts

in the folder itself (a data set's go to --output_dir), and an image that has its score is not scored again. One that
cannot be read, or whose score is no finite number, is named and counted, and the exit code is 1.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from data_sets import add_data_arguments, check_data_arguments, read_data
from runs import script, summarise, write_whole
from scoring import METRICS, Unavailable, identify, load_scorer, make_folder, read_run, read_scores, score, unscored


def summarise_metric(metric, rows, scores):
    """
    The mean over the images that have a score, with its 95 % bootstrap interval; of GenEval, that of its tasks' means,
    and "strict", the same by its strict reading. Prompts are drawn again, or of a data set, which has none, images.

    Args:
        metric (`str`): Its name.
        rows (`list[dict]`): The images.
        scores (`dict[str, dict]`): Of [`read_scores`].

    Returns:
        `dict`: what [`runs.summarise`] returns, and "missing", the number of images that have no score.
    """
    keys = [(row["text" if "prompt_index" in row else "file_name"], row["digest"]) for row in rows]
    missing = sum(row["digest"] not in scores for row in rows)
    rows = {key: row for key, row in zip(keys, rows, strict=True) if row["digest"] in scores}
    tags = {key: row["tag"] for key, row in rows.items()} if metric == "geneval" else None

    def mean_of(field):
        return summarise({key: scores[row["digest"]][field] for key, row in rows.items()}, tags)

    summary = mean_of("score") | {"missing": missing}
    return summary | ({"strict": mean_of("strict")} if metric == "geneval" else {})


def write_summaries(folder, rows):
    """Write `scores.json` from all scores of a folder, those of another process at work there included."""
    summaries = {}
    for metric in METRICS:
        scores = read_scores(folder / "scores" / f"{metric}.jsonl")
        if any(row["digest"] in scores for row in rows):
            summaries[metric] = summarise_metric(metric, rows, scores)
    path = folder / "scores.json"
    write_whole(path, lambda p: p.write_text(json.dumps(summaries, indent=2) + "\n"))
    return summaries


def format_summary(metric, summary):
    """A line on a metric: mean, interval, number of images with a score, and without."""
    ends = [f"{end:.4f}" for end in (summary["low"], summary["high"]) if end is not None]
    strict = f", {summary['strict']['mean']:.4f} by the strict reading" if "strict" in summary else ""
    counted = f"{summary['images']} images" + (f", {summary['missing']} without a score" if summary["missing"] else "")
    return f"{metric} {summary['mean']:.4f} [{', '.join(ends) or 'of one, none'}]{strict}, {counted}"


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="*", type=Path, help="Folders of generate_images.py.")
    parser.add_argument("--metrics", required=True, help=f"Some of {','.join(METRICS)}.")
    parser.add_argument("--batch_size", type=script.number(int, 1), default=16, help="Images at once.")
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
    sets = {run: read_run(run) for run in args.runs} or {args.output_dir: list(map(identify, read_data(args)))}
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
