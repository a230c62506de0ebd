#!/usr/bin/env python
# Copyright 2026 The SOAR for SD3.5 authors.
# SPDX-License-Identifier: Apache-2.0
"""
Train a LoRA of Stable Diffusion 3.5 on a reward, with Flow-GRPO.

    python examples/rl/train_sd3_flow_grpo_lora.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-3.5-medium --mixed_precision bf16 \
        --prompts prompts.txt --reward pickscore=1 --max_train_steps 500 --output_dir sd3-flow-grpo

A step draws pictures of some prompts, a group of each, with noise in the sampler's steps, scores them, and makes those
steps more likely that led to what is better than its group's mean. `diff train_sd3_nft_lora.py` shows the algorithm.

Method: Flow-GRPO, arXiv 2505.05470, in our own words after its formulas; a test compares log-probabilities, loss and
gradient with numbers of the authors' code (https://github.com/yifan123/flow_grpo).
"""

import argparse
import contextlib
import functools
import importlib
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import accelerate
import torch
from diffusers import AutoencoderKL, training_utils
from PIL import Image, ImageDraw
from safetensors.torch import load
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "evaluation")]
import soar_utils  # noqa: E402
import train_sd3_soar_lora as script  # noqa: E402
from data_utils import derive_seed, digest, make_table, read_json_lines  # noqa: E402


# Flags of the training script that mean here what they mean there. Its others, of data and SOAR, are refused.
SHARED_FLAGS = """
    --pretrained_model_name_or_path --revision --variant --transformer --lora --rank --lora_alpha --lora_layers
    --lora_blocks --no_text_encoder_3 --mixed_precision --gradient_checkpointing --torch_compile --allow_tf32
    --resolution --max_sequence_length --cache_dir --cache_batch_size --offload --output_dir --overwrite_output_dir
    --seed --train_batch_size --max_train_steps --learning_rate --lr_scheduler --lr_warmup_steps --lr_num_cycles
    --lr_power --lr_step_rules --use_8bit_adam --adam_beta1 --adam_beta2 --adam_weight_decay --adam_epsilon
    --max_grad_norm --checkpointing_steps --checkpoints_total_limit --resume_from_checkpoint --allow_resume_changes
    --save_dtype --validation_prompt --num_validation_images --validation_steps --validation_height
    --validation_width --num_inference_steps --guidance_scale --skip_final_inference --report_to --push_to_hub
    --hub_model_id --hub_private --hub_token
""".split()
MAX_ADVANTAGE = 5.0  # the authors'; a reward this many deviations above its group's mean has r = 1


def parse_args(input_args=None):
    """The training script's namespace with this one's flags in it."""
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n")[0],
        usage="%(prog)s ARGUMENTS, see --help",
        epilog=f"With the meaning of train_sd3_soar_lora.py, see its --help: {' '.join(SHARED_FLAGS)}. A step is one "
        "rollout with its updates. Other defaults, the authors': --learning_rate 3e-4, --lora_alpha 64, "
        "--adam_weight_decay 1e-4, --guidance_scale 1; --output_dir sd3-flow-grpo, --max_train_steps 1000.",
        allow_abbrev=False,
    )
    add, number = parser.add_argument, script.number
    add("--prompts", required=True, help="A prompt a line, or JSON lines with `prompt` and what the reward asks for.")
    add("--held_out_prompts", nargs="+", default=[], help="Such files of a test: their prompts may not be trained on.")
    add("--reward", nargs="+", required=True, metavar="NAME=WEIGHT", help="A metric, or module:function.")
    add("--num_groups", type=number(int, 1), default=8, help="Prompts a step, of all processes.")
    add("--group_size", type=number(int, 2), default=8, help="Pictures of each.")
    add("--num_updates", type=number(int, 1), default=1, help="Optimizer steps a rollout, each on its part of it.")
    add("--num_rollout_steps", type=number(int, 2), default=10, help="Of the sampler.")
    add("--rollout_guidance", type=number(), default=4.5, help="While drawing, and in training.")
    add("--sde_type", choices=["flow_sde", "cps"], default="flow_sde", help="Of the sampler's noisy steps.")
    add("--sde_noise_scale", type=number(float, 1e-3, 1), default=0.7, help="Its strength.")
    add(
        "--sde_window_size", type=number(int, 1), help="Noisy, and trained, steps in a row. Default: all but the last."
    )
    add("--sde_window_range", type=number(int, 0), nargs=2, default=[0, 5], help="Where the window may lie: from, to.")
    add("--clip_range", type=number(float, 0), default=1e-4, help="Of the ratio of probabilities.")
    add(
        "--kl_weight",
        type=number(float, 0),
        default=0.04,
        help="Of the distance from the start: mean over elements "
        "of (mean - mean_start)^2 / (2 g^2), g the diffusion coefficient, as in the authors' code of today; before "
        "2025-07 g^2 was the step's variance, and DiffusionNFT's is that of velocities.",
    )
    add("--advantage_scale", choices=["global", "group"], default="global", help="Whose deviation divides rewards.")
    add("--picture_steps", type=number(int, 1), default=10, help="Show best, median and worst every N steps.")
    own, rest = parser.parse_known_args(input_args)
    if unknown := [word for word in rest if word.startswith("--") and word.split("=")[0] not in SHARED_FLAGS]:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    if not os.path.isfile(own.prompts):
        parser.error(f"--prompts {own.prompts}: no such file")
    defaults = "--output_dir sd3-flow-grpo --learning_rate 3e-4 --lora_alpha 64 --adam_weight_decay 1e-4".split()
    defaults += ["--max_train_steps", "1000"]
    if any(word.startswith("--validation_prompt") for word in rest):
        defaults += ["--guidance_scale", "1"]
    images = ["--dataset_name", own.prompts]  # it insists on some
    args = script.parse_args([*defaults, *images, *rest])
    args.dataset_name = None
    args.cache_prompt_embeds = True
    if own.group_size % own.num_updates:
        parser.error(f"--group_size {own.group_size} cannot be shared out to --num_updates {own.num_updates}")
    if args.torch_compile and args.mixed_precision not in (None, "no"):
        # On a CPU a tenth of the pictures was then clipped before the policy had moved at all.
        parser.error("--torch_compile rounds otherwise with a gradient than without: ratios would not be 1 at first")
    if own.sde_window_size and not own.sde_window_size <= own.sde_window_range[1] - own.sde_window_range[0]:
        parser.error(f"--sde_window_size {own.sde_window_size} is longer than --sde_window_range")
    if own.sde_window_size and own.sde_window_range[1] >= own.num_rollout_steps:
        parser.error("--sde_window_range ends before --num_rollout_steps: the last step is never noisy")
    for item in own.reward:
        name, _, weight = item.rpartition("=")
        try:
            float(weight)
        except ValueError:
            name = ""
        if not name:
            parser.error(f"--reward {item}: want NAME=WEIGHT")
    vars(args).update(vars(own))
    return args


# The method
def log_probabilities(mode, mean, std, states):
    """
    Log-probability of each sample's next state, a mean over its elements, without gradient to `states`; with `cps`,
    as the authors have it, the negative mean squared distance alone.

    Args:
        mode (`str`): `"flow_sde"` or `"cps"`.
        mean (`torch.Tensor` of shape `(B, C, H, W)`), std (`torch.Tensor` of shape `(B,)`): Of `step_distribution`.
        states (`torch.Tensor` of shape `(B, C, H, W)`): The next states.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    distance = (states.detach() - mean).square().flatten(1).mean(dim=1)
    if mode == "cps":
        return -distance
    return -distance / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)


def clipped_losses(log_probs, old_log_probs, advantages, clip_range):
    """PPO's loss of each sample, `(B,)`, and its ratio, from `(B,)` each."""
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped), ratio


def advantages_of(rewards, sizes, scale):
    """
    How much better than its group's mean each picture is, in deviations of the group's rewards or of all.

    Args:
        rewards (`torch.Tensor` of shape `(N,)`): Of whole groups, one after the other.
        sizes (`list[int]`): Pictures of each group.
        scale (`str`): `"global"` or `"group"`.

    Returns:
        `torch.Tensor` of shape `(N,)`, float64, cut off at -5 and 5. Exactly 0 in a group of equal rewards.
    """
    rewards, found = rewards.double(), []
    for group in rewards.split(sizes):
        # A mean rounds: equal rewards would differ from theirs by some 1e-16, over a deviation that is none.
        centred = torch.zeros_like(group) if group.amax() == group.amin() else group - group.mean()
        found.append(centred / ((rewards if scale == "global" else group).std(correction=0) + 1e-4))
    return torch.cat(found).clamp(-MAX_ADVANTAGE, MAX_ADVANTAGE)


def is_free(args, advantages):
    """Whether the gradient of a batch is 0 for certain."""
    return args.kl_weight == 0 and bool((advantages == 0).all())


def noisy_steps(args, step):
    """The sampler's steps that are noisy and trained in a rollout: never the last, whose noise would stay."""
    if not args.sde_window_size:
        return range(args.num_rollout_steps - 1)
    low, high = args.sde_window_range
    start = random.Random(derive_seed(args.seed, "window", step)).randint(low, high - args.sde_window_size)
    return range(start, start + args.sde_window_size)


def transition(args, predict, states, sigmas, k):
    """Mean and standard deviation of step `k` from `states`, were it noisy, guided; one graph has both branches."""
    sigma, sigma_next, sigma_max = (level.expand(len(states)) for level in (sigmas[k], sigmas[k + 1], sigmas[1]))
    velocity = predict(states, sigma)
    if args.rollout_guidance != 1:
        velocity = soar_utils.apply_guidance(velocity, predict(states, sigma, null=True), args.rollout_guidance)
    step = states, velocity, sigma, sigma_next, args.sde_type, args.sde_noise_scale
    return soar_utils.step_distribution(*step, sigma_max=sigma_max), velocity


def old_decay(args, updates):
    """The policy that draws is the trained one."""
    return 0.0


@torch.no_grad()
def sample(args, predict, normal, names, sigmas):
    """
    Draw pictures, with noise in the steps of [`noisy_steps`]: their latents, and of each such step its number, the
    state before and after it, and the log-probability.

    Args:
        args (`argparse.Namespace`): The command line.
        predict (callable): `predict(states, sigma, null=False)` is the velocity under these pictures' prompts.
        normal (callable): `normal(*what)` is unit noise of a picture, on the CPU, the same for the same `what`.
        names (`list[tuple]`): The name of each picture in the run.
        sigmas (`torch.Tensor` of shape `(K + 1,)`): Of the sampler, from 1 to 0.

    Returns:
        `tuple[torch.Tensor, Any]`: latents `(B, C, H, W)`, float32, and what [`policy_losses`] gets in `records`.
    """
    latents = torch.stack([normal("start", *name) for name in names]).to(sigmas.device)
    noisy, record = noisy_steps(args, names[0][0]), []
    for k in range(args.num_rollout_steps):
        (mean, std), velocity = transition(args, predict, latents, sigmas, k)
        if k in noisy:
            noise = torch.stack([normal("step", *name, k) for name in names]).to(sigmas.device)
            following = mean + std.view(-1, 1, 1, 1) * noise
            log_probs = log_probabilities(args.sde_type, mean, std, following)
            record.append((k, latents.cpu(), following.cpu(), log_probs.cpu()))
        else:
            levels = (level.expand(len(latents)) for level in (sigmas[k], sigmas[k + 1]))
            following = soar_utils.rollout_step(latents, velocity, *levels)
        latents = following
    return latents, record


def policy_losses(args, predict, normal, weights_of, part, sigmas):
    """
    The loss of an update, in terms that each fill one forward. The caller runs `backward` on a term before it asks for
    the next: one graph is alive at a time.

    Args:
        args, normal, sigmas: See [`sample`].
        predict (callable): `predict(pictures, states, sigma, null=False)` is the velocity under their prompts.
        weights_of (callable): `weights_of("old")` is the context in which `predict` is the policy that drew, and
            `weights_of("start")` that in which it is the model that the run began with.
        part (`types.SimpleNamespace`): `pictures`, `list[tuple[dict, tuple]]`, each one's row and name; `batches`, as
            they were drawn, lists of their numbers; `records` of each batch; `advantages` `(N,)` of all pictures;
            `equal`, whether the trained policy is still the one that drew.

    Yields:
        `tuple[torch.Tensor, dict[str, torch.Tensor]]`: a term, and its share of the values to log, detached.
    """
    terms = [(of, *made) for of, record in zip(part.batches, part.records, strict=True) for made in record]
    terms = [term for term in terms if not is_free(args, part.advantages[term[0]])]
    count = sum(map(len, part.batches)) * len(part.records[0])  # also of what was left out

    def mean_and_std(of, k, states):
        pictures = [part.pictures[i] for i in of]
        some = functools.partial(predict, pictures)
        return transition(args, some, states.to(sigmas.device), sigmas, k)[0]

    starts, off = None, []
    if args.kl_weight:
        with torch.no_grad(), weights_of("start"):
            starts = [mean_and_std(of, k, states)[0].cpu() for of, k, states, *_ in terms]
    for number, (of, k, states, following, old_log_probs) in enumerate(terms):
        mean, std = mean_and_std(of, k, states)
        log_probs = log_probabilities(args.sde_type, mean, std, following.to(mean.device))
        inputs = old_log_probs.to(mean.device), part.advantages[of].float().to(mean.device), args.clip_range
        losses, ratio = clipped_losses(log_probs, *inputs)
        loss = losses.sum() / count
        shares = {"policy_loss": loss.detach(), "ratio_error": (ratio - 1).abs().detach().sum() / count}
        shares["clipped"] = ((ratio - 1).abs() > args.clip_range).float().sum() / count
        off.append((ratio - 1).abs().detach().max())
        if args.kl_weight:
            coefficient = std / (sigmas[k] - sigmas[k + 1]).sqrt()
            distance = (mean - starts[number].to(mean.device)).square().flatten(1).mean(dim=1)
            kl = (distance / (2 * coefficient**2)).sum() / count
            loss, shares["kl"] = loss + args.kl_weight * kl, kl.detach()
        yield loss, shares
    if part.equal and off and (largest := float(torch.stack(off).max())) > args.clip_range:
        script.logger.warning(
            f"Before its first update the policy's ratio is up to {largest:.1e} off 1, more than --clip_range "
            f"{args.clip_range:g}: a forward with a gradient rounds otherwise here. A larger range, or "
            "--mixed_precision no, keeps rounding from deciding what is trained."
        )


def main(args):
    # Setup
    if args.hub_token:  # there every library finds it, and nothing that is written does
        os.environ["HF_TOKEN"], args.hub_token = args.hub_token, None
    accelerator = script.make_accelerator(args)
    if accelerator.is_fsdp2 or accelerator.state.deepspeed_plugin is not None:
        script.fail("the LoRA is switched on and off in a step: not tried with FSDP2 and DeepSpeed; use ddp.yaml")
    device, processes = accelerator.device, accelerator.num_processes
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    args.cache_dir = args.cache_dir or os.path.join(args.output_dir, "cache")
    merged, args.lora = args.lora, None  # of the start, which the new LoRA lies on top of

    # Everything that can be wrong with the input, before any model loads
    model_config = script.run_on_each(accelerator, script.check_model, args)
    if merged:  # and whether it is a LoRA of this model, by the check of a run that goes on with it
        alone = {"lora": merged, "rank": 32, "lora_alpha": None, "lora_layers": None, "lora_blocks": None}
        script.run_on_each(accelerator, script.check_model, argparse.Namespace(**vars(args) | alone))
    model_dir = model_config["folder"]
    script.check_folders(accelerator, args)
    checkpoint, saved_state = script.run_on_main(accelerator, script.find_checkpoint, args)
    if args.seed is None:
        seed = saved_state["compared"]["seed"] if checkpoint else random.getrandbits(31)
        args.seed = script.run_on_main(accelerator, lambda: seed)
    prompts = script.run_on_each(accelerator, read_prompts, args)
    images = args.num_groups * args.group_size // processes  # of this process
    if args.num_groups % processes:
        script.fail(f"--num_groups {args.num_groups} cannot be shared out to {processes} processes")
    with failing_together():
        rewards = script.run_on_each(accelerator, load_rewards, args, device, prompts)
    if args.report_to != "none":
        tracked = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in vars(args).items()}
        with script.failing_with(f"--report_to {args.report_to}"):
            options = {"wandb": {"dir": args.output_dir}, "tensorboard": {"purge_step": saved_state["step"] + 1}}
            accelerator.init_trackers(Path(sys.argv[0]).stem, tracked, options)
    size = args.resolution, args.resolution
    table = make_table({"image": "", "digest": digest(r), "size": size, "captions": [r["text"]]} for r in prompts)
    trainer_state = script.make_trainer_state(args, args.num_groups * args.group_size, table)
    trainer_state["compared"]["merged"] = merged
    if checkpoint:
        script.run_on_main(accelerator, script.check_resume, checkpoint, saved_state, trainer_state)
    script.run_on_main(accelerator, script.check_room, args, model_config["trained"], saved_state["step"])
    if args.push_to_hub:
        args.hub_model_id = script.run_on_main(accelerator, script.make_repository, args)

    # Encoders: each prompt is encoded once, to disk
    script.run_on_each(accelerator, script.download_model, args, model_dir)
    digests = script.run_on_main(accelerator, script.digest_encoders, args, model_dir, weight_dtype)
    embeds = script.TrainingImages(args, table, table, digests)
    with script.loading(args.pretrained_model_name_or_path):
        vae = script.load_part(AutoencoderKL, model_dir, "vae", args.variant)
    vae.requires_grad_(False).eval().to(device)
    vae.enable_slicing()  # pictures are decoded one by one: a batch of them takes more memory than the transformer
    texts = ["", *args.validation_prompt]
    inputs = model_dir, model_config, vae, weight_dtype, texts
    script.build_caches(args, accelerator, embeds, *inputs)
    prompt_embeds, _ = script.embed_prompts(args, embeds, model_dir, model_config, weight_dtype, texts, device)
    training_utils.free_memory()

    # Model and optimizer
    with script.loading(args.pretrained_model_name_or_path, checkpoint):
        transformer = script.load_transformer(args, model_dir, weight_dtype, checkpoint, merged=merged)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.torch_compile:
        # Every kind of block is compiled with gradient, without, without its LoRA, for a last batch, for validation.
        torch._dynamo.config.optimize_ddp = False
        torch._dynamo.config.recompile_limit = 32
        for block in transformer.transformer_blocks:
            block.compile(dynamic=False)
    optimizer = script.make_optimizer(args, [p for p in transformer.parameters() if p.requires_grad])
    transformer, optimizer = accelerator.prepare(transformer, optimizer)
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    old = training_utils.EMAModel(parameters)  # the policy that draws: it follows with a decay of its own
    old.to(device, dtype=torch.float32)
    write = functools.partial(script.save_transformer, accelerator, transformer)
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: (write(folder), weights.clear()))
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
    if checkpoint:
        with script.loading(args.pretrained_model_name_or_path, checkpoint):
            accelerator.load_state(checkpoint)
            script.load_ema(old, checkpoint)
    step = saved_state["step"]
    lr_scheduler = script.make_lr_scheduler(args, optimizer.optimizer, step)
    scheduler = script.read_scheduler(model_dir)
    scheduler.set_timesteps(args.num_rollout_steps)
    sigmas = scheduler.sigmas.to(device)
    shape = [model_config["latent_channels"], *(side // model_config["vae_scale_factor"] for side in size)]
    if accelerator.is_main_process and args.overwrite_output_dir and not args.resume_from_checkpoint:
        shutil.rmtree(Path(args.output_dir, "rollouts"), ignore_errors=True)
        for path in script.old_results(args.output_dir):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    @functools.lru_cache(maxsize=64)
    def embedded(text):
        """The embeddings of a prompt, read once for all the forwards of its pictures."""
        return load(embeds.embeds[embeds.embeds_key(text)])

    def predict(pictures, states, sigma, null=False):
        """The velocity of states under the prompts of these pictures, or under the empty one."""
        tensors = [embedded("" if null else row["text"]) for row, _ in pictures]
        batch = {name: torch.stack([t[name] for t in tensors]).to(device) for name in tensors[0]}
        return script.predict_velocity(transformer, batch, states, sigma)

    def normal(*what):
        """Unit noise that depends on the seed and on what it is for alone."""
        generator = torch.Generator().manual_seed(derive_seed(args.seed, *what))
        return torch.randn(shape, generator=generator)

    @contextlib.contextmanager
    def weights_of(policy):
        """Inside, the model is the policy that drew, or what the run began with."""
        if policy == "old":
            with script.averaged_weights(old, parameters):
                yield
        else:
            accelerator.unwrap_model(transformer).disable_adapters()
            yield
            accelerator.unwrap_model(transformer).enable_adapters()

    # Training
    signals = script.collect_stop_signals()
    hidden = not accelerator.is_main_process
    progress = tqdm(desc="Training", total=args.max_train_steps, initial=step, unit="rollout", disable=hidden)
    scored_by = ThreadPoolExecutor(1)
    script.limit_waits(minutes=30)
    while step < args.max_train_steps:
        started = time.perf_counter()
        # 1. The old policy draws groups of pictures, and what is drawn is scored beside.
        groups = groups_of(args, len(prompts), step)[accelerator.process_index :: processes]
        # A picture: its prompt's row, and its name, which is the step, the prompt's place and its number in the group.
        pictures = [(prompts[prompt], (step, place, i)) for place, prompt in groups for i in range(args.group_size)]
        parts = []  # what each update trains on: an equal share of every group
        for update in range(args.num_updates):
            mine = [i for i in range(images) if i % args.group_size % args.num_updates == update]
            batches = [mine[i : i + args.train_batch_size] for i in range(0, len(mine), args.train_batch_size)]
            parts.append(SimpleNamespace(pictures=pictures, batches=batches, records=[]))
        transformer.eval()
        shown, scores = {}, {}
        values = defaultdict(dict)  # of each reward, and the weighted sum, a number a picture
        with failing_together():
            with weights_of("old"):
                for part in parts:
                    for of in tqdm(part.batches, desc="Drawing", unit="batch", leave=False, disable=hidden):
                        some = [pictures[i] for i in of]
                        names = [name for _, name in some]
                        latents, record = sample(args, functools.partial(predict, some), normal, names, sigmas)
                        part.records.append(record)
                        shown |= dict(zip(of, decode(vae, latents), strict=True))
                        rows = [row for row, _ in some]
                        scores[tuple(of)] = scored_by.submit(score, rewards, [shown[i] for i in of], rows)
            for of, future in scores.items():
                for name, numbers in future.result().items():
                    values[name] |= dict(zip(of, numbers, strict=True))
        values = {name: [numbers[i] for i in range(images)] for name, numbers in values.items()}
        everything = accelerate.utils.gather_object([values])
        values = {name: [number for part in everything for number in part[name]] for name in values}
        reward = torch.tensor(values["reward"], dtype=torch.float64)
        advantages = advantages_of(reward, [args.group_size] * args.num_groups, args.advantage_scale)
        advantages = advantages[accelerator.process_index * images :][:images]

        # 2. Each update trains on its part of them.
        transformer.train()
        sums = defaultdict(float, policy_loss=0.0, grad_norm=0.0, below_epsilon=0.0)
        for update, part in enumerate(parts):
            decay = old_decay(args, step * args.num_updates)
            part.equal, part.advantages = update == 0 and (step == 0 or decay == 0), advantages
            with failing_together(), accelerator.no_sync(transformer):
                for loss, shares in policy_losses(args, predict, normal, weights_of, part, sigmas):
                    accelerator.backward(loss)
                    for name, share in shares.items():
                        sums[name] += share / args.num_updates
            trained = average_gradients(accelerator, parameters)
            if trained:
                grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
                sums["grad_norm"] += grad_norm / args.num_updates
                # What AdamW hardly moves, as its epsilon is added to the root of the squared gradient's mean.
                below = sum((p.grad.abs() < args.adam_epsilon).sum() for p in parameters if p.grad is not None)
                sums["below_epsilon"] += below / sum(p.numel() for p in parameters) / args.num_updates
            means = mean_over_processes(sums)
            # fp16's scaler deals with a gradient that is not finite itself.
            checked = means if accelerator.scaler is None else means.keys() - {"grad_norm"}
            if not all(math.isfinite(means[name]) for name in checked):
                script.fail(f"step {step + 1}: not finite ({means}). {script.last_checkpoint(args.output_dir)}")
            if trained:
                optimizer.step()
                optimizer.zero_grad()
        decay = old_decay(args, (step + 1) * args.num_updates)
        for shadow, parameter in zip(old.shadow_params, parameters, strict=True):
            shadow.lerp_(parameter.detach(), 1 - decay) if decay else shadow.copy_(parameter.detach())

        # 3. What was found
        step += 1
        logs = means | {name: sum(numbers) / len(numbers) for name, numbers in values.items()}
        logs |= {"reward_std": reward.std(correction=0).item(), "old_decay": decay}
        spread = reward.view(-1, args.group_size)
        logs["lr"] = lr_scheduler.get_last_lr()[0]
        logs["equal_groups"] = (spread.amax(1) == spread.amin(1)).double().mean().item()
        logs["seconds"] = time.perf_counter() - started
        lr_scheduler.step()
        with script.optional("Logging"):
            accelerator.log(logs, step=step)
        progress.update()
        progress.set_postfix(reward=logs["reward"], loss=logs["policy_loss"])
        if step % args.picture_steps == 0 and accelerator.is_main_process:
            with script.optional("The picture of the rollout"):
                path = Path(args.output_dir, "rollouts", f"step-{step}.png")
                show([shown[i] for i in range(images)], values["reward"][:images], pictures, path)
        stopping = any(accelerate.utils.gather_object([bool(signals)]))
        trainer_state |= {"step": step, "skipped_steps": 0}
        if step % args.checkpointing_steps == 0 or stopping:
            script.save_checkpoint(accelerator, old, trainer_state, args)
        if stopping:
            accelerator.end_training()
            script.logger.info(f"Stopped by a signal after step {step}; --resume_from_checkpoint latest goes on.")
            sys.exit(script.EXIT_INTERRUPTED)
        if args.validation_prompt and step % args.validation_steps == 0 and step < args.max_train_steps:
            script.log_validation(args, accelerator, transformer, vae, model_dir, prompt_embeds, step, signals)
    progress.close()
    script.on_stop_signals(signal.SIG_DFL)
    script.limit_waits(hours=12)  # for the upload of the result

    # Result
    samples = {}
    script.save_result(args, accelerator, transformer)
    if args.validation_prompt and not args.skip_final_inference:
        samples = script.log_validation(args, accelerator, transformer, vae, model_dir, prompt_embeds, step)
    if accelerator.is_main_process:
        with script.optional("The model card, or its upload with the result,"):
            start = [f"It lies on top of the LoRA `{merged}`: load and fuse that one first."] if merged else []
            script.publish(args, samples, trainer_state["changes"] + start)
    accelerator.wait_for_everyone()
    with script.optional("Logging"):
        accelerator.end_training()


# Processes
@contextlib.contextmanager
def failing_together():
    """Around what may fail on one process alone: the others end with its message, and do not wait for it."""
    error = None
    try:
        yield
    except (Exception, SystemExit) as raised:
        error = raised
    messages = accelerate.utils.gather_object([error and (str(error) or type(error).__name__)])
    if error:
        raise error
    if any(messages):
        script.fail(f"another process failed: {next(filter(None, messages)).removeprefix('error: ')}")


def average_gradients(accelerator, parameters):
    """
    Average the gradients over the processes; returns whether there were any. Processes have different numbers of
    terms, or none, so none of their backwards may wait for another process: this is where they meet.
    """
    if not any(accelerate.utils.gather_object([any(p.grad is not None for p in parameters)])):
        return False
    if accelerator.num_processes > 1:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients = [parameter.grad for parameter in parameters]
        mean = accelerator.reduce(parameters_to_vector(gradients) / accelerator.num_processes)
        vector_to_parameters(mean, gradients)
    return True


def mean_over_processes(numbers):
    """The means of numbers that each process has under names, as `dict[str, float]`; one that lacks a name has 0."""
    each = accelerate.utils.gather_object([{name: float(number) for name, number in numbers.items()}])
    names = dict.fromkeys(name for found in each for name in found)
    return {name: sum(found.get(name, 0.0) for found in each) / len(each) for name in names}


# Prompts and pictures
def read_prompts(args):
    """The rows of --prompts, `list[dict]` with `text`; none of them may stand in --held_out_prompts."""
    rows = [row for _, row in read_prompt_file(args.prompts)]
    if not rows:
        script.fail(f"--prompts {args.prompts} has none")
    for path in args.held_out_prompts:
        with script.failing_with(f"--held_out_prompts {path}"):
            tested = {row["text"].strip().lower() for _, row in read_prompt_file(path)}
        if both := [row["text"] for row in rows if row["text"].strip().lower() in tested]:
            script.fail(f"--prompts {args.prompts} has {len(both)} prompts of {path}, such as {both[0]!r}")
    return rows


def read_prompt_file(path):
    """Yield the place and the row of each line: JSON with `prompt` or `text`, or a prompt as it is."""
    if Path(path).suffix in (".jsonl", ".json"):
        for where, row in read_json_lines(path):
            text = row.get("text", row.get("prompt"))
            if not isinstance(text, str) or not text.strip():
                script.fail(f"{where} has no `prompt`")
            yield where, row | {"text": text}
    else:
        with script.failing_with(f"{path} is no text in UTF-8"):
            lines = Path(path).read_text("utf-8-sig").splitlines()
        yield from ((f"{path}, line {i}", {"text": line.strip()}) for i, line in enumerate(lines, 1) if line.strip())


def groups_of(args, number, step):
    """Place in the run and number of each prompt of a step: pass after pass of all of them, each in its own order."""

    @functools.lru_cache(maxsize=2)
    def order(epoch):
        generator = torch.Generator().manual_seed(derive_seed(args.seed, "prompts", epoch))
        return torch.randperm(number, generator=generator).tolist()

    places = range(step * args.num_groups, (step + 1) * args.num_groups)
    return [(place, order(place // number)[place % number]) for place in places]


@torch.no_grad()
def decode(vae, latents):
    """Pictures of latents `(B, C, H, W)`: `list[PIL.Image.Image]`."""
    pixels = vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample
    pixels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in pixels]


def show(images, rewards, pictures, path):
    """Save the best, the median and the worst picture with their rewards and prompts: hacking is seen first here."""
    order = sorted(range(len(images)), key=rewards.__getitem__, reverse=True)
    chosen = [order[0], order[len(order) // 2], order[-1]]
    side = max(images[0].height, 160)
    sheet = Image.new("RGB", (3 * side, side + 40), "white")
    draw = ImageDraw.Draw(sheet)
    for place, i in enumerate(chosen):
        sheet.paste(images[i].resize((side, side)), (place * side, 0))
        text = pictures[i][0]["text"]
        draw.text((place * side + 4, side + 4), f"{rewards[i]:.3f}\n{text[: side // 7]}", fill="black")
    path.parent.mkdir(exist_ok=True)
    sheet.save(path)


# Rewards
def load_rewards(args, device, rows):
    """
    What scores pictures: `dict` of name to weight and `function(images, rows)`, which returns a number for each. A
    name is a metric of `examples/evaluation`, or `module:function` of one's own, from the current folder.
    """
    import scoring

    rewards = {}
    for item in args.reward:
        name, _, weight = item.rpartition("=")
        if ":" in name:
            module, _, function = name.partition(":")
            with script.failing_with(f"--reward {name}"):
                sys.path.insert(0, os.getcwd())
                rewards[name] = float(weight), getattr(importlib.import_module(module), function)
        elif (metric := name.removesuffix("_soft")) in scoring.METRICS and name in (metric, "geneval_soft"):
            try:
                scorer = scoring.load_scorer(metric, device, rows)
            except scoring.Unavailable as error:
                script.fail(f"--reward {name}: {error}")
            rewards[name] = float(weight), functools.partial(scores_of, scorer, "score" if name == metric else "soft")
        else:
            known = ", ".join([*scoring.METRICS, "geneval_soft"])
            script.fail(f"--reward {name}: want one of {known}, or module:function")
    return rewards


def scores_of(scorer, key, images, rows):
    return [found[key] for found in scorer(images, rows)]


@torch.no_grad()
def score(rewards, images, rows):
    """Of each reward its numbers for some pictures, and the weighted sum as `reward`; ends the run on any fault."""
    values = {"reward": [0.0] * len(images)}
    for name, (weight, function) in rewards.items():
        with script.failing_with(f"--reward {name}"):
            values[name] = [float(value) for value in function(images, rows)]
        if len(values[name]) != len(images) or not all(map(math.isfinite, values[name])):
            script.fail(f"--reward {name} gave {json.dumps(values[name])[:200]} for {len(images)} pictures")
        pairs = zip(values["reward"], values[name], strict=True)
        values["reward"] = [total + weight * value for total, value in pairs]
    return values


def run(args):
    """[`main`], with one line where it is interrupted before training, cannot compile, or has no memory left."""
    try:
        main(args)
    except KeyboardInterrupt:
        script.fail("interrupted before the training began")
    except torch._dynamo.exc.TorchDynamoException as error:
        script.fail(
            f"--torch_compile needs Triton on a GPU, a C++ compiler on a CPU. Leave it out: {str(error)[:400]}"
        )
    except torch.OutOfMemoryError as error:
        flags = "--gradient_checkpointing, a smaller --train_batch_size, --use_8bit_adam, --offload"
        script.fail(f"out of memory ({str(error)[:200]}). Try {flags}. {script.last_checkpoint(args.output_dir)}")
    finally:
        script.output_lock.close()


if __name__ == "__main__":
    run(parse_args())
