# SPDX-License-Identifier: Apache-2.0
"""
Draw one sheet of samples from several models: a row each, a prompt a column, the same starting noise down a column.

    python examples/compare_models.py --pretrained_model_name_or_path outputs/base \
        --models base=outputs/base SOAR=outputs/soar SOAR-LoRA=outputs/soar_lora \
        --prompts "a red circle" "two blue stars" --output samples.png

A model is what a training run left: a folder with `transformer/`, or with `pytorch_lora_weights.safetensors`. The
pipeline of `--pretrained_model_name_or_path` gives the rest.
"""

import argparse
import os
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline


@torch.no_grad()
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
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=PATH")
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
        models[name] = folder = Path(folder)
        if not ((folder / "transformer").is_dir() or (folder / "pytorch_lora_weights.safetensors").exists()):
            parser.exit(2, f"error: {item}: want NAME=PATH, a folder with transformer/ or a LoRA file in it\n")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        args.pretrained_model_name_or_path, use_safetensors=True, dtype=dtype
    )
    pipeline.to(device)
    base = pipeline.transformer
    rows = {}
    for name, folder in models.items():
        print(f"sampling from {name}")
        if (folder / "transformer").is_dir():
            transformer = SD3Transformer2DModel.from_pretrained(
                folder / "transformer", use_safetensors=True, dtype=dtype
            ).to(device)
            pipeline.register_modules(transformer=transformer)
            rows[name] = sample(pipeline, args)
            pipeline.register_modules(transformer=base)
        else:
            pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
            rows[name] = sample(pipeline, args)
            pipeline.unload_lora_weights()
    draw_sheet(rows, args.prompts, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
