# SPDX-License-Identifier: Apache-2.0
"""
The preference scorers, without their weights: models of toy size, from checkpoints in the layouts of the originals.

Each is compared with a second computation, written here from the definition and from nothing of transformers; and with
the originals' own modules, where `open_clip_torch` and `image-reward` are installed. (Both demand torchvision: with
`pip install --no-deps` they come without it, and what they import of it and never use is stood in for.)
"""

import importlib
import importlib.machinery
import importlib.util
import math
import os
import sys
import time
from types import ModuleType, SimpleNamespace

import huggingface_hub
import numpy as np
import preference
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer


TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
TEXTS = ["a red star", "two green circles <left of a cat &amp;amp; a dog>", "it’s a “sign”  that says\nNO 42 " * 6]
RECORDS = [{"text": text} for text in TEXTS]


def random_image(width, height, seed=0):
    """Coarse colours and fine noise, up to black and white."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height), 0)
    noise = generator.normal(0, 30, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


IMAGES = [random_image(256, 256, 1), random_image(400, 300, 2), random_image(224, 331, 3)]


# Toy models in the layouts of the originals

VIT_H = {
    "vision_config": preference.VIT_H["vision_config"] | preference.transformer(32, 2, 4, patch_size=56),
    "text_config": preference.VIT_H["text_config"]
    | preference.transformer(24, 3, 2, vocab_size=514, eos_token_id=513),
    "projection_dim": 20,
}
BLIP_L = {
    "vision_config": preference.BLIP_L["vision_config"] | preference.transformer(32, 2, 4, patch_size=56),
    "text_config": preference.BLIP_L["text_config"]
    | preference.transformer(24, 3, 2, encoder_hidden_size=32, vocab_size=80, max_position_embeddings=40),
}


def clip_tokenizer():
    """CLIP's, had it learnt no merges: one token a byte."""
    letters = list(importlib.import_module("transformers.convert_slow_tokenizer").bytes_to_unicode().values())
    words = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])


def bert_tokenizer():
    """BERT's, had it learnt only letters."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789&;,"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters[:-3])]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def random_state(shapes, seed=0):
    """Norms near the identity, all else of about unit effect; small image patches, so that epsilons count."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name, shape):
        values = torch.randn(shape, generator=generator)
        if any(part in name for part in ("ln_", "norm", "LayerNorm")):
            return 0.1 * values + name.endswith("weight")
        if any(part in name for part in ("cls_token", "pos_embed", "patch_embed")):
            return 0.003 * values
        return values / math.sqrt(shape[-1]) if len(shape) > 1 else 0.3 * values

    return {name: draw(name, shape) for name, shape in shapes.items()}


def affine(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def clip_shapes():
    """What open_clip's CLIP of the size of `VIT_H` holds."""
    shapes = {"logit_scale": (), "visual.class_embedding": (32,), "visual.conv1.weight": (32, 3, 56, 56)}
    shapes |= {"visual.positional_embedding": (17, 32), "visual.proj": (32, 20), "text_projection": (24, 20)}
    shapes |= {"token_embedding.weight": (514, 24), "positional_embedding": (77, 24)}
    shapes |= affine("visual.ln_pre", 32) | affine("visual.ln_post", 32) | affine("ln_final", 24)
    for prefix, width, layers in (("visual.", 32, 2), ("", 24, 3)):
        for i in range(layers):
            block = f"{prefix}transformer.resblocks.{i}"
            shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
            shapes |= affine(f"{block}.attn.out_proj", width, width)
            shapes |= affine(f"{block}.ln_1", width) | affine(f"{block}.ln_2", width)
            shapes |= affine(f"{block}.mlp.c_fc", 4 * width, width) | affine(f"{block}.mlp.c_proj", width, 4 * width)
    return shapes


def head_shapes(width, prefix=""):
    sizes = {0: (1024, width), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    return {k: v for i, size in sizes.items() for k, v in affine(f"{prefix}layers.{i}", *size).items()}


def reward_shapes():
    """What ImageReward of the size of `BLIP_L` holds, with what it does not use."""
    shapes = {"cls_token": (1, 1, 32), "pos_embed": (1, 17, 32)}
    shapes |= affine("patch_embed.proj", 32, 3, 56, 56) | affine("norm", 32)
    for i in range(2):
        block = f"blocks.{i}"
        shapes |= affine(f"{block}.norm1", 32) | affine(f"{block}.norm2", 32)
        shapes |= affine(f"{block}.attn.qkv", 96, 32) | affine(f"{block}.attn.proj", 32, 32)
        shapes |= affine(f"{block}.mlp.fc1", 128, 32) | affine(f"{block}.mlp.fc2", 32, 128)
    shapes = {f"blip.visual_encoder.{name}": shape for name, shape in shapes.items()}
    text = {"embeddings.word_embeddings.weight": (80, 24), "embeddings.position_embeddings.weight": (40, 24)}
    text |= affine("embeddings.LayerNorm", 24)
    for i in range(3):
        layer = f"encoder.layer.{i}"
        for attention, width in (("attention", 24), ("crossattention", 32)):
            text |= affine(f"{layer}.{attention}.self.query", 24, 24)
            text |= affine(f"{layer}.{attention}.self.key", 24, width)
            text |= affine(f"{layer}.{attention}.self.value", 24, width)
            text |= affine(f"{layer}.{attention}.output.dense", 24, 24)
            text |= affine(f"{layer}.{attention}.output.LayerNorm", 24)
        text |= affine(f"{layer}.intermediate.dense", 96, 24) | affine(f"{layer}.output.dense", 24, 96)
        text |= affine(f"{layer}.output.LayerNorm", 24)
    shapes |= {f"blip.text_encoder.{name}": shape for name, shape in text.items()}
    shapes |= affine("blip.vision_proj", 8, 32) | affine("blip.text_proj", 8, 24)
    return shapes | head_shapes(24, "mlp.")


def clip_checkpoint():
    return random_state(clip_shapes()) | {"logit_scale": torch.tensor(math.log(100))}


def reward_checkpoint():
    return random_state(reward_shapes()) | {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}


# The second computation


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state, name, x, epsilon):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + epsilon).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def attend(query, key, value, heads, mask=0.0):
    """Softmax attention of `(B, L, C)`; `mask` is added to the logits."""
    query, key, value = (x.unflatten(-1, (heads, -1)).movedim(-2, 1) for x in (query, key, value))
    weights = (query @ key.mT / math.sqrt(query.shape[-1]) + mask).softmax(-1)
    return (weights @ value).movedim(1, -2).flatten(-2)


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def residual_block(state, block, x, heads, names, epsilon, mask=0.0):
    """A transformer block that normalises first; `names`: both norms, the projections of attention, the two layers."""
    norm1, norm2, packed, out, first, second = (f"{block}.{name}" for name in names)
    x = x + linear(
        state, out, attend(*linear(state, packed, norm(state, norm1, x, epsilon)).chunk(3, -1), heads, mask)
    )
    return x + linear(state, second, gelu(linear(state, first, norm(state, norm2, x, epsilon))))


def patches(weight, pixels, bias=0.0):
    """Non-overlapping square patches, each mapped linearly."""
    size = weight.shape[-1]
    cut = pixels.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    return cut @ weight.flatten(1).T + bias


def plain_clip(state, pixels, token_ids):
    """Cosine, by open_clip's definition."""
    state = dict(state)
    for name in [name for name in state if "in_proj_" in name]:
        state[name.replace("in_proj_", "packed.")] = state[name]
    names = ("ln_1", "ln_2", "attn.packed", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
    x = patches(state["visual.conv1.weight"], pixels)
    x = (
        torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], dim=1)
        + state["visual.positional_embedding"]
    )
    x = norm(state, "visual.ln_pre", x, 1e-5)
    for i in range(2):
        x = residual_block(state, f"visual.transformer.resblocks.{i}", x, 4, names, 1e-5)
    image = norm(state, "visual.ln_post", x[:, 0], 1e-5) @ state["visual.proj"]
    x = state["token_embedding.weight"][token_ids] + state["positional_embedding"][: token_ids.shape[1]]
    causal = torch.full((token_ids.shape[1],) * 2, -torch.inf).triu(1)
    for i in range(3):
        x = residual_block(state, f"transformer.resblocks.{i}", x, 2, names, 1e-5, causal)
    x = norm(state, "ln_final", x, 1e-5)
    text = x[torch.arange(len(x)), token_ids.argmax(dim=1)] @ state["text_projection"]
    return (image * text).sum(-1) / image.norm(dim=-1) / text.norm(dim=-1)


def plain_head(state, x, prefix=""):
    for i in (0, 2, 4, 6, 7):
        x = linear(state, f"{prefix}layers.{i}", x)
    return x[:, 0]


def plain_image(state, pixels):
    """The states of BLIP's image encoder."""
    x = patches(state["patch_embed.proj.weight"], pixels, state["patch_embed.proj.bias"])
    x = torch.cat([state["cls_token"].expand(len(x), 1, -1), x], dim=1) + state["pos_embed"]
    for i in range(2):
        names = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        x = residual_block(state, f"blocks.{i}", x, 4, names, 1e-6)
    return norm(state, "norm", x, 1e-6)


def plain_text(state, image, token_ids, mask):
    """The states of BLIP's text encoder: BERT, that attends to the image between its two halves."""
    x = state["embeddings.word_embeddings.weight"][token_ids]
    x = x + state["embeddings.position_embeddings.weight"][: token_ids.shape[1]]
    x = norm(state, "embeddings.LayerNorm", x, 1e-12)
    hidden = torch.where(mask.bool(), 0.0, -torch.inf)[:, None, None, :]
    for i in range(3):
        layer = f"encoder.layer.{i}"
        for name, source, masked in (("attention", None, hidden), ("crossattention", image, 0.0)):
            keys = x if source is None else source
            query, key, value = (
                linear(state, f"{layer}.{name}.self.{part}", y)
                for part, y in (("query", x), ("key", keys), ("value", keys))
            )
            out = linear(state, f"{layer}.{name}.output.dense", attend(query, key, value, 2, masked))
            x = norm(state, f"{layer}.{name}.output.LayerNorm", x + out, 1e-12)
        out = linear(state, f"{layer}.output.dense", gelu(linear(state, f"{layer}.intermediate.dense", x)))
        x = norm(state, f"{layer}.output.LayerNorm", x + out, 1e-12)
    return x


def part(state, prefix):
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def standardise(rewards):
    return (rewards - 0.16717362830052426) / 1.0333394966054072


# The originals


def original(monkeypatch, package, module, stubs):
    """A module of an installed package, without running any `__init__`; `stubs`: what it imports and does not use."""
    spec = importlib.machinery.PathFinder.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    folder = spec.submodule_search_locations[0]
    path = package
    for step in ["", *module.split(".")[:-1]]:
        path, folder = (f"{path}.{step}", os.path.join(folder, step)) if step else (path, folder)
        shell = ModuleType(path)
        shell.__path__ = [folder]
        monkeypatch.setitem(sys.modules, path, shell)
    for name, attributes in stubs.items():
        steps = name.split(".")
        for i in range(1, len(steps) + 1):
            if ".".join(steps[:i]) not in sys.modules or i == len(steps):
                stub = ModuleType(".".join(steps[:i]))
                stub.__path__ = []
                monkeypatch.setitem(sys.modules, stub.__name__, stub)
        vars(sys.modules[name]).update(attributes)
    return importlib.import_module(f"{package}.{module}")


def original_clip(monkeypatch, state, pixels, token_ids):
    stubs = {"torchvision.ops.misc": {"FrozenBatchNorm2d": torch.nn.Module}}
    module = original(monkeypatch, "open_clip", "model", stubs)
    vision = module.CLIPVisionCfg(layers=2, width=32, head_width=8, patch_size=56, image_size=224)
    text = module.CLIPTextCfg(context_length=77, vocab_size=514, width=24, heads=2, layers=3)
    model = module.CLIP(20, vision, text).eval()
    model.load_state_dict(state)
    token_ids = F.pad(token_ids, (0, 77 - token_ids.shape[1]))
    image, text, _ = model(pixels, token_ids)
    return (image * text).sum(-1)


class Patches(torch.nn.Module):
    """timm's `PatchEmbed`, of which ImageReward uses these lines."""

    def __init__(self, img_size, patch_size, in_chans, embed_dim):
        super().__init__()
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = torch.nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


def original_reward(monkeypatch, state, pixels, token_ids, mask):
    unused = torch.nn.Identity
    stubs = {
        "timm.models.vision_transformer": {"_cfg": unused, "PatchEmbed": Patches},
        "timm.models.registry": {"register_model": unused},
        "timm.models.layers": {"trunc_normal_": torch.nn.init.trunc_normal_, "DropPath": unused},
        "timm.models.helpers": {"named_apply": unused, "adapt_input_conv": unused},
        "fairscale.nn.checkpoint.checkpoint_activations": {"checkpoint_wrapper": unused},
    }
    utils = importlib.import_module("transformers.modeling_utils")
    for name in ("find_pruneable_heads_and_indices", "prune_linear_layer"):  # gone since transformers 5
        monkeypatch.setattr(utils, name, unused, raising=False)
    chunking = importlib.import_module("transformers.pytorch_utils").apply_chunking_to_forward
    monkeypatch.setattr(utils, "apply_chunking_to_forward", chunking, raising=False)
    vit = original(monkeypatch, "ImageReward", "models.BLIP.vit", stubs)
    med = original(monkeypatch, "ImageReward", "models.BLIP.med", stubs)
    stubs = {
        "ImageReward.models.BLIP.blip_pretrain": {"BLIP_Pretrain": unused},
        "torchvision.transforms": dict.fromkeys(("Compose", "Resize", "CenterCrop", "ToTensor", "Normalize")),
    }
    head = original(monkeypatch, "ImageReward", "ImageReward", stubs).MLP(24).eval()
    image_encoder = vit.VisionTransformer(224, 56, embed_dim=32, depth=2, num_heads=4, drop_path_rate=0.1).eval()
    config = med.BertConfig(
        vocab_size=80,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=40,
        layer_norm_eps=1e-12,
        add_cross_attention=True,
        encoder_width=32,
    )
    # Not its BertModel: that is of a transformers of 2021. Its masks are these.
    text_encoder = torch.nn.ModuleDict({"embeddings": med.BertEmbeddings(config), "encoder": med.BertEncoder(config)})
    text_encoder.eval().load_state_dict(part(state, "blip.text_encoder."))
    image_encoder.load_state_dict(part(state, "blip.visual_encoder."))
    head.load_state_dict(part(state, "mlp."))
    states = text_encoder["encoder"](
        text_encoder["embeddings"](token_ids),
        attention_mask=-10000.0 * (1 - mask)[:, None, None, :].float(),
        encoder_hidden_states=image_encoder(pixels),
        encoder_attention_mask=torch.zeros(1),
        return_dict=True,
    ).last_hidden_state
    return head(states[:, 0]).squeeze(-1)


# A hub on the disk


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`publish(repo, file)`: the path where a file of a repository lies in the hub's cache, which is offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(preference, "CONVERTED", tmp_path / "converted")
    monkeypatch.setattr(preference, "VIT_H", VIT_H)
    monkeypatch.setattr(preference, "BLIP_L", BLIP_L)

    def publish(repo, file=""):
        folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text("0" * 40)
        (folder / "snapshots" / ("0" * 40)).mkdir(parents=True, exist_ok=True)
        return folder / "snapshots" / ("0" * 40) / file

    return publish


def random_clip(hidden_act, seed):
    config = CLIPConfig(
        vision_config=VIT_H["vision_config"] | {"hidden_act": hidden_act},
        text_config=VIT_H["text_config"] | {"hidden_act": hidden_act},
        projection_dim=20,
    )
    torch.manual_seed(seed)
    model = CLIPModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.constant_(model.logit_scale, math.log(60))
    return model


def publish_clip(hub, repo, model=None):
    if model is not None:
        model.save_pretrained(hub(repo))
    clip_tokenizer().save_pretrained(hub(repo))


def publish(hub, name):
    """What a scorer loads."""
    if name in ("CLIPScore", "HPSv2", "Aesthetic"):
        publish_clip(hub, preference.CLIP_L, random_clip("quick_gelu", 0))
    if name == "PickScore":
        publish_clip(hub, "yuvalkirstain/PickScore_v1", random_clip("gelu", 1))
    if name == "HPSv2":
        state = {name: tensor.half() for name, tensor in clip_checkpoint().items()}
        torch.save({"state_dict": state}, hub(*preference.HPSv2.files[0][:2]))
    if name == "ImageReward":
        torch.save(reward_checkpoint(), hub(*preference.ImageReward.files[0][:2]))
        bert_tokenizer().save_pretrained(hub(preference.ImageReward.files[1][0]))
    if name == "Aesthetic":
        torch.save(random_state(head_shapes(20)), hub(*preference.Aesthetic.files[1][:2]))


SCORERS = ("CLIPScore", "PickScore", "HPSv2", "ImageReward", "Aesthetic")


@pytest.fixture
def ftfy(monkeypatch):
    """For HPSv2: the package, or of it the straight quotes where it is not installed."""
    if importlib.util.find_spec("ftfy") is None:
        straight = str.maketrans("‘’“”", "''\"\"")
        monkeypatch.setitem(sys.modules, "ftfy", SimpleNamespace(fix_text=lambda text: text.translate(straight)))


def scores(results):
    assert all(set(result) == {"score"} and isinstance(result["score"], float) for result in results)
    return torch.tensor([result["score"] for result in results])


def make(name):
    return getattr(preference, name)("cpu")


# Preprocessing

SIZES = [(256, 256), (1024, 1024), (224, 224), (100, 90), (640, 480), (301, 450), (1344, 768), (333, 337), (224, 227)]


@pytest.mark.parametrize("size", SIZES)
def test_images_are_prepared_as_for_clip(size):
    image = random_image(*size)
    expected = CLIPImageProcessorPil()(image, return_tensors="pt").pixel_values
    torch.testing.assert_close(preference.preprocess([image], offset=math.floor), expected, rtol=0, atol=1e-5)


def normalise(pixels):
    pixels = (pixels - np.array(preference.MEAN)) / np.array(preference.STD)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resize_floats", [False, True])
def test_images_are_prepared_as_by_torchvision(size, resize_floats):
    """Pillow, in its 8-bit and in its float mode, after torchvision's documentation."""
    image = random_image(*size)
    ratio = 224 / min(size)
    width, height = (224 if side == min(size) else int(224 * side / min(size)) for side in size)
    assert abs(width - ratio * size[0]) < 1 and abs(height - ratio * size[1]) < 1
    if resize_floats:
        channels = [Image.fromarray(np.asarray(c).astype(np.float32) / 255) for c in image.split()]
        pixels = np.stack([np.asarray(c.resize((width, height), Image.BICUBIC)) for c in channels], axis=-1)
    else:
        pixels = np.asarray(image.resize((width, height), Image.BICUBIC)) / 255
    left, top = int(round((width - 224) / 2.0)), int(round((height - 224) / 2.0))
    expected = normalise(pixels[top : top + 224, left : left + 224])
    found = preference.preprocess([image], resize_floats=resize_floats)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


def test_how_the_ways_of_preparing_differ():
    """Floor or round: nothing for square images, else one pixel at most. Floats: 8-bit rounding, and no clipping."""
    square, wide = random_image(512, 512), random_image(227, 224)
    both = [preference.preprocess([square], offset) for offset in (round, math.floor)]
    assert torch.equal(*both)
    rounded, floored = (preference.preprocess([wide], offset) for offset in (round, math.floor))
    assert not torch.equal(rounded, floored) and torch.equal(rounded[..., :-1], floored[..., 1:])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preference.MEAN, preference.STD))
    pale = square.point(lambda value: 64 + value // 2)  # no overshoot reaches black or white
    eight_bits, floats = (preference.preprocess([pale], resize_floats=way) * std + mean for way in (False, True))
    assert 0.2 < (eight_bits - floats).abs().max() * 255 < 2
    eight_bits, floats = (preference.preprocess([square], resize_floats=way) * std + mean for way in (False, True))
    assert -1e-6 < eight_bits.min() and eight_bits.max() < 1 + 1e-6 and floats.min() < -0.005 and floats.max() > 1.005


def test_a_batch_of_sizes_is_its_images_one_by_one():
    batch = preference.preprocess(IMAGES)
    assert batch.shape == (3, 3, 224, 224) and batch.dtype == torch.float32
    assert torch.equal(batch, torch.cat([preference.preprocess([image]) for image in IMAGES]))


# Scores


@pytest.mark.parametrize("way", ["definition", "original"])
def test_hpsv2(hub, ftfy, monkeypatch, way):
    publish(hub, "HPSv2")
    state = {name: tensor.half().float() for name, tensor in clip_checkpoint().items()}
    clean = ["a red star", "two green circles <left of a cat & a dog>", 'it\'s a "sign" that says NO 42 ' * 6]
    token_ids = clip_tokenizer()(clean, padding=True, truncation=True, max_length=77, return_tensors="pt").input_ids
    pixels = preference.preprocess(IMAGES, resize_floats=True)
    with torch.no_grad():
        if way == "definition":
            expected = plain_clip(state, pixels, token_ids)
        else:
            expected = original_clip(monkeypatch, state, pixels, token_ids)
    assert expected.std() > 0.02
    torch.testing.assert_close(scores(make("HPSv2")(IMAGES, RECORDS)), expected, **TOLERANCE)


@pytest.mark.parametrize("way", ["definition", "original"])
def test_image_reward(hub, monkeypatch, way):
    publish(hub, "ImageReward")
    state = reward_checkpoint()
    inputs = bert_tokenizer()(TEXTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    token_ids, mask, pixels = inputs.input_ids, inputs.attention_mask, preference.preprocess(IMAGES)
    assert mask.sum(1).max() == 35 and mask.sum(1).min() < 20
    with torch.no_grad():
        if way == "definition":
            image = plain_image(part(state, "blip.visual_encoder."), pixels)
            text = plain_text(part(state, "blip.text_encoder."), image, token_ids, mask)
            rewards = plain_head(part(state, "mlp."), text[:, 0])
        else:
            rewards = original_reward(monkeypatch, state, pixels, token_ids, mask)
    assert rewards.std() > 0.1
    torch.testing.assert_close(scores(make("ImageReward")(IMAGES, RECORDS)), standardise(rewards), **TOLERANCE)


@pytest.mark.parametrize("name", ["CLIPScore", "PickScore"])
def test_cosine_and_logit(hub, name):
    """Both are what `CLIPModel` gives for an image and a text by itself, prepared by transformers' classes."""
    publish(hub, name)
    repo = preference.CLIP_L if name == "CLIPScore" else "yuvalkirstain/PickScore_v1"
    model, tokenizer, expected = CLIPModel.from_pretrained(hub(repo)).eval(), clip_tokenizer(), []
    for image, text in zip(IMAGES, TEXTS, strict=True):
        tokens = tokenizer([text], truncation=True, max_length=77, return_tensors="pt")
        pixels = CLIPImageProcessorPil()(image, return_tensors="pt").pixel_values
        with torch.no_grad():
            logit = model(pixel_values=pixels, **tokens).logits_per_image.item()
        expected.append(logit / 60 if name == "CLIPScore" else logit)
    found = scores(make(name)(IMAGES, RECORDS))
    assert found.std() > (0.01 if name == "CLIPScore" else 0.6)
    torch.testing.assert_close(found, torch.tensor(expected), **TOLERANCE)


def test_aesthetic(hub):
    publish(hub, "Aesthetic")
    model = CLIPModel.from_pretrained(hub(preference.CLIP_L)).eval()
    with torch.no_grad():
        dummy = torch.zeros(1, 1, dtype=torch.long)
        embeds = model(pixel_values=preference.preprocess(IMAGES), input_ids=dummy).image_embeds
        expected = plain_head(random_state(head_shapes(20)), embeds)
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(3))
    found = scores(make("Aesthetic")(IMAGES, [{}] * 3))
    assert found.std() > 0.002
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("name", SCORERS)
def test_a_score_does_not_depend_on_the_batch(hub, ftfy, name):
    publish(hub, name)
    scorer = make(name)
    alone = [scorer([image], [record])[0] for image, record in zip(IMAGES, RECORDS, strict=True)]
    torch.testing.assert_close(scores(scorer(IMAGES, RECORDS)), scores(alone), **TOLERANCE)


@pytest.mark.parametrize("name", SCORERS[:4])
def test_prompt_and_image_both_count(hub, ftfy, name):
    publish(hub, name)
    scorer = make(name)
    found = scores(scorer([IMAGES[0], IMAGES[1], IMAGES[0]], [RECORDS[0], RECORDS[0], RECORDS[1]]))
    assert (found[0] - found[1]).abs() > 1e-3 and (found[0] - found[2]).abs() > 1e-3


def test_prompts_are_read_as_by_open_clip(monkeypatch):
    """With CLIP's own vocabulary, which open_clip brings: the same token ids for clean prompts."""
    pytest.importorskip("ftfy", reason="open_clip cleans prompts with ftfy")
    module = original(monkeypatch, "open_clip", "tokenizer", {})
    theirs = module.SimpleTokenizer()
    merges = [pair for pair, _ in sorted(theirs.bpe_ranks.items(), key=lambda item: item[1])]
    words = {word: i for word, i in theirs.encoder.items() if i < 49406}
    tokenizer = CLIPTokenizer(vocab=words | {"<|startoftext|>": 49406, "<|endoftext|>": 49407}, merges=merges)
    seen = {}
    model = SimpleNamespace(to=lambda device: SimpleNamespace(eval=lambda: None))
    scorer = preference.HPSv2("cpu", (model, tokenizer))
    monkeypatch.setattr(
        preference, "image_text_cosine", lambda m, t, p, texts: seen.update(texts=texts) or torch.ones(1)
    )
    prompts = [
        *TEXTS,
        "A café’s menu: “crêpes &amp;amp; naïve” — 3½€",
        "Ｆｕｌｌ ｗｉｄｔｈ, ﬁne ligature, <b>caf&amp;eacute;</b>",
        "🐈 don't   42nd",
    ]
    scorer(IMAGES[:1] * len(prompts), [{"text": prompt} for prompt in prompts])
    ours = tokenizer(seen["texts"], padding="max_length", truncation=True, max_length=77).input_ids
    for mine, other in zip(ours, theirs(prompts).tolist(), strict=True):
        end = other.index(49407)
        assert mine[: end + 1] == other[: end + 1]


# Checkpoints


def test_the_published_checkpoints_fill_the_published_sizes():
    """Of the real sizes, without weights: every place has a source, and the bytes are those that `files` says."""
    with torch.device("meta"):
        clip, reward = CLIPModel(CLIPConfig(**preference.VIT_H)), preference.BlipReward(**preference.BLIP_L)
        head = preference.LinearHead(768)
    for model, names, bytes_each, scorer, file, unused in (
        (clip, preference.open_clip_names(clip), 2, preference.HPSv2, 0, 0),
        (reward, preference.image_reward_names(reward), 4, preference.ImageReward, 0, (1024 + 1 + 768 + 1) * 256),
        (head, preference.aesthetic_names(head), 4, preference.Aesthetic, 1, 0),
    ):
        places = [place.partition(" ")[0] for places in names.values() for place in places]
        state = model.state_dict()
        assert sorted(places) == sorted(state)
        size = bytes_each * (sum(tensor.numel() for tensor in state.values()) + unused) / 1e9
        digits = 3 if size < 0.1 else 2
        assert round(size, digits) == scorer.files[file][2]


def test_a_checkpoint_is_converted_once(hub, monkeypatch):
    publish(hub, "ImageReward")
    first = scores(make("ImageReward")(IMAGES, RECORDS))
    (file,) = preference.CONVERTED.iterdir()
    assert file.name == "zai-org--ImageReward--ImageReward.safetensors"
    assert set(load_file(file)) == set(preference.BlipReward(**BLIP_L).state_dict())
    written = file.stat().st_mtime_ns
    monkeypatch.setattr(torch, "load", None)
    again = make("ImageReward")
    assert file.stat().st_mtime_ns == written
    assert torch.equal(scores(again(IMAGES, RECORDS)), first)
    monkeypatch.undo()


def test_a_newer_checkpoint_is_converted_again(hub):
    publish(hub, "Aesthetic")
    before = scores(make("Aesthetic")(IMAGES, RECORDS))
    source = hub(*preference.Aesthetic.files[1][:2])
    torch.save(random_state(head_shapes(20), seed=1), source)
    os.utime(source, (time.time() + 10,) * 2)
    assert not torch.allclose(scores(make("Aesthetic")(IMAGES, RECORDS)), before)


def test_the_half_precision_of_a_checkpoint_is_kept_on_the_disk(hub):
    publish(hub, "HPSv2")
    scorer = make("HPSv2")
    (file,) = preference.CONVERTED.iterdir()
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    assert {tensor.dtype for tensor in scorer.model.parameters()} == {torch.float32}


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


def damage(state, path, how):
    name = next(name for name in state if name.endswith("fc1.weight") or name.endswith("layers.2.weight"))
    if how == "missing":
        del state[name]
    elif how == "unknown":
        state["surprise"] = torch.zeros(2)
    elif how == "shape":
        state[name] = state[name][1:]
    elif how == "code":
        state["surprise"] = Evil()
    elif how == "number":
        state[name] = 3
    torch.save(state, path)
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "text":
        path.write_text("<html>Not found</html>\n")
    return name


@pytest.mark.parametrize("how", ["missing", "unknown", "shape", "code", "number", "cut", "text"])
@pytest.mark.parametrize("scorer", ["ImageReward", "Aesthetic"])
def test_a_wrong_checkpoint_is_one_line(hub, tmp_path, monkeypatch, scorer, how):
    """The line names the file, and the tensor if it is one that is wrong; nothing is run, and nothing is written."""
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    publish(hub, scorer)
    state, file = (reward_checkpoint(), 0) if scorer == "ImageReward" else (random_state(head_shapes(20)), 1)
    path = hub(*getattr(preference, scorer).files[file][:2])
    tensor = damage(state, path, how)
    with pytest.raises(ValueError) as error:
        make(scorer)
    line = str(error.value)
    assert "\n" not in line and line.startswith(str(path)) and f"delete {path.parents[2]}" in line
    if how in ("missing", "shape"):
        assert tensor in line
    if how == "unknown":
        assert "surprise is not expected" in line
    assert not preference.CONVERTED.exists() and not (tmp_path / "evil").exists()


def test_a_checkpoint_of_another_depth_is_refused():
    model = CLIPModel(CLIPConfig(**VIT_H))
    names, state = preference.open_clip_names(model), clip_checkpoint()
    short = {name: tensor for name, tensor in state.items() if not name.startswith("transformer.resblocks.2.")}
    with pytest.raises(ValueError, match="transformer.resblocks.2.* is missing.* and 9 more"):
        preference.rearrange(short, model, names)
    deep = state | {name.replace(".2.", ".3."): tensor for name, tensor in state.items()}
    with pytest.raises(ValueError, match="transformer.resblocks.3.* is not expected"):
        preference.rearrange(deep, model, names)
    del names["logit_scale"], state["logit_scale"]
    with pytest.raises(ValueError, match="^logit_scale has no source$"):
        preference.rearrange(state, model, names)


def test_a_damaged_converted_file_is_named(hub):
    publish(hub, "Aesthetic")
    make("Aesthetic")
    (file,) = preference.CONVERTED.iterdir()
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"{file} is damaged: delete it"):
        make("Aesthetic")


def test_nothing_is_left_of_a_conversion_that_fails(hub, monkeypatch):
    publish(hub, "Aesthetic")

    def full_disk(state, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(preference, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        make("Aesthetic")
    assert not list(preference.CONVERTED.iterdir())
