# SPDX-License-Identifier: Apache-2.0
"""
Keep the images of a data set that a metric scores highest, to train on them.

    python examples/evaluation/filter_dataset.py --train_data_dir photos --metric aesthetic --min_score 6.8 \
        --output_dir photos_aesthetic
    python examples/evaluation/filter_dataset.py --jsonl_path data.jsonl --image_dir images --metric clipscore \
        --top_fraction 0.2 --to jsonl --output_dir best

SOAR's experiments on single rewards train on such subsets: aesthetic score of at least 6.8, high CLIPScore. The output
is what convert_jsonl.py writes, with the score in each line. Scores, and the histogram with the cut, are kept beside
it, or in --scores_dir: give the same again to try another cut, or after an interruption, and nothing is scored twice.
An image that cannot be scored is named and not kept, and the exit code is 1.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from data_sets import add_data_arguments, add_output_arguments, check_output_arguments, read_data, write_data_set
from runs import script
from scoring import METRICS, Unavailable, identify, load_scorer, make_folder, read_scores, score, unscored


def choose(scores, min_score, top_fraction):
    """
    The lowest score that is kept.

    Args:
        scores (`list[float]`): Of all images.
        min_score (`float`, *optional*): The cut itself.
        top_fraction (`float`, *optional*): In (0, 1]; at least one image is kept, and all that equal the last one.
    """
    if min_score is not None:
        return min_score
    return sorted(scores, reverse=True)[max(round(top_fraction * len(scores)), 1) - 1]


def draw_histogram(scores, cut, metric, path):
    """A picture of all scores and the cut."""
    from matplotlib.figure import Figure

    kept = sum(score >= cut for score in scores)
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axis = figure.subplots()
    edges = np.histogram_bin_edges(scores, bins=40)
    for part, color in (([s for s in scores if s < cut], "lightgrey"), ([s for s in scores if s >= cut], "tab:blue")):
        axis.hist(part, bins=edges, color=color)
    axis.axvline(cut, color="black", lw=1)
    axis.set(xlabel=metric, ylabel="images", title=f"{kept} of {len(scores)} images score at least {cut:.4g}")
    figure.savefig(path, dpi=110)


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0], allow_abbrev=False)
    parser.add_argument("--metric", choices=list(METRICS), required=True)
    cut = parser.add_mutually_exclusive_group(required=True)
    cut.add_argument("--min_score", type=script.number(), help="Keep the images that score at least this.")
    cut.add_argument("--top_fraction", type=script.number(float, 1e-9, 1), help="Keep this part of the images.")
    parser.add_argument("--batch_size", type=script.number(int, 1), default=16, help="Images scored at once.")
    parser.add_argument("--scores_dir", type=Path, help="Default: OUTPUT_DIR-scores.")
    add_data_arguments(parser)
    add_output_arguments(parser)
    args = parser.parse_args(input_args)
    check_output_arguments(parser, args)
    folder = args.scores_dir or args.output_dir.with_name(args.output_dir.name + "-scores")

    PartialState()  # for the log
    rows = list(map(identify, read_data(args)))
    if not rows:
        script.fail("the data set has no images")
    make_folder(folder)
    if missing := unscored(args.metric, rows, folder):
        try:
            scorer = load_scorer(args.metric, torch.device("cuda" if torch.cuda.is_available() else "cpu"), missing)
        except Unavailable as error:
            script.fail(f"--metric {args.metric} {error}")
        for line in score(scorer, args.metric, missing, folder, args.batch_size):
            print(f"not scored: {line}")
    scores = read_scores(folder / "scores" / f"{args.metric}.jsonl")
    scored = [(row, scores[row["digest"]]["score"]) for row in rows if row["digest"] in scores]
    if not scored:
        script.fail("no image has a score")
    values = [value for _, value in scored]
    lowest = choose(values, args.min_score, args.top_fraction)
    draw_histogram(values, lowest, args.metric, folder / f"{args.metric}.png")
    kept = [(row, value) for row, value in scored if value >= lowest]
    if not kept:
        script.fail(f"no image scores at least {lowest:g}; the best has {max(values):g}, see {folder}")
    write_data_set(args, [row for row, _ in kept], [{args.metric: value} for _, value in kept])
    print(f"{len(kept)} of {len(rows)} images in {args.output_dir}; scores and histogram in {folder}")
    sys.exit(1 if len(scored) < len(rows) else 0)


if __name__ == "__main__":
    main()
