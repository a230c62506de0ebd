# Copyright 2026 The SOAR for SD3.5 authors.
# SPDX-License-Identifier: Apache-2.0
"""
Data at the size of a million images: pictures as a viewer shows them, tables that are never Python's objects as a
whole, the order of the samples, and caches that any number of runs share. No command line, no log, no model.
"""

import contextlib
import csv
import functools
import gc
import hashlib
import io
import itertools
import json
import math
import os
import time
import uuid
import warnings
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin


CACHE_FILE_SIZE = 4096  # values
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # generated pictures carry their workflow with them
Image.preinit()  # of the formats, the usual ones are tried first


# Images
def inspect_image(image):
    """Name, size, digest and peculiarities of a row's `image`, or what is wrong with it."""
    if image is None:
        return {"name": None, "error": "its row has none"}
    found = {"name": image["path"]}
    try:
        data = file_bytes(image)
        decoded = decode_image(data)
        found |= {"size": (decoded.height, decoded.width), "notes": decoded.info["notes"]}
        # With what was made of its pixels: before that was done, the same file was another picture.
        found["digest"] = "/".join([hashlib.sha256(data).hexdigest(), *decoded.info["notes"]])
        if all(low == high for low, high in decoded.getextrema()):
            found["notes"] = [*found["notes"], "are of one colour throughout"]
    except Exception as error:  # a broken file raises whatever its decoder raises; the caller reports it
        found["error"] = f"{type(error).__name__}: {error}"[:200]
    return found


def inspect_rows(rows):
    """[`inspect_image`] of some rows, as a data loader's `collate_fn`."""
    return [inspect_image(row["image"]) for row in rows]


def is_inside(path, root):
    """
    Whether a path names something inside of the folder `root`, whatever `..` and links to folders are on the way of
    both. It may be a link itself: `root` holds that, wherever it leads.
    """
    folder, name = os.path.split(path)
    if "\0" in str(path):
        return False
    if name == "..":
        folder = os.path.dirname(os.path.realpath(path))
    inside, outside = (real_folder(os.path.join(os.getcwd(), part)) for part in (folder, root))
    return f"{inside}{os.sep}".startswith(outside.rstrip(os.sep) + os.sep)


@functools.lru_cache(maxsize=1000)
def real_folder(path):
    return os.path.realpath(path)


def file_bytes(image):
    """The bytes of an image's file, of a row's `image` (`dict` with `bytes`, or with a `path`)."""
    return Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]


def decode_image(data):
    """
    Decode the bytes of an image's file to what a viewer shows, a `PIL.Image.Image`: upright by its EXIF orientation,
    in sRGB by its colour profile, transparent parts over white; `info["notes"]` tells which of the latter two it was.
    Raises whatever PIL does on a broken file, and `ValueError` on a giant one, pixels of unknown range, or no picture.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            opened = Image.open(io.BytesIO(data))
        except (Image.UnidentifiedImageError, Image.DecompressionBombError):
            raise ValueError(explain(data)) from None
    with opened:
        if math.prod(opened.size) > Image.MAX_IMAGE_PIXELS:
            opened.draft(opened.mode, (4096, 4096))  # a JPEG can be decoded at a part of its size
        if math.prod(opened.size) > Image.MAX_IMAGE_PIXELS or opened.mode == "F":
            raise ValueError(f"{opened.size} pixels of mode {opened.mode}; make it smaller, with 8 bits a channel")
        image = ImageOps.exif_transpose(opened)
    notes, profile, alpha = [], image.info.get("icc_profile"), None
    if image.mode.startswith("I"):  # 16 bits of grey, which `convert` would cut off at 255
        if not 0 <= (levels := np.asarray(image)).min() <= levels.max() < 2**16:
            raise ValueError("of more than 16 bits a pixel; save it with 8")
        if image.has_transparency_data:  # of one grey
            alpha = Image.fromarray(np.where(levels == image.info["transparency"], 0, 255).astype(np.uint8))
        image = Image.fromarray((levels / 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    if profile:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "srgb" not in ImageCms.getProfileDescription(profile).lower():
                image = image if image.mode in ("L", "CMYK") else image.convert("RGB")
                image = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
                notes.append("were converted to sRGB from another colour profile")
        except (ImageCms.PyCMSError, OSError):
            notes.append("have a colour profile that cannot be read, and are taken as sRGB")
    image = image.convert("RGB")
    if alpha is not None and alpha.getextrema()[0] < 255:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
        notes.append("are transparent in parts, which are laid over white")
    image.info["notes"] = notes
    return image


def explain(data):
    """Why Pillow does not open the bytes of a file, and what to do."""
    if not data:
        return "the file is empty"
    if data.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, and no picture; `git lfs pull` fetches that"
    if b"<html" in data[:1000].lower():
        return "it is an HTML page, and no picture; download it again"
    return "Pillow does not read its format, or so many pixels; make a JPEG of it"


# Tables
def read_csv(path):
    """Yield the place and the fields of each line of a CSV file below its header; anything else ends the program."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            for record in reader:
                where = f"{path}, line {reader.line_num}"
                if None in record or None in record.values():
                    raise SystemExit(f"error: {where}: other fields than the header's; quote texts with commas")
                yield where, record
    except (OSError, ValueError, csv.Error) as error:
        raise SystemExit(f"error: {path} is no CSV file in UTF-8: {error}") from None


def read_json_lines(path):
    """Yield the place and the object of each line but blank ones; anything else ends the program."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if b"\\u" in line:  # JSON can spell characters that are none
                    json.dumps(record, ensure_ascii=False).encode()
            except (ValueError, RecursionError) as error:
                raise SystemExit(f"error: {where} is not JSON: {error}") from None
            if not isinstance(record, dict):
                raise SystemExit(f"error: {where} is not a JSON object")
            yield where, record


def make_table(records):
    """A `datasets.Dataset` of `dict`s with the same keys, made in parts: never are all of them Python's objects."""
    records, collecting = iter(records), gc.isenabled()
    gc.disable()  # its passes over millions of new objects find nothing to free, and take a third of the time
    try:
        parts = iter(lambda: datasets.Dataset.from_list(list(itertools.islice(records, 10_000))), None)
        parts = [*itertools.takewhile(len, parts)]
    finally:
        if collecting:
            gc.enable()
    return datasets.concatenate_datasets(parts) if parts else datasets.Dataset.from_dict({})


def rows_of(table, *columns):
    """Yield the rows of these columns of a `datasets.Dataset`, a `tuple` each, read a thousand at a time."""
    for batch in table.select_columns([*columns]).iter(1000):
        yield from zip(*(batch[column] for column in columns), strict=True)


# Order
def derive_seed(*parts):
    """A 64-bit seed from any printable parts; equal on every machine and in every process."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "little")


class BucketBatchSampler:
    """
    Endless batches of `(index, position)`, each of one of the `sizes` of the samples, the same sequence on any number
    of processes, of which each takes every `num_processes`-th batch, from batch `start` of the run on.

    Every bucket is an endless stream of shuffled passes, cut into full batches, so nothing is dropped or repeated:
    what does not fill a batch at the end of an epoch opens the bucket's next one. An epoch takes from each bucket the
    batches that end in it, in an order shuffled over the buckets; with one bucket the order is the stream itself.
    """

    def __init__(self, sizes, batch_size, seed, start=0, process_index=0, num_processes=1):
        self.buckets = [[i for i, s in enumerate(sizes) if s == size] for size in sorted(set(sizes))]
        self.batch_size, self.seed, self.start = batch_size, seed, start
        self.process_index, self.num_processes = process_index, num_processes
        self.order = functools.lru_cache(maxsize=2 * len(self.buckets))(self.order)  # a batch may span two passes

    def order(self, bucket, epoch):
        """The bucket's samples in the order of its pass number `epoch`."""
        return self.shuffled(self.buckets[bucket], "order", bucket, epoch)

    def shuffled(self, items, *what):
        generator = torch.Generator().manual_seed(derive_seed(self.seed, *what))
        return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]

    def batches(self):
        """Bucket and number therein of every batch of the run."""
        for epoch in itertools.count():
            ends = [[(epoch + i) * len(members) // self.batch_size for i in (0, 1)] for members in self.buckets]
            batches = [(bucket, number) for bucket, end in enumerate(ends) for number in range(*end)]
            yield from self.shuffled(batches, "batches", epoch) if len(self.buckets) > 1 else batches

    def __iter__(self):
        mine = itertools.islice(enumerate(self.batches()), self.start + self.process_index, None, self.num_processes)
        for batch_index, (bucket, number) in mine:
            places = range(number * self.batch_size, (number + 1) * self.batch_size)
            visits = (divmod(place, len(self.buckets[bucket])) for place in places)
            indices = [self.order(bucket, epoch)[place] for epoch, place in visits]
            yield [(index, batch_index * self.batch_size + i) for i, index in enumerate(indices)]


# Caches
def digest(*content):
    """A name of 32 characters that no other content has: of texts, numbers, and lists of them."""
    return hashlib.sha256(repr(content).encode()).hexdigest()[:32]


def file_key(path):
    """
    A name for the state of a file, by path, size, inode and times, or an empty one where there is none. The change
    time is new even where everything else was put back, as by unpacking an archive.
    """
    try:
        found = os.stat(path)
    except (OSError, TypeError, ValueError):  # no file, no path, or a null character in it
        return ""
    return digest(str(path), found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)


class Cache:
    """
    Bytes by key, in a folder of Arrow files with thousands of values. A file is whole or absent and never changes: any
    number of runs may write at once, and be killed. Of two values of a key, the newer counts.

    A file has a record batch for each value, and a last one with the list of their keys, as JSON. The index of all
    files is two arrays, which data-loader workers share with the process that they are forked from.

    Args:
        folder (`str`): Made where it is not there.

    Raises:
        `ValueError`: If a file is damaged; it is named.
    """

    def __init__(self, *folder):
        self.folder = Path(*folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def refresh(self):
        """See what others have written by now."""
        self.files, keys, places = sorted(map(str, self.folder.glob("*.arrow")), reverse=True), [""], [-1]
        for number, path in enumerate(self.files):
            start = number * CACHE_FILE_SIZE
            keys += json.loads(read_batch(path, -1))
            places += range(start, start + len(keys) - len(places))
        self.keys, first = np.unique(np.array(keys, "S32"), return_index=True)  # of equal ones the first
        self.places = np.array(places)[first]

    def find(self, keys):
        """The places of the values of these keys, `(N,)`, or of a single one, `()`; -1 where there is none."""
        keys = np.array(keys, "S32")
        at = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[at] == keys, self.places[at], -1)

    def __getitem__(self, key):
        """The value of a key. `KeyError`: there is none."""
        number, batch = divmod(self.find(key).item(), CACHE_FILE_SIZE)
        if number < 0:
            raise KeyError(f"{key} is missing in {self.folder}, which every process must see alike")
        return read_batch(self.files[number], batch)

    def values(self, places):
        """
        Yield the small values at places of [`find`], `None` for -1; fast where they were written in about this order,
        for a whole file is read at once.
        """
        for number, batch in (divmod(place, CACHE_FILE_SIZE) for place in places):
            yield None if number < 0 else read_file(self.files[number])[batch]

    def write(self, entries):
        """Write pairs of key and bytes as they come. An error ends it, and they stay; a kill costs two minutes'."""
        for old in self.folder.glob("*.unfinished"):
            with contextlib.suppress(FileNotFoundError):  # where another run removes it, too
                if time.time() - old.stat().st_mtime > 3600:
                    old.unlink()
        entries, schema = iter(entries), pyarrow.schema({"value": pyarrow.large_binary()})
        for entry in entries:
            unfinished = self.folder / f"{time.time_ns():020}-{uuid.uuid4().hex}.unfinished"
            keys, started, ended = [], time.monotonic(), None
            with open(unfinished, "wb") as file, pyarrow.ipc.new_file(file, schema) as writer:
                try:
                    for key, value in itertools.chain([entry], entries):
                        writer.write(record_batch(value, schema))
                        keys.append(key)
                        if len(keys) == CACHE_FILE_SIZE or time.monotonic() - started > 120:
                            break
                except BaseException as error:  # also Ctrl-C: what there is is kept
                    ended = error
                writer.write(record_batch(json.dumps(keys).encode(), schema))
            os.replace(unfinished, unfinished.with_suffix(".arrow"))
            if ended is not None:
                raise ended
        self.refresh()


def record_batch(value, schema):
    return pyarrow.record_batch([pyarrow.array([value], schema.types[0])], schema)


def read_batch(path, number):
    reader = open_file(path)
    return reader.get_batch(number % reader.num_record_batches).column(0)[0].as_py()


@functools.lru_cache(maxsize=4)
def read_file(path):
    return open_file(path).read_all().column(0).to_pylist()


@functools.lru_cache(maxsize=8)
def open_file(path):
    try:
        try:
            file = pyarrow.memory_map(path)
        except OSError:  # a file system without memory maps
            file = pyarrow.OSFile(path)
        return pyarrow.ipc.open_file(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is damaged, delete it: {error}") from None
