# SPDX-License-Identifier: Apache-2.0
"""
What a run of reinforcement learning costs, computed: operations, hours and memory, at SD3.5-Medium's size.

    python examples/make_tiny_sd3.py outputs/medium_configs --size medium --configs_only
    python examples/rl/cost.py outputs/medium_configs

Counted as `../benchmark` counts, on tensors without memory. Hours are operations over a card's published rate in bf16,
times a share of it that is stated and not measured here; a reward's model, and reading pictures, come on top.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm.auto import tqdm


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "benchmark")]
import benchmark_step  # noqa: E402
import train_sd3_flow_grpo_lora as flow_grpo  # noqa: E402
import train_sd3_nft_lora as nft  # noqa: E402

import train_sd3_sft  # noqa: E402


# Card: memory in GB, dense bf16 operations a second as published, and the share of them that is assumed. The larger
# card's share is what `time_rollouts.py` measured of its recipe's batch; a smaller one waits less for its host.
CARDS = {"RTX 4090": (24, 165e12, 0.4), "H100": (80, 989e12, 0.15)}
SMALL = "--num_groups 8 --group_size 12 --train_batch_size 4 --max_train_steps 300"
LARGE = "--num_groups 24 --group_size 16 --train_batch_size 16 --max_train_steps 300"
NFT = "--num_train_sigmas 4 --old_start 75 --old_rate 0.0075 --old_max 0.999"
WINDOW = (
    "--rollout_guidance 1 --sde_type cps --sde_noise_scale 0.8 --sde_window_size 3 --kl_weight 0 --clip_range 1e-5"
)
WINDOW += " --num_updates 2 --adam_epsilon 1e-15"
COMMON = "--mixed_precision bf16 --gradient_checkpointing --resolution 512 --max_sequence_length 128"
RECIPES = [
    ("RTX 4090", nft, f"{SMALL} {NFT}"),
    ("RTX 4090", flow_grpo, f"{SMALL} {WINDOW}"),
    ("H100", nft, f"{LARGE} {NFT}"),
    ("H100", flow_grpo, f"{LARGE} {WINDOW}"),
]


def forwards(method, args):
    """Forwards of the model a picture: `tuple[int, int, int]`, while drawing, with a backward, and for comparison."""
    if method is nft:
        late = args.max_train_steps * args.num_updates > args.old_start
        return args.num_rollout_steps, args.num_train_sigmas, args.num_train_sigmas * (late + bool(args.kl_weight))
    branches = 1 if args.rollout_guidance == 1 else 2
    trained = branches * len(flow_grpo.noisy_steps(args, 0))
    return branches * args.num_rollout_steps, trained, trained * bool(args.kl_weight)


def decoding_bytes(folder, args):
    """Bytes alive at the peak of decoding a batch, and those of the VAE's weights, which it includes."""
    config = AutoencoderKL.load_config(folder, subfolder="vae")
    side = args.resolution // 2 ** (len(config["block_out_channels"]) - 1)
    with torch.no_grad(), FakeTensorMode(), benchmark_step.LiveBytes() as live:
        vae = AutoencoderKL.from_config(config)
        vae.enable_slicing()
        weights = live.now
        vae.decode(torch.zeros(args.train_batch_size, config["latent_channels"], side, side))
    return live.peak, weights


def count(card, method, flags, folder):
    """The costs of a recipe: `dict`, one JSON line."""
    required = ["--pretrained_model_name_or_path", str(folder), "--prompts", __file__, "--reward", "ocr=1"]
    args = method.parse_args([*required, *COMMON.split(), *flags.split()])
    text = f"soar_lora {COMMON} --rank {args.rank} --train_batch_size {args.train_batch_size}"
    configuration = benchmark_step.Configuration(f"{text} --cache_latents --cache_prompt_embeds", folder)
    configuration.training_losses = train_sd3_sft.training_losses  # one graph of a batch, as here
    step = configuration.count()
    forward = step["tflop"] / step["forward_equivalents"] / args.train_batch_size
    graph = step["tflop"] / args.train_batch_size
    drawing, graphs, others = forwards(method, args)
    picture = forward * (drawing + others) + graph * graphs
    pictures = args.num_groups * args.group_size
    memory, rate, share = CARDS[card]
    decoding, vae = decoding_bytes(folder, args)
    return {
        "card": card,
        "memory_gb": memory,
        "script": Path(method.__file__).name,
        "flags": flags,
        "pictures": pictures,
        "drawing": drawing,
        "graphs": graphs,
        "others": others,
        "tflop_forward": forward,
        "tflop_graph": graph,
        "tflop_rollout": picture * pictures,
        "rollout_seconds": picture * pictures * 1e12 / rate / share,
        "hours": picture * pictures * args.max_train_steps * 1e12 / rate / share / 3600,
        "training_gib": step["peak_gib"] + vae / benchmark_step.GIB,
        "drawing_gib": step["weights_gib"] + decoding / benchmark_step.GIB,
    }


def table(found):
    head = (
        "| card | script | pictures a rollout | forwards drawing, trained, compared | TFLOP a rollout | a rollout | "
    )
    lines = [head + "all | peak, training | peak, drawing |", "| --- | --- |" + " --: |" * 7]
    for row in found:
        lines.append(
            f"| {row['card']} ({row['memory_gb']} GB) | `{row['script']}` | {row['pictures']} | {row['drawing']}, "
            f"{row['graphs']}, {row['others']} | {row['tflop_rollout']:,.0f} | {row['rollout_seconds']:.0f} s | "
            f"{row['hours']:.1f} h | {row['training_gib']:.1f} GiB | {row['drawing_gib']:.1f} GiB |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description="Operations, hours and memory of the recipes, computed.")
    parser.add_argument("pipeline", type=Path, help="Of SD3.5-Medium's sizes; configs are enough.")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "cost.json", help="JSON file to write.")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found = [count(*recipe, args.pipeline) for recipe in tqdm(RECIPES, "Counting", unit="recipe")]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
