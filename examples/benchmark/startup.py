# SPDX-License-Identifier: Apache-2.0
"""
What a start costs against the number of images, in time and memory, and how fast the data loader is.

    python examples/make_tiny_sd3.py outputs/tiny
    python examples/benchmark/startup.py outputs/tiny --output examples/benchmark/results/startup.json
    python examples/benchmark/startup.py --report examples/benchmark/results/startup.json

Small pictures with captions, each of other bytes, as a folder, as the authors' JSONL and as Parquet for `datasets`.
Of each a start that checks the images and caches nothing, one that encodes everything, a second one, and a resumed one
in the middle of the third epoch: whole processes of two steps with a tiny model. What a run takes beyond that with the
fewest images is the images' cost.
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import save
from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_sd3_sft as script  # noqa: E402
from data_utils import Cache, digest, make_table  # noqa: E402


BATCH = 100  # images a step
STARTS = {"checked": "first, nothing cached", "first": "first, encoding", "second": "second", "resumed": "resumed"}
MAIN_MEMORY = "second"  # the start whose memory is told


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
    """Seconds of a run, as the shell would see them, and GiB of memory at most of its main process."""
    command = [sys.executable, ROOT / "train_sd3_sft.py", "--pretrained_model_name_or_path", args.pipeline, *data]
    command += ["--output_dir", output, "--max_train_steps", steps, "--train_batch_size", BATCH, "--seed", 0]
    command += ["--resolution", args.side, "--report_to", "none", *more]
    command += ["--max_sequence_length", 16, "--dataloader_num_workers", args.workers]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    started, most = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([str(word) for word in command], env=environment, stderr=said)
        while process.poll() is None:
            # Not what `wait4` says: that has the memory of this process, from which the other was forked.
            with contextlib.suppress(OSError):  # it has just ended
                peak = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
                most = max(most, int(peak[1]) if peak else 0)
            time.sleep(0.05)
        seconds = time.perf_counter() - started
        if process.returncode:
            said.seek(0)
            sys.exit(f"error: {' '.join(map(str, command))}\n{said.read()[-2000:]}")
    return {"seconds": seconds, "gib": most / 2**20}


def measure(args, kind, number):
    """The starts of a kind of data with `number` images, and what Pillow alone takes to decode them."""
    folder = args.folder / f"{kind}_{number}"
    data, output = make_data(kind, folder, number, args.side), folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    pictures = [picture(i, args.side) for i in range(500)]
    started = time.perf_counter()
    for data_of_one in pictures:
        Image.open(io.BytesIO(data_of_one)).convert("RGB")
    result = {"kind": kind, "images": number, "decoding": (time.perf_counter() - started) / len(pictures)}
    result["checked"] = run(args, data, output, 2, "--overwrite_output_dir")
    cached = ["--cache_latents", "--cache_prompt_embeds", "--cache_batch_size", 32, "--checkpointing_steps", 2]
    for start in ("first", "second"):
        result[start] = run(args, data, output, 2, *cached, "--overwrite_output_dir")
    # A start asks a checkpoint for nothing but its step, so it need not be trained to the third epoch.
    middle = 5 * number // (2 * BATCH)
    checkpoint = (output / "checkpoint-2").rename(output / f"checkpoint-{middle}")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    (checkpoint / "trainer_state.json").write_text(json.dumps(state | {"step": middle}))
    result["resumed"] = run(args, data, output, middle + 2, *cached, "--resume_from_checkpoint", "latest")
    files = sum(1 for path in (output / "cache").rglob("*") if path.is_file())
    return result | {"cache_files": files}


def loader(args, resolution, cached, workers, number=64):
    """Samples a second of the data loader alone, with photographs' sizes or cached tensors of SD3.5's size."""
    folder = args.folder / f"loader_{resolution}"
    flags, side = make_data("folder", folder, number, 1100), resolution // 8  # 1.2 megapixels
    flags += ["--pretrained_model_name_or_path", args.pipeline, "--resolution", resolution, "--seed", 0]
    flags += ["--cache_dir", folder / "cache", "--dataloader_num_workers", workers, "--train_batch_size", 4]
    flags += ["--cache_latents", "--cache_prompt_embeds"] if cached else []
    options = script.parse_args([str(flag) for flag in flags])
    rows = script.load_images(options)
    inspected = script.inspect_images(options, {"divisor": 16, "max_side": 4096}, rows)  # SD3.5 has such sides
    images = script.TrainingImages(options, rows, inspected, {"vae": "vae", "text": "text"})
    if cached:
        moments = {"moments": torch.randn(32, side, side)}
        embeds = {"prompt_embeds": torch.randn(77 + 256, 4096).bfloat16(), "pooled_prompt_embeds": torch.randn(2048)}
        for cache, keys, tensors in (
            (images.latents, [images.latents_key(item["digest"], item["size"], False) for item in inspected], moments),
            (images.embeds, [images.embeds_key(item["captions"][0]) for item in inspected], embeds),
        ):
            cache.write((key, save(tensors)) for key in keys if cache.find(key) < 0)
    process = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    batches = iter(script.make_dataloader(options, process, images, 0))
    for _ in range(4):  # the workers have started, and the files are in memory
        next(batches)
    started = time.perf_counter()
    for _ in range(args.batches):
        next(batches)
    rate = args.batches * options.train_batch_size / (time.perf_counter() - started)
    return {"resolution": resolution, "cached": cached, "workers": workers, "samples_per_second": rate}


class Samples(torch.utils.data.Dataset):
    """What a worker does with the table and the index of `number` images, without their bytes."""

    def __init__(self, folder, number):
        self.table = make_table({"name": f"{i}.jpg", "digest": digest(i), "size": (64, 64)} for i in range(number))
        self.cache = Cache(folder)
        self.cache.write((digest(i), b"") for i in range(number) if self.cache.find(digest(i)) < 0)

    def __getitem__(self, index):
        return len(self.cache[self.table[index]["digest"]])

    def __len__(self):
        return len(self.table)


def worker_memory(folder, number):
    """MiB that a forked data-loader worker has for itself after 2,000 samples of `number` images."""
    order = torch.randint(number, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    options = {"sampler": order, "num_workers": 1, "multiprocessing_context": "fork", "persistent_workers": True}
    samples = torch.utils.data.DataLoader(Samples(folder, number), 1, **options)
    batches = iter(samples)
    for _ in order:
        next(batches)
    status = Path(f"/proc/{batches._workers[0].pid}/smaps_rollup").read_text()
    return sum(int(size) for size in re.findall(r"Private_Dirty: +(\d+)", status)) / 1024


def slopes(results, kind):
    """Of a kind, the results with the fewest and the most images, and the seconds a further one costs each start."""
    few, *_, many = sorted((r for r in results if r["kind"] == kind), key=lambda result: result["images"])
    more = many["images"] - few["images"]
    return few, many, {start: (many[start]["seconds"] - few[start]["seconds"]) / more for start in STARTS}


def report(measured):
    """Markdown: what each further image costs from the fewest to the most, what a million would, and the loader."""
    results, lines = measured["results"], []
    lines += ["| a further image | decoding it | " + " | ".join(STARTS.values()) + " | a million, second start |"]
    lines += ["| --- |" + " --: |" * (len(STARTS) + 2)]
    for kind in dict.fromkeys(result["kind"] for result in results):
        few, many, cost = slopes(results, kind)
        cells = [f"{kind}, {few['images']:,} to {many['images']:,}", f"{many['decoding'] * 1e3:.2f} ms"]
        cells += [f"{seconds * 1e3:.3f} ms" for seconds in cost.values()]
        lines.append(f"| {' | '.join(cells)} | {cost['second'] * 1e6:.0f} s |")
    lines += ["", "| | peak memory a million images | files in the caches per 1,000 |", "| --- | --: | --: |"]
    for kind in dict.fromkeys(result["kind"] for result in results):
        few, many, _ = slopes(results, kind)
        more = many["images"] - few["images"]
        memory = (many[MAIN_MEMORY]["gib"] - few[MAIN_MEMORY]["gib"]) / more * 1e6
        lines.append(f"| {kind} | {memory:.2f} GiB | {many['cache_files'] / many['images'] * 1e3:.2f} |")
    low, high = measured["worker_mib"]
    lines += ["", f"A worker's own memory: {low[1]:.1f} MiB with {low[0]:,} images, {high[1]:.1f} with {high[0]:,}."]
    lines += ["", "| samples a second | " + " | ".join(f"{r} px" for r in (512, 1024)) + " |", "| --- | --: | --: |"]
    for cached in (False, True):
        for workers in sorted({rate["workers"] for rate in measured["loader"]}):
            name = f"{'cached' if cached else 'decoded from 1.2 megapixels'}, {workers} workers"
            found = [r for r in measured["loader"] if (r["cached"], r["workers"]) == (cached, workers)]
            rates = [f"{rate['samples_per_second']:.0f}" for rate in sorted(found, key=lambda r: r["resolution"])]
            lines.append(f"| {name} | {' | '.join(rates)} |")
    return "\n".join(lines)


def draw(measured, path):
    """The seconds of each start against the number of images."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    kinds = [*dict.fromkeys(result["kind"] for result in measured["results"])]
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(4 * len(kinds), 3.4), sharey=True, squeeze=False)
    for kind, axis in zip(kinds, axes[0], strict=True):
        results = sorted((r for r in measured["results"] if r["kind"] == kind), key=lambda result: result["images"])
        for start, name in STARTS.items():
            numbers, seconds = [r["images"] for r in results], [r[start]["seconds"] for r in results]
            axis.plot(numbers, seconds, marker="o", label=name)
        axis.set(xscale="log", yscale="log", title=kind, xlabel="images")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("seconds to the second step")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description="Measure the start of a run against the number of its images.")
    parser.add_argument("pipeline", type=Path, nargs="?", help="Folder of a tiny pipeline.")
    parser.add_argument("--output", type=Path, help="JSON file to write, and the picture beside it.")
    parser.add_argument("--report", type=Path, help="Print the tables of such a file, and nothing else.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000], help="Numbers of images.")
    parser.add_argument(
        "--kinds", nargs="+", choices=["folder", "jsonl", "datasets"], default=["folder", "jsonl", "datasets"]
    )
    parser.add_argument("--side", type=script.number(int, 16), default=64, help="Of a picture, in pixels.")
    parser.add_argument(
        "--workers", type=script.number(int, 0), default=0, help="Processes that load data in the runs."
    )
    parser.add_argument("--batches", type=script.number(int, 1), default=60, help="Of four, for the loader's speed.")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "startup", help="For the pictures.")
    args = parser.parse_args()
    if args.report:
        with script.failing_with(f"--report {args.report} is no file of this script"):
            print(report(json.loads(args.report.read_text())))
        return
    if not args.pipeline or not args.output or not (args.pipeline / "model_index.json").is_file():
        parser.error("give the folder of a pipeline, which make_tiny_sd3.py makes, and --output")
    if len(set(args.sizes)) < 2 or min(args.sizes) < BATCH:
        parser.error(f"--sizes {args.sizes}: give two or more, of at least {BATCH}")
    for flag, folder in (("--folder", args.folder), ("--output", args.output.parent)):
        with script.failing_with(flag):
            folder.mkdir(parents=True, exist_ok=True)
    measured = {"cores": os.cpu_count(), "side": args.side, "results": []}
    with script.failing_with(f"--output {args.output} holds something else than results of this script"):
        if args.output.exists():  # what is there is not run again
            measured = json.loads(args.output.read_text())
        done = {(result["kind"], result["images"]) for result in measured["results"]}

    def save_measured():
        args.output.write_text(json.dumps(measured, indent=1) + "\n")

    PartialState()  # the script's log asks for it
    if "loader" not in measured:
        choices = itertools.product((512, 1024), (False, True), (0, 2))
        measured["loader"] = [loader(args, *choice) for choice in choices]
        numbers = min(args.sizes), max(args.sizes)
        folders = [args.folder / f"index_{number}" for number in numbers]
        measured["worker_mib"] = [*zip(numbers, map(worker_memory, folders, numbers), strict=True)]
        save_measured()
    for kind in args.kinds:
        for number in tqdm(sorted({*args.sizes} - {images for name, images in done if name == kind}), desc=kind):
            measured["results"].append(measure(args, kind, number))
            save_measured()
    draw(measured, args.output.with_suffix(".png"))
    print(report(measured))


if __name__ == "__main__":
    main()
