# SPDX-License-Identifier: Apache-2.0
"""
Write a data set of any of the training scripts' formats as an image folder, or as the JSONL of SOAR's authors.

    python examples/evaluation/convert_jsonl.py --train_data_dir photos --to jsonl --resolution 512 --output_dir out
    python examples/evaluation/convert_jsonl.py --jsonl_path data.jsonl --image_dir images --output_dir out

`jsonl` writes `data.jsonl`, for `--jsonl_path`, and `images/`, for `--image_dir`: each image is named by its MD5, and
`bh` and `bw` are the size to train at: the nearest of the buckets, or without a flag that names buckets, the source's
own where it has them. `image_folder` writes `images/` and `metadata.jsonl`, for `--train_data_dir`. Images are hard
links where they are files, as the scripts follow no link that leads out of the folder; --copy copies them.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from accelerate import PartialState
from diffusers.training_utils import find_nearest_bucket, generate_aspect_ratio_buckets, parse_buckets_string
from PIL import Image
from score_images import add_data_arguments, check_data_arguments, file_of, read_data, script
from tqdm.auto import tqdm


def add_output_arguments(parser):
    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--output_dir", type=Path, required=True, help="Folder to write, which must not exist.")
    add("--to", choices=["image_folder", "jsonl"], default="image_folder", help="Format. Default: image_folder.")
    add("--copy", action="store_true", help="Copy the images; hard links need the same file system.")
    add("--resolution", type=script.at_least(16), help="Of `bh` and `bw`. Default: the source's own, or 512.")
    add("--use_aspect_ratio_buckets", action="store_true", help="Several shapes of about --resolution^2.")
    add("--aspect_ratio_buckets", help='The shapes, as "height,width;height,width".')


def check_output_arguments(parser, args):
    """
    Refuse an output folder that exists, or would lie among the data; put the sizes to choose from, (height, width),
    into `args.buckets`, and whether a source's own sizes are kept into `args.keep_sizes`.
    """
    if args.output_dir.exists():
        parser.error(f"--output_dir {args.output_dir} exists: choose another folder, or remove it")
    for folder in filter(None, (args.output_dir, getattr(args, "scores_dir", None))):
        for source in filter(None, (args.train_data_dir, args.image_dir, args.dataset_name)):
            if os.path.isdir(source) and script.is_inside(folder, source):
                parser.error(f"{folder} is inside {source}, where its images would be read as data")
    args.keep_sizes = not (args.resolution or args.aspect_ratio_buckets or args.use_aspect_ratio_buckets)
    args.resolution = args.resolution or 512
    args.buckets = [(args.resolution, args.resolution)]
    if args.aspect_ratio_buckets:
        try:
            args.buckets = parse_buckets_string(args.aspect_ratio_buckets)
        except ValueError as error:
            parser.error(f"--aspect_ratio_buckets: {error}")
    elif args.use_aspect_ratio_buckets:
        args.buckets = generate_aspect_ratio_buckets(args.resolution)
    if any(side % 16 for bucket in args.buckets for side in bucket):
        parser.error("--resolution and every side of --aspect_ratio_buckets must be divisible by 16")


def place(image, path, copy):
    """Put the file of an image (`dict` with `path` or `bytes`) at `path`: a hard link, unless there is no file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if image["bytes"] is not None:
        path.write_bytes(image["bytes"])
    elif copy:
        shutil.copyfile(image["path"], path)
    else:
        try:
            os.link(os.path.realpath(image["path"]), path)
        except OSError as error:
            script.fail(f"{image['path']} cannot be linked ({error.strerror}); give --copy")


def write_data_set(args, rows, extra=()):
    """
    Write the images and captions of `rows` to --output_dir.

    Args:
        args (`argparse.Namespace`): With [`add_output_arguments`]' flags.
        rows (`list[dict]`): From [`score_images.read_data`].
        extra (`list[dict]`, *optional*): Further fields of each row's line.

    Returns:
        `int`: how many images could not be read; they are left out and named.
    """
    with script.failing_with(f"--output_dir {args.output_dir}"):
        args.output_dir.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{args.output_dir.name}-", dir=args.output_dir.parent))
        partial.chmod(0o755)
    try:
        bad = write_into(partial, args, rows, extra)
    except BaseException:
        shutil.rmtree(partial)
        raise
    with script.failing_with(f"--output_dir {args.output_dir}; the data set is in {partial}"):
        partial.rename(args.output_dir)
    return bad


def write_into(folder, args, rows, extra):
    """[`write_data_set`], into a new folder."""
    name = "data.jsonl" if args.to == "jsonl" else "metadata.jsonl"
    bad = 0
    with open(folder / name, "w", encoding="utf-8") as file:
        for row, fields in zip(tqdm(rows, desc="Writing", unit="image"), extra or [{}] * len(rows), strict=True):
            image = file_of(row)
            found = script.inspect_image(image)
            if "error" in found:
                print(f"left out: {row['file_name']}: {found['error']}")
                bad += 1
                continue
            line, image = describe(args, row, image, found["size"])
            target = folder / "images" / line.pop("target")
            if not target.exists():  # the same image with two captions
                place(image, target, args.copy)
            file.write(json.dumps(line | fields, ensure_ascii=False) + "\n")
    if bad == len(rows):
        script.fail("no image could be read" if rows else "the data set is empty")
    return bad


def describe(args, row, image, size):
    """The line of an image of `size` (height, width), with its place under `target`; and the image, maybe as PNG."""
    data = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
    with Image.open(io.BytesIO(data)) as opened:
        suffix = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp"}.get(opened.format)
    if suffix is None and args.to == "jsonl":
        buffer = io.BytesIO()
        script.read_image(image)[0].save(buffer, "PNG")
        data, suffix, image = buffer.getvalue(), ".png", {"bytes": buffer.getvalue(), "path": None}
    if args.to == "jsonl":
        height, width = row["height"], row["width"]
        if not (height and args.keep_sizes):
            height, width = args.buckets[find_nearest_bucket(*size, args.buckets)]
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        return {"target": md5 + suffix, "md5": md5, "caption_en": row["text"], "bw": width, "bh": height}, image
    target = row["file_name"]
    if not Path(target).suffix:
        target += suffix or ".png"
    return {"target": target, "file_name": f"images/{target}", "text": row["text"]}, image


def main(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0], allow_abbrev=False)
    add_data_arguments(parser)
    add_output_arguments(parser)
    args = parser.parse_args(input_args)
    if not check_data_arguments(parser, args):
        parser.error("give a data set: --dataset_name, --train_data_dir, or --jsonl_path with --image_dir")
    check_output_arguments(parser, args)
    PartialState()  # for the log
    rows = read_data(args)
    bad = write_data_set(args, rows)
    print(f"{len(rows) - bad} images in {args.output_dir}, {bad} left out")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
