# SPDX-License-Identifier: Apache-2.0
"""
Train the VAE of a toy pipeline on folders of pictures, in about a minute on two cores, and save it in place.

    python examples/quickstart/train_vae.py outputs/small outputs/world/noisy outputs/world/curated

`make_tiny_sd3.py` writes random weights, which decode to nothing. The loss is the squared error of the reconstruction
plus a little of the KL divergence, which keeps the latents smooth. `scaling_factor` and `shift_factor` are then
measured, so that the scaled latents have zero mean and unit variance, as diffusion expects.
"""

import argparse
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.optimization import get_cosine_schedule_with_warmup
from PIL import Image
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_sd3_soar as script  # noqa: E402


KL_WEIGHT = 1e-5


def load_images(folders, size):
    """All PNG files of `folders` as one `torch.Tensor` of shape `(N, 3, size, size)`, in [-1, 1]."""
    paths = sorted(path for folder in folders for path in folder.glob("*.png"))
    images = []
    for path in tqdm(paths, desc="Reading"):
        with script.failing_with(f"{path} cannot be read"), Image.open(path) as image:
            images.append(np.asarray(image.convert("RGB").resize((size, size))))
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images.contiguous(memory_format=torch.channels_last)


def train(vae, images, num_steps, batch_size, learning_rate):
    """Train `vae` in place on random batches of `images`, of shape `(N, 3, H, W)`."""
    # A posterior starts with a standard deviation of 1, as large as the latents; start with precise latents instead.
    with torch.no_grad():
        vae.encoder.conv_out.bias[vae.config.latent_channels :] = -5
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=50, num_training_steps=num_steps)
    progress_bar = tqdm(range(num_steps), desc="Training the VAE")
    for step in progress_bar:
        batch = images[torch.randint(len(images), (batch_size,))]
        posterior = vae.encode(batch).latent_dist
        mse = F.mse_loss(vae.decode(posterior.sample()).sample, batch)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        (mse + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            progress_bar.set_postfix(mse=f"{mse.item():.4f}", kl=f"{kl.item():.2f}")


@torch.no_grad()
def measure_latents(vae, images, batch_size=50):
    """Mean and standard deviation (`float`) of all elements of the latents of `images`, of shape `(N, 3, H, W)`."""
    latents = torch.cat([vae.encode(batch).latent_dist.sample() for batch in images.split(batch_size)])
    return latents.mean().item(), latents.std().item()


def main():
    parser = argparse.ArgumentParser(description="Train the VAE of a toy pipeline and save it in place.")
    parser.add_argument("pipeline_dir", type=Path, help="Pipeline folder, as make_tiny_sd3.py writes it.")
    parser.add_argument("image_dirs", type=Path, nargs="+", help="Folders of PNG files.")
    parser.add_argument("--max_train_steps", type=script.number(int, 1), default=1000)
    parser.add_argument("--train_batch_size", type=script.number(int, 1), default=8)
    parser.add_argument("--learning_rate", type=script.number(float, 0), default=3e-3)
    parser.add_argument("--seed", type=script.number(int, 0, 2**63), default=0)
    args = parser.parse_args()
    vae_dir = args.pipeline_dir / "vae"
    if not (vae_dir / "config.json").exists():
        parser.exit(2, f"error: no VAE in {vae_dir}\n")
    for folder in args.image_dirs:
        if not any(folder.glob("*.png")):
            parser.exit(2, f"error: no PNG files in {folder}\n")

    torch.manual_seed(args.seed)
    with script.failing_with(f"{vae_dir} cannot be read"):
        vae = AutoencoderKL.from_pretrained(vae_dir).to(memory_format=torch.channels_last)
    images = load_images(args.image_dirs, vae.config.sample_size)
    train(vae, images, args.max_train_steps, args.train_batch_size, args.learning_rate)
    mean, std = measure_latents(vae, images[torch.randperm(len(images))[:1000]])
    if not math.isfinite(std):
        script.fail(f"the latents are not finite, and {vae_dir} stays as it was: give a smaller --learning_rate")
    vae.register_to_config(scaling_factor=1 / std, shift_factor=mean)

    # Written beside and then renamed: the pipeline has either the old VAE or the new one.
    partial = vae_dir.with_name("vae.partial")
    shutil.rmtree(partial, ignore_errors=True)
    vae.save_pretrained(partial)
    shutil.rmtree(vae_dir)
    partial.rename(vae_dir)
    print(f"{vae_dir}: scaling_factor {1 / std:.4f}, shift_factor {mean:.4f}")


if __name__ == "__main__":
    main()
