# SPDX-License-Identifier: Apache-2.0
"""
Data of the experiment: prompts for reinforcement learning out of a data set's captions, and the toy data of `tiny`.

    python examples/paper/make_data.py prompts --train_data_dir my_images --held_out tests.txt --output prompts.txt
    python examples/paper/make_data.py tiny outputs/paper_tiny/data
"""

import argparse
import json
import random
import shutil
import sys
from pathlib import Path


EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES / "evaluation"), str(EXAMPLES / "miniature")]
from data_sets import add_data_arguments, check_data_arguments  # noqa: E402
from runs import script  # noqa: E402


def read_held_out(path):
    """The prompts of a test set, in lower case: `set[str]`."""
    with script.failing_with(f"--held_out {path} holds no prompts"):
        lines = Path(path).read_text("utf-8").splitlines()
        prompts = (json.loads(line)["prompt"] if path.endswith(".jsonl") else line for line in lines if line.strip())
        return {prompt.strip().lower() for prompt in prompts}


def write_prompts(args):
    """Each caption once, a line each, but those of the test sets."""
    held_out = {prompt for path in args.held_out for prompt in read_held_out(path)}
    captions = (" ".join(caption.split()) for row in script.load_images(args) for caption in row["captions"])
    captions = [caption for caption in dict.fromkeys(captions) if caption and caption.lower() not in held_out]
    if not captions:
        script.fail("no caption is left that is in none of the test sets")
    with script.failing_with("--output"):
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text("".join(f"{caption}\n" for caption in captions), "utf-8")


def write_tiny(folder):
    """Six pictures of words with captions that quote them, and two prompts of other words."""
    import words

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "train").mkdir(parents=True)
    parts = words.split()
    for i, word in enumerate(parts["train"][:6]):
        words.draw(word, random.Random(i), 64).save(folder / "train" / f"{i}.png")
        (folder / "train" / f"{i}.txt").write_text(f'a sign that says "{word}"\n')
    (folder / "test.txt").write_text("".join(f'a sign that says "{word}"\n' for word in parts["test"][:2]))


def main():
    parser = argparse.ArgumentParser(description="Data of the experiment.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    prompts = commands.add_parser("prompts", help="Out of a data set's captions.")
    add_data_arguments(prompts)
    prompts.add_argument("--held_out", nargs="*", default=[], help="Files of prompts that may not be among them.")
    prompts.add_argument("--output", type=Path, required=True)
    tiny = commands.add_parser("tiny", help="The toy data.")
    tiny.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.command == "tiny":
        with script.failing_with(f"{args.folder} cannot be written"):
            write_tiny(args.folder)
    elif not check_data_arguments(prompts, args):
        prompts.error("give a data set: --dataset_name, --train_data_dir, or --jsonl_path with --image_dir")
    else:
        write_prompts(args)


if __name__ == "__main__":
    main()
