# SPDX-License-Identifier: Apache-2.0
"""Every function of `soar_utils` against the authors' own code and against identities that need no file."""

import json
from pathlib import Path

import pytest
import torch

import soar_utils
from soar_utils import (
    STOCHASTIC_ROLLOUTS,
    U_MIN,
    add_noise,
    apply_guidance,
    correction_target,
    flow_matching_loss,
    next_sigma,
    renoise,
    rollout_step,
    shift_sigma,
    sigma_to_timestep,
    step_distribution,
    unshift_sigma,
)


VECTORS = Path(__file__).with_name("data") / "golden_a.json"
SHAPE = (5, 4, 6, 6)
SIGMA_MAX = next_sigma(torch.ones(5), 40, 3.0)


@pytest.fixture(scope="module")
def golden():
    def tensors(value):
        if isinstance(value, dict) and set(value) == {"shape", "data"}:
            return torch.tensor(value["data"]).view(value["shape"])
        if isinstance(value, dict):
            return {key: tensors(item) for key, item in value.items()}
        return [tensors(item) for item in value] if isinstance(value, list) else value

    return tensors(json.loads(VECTORS.read_text()))


@pytest.fixture
def state():
    """A batch on its ideal path: latents, noise, sigma, one step further down, and a velocity."""
    generator = torch.Generator().manual_seed(0)
    latents, noise, velocity = (torch.randn(SHAPE, generator=generator) for _ in range(3))
    sigma = torch.tensor([0.05, 0.3, 0.6, 0.9, 1.0])
    return {
        "latents": latents,
        "noise": noise,
        "velocity": velocity,
        "sigma": sigma,
        "sigma_next": next_sigma(sigma, 40, 3.0),
    }


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# Against the authors' code


def test_schedule_matches_authors(golden):
    shift = golden["shift"]
    close(shift_sigma(golden["t0"], shift), golden["sigmas"])
    close(unshift_sigma(golden["sigmas"], shift), golden["t0"])
    close(
        sigma_to_timestep(golden["sigmas"]), golden["timesteps"], atol=1e-3
    )  # 1e-3 of 1000 is one float32 step of 10
    ours = next_sigma(golden["sigmas"], golden["num_sampling_steps"], shift)
    close(ours, shift_sigma(golden["t1"], shift))
    # The authors then snap to a grid of 1000 timesteps; the continuous value is never further off than one cell.
    snapped = unshift_sigma(golden["sigmas_next"], shift)
    assert (snapped - golden["t1"]).abs().max() < 1.1 / 1000


def test_noise_and_guidance_match_authors(golden):
    close(add_noise(golden["clean_latents"], golden["noise"], golden["sigmas"]), golden["noisy_latents"])
    close(apply_guidance(golden["v_cond"], golden["v_uncond"], golden["guidance_scale"]), golden["v_cfg"])


@pytest.mark.parametrize("mode", ["ode", *STOCHASTIC_ROLLOUTS])
def test_rollout_matches_authors(golden, mode):
    expected = golden["rollouts"][mode]
    rollout = rollout_step(
        golden["noisy_latents"],
        golden["v_cfg"],
        golden["sigmas"],
        golden["sigmas_next"],
        mode,
        golden["sde_noise_scale"],
        expected.get("step_noise"),
        torch.full_like(golden["sigmas"], golden["sigma_max"]),
    )
    close(rollout, expected["latents"])


def test_auxiliary_points_match_authors(golden):
    assert golden["auxiliary"]
    for point in golden["auxiliary"]:
        i = torch.tensor(point["sample_indices"])
        rollout = golden["rollouts"]["ode"]["latents"][i]
        aux_latents = renoise(rollout, golden["noise"][i], golden["sigmas_next"][i], point["sigmas"])
        close(aux_latents, point["latents"])
        close(correction_target(aux_latents, golden["clean_latents"][i], point["sigmas"]), point["target"])


# Identities


def test_shift_and_unshift_invert():
    u = torch.linspace(0, 1, 101)
    for shift in (1.0, 3.0, 6.0):
        close(unshift_sigma(shift_sigma(u, shift), shift), u)
    assert torch.equal(shift_sigma(u, 1.0), u)
    close(shift_sigma(torch.tensor([0.0, 1.0]), 3.0), torch.tensor([0.0, 1.0]), atol=0)


def test_next_sigma_is_one_step_of_the_sampler_and_never_below_the_floor():
    from diffusers import FlowMatchEulerDiscreteScheduler

    # diffusers' sampler on a grid that is uniform in u, from 1 to 1 / K
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 40, 40).tolist())
    close(next_sigma(scheduler.sigmas[:-2], 40, 3.0), scheduler.sigmas[1:-1])
    close(sigma_to_timestep(scheduler.sigmas[:-1]), scheduler.timesteps, atol=1e-3)
    floor = shift_sigma(torch.tensor([U_MIN]), 3.0)
    close(next_sigma(torch.tensor([0.01]), 40, 3.0), floor, atol=0)
    close(next_sigma(torch.tensor([1.0]), 1, 3.0), floor, atol=0)


def test_noise_endpoints(state):
    zero, one = torch.zeros(5), torch.ones(5)
    assert torch.equal(add_noise(state["latents"], state["noise"], zero), state["latents"])
    assert torch.equal(add_noise(state["latents"], state["noise"], one), state["noise"])


def test_guidance_scales(state):
    cond, uncond = state["velocity"], state["noise"]
    close(apply_guidance(cond, uncond, 1.0), cond)
    assert torch.equal(apply_guidance(cond, uncond, 0.0), uncond)


def test_perfect_rollout_is_corrected_to_the_base_target(state):
    """With the true velocity the rollout stays on the ideal path, and SOAR's target is flow matching's."""
    latents, noise, sigma, sigma_next = (state[k] for k in ("latents", "noise", "sigma", "sigma_next"))
    rollout = rollout_step(add_noise(latents, noise, sigma), noise - latents, sigma, sigma_next)
    close(rollout, add_noise(latents, noise, sigma_next))
    for place in (0.0, 0.5, 1.0):
        sigma_aux = sigma_next + place * (1 - sigma_next)
        aux_latents = renoise(rollout, noise, sigma_next, sigma_aux)
        target = correction_target(aux_latents, latents, sigma_aux)
        torch.testing.assert_close(target, noise - latents, rtol=1e-4, atol=1e-4)


def test_an_euler_step_along_the_target_lands_on_the_latents(state):
    latents, noise, sigma, sigma_next = (state[k] for k in ("latents", "noise", "sigma", "sigma_next"))
    rollout = rollout_step(add_noise(latents, noise, sigma), state["velocity"], sigma, sigma_next)
    sigma_aux = (sigma_next + 1) / 2
    aux_latents = renoise(rollout, noise, sigma_next, sigma_aux)
    target = correction_target(aux_latents, latents, sigma_aux)
    close(rollout_step(aux_latents, target, sigma_aux, torch.zeros(5)), latents)


def test_renoise_endpoints(state):
    sigma_next = state["sigma_next"]
    assert torch.equal(renoise(state["latents"], state["noise"], sigma_next, sigma_next), state["latents"])
    close(renoise(state["latents"], state["noise"], sigma_next, torch.ones(5)), state["noise"], atol=0)


@pytest.mark.parametrize("mode", ["flow_sde", "cps", "simple"])
def test_stochastic_steps_without_noise_are_the_ode_step(state, mode):
    noisy_latents = add_noise(state["latents"], state["noise"], state["sigma"])
    step = noisy_latents, state["velocity"], state["sigma"], state["sigma_next"]
    close(rollout_step(*step, mode, 0.0, torch.randn(SHAPE), SIGMA_MAX), rollout_step(*step))


@pytest.mark.parametrize("mode", ["sde", "flow_sde", "cps"])
def test_stochastic_steps_keep_the_marginals(mode):
    """From the ideal state with the true velocity, the next state has the mean and the variance of the ideal path."""
    n, sigma = 200_000, torch.tensor([0.7])
    sigma_next = next_sigma(sigma, 400, 3.0)  # flow_sde holds to first order in the step
    generator = torch.Generator().manual_seed(0)
    noise, step_noise = (torch.randn(1, n, generator=generator) for _ in range(2))
    latents = torch.full((1, n), 0.3)
    ideal = add_noise(latents, noise, sigma), noise - latents
    rollout = rollout_step(*ideal, sigma, sigma_next, mode, 0.5, step_noise, SIGMA_MAX[:1])
    assert abs(rollout.mean().item() - (1 - sigma_next).item() * 0.3) < 0.01
    assert abs(rollout.std().item() - sigma_next.item()) < 0.01


@pytest.mark.parametrize("mode", ["ode", *STOCHASTIC_ROLLOUTS])
def test_step_is_its_mean_and_as_much_noise_as_it_says(state, mode):
    """Bit for bit; of the ODE step the deviation is 0, of the others it is not."""
    step = state["latents"], state["velocity"], state["sigma"], state["sigma_next"], mode, 0.5
    mean, std = step_distribution(*step, SIGMA_MAX)
    noise = torch.randn(SHAPE)
    assert std.shape == (SHAPE[0],) and (std > 0).all() == (mode != "ode")
    assert torch.equal(rollout_step(*step, noise, SIGMA_MAX), mean + std.view(-1, *[1] * (len(SHAPE) - 1)) * noise)


@pytest.mark.parametrize("shift", [1.0, 1.82, 3.0, 6.0])
@pytest.mark.parametrize("num_sampling_steps", [1, 10, 40])
@pytest.mark.parametrize("mode", STOCHASTIC_ROLLOUTS)
def test_stochastic_steps_are_bounded_at_every_noise_level(mode, num_sampling_steps, shift):
    """From a state and with a velocity of 1, of either sign, at the strongest noise; just below pure noise, too."""
    near_noise = 1 - 2.0 ** -torch.arange(1, 25)
    u = torch.cat([torch.linspace(U_MIN, 1, 2000), near_noise.clamp(min=U_MIN)])
    sigma = shift_sigma(u, shift)
    sigma_next = next_sigma(sigma, num_sampling_steps, shift)
    sigma_max = next_sigma(torch.ones_like(sigma), num_sampling_steps, shift)
    assert sigma.max() == 1 and sigma_max.max() < 1
    for velocity in (-1, 1):
        step = torch.ones(len(u), 1), torch.full((len(u), 1), velocity), sigma, sigma_next
        mean, std = step_distribution(*step, mode, 1.0, sigma_max)
        assert mean.abs().max() < 3 and 0 <= std.min() and std.max() < 1.5


def test_flow_sde_has_one_coefficient_above_the_level_one_step_below_noise():
    """As Flow-GRPO has it at 1; below, the diffusion is that of the marginals."""
    sigma, x = torch.tensor([0.9, 0.995, 1.0]), torch.ones(3, 1)
    std = step_distribution(x, x, sigma, sigma - 0.01, "flow_sde", 0.5, torch.full((3,), 0.99))[1]
    close(std, 0.5 * (sigma / torch.tensor([0.1, 0.01, 0.01]) * 0.01).sqrt())


def test_loss_is_a_weighted_mean_per_sample(state):
    prediction, target = state["velocity"], state["noise"]
    expected = torch.stack([torch.nn.functional.mse_loss(p, t) for p, t in zip(prediction, target, strict=True)])
    close(flow_matching_loss(prediction, target), expected)
    weighting = torch.arange(5.0)
    close(flow_matching_loss(prediction, target, weighting), weighting * expected)


# Types and errors

CALLS = {
    "add_noise": lambda a, b, s, r: add_noise(a, b, s),
    "apply_guidance": lambda a, b, s, r: apply_guidance(a, b, 4.5),
    "rollout_step ode": lambda a, b, s, r: rollout_step(a, b, s, r),
    "step_distribution mean": lambda a, b, s, r: step_distribution(a, b, s, r, "cps")[0],
    **{
        f"rollout_step {mode}": lambda a, b, s, r, mode=mode: rollout_step(a, b, s, r, mode, 0.5, a, SIGMA_MAX)
        for mode in STOCHASTIC_ROLLOUTS
    },
    "renoise": lambda a, b, s, r: renoise(a, b, r, s),
    "correction_target": lambda a, b, s, r: correction_target(a, b, s),
    "flow_matching_loss": lambda a, b, s, r: flow_matching_loss(a, b, s),
}
SCHEDULE = {
    "shift_sigma": lambda s: shift_sigma(s, 3.0),
    "unshift_sigma": lambda s: unshift_sigma(s, 3.0),
    "next_sigma": lambda s: next_sigma(s, 40, 3.0),
    "sigma_to_timestep": sigma_to_timestep,
}


def test_every_public_function_is_checked_here():
    public = {name for name, value in vars(soar_utils).items() if callable(value) and not name.startswith("_")}
    assert public == {name.split()[0] for name in [*CALLS, *SCHEDULE]}


@pytest.mark.parametrize("name", CALLS)
def test_float32_results_for_bfloat16_inputs(state, name):
    inputs = [state[key].bfloat16() for key in ("latents", "noise", "sigma", "sigma_next")]
    result = CALLS[name](*inputs)
    assert result.dtype == torch.float32
    # Computed in float32, not computed in bfloat16 and cast.
    assert torch.equal(result, CALLS[name](*(tensor.float() for tensor in inputs)))


@pytest.mark.parametrize("name", CALLS)
def test_any_shape_that_begins_with_the_batch(state, name):
    """Packed latents give the packed result, bit for bit; a loss but for the order of its sum."""
    a, b, s, r = (state[key] for key in ("latents", "noise", "sigma", "sigma_next"))
    for shape in ((len(a), -1), (len(a), 2, -1), (len(a), 1, *a.shape[1:])):
        result, expected = CALLS[name](a.reshape(shape), b.reshape(shape), s, r), CALLS[name](a, b, s, r)
        assert torch.allclose(result, expected.reshape(result.shape), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SCHEDULE)
def test_float32_schedule_for_bfloat16_inputs(name):
    sigma = torch.tensor([0.1, 0.5, 0.9]).bfloat16()
    result = SCHEDULE[name](sigma)
    assert result.dtype == torch.float32 and torch.equal(result, SCHEDULE[name](sigma.float()))


@pytest.mark.parametrize("name", CALLS)
def test_value_error_for_wrong_shapes(state, name):
    a, b, s, r = (state[key] for key in ("latents", "noise", "sigma", "sigma_next"))
    with pytest.raises(ValueError, match="(?i)shape"):
        CALLS[name](a, b[:, :, :-1], s, r)
    with pytest.raises(ValueError, match="(?i)shape"):
        CALLS[name](a, b[:1], s, r)  # would broadcast
    if name != "apply_guidance":
        for wrong in (s[:-1], s[:1], s.view(-1, 1, 1, 1), s[0]):
            with pytest.raises(ValueError, match="must have shape"):
                CALLS[name](a, b, wrong, wrong)


def test_value_error_for_wrong_choices(state):
    step = state["latents"], state["velocity"], state["sigma"], state["sigma_next"]
    with pytest.raises(ValueError, match="'heun'"):
        rollout_step(*step, "heun")
    with pytest.raises(ValueError, match="`step_noise` is required"):
        rollout_step(*step, "cps")
    with pytest.raises(ValueError, match="(?i)shape"):
        rollout_step(*step, "cps", 0.5, state["noise"][:1])
    with pytest.raises(ValueError, match="`sigma_max` is required"):
        rollout_step(*step, "flow_sde", 0.5, state["noise"])
    for function in (shift_sigma, unshift_sigma):
        with pytest.raises(ValueError, match="`shift`"):
            function(state["sigma"], 0.0)
    with pytest.raises(ValueError, match="`num_sampling_steps`"):
        next_sigma(state["sigma"], 0, 3.0)
