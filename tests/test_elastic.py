# SPDX-License-Identifier: Apache-2.0
"""The same run on one process or two, with one batch size or another, and the order of samples that makes it so."""

import itertools
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import ROOT, finish, scalars, shard, start, start_two, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_utils import BucketBatchSampler, derive_seed


SETTINGS = """--resolution 32 --max_sequence_length 16 --learning_rate 1e-3 --seed 3 --cond_dropout_rate 0.3
    --random_flip --use_ema --num_rollout_paths 2 --trajectory_length 2 --checkpointing_steps 2""".split()


@pytest.fixture
def arguments(pipeline, photos):
    return ["--pretrained_model_name_or_path", pipeline, "--train_data_dir", photos, *SETTINGS]


def run_one(script, folder, *arguments):
    log = f"{folder}.log"
    finish(start(script, [*arguments, "--output_dir", folder], log), log)
    return folder


def run_two(script, folder, *arguments):
    log = f"{folder}.log"
    for process in start_two(script, [*arguments, "--output_dir", folder], log):
        finish(process, log)
    return folder


def distance(one, other):
    """Norm of the difference of all weights, over their norm."""
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    difference = sum((one[name] - other[name]).square().sum() for name in one)
    return (difference / sum(tensor.square().sum() for tensor in one.values())).sqrt().item()


@pytest.mark.parametrize("script", ["train_sd3_sft", "train_sd3_soar", "train_sd3_soar_lora"])
def test_one_process_or_two(script, arguments, tmp_path):
    """Equal order, noise, sigmas, dropout; buckets of several shapes and, in the LoRA, its dropout included."""
    if script == "train_sd3_sft":
        arguments = arguments[:-7] + arguments[-2:]  # no SOAR flags
    extra = ["--use_aspect_ratio_buckets", "--train_batch_size", 2, "--max_train_steps", 4]
    extra += ["--lora_dropout", 0.2] if script == "train_sd3_soar_lora" else []
    one = run_one(script, tmp_path / "one", *arguments, *extra, "--gradient_accumulation_steps", 2)
    two = run_two(script, tmp_path / "two", *arguments, *extra)
    assert distance(one, two) < 1e-5
    expected = scalars(one)
    assert len(expected) == 4
    for step, loss in scalars(two).items():
        assert abs(loss - expected[step]) < 1e-5 * expected[step]
    other = run_one(script, tmp_path / "other", *arguments, *extra, "--gradient_accumulation_steps", 2, "--seed", 4)
    assert distance(one, other) > 1e-3  # what a different run looks like


def test_batch_size_does_not_matter_where_the_global_batch_is_the_same(arguments, tmp_path):
    arguments += ["--max_train_steps", 3]
    four = run_one("train_sd3_soar", tmp_path / "four", *arguments, "--train_batch_size", 4)
    one = run_one(
        "train_sd3_soar", tmp_path / "one", *arguments, "--train_batch_size", 1, "--gradient_accumulation_steps", 4
    )
    assert distance(four, one) < 1e-5


def test_resume_on_another_number_of_processes(arguments, tmp_path):
    arguments += ["--train_batch_size", 2, "--resume_from_checkpoint", "latest"]
    whole = run_one(
        "train_sd3_soar", tmp_path / "whole", *arguments, "--gradient_accumulation_steps", 2, "--max_train_steps", 4
    )
    folder = run_two("train_sd3_soar", tmp_path / "changed", *arguments, "--max_train_steps", 2)
    Path(f"{folder}.log").unlink()
    run_one("train_sd3_soar", folder, *arguments, "--gradient_accumulation_steps", 2, "--max_train_steps", 4)
    log = Path(f"{folder}.log").read_text()
    assert " 2/4 [" in log and " 1/4 [" not in log  # it went on, and did not begin again
    assert distance(whole, folder) < 1e-5


# The order of the samples

bucket_sizes = st.lists(st.integers(1, 23), min_size=1, max_size=4)


def sizes_of(counts):
    return [(16 * (bucket + 1), 16) for bucket, count in enumerate(counts) for _ in range(count)]


def first_batches(n, sizes, batch_size, seed, **place):
    return list(itertools.islice(BucketBatchSampler(sizes, batch_size, seed, **place), n))


@settings(max_examples=150, deadline=None)
@given(bucket_sizes, st.integers(1, 5), st.integers(0, 99), st.integers(1, 4))
def test_every_sample_equally_often(counts, batch_size, seed, epochs):
    """
    Epochs visit every sample equally often. What does not fill a batch is carried into the bucket's next pass, so that
    after any number of epochs a bucket has used that many passes less a part of one batch, and no sample was visited
    more than once more than another.
    """
    sizes = sizes_of(counts)
    full = [epochs * count // batch_size for count in counts]  # batches of each bucket in these epochs
    batches = first_batches(sum(full), sizes, batch_size, seed)
    for batch in batches:
        assert len(batch) == batch_size
        assert len({sizes[index] for index, _ in batch}) == 1
    visits = Counter(index for batch in batches for index, _ in batch)
    for bucket, count in enumerate(counts):
        of_bucket = [visits[i] for i, size in enumerate(sizes) if size == (16 * (bucket + 1), 16)]
        assert sum(of_bucket) == full[bucket] * batch_size
        whole_passes = full[bucket] * batch_size // count
        assert set(of_bucket) <= {whole_passes, whole_passes + 1}


@settings(max_examples=100, deadline=None)
@given(bucket_sizes, st.integers(1, 5), st.integers(0, 99), st.integers(1, 4), st.integers(0, 30))
def test_order_does_not_depend_on_processes_or_restarts(counts, batch_size, seed, processes, start_at):
    sizes = sizes_of(counts)
    whole = first_batches(start_at + 4 * processes, sizes, batch_size, seed)
    assert [position for batch in whole for _, position in batch] == list(range(len(whole) * batch_size))
    shares = [
        first_batches(4, sizes, batch_size, seed, start=start_at, process_index=rank, num_processes=processes)
        for rank in range(processes)
    ]
    assert [batch for together in zip(*shares, strict=True) for batch in together] == whole[start_at:]


@settings(max_examples=50, deadline=None)
@given(st.integers(4, 40), st.integers(0, 99))
def test_one_bucket_has_one_order_whatever_the_batch_size(count, seed):
    sizes = sizes_of([count])
    orders = [sum(first_batches(24 // size, sizes, size, seed), []) for size in (1, 2, 3, 4, 6)]
    assert all(order == orders[0] for order in orders)


@pytest.mark.parametrize("batch_size", [4, 7])  # one that passes end with, and one that spans them
def test_one_size_is_a_stream_of_permutations(batch_size):
    """Of another order in each pass, and with another seed."""
    sizes = sizes_of([20])
    order = [index for batch in first_batches(20, sizes, batch_size, 0) for index, _ in batch]
    passes = [tuple(order[start : start + 20]) for start in range(0, len(order) - 19, 20)]
    assert all(sorted(one) == list(range(20)) for one in passes)
    assert len({*passes, tuple(range(20))}) == len(passes) + 1
    assert first_batches(1, sizes, batch_size, 1) != first_batches(1, sizes, batch_size, 0)


def test_buckets_take_turns_in_another_order_each_epoch():
    """And with another seed; the buckets' own orders have nothing to do with each other."""
    sizes, orders = sizes_of([20, 20]), []
    for seed in (0, 1):
        batches = first_batches(160, sizes, 1, seed)
        turns = [index // 20 for ((index, _),) in batches]
        orders += [tuple(turns[start : start + 40]) for start in range(0, 160, 40)]
        together = [set(), set()]  # what is in one batch, of each bucket
        for batch in first_batches(10, sizes, 4, seed):
            together[batch[0][0] // 20].add(tuple(index % 20 for index, _ in batch))
        assert len(together[0]) == len(together[1]) == 5 and not together[0] & together[1]
    assert len({*orders}) == 8 and all(sum(order) == 20 for order in orders)


def test_seeds_differ_and_do_not_depend_on_the_process():
    assert derive_seed("noise", 0, 1) == derive_seed("noise", 0, 1)
    assert len({derive_seed("noise", seed, p) for seed in range(20) for p in range(200)}) == 4000
    assert torch.Generator().manual_seed(derive_seed("noise", 0, 1))


# Sharded weights


def run_sharded(script, folder, *arguments):
    log = f"{folder}.log"
    for process in start_two(script, [*arguments, "--output_dir", folder], log, shard):
        finish(process, log)
    return folder


SHARDED = """--train_batch_size 2 --max_train_steps 3 --max_grad_norm 0.1 --validation_prompt cat
    --num_inference_steps 2 --num_validation_images 3""".split()


@pytest.mark.parametrize("script", ["train_sd3_soar", "train_sd3_soar_lora"])
def test_sharded_weights_are_gathered(script, arguments, tmp_path):
    """Losses, gradient norms, average, result and samples of a sharded run are those of a whole one."""
    extra = [*SHARDED, "--mixed_precision", "no"]
    one = run_one(script, tmp_path / "one", *arguments, *extra, "--gradient_accumulation_steps", 2)
    two = run_sharded(script, tmp_path / "two", *arguments, *extra)
    assert distance(one, two) < 1e-5
    for name in ("loss", "grad_norm"):
        expected = scalars(one, name)
        assert len(expected) == 3
        for step, value in scalars(two, name).items():
            assert abs(value - expected[step]) < 1e-4 * expected[step]
    images = [np.asarray(Image.open(folder / "validation" / "step-3.png")).astype(int) for folder in (one, two)]
    assert abs(images[0] - images[1]).max() <= 1


def test_sharded_as_configured(arguments, tmp_path):
    """In bf16, as `fsdp2.yaml` has it: close to a whole run, with samples, and resumed from sharded states."""
    extra = [*arguments, *SHARDED]
    options = ["--gradient_accumulation_steps", 2, "--mixed_precision", "bf16"]
    one = run_one("train_sd3_soar", tmp_path / "one", *extra, *options)
    two = run_sharded("train_sd3_soar", tmp_path / "two", *extra)
    assert distance(one, two) < 2e-3
    assert scalars(two).keys() == {1, 2, 3}
    assert all(abs(value - scalars(one)[step]) < 1e-3 * value for step, value in scalars(two).items())
    assert (two / "validation" / "step-3.png").exists()
    shutil.copytree(two / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = run_sharded("train_sd3_soar", tmp_path / "resumed", *extra, "--resume_from_checkpoint", "latest")
    assert distance(two, resumed) == 0


def test_weights_that_cannot_be_sent(arguments, pipeline, tmp_path):
    """A broken file, which one process reads, ends both with one line."""
    broken, log = shutil.copytree(pipeline, tmp_path / "broken"), tmp_path / "log.txt"
    (file,) = (broken / "transformer").glob("*.safetensors")
    os.truncate(file, 5000)
    arguments = [*arguments, "--pretrained_model_name_or_path", broken, "--output_dir", tmp_path / "out"]
    for process in start_two("train_sd3_soar", arguments, log, shard):
        finish(process, log, code=1)
    assert f"error: --pretrained_model_name_or_path {broken} cannot be loaded" in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    ("version", "flags", "message"),
    [
        (1, [], "these scripts shard with FSDP2: set `fsdp_version: 2`"),
        (2, ["--bnb_quantization_config_path", ROOT / "examples/configs/nf4.json"], "leaves quantised weights whole"),
        (2, ["--use_8bit_adam"], "with FSDP2 the optimizer is AdamW"),
        (2, ["--optimizer", "prodigy"], "with FSDP2 the optimizer is AdamW"),
    ],
)
def test_what_cannot_be_sharded(version, flags, message, arguments, tmp_path):
    def setup():
        shard()
        os.environ["FSDP_VERSION"] = str(version)

    log = tmp_path / "log.txt"
    arguments = [*arguments, *flags, "--output_dir", tmp_path / "out"]
    for process in start_two("train_sd3_soar_lora", arguments, log, setup):
        finish(process, log, code=1)
    assert "error: " in log.read_text() and message in log.read_text()
