# SPDX-License-Identifier: Apache-2.0
"""
Whether SOAR was put into a training script rightly, in seconds, on a CPU: with made-up models whose losses are known.

    python examples/porting/check_port.py train_dreambooth_lora_sd3_soar.py \
        --original diffusers/examples/dreambooth/train_dreambooth_lora_sd3.py -- \
        --pretrained_model_name_or_path outputs/tiny --dataset_name my_images --caption_column text \
        --resolution 32 --rank 4 --train_batch_size 2

After `--` come the script's own flags for a short run on a tiny pipeline (`make_tiny_sd3.py`, `tiny_models.py`) and at
least two images with different captions; a batch of two or more. The script must have `parse_args`, `main` and the
flags `--lambda_aux` and `--trajectory_length`, be written for accelerate, and load a transformer of one of the classes
in `ADAPTERS`, to which others can be added in a few lines.

Every image becomes the same latents, every draw of noise the same noise, and in place of the transformer answer:

- *the image*: `(state - latents) / sigma`. Base and auxiliary losses must be zero, up to rounding. A wrong scale of
  the timestep, one timestep for a batch of several, a wrong target or sign of the output are not.
- *the line*: `noise - latents`, whatever it is asked. The rollout stays on the ideal path, so again all losses are
  zero, but not with a wrong sign or length of the rollout, fresh noise, or a velocity that is none.
- *the image, off by one*: each loss is then the weight that the script gives a state, so their sum is known.
- *the line, and another answer without the caption*: auxiliary states must lie off the path, on the side that guidance
  leads to.

Beside the losses, the forwards are counted, with and without gradient; the empty caption must reach those without, and
each caption its own states; one graph may be alive at a time; only the last backward of a step may synchronise; and
`--lambda_aux 0` must be the script without SOAR, bit for bit.
"""

import argparse
import contextlib
import importlib.util
import io
import logging
import sys
import tempfile
import types
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import (
    AutoencoderKL,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput


STEPS, NUM_AUX, LAMBDA = 2, 2, 0.5
ZERO = 1e-9  # of losses of values of size 1; rounding in float32 gives 1e-13


# How a model is asked: its states (N, C, H, W), their sigmas (N,) and captions; and how a velocity is given back.


def sd3(latents, hidden_states, timestep, encoder_hidden_states, **rest):
    return hidden_states, timestep / 1000, encoder_hidden_states, lambda velocity: (velocity,)


def flux(latents, hidden_states, timestep, encoder_hidden_states, **rest):
    height, width = latents.shape[-2:]
    states = FluxPipeline._unpack_latents(hidden_states, height, width, vae_scale_factor=1)

    def answer(velocity):
        return (FluxPipeline._pack_latents(velocity, *velocity.shape),)

    return states, timestep, encoder_hidden_states, answer


def z_image(latents, states, time, captions, **rest):
    return torch.stack(states).squeeze(2), 1 - time, captions, lambda velocity: ([*-velocity.unsqueeze(2)],)


ADAPTERS = {SD3Transformer2DModel: sd3, FluxTransformer2DModel: flux, ZImageTransformer2DModel: z_image}


@dataclass
class Call:
    """A forward of the model."""

    states: torch.Tensor
    sigmas: list
    captions: list
    grad: bool
    apart: bool  # inside `no_sync`


@dataclass
class Run:
    """What a run of a script did."""

    calls: list = field(default_factory=list)
    losses: list = field(default_factory=list)
    alive: int = 0
    most_alive: int = 0
    apart: int = 0
    distilled: bool = False
    latents: torch.Tensor = None
    noise: torch.Tensor = None
    total: int = 0

    @property
    def batch_size(self):
        return len(self.calls[0].sigmas)

    def asked(self, grad):
        """Sigma and caption of every state, in order."""
        calls = [call for call in self.calls if call.grad == grad]
        return [pair for call in calls for pair in zip(call.sigmas, call.captions, strict=True)]


class Graph(torch.autograd.Function):
    """Between the trained parameters and an answer: counts the graphs that wait for their backward."""

    @staticmethod
    def forward(ctx, run, velocity, *parameters):
        ctx.run, ctx.shapes = run, [parameter.shape for parameter in parameters]
        run.alive += 1
        run.most_alive = max(run.most_alive, run.alive)
        return velocity.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.run.alive -= 1
        return None, None, *(gradient.new_zeros(shape) for shape in ctx.shapes)


def image(run, states, sigma, grad):
    return (states - run.latents) / sigma


def line(run, states, sigma, grad):
    return (run.noise - run.latents).expand_as(states)


def off_by_one(run, states, sigma, grad):
    return image(run, states, sigma, grad) + 1


def guided(run, states, sigma, grad):
    return line(run, states, sigma, grad) + (not grad) * run.latents


def run_script(path, flags, answer=None):
    """Run the script with `answer` in place of the model, or with its own; what it did is in the [`Run`]."""
    run, randn, randn_like, backward = Run(), torch.randn, torch.randn_like, Accelerator.backward
    no_sync = Accelerator.no_sync

    def encode(vae, pixels, return_dict=True):
        scale, channels = 2 ** (len(vae.config.block_out_channels) - 1), vae.config.latent_channels
        shape = channels, pixels.shape[-2] // scale, pixels.shape[-1] // scale
        raw, run.noise = randn(2, *shape, generator=torch.Generator().manual_seed(0))
        run.latents = (raw - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
        moments = torch.cat([raw, torch.full_like(raw, -30)]).expand(len(pixels), -1, -1, -1)  # without variance
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))

    def drawn(size, otherwise):
        # Of a step only the first noise: one that is drawn once more, for the rollout, is another.
        asked = sum(len(call.sigmas) for call in run.calls if call.grad)
        if run.noise is None or tuple(size[-3:]) != run.noise.shape or run.total and asked % run.total:
            return otherwise
        return run.noise.expand(*size).clone()

    def fixed_randn(*size, **options):
        size = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        return drawn(size, randn(*size, **options))

    def fixed_randn_like(tensor, **options):
        return drawn(tensor.shape, randn_like(tensor, **options))

    def forward(adapter, module, *inputs, return_dict=True, **named):
        states, sigma, captions, give = adapter(run.latents, *inputs, **named)
        sigma = sigma.detach().float().expand(len(states))
        captions = [round(float(caption.double().abs().sum()), 6) for caption in captions]
        run.distilled = bool(getattr(module.config, "guidance_embeds", False))
        call = Call(states.detach().clone(), sigma.tolist(), captions, torch.is_grad_enabled(), run.apart > 0)
        run.total = run.total or len(states) * (1 + NUM_AUX)
        run.calls.append(call)
        velocity = answer(run, states.detach().float(), sigma.view(-1, 1, 1, 1), call.grad)
        if call.grad:
            trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
            velocity = Graph.apply(run, velocity, *trained)
        return give(velocity.to(states.dtype))

    def asked_by(adapter):
        return lambda module, *inputs, **named: forward(adapter, module, *inputs, **named)

    def count_backward(accelerator, loss, **options):
        run.losses.append(loss.item())
        backward(accelerator, loss, **options)

    @contextlib.contextmanager
    def count_apart(accelerator, model):
        run.apart += 1
        with no_sync(accelerator, model):
            yield
        run.apart -= 1

    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        sys.modules.update(torchvision_stand_in())
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Accelerator, "backward", count_backward))
        stack.enter_context(mock.patch.object(Accelerator, "no_sync", count_apart))
        if answer is not None:
            stack.enter_context(mock.patch.object(AutoencoderKL, "encode", encode))
            stack.enter_context(mock.patch.object(torch, "randn", fixed_randn))
            stack.enter_context(mock.patch.object(torch, "randn_like", fixed_randn_like))
            for model, adapter in ADAPTERS.items():
                stack.enter_context(mock.patch.object(model, "forward", asked_by(adapter)))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        logging.disable(logging.CRITICAL)
        stack.callback(logging.disable, logging.NOTSET)
        stack.enter_context(mock.patch.object(sys, "path", [str(Path(path).resolve().parent), *sys.path]))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        module_spec = importlib.util.spec_from_file_location(f"port_{Path(path).stem}", path)
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        flags = [*flags, "--max_train_steps", str(STEPS), "--output_dir", folder, "--seed", "0"]
        stack.enter_context(mock.patch.object(sys, "argv", [str(path), *flags]))
        module.args = module.parse_args(flags)  # a global, as where the script runs by itself
        module.main(module.args)
    return run


def check(path, flags, original=None):
    """
    Yield name, whether it passed, and what was found, of every check of the script at `path`, run with `flags`; with
    the script `original` that it was made of, also whether it is this one where SOAR is off.
    """
    try:
        yield from check_runs(path, flags, original)
    except Exception as error:  # of the script, whatever it is
        yield "a run to its end", False, f"{type(error).__name__}: {error}; run the script by itself to see where"


def check_runs(path, flags, original):
    """[`check`], with the script's errors as they are."""
    soar = [*flags, "--lambda_aux", str(LAMBDA), "--trajectory_length", str(NUM_AUX)]
    for answer, name in ((image, "a model that knows the image"), (line, "a model that knows the line")):
        run = run_script(path, soar, answer)
        largest = max(map(abs, run.losses))
        yield f"losses of {name}", largest < ZERO, f"at most {largest:.1e}, of {len(run.losses)}"
    yield from check_forwards(run)

    run = run_script(path, soar, off_by_one)
    steps = split([sigma for sigma, _ in run.asked(grad=True)], run.batch_size * (1 + NUM_AUX))
    sums = {}
    for kind, power in (("velocity", 0), ("data", 2)):
        weights = [[sigma**power for sigma in step] for step in steps]
        sums[kind] = sum(sum(w[: run.batch_size]) + LAMBDA * sum(w[run.batch_size :]) for w in weights)
        sums[kind] /= run.batch_size * (1 + LAMBDA * NUM_AUX)
    base = run_script(path, [*flags, "--lambda_aux", "0"], off_by_one)
    squares = [sigma**2 for sigma, _ in base.asked(grad=True)]
    plain = sum(base.losses) * base.batch_size
    kind = "velocity" if abs(plain - len(squares)) < 1e-4 else "data"
    if kind == "data" and abs(plain - sum(squares)) > 1e-4:
        yield (
            "weights of the losses",
            False,
            "base losses are weighted by sigma: choose another scheme",
        )
    else:
        found, wanted = sum(run.losses), sums[kind]
        yield "weights of the losses", abs(found - wanted) < 1e-4, f"{found:.5f} in all, {wanted:.5f} expected"

    if not run.distilled:
        run = run_script(path, soar, guided)
        shares, rest = [], 0.0
        for call in [call for call in run.calls if call.grad]:
            for state, sigma in zip(call.states, call.sigmas, strict=True):
                off = state - (1 - sigma) * run.latents - sigma * run.noise
                shares.append(float((off * run.latents).sum() / run.latents.square().sum()))
                rest = max(rest, float((off - shares[-1] * run.latents).abs().max()))
        steps = split(shares, run.batch_size * (1 + NUM_AUX))
        off = [share for step in steps for share in step[run.batch_size :]]
        right = rest < 1e-4 and min(off, default=0) >= -1e-4 and max(off, default=0) > 1e-3
        yield "side that guidance leads to", right, f"{min(off, default=0):.4f} to {max(off, default=0):.4f}"

    yield "forwards with --lambda_aux 0", not base.asked(grad=False) and len(base.calls) == STEPS, f"{len(base.calls)}"
    if original:
        ours = run_script(path, [*flags, "--lambda_aux", "0"]).losses
        theirs = run_script(original, flags).losses
        yield "--lambda_aux 0 against the original", ours == theirs, f"{ours} and {theirs}"


def check_forwards(run):
    """Yield what is to be said of the forwards of a run."""
    size, grad, free = run.batch_size, run.asked(grad=True), run.asked(grad=False)
    wanted = STEPS * size * (1 + NUM_AUX), 0 if run.distilled else STEPS * size
    found = len(grad), len(free)
    yield "states, with gradient and without", found == wanted, f"{found}, {wanted} expected"
    captions = {caption for _, caption in free}
    right = len(captions) == (not run.distilled) and not captions & {caption for _, caption in grad}
    yield "the empty caption without gradient, and only there", right, f"{len(captions)} captions without"
    steps = split([caption for _, caption in grad], size * (1 + NUM_AUX))
    right = all(sorted(step[size:]) == sorted(step[:size] * NUM_AUX) for step in steps)
    yield "captions of the auxiliary states", right, "those of their batch" if right else "others than their batch has"
    yield "graphs alive at a time", run.most_alive == 1, str(run.most_alive)
    done, synchronised = 0, []
    for call in (call for call in run.calls if call.grad):
        done += len(call.sigmas)
        synchronised.append((not call.apart) == (done % (size * (1 + NUM_AUX)) == 0))
    yield (
        "only the last backward of a step synchronises",
        all(synchronised),
        f"{sum(synchronised)}/{len(synchronised)}",
    )


def split(values, size):
    return [values[i : i + size] for i in range(0, len(values), size)]


def torchvision_stand_in():
    """Enough of `torchvision.transforms` for diffusers' examples where it is not installed; pixels do not count."""

    def keep(image, *rest, **options):
        return image

    def resize(image, size, **options):
        return image.resize((size, size) if isinstance(size, int) else tuple(size)[::-1])

    def to_tensor(image):
        return torch.zeros(3, image.height, image.width)

    class Transform:
        def __init__(self, *inputs, **options):
            self.inputs = inputs

        def __call__(self, image):
            return keep(image)

        @staticmethod
        def get_params(image, output_size):
            return 0, 0, *output_size

    class Resize(Transform):
        def __call__(self, image):
            return resize(image, *self.inputs)

    class ToTensor(Transform):
        def __call__(self, image):
            return to_tensor(image)

    class Compose(Transform):
        def __call__(self, image):
            for transform in self.inputs[0]:
                image = transform(image)
            return image

    package, transforms, functional = (
        types.ModuleType(f"torchvision{name}") for name in ("", ".transforms", ".transforms.functional")
    )
    vars(functional).update(crop=keep, hflip=keep, normalize=keep, resize=resize, to_tensor=to_tensor)
    vars(transforms).update(
        dict.fromkeys(("CenterCrop", "Normalize", "RandomCrop", "RandomHorizontalFlip"), Transform)
    )
    vars(transforms).update(Compose=Compose, Resize=Resize, ToTensor=ToTensor, functional=functional)
    transforms.InterpolationMode = types.SimpleNamespace(BILINEAR=None, LANCZOS=None)
    package.transforms, package.__spec__ = transforms, importlib.util.spec_from_loader("torchvision", None)
    return {module.__name__: module for module in (package, transforms, functional)}


def main():
    parser = argparse.ArgumentParser(description="Check that SOAR was put into a training script rightly.")
    parser.add_argument("script", type=Path, help="The script with SOAR.")
    parser.add_argument("--original", type=Path, help="The script without it.")
    parser.add_argument("flags", nargs="+", metavar="-- FLAGS", help="Of the script, for a short run.")
    args = parser.parse_args()
    for path in (args.script, args.original):
        if path and not path.is_file():
            parser.error(f"{path}: no such file")
    wrong = 0
    for name, right, found in check(args.script, args.flags, args.original):
        print(f"{'right' if right else 'WRONG'}  {name}: {found}", flush=True)
        wrong += not right
    sys.exit(f"error: {wrong} checks failed" if wrong else 0)


if __name__ == "__main__":
    main()
