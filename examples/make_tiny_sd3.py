# SPDX-License-Identifier: Apache-2.0
"""
Write a Stable Diffusion 3.5 pipeline of toy size from code: no download, the same bytes on every run.

    python examples/make_tiny_sd3.py outputs/tiny
    python examples/make_tiny_sd3.py outputs/small --size small
    python examples/make_tiny_sd3.py outputs/medium --size medium --configs_only

Every part has the class, the config fields and the file names of `stabilityai/stable-diffusion-3.5-medium`, so that
whatever runs on the one runs on the other. All weights are random. `tiny` is for tests: a forward takes milliseconds.
`small` can learn to draw `miniature/world.py`'s pictures on a CPU, once `train_vae.py` has trained its VAE; its text
encoders stay random, which is enough to tell words and their order apart. `medium` has the sizes of SD3.5-Medium and
of its text encoders, to measure time and memory: 16 GB in bf16, made on the GPU where there is one, and in memory
first; `--configs_only` is enough to compute them. `rehearsal` is the same with text encoders of a layer or two, 5 GB.
"""

import argparse
import shutil
import string
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)


# One token each; any other text falls back to bytes (CLIP) or to letters (T5).
WORDS = """
    a an and the of on in with to at is photo picture drawing
    red green blue yellow purple orange white black gray
    circle circles square squares triangle triangles star stars heart hearts cross crosses
    one two three four left right above below between next top bottom
"""

SMALL_CLIP = [
    {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "hidden_act": "quick_gelu",
        "num_hidden_layers": 2,
    },
    {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
        "num_hidden_layers": 2,
    },
]

SIZES = {
    "tiny": {
        "clip": [
            {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_attention_heads": 2,
                "hidden_act": "quick_gelu",
                "num_hidden_layers": 2,
            },
            {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_attention_heads": 2,
                "hidden_act": "gelu",
                "num_hidden_layers": 2,
            },
        ],
        "clip_length": 77,
        "t5": {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_heads": 2, "num_layers": 2},
        "vae": {"block_out_channels": (4, 4, 8, 8), "layers_per_block": 1, "norm_num_groups": 2, "sample_size": 128},
        # 128 px by default, up to 256 px: latents are 1/8 of the image, positions 1/16.
        "transformer": {
            "sample_size": 16,
            "pos_embed_max_size": 16,
            "num_layers": 3,
            "dual_attention_layers": (0, 1),
            "num_attention_heads": 2,
            "attention_head_dim": 16,
        },
    },
    "small": {
        "clip": SMALL_CLIP,
        "clip_length": 12,
        "t5": {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_heads": 4, "num_layers": 2},
        # One group: smaller ones would subtract the colour of a flat background.
        "vae": {"block_out_channels": (8, 16, 32), "layers_per_block": 1, "norm_num_groups": 1, "sample_size": 48},
        # 48 px by default, 36 image tokens; up to 128 px: latents are 1/4 of the image, positions 1/8.
        "transformer": {
            "sample_size": 12,
            "pos_embed_max_size": 16,
            "num_layers": 5,
            "dual_attention_layers": (0, 1, 2),
            "num_attention_heads": 4,
            "attention_head_dim": 32,
        },
    },
    "mini": {
        "clip": SMALL_CLIP,
        "clip_length": 12,
        "t5": {"d_model": 96, "d_kv": 32, "d_ff": 192, "num_heads": 3, "num_layers": 2},
        "vae": {"block_out_channels": (8, 16, 32), "layers_per_block": 1, "norm_num_groups": 1, "sample_size": 32},
        # 32 px, 16 image tokens.
        "transformer": {
            "sample_size": 8,
            "pos_embed_max_size": 4,
            "num_layers": 4,
            "dual_attention_layers": (0, 1),
            "num_attention_heads": 3,
            "attention_head_dim": 32,
        },
    },
    "large": {
        "clip": SMALL_CLIP,
        "clip_length": 12,
        "t5": {"d_model": 192, "d_kv": 32, "d_ff": 384, "num_heads": 6, "num_layers": 2},
        "vae": {"block_out_channels": (16, 32, 64), "layers_per_block": 1, "norm_num_groups": 1, "sample_size": 64},
        # 64 px, 64 image tokens.
        "transformer": {
            "sample_size": 16,
            "pos_embed_max_size": 8,
            "num_layers": 8,
            "dual_attention_layers": (0, 1, 2, 3),
            "num_attention_heads": 5,
            "attention_head_dim": 64,
        },
    },
    "medium": {
        "clip": [
            {
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_attention_heads": 12,
                "hidden_act": "quick_gelu",
                "num_hidden_layers": 12,
                "vocab_size": 49408,
            },
            {
                "hidden_size": 1280,
                "intermediate_size": 5120,
                "num_attention_heads": 20,
                "hidden_act": "gelu",
                "num_hidden_layers": 32,
                "vocab_size": 49408,
            },
        ],
        "clip_length": 77,
        "t5": {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "num_layers": 24, "vocab_size": 32128},
        "vae": {
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "sample_size": 1024,
        },
        "transformer": {
            "sample_size": 128,
            "pos_embed_max_size": 384,
            "num_layers": 24,
            "dual_attention_layers": tuple(range(13)),
            "num_attention_heads": 24,
            "attention_head_dim": 64,
        },
    },
}
SIZES["rehearsal"] = SIZES["medium"] | {
    "clip": [
        clip | {"intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 1024}
        for clip in SIZES["medium"]["clip"]
    ],
    "t5": {"d_model": 4096, "d_kv": 64, "d_ff": 64, "num_heads": 1, "num_layers": 1},
}
HALF = ("medium", "rehearsal")  # made and written in bf16


def learn_merges(words):
    """BPE merges, most frequent pair first, until every word is one token. `BpeTrainer` is not deterministic."""
    words = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for word in words for pair in pairwise(word)):
        first, second = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append((first, second))
        for word in words:
            for i in reversed(range(len(word) - 1)):
                if word[i : i + 2] == [first, second]:
                    word[i : i + 2] = [first + second]
    return merges


def make_clip_tokenizer(max_length, pad_token):
    """Byte-level BPE that knows `WORDS`; `!` is id 0, the start and end tokens are the highest, as in CLIP's own."""
    bos, eos = "<|startoftext|>", "<|endoftext|>"
    alphabet = sorted(ByteLevel.alphabet())  # starts with "!"
    merges = learn_merges(WORDS.split())
    tokens = alphabet + [symbol + "</w>" for symbol in alphabet] + [a + b for a, b in merges] + [bos, eos]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=max_length)


def make_t5_tokenizer():
    """Unigram over `WORDS` and letters. A word costs less than its letters, so that it stays whole."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(letter, -10.0) for letter in "▁" + string.ascii_letters + string.digits + string.punctuation]
    words = [("▁" + word, -5.0) for word in WORDS.split()]
    return T5TokenizerFast(vocab=special + letters + words, extra_ids=0, model_max_length=512)


def make_clip_text_encoder(tokenizer, config):
    """A random `CLIPTextModelWithProjection`; its penultimate states, which SD3 reads, tell words and order apart."""
    config = CLIPTextConfig(
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=config["hidden_size"],
        # Not 2: that value selects a legacy way to find the end of the text.
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{"vocab_size": len(tokenizer)} | config,
    )
    text_encoder = CLIPTextModelWithProjection(config)
    # Nothing normalises the penultimate states, and at the usual initial scale, 0.02, they would be next to zero.
    embeddings = text_encoder.text_model.embeddings
    torch.nn.init.normal_(embeddings.token_embedding.weight)
    torch.nn.init.normal_(embeddings.position_embedding.weight, std=0.5)
    return text_encoder


def make_pipeline(size):
    """A random `StableDiffusion3Pipeline` of PyTorch's default type; on one device the same for the same `size`."""
    config = SIZES[size]
    torch.manual_seed(0)
    tokenizer = make_clip_tokenizer(config["clip_length"], pad_token="<|endoftext|>")
    tokenizer_2 = make_clip_tokenizer(config["clip_length"], pad_token="!")
    tokenizer_3 = make_t5_tokenizer()
    t5_config = T5Config(
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer_3.pad_token_id,
        eos_token_id=tokenizer_3.eos_token_id,
        **{"vocab_size": len(tokenizer_3)} | config["t5"],
    )
    num_blocks = len(config["vae"]["block_out_channels"])
    vae = AutoencoderKL(
        latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * num_blocks,
        up_block_types=("UpDecoderBlock2D",) * num_blocks,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **config["vae"],
    )
    heads, head_dim = (config["transformer"][name] for name in ("num_attention_heads", "attention_head_dim"))
    transformer = SD3Transformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=16,
        joint_attention_dim=config["t5"]["d_model"],
        caption_projection_dim=heads * head_dim,
        pooled_projection_dim=sum(clip["hidden_size"] for clip in config["clip"]),
        qk_norm="rms_norm",
        **config["transformer"],
    )
    # PyTorch's initial weights shrink a signal by sqrt(3) a layer. Good to learn from, but in an untrained model
    # prompt and timestep would hardly reach the output.
    if size == "tiny":
        with torch.no_grad():
            for parameter in transformer.parameters():
                if parameter.ndim > 1:
                    parameter *= 3**0.5
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=make_clip_text_encoder(tokenizer, config["clip"][0]).eval(),
        tokenizer=tokenizer,
        text_encoder_2=make_clip_text_encoder(tokenizer_2, config["clip"][1]).eval(),
        tokenizer_2=tokenizer_2,
        text_encoder_3=T5EncoderModel(t5_config).eval(),
        tokenizer_3=tokenizer_3,
    )


def save_configs(pipeline, folder):
    """The pipeline's folder without its weights: what describes its parts, and the tokenizers."""
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        if isinstance(part, PreTrainedModel):
            part.config.save_pretrained(folder / name)
        elif isinstance(part, torch.nn.Module):
            part.save_config(folder / name)
        elif part is not None:
            part.save_pretrained(folder / name)


def main():
    parser = argparse.ArgumentParser(description="Write a toy Stable Diffusion 3.5 pipeline with random weights.")
    parser.add_argument("output_dir", type=Path, help="Folder to write the pipeline to.")
    sizes = "tiny: for tests. mini, small: learn on a CPU; large: on a GPU. medium, rehearsal: SD3.5-Medium's."
    parser.add_argument("--size", choices=list(SIZES), default="tiny", help=sizes)
    parser.add_argument("--configs_only", action="store_true", help="Write no weights.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the pipeline that is in the folder.")
    args = parser.parse_args()

    out = args.output_dir
    if out.exists() and not out.is_dir():
        parser.exit(2, f"error: {out} is not a folder\n")
    if out.exists() and any(out.iterdir()):
        if not args.overwrite:
            parser.exit(2, f"error: {out} is not empty; give --overwrite to replace the pipeline in it\n")
        if not (out / "model_index.json").exists():
            parser.exit(2, f"error: {out} holds no pipeline, so --overwrite leaves it alone\n")

    # Written beside and then renamed, so that the folder is never half a pipeline.
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        parser.exit(2, f"error: {error}\n")
    device = "meta" if args.configs_only else "cpu"
    if args.size == "medium" and torch.cuda.is_available() and not args.configs_only:
        device = "cuda"
    torch.set_default_dtype(torch.bfloat16 if args.size in HALF else torch.float32)
    with torch.device(device):
        pipeline = make_pipeline(args.size)
    if args.configs_only:
        save_configs(pipeline, partial)
    else:
        pipeline.to(dtype=torch.get_default_dtype()).save_pretrained(partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    count = sum(parameter.numel() for parameter in pipeline.transformer.parameters())
    print(f"{out}: {args.size} pipeline, transformer of {count:,} parameters")


if __name__ == "__main__":
    main()
