# SPDX-License-Identifier: Apache-2.0
"""
Write a FLUX.1 or a Z-Image pipeline of toy size from code, with random weights, to run a port on a CPU.

    python examples/porting/tiny_models.py flux outputs/tiny_flux
    python examples/porting/tiny_models.py z_image outputs/tiny_z_image

Stable Diffusion 3 has `examples/make_tiny_sd3.py`.
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from make_tiny_sd3 import make_clip_tokenizer, make_t5_tokenizer  # noqa: E402


def make_vae():
    """Latents of 16 channels at an eighth of the image's sides."""
    return AutoencoderKL(
        latent_channels=16,
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_flux():
    """Distilled guidance and a schedule that is shifted by the size of the image, as FLUX.1-dev has them."""
    tokenizer, tokenizer_2 = make_clip_tokenizer(77, "<|endoftext|>"), make_t5_tokenizer()
    clip = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    t5 = T5Config(d_model=32, d_kv=16, d_ff=32, num_heads=2, num_layers=2, vocab_size=len(tokenizer_2))
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    shifts = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **shifts),
        vae=make_vae(),
        text_encoder=CLIPTextModel(clip).eval(),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def make_z_image():
    # One token a byte; ids after them are the special ones.
    letters = make_clip_tokenizer(77, "!")
    symbols = [symbol for symbol in letters.get_vocab() if len(symbol) == 1]
    tokenizer = Qwen2Tokenizer(vocab={symbol: i for i, symbol in enumerate(sorted(symbols))}, merges=[])
    tokenizer.add_special_tokens(
        {"pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    text = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=make_vae(),
        text_encoder=Qwen3Model(text).eval(),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def main():
    parser = argparse.ArgumentParser(description="Write a toy pipeline with random weights.")
    parser.add_argument("kind", choices=["flux", "z_image"])
    parser.add_argument("output_dir", type=Path, help="Folder to write the pipeline to.")
    args = parser.parse_args()
    try:
        args.output_dir.mkdir(parents=True)
    except OSError as error:
        parser.error(str(error))
    torch.manual_seed(0)
    {"flux": make_flux, "z_image": make_z_image}[args.kind]().save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
