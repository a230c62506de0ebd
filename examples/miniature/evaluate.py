# SPDX-License-Identifier: Apache-2.0
"""
Score a run of the experiment: draw the prompts at several guidances and numbers of steps, detect what is there.

    python examples/miniature/evaluate.py --base outputs/miniature/base_0 --run outputs/miniature/runs/sft \
        --world outputs/miniature/world --output sft.json

Writes a JSON with an outcome of every picture, so that runs can be compared prompt by prompt, and per setting the
Frechet distance to true pictures of the same prompts and the diversity among pictures of one prompt. Twelve pictures,
as many of each task, from the same noise for every run, are kept beside it as a PNG.
"""

import argparse
import json
import os
import random
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import words
import world
from diffusers.utils import make_image_grid
from experiment import CHECKPOINT_PROMPTS, GUIDANCES, MAIN, QUICK_PART, SETTINGS, name_of
from PIL import Image
from safetensors.torch import load_file
from tqdm.auto import tqdm


sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]
from trained import draw_images, find_trained, load_trained  # noqa: E402

import train_sd3_soar as script  # noqa: E402


BATCH = 100


def load_pipeline(base, run, start=None):
    """The pipeline `base`, in float32, with what the run or checkpoint at `run` has: a transformer, or a LoRA on that
    of the run `start`."""
    trained = find_trained(run)
    pipeline = load_trained(base, **(find_trained(start) | trained if start else trained))
    if "transformer" in trained and (run / "ema.safetensors").exists():  # a checkpoint keeps the average apart
        average = load_file(run / "ema.safetensors")
        for i, parameter in enumerate(pipeline.transformer.parameters()):
            parameter.data.copy_(average.pop(str(i)))
        assert not average
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def encode(pipeline, texts):
    """Embeddings of each text: `dict[str, tuple[torch.Tensor, torch.Tensor]]`."""
    length = pipeline.tokenizer_max_length
    found = {}
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        embeds, _, pooled, _ = pipeline.encode_prompt(
            part, part, part, do_classifier_free_guidance=False, max_sequence_length=length
        )
        found |= {text: (embeds[i], pooled[i]) for i, text in enumerate(part)}
    return found


def sample(pipeline, records, embeds, guidance, steps):
    """A picture a record, from the record's own noise: `list[PIL.Image.Image]`."""
    images = []
    for start in range(0, len(records), BATCH):
        part = records[start : start + BATCH]
        inputs = [torch.stack(tensors) for tensors in zip(*(embeds[r["prompt"]] for r in part), strict=True)]
        null = [tensor.expand(len(part), *tensor.shape) for tensor in embeds[""]]
        with script.failing_with(f"guidance {guidance:g} with {steps} steps cannot be drawn"):
            images += draw_images(
                pipeline,
                prompt_embeds=inputs[0],
                pooled_prompt_embeds=inputs[1],
                negative_prompt_embeds=null[0],
                negative_pooled_prompt_embeds=null[1],
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(r["seed"]) for r in part],
            )
    return images


def features(images):
    """Fixed features, of random convolutions: `(N, 128)`. They see colours, edges and roughly where."""
    generator = torch.Generator().manual_seed(0)
    images = [np.asarray(image.resize((world.SIZE, world.SIZE), Image.Resampling.BOX)) for image in images]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    for channels in (16, 32):
        weight = torch.randn(channels, pixels.shape[1], 3, 3, generator=generator) / (9 * pixels.shape[1]) ** 0.5
        pixels = torch.relu(torch.nn.functional.conv2d(pixels, weight, stride=2, padding=1))
    return torch.nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1).double()


def frechet_distance(one, other):
    """Between the Gaussians of two sets of features `(N, D)`."""
    means, covariances = [f.mean(0) for f in (one, other)], [torch.cov(f.T) for f in (one, other)]
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    spread = covariances[0].trace() + covariances[1].trace() - 2 * roots
    return ((means[0] - means[1]).square().sum() + spread).item()


def diversity(found, records):
    """Mean squared distance between the features of two pictures of one prompt."""
    groups = defaultdict(list)
    for feature, record in zip(found, records, strict=True):
        groups[record["prompt"]].append(feature)
    stacks = [torch.stack(group) for group in groups.values() if len(group) > 1]
    return torch.stack([torch.pdist(stack).square().mean() for stack in stacks]).mean().item()


def measure(source, pipeline, prompts, records, truth, embeds, guidance, steps):
    """
    Draw the prompts of `source`, the module `world` or `words`, in one setting.

    Returns:
        `tuple[dict, list[PIL.Image.Image]]`: the outcomes, a character a picture, and what is measured on all of them
        together; and the pictures.
    """
    images = sample(pipeline, records, embeds, guidance, steps)
    drawn, true = features(images), features(truth)
    measured = source.outcomes(prompts, images) | {"frechet": frechet_distance(drawn, true)}
    if source is world:  # a word has one true picture
        measured["diversity"] = diversity(drawn, records) / diversity(true, records)
    return measured, images


def setting(text):
    guidance, steps = text.split(",")
    return script.number()(guidance), script.number(int, 1)(steps)


def main():
    parser = argparse.ArgumentParser(description="Score a run of the experiment.")
    parser.add_argument("--base", type=Path, required=True, help="Pipeline of which the run trained the transformer.")
    parser.add_argument("--run", type=Path, required=True, help="Its --output_dir.")
    parser.add_argument("--start", type=Path, help="Run whose transformer the LoRA of --run lies on.")
    parser.add_argument("--world", type=Path, required=True, help="Folder of world.py, or of words.py.")
    parser.add_argument("--words", action="store_true", help="It is the one of words.py.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write.")
    parser.add_argument("--settings", nargs="+", type=setting, metavar="GUIDANCE,STEPS", help="These alone.")
    parser.add_argument("--checkpoint", action="store_true", help="Fewer pictures, and no PNG.")
    parser.add_argument("--quick", action="store_true", help="Fewer pictures in all but the main setting.")
    args = parser.parse_args()
    source = words if args.words else world
    with script.failing_with(f"--output {args.output}"):
        args.output.parent.mkdir(parents=True, exist_ok=True)
    with script.failing_with(f"--base {args.base}, with --start and --run {args.run}"):
        pipeline = load_pipeline(args.base, args.run, args.start)
    result, shown = {"test": {}, "validation": {}}, []
    parts = {"test": SETTINGS, "validation": GUIDANCES}
    if args.settings:
        parts = {"test": dict.fromkeys(args.settings, SETTINGS[MAIN]), "validation": dict.fromkeys(args.settings, 20)}
    if args.checkpoint:
        parts = {"test": dict.fromkeys(args.settings or [MAIN], CHECKPOINT_PROMPTS)}
    for part, settings in parts.items():
        with script.failing_with(f"--world {args.world} has no {part}.jsonl of {source.__name__}.py"):
            prompts, records = source.read_prompts(args.world / f"{part}.jsonl")
        embeds = encode(pipeline, sorted({"", *(record["prompt"] for record in records)}))
        rng = random.Random(f"truth {part}")
        truth = [source.draw_truth(prompt, rng) for prompt in prompts]
        of_task = len(records) // len(source.TASKS)
        for (guidance, steps), count in tqdm(settings.items(), desc=f"Drawing {part}", unit="setting"):
            if args.quick and (part, guidance, steps) != ("test", *MAIN):
                count = round(QUICK_PART * count)
            count = min(source.TIMES * count, of_task)
            chosen = [task * of_task + i for task in range(len(source.TASKS)) for i in range(count)]
            these = [[items[i] for i in chosen] for items in (prompts, records, truth)]
            measured, images = measure(source, pipeline, *these, embeds, guidance, steps)
            result[part][name_of(guidance, steps)] = measured
            if (part, guidance, steps) == ("test", *MAIN):
                each = min(12 // len(source.TASKS), count)
                shown = [images[task * count + i] for task in range(len(source.TASKS)) for i in range(each)]
    if shown and not args.checkpoint:
        make_image_grid(shown, rows=1, cols=len(shown)).save(args.output.with_suffix(".png"))
    partial = args.output.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, args.output)
    scores = next(iter(result["test"].values()))
    print({key: np.mean([int(c) for c in value]).round(3) for key, value in scores.items() if isinstance(value, str)})


if __name__ == "__main__":
    main()
