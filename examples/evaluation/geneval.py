# SPDX-License-Identifier: Apache-2.0
"""
GenEval: does an image show the objects that its prompt names, in their number, their colours, and their places?

    python examples/evaluation/score_images.py runs/soar --metrics geneval

for a folder of images of the prompts of GenEval's `evaluation_metadata.jsonl`, or in Python

    rows = GenEval("cuda")(images, records)     # records: rows of that file, one an image
    task_means(rows)                            # the tasks' means, and "overall", their mean

An image is searched for the 80 classes of COCO. Of each class those objects count whose confidence is above 0.3, or
above 0.9 in the task `counting`, at most the 16 most confident. Overlapping boxes stay: the original's non-maximum
suppression is off. Two readings of the prompt's requirements are offered:

- `score`, the original one. For each clause of `include` its `count` most confident objects of the class are taken.
  There must be that many. All must have the clause's colour, if it names one, and each must lie in the clause's
  relation to each object that was taken for the target clause, if it names one; a target that failed its own clause
  cannot be related to. More objects than `count` do no harm, unless a clause of `exclude` says from which number on.
- `strict`, the one of Flow-GRPO's reward server: the same, and of each class of `include` exactly `count` objects.

The score of the benchmark is `overall`: the mean of its six tasks' means, not the mean over images.

The detector's weights are those of the authors of Mask2Former, and the original's are those that OpenMMLab trained
for the same network, so scores are close to published ones, not the same. Compare models by one detector only.
The models see images in the original's sizes: Mask2Former with a shorter side of 800 pixels and a longer one of at
most 1333, CLIP as the square in the middle of an object's box. See `find_instances` for how the confidence is had.

Source: Ghosh, Hajishirzi, Schmidt, GenEval, arXiv 2310.11513, github.com/djghosh13/geneval; the strict reading: Liu et
al., Flow-GRPO, arXiv 2505.05470, github.com/yifan123/reward-server. This is written anew, on transformers alone.
"""

import itertools
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
)


TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

MIN_CONFIDENCE = 0.3
MIN_CONFIDENCE_COUNTING = 0.9
MAX_OBJECTS = 16  # of a class
POSITION_THRESHOLD = 0.1  # of the summed widths, or heights, of two objects: their centres may differ so much for free

COLOR_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
BACKGROUND = "#999"

DETECTION_SIZE = {"shortest_edge": 800, "longest_edge": 1333}  # that both trainings of the detector test with
SIZE_DIVISOR = 32  # of the detector's input, which is padded
MAX_DETECTIONS = 100  # pairs of query and class of an image

# COCO's 80 classes in COCO's order, by GenEval's names.
CLASSES = """\
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag,
tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis
racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog,
pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote,
computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush""".replace("\n", " ").split(", ")

# Other names of them that detectors of the hub have: COCO's own and, of the classes that VOC has too, VOC's.
OTHER_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
OTHER_NAMES |= {"motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "tvmonitor": "tv"}
OTHER_NAMES |= {"pottedplant": "potted plant", "diningtable": "dining table"}


# The rules, on plain data. A detected object is a tuple (box, confidence, mask): box [x0, y0, x1, y1] in pixels, where
# x1 and y1 are the first outside; mask a `np.ndarray` of the image's height and width, bool, which no rule looks at.


def check_record(record):
    """Raises `ValueError` for a row of metadata that is malformed, or has an unknown class, colour, relation, ..."""
    row = record.get("file_name") or record.get("prompt") or record

    def check(what, value, known):
        if value not in known:
            raise ValueError(f"{row}: {what} {value!r} is none of GenEval's: {', '.join(map(str, known))}")

    if not record.get("include"):
        raise ValueError(f"{row}: no `include`, so nothing to look for; generate the images from GenEval's metadata")
    check("tag", record.get("tag"), TASKS)
    for clause in [*record["include"], *(record.get("exclude") or [])]:
        position = clause.get("position") or ("", 0) if isinstance(clause, dict) else ()
        if len(position) != 2 or not isinstance(clause.get("count"), int) or clause["count"] < 1:
            raise ValueError(
                f"{row}: want a `class`, a `count` and perhaps a `position` of two in each clause: {clause}"
            )
        check("class", clause.get("class"), CLASSES)
    for index, clause in enumerate(record["include"]):
        if clause.get("color"):
            check("color", clause["color"], COLORS)
        if clause.get("position"):
            check("relation", clause["position"][0], RELATIONS)
            check("target", clause["position"][1], range(index))  # an earlier clause


def select(detections, task):
    """
    The objects that count: confident enough, most confident first, and no more than 16 of a class.

    Args:
        detections (`dict[str, list[tuple]]`): All detected objects, by class.
        task (`str`): One of `TASKS`.

    Returns:
        `dict[str, list[tuple]]`: Classes without such objects are left out.
    """
    threshold = MIN_CONFIDENCE_COUNTING if task == "counting" else MIN_CONFIDENCE
    selected = {}
    for name, objects in detections.items():
        if sure := [found for found in objects if found[1] > threshold]:
            selected[name] = sorted(sure, key=lambda found: found[1], reverse=True)[:MAX_OBJECTS]
    return selected


def relations(box, other):
    """
    Where `box` lies as seen from `other`: a set of none, one or two of `RELATIONS`.

    The offset between the centres, less a tenth of the summed widths, or heights, must be more than half the offset's
    length. So two objects on a diagonal, far apart for their size, are in two relations.
    """
    corners = np.array([box, other], dtype=float).reshape(2, 2, 2)  # box, corner, axis
    offset = np.subtract(*corners.mean(axis=1))
    free = POSITION_THRESHOLD * (corners[:, 1] - corners[:, 0]).sum(axis=0)
    beyond = np.sign(offset) * np.maximum(np.abs(offset) - free, 0)
    if np.all(np.abs(beyond) < 1e-3):  # of a pixel; the centres may coincide
        return set()
    dx, dy = beyond / np.linalg.norm(offset)
    return set(itertools.compress(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)))


def unmet(clause, group, groups, classify):
    """What is wrong with `group`, the objects taken for a clause of `include`, in words; `None` if it is met."""
    name, count = clause["class"], clause["count"]
    if len(group) < count:
        return f"expected {count} {name}, found {len(group)}"
    if clause.get("color"):
        colors = classify(group, name)
        if colors.count(clause["color"]) < count:
            return f"expected {count} {clause['color']} {name}, found {', '.join(colors)}"
    if clause.get("position"):
        relation, target = clause["position"]
        if groups[target] is None:
            return f"no target for {name} to be {relation}"
        for (box, *_), (other, *_) in itertools.product(group, groups[target]):
            found = relations(box, other)
            if relation not in found:
                return f"expected {name} {relation} target, found {' and '.join(sorted(found)) or 'no relation'}"
    return None


def judge(objects, record, classify):
    """
    Whether the objects are what the prompt asks for, in both readings.

    Args:
        objects (`dict[str, list[tuple]]`): From [`select`].
        record (`dict`): Row of GenEval's metadata that passes [`check_record`].
        classify (`Callable`): Of a list of objects and their class's name, a list of their colours.

    Returns:
        `tuple[bool, bool, str]`: right in the original reading, right in the strict one, and what is missing or
        wrong; where only the strict reading fails, what is too many; where none fails, the empty string.
    """
    wrong, too_many, groups = [], [], []
    for clause in record["include"]:
        found = objects.get(clause["class"], [])
        group = found[: clause["count"]]
        problem = unmet(clause, group, groups, classify)
        groups.append(group if problem is None else None)
        if problem is not None:
            wrong.append(problem)
        if len(found) > clause["count"]:
            too_many.append(f"strict: expected no more than {clause['count']} {clause['class']}, found {len(found)}")
    for clause in record.get("exclude") or []:
        number = len(objects.get(clause["class"], []))
        if number >= clause["count"]:
            wrong.append(f"expected less than {clause['count']} {clause['class']}, found {number}")
    return not wrong, not wrong and not too_many, "; ".join(wrong or too_many)


def soft_score(objects, record, classify):
    """
    Flow-GRPO's reward of GenEval, which rises with every step toward what is asked for.

    The mean of, for each clause of `include`, how near its number of objects is, `1 - |found - count| / count`; and,
    where it has a colour or a relation, 0 if the number is wrong, else `1 - |of the colour - count| / count`, and 1
    for a relation that holds. One that does not counts 0 and 1, as in Flow-GRPO's code.

    Args:
        objects, record, classify: See [`judge`].

    Returns:
        `float`: 1 for a picture that is right; there is no lower bound, as too many objects count below 0.

    Source: Flow-GRPO, arXiv 2505.05470, https://github.com/yifan123/flow_grpo.
    """
    scores, groups = [], []
    for clause in record["include"]:
        group, count = objects.get(clause["class"], []), clause["count"]
        groups.append(group if len(group) == count else None)
        scores.append(1 - abs(len(group) - count) / count)
        if len(group) != count:
            scores += [0.0] if clause.get("color") or clause.get("position") else []
            continue
        if clause.get("color"):
            scores.append(1 - abs(classify(group, clause["class"]).count(clause["color"]) - count) / count)
        if clause.get("position"):
            relation, target = clause["position"]
            pairs = itertools.product(group, groups[target] or [])
            holds = groups[target] and all(relation in relations(box, other) for (box, *_), (other, *_) in pairs)
            scores += [1.0] if holds else [0.0, 1.0]
    return float(np.mean(scores))


def task_means(rows, key="score"):
    """
    GenEval's result.

    Args:
        rows (`list[dict]`): What [`GenEval`] returns, of any number of images a prompt.
        key (`str`): The reading, "score" or "strict".

    Returns:
        `dict[str, float]`: the mean of each task that occurs, in the order of `TASKS`, and `overall`, their mean.
    """
    tasks = {task: [row[key] for row in rows if row["tag"] == task] for task in TASKS}
    means = {task: float(np.mean(values)) for task, values in tasks.items() if values}
    return means | {"overall": float(np.mean(list(means.values())))}


# The colour classifier.


def crop_object(image, box, mask):
    """The part of `image` in `box`, with all that is not in `mask` painted grey, `BACKGROUND`."""
    crop, inside = image.crop(box), Image.fromarray(mask).crop(box)
    return Image.composite(crop, Image.new("RGB", crop.size, BACKGROUND), inside)


class ColorClassifier:
    """
    Zero-shot classification by CLIP. Of the ten colours, an object gets the one whose text is most similar.

    A colour's text is the mean of the normalised embeddings of `COLOR_TEMPLATES`, so it depends on the class's name.
    """

    def __init__(self, clip, device):
        self.processor = CLIPImageProcessorPil.from_pretrained(clip)
        self.tokenizer = AutoTokenizer.from_pretrained(clip)
        self.model = CLIPModel.from_pretrained(clip, dtype=torch.float32, use_safetensors=True).to(device).eval()
        self.texts = {}

    def embed_colors(self, name):
        """`torch.Tensor` of shape `(10, D)`: directions of the colours of class `name`."""
        texts = [template.format(color=color, name=name) for color in COLORS for template in COLOR_TEMPLATES]
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.model.device)
        features = F.normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)
        return F.normalize(features.unflatten(0, (len(COLORS), len(COLOR_TEMPLATES))).mean(dim=1), dim=-1)

    @torch.no_grad()
    def __call__(self, image, objects, name):
        """The colours of `objects`, at least one, of class `name` in `image`: a list of names."""
        if name not in self.texts:
            self.texts[name] = self.embed_colors(name)
        crops = [crop_object(image, box, mask) for box, _, mask in objects]
        pixels = self.processor(images=crops, return_tensors="pt").to(self.model.device)
        features = self.model.get_image_features(**pixels).pooler_output
        similarities = features @ self.texts[name].T
        if not similarities.isfinite().all():
            raise ValueError("the colour classifier predicts numbers that are not finite")
        return [COLORS[index] for index in similarities.argmax(dim=1).tolist()]


# The detector.


def find_instances(class_logits, mask_logits, padded_size, resized_size, size):
    """
    The objects in the output of a Mask2Former for one image, as the original's detector finds them.

    The 100 most probable pairs of query and class are candidates. A candidate's mask is where its logit, interpolated
    to the size of the image, is positive. Its confidence is the class's probability times the mean probability of the
    pixels in the mask. Its box is the smallest around the mask. Masks may overlap.

    Args:
        class_logits (`torch.Tensor` of shape `(Q, C + 1)`): The last class is no object.
        mask_logits (`torch.Tensor` of shape `(Q, h, w)`): At any resolution, of the padded input.
        padded_size (`tuple[int, int]`): Height and width of the input of the model.
        resized_size (`tuple[int, int]`): Height and width of its upper left part that shows the image.
        size (`tuple[int, int]`): Height and width of the image.

    Returns:
        `list[tuple[int, list[int], float, np.ndarray]]`: class, box, confidence, and mask of shape `size`, bool, of
        each whose confidence is above 0.3, the least that any task asks for.

    Raises:
        `ValueError`: If a number is not finite: this is no image without objects.
    """
    if not (class_logits.isfinite().all() and mask_logits.isfinite().all()):
        raise ValueError("the detector predicts numbers that are not finite")
    probabilities = class_logits.softmax(dim=-1)[:, :-1]
    top, pairs = probabilities.flatten().topk(min(MAX_DETECTIONS, probabilities.numel()))
    found = []
    for probability, pair in zip(top.tolist(), pairs.tolist(), strict=True):
        if probability <= MIN_CONFIDENCE:  # and so is the confidence
            break
        query, label = divmod(pair, probabilities.shape[1])
        logits = F.interpolate(mask_logits[None, None, query], padded_size, mode="bilinear")
        logits = F.interpolate(logits[..., : resized_size[0], : resized_size[1]], size, mode="bilinear")[0, 0]
        mask = logits > 0
        if not mask.any():
            continue
        confidence = probability * logits.sigmoid()[mask].mean().item()
        if confidence > MIN_CONFIDENCE:
            (y0, x0), (y1, x1) = (ends.tolist() for ends in mask.nonzero().aminmax(dim=0))
            found.append((label, [x0, y0, x1 + 1, y1 + 1], confidence, mask.cpu().numpy()))
    return found


class Detector:
    """A Mask2Former of the hub that was trained on COCO's instances."""

    def __init__(self, name, device):
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "mask2former":
            raise ValueError(f"detector {name} is a {config.model_type}; it must be a Mask2Former")
        labels = [config.id2label[index] for index in range(config.num_labels)]
        self.classes = [OTHER_NAMES.get(label, label) for label in labels]
        if missing := set(CLASSES).difference(self.classes):
            raise ValueError(f"detector {name} does not know {', '.join(sorted(missing))}")
        self.processor = Mask2FormerImageProcessorPil.from_pretrained(name)
        load = Mask2FormerForUniversalSegmentation.from_pretrained
        self.model = load(name, dtype=torch.float32, use_safetensors=True).to(device).eval()

    @torch.no_grad()
    def __call__(self, image):
        """The objects in `image`, by class; see [`find_instances`] and, for their form, [`select`]."""
        # The processor itself would stretch the image to multiples of 32. Here it keeps its shape, and is padded.
        inputs = self.processor(images=image, size=DETECTION_SIZE, size_divisor=0, return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.model.device)
        height, width = pixels.shape[2:]
        pixels = F.pad(pixels, (0, -width % SIZE_DIVISOR, 0, -height % SIZE_DIVISOR))
        output = self.model(pixel_values=pixels)
        logits = output.class_queries_logits[0], output.masks_queries_logits[0]
        detections = {}
        for label, *found in find_instances(*logits, pixels.shape[2:], (height, width), image.size[::-1]):
            detections.setdefault(self.classes[label], []).append(tuple(found))
        return detections


class GenEval:
    """
    Scores images by GenEval, see above.

    Args:
        device (`str` or `torch.device`): Where the models run, in float32.
        detector (`str`): A Mask2Former, trained on COCO's instances: a hub id or a folder.
        clip (`str`): A CLIP that names the colours: a hub id or a folder.

    Source: arXiv 2310.11513, github.com/djghosh13/geneval.
    """

    files = [
        ("facebook/mask2former-swin-small-coco-instance", "model.safetensors", 0.28),
        ("openai/clip-vit-large-patch14", "model.safetensors", 1.71),
    ]
    packages = ["scipy"]  # transformers makes no Mask2Former without it

    @staticmethod
    def check(records):
        """Raises `ValueError` for the first row that does not fit, see [`check_record`]."""
        for record in records:
            check_record(record)

    def __init__(self, device, detector=files[0][0], clip=files[1][0]):
        self.detect = Detector(detector, device)
        self.classify = ColorClassifier(clip, device)

    def __call__(self, images, records):
        """
        Judge a batch.

        Args:
            images (`list[PIL.Image.Image]`): In RGB.
            records (`list[dict]`): For each its prompt's row of GenEval's metadata: `tag`, `include`, `exclude`.

        Returns:
            `list[dict]`: `score` and `strict`, each 1.0 or 0.0; `soft`, see [`soft_score`]; `tag`; `reason`, see
            [`judge`]; and `detections`, all that counted, each with `class`, `confidence` and `box`, in pixels
            `[x0, y0, x1, y1]`.

        Raises:
            `ValueError`: See [`check_record`]; or if a model's numbers are not finite.
        """
        self.check(records)
        rows = []
        for image, record in zip(images, records, strict=True):
            objects = select(self.detect(image), record["tag"])
            correct, strict, reason = judge(objects, record, partial(self.classify, image))
            row = {"score": float(correct), "strict": float(strict), "tag": record["tag"], "reason": reason}
            row["soft"] = soft_score(objects, record, partial(self.classify, image))
            row["detections"] = [
                {"class": name, "confidence": round(confidence, 4), "box": box}
                for name, group in objects.items()
                for box, confidence, _ in group
            ]
            rows.append(row)
        return rows
