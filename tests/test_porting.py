# SPDX-License-Identifier: Apache-2.0
"""
`examples/porting`: its check is passed by our scripts and by the ports, and by nothing with a planted error.

The ports are tried where `DIFFUSERS_CHECKOUT` names a folder with diffusers' repository at v0.40.0.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import ROOT
from PIL import Image

import soar_utils


PORTING = ROOT / "examples" / "porting"
sys.path[:0] = [str(PORTING), str(ROOT / "examples")]
import apply  # noqa: E402
import check_port  # noqa: E402
import minimal_soar  # noqa: E402


PORTS = ["train_dreambooth_lora_sd3", "train_dreambooth_lora_flux", "train_dreambooth_lora_z_image"]
CHECKOUT = os.environ.get("DIFFUSERS_CHECKOUT")
needs_checkout = pytest.mark.skipif(not CHECKOUT, reason="DIFFUSERS_CHECKOUT names no checkout of diffusers v0.40.0")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Four images with captions, for our scripts and for `datasets`."""
    folder = tmp_path_factory.mktemp("images")
    with open(folder / "metadata.jsonl", "w") as metadata:
        for i, text in enumerate(("a red circle", "two blue stars", "a green heart", "one white cross")):
            Image.new("RGB", (64, 64), (40 * i, 90, 120)).save(folder / f"{i}.png")
            metadata.write(json.dumps({"file_name": f"{i}.png", "text": text}) + "\n")
    return folder


@pytest.fixture(scope="module")
def flags(pipeline, images):
    """A short run of our scripts."""
    words = f"--pretrained_model_name_or_path {pipeline} --train_data_dir {images} --resolution 32 --report_to none"
    return f"{words} --train_batch_size 2 --max_sequence_length 16".split()


def planted(text, path, *changes):
    """Write `text` with each of `changes`, pairs of old and new, to `path`."""
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)
    return path


def first_wrong(path, flags, original=None):
    """The name of the first check that fails, or `None`."""
    return next((name for name, right, _ in check_port.check(path, flags, original) if not right), None)


# Our own


@pytest.mark.parametrize("script", ["train_sd3_soar", "train_sd3_soar_lora"])
def test_our_scripts_pass(script, flags):
    results = list(check_port.check(ROOT / f"{script}.py", flags))
    assert len(results) == 10 and all(right for _, right, _ in results), results


PREDICT = "timestep=soar_utils.sigma_to_timestep(sigma),"
ERRORS = {
    "timestep not scaled": (PREDICT, "timestep=sigma,"),
    "timestep an integer": (PREDICT, "timestep=soar_utils.sigma_to_timestep(sigma).long(),"),
    "one timestep for the batch": (PREDICT, "timestep=soar_utils.sigma_to_timestep(sigma[:1].expand_as(sigma)),"),
    "model's output negated": (
        "        return_dict=False,\n    )[0]\n",
        "        return_dict=False,\n    )[0].neg()\n",
    ),
    "rollout upward": (
        "noisy_latents, velocity_cfg, sigma, sigma_next, *stochastic",
        "noisy_latents, -velocity_cfg, sigma, sigma_next, *stochastic",
    ),
    "rollout from the velocity of nothing": (
        "velocity_cfg = velocity.detach()",
        "velocity_cfg = 0 * velocity.detach()",
    ),
    "fresh noise": ("renoise(rollout_latents, noise, sig", "renoise(rollout_latents, torch.randn_like(noise), sig"),
    "guidance the wrong way": ("(velocity_cfg, velocity_uncond, args", "(velocity_uncond, velocity_cfg, args"),
    "guidance by the caption": ("predict(noisy_latents, sigma, null=True)", "predict(noisy_latents, sigma)"),
    "rollout with a graph": (
        "        with torch.no_grad():\n            velocity_uncond",
        "        if True:\n            velocity_uncond",
    ),
    "first caption for all": ("torch.arange(n_base, device=device)", "torch.zeros(n_base, dtype=int, device=device)"),
    "wrong denominator": ("denominator = n_base + args.lambda_aux * n_aux", "denominator = n_base + n_aux"),
    "every backward synchronises": (
        "accelerator.sync_gradients = last_batch and last",
        "accelerator.sync_gradients = last_batch",
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_planted_errors_in_our_script(error, flags, tmp_path):
    path = planted((ROOT / "train_sd3_soar.py").read_text(), tmp_path / "planted_soar.py", ERRORS[error])
    assert first_wrong(path, flags)


@pytest.mark.parametrize("answer", [check_port.image, check_port.line])
def test_minimal_soar_under_the_same_models(answer):
    """All its losses are zero, for a model that knows the image and for one that knows the line."""
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    run = check_port.Run(latents=latents, noise=torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)))
    args = SimpleNamespace(lambda_aux=1.0, trajectory_length=4, num_sampling_steps=40, cfg_scale_sampling=4.5)

    def predict(states, sigma, text):
        return answer(run, states, sigma.view(-1, 1, 1, 1), True)

    generator = torch.Generator().manual_seed(1)  # its first draw is the noise
    losses = list(minimal_soar.soar_losses(args, predict, latents, None, None, 3.0, generator))
    assert len(losses) == 5 and max(losses) < 1e-9


# Applying


STAND_IN = """import argparse
import diffusers


def train(loss):
    loss.backward()
    return loss
"""


def test_apply(tmp_path):
    """Insertions before, after and instead of a line, each in its place; nothing else changes."""
    (tmp_path / "stand_in.port").write_text(
        "# remarks\n== before: import diffusers\nimport soar_utils\n== after: import diffusers\nimport torch\n"
        "== instead of: loss.backward()\n    (2 * loss).backward()\n    print(loss)\n"
    )
    edits = apply.read_port(tmp_path / "stand_in.port")
    assert apply.apply(edits, STAND_IN) == STAND_IN.replace(
        "import diffusers\n", "import soar_utils\nimport diffusers\nimport torch\n"
    ).replace("    loss.backward()\n", "    (2 * loss).backward()\n    print(loss)\n")


@pytest.mark.parametrize(("source", "times"), [("", 0), (STAND_IN + STAND_IN, 2)])
def test_an_anchor_that_is_not_there_once_is_named(source, times):
    with pytest.raises(SystemExit, match=rf"'import diffusers' occurs {times} times"):
        apply.apply([("after", "import diffusers", ["import soar_utils"])], source)


def test_apply_from_the_command_line(tmp_path):
    """A checkout without the script, or with another version of it, gives one line; nothing is written."""
    command = [sys.executable, PORTING / "apply.py", tmp_path, PORTS[0], tmp_path / "out.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and f"has 0 files examples/*/{PORTS[0]}.py" in done.stderr
    (tmp_path / "examples" / "dreambooth").mkdir(parents=True)
    (tmp_path / "examples" / "dreambooth" / f"{PORTS[0]}.py").write_text(STAND_IN)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "this is not the script of diffusers v0.40.0" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out.py").exists()


@pytest.mark.parametrize("port", PORTS)
def test_ports_are_short_and_use_what_there_is(port):
    """At most 80 lines each; every name of `soar_utils` in them exists."""
    edits = apply.read_port(PORTING / f"{port}.port")
    changed = sum(len(lines) + (place == "instead of") for place, _, lines in edits)
    readme = (PORTING / "README.md").read_text()
    assert changed <= 80 and re.search(rf"^\| `{port}` \|[^|]*\| {changed} \|", readme, re.MULTILINE)
    assert f"plants {len(PLANTED)} errors" in readme and f"with {len(ERRORS)} errors planted" in readme
    names = re.findall(r"soar_utils\.(\w+)", "\n".join(line for _, _, lines in edits for line in lines))
    assert names and all(hasattr(soar_utils, name) for name in names)


# The ports


@pytest.fixture(scope="module")
def ported(pipeline, images, tmp_path_factory):
    """A function that gives a port's script, the original, and the flags of a short run."""
    folder, models = tmp_path_factory.mktemp("ported"), {PORTS[0]: pipeline}

    def make(port):
        if port not in models:
            models[port] = folder / f"model_{port}"
            kind = port.removeprefix("train_dreambooth_lora_")
            command = [sys.executable, PORTING / "tiny_models.py", kind, models[port]]
            subprocess.run(command, check=True, capture_output=True)
        path = folder / f"{port}.py"
        if not path.exists():
            subprocess.run([sys.executable, PORTING / "apply.py", CHECKOUT, port, path], check=True)
        flags = f"--pretrained_model_name_or_path {models[port]} --dataset_name {images} --caption_column text"
        flags += " --instance_prompt x --resolution 64 --rank 4 --train_batch_size 2 --max_sequence_length 16"
        return path, next(Path(CHECKOUT).glob(f"examples/*/{port}.py")), flags.split()

    return make


@needs_checkout
@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("more", [[], ["--weighting_scheme", "mode", "--cache_latents"]])
def test_ports_pass(port, more, ported):
    path, original, flags = ported(port)
    if port == PORTS[0]:
        more = [*more, "--precondition_outputs", str(int(not more))]
    results = list(check_port.check(path, [*flags, *more], original))
    assert all(right for _, right, _ in results), results
    run = check_port.run_script(path, [*flags, "--trajectory_length", "3"])  # with the model itself
    assert len(run.losses) == 2 * (1 + 3) and all(0 < loss < 100 for loss in run.losses)


ROLLOUT = "rollout_step(noisy_latents, velocity, sigma, sigma_next)"
TARGET = "target = soar_utils.correction_target(aux_latents, latents, sigma_aux)"
IN_ALL = {
    "rollout upward": (ROLLOUT, "rollout_step(noisy_latents, -velocity, sigma, sigma_next)"),
    "rollout of another length": (ROLLOUT, "rollout_step(noisy_latents, velocity, sigma, sigma_next / 2)"),
    "target negated": (TARGET, TARGET.replace("= soar", "= -soar")),
    "target of the first path": (
        TARGET,
        "target = noise.float() - latents.float() + 0 * aux_latents + 0.1 * sigma.mean()",
    ),
    "fresh noise": ("renoise(rollout_latents, noise,", "renoise(rollout_latents, torch.randn_like(noise),"),
    "auxiliary loss not shared": (
        "backward(share * args.lambda_aux * aux_loss)",
        "backward(args.lambda_aux * aux_loss)",
    ),
    "base loss not shared": ("accelerator.backward(share * loss)", "accelerator.backward(loss)"),
    "every backward synchronises": (
        "if args.lambda_aux > 0:\n                    apart",
        "if False:\n                    apart",
    ),
    "no last backward": ("if number == num_aux:", "if number > num_aux:"),
    "another loss without SOAR": ("share = 1 / (1 + args.", "share = 1 / (1.5 + args."),
    "noise as velocity": ("velocity = model_pred.detach()", "velocity = noise.detach()"),
}
GUIDED = {
    "guidance the wrong way": ("guidance(velocity, velocity_uncond,", "guidance(velocity_uncond, velocity,"),
    "rollout with a graph": ("with torch.no_grad():\n                        ", "if True:\n                        "),
}
IN_ONE = {
    PORTS[0]: GUIDED
    | {
        "timestep not scaled": ("timestep=soar_utils.sigma_to_timestep(sigma)", "timestep=sigma"),
        "timestep an integer": ("sigma_to_timestep(sigma)", "sigma_to_timestep(sigma).long()"),
        "one timestep for the batch": (
            "predict(aux_latents, sigma_aux,",
            "predict(aux_latents, sigma_aux[:1].expand(count),",
        ),
        "preconditioned velocity": (
            "share * loss.detach()\n",
            "share * loss.detach()\n                velocity = model_pred.detach()\n",
        ),
        "weights of the velocity": ("weighting = weighting * sigma_aux**2", "pass"),
        "guidance by the caption": (
            "predict(noisy_latents, sigma, *null)",
            "predict(noisy_latents, sigma, text, pooled)",
        ),
    },
    PORTS[1]: {
        "timestep scaled": ("timestep=sigma_aux,", "timestep=1000 * sigma_aux,"),
        "one timestep for the batch": ("timestep=sigma_aux,", "timestep=sigma_aux[:1].expand(count),"),
        "captions of another": (
            "prompt_embeds[:count],\n                            txt",
            "0 * prompt_embeds[:count],\n                            txt",
        ),
    },
    PORTS[2]: GUIDED
    | {
        "time not turned": ("transformer(frames, 1 - sigma, text", "transformer(frames, sigma, text"),
        "output not negated": ("return -torch.stack(transformer", "return torch.stack(transformer"),
        "one timestep for the batch": (
            "predict(aux_latents, sigma_aux,",
            "predict(aux_latents, sigma_aux[:1].expand(count),",
        ),
        "guidance by the caption": ("[null_text] * count", "text"),
    },
}
PLANTED = [(port, error, change) for port in PORTS for error, change in (IN_ALL | IN_ONE[port]).items()]


@needs_checkout
@pytest.mark.parametrize(("port", "error", "change"), PLANTED, ids=[f"{port}: {error}" for port, error, _ in PLANTED])
def test_planted_errors_in_the_ports(port, error, change, ported, tmp_path):
    path, original, flags = ported(port)
    (tmp_path / "soar_utils.py").symlink_to(ROOT / "soar_utils.py")
    assert first_wrong(planted(path.read_text(), tmp_path / f"planted_{port}.py", change), flags, original)
