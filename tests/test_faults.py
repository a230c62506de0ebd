# SPDX-License-Identifier: Apache-2.0
"""What a run does when it is told to stop, runs out of disk, meets bad numbers, or loses a process."""

import errno
import fcntl
import importlib
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
import traceback
import zlib
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from diffusers import SD3Transformer2DModel
from harness import PHOTOS, ROOT, SCRIPTS, cached, equal, finish, start, start_two, weights
from PIL import Image
from safetensors.torch import load_file, save
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_sd3_soar
from data_utils import Cache


@pytest.fixture
def arguments(pipeline, photos, tmp_path):
    return [
        *("--pretrained_model_name_or_path", pipeline, "--train_data_dir", photos, "--output_dir", tmp_path / "out"),
        *"--resolution 32 --max_sequence_length 16 --train_batch_size 2 --seed 0 --report_to none".split(),
        *"--resume_from_checkpoint latest --learning_rate 1e-3".split(),
    ]


def wait_for(condition, process, seconds=60):
    """Wait until a file or a text is there, while the run is alive."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)


# Signals


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_run_after_a_checkpoint(script, number, arguments, run, tmp_path):
    """Exit code 75, and the run that is started again ends with the bits of one that was left alone."""
    if script != "train_sd3_soar" and number != signal.SIGTERM:
        pytest.skip("one signal is enough for the scripts whose main is the same")
    log, out = tmp_path / "log", tmp_path / "out"
    arguments += ["--max_train_steps", 12, "--checkpointing_steps", 1000]
    process = start(script, arguments, log)
    wait_for(lambda: " 3/12 [" in log.read_text() if log.exists() else False, process)
    asked = time.monotonic()
    os.kill(process.pid, number)
    finish(process, log, code=75)
    assert time.monotonic() - asked < 10
    (checkpoint,) = out.glob("checkpoint-*")
    assert 3 <= int(checkpoint.name.removeprefix("checkpoint-")) < 12
    finish(start(script, arguments, log), log)
    whole = run(script, *arguments[:4], *arguments[6:], "--output_dir", tmp_path / "whole")
    assert equal(whole, out)


def test_a_second_signal_ends_the_run_at_once(arguments, tmp_path):
    log = tmp_path / "log"

    def endless(*_, **__):
        print("in the step", flush=True)
        time.sleep(600)

    def setup():
        train_sd3_soar.training_losses = endless

    process = start("train_sd3_soar", arguments, log, setup=setup)
    wait_for(lambda: "in the step" in log.read_text() if log.exists() else False, process)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.5)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    finish(process, log, code=-signal.SIGTERM)


def test_a_signal_during_validation_does_not_wait_for_its_end(arguments, tmp_path):
    log = tmp_path / "log"
    arguments += ["--max_train_steps", 3, "--validation_steps", 1, "--validation_prompt", "cat"]
    arguments += ["--num_inference_steps", 100_000, "--num_validation_images", 1]
    process = start("train_sd3_soar", arguments, log)
    wait_for(lambda: "Validation" in log.read_text() if log.exists() else False, process)
    time.sleep(1)
    os.kill(process.pid, signal.SIGTERM)
    finish(process, log, code=75)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not list((tmp_path / "out" / "validation").glob("*"))


def test_a_signal_to_one_process_stops_both(arguments, tmp_path):
    log, arguments = tmp_path / "log", [*arguments, "--max_train_steps", 1000]
    processes = start_two("train_sd3_soar", arguments, log)
    wait_for(lambda: " 2/1000 [" in log.read_text() if log.exists() else False, processes[0])
    os.kill(processes[1].pid, signal.SIGUSR1)
    for process in processes:
        finish(process, log, code=75)
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) == 1


# Disks


def test_a_full_disk_leaves_the_older_checkpoint_whole(arguments, run, tmp_path):
    """No file may grow over 100 kB after the first checkpoint: the second one fails in the middle of its writing."""
    log, out = tmp_path / "log", tmp_path / "out"
    arguments += ["--max_train_steps", 4, "--checkpointing_steps", 2, "--checkpoints_total_limit", 1]

    def setup():
        save, signal_ = train_sd3_soar.save_checkpoint, signal.signal

        def limited(accelerator, ema, trainer_state, *rest):
            if trainer_state["step"] == 4:
                signal_(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            save(accelerator, ema, trainer_state, *rest)

        train_sd3_soar.save_checkpoint = limited

    finish(start("train_sd3_soar", arguments, log, setup=setup), log, code=1)
    text = log.read_text()
    assert "checkpoint-4 could not be written" in text and f"Last checkpoint: {out / 'checkpoint-2'}" in text
    assert "GiB are free" in text and "Traceback" not in text
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    finish(start("train_sd3_soar", arguments, log), log)
    assert equal(run("train_sd3_soar", *arguments[:4], *arguments[6:], "--output_dir", tmp_path / "whole"), out)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_full_disk_at_the_end(script, arguments, run, monkeypatch, tmp_path):
    """One line with what is needed and free; nothing half is left, and `latest` finishes without training."""
    module, out = importlib.import_module(script), tmp_path / "out"
    write = module.save_file

    def full(state, path, *metadata):
        if ".unfinished" in str(path) and "checkpoint" not in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(state, path, *metadata)

    more = ("--max_train_steps", 2, "--checkpointing_steps", 2)
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", full)
        with pytest.raises(SystemExit) as caught:
            run(script, *arguments, *more)
    message = str(caught.value)
    assert re.match(
        r"error: The result, of 0.0 GiB, could not be written .*No space left.*; [\d.]+ GiB are free", message
    )
    assert message.endswith(f"Last checkpoint: {out / 'checkpoint-2'}") and not list(out.glob("result*"))
    monkeypatch.setattr(module, "training_losses", lambda *_: pytest.fail("it trained"))
    assert equal(run(script, *arguments, *more), out) and (out / "README.md").exists()


def no_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory")


def no_disk(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("name", "what", "failing"),
    [
        ("AutoencoderKL.decode", "Sampling", no_memory),
        ("make_image_grid", "Saving the validation images", no_disk),
        ("Accelerator.log", "Logging", no_disk),
        ("Accelerator.end_training", "Logging", no_disk),
        ("huggingface_hub.ModelCard", "The model card, or its upload with the result,", no_disk),
    ],
)
def test_what_the_result_does_not_depend_on(name, what, failing, arguments, run, monkeypatch, tmp_path, caplog):
    """Samples, pictures, trackers and cards that fail are a warning: the run goes on, with the same weights."""
    more = ("--validation_prompt", "a cat", "--validation_steps", 1, "--max_train_steps", 2)
    holder, _, last = f"train_sd3_sft.{name}".rpartition(".")
    module, _, attribute = holder.partition(".")
    holder = importlib.import_module(module)
    holder = getattr(holder, attribute) if attribute else holder
    with monkeypatch.context() as patch:
        patch.setattr(holder, last, failing)
        out = run("train_sd3_sft", *arguments, *more)
    (message,) = {r.getMessage().removeprefix("[RANK 0] ") for r in caplog.records if "failed" in r.getMessage()}
    assert message.startswith(f"{what} failed: ") and ("memory" in message or "No space left" in message)
    assert (out / "training_args.json").exists()
    whole = run("train_sd3_sft", *arguments[:4], *arguments[6:], "--output_dir", tmp_path / "whole")
    assert equal(whole, out)


def test_a_tracker_that_cannot_start(arguments, run, monkeypatch):
    """Such as one without a login: one line, before an image is read."""

    def refuse(*_, **__):
        raise ValueError("no API key configured")

    monkeypatch.setattr(Accelerator, "init_trackers", refuse)
    monkeypatch.setattr(train_sd3_soar, "load_images", lambda *_: pytest.fail("images were read"))
    arguments = [*arguments, "--report_to", "tensorboard"]
    with pytest.raises(SystemExit, match="^error: --report_to tensorboard: no API key configured$"):
        run("train_sd3_soar", *arguments)


def test_the_end_of_a_session():
    """SIGHUP stops a run as SIGTERM does, but under `nohup`."""
    assert signal.SIGHUP in train_sd3_soar.STOP_SIGNALS
    code = "import signal, train_sd3_soar; print(signal.SIGHUP in train_sd3_soar.STOP_SIGNALS)"
    done = subprocess.run(["nohup", sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["False"]


def test_what_is_no_checkpoint_of_ours_is_neither_read_nor_removed(run, tmp_path):
    """As diffusers' own script or transformers leave them: the run ends with the folder's name."""
    arguments = ("train_sd3_soar", "--checkpointing_steps", 1, "--checkpoints_total_limit", 1)
    latest = ("--resume_from_checkpoint", "latest")
    out = tmp_path / "out"
    states = [None, "{}", "[]", '{"global_step": 500, "log_history": []}', "{"]
    for state in states:
        shutil.rmtree(out, ignore_errors=True)
        run(*arguments, "--max_train_steps", 1)
        other = out / "checkpoint-500"
        (other / "unet").mkdir(parents=True)
        if state is not None:
            (other / "trainer_state.json").write_text(state)
        with pytest.raises(
            SystemExit, match=f"{other} is no whole checkpoint.*Last checkpoint: {out / 'checkpoint-1'}"
        ):
            run(*arguments, *latest, "--max_train_steps", 2)
        assert (other / "unet").exists()
        with pytest.raises(SystemExit, match=f"{other} is no whole checkpoint"):
            run(*arguments, "--resume_from_checkpoint", other, "--output_dir", tmp_path / "new")
    shutil.rmtree(other)
    (out / "checkpoint-1").rename(out / "checkpoint-1.unfinished")  # as a kill leaves it
    run(*arguments, *latest, "--max_train_steps", 2)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]


def test_latest_is_what_was_written_last(run, tmp_path, logged):
    """Not a higher step of a branch that was left; nor does pruning keep that one."""
    arguments = ("train_sd3_soar", "--checkpointing_steps", 2)
    out = run(*arguments, "--max_train_steps", 6)
    slower = ("--learning_rate", 5e-4, "--allow_resume_changes", "learning_rate", "--max_train_steps", 4)
    run(*arguments, *slower, "--resume_from_checkpoint", "checkpoint-2")
    logged.clear()
    latest = ("--resume_from_checkpoint", "latest", "--max_train_steps", 5, "--learning_rate", 5e-4)
    run(*arguments, *latest)
    assert [values["step"] for values in logged] == [5]
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    run(*arguments, *slower[:-1], 4, "--resume_from_checkpoint", "checkpoint-2", "--checkpoints_total_limit", 1)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_damaged_checkpoint_names_the_one_before(run):
    arguments = ("train_sd3_sft", "--checkpointing_steps", 1)
    out = run(*arguments, "--max_train_steps", 2)
    file = out / "checkpoint-2" / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SystemExit, match=f"checkpoint-2 is damaged .*{out / 'checkpoint-1'}"):
        run(*arguments, "--max_train_steps", 3, "--resume_from_checkpoint", "latest")


def test_a_tracker_forgets_what_came_after_the_checkpoint(run, tmp_path):
    """A run that is killed after step 4 and goes on from step 2 shows each step once."""
    arguments = ("train_sd3_sft", "--checkpointing_steps", 2, "--report_to", "tensorboard")
    out = run(*arguments, "--max_train_steps", 4)
    shutil.rmtree(out / "checkpoint-4")
    run(*arguments, "--max_train_steps", 5, "--resume_from_checkpoint", "latest")
    (folder,) = (out / "logs").iterdir()
    assert [event.step for event in EventAccumulator(str(folder)).Reload().Scalars("loss")] == [1, 2, 3, 4, 5]


def test_nothing_is_written_in_a_checkpoint(run, tmp_path):
    """It is renamed when it is whole: no kill can leave a part of one under its name, however it was timed."""
    opened, watching = [], True

    def watch(event, inputs):  # Python can take no such hook away again
        if watching and event == "open" and re.search(r"checkpoint-\d+/", str(inputs[0])):
            opened.append((str(inputs[0]), inputs[2]))

    sys.addaudithook(watch)
    flags = ("--checkpointing_steps", 1, "--use_ema", "--resume_from_checkpoint", "latest")
    run("train_sd3_sft", *flags, "--max_train_steps", 1)
    run("train_sd3_sft", *flags, "--max_train_steps", 2)
    watching = False
    writes = [path for path, mode in opened if mode & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)]
    assert opened and not writes and (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").exists()


def test_latest_starts_from_the_beginning_where_there_is_none(run, caplog):
    with caplog.at_level("INFO"):
        run("train_sd3_soar", "--resume_from_checkpoint", "latest", "--max_train_steps", 1)
    assert "starting from the beginning" in caplog.text


# File systems that lack something


def test_folders_that_cannot_be_synced(run, monkeypatch, caplog, tmp_path):
    """As on CIFS, sshfs and VirtualBox: said once, and the checkpoints are whole. A file has to be."""
    sync, refused = os.fsync, [stat.S_ISDIR]

    def fsync(descriptor):
        if refused[0](os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    arguments = ("train_sd3_soar", "--checkpointing_steps", 1, "--max_train_steps", 3)
    out = run(*arguments)
    assert caplog.text.count("does not sync folders") == 1 and (out / "checkpoint-3" / "trainer_state.json").exists()
    refused[0] = stat.S_ISREG
    with pytest.raises(SystemExit, match="checkpoint-1 could not be written"):
        run(*arguments, "--output_dir", tmp_path / "files")


def test_a_file_system_that_does_not_know_its_room(run, monkeypatch, tmp_path):
    """As in front of object stores, where all figures are 0."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))
    run("train_sd3_soar", "--checkpointing_steps", 1, "--cache_latents", "--cache_prompt_embeds")


def test_folders_that_cannot_be_renamed(run, monkeypatch, tmp_path):
    """As on gcsfuse: checkpoints need it, so the run ends before an image is read."""
    replace = os.replace

    def refuse(source, target):
        if os.path.isdir(source):
            raise OSError(errno.EMFILE, "Too many open files")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(train_sd3_soar, "load_images", lambda *_: pytest.fail("images were read"))
    with pytest.raises(SystemExit, match="--output_dir .* cannot rename a folder.*Too many open files"):
        run("train_sd3_soar")
    assert not [path for path in (tmp_path / "out").iterdir() if path.name != "cache"]


def test_an_old_checkpoint_that_cannot_be_removed(run, monkeypatch, caplog):
    """As on NFS while a file of it is open: it is no checkpoint any more, and the run goes on."""
    remove = shutil.rmtree

    def refuse(path, **options):
        if "checkpoint" in str(path) and not options:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    out = run("train_sd3_soar", "--checkpointing_steps", 1, "--max_train_steps", 3, "--checkpoints_total_limit", 1)
    assert "Directory not empty" in caplog.text and (out / "transformer").exists()
    monkeypatch.undo()
    assert [*train_sd3_soar.checkpoints(out)] == [out / "checkpoint-3"]


# What a checkpoint is compared on

CHANGES = [  # that each flag is compared, `test_flags.py` shows
    (["--seed", 1], "checkpoint-1 is of another run: seed was 0 there and is 1 now"),
    (["--lambda_aux", 0.5], "lambda_aux was 1.0 there and is 0.5 now"),
    (["--gradient_accumulation_steps", 2], "global_batch_size was 2 there and is 4 now"),
    (["--max_train_samples", 6], "data was"),
]


@pytest.fixture(scope="module")
def begun(pipeline, photos, tmp_path_factory):
    """A folder with `checkpoint-1` of a run."""
    out = tmp_path_factory.mktemp("begun") / "out"
    log = out.parent / "log"
    arguments = ["--pretrained_model_name_or_path", pipeline, "--train_data_dir", photos, "--output_dir", out]
    arguments += "--resolution 32 --max_sequence_length 16 --train_batch_size 2 --seed 0 --report_to none".split()
    arguments += "--learning_rate 1e-3 --max_train_steps 1 --checkpointing_steps 1".split()
    finish(start("train_sd3_soar", arguments, log), log)
    return out


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_change_of_the_result_is_refused(change, message, begun, run):
    def files():
        return {path: path.stat().st_mtime_ns for path in begun.rglob("*") if path.is_file() and path.name != ".lock"}

    before = files()
    with pytest.raises(SystemExit, match=message):
        run("train_sd3_soar", "--output_dir", begun, "--resume_from_checkpoint", "latest", *change)
    assert files() == before


def test_a_checkpoint_of_another_script_is_refused(begun, run):
    with pytest.raises(SystemExit, match="checkpoint-1: written by train_sd3_soar.py, not by train_sd3_soar_lora.py"):
        run("train_sd3_soar_lora", "--output_dir", begun, "--resume_from_checkpoint", "latest")


def test_the_end_of_a_schedule_may_not_move(run, tmp_path):
    arguments = ("train_sd3_soar", "--lr_scheduler", "linear", "--checkpointing_steps", 1)
    out = run(*arguments, "--max_train_steps", 1)
    with pytest.raises(SystemExit, match="max_train_steps was 1 there and is 3 now"):
        run(*arguments, "--max_train_steps", 3, "--output_dir", out, "--resume_from_checkpoint", "latest")


def test_changes_that_are_meant(begun, run, logged, tmp_path, caplog):
    """What --allow_resume_changes names acts, and is told by the log, by later checkpoints and by the model card."""
    out = Path(shutil.copytree(begun, tmp_path / "out"))
    again = ("train_sd3_soar", "--output_dir", out, "--resume_from_checkpoint", "latest", "--checkpointing_steps", 2)
    slower = ("--max_train_steps", 2, "--learning_rate", 5e-4)
    changed = "learning_rate was 0.001 there and is 0.0005 now"
    with pytest.raises(SystemExit, match=f"{changed}. What is meant to differ can be named in --allow_resume_changes"):
        run(*again, *slower)
    run(*again, *slower, "--allow_resume_changes", "learning_rate")
    assert f"Resuming with changes that change the result: {changed}" in caplog.text
    linear = ("--max_train_steps", 5, "--learning_rate", 5e-4, "--lr_scheduler", "linear")
    run(*again, *linear, "--allow_resume_changes", "lr_scheduler, max_train_steps")
    assert [values["lr"] for values in logged] == pytest.approx([5e-4, 3e-4, 2e-4, 1e-4])
    card = (out / "README.md").read_text()
    for text in (
        f"From step 1 on: {changed}.",
        "From step 2 on: lr_scheduler was constant there and is linear now.",
        "From step 2 on: max_train_steps was 2 there and is 5 now.",
    ):
        assert f"\n\n{text}\n\n" in card


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("train_sd3_sft", []),
        ("train_sd3_sft", ["--use_ema"]),
        ("train_sd3_sft", ["--optimizer", "prodigy"]),
        ("train_sd3_soar_lora", ["--use_dora", "--lora_layers", "attn.to_q,pos_embed.proj"]),
    ],
)
def test_room_for_the_checkpoints(script, flags, run, monkeypatch, caplog, tmp_path):
    """
    The estimate is their size, but for files' headers and SD3's table of positions, a thirtieth; a disk with less is
    refused before anything loads.
    """
    arguments = [script, *flags, "--checkpointing_steps", 1, "--max_train_steps", 3, "--checkpoints_total_limit", 1]
    with caplog.at_level("INFO"):
        out = run(*arguments)
    assert re.search(r"2 checkpoints of .* GiB and the result, .* GiB, in .* GiB are free", caplog.text)
    tensors = [item for file in (out / "checkpoint-3").rglob("*.safetensors") for item in load_file(file).items()]
    size = sum(tensor.numel() * tensor.itemsize for name, tensor in tensors if name != "pos_embed.pos_embed")
    state = torch.load(out / "checkpoint-3" / "optimizer.bin", weights_only=True)["state"]
    size += sum(t.numel() * t.itemsize for s in state.values() for t in s.values() if torch.is_tensor(t) and t.ndim)
    result = sum(tensor.numel() for name, tensor in weights(out).items() if name != "pos_embed.pos_embed")
    needed = 2 * size + 4 * result
    usage = shutil.disk_usage(tmp_path)
    arguments += ["--output_dir", tmp_path / "again"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(SystemExit, match="^error: no room for 2 checkpoints of .*See --checkpoints_total_limit"):
        run(*arguments)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    run(*arguments)


@pytest.mark.parametrize("name", ["constant", "linear"])
def test_schedule_of_an_optimizer_without_its_first_rate(name):
    """Accelerate's FSDP2 loads an optimizer whose groups have lost `initial_lr`; the schedule goes on all the same."""
    names = "lr_step_rules lr_num_cycles lr_power".split()
    args = SimpleNamespace(lr_scheduler=name, lr_warmup_steps=0, max_train_steps=10, learning_rate=0.1)
    vars(args).update(dict.fromkeys(names, 1))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.07)
    scheduler = train_sd3_soar.make_lr_scheduler(args, optimizer, 5)
    assert scheduler.get_last_lr() == pytest.approx([0.1 if name == "constant" else 0.05])


# Numbers


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_loss_that_is_not_finite(what, script, run, monkeypatch, tmp_path):
    """
    The run ends with the step, the files of the batch and the last checkpoint, which stays as it was: the run goes on
    from there as if nothing had been.
    """
    arguments = ("--checkpointing_steps", 2, "--max_train_steps", 4)
    whole = run(script, *arguments, "--output_dir", tmp_path / "whole")
    module = importlib.import_module(script)
    forward, prepare_batch, batches = SD3Transformer2DModel.forward, module.prepare_batch, []

    def counted(batch, *rest):
        batches.append(batch["name"])
        return prepare_batch(batch, *rest)

    def diverging(self, *inputs, **more):
        (output,) = forward(self, *inputs, **more)
        if len(batches) == 3 and what == "loss":
            output = output * math.nan
        if len(batches) == 3 and what == "gradient" and output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.inf)
        return (output,)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(module, "prepare_batch", counted)
        patch.setattr(SD3Transformer2DModel, "forward", diverging)
        run(script, *arguments)
    message, out = exit.value.code, tmp_path / "out"
    assert "step 3" in message and "not finite" in message and str(out / "checkpoint-2") in message
    assert all(name in message for name in batches[2]) and len(batches[2]) == 2
    assert {path.name.split(".")[0] for path in map(Path, batches[2])} <= PHOTOS.keys()
    assert equal(out / "checkpoint-2", whole / "checkpoint-2")
    assert {path.name for path in out.iterdir()} == {".lock", "cache", "checkpoint-2"}
    assert equal(run(script, *arguments, "--resume_from_checkpoint", "latest"), whole)


def test_cached_latent_that_is_not_finite(run, tmp_path, photos):
    """The image is among the named ones."""
    out = run("train_sd3_sft", "--cache_latents", "--center_crop")
    cache = Cache(out / "cache" / "latents")
    cache.write([(key, save({"moments": t["moments"] * math.nan})) for key, t in cached(cache.folder).items()])
    with pytest.raises(SystemExit, match=r"step 1: .*not finite.*Last checkpoint: none") as exit:
        run("train_sd3_sft", "--cache_latents", "--center_crop", "--overwrite_output_dir")
    assert sum(str(photos / f"{name}.png") in exit.value.code for name in PHOTOS) == 2


@pytest.mark.filterwarnings("error:Detected call of")  # PyTorch's, where a schedule moves before the weights did
def test_steps_that_are_not_finite_may_be_skipped(run, monkeypatch, tmp_path, caplog):
    """
    Up to --max_skipped_steps of them in a row: they change nothing and are logged, one more ends the run. The schedule
    goes on by a step each.
    """
    logged = []
    monkeypatch.setattr(Accelerator, "log", lambda self, logs, step: logged.append(logs))
    arguments = ("train_sd3_soar", "--checkpointing_steps", 1, "--adam_weight_decay", 0)
    arguments += ("--lr_scheduler", "linear", "--learning_rate", 1e-3)

    def run_with(bad, steps, allowed, folder):
        """Make the loss of the optimizer steps `bad` not a number."""
        original, count = train_sd3_soar.training_losses, itertools.count(1)

        def poisoned(*inputs):
            factor = math.nan if next(count) in bad else 1
            for loss, shares in original(*inputs):
                yield loss * factor, shares

        with monkeypatch.context() as patch:
            patch.setattr(train_sd3_soar, "training_losses", poisoned)
            flags = ("--max_train_steps", steps, "--max_skipped_steps", allowed, "--output_dir", tmp_path / folder)
            return run(*arguments, *flags)

    out = run_with({1, 2, 4}, 4, 2, "two")
    assert caplog.text.count("Skipped step") == 3
    assert [logs["skipped_steps"] for logs in logged] == [1, 2, 0, 1]
    assert [logs["lr"] for logs in logged] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    assert equal(out / "checkpoint-3", out / "checkpoint-4") and not equal(out / "checkpoint-2", out / "checkpoint-3")
    with pytest.raises(SystemExit, match="step 3: not finite"):
        run_with({1, 2, 3}, 4, 2, "three")
    with pytest.raises(SystemExit, match="step 1: not finite"):
        run_with({1}, 4, 0, "none")


def test_skipped_steps_of_fp16(run, monkeypatch, caplog):
    """With the scaler, which runs on a CPU where a run with fp16 does not: the step after the skipped one is taken."""
    make, losses, count = train_sd3_soar.make_accelerator, train_sd3_soar.training_losses, itertools.count(1)

    def scaled(args):
        accelerator = make(args)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        accelerator.native_amp = True
        accelerator.state._mixed_precision = "fp16"
        return accelerator

    def poisoned(*inputs):
        factor = math.nan if next(count) == 2 else 1
        for loss, shares in losses(*inputs):
            yield loss * factor, shares

    monkeypatch.setattr(train_sd3_soar, "make_accelerator", scaled)
    monkeypatch.setattr(train_sd3_soar, "training_losses", poisoned)
    arguments = ("--max_skipped_steps", 1, "--max_train_steps", 4, "--checkpointing_steps", 1)
    out = run("train_sd3_soar", *arguments, "--adam_weight_decay", 0)
    assert caplog.text.count("Skipped step") == 1
    assert equal(out / "checkpoint-1", out / "checkpoint-2") and not equal(out / "checkpoint-2", out / "checkpoint-3")


# Data that fails in the middle of a run


def gone(photos):
    """Take an image away."""
    (photos / "rocket.png").rename(photos / "rocket.gone")


def killed(process):
    """Kill a worker, as the kernel does where memory is short."""
    for child in children(process.pid):
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("fault", ["image", "worker"])
def test_data_that_fails_costs_no_step(fault, workers, arguments, run, photos, tmp_path):
    """One line, no process left, and a checkpoint of the last whole step, from which the run goes on."""
    if fault == "worker" and not workers:
        pytest.skip("there is none")
    folder, log, out = shutil.copytree(photos, tmp_path / "photos"), tmp_path / "log", tmp_path / "out"
    arguments[arguments.index(photos)] = folder
    more = ["--dataloader_num_workers", workers, "--checkpointing_steps", 1000]
    process = start("train_sd3_soar", [*arguments, *more, "--max_train_steps", 1000], log)
    wait_for(lambda: " 2/1000 [" in log.read_text() if log.exists() else False, process)
    gone(folder) if fault == "image" else killed(process)
    began = time.monotonic()
    finish(process, log, code=1)
    text = log.read_text()
    last = text.strip().splitlines()[-1]
    assert time.monotonic() - began < 100 and "Traceback" not in text, text[-3000:]
    assert ("rocket.png" if fault == "image" else "DataLoader worker") in last
    (checkpoint,) = out.glob("checkpoint-*")
    assert str(checkpoint) in last
    if fault == "image":
        (folder / "rocket.gone").rename(folder / "rocket.png")
    steps = int(checkpoint.name.removeprefix("checkpoint-")) + 1
    finish(start("train_sd3_soar", [*arguments, *more, "--max_train_steps", steps], log), log)
    whole = ("--output_dir", tmp_path / "whole", "--max_train_steps", steps)
    assert equal(run("train_sd3_soar", *arguments[:4], *arguments[6:], *whole), out)


def test_data_that_fails_on_one_of_two_processes(arguments, photos, tmp_path):
    folder, log = shutil.copytree(photos, tmp_path / "photos"), tmp_path / "log"
    arguments[arguments.index(photos)] = folder
    processes = start_two("train_sd3_soar", [*arguments, "--max_train_steps", 1000], log)
    wait_for(lambda: " 2/1000 [" in log.read_text() if log.exists() else False, processes[0])
    gone(folder)
    for process in processes:
        finish(process, log, code=1)
    assert "Traceback" not in log.read_text() and len(list((tmp_path / "out").glob("checkpoint-*"))) == 1


def test_workers_need_no_shared_memory(arguments, run, tmp_path):
    """A container has 64 MB of it: PyTorch's workers would lose what does not fit, and the run wait for it."""

    def none(*_):
        raise RuntimeError("unable to allocate shared memory")

    def setup():
        torch.UntypedStorage._share_fd_cpu_ = torch.UntypedStorage._share_filename_cpu_ = none

    log, plain = tmp_path / "log", tmp_path / "plain"
    finish(
        start("train_sd3_soar", [*arguments, "--dataloader_num_workers", 2, "--max_train_steps", 2], log, setup=setup),
        log,
    )
    assert equal(run("train_sd3_soar", *arguments[:4], *arguments[6:], "--output_dir", plain), tmp_path / "out")


@pytest.mark.parametrize("within", ["loss", "update"])
def test_an_error_of_the_step(within, run, monkeypatch, tmp_path):
    """It ends the run as it is; before an update of the weights, the last whole step is kept."""
    owner, name = (train_sd3_soar, "training_losses") if within == "loss" else (torch.optim.AdamW, "step")
    function, count = getattr(owner, name), itertools.count(1)

    def broken(*inputs, **more):
        if next(count) == 3:
            raise RuntimeError("broken")
        return function(*inputs, **more)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken"):
        patch.setattr(owner, name, broken)
        run("train_sd3_soar", "--max_train_steps", 4)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"] * (within == "loss")


def test_a_process_that_waits_for_another_ends(arguments, tmp_path):
    """After a time that a user survives, where the other never comes."""

    def setup():
        limit, losses = train_sd3_soar.limit_waits, train_sd3_soar.training_losses

        def endless(*inputs):
            time.sleep(10_000)
            yield from losses(*inputs)

        train_sd3_soar.limit_waits = lambda **time: limit(seconds=5 if time["minutes"] <= 60 else 0)
        if os.environ["RANK"] == "1":
            train_sd3_soar.training_losses = endless

    log = tmp_path / "log"
    waiting, stuck = start_two("train_sd3_soar", [*arguments, "--max_train_steps", 2], log, setup)
    waiting.join(120)
    stuck.kill()
    assert waiting.exitcode == 1, log.read_text()[-2000:]


# Processes


def torchrun(arguments, log):
    """The real launcher, with two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with open(log, "w") as output:
        command = [*map(str, [*command, ROOT / "train_sd3_soar.py", *arguments])]
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


def children(pid):
    """Process ids of the children of a process, from /proc."""
    return [int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]


def test_a_process_that_dies_takes_the_others_along(arguments, tmp_path, request):
    log = tmp_path / "log"
    launcher = torchrun([*arguments, "--max_train_steps", 100_000], log)
    request.addfinalizer(launcher.kill)
    deadline = time.monotonic() + 120
    while " 2/100000 [" not in log.read_text():
        assert launcher.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)
    victim = max(children(launcher.pid))
    os.kill(victim, signal.SIGKILL)
    assert launcher.wait(60) != 0


SRUN = """#!/bin/bash
for i in $(seq 0 $((SLURM_NTASKS - 1))); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & tasks+=($!); done
echo "${tasks[@]}" > tasks
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit ${code:-0}
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> requeued
"""


def test_slurm_queues_an_interrupted_job_again(arguments, tmp_path, request):
    """The job's script with two processes, and stand-ins for Slurm's commands; a signal to each, as Slurm sends."""
    tools = tmp_path / "tools"
    tools.mkdir()
    python = f'#!/bin/bash\nexec {sys.executable} "$@"\n'
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": python}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slurm = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node", "MASTER_PORT": str(port)}
    environment = os.environ | slurm | {"PATH": f"{tools}:{os.environ['PATH']}", "ACCELERATE_USE_CPU": "true"}
    script = ROOT / "examples" / "accelerate_configs" / "slurm.sh"
    command = ["bash", script, ROOT / "train_sd3_soar.py", *arguments, "--max_train_steps", 100_000]
    log = tmp_path / "log"
    with open(log, "w") as output:
        options = {"env": environment, "cwd": tmp_path, "start_new_session": True}
        job = subprocess.Popen([*map(str, command)], stdout=output, stderr=subprocess.STDOUT, **options)
    request.addfinalizer(lambda: subprocess.run(["pkill", "-KILL", "-s", str(job.pid)]))  # of a test that fails
    deadline = time.monotonic() + 120
    while " 2/100000 [" not in log.read_text():
        assert job.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)
    for task in (tmp_path / "tasks").read_text().split():
        os.kill(int(task), signal.SIGUSR1)
    assert job.wait(60) == 75, log.read_text()[-3000:]
    assert (tmp_path / "requeued").read_text() == "requeue 7\n" and list((tmp_path / "out").glob("checkpoint-*"))


def test_bad_input_ends_both_processes_with_the_message(arguments, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.png").write_bytes(b"no picture")
    (bad / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n')
    log = tmp_path / "log"
    processes = start_two("train_sd3_soar", [*arguments[:2], "--train_data_dir", bad, *arguments[4:]], log)
    began = time.monotonic()
    for process in processes:
        finish(process, log, code=1)
    assert time.monotonic() - began < 60
    assert "a.png cannot be read" in log.read_text() and "Traceback" not in log.read_text()


def test_two_runs_may_build_one_cache_at_once(arguments, run, tmp_path):
    cache = ["--cache_latents", "--cache_prompt_embeds", "--center_crop", "--max_train_steps", 2]
    cache += ["--cache_dir", tmp_path / "cache"]
    plain = arguments[:4] + arguments[6:]
    runs = [
        (start("train_sd3_soar", [*plain, *cache, "--output_dir", tmp_path / name], tmp_path / f"{name}.log"), name)
        for name in ("one", "two")
    ]
    for process, name in runs:
        finish(process, tmp_path / f"{name}.log")
    assert equal(tmp_path / "one", tmp_path / "two")
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert all(path.suffix == ".arrow" for path in files)
    assert len(cached(tmp_path / "cache" / "latents")) == 8
    assert len(cached(tmp_path / "cache" / "prompt_embeds")) == 9


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_folder_without_locks(code, run, monkeypatch, caplog):
    """A file system that knows none is no reason not to train: it is said."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(code, "no locks here")))
    out = run("train_sd3_soar", "--max_train_steps", 1)
    assert f"Nothing keeps a second run out of {out}" in caplog.text and (out / "transformer").exists()


@pytest.mark.parametrize("flag", ["output_dir", "cache_dir"])
def test_processes_that_do_not_share_their_folders(flag, arguments, tmp_path):
    """As on two machines with a folder each: one line, before anything loads, instead of a missing file later."""

    def apart():
        own = tmp_path / os.environ["RANK"]
        own.mkdir()
        os.chdir(own)
        time.sleep = lambda seconds: None

    flags = [*arguments, "--cache_dir", tmp_path / "cache"]
    flags[flags.index(f"--{flag}") + 1] = "own"
    for process in start_two("train_sd3_soar", flags, tmp_path / "log.txt", apart):
        finish(process, tmp_path / "log.txt", code=1)
    log = (tmp_path / "log.txt").read_text()
    assert f"error: --{flag} own: all processes must see the same folder" in log
    assert "Traceback" not in log and "Training:" not in log


# Hostile data


def png_header(width, height):
    """A valid PNG header that claims a size, and nothing else."""
    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + ihdr
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(ihdr)) + chunk + struct.pack(">I", zlib.crc32(chunk))


CAPTIONS = [
    "a cat",
    "",
    " ",
    "\x00\x07\x1b[31m",
    "x" * 100_000,
    "\ud800",
    "{",
    '{"text": 3}',
    "漢字 🦊",
    None,
    7,
    ["a"],
]
LINES = [b"", b"   ", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"md5": 3}', b'{"md5": "a"}', b"{}" * 3]
NAMES = ["a", "../a", "/etc/passwd", "a/../../b", "", ".", "..", "link", "a\x00b", "missing", "x" * 300, "a\nb", "ü"]


def write_case(folder, kind, rng):
    """A data folder with a few random faults, or none."""
    images = []
    for name in ("a", "b", "c"):
        path, choice = folder / f"{name}.png", rng.random()
        Image.new(rng.choice(["RGB", "L", "RGBA", "P", "I;16", "1"]), (rng.randint(1, 70), rng.randint(1, 70))).save(
            path
        )
        data = path.read_bytes()
        if choice < 0.1:
            path.write_bytes(data[: rng.randint(0, len(data) - 1)])
        elif choice < 0.2:
            place = rng.randrange(len(data))
            path.write_bytes(data[:place] + rng.randbytes(4) + data[place + 4 :])
        elif choice < 0.25:
            path.write_bytes(png_header(60_000, 60_000))
        elif choice < 0.3:
            path.write_bytes(rng.randbytes(100))
        images.append(name)
    (folder / "link.png").symlink_to("/etc/hostname")
    if rng.random() < 0.4:
        images.append(rng.choice(NAMES))
    captions = [rng.choice(CAPTIONS) if rng.random() < 0.3 else f"picture {name}" for name in images]
    if kind == "jsonl":
        records = [{"md5": name, "caption_en": caption} for name, caption in zip(images, captions, strict=True)]
        for record in records:
            if rng.random() < 0.2:
                record |= {
                    "bw": rng.choice([32, 0, -16, 17, 1.5, "32", None, 10**9]),
                    "bh": rng.choice([32, 48, None]),
                }
        lines = [json.dumps(record).encode() for record in records]
        if rng.random() < 0.4:
            lines.insert(rng.randint(0, 3), rng.choice(LINES))
        (folder / "data.jsonl").write_bytes(b"\n".join(lines))
        return ["--jsonl_path", folder / "data.jsonl", "--image_dir", folder]
    records = [{"file_name": f"{name}.png", "text": caption} for name, caption in zip(images, captions, strict=True)]
    if kind == "csv":
        rows = ["file_name,text", *(f'{record["file_name"]},"{record["text"]}"' for record in records)]
        (folder / "metadata.csv").write_bytes("\n".join(rows).encode(errors="surrogatepass"))
    else:
        lines = [json.dumps(record).encode() for record in records]
        if rng.random() < 0.3:
            lines.insert(rng.randint(0, 3), rng.choice(LINES))
        (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))
    return ["--train_data_dir", folder]


@pytest.mark.parametrize("kind", ["jsonl", "folder", "csv"])
def test_fuzzed_data_ends_in_a_message_or_a_counted_skip(kind, pipeline, tmp_path, monkeypatch, caplog):
    """170 random folders a reader: rows and dropped rows add up, or the run ends with one line."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    PartialState()  # the scripts' logger needs it
    seed = int(os.environ.get("FUZZ_SEED", time.time_ns() % 2**32))
    print(f"FUZZ_SEED={seed}")
    rng, ended, used, dropped = random.Random(seed), 0, 0, 0
    for number in range(170):
        folder = tmp_path / f"{kind}-{number}"
        folder.mkdir()
        arguments = [*write_case(folder, kind, rng), "--pretrained_model_name_or_path", pipeline]
        arguments += [
            "--cache_dir",
            tmp_path / "cache",
            "--resolution",
            32,
            *(["--skip_bad_images"] if rng.random() < 0.5 else []),
        ]
        try:
            args = train_sd3_soar.parse_args([str(argument) for argument in arguments])
            model = train_sd3_soar.check_model(args)
            rows = train_sd3_soar.load_images(args)
            inspected = train_sd3_soar.inspect_images(args, model, rows)
        except SystemExit as error:
            ended += 1
            assert str(error).startswith("error: ") and "\n" not in str(error), error
            continue
        used += len(inspected)
        dropped += len(rows) - len(inspected)
        assert args.skip_bad_images or len(rows) == len(inspected)
        for item in inspected:
            assert Path(item["name"]).resolve().parent == folder.resolve()  # nothing from outside
            assert all(isinstance(text, str) for text in rows[item["row"]]["captions"])
    assert ended > 20 and used > 40 and dropped > 5


def test_hostile_captions_train(run, photos, tmp_path):
    """Control characters, 100 kB of text, an empty caption: encoded like any other, truncated, nothing dropped."""
    with open(tmp_path / "data.jsonl", "w") as file:
        for name, caption in zip(
            ("coffee", "rocket", "coins"), ("\x00\x07\x1b[31m", "word " * 20_000, ""), strict=True
        ):
            file.write(json.dumps({"md5": name, "caption_en": caption}) + "\n")
    data = ("--jsonl_path", tmp_path / "data.jsonl", "--image_dir", photos, "--cache_prompt_embeds")
    out = run("train_sd3_soar", *data, "--train_batch_size", 3)
    assert len(cached(out / "cache" / "prompt_embeds")) == 3  # the empty one is the null prompt


def test_metadata_may_not_lead_out_of_train_data_dir(run, photos, tmp_path):
    """Neither by a path nor through a folder that is a link; a picture that is a link is the folder's own."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "linked").symlink_to(photos)
    for name in ("linked/coffee.png", "../photos/coffee.png", str(photos / "coffee.png")):
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a"}))
        with pytest.raises(SystemExit, match="coffee.png' leads out of --train_data_dir"):
            run("train_sd3_soar", "--train_data_dir", folder)


def test_rng_of_the_process_does_not_matter(run, tmp_path):
    """Whatever drew random numbers before, the run is the same."""
    torch.manual_seed(1)
    random.seed(1)
    one = run("train_sd3_soar_lora", "--lora_dropout", 0.3, "--output_dir", tmp_path / "one")
    torch.manual_seed(2)
    random.seed(2)
    assert equal(one, run("train_sd3_soar_lora", "--lora_dropout", 0.3, "--output_dir", tmp_path / "two"))


# Other machines


def test_no_memory_left_on_the_device(arguments, run, monkeypatch, tmp_path):
    """One line with the flags that help, in order, and the checkpoint that is safe."""
    predict, calls = train_sd3_soar.predict_velocity, itertools.count(1)

    def full(*inputs, **options):
        if next(calls) == 20:  # in the third step, of eight forwards each
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")
        return predict(*inputs, **options)

    monkeypatch.setattr(train_sd3_soar, "predict_velocity", full)
    with pytest.raises(SystemExit) as caught:
        run("train_sd3_soar", *arguments, "--max_train_steps", 4, "--checkpointing_steps", 2)
    message = str(caught.value)
    assert message.startswith("error: out of memory (CUDA out of memory. Tried") and "\n" not in message
    flags = ("--cache_latents", "--gradient_checkpointing", "--train_batch_size", "--full_bf16", "--offload")
    places = [message.index(flag) for flag in flags]
    assert places == sorted(places) and message.endswith(f"Last checkpoint: {tmp_path / 'out' / 'checkpoint-2'}")


def test_no_compiler(arguments, tmp_path, pipeline):
    """What cannot be compiled gives one line, not the compiler's hundred."""
    command = [sys.executable, ROOT / "train_sd3_sft.py", *map(str, arguments), "--torch_compile"]
    environment = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "error: --torch_compile needs Triton on a GPU (`pip install triton`"
    )
    # What PyTorch raises for want of Triton, on a GPU, is of the same kind.
    assert issubclass(torch._inductor.exc.TritonMissing, torch._dynamo.exc.TorchDynamoException)


class WindowsOs:
    """`os`, but a folder cannot be opened, nor a file synced that was opened to be read."""

    name = "nt"

    def __init__(self):
        self.writable, self.synced = set(), 0

    def __getattr__(self, name):
        return getattr(os, name)

    def open(self, path, flags):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        descriptor = os.open(path, flags)
        self.writable.discard(descriptor)
        if flags & os.O_RDWR:
            self.writable.add(descriptor)
        return descriptor

    def fsync(self, descriptor):
        if descriptor not in self.writable:
            raise OSError(9, "Bad file descriptor")
        self.synced += 1
        os.fsync(descriptor)


def test_checkpoints_under_windows(arguments, run, monkeypatch, tmp_path):
    """What is there to sync is synced, and the checkpoint is a whole one: the run goes on from it."""
    windows = WindowsOs()
    with pytest.raises(PermissionError):
        windows.open(tmp_path, os.O_RDONLY)
    monkeypatch.setattr(train_sd3_soar, "os", windows)
    monkeypatch.setattr(train_sd3_soar, "STOP_SIGNALS", [signal.SIGTERM, signal.SIGINT])  # it has no SIGUSR1
    run("train_sd3_soar", *arguments, "--checkpointing_steps", 1, "--max_train_steps", 1)
    files = [path for path in (tmp_path / "out" / "checkpoint-1").rglob("*") if path.is_file()]
    assert windows.synced == len(files) > 4
    run("train_sd3_soar", *arguments, "--max_train_steps", 2)
    whole = ("--output_dir", tmp_path / "whole")
    assert equal(run("train_sd3_soar", *arguments[:4], *arguments[6:], *whole), tmp_path / "out")


def test_workers_that_are_spawned(arguments, run, tmp_path):
    """As Windows and macOS start them: nothing that workers get depends on what their parent has in memory."""
    more = ["--max_train_steps", "2", "--dataloader_num_workers", "1"]
    driver = (
        "import multiprocessing, runpy, sys\n"
        "multiprocessing.set_start_method('spawn')\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", driver, ROOT / "train_sd3_soar.py", *map(str, arguments), *more]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    forked = ("--output_dir", tmp_path / "forked")
    assert equal(run("train_sd3_soar", *arguments[:4], *arguments[6:], *more, *forked), tmp_path / "out")


def test_no_double_precision(arguments, run):
    """MPS has no float64: from the first sample to the last validation image nothing on the device would be of it."""
    # Both make theirs on the CPU, and cast it before, or while, it goes to the device.
    excepted = {"embeddings.py", "scheduling_flow_match_euler_discrete.py"}
    makers = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, inputs=(), options=None):
            result = function(*inputs, **(options or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if torch.is_tensor(tensor) and tensor.dtype == torch.float64:
                    files = (Path(frame.filename) for frame in reversed(traceback.extract_stack()[:-1]))
                    makers.add(next(file.name for file in files if "torch" not in file.parts))
            return result

    more = "--num_rollout_paths 2 --use_ema --validation_prompt cat --validation_steps 1".split()
    with Watch():
        torch.from_numpy(np.zeros(1)) + 1
        assert makers == {"test_faults.py"} and not makers.clear()
        run("train_sd3_soar", *arguments, *more)
    assert makers == excepted
