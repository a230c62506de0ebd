# SPDX-License-Identifier: Apache-2.0
"""GenEval: its rules, on detections made by hand and from its metadata; its detector and colour classifier, tiny."""

import copy
import json
import math
from types import SimpleNamespace

import geneval
import numpy as np
import pytest
import torch
from harness import ROOT
from make_tiny_sd3 import make_clip_tokenizer
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
)


METADATA = ROOT / "tests" / "data" / "geneval_metadata.jsonl"
ROWS = [
    {"tag": "single_object", "include": [{"class": "computer mouse", "count": 1}]},
    {"tag": "two_object", "include": [{"class": "tv", "count": 1}, {"class": "bicycle", "count": 1}]},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
    },
    {"tag": "colors", "include": [{"class": "fire hydrant", "count": 1, "color": "blue"}]},
    {
        "tag": "position",
        "include": [{"class": "couch", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
    },
    {
        "tag": "position",
        "include": [{"class": "chair", "count": 1}, {"class": "bench", "count": 1, "position": ["above", 0]}],
    },
    {
        "tag": "color_attr",
        "include": [
            {"class": "wine glass", "count": 1, "color": "purple"},
            {"class": "apple", "count": 1, "color": "black"},
        ],
    },
]
SINGLE, TWO, COUNTING, COLOR, RIGHT, ABOVE, ATTRIBUTES = ROWS

# What the hub's Mask2Former calls classes otherwise than GenEval, and what COCO does.
HUB = {"motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "tv": "tvmonitor"}
HUB |= {"potted plant": "pottedplant", "dining table": "diningtable"}
COCO = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
SHIFTS = {"left of": (-60, 0), "right of": (60, 0), "above": (0, -60), "below": (0, 60)}


def thing(x=100, y=100, confidence=0.95, color=None, size=10):
    """A detected square; no rule looks at the mask, so that its place can tell the colour."""
    return [x - size / 2, y - size / 2, x + size / 2, y + size / 2], confidence, color


def tell_colors(group, name):
    return [color for *_, color in group]


def perfect(row):
    """Detections that are just what `row` asks for."""
    places, detections = [], {}
    for clause in row["include"]:
        relation, target = clause.get("position", (None, None))
        x, y = (100, 100) if target is None else places[target]
        dx, dy = SHIFTS.get(relation, (0, 0))
        places.append((x + dx, y + dy))
        objects = [thing(x + dx, y + dy, color=clause.get("color")) for _ in range(clause["count"])]
        detections.setdefault(clause["class"], []).extend(objects)
    return detections


def outcome(row, detections):
    geneval.GenEval.check([row])
    correct, strict, reason = geneval.judge(geneval.select(detections, row["tag"]), row, tell_colors)
    assert (reason == "") == strict and "\n" not in reason
    return correct, strict


def soft(row, detections):
    return geneval.soft_score(geneval.select(detections, row["tag"]), row, tell_colors)


def test_soft_score_rises_with_every_step():
    """1 where everything is right; a part for a part; below 0 for far too many; a failed relation counts half."""
    assert all(soft(row, perfect(row)) == 1 for row in ROWS)
    assert soft(TWO, {"tv": [thing()]}) == 0.5 and soft(TWO, {}) == 0
    assert soft(COUNTING, {"clock": [thing()]}) == 0.5 and soft(COUNTING, {"clock": [thing()] * 5}) == -0.5
    assert soft(COLOR, {"fire hydrant": [thing(color="red")]}) == 0.5  # one, of another colour
    assert soft(COLOR, {}) == 0 and soft(COLOR, {"fire hydrant": [thing(color="blue")] * 2}) == 0
    reverse = {"couch": [thing(160)], "dog": [thing(100)]}
    assert soft(RIGHT, reverse) == pytest.approx((1 + 1 + 0 + 1) / 4)
    assert soft(RIGHT, {"dog": [thing()]}) == pytest.approx((0 + 1 + 0 + 1) / 4)
    half = perfect(ATTRIBUTES) | {"apple": [thing(color="green")]}
    assert soft(ATTRIBUTES, half) == pytest.approx(3 / 4)


def check_row(row):
    """What is just right scores 1; each single thing that is amiss scores 0; one object more is a strict 0."""
    assert outcome(row, perfect(row)) == (True, True), row
    for index, clause in enumerate(row["include"]):
        name, missing = clause["class"], perfect(row)
        missing[name].pop()
        assert outcome(row, missing) == (False, False), row
        unsure = perfect(row)
        unsure[name][-1] = (unsure[name][-1][0], 0.9 if row["tag"] == "counting" else 0.3, clause.get("color"))
        assert outcome(row, unsure) == (False, False), row
        more = perfect(row)
        more[name].append(thing(0, 0, confidence=0.93))
        assert outcome(row, more) == (row["tag"] != "counting", False), row
        for other in geneval.COLORS if "color" in clause else []:
            changed = copy.deepcopy(row)
            changed["include"][index]["color"] = other
            assert outcome(row, perfect(changed)) == (other == clause["color"],) * 2, row
        for other in geneval.RELATIONS if "position" in clause else []:
            changed = copy.deepcopy(row)
            changed["include"][index]["position"][0] = other
            assert outcome(row, perfect(changed)) == (other == clause["position"][0],) * 2, row


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["tag"])
def test_rows(row):
    check_row(row)


def test_all_of_geneval():
    """Every prompt of the benchmark; and it has the 80 classes, no other."""
    rows = [json.loads(line) for line in METADATA.read_text().splitlines()]
    assert len(rows) == 553
    for row in rows:
        check_row(row)
    names = {clause["class"] for row in rows for clause in row["include"] + row.get("exclude", [])}
    assert names == set(geneval.CLASSES)


def test_class_names():
    """Names of COCO and of the hub's detector lead one to one to GenEval's."""
    assert len(geneval.CLASSES) == len(set(geneval.CLASSES)) == 80
    assert geneval.OTHER_NAMES == {other: name for name, other in (HUB | COCO).items()}
    assert geneval.OTHER_NAMES.keys().isdisjoint(geneval.CLASSES)
    assert set(geneval.OTHER_NAMES.values()) <= set(geneval.CLASSES)


CASES = {
    "nothing": (SINGLE, {}, (False, False), "expected 1 computer mouse, found 0"),
    "another class": (SINGLE, {"tv": [thing()]}, (False, False), "expected 1 computer mouse, found 0"),
    "others around": (SINGLE, {"computer mouse": [thing()], "tv": [thing()]}, (True, True), ""),
    "one more": (
        SINGLE,
        {"computer mouse": [thing(), thing()]},
        (True, False),
        "strict: expected no more than 1 computer mouse, found 2",
    ),
    "many more, capped": (
        SINGLE,
        {"computer mouse": [thing()] * 20},
        (True, False),
        "strict: expected no more than 1 computer mouse, found 16",
    ),
    "both missing": (TWO, {}, (False, False), "expected 1 tv, found 0; expected 1 bicycle, found 0"),
    "one of two": (TWO, {"tv": [thing(confidence=0.31)]}, (False, False), "expected 1 bicycle, found 0"),
    "too few": (COUNTING, {"clock": [thing()]}, (False, False), "expected 2 clock, found 1"),
    "right count": (COUNTING, {"clock": [thing()] * 2 + [thing(confidence=0.9)] * 9}, (True, True), ""),
    "too many": (COUNTING, {"clock": [thing()] * 3}, (False, False), "expected less than 3 clock, found 3"),
    "wrong color": (
        COLOR,
        {"fire hydrant": [thing(color="red")]},
        (False, False),
        "expected 1 blue fire hydrant, found red",
    ),
    "most confident has the color": (
        COLOR,
        {"fire hydrant": [thing(color="red", confidence=0.8), thing(color="blue", confidence=0.9)]},
        (True, False),
        "strict: expected no more than 1 fire hydrant, found 2",
    ),
    "most confident has another color": (
        COLOR,
        {"fire hydrant": [thing(color="red", confidence=0.9), thing(color="blue", confidence=0.8)]},
        (False, False),
        "expected 1 blue fire hydrant, found red",
    ),
    "colors swapped": (
        ATTRIBUTES,
        {"wine glass": [thing(color="black")], "apple": [thing(color="purple")]},
        (False, False),
        "expected 1 purple wine glass, found black; expected 1 black apple, found purple",
    ),
    "within the threshold": (
        RIGHT,
        {"couch": [thing(100)], "dog": [thing(104)]},
        (False, False),
        "expected dog right of target, found no relation",
    ),
    "beyond the threshold": (RIGHT, {"couch": [thing(100)], "dog": [thing(105)]}, (True, True), ""),
    "wrong side": (
        RIGHT,
        {"couch": [thing(100)], "dog": [thing(60, 60)]},
        (False, False),
        "expected dog right of target, found above and left of",
    ),
    "diagonal": (RIGHT, {"couch": [thing(100)], "dog": [thing(140, 140)]}, (True, True), ""),
    "target missing": (
        RIGHT,
        {"dog": [thing()]},
        (False, False),
        "expected 1 couch, found 0; no target for dog to be right of",
    ),
    "related to the most confident target": (
        ABOVE,
        {"chair": [thing(100, 0, confidence=0.8), thing(100, 200, confidence=0.9)], "bench": [thing(100, 100)]},
        (True, False),
        "strict: expected no more than 1 chair, found 2",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_judgement(case):
    row, detections, expected, reason = CASES[case]
    assert geneval.judge(geneval.select(detections, row["tag"]), row, tell_colors) == (*expected, reason)


def test_several_of_a_kind():
    """Clauses that the benchmark's prompts do not have: all objects of a group must fit, and in all pairs."""
    clauses = [{"class": "cat", "count": 2}, {"class": "dog", "count": 2, "color": "red", "position": ["below", 0]}]
    row = {"tag": "position", "include": clauses, "exclude": [{"class": "cow", "count": 1}]}
    cats, dogs = (
        [thing(0, color="black"), thing(50, color="black")],
        [thing(10, 190, color="red"), thing(40, 190, color="red")],
    )
    assert outcome(row, {"cat": cats, "dog": dogs}) == (True, True)
    assert outcome(row, {"cat": cats, "dog": dogs, "cow": [thing()]}) == (False, False)
    assert outcome(row, {"cat": cats, "dog": dogs, "cow": [thing(confidence=0.3)]}) == (True, True)
    assert outcome(row, {"cat": cats, "dog": [dogs[0], thing(40, 190, color="blue")]}) == (False, False)
    assert outcome(row, {"cat": cats, "dog": [dogs[0], thing(40, 10, color="red")]}) == (False, False)
    assert outcome(row, {"cat": [cats[0], thing(50, 300, color="black")], "dog": dogs}) == (False, False)
    apart = {"cat": [cats[0], thing(200, color="black")], "dog": [dogs[0], thing(200, 190, color="red")]}
    assert outcome(row, apart) == (False, False)  # each dog is below one cat, and beside the other
    painted = copy.deepcopy(row)
    painted["include"][0]["color"] = "white"  # a target that fails its own clause
    correct, _, reason = geneval.judge({"cat": cats, "dog": dogs}, painted, tell_colors)
    assert not correct and reason.endswith("no target for dog to be below")


def test_selection():
    detections = {
        "cat": [thing(i, confidence=0.31 + 0.03 * i) for i in range(20)],
        "dog": [thing(confidence=0.3)],
        "cow": [thing(confidence=0.3000001), thing(confidence=0.9), thing(confidence=0.9000001)],
    }
    found = geneval.select(detections, "two_object")
    assert [round(x0 + 5) for (x0, *_), *_ in found["cat"]] == list(range(19, 3, -1))  # the 16 best, best first
    assert [confidence for _, confidence, _ in found["cow"]] == [0.9000001, 0.9, 0.3000001] and len(found) == 2
    assert geneval.select(detections, "counting") == {"cow": [thing(confidence=0.9000001)]}


@pytest.mark.parametrize(
    ("dx", "dy", "size", "expected"),
    [
        (0, 0, 10, set()),
        (1.9, 0, 10, set()),  # less than a tenth of 10 + 10
        (4, 0, 10, set()),  # (4 - 2) / 4 is not more than a half
        (4.1, 0, 10, {"right of"}),
        (-4.1, 0, 10, {"left of"}),
        (0, -4.1, 10, {"above"}),
        (0, 4.1, 10, {"below"}),
        (4.1, 0, 12, set()),
        (6.8, 6.8, 10, set()),  # (6.8 - 2) / 9.6
        (6.9, 6.9, 10, {"right of", "below"}),  # (6.9 - 2) / 9.8
        (-20, -9, 10, {"left of"}),
    ],
)
def test_relations(dx, dy, size, expected):
    assert geneval.relations(thing(50 + dx, 50 + dy, size=size)[0], thing(50, 50, size=10)[0]) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tag": "shapes"}, "prompt 7: tag 'shapes' is none of GenEval's: single_object, "),
        ({"include": []}, "prompt 7: no `include`"),
        (
            {"include": [{"class": "mouse", "count": 1}]},
            "prompt 7: class 'mouse' is none of GenEval's: person, ",
        ),
        ({"exclude": [{"class": "unicorn", "count": 1}]}, "prompt 7: class 'unicorn' is none"),
        ({"include": ["cat"]}, "prompt 7: want a `class`, a `count` and"),
        ({"include": [{"class": "cat"}]}, "prompt 7: want a `class`, a `count` and"),
        ({"include": [{"count": 1}]}, "prompt 7: class None is none"),
        (
            {"include": [{"class": "cat", "count": 1, "position": ["above"]}]},
            "prompt 7: want a `class`, a `count` and",
        ),
        ({"include": [{"class": "tv", "count": 1, "color": "gray"}]}, "prompt 7: color 'gray' is none"),
        ({"include": [{"class": "tv", "count": 1, "position": ["near", 0]}]}, "prompt 7: relation 'near' is none"),
        ({"include": [{"class": "tv", "count": 1, "position": ["above", 0]}]}, "prompt 7: target 0 is none"),
    ],
)
def test_bad_records_are_refused(change, message):
    with pytest.raises(ValueError) as error:
        geneval.check_record(SINGLE | {"prompt": "prompt 7"} | change)
    assert str(error.value).startswith(message)


def test_task_means():
    rows = [{"tag": "counting", "score": 1.0, "strict": 0.0}] * 3 + [{"tag": "counting", "score": 0.0, "strict": 0.0}]
    rows += [{"tag": "single_object", "score": 1.0, "strict": 1.0}]
    means = geneval.task_means(rows)
    assert means == {"single_object": 1, "counting": 0.75, "overall": 0.875} and list(means)[-1] == "overall"
    assert geneval.task_means(rows, "strict") == {"single_object": 1, "counting": 0, "overall": 0.5}


def test_crops():
    """The object keeps its pixels; the rest of its box is #999."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    mask = np.zeros((20, 30), bool)
    mask[5:9, 10:20] = True
    mask[5, 10] = False
    crop = np.asarray(geneval.crop_object(Image.fromarray(pixels), [10, 5, 20, 9], mask))
    expected = pixels[5:9, 10:20].copy()
    expected[0, 0] = 0x99
    assert np.array_equal(crop, expected)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Folder of a CLIP with random weights, large enough that crops get different colours."""
    tokenizer = make_clip_tokenizer(77, pad_token="<|endoftext|>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPConfig(
        text_config=sizes | ids | {"vocab_size": len(tokenizer)},
        vision_config=sizes | {"patch_size": 32},
        projection_dim=16,
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    for parameter in model.parameters():
        parameter.data.mul_(4)
    folder = tmp_path_factory.mktemp("clip")
    for part in (model, tokenizer, CLIPImageProcessorPil()):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """Folder of a Mask2Former with random weights that is sure of what it sees."""
    backbone = SwinConfig(
        embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, out_features=[f"stage{i}" for i in (1, 2, 3, 4)]
    )
    labels = [(HUB | COCO).get(name, name) for name in geneval.CLASSES]
    config = Mask2FormerConfig(
        backbone_config=backbone,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        num_attention_heads=2,
        encoder_layers=1,
        decoder_layers=2,
        num_queries=20,
    )
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(config)
    model.class_predictor.weight.data.normal_(std=2)
    folder = tmp_path_factory.mktemp("detector")
    model.save_pretrained(folder)
    # Sizes that must not be used: the original tests at 800.
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return str(folder)


def draw(width=96, height=64, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)


def resize_and_normalise(image, size, filter, mean, std):
    pixels = np.asarray(image.resize(size, filter), dtype=np.float64) / 255
    return torch.tensor(((pixels - mean) / std).transpose(2, 0, 1)).float()[None]


def test_colors(clip):
    """One text and one crop at a time, with PIL alone, come to the same colours; no torchvision is needed."""
    classifier = geneval.ColorClassifier(clip, "cpu")
    image = draw(300, 200)
    boxes = [[0, 0, 300, 200], [10, 10, 50, 190], [100, 50, 290, 90], [200, 100, 240, 140], [150, 0, 290, 30]]
    masks = np.random.default_rng(1).random((5, 200, 300)) < np.array([0.9, 0.7, 0.5, 0.9, 0.1])[:, None, None]
    objects = [(box, 0.9, mask) for box, mask in zip(boxes, masks, strict=True)]
    found = classifier(image, objects, "green square")

    processor = classifier.processor
    with torch.no_grad():
        directions = []
        for color in geneval.COLORS:
            texts = [f"a photo of a {color} green square", f"a photo of a {color}-colored green square"]
            texts.append(f"a photo of a {color} object")
            tokens = [torch.tensor([classifier.tokenizer(text)["input_ids"]]) for text in texts]
            embedded = [classifier.model.get_text_features(ids).pooler_output[0] for ids in tokens]
            directions.append(sum(vector / vector.norm() for vector in embedded))
        directions = torch.stack([vector / vector.norm() for vector in directions])
        for (box, _, mask), color in zip(objects, found, strict=True):
            crop = geneval.crop_object(image, box, mask)
            scale = 224 / min(crop.size)
            width, height = (int(side * scale) for side in crop.size)
            pixels = resize_and_normalise(
                crop, (width, height), Image.Resampling.BICUBIC, processor.image_mean, processor.image_std
            )
            left, top = (width - 224) // 2, (height - 224) // 2
            pixels = pixels[..., top : top + 224, left : left + 224]
            similarity = directions @ classifier.model.get_image_features(pixels).pooler_output[0]
            # Random weights may see two colours as one.
            assert similarity[geneval.COLORS.index(color)] > similarity.max() - 1e-4
    assert len(set(found)) > 2
    assert found == classifier(image, objects, "green square")
    assert torch.equal(classifier.texts["green square"], classifier.embed_colors("green square"))
    classifier(image, objects, "red star")  # each class has texts of its own
    assert torch.equal(classifier.texts["red star"], classifier.embed_colors("red star"))
    assert not torch.equal(classifier.texts["green square"], classifier.texts["red star"])


def test_confidence_is_that_of_transformers():
    """At the one size that transformers' own post-processing works at, both find the same."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20, 11, generator=generator)
    masks = torch.randn(20, 6, 6, generator=generator) - 0.5
    masks = torch.nn.functional.interpolate(masks[None], (384, 384), mode="bilinear")[0]
    masks[3] = -1  # nothing
    size = (384, 384)
    found = geneval.find_instances(logits, masks, size, size, size)

    output = SimpleNamespace(class_queries_logits=logits[None], masks_queries_logits=masks[None])
    expected = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        output, threshold=0.3, target_sizes=[size], return_binary_maps=True
    )[0]
    assert len(found) == len(expected["segments_info"]) > 5
    expected = sorted(
        zip(expected["segments_info"], expected["segmentation"], strict=True), key=lambda e: e[0]["score"]
    )
    for (label, box, confidence, mask), (info, other) in zip(sorted(found, key=lambda f: f[2]), expected, strict=True):
        assert label == info["label_id"] and abs(confidence - info["score"]) < 1e-5
        assert np.array_equal(mask, other.numpy() == 1)
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        assert box == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_masks_are_scaled_to_the_image():
    """Of an image 60 high and 90 wide, the model sees 80 x 120 in 96 x 128, and its masks are a quarter of that."""
    class_logits = torch.full((4, 3), -9.0)
    class_logits[[0, 1, 2, 3], [0, 1, 1, 2]] = 9
    class_logits[1, 0] = 9  # as sure of class 0: two candidates, of half the confidence
    masks = torch.full((4, 24, 32), -8.0)
    masks[0, 4:12, 8:20] = 8
    masks[1] = -1
    masks[1, 12:20, 20:30] = 1
    masks[2, 21:, :] = 8  # in the padding
    masks[3] = 8  # no object
    found = geneval.find_instances(class_logits, masks, (96, 128), (80, 120), (60, 90))
    assert [label for label, *_ in found] == [0, 0, 1] or [label for label, *_ in found] == [0, 1, 0]
    (_, box, confidence, mask), *halves = found
    assert box == [24, 12, 60, 36] and mask.shape == (60, 90) and confidence > 0.9
    assert mask[12:36, 24:60].mean() > 0.98 and not mask[:12].any() and mask.dtype == bool
    for _, box, confidence, _ in halves:
        assert box[2:] == [90, 60] and 0.3 < confidence < 0.5 * torch.tensor(1.0).sigmoid()
    class_logits[1, 2] = 9  # a third of the probability, and less of it in the mask
    assert len(geneval.find_instances(class_logits, masks, (96, 128), (80, 120), (60, 90))) == 1


def test_at_most_100_candidates():
    logits = torch.zeros(120, 4)
    logits[:, 1] = torch.linspace(2, 9, 120)
    found = geneval.find_instances(logits, torch.ones(120, 2, 2), (2, 2), (2, 2), (2, 2))
    assert len(found) == 100 and found[-1][2] > 0.7 * logits[20].softmax(0)[1]


@pytest.mark.parametrize(("size", "resized"), [((512, 512), (800, 800)), ((1344, 768), (1332, 762)), ((96, 64), None)])
def test_the_detector_sees_the_image_at_800_pixels(detector, size, resized):
    """Resized by PIL in its own shape, whatever size the detector's files name, and padded to multiples of 32."""
    detect = geneval.Detector(detector, "cpu")
    resized = resized or (1200, 800)
    seen = []

    def model(pixel_values):
        seen.append(pixel_values)
        shape = [side // 4 for side in pixel_values.shape[2:]]
        masks = torch.full((1, 1, *shape), 4.0)
        return SimpleNamespace(class_queries_logits=torch.eye(81)[None, 4:5] * 20, masks_queries_logits=masks)

    model.device = "cpu"
    detect.model = model
    image = draw(*size)
    found = detect(image)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    expected = resize_and_normalise(image, resized, Image.Resampling.BILINEAR, mean, std)
    assert all(
        side % 32 == 0 and side - 32 < want for side, want in zip(seen[0].shape[2:], resized[::-1], strict=True)
    )
    assert torch.allclose(seen[0][..., : resized[1], : resized[0]], expected, atol=1e-5)
    assert not seen[0][..., resized[1] :, :].any() and not seen[0][..., resized[0] :].any()
    [(name, [(box, confidence, mask)])] = found.items()
    assert (name, box, mask.shape, mask.all()) == ("airplane", [0, 0, *size], size[::-1], True)
    assert confidence == pytest.approx(torch.tensor(4.0).sigmoid().item(), abs=1e-4)


def test_scores_images(detector, clip):
    """From files to rows, twice the same."""
    scorer = geneval.GenEval("cpu", detector=detector, clip=clip)
    images = [draw(), draw(64, 64, seed=1)]
    found = [scorer.detect(image) for image in images]
    assert sum(map(len, found)) > 1
    for image, objects in zip(images, found, strict=True):
        for box, confidence, mask in [thing for group in objects.values() for thing in group]:
            x0, y0, x1, y1 = box
            assert 0 <= x0 < x1 <= image.width and 0 <= y0 < y1 <= image.height and 0.3 < confidence <= 1
            assert mask[y0:y1, x0:x1].sum() == mask.sum() > 0 and mask.shape == image.size[::-1]
    name, group = next(iter(found[0].items()))
    [color] = scorer.classify(images[0], group[:1], name)
    record = {"tag": "colors", "include": [{"class": name, "count": 1, "color": color}]}
    other = {"tag": "colors", "include": [{"class": name, "count": 1, "color": {"red": "blue"}.get(color, "red")}]}
    rows = scorer([images[0]] * 2, [record, other])
    assert [row["score"] for row in rows] == [1, 0] and rows[0]["strict"] == (len(group) == 1)
    assert json.loads(json.dumps(rows)) == rows == scorer([images[0]] * 2, [record, other])
    for row in rows:
        assert row.keys() == {"score", "strict", "soft", "tag", "reason", "detections"} and row["tag"] == "colors"
        assert {d["class"] for d in row["detections"]} == set(found[0])
    assert rows[1]["reason"].endswith(f"found {color}")
    with pytest.raises(ValueError, match="class 'unicorn' is none"):
        scorer(images[:1], [{"tag": "colors", "include": [{"class": "unicorn", "count": 1}]}])


@pytest.mark.parametrize("part", ["class_predictor", "mask_embedder", "visual_projection"])
def test_numbers_that_are_not_finite_give_no_score(detector, clip, part):
    """Of the detector's classes, its masks, or the colours: an image without objects is another thing."""
    scorer = geneval.GenEval("cpu", detector=detector, clip=clip)
    name, group = next(iter(scorer.detect(draw()).items()))
    record = {"tag": "colors", "include": [{"class": name, "count": len(group), "color": "red"}]}
    scorer([draw()], [record])
    for model in (scorer.detect.model, scorer.classify.model):
        for parameter in (value for key, value in model.named_parameters() if part in key):
            parameter.data.fill_(math.nan)
    with pytest.raises(ValueError, match="numbers that are not finite"):
        scorer([draw()], [record])


def test_rows_report_what_counted():
    """The least confident are not in the row, and the colours are asked of the right image."""
    scorer = geneval.GenEval.__new__(geneval.GenEval)
    scorer.detect = lambda image: {"clock": [thing(confidence=0.95123), thing(confidence=0.8)], "tv": [thing()]}
    scorer.classify = lambda image, group, name: [image] * len(group)
    counted = {"tag": "counting", "include": [{"class": "clock", "count": 1}]}
    colored = {"tag": "colors", "include": [{"class": "tv", "count": 1, "color": "red"}]}
    rows = scorer(["red", "red", "blue"], [counted, colored, colored])
    assert [row["score"] for row in rows] == [row["strict"] for row in rows] == [1, 1, 0]
    box = [95, 95, 105, 105]
    expected = [{"class": "clock", "confidence": 0.9512, "box": box}, {"class": "tv", "confidence": 0.95, "box": box}]
    assert rows[0]["detections"] == expected and len(rows[1]["detections"]) == 3
    assert rows[2]["reason"] == "expected 1 red tv, found blue"


def test_other_detectors_are_refused(detector, tmp_path):
    CLIPConfig().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other is a clip; it must be a Mask2Former"):
        geneval.Detector(str(tmp_path / "other"), "cpu")
    config, few, pickled = Mask2FormerConfig.from_pretrained(detector), tmp_path / "few", tmp_path / "pickled"
    config.save_pretrained(pickled)
    Mask2FormerImageProcessorPil().save_pretrained(pickled)
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(OSError, match="no file named model.safetensors"):
        geneval.Detector(str(pickled), "cpu")
    config.id2label = {index: label for index, label in config.id2label.items() if index < 78}
    config.save_pretrained(few)
    with pytest.raises(ValueError, match="few does not know hair drier, toothbrush$"):
        geneval.Detector(str(few), "cpu")
