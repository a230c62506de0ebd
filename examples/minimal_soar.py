# SPDX-License-Identifier: Apache-2.0
"""
SOAR (arXiv 2604.12617) in one sitting: post-train SD3.5 on a folder of captioned images, on one GPU or a CPU.

    python examples/minimal_soar.py stabilityai/stable-diffusion-3.5-medium my_images sd3-soar

`my_images` has a `metadata.jsonl` of lines {"file_name": "1.jpg", "text": "a caption"}. Everything is encoded once and
kept in memory; one image at a time, plain AdamW, no resume; for SD3.5-Medium a card of 80 GB. What runs in earnest is
`train_sd3_soar.py`; with the same draws its losses and gradients are these, bit for bit: a test shows it.

Noise levels: sigma = 1 is noise, sigma = 0 is data. The model predicts the velocity `noise - latents`.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image, ImageOps
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import soar_utils  # noqa: E402


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("model", help="Hub id or folder of an SD3 / SD3.5 pipeline.")
    parser.add_argument("images", type=Path, help="Folder of images with metadata.jsonl.")
    parser.add_argument("output", type=Path, help="Folder to save the trained transformer in.")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--accumulate", type=int, default=4, help="Images per optimizer step.")
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    parser.add_argument("--lambda_aux", type=float, default=1.0, help="Weight of an auxiliary state; 0 is plain SFT.")
    parser.add_argument("--trajectory_length", type=int, default=6, help="N: auxiliary states per image.")
    parser.add_argument("--num_sampling_steps", type=int, default=40, help="K: the rollout is one sampling step of K.")
    parser.add_argument("--cfg_scale_sampling", type=float, default=4.5, help="Guidance of the rollout.")
    args = parser.parse_args(input_args)
    if not (args.images / "metadata.jsonl").is_file():
        parser.error(f"{args.images} has no metadata.jsonl")
    if min(args.steps, args.accumulate, args.num_sampling_steps) < 1:
        parser.error("--steps, --accumulate and --num_sampling_steps must be at least 1")
    return args


def soar_losses(args, predict, latents, text, null_text, shift, generator):
    """
    The SOAR loss of one image, in terms: run `backward` on each before asking for the next, so one graph is alive.

    Args:
        predict (callable): `predict(state, sigma, text)` gives the model's velocity.
        latents (`torch.Tensor` of shape `(1, C, H, W)`): Clean latents, float32, scaled.
        text, null_text: What `predict` takes of the caption, and of the empty caption.
        shift (`float`), generator (`torch.Generator`): Of the scheduler; of the noise, on the CPU.
    """
    device, denominator = latents.device, 1 + args.lambda_aux * args.trajectory_length

    # 1. The ideal state, on the straight line between image and noise, at a random level: plain flow matching.
    noise = torch.randn(latents.shape, generator=generator).to(device)
    u = torch.sigmoid(torch.randn(1, generator=generator)).clamp(soar_utils.U_MIN, 1).to(device)
    sigma = soar_utils.shift_sigma(u, shift)
    noisy_latents = soar_utils.add_noise(latents, noise, sigma)
    velocity = predict(noisy_latents, sigma, text)
    yield soar_utils.flow_matching_loss(velocity, noise - latents).sum() / denominator
    if args.lambda_aux == 0:
        return

    # 2. The model's own step from there: guided, one sampling step long, without gradient. It leaves the line.
    with torch.no_grad():
        velocity_uncond = predict(noisy_latents, sigma, null_text)
        velocity_cfg = soar_utils.apply_guidance(velocity.detach(), velocity_uncond, args.cfg_scale_sampling)
        sigma_next = soar_utils.next_sigma(sigma, args.num_sampling_steps, shift)
        rollout_latents = soar_utils.rollout_step(noisy_latents, velocity_cfg, sigma, sigma_next)

    for _ in range(args.trajectory_length):
        # 3. The state it landed on, noised again toward the same noise, to a random level above.
        place = torch.rand(1, generator=generator).to(device)
        sigma_aux = sigma_next + place * (1 - sigma_next)
        aux_latents = soar_utils.renoise(rollout_latents, noise, sigma_next, sigma_aux)
        # 4. From there, the velocity that leads back to the clean image.
        velocity = predict(aux_latents, sigma_aux, text)
        target = soar_utils.correction_target(aux_latents, latents, sigma_aux)
        yield args.lambda_aux * soar_utils.flow_matching_loss(velocity, target).sum() / denominator


@torch.no_grad()
def encode(args, pipeline):
    """Latents and caption embeddings of every image, and the embeddings of the empty caption, on the CPU."""
    vae, device = pipeline.vae.float(), pipeline.device

    def embed(caption):
        prompt_embeds, _, pooled, _ = pipeline.encode_prompt(caption, None, None, do_classifier_free_guidance=False)
        return prompt_embeds.cpu(), pooled.cpu()

    samples = []
    for line in tqdm((args.images / "metadata.jsonl").read_text("utf-8").splitlines(), desc="Encoding"):
        row = json.loads(line)
        image = ImageOps.exif_transpose(Image.open(args.images / row["file_name"])).convert("RGB")
        image = np.array(ImageOps.fit(image, (args.resolution, args.resolution), Image.Resampling.LANCZOS))
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].to(device) / 127.5 - 1
        latents = vae.encode(pixels).latent_dist.sample()
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        samples.append((latents.cpu(), embed(row["text"])))
    return samples, embed("")


def main(args):
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    generator = torch.manual_seed(0)
    args.output.mkdir(parents=True, exist_ok=True)  # what cannot be written is known before hours are spent
    pipeline = StableDiffusion3Pipeline.from_pretrained(args.model, dtype=torch.bfloat16).to(device)
    most = pipeline.transformer.config.pos_embed_max_size * pipeline.patch_size * pipeline.vae_scale_factor
    if args.resolution % 16 or not 16 <= args.resolution <= most:
        sys.exit(f"error: --resolution must be divisible by 16, and at most {most} for this model")
    samples, null_text = encode(args, pipeline)
    transformer, shift = pipeline.transformer.float().train(), pipeline.scheduler.config.shift
    del pipeline  # and with it the encoders
    transformer.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=args.learning_rate)

    def predict(state, sigma, text):
        prompt_embeds, pooled = (tensor.to(device) for tensor in text)
        with torch.autocast(device.type, torch.bfloat16):
            return transformer(state, prompt_embeds, pooled, soar_utils.sigma_to_timestep(sigma), return_dict=False)[0]

    progress = tqdm(range(args.steps), desc="Training")
    for _ in progress:
        total = 0.0
        for index in torch.randint(len(samples), (args.accumulate,), generator=generator).tolist():
            latents, text = samples[index]
            for loss in soar_losses(args, predict, latents.to(device), text, null_text, shift, generator):
                (loss / args.accumulate).backward()
                total += loss.item() / args.accumulate
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=total)
    transformer.save_pretrained(args.output / "transformer")


if __name__ == "__main__":
    try:
        main(parse_args())
    except OSError as error:  # a model or an image that is not there, a folder that cannot be written
        sys.exit(f"error: {' '.join(str(error).split())}")
