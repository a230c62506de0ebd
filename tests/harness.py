# SPDX-License-Identifier: Apache-2.0
"""
What the tests and `torture.py` share: photographs, a look at what a run left, and runs that can be killed. Each of
these is a process of its own, forked from one that has imported the script already: a start takes half a second.
"""

import contextlib
import importlib
import json
import logging
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from diffusers import SD3Transformer2DModel
from PIL import Image
from safetensors.torch import load, load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.tensor import DTensor

from data_utils import Cache


ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train_sd3_sft", "train_sd3_soar", "train_sd3_soar_lora")
PHOTOS = {
    "astronaut": "an astronaut in an orange suit",
    "camera": "a man behind a camera",
    "chelsea": "a cat looking to the side",
    "coffee": "a cup of coffee on a wooden table",
    "coins": "old coins in rows",
    "hubble_deep_field": "galaxies in deep space",
    "retina": "the retina of an eye",
    "rocket": "a rocket on its launch pad",
}


def write_photos(folder, side=10_000):
    """Write the photographs that scikit-image ships, no side longer than `side` pixels, and their captions."""
    from skimage import data

    folder.mkdir(exist_ok=True)
    with open(folder / "metadata.jsonl", "w") as metadata:
        for name, caption in PHOTOS.items():
            image = Image.fromarray(getattr(data, name)())
            image.thumbnail((side, side))
            image.save(folder / f"{name}.png")
            metadata.write(json.dumps({"file_name": f"{name}.png", "text": caption}) + "\n")


def weights(folder):
    """The trained tensors that a run, or a pipeline, has in `folder`, by name."""
    folder = Path(folder)
    files = [folder / "pytorch_lora_weights.safetensors", folder / "transformer/diffusion_pytorch_model.safetensors"]
    return load_file(next(file for file in files if file.exists()))


def equal(one, other):
    """Whether two folders hold exactly the same weights."""
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def cached(folder):
    """The tensors in one of the scripts' caches, by key."""
    cache = Cache(folder)
    return {key.decode(): load(cache[key]) for key in cache.keys.tolist() if key}


def reset_accelerate():
    """Make accelerate forget the run before, as in a new process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def scalars(folder, name="loss"):
    """A logged value of every optimizer step, the last one where a restart logged a step again."""
    values = {}
    files = sorted(Path(folder).glob("logs/*/events*"), key=lambda file: file.stat().st_mtime)
    for file in files:
        events = EventAccumulator(str(file)).Reload()
        if name in events.Tags()["scalars"]:
            values |= {event.step: event.value for event in events.Scalars(name)}
    return values


COMMON = """--resolution 32 --max_sequence_length 16 --train_batch_size 2 --max_train_steps 8 --checkpointing_steps 2
    --learning_rate 1e-3 --seed 0 --validation_prompt cat --validation_steps 3 --num_validation_images 1
    --num_inference_steps 2 --resume_from_checkpoint latest""".split()

# What a run may be made of; between them the cases hold every kind of state that a checkpoint has to carry.
CASES = {
    "SFT, EMA, cosine, accumulation": (
        "train_sd3_sft",
        "--use_ema --lr_scheduler cosine --lr_warmup_steps 2 --gradient_accumulation_steps 2 --random_flip",
    ),
    "SFT, Prodigy, caches, dropout": (
        "train_sd3_sft",
        "--optimizer prodigy --learning_rate 1 --cache_latents --cache_prompt_embeds --cond_dropout_rate 0.3",
    ),
    "SOAR, 8-bit Adam, 1 worker": (
        "train_sd3_soar",
        "--use_8bit_adam --dataloader_num_workers 1 --lr_scheduler linear",
    ),
    "SOAR, SDE paths, buckets, flips": (
        "train_sd3_soar",
        "--num_rollout_paths 2 --trajectory_length 2 --use_aspect_ratio_buckets --random_flip --cond_dropout_rate 0.3",
    ),
    "SOAR, EMA, 4 workers, bf16": (
        "train_sd3_soar",
        "--use_ema --offload_ema --dataloader_num_workers 4 --mixed_precision bf16 --trajectory_length 2",
    ),
    "LoRA, dropout, polynomial, bf16": (
        "train_sd3_soar_lora",
        "--lora_dropout 0.2 --lr_scheduler polynomial --gradient_checkpointing --checkpoints_total_limit 1 "
        "--mixed_precision bf16",
    ),
    "DoRA, EMA, caches, restarts": (
        "train_sd3_soar_lora",
        "--use_dora --use_ema --cache_latents --cache_prompt_embeds --center_crop --random_flip --trajectory_length 2 "
        "--lr_scheduler cosine_with_restarts --lr_num_cycles 2",
    ),
}


def start(script, arguments, log, environment=(), setup=lambda: None):
    """
    Fork a process that runs `script` with `arguments`, its output in the file `log`, after `environment` was added to
    its own and `setup` was called there.
    """

    def target():
        os.environ.update(environment)
        torch.set_num_threads(1)  # makes PyTorch's pool anew, before the threads that load weights race to do so
        setup()
        sys.stdout = sys.stderr = open(log, "a", buffering=1)
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
        reset_accelerate()
        sys.argv = [f"{script}.py", *map(str, arguments)]
        module = importlib.import_module(script)
        module.run(module.parse_args())

    importlib.import_module(script)
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


def run_python(command, check=True, cwd=None):
    """`subprocess.run` of a Python script, with its output as text, by [`run_forked`]."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        done = run_forked(command, out, err, os.environ, cwd or os.getcwd())
        done.stdout, done.stderr = (file.seek(0) or file.read() for file in (out, err))
    assert done.returncode == 0 or not check, done.stderr[-3000:]
    return done


def run_forked(command, stdout, stderr, env, cwd):
    """`subprocess.run` of a Python script, in a fork of this process, which has imported most of it already."""

    def target():
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd)
        torch.set_num_threads(1)
        sys.stdout = sys.stderr = open(stdout.fileno(), "w", buffering=1, closefd=False)
        if stderr not in (stdout, subprocess.STDOUT):
            sys.stderr = open(stderr.fileno(), "w", buffering=1, closefd=False)
        reset_accelerate()
        sys.argv = [str(word) for word in command[1:]]
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join()
    return subprocess.CompletedProcess(command, process.exitcode)


def start_two(script, arguments, log, setup=lambda: None):
    """The same run on two processes that talk over gloo, as `torchrun` would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common["ACCELERATE_USE_CPU"] = "true"
    return [start(script, arguments, log, {**common, "RANK": str(r), "LOCAL_RANK": str(r)}, setup) for r in range(2)]


def shard():
    """As a `setup`: shard over the processes, as `accelerate launch --config_file fsdp2.yaml` does on GPUs alone."""
    config = ROOT / "examples" / "accelerate_configs" / "fsdp2.yaml"
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(config), "x"]))
    own = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    os.environ.update(prepare_multi_gpu_env(arguments) | own)
    init, backward = AcceleratorState.__init__, Accelerator.backward

    def start_sharded(self, *inputs, fsdp_plugin=None, **options):
        init(self, *inputs, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:  # else it is not the first
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)

    def backward_sharded(self, loss, **options):
        """Neither a gradient nor a weight is whole on either process when it has returned."""
        backward(self, loss, **options)
        for model in self._models:
            for parameter in model.parameters():
                assert isinstance(parameter, DTensor)
                assert isinstance(parameter.grad, DTensor) or not parameter.requires_grad
        policy = self.state.fsdp_plugin.mixed_precision_policy
        assert policy is None or policy.reduce_dtype == torch.float32

    AcceleratorState.__init__, Accelerator.backward = start_sharded, backward_sharded
    if os.environ["RANK"] != "0":  # it is sent them
        SD3Transformer2DModel.from_pretrained = None


def finish(process, log, code=0):
    """Wait for a run to end with exit code `code`."""
    process.join(300)
    assert process.exitcode == code, f"exit code {process.exitcode}:\n{Path(log).read_text()[-3000:]}"


def finish_all(processes, log, code=0, seconds=120):
    """[`finish`] for the processes of one run; those that still wait for each other after `seconds` are killed."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    assert codes == [code] * len(processes), f"exit codes {codes}:\n{Path(log).read_text()[-3000:]}"


@dataclass
class Outcome:
    kills: int = 0
    resumed: int = 0
    identical: bool = False
    same_losses: bool = False
    moments: list = field(default_factory=list)


def torture(case, folder, model, photos, kills, rng):
    """
    Run a case whole, then again with `kills` kills at random moments of its duration, and compare.

    Returns:
        [`Outcome`]: whether the weights are bit-identical and every logged loss is the same.
    """
    script, extra = CASES[case]
    importlib.import_module(script)  # not part of the duration
    arguments = ["--pretrained_model_name_or_path", model, "--train_data_dir", photos, *COMMON, *extra.split()]
    whole, broken = Path(folder, "whole"), Path(folder, "broken")
    Path(folder).mkdir(parents=True, exist_ok=True)
    if not whole.exists():
        log, began = Path(folder, "whole.log"), time.monotonic()
        finish(start(script, [*arguments, "--output_dir", whole], log), log)
        Path(folder, "seconds").write_text(str(time.monotonic() - began))
    seconds, outcome, log = float(Path(folder, "seconds").read_text()), Outcome(), Path(folder, "broken.log")
    command = [*arguments, "--output_dir", broken]
    while outcome.kills < kills:
        process = start(script, command, log)
        moment = rng.uniform(0, seconds)
        process.join(moment)
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.join()
            outcome.kills += 1
            outcome.moments.append(round(moment, 2))
            outcome.resumed += any(broken.glob("checkpoint-?"))
        else:
            assert process.exitcode == 0, Path(log).read_text()[-3000:]
            break  # it was done before the kill
    finish(start(script, command, log), log)
    outcome.identical = equal(whole, broken)
    expected = scalars(whole)
    outcome.same_losses = len(expected) == 8 and all(expected[s] == v for s, v in scalars(broken).items())
    return outcome


def seeded():
    """A generator whose seed is printed, and taken from TORTURE_SEED where that is set."""
    seed = int(os.environ.get("TORTURE_SEED", time.time_ns() % 2**32))
    print(f"TORTURE_SEED={seed}")
    return random.Random(seed)
