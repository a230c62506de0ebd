# SPDX-License-Identifier: Apache-2.0
"""
Tables and pictures from the scores of the experiment's runs, and from nothing else.

    python examples/miniature/report.py examples/miniature/results

Prints Markdown; writes scores.png, steps.png, gap.png, samples.png and words.png beside the results. Intervals are
95 % bootstrap intervals: pairs of runs (same base, same seed), and pictures within their tasks, are drawn again.
Where there are fewer than three pairs there is no interval, as seeds differ more than prompts do.
"""

import argparse
import functools
import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from experiment import (
    ARMS,
    CHANGED,
    CHECKPOINT_PROMPTS,
    CHECKPOINTS,
    DROPOUTS,
    GUIDANCES,
    MAIN,
    MAIN_ARMS,
    OTHER_ARMS,
    SETTINGS,
    STEPS,
    Run,
    name_of,
    world_of,
)
from world import TASKS, TIMES, choose_prompts


MAIN_SETTING, BEST = name_of(*MAIN), "best guidance"
# Forwards of the model per optimizer step and sample: 3 a state with gradient (LoRA: 2), 1 without.
FORWARDS = {
    "SFT": 3,
    "SFT x 7": 21,
    "true state": 22,
    "sigma mixture": 3,
    "SOAR without CFG": 21,
    "SOAR N=1": 7,
    "SOAR N=2": 10,
    "SOAR N=1 x 3": 21,
    "SOAR-LoRA": 15,
    "SFT cosine": 3,
    "SFT x 7 cosine": 21,
}
PAIRS = [
    ("SOAR K=40", "SFT"),
    ("SOAR K=40", "SFT x 7"),
    ("SOAR K=40", "true state"),
    ("SOAR K=40", "sigma mixture"),
    ("SOAR K=10", "SFT"),
    ("SOAR K=10", "SFT x 7"),
    ("SOAR K=10", "true state"),
    ("SOAR K=10", "SOAR K=40"),
    ("sigma mixture", "SFT"),
    ("SOAR N=1 x 3", "SFT x 7"),
    *((arm, "SOAR K=40") for arm in OTHER_ARMS if arm != "sigma mixture"),
    *((f"{arm} cosine", arm) for arm in CHANGED),
    ("SOAR K=40 cosine", "SFT cosine"),
    ("SOAR K=40 cosine", "SFT x 7 cosine"),
]


def read_json(path, field):
    """What is in a file of scores, which have this field; one line where it is another."""
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict) or field not in found:
        raise SystemExit(f"error: {path} is no file of scores: remove it, or run examples/miniature/run.sh again")
    return found


def read(folder, world):
    """The scores of a world's runs: `dict[arm, dict[(dropout, base, seed), dict[step, dict]]]`, and of its bases."""
    names = {
        Run(arm, dropout, base, seed).name: (arm, dropout, base, seed)
        for arm in ARMS
        for dropout in DROPOUTS
        for base in (*range(9), "words")
        for seed in range(9)
        if world_of(base) == world
    }
    runs, bases = defaultdict(dict), {}
    for path in sorted(folder.glob("*.json")):
        stem, _, step = path.stem.partition("-step")
        if stem in names:
            arm, *key = names[stem]
            runs[arm].setdefault(tuple(key), {})[int(step or STEPS)] = read_json(path, "test")
        elif (match := re.fullmatch(r"base(\d+|words)", stem)) and world_of(match[1]) == world:
            bases[match[1]] = read_json(path, "test")
    return runs, bases


def finished(runs, bases, arm, dropout):
    """The scores of an arm's finished runs, or of the bases: `dict[(base, seed), dict]`."""
    if arm == "base":
        return bases
    return {key[1:]: scores[STEPS] for key, scores in runs[arm].items() if key[0] == dropout and STEPS in scores}


def outcomes(scores, setting, key, part="test"):
    """
    The outcomes of a run in a setting: an array of `(tasks, prompts)`, 0 or 1; of words `(1, prompts)`, where
    "letters" is the part of a word's three that is right, and "word" whether all are. [`BEST`] is the setting that is
    best for the run on the validation prompts, on those test prompts that all guidances have.
    """
    if setting == BEST:
        best, count = best_guidance(scores, key)
        return outcomes(scores, best, key)[:, :count]
    results = scores[part][setting]
    if "letters" in results:
        right = np.array([[int(c) for c in results["letters"]]])
        return right / 3 if key == "letters" else (right == 3).astype(float)
    return np.array([int(c) for c in results[key]], dtype=float).reshape(len(TASKS), -1)


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " --: |" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def spread(values, form=".3f"):
    """Mean and standard deviation over runs; `None` is what a run has no number for."""
    if None in values:
        return "undefined"
    text = format(np.mean(values), form)
    return text if len(values) == 1 else f"{text} ± {np.std(values, ddof=1):{form.strip('+')}}"


def best_guidance(scores, key):
    """The setting that is best for a run on the validation prompts, and how many test prompts a task all have."""
    settings = [name for setting in GUIDANCES if (name := name_of(*setting)) in scores["validation"]]
    best = max(settings, key=lambda setting: outcomes(scores, setting, key, "validation").mean())
    return best, min(outcomes(scores, setting, key).shape[1] for setting in settings)


def at_best_guidance(runs, key):
    """The mean scores of runs, each at its best guidance, and which these are."""
    values = [outcomes(scores, BEST, key).mean() for scores in runs]
    best = {best_guidance(scores, key)[0].split(",")[0].removeprefix("guidance ") for scores in runs}
    return f"{spread(values)} ({', '.join(sorted(best, key=float))})"


def main_table(runs, bases, dropout):
    """A row an arm: everything in the main setting, and the score with five steps and at the best guidance."""
    keys, totals = {"score": "lenient", "strict": "strict", "broken": "broken"}, ("frechet", "diversity")
    if any("letters" in base["test"][MAIN_SETTING] for base in bases.values()):
        keys, totals = {"letters": "letters", "words": "word"}, ("frechet",)
    first = next(iter(keys))
    header = ["arm", "runs", *keys, *totals, f"{first}, 5 steps", f"{first}, best guidance", "forwards"]
    header = [name.replace("frechet", "Fréchet") for name in header]
    rows = []
    for arm in ["base", *ARMS]:
        found = list(finished(runs, bases, arm, dropout).values())
        if not found:
            continue
        row = [arm, str(len(found))]
        row += [spread([outcomes(scores, MAIN_SETTING, key).mean() for scores in found]) for key in keys.values()]
        row += [spread([scores["test"][MAIN_SETTING][key] for scores in found]) for key in totals]
        row += [spread([outcomes(scores, name_of(4.5, 5), keys[first]).mean() for scores in found])]
        row += [at_best_guidance(found, keys[first]), "0" if arm == "base" else str(FORWARDS.get(arm, 22))]
        rows.append(row)
    return table(header, rows)


def summary_table(runs, bases, word_runs, word_bases):
    """A row a main arm, caption dropout 0.1: score and its difference from SFT's, right letters, and the cost."""
    rows = []
    for arm in ["base", *MAIN_ARMS]:
        found, sft = (finished(runs, bases, name, DROPOUTS[1]) for name in (arm, "SFT"))
        words, row = finished(word_runs, word_bases, arm, DROPOUTS[1]), [arm]
        for setting in (MAIN_SETTING, BEST):
            row.append(
                spread([outcomes(scores, setting, "lenient").mean() for scores in found.values()]) if found else ""
            )
            has_pairs = arm not in ("base", "SFT") and found.keys() & sft.keys()
            row.append(difference(found, sft, setting, "lenient") if has_pairs else "")
        row.append(spread([outcomes(s, MAIN_SETTING, "letters").mean() for s in words.values()]) if words else "")
        rows.append([*row, "0" if arm == "base" else str(FORWARDS.get(arm, 22))])
    return table(["", "score", "- SFT", f"score, {BEST}", "- SFT", "letters", "forwards"], rows)


def task_table(runs, bases, dropout):
    """A row an arm: the score of each task, and of the prompts with pairs of shape and colour never asked before."""
    rows = []
    for arm in ["base", *ARMS]:
        found = finished(runs, bases, arm, dropout)
        if found:
            tasks = np.array([outcomes(scores, MAIN_SETTING, "lenient").mean(1) for scores in found.values()])
            all_scores = np.array([outcomes(scores, MAIN_SETTING, "lenient") for scores in found.values()])
            prompts = [prompt for prompt, _ in choose_prompts("test", all_scores.shape[2])]
            held_out = np.reshape([prompt.held_out for prompt in prompts], all_scores.shape[1:])
            rows.append([arm, *(f"{value:.2f}" for value in (*tasks.mean(0), all_scores[:, held_out].mean()))])
    return table(["arm", *(task.replace("_", " ") for task in TASKS), "held-out pairs"], rows)


@functools.cache
def bootstrap(runs, tasks, prompts, draws=4000):
    """How often each draw has each run, `(draws, runs)`, and each prompt of a task, `(draws, tasks * prompts)`."""
    rng = np.random.default_rng(0)
    chosen_runs = rng.multinomial(runs, np.full(runs, 1 / runs), size=draws)
    chosen_prompts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=(draws, tasks))
    return chosen_runs, chosen_prompts.reshape(draws, -1)


def difference(one, other, setting, key, least=3):
    """Mean paired difference of two arms' outcomes, its interval where there are as many pairs of runs as `least`, and
    in how many of them it has its sign."""
    pairs = [
        outcomes(one[k], setting, key) - outcomes(other[k], setting, key) for k in sorted(one.keys() & other.keys())
    ]
    pairs = np.array(pairs)
    chosen_runs, chosen_prompts = bootstrap(*pairs.shape)
    means = (chosen_runs @ pairs.reshape(len(pairs), -1) * chosen_prompts).sum(1) / pairs.size
    low, high = np.quantile(means, [0.025, 0.975])
    mean = pairs.mean()
    same = (np.sign(pairs.mean((1, 2))) == np.sign(mean)).sum()
    interval = f" [{low:+.3f}, {high:+.3f}]" if len(pairs) >= least else ""
    return f"{mean:+.3f}{interval}, {same} of {len(pairs)}"


SHAPE_COLUMNS = {
    "score": (MAIN_SETTING, "lenient"),
    f"score, {BEST}": (BEST, "lenient"),
    "score, 5 steps": (name_of(4.5, 5), "lenient"),
    "strict": (MAIN_SETTING, "strict"),
    "broken": (MAIN_SETTING, "broken"),
    "broken, 5 steps": (name_of(4.5, 5), "broken"),
}
WORD_COLUMNS = {
    "letters": (MAIN_SETTING, "letters"),
    "words": (MAIN_SETTING, "word"),
    "letters, 5 steps": (name_of(4.5, 5), "letters"),
    "words, 5 steps": (name_of(4.5, 5), "word"),
}


def difference_table(runs, dropout, columns=SHAPE_COLUMNS):
    """A row a pair of arms; in how many runs the difference has the sign of the mean."""
    rows = []
    for one, other in PAIRS:
        first, second = (finished(runs, {}, arm, dropout) for arm in (one, other))
        if first.keys() & second.keys():
            differences = [difference(first, second, setting, key) for setting, key in columns.values()]
            rows.append([f"{one} - {other}", *differences])
    return table(["difference", *columns], rows)


def dropout_table(runs):
    """A row an arm: what it loses or gains without caption dropout."""
    rows = []
    for arm in ARMS:
        without, with_dropout = (finished(runs, {}, arm, dropout) for dropout in DROPOUTS)
        if without.keys() & with_dropout.keys():
            row = [difference(without, with_dropout, setting, key) for setting, key in SHAPE_COLUMNS.values()]
            rows.append([arm, *row])
    return table(["dropout 0 - dropout 0.1", *SHAPE_COLUMNS], rows)


def read_gaps(folder, dropout):
    """What `measure_exposure_bias.py` wrote for the groups of main arms: a `dict` a base and seed."""
    return [read_json(path, "summary") for path in sorted(folder.glob(f"gap-dropout{dropout:g}-*.json"))]


def gap_table(gaps):
    """A row an arm: changes of its log errors from the base's, mean and standard deviation over bases and seeds."""
    rows = []
    for arm in MAIN_ARMS:
        slug, row = Run(arm, 0, 0, 0).slug, [arm]
        for k in gaps[0]["arguments"]["num_own_steps"]:
            records = [r for gap in gaps for r in gap["summary"] if (r["model"], r["num_own_steps"]) == (slug, k)]
            row += [spread([r[f"{key}_change"] for r in records], "+.3f") for key in ("ideal", "own", "gap")]
        rows.append(row)
    steps = [f"{k} step{'s' if k > 1 else ''}" for k in gaps[0]["arguments"]["num_own_steps"]]
    return table(["arm", *(f"{key}, {s}" for s in steps for key in ("ideal", "own", "gap"))], rows)


def draw_gap(gaps, path):
    """Own over ideal error against sigma, the base and the main arms, mean over bases and seeds; noise is left."""
    from matplotlib import pyplot as plt

    own_steps = gaps[0]["arguments"]["num_own_steps"]
    figure, axes = plt.subplots(2, len(own_steps), figsize=(6 * len(own_steps), 8), layout="constrained", sharex=True)
    for column, k in zip(axes.T, own_steps, strict=True):
        for arm in ["base", *MAIN_ARMS]:
            slug = arm if arm == "base" else Run(arm, 0, 0, 0).slug
            records = [[r for r in gap["levels"] if (r["model"], r["num_own_steps"]) == (slug, k)] for gap in gaps]
            curves = [[(r["sigma"], r["ratio"], r["own"]) for r in levels] for levels in records]
            sigma, ratio, own = np.mean(np.array(curves, dtype=float), axis=0).T  # `None` becomes nan: not drawn
            style = {"color": "grey", "ls": ":"} if arm == "base" else {}
            column[0].plot(sigma, ratio, marker="o", ms=4, label=arm, **style)
            column[1].plot(sigma, own, marker="o", ms=4, **style)
        column[0].set(
            title=f"after {k} own step{'s' if k > 1 else ''}", ylabel="own error / ideal error", yscale="log"
        )
        column[1].set(xlabel="sigma (1 is noise)", ylabel="own error", yscale="log")
        for axis in column:
            axis.grid(alpha=0.3, which="both")
    axes[0, 0].legend(fontsize=8)
    axes[0, 0].invert_xaxis()  # of all, as they share it: sampling goes from noise to the right
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_scores(runs, bases, path):
    """Score and broken pictures against guidance and against steps, an arm a line; a row a dropout rate."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(DROPOUTS), 4, figsize=(17, 8), layout="constrained", squeeze=False)
    sweeps = [
        ("guidance", [s for s in SETTINGS if s[1] == MAIN[1]], 0),
        ("steps", [s for s in SETTINGS if s[0] == MAIN[0]], 1),
    ]
    for row, dropout in zip(axes, reversed(DROPOUTS), strict=True):
        for column, (key, (label, settings, which)) in enumerate(
            [(k, s) for k in ("lenient", "broken") for s in sweeps]
        ):
            axis, settings = row[column], sorted(settings, key=lambda setting: setting[which])
            for arm in ["base", *MAIN_ARMS]:
                found = finished(runs, bases, arm, dropout)
                if found:
                    parts = [[outcomes(s, name_of(*x), key) for x in settings] for s in found.values()]
                    count = min(part.shape[1] for part in parts[0])  # the prompts that all settings have
                    values = [[part[:, :count].mean() for part in run] for run in parts]
                    means, errors = np.mean(values, 0), np.std(values, 0) / max(len(values) - 1, 1) ** 0.5
                    places = [setting[which] for setting in settings]
                    style = {"color": "grey", "ls": ":"} if arm == "base" else {}
                    axis.errorbar(places, means, errors, label=arm, marker="o", ms=4, capsize=2, **style)
            axis.set(xlabel=label, ylabel="score" if key == "lenient" else "pictures with a broken object")
            axis.set_title(f"caption dropout {dropout:g}")
            if label == "steps":
                axis.set_xscale("log", base=2)
                axis.set_xticks(places, [str(place) for place in places])
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_steps(runs, bases, path):
    """Score against optimizer steps, and against forwards of the model, which is the cost; on the same prompts."""
    from matplotlib import pyplot as plt

    def score(scores):  # a checkpoint has seen the first prompts of each task only
        return outcomes(scores, MAIN_SETTING, "lenient")[:, : TIMES * CHECKPOINT_PROMPTS].mean()

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", sharey=True)
    for arm in MAIN_ARMS:
        found = {k: r for k, r in runs[arm].items() if k[0] == DROPOUTS[1]}
        steps = [step for step in (*CHECKPOINTS, STEPS) if all(step in r for r in found.values())]
        if found:
            values = [[score(r[step]) for step in steps] for r in found.values()]
            start = np.mean([score(s) for s in bases.values()])
            means, errors = np.mean(values, 0), np.std(values, 0) / max(len(values) - 1, 1) ** 0.5
            for axis, factor in zip(axes, (1, 8 * FORWARDS.get(arm, 22) / 1000), strict=True):
                places = [0, *(step * factor for step in steps)]
                axis.errorbar(places, [start, *means], [0, *errors], label=arm, marker="o", ms=4, capsize=2)
    axes[0].set(xlabel="optimizer steps", ylabel="score", title=f"caption dropout {DROPOUTS[1]:g}")
    axes[1].set(xlabel="thousand forwards of one sample")
    axes[0].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def samples_of(folder, base):
    """The PNG of a base, and of every arm on it."""
    arms = {arm: folder / f"{Run(arm, DROPOUTS[1], base, 0).name}.png" for arm in ARMS}
    return {"base": folder / f"base{base}.png"} | arms


def draw_samples(rows, path, title):
    """The same prompts from the same noise through all arms: of each in `rows` its PNG, where there is one."""
    from matplotlib import pyplot as plt
    from PIL import Image

    rows = {name: Image.open(file) for name, file in rows.items() if file.exists()}
    if not rows:
        return
    figure, axes = plt.subplots(len(rows), 1, figsize=(12, 1.02 * len(rows)), layout="constrained", squeeze=False)
    for (name, strip), (axis,) in zip(rows.items(), axes, strict=True):
        axis.imshow(strip, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    axes[0, 0].set_title(title, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description="Tables and pictures of the experiment.")
    parser.add_argument("results", type=Path, help="Folder of the runs' scores.")
    parser.add_argument("--no_pictures", action="store_true")
    args = parser.parse_args()
    runs, bases = read(args.results, "world")
    word_runs, word_bases = read(args.results, "words")
    if not bases:
        parser.error(f"{args.results} holds no scores: run examples/miniature/run.sh first")
    print(f"Summary\n\n{summary_table(runs, bases, word_runs, word_bases)}\n")
    for dropout in reversed(DROPOUTS):
        if any(key[0] == dropout for found in runs.values() for key in found):
            print(f"Caption dropout {dropout:g}, {MAIN_SETTING}\n\n{main_table(runs, bases, dropout)}\n")
            print(f"Paired differences, caption dropout {dropout:g}\n\n{difference_table(runs, dropout)}\n")
            print(f"Score by task, caption dropout {dropout:g}\n\n{task_table(runs, bases, dropout)}\n")
        if gaps := read_gaps(args.results, dropout):
            print(f"Changes of log errors from the base's, caption dropout {dropout:g}\n\n{gap_table(gaps)}\n")
    if any(key[0] == DROPOUTS[0] for found in runs.values() for key in found):
        print(f"Paired differences, without caption dropout - with\n\n{dropout_table(runs)}\n")
    if any(word_runs.values()):
        print(f"Words, caption dropout 0.1, {MAIN_SETTING}\n\n{main_table(word_runs, word_bases, DROPOUTS[1])}\n")
        print(f"Paired differences of words\n\n{difference_table(word_runs, DROPOUTS[1], WORD_COLUMNS)}\n")
    runs_there, bases_there = read(args.results / "schedule", "world")
    if runs_there:
        print(
            f"Schedules, caption dropout 0.1, {MAIN_SETTING}\n\n{main_table(runs_there, bases_there, DROPOUTS[1])}\n"
        )
        print(f"Paired differences of schedules\n\n{difference_table(runs_there, DROPOUTS[1])}\n")
    if not args.no_pictures:
        import matplotlib

        matplotlib.use("Agg")
        draw_scores(runs, bases, args.results / "scores.png")
        draw_steps(runs, bases, args.results / "steps.png")
        tasks = "     ".join(task.replace("_", " ") for task in TASKS)
        draw_samples(samples_of(args.results, 0), args.results / "samples.png", f"{tasks}     (two each)")
        if word_bases:
            draw_samples(samples_of(args.results, "words"), args.results / "words.png", "words of the test")
        if gaps := read_gaps(args.results, DROPOUTS[1]):
            draw_gap(gaps, args.results / "gap.png")


if __name__ == "__main__":
    main()
