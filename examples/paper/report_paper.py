# SPDX-License-Identifier: Apache-2.0
"""
The report of what `paper.py` ran: the table beside the published one, reward curves, exposure bias, what is missing.

    python examples/paper/report_paper.py tiny outputs/paper_tiny
"""

import argparse
import base64
import html
import io
import json
import os
import re
import sys
from collections import defaultdict
from pathlib import Path


EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES / "evaluation"), str(Path(__file__).resolve().parent)]
from compare import LABELS, PUBLISHED  # noqa: E402
from paper import ROOT, hours, plan, tflop  # noqa: E402


# The published row that an arm stands beside.
SAME = {"base": "SD3.5-M", "sft": "SD3.5-M SFT", "soar": "SD3.5-M SOAR"} | {
    name: name for name in ("SD-XL", "SD3.5-L", "FLUX.1-dev")
}
# At the ends of its curves, as the paper's text gives them.
PUBLISHED_ENDS = {
    "aesthetic": {"sft": "5.74", "soar": "5.94", "flow-grpo": "5.87"},
    "clipscore": {"sft": "0.297", "soar": "0.300", "flow-grpo": "0.296"},
}
STYLE = """body { font: 15px/1.5 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .7em; border-bottom: 1px solid #ccc }
td:not(:first-child) { text-align: right } .published { color: #777 } .toy { background: #fd8; padding: .5em 1em }
img { max-width: 100% }"""


def read_json(path, default=None):
    return json.loads(path.read_text("utf-8")) if path.exists() else default


def compared(out, part):
    """By arm and metric, the "scores" or the "differences" from the base, over all sets of prompts."""
    found = defaultdict(dict)
    for path in sorted(out.glob("compare/*/comparison.json")):
        for metric, row in read_json(path)[part].items():
            for arm, summary in row.items():
                found[arm][metric] = summary
    return found


def curves(out, reward):
    """By arm, the mean reward at each step that was scored: `dict[str, list[tuple[int, float]]]`."""
    found = defaultdict(list)
    for path in out.glob(f"images/curves/{reward}/*/scores.json"):
        arm, step = path.parent.name.rsplit("-", 1)
        if summary := read_json(path).get(reward):
            found[arm].append((int(step), summary["mean"]))
    return {arm: sorted(points) for arm, points in found.items()}


def draw(size_curves, reward):
    """A picture of a reward's curves, as the source of an `img`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for arm, points in size_curves.items():
        last = points[-1][0]  # runs differ in what a step is: each is shown over its own length
        axis.plot([step / last for step, _ in points], [value for _, value in points], marker=".", label=arm)
    for arm, value in PUBLISHED_ENDS.get(reward, {}).items():
        axis.plot(1.02, float(value), "k_", markersize=12)
        axis.annotate(f"{arm}, published", (1.03, float(value)), fontsize=7, va="center")
    axis.set(xlabel="part of the run", ylabel=LABELS.get(reward, reward), title=f"trained on {reward}")
    axis.legend(fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, dpi=100, format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def table(header, rows):
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def cell(summary, form):
    if summary is None:
        return "-"
    ends = [format(end, form) for end in (summary["low"], summary["high"]) if end is not None]
    missing = f", {summary['missing']} images missing" if summary.get("missing") else ""
    return f"{summary['mean']:{form}}<br><small>[{', '.join(ends)}]{missing}</small>"


def make_report(size, out):
    """The page, as text."""
    stages = plan(size, str(out), "--train_data_dir my_images")
    arms = [s.name.removeprefix("train-") for s in stages if s.name.startswith("train-")]
    arms = ["base", *arms, *(name for name in SAME if name not in ("base", *arms))]
    scores, paired, missing = (
        compared(out, "scores"),
        compared(out, "differences"),
        read_json(out / "missing.json", {}),
    )
    parts = [f"<h1>SOAR's experiment, size {size}</h1>"]
    if size == "tiny":
        text = (
            "A toy: a random model, pictures of 64 pixels, a few steps. It shows that every stage runs, nothing else."
        )
        parts.append(f"<p class=toy>{text}</p>")
    rows = []
    for arm in arms:
        row = [html.escape(arm)]
        for metric in LABELS:
            published = PUBLISHED[metric][PUBLISHED["models"].index(SAME[arm])] if arm in SAME else ""
            text = cell(scores[arm].get(metric), ".3f")
            row.append(f"{text} <span class=published>{published}</span>")
        rows.append(row)
    parts.append("<h2>Scores</h2><p>Means with 95 % intervals over the prompts; <span class=published>grey: as "
                 f"published, not measured here ({html.escape(PUBLISHED['source'])})</span>.</p>")  # fmt: skip
    parts.append(table(["", *LABELS.values()], rows))
    rows = [[html.escape(a), *(cell(paired[a].get(m), "+.3f") for m in LABELS)] for a in arms if paired[a]]
    parts.append("<h2>Paired differences from the base</h2>" + table(["", *LABELS.values()], rows))
    pages = sorted(out.glob("compare/*/report.html"))
    links = [f'<a href="{page.relative_to(out)}">{page.parent.name}</a>' for page in pages]
    parts.append(f"<p>Prompt by prompt: {', '.join(links) or 'none'}.</p>")
    for reward in dict.fromkeys(m[1] for s in stages if (m := re.fullmatch(r"filter-(\w+)", s.name))):
        found = curves(out, reward)
        picture = f'<img alt="curves" src="{draw(found, reward)}">' if found else "<p>Nothing was scored.</p>"
        ends = [[arm, f"{points[-1][1]:.3f}"] for arm, points in sorted(found.items())]
        parts.append(f"<h2>Trained on {reward}</h2>{picture}{table(['', 'at the end'], ends)}")
    if (bias := out / "exposure_bias" / "exposure_bias.png").exists():
        source = f"data:image/png;base64,{base64.b64encode(bias.read_bytes()).decode()}"
        parts.append(f'<h2>Exposure bias</h2><img alt="errors" src="{source}">')
    total = sum(map(tflop, stages)) / 1000
    parts.append("<h2>Cost</h2>" + f"<p>{total:,.0f} thousand TFLOP, {sum(hours(s, 1) for s in stages):,.1f} hours "
                 "on one H100 (computed, see the folder's README).</p>")  # fmt: skip
    rows = [[html.escape(name), html.escape(why)] for name, why in missing.items()]
    parts.append("<h2>Missing</h2>" + (table(["stage", "why"], rows) if rows else "<p>Nothing.</p>"))
    body = "\n".join(parts)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>SOAR, {size}</title><style>{STYLE}</style>{body}\n"
    )


def main():
    parser = argparse.ArgumentParser(description="The report of an experiment.")
    parser.add_argument("size", choices=["tiny", "one", "full"])
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    if not args.out.is_dir():
        parser.error(f"{args.out}: no such folder")
    out = args.out.resolve()
    os.chdir(ROOT)
    path = out / "report.html"
    path.with_suffix(".partial").write_text(make_report(args.size, out), "utf-8")
    os.replace(path.with_suffix(".partial"), path)
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
