# Copyright 2026 The SOAR for SD3.5 authors.
# SPDX-License-Identifier: Apache-2.0
"""
The SOAR method as pure tensor functions: no model, no randomness, no state.

Convention of the SD3 paper: `sigma = 1` is noise and `sigma = 0` is data; the model predicts the velocity
`noise - latents`. `u` is the noise level before the resolution shift. Every function computes and returns float32,
whatever it is given. Shapes `(B, ...)` are any that begin with the batch: latents, packed ones, videos; sigmas keep
the shape `(B,)` and are broadcast inside the formula.

Source: SOAR, arXiv 2604.12617; rectified flow and the shift, arXiv 2403.03206; Flow-GRPO, arXiv 2505.05470.
"""

import math

import torch


U_MIN = 1e-3  # lowest noise level before the shift: keeps the division by sigma in `correction_target` bounded
STOCHASTIC_ROLLOUTS = ("simple", "sde", "flow_sde", "cps")


def _check_same_shape(**tensors):
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"Shapes must be equal, got {shapes}.")


def _per_sample(like, **sigmas):
    """Check that each sigma is `(B,)` and view it as `(B, 1, ..., 1)` float32, ready to broadcast against `like`."""
    for name, sigma in sigmas.items():
        if like.ndim < 1 or sigma.shape != like.shape[:1]:
            raise ValueError(f"`{name}` must have shape {tuple(like.shape[:1])}, got {tuple(sigma.shape)}.")
    return [sigma.float().view(-1, *[1] * (like.ndim - 1)) for sigma in sigmas.values()]


def shift_sigma(u, shift):
    """
    Noise level of the shifted schedule: `shift * u / (1 + (shift - 1) * u)`.

    Args:
        u (`torch.Tensor` of any shape): Noise level before the shift, in [0, 1].
        shift (`float`): `scheduler.config.shift`, 3.0 for SD3.5.

    Returns:
        `torch.Tensor` of the same shape, float32: sigma.

    Raises:
        `ValueError`: If `shift` is not positive.

    Source: SD3, arXiv 2403.03206, eq. 23.
    """
    if shift <= 0:
        raise ValueError(f"`shift` must be positive, got {shift}.")
    u = u.float()
    return (shift * u / (1 + (shift - 1) * u)).clamp(max=1)  # which rounding may exceed


def unshift_sigma(sigma, shift):
    """
    Inverse of [`shift_sigma`]: `sigma / (shift - (shift - 1) * sigma)`.

    Args:
        sigma (`torch.Tensor` of any shape): Noise level in [0, 1].
        shift (`float`): `scheduler.config.shift`.

    Returns:
        `torch.Tensor` of the same shape, float32: u.

    Raises:
        `ValueError`: If `shift` is not positive.
    """
    if shift <= 0:
        raise ValueError(f"`shift` must be positive, got {shift}.")
    sigma = sigma.float()
    return sigma / (shift - (shift - 1) * sigma)


def next_sigma(sigma, num_sampling_steps, shift):
    """
    Noise level one inference step further down: a step of `1 / num_sampling_steps` in `u`, not below `U_MIN`.

    Args:
        sigma (`torch.Tensor` of any shape): Noise level in [0, 1].
        num_sampling_steps (`int`): Steps K of the sampler that the rollout imitates.
        shift (`float`): `scheduler.config.shift`.

    Returns:
        `torch.Tensor` of the same shape, float32: sigma_next.

    Raises:
        `ValueError`: If `num_sampling_steps` is below 1 or `shift` is not positive.

    Source: SOAR, arXiv 2604.12617.
    """
    if num_sampling_steps < 1:
        raise ValueError(f"`num_sampling_steps` must be at least 1, got {num_sampling_steps}.")
    return shift_sigma((unshift_sigma(sigma, shift) - 1 / num_sampling_steps).clamp(min=U_MIN), shift)


def sigma_to_timestep(sigma):
    """
    Timestep that the SD3 transformer is conditioned on: `1000 * sigma`, continuous.

    Args:
        sigma (`torch.Tensor` of any shape): Noise level in [0, 1].

    Returns:
        `torch.Tensor` of the same shape, float32, in [0, 1000].
    """
    return 1000 * sigma.float()


def add_noise(latents, noise, sigma):
    """
    State of the ideal straight path at noise level `sigma`: `(1 - sigma) * latents + sigma * noise`.

    Args:
        latents (`torch.Tensor` of shape `(B, ...)`): Clean latents, in scaled latent units.
        noise (`torch.Tensor` of shape `(B, ...)`): Noise endpoint of the path, unit variance.
        sigma (`torch.Tensor` of shape `(B,)`): Noise level in [0, 1].

    Returns:
        `torch.Tensor` of shape `(B, ...)`, float32.

    Raises:
        `ValueError`: If shapes disagree.

    Source: rectified flow, arXiv 2403.03206.
    """
    _check_same_shape(latents=latents, noise=noise)
    (sigma,) = _per_sample(latents, sigma=sigma)
    return (1 - sigma) * latents.float() + sigma * noise.float()


def apply_guidance(velocity_cond, velocity_uncond, guidance_scale):
    """
    Classifier-free guidance: `velocity_uncond + guidance_scale * (velocity_cond - velocity_uncond)`.

    Args:
        velocity_cond (`torch.Tensor` of shape `(B, ...)`): Velocity under the caption.
        velocity_uncond (`torch.Tensor` of shape `(B, ...)`): Velocity under the empty caption.
        guidance_scale (`float`): 1 gives the conditional velocity.

    Returns:
        `torch.Tensor` of shape `(B, ...)`, float32.

    Raises:
        `ValueError`: If shapes disagree.

    Source: arXiv 2207.12598.
    """
    _check_same_shape(velocity_cond=velocity_cond, velocity_uncond=velocity_uncond)
    velocity_uncond = velocity_uncond.float()
    return velocity_uncond + guidance_scale * (velocity_cond.float() - velocity_uncond)


def rollout_step(
    noisy_latents, velocity, sigma, sigma_next, mode="ode", noise_scale=0.5, step_noise=None, sigma_max=None
):
    """
    One sampling step of the model from `sigma` down to `sigma_next`: the off-trajectory state that SOAR corrects.

    Args:
        noisy_latents (`torch.Tensor` of shape `(B, ...)`): State at `sigma`, in scaled latent units.
        velocity (`torch.Tensor` of shape `(B, ...)`): Guided velocity predicted at that state.
        sigma (`torch.Tensor` of shape `(B,)`): Noise level of the state, in (0, 1].
        sigma_next (`torch.Tensor` of shape `(B,)`): Noise level after the step, at most `sigma`.
        mode (`str`): `"ode"` (Euler), or one of the stochastic steps: `"simple"` (Euler-Maruyama with constant
            noise), `"sde"` (the predicted data, noised afresh), `"flow_sde"` (Flow-GRPO's SDE with the marginals of
            the ODE) or `"cps"` (coefficients-preserving sampling).
        noise_scale (`float`): Strength of the stochastic part; unused by `"ode"` and `"sde"`.
        step_noise (`torch.Tensor` of shape `(B, ...)`, *optional*): Fresh unit noise of a stochastic step.
        sigma_max (`torch.Tensor` of shape `(B,)`, *optional*): Needed by `"flow_sde"` alone: the noise level one step
            below 1. Its coefficient diverges at 1, so it is taken at no higher level, as Flow-GRPO does at 1 itself.

    Returns:
        `torch.Tensor` of shape `(B, ...)`, float32: state at `sigma_next`.

    Raises:
        `ValueError`: If shapes disagree, `mode` is unknown, or a stochastic step lacks `step_noise` or `sigma_max`.

    Source: SOAR, arXiv 2604.12617; `flow_sde`: Flow-GRPO, arXiv 2505.05470; `cps`: arXiv 2509.05952.
    """
    if mode != "ode" and step_noise is None:
        raise ValueError(f"`step_noise` is required by mode '{mode}'.")
    mean, std = step_distribution(noisy_latents, velocity, sigma, sigma_next, mode, noise_scale, sigma_max)
    if mode == "ode":
        return mean
    _check_same_shape(noisy_latents=noisy_latents, step_noise=step_noise)
    return mean + _per_sample(noisy_latents, std=std)[0] * step_noise.float()


def step_distribution(noisy_latents, velocity, sigma, sigma_next, mode="ode", noise_scale=0.5, sigma_max=None):
    """
    Mean and standard deviation of the state after [`rollout_step`], over its `step_noise`.

    Args:
        noisy_latents, velocity, sigma, sigma_next, mode, noise_scale, sigma_max: See [`rollout_step`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: mean `(B, ...)` and standard deviation `(B,)`, float32.

    Raises:
        `ValueError`: If shapes disagree, `mode` is unknown, or `"flow_sde"` lacks `sigma_max`.
    """
    if mode != "ode" and mode not in STOCHASTIC_ROLLOUTS:
        raise ValueError(f"`mode` must be 'ode' or one of {STOCHASTIC_ROLLOUTS}, got '{mode}'.")
    if mode == "flow_sde" and sigma_max is None:
        raise ValueError("`sigma_max` is required by mode 'flow_sde'.")
    _check_same_shape(noisy_latents=noisy_latents, velocity=velocity)
    sigma, sigma_next = _per_sample(noisy_latents, sigma=sigma, sigma_next=sigma_next)
    x, v, d, s = noisy_latents.float(), velocity.float(), sigma_next - sigma, noise_scale
    data = x - sigma * v
    if mode == "ode":
        mean, std = x + v * d, torch.zeros_like(d)
    elif mode == "simple":
        mean, std = x + v * d, s * d.abs().sqrt()
    elif mode == "sde":
        mean, std = (1 - sigma_next) * data, sigma_next
    elif mode == "flow_sde":
        (sigma_max,) = _per_sample(noisy_latents, sigma_max=sigma_max)
        g = s * (sigma / (1 - sigma.clamp(max=sigma_max))).sqrt()
        drift = g**2 / (2 * sigma)
        mean, std = x * (1 + drift * d) + v * (1 + drift * (1 - sigma)) * d, g * (-d).sqrt()
    else:  # "cps": part of the predicted noise is replaced by fresh noise of equal variance
        endpoint, std = x + (1 - sigma) * v, sigma_next * math.sin(s * math.pi / 2)
        mean = (1 - sigma_next) * data + (sigma_next**2 - std**2).sqrt() * endpoint
    return mean, std.flatten()


def renoise(rollout_latents, noise, sigma_next, sigma_aux):
    """
    Move a rollout state from `sigma_next` up to `sigma_aux`, on the straight line to the same noise endpoint.

    Args:
        rollout_latents (`torch.Tensor` of shape `(B, ...)`): State at `sigma_next`, in scaled latent units.
        noise (`torch.Tensor` of shape `(B, ...)`): The noise endpoint of the path that the rollout left.
        sigma_next (`torch.Tensor` of shape `(B,)`): Noise level in [0, 1).
        sigma_aux (`torch.Tensor` of shape `(B,)`): Noise level in [`sigma_next`, 1].

    Returns:
        `torch.Tensor` of shape `(B, ...)`, float32: `aux_latents`.

    Raises:
        `ValueError`: If shapes disagree.

    Source: SOAR, arXiv 2604.12617.
    """
    _check_same_shape(rollout_latents=rollout_latents, noise=noise)
    sigma_next, sigma_aux = _per_sample(rollout_latents, sigma_next=sigma_next, sigma_aux=sigma_aux)
    a = (sigma_aux - sigma_next) / (1 - sigma_next)
    return (1 - a) * rollout_latents.float() + a * noise.float()


def correction_target(aux_latents, latents, sigma_aux):
    """
    Velocity whose straight path from `aux_latents` ends at `latents`: `(aux_latents - latents) / sigma_aux`.

    Args:
        aux_latents (`torch.Tensor` of shape `(B, ...)`): State at noise level `sigma_aux`, in scaled latent units.
        latents (`torch.Tensor` of shape `(B, ...)`): Clean latents, same units.
        sigma_aux (`torch.Tensor` of shape `(B,)`): Noise level in (0, 1].

    Returns:
        `torch.Tensor` of shape `(B, ...)`, float32.

    Raises:
        `ValueError`: If shapes disagree.

    Source: SOAR, arXiv 2604.12617.
    """
    _check_same_shape(aux_latents=aux_latents, latents=latents)
    (sigma_aux,) = _per_sample(aux_latents, sigma_aux=sigma_aux)
    return (aux_latents.float() - latents.float()) / sigma_aux


def flow_matching_loss(velocity_pred, target, weighting=None):
    """
    Mean squared error of each sample's velocity, weighted.

    Args:
        velocity_pred (`torch.Tensor` of shape `(B, ...)`): Predicted velocity.
        target (`torch.Tensor` of shape `(B, ...)`): Velocity to regress to.
        weighting (`torch.Tensor` of shape `(B,)`, *optional*): Weight of each sample.

    Returns:
        `torch.Tensor` of shape `(B,)`, float32.

    Raises:
        `ValueError`: If shapes disagree.
    """
    _check_same_shape(velocity_pred=velocity_pred, target=target)
    loss = (velocity_pred.float() - target.float()).square().flatten(1).mean(dim=1)
    if weighting is None:
        return loss
    _per_sample(loss, weighting=weighting)
    return weighting.float() * loss
