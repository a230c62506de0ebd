# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: every way to train there runs, and a resumed run ends with the bits of a straight one."""

import functools
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from harness import ROOT, equal, scalars, weights


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FLAGS = "--mixed_precision bf16 --max_train_steps 4 --checkpointing_steps 2"
CACHED = "--cache_latents --cache_prompt_embeds"
NF4 = f"--bnb_quantization_config_path {ROOT}/examples/configs/nf4.json --use_8bit_adam"
WAYS = {
    "SFT": ("train_sd3_sft", ""),
    "SFT, EMA, caches": ("train_sd3_sft", f"--use_ema {CACHED}"),
    "SOAR": ("train_sd3_soar", ""),
    "SOAR, fp32": ("train_sd3_soar", "--mixed_precision no"),
    "SOAR, fp16": ("train_sd3_soar", "--mixed_precision fp16"),
    "SOAR, full bf16": ("train_sd3_soar", f"--full_bf16 {CACHED}"),
    "SOAR, 8-bit Adam, SDE paths": ("train_sd3_soar", "--use_8bit_adam --num_rollout_paths 2 --trajectory_length 2"),
    "SOAR, compiled": ("train_sd3_soar", f"--torch_compile {CACHED}"),
    "SOAR, offload, checkpointing": ("train_sd3_soar", "--offload --gradient_checkpointing"),
    "LoRA": ("train_sd3_soar_lora", ""),
    "LoRA, dropout, DoRA, EMA": ("train_sd3_soar_lora", "--lora_dropout 0.2 --use_dora --use_ema --offload_ema"),
    "LoRA, NF4": ("train_sd3_soar_lora", f"{NF4} --gradient_checkpointing"),
    "LoRA, NF4, compiled, offload": ("train_sd3_soar_lora", f"{NF4} --torch_compile --offload"),
}


def resume_as_killed(straight, resumed):
    """Copy of a run, as if it had been killed after its first checkpoint."""
    shutil.copytree(straight / "checkpoint-2", resumed / "checkpoint-2")
    return "--output_dir", resumed, "--resume_from_checkpoint", "latest"


@pytest.mark.parametrize("way", WAYS)
def test_resumed_run_ends_with_the_same_bits(run, way, tmp_path, monkeypatch):
    """By PyTorch's deterministic algorithms: the fast backward of attention adds in any order."""
    script, flags = WAYS[way]
    names = {word for word in flags.split() if word.startswith("--")}
    arguments = [*flags.split(), "--validation_prompt", "cat", "--validation_steps", "3"]
    words = FLAGS.split()
    for name, value in zip(words[::2], words[1::2], strict=True):
        arguments += [] if name in names else [name, value]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        straight = run(script, *arguments, "--output_dir", tmp_path / "straight")
        resumed = run(script, *arguments, *resume_as_killed(straight, tmp_path / "resumed"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(tensor.isfinite().all() for tensor in weights(straight).values())
    assert (straight / "validation" / "step-3.png").exists()
    assert equal(straight, resumed)
    # It learned, so that the same bits are not the ones it began with.
    assert not equal(straight / "checkpoint-2", straight)


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("train_sd3_nft_lora", "--old_rate 0.2 --kl_weight 0.01 --gradient_checkpointing"),
        ("train_sd3_flow_grpo_lora", "--num_updates 2"),
        ("train_sd3_flow_grpo_lora", "--sde_type cps --rollout_guidance 1 --kl_weight 0 --adam_epsilon 1e-15"),
    ],
)
def test_reinforcement_learning(script, flags, run, logged, tmp_path, monkeypatch):
    """A resumed run ends with the bits of a straight one; before its update a policy is the one that drew."""
    rl = ROOT / "examples" / "rl"
    monkeypatch.syspath_prepend(rl)
    monkeypatch.chdir(rl)  # where its reward is looked for
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    (tmp_path / "prompts.txt").write_text("a red square\na dog\na house by the sea\n")
    arguments = f"{flags} --prompts {tmp_path}/prompts.txt --reward time_rollouts:brightness=1 --num_rollout_steps 7"
    arguments += " --num_groups 2 --group_size 4 --max_train_steps 3 --checkpointing_steps 1 --mixed_precision bf16"
    train = functools.partial(run, script, *arguments.split(), omit=["--train_data_dir"])
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        straight = train("--output_dir", tmp_path / "straight")
        resumed = train(*resume_as_killed(straight, tmp_path / "resumed"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert equal(straight, resumed) and not equal(straight / "checkpoint-2", straight)
    assert len(logged) == 4 and all(math.isfinite(value) for logs in logged for value in logs.values())
    if "num_updates" not in flags:
        assert max(logs.get("ratio_error", 0) for logs in logged) < 1e-6


def test_fsdp2(pipeline, photos, tmp_path):
    """The launch configuration, on the one GPU: sharded, saved, resumed."""
    config = ROOT / "examples" / "accelerate_configs" / "fsdp2.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", 1]
    command += [ROOT / "train_sd3_soar.py", "--pretrained_model_name_or_path", pipeline, "--train_data_dir", photos]
    command += "--resolution 32 --max_sequence_length 16 --train_batch_size 2 --learning_rate 1e-3 --seed 0".split()
    command += ["--use_ema", "--report_to", "none", *FLAGS.split()]
    command += ["--validation_prompt", "cat", "--num_inference_steps", 2]

    def launch(*arguments):
        done = subprocess.run([str(word) for word in (*command, *arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    launch("--output_dir", tmp_path / "straight")
    assert any((tmp_path / "straight" / "validation").iterdir())
    launch(*resume_as_killed(tmp_path / "straight", tmp_path / "resumed"))
    one, other = weights(tmp_path / "straight"), weights(tmp_path / "resumed")
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-2, atol=1e-4, msg=name)


def test_a_run_on_the_gpu_is_that_of_the_cpu(run, pipeline, photos, tmp_path):
    """The same seeds draw the same noise on both: losses of float32 runs agree to rounding."""
    flags = "--max_train_steps 3 --report_to tensorboard --mixed_precision no".split()
    gpu = run("train_sd3_soar", *flags, "--output_dir", tmp_path / "gpu")
    command = [sys.executable, ROOT / "train_sd3_soar.py", "--pretrained_model_name_or_path", pipeline]
    command += ["--train_data_dir", photos, "--output_dir", tmp_path / "cpu", *flags]
    command += "--resolution 32 --max_sequence_length 16 --train_batch_size 2 --learning_rate 1e-3 --seed 0".split()
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    on_gpu, on_cpu = scalars(gpu), scalars(tmp_path / "cpu")
    assert on_gpu.keys() == on_cpu.keys() == {1, 2, 3}
    assert all(math.isclose(on_gpu[step], on_cpu[step], rel_tol=1e-3) for step in on_gpu), (on_gpu, on_cpu)


def test_capped_run(pipeline, photos, tmp_path):
    """`run_capped.py` notes what a whole run used, and ends one that does not fit with the script's own line."""
    script = ROOT / "examples" / "benchmark" / "run_capped.py"

    def capped(limit, *flags):
        command = [sys.executable, script, limit, "--output", tmp_path / "run.json", "--", ROOT / "train_sd3_soar.py"]
        command += ["--pretrained_model_name_or_path", pipeline, "--train_data_dir", photos, "--resolution", 32]
        command += ["--max_sequence_length", 16, "--max_train_steps", 1, "--report_to", "none", *flags]
        command += ["--train_batch_size", 2, "--output_dir", tmp_path / f"out{limit}"]
        return subprocess.run([str(word) for word in command], capture_output=True, text=True)

    done = capped(2)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "run.json").read_text())
    assert 0 < result["peak_allocated_gib"] <= result["peak_reserved_gib"] < 2 - 0.75
    failed = capped(0.76)
    assert failed.returncode == 1 and "error: out of memory" in failed.stderr, failed.stderr[-3000:]
