# SPDX-License-Identifier: Apache-2.0
"""
Draw a folder of captioned pictures ("a red circle left of a blue square") that `--train_data_dir` reads.

    python examples/draw_scenes.py outputs/scenes --num_images 1000
    python examples/draw_scenes.py outputs/noisy_scenes --num_images 2000 --noisy

The clean set stands for curated data. `--noisy` stands for data scraped from the web: cluttered, blurred, badly
compressed pictures, of which some have the caption of another picture. The same arguments draw the same pictures.
"""

import argparse
import io
import json
import math
import random
import shutil
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter
from tqdm.auto import tqdm


SUPERSAMPLING = 4  # drawn this many times larger, then reduced: smooth edges
WRONG_CAPTIONS = 0.3  # fraction, with --noisy

COLORS = {
    "red": (214, 40, 40),
    "green": (56, 150, 70),
    "blue": (40, 90, 210),
    "yellow": (250, 205, 50),
    "purple": (135, 60, 175),
    "orange": (245, 125, 25),
}


def ring(radii, points):
    """`points` corners around the origin, clockwise from the top, at the distances `radii` in turn."""
    angles = [2 * math.pi * i / points for i in range(points)]
    return [(radii[i % len(radii)] * math.sin(a), -radii[i % len(radii)] * math.cos(a)) for i, a in enumerate(angles)]


def heart(points):
    """The curve `x = 16 sin^3 a, y = 13 cos a - 5 cos 2a - 2 cos 3a - cos 4a`, in [-1, 1]."""
    angles = [2 * math.pi * i / points for i in range(points)]
    y = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in angles]
    return [(math.sin(a) ** 3, -(height + 2.5) / 15) for a, height in zip(angles, y, strict=True)]


# Outlines in [-1, 1], y pointing down.
SHAPES = {
    "circle": ring([0.95], points=72),
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -0.95), (1, 0.8), (-1, 0.8)],
    "star": ring([1.1, 0.46], points=10),
    "heart": heart(points=72),
    "cross": [(-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3)]
    + [(0.3, 0.95), (-0.3, 0.95), (-0.3, 0.3), (-0.95, 0.3), (-0.95, -0.3), (-0.3, -0.3)],
}

# Centres of the objects, in fractions of the picture's side.
LEFT_RIGHT = [(0.27, 0.5), (0.73, 0.5)]
ABOVE_BELOW = [(0.5, 0.27), (0.5, 0.73)]
COUNTS = {
    "two": LEFT_RIGHT,
    "three": [(0.5, 0.27), (0.27, 0.73), (0.73, 0.73)],
    "four": [(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)],
}


def random_scene(rng):
    """
    Choose what to draw.

    Returns:
        `tuple`: The caption (`str`), and its objects as `(shape, color, center, radius)`, lengths in fractions of the
        picture's side.
    """
    shape, other_shape = rng.choices(list(SHAPES), k=2)
    color, other_color = rng.sample(list(COLORS), k=2)
    article, other_article = ("an" if name == "orange" else "a" for name in (color, other_color))
    kind = rng.choice(["one", "count", "left of", "above"])
    if kind == "one":
        return f"{article} {color} {shape}", [(shape, color, (0.5, 0.5), 0.3)]
    if kind == "count":
        count = rng.choice(list(COUNTS))
        plural = "crosses" if shape == "cross" else shape + "s"
        return f"{count} {color} {plural}", [(shape, color, center, 0.19) for center in COUNTS[count]]
    centers = LEFT_RIGHT if kind == "left of" else ABOVE_BELOW
    objects = [(shape, color, centers[0], 0.19), (other_shape, other_color, centers[1], 0.19)]
    return f"{article} {color} {shape} {kind} {other_article} {other_color} {other_shape}", objects


def draw_scene(objects, size, rng, noisy):
    """A picture of `objects`, `size` pixels wide and high, on paper with soft shadows, or in a `noisy` mess."""
    side = size * SUPERSAMPLING
    background = tuple(rng.randint(60, 230) for _ in range(3)) if noisy else (250, 247, 240)
    image = Image.new("RGB", (side, side), background)
    draw = ImageDraw.Draw(image)

    def polygon(outline, center, radius, fill):
        draw.polygon([((center[0] + radius * x) * side, (center[1] + radius * y) * side) for x, y in outline], fill)

    if noisy:
        for _ in range(rng.randint(4, 10)):
            ends = [(rng.uniform(0, side), rng.uniform(0, side)) for _ in range(2)]
            draw.line(ends, tuple(rng.randint(30, 250) for _ in range(3)), width=rng.randint(side // 40, side // 8))
    for shape, color, (x, y), radius in objects:
        fill = COLORS[color]
        if noisy:
            fill = tuple(channel + rng.randint(-40, 40) for channel in fill)
            x, y = x + rng.uniform(-0.08, 0.08), y + rng.uniform(-0.08, 0.08)
            radius *= rng.uniform(0.7, 1.1)
        else:
            x, y = x + rng.uniform(-0.01, 0.01), y + rng.uniform(-0.01, 0.01)
            polygon(SHAPES[shape], (x + 0.02, y + 0.025), radius, (218, 212, 200))
        polygon(SHAPES[shape], (x, y), radius, fill)

    image = image.resize((size, size), Image.Resampling.LANCZOS)
    if noisy:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, size / 60)))
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=rng.randint(10, 50))
        image = Image.open(jpeg).convert("RGB")
    return image


def main():
    parser = argparse.ArgumentParser(description="Draw a folder of captioned pictures to train on.")
    parser.add_argument("output_dir", type=Path, help="Folder to write the pictures and metadata.jsonl to.")
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--size", type=int, default=48, help="Width and height in pixels.")
    parser.add_argument("--noisy", action="store_true", help="Messy pictures, and some captions of other pictures.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out = args.output_dir
    if args.num_images < 1 or args.size < 16:
        parser.exit(2, "error: --num_images must be at least 1 and --size at least 16\n")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.exit(2, f"error: {out} exists and is not an empty folder\n")

    # Written beside and then renamed, so that the folder is never half a data set.
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    rng = random.Random(args.seed)
    with open(partial / "metadata.jsonl", "w", encoding="utf-8") as metadata:
        for index in tqdm(range(args.num_images), desc="Drawing"):
            caption, objects = random_scene(rng)
            name = f"{index:05d}.png"
            draw_scene(objects, args.size, rng, args.noisy).save(partial / name)
            if args.noisy and rng.random() < WRONG_CAPTIONS:
                caption, _ = random_scene(rng)
            metadata.write(json.dumps({"file_name": name, "text": caption}) + "\n")
    if out.exists():
        out.rmdir()
    partial.rename(out)


if __name__ == "__main__":
    main()
