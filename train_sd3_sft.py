#!/usr/bin/env python
# Copyright 2026 The SOAR for SD3.5 authors.
# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.9", "diffusers>=0.40", "transformers>=5.6", "accelerate>=1.13", "peft>=0.19", "datasets>=4.0",
#     "safetensors>=0.8", "bitsandbytes>=0.50; sys_platform != 'darwin'", "sentencepiece", "protobuf", "tensorboard",
# ]
# ///
"""
Fine-tune all weights of a Stable Diffusion 3 / 3.5 transformer with plain flow matching (SFT).

    python train_sd3_sft.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-3.5-medium \
        --train_data_dir my_images --resolution 512 --center_crop --cache_latents --cache_prompt_embeds \
        --mixed_precision bf16 --train_batch_size 4 --learning_rate 2e-5 --max_train_steps 5000 \
        --validation_prompt "a photo of two clocks" --output_dir sd35-sft

The baseline of `train_sd3_soar.py`: the same data, noise and order for the same seed, without SOAR's correction of
the model's own sampling errors. `diff train_sd3_sft.py train_sd3_soar.py` shows the whole method.

Needs `soar_utils.py` and `data_utils.py` beside it, nothing else. Source: rectified flow and SD3, arXiv 2403.03206.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import unicodedata
import warnings
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace


logging.disable(logging.WARNING)  # libraries' remarks while they are imported, on what this script does not use
import accelerate
import datasets
import diffusers
import filelock
import huggingface_hub
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import convert_outputs_to_fp32
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline, training_utils
from diffusers.hooks import apply_group_offloading
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import distribute_tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer

import data_utils
import soar_utils


logging.disable(logging.NOTSET)
logger = get_logger(__name__)
output_lock = contextlib.ExitStack()  # held as long as a run may write into its --output_dir

# Flags, and versions, that may differ when a run is resumed: they do not change what is trained, or what they name is
# compared by its content. All others may not. (The end of a schedule may not move either, see `check_resume`.)
FREE_ON_RESUME = """
    accelerate allow_resume_changes aux_batch_size cache_batch_size cache_dir cache_prompt_embeds caption_column
    check_images checkpointing_steps checkpoints_total_limit dataloader_num_workers dataset_config_name
    dataset_name dataset_split diffusers gradient_accumulation_steps gradient_checkpointing guidance_scale hub_model_id
    hub_private hub_token image_column image_dir instance_prompt jsonl_path max_skipped_steps max_train_samples
    max_train_steps min_image_side num_inference_steps num_train_epochs num_validation_images offload offload_ema
    output_dir overwrite_output_dir push_to_hub report_to resume_from_checkpoint save_dtype skip_bad_images
    skip_final_inference torch torch_compile train_data_dir transformers validation_height validation_prompt
    validation_steps validation_width
""".split()
KEPT_ON_RESUME = "adam_|full_bf16|lora|optimizer|prodigy_|rank|transformer|use_8bit|use_dora|use_ema"


def parse_args(input_args=None):
    """Command line of this script; prints one line and exits with code 2 on a mistake. The groups are the manual."""
    about = {"description": __doc__.strip().split("\n")[0], "usage": "%(prog)s ARGUMENTS, see --help"}
    parser = argparse.ArgumentParser(**about, allow_abbrev=False)

    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", required=True, help="Hub id or folder of an SD3 / SD3.5 pipeline.")
    add("--revision", help="Hub revision of the model.")
    add("--transformer", help="Folder or hub id of a full fine-tune of it, to start from: `transformer/` in there.")
    add("--variant", help="Variant of the weight files, for example fp16.")
    add("--no_text_encoder_3", action="store_true", help="Leave the T5 encoder out; the pipeline feeds zeros instead.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: what `accelerate config` says.")
    add("--gradient_checkpointing", action="store_true", help="Recompute activations: less memory, a third slower.")
    add("--torch_compile", action="store_true", help="Compile the blocks: slow first steps, then faster ones.")
    add("--allow_tf32", action="store_true", help="TF32 matrix products for float32 on Ampere and newer GPUs.")

    add = parser.add_argument_group("data (--dataset_name, --train_data_dir, or --jsonl_path)").add_argument
    add("--dataset_name", help="Hub id or folder for `datasets.load_dataset`, or a folder of `save_to_disk`.")
    add("--dataset_config_name", help="With --dataset_name: its configuration.")
    add("--dataset_split", default="train", help="With --dataset_name: its split.")
    add("--train_data_dir", help="Folder of images, with NAME.txt beside each, or `metadata.jsonl` or `metadata.csv`.")
    add("--jsonl_path", help='Lines {"md5": ..., "caption_en": ..., "bw": 512, "bh": 512}.')
    add("--image_dir", help="With --jsonl_path: the folder of its images, `{md5}.jpg`, .jpeg, .png, .webp.")
    add("--image_column", default="image", help="Of --dataset_name; of the metadata of --train_data_dir: file_name.")
    add("--caption_column", default="text", help="Of --dataset_name, and of the metadata of --train_data_dir.")
    add("--instance_prompt", help="Caption of every image that has none, such as: a photo of sks dog.")
    add("--max_train_samples", type=number(int, 1), help="Use the first N images.")
    add("--skip_bad_images", action="store_true", help="Drop and count images that cannot be read, instead of ending.")
    add("--min_image_side", type=number(int, 1), default=1, help="Drop and count images with a shorter side.")
    add("--resolution", type=number(int, 16), default=512, help="Size in pixels.")
    add("--center_crop", action="store_true", help="Crop the centre instead of a random part.")
    add("--random_flip", action="store_true", help="Mirror half of the images.")
    add("--use_aspect_ratio_buckets", action="store_true", help="Train at several shapes of about --resolution^2.")
    add("--aspect_ratio_buckets", help='The shapes, as "height,width;height,width"; implies the flag above.')
    add("--max_sequence_length", type=number(int, 1, 512), default=256, help="T5 tokens; sample with as many.")
    add("--cond_dropout_rate", "--caption_dropout", type=number(float, 0, 1), default=0.0, help="Share left empty.")
    add("--cache_latents", action="store_true", help="Encode every image once, to disk; keeps one crop an image.")
    add("--cache_prompt_embeds", action="store_true", help="Encode every caption once, to disk.")
    add("--cache_dir", help="Folder of what is computed once, shared by runs. Default: OUTPUT_DIR/cache.")
    add("--cache_batch_size", type=number(int, 1), default=1, help="Images or captions encoded at once for them.")
    add("--check_images", action="store_true", help="Check images again that --cache_dir knows as good.")
    add("--offload", action="store_true", help="For small cards: encoders stay on the CPU between uses.")
    add("--dataloader_num_workers", type=number(int, 0), default=0)

    add = parser.add_argument_group("training").add_argument
    add("--output_dir", default="sd3-sft")
    add("--overwrite_output_dir", action="store_true", help="Delete the result and checkpoints of another run there.")
    add("--seed", type=number(int, 0, 2**63 - 1), help="Drawn and logged when absent.")
    add("--train_batch_size", type=number(int, 1), default=4, help="Images per process and forward.")
    add("--gradient_accumulation_steps", type=number(int, 1), default=1)
    add("--num_train_epochs", type=number(int, 1), default=1)
    add("--max_train_steps", type=number(int, 1), help="Optimizer steps; replaces --num_train_epochs.")
    add("--learning_rate", type=number(float, 0), help="Default: 2e-5; with prodigy, which finds the rest, 1.")
    add("--lr_scheduler", choices=[name.value for name in SchedulerType], default="constant")
    add("--lr_warmup_steps", type=number(int, 0), default=0)
    add("--lr_num_cycles", type=number(int, 1), default=1, help="With --lr_scheduler cosine_with_restarts: how many.")
    add("--lr_power", type=number(), default=1.0, help="With --lr_scheduler polynomial: its power.")
    add("--lr_step_rules", help="With --lr_scheduler piecewise_constant: 1:10,0.1 is x1 up to step 10, x0.1 after.")
    add("--optimizer", type=str.lower, choices=["adamw", "prodigy"], default="adamw")
    add("--use_8bit_adam", action="store_true", help="AdamW with 8-bit state (bitsandbytes).")
    add("--full_bf16", action="store_true", help="bf16 weights and 8-bit AdamW (torchao): fits a card of 24 GB.")
    add("--adam_beta1", type=number(float, 0, 0.99999), default=0.9)
    add("--adam_beta2", type=number(float, 0, 0.99999), default=0.999)
    add("--adam_weight_decay", type=number(float, 0), default=1e-2)
    add("--adam_epsilon", type=number(float, 0), default=1e-8)
    add("--prodigy_beta3", type=number(float, 0, 0.99999), help="With --optimizer prodigy: default sqrt(adam_beta2).")
    switch = {"action": argparse.BooleanOptionalAction, "default": True, "help": "With --optimizer prodigy: as named."}
    add("--prodigy_decouple", **switch)
    add("--prodigy_use_bias_correction", **switch)
    add("--prodigy_safeguard_warmup", **switch)
    add("--max_grad_norm", type=number(float, 0), default=1.0, help="0 does not clip.")
    add("--max_skipped_steps", type=number(int, 0), default=0, help="Skip up to N steps in a row that are not finite.")
    add("--weighting_scheme", choices=["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"], default="logit_normal")
    add("--logit_mean", type=number(), default=0.0, help="With --weighting_scheme logit_normal: above 0 more noise.")
    add("--logit_std", type=number(float, 0), default=1.0, help="With --weighting_scheme logit_normal: its spread.")
    add("--mode_scale", type=number(), default=1.29, help="With --weighting_scheme mode: its scale.")
    add("--use_ema", action="store_true", help="Average the weights; validation and the saved model use the average.")
    add("--ema_decay", type=number(float, 0, 1), default=0.9999, help="With --use_ema: its decay.")
    add("--offload_ema", action="store_true", help="With --use_ema: keep it on the CPU between steps.")

    add = parser.add_argument_group("checkpoint and result").add_argument
    add("--checkpointing_steps", type=number(int, 1), default=500, help="Save the whole state every N steps.")
    add("--checkpoints_total_limit", type=number(int, 1), help="Keep the newest N checkpoints.")
    add("--resume_from_checkpoint", help="A checkpoint folder, or `latest`: the newest, if there is one.")
    add("--allow_resume_changes", help="With --resume_from_checkpoint: names of flags that may differ.")
    add("--save_dtype", choices=["bf16", "fp16", "fp32"], help="Of the result. Default: bf16; fp32 where trained so.")

    add = parser.add_argument_group("validation").add_argument
    add("--validation_prompt", action="append", default=[], help="May be given several times.")
    add("--num_validation_images", type=number(int, 0), default=4, help="With --validation_prompt: of each, or 0.")
    add("--validation_steps", type=number(int, 1), default=500, help="With --validation_prompt: sample every N steps.")
    add("--validation_height", type=number(int, 16), help="With --validation_prompt: pixels. Default: --resolution.")
    add("--validation_width", type=number(int, 16), help="With --validation_prompt: pixels. Default: --resolution.")
    add("--num_inference_steps", type=number(int, 1), default=40, help="With --validation_prompt: of each image.")
    add("--guidance_scale", type=number(), default=4.5, help="With --validation_prompt: its guidance.")
    add("--skip_final_inference", action="store_true", help="No validation images at the end.")

    add = parser.add_argument_group("logging and hub").add_argument
    add("--report_to", choices=["none", "all", *LOGGER_TYPE_TO_CLASS], default="tensorboard")
    add("--push_to_hub", action="store_true", help="Upload the result and its card.")
    add("--hub_model_id", help="With --push_to_hub: the repository. Default: the name of --output_dir.")
    add("--hub_private", action="store_true", help="With --push_to_hub: a private one, if it is new.")
    add("--hub_token", help="Better: `hf auth login`, or the HF_TOKEN variable. Never written anywhere.")

    args = parser.parse_args(input_args)
    if args.learning_rate is None:
        args.learning_rate = 1.0 if args.optimizer == "prodigy" else 2e-5
    check_args(parser, args)
    return args


def training_losses(args, predict, latents, generators, shift, sync):
    """
    The flow-matching loss of one batch, in one term. The caller runs `backward` on a term before it asks for the next.

    Args:
        args (`argparse.Namespace`): The group "training" of the command line.
        predict (callable): `predict(noisy_latents, sigma)` is the model's velocity under the captions of the batch,
            with `samples=` under those of these samples, with `null=True` under the empty caption.
        latents (`torch.Tensor` of shape `(B, C, H, W)`): Clean latents, float32, in scaled latent units.
        generators (`list[torch.Generator]`): Of each sample's noise, on the CPU.
        shift (`float`): Of the scheduler.
        sync (callable): `sync(last)` is the context of a forward and its backward; `last` is true at the last of them.

    Yields:
        `tuple[torch.Tensor, dict[str, torch.Tensor]]`: a term, and its share of the values to log, detached.

    Source: SD3, arXiv 2403.03206.
    """
    device, n_base = latents.device, len(latents)

    def unit_noise(generator):
        return torch.randn(latents.shape[1:], generator=generator)

    def sample_u(generator):
        return training_utils.compute_density_for_timestep_sampling(
            args.weighting_scheme, 1, args.logit_mean, args.logit_std, args.mode_scale, generator=generator
        )[0].clamp(soar_utils.U_MIN, 1)

    def sample_losses(velocity, target, sigma):
        weighting = training_utils.compute_loss_weighting_for_sd3(args.weighting_scheme, sigma)
        return soar_utils.flow_matching_loss(velocity, target, weighting)

    # The ideal state: plain flow matching.
    noise = draw(unit_noise, generators, device)
    sigma = soar_utils.shift_sigma(draw(sample_u, generators, device), shift)
    noisy_latents = soar_utils.add_noise(latents, noise, sigma)
    with sync(True):
        velocity = predict(noisy_latents, sigma)
        losses = sample_losses(velocity, noise - latents, sigma)
        yield losses.sum() / n_base, {"loss_base": losses.detach().mean()}


def main(args):
    # Setup
    if args.hub_token:  # there every library finds it, and nothing that is written does
        os.environ["HF_TOKEN"], args.hub_token = args.hub_token, None
    accelerator = make_accelerator(args)
    device = accelerator.device
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    global_batch_size = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    args.cache_dir = args.cache_dir or os.path.join(args.output_dir, "cache")

    # Everything that can be wrong with the input, before any model loads
    model_config = run_on_each(accelerator, check_model, args)
    model_dir = model_config["folder"]
    check_folders(accelerator, args)
    checkpoint, saved_state = run_on_main(accelerator, find_checkpoint, args)
    if args.seed is None:
        seed = saved_state["compared"]["seed"] if checkpoint else random.getrandbits(31)
        args.seed = run_on_main(accelerator, lambda: seed)
    where = f"{accelerator.num_processes} processes on {device}, {str(weight_dtype).removeprefix('torch.')}"
    logger.info(f"Seed {args.seed}, {where}, global batch {global_batch_size}")
    if device.type == "cpu" and model_config["joint_attention_dim"] >= 4096:  # of no model that is a toy
        logger.warning("PyTorch sees no GPU: a step of a model of this size takes minutes.")
    if args.report_to != "none":
        tracked = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in vars(args).items()}
        with failing_with(f"--report_to {args.report_to}"):  # it may ask for a login
            # TensorBoard forgets what a run that was interrupted had logged after its checkpoint.
            options = {"wandb": {"dir": args.output_dir}, "tensorboard": {"purge_step": saved_state["step"] + 1}}
            accelerator.init_trackers(Path(sys.argv[0]).stem, tracked, options)
    rows = run_on_each(accelerator, load_images, args)
    place = accelerator.process_index, accelerator.num_processes
    with failing_with("the images cannot be checked"):  # such as a worker that was killed
        check_images(args, rows, *place, again=args.check_images)
    accelerator.wait_for_everyone()
    inspected = run_on_each(accelerator, inspect_images, args, model_config, rows)
    if len(inspected) < global_batch_size:
        fail(f"{len(inspected)} images are fewer than one global batch of {global_batch_size}")
    if args.max_train_steps is None:
        args.max_train_steps = math.ceil(args.num_train_epochs * len(inspected) / global_batch_size)
    with failing_with(f"--lr_scheduler {args.lr_scheduler} or --lr_step_rules {args.lr_step_rules}"):
        rehearsal = make_lr_scheduler(args, torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate))
        for step in (args.lr_warmup_steps, args.max_train_steps):
            rehearsal.lr_lambdas[0](step)
    if args.lr_warmup_steps >= args.max_train_steps:
        logger.warning(f"--lr_warmup_steps {args.lr_warmup_steps} outlasts the run of {args.max_train_steps} steps.")
    trainer_state = make_trainer_state(args, global_batch_size, inspected)
    if checkpoint:
        run_on_main(accelerator, check_resume, checkpoint, saved_state, trainer_state)
    run_on_main(accelerator, check_room, args, model_config["trained"], saved_state["step"])
    if args.push_to_hub:
        args.hub_model_id = run_on_main(accelerator, make_repository, args)

    # Encoders and caches
    run_on_each(accelerator, download_model, args, model_dir)
    encoder_digests = None
    if args.cache_latents or args.cache_prompt_embeds:
        encoder_digests = run_on_main(accelerator, digest_encoders, args, model_dir, weight_dtype)
    train_dataset = TrainingImages(args, rows, inspected, encoder_digests)
    run_on_main(accelerator, report_truncation, args, model_dir, inspected)
    with loading(args.pretrained_model_name_or_path):
        vae = load_part(AutoencoderKL, model_dir, "vae", args.variant)
    vae.requires_grad_(False).eval().to("cpu" if args.cache_latents or args.offload else device)
    prompts = ["", *args.validation_prompt]
    if args.cache_latents or args.cache_prompt_embeds:
        with failing_with(f"--cache_dir {args.cache_dir} cannot be filled"):
            build_caches(args, accelerator, train_dataset, model_dir, model_config, vae, weight_dtype, prompts)
    prompt_embeds, text_encoders = embed_prompts(
        args, train_dataset, model_dir, model_config, weight_dtype, prompts, device
    )
    null_embeds = {name: tensor[None].to(device) for name, tensor in prompt_embeds[""].items()}
    training_utils.free_memory()

    # Model and optimizer: with FSDP2 the main process reads the weights, and sends each its part
    hidden = not accelerator.is_main_process
    sent = accelerator.is_fsdp2 and not isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy)
    load = loading(args.pretrained_model_name_or_path, checkpoint)(load_transformer)
    transformer = run_on_each(accelerator, load, args, model_dir, weight_dtype, checkpoint, sent and hidden)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.torch_compile:
        # Every kind of block is compiled for every size: with gradient, without, for a last chunk, for validation.
        # Whole, too, under DDP, which would cut the graphs along its buckets.
        torch._dynamo.config.optimize_ddp = False
        torch._dynamo.config.recompile_limit = 16 * len({*map(tuple, inspected["size"][:])})
        for block in transformer.transformer_blocks:
            block.compile(dynamic=False)
    transformer.train()
    with failing_with(f"--optimizer {args.optimizer}"):
        optimizer = make_optimizer(args, [p for p in transformer.parameters() if p.requires_grad])
    state = transformer.state_dict() if sent and not hidden else {}
    transformer, optimizer = accelerator.prepare(transformer, optimizer)
    if sent:
        set_model_state_dict(transformer, state, options=StateDictOptions(True, broadcast_from_rank0=True))
        del state
    parameters = [p for p in transformer.parameters() if p.requires_grad]  # with FSDP2 others: sharded ones
    if accelerator.is_fsdp2 and accelerator.mixed_precision != "no":
        transformer.forward = convert_outputs_to_fp32(accelerator.autocast()(transformer.forward))
    ema = None
    if args.use_ema:
        ema = training_utils.EMAModel(parameters, decay=args.ema_decay)
        ema.to("cpu" if args.offload_ema else device, dtype=torch.float32)  # bf16 would lose its small steps
    # Of the model, a checkpoint has what `save_transformer` writes, and `load_transformer` reads it.
    write = functools.partial(save_transformer, accelerator, transformer)
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: (write(folder), weights.clear()))
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
    if checkpoint:
        with loading(args.pretrained_model_name_or_path, checkpoint):
            accelerator.load_state(checkpoint)
            if ema is not None:
                load_ema(ema, checkpoint)
        logger.info(f"Resumed from {checkpoint}")
    global_step = saved_state["step"]
    skipped_steps = saved_state.get("skipped_steps", 0)
    lr_scheduler = make_lr_scheduler(args, optimizer.optimizer, global_step)
    batches = iter(make_dataloader(args, accelerator, train_dataset, global_step))
    if accelerator.is_main_process and args.overwrite_output_dir and not args.resume_from_checkpoint:
        for path in old_results(args.output_dir):  # only now that everything has loaded and nothing can be wrong
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    epochs = args.max_train_steps * global_batch_size / len(inspected)
    trained = sum(parameter.numel() for parameter in parameters)
    logger.info(f"{trained:,} trained parameters, {args.max_train_steps} steps, {epochs:.1f} epochs")

    # Training
    validating = args.validation_prompt and args.num_validation_images > 0
    save = functools.partial(save_checkpoint, accelerator, ema, trainer_state, args)
    signals = collect_stop_signals()
    if args.dataloader_num_workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's would raise in any line; `next` sees a dead worker
    progress = tqdm(desc="Training", total=args.max_train_steps, initial=global_step, unit="step", disable=hidden)
    limit_waits(minutes=30)
    batch, whole = None, True  # whether the weights are those after `global_step` steps
    try:
        while global_step < args.max_train_steps:
            started = time.perf_counter()
            sums = defaultdict(float)  # of what is logged, on the device
            names, failure = [], None
            for micro_step in range(1, args.gradient_accumulation_steps + 1):
                try:
                    data = next(batches) if failure is None else None
                except Exception as error:  # an image vanished, a worker was killed
                    failure = str(error).strip().split("\n")[-1]
                    if batch is None:
                        fail(failure)
                if failure is None:  # else the others wait for this process: it goes on with the batch before
                    batch = prepare_batch(data, null_embeds, vae, text_encoders, args.max_sequence_length, device)
                names += batch["name"]
                last_batch = micro_step == args.gradient_accumulation_steps
                predict = functools.partial(predict_velocity, transformer, batch)
                sync = functools.partial(gradient_sync, accelerator, transformer, last_batch)
                latents, generators = batch["latents"], batch["generators"]
                for loss, shares in training_losses(args, predict, latents, generators, model_config["shift"], sync):
                    accelerator.backward(loss)
                    for name, share in {"loss": loss.detach(), **shares}.items():
                        sums[name] += share / args.gradient_accumulation_steps
            grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
            if hasattr(grad_norm, "full_tensor"):  # FSDP2 gives a sharded tensor, DeepSpeed a float or nothing
                grad_norm = grad_norm.full_tensor()
            sums["grad_norm"] = torch.as_tensor(0.0 if grad_norm is None else grad_norm, device=device)
            # What happens to one process stops all.
            sums["signals"] = torch.tensor(float(len(signals)), device=device)
            sums["failures"] = torch.tensor(float(failure is not None), device=device)
            # The one place of the step where the host waits for the device.
            means = accelerator.reduce(torch.stack([*sums.values()]), "mean").tolist()
            logs = dict(zip(sums, means, strict=True))
            stopping = logs.pop("signals") > 0
            if logs.pop("failures") > 0:
                failures = "; ".join(filter(None, accelerate.utils.gather_object([failure])))
                if global_step > saved_state["step"]:
                    save()
                fail(f"step {global_step + 1} was not taken: {failures}. {last_checkpoint(args.output_dir)}")
            # fp16's scaler deals with a gradient that is not finite itself.
            checked = logs if accelerator.scaler is None else logs.keys() - {"grad_norm"}
            if not all(math.isfinite(logs[name]) for name in checked):
                skipped_steps += 1
                names = ", ".join(accelerate.utils.gather_object(names))
                what = f"step {global_step + 1}: not finite ({logs}); samples {names}"
                if skipped_steps > args.max_skipped_steps:
                    fail(f"{what}. The step was not taken. {last_checkpoint(args.output_dir)}")
                logger.warning(f"Skipped {what}")
                if accelerator.scaler is not None:
                    accelerator.scaler.update()  # else it takes the next step's gradients for this one's
            else:
                skipped_steps = 0
                # The rounding of --full_bf16: alike on all processes, and after a restart.
                torch.manual_seed(data_utils.derive_seed(args.seed, "rounding", global_step))
                whole = False
                optimizer.step()
                if ema is not None:
                    ema.to(device)
                    ema.step(parameters)
                    ema.to("cpu" if args.offload_ema else device)
            logs["lr"] = float(lr_scheduler.get_last_lr()[0] * optimizer.param_groups[0].get("d", 1))  # of Prodigy
            logs["skipped_steps"] = skipped_steps
            lr_scheduler.step()
            optimizer.zero_grad()
            global_step += 1
            trainer_state |= {"step": global_step, "skipped_steps": skipped_steps}
            whole = True
            logs["samples_per_second"] = global_batch_size / (time.perf_counter() - started)
            with optional("Logging"):
                accelerator.log(logs, step=global_step)
            progress.update()
            progress.set_postfix(loss=logs["loss"], lr=logs["lr"])

            if global_step % args.checkpointing_steps == 0 or stopping:
                save()
            if stopping:
                accelerator.end_training()
                logger.info(f"Stopped by a signal after step {global_step}; --resume_from_checkpoint latest goes on.")
                sys.exit(EXIT_INTERRUPTED)
            if validating and global_step % args.validation_steps == 0 and global_step < args.max_train_steps:
                with averaged_weights(ema, parameters):
                    log_validation(args, accelerator, transformer, vae, model_dir, prompt_embeds, global_step, signals)
    except Exception:
        if whole and global_step > saved_state["step"] and accelerator.num_processes == 1:  # others would wait
            with optional("A checkpoint of the last whole step"):
                save()
        raise
    finally:
        progress.close()
    on_stop_signals(signal.SIG_DFL)
    limit_waits(hours=12)  # for the upload of the result

    # Result: first what the run was for, then what may fail
    samples = {}
    with averaged_weights(ema, parameters):
        save_result(args, accelerator, transformer)
        if validating and not args.skip_final_inference:
            samples = log_validation(args, accelerator, transformer, vae, model_dir, prompt_embeds, global_step)
    if accelerator.is_main_process:
        with optional("The model card, or its upload with the result,"):
            publish(args, samples, trainer_state["changes"])
    accelerator.wait_for_everyone()
    with optional("Logging"):
        accelerator.end_training()


# Arguments and errors
def check_args(parser, args):
    """End with `parser`'s one line and code 2 where arguments that are each right do not go together."""
    for action in parser._actions:  # where a flag needs another, its help says so first, and nothing else does
        for flag, value in re.findall(r"^With --(\w+) ?(\w*):", action.help or ""):
            acts = getattr(args, flag) == value if value else getattr(args, flag) != parser.get_default(flag)
            asked = getattr(args, action.dest) != action.default
            if asked and not acts and (flag, getattr(args, action.dest)) != ("validation_prompt", 0):  # 0 images
                parser.error(f"{action.option_strings[0]} has no effect without --{f'{flag} {value}'.strip()}")
    if sum(getattr(args, flag) is not None for flag in ("dataset_name", "train_data_dir", "jsonl_path")) != 1:
        parser.error("give exactly one of --dataset_name, --train_data_dir and --jsonl_path")
    for folder in filter(None, (args.train_data_dir, args.dataset_name)):
        if os.path.isdir(folder) and Path(args.output_dir).resolve().is_relative_to(Path(folder).resolve()):
            parser.error(f"--output_dir {args.output_dir} is inside of {folder}: its pictures would be data, too")
    if (args.jsonl_path is None) != (args.image_dir is None):
        parser.error("--jsonl_path and --image_dir belong together: give both or none")
    for flag, kind in (("train_data_dir", "folder"), ("image_dir", "folder"), ("jsonl_path", "file")):
        path, is_there = getattr(args, flag), os.path.isdir if kind == "folder" else os.path.isfile
        if path is not None and not is_there(path):
            parser.error(f"--{flag} {path}: no such {kind}")
    if args.hub_token and args.report_to not in ("none", "tensorboard"):
        parser.error("--hub_token: other trackers than TensorBoard keep the command line. Use `hf auth login` instead")
    if args.lr_warmup_steps > 0 and args.lr_scheduler in ("constant", "piecewise_constant"):
        parser.error("--lr_warmup_steps has no effect without another --lr_scheduler: see constant_with_warmup")
    strength = parser.get_default("sde_noise_scale")
    if getattr(args, "sde_rollout_type", "") == "sde" and args.sde_noise_scale != strength:
        parser.error("--sde_noise_scale has no effect with --sde_rollout_type sde, which renews all of the noise")
    args.validation_height = args.validation_height or args.resolution
    args.validation_width = args.validation_width or args.resolution
    try:
        sides = {args.resolution, args.validation_height, args.validation_width}.union(*training_sizes(args))
    except ValueError as error:
        parser.error(f"--aspect_ratio_buckets: {error}")
    if any(side % 16 for side in sides):
        parser.error("--resolution, --validation_ and every side of --aspect_ratio_buckets must be divisible by 16")
    for name in re.findall(r"\w+", args.allow_resume_changes or ""):
        if name not in {*vars(args), "data", "global_batch_size"} or re.match(KEPT_ON_RESUME, name):
            parser.error(f"--allow_resume_changes {name}: no such flag, or one that a checkpoint keeps as it was")
    optimizers = {"prodigyopt": args.optimizer == "prodigy", "bitsandbytes": args.use_8bit_adam}
    for package, wanted in (optimizers | {"torchao": args.full_bf16}).items():
        if wanted and importlib.util.find_spec(package) is None:
            parser.error(f"{package} is not installed: `pip install {package}`, or `uv run --with {package}`")
    if (args.optimizer != "adamw") + args.use_8bit_adam + args.full_bf16 > 1:
        parser.error("--optimizer prodigy, --use_8bit_adam and --full_bf16 each have an optimizer: give one of them")
    installed = [tracker.value for tracker in get_available_trackers()]
    if args.report_to in LOGGER_TYPE_TO_CLASS and args.report_to not in installed:
        parser.error(f"--report_to {args.report_to}: not installed; `pip install {args.report_to}`, or none")


def training_sizes(args):
    """The sizes (height, width) in pixels that an image may be trained at. `ValueError`: malformed buckets."""
    if args.aspect_ratio_buckets:
        return training_utils.parse_buckets_string(args.aspect_ratio_buckets)
    if args.use_aspect_ratio_buckets:
        return training_utils.generate_aspect_ratio_buckets(args.resolution)
    return [(args.resolution, args.resolution)]


def number(kind=float, low=-math.inf, high=math.inf):
    """Argparse type: a finite number from `low` to `high`."""

    def parse(text):
        value = kind(text)
        if low <= value <= high and math.isfinite(value):
            return value
        raise argparse.ArgumentTypeError(f"must be a finite number from {low} to {high}, got {text}")

    parse.__name__ = kind.__name__  # argparse names the type when `kind` itself refuses the text
    return parse


def fail(message):
    """End the run with one line and exit code 1."""
    raise SystemExit(f"error: {' '.join(message.split())}")


@contextlib.contextmanager
def failing_with(what):
    """Turn a library's complaint about the user's input into one line that says `what` it was about."""
    try:
        yield
    except Exception as error:  # each library has its own, down to TypeError
        fail(f"{what}: {str(error.__cause__ or error)[:500]}")


def ask_hub(what, function, name, **options):
    """Call `function(name)`, and again after growing pauses while the hub fails; what lasts gives one line."""
    errors = huggingface_hub.errors
    for pause in (2, 8, 30, None):
        try:
            return function(name, **options)
        except errors.GatedRepoError:
            fail(f"{what}: it is gated. Accept its licence on https://huggingface.co/{name}, then `hf auth login`")
        except Exception as error:  # no answer, a server's error, or another, which will not pass
            answer, library = getattr(error, "response", None), type(error).__module__.split(".")[0]
            silent = isinstance(error, errors.LocalEntryNotFoundError) or library.startswith("httpx")
            passing = silent if answer is None else answer.status_code >= 500 or answer.status_code == 429
            if not passing or pause is None or huggingface_hub.constants.HF_HUB_OFFLINE:
                fail(f"{what}: {str(error)[:500]}")
        logger.warning(f"The hub does not answer, or with an error of its own; trying again in {pause} seconds.")
        time.sleep(pause)


@contextlib.contextmanager
def optional(what):
    """Around what the result does not depend on: where it fails, the log says so, and the run goes on."""
    try:
        yield
    except (Exception, SystemExit) as error:
        logger.warning(f"{what} failed: {str(error)[:500] or type(error).__name__}", main_process_only=False)


def loading(name, checkpoint=None):
    """Around the loading of weights: a missing, pickled or broken file of the model or checkpoint gives one line."""
    if checkpoint:
        others = [str(path) for path in checkpoints(Path(checkpoint).parent) if path != Path(checkpoint)]
        way = f" (go on from {others[-1]})" if others else ""
        return failing_with(f"--resume_from_checkpoint {checkpoint} is damaged{way}")
    return failing_with(f"--pretrained_model_name_or_path {name} cannot be loaded")


def run_on_main(accelerator, function, *inputs):
    """Call `function` on the main process; every process returns its result, or ends with its error message."""
    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function(*inputs)
        except SystemExit as error:
            outcome[1] = str(error)
    accelerate.utils.broadcast_object_list(outcome)
    if outcome[1]:
        raise SystemExit(outcome[1])
    return outcome[0]


def run_on_each(accelerator, function, *inputs):
    """[`run_on_main`], then on the others: they may be on machines with files and caches of their own."""
    results = []
    run_on_main(accelerator, lambda: results.append(function(*inputs)))  # nothing to broadcast but an error
    with accelerator.local_main_process_first():
        return results[0] if results else function(*inputs)


# Setup
def make_accelerator(args):
    """The `Accelerator`, and the logs; refuses what the launcher's configuration and the arguments cannot do both."""
    options = {name: getattr(args, name) for name in ("mixed_precision", "gradient_accumulation_steps")}
    options["log_with"] = None if args.report_to == "none" else args.report_to
    folders = accelerate.utils.ProjectConfiguration(args.output_dir, os.path.join(args.output_dir, "logs"))
    handlers = [
        # SD3.5's position table is a buffer of 0.9 GB that never changes: do not send it at every forward.
        accelerate.utils.DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        # Others wait while the main process checks the images; see `limit_waits` for the rest of the run.
        accelerate.utils.InitProcessGroupKwargs(timeout=datetime.timedelta(hours=12)),
    ]
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ.get("FSDP_VERSION") != "2":
        fail("these scripts shard with FSDP2: set `fsdp_version: 2` in accelerate's configuration, as in fsdp2.yaml")
    with failing_with("--mixed_precision"):
        accelerator = Accelerator(**options, project_config=folders, kwargs_handlers=handlers)
    if (started := int(os.environ.get("WORLD_SIZE", 1))) > accelerator.num_processes:
        why = "PyTorch sees no GPU here. Mend its installation, start one process, or set ACCELERATE_USE_CPU=true"
        fail(f"the launcher started {started} processes, and each takes itself for the only one, as {why}")
    if accelerator.state.dynamo_plugin.backend != accelerate.utils.DynamoBackend.NO:  # it would rename all weights
        fail("to compile give --torch_compile, and not accelerate's `dynamo_config` or ACCELERATE_DYNAMO_BACKEND")
    deepspeed = accelerator.state.deepspeed_plugin
    if deepspeed is not None:  # it would read this from a prepared data loader
        deepspeed.deepspeed_config["train_micro_batch_size_per_gpu"] = args.train_batch_size
        if args.use_ema:
            fail("--use_ema does not work with DeepSpeed, which hides its float32 weights; use FSDP2 (fsdp2.yaml)")
    if accelerator.is_fsdp2:
        plugin = accelerator.state.fsdp_plugin
        # `main` sends the weights, as accelerate cannot send a buffer; and transformers would leave encoders empty.
        plugin.cpu_ram_efficient_loading = False
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        if args.use_8bit_adam or args.optimizer == "prodigy":
            fail("with FSDP2 the optimizer is AdamW: leave out --use_8bit_adam and --optimizer, or use ddp.yaml")
        if accelerator.mixed_precision != "no":
            # `main` has autocast cast. FSDP2 would round the timestep, what blocks pass on, and sums of gradients.
            policy = {"cast_forward_inputs": False, "output_dtype": None, "reduce_dtype": torch.float32}
            plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, **policy)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        fail("--mixed_precision fp16 needs a GPU; use bf16 or no on a CPU")
    if args.full_bf16 and (accelerator.mixed_precision != "bf16" or accelerator.is_fsdp2 or deepspeed is not None):
        fail("--full_bf16 needs --mixed_precision bf16, and one GPU or DDP: FSDP2 and DeepSpeed keep float32 weights")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)  # of this script alone
    for library in (datasets, diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    return accelerator


def limit_waits(**time):
    """From now on, how long a process may wait for others before it ends with an error."""
    if torch.distributed.is_initialized():
        torch.distributed.distributed_c10d._set_pg_timeout(datetime.timedelta(**time))  # PyTorch has no public one


# Model and optimizer
def fetch(flag, name, patterns, revision=None):
    """The folder `name` that a flag gives, or the hub's of that name, with the files that fit `patterns` fetched."""
    if os.path.isdir(name):
        return name
    if os.path.isfile(name):
        code = "from diffusers import StableDiffusion3Pipeline as P; P.from_single_file"
        fail(f"--{flag} {name} is one file. Make a folder of it in Python: {code}({name!r}).save_pretrained('FOLDER')")
    what = f"--{flag} {name} cannot be loaded"
    return ask_hub(what, huggingface_hub.snapshot_download, name, allow_patterns=patterns, revision=revision)


def check_model(args):
    """
    Read the configs of the pipeline's parts and refuse what these scripts cannot train, before any weights load.
    Returns the model's `folder`, `shift`, and the sizes that data and caches depend on.
    """
    name = args.pretrained_model_name_or_path
    model_dir = fetch("pretrained_model_name_or_path", name, "*.json", args.revision)
    started = args.transformer and fetch("transformer", args.transformer, "transformer/*.json")
    with failing_with(f"--pretrained_model_name_or_path {name} is not a Stable Diffusion 3 pipeline"):
        if not StableDiffusion3Pipeline.load_config(model_dir)["_class_name"].startswith("StableDiffusion3"):
            raise ValueError("its model_index.json names another pipeline")
        transformer = SD3Transformer2DModel.load_config(started or model_dir, subfolder="transformer")
        scheduler = read_scheduler(model_dir).config
        vae = AutoencoderKL.load_config(model_dir, subfolder="vae")
        if not args.no_text_encoder_3 and StableDiffusion3Pipeline.load_config(model_dir)["text_encoder_3"][0] is None:
            raise ValueError("it has no T5: give --no_text_encoder_3")
        for part in ("transformer", "vae", *text_parts(args.no_text_encoder_3)) if model_dir == name else ():
            is_model = Path(name, part, "config.json").is_file()  # and not a tokenizer
            if is_model and not any(Path(name, part).glob("*.safetensors")):
                raise ValueError(f"{part} has no weights as safetensors, and pickled ones are not loaded")
        vae_scale_factor = 2 ** (len(vae["block_out_channels"]) - 1)
        patch, dim = vae_scale_factor * transformer["patch_size"], transformer["joint_attention_dim"]
        model_config = {
            "folder": model_dir,
            "shift": scheduler.shift,
            "latent_channels": vae["latent_channels"],
            "vae_scale_factor": vae_scale_factor,
            "divisor": math.lcm(16, patch),
            "max_side": patch * transformer["pos_embed_max_size"],
            "joint_attention_dim": dim,
            "embeds_size": dim * (77 + args.max_sequence_length) + transformer["pooled_projection_dim"],
            "trained": sum(trained_layers(args, transformer).values()),
        }
    if scheduler.use_dynamic_shifting:
        fail(f"{name}: its scheduler uses dynamic shifting; these scripts need a constant `shift`, as SD3.5 has")
    for side in {args.validation_height, args.validation_width}.union(*training_sizes(args)):
        check_side(side, model_config, "--resolution, --validation_ or --aspect_ratio_buckets")
    return model_config


def check_side(side, model_config, what):
    """Refuse an image side, in pixels, that the model cannot take; `what` names where it came from."""
    divisor, max_side = model_config["divisor"], model_config["max_side"]
    if side % divisor or not 0 < side <= max_side:
        fail(f"{what}: side {side} must be divisible by {divisor} and at most {max_side} for this model")


def read_scheduler(model_dir):
    """The noise levels of the pipeline, for Euler's steps. `ValueError`: its scheduler is no flow's, with a shift."""
    name = StableDiffusion3Pipeline.load_config(model_dir)["scheduler"][1]
    config = diffusers.FlowMatchEulerDiscreteScheduler.load_config(model_dir, subfolder="scheduler")
    if not name.startswith("FlowMatch"):
        if not config.get("use_flow_sigmas"):
            raise ValueError(f"its {name} has no shift: save it with a FlowMatchEulerDiscreteScheduler")
        config["shift"] = config["flow_shift"]
    return diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)


def download_model(args, model_dir):
    """Fetch from the hub what this run needs of the model and the cache does not hold, and nothing else."""
    unused = {*TEXT_PARTS} - {*text_parts(args.no_text_encoder_3)} | ({"transformer"} if args.transformer else set())
    options = {"revision": args.revision, "variant": args.variant, "use_safetensors": True} | dict.fromkeys(unused)
    name = args.pretrained_model_name_or_path
    if model_dir != name:
        what = f"--pretrained_model_name_or_path {name} cannot be loaded"
        ask_hub(what, StableDiffusion3Pipeline.download, name, **options)
    if args.variant and not any(Path(model_dir).glob(f"*/*.{args.variant}[.-]*safetensors")):
        fail(f"--variant {args.variant}: {name} has no weights of that name")


def load_part(model_class, folder, part, variant=None, **options):
    """
    A part of a pipeline, from files of `variant` where it has any, as [`DiffusionPipeline.from_pretrained`] does it.
    `ValueError`: they lack a tensor, which the libraries would leave empty, or draw at random.
    """
    if variant and not any(Path(folder, part).glob(f"*.{variant}[.-]*safetensors")):
        variant = None
    options |= {"subfolder": part, "variant": variant, "use_safetensors": True, "output_loading_info": True}
    model, report = model_class.from_pretrained(folder, **options)
    if report["missing_keys"]:
        raise ValueError(f"the weights in {folder}/{part} lack {min(report['missing_keys'])}")
    return model


def trained_layers(args, config):
    """Names of the layers that are trained, and how many parameters each trains."""
    with torch.device("meta"):
        skeleton = SD3Transformer2DModel.from_config(config, pos_embed_max_size=config["sample_size"])
    return {name: parameter.numel() for name, parameter in skeleton.named_parameters()}


def read_transformer(folder, dtype, empty=False, variant=None, **options):
    """The `SD3Transformer2DModel` in `folder`; `empty`, with memory for its weights that nothing has touched."""
    if empty:
        with torch.device("meta"):
            config = SD3Transformer2DModel.load_config(folder, subfolder="transformer")
            return SD3Transformer2DModel.from_config(config).to(dtype).to_empty(device="cpu")
    # The file has the position table, which diffusers would compute before: 3 s, 3.4 GiB.
    with contextlib.nullcontext() if options.get("quantization_config") else torch.device("meta"):
        return load_part(SD3Transformer2DModel, folder, "transformer", variant, dtype=dtype, **options)


def load_transformer(args, model_dir, weight_dtype, checkpoint=None, empty=False):
    """
    The `SD3Transformer2DModel` to train, in float32 or, with --full_bf16, in `weight_dtype`; from `checkpoint`, which
    [`save_transformer`] wrote, where there is one; or `empty`. The parameters to train have `requires_grad`.
    """
    variant = None if checkpoint or args.transformer else args.variant
    dtype = weight_dtype if args.full_bf16 else torch.float32
    return read_transformer(checkpoint or args.transformer or model_dir, dtype, empty, variant=variant)


def save_transformer(accelerator, transformer, folder, dtype=None):
    """
    Write the trained weights to `folder/transformer`: a result's as `dtype`, a checkpoint's as they are. In diffusers'
    names and in one file, which other programs load, too. Every process must call it.
    """
    state = accelerator.get_state_dict(transformer)  # gathered, where the weights are sharded over the processes
    if accelerator.is_main_process:
        folder = os.path.join(folder, "transformer")
        accelerator.unwrap_model(transformer).save_config(folder)
        state = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in state.items()}
        save_file(state, os.path.join(folder, "diffusion_pytorch_model.safetensors"), {"format": "pt"})


# For the model card: what makes a pipeline of `base` and the folder `result`.
USAGE = """dtype = torch.bfloat16
transformer = SD3Transformer2DModel.from_pretrained(result, subfolder="transformer", dtype=dtype)
pipeline = StableDiffusion3Pipeline.from_pretrained(base, transformer=transformer, dtype=dtype)"""


def predict_velocity(transformer, batch, noisy_latents, sigma, samples=slice(None), null=False):
    """
    The velocity that [`training_losses`] asks for: of states `(N, C, H, W)` at `sigma` `(N,)`, under the captions of
    `samples` `(N,)` of a batch of [`prepare_batch`], or with `null` under the empty one.
    """
    kind = "null_" if null else ""
    return transformer(
        hidden_states=noisy_latents,
        timestep=soar_utils.sigma_to_timestep(sigma),
        encoder_hidden_states=batch[f"{kind}prompt_embeds"][samples],
        pooled_projections=batch[f"{kind}pooled_prompt_embeds"][samples],
        return_dict=False,
    )[0]


@contextlib.contextmanager
def gradient_sync(accelerator, transformer, last_batch, last):
    """Around a forward and its backward: processes average gradients at the `last` one of the step's `last_batch`."""
    accelerator.sync_gradients = last_batch and last  # what `accelerator.accumulate` finds out by counting
    each = accelerator.is_fsdp2  # its gradients are whole until they are averaged: 32 GB of SD3.5-Large on every GPU
    with contextlib.nullcontext() if accelerator.sync_gradients or each else accelerator.no_sync(transformer):
        yield


def make_optimizer(args, parameters):
    """AdamW, AdamW with 8-bit state, for float32 weights or bf16 ones, or Prodigy."""
    common = {"lr": args.learning_rate, "weight_decay": args.adam_weight_decay, "eps": args.adam_epsilon}
    common["betas"] = (args.adam_beta1, args.adam_beta2)
    if args.optimizer == "prodigy":
        from prodigyopt import Prodigy

        if args.learning_rate < 0.1:
            logger.warning(f"Prodigy multiplies --learning_rate {args.learning_rate} by what it finds; 1 is usual.")
        names = ("beta3", "decouple", "use_bias_correction", "safeguard_warmup")
        return Prodigy(parameters, **common, **{name: getattr(args, f"prodigy_{name}") for name in names})
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **common)
    if args.full_bf16:
        from torchao.optim import AdamW8bit

        # Most updates are smaller than half a step between bf16 numbers. Rounding at random, in proportion, keeps them
        # on average; rounding to the nearest would lose them.
        return AdamW8bit(parameters, **common, bf16_stochastic_round=True)
    return torch.optim.AdamW(parameters, **common, fused=True)


def make_lr_scheduler(args, optimizer, steps_done=0):
    """The learning rate's schedule, from optimizer step `steps_done` on."""
    warnings.filterwarnings("ignore", "Detected call of")  # it moves at a first step that is skipped, too
    options = {"step_rules": args.lr_step_rules, "num_cycles": args.lr_num_cycles, "power": args.lr_power}
    steps = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
    for group in optimizer.param_groups:  # what FSDP2 loads has lost it
        group["initial_lr"] = args.learning_rate
    return get_scheduler(args.lr_scheduler, optimizer, **options, **steps, last_epoch=steps_done - 1)


@contextlib.contextmanager
def averaged_weights(ema, parameters):
    """Inside the block the model holds the averaged weights, where there is an average."""
    if ema is not None:
        ema.store(parameters)
        ema.copy_to(parameters)
    yield
    if ema is not None:
        ema.restore(parameters)


# Data
def load_images(args):
    """
    The images, not yet decoded, and their captions, from whichever of the three sources was given.

    Returns:
        `datasets.Dataset`: columns `image` (`{"path", "bytes"}`), `key` (`str`, another one when the image may have
        changed), `captions` (`list[str]`, at least one), and `height` and `width`, the size in pixels that the source
        asks for, or 0.
    """
    if args.dataset_name is None:
        if args.jsonl_path is not None:
            records = read_jsonl(args.jsonl_path, args.image_dir, args.instance_prompt)
        else:
            image_column = "file_name" if args.image_column == "image" else args.image_column
            records = read_folder(args.train_data_dir, image_column, args.caption_column, args.instance_prompt)
        try:
            return data_utils.make_table(
                {"image": {"path": path, "bytes": None}, "key": data_utils.file_key(path), **others}
                for path, others in itertools.islice(records, args.max_train_samples)
            )
        except UnicodeEncodeError as error:  # Arrow's texts are UTF-8
            fail(f"{os.fsencode(error.object)}: the name of a file or folder is not UTF-8; rename it")

    load = functools.partial(load_split, config_name=args.dataset_config_name, split=args.dataset_split)
    rows = ask_hub(f"--dataset_name {args.dataset_name} --dataset_split {args.dataset_split}", load, args.dataset_name)
    if args.max_train_samples is not None:
        rows = rows.select(range(min(args.max_train_samples, len(rows))))
    for flag in ("image_column", "caption_column"):
        column, others = getattr(args, flag), ", ".join(rows.column_names)
        if column not in rows.column_names and not (flag == "caption_column" and args.instance_prompt):
            fail(f"--{flag} {column}: {args.dataset_name} has the columns {others}; give the one that is meant")
    with failing_with(f"--image_column {args.image_column} of {args.dataset_name} holds no images"):
        images = rows.select_columns(args.image_column).cast_column(args.image_column, datasets.Image(decode=False))
        images = images.rename_columns({args.image_column: "image"})
    # Of the column: the rows would bring the bytes of all images.
    chunks = images.data.column("image").chunks
    paths = [path for chunk in chunks for path in chunk.field("path").to_pylist()]
    only_paths = all(chunk.field("bytes").null_count == len(chunk) for chunk in chunks)
    if only_paths and any(paths) and not any(os.path.isfile(path) for path in paths if path):
        example = next(filter(None, paths))[:60]
        what = f"--image_column {args.image_column} of {args.dataset_name} holds texts such as {example!r}"
        fail(f"{what}, which name no files here: images are wanted, or paths of their files")
    captions = itertools.repeat((None,), len(rows))
    if args.caption_column in rows.column_names:
        captions = data_utils.rows_of(rows, args.caption_column)
        feature = rows.features[args.caption_column]
        feature = getattr(feature, "feature", feature)  # a list's
        if isinstance(feature, datasets.ClassLabel):  # -1 is no label
            captions = ((None if label in (None, -1) else feature.int2str(label),) for (label,) in captions)
    where = f"--caption_column {args.caption_column} of {args.dataset_name}, row"

    def others():
        for i, (path, (caption,)) in enumerate(zip(paths, captions, strict=True)):
            key = data_utils.digest(rows._fingerprint, i, data_utils.file_key(path))
            yield {"key": key, **read_captions(caption, args.instance_prompt, f"{where} {i}")}

    return datasets.concatenate_datasets([images, data_utils.make_table(others())], axis=1)


def load_split(name, config_name, split):
    """A split of a data set of the hub or in a folder, also of `save_to_disk`, which writes no configurations."""
    for folder in () if config_name else (name, os.path.join(name, split)):
        if os.path.isfile(os.path.join(folder, "state.json")):
            return datasets.load_from_disk(folder)
    try:
        return datasets.load_dataset(name, config_name, split=split)
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ from None  # itself it does not say what is wrong


def read_folder(folder, image_column, caption_column, instance_prompt):
    """
    Yield path and other columns of each image of --train_data_dir: of those that its metadata lists, in that order,
    with the captions there; without metadata of all, each with the text of NAME.txt or NAME.caption beside it.
    """
    walk, unread = [], []
    for at, folders, files in os.walk(folder, onerror=lambda error: unread.append(error.filename)):
        folders[:] = [name for name in folders if name[0] != "."]
        unread.extend(path for name in folders if os.path.islink(path := os.path.join(at, name)))
        walk.append((at, sorted(name for name in files if name[0] != ".")))
    walk.sort()
    if unread:
        some = ", ".join(unread[:5])
        logger.warning(f"{len(unread)} folders in {folder} are links or cannot be read, and are not used: {some}")
    names = [f"{at}{name}" for at, files in walk for at in [os.path.join(at, "")] for name in files]
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    suffixes |= {".heic", ".heif"}
    images = [path for path in names if os.path.splitext(path)[1].lower() in suffixes]
    stems = {os.path.splitext(path)[0] for path in images}
    texts, others = {}, defaultdict(list)
    for path in names:
        stem, suffix = os.path.splitext(path)
        if stem in stems and suffix.lower() in (".txt", ".caption"):
            if texts.setdefault(stem, path) != path:
                fail(f"{texts[stem]} and {path} both hold a caption: remove one of them")
        elif suffix.lower() not in suffixes:
            others[suffix].append(path)
    there = {unicodedata.normalize("NFC", path): path for path in names if not path.isascii()}  # macOS has others
    metadata = [
        os.path.join(at, name) for at, files in walk for name in files if name in ("metadata.jsonl", "metadata.csv")
    ]
    for path in metadata:
        if path.endswith(".csv") and f"{path[:-4]}.jsonl" in metadata:
            fail(f"{path} lies beside metadata.jsonl: remove one of them")
    if metadata and texts:
        fail(f"{metadata[0]} and {next(iter(texts.values()))} both hold captions: remove one of them")
    if others and not metadata:
        kinds = ", ".join(f"{len(paths)} like {paths[0]}" for paths in [*others.values()][:10])
        logger.warning(f"Not used, neither images that Pillow reads nor NAME.txt or NAME.caption of one: {kinds}")
    if any(re.match(r"\d+_", Path(at).name) for at, _ in walk):
        logger.info(f"Folder names in {folder}, such as 10_name, mean nothing here: every image comes once an epoch.")
    listed, root = {}, os.path.realpath(folder)
    for path in metadata:
        at = os.path.dirname(path)
        for where, record in (data_utils.read_csv if path.endswith(".csv") else data_utils.read_json_lines)(path):
            for flag, column in (("image_column", image_column), ("caption_column", caption_column)):
                if column not in record and not (flag == "caption_column" and instance_prompt):
                    fail(f"--{flag} {column}: {where} has {', '.join(record)}; give the one that is meant")
            image = os.path.join(at, str(record[image_column]))
            image = image if image.isascii() else there.get(unicodedata.normalize("NFC", image), image)
            if not data_utils.is_inside(image, root):
                fail(f"{where}: {record[image_column]!r} leads out of --train_data_dir")
            if (first := listed.setdefault(os.path.normpath(image), path)) != path:
                fail(f"{where}: {record[image_column]!r} is listed in {first}, too: remove one of them")
            yield image, read_captions(record.get(caption_column), instance_prompt, where)
    if metadata and (unlisted := sum(os.path.normpath(image) not in listed for image in images)):
        logger.warning(f"{unlisted} images in {folder} are not listed in its metadata and are not used.")
    for image in () if metadata else images:
        caption, name = instance_prompt, os.path.splitext(image)[0]
        if name in texts:
            with failing_with(f"{texts[name]} is no text in UTF-8"):
                caption = " ".join(Path(texts[name]).read_text("utf-8-sig").split("\n")).strip()
        if caption is None:
            way = f"write {Path(image).stem}.txt beside it, or give --instance_prompt for all such"
            fail(f"{image} has no caption: {way}")
        yield image, read_captions(caption, instance_prompt, image)


def read_captions(value, default, where, height=0, width=0):
    """The columns of an image besides it: of a text, a list of texts, or none, where it has none, of the `default`."""
    missing = value is None or value != value  # NaN, as pandas writes it
    values = value if isinstance(value, list) else [] if missing else [value]
    if not all(type(text) in (str, int) for text in values):  # a truth value is of another type
        fail(f"{where}: the caption is neither a text nor a list of texts: {str(value)[:200]}")
    captions = [str(text) or default or "" for text in values] or [default or ""]
    return {"captions": captions, "height": height, "width": width}


def read_jsonl(path, image_dir, default):
    """Yield path and other columns of each line of --jsonl_path, the format of the authors' code."""
    image_dir = Path(image_dir).resolve()
    for where, record in data_utils.read_json_lines(path):
        if not isinstance(record.get("md5"), str) or "caption_en" not in record:
            fail(f"{where} needs the fields `md5`, a text, and `caption_en`")
        height, width = record.get("bh") or 0, record.get("bw") or 0
        whole = all(isinstance(side, int) and side >= 0 and side % 16 == 0 for side in (height, width))
        if not whole or (height == 0) != (width == 0):
            fail(f"{where}: `bw` and `bh` must be whole numbers divisible by 16, or left out: {width} and {height}")
        suffixes = ".jpg .jpeg .png .webp .JPG .JPEG .PNG .WEBP".split()
        candidates = [os.path.join(image_dir, f"{record['md5']}{suffix}") for suffix in suffixes]
        image = next((file for file in candidates if os.path.isfile(file)), candidates[0])
        if len(record["md5"]) > 200 or not data_utils.is_inside(image, image_dir):
            fail(f"{where}: `md5` {record['md5'][:200]!r} is no file name in --image_dir")
        if isinstance(value := record["caption_en"], str) and value.lstrip().startswith("{"):
            with contextlib.suppress(ValueError):  # a caption may simply begin with a brace
                value = json.loads(value)
        if isinstance(value, dict):
            fields = ("long_caption", "medium_caption", "short_caption", "text")
            texts = (text for field in fields if (text := value.get(field)) == text and str(text or "").strip())
            value = next(texts, "" if value.keys() & {*fields} else value)
        yield image, read_captions(value, default, where, height, width)


def check_images(args, rows, process_index=0, num_processes=1, again=False):
    """
    Decode this process's share of the images that were not before, or `again` of all, so that a bad one is found now
    and not in the middle of the run. What [`inspect_image`] finds is remembered in --cache_dir, but of a bad one.

    Returns:
        `tuple[Cache, dict[int, dict]]`: what is remembered, and what was found of each row with a bad image.
    """
    if len(rows) == 0:
        fail(f"{args.dataset_name or args.train_data_dir or args.jsonl_path} has no images")
    if not any(text.strip() for (texts,) in data_utils.rows_of(rows, "captions") for text in texts):
        fail("every caption is empty; is this the right --caption_column?")
    checks, bad = open_cache(args, "checks"), {}
    keys = np.array(rows["key"][:])
    unknown = np.flatnonzero(again | (checks.find(keys) < 0))
    unknown = unknown[unknown % num_processes == process_index].tolist()

    def good(results):
        for row, found in zip(unknown, results, strict=True):
            if "error" in found:
                bad[row] = found
            else:
                yield keys[row], json.dumps(found).encode()

    if unknown:
        options = {"num_workers": args.dataloader_num_workers, "collate_fn": data_utils.inspect_rows}
        found = itertools.chain.from_iterable(DataLoader(rows.select_columns("image"), 16, sampler=unknown, **options))
        progress = {"desc": "Checking images", "unit": "image", "disable": process_index > 0}
        checks.write(good(tqdm(found, total=len(unknown), **progress)))
    return checks, bad


def inspect_images(args, model_config, rows):
    """
    What will be trained on, of all usable images, as a `datasets.Dataset` with the columns `row`, `name`, `digest`,
    `captions`, and `size` (height, width) in pixels to train at.
    """
    checks, bad = check_images(args, rows)
    if empty := sum(not all(text.strip() for text in texts) for (texts,) in data_utils.rows_of(rows, "captions")):
        logger.warning(f"{empty} of {len(rows)} captions are empty: those images train the unconditional model.")
    buckets = training_sizes(args)
    nearest = functools.lru_cache(lambda size: buckets[training_utils.find_nearest_bucket(*size, buckets)])
    notes, sizes, grown = Counter(), Counter(), []

    def items():
        known = checks.values(checks.find(rows["key"][:]).tolist())
        for row, (captions, *size) in enumerate(data_utils.rows_of(rows, "captions", "height", "width")):
            value = next(known)
            found = bad.get(row) or json.loads(value.decode())
            name = found["name"] or f"image {row} of the data set"
            if "error" in found:
                name = name[-200:]  # what is no path can be of any length
                if not args.skip_bad_images:
                    others = f", nor can {len(bad) - 1} more" if len(bad) > 1 else ""
                    what = f"{name} cannot be read ({found['error']}){others}"
                    fail(f"{what}; mend it, or drop such images with --skip_bad_images")
                logger.warning(f"Dropped {name}: {found['error']}")
                continue
            if min(found["size"]) < args.min_image_side:
                notes["have a side below --min_image_side and are dropped"] += 1
                continue
            size = nearest(tuple(found["size"])) if size == [0, 0] else tuple(size)
            for side in size:
                check_side(side, model_config, f"{name}: size in its data set")
            notes.update(found["notes"])
            sizes["{1}x{0}".format(*size)] += 1
            if (scale := max(size[0] / found["size"][0], size[1] / found["size"][1])) > 1:
                grown.append(scale)
            yield {"row": row, "name": name, "digest": found["digest"], "captions": captions, "size": size}

    inspected = data_utils.make_table(items())
    logger.info(f"{len(inspected)} images, {len(rows) - len(inspected)} dropped; sizes {dict(sizes)}.")
    if grown:
        logger.warning(f"{len(grown)} images are smaller than they are trained at: enlarged up to {max(grown):.1f} x.")
    for note, number in notes.items():
        logger.info(f"{number} images {note}.")
    return inspected


class TrainingImages(Dataset):
    """
    The samples. A key is `(index, position)`, where `position` counts samples from the start of the run: whatever is
    random about a sample depends on the seed and on its position, so no worker, process or restart changes it.
    """

    def __init__(self, args, rows, inspected, encoder_digests):
        self.args, self.inspected, self.encoder_digests = args, inspected, encoder_digests
        self.images = rows.select_columns("image")  # read row by row, as asked for
        self.see_caches()

    def __len__(self):
        return len(self.inspected)

    def see_caches(self):
        """Open the caches, or see what other processes have written to them."""
        self.latents = open_cache(self.args, "latents") if self.args.cache_latents else None
        self.embeds = open_cache(self.args, "prompt_embeds") if self.args.cache_prompt_embeds else None

    def pixels(self, item, top, left, flip):
        """Resize so that the image covers its training size, crop, flip; `(3, H, W)` uint8."""
        image = data_utils.decode_image(data_utils.file_bytes(self.images[item["row"]]["image"]))
        height, width = item["size"]
        scale = max(height / image.height, width / image.width)
        covering = round(image.width * scale), round(image.height * scale)
        y, x = round(top * (covering[1] - height)), round(left * (covering[0] - width))
        kept = (x, y, x + width, y + height)
        if math.prod(covering) > 16 * width * height:  # of a strip only what is kept, however long it is
            box = [min(edge / scale, end) for edge, end in zip(kept, image.size * 2, strict=True)]
            image = image.resize((width, height), Image.Resampling.LANCZOS, box)
        else:
            image = image.resize(covering, Image.Resampling.LANCZOS).crop(kept)
        return torch.from_numpy(np.array(ImageOps.mirror(image) if flip else image)).permute(2, 0, 1).contiguous()

    def crop(self, image_digest):
        """The one crop of an image whose latents are cached, as fractions of the room there is."""
        if self.args.center_crop:
            return 0.5, 0.5
        seed = data_utils.derive_seed("crop", self.args.seed, image_digest)
        return torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()

    def latents_key(self, image_digest, size, flip):
        """Of cached tensors the keys are digests of all that they depend on: they cannot be stale."""
        crop = None if self.args.center_crop else self.args.seed
        return data_utils.digest(image_digest, *size, crop, flip, self.encoder_digests["vae"])

    def embeds_key(self, caption):
        return data_utils.digest(caption, self.encoder_digests["text"])

    def load(self, batch):
        items = [(self.inspected[index], flip) for _, index, flip in batch]
        pixels = [self.pixels(item, *self.crop(item["digest"]), flip) for item, flip in items]
        return [key for key, *_ in batch], torch.stack(pixels)

    def __getitem__(self, key):
        index, position = key
        item, seed = self.inspected[index], data_utils.derive_seed("sample", self.args.seed, position)
        top, left, flip, drop, choice = torch.rand(5, generator=torch.Generator().manual_seed(seed)).tolist()
        flip = self.args.random_flip and flip < 0.5
        sample = {
            "seed": data_utils.derive_seed("noise", self.args.seed, position),
            "drop": drop < self.args.cond_dropout_rate,
            "name": item["name"],
            "caption": item["captions"][int(choice * len(item["captions"]))],
        }
        if self.args.cache_latents:
            sample.update(load(self.latents[self.latents_key(item["digest"], item["size"], flip)]))
        else:
            sample["pixels"] = self.pixels(item, *((0.5, 0.5) if self.args.center_crop else (top, left)), flip)
        if self.args.cache_prompt_embeds:
            sample.update(load(self.embeds[self.embeds_key(sample["caption"])]))
        return sample


def collate(samples):
    """
    Stack the tensors of a batch of one image size, as arrays of bytes; keep everything else as lists. Workers send
    tensors through shared memory, of which a container may have next to none, but arrays through pipes.
    """
    batch = {key: [sample[key] for sample in samples] for key in samples[0]}
    return {k: torch.stack(v).view(torch.uint8).numpy() if torch.is_tensor(v[0]) else v for k, v in batch.items()}


def make_dataloader(args, accelerator, train_dataset, first_step):
    """The batches of this process from optimizer step `first_step` on, without end."""
    sizes, processes = [*map(tuple, train_dataset.inspected["size"][:])], accelerator.num_processes
    start = first_step * args.gradient_accumulation_steps * processes
    place = {"start": start, "process_index": accelerator.process_index, "num_processes": processes}
    sampler = data_utils.BucketBatchSampler(sizes, args.train_batch_size, args.seed, **place)
    return DataLoader(
        train_dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        # They leave signals to their process, which still needs them for the step that it finishes.
        worker_init_fn=functools.partial(on_stop_signals, signal.SIG_IGN),
    )


def open_cache(args, kind):
    """The [`Cache`] of this kind in --cache_dir."""
    with failing_with(f"--cache_dir {args.cache_dir}"):
        return data_utils.Cache(args.cache_dir, kind)


# Encoders and their caches
TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")


def text_parts(no_text_encoder_3):
    """The parts of the pipeline that encode prompts in this run."""
    return [part for part in TEXT_PARTS if not (no_text_encoder_3 and part.endswith("_3"))]


def load_text_encoders(args, model_dir, weight_dtype, joint_attention_dim, device):
    """The `StableDiffusion3Pipeline` without its transformer and VAE, whose text encoders compute on `device`."""
    used, classes = text_parts(args.no_text_encoder_3), StableDiffusion3Pipeline.load_config(model_dir)
    parts = dict.fromkeys({"transformer", "vae", *TEXT_PARTS} - {*used})
    with loading(args.pretrained_model_name_or_path):
        for part in used:
            if part.startswith("text_encoder"):
                encoder = getattr(transformers, classes[part][1])
                parts[part] = load_part(encoder, model_dir, part, args.variant, dtype=weight_dtype)
        pipeline = StableDiffusion3Pipeline.from_pretrained(model_dir, **parts)
    # `encode_prompt` asks the transformer for nothing but this width, of the zeros in place of a missing T5.
    pipeline.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=joint_attention_dim))
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
        if encoder is not None and args.offload:  # T5 alone has 9.5 GB: its layers visit the device one by one
            apply_group_offloading(encoder, device, offload_type="leaf_level", use_stream=device.type == "cuda")
        elif encoder is not None:
            encoder.to(device)
    return pipeline


@torch.no_grad()
def encode_prompts(text_encoders, prompts, max_sequence_length, device):
    """
    Embed prompts as the pipeline does when it generates, with that of [`load_text_encoders`], to a `dict` of
    `prompt_embeds` `(B, tokens, joint_attention_dim)` and `pooled_prompt_embeds` `(B, pooled_dim)`.
    """
    options = {"device": device, "do_classifier_free_guidance": False, "max_sequence_length": max_sequence_length}
    prompt_embeds, _, pooled_prompt_embeds, _ = text_encoders.encode_prompt(prompts, None, None, **options)
    return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}


@torch.no_grad()
def encode_images(vae, pixels, device):
    """Mean and log-variance `(B, 2 * C, H / 8, W / 8)`, float32, of the latents of images `(B, 3, H, W)`, uint8."""
    with training_utils.offload_models(vae, device=device):
        return vae.encode(pixels.to(device, non_blocking=True) / 127.5 - 1).latent_dist.parameters


def encode_latents(vae, moments, generators):
    """Draw latents from `moments` (see [`encode_images`]) and scale them to the units of the transformer."""
    distribution = DiagonalGaussianDistribution(moments)
    shape = distribution.mean.shape[1:]
    noise = draw(lambda generator: torch.randn(shape, generator=generator), generators, moments.device)
    return (distribution.mean + distribution.std * noise - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


def draw(sample, generators, device):
    """Stack `sample(generator)` of each sample's own CPU generator: the same numbers on every device."""
    values = torch.stack([sample(generator) for generator in generators])
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def prepare_batch(batch, null_embeds, vae, text_encoders, max_sequence_length, device):
    """
    Add to a batch of the data loader what [`training_losses`] and [`predict_velocity`] ask for, on the device:
    `generators`, `latents`, `prompt_embeds`, `pooled_prompt_embeds`, and both of the empty caption under `null_`, from
    `null_embeds` of [`encode_prompts`]. `vae` is only asked for its config, and `text_encoders` is `None`, where the
    batch has cached tensors.
    """
    batch["generators"] = [torch.Generator().manual_seed(seed) for seed in batch["seed"]]
    torch.manual_seed(batch["seed"][0])  # LoRA dropout: a function of the position in the run, like all else
    if "moments" in batch:
        moments = torch.as_tensor(batch["moments"]).view(torch.float32).to(device, non_blocking=True)
    else:
        moments = encode_images(vae, torch.as_tensor(batch["pixels"]), device)
    batch["latents"] = encode_latents(vae, moments, batch["generators"])
    if text_encoders is not None:
        batch.update(encode_prompts(text_encoders, batch["caption"], max_sequence_length, device))
    drop = torch.as_tensor(batch["drop"]).to(device, non_blocking=True)
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        embed = torch.as_tensor(batch[name]).view(null_embeds[name].dtype).to(device, non_blocking=True)
        batch[f"null_{name}"] = null_embeds[name].expand_as(embed)
        batch[name] = torch.where(drop.view(-1, *[1] * (embed.ndim - 1)), batch[f"null_{name}"], embed)
    return batch


def digest_encoders(args, model_dir, weight_dtype):
    """What the cached tensors depend on besides the samples: the encoders' files, the length and the number format."""
    known = open_cache(args, "checks")

    def digests(*parts):
        paths = [path for part in parts for path in sorted(Path(model_dir, part).rglob("*")) if path.is_file()]
        return [[path.name, known[data_utils.file_key(path)].decode()] for path in paths]

    def read(path):
        with open(path, "rb") as file:
            return data_utils.file_key(path), hashlib.file_digest(file, "sha256").hexdigest().encode()

    parts = ["vae", *text_parts(args.no_text_encoder_3)]
    paths = [path for part in parts for path in Path(model_dir, part).rglob("*") if path.is_file()]
    unknown = [path for path in paths if known.find(data_utils.file_key(path)) < 0]
    known.write(map(read, tqdm(unknown, "Reading the encoders' files", leave=False, unit="file", disable=not unknown)))
    text = data_utils.digest(digests(*parts[1:]), args.max_sequence_length, str(weight_dtype), args.no_text_encoder_3)
    return {"vae": data_utils.digest(digests("vae")), "text": text}


def report_truncation(args, model_dir, inspected):
    """Count the captions that are longer than what the text encoders read, once for the same captions."""
    captions = [text for (texts,) in data_utils.rows_of(inspected, "captions") for text in texts]
    tokenizers = {"CLIP": "tokenizer"} if args.no_text_encoder_3 else {"CLIP": "tokenizer", "T5": "tokenizer_3"}
    known = open_cache(args, "checks")
    for name, part in tokenizers.items():
        tokenizer = AutoTokenizer.from_pretrained(model_dir, subfolder=part)
        length = tokenizer.model_max_length if name == "CLIP" else args.max_sequence_length
        key = data_utils.digest(name, length, len(tokenizer), captions)
        if known.find(key) < 0:
            starts = tqdm(range(0, len(captions), 1000), desc=f"Counting {name} tokens", unit="k captions")
            tokens = (tokenizer(captions[start : start + 1000], verbose=False).input_ids for start in starts)
            known.write([(key, str(sum(len(ids) > length for part in tokens for ids in part)).encode())])
        truncated = int(known[key])
        logger.info(f"{truncated} of {len(captions)} captions are longer than the {length} tokens that {name} reads.")


def plan_caches(args, train_dataset, model_config, weight_dtype, prompts, process_index, num_processes):
    """
    What the caches lack of this process's share, in batches: of latents lists of key, index and flip, of embeddings
    lists of key and text. Ends the run where there is no room for all of it.
    """
    latents, embeds, totals = defaultdict(list), [], [0, 0]
    if args.cache_latents:
        flips = [False, True] if args.random_flip else [False]
        images = data_utils.rows_of(train_dataset.inspected, "digest", "size")
        keys = [train_dataset.latents_key(*image, flip) for image in images for flip in flips]
        places, totals[0] = train_dataset.latents.find(keys), len({*keys})
        sizes = train_dataset.inspected["size"][:]
        for key, place in {keys[i]: i for i in np.flatnonzero(places < 0).tolist()}.items():
            index, flip = divmod(place, len(flips))
            latents[tuple(sizes[index])].append((key, index, bool(flip)))
    if args.cache_prompt_embeds:
        captions = (text for (texts,) in data_utils.rows_of(train_dataset.inspected, "captions") for text in texts)
        texts = {train_dataset.embeds_key(text): text for text in itertools.chain(prompts, captions)}
        places, totals[1] = train_dataset.embeds.find([*texts]), len(texts)
        embeds = [item for item, place in zip(texts.items(), places, strict=True) if place < 0]
    pixels = sum(math.prod(size) * len(group) for size, group in latents.items())
    moments = pixels // model_config["vae_scale_factor"] ** 2 * 2 * model_config["latent_channels"]
    needed = moments * torch.float32.itemsize + len(embeds) * model_config["embeds_size"] * weight_dtype.itemsize
    free = free_space(args.cache_dir) * 2**30
    missing = sum(map(len, latents.values()))
    what = f"{missing} of {totals[0]} latents and {len(embeds)} of {totals[1]} prompt embeddings"
    logger.info(f"Caches in {args.cache_dir}: {what} are missing and take {needed / 2**30:.2f} GiB.")
    for folder in {path.parent for path in Path(args.cache_dir).glob("*/??") if path.is_dir()}:
        logger.warning(f"{folder} has folders 00 to ff of an older version, which are not read and can be deleted.")
    if needed > free:
        fail(f"--cache_dir {args.cache_dir}: {needed / 2**30:.1f} GiB to write, {free / 2**30:.1f} GiB free")
    batches = []
    for groups in (latents.values(), [embeds]):
        # Shared out by key: by place would leave gaps where another run writes while the processes look.
        groups = [[item for item in group if int(item[0], 16) % num_processes == process_index] for group in groups]
        size = args.cache_batch_size
        batches.append([group[i : i + size] for group in groups for i in range(0, len(group), size)])
    return batches


def build_caches(args, accelerator, train_dataset, model_dir, model_config, vae, weight_dtype, prompts):
    """Encode what [`plan_caches`] lists, each process its share, and keep it for this and every later run."""
    device, place, processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    inputs = args, train_dataset, model_config, weight_dtype, prompts
    latents, embeds = run_on_each(accelerator, plan_caches, *inputs, place, processes)

    def entries(batches, what, encode):
        for keys, contents in tqdm(batches, desc=f"Caching {what}", unit="batch", disable=place > 0):
            tensors = {name: tensor.cpu() for name, tensor in encode(contents).items()}
            for i, key in enumerate(keys):
                yield key, save({name: tensor[i].contiguous() for name, tensor in tensors.items()})

    if latents:
        loader = DataLoader(latents, None, num_workers=args.dataloader_num_workers, collate_fn=train_dataset.load)
        with training_utils.offload_models(vae, device=device):
            encoded = entries(loader, "latents", lambda pixels: {"moments": encode_images(vae, pixels, device)})
            train_dataset.latents.write(encoded)
    if embeds:
        text_encoders = load_text_encoders(args, model_dir, weight_dtype, model_config["joint_attention_dim"], device)
        length = args.max_sequence_length
        batches = [tuple(map(list, zip(*batch, strict=True))) for batch in embeds]
        encoded = entries(batches, "captions", lambda texts: encode_prompts(text_encoders, texts, length, device))
        train_dataset.embeds.write(encoded)
    accelerator.wait_for_everyone()
    train_dataset.see_caches()


def embed_prompts(args, train_dataset, model_dir, model_config, weight_dtype, prompts, device):
    """
    Of each of `prompts` what [`encode_prompts`] returns, without the batch dimension, from the cache or made now; and
    the text encoders, for the captions, or `None` where those are cached.
    """
    if args.cache_prompt_embeds:
        return {prompt: load(train_dataset.embeds[train_dataset.embeds_key(prompt)]) for prompt in prompts}, None
    dim = model_config["joint_attention_dim"]
    text_encoders = load_text_encoders(args, model_dir, weight_dtype, dim, device)
    encoded = {prompt: encode_prompts(text_encoders, [prompt], args.max_sequence_length, device) for prompt in prompts}
    return {prompt: {name: tensor[0] for name, tensor in encoded[prompt].items()} for prompt in prompts}, text_encoders


# Checkpoints and resume
RESULTS = "transformer pytorch_lora_weights.safetensors training_args.json README.md samples validation".split()


def old_results(output_dir):
    """What an earlier run has left in --output_dir."""
    output = Path(output_dir)
    return [path for path in (*(output / name for name in RESULTS), *output.glob("checkpoint-*")) if path.exists()]


def check_folders(accelerator, args):
    """Refuse an --output_dir or --cache_dir that cannot be written, or that is not the same one for all processes."""

    def write(flag, folder, written):
        with failing_with(f"--{flag} {folder} cannot be written"):
            os.makedirs(folder, exist_ok=True)
            path = written.enter_context(tempfile.NamedTemporaryFile(dir=folder)).name
        with (
            failing_with(f"--{flag} {folder}: its file system cannot rename a folder of files; choose a local one"),
            tempfile.TemporaryDirectory(dir=folder) as probe,
        ):
            os.makedirs(f"{probe}/checkpoint.unfinished/part")
            os.replace(f"{probe}/checkpoint.unfinished", f"{probe}/checkpoint")
        return path

    for flag, folder in (("output_dir", args.output_dir), ("cache_dir", args.cache_dir)):
        with contextlib.ExitStack() as written:
            path = Path(folder, Path(run_on_main(accelerator, write, flag, folder, written)).name)
            # NFS may remember for half a minute what was not there.
            seen = accelerate.utils.gather_object([any(path.exists() or time.sleep(1) for _ in range(40))])
        if not all(seen):
            fail(f"--{flag} {folder}: all processes must see the same folder, on several machines a shared one")


def find_checkpoint(args):
    """
    The folder of the checkpoint that --resume_from_checkpoint means, and its `trainer_state.json`; or `None`, and step
    0. Refuse an --output_dir that another run writes to or, without that flag, that holds another run's result.
    """
    output, wanted = Path(args.output_dir), args.resume_from_checkpoint
    try:  # which no dead process keeps
        output_lock.enter_context(filelock.FileLock(output / ".lock", blocking=False))
    except filelock.Timeout:
        fail(f"--output_dir {output}: another run is writing there. Wait for its end, or choose another folder")
    except (NotImplementedError, OSError) as error:  # such as NFS without its lock service
        logger.warning(f"Nothing keeps a second run out of {output}: {error}")
    if not wanted:
        if (old := sorted(path.name for path in old_results(output))) and not args.overwrite_output_dir:
            ways = "choose a new folder, go on with --resume_from_checkpoint latest, or give --overwrite_output_dir"
            fail(f"--output_dir {output} holds another run ({', '.join(old)}): {ways}")
        return None, {"step": 0}
    found = checkpoints(output)
    folder = [None, *found][-1] if wanted == "latest" else Path(wanted) if os.path.isdir(wanted) else output / wanted
    try:
        state = read_state(folder) if folder else {"step": 0}
    except (OSError, ValueError) as error:
        fail(
            f"--resume_from_checkpoint {wanted}: {folder} is no whole checkpoint ({error}). {last_checkpoint(output)}"
        )
    for other in output.glob("checkpoint-*"):  # which this run would count, or replace
        if other not in found and other.suffix != ".unfinished":
            way = "move it away, or choose another --output_dir"
            fail(f"{other} is no whole checkpoint of this script: {way}. {last_checkpoint(output)}")
    if folder is None:
        logger.info(f"No checkpoint in {output}: starting from the beginning.")
        return None, state
    if state["script"] != Path(sys.argv[0]).name:
        fail(f"--resume_from_checkpoint {folder}: written by {state['script']}, not by {Path(sys.argv[0]).name}")
    return str(folder), state


def read_state(folder):
    """The `trainer_state.json` of a checkpoint of one of these scripts. `OSError` or `ValueError`: it is none."""
    if Path(folder).suffix == ".unfinished":
        raise ValueError("its writing was interrupted")
    state = json.loads(Path(folder, "trainer_state.json").read_text())
    if not isinstance(state, dict) or not {"script", "compared", "number"} <= state.keys():
        raise ValueError("its trainer_state.json is of another program or version")
    return state


def checkpoints(output_dir):
    """The whole checkpoints of these scripts in a folder, and the state of each, in the order of their writing."""
    states = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        with contextlib.suppress(OSError, ValueError):
            states[folder] = read_state(folder)
    return dict(sorted(states.items(), key=lambda item: item[1]["number"]))


def last_checkpoint(output_dir):
    """Where to go on from, for a message."""
    return f"Last checkpoint: {[None, *checkpoints(output_dir)][-1] or 'none'}"


@contextlib.contextmanager
def writing(folder, what):
    """Around the writing of `folder`: where it fails, as on a full disk, it is removed, and one line ends the run."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # PyTorch and safetensors report a full disk as theirs
        shutil.rmtree(folder, ignore_errors=True)
        free = free_space(folder.parent)
        fail(f"{what} could not be written ({error}); {free:.1f} GiB are free. {last_checkpoint(folder.parent)}")


def make_trainer_state(args, global_batch_size, inspected):
    """What a checkpoint remembers of its run: what is `compared` when it is resumed, and the `changes` on the way."""
    contents = hashlib.sha256()
    for batch in inspected.select_columns(["digest", "size", "captions"]).iter(1000):
        contents.update(json.dumps(batch).encode())
    compared = json.loads(json.dumps(vars(args))) | {"global_batch_size": global_batch_size}
    compared |= {"data": contents.hexdigest()}
    compared |= {name: version(name) for name in ("accelerate", "diffusers", "torch", "transformers")}
    return {"script": Path(sys.argv[0]).name, "compared": compared, "changes": []}


def check_resume(checkpoint, before, now):
    """End with an error where a difference changes the result and --allow_resume_changes lacks it; note the others."""
    old, new, free = before["compared"], now["compared"], {*FREE_ON_RESUME}
    if new["lr_scheduler"] not in ("constant", "constant_with_warmup", "piecewise_constant"):
        free -= {"max_train_steps"}  # the schedule ends there
    told = {k: f"{k} was {old.get(k)} there and is {v} now" for k, v in new.items() if old.get(k) != v}
    named = re.findall(r"\w+", new["allow_resume_changes"] or "")
    changes = [told.pop(name) for name in [*told] if name in named and name not in free]
    if refused := [text for name, text in told.items() if name not in free]:
        way = "What is meant to differ can be named in --allow_resume_changes"
        fail(f"--resume_from_checkpoint {checkpoint} is of another run: {'; '.join(refused)}. {way}")
    now["changes"] = before["changes"] + [f"From step {before['step']} on: {text}." for text in changes]
    for effect, texts in (("change", changes), ("do not change", told.values())):
        if texts:
            logger.info(f"Resuming with changes that {effect} the result: {'; '.join(texts)}")


def check_room(args, trained, step):
    """End where the disk has no room for what a run of `trained` parameters writes after optimizer step `step`."""
    state = 16 if args.optimizer == "prodigy" else 2 if args.use_8bit_adam or args.full_bf16 else 8
    size = trained * ((2 if args.full_bf16 else 4) + state + 4 * args.use_ema)
    number = args.max_train_steps // args.checkpointing_steps - step // args.checkpointing_steps
    if args.checkpoints_total_limit:  # one more while it is written
        number = min(number, max(1, args.checkpoints_total_limit + 1 - len(checkpoints(args.output_dir))))
    needed, free = (number * size + 4 * trained) / 2**30, free_space(args.output_dir)
    what = f"{number} checkpoints of {size / 2**30:.1f} GiB and the result, {needed:.1f} GiB, in {args.output_dir}"
    logger.info(f"{what}; {free:.1f} GiB are free. Caches: {args.cache_dir}")
    if needed > free:
        fail(f"no room for {what}: {free:.1f} GiB are free. See --checkpoints_total_limit")


def free_space(folder):
    """In GiB; infinite on file systems that report none, such as those in front of object stores."""
    usage = shutil.disk_usage(folder)
    return usage.free / 2**30 if usage.total else math.inf


def save_checkpoint(accelerator, ema, trainer_state, args):
    """
    Write `OUTPUT_DIR/checkpoint-STEP` beside, rename it when all of it is on the disk, and only then prune those that
    were written first, to --checkpoints_total_limit where there is one.
    """
    folder = Path(args.output_dir, f"checkpoint-{trainer_state['step']}")
    unfinished = Path(f"{folder}.unfinished")
    if accelerator.is_main_process:
        remove_unfinished(folder.parent)
    accelerator.wait_for_everyone()
    with writing(unfinished, str(folder)):
        accelerator.save_state(unfinished)
        shadow = {
            str(i): getattr(t, "full_tensor", t.detach)() for i, t in enumerate(ema.shadow_params if ema else ())
        }
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if ema is not None:
                shadow = {i: t.cpu().contiguous() for i, t in shadow.items()}
                save_file(shadow, unfinished / "ema.safetensors", {"step": str(ema.optimization_step)})
            number = 1 + max((state["number"] for state in checkpoints(args.output_dir).values()), default=0)
            (unfinished / "trainer_state.json").write_text(json.dumps(trainer_state | {"number": number}, indent=2))
            write_through(unfinished)
    if accelerator.is_main_process:
        if folder.exists():  # a resumed run comes by here again
            os.replace(folder, f"{folder}.replaced.unfinished")
        os.replace(unfinished, folder)
        logger.info(f"Saved {folder}")
        pruned = (
            [*checkpoints(args.output_dir)][: -args.checkpoints_total_limit] if args.checkpoints_total_limit else []
        )
        for old in pruned:  # a kill must not leave a part of it under its name
            os.replace(old, f"{old}.unfinished")
        remove_unfinished(folder.parent)
    accelerator.wait_for_everyone()


def remove_unfinished(output_dir):
    """Remove what is no checkpoint yet, or no longer."""
    for folder in Path(output_dir).glob("checkpoint-*.unfinished"):
        with optional(f"Removing {folder}"):  # NFS may hold a file of it a little longer
            shutil.rmtree(folder)


def write_through(folder):
    """Have all files of a folder on the disk, and the folders where their file system can say so."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or os.name == "posix":  # Windows opens no folder, and syncs nothing read-only
            descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
            try:
                os.fsync(descriptor)
            except OSError as error:  # CIFS, sshfs and VirtualBox do not sync folders
                if path.is_file():
                    raise
                logger.warning_once(f"The file system of {folder.parent} does not sync folders: {error}")
            finally:
                os.close(descriptor)


def load_ema(ema, checkpoint):
    """Put the state that [`save_checkpoint`] wrote back into `ema`."""
    with safe_open(os.path.join(checkpoint, "ema.safetensors"), "pt") as file:
        for i, shadow in enumerate(ema.shadow_params):
            tensor = file.get_tensor(str(i))
            if hasattr(shadow, "device_mesh"):  # sharded over the processes
                tensor = distribute_tensor(tensor.to(shadow.device), shadow.device_mesh, shadow.placements)
            shadow.copy_(tensor)
        ema.optimization_step = int(file.metadata()["step"])


# What cluster schedulers send, Ctrl-C, and the end of a session but under `nohup`; Windows has not all of them.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
if signal.getsignal(STOP_SIGNALS[-1]) == signal.SIG_IGN:
    STOP_SIGNALS.pop()
EXIT_INTERRUPTED = 75  # a signal ended the run after a checkpoint (EX_TEMPFAIL of sysexits.h: start it again)


def on_stop_signals(handler, worker=None):
    """Set what this process, or this `worker` of a data loader, does on a signal to stop."""
    for number in STOP_SIGNALS:
        signal.signal(number, handler)


def collect_stop_signals():
    """A list that a signal to stop is added to, for the step to see; a second one ends the process at once."""
    signals = []
    on_stop_signals(lambda number, frame: (signals.append(number), on_stop_signals(signal.SIG_DFL)))
    return signals


# Validation
def log_validation(args, accelerator, transformer, vae, model_dir, prompt_embeds, step, signals=()):
    """
    Sample every validation prompt with the transformer that is being trained, the same seeds every time; save them as
    `OUTPUT_DIR/validation/step-N.png`, a row a prompt, and send them to the tracker. A signal in `signals` ends it.

    Returns:
        `dict[str, list[PIL.Image.Image]]`: the images of each prompt, on every process; none where it failed.
    """
    scheduler = read_scheduler(model_dir)
    options = {name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale", "max_sequence_length")}
    unwrapped = accelerator.unwrap_model(transformer)
    pipeline = StableDiffusion3Pipeline(unwrapped, scheduler, vae, **dict.fromkeys(TEXT_PARTS))
    pipeline.set_progress_bar_config(disable=True)
    prompts = dict.fromkeys(args.validation_prompt)  # one that was given twice is sampled once
    jobs = [(prompt, i) for prompt in prompts for i in range(args.num_validation_images)]
    done = []

    def inputs(prompt):
        # float32: the latents take this type, and sampling in bf16 would add its own rounding at every step
        return {name: tensor[None].to(accelerator.device).float() for name, tensor in prompt_embeds[prompt].items()}

    def stop_sampling(pipeline, step, timestep, tensors):
        pipeline._interrupt = bool(signals)  # what `pipeline.interrupt` reads at every step
        return tensors

    unwrapped.eval()
    with (
        optional("Sampling"),
        training_utils.offload_models(vae, device=accelerator.device),
        # Padded, because a sharded transformer needs every process at every forward.
        accelerator.split_between_processes(jobs, apply_padding=True) as mine,
    ):
        for prompt, i in tqdm(mine, desc="Validation", leave=False, disable=not accelerator.is_main_process):
            image = pipeline(
                **inputs(prompt),
                **{f"negative_{name}": tensor for name, tensor in inputs("").items()},
                **options,
                height=args.validation_height,
                width=args.validation_width,
                generator=torch.Generator().manual_seed(args.seed + i),
                callback_on_step_end=stop_sampling,
            ).images[0]
            done.append(((prompt, i), None if signals else image))
    unwrapped.train()
    images = dict(accelerate.utils.gather_object(done))
    if any(images.get(job) is None for job in jobs):
        return {}
    rows = {prompt: [images[prompt, i] for i in range(args.num_validation_images)] for prompt in prompts}
    if not accelerator.is_main_process:
        return rows
    with optional("Saving the validation images"):
        everything = [images[job] for job in jobs]
        grid = make_image_grid(everything, rows=len(rows), cols=args.num_validation_images)
        os.makedirs(os.path.join(args.output_dir, "validation"), exist_ok=True)
        grid.save(os.path.join(args.output_dir, "validation", f"step-{step}.png"))
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"validation": np.stack(everything)}, step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({"validation": everything}, step)
    return rows


# The result
def save_result(args, accelerator, transformer):
    """Write what the run was for, the weights, and `training_args.json`."""
    output = Path(args.output_dir)
    unfinished = output / "result.unfinished"
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    dtype = dtypes[args.save_dtype or ("fp32" if accelerator.mixed_precision == "no" else "bf16")]
    size = sum(p.numel() for p in transformer.parameters() if p.requires_grad) * dtype.itemsize / 2**30
    with writing(unfinished, f"The result, of {size:.1f} GiB,"):
        save_transformer(accelerator, transformer, unfinished, dtype)
        if accelerator.is_main_process:
            (unfinished / "training_args.json").write_text(json.dumps(vars(args), indent=2))
    if accelerator.is_main_process:
        for part in unfinished.iterdir():
            if (output / part.name).is_dir():
                shutil.rmtree(output / part.name)
            os.replace(part, output / part.name)
        unfinished.rmdir()
        logger.info(f"Saved the result in {output}")


def make_repository(args):
    """The full name of the hub's repository for the result, made where it is not there and may be written to."""
    api, name = huggingface_hub.HfApi(), args.hub_model_id or Path(args.output_dir).resolve().name
    what = f"--push_to_hub {name}: no such repository can be made, or written to"
    repo = ask_hub(what, api.create_repo, name, exist_ok=True, private=args.hub_private or None).repo_id
    ask_hub(what, api.auth_check, repo, write=True)
    return repo


def publish(args, images, changes):
    """Write the model card, with what [`log_validation`] and [`check_resume`] found; upload all where asked to."""
    output, rows, usage = Path(args.output_dir), [], USAGE
    shutil.rmtree(output / "samples", ignore_errors=True)  # of an earlier run
    for number, (prompt, samples) in enumerate(images.items()):
        files = {f"samples/{number}-{i}.png": image for i, image in enumerate(samples)}
        (output / "samples").mkdir(exist_ok=True)
        for name, image in files.items():
            image.save(output / name)
        rows.append(f"{prompt}\n\n" + " ".join(f"![]({name})" for name in files))
    base, title = args.pretrained_model_name_or_path, args.hub_model_id or output.resolve().name
    parents = [name for name in (base, args.transformer, getattr(args, "lora", None)) if name]
    if args.transformer and "transformer" not in usage:  # a LoRA on a full fine-tune
        start = f"{args.transformer!r}, subfolder='transformer', dtype=torch.bfloat16"
        usage = usage.replace("(base, ", f"(\n    base, transformer=SD3Transformer2DModel.from_pretrained({start}), ")
    data = huggingface_hub.ModelCardData(
        base_model=[name for name in parents if not os.path.exists(name)] or None,
        library_name="diffusers",
        license="other",
        license_name="stabilityai-ai-community",
        license_link="https://stability.ai/community-license-agreement",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers-training", "stable-diffusion-3", *Path(sys.argv[0]).stem.split("_")[2:]],
        widget=[{"text": prompt, "output": {"url": f"samples/{i}-0.png"}} for i, prompt in enumerate(images)] or None,
    )
    words = zip(sys.argv[1:], sys.argv, strict=False)  # each with the one before it
    command = shlex.join(word for word, last in words if "--hub_token" not in (word.split("=")[0], last))
    launcher = (
        f"torchrun --nproc_per_node {world}" if (world := os.environ.get("WORLD_SIZE", "1")) != "1" else "python"
    )
    card = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title}\n\nTrained from {', '.join(f'`{name}`' for name in parents)} with `{Path(sys.argv[0]).name}`.",
        *rows,
        "## Use\n\n```python\nimport torch\nfrom diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline\n\n"
        f"base, result = {base!r}, {title if args.push_to_hub else args.output_dir!r}\n{usage}\n"
        f"prompt = {next(iter(images), 'a prompt')!r}\n"
        f"image = pipeline(prompt, max_sequence_length={args.max_sequence_length}).images[0]\n```",
        f"## Command\n\n```bash\n{launcher} {Path(sys.argv[0]).name} {command}\n```",
        *changes,
        f"## Settings\n\n```json\n{(output / 'training_args.json').read_text()}\n```\n",
    ]
    huggingface_hub.ModelCard("\n\n".join(card)).save(output / "README.md")
    if args.push_to_hub:
        api = huggingface_hub.HfApi()
        parts = ["README.md", "training_args.json", "samples/*", "transformer/*", "pytorch_lora_weights.safetensors"]
        what = f"--push_to_hub {title}: the result is safe in {output}, but not uploaded"
        upload = {"folder_path": output, "allow_patterns": parts, "commit_message": "End of training"}
        ask_hub(what, lambda repo: api.upload_folder(repo_id=repo, **upload), title)


def run(args):
    """[`main`], with one line where it is interrupted before training, cannot compile, or has no memory left."""
    try:
        main(args)
    except KeyboardInterrupt:
        fail("interrupted before the training began")
    except torch._dynamo.exc.TorchDynamoException as error:
        needs = "Triton on a GPU (`pip install triton`, on Windows triton-windows) and a C++ compiler on a CPU"
        fail(f"--torch_compile needs {needs}; leave it out, or mend this: {str(error)[:500]}")
    except torch.OutOfMemoryError as error:
        flags = "--cache_latents --cache_prompt_embeds, --gradient_checkpointing, a smaller --train_batch_size, "
        flags += "--full_bf16 (all weights) or --bnb_quantization_config_path (LoRA), --offload"
        fail(f"out of memory ({str(error)[:200]}). Try, in this order, {flags}. {last_checkpoint(args.output_dir)}")
    finally:
        for worker in multiprocessing.active_children():
            if worker.daemon:  # a data loader's, which ignores the signal that it would be ended with
                worker.kill()
        output_lock.close()


if __name__ == "__main__":
    run(parse_args())
