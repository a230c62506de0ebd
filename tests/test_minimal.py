# SPDX-License-Identifier: Apache-2.0
"""`examples/minimal_soar.py`: short, of the same losses and gradients as the script, and run by its first command."""

import re
import shlex
import sys
from contextlib import nullcontext
from functools import partial

import minimal_soar
import pytest
import torch
from diffusers import SD3Transformer2DModel
from harness import ROOT, equal, run_python, weights

import train_sd3_soar


@pytest.mark.parametrize("flags", ["", "--lambda_aux 0.3 --num_sampling_steps 10", "--lambda_aux 0"])
def test_losses_and_gradients_are_those_of_the_script(flags, pipeline, photos):
    """Bit for bit, term by term, for one image and the same draws."""
    flags = shlex.split(flags)
    minimal_args = minimal_soar.parse_args(["model", str(photos), "out", *flags])
    script_args = train_sd3_soar.parse_args(
        ["--pretrained_model_name_or_path", "model", "--train_data_dir", str(photos), *flags]
    )
    transformer = SD3Transformer2DModel.from_pretrained(pipeline, subfolder="transformer")
    config = transformer.config
    torch.manual_seed(0)
    latents = torch.randn(1, config.in_channels, 8, 8)
    text, null_text = (
        (torch.randn(1, 93, config.joint_attention_dim), torch.randn(1, config.pooled_projection_dim))
        for _ in range(2)
    )
    batch = dict(zip(("prompt_embeds", "pooled_prompt_embeds"), text, strict=True))
    batch |= dict(zip(("null_prompt_embeds", "null_pooled_prompt_embeds"), null_text, strict=True))
    script_predict = partial(train_sd3_soar.predict_velocity, transformer, batch)

    def minimal_predict(state, sigma, text):
        return script_predict(state, sigma, null=text is null_text)

    def backward(losses):
        transformer.zero_grad()
        values = []
        for loss in losses:
            loss.backward()
            values.append(loss.item())
        return values, {name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None}

    for seed in range(4):
        generator, other = (torch.Generator().manual_seed(seed) for _ in range(2))
        terms = train_sd3_soar.training_losses(script_args, script_predict, latents, [generator], 3.0, nullcontext)
        expected, expected_gradients = backward(loss for loss, _ in terms)
        losses, gradients = backward(
            minimal_soar.soar_losses(minimal_args, minimal_predict, latents, text, null_text, 3.0, other)
        )
        assert losses == expected and len(losses) == (1 if minimal_args.lambda_aux == 0 else 7)
        assert gradients.keys() == expected_gradients.keys()
        assert all(torch.equal(gradients[name], expected_gradients[name]) for name in gradients)


def test_defaults_are_those_of_the_script(photos):
    minimal_args = minimal_soar.parse_args(["model", str(photos), "out"])
    script_args = train_sd3_soar.parse_args(
        ["--pretrained_model_name_or_path", "model", "--train_data_dir", str(photos)]
    )
    shared = vars(minimal_args).keys() & vars(script_args).keys()
    assert len(shared) == 6 and all(getattr(minimal_args, name) == getattr(script_args, name) for name in shared)


def test_first_command(pipeline, small_photos, tmp_path):
    """As it stands in the docstring, from another folder; twice, to the same weights, which are not the base's."""
    (command,) = re.findall(r"^    (python .*)", minimal_soar.__doc__, flags=re.MULTILINE)
    names = {"stabilityai/stable-diffusion-3.5-medium": pipeline, "my_images": small_photos, "python": sys.executable}
    names["examples/minimal_soar.py"] = ROOT / "examples" / "minimal_soar.py"
    words = [str(names.get(word, word)) for word in shlex.split(command)]
    assert words[-1] == "sd3-soar"
    for folder in ("one", "two"):
        flags = ["--resolution", "32", "--steps", "2", "--accumulate", "2", "--trajectory_length", "2"]
        run_python([*words[:-1], tmp_path / folder, *flags], cwd=tmp_path)
    assert equal(tmp_path / "one", tmp_path / "two")
    base, trained = weights(pipeline), SD3Transformer2DModel.from_pretrained(tmp_path / "one", subfolder="transformer")
    assert any(not torch.equal(tensor, base[name]) for name, tensor in trained.state_dict().items())


def test_a_folder_without_metadata(tmp_path, capsys):
    with pytest.raises(SystemExit):
        minimal_soar.parse_args(["model", str(tmp_path), "out"])
    assert f"{tmp_path} has no metadata.jsonl" in capsys.readouterr().err.splitlines()[-1]


def test_it_is_short():
    assert len((ROOT / "examples" / "minimal_soar.py").read_text().splitlines()) <= 150
