# SPDX-License-Identifier: Apache-2.0
"""What the tests share: a tiny SD3.5-format pipeline, real photographs with captions, and a way to run a script."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file


ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train_sd3_sft", "train_sd3_soar", "train_sd3_soar_lora")
PHOTOS = {
    "astronaut": "an astronaut in an orange suit",
    "camera": "a man behind a camera",
    "chelsea": "a cat looking to the side",
    "coffee": "a cup of coffee on a wooden table",
    "coins": "old coins in rows",
    "hubble_deep_field": "galaxies in deep space",
    "retina": "the retina of an eye",
    "rocket": "a rocket on its launch pad",
}


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """Folder of the tiny pipeline, written by the example as a user would."""
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    subprocess.run([sys.executable, ROOT / "examples" / "make_tiny_sd3.py", folder], check=True)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """An image folder of eight photographs of different sizes and modes, with `metadata.jsonl`."""
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder)
    return folder


@pytest.fixture(scope="session")
def small_photos(tmp_path_factory):
    """The same photographs, at most 64 pixels wide and high."""
    folder = tmp_path_factory.mktemp("small_photos")
    write_photos(folder, 64)
    return folder


def write_photos(folder, side=10_000):
    """Write the photographs that scikit-image ships, no side longer than `side` pixels, and their captions."""
    from skimage import data

    folder.mkdir(exist_ok=True)
    with open(folder / "metadata.jsonl", "w") as metadata:
        for name, caption in PHOTOS.items():
            image = Image.fromarray(getattr(data, name)())
            image.thumbnail((side, side))
            image.save(folder / f"{name}.png")
            metadata.write(json.dumps({"file_name": f"{name}.png", "text": caption}) + "\n")


@pytest.fixture
def run(pipeline, photos, tmp_path):
    """
    Run a script in this process, on the photographs unless the arguments name other data.

    `run("train_sd3_soar", "--max_train_steps", 2)` returns the output folder, `tmp_path/out` unless given.
    """

    def run_script(script, *arguments):
        arguments = [str(a) for a in arguments]
        defaults = {
            "--pretrained_model_name_or_path": pipeline,
            "--output_dir": tmp_path / "out",
            "--resolution": 32,
            "--max_sequence_length": 16,
            "--train_batch_size": 2,
            "--max_train_steps": 2,
            "--learning_rate": 1e-3,
            "--seed": 0,
            "--num_inference_steps": 2,
            "--num_validation_images": 1,
            "--report_to": "none",
        }
        if not {"--dataset_name", "--train_data_dir", "--jsonl_path"} & set(arguments):
            defaults["--train_data_dir"] = photos
        for flag, value in defaults.items():
            if flag not in arguments:
                arguments += [flag, str(value)]
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        module = importlib.import_module(script)
        module.main(module.parse_args(arguments))
        return Path(arguments[arguments.index("--output_dir") + 1])

    return run_script


def weights(folder):
    """The trained tensors that a run left in `folder`, by name."""
    files = [
        folder / "pytorch_lora_weights.safetensors",
        folder / "transformer" / "diffusion_pytorch_model.safetensors",
    ]
    return load_file(next(file for file in files if file.exists()))


def equal(one, other):
    """Whether two runs left exactly the same weights."""
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
torch.set_num_threads(1)
