# SPDX-License-Identifier: Apache-2.0
"""
Rehearse runs at SD3.5-Medium's full size on a CPU under Linux, before a card is rented for them.

    bash examples/benchmark/run.sh rehearse

Weights are random and the text encoders tiny; all else is real: caches, two steps of SOAR at a batch of one and N = 2,
a checkpoint and a picture after each, the result; then a run that goes on from the first checkpoint, whose result must
have the same bits. The most memory that a process kept resident stands beside what `benchmark_step.py` counts for a
step; the code, 1 GiB of it, and the reading of the weights come on top of that. What needs more memory or disk than
there is, is named and left out. A CPU without bf16 takes many times as long in it: there the LoRA's base is float32,
and all weights, which `--full_bf16` trains, are left out.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from benchmark_step import GIB, METHODS, Configuration, script
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[2]
FLAGS = "--train_batch_size 1 --trajectory_length 2 --cache_latents --cache_prompt_embeds"
LORA, FULL = f"soar_lora {FLAGS} --rank 32", f"soar {FLAGS} --mixed_precision bf16 --full_bf16"
LIBRARIES_GIB, DISK_GIB = 3, 12  # beyond what is counted; two checkpoints and two results of all weights in bf16


def run(command, log):
    """Run a command to its end: seconds, and the most GiB that it kept resident."""
    started = time.perf_counter()
    with open(log, "w") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        lines = Path(log).read_text().strip().splitlines()
        raise SystemExit(f"error: {Path(command[1]).name} failed, see {log}: {(lines or ['it printed nothing'])[-1]}")
    return time.perf_counter() - started, usage.ru_maxrss / 2**20


def weights(folder):
    """Those of a run's result."""
    found = {}
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("transformer/*.safetensors")]):
        found |= load_file(path)
    return found


def seconds_a_step(folder):
    """Of the last step of a run with a batch of one, as it was logged."""
    events = EventAccumulator(str(next((folder / "logs").rglob("events*")).parent)).Reload()
    return 1 / events.Scalars("samples_per_second")[-1].value


def rehearse(text, pipeline, data, resolution, work):
    """A run and its resumption: `dict`, one row of the table; or why there is too little memory or disk for them."""
    method, *flags = text.split()
    flags += ["--resolution", str(resolution)]
    configuration = Configuration(f"{method} {' '.join(flags)}", pipeline)
    counted = configuration.count_once(operations=False)
    peak = (counted["peak"] + (2 * counted["trained"] if configuration.args.full_bf16 else 0)) / GIB
    for what, needed, there in (
        ("memory", peak + LIBRARIES_GIB, psutil.virtual_memory().available / GIB),
        ("disk", DISK_GIB * counted["trained"] / 2.24e9, shutil.disk_usage(work).free / GIB),
    ):
        if needed > there:
            return f"{text} at {resolution} px needs {needed:.0f} GiB of {what}, and {there:.0f} are free"
    command = [sys.executable, f"{METHODS[method]}.py", "--pretrained_model_name_or_path", pipeline]
    command += ["--train_data_dir", data, "--cache_dir", work / "cache", *flags, "--max_train_steps", 2]
    command += "--checkpointing_steps 1 --validation_prompt two_red_circles --validation_steps 1 --seed 0".split()
    command += "--num_validation_images 1 --num_inference_steps 2 --report_to tensorboard --save_dtype bf16".split()
    straight, resumed = work / "straight", work / "resumed"
    shutil.rmtree(straight, ignore_errors=True)
    shutil.rmtree(resumed, ignore_errors=True)
    seconds, resident = run([*command, "--output_dir", straight], work / "straight.log")
    shutil.rmtree(straight / "checkpoint-2")
    resumed.mkdir()
    (straight / "checkpoint-1").rename(resumed / "checkpoint-1")
    again = [*command, "--output_dir", resumed, "--resume_from_checkpoint", "latest"]
    resumed_seconds, resumed_resident = run(again, work / "resumed.log")
    one, other = weights(straight), weights(resumed)
    result = {
        "configuration": text,
        "resolution": resolution,
        "counted_gib": peak,
        "resident_gib": resident,
        "resident_resumed_gib": resumed_resident,
        "step_s": seconds_a_step(straight),
        "run_s": seconds,
        "resumed_run_s": resumed_seconds,
        "same_bits": one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one),
    }
    shutil.rmtree(straight)
    shutil.rmtree(resumed)
    return result


def table(document):
    """A row a rehearsal."""
    rows = ["| | px | peak of a step, counted | most resident, resumed | a step | a run, resumed | same bits |"]
    rows.append("| --- | --: | --: | --: | --: | --: | --- |")
    for row in document["results"]:
        memory = f"{row['counted_gib']:.1f} GiB | {row['resident_gib']:.1f} and {row['resident_resumed_gib']:.1f} GiB"
        times = f"{row['step_s']:.0f} s | {row['run_s']:.0f} and {row['resumed_run_s']:.0f} s"
        name = row["configuration"].replace(f"{FLAGS} ", "")
        rows.append(f"| `{name}` | {row['resolution']} | {memory} | {times} | {'yes' if row['same_bits'] else 'NO'} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description="Rehearse runs at full size on a CPU.")
    parser.add_argument("pipeline", type=Path, help="Folder of a pipeline, such as make_tiny_sd3.py --size rehearsal.")
    parser.add_argument("data", type=Path, help="Folder of images with captions.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; what is in it is not run again.")
    parser.add_argument("--work", type=Path, default=Path("outputs/rehearsed"), help="Folder for the runs.")
    parser.add_argument("--resolutions", type=script.number(int, 16), nargs="+", default=[256, 512])
    args = parser.parse_args()
    for folder in (args.pipeline / "transformer", args.data):
        if not folder.is_dir():
            parser.error(f"{folder} is no folder")
    os.environ |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    machine = {"device": f"{platform.machine()}, {os.cpu_count()} cores", "torch": version("torch")}
    document = {"rehearsed": args.pipeline.name, "machine": machine, "results": []}
    for flag, folder in (("--work", args.work), ("--output", args.output.parent)):
        with script.failing_with(flag):
            folder.mkdir(parents=True, exist_ok=True)
    with script.failing_with(f"--output {args.output} holds something else than results of this script"):
        if args.output.exists():
            document = json.loads(args.output.read_text())
        done = [(result["configuration"], result["resolution"]) for result in document["results"]]
    configurations = [f"{LORA} --mixed_precision bf16", FULL]
    if "bf16" not in Path("/proc/cpuinfo").read_text():
        configurations = [f"{LORA} --mixed_precision no"]
        print(f"Left out, as this CPU does not compute in bf16: {FULL}")
    planned = [(text, resolution) for text in configurations for resolution in args.resolutions]
    for text, resolution in tqdm([plan for plan in planned if plan not in done], "Rehearsing", unit="run"):
        result = rehearse(text, args.pipeline.resolve(), args.data.resolve(), resolution, args.work.resolve())
        if isinstance(result, str):
            tqdm.write(f"Left out: {result}")
        else:
            document["results"].append(result)
            args.output.write_text(json.dumps(document, indent=1) + "\n")
    print(table(document))
    if not all(result["same_bits"] for result in document["results"]):
        raise SystemExit("error: a resumed run ended with other bits")


if __name__ == "__main__":
    main()
