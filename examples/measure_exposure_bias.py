# SPDX-License-Identifier: Apache-2.0
"""
Measure how much worse models predict on states that they reached themselves than on the ideal states of training.

    python examples/measure_exposure_bias.py --pretrained_model_name_or_path stabilityai/stable-diffusion-3.5-medium \
        --models base=stabilityai/stable-diffusion-3.5-medium SFT=sd3-sft SOAR=sd3-soar SOAR-LoRA=sd3-soar-lora \
        --train_data_dir held_out_images --resolution 512 --center_crop --mixed_precision bf16 \
        --output_dir exposure_bias

A model is what a training run left, a folder with `transformer/` or with `pytorch_lora_weights.safetensors`, or a
pipeline, a folder or a hub id. `--pretrained_model_name_or_path` gives all else, and the weights under a LoRA. Data
are read, cropped and encoded as by the training scripts, with their flags; best use images that no model has seen.

At several noise levels sigma (1 is noise) of the sampler's grid, `sigma = shift_sigma(1 - i / K)`, for every image:

- `ideal`: mean squared error of the predicted clean latents, `x - sigma * velocity`, under the caption and without
  guidance, on the ideal state `x = (1 - sigma) * latents + sigma * noise`; in scaled latent units;
- `own`: the same error at the same sigma on the state that the model reaches by k guided Euler steps of its own, from
  the ideal state k levels earlier, of the same latents and noise. It is sigma^2 times SOAR's correction loss there;
- `ratio`: own / ideal, the geometric mean over the images (so not quite the quotient of the two columns);
- `start`: the model's ideal error k levels earlier, where its own steps began;
- `growth`: standard deviation of the own state, relative to the ideal state's.

A model's `gap` is log ratio, averaged over the levels; for one number a model, take that of the largest k. All models
see the same images, crops and noise, so each is compared with the first of --models image by image: the change of the
gap and of both log errors (-0.1 is 10 % less), with a 95 % interval over the images (normal: have 30 or more).

What the numbers do not say:

- The own states are k steps off the ideal path. Only where these steps begin at sigma 1 are they a real trajectory.
- The aim is not a ratio of 1. After its own steps a model knows no more of this image than the state before them
  showed, so even a perfect model's own error is no less than its `start`, on average; and guidance leaves the path on
  purpose. The larger k, the more of the ratio is this. Compare models, at the same k, guidance and images.
- The gap also falls when the ideal error rises: read its change with those of `own` and `ideal`.
- The intervals are over images and their noise, and say nothing of another training run of the same recipe.
"""

import argparse
import itertools
import json
import math
import sys
import tempfile
from pathlib import Path

import datasets
import diffusers
import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.training_utils import free_memory
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from trained import find_trained, load_trained  # noqa: E402

import soar_utils  # noqa: E402
import train_sd3_soar as script  # noqa: E402


# Flags of the training script that mean here what they mean there. Its others, of training, are refused.
SHARED_FLAGS = """
    --pretrained_model_name_or_path --no_text_encoder_3 --mixed_precision --dataset_name --dataset_config_name
    --dataset_split --train_data_dir --jsonl_path --image_dir --image_column --caption_column --skip_bad_images
    --resolution --center_crop --use_aspect_ratio_buckets --aspect_ratio_buckets --max_sequence_length --offload
    --dataloader_num_workers --output_dir --seed
""".split()
ROUNDING = 1e-10  # squared error that float32 itself may make on latents of about unit size: no ratio below it
NORMAL_95 = 1.96  # standard errors on either side of the mean


def parse_args(input_args=None):
    """The training script's namespace with this one's flags in it, and with `report_arguments`, what it reports."""
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n")[0],
        usage="%(prog)s ARGUMENTS, see --help",
        epilog=f"With the meaning of train_sd3_soar.py, see its --help: {' '.join(SHARED_FLAGS)}. "
        "Other defaults: --output_dir exposure_bias, --seed 0.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--models", nargs="+", required=True, metavar="NAME=PATH", help="The others are compared with the first.")
    add("--num_own_steps", type=script.number(int, 1), nargs="+", default=[1, 4], help="Own steps k; one or several.")
    add("--num_sigmas", type=script.number(int, 1), default=8, help="Noise levels, spread evenly over the grid.")
    add("--num_samples", type=script.number(int, 2), default=64, help="Images, drawn from the data set.")
    add("--batch_size", type=script.number(int, 1), default=4)
    add("--num_inference_steps", type=script.number(int, 1), default=40, help="Of the grid that the steps are on.")
    add("--guidance_scale", type=script.number(), default=4.5, help="Of the own steps.")
    own, rest = parser.parse_known_args(input_args)
    if unknown := [word for word in rest if word.startswith("--") and word.split("=")[0] not in SHARED_FLAGS]:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    args = script.parse_args(["--output_dir", "exposure_bias", "--seed", "0", *rest])
    own.num_own_steps = sorted(set(own.num_own_steps))
    args.report_arguments = {flag.strip("-"): getattr(args, flag.strip("-")) for flag in SHARED_FLAGS} | vars(own)
    vars(args).update(vars(own))

    most = args.num_own_steps[-1]
    if args.num_sigmas > args.num_inference_steps - most:  # the levels above sigma 0 that have so many above them
        asked = f"--num_own_steps {most} and --num_sigmas {args.num_sigmas}"
        parser.error(f"{asked} do not fit into --num_inference_steps {args.num_inference_steps}: give fewer")
    return args


def check_models(args, model_config):
    """Of each name in --models what [`find_trained`] says; refuses what is no model, before weights load."""
    models = {}
    for item in args.models:
        name, _, path = item.partition("=")
        if not name or not path or name in models:
            script.fail(f"--models {item}: want NAME=PATH, every name once")
        with script.failing_with(f"--models {item}"):
            models[name] = find_trained(path)
        if "transformer" in models[name]:
            with script.failing_with(f"--models {item} is no folder, and no model of the hub that can be read"):
                config = SD3Transformer2DModel.load_config(path, subfolder="transformer")
            sizes = config["in_channels"], config["joint_attention_dim"]
            if sizes != (model_config["latent_channels"], model_config["joint_attention_dim"]):
                script.fail(f"--models {item} takes other latents or prompts than --pretrained_model_name_or_path")
    return models


def encode_samples(args, model_config, images, dtype, device):
    """
    All that the transformers are given, in batches of one image size. The encoders are gone on return.

    Args:
        model_config (`dict`): Of the base, from `check_model`.
        images (`TrainingImages`): The samples. What is random about one depends on --seed and its index.

    Returns:
        `list[dict]`: on the CPU, `latents` and `noise`, float32; `prompt_embeds` and `pooled_prompt_embeds` of the
        caption, and, with the prefix `null_`, of the empty caption.
    """
    base = args.pretrained_model_name_or_path
    with script.loading(base):
        vae = script.load_part(AutoencoderKL, base, "vae").requires_grad_(False)
    vae.to("cpu" if args.offload else device)
    text_encoders = script.load_text_encoders(args, base, dtype, model_config["joint_attention_dim"], device)
    null_embeds = script.encode_prompts(text_encoders, [""], args.max_sequence_length, device)

    def size(index):
        return tuple(images.inspected[index]["size"])

    batches = []
    for _, indices in itertools.groupby(sorted(range(len(images)), key=size), key=size):
        keys = [(index, index) for index in indices]
        batches += [keys[start : start + args.batch_size] for start in range(0, len(keys), args.batch_size)]
    loader = torch.utils.data.DataLoader(
        images, batch_sampler=batches, collate_fn=script.collate, num_workers=args.dataloader_num_workers
    )
    encoded = []
    for batch in tqdm(loader, desc="Encoding", unit="batch"):
        batch = script.prepare_batch(batch, null_embeds, vae, text_encoders, args.max_sequence_length, device)
        shape = batch["latents"].shape[1:]
        batch["noise"] = torch.stack([torch.randn(shape, generator=generator) for generator in batch["generators"]])
        encoded.append({name: batch[name].cpu() for name in batch if "embeds" in name or name in ("latents", "noise")})
    return encoded


@torch.no_grad()
def measure_batch(transformer, batch, sigmas, points, own_steps, guidance_scale):
    """
    Errors on ideal and on own states.

    Args:
        transformer (`SD3Transformer2DModel`): Predicts the velocity.
        batch (`dict`): From [`encode_samples`], on the device of the transformer.
        sigmas (`torch.Tensor` of shape `(K,)`): Noise levels of the sampler's grid, descending from 1.
        points (`list[int]`): Where to measure, as indices of `sigmas`; at least the largest of `own_steps`.
        own_steps (`list[int]`): Own steps k before the measurement.
        guidance_scale (`float`): Of the own steps.

    Returns:
        `torch.Tensor` of shape `(4, len(points), len(own_steps), B)`, float64, on the CPU: ideal, start and own error
        and growth, see above.
    """
    latents, noise = batch["latents"], batch["noise"]
    levels = sigmas.to(latents.device)[:, None].expand(-1, len(latents))

    def predict_velocity(state, sigma, null=False):
        return script.predict_velocity(transformer, batch, state.to(transformer.dtype), sigma, null=null).float()

    def error(state, velocity, sigma):
        predicted_latents = soar_utils.rollout_step(state, velocity, sigma, torch.zeros_like(sigma))
        return soar_utils.flow_matching_loss(predicted_latents, latents)

    rows = []
    for point in points:
        ideal_state = soar_utils.add_noise(latents, noise, levels[point])
        ideal = error(ideal_state, predict_velocity(ideal_state, levels[point]), levels[point])
        for k in own_steps:
            state = soar_utils.add_noise(latents, noise, levels[point - k])
            velocity = predict_velocity(state, levels[point - k])
            start = error(state, velocity, levels[point - k])
            for i in range(point - k, point):
                if guidance_scale != 1:
                    velocity_uncond = predict_velocity(state, levels[i], null=True)
                    velocity = soar_utils.apply_guidance(velocity, velocity_uncond, guidance_scale)
                state = soar_utils.rollout_step(state, velocity, levels[i], levels[i + 1])
                velocity = predict_velocity(state, levels[i + 1])
            own = error(state, velocity, levels[point])
            growth = state.flatten(1).std(dim=1) / ideal_state.flatten(1).std(dim=1)
            rows.append(torch.stack([ideal, start, own, growth]))
    return torch.stack(rows, dim=1).unflatten(1, (len(points), len(own_steps))).double().cpu()


def mean_and_error(values):
    """Mean over the samples, the last dimension, and its standard error; `None` for what is undefined."""
    mean, error = values.mean().item(), values.std().item() / math.sqrt(values.numel())
    return (mean, error) if math.isfinite(mean) else (None, None)


def summarise(sigmas, own_steps, measured):
    """
    What the table and the picture show.

    Args:
        sigmas (`list[float]`): Where it was measured.
        own_steps (`list[int]`): Own steps k.
        measured (`dict[str, torch.Tensor]`): By model, what [`measure_batch`] returns, of all samples.

    Returns:
        `tuple[list[dict], list[dict]]`: a record for each model and k, and one for each model, k and sigma.
    """
    summary, levels, reference = [], [], None
    for name, values in measured.items():
        log_ideal, _, log_own, _ = torch.where(values > ROUNDING, values, math.nan).log()
        log_ratio = log_own - log_ideal
        means = {"gap": log_ratio.mean(dim=0), "own": log_own.mean(dim=0), "ideal": log_ideal.mean(dim=0)}
        reference = reference or means
        for j, k in enumerate(own_steps):
            record = {"model": name, "num_own_steps": k}
            record["gap"], record["gap_se"] = mean_and_error(means["gap"][j])
            for key, mean in means.items():
                change, se = mean_and_error(mean[j] - reference[key][j])
                interval = None if change is None else [change - NORMAL_95 * se, change + NORMAL_95 * se]
                record |= {f"{key}_change": change, f"{key}_change_interval": interval}
            summary.append(record)
            for i, sigma in enumerate(sigmas):
                record = {"model": name, "num_own_steps": k, "sigma": sigma}
                for key, value in zip(("ideal", "start", "own", "growth"), values[:, i, j], strict=True):
                    record[key], record[f"{key}_se"] = mean_and_error(value)
                mean, se = mean_and_error(log_ratio[i, j])
                record["ratio"] = None if mean is None else math.exp(mean)
                record["ratio_se"] = None if mean is None else math.exp(mean) * se
                levels.append(record)
    return summary, levels


def format_table(report):
    """The report's numbers as two Markdown tables."""

    def cell(record, key):
        value = record[key]
        if value is None:
            return "undefined"
        if f"{key}_interval" in record:
            return "{:.4f} [{:.4f}, {:.4f}]".format(value, *record[f"{key}_interval"])
        if f"{key}_se" in record:
            return f"{value:.4f} +- {record[f'{key}_se']:.4f}"
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    def table(records, columns):
        lines = [columns, ["---"] * len(columns), *([cell(record, key) for key in columns] for record in records)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    arguments, summary = report["arguments"], report["summary"]
    return (
        f"{report['num_images']} images, guidance {arguments['guidance_scale']}, {arguments['num_inference_steps']} "
        f"sampling steps. Changes are of logarithms, against {summary[0]['model']}, with 95 % intervals over the "
        "images; +- is a standard error. The head of `measure_exposure_bias.py` says what the columns are.\n\n"
        f"{table(summary, ['model', 'num_own_steps', 'gap', 'gap_change', 'own_change', 'ideal_change'])}\n\n"
        f"{table(report['levels'], ['model', 'num_own_steps', 'sigma', 'ideal', 'own', 'ratio', 'start', 'growth'])}\n"
    )


def draw(report, path):
    """Save errors, ratio and growth against sigma, a colour a model; noise is on the left, as in sampling."""
    figure, axes = plt.subplots(3, sharex=True, figsize=(8, 10), height_ratios=(3, 2, 2))
    colors, markers = {}, dict(zip(report["arguments"]["num_own_steps"], itertools.cycle("osD^v"), strict=False))
    for record in report["summary"]:
        name, k = record["model"], record["num_own_steps"]
        records = [r for r in report["levels"] if (r["model"], r["num_own_steps"]) == (name, k)]
        # `None` becomes nan, which is not drawn.
        curves = {key: np.array([r[key] for r in records], dtype=float) for key in records[0] if key != "model"}
        if name not in colors:
            colors[name] = f"C{len(colors)}"
            ideal, se = curves["ideal"], curves["ideal_se"]
            axes[0].errorbar(curves["sigma"], ideal, se, color=colors[name], linestyle="--", label=f"{name}, ideal")
        style = {"color": colors[name], "marker": markers[k], "markersize": 5}
        for axis, key in zip(axes, ("own", "ratio", "growth"), strict=True):
            axis.errorbar(curves["sigma"], curves[key], curves[f"{key}_se"], label=f"{name}, own, k = {k}", **style)
    axes[0].set(ylabel="error of predicted clean latents", yscale="log")
    axes[1].set(ylabel="own error / ideal error", yscale="log")
    axes[2].set(ylabel="growth of the standard deviation", xlabel="sigma (1 is noise)")
    axes[2].invert_xaxis()
    for axis in axes[1:]:
        axis.axhline(1, color="gray", linewidth=0.8)  # own states as good, or as large, as ideal ones
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(args):
    with script.failing_with("--mixed_precision"):
        accelerator = Accelerator(mixed_precision=args.mixed_precision)
    device, dtypes = accelerator.device, {"fp16": torch.float16, "bf16": torch.bfloat16}
    dtype = dtypes.get(accelerator.mixed_precision, torch.float32)  # of text encoders and transformers
    for library in (datasets, diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    output = Path(args.output_dir)

    # Everything that can be wrong with the input, before any model loads
    model_config = script.check_model(args)
    models = check_models(args, model_config)
    rows = script.load_images(args)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed))
    rows = rows.select(sorted(order[: args.num_samples].tolist()))
    with tempfile.TemporaryDirectory() as args.cache_dir:
        inspected = script.inspect_images(args, model_config, rows)
    args.cache_dir = None
    images = script.TrainingImages(args, rows, inspected, encoder_digests=None)
    if len(images) < 2:
        script.fail(f"{len(images)} images are not enough for a standard error")
    with script.failing_with("--output_dir cannot be written"):
        output.mkdir(parents=True, exist_ok=True)

    batches = encode_samples(args, model_config, images, dtype, device)
    free_memory()
    num_steps, own_steps = args.num_inference_steps, args.num_own_steps
    sigmas = soar_utils.shift_sigma(1 - torch.arange(num_steps) / num_steps, model_config["shift"])
    points = torch.linspace(own_steps[-1], num_steps - 1, args.num_sigmas).round().int().tolist()
    measured = {}
    others = dict.fromkeys(["vae", *script.TEXT_PARTS])  # which are not needed any more
    for name, model in models.items():
        with script.failing_with(f"--models {name} cannot be loaded"):
            pipeline = load_trained(args.pretrained_model_name_or_path, **model, dtype=dtype, **others)
        transformer, found = pipeline.transformer.to(device), []
        for batch in tqdm(batches, desc=f"Measuring {name}", unit="batch"):
            batch = {key: value.to(device) for key, value in batch.items()}
            found.append(measure_batch(transformer, batch, sigmas, points, own_steps, args.guidance_scale))
        del pipeline, transformer  # before the next one loads
        free_memory()
        measured[name] = torch.cat(found, dim=-1)
        if not measured[name].isfinite().all():
            script.fail(f"{name} predicts numbers that are not finite")

    summary, levels = summarise(sigmas[points].tolist(), own_steps, measured)
    report = {"arguments": args.report_arguments, "num_images": len(images), "summary": summary, "levels": levels}
    (output / "exposure_bias.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    (output / "exposure_bias.md").write_text(format_table(report))
    draw(report, output / "exposure_bias.png")
    print(format_table(report))


if __name__ == "__main__":
    main(parse_args())
