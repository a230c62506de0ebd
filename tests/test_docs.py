# SPDX-License-Identifier: Apache-2.0
"""Every command in the README, the examples and the scripts' docstrings is one that its script understands."""

import ast
import importlib
import re
import shlex

import pytest
from harness import ROOT, SCRIPTS
from mutate import MUTATIONS


QUICKSTART = ROOT / "examples" / "quickstart" / "run.sh"


def commands(text):
    """The command lines that name a training script, continued lines joined, from a text or a shell script."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        match = re.search(r"(train_sd3_\w+)\.py\s+(--.*)", line)
        if match and match[1] in SCRIPTS:
            yield match[1], match[2].split("  #")[0]


def documents():
    readme = (ROOT / "README.md").read_text()
    yield "README.md", "\n".join(re.findall(r"```bash\n(.*?)```", readme, flags=re.DOTALL))
    for script in SCRIPTS:
        yield f"{script}.py", importlib.import_module(script).__doc__
    printed = QUICKSTART.read_text().split("cat <<END")[1]
    yield "quickstart/run.sh", printed.replace("\\\\", "\\")
    for path in sorted((ROOT / "examples").rglob("*.md")):
        yield str(path.relative_to(ROOT)), "\n".join(re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL))


COMMANDS = [(name, *command) for name, text in documents() for command in commands(text)]


def test_there_are_commands():
    names = {"README.md", "quickstart/run.sh", *(f"{script}.py" for script in SCRIPTS)}
    assert names <= {name for name, *_ in COMMANDS}


@pytest.mark.parametrize(("document", "script", "arguments"), COMMANDS)
def test_command_is_understood(document, script, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_images").mkdir()
    args = importlib.import_module(script).parse_args(shlex.split(arguments))
    if config := getattr(args, "bnb_quantization_config_path", None):
        assert (ROOT / config).exists()


def test_flags_of_the_quickstart_exist():
    """The quickstart builds its command lines from variables: every flag there must be one of the scripts'."""
    text = QUICKSTART.read_text()
    known = {script: set(re.findall(r'add\("(--\w+)"', (ROOT / f"{script}.py").read_text())) for script in SCRIPTS}

    def flags(pattern):
        return set(re.findall(r"(?<!\S)(--\w+)", re.search(pattern, text, re.DOTALL | re.MULTILINE)[1]))

    common = flags(r"^train\(\) \{(.*?)^\}") | flags(r'^full="(.*?)"') | flags(r"stage base train (.*?)\n    stage")
    assert len(common) > 10
    for script in SCRIPTS:
        assert common <= known[script], script
    assert flags(r'^soar="(.*?)"') <= known["train_sd3_soar"] & known["train_sd3_soar_lora"]
    assert flags(r'^lora="(.*?)"') <= known["train_sd3_soar_lora"]


def test_flags_of_the_cards(tmp_path, monkeypatch):
    """The README's command, changed as its table says for each card, is understood by the script of that row."""
    monkeypatch.chdir(ROOT)
    readme = (ROOT / "README.md").read_text()
    ((script, recipe),) = [
        c for c in commands("\n".join(re.findall(r"```bash\n(.*?)```", readme, re.DOTALL))) if "lora" in c[0]
    ]
    recipe = shlex.split(recipe.replace("my_images", str(tmp_path)))
    rows = re.findall(r"^\| \d+ GB \|[^|]*\|([^|]*)\|", readme, re.MULTILINE)
    assert len(rows) == 5
    for row in rows:
        changed, without = row.partition("without")[::2]
        module = importlib.import_module(match[0] if (match := re.search(r"train_\w+", changed)) else script)
        words = [word for word in recipe if f"`{word}`" not in without]
        words += [word for text in re.findall(r"`(--[^`]*)`", changed) for word in shlex.split(text)]
        args = module.parse_args(words)
        assert ("--offload" in without) == (not args.offload)


def test_bounds_are_the_same_everywhere():
    """requirements.txt, the PEP 723 header of each script, and the lowest versions that the tests are run with."""
    bounds = (ROOT / "requirements.txt").read_text().split("\n")[:-1]
    for script in SCRIPTS:
        header = (ROOT / f"{script}.py").read_text().split("# dependencies = [\n")[1].split("# ]")[0]
        assert [bound.replace("'", '"') for bound in re.findall(r'"(.*?)"', header)] == bounds
    oldest = dict(re.findall(r"^([\w-]+)==(.*)$", (ROOT / "tests" / "constraints-oldest.txt").read_text(), re.M))
    tested = dict(re.findall(r"^([\w-]+)==(.*)$", (ROOT / "tests" / "constraints.txt").read_text(), re.M))
    assert oldest.keys() == tested.keys()
    for name, low in re.findall(r"^(\w+)>=([\d.]+)", "\n".join(bounds), re.M):
        assert oldest[name] == low + ".0" and oldest[name] != tested[name] or name == "safetensors"


def test_readme_table_has_every_soar_flag_with_its_default():
    readme = (ROOT / "README.md").read_text()
    table = dict(re.findall(r"^\| `(--\w+)` \| ([^|]*) \|", readme, flags=re.MULTILINE))
    module = importlib.import_module("train_sd3_soar")
    source = (ROOT / "train_sd3_soar.py").read_text().split('add_argument_group("SOAR")')[1]
    flags = re.findall(r'add\("(--\w+)"', source.split("add_argument_group")[0])
    assert set(table) == set(flags)
    args = module.parse_args(["--pretrained_model_name_or_path", "x", "--train_data_dir", str(ROOT / "tests")])
    for flag, default in table.items():
        value = getattr(args, flag.strip("-"))
        assert default.strip() in (f"{value}", f"`{value}`") or value is None


def test_examples_use_the_public_names_of_a_script_and_no_others():
    """Those of the table in `examples/README.md`, each of which some example uses and every script has."""
    section = (ROOT / "examples" / "README.md").read_text().split("## What the examples use of a script")[1]
    public = {
        name for names in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", names)
    }
    used = set()
    for path in (ROOT / "examples").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in SCRIPTS:
                used |= {alias.name for alias in node.names}
            elif (
                isinstance(node, ast.Attribute)
                and getattr(node.value, "id", getattr(node.value, "attr", "")) == "script"
            ):
                used.add(node.attr)
    assert used == public
    for script in SCRIPTS:
        assert all(hasattr(importlib.import_module(script), name) for name in public)


def test_the_errors_to_plant_have_their_place():
    """Each text that `mutate.py` changes stands once in its file, and the document says how many there are."""
    for file, text, instead, _ in MUTATIONS:
        assert (ROOT / file).read_text().count(text) == 1 and text != instead, (file, text)
    assert f"plants {len(MUTATIONS)} errors" in (ROOT / "tests" / "README.md").read_text()
