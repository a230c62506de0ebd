# SPDX-License-Identifier: Apache-2.0
"""
Time a rollout of the scripts stage by stage, and find out how much of it the GPU has nothing to do.

    python examples/make_tiny_sd3.py outputs/medium --size medium
    python examples/rl/time_rollouts.py outputs/medium --output outputs/rollouts.json \
        "nft --mixed_precision bf16 --gradient_checkpointing --train_batch_size 4 --num_groups 2 --group_size 12"

A configuration is a method (nft or flow_grpo) and flags of its script, which runs as it is, on random weights: one
rollout that nobody times, one whose stages are timed, and on a GPU the first batch and the first terms of a third
under PyTorch's profiler. The reward costs nothing; that of a metric comes on top, beside the drawing.
"""

import argparse
import contextlib
import functools
import importlib
import itertools
import json
import platform
import shlex
import sys
import tempfile
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers.training_utils import free_memory
from PIL import ImageStat


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "benchmark")]
from benchmark_step import GIB, profiled_kernels, synchronize  # noqa: E402


METHODS = {"nft": "train_sd3_nft_lora", "flow_grpo": "train_sd3_flow_grpo_lora"}
PROFILED_TERMS = 4


def brightness(images, rows):
    """A reward that tells pictures apart and takes no time."""
    return [ImageStat.Stat(image.convert("L")).mean[0] / 255 for image in images]


class Measured(Exception):
    """Ends a run of which everything is known."""


def measure(text, pipeline, folder):
    """Seconds of each stage of a configuration's second rollout, and on a GPU profiles of its drawing and training."""
    name, *flags = shlex.split(text)
    method = importlib.import_module(METHODS[name])
    cuda, seconds, logged, profiles = torch.cuda.is_available(), defaultdict(float), [], {}
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(f"a photo of {i} clocks on a wooden table" for i in range(2, 34)))
    paths = {"--prompts": prompts, "--output_dir": folder / "out", "--pretrained_model_name_or_path": pipeline}
    arguments = [str(word) for pair in paths.items() for word in pair]
    arguments += "--reward time_rollouts:brightness=1 --seed 0 --report_to none".split()
    arguments += ["--max_train_steps", "3" if cuda else "2", *flags]  # the third is for the profiler
    args = method.parse_args(arguments)

    def log(accelerator, logs, step):
        logged.append(logs)
        if len(logged) == 1:
            seconds.clear()
            if cuda:
                torch.cuda.reset_peak_memory_stats()

    def timed(stage, function):
        """`function`, with its time added to the stage's in the rollout that is timed."""

        @functools.wraps(function)
        def call(*inputs):
            profile = cuda and len(logged) == 2 and stage == "drawing" and stage not in profiles
            with profiled_kernels() if profile else contextlib.nullcontext({}) as found:
                started = time.perf_counter()
                result = function(*inputs)
                synchronize(cuda and stage != "reward")  # that runs in a thread of its own
                if len(logged) < 2:
                    seconds[stage] += time.perf_counter() - started
            if profile:
                profiles[stage] = found
            return result

        return call

    def timed_losses(*inputs):
        """The terms of an update, with the backward that the script runs on each before it asks for the next."""
        terms = method_losses(*inputs)
        if len(logged) < 2:
            started = time.perf_counter()
            yield from terms
            synchronize(cuda)
            seconds["training"] += time.perf_counter() - started
        else:
            next_terms = itertools.islice(terms, PROFILED_TERMS)
            with profiled_kernels() as profiles["training"]:
                yield from next_terms
            raise Measured

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    method_losses = method.policy_losses
    with contextlib.ExitStack() as patches:
        replace = functools.partial(mock.patch.object, method)
        for stage, function in (("drawing", "sample"), ("decoding", "decode"), ("reward", "score")):
            patches.enter_context(replace(function, timed(stage, getattr(method, function))))
        patches.enter_context(replace("policy_losses", timed_losses))
        patches.enter_context(mock.patch.object(Accelerator, "log", log))
        patches.enter_context(mock.patch.object(sys, "argv", [f"{METHODS[name]}.py", *arguments]))
        patches.enter_context(contextlib.suppress(Measured))
        method.run(args)
    stages = {stage: seconds[stage] for stage in ("drawing", "decoding", "training")}
    pictures = args.num_groups * args.group_size
    return {
        "configuration": text,
        "pictures": pictures,
        "pictures_per_second_drawn": pictures / (stages["drawing"] + stages["decoding"]),
        "rollout_s": logged[1]["seconds"],
        "stages_s": stages | {"everything else": logged[1]["seconds"] - sum(stages.values())},
        "reward_s": seconds["reward"],
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB if cuda else None,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB if cuda else None,
        "idle": {stage: found["idle_s"] / found["profiled_s"] for stage, found in profiles.items()},
        "profiles": profiles,
        "logs": logged[1],
    }


def table(document):
    head = "| configuration | pictures | drawn a second | drawing | decoding | training | rest | a rollout | reserved "
    lines = [head + "| idle, drawing | idle, training |", "| --- |" + " --: |" * 10]
    for row in document["results"]:
        stages = [f"{value:.2f} s" for value in (*row["stages_s"].values(), row["rollout_s"])]
        memory = f"{row['peak_reserved_gib']:.1f} GiB" if row["peak_reserved_gib"] else ""
        idle = [f"{row['idle'][stage]:.0%}" if stage in row["idle"] else "" for stage in ("drawing", "training")]
        cells = [str(row["pictures"]), f"{row['pictures_per_second_drawn']:.2f}", *stages, memory, *idle]
        short = row["configuration"].replace("--mixed_precision bf16 ", "").replace("--no_text_encoder_3 ", "")
        lines.append(f"| `{short}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description="Time a rollout of the scripts, stage by stage.")
    parser.add_argument("pipeline", type=Path, help="Folder of an SD3 pipeline, such as make_tiny_sd3.py's.")
    parser.add_argument("configurations", nargs="+", help='Quoted, for example "nft --train_batch_size 4".')
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write.")
    args = parser.parse_args()
    for text in args.configurations:
        if text.split()[:1] not in [[name] for name in METHODS]:
            parser.error(f"{text!r}: the first word must be one of {', '.join(METHODS)}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    versions = {name: version(name) for name in ("torch", "diffusers", "accelerate", "peft")}
    document = {"pipeline": args.pipeline.name, "machine": {"device": device, "versions": versions}, "results": []}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for text in args.configurations:
        with tempfile.TemporaryDirectory() as folder:
            document["results"].append(measure(text, args.pipeline.resolve(), Path(folder)))
        free_memory()  # else the next configuration is charged for this one
        args.output.write_text(json.dumps(document, indent=1) + "\n")
    print(table(document))


if __name__ == "__main__":
    main()
