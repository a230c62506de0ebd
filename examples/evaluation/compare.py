# SPDX-License-Identifier: Apache-2.0
"""
Compare scored runs: a table with intervals, a picture of it, and a page that shows the images side by side.

    python examples/evaluation/compare.py base=outputs/base sft=outputs/sft soar=outputs/soar --output_dir comparison

A run is a folder that `generate_images.py` wrote and `score_images.py` scored. Into --output_dir come

- `table.md`, also printed, and the same numbers in `comparison.json`: of every metric in the runs' `scores/` the mean,
  and its paired difference from the first run;
- `scores.png`: the means as bars;
- `report.html`: every prompt with the runs' images and scores, in one file that needs no server and no network. It
  filters, searches, sorts by where the runs differ most, and opens the full-size images where they still are.

Intervals are 95 % bootstrap intervals: prompts are drawn again, all images of a prompt together. Pairs of images have
the same prompt and `image_index`; where a run has the same prompt twice, its first is paired with the other's first.
GenEval is the mean of its tasks' means, as published by its authors, and its prompts are drawn again within the tasks.
"""

import argparse
import base64
import io
import json
import os
import tempfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image
from runs import DRAWS, SEED, data_utils, is_number, read_rows, script, summarise
from tqdm.auto import tqdm


LABELS = {
    "geneval": "GenEval",
    "ocr": "OCR",
    "clipscore": "CLIPScore",
    "pickscore": "PickScore",
    "hpsv2": "HPSv2",
    "imagereward": "ImageReward",
    "aesthetic": "Aesthetic",
}
COLORS = ("#8b919c", "#2f6fdb", "#e08a1e", "#2a9d6f", "#b8578f", "#7a5cd0", "#c9483b", "#4aa3c7")  # a run's, in turn
PUBLISHED = {
    "source": "SOAR, arXiv 2604.12617: GenEval and OCR on their test sets, all else on DrawBench",
    "models": ["SD-XL", "SD3.5-L", "FLUX.1-dev", "SD3.5-M", "SD3.5-M SFT", "SD3.5-M SOAR"],
    "geneval": ["0.55", "0.71", "0.66", "0.63", "0.70", "0.78"],
    "ocr": ["0.14", "0.68", "0.59", "0.59", "0.64", "0.67"],
    "clipscore": ["0.287", "0.289", "0.295", "0.285", "0.295", "0.295"],
    "pickscore": ["22.42", "22.91", "22.84", "22.34", "22.71", "22.86"],
    "hpsv2": ["0.280", "0.288", "0.274", "0.279", "0.284", "0.289"],
    "imagereward": ["0.76", "0.96", "0.96", "0.85", "1.04", "1.09"],
    "aesthetic": ["5.60", "5.50", "5.71", "5.36", "5.35", "5.46"],
}
TEMPLATE, PLACEHOLDER = Path(__file__).with_name("report_template.html"), "{{DATA}}"
MADE_BY = "examples/evaluation/compare.py"
OUTPUTS = {"table.md", "comparison.json", "scores.png", "report.html"}


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER", help="Scored runs; differences are from the first.")
    parser.add_argument("--output_dir", type=Path, default=Path("comparison"))
    size = script.number(int, 16, 1024)
    parser.add_argument("--thumbnail_size", type=size, default=256, help="Longer side in the page, in pixels.")
    return parser.parse_args(input_args)


def read_scored(folder):
    """
    The images of a run with their scores.

    Args:
        folder (`pathlib.Path`): With `metadata.jsonl` and `scores/METRIC.jsonl`.

    Returns:
        `dict[tuple, dict]`: by (prompt, `image_index`, how many such pairs came before) the image's "file", "tag",
        "seed", "scores" (`dict[str, float | None]`, `None` where it is missing) and "notes" (`list[str]`) on them.
    """
    images, files, seen = {}, {}, Counter()
    for row in read_rows(folder):
        pair = row["text"], row.get("image_index", 0)
        if not isinstance(pair[1], int):
            script.fail(f'{folder}/metadata.jsonl: {row["file_name"]} has an "image_index" that is no number')
        tag = row["tag"] if isinstance(row.get("tag"), str) else None
        seed = row["seed"] if is_number(row.get("seed")) else None
        image = {"file": row["file_name"], "tag": tag, "seed": seed, "scores": {}, "notes": []}
        images[*pair, seen[pair]] = files[row["file_name"]] = image
        seen[pair] += 1
    for path in sorted((folder / "scores").glob("*.jsonl")):
        for image in images.values():
            image["scores"][path.stem] = None
        if not path.is_file():
            script.fail(f"{path} is no file of scores")
        for _, row in data_utils.read_json_lines(path):
            name, score = row.get("file_name"), row.get("score")
            if not isinstance(name, str) or name not in files or not isinstance(score, int | float | None):
                script.fail(f"{path}: {name} is not in metadata.jsonl, or its score is no number; score it again")
            image = files[name]
            image["scores"][path.stem] = score if is_number(score) else None
            for key, value in row.items():
                if key not in ("file_name", "digest", "score") and value not in (None, "", [], {}):
                    image["notes"].append(f"{LABELS.get(path.stem, path.stem)} {key}: {str(value)[:300]}")
            if path.stem == "geneval" and image["tag"] is None:
                script.fail(f'{folder}/metadata.jsonl: {name} has no "tag", the task that GenEval is averaged over')
    if all(score is None for image in images.values() for score in image["scores"].values()):
        script.fail(f"{folder} has no scores: run `python examples/evaluation/score_images.py {folder}` first")
    return images


def compare(runs):
    """
    All numbers of the table.

    Args:
        runs (`dict[str, dict]`): By name, what [`read_scored`] returns.

    Returns:
        `tuple[dict, dict]`: by metric and run the [`summarise`]d scores, with "missing", the number of images that
        have none; and by metric and run, but the first, the paired differences from the first.
    """
    metrics = list(dict.fromkeys(m for images in runs.values() for image in images.values() for m in image["scores"]))
    metrics.sort(key=lambda metric: [*LABELS, metric].index(metric))
    first, scores, differences = next(iter(runs)), defaultdict(dict), defaultdict(dict)
    jobs = [(metric, name) for metric in metrics for name in runs]
    for metric, name in tqdm(jobs, desc="Drawing prompts again", leave=False):
        found = {key: image["scores"].get(metric) for key, image in runs[name].items()}
        own = {key: score for key, score in found.items() if score is not None}
        tags = {key: runs[name][key]["tag"] for key in own} if metric == "geneval" else None
        if own:
            scores[metric][name] = summarise(own, tags) | {"missing": len(found) - len(own)}
        if name == first:
            reference = own
        elif pairs := {key: score - reference[key] for key, score in own.items() if key in reference}:
            differences[metric][name] = summarise(pairs, tags)
    for name in list(runs)[1:]:
        if not any(name in found for found in differences.values()):
            script.fail(f"{first} and {name} have no pair: no prompt and image_index has the same metric in both")
    return dict(scores), dict(differences)


def read_settings(folders):
    """By setting in which the runs' `generation.json` differ, its value in each; `folders` as in [`make_cards`]."""
    settings = {}
    for name, file in ((name, folder / "generation.json") for name, folder in folders.items()):
        with script.failing_with(f"{file} is not a JSON object"):
            text = file.read_text("utf-8") if file.is_file() else "{}"
            settings[name] = dict(json.loads(text, parse_constant=str))  # `NaN` is no JSON: shown as text
    keys = dict.fromkeys(key for found in settings.values() for key in found)
    rows = {key: {name: found.get(key) for name, found in settings.items()} for key in keys}
    return {key: row for key, row in rows.items() if len({json.dumps(value) for value in row.values()}) > 1}


def lines_of(found):
    """The lines of a table of scores or of differences: a metric's name, or a task's, and its summary by run."""
    for metric, summaries in found.items():
        yield LABELS.get(metric, metric), summaries
        for task in dict.fromkeys(task for summary in summaries.values() for task in summary.get("tasks", ())):
            each = {name: summary["tasks"][task] for name, summary in summaries.items() if task in summary["tasks"]}
            yield f"{LABELS[metric]}: {task}", each


def format_table(comparison):
    """What `table.md` says, from what `comparison.json` says."""

    def table(*lines):
        lines = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
        lines.insert(1, ["---"] + ["--:"] * (len(lines[0]) - 1))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def cell(summary, form, counted=""):
        if summary is None:
            return "-"
        ends = [format(end, form) for end in (summary["low"], summary["high"]) if end is not None]
        missing = f", {summary['missing']} images missing" if summary.get("missing") else ""
        return f"{summary['mean']:{form}} [{', '.join(ends) or 'only one prompt'}]{missing}{counted.format(**summary)}"

    names = list(comparison["runs"])
    first, others = names[0], names[1:]
    rows = [[label, *(cell(row.get(name), ".3f") for name in names)] for label, row in lines_of(comparison["scores"])]
    text = f"Mean and 95 % interval over the prompts.\n\n{table(['metric', *names], *rows)}\n"
    if others:
        found = lines_of(comparison["differences"])
        rows = [[label, *(cell(row.get(n), "+.3f", ", {images} pairs") for n in others)] for label, row in found]
        header = ["difference", *(f"{name} - {first}" for name in others)]
        text += f"Paired differences from {first}, with 95 % intervals.\n\n{table(header, *rows)}\n"
    if comparison["settings"]:
        rows = [[key, *(row[name] for name in names)] for key, row in comparison["settings"].items()]
        text += f"Settings in which the generations differ.\n\n{table(['setting', *names], *rows)}\n"
    rows = [[LABELS[metric], *PUBLISHED[metric]] for metric in LABELS]
    header = ["metric", *PUBLISHED["models"]]
    return f"{text}Published, not measured here ({PUBLISHED['source']}).\n\n{table(header, *rows)}"


def draw(comparison, path):
    """Save the means as bars with their intervals: a panel a metric, that of GenEval with its tasks."""
    from matplotlib.figure import Figure  # what else there is here is used without it, too
    from matplotlib.patches import Patch

    names = list(comparison["runs"])
    panels = [list(lines_of({metric: row})) for metric, row in comparison["scores"].items()]
    widths = [1 + 0.32 * len(lines) * len(names) for lines in panels]
    figure = Figure(figsize=(max(sum(widths), 4), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0]
    for axis, lines in zip(axes, panels, strict=True):
        for i, name in enumerate(names):
            found = [(place, row[name]) for place, (_, row) in enumerate(lines) if name in row]
            places = [place + 0.8 * ((i + 0.5) / len(names) - 0.5) for place, _ in found]
            means = np.array([s["mean"] for _, s in found])
            ends = [(s["mean"], s["mean"]) if s["low"] is None else (s["low"], s["high"]) for _, s in found]
            errors = np.abs(np.reshape(ends, (-1, 2)).T - means)
            color = COLORS[i % len(COLORS)]
            axis.bar(places, means, 0.76 / len(names), yerr=errors, color=color, ecolor="#444")
        ticks = [label.partition(": ")[2].replace("_", "\n") or "all tasks" for label, _ in lines]
        axis.set_xticks(range(len(lines)), ticks if len(lines) > 1 else [""], fontsize=8)
        axis.set_title(lines[0][0], fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=COLORS[i % len(COLORS)]) for i in range(len(names))]
    labels = [name.replace("$", r"\$") for name in names]  # which would begin a formula
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=130)


def thumbnail(path, size):
    """The image file as a base64 JPEG (`str`), its longer side at most `size` pixels; `None` if it is unreadable."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * size, 2 * size))  # lets a JPEG decode at a fraction of its size
            image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what Pillow makes of broken files
        return None
    image.thumbnail((size, size), Image.Resampling.LANCZOS, reducing_gap=3)
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=80, optimize=True)
    return base64.b64encode(jpeg.getvalue()).decode()


def make_cards(runs, folders, metrics, size, output):
    """
    What the page shows of each prompt, in the order of the first run.

    Args:
        runs (`dict[str, dict]`): By name, what [`read_scored`] returns.
        folders (`dict[str, pathlib.Path]`): By name, the run's folder.
        metrics (`list[str]`): Order of the scores.
        size (`int`): Longer side of a thumbnail, in pixels.
        output (`pathlib.Path`): Folder that the page will be in.

    Returns:
        `tuple[list[dict], list[pathlib.Path]]`: for each prompt its "text", "tag" and "rows", which for each of its
        images hold a cell a run; and the image files that could not be read.
    """
    jobs = [(i, *item, folders[name] / item[1]["file"]) for i, name in enumerate(runs) for item in runs[name].items()]
    with ThreadPoolExecutor() as pool:
        thumbs = pool.map(lambda job: thumbnail(job[-1], size), jobs)
        thumbs = list(tqdm(thumbs, desc="Making thumbnails", total=len(jobs)))
    cards = {}
    for (run, key, image, path), thumb in zip(jobs, thumbs, strict=True):
        card = cards.setdefault(key[0], {"text": key[0], "tag": image["tag"], "rows": {}})
        link = quote(Path(os.path.relpath(path, output)).as_posix()) if path.is_file() else None
        cell = {"name": path.name, "link": link, "thumb": thumb, "seed": image["seed"], "notes": image["notes"]}
        row = card["rows"].setdefault(key[1:], [None] * len(runs))
        row[run] = cell | {"scores": [image["scores"].get(metric) for metric in metrics]}
    unreadable = [path for (*_, path), thumb in zip(jobs, thumbs, strict=True) if thumb is None]
    return [card | {"rows": list(card["rows"].values())} for card in cards.values()], unreadable


def check_output(output):
    """Refuse a folder that cannot be written, or that holds what this tool did not make."""
    with script.failing_with(f"--output_dir {output}"):
        output.parent.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in output.iterdir()} if output.exists() else set()
        marker = (output / "comparison.json").read_text("utf-8") if "comparison.json" in names else ""
    if names and not (names <= OUTPUTS and MADE_BY in marker):
        found = ", ".join(sorted(names - OUTPUTS)[:3]) or "it has no comparison.json of this script"
        script.fail(f"--output_dir {output} is not, or not only, an earlier comparison ({found}): name another folder")


def main(args):
    folders = {}
    for item in args.runs:
        name, _, folder = item.partition("=") if not Path(item).is_dir() else (Path(item).resolve().name, "", item)
        if not name or not folder or name in folders:
            script.fail(f"{item}: want NAME=FOLDER or a folder that exists, and every name once")
        folders[name] = Path(os.path.abspath(folder))
    output = Path(os.path.abspath(args.output_dir))
    check_output(output)
    settings = read_settings(folders)
    runs = {name: read_scored(folder) for name, folder in folders.items()}
    scores, differences = compare(runs)
    cards, unreadable = make_cards(runs, folders, list(scores), args.thumbnail_size, output)
    comparison = {
        "made_by": MADE_BY,
        "runs": {name: os.path.relpath(folder, output) for name, folder in folders.items()},
        "unreadable_images": [os.path.relpath(path, output) for path in unreadable],
        "bootstrap": {"draws": DRAWS, "seed": SEED},
        "settings": settings,
        "scores": scores,
        "differences": differences,
        "published": PUBLISHED,
    }
    labels = {metric: LABELS.get(metric, metric) for metric in scores}
    page = {"comparison": comparison, "runs": list(runs), "labels": labels, "colors": COLORS}
    page |= {"size": args.thumbnail_size, "cards": cards}
    # ASCII, in which a browser keeps a string in half the memory; and no prompt can end the script element.
    block = json.dumps(page, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    # Written beside and then renamed, so that the folder is never half a comparison, nor of two of them.
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as beside:
        new = Path(beside, "new")
        new.mkdir()
        (new / "comparison.json").write_text(json.dumps(comparison, indent=2, allow_nan=False) + "\n", "utf-8")
        (new / "table.md").write_text(format_table(comparison), "utf-8")
        (new / "report.html").write_text(TEMPLATE.read_text("utf-8").replace(PLACEHOLDER, block, 1), "utf-8")
        draw(comparison, new / "scores.png")
        if output.exists():
            output.rename(Path(beside, "old"))
        new.rename(output)
    print(format_table(comparison))
    if unreadable:
        print(f"{len(unreadable)} images could not be read; the page shows their names. The first: {unreadable[0]}")
    megabytes = (output / "report.html").stat().st_size / 1e6
    advice = "; a smaller --thumbnail_size makes it lighter" if megabytes > 100 else ""
    print(f"Open {output / 'report.html'} in a browser ({megabytes:.1f} MB{advice})")


if __name__ == "__main__":
    main(parse_args())
