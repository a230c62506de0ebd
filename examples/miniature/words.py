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
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont
from world import SIZE, SUPERSAMPLING, draw_on_paper, main


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "evaluation"))
from ocr import text_score  # noqa: E402


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


def draw(word, rng=None, size=SIZE):
    """A picture of `size` x `size` pixels with `word` in its middle; with `rng` (`random.Random`) a noisy one."""

    def paint(pen, spread):
        font = ImageFont.load_default(FONT_SIZE * SUPERSAMPLING * (1 + spread(0.1)))
        x, y = (SIZE / 2 + spread(2)) * SUPERSAMPLING, (SIZE / 2 + spread(5)) * SUPERSAMPLING
        pen.text((x, y), word, tuple(round(channel + abs(spread(120))) for channel in INK), font, anchor="mm")

    return draw_on_paper(paint, rng, size)


def draw_truth(word, _rng):
    return draw(word)


def make_word(rng, noisy, part="train", size=SIZE):
    """A picture of a random word of a split, and its caption."""
    word = rng.choice(split()[part])
    return draw(word, rng if noisy else None, size), caption(word)


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


def letters_right(word, text):
    """How many of a word's three letters are right in a text: Flow-GRPO's OCR reward, times their number."""
    return round(len(word) * text_score(word, text))


def outcomes(words, images):
    """What is kept of each picture, a character each: how many letters are right, of three."""
    texts = [read(image) for image in images]
    return {"letters": "".join(str(letters_right(*pair)) for pair in zip(words, texts, strict=True))}


def write_prompts(path, part, count):
    """`TIMES * count` prompts, each with the seed of its noise; a part with fewer words has some twice."""
    rng = random.Random(part)
    words = itertools.islice(itertools.cycle(split()[part]), TIMES * count)
    records = [
        {"task": "word", "prompt": caption(word), "wanted_text": word, "seed": rng.getrandbits(31)} for word in words
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_prompts(path):
    """The words of a file of [`write_prompts`], and its records."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record["wanted_text"] for record in records], records


def reward(images, rows):
    """For `--reward words:reward=1` of ../rl, in this folder: the share of a word's letters that are right."""
    pairs = zip(images, rows, strict=True)
    return [text_score(row["wanted_text"], read(image)) for image, row in pairs]


if __name__ == "__main__":
    main(make_word, write_prompts)
