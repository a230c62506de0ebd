# SPDX-License-Identifier: Apache-2.0
"""Data sets in the training scripts' formats: their flags, read and written."""

import argparse
import hashlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path

from diffusers.training_utils import find_nearest_bucket
from PIL import Image
from runs import data_utils, script
from tqdm.auto import tqdm

from data_utils import inspect_image


def add_data_arguments(parser):
    """The flags of the training scripts that name a data set."""
    data = parser.add_argument_group("data set (as in the training scripts)")
    add = data.add_argument
    add("--dataset_name", help="Hub id or folder for `datasets.load_dataset`, or a folder of `save_to_disk`.")
    add("--dataset_config_name", help="Configuration of --dataset_name.")
    add("--dataset_split", default="train", help="Split of --dataset_name.")
    add("--train_data_dir", help="Folder of images, with NAME.txt beside each, or `metadata.jsonl` or `metadata.csv`.")
    add("--jsonl_path", help='Lines {"md5": ..., "caption_en": ..., "bw": 512, "bh": 512}; images `{md5}.jpg`.')
    add("--image_dir", help="Folder of the images of --jsonl_path.")
    add("--image_column", default="image")
    add("--caption_column", default="text")
    add("--instance_prompt", help="Caption of every image that has none.")
    add("--max_train_samples", type=script.number(int, 1), help="Use the first N images.")


def check_data_arguments(parser, args):
    """Refuse what names no data set, or more than one; returns whether there is one."""
    given = [flag for flag in ("dataset_name", "train_data_dir", "jsonl_path") if getattr(args, flag)]
    if len(given) > 1 or (args.jsonl_path is None) != (args.image_dir is None):
        parser.error("give one of --dataset_name, --train_data_dir, and --jsonl_path with --image_dir")
    for flag in ("train_data_dir", "image_dir", "jsonl_path"):
        path, is_there = getattr(args, flag), os.path.isfile if flag == "jsonl_path" else os.path.isdir
        if path is not None and not is_there(path):
            parser.error(f"--{flag} {path}: no such {'file' if flag == 'jsonl_path' else 'folder'}")
    return bool(given)


def read_data(args):
    """The rows of a data set, `list[dict]`: `file_name`, `text`, `captions`, `image`, `height` and `width`."""
    rows, table = [], script.load_images(args)
    for index, row in enumerate(tqdm(table, desc="Reading", unit="image")):
        captions, _ = row.pop("captions"), row.pop("key")
        row["text"] = captions[0]  # what an image is scored by
        row["captions"] = captions[0] if len(captions) == 1 else captions
        row["file_name"] = name_of(args, index, row["image"])
        if row["image"] and row["image"]["bytes"] is not None:
            row["image"] = (table, index)  # not its bytes: a data set is larger than the memory
        rows.append(row)
    return rows


def file_of(row):
    """A row's image as a `dict` of the `bytes` of its file, or its `path`; `None` where it has none."""
    if not isinstance(row["image"], tuple):
        return row["image"]
    table, index = row["image"]
    return table[index]["image"]


def name_of(args, index, image):
    """What a row of a data set is called in its scores: its place in the folder, or its number."""
    folder = args.train_data_dir or args.image_dir
    path = (image or {}).get("path")
    if folder and path:
        path = Path(path)  # it may be a link that leads elsewhere
        return (path.parent.resolve() / path.name).relative_to(Path(folder).resolve()).as_posix()
    return f"{index:06d}"


def add_output_arguments(parser):
    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--output_dir", type=Path, required=True, help="Folder to write, which must not exist.")
    add("--to", choices=["image_folder", "jsonl"], default="image_folder", help="Format. Default: image_folder.")
    add("--copy", action="store_true", help="Copy the images; hard links need the same file system.")
    add("--resolution", type=script.number(int, 16), help="Of `bh` and `bw`. Default: the source's own, or 512.")
    add("--use_aspect_ratio_buckets", action="store_true", help="Several shapes of about --resolution^2.")
    add("--aspect_ratio_buckets", help='The shapes, as "height,width;height,width".')


def output_sizes(args):
    """The sizes (height, width) to choose from, and whether a source's own go before them; `ValueError`: malformed."""
    named = args.resolution or args.use_aspect_ratio_buckets or args.aspect_ratio_buckets
    sizes = script.training_sizes(argparse.Namespace(**vars(args) | {"resolution": args.resolution or 512}))
    if any(side % 16 for size in sizes for side in size):
        raise ValueError("every side must be divisible by 16")
    return sizes, not named


def check_output_arguments(parser, args):
    """Refuse no data, sizes that no script takes, and an output folder that exists, or would lie among the data."""
    if not check_data_arguments(parser, args):
        parser.error("give a data set: --dataset_name, --train_data_dir, or --jsonl_path with --image_dir")
    if args.output_dir.exists():
        parser.error(f"--output_dir {args.output_dir} exists: choose another folder, or remove it")
    for folder in filter(None, (args.output_dir, getattr(args, "scores_dir", None))):
        for source in filter(None, (args.train_data_dir, args.image_dir, args.dataset_name)):
            if os.path.isdir(source) and data_utils.is_inside(folder, source):
                parser.error(f"{folder} is inside {source}, where its images would be read as data")
    try:
        output_sizes(args)
    except ValueError as error:
        parser.error(f"--resolution or --aspect_ratio_buckets: {error}")


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
        rows (`list[dict]`): From [`read_data`].
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
    except BaseException as error:
        shutil.rmtree(partial)
        if isinstance(error, OSError):  # the disk is full
            script.fail(f"--output_dir {args.output_dir}: {error}")
        raise
    with script.failing_with(f"--output_dir {args.output_dir}; the data set is in {partial}"):
        partial.rename(args.output_dir)
    return bad


def write_into(folder, args, rows, extra):
    """[`write_data_set`], into a new folder."""
    name = "data.jsonl" if args.to == "jsonl" else "metadata.jsonl"
    sizes, keep_own = output_sizes(args)
    bad = 0
    with open(folder / name, "w", encoding="utf-8") as file:
        for row, fields in zip(tqdm(rows, desc="Writing", unit="image"), extra or [{}] * len(rows), strict=True):
            image = file_of(row)
            found = inspect_image(image)
            if "error" in found:
                print(f"left out: {row['file_name']}: {found['error']}")
                bad += 1
                continue
            size = row["height"], row["width"]
            if not (keep_own and all(size)):
                size = sizes[find_nearest_bucket(*found["size"], sizes)]
            line, image = describe(args.to, row, image, size)
            target = folder / "images" / line.pop("target")
            if not target.exists():  # the same image with two captions
                place(image, target, args.copy)
            file.write(json.dumps(line | fields, ensure_ascii=False) + "\n")
    if bad == len(rows):
        script.fail("no image could be read" if rows else "the data set is empty")
    return bad


def describe(to, row, image, size):
    """The line of an image, to train at `size` (height, width), its place under `target`; and it, maybe as PNG."""
    data = data_utils.file_bytes(image)
    with Image.open(io.BytesIO(data)) as opened:
        suffix = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp"}.get(opened.format)
    if suffix is None and to == "jsonl":
        buffer = io.BytesIO()
        data_utils.decode_image(data).save(buffer, "PNG")
        data, suffix, image = buffer.getvalue(), ".png", {"bytes": buffer.getvalue(), "path": None}
    if to == "jsonl":
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        return {"target": md5 + suffix, "md5": md5, "caption_en": row["captions"], "bw": size[1], "bh": size[0]}, image
    target = row["file_name"]
    if not Path(target).suffix:
        target += suffix or ".png"
    return {"target": target, "file_name": f"images/{target}", "text": row["captions"]}, image
