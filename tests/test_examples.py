# SPDX-License-Identifier: Apache-2.0
"""What the examples' commands say to input that is not there or of another kind, and where their output may go."""

import json
import shlex
import shutil
import sys

import matplotlib.pyplot  # noqa: F401  # what the forks import need not be imported by each
import pytest
import torch
import trained
from harness import ROOT, run_python
from PIL import Image
from torch.utils.tensorboard import SummaryWriter


EXAMPLES = ROOT / "examples"


@pytest.fixture
def call(pipeline, small_photos, tmp_path):
    """
    Run an example in `tmp_path` by its command line, in which names stand for what they name; returns its exit code
    and what it said last.
    """
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()

    def run_example(command):
        places = {"PIPELINE": pipeline, "PHOTOS": small_photos, "a=PIPELINE": f"a={pipeline}"}
        script, *words = [str(places.get(word, word)) for word in shlex.split(command)]
        done = run_python([sys.executable, EXAMPLES / script, *words], check=False, cwd=tmp_path)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, (done.stderr.strip().splitlines() or [""])[-1]

    return run_example


COMPARE = "quickstart/compare_models.py --pretrained_model_name_or_path PIPELINE --models a=PIPELINE --prompts x"
VAE = "quickstart/train_vae.py PIPELINE PHOTOS"
EVALUATE = "miniature/evaluate.py --base PIPELINE --run PIPELINE --output e.json --world"
PROMPTS = "paper/make_data.py prompts --train_data_dir PHOTOS --output"
STARTUP = "benchmark/startup.py PIPELINE --sizes 100 200 --output"
MINIMAL = "minimal_soar.py PIPELINE PHOTOS"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("make_tiny_sd3.py file/x", "file/x"),
        ("minimal_soar.py empty PHOTOS out", "empty"),
        (f"{MINIMAL} file/x", "file/x"),
        (f"{MINIMAL} out --resolution 40", "--resolution"),
        (f"{MINIMAL} out --resolution 272", "at most 256"),
        (f"{MINIMAL} out --num_sampling_steps 0", "--num_sampling_steps"),
        (f"{COMPARE} --output file/x.png", "--output file/x.png"),
        (f"{COMPARE} --output x.xyz", "--output x.xyz"),
        (f"{COMPARE} --resolution 272", "at most 256"),
        (f"{COMPARE} --resolution 0", "--resolution"),
        (f"{COMPARE} --resolution 40", "--resolution 40"),
        (f"{COMPARE} --num_inference_steps 0", "--num_inference_steps"),
        (f"{COMPARE} --max_sequence_length 1000", "--max_sequence_length"),
        (f"{COMPARE} --resolution 32 --num_inference_steps 1 --guidance_scale 1e38", "not finite"),
        (f"{COMPARE} --seed {2**64}", "--seed"),
        (f"{COMPARE} --models a=PIPELINE a=PIPELINE", "every name once"),
        (f"{COMPARE} --pretrained_model_name_or_path empty", "--pretrained_model_name_or_path empty"),
        ("quickstart/plot_losses.py a=run --output file/x.png", "--output file/x.png"),
        ("quickstart/plot_losses.py a=run --output x.xyz", "--output x.xyz"),
        ("quickstart/plot_losses.py a=run --smoothing 0", "--smoothing"),
        (f"{VAE} --train_batch_size 0", "--train_batch_size"),
        (f"{VAE} --learning_rate nan", "--learning_rate"),
        (f"{VAE} --seed {2**64}", "--seed"),
        ("quickstart/train_vae.py broken PHOTOS", "broken/vae"),
        ("quickstart/train_vae.py PIPELINE broken", "broken/x.png"),
        ("miniature/world.py file/x", "file/x"),
        ("miniature/world.py out --noisy -1", "--noisy"),
        ("miniature/words.py out --size 0", "--size"),
        ("miniature/experiment.py quick --out file/x", "file/x"),
        ("miniature/experiment.py quick --out out --results file/x", "file/x"),
        ("miniature/experiment.py quick --out out --workers 0", "--workers"),
        ("miniature/experiment.py quick --out out --base_steps 0", "--base_steps"),
        ("miniature/train_control.py true_state nowhere.py", "usage: "),
        (f"{EVALUATE} nowhere", "--world nowhere"),
        (f"{EVALUATE} words", "--world words"),
        (f"{EVALUATE} words --words --settings 1,0", "--settings"),
        (f"{EVALUATE} words --words --run empty", "--run empty"),
        (f"{EVALUATE} words --words --output file/x.json", "--output file/x.json"),
        (f"{EVALUATE} words --words --settings 1e38,1", "not finite"),
        ("miniature/report.py results", "results/base0.json"),
        ("benchmark/report_benchmark.py results", "results/base0.json"),
        ("paper/paper.py tiny --gpus 0", "--gpus"),
        ("paper/paper.py tiny --out file/x", "--out"),
        ('paper/paper.py one --data "--train_data_dir \'x"', "--data"),
        ("paper/paper.py tiny --launcher 'nowhere launch'", "--launcher"),
        ("paper/report_paper.py tiny nowhere", "nowhere"),
        ("paper/report_paper.py huge empty", "huge"),
        ("paper/make_data.py tiny file/x", "file/x"),
        (f"{PROMPTS} file/x.txt", "--output"),
        (f"{PROMPTS} x.txt --held_out nowhere", "--held_out nowhere"),
        (f"{PROMPTS} x.txt --held_out results/base0.jsonl", "--held_out results/base0.jsonl"),
        ("benchmark/benchmark_step.py PIPELINE --output file/x.json sft", "--output file/x.json"),
        ("benchmark/benchmark_step.py PIPELINE --output x.json ''", "must be one of sft"),
        ("benchmark/benchmark_step.py PIPELINE --output x.json 'sft --resolution 272'", "at most 256"),
        ("benchmark/benchmark_step.py PIPELINE --output x.json sft --steps 0", "--steps"),
        ("benchmark/benchmark_step.py PIPELINE --output x.json --counted results/base0.json -- sft", "--counted"),
        (
            "benchmark/benchmark_step.py PIPELINE --output results/base0.json --count_only 'sft --resolution 32'",
            "base0",
        ),
        ("benchmark/compare_choices.py empty", "empty"),
        ("benchmark/compare_choices.py PIPELINE --repeats 0", "--repeats"),
        ("benchmark/rehearse.py PIPELINE PHOTOS --output file/x.json", "--output"),
        ("benchmark/rehearse.py PIPELINE PHOTOS --output x.json --work file/x", "--work"),
        ("benchmark/rehearse.py PIPELINE PHOTOS --output results/base0.json", "--output results/base0.json"),
        (f"{STARTUP} file/x.json", "--output"),
        (f"{STARTUP} x.json --folder file/x", "--folder"),
        (f"{STARTUP} x.json --side 0", "--side"),
        (f"{STARTUP} results/base0.json --folder out", "--output results/base0.json"),
        ("benchmark/startup.py --report results/base0.json", "--report results/base0.json"),
        ("porting/apply.py diffusers train_dreambooth_lora_sd3 x.py", "train_dreambooth_lora_sd3.py is no script"),
        ("porting/tiny_models.py flux file/x", "file/x"),
    ],
)
def test_a_mistake_is_one_line(command, message, call, tmp_path):
    """Which names the flag or the file; the exit code says it, too."""
    for name in ("broken/vae/config.json", "broken/x.png", "results/base0.json", "results/base0.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("nonsense")
    (tmp_path / "words").mkdir()
    record = {"task": "word", "prompt": "picture of b u g", "wanted_text": "BUG", "seed": 1}
    for part in ("test", "validation"):
        (tmp_path / "words" / f"{part}.jsonl").write_text(2 * (json.dumps(record) + "\n"))
    folder = tmp_path / "diffusers" / "examples" / "dreambooth"
    folder.mkdir(parents=True)
    (folder / "train_dreambooth_lora_sd3.py").write_bytes(b"\xff\xfe\xfa")
    if "a=run" in command:
        log_losses(tmp_path / "run")
    code, line = call(command)
    assert code in (1, 2) and message in line


def log_losses(folder):
    writer = SummaryWriter(folder / "logs")
    for step in range(5):
        writer.add_scalar("loss_base", 1.0, step)
    writer.close()


def test_folders_of_the_output_are_made(call, tmp_path):
    log_losses(tmp_path / "run")
    for command, made in (
        ("make_tiny_sd3.py new/a/tiny --configs_only", "new/a/tiny/model_index.json"),
        ("quickstart/plot_losses.py a=run --output new/b/loss.png", "new/b/loss.png"),
        (f"{COMPARE} --resolution 32 --num_inference_steps 1 --output new/c/x.png", "new/c/x.png"),
        ("miniature/world.py new/d/world --noisy 2 --curated 2 --unseen 2", "new/d/world/test.jsonl"),
        (f"{PROMPTS} new/e/prompts.txt", "new/e/prompts.txt"),
        ("porting/tiny_models.py flux new/f/flux", "new/f/flux/model_index.json"),
    ):
        assert call(command)[0] == 0 and (tmp_path / made).is_file()


def test_a_vae_that_diverges_is_not_kept(call, pipeline, tmp_path):
    """The pipeline keeps the one that it had."""
    shutil.copytree(pipeline, tmp_path / "mine")
    before = {path.name: path.read_bytes() for path in (tmp_path / "mine" / "vae").iterdir()}
    code, line = call("quickstart/train_vae.py mine PHOTOS --max_train_steps 3 --learning_rate 1e10")
    assert code == 1 and "--learning_rate" in line
    assert {path.name: path.read_bytes() for path in (tmp_path / "mine" / "vae").iterdir()} == before
    assert call("quickstart/train_vae.py mine PHOTOS --max_train_steps 1")[0] == 0
    assert (tmp_path / "mine" / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() not in before.values()


def test_some_settings_alone_are_scored(call, tmp_path):
    """Also without the main one, of which a picture is kept; where that is among them, it is."""
    call("miniature/words.py words --noisy 1 --curated 1 --unseen 1")
    for name, settings, picture in (("few", "1,1 2,1", False), ("main", "4.5,20", True)):
        for part in ("test", "validation"):
            lines = (tmp_path / "words" / f"{part}.jsonl").read_text().splitlines(keepends=True)
            (tmp_path / "words" / f"{part}.jsonl").write_text("".join(lines[:3]))
        output = f"new/{name}.json"
        assert call(f"{EVALUATE} words --words --settings {settings} --output {output}")[0] == 0
        scores = json.loads((tmp_path / output).read_text())
        wanted = [
            f"guidance {guidance}, {steps} steps" for guidance, steps in (s.split(",") for s in settings.split())
        ]
        assert list(scores["test"]) == list(scores["validation"]) == wanted
        assert (tmp_path / output).with_suffix(".png").exists() == picture


def test_a_report_without_pictures_of_runs(call, tmp_path):
    """Of scores whose pictures were not kept."""
    (tmp_path / "scores").mkdir()
    shutil.copy(EXAMPLES / "miniature" / "results" / "base0.json", tmp_path / "scores")
    assert call("miniature/report.py scores")[0] == 0
    assert (tmp_path / "scores" / "scores.png").exists() and not (tmp_path / "scores" / "samples.png").exists()


def test_numbers_that_are_not_finite_are_no_image():
    """Diffusers would cast them to bytes: a black image, and a warning."""

    class Pipeline:
        def __call__(self, value):
            pixels = (torch.full((2, 2, 3), value).numpy() * 255).round().astype("uint8")
            self.images = [Image.fromarray(pixels)]
            return self

    assert trained.draw_images(Pipeline(), 1.0)[0].getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ValueError, match="not finite"):
        trained.draw_images(Pipeline(), float("nan"))
