# SPDX-License-Identifier: Apache-2.0
"""
A world of coloured shapes on a grid of four cells, with prompts after GenEval's six tasks and an exact detector.

    python examples/miniature/world.py outputs/miniature/world

writes `noisy/` (20,000 scenes: clutter, blur, JPEG, unasked objects, a fifth of the captions from other scenes; what a
base model learns from), `curated/` (2,000 clean scenes; what post-training learns from), `unseen/` (256 clean scenes
of test prompts, to measure errors on), `validation.jsonl` and `test.jsonl` (prompts; choices are made on the first,
results are from the second). Some pairs of shape and colour are in no caption before the test.
"""

import argparse
import functools
import io
import itertools
import json
import math
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm.auto import tqdm


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

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attribution")
TIMES = 1  # `words.py` has three times as many prompts a task
SIZE, CELL, RADIUS = 32, 16, 6.5  # pixels
SUPERSAMPLING = 4
PAPER = (250, 247, 240)
CELLS = [(row, column) for row in range(2) for column in range(2)]
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}  # of the first to the second
# Never asked for before the test: each shape and each colour once.
HELD_OUT = set(zip(SHAPES, ["green", "orange", "red", "purple", "blue", "yellow"], strict=True))
WRONG_CAPTIONS = 0.2


@dataclass(frozen=True)
class Thing:
    """An object of a scene or of a prompt; in a prompt, `color` and `cell` may be open (`None`)."""

    shape: str
    color: str | None = None
    cell: tuple | None = None


@dataclass(frozen=True)
class Prompt:
    task: str
    things: tuple
    relation: str | None = None

    @property
    def text(self):
        if self.task == "counting":
            shape = self.things[0].shape
            return f"{NUMBERS[len(self.things)]} {'crosses' if shape == 'cross' else shape + 's'}"
        names = []
        for thing in self.things:
            words = f"{thing.color} {thing.shape}" if thing.color else thing.shape
            names.append(f"{'an' if words[0] in 'aeiou' else 'a'} {words}")
        return f" {self.relation or 'and'} ".join(names)

    @property
    def held_out(self):
        return any((thing.shape, thing.color) in HELD_OUT for thing in self.things)


def all_prompts(task):
    """Every prompt of a task."""
    shapes, colors = list(SHAPES), list(COLORS)
    if task == "single_object":
        return [Prompt(task, (Thing(shape),)) for shape in shapes]
    if task == "two_object":
        return [Prompt(task, (Thing(a), Thing(b))) for a, b in itertools.permutations(shapes, 2)]
    if task == "counting":
        return [Prompt(task, (Thing(shape),) * n) for shape in shapes for n in NUMBERS]
    if task == "colors":
        return [Prompt(task, (Thing(shape, color),)) for shape in shapes for color in colors]
    if task == "position":
        pairs = itertools.permutations(shapes, 2)
        return [Prompt(task, (Thing(a), Thing(b)), relation) for a, b in pairs for relation in RELATIONS]
    kinds = [Thing(shape, color) for shape in shapes for color in colors]
    pairs = itertools.permutations(kinds, 2)
    return [Prompt(task, (a, b)) for a, b in pairs if a.shape != b.shape and a.color != b.color]


@functools.cache
def split(task):
    """
    The prompts of a task for training, validation and test. Where a task has few, all three have all of them: there
    the pictures differ, not the prompts. Pairs of shape and colour in `HELD_OUT` are in the test alone.
    """
    prompts = all_prompts(task)
    random.Random(f"split {task}").shuffle(prompts)
    held_out = [prompt for prompt in prompts if prompt.held_out]
    prompts = [prompt for prompt in prompts if not prompt.held_out]
    if len(prompts) < 100:
        return {"train": prompts, "validation": prompts, "test": prompts + held_out}
    fifth = len(prompts) // 5
    parts = {
        "validation": prompts[:fifth],
        "test": prompts[fifth : 2 * fifth] + held_out,
        "train": prompts[2 * fifth :],
    }
    return parts


def realise(prompt, rng):
    """A scene that the prompt describes: its things with open colours and cells filled in."""
    if prompt.task == "position":
        row, column = RELATIONS[prompt.relation]
        line = rng.randrange(2)
        first = (line, max(column, 0)) if column else (max(row, 0), line)
        cells = [first, (first[0] - row, first[1] - column)]
    else:
        cells = rng.sample(CELLS, len(prompt.things))
    return [
        Thing(thing.shape, thing.color or rng.choice(list(COLORS)), cell)
        for thing, cell in zip(prompt.things, cells, strict=True)
    ]


def draw(things, rng=None, size=SIZE):
    """
    A picture of `things`.

    Args:
        things (`list[Thing]`): With colours and cells.
        rng (`random.Random`, *optional*): Makes it a noisy picture.
        size (`int`): Width and height in pixels. The world itself is 32 pixels wide, also in larger pictures.

    Returns:
        `PIL.Image.Image`.
    """

    def paint(pen, spread):
        for thing in things:
            row, column = thing.cell
            x, y = (column + 0.5) * CELL + spread(2), (row + 0.5) * CELL + spread(2)
            radius = RADIUS * (1 + spread(0.2))
            outline = [
                ((x + radius * a) * SUPERSAMPLING, (y + radius * b) * SUPERSAMPLING) for a, b in SHAPES[thing.shape]
            ]
            pen.polygon(outline, tuple(round(channel + spread(40)) for channel in COLORS[thing.color]))

    return draw_on_paper(paint, rng, size)


def draw_truth(prompt, rng):
    """A true picture of a prompt."""
    return draw(realise(prompt, rng))


def draw_on_paper(paint, rng, size):
    """
    A picture of `size` x `size` pixels by `paint(pen, spread)`, where `spread(width)` is a random offset: 0 without
    `rng`, and with it up to `width` either way. `rng` also adds lines, blur and JPEG's traces.
    """
    side, mess = SIZE * SUPERSAMPLING, rng.random() if rng else 0.0  # some noisy pictures are nearly clean

    def spread(width):
        return mess * rng.uniform(-width, width) if rng else 0.0

    image = Image.new("RGB", (side, side), tuple(round(channel - abs(spread(90))) for channel in PAPER))
    pen = ImageDraw.Draw(image)
    for _ in range(round(abs(spread(4)))):
        ends = [(rng.uniform(0, side), rng.uniform(0, side)) for _ in range(2)]
        pen.line(ends, tuple(rng.randint(30, 250) for _ in range(3)), width=rng.randint(2, 8))
    paint(pen, spread)
    image = image.resize((size, size), Image.Resampling.BOX)
    if rng:
        image = image.filter(ImageFilter.GaussianBlur(0.7 * mess * size / SIZE))
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=round(90 - 60 * mess))
        image = Image.open(jpeg).convert("RGB")
    return image


# The detector


@functools.cache
def templates():
    """Masks of the shapes in a cell, moved by up to two pixels each way: `(shapes, moves, CELL, CELL)`, in [0, 1]."""
    masks = []
    for shape in SHAPES:
        moved = []
        for dy, dx in itertools.product(range(-2, 3), repeat=2):
            side = CELL * SUPERSAMPLING
            mask = Image.new("L", (side, side))
            centre = (CELL / 2 + dx, CELL / 2 + dy)
            outline = [((centre[0] + RADIUS * a), (centre[1] + RADIUS * b)) for a, b in SHAPES[shape]]
            points = [(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in outline]
            ImageDraw.Draw(mask).polygon(points, 255)
            moved.append(np.asarray(mask.resize((CELL, CELL), Image.Resampling.BOX), dtype=np.float32) / 255)
        masks.append(moved)
    return np.array(masks)


EMPTY, BROKEN = 0.006, 0.017  # mean squared error of a cell, of pixels in [0, 1]: as paper; as its best template


def detect(image):
    """
    What is in each cell: the template, of all shapes, colours and small moves, with the least squared error.

    Args:
        image (`PIL.Image.Image`): 32 x 32 pixels; a larger one is reduced.

    Returns:
        `tuple[list[Thing], int]`: the things, and the number of cells that are neither paper nor any thing.
    """
    image = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)
    pixels = np.asarray(image, dtype=np.float32) / 255
    paper = np.array(PAPER, dtype=np.float32) / 255
    colors = np.array(list(COLORS.values()), dtype=np.float32) / 255
    masks = templates()
    things, broken = [], 0
    for row, column in CELLS:
        cell = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] - paper
        if np.square(cell).mean() < EMPTY:
            continue
        # |cell - mask * (color - paper)|^2, expanded, for all templates at once
        ink = colors - paper
        cross = np.einsum("smyx,yxc,kc->smk", masks, cell, ink) * 2
        error = np.square(cell).sum() - cross + np.square(masks).sum((2, 3))[..., None] * np.square(ink).sum(1)
        shape, _, color = np.unravel_index(error.argmin(), error.shape)
        if error.min() / cell.size > BROKEN:
            broken += 1
        else:
            things.append(Thing(list(SHAPES)[shape], list(COLORS)[color], (row, column)))
    return things, broken


def score(prompt, things, broken):
    """
    Whether a picture shows what the prompt asks for.

    Returns:
        `tuple[bool, bool]`: lenient, GenEval's rule: what is asked for is there, counts are exact; and strict: besides
        that, nothing else is there and nothing is broken.
    """

    def fits(thing, wanted):
        return thing.shape == wanted.shape and wanted.color in (None, thing.color)

    if prompt.task == "counting":
        lenient = sum(thing.shape == prompt.things[0].shape for thing in things) == len(prompt.things)
    elif prompt.task == "position":
        dy, dx = RELATIONS[prompt.relation]
        lenient = any(
            fits(a, prompt.things[0])
            and fits(b, prompt.things[1])
            and (dy == 0 or np.sign(a.cell[0] - b.cell[0]) == dy)
            and (dx == 0 or np.sign(a.cell[1] - b.cell[1]) == dx)
            for a, b in itertools.permutations(things, 2)
        )
    else:
        lenient = all(any(fits(thing, wanted) for thing in things) for wanted in prompt.things)
    return lenient, lenient and len(things) == len(prompt.things) and broken == 0


# The sets


def make_scene(rng, noisy, part="train", size=SIZE):
    """A scene of a random prompt of a split: `tuple[PIL.Image.Image, str]`, the picture and its caption."""
    prompt = rng.choice(split(rng.choice(TASKS))[part])
    things = realise(prompt, rng)
    if noisy:  # now and then something that nobody asked for
        free = [cell for cell in CELLS if cell not in [thing.cell for thing in things]]
        extra = rng.sample(free, sum(rng.random() < 0.15 for _ in free))
        things += [Thing(rng.choice(list(SHAPES)), rng.choice(list(COLORS)), cell) for cell in extra]
    return draw(things, rng if noisy else None, size), prompt.text


def write_pictures(folder, count, make, rng, noisy):
    """An image folder for `--train_data_dir`: `count` pictures by `make(rng, noisy)`; of noisy ones a part has the
    caption of another."""
    folder.mkdir(parents=True)
    captions = []
    for i in tqdm(range(count), desc=f"Drawing {folder.name}", unit="picture"):
        image, caption = make(rng, noisy)
        image.save(folder / f"{i:05d}.png")
        captions.append(caption)
    if noisy:
        wrong = rng.sample(range(count), round(WRONG_CAPTIONS * count))
        for i, j in zip(wrong, wrong[1:] + wrong[:1], strict=True):
            captions[i] = captions[j]
    with open(folder / "metadata.jsonl", "w") as file:
        for i, caption in enumerate(captions):
            file.write(json.dumps({"file_name": f"{i:05d}.png", "text": caption}) + "\n")


def choose_prompts(part, count):
    """Yield `count` prompts a task, each with its noise's seed; tasks with few prompts have them several times."""
    rng = random.Random(part)
    for task in TASKS:
        prompts = split(task)[part]
        for i in range(count):
            prompt = prompts[i % len(prompts)] if len(prompts) < count else rng.choice(prompts)
            yield prompt, rng.getrandbits(31)


def write_prompts(path, part, count):
    """Write what [`choose_prompts`] yields, a JSON object a line."""
    with open(path, "w") as file:
        for prompt, seed in choose_prompts(part, count):
            things = [[thing.shape, thing.color] for thing in prompt.things]
            record = {"task": prompt.task, "prompt": prompt.text, "things": things, "relation": prompt.relation}
            record |= {"held_out": prompt.held_out, "seed": seed}
            file.write(json.dumps(record) + "\n")


def read_prompts(path):
    """The prompts of a file of [`write_prompts`], and its records: `tuple[list[Prompt], list[dict]]`."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [prompt_of(record) for record in records], records


def prompt_of(record):
    """The `Prompt` of a record of [`write_prompts`]."""
    return Prompt(record["task"], tuple(Thing(*thing) for thing in record["things"]), record["relation"])


def reward(images, rows):
    """
    For `--reward world:reward=1` of ../rl, in this folder, on prompts of [`write_prompts`]: 1 for a picture that shows
    what is asked for and nothing else, 1/2 for one that shows more or something broken, 0 for any other.
    """
    return [sum(score(prompt_of(row), *detect(image))) / 2 for image, row in zip(images, rows, strict=True)]


def outcomes(prompts, images):
    """What is kept of a picture, a character each: whether it fits, leniently and strictly; whether it is broken."""
    found = [detect(image) for image in images]
    scores = [score(prompt, *seen) for prompt, seen in zip(prompts, found, strict=True)]
    return {
        "lenient": "".join(str(int(lenient)) for lenient, _ in scores),
        "strict": "".join(str(int(strict)) for _, strict in scores),
        "broken": "".join(str(int(broken > 0)) for _, broken in found),
    }


def main(make=make_scene, write_prompts=write_prompts):
    parser = argparse.ArgumentParser(description="Draw the pictures and write the prompts of the experiment.")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--noisy", type=int, default=20_000, help="Pictures for the base model.")
    parser.add_argument("--curated", type=int, default=2_000, help="Pictures for post-training.")
    parser.add_argument("--unseen", type=int, default=256, help="Pictures to measure errors on.")
    parser.add_argument("--size", type=int, default=SIZE, help="Width and height in pixels.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make = functools.partial(make, size=args.size)
    if min(args.noisy, args.curated, args.unseen) < 0 or args.size < 1:
        parser.error("--noisy, --curated and --unseen must be at least 0, --size at least 1")
    if args.output_dir.exists():
        parser.error(f"{args.output_dir} exists: choose another folder, or remove it")
    partial = args.output_dir.with_name(args.output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        parser.error(str(error))
    write_pictures(partial / "noisy", args.noisy, make, random.Random(f"{args.seed} True"), noisy=True)
    write_pictures(partial / "curated", args.curated, make, random.Random(f"{args.seed} False"), noisy=False)
    unseen = functools.partial(make, part="test")
    write_pictures(partial / "unseen", args.unseen, unseen, random.Random(f"{args.seed} test"), noisy=False)
    write_prompts(partial / "validation.jsonl", "validation", 30)
    write_prompts(partial / "test.jsonl", "test", 100)
    partial.rename(args.output_dir)


if __name__ == "__main__":
    main()
