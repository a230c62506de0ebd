# SPDX-License-Identifier: Apache-2.0
"""
Write a result of the training scripts in the names that other programs read, or a LoRA of theirs in ours.

    python examples/convert_for_ui.py sd3-soar-lora soar_lora.safetensors       # a LoRA in kohya's names
    python examples/convert_for_ui.py sd3-soar soar.safetensors                 # a full fine-tune in MMDiT's names
    python examples/convert_for_ui.py sd3-soar-dora merged.safetensors \
        --merge_into stabilityai/stable-diffusion-3.5-medium                    # either, as a whole model
    python examples/convert_for_ui.py kohya.safetensors lora.safetensors        # back: a file for --lora

ComfyUI loads what the scripts write as it is. Forge reads a LoRA in kohya's names (`lora_unet_joint_blocks_...`), as
kohya's scripts do, and a transformer in the names of SD3's own code (MMDiT). Both fuse query, key and value into one
layer: three LoRAs of rank r on them become one of rank 3 r. A DoRA cannot be told in these names: merge it.
Back again, each of the three has those of the 3 r that it needs.

Source of the names: SD3, arXiv 2403.03206, https://github.com/Stability-AI/sd3.5.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from trained import LORA_FILE, find_trained, load_trained


# Of the whole model, and of a block: diffusers' name of a layer, and MMDiT's.
LAYERS = {
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
BLOCK_LAYERS = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
FUSED = {  # query, key and value, rows of one layer
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def mmdit_place(layer):
    """
    Where a layer is in MMDiT.

    Args:
        layer (`str`): Diffusers' name, without `.weight` or `.bias`.

    Returns:
        `tuple[str, int]`: MMDiT's name, and which third of its rows it is: 0, 1, 2, or `None` for all of them.

    Raises:
        `ValueError`: If there is no such layer.
    """
    match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", layer)
    if match is None and layer in LAYERS:
        return LAYERS[layer], None
    if match and match[2] in BLOCK_LAYERS:
        return f"joint_blocks.{match[1]}.{BLOCK_LAYERS[match[2]]}", None
    for name, parts in FUSED.items():
        if match and match[2] in parts:
            return f"joint_blocks.{match[1]}.{name}", parts.index(match[2])
    raise ValueError(f"no layer of a Stable Diffusion 3 transformer: {layer}")


def tensor_of(state, name):
    """A tensor by its name; raises `ValueError` where there is none."""
    if name not in state:
        raise ValueError(f"{name} is not there")
    return state[name]


def swap_halves(rows):
    """Scale and shift of a final modulation stand in the other order there."""
    return torch.cat(rows.chunk(2)[::-1])


def convert_transformer(state):
    """
    Rename all weights of a transformer.

    Args:
        state (`dict[str, torch.Tensor]`): By diffusers' names.

    Returns:
        `dict[str, torch.Tensor]`: by MMDiT's names.

    Raises:
        `ValueError`: If a weight is no part of a Stable Diffusion 3 transformer, or one of query, key and value lacks.
    """
    converted, fused = {}, defaultdict(dict)
    for name, tensor in state.items():
        if name == "pos_embed.pos_embed":
            converted["pos_embed"] = tensor
            continue
        layer, _, kind = name.rpartition(".")
        place, third = mmdit_place(layer)
        weight = tensor_of(state, f"{layer}.weight")
        if "adaLN" in place and weight.shape[0] == 2 * weight.shape[1]:  # of the last layer, and the last block's text
            tensor = swap_halves(tensor)
        if third is None:
            converted[f"{place}.{kind}"] = tensor
        else:
            fused[f"{place}.{kind}"][third] = tensor
    for name, thirds in fused.items():
        if len(thirds) < 3:
            raise ValueError(f"query, key or value of {name} is not there")
        converted[name] = torch.cat([thirds[i] for i in range(3)])
    return converted


def convert_lora(state, metadata=None):
    """
    Rename a LoRA, with alpha equal to the rank.

    Args:
        state (`dict[str, torch.Tensor]`): By diffusers' names, `transformer.LAYER.lora_A.weight` and so on.
        metadata (`dict`, *optional*): Of the adapter, in the file; its alpha is multiplied into the weights.

    Returns:
        `dict[str, torch.Tensor]`: by kohya's names.

    Raises:
        `ValueError`: If it is a DoRA, has a layer that is no part of a Stable Diffusion 3 transformer, or a tensor
            that is none of diffusers' LoRA: one of another kind, or in other names.
    """
    config = {name.removeprefix("transformer."): value for name, value in (metadata or {}).items()}
    alphas = config.get("alpha_pattern", {})
    if any("lora_magnitude_vector" in name for name in state):
        raise ValueError("a DoRA cannot be told in these names: merge it, by --merge_into")
    layers, converted = defaultdict(dict), {}
    for name, down in state.items():
        if ".lora_B." in name:
            tensor_of(state, name.replace(".lora_B.", ".lora_A."))
            continue
        layer, part, _ = name.removeprefix("transformer.").partition(".lora_A.")
        if not part:
            raise ValueError(f"{name} is no tensor of a LoRA in diffusers' names")
        up = tensor_of(state, name.replace(".lora_A.", ".lora_B."))
        rank = len(down)
        alpha = alphas.get(get_pattern_key(alphas, layer), config.get("lora_alpha", rank))
        up = up * (alpha / (rank**0.5 if config.get("use_rslora") else rank))
        place, third = mmdit_place(layer)
        if "adaLN" in place and up.shape[0] == 2 * down.shape[1]:
            up = swap_halves(up)
        layers[place][third] = down, up
    for place, parts in layers.items():
        name, ((down, up), *_) = f"lora_unet_{place.replace('.', '_')}", parts.values()
        if None not in parts:  # of query, key and value, some may have none: rows of zeros
            down = torch.cat([parts[third][0] for third in sorted(parts)])
            up = torch.block_diag(
                *(parts[third][1] if third in parts else up.new_zeros(len(up), 0) for third in range(3))
            )
        converted |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        converted[f"{name}.alpha"] = torch.tensor(float(len(down)))
    if not converted:
        raise ValueError("it holds no LoRA")
    return {name: tensor.contiguous() for name, tensor in sorted(converted.items())}


def convert_lora_back(state):
    """
    Rename a LoRA in kohya's names, with alpha equal to the rank.

    Args:
        state (`dict[str, torch.Tensor]`): By kohya's names.

    Returns:
        `dict[str, torch.Tensor]`: by diffusers' names, without what is of text encoders.

    Raises:
        `ValueError`: If a tensor is of something else than a LoRA of a layer of the transformer.
    """
    places = {place: [layer] for layer, place in (LAYERS | BLOCK_LAYERS).items()} | FUSED
    places = {place.replace(".", "_"): layers for place, layers in places.items()}
    state = {name: tensor for name, tensor in state.items() if not name.startswith("lora_te")}
    converted = {}
    for name in state:
        key, _, part = name.partition(".")
        match = re.fullmatch(r"lora_unet_(?:joint_blocks_(\d+)_)?(.+)", key)
        is_lora = match and match[2] in places and part in ("lora_down.weight", "lora_up.weight", "alpha")
        if not is_lora or not {f"{key}.lora_down.weight", f"{key}.lora_up.weight"} <= state.keys():
            raise ValueError(f"no LoRA of a Stable Diffusion 3 transformer in kohya's names: {name}")
        if part != "lora_down.weight":
            continue
        down, up = state[name], state[f"{key}.lora_up.weight"]
        if f"{key}.alpha" in state:
            up = up * (state[f"{key}.alpha"].item() / len(down))
        if "adaLN" in key and up.shape[0] == 2 * down.shape[1]:
            up = swap_halves(up)
        layers = places[match[2]]
        for layer, rows in zip(layers, up.chunk(len(layers)), strict=True):
            used = torch.ones(len(down), dtype=bool) if len(layers) == 1 else rows.any(dim=0)
            layer = f"transformer_blocks.{match[1]}.{layer}" if match[1] else layer
            if used.any():  # else this one of query, key and value has no LoRA
                converted[f"transformer.{layer}.lora_A.weight"] = down[used]
                converted[f"transformer.{layer}.lora_B.weight"] = rows[:, used]
    return converted


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0], allow_abbrev=False)
    parser.add_argument("source", type=Path, help="A run's --output_dir, or a LoRA's file in kohya's names.")
    parser.add_argument("output", type=Path, help="File to write, .safetensors; it must not exist.")
    parser.add_argument("--merge_into", help="Hub id or folder of the pipeline that the LoRA is merged into.")
    parser.add_argument("--transformer", help="Full fine-tune of that pipeline, if the LoRA was trained on one.")
    args = parser.parse_args(input_args)
    back = args.source.is_file()
    if not back and not args.source.is_dir():
        parser.error(f"{args.source}: no such folder or file")
    try:
        if args.output.exists() or args.output.suffix != ".safetensors":
            parser.error(f"{args.output}: give a new file with the ending .safetensors")
        args.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(str(error))
    sources = f"{args.source} --merge_into {args.merge_into}" if args.merge_into else str(args.source)
    try:
        lora = back or "lora" in find_trained(args.source)
        if args.transformer and not (lora and args.merge_into):
            parser.error("--transformer goes with a LoRA and --merge_into")
        if back:
            state = load_file(args.source)
            converted = convert_lora_back(state)
            if left_out := sum(name.startswith("lora_te") for name in state):
                print(f"{args.source}: {left_out} tensors of text encoders are left out")
        elif args.merge_into:
            others = dict.fromkeys(f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3"))
            trained = {"transformer": args.transformer} | find_trained(args.source)
            pipeline = load_trained(args.merge_into, **trained, vae=None, **others)
            if lora:
                pipeline.fuse_lora()
                pipeline.unload_lora_weights()
            converted = convert_transformer(pipeline.transformer.bfloat16().state_dict())
        elif lora:
            with safe_open(args.source / LORA_FILE, "pt") as file:
                metadata = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
            converted = convert_lora(load_file(args.source / LORA_FILE), metadata)
        else:
            files = sorted((args.source / "transformer").glob("*.safetensors"))
            converted = convert_transformer({k: v for file in files for k, v in load_file(file).items()})
    except (OSError, ValueError, SafetensorError) as error:
        parser.exit(1, f"error: {sources}: {' '.join(str(error).split())}\n")
    converted = {name: tensor.contiguous() for name, tensor in converted.items()}
    try:
        save_file(converted, args.output, {"format": "pt"})
    except SafetensorError as error:
        parser.exit(1, f"error: {args.output}: {error}\n")
    print(f"{args.output}: {len(converted)} tensors, for {'a LoRA' if lora and not args.merge_into else 'a model'}")


if __name__ == "__main__":
    sys.exit(main())
