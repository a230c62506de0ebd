# SPDX-License-Identifier: Apache-2.0
"""
Time the choices that `NOTES.md` speaks of, side by side in one run, on the device that is there.

    python examples/benchmark/compare_choices.py outputs/small

Prints seconds, the ratio to the first line of each group, and the bytes that the choice had alive beside the model.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from benchmark_step import LiveBytes, script, synchronize
from diffusers import SD3Transformer2DModel


def timed(function, device, repeats):
    """Median seconds of a call, after one that is not timed."""
    function()
    seconds = []
    for _ in range(repeats):
        synchronize(device.type == "cuda")
        started = time.perf_counter()
        function()
        synchronize(device.type == "cuda")
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def show(group, choices, device, repeats):
    base = None
    for name, function in choices.items():
        seconds = timed(function, device, repeats)
        with LiveBytes() as live:
            function()
        base = base or seconds
        print(f"| {group} | {name} | {seconds:.4f} | {seconds / base:.2f} | {live.peak / 2**20:.1f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Time the choices that NOTES.md speaks of.")
    parser.add_argument("pipeline", type=Path, help="Folder of an SD3 pipeline.")
    parser.add_argument("--batch_size", type=script.number(int, 1), default=4)
    parser.add_argument("--repeats", type=script.number(int, 1), default=20)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    load = {"subfolder": "transformer", "use_safetensors": True, "dtype": torch.float32}
    with script.failing_with(f"{args.pipeline} cannot be loaded"):
        transformer = SD3Transformer2DModel.from_pretrained(args.pipeline, **load).to(device).train()
    config, n = transformer.config, args.batch_size
    inputs = {
        "hidden_states": torch.randn(n, config.in_channels, config.sample_size, config.sample_size, device=device),
        "timestep": torch.rand(n, device=device) * 1000,
        "encoder_hidden_states": torch.randn(n, 333, config.joint_attention_dim, device=device),
        "pooled_projections": torch.randn(n, config.pooled_projection_dim, device=device),
        "return_dict": False,
    }
    print(f"{args.pipeline.name}, {device.type}, batch {n}, {torch.get_num_threads()} threads\n")
    print("| group | choice | seconds | ratio | MiB alive beside |\n| --- | --- | --: | --: | --: |")

    parameters = list(transformer.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizers = {
        "AdamW, a loop": {"foreach": False},
        "AdamW, foreach": {"foreach": True},
        "AdamW, fused": {"fused": True},
    }
    optimizers = {name: torch.optim.AdamW(parameters, lr=1e-9, **flags).step for name, flags in optimizers.items()}
    show("optimizer", optimizers, device, args.repeats)

    # `fuse_qkv_projections` does not run with the second attention of SD3.5-Medium, so only its products are timed.
    width, tokens = 1536, torch.randn(1024, 1536, device=device, requires_grad=True)
    apart = [torch.nn.Linear(width, width, device=device) for _ in range(3)]
    fused = torch.nn.Linear(width, 3 * width, device=device)
    projections = {
        "apart": lambda: sum(layer(tokens).sum() for layer in apart).backward(),
        "fused": lambda: fused(tokens).sum().backward(),
    }
    show("query, key, value", projections, device, args.repeats)

    def seven(one_context):
        """A SOAR step's forwards under bf16 autocast, which keeps the cast weights until its context ends."""
        transformer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=one_context):
            for _ in range(7):
                with torch.autocast(device.type, torch.bfloat16):
                    loss = transformer(**inputs)[0].float().square().mean()
                loss.backward()

    choices = {"a context a forward": lambda: seven(False), "a context a step": lambda: seven(True)}
    show("autocast", choices, device, max(3, args.repeats // 7))


if __name__ == "__main__":
    main()
