# SPDX-License-Identifier: Apache-2.0
"""
Put SOAR into a training script of diffusers' examples: a copy of it with the insertions of a port.

    git clone --depth 1 --branch v0.40.0 https://github.com/huggingface/diffusers
    python examples/porting/apply.py diffusers train_dreambooth_lora_sd3 train_dreambooth_lora_sd3_soar.py

The copy needs `soar_utils.py`, which is written beside it. A port is a text: lines `== after: ANCHOR`, `== before:` or
`== instead of:`, and the lines to put there. An anchor is a whole line of the script, without its indentation, which
must occur exactly once.
"""

import argparse
import re
import shutil
from pathlib import Path


HERE = Path(__file__).resolve().parent
RELEASE = "v0.40.0"


def read_port(path):
    """`list` of place, anchor and lines of a port."""
    edits = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if match := re.fullmatch(r"== (after|before|instead of): (.+)", line):
            edits.append((match[1], match[2], []))
        elif edits:
            edits[-1][2].append(line)
        elif line.strip() and not line.startswith("#"):
            raise SystemExit(f"error: {path}, line {number}: before the first `== after: ANCHOR`")
    return edits


def apply(edits, source):
    """`source` with `edits` of [`read_port`]; an error names the anchors that do not occur exactly once."""
    lines = source.splitlines()
    places = {anchor: [i for i, line in enumerate(lines) if line.strip() == anchor] for _, anchor, _ in edits}
    if wrong := [f"{anchor!r} occurs {len(found)} times" for anchor, found in places.items() if len(found) != 1]:
        raise SystemExit(f"error: this is not the script of diffusers {RELEASE}: {'; '.join(wrong)}")
    parts = {place: {} for place in ("before", "instead of", "after")}
    for place, anchor, new in edits:
        parts[place].setdefault(places[anchor][0], []).extend(new)
    result = []
    for i, line in enumerate(lines):
        result += [*parts["before"].get(i, []), *parts["instead of"].get(i, [line]), *parts["after"].get(i, [])]
    return "\n".join(result) + "\n"


def main():
    ports = sorted(path.stem for path in HERE.glob("*.port"))
    parser = argparse.ArgumentParser(description="Put SOAR into a training script of diffusers' examples.")
    parser.add_argument("checkout", type=Path, help=f"Folder of diffusers' repository at {RELEASE}.")
    parser.add_argument("script", choices=ports, help="Which script.")
    parser.add_argument("output", type=Path, help="File to write; it must not exist.")
    args = parser.parse_args()
    found = sorted(args.checkout.glob(f"examples/*/{args.script}.py"))
    if len(found) != 1:
        parser.error(f"{args.checkout} has {len(found)} files examples/*/{args.script}.py")
    if args.output.exists():
        parser.error(f"{args.output} exists")
    try:
        source = found[0].read_text("utf-8")
    except ValueError as error:
        parser.error(f"{found[0]} is no script: {error}")
    text = apply(read_port(HERE / f"{args.script}.port"), source)
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text)
        utils = args.output.parent / "soar_utils.py"
        if not utils.exists():
            shutil.copy(HERE.parents[1] / "soar_utils.py", utils)
    except OSError as error:
        parser.error(str(error))
    print(f"{args.output}: {args.script}.py of diffusers {RELEASE} with SOAR; see --lambda_aux in its --help")


if __name__ == "__main__":
    main()
