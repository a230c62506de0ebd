# SPDX-License-Identifier: Apache-2.0
"""The comparison of scored runs: its numbers against independent ones, its refusals, and its page in a browser."""

import base64
import io
import json
import math
import random
import re
import select
import shutil
import statistics
import subprocess
import time

import compare
import numpy as np
import pytest
from harness import ROOT
from PIL import Image


EVALUATION = ROOT / "examples" / "evaluation"
TASKS = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
NASTY = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'> \"quoted\" & {{DATA}} <!-- \\u003c",
    "一只红色的狐狸 🦊 在雪地里，line\u2028separator",
    "an unbreakable " + "w" * 300,
]


def write_run(folder, rows, side=16, **settings):
    """
    Write a run of `rows`, each a prompt, an `image_index`, a tag and a `dict` of scores by metric; a score may be a
    number, `None`, or a `dict` with details, and a metric that a row lacks has no line for its image.
    """
    (folder / "images").mkdir(parents=True)
    (folder / "scores").mkdir()
    (folder / "generation.json").write_text(json.dumps({"guidance_scale": 4.5} | settings))
    metadata, lines = [], {}
    for i, (text, index, tag, scores) in enumerate(rows):
        name = f"images/{i:05d}-{index}.png"
        Image.new("RGB", (side, side), (i * 7 % 256, i * 13 % 256, i * 29 % 256)).save(folder / name, compress_level=1)
        metadata.append({"file_name": name, "text": text, "prompt_index": i, "image_index": index, "seed": i})
        metadata[-1] |= {"tag": tag} if tag else {}
        for metric, score in scores.items():
            row = score if isinstance(score, dict) else {"score": score}
            lines.setdefault(f"scores/{metric}.jsonl", []).append({"file_name": name} | row)
    for name, found in {"metadata.jsonl": metadata, **lines}.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


def run(output, *arguments):
    """Run the script; returns what it wrote into `comparison.json`."""
    compare.main(compare.parse_args([*map(str, arguments), "--output_dir", str(output)]))
    return json.loads((output / "comparison.json").read_text())


def page_data(output):
    """What the page is given."""
    return json.loads(re.search(r'id="data">(.*?)</script>', (output / "report.html").read_text(), re.DOTALL)[1])


# Numbers


def resample(tasks, draws=4000):
    """An independent bootstrap: `tasks` are lists of prompts, which are lists of their images' scores."""
    rng, means = random.Random(1), []
    for _ in range(draws):
        drawn = [[score for group in rng.choices(task, k=len(task)) for score in group] for task in tasks]
        means.append(statistics.fmean(statistics.fmean(scores) for scores in drawn))
    cuts = statistics.quantiles(means, n=40)
    return cuts[0], cuts[-1]


@pytest.mark.parametrize("metric", ["ocr", "geneval"])
def test_table_against_an_independent_computation(tmp_path, metric):
    """Uneven tasks, prompts with one to four images: means to the bit, intervals to the bootstrap's own noise."""
    rng, rows, tasks = random.Random(0), [], []
    for task, prompts in zip(TASKS, (3, 9, 6, 12, 5, 7), strict=True):
        tasks.append([])
        for prompt in range(prompts):
            skill = rng.random()
            group = [float(rng.random() < skill) for _ in range(rng.randint(1, 4))]
            rows += [(f"{task} {prompt}", i, task, {metric: score}) for i, score in enumerate(group)]
            tasks[-1].append(group)
    comparison = run(tmp_path / "out", write_run(tmp_path / "base", rows))
    found = comparison["scores"][metric]["base"]
    flat = [[score for group in task for score in group] for task in tasks]
    if metric == "geneval":  # the mean of the tasks' means
        expected, (low, high) = statistics.fmean(map(statistics.fmean, flat)), resample(tasks)
        assert list(found["tasks"]) == TASKS
        for name, task, scores in zip(TASKS, tasks, flat, strict=True):
            part = found["tasks"][name]
            assert part["mean"] == pytest.approx(statistics.fmean(scores)) and part["images"] == len(scores)
            assert (part["low"], part["high"]) == pytest.approx(resample([task], 1000), abs=0.06)
    else:
        expected, (low, high) = statistics.fmean(sum(flat, [])), resample([sum(tasks, [])])
        assert "tasks" not in found
    assert abs(statistics.fmean(map(statistics.fmean, flat)) - statistics.fmean(sum(flat, []))) > 0.01
    assert found["mean"] == pytest.approx(expected)
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.012)
    assert (found["images"], found["prompts"], found["missing"]) == (len(rows), 42, 0)
    text = (tmp_path / "out" / "table.md").read_text()
    label = {"ocr": "OCR", "geneval": "GenEval"}[metric]
    assert f"| {label} | {expected:.3f} [{found['low']:.3f}, {found['high']:.3f}] |" in text
    assert all((f"| GenEval: {task} |" in text) == (metric == "geneval") for task in TASKS)


def test_images_of_a_prompt_are_drawn_together():
    """Copies of an image say nothing new, and other prompts do."""
    rng = np.random.default_rng(0)
    scores = {(f"{i}", 0, 0): float(rng.normal()) for i in range(100)}
    once, copies = compare.summarise(scores), {(p, i, 0): score for (p, *_), score in scores.items() for i in range(4)}
    assert compare.summarise(copies) == pytest.approx(once | {"images": 400})
    se = np.std(list(scores.values())) / 10
    assert (once["high"] - once["low"]) / se == pytest.approx(2 * 1.96, rel=0.08)
    more = {(f"{p} {i}", 0, 0): score for (p, *_), score in scores.items() for i in range(4)}
    assert compare.summarise(more)["high"] - once["mean"] == pytest.approx((once["high"] - once["mean"]) / 2, rel=0.15)
    assert compare.summarise({("one", 0, 0): 1.0, ("one", 1, 0): 0.0})["low"] is None
    tags = {key: "few" if key[0] == "0" else "many" for key in scores}  # a task of one prompt: nothing to draw from
    tasks = compare.summarise(scores, tags)
    assert tasks["low"] is tasks["tasks"]["few"]["low"] is None and tasks["tasks"]["many"]["low"] is not None


def test_intervals_cover(monkeypatch):
    """Of 400 synthetic data sets, prompts with two images each, about 95 % have the truth within the interval."""
    monkeypatch.setattr("runs.DRAWS", 400)
    rng, covered = np.random.default_rng(0), {"mean": 0, "tasks": 0}
    for _ in range(400):
        prompts = rng.normal(0.3, 1, size=60)
        scores = {(str(i), j, 0): prompts[i] + rng.normal() for i in range(60) for j in range(2)}
        tags = {key: "a" if int(key[0]) < 20 else "b" for key in scores}
        shifted = {key: score + (tags[key] == "a") for key, score in scores.items()}
        mean, tasks = compare.summarise(scores), compare.summarise(shifted, tags)
        covered["mean"] += mean["low"] <= 0.3 <= mean["high"]
        covered["tasks"] += tasks["low"] <= 0.8 <= tasks["high"]
    assert all(0.91 < count / 400 < 0.98 for count in covered.values()), covered


def test_pairs(tmp_path):
    """Matched by prompt and index whatever the order, a prompt that is there twice by its occurrence."""
    texts = ["same", *(f"prompt {i}" for i in range(12)), "same"]
    base = [(text, i, None, {"ocr": place / 20 + i / 100}) for place, text in enumerate(texts) for i in range(2)]
    other = [(t, i, None, {"ocr": s["ocr"] + 0.1}) for t, i, _, s in base]
    twice = [row for row in other if row[0] == "same"]
    other = [row for row in reversed(other) if row[0] != "same"]  # in another order, but for the two of one prompt
    other += [*twice, ("only here", 0, None, {"ocr": 0.9})]
    other[0][3]["ocr"] = None
    other[1][3].clear()
    folders = [write_run(tmp_path / "base", base), write_run(tmp_path / "other", other)]
    comparison = run(tmp_path / "out", *folders)
    assert list(comparison["differences"]["ocr"]) == ["other"]
    found = comparison["differences"]["ocr"]["other"]
    assert (found["images"], found["prompts"]) == (26, 12)
    assert [found[key] for key in ("mean", "low", "high")] == pytest.approx([0.1] * 3)
    assert comparison["scores"]["ocr"]["other"]["missing"] == 2
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| OCR | +0.100 [+0.100, +0.100], 26 pairs |" in text and ", 2 images missing |" in text
    cards = page_data(tmp_path / "out")["cards"]
    assert [card["text"] for card in cards] == [*texts[:-1], "only here"]
    assert len(cards[0]["rows"]) == 4 and cards[-1]["rows"][0][0] is None


def test_differences_against_an_independent_computation(tmp_path):
    """Of GenEval and of a metric that only one of the others has; and the same call gives the same numbers."""
    rng, runs = random.Random(0), {}
    for name in ("base", "sft", "soar"):
        rows = [(f"{task} {i}", 0, task, {"geneval": float(rng.random() < 0.6)}) for task in TASKS for i in range(15)]
        for row in rows if name != "sft" else ():
            row[3]["pickscore"] = rng.gauss(21, 1)
        runs[name] = write_run(tmp_path / name, rows, guidance_scale=7 if name == "soar" else 4.5), rows
    arguments = [f"{name}={folder}" for name, (folder, _) in runs.items()]
    comparison = run(tmp_path / "out", *arguments)
    assert list(comparison["scores"]) == list(comparison["differences"]) == ["geneval", "pickscore"]
    assert list(comparison["differences"]["pickscore"]) == ["soar"]
    for name in ("sft", "soar"):
        found = comparison["differences"]["geneval"][name]
        both = zip(runs[name][1], runs["base"][1], strict=True)
        pairs = [(row[2], row[3]["geneval"] - other[3]["geneval"]) for row, other in both]
        tasks = [[[difference] for tag, difference in pairs if tag == task] for task in TASKS]
        assert found["mean"] == pytest.approx(statistics.fmean(difference for _, difference in pairs))
        assert (found["low"], found["high"]) == pytest.approx(resample(tasks), abs=0.012)
    text = (tmp_path / "out" / "table.md").read_text()
    assert re.search(r"^\| difference \| sft - base \| soar - base \|$", text, re.MULTILINE)
    assert re.search(r"^\| PickScore \| - \| [+-]0.\d+ \[", text, re.MULTILINE)
    assert "| guidance_scale | 4.5 | 4.5 | 7 |" in text and comparison["settings"].keys() == {"guidance_scale"}
    assert run(tmp_path / "again", *arguments) == comparison


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1" + "0" * 400])
def test_what_is_no_number_is_missing(tmp_path, value):
    """In scores, as in seeds and settings: means are those of the others, and what is written is JSON."""
    rows = [(f"p{i}", 0, None, {"ocr": 0.7 + i / 10}) for i in range(3)]
    folder = write_run(tmp_path / "base", rows)
    for name in ("scores/ocr.jsonl", "metadata.jsonl", "generation.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(re.sub('"(score|seed|guidance_scale)": [^,}]*', rf'"\1": {value}', text, count=1))
    run(tmp_path / "out", folder, f"other={write_run(tmp_path / 'other', rows)}")
    text = (tmp_path / "out" / "comparison.json").read_text()
    comparison = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    found, cells = comparison["scores"]["ocr"]["base"], page_data(tmp_path / "out")["cards"][0]["rows"][0]
    assert (found["mean"], found["images"], found["missing"]) == (pytest.approx(0.85), 2, 1)
    assert comparison["differences"]["ocr"]["other"]["images"] == 2
    assert [cell["scores"] for cell in cells] == [[None], [0.7]] and (cells[0]["seed"], cells[1]["seed"]) == (None, 0)
    assert comparison["settings"]["guidance_scale"]["other"] == 4.5


def test_published_figures(tmp_path):
    """They are marked as such, and are those of the paper."""
    run(tmp_path / "out", write_run(tmp_path / "base", [("a", 0, None, {"ocr": 0.5})]))
    text = (tmp_path / "out" / "table.md").read_text().split("Published, not measured here (SOAR, arXiv 2604.12617")[1]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == "| metric | SD-XL | SD3.5-L | FLUX.1-dev | SD3.5-M | SD3.5-M SFT | SD3.5-M SOAR |"
    assert rows[2:4] == [
        "| GenEval | 0.55 | 0.71 | 0.66 | 0.63 | 0.70 | 0.78 |",
        "| OCR | 0.14 | 0.68 | 0.59 | 0.59 | 0.64 | 0.67 |",
    ]
    assert len(rows) == 2 + len(compare.LABELS) and all(row.count("|") == 8 for row in rows)


def test_legend(tmp_path, monkeypatch):
    """A name a run in its colour, also of one that the first metric lacks, and whatever the name."""
    from matplotlib.colors import to_rgba
    from matplotlib.figure import Figure

    legends, legend = [], Figure.legend
    monkeypatch.setattr(Figure, "legend", lambda *args, **kwargs: legends.append(legend(*args, **kwargs)))
    scores = [{"ocr": 0.5, "aesthetic": 5.0}, {"aesthetic": 6.0}, {"ocr": 0.1}]
    names = ["_base", "$x^$", "other"]
    folders = [write_run(tmp_path / str(i), [("a", 0, None, found)]) for i, found in enumerate(scores)]
    run(tmp_path / "out", *(f"{name}={folder}" for name, folder in zip(names, folders, strict=True)))
    assert [text.get_text().replace("\\$", "$") for text in legends[0].get_texts()] == names
    colors = [patch.get_facecolor() for patch in legends[0].get_patches()]
    assert colors == [to_rgba(color) for color in compare.COLORS[:3]]


# Files


def test_files_outside_of_a_run(tmp_path):
    folder = write_run(tmp_path / "run", [("a", 0, None, {"ocr": 0.5})])
    path = folder / "metadata.jsonl"
    path.write_text(path.read_text().replace("images/", "../other/"))
    with pytest.raises(SystemExit, match="leads out of"):
        run(tmp_path / "out", folder)


def test_unreadable_images_are_counted(tmp_path, capsys):
    """A truncated and a missing image leave a place with the file's name; the others have thumbnails and links."""
    folder = write_run(tmp_path / "my run #1", [(f"p{i}", 0, None, {"ocr": 0.5}) for i in range(4)], side=64)
    whole = (folder / "images" / "00001-0.png").read_bytes()
    (folder / "images" / "00001-0.png").write_bytes(whole[: len(whole) // 2])
    (folder / "images" / "00002-0.png").unlink()
    comparison = run(tmp_path / "out", f"base={folder}", "--thumbnail_size", 32)
    assert "2 images could not be read" in capsys.readouterr().out
    names = [f"../my run #1/images/0000{i}-0.png" for i in (1, 2)]
    assert comparison["unreadable_images"] == names
    cells = [card["rows"][0][0] for card in page_data(tmp_path / "out")["cards"]]
    assert [cell["thumb"] is None for cell in cells] == [False, True, True, False]
    assert [cell["link"] is None for cell in cells] == [False, False, True, False]
    assert cells[0]["link"] == "../my%20run%20%231/images/00000-0.png" and cells[2]["name"] == "00002-0.png"
    assert Image.open(io.BytesIO(base64.b64decode(cells[0]["thumb"]))).size == (32, 32)


def test_prompts_do_not_leave_the_data(tmp_path):
    """No prompt ends the script element that it is in, and each arrives as it was; the table's cells stay cells."""
    rows = [(text, 0, "a|b", {"geneval": {"score": 1.0, "reason": text}}) for text in NASTY]
    run(tmp_path / "out", f"a|b={write_run(tmp_path / 'base', rows)}")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("</script") == (EVALUATION / "report_template.html").read_text().count("</script")
    assert [card["text"] for card in page_data(tmp_path / "out")["cards"]] == NASTY
    assert "| metric | a\\|b |" in (tmp_path / "out" / "table.md").read_text()


def test_an_earlier_comparison_is_replaced_whole(tmp_path, monkeypatch):
    """And stays as it was when the new one fails, with nothing left beside it."""
    folder = write_run(tmp_path / "base", [("a", 0, None, {"ocr": 0.5}), ("b", 0, None, {"ocr": 0.7})])
    run(tmp_path / "out", folder)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert before.keys() == compare.OUTPUTS
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(compare, "draw", lambda *_: 1 / 0)
        run(tmp_path / "out", f"other={folder}")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert list(run(tmp_path / "out", f"other={folder}")["runs"]) == ["other"]
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}


def test_refusals(tmp_path):
    """One line that names what is wrong, and nothing written."""
    good = write_run(tmp_path / "good", [("a", 0, None, {"ocr": 0.5}), ("b", 0, None, {"ocr": 0.7})])
    others = {
        "unscored": write_run(tmp_path / "unscored", [("a", 0, None, {})]),
        "empty": write_run(tmp_path / "empty", [("a", 0, None, {"ocr": None})]),
        "elsewhere": write_run(tmp_path / "elsewhere", [("c", 0, None, {"ocr": 0.5})]),
        "index": write_run(tmp_path / "index", [("a", 1, None, {"ocr": 0.5})]),
        "metric": write_run(tmp_path / "metric", [("a", 0, None, {"pickscore": 0.5})]),
        "untagged": write_run(tmp_path / "untagged", [("a", 0, None, {"geneval": 1.0})]),
        "text": write_run(tmp_path / "text", [("a", 0, None, {"ocr": "high"})]),
        "stale": write_run(tmp_path / "stale", [("a", 0, None, {"ocr": {"file_name": "old.png", "score": 1.0}})]),
        "broken": write_run(tmp_path / "broken", [("a", 0, None, {"ocr": 0.5}), ("b", 0, None, {"ocr": 0.5})]),
        "settings": write_run(tmp_path / "settings", [("a", 0, None, {"ocr": 0.5})]),
        "twice": write_run(tmp_path / "twice", [("a", 0, None, {"ocr": 0.5})]),
        "folder": write_run(tmp_path / "folder", [("a", 0, None, {"pickscore": 0.5})]),
    }
    (others["folder"] / "scores" / "ocr.jsonl").mkdir()
    with open(others["broken"] / "scores" / "ocr.jsonl", "r+") as file:
        file.truncate(len(file.read()) - 9)
    (others["settings"] / "generation.json").write_text("[1]")
    lines = (others["twice"] / "metadata.jsonl").read_text()
    (others["twice"] / "metadata.jsonl").write_text(lines * 2)
    no_pair = "good and {0} have no pair"
    wrong = {
        "unscored": "unscored has no scores: run `python examples/evaluation/score_images.py ",
        "empty": "empty has no scores: run `python",
        "elsewhere": no_pair,
        "index": no_pair,
        "metric": no_pair,
        "untagged": 'untagged/metadata.jsonl: images/00000-0.png has no "tag"',
        "text": "text/scores/ocr.jsonl: images/00000-0.png",
        "stale": "stale/scores/ocr.jsonl: old.png is not in metadata.jsonl",
        "broken": "broken/scores/ocr.jsonl, line 2 is not JSON",
        "settings": "settings/generation.json is not a JSON object",
        "twice": "twice/metadata.jsonl: images/00000-0.png is twice",
        "folder": "folder/scores/ocr.jsonl is no file",
    }
    output = tmp_path / "out"
    calls = [([good, others[name]], message.format(name)) for name, message in wrong.items()]
    calls += [([good, f"good={others['index']}"], "every name once"), ([f"={good}"], "want NAME=FOLDER")]
    calls += [([good, tmp_path / "nowhere"], "want NAME=FOLDER"), ([f"x={tmp_path}"], "has no metadata.jsonl")]
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in calls:
        with pytest.raises(SystemExit) as end:
            run(output, *arguments)
        assert message in str(end.value) and "\n" not in str(end.value), (arguments, end.value)
    assert sorted(tmp_path.rglob("*")) == before
    run(output, good)
    for name, text in (("notes.txt", "mine"), ("comparison.json", "{}")):
        kept = (output / name).read_text() if (output / name).exists() else None
        (output / name).write_text(text)
        with pytest.raises(SystemExit, match=rf"not, or not only, an earlier comparison \(.*{name}"):
            run(output, good)
        assert (output / name).read_text() == text
        (output / name).write_text(kept) if kept else (output / name).unlink()
    with pytest.raises(SystemExit, match="--output_dir"):
        run(good / "metadata.jsonl", good)
    with pytest.raises(SystemExit, match="2"):
        run(output, good, "--thumbnail_size", 5)


# The page


class Browser:
    """Headless Chromium, spoken to in the DevTools protocol through pipes at its file descriptors 3 and 4."""

    def __init__(self, program, profile):
        flags = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
            --disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe""".split()
        flags += [f"--user-data-dir={profile}", "--window-size=1280,900", "about:blank"]
        command = ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1', "sh", program, *flags]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.buffer, self.calls, self.events, self.page = b"", 0, [], {}
        (page,) = [info for info in self.call("Target.getTargets")["targetInfos"] if info["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self.page = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def receive(self):
        while b"\0" not in self.buffer:
            assert select.select([self.process.stdout], [], [], 60)[0], "Chromium does not answer"
            data = self.process.stdout.read(1 << 20)
            assert data, "Chromium has ended"
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method, **params):
        self.calls += 1
        message = {"id": self.calls, "method": method, "params": params} | self.page
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.calls:
            self.events.append(answer)
        return answer["result"]

    def open(self, path):
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def run(self, script):
        """The value of an expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, script):
        for _ in range(500):
            if self.run(script):
                return
            time.sleep(0.02)
        pytest.fail(f"never true: {script}")

    def press(self, key):
        text = {"text": {"Enter": "\r"}.get(key, key)} if key == "Enter" or len(key) == 1 else {}
        code = {"Escape": 27, "Enter": 13}.get(key, 0)
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)

    def click(self, selector):
        box = self.run(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def choose(self, selector, value):
        self.run(
            f"(node => {{ node.value = {json.dumps(value)}; node.dispatchEvent(new Event('input')) }})"
            f"(document.querySelector({json.dumps(selector)}))"
        )

    def complaints(self):
        """Uncaught errors, and whatever reached the console."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.events if event["method"] in kinds]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(names)} is installed")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.process.stdin.close()  # which ends it
    browser.process.wait(30)


RUNS = ("base", "sft", "soar", "soar-lora")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A comparison of 500 prompts and 4 runs, and its scores: OCR of `(prompt, run)`."""
    folder, rng = tmp_path_factory.mktemp("large"), np.random.default_rng(0)
    scores = rng.random((500, 4)).round(3)
    scores[17:20] = scores[3]  # ties
    texts = [*NASTY, *(f"a photo of {number} apples" for number in range(4, 500))]
    for run_number, name in enumerate(RUNS):
        rows = [
            (text, 0, TASKS[i % 6], {"ocr": scores[i, run_number], "geneval": float(scores[i, run_number] > 0.5)})
            for i, text in enumerate(texts)
        ]
        write_run(folder / name, rows, side=48)
    run(folder / "out", *(folder / name for name in RUNS), "--thumbnail_size", 40)
    return folder / "out" / "report.html", texts, scores


def shown(browser):
    return browser.run("[...document.querySelectorAll('article h2')].map(node => node.textContent)")


def current(browser):
    return browser.run("document.activeElement.querySelector('h2')?.textContent")


# How many cards in sight have not all their images.
EMPTY = """[...document.querySelectorAll('article')].filter(node => {
    const { top, bottom } = node.getBoundingClientRect();
    const there = [...node.querySelectorAll('img')].filter(image => image.complete && image.naturalWidth);
    return bottom > 0 && top < innerHeight && there.length < 4;
}).length"""


def test_page_of_500_prompts(browser, large):
    """All prompts are there as text, only those near the visible part have images, and nothing else is loaded."""
    page, texts, _ = large
    browser.open(page)
    assert shown(browser) == texts
    assert browser.run("document.title") == "base, sft, soar, soar-lora"
    assert browser.run("document.querySelector('#count').textContent") == "500 prompts"
    browser.run("document.querySelector('.tools').scrollIntoView()")
    browser.wait_for(f"{EMPTY} === 0")
    assert 0 < browser.run("document.querySelectorAll('article figure').length") < 100
    assert browser.run("typeof hacked") == "undefined"
    assert browser.run("[...document.querySelectorAll('img')].every(image => image.alt.length > 5)")
    assert browser.run("[...document.querySelectorAll('input, select')].every(node => node.labels[0].textContent)")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    table = browser.run("document.querySelector('table').textContent") + browser.run(
        "document.querySelector('.scroll p').textContent"
    )
    assert "two object" in table and "Published, not measured here" in table and "SOAR 0.78" in table
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith(("data:", page.as_uri())) for url in asked)
    assert browser.complaints() == []


def test_runs_in_the_order_of_the_call(browser, tmp_path):
    """Also where their names are numbers, which JavaScript sorts; and a card that was clicked on is the one opened."""
    names, texts = ["base", "1000", "500"], ["first", "second"]
    for place, name in enumerate(names):
        write_run(tmp_path / name, [(text, 0, None, {"ocr": 0.1 + place / 10}) for text in texts])
    run(tmp_path / "out", *(tmp_path / name for name in names))
    browser.open(tmp_path / "out" / "report.html")
    assert browser.run("document.title") == "base, 1000, 500"
    card = browser.run("document.querySelector('article').textContent")
    assert re.search("base.*1000.*500", card, re.DOTALL) and re.search("0.100.*0.200.*0.300", card, re.DOTALL)
    browser.run("document.querySelectorAll('article')[1].focus()")  # as a click does
    browser.press("Enter")
    assert browser.run("document.querySelector('dialog h2').textContent") == "second"
    assert browser.complaints() == []


def test_filter_search_and_sort(browser, large):
    """The cards, their order and the count are those of an independent computation; cards in sight have images."""
    page, texts, scores = large
    browser.open(page)
    count = "document.querySelector('#count').textContent"
    by_difference = sorted(range(500), key=lambda i: -(scores[i].max() - scores[i].min()))
    assert by_difference != list(range(500))
    browser.run("document.querySelector('.tools').scrollIntoView()")
    browser.wait_for(f"{EMPTY} === 0")
    browser.choose("#search", "  ")  # changes nothing, and the cards in sight do not stay empty
    browser.wait_for(f"{EMPTY} === 0")
    browser.choose("#order", "1")
    assert shown(browser) == [texts[i] for i in by_difference]
    browser.run("document.querySelector('.tools').scrollIntoView()")
    browser.wait_for(f"{EMPTY} === 0")
    first = np.ptp(scores[by_difference[0]])
    assert browser.run("document.querySelector('article > p').textContent").endswith(f"OCR differs by {first:.3f}")
    browser.choose("#task", "counting")
    assert shown(browser) == [texts[i] for i in by_difference if i % 6 == 2]
    assert browser.run(count) == f"{len(range(2, 500, 6))} of 500 prompts"
    browser.choose("#order", "")
    browser.press("/")
    browser.call("Input.insertText", text="APPLES 11")
    assert shown(browser) == [texts[i] for i in range(2, 500, 6) if "apples" in texts[i] and "11" in texts[i]]
    browser.wait_for(f"{EMPTY} === 0")
    browser.choose("#search", "狐狸")
    assert shown(browser) == [NASTY[2]]
    browser.choose("#search", "nothing like this")
    assert browser.run(count) == "0 of 500 prompts" and browser.run("!document.querySelector('#none').hidden")
    browser.choose("#search", "")
    browser.choose("#task", "")
    assert shown(browser) == texts and browser.run("document.querySelector('#none').hidden")
    assert browser.complaints() == []


def test_keyboard_and_large_view(browser, large):
    page, texts, scores = large
    browser.open(page)
    for key, place in zip(["j", "j", "ArrowDown", "k", "ArrowRight", "ArrowLeft"], [0, 1, 2, 1, 2, 1], strict=True):
        browser.press(key)
        assert current(browser) == texts[place]
        assert browser.run("document.querySelectorAll('.current').length") == 1
    bar = browser.run("document.querySelector('.tools').getBoundingClientRect().bottom")
    assert bar <= browser.run("document.activeElement.getBoundingClientRect().top") < bar + 40
    height = browser.run("document.documentElement.scrollHeight")
    for _ in range(100):  # the cards that were left behind are emptied, and nothing moves
        browser.press("j")
    assert current(browser) == texts[101]
    browser.wait_for(f"{EMPTY} === 0")
    browser.wait_for("document.querySelectorAll('article figure').length < 100")
    assert bar <= browser.run("document.activeElement.getBoundingClientRect().top") < bar + 40
    assert browser.run("document.documentElement.scrollHeight") == height

    browser.click(".current figure:nth-child(2) .picture")
    heading, pressed = (
        "document.querySelector('dialog[open] h2').textContent",
        "document.querySelector('[aria-pressed=true]').textContent",
    )
    score = "[...document.querySelectorAll('dialog dd')].map(node => node.textContent).at(-1)"
    assert browser.run(heading) == texts[101] and browser.run(pressed) == "sft"
    assert browser.run(score) == f"{scores[101, 1]:.3f}"
    full = "(image => image && image.complete && image.naturalWidth)(document.querySelectorAll('dialog img')[1])"
    browser.wait_for(f"{full} === 48")  # the file, not the thumbnail
    for key, text, name in [
        ("ArrowRight", 101, "soar"),
        ("ArrowDown", 102, "soar"),
        ("k", 101, "soar"),
        ("k", 100, "soar"),
    ]:
        browser.press(key)
        assert browser.run(heading) == texts[text] and browser.run(pressed) == name
    assert browser.run("document.querySelector('dialog a').getAttribute('href')") == "../soar/images/00100-0.png"
    for _ in range(2):
        browser.press("ArrowRight")
    assert browser.run(pressed) == "base" and browser.run(score) == f"{scores[100, 0]:.3f}"
    browser.press("Escape")
    browser.wait_for("!document.querySelector('dialog').open")
    assert current(browser) == texts[100]
    browser.press("Enter")
    assert browser.run(heading) == texts[100]
    browser.press("Escape")
    browser.wait_for("!document.querySelector('dialog').open")
    browser.press("/")
    browser.press("j")
    assert browser.run("document.querySelector('#search').value") == "j"
    assert browser.complaints() == []


def test_page_with_gaps(browser, tmp_path):
    """One run; several images a prompt; missing scores, files and thumbnails: places are held, numbers are dashes."""
    rows = [(f"p{i}", j, None, {"pickscore": 20 + i + j} if i else {}) for i in range(3) for j in range(2)]
    folder = write_run(tmp_path / "base", rows, side=48)
    (folder / "images" / "00002-0.png").write_bytes(b"broken")
    run(tmp_path / "out", folder)
    (folder / "images" / "00004-0.png").unlink()
    browser.open(tmp_path / "out" / "report.html")
    assert browser.run("document.querySelector('#task').hidden")
    browser.press("j")
    browser.wait_for("document.querySelectorAll('article figure').length >= 4")
    assert browser.run("document.querySelector('article dd').textContent") == "–"
    assert (
        browser.run("document.querySelectorAll('article')[1].querySelector('.picture').textContent")
        == "00002-0.png could not be read"
    )
    assert "2 images without a score" in browser.run("document.querySelector('table').textContent")
    assert browser.complaints() == []
    browser.press("j")
    browser.press("j")
    browser.press("Enter")
    browser.wait_for("document.querySelector('dialog ul').textContent.includes('00004-0.png could not be opened')")
    browser.press("ArrowDown")
    assert "image 2 of 2" in browser.run("document.querySelector('dialog').textContent")
    assert math.isclose(browser.run("Number(document.querySelector('dialog dd').textContent)"), 23)


def test_page_on_a_small_screen(browser, large):
    """Nothing but the table and the images is wider than the screen; a step from the table leads to the first card."""
    page, texts, _ = large
    browser.call("Emulation.setDeviceMetricsOverride", width=390, height=560, deviceScaleFactor=1, mobile=True)
    browser.open(page)
    assert browser.run("document.documentElement.scrollWidth") == 390
    assert browser.run("document.querySelector('article').getBoundingClientRect().top > innerHeight")
    browser.press("j")
    assert current(browser) == texts[0]
    browser.wait_for(f"{EMPTY} === 0")
    browser.press("ArrowDown")
    assert current(browser) == texts[1]
    browser.run("scrollTo(0, document.querySelectorAll('article')[300].offsetTop)")  # a step then starts from there
    browser.press("j")
    assert current(browser) == texts[300]
    browser.call("Emulation.clearDeviceMetricsOverride")
    assert browser.complaints() == []
