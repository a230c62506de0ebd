# SPDX-License-Identifier: Apache-2.0
"""
Run a training script from beginning to end as if the GPU were smaller, and note what it used.

    python examples/benchmark/run_capped.py 8 --output outputs/benchmark/lora.json -- train_sd3_soar_lora.py \
        --pretrained_model_name_or_path outputs/medium --train_data_dir my_images --output_dir outputs/capped

Encoding, training, validation and the samples of the result all happen under the limit; a run that does not fit ends
with PyTorch's out-of-memory error and writes no JSON. The driver's context, which PyTorch does not see, is taken off
the limit.
"""

import argparse
import json
import runpy
import sys
import time
from pathlib import Path

import torch


CONTEXT_GIB = 0.75
GIB = 2**30


def main():
    parser = argparse.ArgumentParser(description="Run a training script as if the GPU were smaller.")
    parser.add_argument("limit", type=float, help="Memory of the card to imitate, in GiB.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write.")
    parser.add_argument("command", nargs="+", metavar="-- SCRIPT FLAGS", help="What to run.")
    args = parser.parse_args()
    script, *flags = args.command
    if not Path(script).is_file():
        parser.error(f"{script!r} is no script: give -- SCRIPT FLAGS")
    if not torch.cuda.is_available():
        parser.error("a limit on GPU memory needs a GPU")
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    if not CONTEXT_GIB < args.limit <= total:
        parser.error(f"the limit must be from {CONTEXT_GIB} to {total:.1f} GiB, what this GPU has; got {args.limit}")
    torch.cuda.set_per_process_memory_fraction((args.limit - CONTEXT_GIB) / total)
    started = time.perf_counter()
    sys.path.insert(0, str(Path(script).resolve().parent))
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")
    result = {
        "run": " ".join([script, *flags]),
        "device": torch.cuda.get_device_name(),
        "limit_gib": args.limit,
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "seconds": time.perf_counter() - started,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
