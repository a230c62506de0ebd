# SPDX-License-Identifier: Apache-2.0
"""
OCR accuracy: is the text that a prompt quotes written in the image? PP-OCR reads; its weights come with `rapidocr`.

The score is the reward of Flow-GRPO (arXiv 2505.05470, https://github.com/yifan123/flow_grpo), which the SOAR paper
reports, too. That code reads with PaddleOCR; `rapidocr` runs a newer PP-OCR on onnxruntime, so a page that is hard to
read may score otherwise here and there.
"""

import numpy as np


MAX_RATIO = 20  # of the sides: PP-OCR enlarges the shorter one, whatever becomes of the other


def edit_distance(one, other):
    """Levenshtein's distance between two strings."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            previous, row[j] = row[j], min(previous + (a != b), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def text_score(wanted, text):
    """
    How much of a wanted text was read, in [0, 1]: spaces and case do not count; 1 where `text` contains it, else 1
    less its edit distance as a part of its length.

    Raises:
        `ValueError`: If nothing is wanted.
    """
    wanted, text = (string.replace(" ", "").lower() for string in (wanted, text))
    if not wanted:
        raise ValueError("no text is asked for")
    return 1.0 if wanted in text else 1 - min(edit_distance(wanted, text), len(wanted)) / len(wanted)


def wanted_text(record):
    """
    The text that a row of `metadata.jsonl` asks for: its `wanted_text`, or what stands between the first two straight
    or curly double quotes of its prompt.

    Raises:
        `ValueError`: If there is none.
    """
    quoted = record["text"].replace("“", '"').replace("”", '"').split('"')
    text = record.get("wanted_text", quoted[1] if len(quoted) > 2 else "")
    if not isinstance(text, str) or not text.replace(" ", ""):
        raise ValueError(f'the prompt {record["text"]!r} has no text in double quotes, and its row no "wanted_text"')
    return text


class OCR:
    """One score an image, and what was read."""

    files = []
    packages = ["rapidocr", "onnxruntime"]

    @staticmethod
    def check(records):
        """Raises `ValueError` where a prompt asks for no text."""
        for record in records:
            wanted_text(record)

    def __init__(self, device):
        from rapidocr import RapidOCR

        self.reader = RapidOCR(params={"Global.log_level": "error"})

    def __call__(self, images, records):
        rows = []
        for image, record in zip(images, records, strict=True):
            wanted = wanted_text(record)
            if max(image.size) > MAX_RATIO * min(image.size):
                raise ValueError(f"an image of {image.width} x {image.height} pixels is too long to be read")
            found = self.reader(np.asarray(image)[:, :, ::-1])  # it wants BGR
            read = " ".join(found.txts or [])
            rows.append({"score": text_score(wanted, read), "wanted": wanted, "read": read})
        return rows
