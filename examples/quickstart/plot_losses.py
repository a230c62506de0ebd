# SPDX-License-Identifier: Apache-2.0
"""
Draw the training losses of several runs, smoothed, from their TensorBoard files.

    python examples/quickstart/plot_losses.py SFT=outputs/sft SOAR=outputs/soar --output loss.png

`loss_base` is plain flow matching, and comparable between runs. `loss_aux` is SOAR's correction, on states that the
model itself has led to.
"""

import argparse
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


SCALARS = {"loss_base": "flow matching loss (loss_base)", "loss_aux": "SOAR correction loss (loss_aux)"}


def read_scalars(run):
    """Scalars under `run`/logs: a `dict` from each name to `(steps, values)`; a resumed run's later file wins."""
    scalars = {}
    for path in sorted(run.glob("logs/**/events.out.tfevents.*"), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for name in events.Tags()["scalars"]:
            scalars.setdefault(name, {}).update({event.step: event.value for event in events.Scalars(name)})
    return {
        name: (np.array(sorted(values)), np.array([values[step] for step in sorted(values)]))
        for name, values in scalars.items()
    }


def smooth(values, width):
    """
    Median over a window of `width` points, shorter at both ends; same length as `values`. Not the mean: the correction
    target is divided by a noise level that can be next to zero, so that one sample can dwarf all others.
    """
    half = width // 2
    return np.array([np.median(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))])


def main():
    parser = argparse.ArgumentParser(description="Draw the training losses of several runs.")
    parser.add_argument("runs", nargs="+", metavar="NAME=OUTPUT_DIR")
    parser.add_argument("--output", type=Path, default=Path("loss.png"))
    parser.add_argument("--smoothing", type=int, default=25, help="Steps that a point is averaged over.")
    args = parser.parse_args()
    if args.smoothing < 1:
        parser.error("--smoothing must be at least 1")
    runs = {}
    for item in args.runs:
        name, _, folder = item.partition("=")
        runs[name] = read_scalars(Path(folder))
        if not runs[name]:
            parser.exit(2, f"error: {item}: want NAME=OUTPUT_DIR, with TensorBoard files in OUTPUT_DIR/logs\n")

    figure, axes = plt.subplots(1, len(SCALARS), figsize=(10, 4))
    for axis, (scalar, title) in zip(axes, SCALARS.items(), strict=True):
        for index, (name, scalars) in enumerate(runs.items()):
            if scalar in scalars:  # plain fine-tuning has no loss_aux
                steps, values = scalars[scalar]
                axis.plot(steps, smooth(values, args.smoothing), label=name, color=f"C{index}")
        axis.set(title=title, xlabel="step", ylabel="loss", yscale="log")
        axis.grid(alpha=0.3, which="both")
        if axis.lines:
            axis.legend()
    figure.tight_layout()
    # Written beside and then renamed, so that the plot is never half a picture.
    partial = args.output.with_name("partial." + args.output.name)
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(partial, dpi=130)
        os.replace(partial, args.output)
    except (OSError, ValueError) as error:  # the latter of an ending that no picture has
        parser.error(f"--output {args.output}: {error}")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
