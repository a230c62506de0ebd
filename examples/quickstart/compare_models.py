# SPDX-License-Identifier: Apache-2.0
"""
Draw one sheet of samples from several models: a row each, a prompt a column, the same starting noise down a column.

    python examples/quickstart/compare_models.py --pretrained_model_name_or_path outputs/small \
        --transformer outputs/base --models base=outputs/base SOAR=outputs/soar SOAR-LoRA=outputs/soar_lora \
        --prompts "a red circle" "two blue stars" --output samples.png

A model is what a training run left: a folder with `transformer/`, or with `pytorch_lora_weights.safetensors`. The
pipeline of `--pretrained_model_name_or_path` gives the rest, `--transformer` what a LoRA was trained on, if not the
pipeline's own.
"""

import argparse
import os
import sys
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.backend_bases import FigureCanvasBase


sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]
from trained import draw_images, find_trained, largest_side, load_trained  # noqa: E402

import train_sd3_soar as script  # noqa: E402


def sample(pipeline, args):
    """One image (`PIL.Image`) for each of `args.prompts`; image i starts from the noise of seed `args.seed + i`."""
    images = []
    for i, prompt in enumerate(args.prompts):
        images += draw_images(
            pipeline,
            prompt,
            height=args.resolution,
            width=args.resolution,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            max_sequence_length=args.max_sequence_length,
            generator=torch.Generator("cpu").manual_seed(args.seed + i),
        )
    return images


def draw_sheet(rows, prompts, path):
    """Save `rows`, a `dict` from a model's name to its images (`list[PIL.Image]`, one a prompt), labelled."""
    figure, axes = plt.subplots(
        len(rows), len(prompts), figsize=(1.5 * len(prompts) + 1, 1.5 * len(rows) + 0.6), squeeze=False
    )
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=12, fontweight="bold")
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    for axis, prompt in zip(axes[0], prompts, strict=True):
        axis.set_title(textwrap.fill(prompt, 18), fontsize=9)
    figure.tight_layout(pad=0.4)
    # Written beside and then renamed, so that the sheet is never half a picture.
    partial = path.with_name("partial." + path.name)
    figure.savefig(partial, dpi=130)
    os.replace(partial, path)


def main():
    parser = argparse.ArgumentParser(description="Draw one sheet of samples from several models.")
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="Pipeline the models belong to.")
    parser.add_argument("--transformer", help="Full fine-tune that the LoRAs among the models belong to.")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--output", type=Path, default=Path("samples.png"))
    side = script.number(int, 16)
    parser.add_argument("--resolution", type=side, help="Width and height in pixels. Default: the model's own.")
    parser.add_argument("--num_inference_steps", type=script.number(int, 1), default=40)
    parser.add_argument("--guidance_scale", type=script.number(), default=4.5)
    parser.add_argument("--max_sequence_length", type=script.number(int, 1, 512), default=256)
    parser.add_argument("--seed", type=script.number(int, 0, 2**62), default=0)
    args = parser.parse_args()
    models = {}
    for item in args.models:
        name, _, folder = item.partition("=")
        if name in models:
            parser.exit(2, f"error: {item}: every name once\n")
        try:
            models[name] = {"transformer": args.transformer} | find_trained(Path(folder).resolve(strict=True))
        except (OSError, ValueError) as error:
            parser.exit(2, f"error: {item}: want NAME=FOLDER: {error}\n")
    if args.output.suffix[1:] not in FigureCanvasBase.get_supported_filetypes():
        parser.error(f"--output {args.output}: give an ending that pictures have")
    with script.failing_with(f"--output {args.output}"):
        args.output.parent.mkdir(parents=True, exist_ok=True)
    with script.failing_with(f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"):
        most = largest_side(args.pretrained_model_name_or_path)
    if args.resolution and (args.resolution > most or args.resolution % 16):
        parser.error(f"--resolution {args.resolution}: must be divisible by 16, and at most {most} for this model")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows = {}
    for name, model in models.items():
        print(f"sampling from {name}")
        with script.failing_with(f"{name}, with --pretrained_model_name_or_path {args.pretrained_model_name_or_path}"):
            pipeline = load_trained(args.pretrained_model_name_or_path, **model, dtype=dtype).to(device)
            rows[name] = sample(pipeline, args)
    draw_sheet(rows, args.prompts, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
