# SPDX-License-Identifier: Apache-2.0
"""
The SOAR step put together as in the authors' code, in our own words, to be measured beside ours.

The states are the same; what differs is what is computed and what is kept:

- the rollout runs the conditional branch once more, and it and the unconditional one have graphs that nobody uses;
- each auxiliary state has a forward of its own, and every graph stays until the one `backward` at the end: with N = 6
  eight are alive;
- captions and images are encoded anew in every step, so the encoders stay on the GPU (run it without the caches).

Source: SOAR, arXiv 2604.12617, and the structure of Tencent-Hunyuan/HY-SOAR.
"""

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

import soar_utils
from train_sd3_soar import draw


def training_losses(args, predict, latents, generators, shift, sync):
    """
    The whole SOAR loss of one batch as one term; arguments and result as in `train_sd3_soar.training_losses`.

    Only the ODE path, `--num_rollout_paths 1`.
    """
    device = latents.device

    def summed_loss(velocity, target, sigma):
        weighting = compute_loss_weighting_for_sd3(args.weighting_scheme, sigma)
        return soar_utils.flow_matching_loss(velocity, target, weighting).sum()

    def sample_u(generator):
        return compute_density_for_timestep_sampling(
            args.weighting_scheme, 1, args.logit_mean, args.logit_std, args.mode_scale, generator=generator
        )[0].clamp(soar_utils.U_MIN, 1)

    noise = draw(lambda generator: torch.randn(latents.shape[1:], generator=generator), generators, device)
    sigma = soar_utils.shift_sigma(draw(sample_u, generators, device), shift)
    noisy_latents = soar_utils.add_noise(latents, noise, sigma)
    loss_base = summed_loss(predict(noisy_latents, sigma), noise - latents, sigma)

    # Both keep their graphs to the end of the step.
    velocity_uncond, velocity_cond = predict(noisy_latents, sigma, null=True), predict(noisy_latents, sigma)
    velocity = soar_utils.apply_guidance(velocity_cond.detach(), velocity_uncond.detach(), args.cfg_scale_sampling)
    sigma_next = soar_utils.next_sigma(sigma, args.num_sampling_steps, shift)
    rollout_latents = soar_utils.rollout_step(noisy_latents, velocity, sigma, sigma_next)

    losses_aux = []
    for _ in range(args.trajectory_length):
        place = draw(lambda generator: torch.rand((), generator=generator), generators, device)
        sigma_aux = sigma_next + place * (1 - sigma_next)
        aux_latents = soar_utils.renoise(rollout_latents, noise, sigma_next, sigma_aux)
        target = soar_utils.correction_target(aux_latents, latents, sigma_aux)
        losses_aux.append(summed_loss(predict(aux_latents, sigma_aux), target, sigma_aux))

    n_base, n_aux = len(latents), args.trajectory_length * len(latents)
    loss = (loss_base + args.lambda_aux * sum(losses_aux)) / (n_base + args.lambda_aux * n_aux)
    with sync(True):
        yield loss, {"loss_base": loss_base.detach() / n_base, "loss_aux": sum(losses_aux).detach() / n_aux}
