# SPDX-License-Identifier: Apache-2.0
"""
A world of rendered words, of three letters each, read by real OCR: the weights of PP-OCR that `rapidocr` ships.

    python examples/miniature/words.py outputs/miniature/words

writes the same as `world.py`. A word is consonant, vowel, consonant ("BUG", "TEK"), in one font. Its caption spells
it, `picture of b u g`, as the toy pipeline's tokenizers know few words. No word of the test is in a caption before.
"""

import functools
import itertools
import json
import random

import numpy as np
from PIL import Image, ImageFont
from world import SIZE, SUPERSAMPLING, draw_on_paper, main


TASKS, TIMES = ("word",), 3  # prompts of the one task, times as many as of each of `world.py`
CONSONANTS, VOWELS = "BCDFGHJKLMNPRSTVXZ", "AEOU"
INK, FONT_SIZE = (35, 35, 60), 15
ENLARGED, MARGIN = 4, 32  # for the OCR: times, pixels


@functools.cache
def split(_task="word"):
    """The words for training, validation and test: three fifths and twice a fifth."""
    words = ["".join(letters) for letters in itertools.product(CONSONANTS, VOWELS, CONSONANTS)]
    random.Random("split words").shuffle(words)
    fifth = len(words) // 5
    return {"validation": words[:fifth], "test": words[fifth : 2 * fifth], "train": words[2 * fifth :]}


def caption(word):
    return "picture of " + " ".join(word.lower())


def draw(word, rng=None):
    """A picture of 32 x 32 pixels with `word` in its middle; with `rng` (`random.Random`) a noisy one."""

    def paint(pen, spread):
        font = ImageFont.load_default(FONT_SIZE * SUPERSAMPLING * (1 + spread(0.1)))
        x, y = (SIZE / 2 + spread(2)) * SUPERSAMPLING, (SIZE / 2 + spread(5)) * SUPERSAMPLING
        pen.text((x, y), word, tuple(round(channel + abs(spread(120))) for channel in INK), font, anchor="mm")

    return draw_on_paper(paint, rng)


def draw_truth(word, _rng):
    return draw(word)


def make_word(rng, noisy, part="train"):
    """A picture of a random word of a split, and its caption."""
    word = rng.choice(split()[part])
    return draw(word, rng if noisy else None), caption(word)


@functools.cache
def reader():
    from rapidocr import RapidOCR

    return RapidOCR(params={"Global.log_level": "error"})


def read(image):
    """The text that the OCR sees in a picture of one line; `""` where it sees none."""
    side = SIZE * ENLARGED
    page = Image.new("RGB", (side + 2 * MARGIN, side + 2 * MARGIN), image.getpixel((0, 0)))
    page.paste(image.resize((side, side), Image.Resampling.BICUBIC), (MARGIN, MARGIN))
    found = reader()(np.asarray(page)[:, :, ::-1], use_det=False, use_cls=False, use_rec=True)
    return "".join(found.txts or [])


def edit_distance(one, other):
    """Levenshtein's distance between two strings."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            previous, row[j] = row[j], min(previous + (a != b), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def letters_right(word, text):
    """
    The reward of Flow-GRPO (https://github.com/yifan123/flow_grpo), times the number of letters: spaces and case do
    not count; a text that contains the word is right, any other wrong by its edit distance, up to the word's length.
    """
    word, text = word.lower(), text.replace(" ", "").lower()
    return len(word) if word in text else len(word) - min(edit_distance(word, text), len(word))


def outcomes(words, images):
    """What is kept of each picture, a character each: how many letters are right, of three."""
    texts = [read(image) for image in images]
    return {"letters": "".join(str(letters_right(*pair)) for pair in zip(words, texts, strict=True))}


def write_prompts(path, part, count):
    """`TIMES * count` prompts, each with the seed of its noise; a part with fewer words has some twice."""
    rng = random.Random(part)
    words = itertools.islice(itertools.cycle(split()[part]), TIMES * count)
    records = [{"task": "word", "prompt": caption(word), "word": word, "seed": rng.getrandbits(31)} for word in words]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_prompts(path):
    """The words of a file of [`write_prompts`], and its records."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record["word"] for record in records], records


if __name__ == "__main__":
    main(make_word, write_prompts)
