# SPDX-License-Identifier: Apache-2.0
"""What a data set of a million images leans on: tables made in parts, and caches that many runs write at once."""

import contextlib
import gc
import json
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

import data_utils
from data_utils import Cache, digest, file_key, is_inside, make_table, rows_of


def value_of(key):
    """Bytes that belong to a key and to no other, of a length of its own."""
    return key.encode() * (int(key, 16) % 50)


def keys_of(numbers):
    return [digest(number) for number in numbers]


def write(folder, numbers, pause=0.0):
    def entries():
        for key in keys_of(numbers):
            time.sleep(pause)
            yield key, value_of(key)

    Cache(folder).write(entries())


def check(cache, numbers):
    """The cache has these and no others, and each value is its key's."""
    keys = keys_of(numbers)
    assert {key.decode() for key in cache.keys.tolist() if key} == {*keys}
    assert all(cache[key] == value_of(key) for key in keys)
    assert [*cache.values([*cache.find(keys).tolist(), -1])] == [*map(value_of, keys), None]


# Tables


@pytest.mark.parametrize("collecting", [True, False])
def test_a_table_leaves_garbage_collection_as_it_was(collecting):
    """Also where a record cannot be read."""
    for records in ([{"a": 1}], ({"a": 1 // 0} for _ in "a")):
        (gc.enable if collecting else gc.disable)()
        with contextlib.suppress(ZeroDivisionError):
            make_table(records)
        after = gc.isenabled()
        gc.enable()
        assert after == collecting


@pytest.mark.parametrize("number", [0, 1, 9999, 10_000, 25_001])
def test_a_table_made_in_parts_is_the_table(number):
    """Also where a part, or all, is empty; and its rows are read in order."""
    records = [{"row": i, "captions": ["a"] * (i % 3), "size": (i, 16)} for i in range(number)]
    table = make_table(iter(records))
    assert table.to_list() == Dataset.from_list(records).to_list()
    assert len(table) == number
    if number:
        rows = [(i, ["a"] * (i % 3)) for i in range(number)]
        assert list(rows_of(table, "row", "captions")) == rows


# Names


def test_digests_tell_contents_apart():
    """Texts from numbers, lists from their parts, and nothing by the way it is joined."""
    contents = [
        (),
        ("a",),
        ("a", ""),
        ("a", "b"),
        ("ab",),
        (["a", "b"],),
        (1,),
        ("1",),
        (1.0,),
        (True,),
        (None,),
        ("é",),
    ]
    assert len({digest(*content) for content in contents}) == len(contents)
    assert all(len(digest(*content)) == 32 for content in contents)


def test_file_key_sees_what_an_archive_puts_back(tmp_path):
    """The same length and modification time, another content; the same content in another file; none."""
    file, other = tmp_path / "a.png", tmp_path / "b.png"
    file.write_bytes(b"one")
    before, times = file_key(file), os.stat(file)
    assert before == file_key(str(file)) != file_key(other) == file_key(None) == file_key("a\0b") == ""
    time.sleep(0.02)  # a kernel's clock may stand still for some milliseconds
    file.write_bytes(b"two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert os.stat(file).st_mtime_ns == times.st_mtime_ns and file_key(file) != before
    before = file_key(file)
    other.write_bytes(b"two")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(other, file)
    assert file_key(file) != before


# Caches


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 20), max_size=9), max_size=5), st.integers(1, 4), st.lists(st.integers(0, 30)))
def test_a_cache_is_a_dictionary(tmp_path_factory, writes, file_size, asked):
    """Whatever is written in whatever parts, and asked for one by one or together."""
    folder, wanted = tmp_path_factory.mktemp("cache"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_utils, "CACHE_FILE_SIZE", file_size)
        for turn, numbers in enumerate(writes):
            entries = {digest(number): f"{turn} {number}".encode() for number in numbers}
            Cache(folder).write(entries.items())
            wanted |= entries
        cache, keys = Cache(folder), keys_of(asked)
        assert len(cache.files) == sum(-(-len({*numbers}) // file_size) for numbers in writes)
        assert [place >= 0 for place in cache.find(keys)] == [key in wanted for key in keys]
        for key in keys:
            if key in wanted:
                assert cache[key] == wanted[key]  # of two, the newer
            else:
                with pytest.raises(KeyError, match=key):
                    cache[key]


def test_a_slow_writer_leaves_files_on_its_way(tmp_path, monkeypatch):
    """After two minutes a file ends, however few values it has."""
    clock = iter(range(0, 10_000, 50))
    monkeypatch.setattr(data_utils.time, "monotonic", lambda: next(clock))
    write(tmp_path, range(10))
    cache = Cache(tmp_path)
    assert len(cache.files) == 4  # of three values: started, 50, 100 and 150 seconds later
    check(cache, range(10))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_was_written_before_an_error_is_kept(error, tmp_path):
    def entries():
        for key in keys_of(range(5)):
            yield key, value_of(key)
        raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        Cache(tmp_path).write(entries())
    check(Cache(tmp_path), range(5))
    assert [path.suffix for path in tmp_path.iterdir()] == [".arrow"]


def test_a_full_disk_leaves_no_file_that_counts(tmp_path, monkeypatch):
    write(tmp_path, range(3))
    record_batch, written = data_utils.record_batch, []

    def full(value, schema):
        written.append(value)
        if len(written) > 2:
            raise OSError(28, "No space left on device")
        return record_batch(value, schema)

    monkeypatch.setattr(data_utils, "record_batch", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, range(10, 20))
    check(Cache(tmp_path), range(3))


def test_many_writers_killed_at_any_moment(tmp_path, monkeypatch):
    """What is there is whole; what was being written can be told from it, and goes when it is old."""
    monkeypatch.setattr(data_utils, "CACHE_FILE_SIZE", 7)
    context, rng, killed = multiprocessing.get_context("fork"), random.Random(0), 0
    for turn in range(6):
        numbers = [range(1000 * turn + 100 * i, 1000 * turn + 100 * i + 60) for i in range(3)]
        writers = [context.Process(target=write, args=(tmp_path, part, 0.001)) for part in numbers]
        for writer in writers:
            writer.start()
        time.sleep(rng.uniform(0.02, 0.15))
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
            killed += writer.exitcode == -signal.SIGKILL
        data_utils.open_file.cache_clear()
        cache = Cache(tmp_path)
        for key in cache.keys.tolist():
            assert not key or cache[key.decode()] == value_of(key.decode())
        assert {len(json.loads(data_utils.read_batch(path, -1))) for path in cache.files} <= {7, 60 % 7}
    leftovers = list(tmp_path.glob("*.unfinished"))
    assert killed > 6 and leftovers and len(cache.keys) > 7
    os.utime(leftovers[0], (0, 0))
    write(tmp_path, [5000])
    assert {*tmp_path.glob("*.unfinished")} == {*leftovers[1:]}


def test_a_damaged_file_is_named(tmp_path):
    write(tmp_path, range(3))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-20])
    data_utils.open_file.cache_clear()
    with pytest.raises(ValueError, match=rf"{file} is damaged, delete it"):
        Cache(tmp_path)


def test_a_file_system_without_memory_maps(tmp_path, monkeypatch):
    """As mergerfs may be: what was written is read all the same, and a damaged file named."""

    def fail(path):
        raise OSError("Memory mapping file failed: No such device")

    monkeypatch.setattr(data_utils.pyarrow, "memory_map", fail)
    write(tmp_path, range(20))
    check(Cache(tmp_path), range(20))
    test_a_damaged_file_is_named(tmp_path / "other")


def test_values_are_found_by_other_processes(tmp_path):
    """As a data loader's workers are made, forked or started anew."""
    write(tmp_path, range(20))
    cache, keys = Cache(tmp_path), keys_of(range(20))
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(cache.__getitem__, keys) == [*map(value_of, keys)]


def test_the_index_is_small(tmp_path):
    """Two arrays: 40 bytes a value."""
    numbers = range(3000)
    write(tmp_path, numbers)
    cache = Cache(tmp_path)
    assert cache.keys.nbytes + cache.places.nbytes == 40 * 3001
    assert np.array_equal(np.sort(cache.find(keys_of(numbers))), np.arange(3000))


def test_what_is_inside(tmp_path, monkeypatch):
    """By whatever path either is named, and however folders are linked; the working folder may change."""
    for folder in ("one/images", "two/images"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "one" / "link").symlink_to(tmp_path / "two")
    (tmp_path / "one" / "images" / "out.png").symlink_to(tmp_path / "two" / "a.png")
    (tmp_path / "alias").symlink_to(tmp_path / "one")
    for base in ("one", "two"):
        monkeypatch.chdir(tmp_path / base)
        for root in ("images", "./images", "../two/../" + base + "/images", tmp_path / base / "images"):
            assert is_inside("images/a.png", root) and is_inside(tmp_path / base / "images" / "a.png", root)
            assert not is_inside("a.png", root) and not is_inside("images/../a.png", root)
        assert not is_inside(tmp_path / ("two" if base == "one" else "one") / "images" / "a.png", "images")
    monkeypatch.chdir(tmp_path)
    assert not is_inside("one/images too/a.png", "one/images")
    assert is_inside("alias/images/a.png", "one") and is_inside("one/a.png", "alias")
    assert not is_inside("one/link/a.png", "one") and is_inside("one/images/out.png", "one")  # it has that link
    assert not is_inside("one/images/..", "one/images") and not is_inside("one/\0", "one") and is_inside("a", "/")
