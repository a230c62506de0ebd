# SPDX-License-Identifier: Apache-2.0
"""
Tables and pictures from the scores that `compare_methods.py` left, and from nothing else.

    python examples/rl/report_comparison.py examples/rl/results

Prints Markdown; writes curves.png and samples.png beside the results. Intervals are 95 % bootstrap intervals over
pairs of runs (same seed) and pictures within their tasks; with one pair over its pictures alone; of
two pairs they say little.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from compare_methods import BUDGET, METHODS, SEEDS, STARTS, plan, start_run


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "miniature"))
from experiment import CHECKPOINT_PROMPTS, STEPS, Run, name_of  # noqa: E402
from report import BEST, MAIN_SETTING, at_best_guidance, difference, draw_samples, outcomes, spread, table  # noqa: E402
from world import TASKS, choose_prompts  # noqa: E402


SFT_FORWARDS = STEPS * 8 * 3
UNGUIDED = name_of(1, 20)
WORLDS = {"world": "lenient", "words": "letters"}
COLUMNS = {
    "score": (MAIN_SETTING, "lenient"),
    "strict": (MAIN_SETTING, "strict"),
    "score, guidance 1": (UNGUIDED, "lenient"),
}
COLUMNS |= {
    f"score, {BEST}": (BEST, "lenient"),
    "strict, guidance 1": (UNGUIDED, "strict"),
    "broken": (MAIN_SETTING, "broken"),
}


def read(folder):
    """
    The scores: `dict[label, dict[seed, dict[forwards, dict]]]`. A label is the base, SFT, SOAR, or a method from one
    of them; forwards are those spent by then, its start's with them, and the last are of the end.
    """
    found = defaultdict(lambda: defaultdict(dict))

    def add(label, seed, forwards, name):
        if (path := folder / f"{name}.json").exists():
            found[label][seed][forwards] = json.loads(path.read_text())

    for seed in range(SEEDS):
        add("base", seed, 0, "base0")
        for start, forwards in costs().items():
            if start != "base":
                add(start, seed, forwards, start_run(start, seed).name)
    add("base, words", 0, 0, "basewords")
    for arm in plan(SEEDS):
        if not isinstance(arm, Run) and (folder / f"{arm.name}.json").exists():  # a run that is done
            for step in [*arm.checkpoints(), arm.steps]:
                name = arm.name if step == arm.steps else f"{arm.name}-step{step}"
                add(label_of(arm), arm.seed, costs()[arm.start] + arm.forwards(step), name)
    return found


def costs():
    """Forwards that each start has cost."""
    return {"base": 0, "SFT": SFT_FORWARDS, "SOAR": BUDGET}


def label_of(arm):
    start = f"{arm.start}, then {arm.method}" if arm.start != "base" else arm.method
    return f"{start}, words" if arm.world == "words" else start


def ends(runs):
    """The last scores of each seed, and what they have cost."""
    return {seed: scores[max(scores)] for seed, scores in runs.items()}


def held_out(values):
    """The outcomes `(tasks, prompts)` of test prompts that no caption or training prompt had."""
    prompts = [prompt for prompt, _ in choose_prompts("test", values.shape[1])]
    new = [prompt.held_out or prompt.task in ("position", "color_attribution") for prompt in prompts]
    return values[np.reshape(new, values.shape)]


def main_table(found):
    header = ["", "runs", *COLUMNS, "new prompts", "Fréchet", "diversity", "same, guidance 1", "forwards"]
    rows = []
    for label, runs in found.items():
        if label.endswith("words"):
            continue
        last = list(ends(runs).values())
        row = [label, "" if label == "base" else str(len(last))]
        last = last[:1] if label == "base" else last
        for setting, key in COLUMNS.values():
            if setting == BEST:
                row.append(at_best_guidance(last, key))
            else:
                row.append(spread([outcomes(scores, setting, key).mean() for scores in last]))
        row.append(spread([held_out(outcomes(scores, MAIN_SETTING, "lenient")).mean() for scores in last]))
        for setting, key in ((MAIN_SETTING, "frechet"), (MAIN_SETTING, "diversity"), (UNGUIDED, "diversity")):
            row.append(spread([scores["test"][setting][key] for scores in last]))
        rows.append([*row, f"{max(max(scores) for scores in runs.values()) / 1000:.0f}k"])
    return table(header, rows)


PAIRS = [
    *((method, start) for method in METHODS for start in ("base", "SFT", "SOAR")),
    *((f"{start}, then {method}", start) for method in METHODS for start in ("SFT", "SOAR")),
    *((f"{start}, then {method}", method) for method in METHODS for start in ("SFT", "SOAR")),
    *((f"SOAR, then {method}", f"SFT, then {method}") for method in METHODS),
    ("NFT", "Flow-GRPO"),
]


def difference_table(found):
    rows = []
    for one, other in PAIRS:
        if one in found and other in found:
            first, second = ends(found[one]), ends(found[other])
            rows.append(
                [f"{one} - {other}", *(difference(first, second, *column, least=1) for column in COLUMNS.values())]
            )
    return table(["difference", *COLUMNS], rows)


def words_table(found):
    rows = []
    base = ends(found["base, words"])
    settings = {"letters": MAIN_SETTING, "letters, guidance 1": UNGUIDED}
    for label, runs in found.items():
        if label.endswith(", words"):
            row, last = [label.removesuffix(", words")], ends(runs)
            for setting in settings.values():
                row.append(spread([outcomes(scores, setting, "letters").mean() for scores in last.values()]))
                row.append("" if label == "base, words" else difference(last, base, setting, "letters", least=1))
            rows.append([*row, f"{max(max(scores) for scores in runs.values()) / 1000:.0f}k"])
    return table(["", *(column for name in settings for column in (name, "- base")), "forwards"], rows)


def curve(runs, setting, key, count):
    """Forwards, and the mean over runs of the score on the prompts that every checkpoint has."""
    points = sorted(set.intersection(*(set(scores) for scores in runs.values())))
    means = [
        np.mean([outcomes(scores[p], setting, key)[:, :count].mean() for scores in runs.values()]) for p in points
    ]
    return points, means


def reached(points, means, goal):
    """The forwards at which a curve first is at a goal, between two points on a straight line; `None` if never."""
    for (a, x), (b, y) in zip(
        zip(points, means, strict=True), list(zip(points, means, strict=True))[1:], strict=False
    ):
        if x < goal <= y:
            return a + (goal - x) / (y - x) * (b - a)
    return None


def with_start(found, label):
    """An arm's runs with what they start from as their first point."""
    start = label.split(",")[0] if ", then " in label else "base"
    return {
        seed: {**ends_at(found[start][seed]), **scores}
        for seed, scores in found[label].items()
        if seed in found[start]
    }


def ends_at(scores):
    return {max(scores): scores[max(scores)]}


def cost_table(found):
    """Forwards until an arm's score is that of SOAR, in the setting that is better for both."""
    rows = []
    goals = {
        setting: curve(found["SOAR"], setting, "lenient", CHECKPOINT_PROMPTS)[1][-1]
        for setting in (MAIN_SETTING, UNGUIDED)
    }
    best = max(goals.values())
    for label in found:
        if label in ("base", "SFT", "SOAR") or label.endswith("words"):
            continue
        row = [label]
        for setting in goals:
            points, means = curve(with_start(found, label), setting, "lenient", CHECKPOINT_PROMPTS)
            if means[0] >= best:
                row.append("at the start")
            else:
                at = reached(points, means, best)
                row.append(
                    f"{at / 1000:.0f}k" if at is not None else f"not by {points[-1] / 1000:.0f}k ({means[-1]:.3f})"
                )
        rows.append(row)
    return table([f"forwards to a score of {best:.3f}", "guidance 4.5", "guidance 1"], rows)


def parts_table(found):
    """The scores of each method on its way: its start, after half a budget, after a whole one where it had one."""
    names = {MAIN_SETTING: "guidance 4.5", UNGUIDED: "guidance 1"}
    header = [f"{part}, {name}" for name in names.values() for part in ("start", "half a budget", "a whole one")]
    rows = []
    for label in found:
        if label in STARTS or label.endswith("words"):
            continue
        row, runs = [label], with_start(found, label)
        for setting in names:
            means = curve(runs, setting, "lenient", CHECKPOINT_PROMPTS)[1]
            row += [f"{mean:.3f}" for mean in means] + [""] * (3 - len(means))
        rows.append(row)
    return table(["", *header], rows)


def draw_curves(found, path):
    from matplotlib import pyplot as plt

    settings = [(MAIN_SETTING, "guidance 4.5"), (UNGUIDED, "guidance 1")]
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", sharey=True)
    colors = {"NFT": "tab:blue", "Flow-GRPO": "tab:orange", "Flow-GRPO, plain": "tab:red"}
    styles = {"base": "-", "SFT": "--", "SOAR": ":"}
    for axis, (setting, title) in zip(axes, settings, strict=True):
        for label in found:
            if label.endswith("words"):
                continue
            if label in STARTS:
                points, means = curve(found[label], setting, "lenient", CHECKPOINT_PROMPTS)
                axis.plot(
                    points[-1], means[-1], "k" + {"base": "o", "SFT": "s", "SOAR": "D"}[label], label=label, zorder=3
                )
                continue
            start = label.split(",")[0] if ", then " in label else "base"
            method = label.split(", then ")[-1]
            points, means = curve(with_start(found, label), setting, "lenient", CHECKPOINT_PROMPTS)
            axis.plot(points, means, styles[start], color=colors[method], marker=".", label=label)
        axis.set(xlabel="forwards of the model, a backward counts as two", title=title)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("score")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def samples_of(folder):
    """The PNG of the base and of every arm of the first seed."""
    names = {"base": "base0"} | {start: start_run(start, 0).name for start in STARTS if start != "base"}
    names |= {label_of(arm): arm.name for arm in plan(1) if not isinstance(arm, Run) and arm.world == "world"}
    return {label: folder / f"{name}.png" for label, name in names.items()}


def main():
    parser = argparse.ArgumentParser(description="Tables and pictures of the comparison.")
    parser.add_argument("results", type=Path, help="Folder of the scores.")
    parser.add_argument("--no_pictures", action="store_true")
    args = parser.parse_args()
    found = read(args.results)
    if not found["base"]:
        parser.error(f"{args.results} holds no scores: run examples/rl/compare_methods.py first")
    print(f"Scores\n\n{main_table(found)}\n")
    print(f"Paired differences\n\n{difference_table(found)}\n")
    if "SOAR" in found:
        print(f"Parts\n\n{parts_table(found)}\n")
        print(f"Cost\n\n{cost_table(found)}\n")
    if found.get("base, words"):
        print(f"Words\n\n{words_table(found)}\n")
    if not args.no_pictures:
        import matplotlib

        matplotlib.use("Agg")
        draw_curves(found, args.results / "curves.png")
        tasks = "     ".join(task.replace("_", " ") for task in TASKS)
        draw_samples(samples_of(args.results), args.results / "samples.png", f"{tasks}     (two each)")


if __name__ == "__main__":
    main()
