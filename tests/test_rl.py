# SPDX-License-Identifier: Apache-2.0
"""`examples/rl`: its losses against numbers of the authors' code; its runs: resumed, shared out, from any start."""

import ast
import contextlib
import functools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
from collections import defaultdict
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.models.attention import JointTransformerBlock
from harness import ROOT, equal, finish, finish_all, reset_accelerate, scalars, shard, start_two, weights
from PIL import Image
from safetensors.torch import load_file

import soar_utils


sys.path.insert(0, str(ROOT / "examples" / "rl"))
import compare_methods  # noqa: E402
import cost  # noqa: E402
import report_comparison  # noqa: E402
import time_rollouts  # noqa: E402
import train_sd3_flow_grpo_lora as grpo  # noqa: E402
import train_sd3_nft_lora as nft  # noqa: E402

import train_sd3_soar_lora as script  # noqa: E402


DATA = ROOT / "tests" / "data"


def tensors(value):
    if isinstance(value, dict) and value.keys() == {"shape", "data"}:
        return torch.tensor(value["data"]).view(value["shape"])
    return {key: tensors(item) for key, item in value.items()} if isinstance(value, dict) else value


VECTORS = {name: tensors(json.loads((DATA / f"{name}_a.json").read_text())) for name in ("nft", "flow_grpo")}


def redness(images, rows):
    """How red each picture is."""
    return [image.getpixel((5, 5))[0] / 255 - image.getpixel((5, 5))[2] / 255 for image in images]


def constant(images, rows):
    return [0.25 for _ in images]


def of_the_dog(images, rows):
    """A reward that tells the pictures of one prompt apart, and all others not."""
    return [score if "dog" in row["text"] else 0.5 for score, row in zip(redness(images, rows), rows, strict=True)]


def not_a_number(images, rows):
    return [math.nan for _ in images]


def too_few(images, rows):
    return [1.0 for _ in images[1:]]


def raising(images, rows):
    raise RuntimeError("the reader is broken")


@pytest.fixture
def train(pipeline, tmp_path, monkeypatch):
    """Train in this process: `train("--reward", "test_rl:constant=1", method=grpo)` returns the output folder."""
    (tmp_path / "prompts.txt").write_text("a red square\na dog\n\na house by the sea\n")
    monkeypatch.chdir(ROOT / "tests")

    def run(*arguments, method=nft, omit=()):
        arguments = [str(word) for word in arguments]
        defaults = {
            "--pretrained_model_name_or_path": pipeline,
            "--prompts": tmp_path / "prompts.txt",
            "--reward": "test_rl:redness=1",
            "--output_dir": tmp_path / "out",
            "--cache_dir": tmp_path / "cache",
            "--resolution": 32,
            "--max_sequence_length": 16,
            "--train_batch_size": 4,
            "--num_groups": 2,
            "--group_size": 4,
            "--num_rollout_steps": 3,
            "--max_train_steps": 2,
            "--learning_rate": 3e-3,
            "--seed": 0,
            "--report_to": "none",
        }
        for flag, value in defaults.items():
            if flag not in (*arguments, *omit):
                arguments += [flag, str(value)]
        reset_accelerate()
        monkeypatch.setattr(sys, "argv", [nft.Path(method.__file__).name, *arguments])
        args = method.parse_args(arguments)
        method.run(args)
        return nft.Path(args.output_dir)

    return run


@pytest.fixture
def forwards(monkeypatch):
    """The samples of each forward of the transformer, and whether it keeps a graph."""
    seen, predict = [], script.predict_velocity

    def count(transformer, batch, states, sigma, *inputs, **more):
        seen.append((len(states), torch.is_grad_enabled()))
        return predict(transformer, batch, states, sigma, *inputs, **more)

    monkeypatch.setattr(script, "predict_velocity", count)
    return seen


# The method


@pytest.mark.parametrize("case", ["loss", "on_policy"])
def test_loss_and_gradient_are_the_authors(case):
    """The policy loss, the distance from the start, and the gradient of their sum."""
    given, wanted = VECTORS["nft"][case]["inputs"], VECTORS["nft"][case]["outputs"]
    velocity = given["v"].clone().requires_grad_()
    inputs = given["latents"], given["noise"], given["sigma"], given["advantages"].clamp(-5, 5), given["nft_beta"]
    losses = nft.nft_losses(velocity, given["v_old"], *inputs)
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(losses.mean().item(), wanted["policy_loss"], **close)
    kl = soar_utils.flow_matching_loss(velocity, given["v_ref"]).mean()
    torch.testing.assert_close(kl.item(), wanted["kl_div_loss"], **close)
    (losses.mean() + given["kl_beta"] * kl).backward()
    torch.testing.assert_close(velocity.grad, wanted["grad_of_total_loss_wrt_v"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_first_gradient_is_the_advantage_times_flow_matching(beta):
    """For every beta, where the trained policy still is the old one; so it is 0 for a picture like its group."""
    torch.manual_seed(0)
    latents, noise, old = (torch.randn(5, 4, 6, 6) for _ in range(3))
    sigma, advantages = torch.rand(5).clamp(min=0.1), torch.tensor([-5.0, -1.2, 0.0, 0.4, 5.0])
    velocity = old.clone().requires_grad_()
    nft.nft_losses(velocity, old, latents, noise, sigma, advantages, beta).sum().backward()
    twin, target = old.clone().requires_grad_(), noise - latents
    error = (sigma.view(-1, 1, 1, 1) * (old - target)).abs().mean((1, 2, 3))
    (advantages * soar_utils.flow_matching_loss(twin, target, sigma**2 / error)).sum().backward()
    torch.testing.assert_close(velocity.grad, twin.grad, rtol=1e-4, atol=1e-6)
    assert velocity.grad[2].abs().max() < 1e-6 < twin.grad[3].abs().max()


@pytest.mark.parametrize(("mode", "case"), [("flow_sde", "sde_step"), ("cps", "cps_step")])
def test_transition_and_its_probability_are_the_authors(mode, case):
    """In the middle, at sigma = 1, and at the last step; and the gradient of the log-probability."""
    given, wanted = VECTORS["flow_grpo"][case]["inputs"], VECTORS["flow_grpo"][case]["outputs"]
    levels, step = (
        (given["sigma"], given["sigma_next"]),
        (mode, given["noise_level"], given["sigma_next"].max().expand(len(given["sigma"]))),
    )
    close = {"rtol": 1e-4, "atol": 1e-5}
    for policy in ("old", "new", "ref"):
        velocity = given[f"model_output_{policy}"].clone().requires_grad_()
        mean, std = soar_utils.step_distribution(given["sample"], velocity, *levels, *step)
        torch.testing.assert_close(mean, wanted[f"prev_sample_mean_{policy}"], **close)
        deviation = wanted["std_dev_t"] * (wanted["sqrt_minus_dt"] if mode == "flow_sde" else 1)
        torch.testing.assert_close(std, deviation.flatten(), **close)
        last = (std == 0) & (mode == "flow_sde")
        log_probs = grpo.log_probabilities(mode, mean, std, wanted["prev_sample"])
        torch.testing.assert_close(log_probs[~last], wanted[f"log_prob_{policy}"][~last], rtol=1e-5, atol=1e-5)
    velocity = given["model_output_new"].clone().requires_grad_()
    mean, std = soar_utils.step_distribution(given["sample"], velocity, *levels, *step)
    grpo.log_probabilities(mode, mean, std, wanted["prev_sample"]).sum().backward()
    gradient = wanted["grad_of_sum_log_prob_new_wrt_model_output_new"]
    torch.testing.assert_close(velocity.grad, gradient, rtol=1e-3, atol=1e-5)


def test_clipped_loss_is_the_authors():
    """The mean over samples, every branch of the clip, and the gradient to the log-probabilities."""
    case = VECTORS["flow_grpo"]["policy_loss"]["clip_branches"]
    given, wanted = case["inputs"], case["outputs"]
    log_probs = given["log_prob_new"].clone().requires_grad_()
    losses, ratio = grpo.clipped_losses(
        log_probs, given["log_prob_old"], given["advantages"].clamp(-5, 5), given["clip_range"]
    )
    torch.testing.assert_close(ratio, wanted["ratio"], rtol=1e-6, atol=0)
    assert losses.mean().item() == pytest.approx(wanted["policy_loss"], abs=1e-6)
    assert ((ratio - 1).abs() > given["clip_range"]).float().mean() == wanted["clipfrac"]
    losses.mean().backward()
    torch.testing.assert_close(log_probs.grad, wanted["grad_of_loss_wrt_log_prob_new"], rtol=1e-5, atol=1e-7)


def one_update(step, advantages, predict, sigmas, **flags):
    """The terms and the gradient of Flow-GRPO's update on one noisy step `(k, before, after, old log-probability)`."""
    defaults = {"kl_weight": 0.0, "clip_range": 1e-4, "sde_type": "flow_sde", "sde_noise_scale": 0.7}
    args = SimpleNamespace(**(defaults | {"rollout_guidance": 1.0} | flags))
    pictures = [({}, (0, 0, i)) for i in range(len(advantages))]
    part = SimpleNamespace(pictures=pictures, batches=[[*range(len(pictures))]], records=[[step]], equal=True)
    part.advantages = advantages
    accelerate.PartialState()  # the script's log asks for it
    return list(grpo.policy_losses(args, predict, None, contextlib.nullcontext, part, sigmas))


@pytest.mark.parametrize("index", range(3))
def test_loss_and_distance_from_the_start_are_the_authors(index):
    """Of one step of the sampler: where the policy has moved, and how far it is from the start."""
    case, loss = VECTORS["flow_grpo"]["sde_step"], VECTORS["flow_grpo"]["policy_loss"]
    given, found = case["inputs"], case["outputs"]
    some = slice(index, index + 1)
    levels = torch.stack([given["sigma"][index], given["sigma_next"][index]])
    sigmas = torch.cat([torch.ones(1), given["sigma_next"].max()[None], levels])
    policies = iter([given["model_output_ref"][some], given["model_output_new"][some]])
    step = 2, given["sample"][some], found["prev_sample"][some], found["log_prob_old"][some]
    advantages = loss["inputs"]["advantages"][some].clamp(-5, 5)
    flags = {"kl_weight": loss["inputs"]["beta"], "clip_range": loss["inputs"]["clip_range"]}
    ((total, shares),) = one_update(step, advantages, lambda *_, **__: next(policies), sigmas, **flags)
    wanted = torch.maximum(loss["outputs"]["unclipped_loss"], loss["outputs"]["clipped_loss"])[index]
    torch.testing.assert_close(shares["policy_loss"], wanted, rtol=1e-4, atol=1e-6)
    distance = (found["prev_sample_mean_new"] - found["prev_sample_mean_ref"]).square().mean((1, 2, 3))
    kl = (distance / (2 * found["std_dev_t"].flatten() ** 2))[index]
    torch.testing.assert_close(shares["kl"], kl, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(total, wanted + flags["kl_weight"] * kl, rtol=1e-4, atol=1e-6)


def test_first_gradient_is_the_advantage_times_that_of_the_probability():
    torch.manual_seed(0)
    states, noise, old = (torch.randn(4, 4, 6, 6) for _ in range(3))
    sigmas, advantages = torch.tensor([1.0, 0.9, 0.7, 0.5]), torch.tensor([-5.0, -0.3, 0.0, 2.0])
    levels = (level.expand(4) for level in sigmas[2:])
    velocity = old.clone().requires_grad_()
    mean, std = soar_utils.step_distribution(
        states, velocity, *levels, "flow_sde", 0.7, sigma_max=torch.full((4,), 0.9)
    )
    following = (mean + std.view(-1, 1, 1, 1) * noise).detach()
    log_probs = grpo.log_probabilities("flow_sde", mean, std, following)
    (wanted,) = torch.autograd.grad((-advantages * log_probs).sum() / 4, velocity)
    twin = old.clone().requires_grad_()
    step = 2, states, following, log_probs.detach()
    ((loss, shares),) = one_update(step, advantages, lambda *_, **__: twin, sigmas)
    loss.backward()
    torch.testing.assert_close(twin.grad, wanted, rtol=1e-5, atol=1e-9)
    assert shares["ratio_error"] == 0 and (twin.grad[2] == 0).all() and shares["policy_loss"] == -advantages.mean()


@pytest.mark.parametrize(("scale", "name"), [("group", "per_prompt_std"), ("global", "global_std")])
def test_advantages_are_the_authors(scale, name):
    """Of groups in any order; a constant one has none."""
    given, wanted = VECTORS["flow_grpo"]["advantages"]["inputs"], VECTORS["flow_grpo"]["advantages"]["outputs"]
    prompts = given["prompts"]
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    sizes = [prompts.count(prompt) for prompt in sorted({*prompts})]
    rewards = given["rewards"].double()[order]
    found = nft.advantages_of(rewards, sizes, scale)
    torch.testing.assert_close(found, wanted[f"advantages_{name}"].double()[order].clamp(-5, 5), rtol=1e-5, atol=1e-6)
    assert (nft.advantages_of(torch.full((6,), 0.1), [3, 3], scale) == 0).all()
    assert (nft.advantages_of(torch.tensor([0.1, 0.1, 0.1, 0.0, 0.7, 0.2]), [3, 3], scale)[:3] == 0).all()


def test_every_prompt_comes_once_a_pass(train):
    args = SimpleNamespace(seed=3, num_groups=4)
    places, numbers = zip(*(pair for step in range(7) for pair in nft.groups_of(args, 7, step)), strict=True)
    assert places == tuple(range(28))
    passes = [numbers[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(part) == [*range(7)] for part in passes) and len({*passes}) > 1


def test_what_the_seed_draws(monkeypatch):
    """The order of prompts, the place of the window, each picture's noise levels: another one with another seed."""
    args = dict(num_groups=7, sde_window_size=3, sde_window_range=[0, 9], num_rollout_steps=10, num_train_sigmas=5)
    runs = [SimpleNamespace(seed=seed, train_batch_size=5, **args) for seed in (0, 1)]
    for draw in (
        lambda args: [nft.groups_of(args, 7, step) for step in range(9)],
        lambda args: [grpo.noisy_steps(args, step) for step in range(9)],
        lambda args: [levels for _, levels in nft.training_terms(args, range(9), [(0, i, i) for i in range(9)])],
    ):
        first, second = map(draw, runs)
        assert first != second and first[0] != first[1]
    by_step = [nft.training_terms(runs[0], range(9), [(step, i, i) for i in range(9)]) for step in (0, 1)]
    assert by_step[0] != by_step[1]


def test_the_old_policys_decay():
    """It grows with each update after the first ones, up to its limit."""
    args = SimpleNamespace(old_start=3, old_rate=0.2, old_max=0.5)
    assert [nft.old_decay(args, updates) for updates in range(8)] == pytest.approx([0, 0, 0, 0, 0.2, 0.4, 0.5, 0.5])


def test_every_picture_trains_its_noise_levels():
    """Each as many different ones as asked for, never the sampler's last; all where all are asked for."""
    for levels in (2, 5):
        args = SimpleNamespace(seed=0, num_rollout_steps=6, num_train_sigmas=levels, train_batch_size=4)
        terms = nft.training_terms(args, range(1, 12, 2), [(0, i, i) for i in range(12)])
        pairs = [pair for term in terms for pair in zip(*term, strict=True)]
        assert max(len(of) for of, _ in terms) == 4 and len({*pairs}) == len(pairs) == 6 * levels
        assert {i for i, _ in pairs} == {*range(1, 12, 2)} and {level for _, level in pairs} <= {*range(5)}


# Runs


GRPO = ["--rollout_guidance", 1, "--kl_weight", 0, "--adam_epsilon", 1e-15]


@pytest.mark.parametrize(("method", "flags"), [(nft, []), (grpo, [*GRPO, "--num_rollout_steps", 4])])
def test_reward_rises(method, flags, train, logged):
    flags = [
        *flags,
        "--num_groups",
        4,
        "--group_size",
        8,
        "--train_batch_size",
        16,
        "--max_train_steps",
        20,
        "--learning_rate",
        1e-2,
    ]
    train(*flags, method=method)
    rewards = torch.tensor([log["reward"] for log in logged])
    first, last = rewards[:5], rewards[-5:]
    error = math.hypot(first.std() / 5**0.5, last.std() / 5**0.5)
    assert last.mean() - first.mean() > 3 * error


@pytest.mark.parametrize(("method", "flags"), [(nft, ["--old_start", 9]), (grpo, ["--kl_weight", 0])])
def test_equal_rewards_train_nothing(method, flags, train, logged, forwards):
    """The gradient is 0, exactly; and costs no forward as long as the policies are equal."""
    train("--reward", "test_rl:constant=1", *flags, method=method)
    assert [log["grad_norm"] for log in logged] == [0.0, 0.0]
    assert all(log["equal_groups"] == 1 and log["reward"] == 0.25 for log in logged)
    assert not any(grad for _, grad in forwards)


def test_what_a_step_costs(train, logged, forwards):
    """Forwards of a picture: the sampler's; one a noise level; the old policy's once it differs; the start's."""
    flags = ["--old_start", 1, "--old_rate", 0.1, "--num_train_sigmas", 2, "--kl_weight", 0.1, "--max_train_steps", 3]
    train(*flags)
    graphs = sum(size for size, grad in forwards if grad)
    others = sum(size for size, grad in forwards if not grad)
    assert graphs == 3 * 8 * 2  # steps, pictures, noise levels
    # drawn in 3 steps; the start; and the old one in the third step, when it has begun to follow
    assert others == 3 * 8 * 3 + 3 * 8 * 2 + 1 * 8 * 2
    assert [log["old_decay"] for log in logged] == [0, 0.1, 0.2]


@pytest.mark.parametrize(("guidance", "kl_weight"), [(1, 0), (4.5, 0), (4.5, 0.04)])
def test_what_a_step_of_flow_grpo_costs(guidance, kl_weight, train, logged, forwards):
    """Of a picture: the sampler's steps; all but the last with a graph, and for the start; twice where guided."""
    flags = ["--rollout_guidance", guidance, "--kl_weight", kl_weight, "--num_rollout_steps", 4]
    train(*flags, "--max_train_steps", 1, method=grpo)
    branches = 1 if guidance == 1 else 2
    assert sum(size for size, grad in forwards if grad) == 8 * 3 * branches
    assert sum(size for size, grad in forwards if not grad) == 8 * branches * (4 + (3 if kl_weight else 0))
    if kl_weight:
        assert logged[0]["kl"] == 0


@pytest.mark.parametrize(("method", "guidance"), [(nft, 1), (grpo, 0), (grpo, 1), (grpo, 4.5)])
def test_pictures_are_the_pipelines(method, guidance, pipeline, train, monkeypatch):
    """From the same noise, of the same prompt, with the same guidance; at 0 of the empty prompt. Noise is left out."""
    names, starts, pictures, draw, decode = [], [], [], method.sample, method.decode

    def sample(args, predict, normal, some, sigmas):
        names.extend(some)
        starts.append(torch.stack([normal("start", *name) for name in some]))
        return draw(args, predict, normal, some, sigmas)

    monkeypatch.setattr(method, "sample", sample)
    monkeypatch.setattr(method, "decode", lambda *inputs: pictures.extend(found := decode(*inputs)) or found)
    flags = [] if method is nft else ["--rollout_guidance", guidance, "--sde_noise_scale", 1e-3]
    out = train(*flags, "--max_train_steps", 1, method=method)
    prompts = (out.parent / "prompts.txt").read_text().split("\n")
    prompts = [prompt for prompt in prompts if prompt]
    order = dict(method.groups_of(method.parse_args(sys.argv[1:]), len(prompts), 0))
    # To pipelines a guidance of 1 or less is none.
    prompts = [prompts[order[place]] if guidance else "" for _, place, _ in names]
    options = {"num_inference_steps": 3, "guidance_scale": guidance or 1, "max_sequence_length": 16}
    pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline)
    wanted = pipeline(prompts, height=32, width=32, latents=torch.cat(starts), output_type="np", **options).images
    found = np.stack([np.asarray(picture) / 255 for picture in pictures])
    assert np.abs(found - wanted).max() < 0.02 < np.abs(found[:4] - wanted[4:]).max()


@pytest.mark.parametrize(("method", "each"), [(nft, 1 + 2), (grpo, 1 + 2)])
def test_noise_is_drawn_afresh(method, each, train, monkeypatch, tmp_path):
    """Of every step, picture, and noise level or step of the sampler; and with another seed all of it."""
    seen = set()

    def kept(normal):
        def draw(*what):
            noise = normal(*what)
            seen.add(noise.numpy().tobytes())
            return noise

        return draw

    draw, losses = method.sample, method.policy_losses
    monkeypatch.setattr(
        method, "sample", lambda args, predict, normal, *more: draw(args, predict, kept(normal), *more)
    )
    monkeypatch.setattr(
        method, "policy_losses", lambda args, predict, normal, *more: losses(args, predict, kept(normal), *more)
    )
    for seed in (0, 1):
        train("--seed", seed, "--output_dir", tmp_path / str(seed), method=method)
    assert len(seen) == 2 * 2 * 8 * each  # seeds, steps, pictures


@pytest.mark.parametrize(
    ("method", "flags", "other"),
    [
        (nft, [], ["--nft_beta", 0.2]),
        (nft, [], ["--advantage_scale", "group"]),
        (nft, ["--kl_weight", 1], ["--kl_weight", 2]),
        (nft, [], ["--max_grad_norm", 1e-6]),
        (grpo, [], ["--rollout_guidance", 1]),
        (grpo, [], ["--sde_noise_scale", 0.3]),
        (grpo, [], ["--advantage_scale", "group"]),
        (grpo, ["--kl_weight", 1], ["--kl_weight", 2]),
        (grpo, ["--num_updates", 2], ["--num_updates", 2, "--clip_range", 0.5]),
    ],
)
def test_a_flag_changes_what_is_trained(method, flags, other, train, tmp_path):
    one = train(*flags, "--output_dir", tmp_path / "one", method=method)
    assert not equal(one, train(*other, "--output_dir", tmp_path / "other", method=method))


def test_a_gradient_is_not_clipped_at_0(train, tmp_path):
    one = train("--max_grad_norm", 0, "--output_dir", tmp_path / "one")
    assert equal(one, train("--max_grad_norm", 1e9, "--output_dir", tmp_path / "other"))


def test_the_old_policy_follows_and_draws(train, logged, monkeypatch):
    """It is made equal at first, then an average; it draws, and is what updates compare with once it differs."""
    calls, predict = [], script.predict_velocity

    def keep(transformer, *inputs, **more):
        policy = torch.cat([p.detach().flatten() for p in transformer.parameters() if p.requires_grad])
        calls.append((torch.is_grad_enabled(), policy))
        return predict(transformer, *inputs, **more)

    monkeypatch.setattr(script, "predict_velocity", keep)
    flags = "--num_updates 2 --old_start 2 --old_rate 0.2 --num_train_sigmas 2 --checkpointing_steps 1"
    out = train(*flags.split(), "--max_train_steps", 4)
    assert [log["old_decay"] for log in logged] == pytest.approx([0, 0.4, 0.5, 0.5])
    old, trained = [], [policy for grad, policy in calls if grad]
    for step in range(1, 5):
        shadow = load_file(out / f"checkpoint-{step}" / "ema.safetensors")
        old.append(torch.cat([shadow[str(i)].flatten() for i in range(len(shadow))]))
    trained = trained[4::4]  # two batches of each of two updates: at the start of every step but the first
    assert torch.equal(old[0], trained[0])
    for step, decay in ((1, 0.4), (2, 0.5)):
        torch.testing.assert_close(old[step], decay * old[step - 1] + (1 - decay) * trained[step])
    start = next(policy for grad, policy in calls)
    # Two batches of three steps; then the second update's two, and the first's as soon as the policies differ.
    for step, count in enumerate((6 + 2, 6 + 2, 6 + 4, 6 + 4)):
        for _ in range(count):
            grad, policy = calls.pop(next(i for i, (grad, _) in enumerate(calls) if not grad))
            assert torch.equal(policy, old[step - 1] if step else start)
    assert all(grad for grad, _ in calls)


@pytest.mark.parametrize(
    ("method", "flags", "trains"),
    [
        (nft, ["--old_start", 99], False),
        (nft, ["--old_rate", 0.2], True),
        (nft, ["--old_start", 99, "--kl_weight", 1], True),
        (grpo, ["--kl_weight", 0], False),
        (grpo, ["--kl_weight", 1], True),
    ],
)
def test_equal_groups_train_toward_the_old_policy_and_the_start(method, flags, trains, train, logged):
    """Once a policy has left them; by then one of three prompts, in a step of its own, has told pictures apart."""
    flags += "--reward test_rl:of_the_dog=1 --num_groups 1 --adam_epsilon 1e-15 --max_train_steps 4".split()
    train(*flags, method=method)
    left = next(i for i, log in enumerate(logged) if log["equal_groups"] == 0)
    assert left < 3 and {log["grad_norm"] > 0 for log in logged[left + 1 :]} == {trains}


def test_what_is_logged(train, logged, monkeypatch):
    """Rewards in their weighted sum, its deviation; means over the updates; the learning rate."""
    norms, clip = [], accelerate.Accelerator.clip_grad_norm_
    monkeypatch.setattr(
        accelerate.Accelerator, "clip_grad_norm_", lambda *inputs: norms.append(norm := clip(*inputs)) or norm
    )
    rewards = ["--reward", "test_rl:constant=3", "test_rl:redness=-2"]
    train(*rewards, "--lr_scheduler", "linear", "--max_train_steps", 4)
    assert [log["lr"] for log in logged] == pytest.approx([3e-3, 2.25e-3, 1.5e-3, 0.75e-3])
    for log in logged:
        assert log["test_rl:constant"] == 0.25
        assert log["reward"] == pytest.approx(0.75 - 2 * log["test_rl:redness"])
    logged.clear()
    scores, score = [], nft.score
    monkeypatch.setattr(nft, "score", lambda *inputs: scores.append(found := score(*inputs)) or found)
    flags = ["--learning_rate", 0, "--max_train_steps", 1, "--overwrite_output_dir"]
    train(*flags)
    numbers = torch.tensor([number for found in scores for number in found["reward"]])
    assert logged[0]["reward_std"] == pytest.approx(numbers.std(correction=0).item())
    norms.clear()
    train(*flags, "--num_updates", 2)
    one, two = logged
    assert two["policy_loss"] == pytest.approx(one["policy_loss"], rel=1e-4)
    assert two["below_epsilon"] == pytest.approx(one["below_epsilon"], abs=0.03)
    assert len(norms) == 2 and two["grad_norm"] == pytest.approx(sum(norms).item() / 2)


def test_gradient_checkpointing(train, monkeypatch, tmp_path):
    """The same gradients, from blocks that are run twice."""
    calls, forward = [], JointTransformerBlock.forward
    monkeypatch.setattr(
        JointTransformerBlock, "forward", lambda *inputs, **more: calls.append(0) or forward(*inputs, **more)
    )
    plain = weights(train("--output_dir", tmp_path / "plain", "--adam_epsilon", 1e-3))
    count = len(calls)
    for name, tensor in weights(train("--gradient_checkpointing", "--adam_epsilon", 1e-3)).items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-4, atol=1e-6)
    assert len(calls) - count > count


def test_a_run_without_a_seed(train, tmp_path):
    """It draws one, the same for all processes, and keeps it when it is resumed."""
    flags = "--adam_epsilon 1e-3 --checkpointing_steps 1 --report_to tensorboard".split()
    two, _ = on_two(train(*flags, "--output_dir", tmp_path / "drawn", omit=["--seed"]), nft)
    seed = json.loads((two / "training_args.json").read_text())["seed"]
    assert_same_run(train(*flags, "--output_dir", tmp_path / "one", "--seed", seed), two)
    shutil.copytree(tmp_path / "one" / "checkpoint-1", tmp_path / "parts" / "checkpoint-1")
    flags += ["--output_dir", tmp_path / "parts", "--resume_from_checkpoint", "latest"]
    assert equal(tmp_path / "one", train(*flags, omit=["--seed"]))


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("sde_type", ["flow_sde", "cps"])
def test_ratio_is_exactly_one_at_the_first_update(precision, sde_type, train, logged):
    """The same function on the same batches of the same float32 states; and not at the second."""
    flags = ["--mixed_precision", precision, "--sde_type", sde_type, "--num_updates", 2, "--max_train_steps", 1]
    train(*flags, "--clip_range", 1e-9, "--adam_epsilon", 1e-15, method=grpo)
    second = logged[-1]
    logged.clear()
    flags[flags.index("--num_updates") + 1] = 1
    train(*flags, "--overwrite_output_dir", method=grpo)
    assert logged[-1]["ratio_error"] == logged[-1]["clipped"] == 0 < second["ratio_error"]


def test_rounding_beyond_the_clip_range_is_said(train, monkeypatch, caplog):
    """Where a device rounds a forward with a gradient otherwise than the one that drew, by more than is clipped at."""
    predict = script.predict_velocity
    monkeypatch.setattr(
        script,
        "predict_velocity",
        lambda *inputs, **more: predict(*inputs, **more) * (1 + 1e-3 * torch.is_grad_enabled()),
    )
    flags = ["--sde_type", "cps", "--num_updates", 2, "--max_train_steps", 1, "--kl_weight", 0]
    train(*flags, "--clip_range", 0.5, method=grpo)
    assert "off 1" not in caplog.text
    train(*flags, "--clip_range", 1e-6, "--overwrite_output_dir", method=grpo)
    assert caplog.text.count("off 1, more than --clip_range 1e-06") == 1


def test_share_of_gradients_below_epsilon(train, logged):
    """All below a large one; below a tiny one what is 0: that of A as long as B is 0, and little after a step."""
    out = train("--adam_epsilon", 1e-30)
    numel = {"A": 0, "B": 0}
    for name, tensor in weights(out).items():
        numel["A" if "lora_A" in name else "B"] += tensor.numel()
    first, second = (log["below_epsilon"] for log in logged)
    assert first == pytest.approx(numel["A"] / sum(numel.values()), abs=0.03)
    assert second < first / 3
    train("--adam_epsilon", 1e9, "--max_train_steps", 1, "--overwrite_output_dir")
    assert logged[-1]["below_epsilon"] == 1


def test_a_window_of_all_steps_but_the_last_is_none(train, tmp_path):
    flags = [*GRPO, "--num_rollout_steps", 4]
    plain = train(*flags, "--output_dir", tmp_path / "plain", method=grpo)
    flags += ["--sde_window_size", 3, "--sde_window_range", 0, 3]
    assert equal(plain, train(*flags, "--output_dir", tmp_path / "window", method=grpo))


def test_a_window_moves_and_costs_less(train, logged, forwards):
    """Its steps alone are noisy and trained; each rollout draws its place from the seed."""
    args = SimpleNamespace(seed=0, num_rollout_steps=10, sde_window_size=3, sde_window_range=[1, 6])
    windows = {tuple(grpo.noisy_steps(args, step)) for step in range(50)}
    assert windows == {(1, 2, 3), (2, 3, 4), (3, 4, 5)}
    train(*GRPO, *"--num_rollout_steps 10 --sde_window_size 3 --max_train_steps 1".split(), method=grpo)
    assert sum(size for size, grad in forwards if grad) == 8 * 3
    assert sum(size for size, grad in forwards if not grad) == 8 * 10


def test_the_two_scripts_differ_in_the_algorithm_alone():
    """So `diff` shows it: `sample`, `policy_losses`, what these call, arguments and docstring."""
    sources = []
    for method in (nft, grpo):
        text = nft.Path(method.__file__).read_text()
        tree = ast.parse(text)
        parts = {getattr(node, "name", None) or ast.unparse(node): node for node in tree.body[1:]}
        sources.append({name: ast.get_source_segment(text, node) for name, node in parts.items()})
    both = sources[0].keys() & sources[1].keys()
    different = {name for name in both if sources[0][name] != sources[1][name]}
    assert different == {"parse_args", "sample", "policy_losses", "is_free", "old_decay"}
    assert sources[0].keys() - both == {"nft_losses", "training_terms"}
    assert sources[1].keys() - both == {"log_probabilities", "clipped_losses", "noisy_steps", "transition"}


@pytest.mark.parametrize(("method", "more"), [(nft, ["--old_start", 9]), (grpo, GRPO)])
def test_leaving_out_what_has_no_advantage_changes_nothing(
    method, more, train, logged, forwards, monkeypatch, tmp_path
):
    flags = [*more, "--reward", "test_rl:of_the_dog=1", "--num_groups", 3, "--train_batch_size", 4]
    lean = train(*flags, "--output_dir", tmp_path / "lean", method=method)
    assert {round(log["equal_groups"], 3) for log in logged} == {0.667}
    seen = len(forwards)
    monkeypatch.setattr(method, "is_free", lambda *_: False)
    assert equal(lean, train(*flags, "--output_dir", tmp_path / "all", method=method))
    assert sum(grad for _, grad in forwards[:seen]) * 3 == sum(grad for _, grad in forwards[seen:])


NFT = ["--old_rate", 0.2, "--kl_weight", 0.01]


@pytest.mark.parametrize(
    ("method", "flags"), [(nft, ["--num_updates", 1, *NFT]), (nft, ["--num_updates", 2, *NFT]), (grpo, [])]
)
def test_resumed_run_ends_with_the_same_bits(method, flags, train, tmp_path):
    """The trained policy, the old one, the optimizer; pictures and rewards depend on their place in the run alone."""
    train = functools.partial(train, method=method)
    flags = [*flags, "--checkpointing_steps", 1]
    whole = train(*flags, "--max_train_steps", 3, "--output_dir", tmp_path / "whole")
    shutil.copytree(whole / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    flags += ["--max_train_steps", 3, "--output_dir", tmp_path / "parts", "--resume_from_checkpoint", "latest"]
    parts = train(*flags)
    assert equal(whole, parts) and equal(whole / "checkpoint-3", parts / "checkpoint-3")
    assert not equal(whole / "checkpoint-2", whole / "checkpoint-3")
    with pytest.raises(SystemExit, match="num_groups was 2 there and is 1 now"):
        train(*flags, "--num_groups", 1)
    with pytest.raises(SystemExit, match="advantage_scale was global there and is group now"):
        train(*flags, "--advantage_scale", "group")


def test_a_run_is_resumed_with_its_own_start_and_prompts(train, run, tmp_path):
    """The LoRA under it, and all that rows of prompts say to rewards."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a dog", "wanted": 1}\n{"prompt": "a cat", "wanted": 2}\n')
    lora = run("train_sd3_soar_lora", "--rank", 2, "--output_dir", tmp_path / "start")
    flags = ["--prompts", prompts, "--checkpointing_steps", 1, "--resume_from_checkpoint", "latest"]
    train(*flags, "--lora", lora)
    with pytest.raises(SystemExit, match=f"merged was {lora} there and is None now"):
        train(*flags)
    prompts.write_text(prompts.read_text().replace("2", "3"))
    with pytest.raises(SystemExit, match="is of another run: data was"):
        train(*flags, "--lora", lora)


def test_torch_compile(train, compiled, tmp_path):
    """The same run, and no more graphs than there are kinds of blocks and of forwards."""
    flags = [*NFT, "--adam_epsilon", 1e-3]
    plain = train(*flags, "--output_dir", tmp_path / "plain")
    assert not compiled
    for name, tensor in weights(train(*flags, "--torch_compile")).items():
        torch.testing.assert_close(tensor, weights(plain)[name], rtol=1e-4, atol=1e-6)
    # Drawing, the old policy and the start: each block but the last, and the last; with a gradient the first, too.
    assert len(compiled) == 3 * 2 + 3 and not torch._dynamo.utils.counters["graph_break"]


def on_two(one, method, setup=lambda: None, code=0):
    """The run that this process has just done in the folder `one`, once more on two: its folder, and its output."""
    two, log = one.with_name("two"), one.with_name("two.log")
    arguments = [word.replace(str(one), str(two)) for word in sys.argv[1:]]
    finish_all(start_two(method.__name__, arguments, log, setup), log, code)
    return two, log.read_text()


def assert_same_run(one, two):
    """The same weights, up to the order of float32 sums, and the same values of all processes in the log."""
    expected, found = weights(one), weights(two)
    for name, tensor in expected.items():
        torch.testing.assert_close(tensor, found[name], rtol=0, atol=1e-5)
    for name in "policy_loss kl ratio_error grad_norm below_epsilon reward reward_std equal_groups".split():
        expected, found = scalars(one, name), scalars(two, name)
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6) and (found or name in ("kl", "ratio_error")), name


@pytest.mark.parametrize(("method", "flags"), [(nft, NFT), (grpo, [])])
def test_two_processes_train_what_one_trains(method, flags, train, tmp_path, pipeline):
    """Up to the order of float32 sums: each has its share of the groups, and of every update."""
    flags = [*flags, "--num_updates", 2, "--adam_epsilon", 1e-3, "--report_to", "tensorboard"]
    one = train(*flags, "--output_dir", tmp_path / "one", method=method)
    assert_same_run(one, on_two(one, method)[0])


@pytest.mark.parametrize("method", [nft, grpo])
@pytest.mark.parametrize(("reward", "dog_on"), [("redness", 0), ("of_the_dog", 0), ("of_the_dog", 1), ("constant", 0)])
def test_a_process_without_terms_is_not_waited_for(reward, dog_on, method, train, tmp_path):
    """Without a weight of the distance, equal groups give a process nothing to train: on none, on one, on both."""
    (tmp_path / "two_prompts.txt").write_text("a red square\na dog\n")
    seeds = (seed for seed in range(20) if nft.groups_of(SimpleNamespace(seed=seed, num_groups=2), 2, 0)[dog_on][1])
    flags = ["--prompts", tmp_path / "two_prompts.txt", "--reward", f"test_rl:{reward}=1", "--seed", next(seeds)]
    flags += ["--adam_epsilon", 1e-3, "--report_to", "tensorboard", *([] if method is nft else ["--kl_weight", 0])]
    one = train(*flags, "--output_dir", tmp_path / "one", method=method)
    assert_same_run(one, on_two(one, method)[0])


def fail_on_one(step):
    """As a `setup` of two processes: the second has no reward, or no memory, or a number that is not finite."""
    if os.environ["RANK"] == "1":
        losses = grpo.policy_losses

        def out_of_memory(*inputs):
            raise torch.OutOfMemoryError("a card is full")

        def not_finite(*inputs):
            for loss, shares in losses(*inputs):
                yield loss, shares | {"ratio_error": loss.detach() + math.inf}

        def full_at_the_second_term(*inputs):
            yield next(losses(*inputs))
            out_of_memory()

        module = sys.modules[__name__]
        {
            "rewards are loaded": lambda: delattr(module, "redness"),
            "pictures are drawn": lambda: setattr(grpo, "decode", out_of_memory),
            "pictures are scored": lambda: setattr(module, "redness", raising),
            "gradients are computed": lambda: setattr(grpo, "policy_losses", full_at_the_second_term),
            "numbers are checked": lambda: setattr(grpo, "policy_losses", not_finite),
        }[step]()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("rewards are loaded", "--reward test_rl:redness: module 'test_rl' has no attribute 'redness'"),
        ("pictures are drawn", "a card is full"),
        ("pictures are scored", "--reward test_rl:redness: the reader is broken"),
        ("gradients are computed", "a card is full"),
        ("numbers are checked", "step 1: not finite"),
    ],
)
def test_what_fails_on_one_process_ends_both(step, message, train, tmp_path):
    """With one line each, of which both say why; neither waits for the other, and the step is not taken."""
    one = train("--max_train_steps", 1, "--output_dir", tmp_path / "one", method=grpo)
    two, text = on_two(one, grpo, functools.partial(fail_on_one, step), code=1)
    errors = re.findall("error: .*", text)
    assert len(errors) == 2 and all(message in error for error in errors), errors
    assert "Traceback" not in text and not (two / "pytorch_lora_weights.safetensors").exists()


def stop_one():
    """As a `setup` of two processes: the second is told to stop while its first pictures are scored."""
    score = nft.score

    def score_and_stop(*inputs):
        if os.environ["RANK"] == "1":
            nft.score = score
            os.kill(os.getpid(), signal.SIGUSR1)
        return score(*inputs)

    nft.score = score_and_stop


def test_a_signal_to_one_process_stops_both(train, tmp_path):
    """After the step, with a checkpoint, from which both go on to the same end."""
    flags = "--adam_epsilon 1e-3 --report_to tensorboard --resume_from_checkpoint latest".split()
    one = train(*flags, "--output_dir", tmp_path / "one")
    two, _ = on_two(one, nft, stop_one, code=script.EXIT_INTERRUPTED)
    assert [path.name for path in two.glob("checkpoint-*")] == ["checkpoint-1"]
    on_two(one, nft)
    assert_same_run(one, two)


@pytest.mark.parametrize("method", [nft, grpo])
def test_fp16s_scaler(method, train, logged, monkeypatch, tmp_path):
    """An update without terms has nothing to unscale; one whose scaled gradient overflows is left to the scaler."""
    make = script.make_accelerator

    def make_with_scaler(args):
        accelerator = make(args)
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True  # which is refused on a CPU
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100, backoff_factor=2.0**-90)
        return accelerator

    monkeypatch.setattr(script, "make_accelerator", make_with_scaler)
    flags = "--reward test_rl:of_the_dog=1 --num_groups 1 --max_train_steps 6 --checkpointing_steps 1".split()
    out = train(*flags, *(["--old_start", 9] if method is nft else GRPO), method=method)
    norms = [log["grad_norm"] for log in logged]
    first, second = (step for step, norm in enumerate(norms, 1) if norm != 0)  # one prompt of three, twice
    assert not math.isfinite(norms[first - 1]) and math.isfinite(norms[second - 1])
    assert equal(out / f"checkpoint-{first}", out / f"checkpoint-{second - 1}")
    assert not equal(out / f"checkpoint-{second - 1}", out / f"checkpoint-{second}")


def test_deepspeed_is_refused(train, monkeypatch):
    """It takes its steps within `backward`, for which processes would wait, and hides the float32 weights."""
    make = script.make_accelerator

    def make_with_deepspeed(args):
        accelerator = make(args)
        monkeypatch.setattr(type(accelerator.state), "deepspeed_plugin", SimpleNamespace())
        return accelerator

    monkeypatch.setattr(script, "make_accelerator", make_with_deepspeed)
    with pytest.raises(SystemExit, match="not tried with FSDP2 and DeepSpeed"):
        train()


def test_sharded_weights_are_refused(pipeline, tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog\n")
    arguments = ["--pretrained_model_name_or_path", pipeline, "--prompts", tmp_path / "prompts.txt", "--reward", "x=1"]
    log = tmp_path / "log.txt"
    for process in start_two("train_sd3_nft_lora", [*arguments, "--output_dir", tmp_path / "out"], log, shard):
        finish(process, log, code=1)
    assert "error: the LoRA is switched on and off" in log.read_text()


@pytest.mark.parametrize("start", ["base", "transformer", "lora"])
def test_a_run_starts_where_another_ended(start, train, run, logged, forwards, tmp_path, monkeypatch):
    """A full fine-tune or a LoRA, merged into what is frozen: "without the new LoRA" is the start, not the base."""
    flags, drawn = ["--kl_weight", 1.0, "--max_train_steps", 2 if start == "lora" else 1], []
    if start == "transformer":
        flags += ["--transformer", run("train_sd3_soar", "--output_dir", tmp_path / "start", "--learning_rate", 0.02)]
    if start == "lora":
        more = ["--rank", 2, "--learning_rate", 0.1, "--output_dir", tmp_path / "start"]
        flags += ["--lora", run("train_sd3_soar_lora", *more)]
    decode = nft.decode
    monkeypatch.setattr(nft, "decode", lambda vae, latents: drawn.append(latents) or decode(vae, latents))
    logged.clear()
    out = train(*flags)
    assert logged[0]["kl"] == 0 and logged[0]["grad_norm"] > 0  # a new LoRA begins with none of its own
    first, drawn[:] = torch.cat(drawn)[:8], []
    if start == "lora":
        assert logged[1]["kl"] > 0  # it has one now, and the start has not
        assert f"It lies on top of the LoRA `{tmp_path / 'start'}`" in (out / "README.md").read_text()
    train("--max_train_steps", 1, "--output_dir", tmp_path / "from_the_base")
    assert torch.equal(first, torch.cat(drawn)) == (start == "base")


def test_what_a_run_leaves(train, pipeline):
    """A LoRA that pipelines load, a card with the method's name, and the best, median and worst picture."""
    from trained import load_trained

    out = train("--picture_steps", 2, "--validation_prompt", "a dog", "--num_inference_steps", 2)
    assert {"pytorch_lora_weights.safetensors", "README.md", "samples"} <= {path.name for path in out.iterdir()}
    card = (out / "README.md").read_text()
    assert "with `train_sd3_nft_lora.py`" in card and "- nft" in card
    assert load_trained(pipeline, lora=out).transformer.peft_config
    with Image.open(out / "rollouts" / "step-2.png") as sheet:
        assert sheet.size == (480, 200) and not (out / "rollouts" / "step-1.png").exists()


def test_validation_on_the_way(train):
    """Every so many steps, and at the end unless it is left out, without guidance unless asked for."""
    flags = "--validation_prompt dog --validation_steps 1 --num_inference_steps 2 --num_validation_images 1".split()
    out = train(*flags, "--skip_final_inference")
    assert [path.name for path in (out / "validation").iterdir()] == ["step-1.png"]
    assert not (out / "samples").exists()
    out = train(*flags, "--overwrite_output_dir", "--hub_token", "hf_secret")
    assert {path.name for path in (out / "validation").iterdir()} == {"step-1.png", "step-2.png"}
    assert json.loads((out / "training_args.json").read_text())["guidance_scale"] == 1


def test_defaults_are_the_authors(tmp_path):
    """As --help says; what is given goes before."""
    (tmp_path / "prompts.txt").write_text("a dog\n")
    required = ["--pretrained_model_name_or_path", "x", "--prompts", str(tmp_path / "prompts.txt"), "--reward", "x=1"]
    for method in (nft, grpo):
        args = vars(method.parse_args([*required, "--validation_prompt", "dog"]))
        wanted = {"learning_rate": 3e-4, "lora_alpha": 64, "adam_weight_decay": 1e-4, "guidance_scale": 1}
        assert {name: args[name] for name in wanted} == wanted and args["max_train_steps"] == 1000
        given = "--lora_alpha 8 --guidance_scale 2 --validation_prompt dog"
        args = method.parse_args([*required, *given.split()])
        assert (args.lora_alpha, args.guidance_scale) == (8, 2)


def test_the_token_is_kept_where_libraries_find_it(train, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "another")
    out = train("--hub_token", "hf_secret", "--max_train_steps", 1)
    assert os.environ["HF_TOKEN"] == "hf_secret"
    assert not any(b"hf_secret" in path.read_bytes() for path in out.rglob("*") if path.is_file())


def test_a_new_run_removes_the_pictures_of_the_last(train):
    """A resumed one does not."""
    train("--picture_steps", 1, "--checkpointing_steps", 1)
    out = train("--picture_steps", 1, "--max_train_steps", 3, "--resume_from_checkpoint", "latest")
    assert len([*(out / "rollouts").iterdir()]) == 3
    train("--picture_steps", 1, "--max_train_steps", 1, "--overwrite_output_dir")
    assert [path.name for path in (out / "rollouts").iterdir()] == ["step-1.png"]


def test_what_a_run_can_do_without(train, monkeypatch, caplog):
    """A tracker that has no connection, a picture that cannot be drawn: said, and gone on."""

    def fail(*inputs, **more):
        raise OSError("no room")

    monkeypatch.setattr(accelerate.Accelerator, "log", fail)
    monkeypatch.setattr(nft, "show", fail)
    out = train("--picture_steps", 1)
    assert weights(out) and "Logging failed: no room" in caplog.text
    assert "The picture of the rollout failed: no room" in caplog.text


def test_best_median_and_worst_are_shown(tmp_path):
    colors = ["red", "green", "blue", "white", "black"]
    pictures = [({"text": color}, (0, 0, 0)) for color in colors]
    images = [Image.new("RGB", (8, 8), color) for color in colors]
    nft.show(images, [0.3, 0.9, 0.1, 0.2, 0.8], pictures, tmp_path / "rollouts" / "sheet.png")
    with Image.open(tmp_path / "rollouts" / "sheet.png") as sheet:
        assert [sheet.getpixel((160 * i + 80, 120)) for i in range(3)] == [(0, 128, 0), (255, 0, 0), (0, 0, 255)]


def test_a_metrics_score_and_its_soft_one(monkeypatch):
    import scoring

    monkeypatch.setattr(
        scoring, "load_scorer", lambda *_: lambda images, rows: [{"score": 0.0, "soft": 0.5} for _ in images]
    )
    rewards = nft.load_rewards(SimpleNamespace(reward=["geneval=2", "geneval_soft=4"]), "cpu", [{}])
    assert nft.score(rewards, [None], [{}]) == {"reward": [2.0], "geneval": [0.0], "geneval_soft": [0.5]}


# Bad input


def test_groups_are_not_shared_out_unequally(train, tmp_path):
    one = train("--num_groups", 3, "--max_train_steps", 1, "--output_dir", tmp_path / "one")
    _, text = on_two(one, nft, code=1)
    assert text.count("error: --num_groups 3 cannot be shared out to 2 processes") == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reward", "test_rl:raising=1"], "--reward test_rl:raising: the reader is broken"),
        (["--reward", "test_rl:not_a_number=1"], r"--reward test_rl:not_a_number gave \[NaN"),
        (["--reward", "test_rl:too_few=1"], r"--reward test_rl:too_few gave \[1.0, 1.0, 1.0\] for 4 pictures"),
        (["--reward", "beauty=1"], "--reward beauty: want one of ocr, geneval"),
        (["--reward", "ocr_soft=1"], "--reward ocr_soft: want one of ocr, geneval.*, geneval_soft"),
        (["--reward", "geneval_soft=1"], "--reward geneval_soft: .*no `include`"),
        (["--reward", "test_rl:none=1"], "--reward test_rl:none: module 'test_rl' has no attribute 'none'"),
        (["--reward", "ocr=1"], "--reward ocr: the prompt 'a red square' has no text in double quotes"),
        (["--held_out_prompts", "{folder}/prompts.txt"], "has 3 prompts of .*prompts.txt, such as 'a red square'"),
        (["--held_out_prompts", "{folder}/capitals.txt"], "has 1 prompts of .*capitals.txt, such as 'a dog'"),
        (
            ["--prompts", "{folder}/capitals.txt", "--held_out_prompts", "{folder}/prompts.txt"],
            "has 1 prompts of .*prompts.txt, such as 'A Dog'",
        ),
        (["--prompts", "{folder}/empty.txt"], "empty.txt has none"),
        (
            ["--lora", "{folder}"],
            "--lora .*: no pytorch_lora_weights.safetensors or adapter_model.safetensors is there",
        ),
        (["--prompts", "{folder}/bad.jsonl"], "bad.jsonl, line 1 has no `prompt`"),
    ],
)
def test_one_line_for_a_mistake(flags, message, train, tmp_path):
    """Before any model loads, but for what only a picture shows; and no reward is silently 0."""
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "capitals.txt").write_text("  A Dog\n")
    (tmp_path / "bad.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(SystemExit, match=message) as ended:
        train(*(flag.format(folder=tmp_path) for flag in flags))
    assert str(ended.value).startswith("error: ") and "\n" not in str(ended.value)
    assert not (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reward", "redness"], "--reward redness: want NAME=WEIGHT"),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt: no such file"),
        (["--num_train_sigmas", "3"], "--num_train_sigmas 3: at most --num_rollout_steps less one"),
        (["--num_updates", "3"], "--group_size 4 cannot be shared out to --num_updates 3"),
        (["--trajectory_length", "3"], "unknown arguments: --trajectory_length"),
        (["--torch_compile", "--mixed_precision", "bf16", "--kl_weight", "0"], "--torch_compile rounds otherwise"),
        (["--sde_window_size", "6"], "--sde_window_size 6 is longer than --sde_window_range"),
        (["--sde_window_size", "2", "--num_rollout_steps", "5"], "--sde_window_range ends before"),
    ],
)
def test_one_line_for_a_wrong_flag(flags, message, train, capsys):
    with pytest.raises(SystemExit, match="2"):
        train(*flags, method=grpo if {"--sde_window_size", "--torch_compile"} & set(flags) else nft)
    assert message in capsys.readouterr().err


def test_commands_of_the_documents(tmp_path, monkeypatch):
    """Those of the README and of each script's docstring."""
    monkeypatch.chdir(tmp_path)
    for name in ("prompts.txt", "test_prompts.txt"):
        (tmp_path / name).write_text("a prompt\n")
    texts = [(ROOT / "examples" / "rl" / "README.md").read_text(), nft.__doc__, grpo.__doc__]
    pattern = r"(train_sd3_\w+)\.py\s+(--.*)"
    found = re.findall(pattern, re.sub(r"\\\n\s*", " ", "\n".join(texts)))
    assert len(found) == 4
    for name, arguments in found:
        args = {"train_sd3_nft_lora": nft, "train_sd3_flow_grpo_lora": grpo}[name].parse_args(shlex.split(arguments))
        assert args.reward and args.output_dir.startswith("sd3-")


# The comparison and the costs


def test_methods_of_the_comparison_cost_what_they_are_said_to(tmp_path, monkeypatch):
    """Each arm's command line is one that its script takes, and costs its budgets in forwards to within a rollout."""
    monkeypatch.chdir(compare_methods.MINIATURE)
    (tmp_path / "raw_world" / "transformer").mkdir(parents=True)
    (tmp_path / "raw_world" / "transformer" / "config.json").write_text('{"sample_size": 8}')
    shutil.copytree(tmp_path / "raw_world", tmp_path / "raw_words")
    calls = []
    monkeypatch.setattr(compare_methods.experiment, "call", lambda log, *command, **more: calls.append(command))
    compare_methods.write_prompts(tmp_path)
    arms = [item for item in compare_methods.plan(2) if isinstance(item, compare_methods.Arm)]
    seeds = defaultdict(set)
    for arm in arms:
        compare_methods.train(tmp_path, arm)
        name, *flags = calls[-1]
        method = {nft.__file__: nft, grpo.__file__: grpo}[str(name)]
        args = method.parse_args([str(flag) for flag in flags])
        pictures = args.num_groups * args.group_size
        drawing, graphs, others = cost.forwards(method, args)
        each = drawing + 3 * graphs + others
        assert (pictures, each) == (compare_methods.PICTURES, compare_methods.METHODS[arm.method][2])
        spent = args.max_train_steps * pictures * each
        assert spent == arm.forwards(args.max_train_steps)
        seeds[arm.method, arm.start, arm.world].add(args.seed)
        budget = compare_methods.BUDGET / (2 if arm.start == "SOAR" else 1)
        assert abs(spent - budget) <= arm.parts * pictures * each / 2
        assert args.checkpointing_steps * arm.parts == args.max_train_steps
        assert args.reward == [f"{arm.world}:reward=1"] and nft.read_prompts(args)
    assert {arm.start for arm in arms} == set(compare_methods.STARTS)
    assert len(seeds["NFT", "base", "world"]) == 2 and len(seeds["NFT", "base", "words"]) == 1


def test_costs_of_the_readme(tmp_path):
    """Of a picture and a rollout, a backward counting as two; and what a weight of the distance adds to each."""
    (tmp_path / "prompts.txt").write_text("a dog\n")
    required = ["--pretrained_model_name_or_path", "x", "--prompts", str(tmp_path / "prompts.txt"), "--reward", "x=1"]
    for method, flags, wanted in [
        (grpo, "", 92),
        (grpo, "--kl_weight 0", 74),
        (grpo, "--rollout_guidance 1 --kl_weight 0 --sde_window_size 3", 19),
        (nft, "", 46),
        (nft, "--old_start 1000", 37),
        (nft, "--old_start 1000 --num_train_sigmas 4", 22),
        (nft, "--old_start 1000 --num_train_sigmas 4 --kl_weight 0.1", 26),
        (nft, "--num_train_sigmas 4 --kl_weight 0.1", 30),
        (nft, "--old_start 1000 --num_train_sigmas 4 --num_updates 2", 26),
    ]:
        drawing, graphs, others = cost.forwards(method, method.parse_args([*required, *flags.split()]))
        assert drawing + 3 * graphs + others == wanted, flags


def test_costs_of_a_run(pipeline, monkeypatch):
    """A rollout's operations are those of its pictures' forwards; the card's rate and its share make hours of them."""
    monkeypatch.setattr(cost, "COMMON", "--mixed_precision bf16 --resolution 32 --max_sequence_length 16")
    flags = "--num_groups 2 --group_size 3 --max_train_steps 5 --num_rollout_steps 6 --num_train_sigmas 2"
    one, four = (cost.count("H100", nft, f"{flags} --train_batch_size {size}", pipeline) for size in (1, 4))
    forward, graph = one["tflop_forward"], one["tflop_graph"]
    assert 2 < graph / forward <= 3 and graph == pytest.approx(four["tflop_graph"], rel=0.01)
    assert one["tflop_rollout"] == pytest.approx(2 * 3 * ((6 + 2) * forward + 2 * graph))
    assert one["rollout_seconds"] == pytest.approx(one["tflop_rollout"] / (989 * 0.15))
    assert one["hours"] == pytest.approx(5 * one["rollout_seconds"] / 3600)
    assert one["training_gib"] < four["training_gib"]


@pytest.mark.parametrize("method", ["nft", "flow_grpo"])
def test_stages_of_a_rollout(method, pipeline, tmp_path, monkeypatch):
    """Timed from outside the script, they are all of its own time but a little."""
    monkeypatch.chdir(ROOT / "examples" / "rl")  # where its reward is looked for
    flags = f"{method} --resolution 32 --max_sequence_length 16 --num_groups 1 --group_size 2 --num_rollout_steps 7"
    found = time_rollouts.measure(flags, pipeline, tmp_path)
    assert 0 < found["stages_s"]["everything else"] < 0.5 * found["rollout_s"]
    assert found["rollout_s"] == pytest.approx(sum(found["stages_s"].values()))
    assert found["pictures"] == 2 and found["logs"]["seconds"] == found["rollout_s"]
    assert f"| 2 | {found['pictures_per_second_drawn']:.2f} |" in time_rollouts.table({"results": [found]})


def test_where_a_curve_reaches_a_goal():
    assert report_comparison.reached([0, 10, 20], [0.1, 0.3, 0.2], 0.2) == pytest.approx(5)
    assert report_comparison.reached([0, 10], [0.1, 0.3], 0.4) is None


def test_tables_of_the_readme():
    """Those of the comparison are what its results give, line by line, and so is that of the costs."""
    folder = ROOT / "examples" / "rl"
    readme = (folder / "README.md").read_text()
    found = report_comparison.read(folder / "results")
    tables = [report_comparison.main_table(found), report_comparison.difference_table(found)]
    tables += [report_comparison.parts_table(found), report_comparison.cost_table(found)]
    tables += [report_comparison.words_table(found)]
    tables += [cost.table(json.loads((folder / "results" / "cost.json").read_text()))]
    tables += [time_rollouts.table(json.loads((folder / "results" / "rollouts.json").read_text()))]
    for table in tables:
        assert table in readme
    findings = " ".join(readme.split("<!-- findings -->")[1].split("<!-- /findings -->")[0].split())
    figures = re.findall(r"[+-]0\.\d{3} \[[^]]*\]|0\.\d{3}", findings)
    assert len(figures) > 10 and [figure for figure in figures if figure not in "\n".join(tables)] == []
