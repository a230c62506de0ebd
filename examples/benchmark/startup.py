# SPDX-License-Identifier: Apache-2.0
"""
How long a run takes to its first step, and what memory, against the number of its images.

    python examples/make_tiny_sd3.py outputs/tiny
    python examples/benchmark/startup.py outputs/tiny --output outputs/benchmark/startup.json
    python examples/benchmark/startup.py outputs/tiny --output outputs/benchmark/startup.json --sizes 1000 100000

Small pictures with captions, each of other bytes, as a folder, as the authors' JSONL and as Parquet for `datasets`;
of each a first start, which encodes everything, a second, and a resumed one in the middle of the third epoch. Runs are
whole processes of two steps with a tiny model; what they take beyond those with the fewest images is the images'.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[2]
BATCH = 100  # images a step, so that a resumed run need not train long to be in its third epoch


def picture(number, side):
    """Bytes of a JPEG that no other number has."""
    noise = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((side, side)).save(file, "jpeg")
    return file.getvalue()


def make_data(kind, folder, number, side):
    """Write `number` pictures with captions to `folder`; the flags that train on them."""
    if not (folder / "whole").exists():
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "images").mkdir(parents=True)
        lines, columns = [], {"image": [], "text": []}
        for i in tqdm(range(number), desc=f"Making {kind}", unit="picture", leave=False):
            data, text = picture(i, side), f"picture number {i} of {number}"
            if kind == "datasets":
                columns["image"].append({"bytes": data, "path": None})
                columns["text"].append(text)
                continue
            md5 = hashlib.md5(data).hexdigest()
            name = f"{i // 1000:03d}/{i}.jpg" if kind == "folder" else f"{md5}.jpg"
            (folder / "images" / name).parent.mkdir(exist_ok=True)
            (folder / "images" / name).write_bytes(data)
            line = {"file_name": name, "text": text} if kind == "folder" else {"md5": md5, "caption_en": text}
            lines.append(json.dumps(line))
        if kind == "datasets":
            import datasets

            features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
            datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "images" / "data.parquet")
        else:
            target = folder / "images" / "metadata.jsonl" if kind == "folder" else folder / "data.jsonl"
            target.write_text("\n".join(lines) + "\n")
        (folder / "whole").touch()
    images = str(folder / "images")
    flags = {"folder": ["--train_data_dir", images], "datasets": ["--dataset_name", images]}
    return flags.get(kind, ["--jsonl_path", str(folder / "data.jsonl"), "--image_dir", images])


def run(args, data, output, steps, *more):
    """Seconds of a run, as the shell would see them, and GiB of memory at most of its processes."""
    command = [sys.executable, ROOT / "train_sd3_sft.py", "--pretrained_model_name_or_path", args.pipeline, *data]
    command += ["--output_dir", output, "--max_train_steps", steps, "--train_batch_size", BATCH, "--seed", 0]
    command += ["--resolution", args.side, "--cache_latents", "--cache_prompt_embeds", "--report_to", "none", *more]
    command += ["--max_sequence_length", 16, "--dataloader_num_workers", args.workers]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], env=environment, stderr=subprocess.PIPE, text=True)
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"error: {' '.join(map(str, command))}\n{said[-2000:]}")
    return {"seconds": time.perf_counter() - started, "gib": usage.ru_maxrss / 2**20}


def measure(args, kind, number):
    """The three starts of a kind of data with `number` images."""
    folder = args.folder / f"{kind}_{number}"
    data, output = make_data(kind, folder, number, args.side), folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    result = {"kind": kind, "images": number, "first": run(args, data, output, 2)}
    result["second"] = run(args, data, output, 2, "--overwrite_output_dir")
    middle = 5 * number // (2 * BATCH)  # the third epoch's
    run(args, data, output, middle, "--overwrite_output_dir", "--checkpointing_steps", middle)
    result["resumed"] = run(args, data, output, middle + 2, "--resume_from_checkpoint", "latest")
    files = sum(1 for path in (output / "cache").rglob("*") if path.is_file())
    return result | {"cache_files_per_image": files / number}


def report(results):
    """Markdown: what each further image costs, in milliseconds and KiB, from the fewest images to the most."""
    rows = ["| data | images | first start | second | resumed | memory, second | cache files |"]
    rows.append("| --- | --- | --: | --: | --: | --: | --: |")
    for kind in dict.fromkeys(result["kind"] for result in results):
        few, *_, many = sorted((r for r in results if r["kind"] == kind), key=lambda result: result["images"])
        more = many["images"] - few["images"]
        cells = [f"{few['images']:,} to {many['images']:,}"]
        cells += [
            f"{(many[start]['seconds'] - few[start]['seconds']) / more * 1e3:.2f} ms"
            for start in ("first", "second", "resumed")
        ]
        cells.append(f"{(many['second']['gib'] - few['second']['gib']) / more * 2**20:.1f} KiB")
        rows.append(f"| {kind} | {' | '.join(cells)} | {many['cache_files_per_image']:.2f} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description="Measure the start of a run against the number of its images.")
    parser.add_argument("pipeline", type=Path, help="Folder of a tiny pipeline.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000], help="Numbers of images, two or more.")
    parser.add_argument(
        "--kinds", nargs="+", choices=["folder", "jsonl", "datasets"], default=["folder", "jsonl", "datasets"]
    )
    parser.add_argument("--side", type=int, default=64, help="Of a picture, in pixels.")
    parser.add_argument("--workers", type=int, default=0, help="Processes that load data.")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "startup", help="For the pictures.")
    args = parser.parse_args()
    if not (args.pipeline / "model_index.json").is_file():
        parser.error(f"{args.pipeline} holds no pipeline; make_tiny_sd3.py makes one")
    if len(set(args.sizes)) < 2 or min(args.sizes) < BATCH:
        parser.error(f"--sizes {args.sizes}: give two or more, of at least {BATCH}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for kind in args.kinds:
        for number in tqdm(sorted(set(args.sizes)), desc=kind):
            results.append(measure(args, kind, number))
            args.output.write_text(json.dumps({"cores": os.cpu_count(), "results": results}, indent=1) + "\n")
    print(report(results))


if __name__ == "__main__":
    main()
