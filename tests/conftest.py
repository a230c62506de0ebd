# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests: a tiny SD3.5-format pipeline, real photographs with captions, and a way to run a script."""

import gc
import importlib
import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from harness import ROOT, reset_accelerate, run_python, write_photos


@pytest.fixture(scope="session", autouse=True)
def imports_are_not_searched_for_garbage():
    """Every run of a script collects garbage: a quarter of its time, were all imports looked through for it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """Folder of the tiny pipeline, written by the example as a user would."""
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    run_python([sys.executable, ROOT / "examples" / "make_tiny_sd3.py", folder])
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


@pytest.fixture
def run(pipeline, photos, tmp_path, monkeypatch):
    """
    Run a script in this process, on the photographs unless the arguments name other data.

    `run("train_sd3_soar", "--max_train_steps", 2)` returns the output folder, `tmp_path/out` unless given. Flags that
    are not given have short runs' values, but for those in `omit`.
    """

    def run_script(script, *arguments, omit=()):
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
            "--report_to": "none",
        }
        if "--validation_prompt" in arguments:
            defaults |= {"--num_inference_steps": 2, "--num_validation_images": 1}
        if not {"--dataset_name", "--train_data_dir", "--jsonl_path"} & set(arguments):
            defaults["--train_data_dir"] = photos
        for flag, value in defaults.items():
            if flag not in (*arguments, *omit):
                arguments += [flag, str(value)]
        reset_accelerate()
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        module = importlib.import_module(script)
        module.run(module.parse_args())
        return Path(arguments[arguments.index("--output_dir") + 1])

    return run_script


@pytest.fixture
def logged(monkeypatch):
    """What the runs of a test log, a dictionary a step."""
    values = []
    monkeypatch.setattr(Accelerator, "log", lambda self, logs, step: values.append(logs | {"step": step}))
    return values


@pytest.fixture
def compiled(monkeypatch):
    """The graphs that the compiler is given: it runs them as they are. Also why a frame was compiled again."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def compile(self, **more):
        self._compiled_call_impl = torch.compile(self._call_impl, backend=backend, **more)

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    yield graphs
    torch.compiler.reset()


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
torch.set_num_threads(1)
