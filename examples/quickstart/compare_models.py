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


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from trained import find_trained, load_trained  # noqa: E402


def sample(pipeline, args):
    """One image (`PIL.Image`) for each of `args.prompts`; image i starts from the noise of seed `args.seed + i`."""
    images = []
    for i, prompt in enumerate(args.prompts):
        images += pipeline(
            prompt,
            height=args.resolution,
            width=args.resolution,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            max_sequence_length=args.max_sequence_length,
            generator=torch.Generator("cpu").manual_seed(args.seed + i),
        ).images
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
    parser.add_argument("--resolution", type=int, help="Width and height in pixels. Default: the model's own.")
    parser.add_argument("--num_inference_steps", type=int, default=40)
    parser.add_argument("--guidance_scale", type=float, default=4.5)
    parser.add_argument("--max_sequence_length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    models = {}
    for item in args.models:
        name, _, folder = item.partition("=")
        try:
            models[name] = {"transformer": args.transformer} | find_trained(Path(folder).resolve(strict=True))
        except (OSError, ValueError) as error:
            parser.exit(2, f"error: {item}: want NAME=FOLDER: {error}\n")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows = {}
    for name, model in models.items():
        print(f"sampling from {name}")
        rows[name] = sample(load_trained(args.pretrained_model_name_or_path, **model, dtype=dtype).to(device), args)
    draw_sheet(rows, args.prompts, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
