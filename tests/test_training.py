# SPDX-License-Identifier: Apache-2.0
"""The scripts from end to end on the tiny pipeline: train, checkpoint, resume, finish, load, generate."""

import ast
import importlib
import json
import math
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models import embeddings
from harness import ROOT, SCRIPTS, equal, weights

import train_sd3_soar


# What may differ between two scripts, besides their module docstrings.
ALLOWED_DIFFERENCES = {
    ("train_sd3_sft", "train_sd3_soar"): {"parse_args", "training_losses"},
    ("train_sd3_soar", "train_sd3_soar_lora"): {
        "from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict",
        "parse_args",
        "LORA_FILES",
        "load_lora",
        "trained_layers",
        "load_transformer",
        "save_transformer",
        "USAGE",
    },
}


def definitions(script):
    """Source of every top-level statement, with the comments above it, by name where it has one."""
    source = (ROOT / f"{script}.py").read_text()
    body = ast.parse(source).body[1:]  # without the docstring
    lines, end, found = source.splitlines(), body[0].lineno - 1, {}
    for node in body:
        text = "\n".join(lines[end : node.end_lineno]).strip()
        name = node.targets[0].id if isinstance(node, ast.Assign) and hasattr(node.targets[0], "id") else text
        found[getattr(node, "name", name)] = text
        end = node.end_lineno
    return found


@pytest.mark.parametrize("pair", ALLOWED_DIFFERENCES)
def test_scripts_stay_in_step(pair):
    one, other = map(definitions, pair)
    different = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
    assert different == ALLOWED_DIFFERENCES[pair]
    header = [(ROOT / f"{script}.py").read_text().split('"""')[0] for script in pair]
    assert header[0] == header[1]


def test_the_command_lines_differ_only_in_their_groups():
    """`parse_args` may differ: in the groups of SOAR and LoRA, the name of the output and the learning rate."""
    sft, soar, lora = (definitions(script)["parse_args"].splitlines() for script in SCRIPTS)

    def without_group(lines, title):
        start = next(i for i, line in enumerate(lines) if f'add_argument_group("{title}")' in line)
        return lines[:start] + lines[start + 1 + lines[start + 1 :].index("") + 1 :]

    def difference(one, other):
        return [pair for pair in zip(one, other, strict=True) if pair[0] != pair[1]]

    assert [a.split('"')[1] for a, _ in difference(sft, without_group(soar, "SOAR"))] == ["--output_dir"]
    changed = [a.split('"')[1] for a, _ in difference(soar, without_group(lora, "LoRA"))]
    # A LoRA has no use for the third; the last is the line of the learning rate's default.
    assert changed == ["--output_dir", "--learning_rate", "--full_bf16", "prodigy"]


def generate(pipeline):
    generator = torch.Generator().manual_seed(0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a cat", height=32, width=32, num_inference_steps=2, generator=generator, output_type="np").images


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_position_table_is_read_and_not_computed(script, pipeline, photos, monkeypatch):
    """diffusers makes it in float64, 3.4 GiB at full size, before it reads the one in the file."""
    made, compute = [], embeddings.get_2d_sincos_pos_embed

    def watched(*inputs, **more):
        made.append(compute(*inputs, **more))
        return made[-1]

    monkeypatch.setattr(embeddings, "get_2d_sincos_pos_embed", watched)
    module = importlib.import_module(script)
    required = ["--pretrained_model_name_or_path", str(pipeline), "--train_data_dir", str(photos), "--seed", "0"]
    loaded = module.load_transformer(module.parse_args(required), str(pipeline), torch.float32)
    assert made and all(table.is_meta for table in made)
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert torch.equal(loaded.pos_embed.pos_embed, weights(pipeline)["pos_embed.pos_embed"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_train_checkpoint_resume_finish_load_generate(script, run, pipeline, tmp_path, monkeypatch):
    arguments = ("--max_train_steps", 4, "--checkpointing_steps", 2, "--checkpoints_total_limit", 1, "--use_ema")
    whole = run(script, *arguments, "--output_dir", tmp_path / "whole", "--validation_prompt", "a cat")
    part = tmp_path / "part"
    run(script, *arguments, "--output_dir", part, "--max_train_steps", 2)
    run(script, *arguments, "--output_dir", part, "--resume_from_checkpoint", "latest")
    assert equal(whole, part)
    assert [folder.name for folder in part.glob("checkpoint-*")] == ["checkpoint-4"]

    base = StableDiffusion3Pipeline.from_pretrained(pipeline)
    before = generate(base)
    if script == "train_sd3_soar_lora":
        base.load_lora_weights(whole)
        after = generate(base)
        base.set_adapters(base.get_list_adapters()["transformer"], 0.0)
        assert np.array_equal(generate(base), before)
    else:
        transformer = SD3Transformer2DModel.from_pretrained(whole, subfolder="transformer")
        after = generate(StableDiffusion3Pipeline.from_pretrained(pipeline, transformer=transformer))
    assert np.abs(after - before).max() > 1e-3

    assert (whole / "validation" / "step-4.png").exists()
    card = (whole / "README.md").read_text()
    assert "samples/0-0.png" in card and f"{script}.py --max_train_steps 4" in card
    monkeypatch.chdir(tmp_path)
    drawn = {}
    exec(card.split("```python\n")[1].split("```")[0], drawn)  # as its reader would; `whole` is a local folder
    assert np.asarray(drawn["image"]).std() > 1
    length = json.loads((whole / "training_args.json").read_text())["max_sequence_length"]
    assert f"pipeline(prompt, max_sequence_length={length})" in card
    assert (whole / "samples" / "0-0.png").exists()
    assert json.loads((whole / "training_args.json").read_text())["max_train_steps"] == 4


def test_soar_without_auxiliary_points_is_sft(run, tmp_path):
    """Step for step: the weights after each step are the SFT script's, bit for bit."""
    arguments = ("--max_train_steps", 3, "--checkpointing_steps", 1, "--cond_dropout_rate", 0.5, "--random_flip")
    sft = run("train_sd3_sft", *arguments, "--output_dir", tmp_path / "sft")
    for name, flag in (("lambda", "--lambda_aux"), ("length", "--trajectory_length")):
        soar = run("train_sd3_soar", *arguments, flag, 0, "--output_dir", tmp_path / name)
        for step in (1, 2, 3):
            assert equal(sft / f"checkpoint-{step}", soar / f"checkpoint-{step}")
    soar = run("train_sd3_soar", *arguments, "--output_dir", tmp_path / "soar")
    assert not equal(sft, soar)


@pytest.mark.parametrize(
    ("paths", "length", "chunk", "scale", "with_graph", "without_graph"),
    [(1, 6, None, 4.5, 7, 1), (2, 3, 12, 4.5, 2, 1), (1, 2, 1, 4.5, 5, 1), (1, 6, 6, 1.0, 3, 0)],
)
def test_calls_and_graphs_of_a_soar_step(run, monkeypatch, paths, length, chunk, scale, with_graph, without_graph):
    """1 + M*N forwards with gradient and 1 without per sample; never more than one graph alive."""
    calls, alive = [], set()
    forward = SD3Transformer2DModel.forward

    class Graph(torch.autograd.Function):
        """Identity that knows when its graph is used up by `backward`."""

        @staticmethod
        def forward(ctx, x, number):
            ctx.number = number
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            alive.discard(ctx.number)
            return gradient, None

    def counted(self, hidden_states, **inputs):
        calls.append((torch.is_grad_enabled(), len(hidden_states)))
        assert not alive, "another graph is still alive"
        (output,) = forward(self, hidden_states, **inputs)
        if torch.is_grad_enabled():
            alive.add(len(calls))
            output = Graph.apply(output, len(calls))
        return (output,)

    monkeypatch.setattr(SD3Transformer2DModel, "forward", counted)
    arguments = ["--max_train_steps", 1, "--num_rollout_paths", paths, "--trajectory_length", length]
    arguments += ["--aux_batch_size", chunk] if chunk else []
    run("train_sd3_soar", *arguments, "--cfg_scale_sampling", scale)
    assert sum(grad for grad, _ in calls) == with_graph
    assert sum(not grad for grad, _ in calls) == without_graph
    assert sum(samples for grad, samples in calls if grad) == 2 * (1 + paths * length)


@pytest.mark.parametrize("paths", [1, 2])
def test_the_step_follows_the_equations(paths, photos):
    """Every term of the loss, sample by sample, against the equations of the paper written out with plain numbers."""
    n, k, shift, cfg, scale, lam = 3, 10, 3.0, 4.5, 0.5, 0.7
    seeds = (1, 262, 838)  # the second draws u = 0.0026: its rollout ends at the floor; the third draws less than that
    size = len(seeds)
    arguments = f"""--pretrained_model_name_or_path x --train_data_dir {photos} --num_rollout_paths {paths}
        --lambda_aux {lam} --trajectory_length {n} --num_sampling_steps {k} --weighting_scheme cosmap"""
    arguments += " --sde_rollout_type cps" if paths > 1 else ""
    args = train_sd3_soar.parse_args(arguments.split())
    latents, captions, last_of = torch.randn(size, 4, 6, 6), torch.randn(size), []
    weight, graphs = torch.tensor(0.3, requires_grad=True), []

    def predict(x, sigma, samples=slice(None), null=False):
        """Something that tells all its inputs apart."""
        graphs.append(x.requires_grad)
        caption = torch.full_like(sigma, -0.7) if null else captions[samples]
        return weight * x + (0.2 * sigma + caption).view(-1, 1, 1, 1) * (1 + x.square())

    def sync(last):
        last_of.append(last)
        return nullcontext()

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    terms = list(train_sd3_soar.training_losses(args, predict, latents, generators, shift, sync))
    assert last_of == [False] * (len(terms) - 1) + [True]
    assert not any(graphs) and all(loss.requires_grad for loss, _ in terms)  # the rollout is a part of no graph

    base, aux = [], []
    for i, seed in enumerate(seeds):
        generator, z0 = torch.Generator().manual_seed(seed), latents[i : i + 1]

        def v(x, sigma, i=i, **null):
            return predict(x, torch.tensor([sigma]), samples=[i], **null)

        def error(prediction, target, sigma):
            weight = 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
            return weight * (prediction - target).square().mean().item()

        z1 = torch.randn(4, 6, 6, generator=generator)[None]
        u = max(torch.rand(1, generator=generator).item(), 1e-3)
        sigma = shift * u / (1 + (shift - 1) * u)
        u_next = max(u - 1 / k, 1e-3)
        sigma_next = shift * u_next / (1 + (shift - 1) * u_next)
        x = (1 - sigma) * z0 + sigma * z1
        base.append(error(v(x, sigma), z1 - z0, sigma))
        uncond = v(x, sigma, null=True)
        guided = uncond + cfg * (v(x, sigma) - uncond)
        for path in range(paths):
            if path == 0:
                state = x + guided * (sigma_next - sigma)
            else:
                fresh = torch.randn(4, 6, 6, generator=generator)[None]
                h = sigma_next * math.sin(scale * math.pi / 2)
                state = (1 - sigma_next) * (x - sigma * guided) + h * fresh
                state = state + math.sqrt(sigma_next**2 - h**2) * (x + (1 - sigma) * guided)
            for _ in range(n):
                sigma_aux = sigma_next + torch.rand((), generator=generator).item() * (1 - sigma_next)
                a = (sigma_aux - sigma_next) / (1 - sigma_next)
                aux_state = (1 - a) * state + a * z1
                aux.append(error(v(aux_state, sigma_aux), (aux_state - z0) / sigma_aux, sigma_aux))
    expected = (sum(base) + lam * sum(aux)) / (size + lam * size * n * paths)
    assert sum(loss.item() for loss, _ in terms) == pytest.approx(expected, rel=1e-4)
    assert sum(v["loss_base"].item() for _, v in terms if "loss_base" in v) == pytest.approx(
        sum(base) / size, rel=1e-4
    )
    logged = sum(v["loss_aux"].item() for _, v in terms if "loss_aux" in v)
    assert logged == pytest.approx(sum(aux) / len(aux), rel=1e-4)
    assert len(aux) == size * n * paths


def test_the_velocity_is_the_models():
    """Timestep and text of each state: of the samples that are asked for, or the empty caption."""
    calls = []
    transformer = lambda **inputs: calls.append(inputs) or (inputs["hidden_states"],)  # noqa: E731
    names = ("prompt_embeds", "pooled_prompt_embeds", "null_prompt_embeds", "null_pooled_prompt_embeds")
    batch = {name: torch.randn(2, 3) for name in names}
    sigma, samples = torch.tensor([0.5, 0.25, 1.0]), torch.tensor([1, 0, 1])
    for null, (embeds, pooled) in ((False, names[:2]), (True, names[2:])):
        states = torch.randn(3, 4, 6, 6)
        assert train_sd3_soar.predict_velocity(transformer, batch, states, sigma, samples, null) is states
        assert calls[-1]["timestep"].tolist() == [500, 250, 1000]
        assert torch.equal(calls[-1]["encoder_hidden_states"], batch[embeds][samples])
        assert torch.equal(calls[-1]["pooled_projections"], batch[pooled][samples])
    train_sd3_soar.predict_velocity(transformer, batch, states[:2], sigma[:2])
    assert torch.equal(calls[-1]["encoder_hidden_states"], batch["prompt_embeds"])


def test_loss_does_not_depend_on_the_chunks(run, tmp_path):
    """The gradient is the sum over the auxiliary points, however they are cut."""
    arguments = ("train_sd3_soar", "--max_train_steps", 1, "--num_rollout_paths", 2, "--trajectory_length", 3)
    one, other = (run(*arguments, "--aux_batch_size", n, "--output_dir", tmp_path / str(n)) for n in (5, 12))
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(other)[name], rtol=0, atol=2e-5)


def test_accelerate_launch(pipeline, photos, tmp_path):
    """The command of the README, as a process of its own."""
    command = f"""accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
        {ROOT}/train_sd3_soar.py --pretrained_model_name_or_path {pipeline} --train_data_dir {photos} --resolution 32
        --train_batch_size 2 --max_train_steps 1 --output_dir {tmp_path}/out --cache_latents --cache_prompt_embeds
        --dataloader_num_workers 1"""
    executable = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *command.split()[1:]]
    done = subprocess.run(executable, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "transformer" / "config.json").exists()
    assert "Traceback" not in done.stderr
