# SPDX-License-Identifier: Apache-2.0
"""
Scorers that stand in for human preference, for score_images.py.

| class | model | score | SD3.5-Medium |
| --- | --- | --- | --- |
| `CLIPScore` | CLIP ViT-L/14 | cosine of image and prompt | 0.285 |
| `PickScore` | CLIP ViT-H/14, tuned on Pick-a-Pic | cosine times the model's logit scale | 22.34 |
| `HPSv2` | CLIP ViT-H/14, tuned on HPD v2; version 2.1 | cosine of image and prompt | 0.279 |
| `ImageReward` | BLIP ViT-L, and a head on its text encoder, that sees the image | standardised; 0 is average | 0.85 |
| `Aesthetic` | CLIP ViT-L/14, and a head on the image's embedding alone | rating, 1 to 10 | 5.36 |

The last column is what the authors of SOAR (arXiv 2604.12617) report for DrawBench: these are their scales. The code
of Flow-GRPO (arXiv 2505.05470) has others as rewards: PickScore / 26, and 100 / 30 times the cosine of CLIP.

`Scorer(device)` loads from the hub, or from its cache under HF_HUB_OFFLINE=1; `Scorer(device, parts)` takes model and
tokenizer (Aesthetic: model and head) as they are. A scorer is called with a list of B `PIL.Image.Image`s in RGB and a
list of B records, of which `"text"` is the prompt, and returns B times `{"score": float}`. It computes in float32.
Checkpoints that are published as pickles are read once, by a loader that runs no code in them, and kept as
safetensors in `$HF_HOME/soar-evaluation`. A `ValueError` says what in one is not as expected.
"""

import html
import math
import os
import pickle
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
)


def transformer(width, layers, heads, **others):
    """A part of a configuration."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width}
    return {**sizes, "num_hidden_layers": layers, "num_attention_heads": heads, **others}


CONVERTED = Path(huggingface_hub.constants.HF_HOME) / "soar-evaluation"
SIZE = 224  # pixels a side, of all five models
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the images that CLIP was trained on; all five models use these
STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_L, PICK = "openai/clip-vit-large-patch14", "yuvalkirstain/PickScore_v1"
VIT_H = {
    "vision_config": transformer(1280, 32, 16, image_size=SIZE, patch_size=14, hidden_act="gelu"),
    "text_config": transformer(1024, 24, 16, hidden_act="gelu"),
    "projection_dim": 1024,
}
BLIP_L = {
    # The authors' epsilon, where transformers has 1e-5.
    "vision_config": transformer(1024, 24, 16, image_size=SIZE, patch_size=16, layer_norm_eps=1e-6),
    # `is_decoder` is transformers' word for cross-attention; the self-attention looks both ways all the same.
    "text_config": transformer(768, 12, 12, vocab_size=30524, encoder_hidden_size=1024, is_decoder=True),
}


def preprocess(images, offset=round, resize_floats=False):
    """
    Images as the models saw them in training: the short side 224 pixels, bicubic; of that the middle; normalised.

    Args:
        images (`list[PIL.Image.Image]`): RGB, of any sizes.
        offset (`Callable`): Rounds the corner of the middle to whole pixels: `round`, as torchvision, or
            `math.floor`, as transformers' CLIP processor. They differ, by one pixel, only if the image is not square.
        resize_floats (`bool`): Resize numbers, which may leave [0, 1], as torchvision does with tensors; Pillow
            resizes in 8 bits.

    Returns:
        `torch.Tensor` of shape `(B, 3, 224, 224)`, float32.
    """
    batch = []
    for image in images:
        width, height = (SIZE * side // min(image.size) for side in image.size)
        if not resize_floats:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        if resize_floats:
            pixels = torch.nn.functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
        top, left = offset((height - SIZE) / 2), offset((width - SIZE) / 2)
        batch.append(pixels[..., top : top + SIZE, left : left + SIZE])
    return (torch.cat(batch) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def image_text_cosine(model, tokenizer, pixels, texts):
    """Cosine, of shape `(B,)`, of B images, from [`preprocess`], and B texts, of which the first 77 tokens count."""
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt").to(model.device)
    outputs = model(pixel_values=pixels.to(model.device), **inputs)
    return (outputs.image_embeds * outputs.text_embeds).sum(dim=-1)  # both of length 1


class LinearHead(torch.nn.Sequential):
    """From embeddings of shape `(B, width)` to numbers of shape `(B, 1)`, in five steps with nothing in between."""

    published = (0, 2, 4, 6, 7)  # the layers' numbers in the checkpoints, where dropout counts as one

    def __init__(self, width):
        sizes = (width, 1024, 128, 64, 16, 1)
        super().__init__(*(torch.nn.Linear(*pair) for pair in zip(sizes[:-1], sizes[1:], strict=True)))


class BlipReward(torch.nn.Module):
    """BLIP's image encoder; its text encoder, that attends to the image in every layer; a head on the first token."""

    def __init__(self, vision_config, text_config):
        super().__init__()
        self.vision = BlipVisionModel(BlipVisionConfig(**vision_config))
        self.text = BlipTextModel(BlipTextConfig(**text_config), add_pooling_layer=False)
        self.head = LinearHead(text_config["hidden_size"])

    def forward(self, pixels, input_ids, attention_mask):
        """Rewards, not standardised, of shape `(B,)`, of pixels `(B, 3, H, W)`, token ids and their mask `(B, L)`."""
        image = self.vision(pixels).last_hidden_state
        text = self.text(input_ids, attention_mask, encoder_hidden_states=image).last_hidden_state
        return self.head(text[:, 0]).squeeze(-1)


def load_clip(repo):
    """`CLIPModel` and `CLIPTokenizer` of a repository of the hub."""
    model = CLIPModel.from_pretrained(repo, dtype=torch.float32, use_safetensors=True)
    return model, CLIPTokenizer.from_pretrained(repo)


def open_clip_names(model):
    """
    Where the tensors of open_clip's CLIP go in transformers' `CLIPModel`.

    Args:
        model (`CLIPModel`).

    Returns:
        `dict[str, list[str]]`: For each tensor of a checkpoint its place in the model; or several, among which it is
        divided along its first dimension; or none. At a place that ends in ` transposed` it is transposed.
    """
    names = {
        "logit_scale": ["logit_scale"],
        "token_embedding.weight": ["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": ["text_model.embeddings.position_embedding.weight"],
        "text_projection": ["text_projection.weight transposed"],
        "visual.class_embedding": ["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": ["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": ["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": ["visual_projection.weight transposed"],
    }
    layer = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    layer["attn.out_proj"] = "self_attn.out_proj"
    for kind in ("weight", "bias"):
        names[f"ln_final.{kind}"] = [f"text_model.final_layer_norm.{kind}"]
        names[f"visual.ln_pre.{kind}"] = [f"vision_model.pre_layrnorm.{kind}"]  # sic
        names[f"visual.ln_post.{kind}"] = [f"vision_model.post_layernorm.{kind}"]
        for prefix, tower in (("", "text"), ("visual.", "vision")):
            for i in range(getattr(model.config, f"{tower}_config").num_hidden_layers):
                old, new = f"{prefix}transformer.resblocks.{i}", f"{tower}_model.encoder.layers.{i}"
                names |= {f"{old}.{a}.{kind}": [f"{new}.{b}.{kind}"] for a, b in layer.items()}
                names[f"{old}.attn.in_proj_{kind}"] = [f"{new}.self_attn.{part}_proj.{kind}" for part in "qkv"]
    return names


def aesthetic_names(head):
    """Where the tensors of the aesthetic predictor go in [`LinearHead`]; see [`open_clip_names`]."""
    numbers = list(enumerate(head.published))
    return {f"layers.{old}.{kind}": [f"{new}.{kind}"] for new, old in numbers for kind in ("weight", "bias")}


def image_reward_names(model):
    """Where the tensors of ImageReward go in [`BlipReward`]; see [`open_clip_names`]."""
    names = {f"mlp.{old}": [f"head.{new}"] for old, (new,) in aesthetic_names(model.head).items()}
    names |= {f"blip.text_encoder.{name}": [f"text.{name}"] for name in model.text.state_dict()}
    names["blip.visual_encoder.cls_token"] = ["vision.embeddings.class_embedding"]
    names["blip.visual_encoder.pos_embed"] = ["vision.embeddings.position_embedding"]
    layer = {"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    layer |= {"attn.qkv": "self_attn.qkv", "attn.proj": "self_attn.projection"}
    for kind in ("weight", "bias"):
        names[f"blip.visual_encoder.patch_embed.proj.{kind}"] = [f"vision.embeddings.patch_embedding.{kind}"]
        names[f"blip.visual_encoder.norm.{kind}"] = [f"vision.post_layernorm.{kind}"]
        for i in range(model.vision.config.num_hidden_layers):
            old, new = f"blip.visual_encoder.blocks.{i}", f"vision.encoder.layers.{i}"
            names |= {f"{old}.{a}.{kind}": [f"{new}.{b}.{kind}"] for a, b in layer.items()}
        # What is left of BLIP's pretraining; no reward depends on it.
        names[f"blip.vision_proj.{kind}"] = names[f"blip.text_proj.{kind}"] = []
    names["blip.text_encoder.embeddings.position_ids"] = []  # 0, 1, 2, ...
    return names


def read_checkpoint(path, key=None):
    """The tensors by name in a file of `torch.save`, there under `key`; `ValueError` if it holds anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.detach() for name, tensor in (state[key] if key else state).items()}
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"it is damaged, or holds more than tensors ({type(error).__name__}: {reason})") from error


def rearrange(state, model, names):
    """
    The tensors of a checkpoint in the places that they have in a model.

    Args:
        state (`dict[str, torch.Tensor]`): All that the checkpoint holds.
        model (`torch.nn.Module`): All of which is to be filled.
        names (`dict[str, list[str]]`): See [`open_clip_names`]. A tensor that has no place may be absent.

    Returns:
        `dict[str, torch.Tensor]`: For `model.load_state_dict`.

    Raises:
        `ValueError`: If a tensor of the checkpoint is not in `names`, if one is absent in the checkpoint or in the
        model, or if a shape is not the model's.
    """
    problems = [f"{name} is not expected" for name in state if name not in names]
    result, wanted = {}, model.state_dict()
    for name, places in names.items():
        if name not in state:
            problems += [f"{name} is missing"] if places else []
            continue
        tensors = state[name].chunk(len(places)) if len(places) > 1 else [state[name]]
        for place, tensor in zip(places, tensors, strict=False):
            place, _, transposed = place.partition(" ")
            result[place] = (tensor.T if transposed else tensor).contiguous()
            if place in wanted and wanted[place].shape != result[place].shape:
                problems.append(f"{name} gives {place} the shape {list(result[place].shape)}")
    filled = {place.partition(" ")[0] for places in names.values() for place in places}
    problems += [f"{place} has no source" for place in sorted(wanted.keys() - filled)]
    problems += [f"{place} is not in the model" for place in sorted(filled - wanted.keys())]
    if problems:
        raise ValueError("; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if problems[3:] else ""))
    return result


def load_converted(model, repo, file, names, key=None):
    """
    Fill a model with a PyTorch checkpoint of the hub, by way of a safetensors file that is made once.

    Args:
        model (`torch.nn.Module`): Is filled, and returned; best without memory of its own, as the tensors become its.
        repo (`str`), file (`str`): The checkpoint.
        names (`dict[str, list[str]]`): See [`rearrange`].
        key (`str`, *optional*): Under which its tensors lie.

    Raises:
        `ValueError`: If the checkpoint is not what is expected. Nothing is written then.
    """
    source = Path(hf_hub_download(repo, file))
    target = CONVERTED / f"{repo.replace('/', '--')}--{Path(file).stem}.safetensors"
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        try:
            state = rearrange(read_checkpoint(source, key), model, names)
        except ValueError as error:
            again = f"to load it again, delete {source.parents[2]}"
            raise ValueError(f"{source} is not the checkpoint that was expected: {error}; {again}") from error
        CONVERTED.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        try:
            save_file(state, partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    try:
        model.load_state_dict(load_file(target), assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{target} is damaged: delete it, to have it made again") from error
    return model.float()


class CLIPScore:
    """
    Cosine of the image's and the prompt's embedding by CLIP ViT-L/14.

    Hessel et al. (arXiv 2104.08718) report 2.5 times its positive part, with ViT-B/32. Flow-GRPO's code resizes images
    bilinearly, here they are resized as in CLIP.

    Source: Radford et al., arXiv 2103.00020, openai/CLIP; transformers' `CLIPProcessor`.
    """

    files = [(CLIP_L, "model.safetensors", 1.71), (CLIP_L, "tokenizer.json", 0.002)]
    packages = []

    def __init__(self, device, parts=None):
        model, self.tokenizer = parts or load_clip(CLIP_L)
        self.model = model.to(device).eval()

    @torch.no_grad()
    def __call__(self, images, records):
        texts = [record["text"] for record in records]
        cosine = image_text_cosine(self.model, self.tokenizer, preprocess(images, offset=math.floor), texts)
        return [{"score": score} for score in cosine.tolist()]


class PickScore:
    """
    The logit of PickScore v1: the cosine times the scale that the model has learnt. It is not divided by 26.

    Source: Kirstain et al., arXiv 2305.01569, and the code on the model's card, with `CLIPProcessor`.
    """

    files = [(PICK, "model.safetensors", 3.94), (PICK, "tokenizer.json", 0.002)]
    packages = []

    def __init__(self, device, parts=None):
        model, self.tokenizer = parts or load_clip(PICK)
        self.model = model.to(device).eval()

    @torch.no_grad()
    def __call__(self, images, records):
        texts = [record["text"] for record in records]
        cosine = image_text_cosine(self.model, self.tokenizer, preprocess(images, offset=math.floor), texts)
        return [{"score": score} for score in (self.model.logit_scale.exp() * cosine).tolist()]


class HPSv2:
    """
    Human Preference Score v2.1, the cosine itself; some tables show 100 times it.

    As in the authors' code, prompts are cleaned with ftfy, and float tensors are resized; with antialiasing, which
    torchvision does since 0.17. The authors compute in half precision on GPUs.

    Source: Wu et al., arXiv 2306.09341, tgxs002/HPSv2.
    """

    files = [("xswu/HPSv2", "HPS_v2.1_compressed.pt", 1.97), (CLIP_L, "tokenizer.json", 0.002)]
    packages = ["ftfy"]

    def __init__(self, device, parts=None):
        model, self.tokenizer = parts or self.load()
        self.model = model.to(device).eval()

    @classmethod
    def load(cls):
        with init_empty_weights():
            model = CLIPModel(CLIPConfig(**VIT_H))
        load_converted(model, *cls.files[0][:2], open_clip_names(model), key="state_dict")
        return model, CLIPTokenizer.from_pretrained(CLIP_L)  # all CLIPs have this one

    @torch.no_grad()
    def __call__(self, images, records):
        import ftfy  # no other scorer needs it

        texts = [html.unescape(html.unescape(ftfy.fix_text(record["text"]))).strip() for record in records]
        cosine = image_text_cosine(self.model, self.tokenizer, preprocess(images, resize_floats=True), texts)
        return [{"score": score} for score in cosine.tolist()]


class ImageReward:
    """
    ImageReward v1.0, standardised with the authors' mean and standard deviation. The prompt's first 35 tokens count.

    Source: Xu et al., arXiv 2304.05977, zai-org/ImageReward (formerly THUDM/ImageReward).
    """

    files = [
        ("zai-org/ImageReward", "ImageReward.pt", 1.79),
        ("google-bert/bert-base-uncased", "tokenizer.json", 0.0005),
    ]
    packages = []
    mean, std = 0.16717362830052426, 1.0333394966054072

    def __init__(self, device, parts=None):
        model, self.tokenizer = parts or self.load()
        self.model, self.device = model.to(device).eval(), device

    @classmethod
    def load(cls):
        with init_empty_weights():
            model = BlipReward(**BLIP_L)
        load_converted(model, *cls.files[0][:2], image_reward_names(model))
        return model, BertTokenizer.from_pretrained(cls.files[1][0])

    @torch.no_grad()
    def __call__(self, images, records):
        texts = [record["text"] for record in records]
        inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=35, return_tensors="pt")
        inputs, pixels = inputs.to(self.device), preprocess(images).to(self.device)
        rewards = (self.model(pixels, inputs["input_ids"], inputs["attention_mask"]) - self.mean) / self.std
        return [{"score": score} for score in rewards.tolist()]


class Aesthetic:
    """
    LAION's improved aesthetic predictor with the linear head that was trained on SAC, Logos and AVA1.

    The head's file is a copy of the authors' `sac+logos+ava1-l14-linearMSE.pth`, which is not on the hub. Prompts are
    not read.

    Source: Schuhmann, christophschuhmann/improved-aesthetic-predictor.
    """

    files = [
        (CLIP_L, "model.safetensors", 1.71),
        ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth", 0.004),
    ]
    packages = []

    def __init__(self, device, parts=None):
        model, head = parts or self.load()
        self.model, self.head = model.to(device).eval(), head.to(device).eval()

    @classmethod
    def load(cls):
        model = CLIPModel.from_pretrained(CLIP_L, dtype=torch.float32, use_safetensors=True)
        head = LinearHead(model.config.projection_dim)
        return model, load_converted(head, *cls.files[1][:2], aesthetic_names(head))

    @torch.no_grad()
    def __call__(self, images, records):
        states = self.model.vision_model(preprocess(images).to(self.model.device)).pooler_output
        embeds = torch.nn.functional.normalize(self.model.visual_projection(states), dim=-1)
        return [{"score": score} for score in self.head(embeds).squeeze(-1).tolist()]
