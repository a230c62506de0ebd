# SPDX-License-Identifier: Apache-2.0
"""
Count the operations of one forward of each model of the plan, on tensors without memory, into `models.json`.

    python examples/paper/count_models.py
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmark"))
from benchmark_step import CPU_ATTENTION  # noqa: E402


# Of the published configs, what differs from the classes' defaults.
SD3 = {"pos_embed_max_size": 384, "qk_norm": "rms_norm"}
MEDIUM = SD3 | {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "dual_attention_layers": tuple(range(13)),
}
LARGE = SD3 | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TEXT_TOKENS = 77 + 256


def stable_diffusion_3(config, side):
    model = SD3Transformer2DModel(in_channels=16, out_channels=16, joint_attention_dim=4096, **config)
    return model, {
        "hidden_states": torch.zeros(1, 16, side // 8, side // 8),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.zeros(1, TEXT_TOKENS, 4096),
        "pooled_projections": torch.zeros(1, 2048),
    }


def flux(side):
    model, tokens = FluxTransformer2DModel(guidance_embeds=True), (side // 16) ** 2
    return model, {
        "hidden_states": torch.zeros(1, tokens, 64),
        "encoder_hidden_states": torch.zeros(1, 512, 4096),
        "pooled_projections": torch.zeros(1, 768),
        "timestep": torch.zeros(1),
        "guidance": torch.zeros(1),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(512, 3),
    }


def sdxl(side):
    return UNet2DConditionModel(**SDXL), {
        "sample": torch.zeros(1, 4, side // 8, side // 8),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.zeros(1, 77, 2048),
        "added_cond_kwargs": {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)},
    }


def count(make, *inputs):
    """Units of 1e12 operations of one forward of one picture."""
    with torch.no_grad(), FakeTensorMode(), FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        model, arguments = make(*inputs)
        model(**arguments)
    return counter.get_total_flops() / 1e12


def main():
    found = {
        "SD3.5-M, 512 px": count(stable_diffusion_3, MEDIUM, 512),
        "SD3.5-L, 1024 px": count(stable_diffusion_3, LARGE, 1024),
        "SD-XL, 1024 px": count(sdxl, 1024),
        "FLUX.1-dev, 1024 px": count(flux, 1024),
    }
    text = json.dumps(found, indent=1) + "\n"
    Path(__file__).with_name("models.json").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
