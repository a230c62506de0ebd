# SPDX-License-Identifier: Apache-2.0
"""
Count and time optimizer steps of the training scripts, one configuration after the other in one process.

    python examples/make_tiny_sd3.py outputs/medium --size medium     # or --configs_only, to count and not to time
    python examples/benchmark/benchmark_step.py outputs/medium --output outputs/benchmark/step.json \
        "reference --mixed_precision bf16 --gradient_checkpointing" \
        "soar --mixed_precision bf16 --cache_latents --cache_prompt_embeds" \
        "sft --mixed_precision bf16 --cache_latents --cache_prompt_embeds"

A configuration is a method (sft, soar, soar_lora, or reference: the authors' way to put the step together, see
`reference_step.py`) and flags of its script. Data and weights are random, which changes no time; only encoders and a
quantised model are read from the pipeline.

Counted, on tensors without memory, so on any machine and for any size: floating-point operations of the transformer,
as multiples of one forward, and the bytes alive at the peak of the step. The count knows no allocator, no workspace
and no kernels; it is a lower bound of what a GPU uses. Timed, on the device that is there, CPU included: the step, its
encoding where nothing is cached, and on a GPU the model-FLOP utilisation against a large matrix product's measured
rate, the peak memory, and with --profile where the time of one more step goes, kernel by kernel.
"""

import argparse
import contextlib
import functools
import importlib
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
import weakref
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.training_utils import free_memory
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm.auto import tqdm
from transformers import AutoConfig, CLIPTextModelWithProjection, T5EncoderModel


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_sd3_soar as script  # noqa: E402


METHODS = {
    "sft": "train_sd3_sft",
    "soar": "train_sd3_soar",
    "soar_lora": "train_sd3_soar_lora",
    "reference": "train_sd3_soar",
}
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight, an 8-bit scale every 64, its float32 scale every 256 of them
GIB, TERA = 2**30, 1e12


def attention_flop(query, key, value, *rest, out_shape=None, **more):
    return sdpa_flop_count(query, key, value)


def attention_backward_flop(gradient, query, key, value, *rest, out_shape=None, **more):
    return 2 * sdpa_flop_count(query, key, value)  # the model's: without what the kernel computes a second time


# The CPU's attention, which `FlopCounterMode` does not know.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flop,
}


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were made inside the block and are alive: now, and at most so far."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        if id(storage) not in self.known:
            self.known.add(id(storage))
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, id(storage), storage.nbytes())

    def remove(self, key, size):
        self.known.discard(key)
        self.now -= size


class Configuration:
    """
    A method, the flags of its script and a pipeline.

    Args:
        text (`str`): For example `"soar --mixed_precision bf16"`.
        folder (`Path`): Of the pipeline; its weights are read for timing only.
    """

    def __init__(self, text, folder):
        with script.failing_with(repr(text)):
            method, *flags = shlex.split(text) or [""]
        if method not in METHODS:
            raise SystemExit(f"error: {text!r}: the first word must be one of {', '.join(METHODS)}")
        self.text, self.folder = text, str(folder)
        self.script = importlib.import_module(METHODS[method])
        self.training_losses = self.script.training_losses
        if method == "reference":
            for flag in ("--num_rollout_paths", "--sigma_upper_ratio", "--aux_batch_size", "--cfg_scale_sampling"):
                if flag in [word.split("=")[0] for word in flags]:
                    raise SystemExit(f"error: {text!r}: the reference step does not know {flag}")
            self.training_losses = importlib.import_module("reference_step").training_losses
        required = ["--pretrained_model_name_or_path", self.folder, "--train_data_dir", os.path.dirname(__file__)]
        self.args = self.script.parse_args([*required, "--seed", "0", "--max_train_steps", "1", *flags])
        self.weight_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(
            self.args.mixed_precision, torch.float32
        )
        self.nf4 = getattr(self.args, "bnb_quantization_config_path", None)
        self.config = SD3Transformer2DModel.load_config(folder, subfolder="transformer")
        self.vae_config = AutoencoderKL.load_config(folder, subfolder="vae")
        self.vae_scale = {name: self.vae_config[name] for name in ("scaling_factor", "shift_factor")}
        most = self.config["pos_embed_max_size"] * self.config["patch_size"] * self.pixels
        if self.args.resolution > most or self.args.resolution % 16:
            raise SystemExit(f"error: {text!r}: --resolution must be divisible by 16, and at most {most} for {folder}")

    @property
    def pixels(self):
        """Width and height of what a latent stands for."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    def make_accelerator(self, **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return Accelerator(mixed_precision=self.args.mixed_precision or "no", **options)

    def make_batch(self):
        """A random batch as the data loader gives it, with pixels and captions where the flags cache nothing."""
        size, args = self.args.train_batch_size, self.args
        side, channels = args.resolution // self.pixels, 2 * self.vae_config["latent_channels"]
        batch = {"seed": list(range(size)), "drop": torch.zeros(size, dtype=torch.bool)}
        batch["caption"] = ["a photo of a clock on a wooden table"] * size
        if args.cache_latents:
            batch["moments"] = torch.randn(size, channels, side, side)
        else:
            batch["pixels"] = torch.zeros(size, 3, args.resolution, args.resolution, dtype=torch.uint8)
        if args.cache_prompt_embeds:
            batch |= {name: tensor.expand(size, *tensor.shape[1:]) for name, tensor in self.null_embeds().items()}
        return batch

    def null_embeds(self):
        clip = AutoConfig.from_pretrained(os.path.join(self.folder, "text_encoder"))
        tokens = clip.max_position_embeddings + self.args.max_sequence_length
        return {
            "prompt_embeds": torch.zeros(1, tokens, self.config["joint_attention_dim"], dtype=self.weight_dtype),
            "pooled_prompt_embeds": torch.zeros(1, self.config["pooled_projection_dim"], dtype=self.weight_dtype),
        }

    def encoder_bytes(self):
        """Size of the encoders that the flags keep on the device during the step."""
        if self.args.offload:
            return 0
        size = 0
        with torch.device("meta"):
            if not self.args.cache_prompt_embeds:
                parts = ("text_encoder", "text_encoder_2", "text_encoder_3")
                for part in parts[:-1] if self.args.no_text_encoder_3 else parts:
                    config = AutoConfig.from_pretrained(os.path.join(self.folder, part))
                    model = (T5EncoderModel if part == "text_encoder_3" else CLIPTextModelWithProjection)(config)
                    size += sum(parameter.numel() for parameter in model.parameters()) * self.weight_dtype.itemsize
            if not self.args.cache_latents:
                vae = AutoencoderKL.from_config(self.vae_config)
                size += sum(parameter.numel() for parameter in vae.parameters()) * torch.float32.itemsize
        return size

    def load(self, compile):
        """The transformer, as `main` makes it."""
        transformer = self.script.load_transformer(self.args, self.folder, self.weight_dtype)
        if self.args.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        if compile:
            torch.compiler.reset()  # as in a process of its own
            torch._dynamo.config.recompile_limit = 16
            for block in transformer.transformer_blocks:
                block.compile(dynamic=False)
        return transformer.train()

    def prepare(self, accelerator, transformer, make_optimizer=None, device_placement=None):
        """The transformer and its optimizer, ready to train, and the trained parameters."""
        parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        make_optimizer = make_optimizer or functools.partial(self.script.make_optimizer, self.args)
        optimizer = make_optimizer(parameters)
        return *accelerator.prepare(transformer, optimizer, device_placement=device_placement), parameters

    def backward(self, accelerator, transformer, batch):
        predict = functools.partial(self.script.predict_velocity, transformer, batch)
        sync = functools.partial(self.script.gradient_sync, accelerator, transformer, True)
        for loss, _ in self.training_losses(self.args, predict, batch["latents"], batch["generators"], 3.0, sync):
            accelerator.backward(loss)

    def count(self):
        """What the step needs, by its operations on tensors without memory."""
        checkpointing, encoders, flags = self.args.gradient_checkpointing, self.encoder_bytes(), vars(self.args).copy()
        self.args.cache_latents = self.args.cache_prompt_embeds = True  # the encoders are counted by their size alone
        self.args.gradient_checkpointing = False
        if self.nf4:  # quantising needs a GPU: counted in bf16, and the difference of the weights taken off
            self.args.bnb_quantization_config_path = None
        model = self.count_once()
        executed, memory = model["operations"], model
        if checkpointing:
            self.args.gradient_checkpointing = True
            executed = self.count_once()["operations"]
            memory = self.count_once(operations=False)  # `FlopCounterMode` keeps alive what checkpointing would free
        vars(self.args).update(flags)
        return {
            "trained_parameters": model["trained"],
            "tflop": executed / TERA,
            "model_tflop": model["operations"] / TERA,
            "forward_equivalents": executed / model["one_forward"] / self.args.train_batch_size,
            "weights_gib": memory["weights"] / GIB,
            "peak_gib": (memory["peak"] + encoders) / GIB,
        }

    def count_once(self, operations=True):
        counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
        with weights_from_configs(torch.device("meta")), torch.device("meta"):
            transformer = self.load(compile=False)
        with FakeTensorMode(allow_non_fake_inputs=True), cuda_autocast(), LiveBytes() as live:
            transformer.to_empty(device="cpu")
            accelerator = self.make_accelerator(cpu=True)
            # Optimizers with 8-bit state need real memory: instead of a call, two bytes a weight are added below.
            eight_bit = self.args.use_8bit_adam or self.args.full_bf16
            stand_in = torch.optim.SGD if eight_bit else None
            transformer, optimizer, parameters = self.prepare(accelerator, transformer, stand_in, [False, False])
            weights, trained = live.now, sum(parameter.numel() for parameter in parameters)
            vae = SimpleNamespace(config=SimpleNamespace(**self.vae_scale))
            batch = self.script.prepare_batch(
                self.make_batch(), self.null_embeds(), vae, None, self.args.max_sequence_length, torch.device("cpu")
            )
            if not eight_bit:  # from the first step on the optimizer has its state
                for parameter in parameters:
                    parameter.grad = torch.zeros_like(parameter)
                optimizer.step()
                optimizer.zero_grad()
            live.peak = live.now
            with counter if operations else contextlib.nullcontext():
                self.backward(accelerator, transformer, batch)
            accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)
            if not eight_bit:
                optimizer.step()
            peak = live.peak + (2 * trained if eight_bit else 0)
            if self.nf4:
                linear = [module.weight for module in transformer.modules() if isinstance(module, torch.nn.Linear)]
                quantized = sum(weight.numel() for weight in linear if not weight.requires_grad)
                saved = quantized * (self.weight_dtype.itemsize - NF4_BYTES)
                peak, weights = peak - saved, weights - saved
            with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as one, torch.no_grad():
                transformer(
                    hidden_states=batch["latents"][:1],
                    timestep=torch.zeros(1),
                    encoder_hidden_states=batch["prompt_embeds"][:1],
                    pooled_projections=batch["pooled_prompt_embeds"][:1],
                )
        return {
            "peak": peak,
            "weights": weights,
            "trained": trained,
            "operations": counter.get_total_flops(),
            "one_forward": one.get_total_flops(),
        }

    def measure(self, warmup, steps, model_operations, rate, profile=False):
        """The step on the device, in seconds; on a GPU also its peak memory in GiB."""
        accelerator = self.make_accelerator()
        device, cuda = accelerator.device, accelerator.device.type == "cuda"
        text_encoders, vae = None, SimpleNamespace(config=SimpleNamespace(**self.vae_scale))
        if not self.args.cache_prompt_embeds:
            dim = self.config["joint_attention_dim"]
            text_encoders = self.script.load_text_encoders(self.args, self.folder, self.weight_dtype, dim, device)
        if not self.args.cache_latents:
            vae = AutoencoderKL.from_pretrained(self.folder, subfolder="vae", use_safetensors=True)
            vae.requires_grad_(False).to("cpu" if self.args.offload else device)
        with contextlib.nullcontext() if self.nf4 else weights_from_configs(device):
            transformer = self.load(self.args.torch_compile)
        transformer, optimizer, parameters = self.prepare(accelerator, transformer)
        null_embeds = {name: tensor.to(device) for name, tensor in self.null_embeds().items()}
        length = self.args.max_sequence_length
        cpu_batch, seconds = self.make_batch(), []

        def take_step():
            batch = self.script.prepare_batch(dict(cpu_batch), null_embeds, vae, text_encoders, length, device)
            self.backward(accelerator, transformer, batch)
            accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            synchronize(cuda)

        for step in tqdm(range(warmup + steps), desc=self.text[:60], unit="step", leave=False):
            if step == warmup and cuda:
                torch.cuda.reset_peak_memory_stats()
            synchronize(cuda)
            started = time.perf_counter()
            take_step()
            seconds.append(time.perf_counter() - started)
        step = statistics.median(seconds[warmup:])
        result = {
            "first_step_s": seconds[0],
            "step_s": step,
            "samples_per_second": self.args.train_batch_size / step,
            "model_flop_utilisation": model_operations / step / rate,
            "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB if cuda else None,
            "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB if cuda else None,
        }
        if profile:
            with profiled_kernels() as result["profile"]:
                take_step()
        accelerator.free_memory()
        return result


def weights_from_configs(device):
    """Inside the block a transformer is made from its config on `device`, unquantised, instead of being read."""

    def from_pretrained(cls, folder, subfolder=None, dtype=torch.float32, **unused):
        with device:
            return cls.from_config(cls.load_config(folder, subfolder=subfolder)).to(dtype), {"missing_keys": []}

    return mock.patch.object(SD3Transformer2DModel, "from_pretrained", classmethod(from_pretrained))


def cuda_autocast():
    """On a GPU autocast computes layer norms in float32, on a CPU it does not: inside the block as on a GPU."""
    original = torch.nn.functional.layer_norm

    def layer_norm(x, *inputs, **more):
        return original(x.float() if torch.is_autocast_enabled("cpu") else x, *inputs, **more)

    return mock.patch.object(torch.nn.functional, "layer_norm", layer_norm)


# What a kernel of a GPU is for, by its name; the first that fits.
KERNELS = {
    "attention": "flash|fmha|attention|sdpa",
    "matrix products": "gemm|nvjet|cutlass|xmma|wgmma|cublas|splitk",
    "optimizer and gradient norm": "multi_tensor|adam|foreach|norm_lp|lpnorm",
    "norms": "norm",
    "copies and casts": "memcpy|memset|copy|cast",
    "compiled, all else": "triton",
    "other": "",
}


@contextlib.contextmanager
def profiled_kernels():
    """
    What the GPU does inside the block: `dict` of seconds by what kernels are for, of those that took longest, and of
    the time when it had nothing to do; filled at the block's end.
    """
    result = {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        started = time.perf_counter()
        yield result
        synchronize(True)
        elapsed = time.perf_counter() - started
    kinds, names = dict.fromkeys(KERNELS, 0.0), Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            seconds = event.time_range.elapsed_us() / 1e6
            kinds[next(kind for kind, words in KERNELS.items() if re.search(words, event.name.lower()))] += seconds
            names[event.name[:120]] += seconds
    idle = elapsed - sum(kinds.values())
    result |= {"profiled_s": elapsed, "idle_s": idle, "kinds_s": kinds, "longest_s": dict(names.most_common(25))}


def synchronize(cuda):
    if cuda:
        torch.cuda.synchronize()


def matmul_rate(device, dtype, size):
    """Operations per second of a large square matrix product, the best of eight runs of ten: a cold GPU is slow."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best = 0.0
    for _ in range(8):
        torch.mm(a, b)
        synchronize(device.type == "cuda")
        started = time.perf_counter()
        for _ in range(10):
            torch.mm(a, b)
        synchronize(device.type == "cuda")
        best = max(best, 10 * 2 * size**3 / (time.perf_counter() - started))
    return best


def main():
    parser = argparse.ArgumentParser(description="Count and time optimizer steps of the training scripts.")
    parser.add_argument("pipeline", type=Path, help="Folder of an SD3 pipeline; configs are enough for --count_only.")
    parser.add_argument("configurations", nargs="+", help='Quoted, for example "soar --mixed_precision bf16".')
    parser.add_argument("--output", type=Path, required=True, help="JSON file; what is in it is not run again.")
    parser.add_argument("--count_only", action="store_true", help="Time nothing.")
    parser.add_argument(
        "--counted", type=Path, nargs="*", default=[], help="Earlier --output; what it has is not counted again."
    )
    parser.add_argument("--profile", action="store_true", help="On a GPU: list the kernels of one more step.")
    parser.add_argument("--warmup", type=script.number(int, 0), default=3, help="Steps before the timed ones.")
    parser.add_argument("--steps", type=script.number(int, 1), default=10, help="Timed steps; the median counts.")
    options = parser.parse_args()
    if not (options.pipeline / "transformer" / "config.json").exists():
        parser.error(f"{options.pipeline} holds no transformer/config.json; make_tiny_sd3.py makes a pipeline")
    if not options.count_only and not list((options.pipeline / "transformer").glob("*.safetensors")):
        parser.error(f"{options.pipeline} holds no weights: give --count_only, or make it without --configs_only")
    if options.profile and not torch.cuda.is_available():
        parser.error("--profile lists the kernels of a GPU, and there is none")

    with script.failing_with(f"--output {options.output}"):
        options.output.parent.mkdir(parents=True, exist_ok=True)
    counts = {}
    for path in options.counted:
        with script.failing_with(f"--counted {path} holds no results of this script"):
            counts |= {
                result["configuration"]: result["counted"] for result in json.loads(path.read_text())["results"]
            }
    configurations = [Configuration(text, options.pipeline) for text in options.configurations]
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = configurations[0].weight_dtype
    machine = {
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "accelerate")},
    }
    rate, done = None, []
    if not options.count_only:
        rate = matmul_rate(device, dtype, 8192 if cuda else 1024)
        machine["matmul_tflops"] = rate / TERA
    document = {"pipeline": options.pipeline.name, "machine": machine, "results": []}
    if options.output.exists():
        with script.failing_with(f"--output {options.output} holds something else than results of this script"):
            before = json.loads(options.output.read_text())
            done = [result["configuration"] for result in before["results"]]
            known = {name: before["machine"][name] for name in ("device", "versions")} | {"name": before["pipeline"]}
        if known != {name: machine[name] for name in ("device", "versions")} | {"name": document["pipeline"]}:
            parser.error(f"{options.output} is of another machine or pipeline: choose another file, or remove it")
        document = before
    configurations = [configuration for configuration in configurations if configuration.text not in done]
    for configuration in tqdm(configurations, desc="Configurations"):
        counted = counts.get(configuration.text.replace(" --torch_compile", "")) or configuration.count()
        measured = None
        if not options.count_only:
            model_operations = counted["model_tflop"] * TERA
            try:
                measured = configuration.measure(
                    options.warmup, options.steps, model_operations, rate, options.profile
                )
            except torch.OutOfMemoryError:
                measured = "out of memory"
            free_memory()  # else the next configuration is charged for this one
        document["results"].append({"configuration": configuration.text, "counted": counted, "measured": measured})
        options.output.write_text(json.dumps(document, indent=1) + "\n")
        tqdm.write(f"{configuration.text}: {json.dumps(counted)} {json.dumps(measured)}")


if __name__ == "__main__":
    main()
