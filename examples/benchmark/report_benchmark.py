# SPDX-License-Identifier: Apache-2.0
"""
Tables and a picture of what `benchmark_step.py` and `run_capped.py` wrote.

    python examples/benchmark/report_benchmark.py examples/benchmark/results

Prints Markdown; draws FOLDER/report.png, time against memory: measured where all of its points are, else counted.
"""

import argparse
import json
import re
from pathlib import Path


def short(configuration):
    """A configuration without the flags that nearly all have."""
    words = configuration.replace("--cache_latents --cache_prompt_embeds", "").replace("--mixed_precision bf16", "")
    words = words.replace("--bnb_quantization_config_path examples/configs/nf4.json --use_8bit_adam", "NF4 base")
    words = " ".join(words.split())
    if "--cache_latents" not in configuration:
        words += " (encoders on the device)"
    return words


def label(configuration):
    """What a point of the picture is called: the method, and what differs from its defaults."""
    text = short(configuration).replace("--", "").replace("(encoders on the device)", "+ encoders")
    for pattern, replacement in {
        r"train_batch_size 1 |rank 32 ": "",
        r"resolution (\d+)": r"\1 px",
        r"gradient_checkpointing": "checkpointing",
        r"aux_batch_size ": "chunk ",
    }.items():
        text = re.sub(pattern, replacement, text)
    return text


def on_gpu(document):
    return any(isinstance(m, dict) and m["peak_allocated_gib"] for m in (r["measured"] for r in document["results"]))


def step_table(document, on_gpu):
    """A row a configuration: what was counted, and what was timed on a GPU, here or in `on_gpu`, by configuration."""
    rows = ["| configuration | forwards | TFLOP | peak, counted | step, utilisation, peak allocated and reserved |"]
    rows.append("| --- | --: | --: | --: | --- |")
    for result in document["results"]:
        counted, measured = result["counted"], result["measured"] or on_gpu.get(result["configuration"])
        cells = [
            f"`{short(result['configuration'])}`",
            f"{counted['forward_equivalents']:.1f}",
            f"{counted['tflop']:.3g}",
            f"{counted['peak_gib']:.1f} GiB",
            "not measured",
        ]
        if isinstance(measured, str):
            cells[-1] = measured
        elif measured:
            memory = f"{measured['peak_allocated_gib']:.1f} and {measured['peak_reserved_gib']:.1f} GiB"
            cells[-1] = f"{measured['step_s']:.3f} s, {measured['model_flop_utilisation']:.0%}, {memory}"
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def ratio_table(document):
    """Times of one run as multiples of the plain SFT step's: what a slow machine can say, too."""
    results = [result for result in document["results"] if isinstance(result["measured"], dict)]
    base = next(r["measured"]["step_s"] for r in results if r["configuration"].startswith("sft"))
    rows = ["| configuration | forwards | step over SFT's | first step over SFT's |", "| --- | --: | --: | --: |"]
    for result in results:
        measured, forwards = result["measured"], result["counted"]["forward_equivalents"]
        cells = f"{forwards:.1f} | {measured['step_s'] / base:.2f} | {measured['first_step_s'] / base:.1f}"
        rows.append(f"| `{short(result['configuration'])}` | {cells} |")
    return "\n".join(rows)


def kernel_table(documents):
    """A row a configuration: seconds of a step on the GPU, kind of kernel by kind, and the step by the clock."""
    results = [r for document in documents for r in document["results"] if "profile" in (r["measured"] or ())]
    if not results:
        return ""
    kinds = [*results[0]["measured"]["profile"]["kinds_s"]]
    rows = [f"| configuration | {' | '.join(kinds)} | all kernels | step |", "| --- |" + " --: |" * (len(kinds) + 2)]
    for result in results:
        seconds = result["measured"]["profile"]["kinds_s"].values()
        cells = " | ".join(f"{value:.3f}" for value in (*seconds, sum(seconds), result["measured"]["step_s"]))
        rows.append(f"| `{short(result['configuration'])}` | {cells} |")
    return "\n".join(rows)


def run_table(documents):
    """A row a whole run under a memory limit."""
    rows = ["| run | limit | peak allocated | peak reserved |", "| --- | --: | --: | --: |"]
    for document in sorted(documents, key=lambda document: (document["limit_gib"], document["peak_reserved_gib"])):
        cells = f"{document['limit_gib']:g} GiB | {document['peak_allocated_gib']:.1f} GiB | "
        cells += f"{document['peak_reserved_gib']:.1f} GiB"
        run = document["run"].split(" --pretrained_model")[0]
        rows.append(f"| `{short(run.replace('train_sd3_', '').replace('.py', ''))}` | {cells} |")
    return "\n".join(rows)


def draw(documents, path):
    """Time, or operations where nothing was timed on a GPU, against peak memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {"batch 4, 512 px": ("step", "chunks"), "batch 1": ("small",)}
    kind = "gpu" if all(f"gpu_{part}" in documents for parts in panels.values() for part in parts) else "count"
    colours = {"sft": "tab:green", "soar": "tab:blue", "soar_lora": "tab:purple", "reference": "tab:red"}
    figure, all_axes = plt.subplots(1, 2, figsize=(14, 6), layout="constrained")
    for axes, (title, parts) in zip(all_axes, panels.items(), strict=True):
        names = [f"{kind}_{part}" for part in parts if f"{kind}_{part}" in documents]
        for number, result in enumerate(result for name in names for result in documents[name]["results"]):
            counted, measured = result["counted"], result["measured"]
            place = counted["peak_gib"], counted["tflop"]
            if isinstance(measured, str):
                continue
            if kind == "gpu":
                place = measured["peak_allocated_gib"], measured["step_s"]
            axes.scatter(*place, color=colours[result["configuration"].split()[0]], s=36)
            shift = (5, 4 + 9 * (number % 3)) if number % 2 else (5, -9 - 9 * (number % 3))
            line = {"arrowstyle": "-", "lw": 0.4, "color": "grey"}
            text = label(result["configuration"])
            axes.annotate(text, place, fontsize=7, xytext=shift, textcoords="offset points", arrowprops=line)
        axes.set(xscale="log", yscale="log", title=title, xlabel="peak memory, GiB" + " (counted)" * (kind == "count"))
        axes.set_ylabel("seconds a step" if kind == "gpu" else "TFLOP a step (counted; times not measured)")
        axes.margins(x=0.25, y=0.15)
        axes.grid(which="both", alpha=0.25)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description="Tables and a picture of the benchmark's results.")
    parser.add_argument("results", type=Path, help="Folder of JSON files.")
    parser.add_argument("--no_picture", action="store_true")
    args = parser.parse_args()
    documents = {path.stem: json.loads(path.read_text()) for path in sorted(args.results.glob("*.json"))}
    runs = [document for document in documents.values() if "run" in document]
    steps = {name: document for name, document in documents.items() if "pipeline" in document}  # not startup.json
    if not (runs or steps):
        parser.error(f"{args.results} holds no results: run examples/benchmark/run.sh first")
    measured = {r["configuration"]: r["measured"] for d in steps.values() if on_gpu(d) for r in d["results"]}
    counted = {r["configuration"] for d in steps.values() if not on_gpu(d) for r in d["results"]}
    for name, document in steps.items():
        tables, gpu = [], on_gpu(document)
        new = {result["configuration"] for result in document["results"]} - counted
        if new if gpu else not any(result["measured"] for result in document["results"]):
            tables.append(step_table(document, measured))
        if not gpu and any(r["measured"] and r["configuration"].startswith("sft") for r in document["results"]):
            tables.append(ratio_table(document))
        for table in tables:
            print(f"{name}: {document['pipeline']}, {document['machine']['device']}\n\n{table}\n")
    print(kernel_table(steps.values()) + "\n")
    if runs:
        print(run_table(runs) + "\n")
    if not args.no_picture:
        draw(steps, args.results / "report.png")


if __name__ == "__main__":
    main()
