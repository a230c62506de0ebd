# SPDX-License-Identifier: Apache-2.0
"""
Tables and a picture of what `benchmark_step.py` and `run_capped.py` wrote.

    python examples/benchmark/report_benchmark.py examples/benchmark/results

Prints Markdown; draws FOLDER/report.png: peak memory of each recipe against the sizes of cards.
"""

import argparse
import json
import re
from pathlib import Path


CARDS = (8, 12, 16, 24, 80)  # GB


def short(configuration):
    """A configuration without the flags that nearly all have."""
    words = configuration.replace("--cache_latents --cache_prompt_embeds", "").replace("--mixed_precision bf16", "")
    words = words.replace("--bnb_quantization_config_path examples/configs/nf4.json --use_8bit_adam", "NF4 base")
    words = " ".join(words.split())
    if "--cache_latents" not in configuration:
        words += " (encoders on the device)"
    return words


def label(configuration):
    """What a bar of the picture is called: the method, its image size and batch, and what else it was given."""
    text = short(configuration).replace("--", "").replace("(encoders on the device)", "+ encoders")
    text = text.replace("gradient_checkpointing", "checkpointing").replace("rank 32 ", "")
    size, batch = (re.search(rf"{flag} (\d+)", text) for flag in ("resolution", "train_batch_size"))
    method, *rest = re.sub(r"(resolution|train_batch_size) \d+ ?", "", text).split()
    return f"{method} {' '.join(rest)}, {size[1] if size else 512} px, batch {batch[1] if batch else 4}".replace(
        " ,", ","
    )


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
    """Peak memory of each recipe as a bar against the sizes of cards, and its forwards a step beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    measured = {}
    for document in documents.values():
        for result in document["results"]:
            if isinstance(result["measured"], dict) and result["measured"]["peak_allocated_gib"]:
                measured[result["configuration"]] = result["measured"]["peak_reserved_gib"]
    names = [name for name in ("count_step", "count_lora", "count_small") if name in documents] or [*documents]
    results = [result for name in names for result in documents[name]["results"]]
    results = [result for result in results if result["counted"]["peak_gib"] < max(CARDS)]
    results.sort(key=lambda result: result["counted"]["peak_gib"], reverse=True)
    colours = {"sft": "tab:green", "soar": "tab:blue", "soar_lora": "tab:purple", "reference": "tab:red"}
    figure, axes = plt.subplots(figsize=(11, 0.32 * len(results) + 1.5), layout="constrained")
    for place, result in enumerate(results):
        counted, name = result["counted"], result["configuration"]
        axes.barh(place, counted["peak_gib"], color=colours[name.split()[0]], alpha=0.8)
        if name in measured:
            axes.plot(measured[name], place, "k|", markersize=11)
        end = max(counted["peak_gib"], measured.get(name, 0))
        axes.annotate(f"{counted['forward_equivalents']:.0f} forwards", (end, place), xytext=(5, 0),
                      textcoords="offset points", va="center", fontsize=8)  # fmt: skip
    for size in CARDS:
        axes.axvline(size, color="grey", lw=0.8, ls="--")
        axes.annotate(f"{size} GB", (size, len(results) - 0.4), fontsize=8, ha="center", va="bottom", color="grey")
    axes.set_yticks(range(len(results)), [label(result["configuration"]) for result in results], fontsize=8)
    axes.set(
        xlim=(0, 1.06 * max(CARDS)),
        ylim=(-0.6, len(results) + 0.4),
        xlabel="peak memory, GiB: counted (bar); reserved on a GPU (mark)",
    )
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description="Tables and a picture of the benchmark's results.")
    parser.add_argument("results", type=Path, help="Folder of JSON files.")
    parser.add_argument("--no_picture", action="store_true")
    args = parser.parse_args()
    documents = {}
    for path in sorted(args.results.glob("*.json")):
        try:
            documents[path.stem] = json.loads(path.read_text())
        except ValueError as error:
            parser.error(f"{path} is no JSON: {error}")
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
            same = steps.get(name.replace("count", "gpu"), {"results": []})["results"]  # of one machine
            tables.append(step_table(document, measured | {r["configuration"]: r["measured"] for r in same}))
        if not gpu and any(r["measured"] and r["configuration"].startswith("sft") for r in document["results"]):
            tables.append(ratio_table(document))
        for table in tables:
            print(f"{name}: {document['pipeline']}, {document['machine']['device']}\n\n{table}\n")
    print(kernel_table(steps.values()) + "\n")
    if runs:
        print(run_table(runs) + "\n")
    if "rehearsal" in documents:
        from rehearse import table

        print(f"rehearsal: {documents['rehearsal']['machine']['device']}\n\n{table(documents['rehearsal'])}\n")
    if not args.no_picture:
        draw(steps, args.results / "report.png")


if __name__ == "__main__":
    main()
