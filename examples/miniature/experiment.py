# SPDX-License-Identifier: Apache-2.0
"""
Run what is missing of the experiment: the world, the bases, the arms, their scores. `run.sh` calls it.

    python examples/miniature/experiment.py quick
    python examples/miniature/experiment.py full --workers 2
    python examples/miniature/experiment.py large --workers 8   # the same with a larger model, for a GPU
    python examples/miniature/experiment.py schedule   # learning rates that fall to zero, on the first base

Each arm is trained by a script of this collection, by its command line, in a process of its own with one thread; an
interrupted run is resumed from its checkpoint, one that has its scores is not run again. Scores go to `results/`, one
JSON a run, all else to `outputs/miniature`.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PROMPT_TOKENS = 12
SFT, SOAR, LORA = "train_sd3_sft.py", "train_sd3_soar.py", "train_sd3_soar_lora.py"

# An arm: its script, what differs from the script's defaults, and the control that it goes through, if any.
MAIN_ARMS = {
    "SFT": (SFT, "", None),
    "SFT x 7": (SFT, "--train_batch_size 56", None),  # as many supervised states as SOAR
    "true state": (SOAR, "", "true_state"),
    "SOAR K=40": (SOAR, "", None),
    "SOAR K=10": (SOAR, "--num_sampling_steps 10", None),
}
OTHER_ARMS = {
    "sigma mixture": (SFT, "", "sigma_mixture"),
    "SOAR K=5": (SOAR, "--num_sampling_steps 5", None),
    "SOAR without CFG": (SOAR, "--cfg_scale_sampling 1", None),
    "SOAR flow_sde": (SOAR, "--num_rollout_paths 2 --trajectory_length 3 --sde_rollout_type flow_sde", None),
    "SOAR cps": (SOAR, "--num_rollout_paths 2 --trajectory_length 3 --sde_rollout_type cps", None),
    "SOAR N=1": (SOAR, "--trajectory_length 1", None),
    "SOAR N=2": (SOAR, "--trajectory_length 2", None),
    "SOAR N=1 x 3": (SOAR, "--trajectory_length 1 --train_batch_size 24", None),  # costs what SOAR and SFT x 7 cost
    "SOAR-LoRA": (LORA, "--rank 16 --learning_rate 1e-3", None),
}
CHANGED = ("SFT", "SFT x 7", "SOAR K=40")  # the arms that are run with another schedule, too
SCHEDULE_ARMS = {
    f"{arm} cosine": (script, f"{flags} --lr_scheduler cosine", control)
    for arm, (script, flags, control) in MAIN_ARMS.items()
    if arm in CHANGED
}
ARMS = MAIN_ARMS | OTHER_ARMS | SCHEDULE_ARMS
DROPOUTS = (0.0, 0.1)
# Of the other arms, what the conclusions rest on.
REPEATED_WITHOUT_DROPOUT = ("sigma mixture", "SOAR K=5", "SOAR without CFG", "SOAR N=1 x 3")
CHECKPOINTS = (250, 500)  # scored, too, for the main arms, besides the end
STEPS, BASE_STEPS, QUICK_BASE_STEPS = 1000, 6000, 4000  # of post-training, of a base
WORDS_BASE_PART = 1 / 4  # of those steps is enough to learn words half, which leaves room for what follows
# Of post-training. The average of the weights keeps the noise of the last step from hiding what the arms differ in.
COMMON = "--train_batch_size 8 --learning_rate 3e-4 --use_ema --ema_decay 0.99"
gap_lock = threading.Lock()

# What a run is scored at: guidance and number of sampling steps.
MAIN = (4.5, 20)  # guidance, steps
# Prompts a task in each setting: all of them where the main results are.
SETTINGS = {MAIN: 100, (4.5, 5): 100, (1.0, 20): 50, (2.0, 20): 50, (7.0, 20): 50, (4.5, 10): 25, (4.5, 40): 25}
CHECKPOINT_PROMPTS = 50  # a task, of the test
QUICK_PART = 1 / 3  # of the prompts, in all but the main setting
GUIDANCES = dict.fromkeys([(1.0, 20), (2.0, 20), MAIN, (7.0, 20)], 20)  # of the validation, to choose from


@dataclasses.dataclass(frozen=True)
class Run:
    arm: str
    dropout: float
    base: int | str  # "words" is the base of words.py's world
    seed: int

    @property
    def slug(self):
        return self.arm.lower().replace(" ", "_").replace("=", "")

    @property
    def name(self):
        return f"{self.slug}-dropout{self.dropout:g}-base{self.base}-seed{self.seed}"

    @property
    def gap(self):
        """Name of the exposure bias of the main arms like this run."""
        return f"gap-dropout{self.dropout:g}-base{self.base}-seed{self.seed}"

    def scores(self, steps, size):
        """Names of all that is scored with this run."""
        names = [self.name]
        if self.arm in MAIN_ARMS and size != "schedule":
            names += [f"{self.name}-step{step}" for step in CHECKPOINTS if step < steps and size != "quick"]
            names += [self.gap] if self.base != "words" else []
        return names


def name_of(guidance, steps):
    return f"guidance {guidance:g}, {steps} steps"


def plan(size):
    """The runs, seed by seed, so that what an unfinished experiment has is balanced."""
    if size == "quick":
        return [Run(arm, 0.1, 0, 0) for arm in MAIN_ARMS]
    if size == "schedule":
        return [Run(arm, 0.1, 0, seed) for seed in range(3) for arm in (*CHANGED, *SCHEDULE_ARMS)]
    runs = []
    for seed in range(3):
        for dropout in reversed(DROPOUTS):
            others = OTHER_ARMS if dropout or seed == 0 else REPEATED_WITHOUT_DROPOUT
            runs += [Run(arm, dropout, base, seed) for base in range(2) for arm in MAIN_ARMS]
            runs += [Run("sigma mixture", dropout, 1, seed)]  # cheap, and tells noise levels from number of states
            runs += [Run(arm, dropout, 0, seed) for arm in others]
    return runs + [Run(arm, 0.1, "words", 0) for arm in MAIN_ARMS]


def call(log, *command, threads=1, cwd=ROOT):
    """Run a Python script in a process of its own; its output goes to `log`."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        command = [sys.executable, *map(str, command)]
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=cwd)
    if done.returncode:
        raise SystemExit(f"error: {Path(command[1]).name} ended with code {done.returncode}; see {log}")


def size_of(pipeline):
    """Width and height of a pipeline's pictures."""
    return 4 * json.loads((pipeline / "transformer" / "config.json").read_text())["sample_size"]


def training_flags(out, world, part, run_dir, seed, dropout, steps):
    pipeline = out / f"raw_{world}"
    size = size_of(pipeline)
    return f"""--pretrained_model_name_or_path {pipeline} --train_data_dir {out}/{world}/{part} --output_dir {run_dir}
        --cache_dir {out}/cache --cache_prompt_embeds --resolution {size} --max_sequence_length {PROMPT_TOKENS}
        --cond_dropout_rate {dropout} --max_train_steps {steps} --seed {seed} --save_dtype fp32
        --mixed_precision {"no" if size == 32 else "bf16"}
        --report_to tensorboard --resume_from_checkpoint latest""".split()


def world_of(base):
    """The folder of the pictures and prompts of a base and its runs."""
    return "words" if base == "words" else "world"


def make_base(out, name, steps, threads=1):
    """A base model: a transformer trained on the noisy pictures. Numbered ones differ in seed; "words" knows words."""
    run_dir, seed = out / f"base_{name}", 0 if name == "words" else name
    if (run_dir / "training_args.json").exists():
        return
    flags = training_flags(out, world_of(name), "noisy", run_dir, seed, 0.1, steps)
    flags += "--train_batch_size 32 --learning_rate 2e-3 --lr_scheduler cosine --lr_warmup_steps 100".split()
    flags += "--checkpointing_steps 1000 --checkpoints_total_limit 1".split()
    call(out / "logs" / f"base_{name}.log", SFT, *flags, threads=threads)


def make_raw(out, world, model, threads):
    """The pictures of a world, and the toy pipeline with its VAE trained on them."""
    raw, log = out / f"raw_{world}", out / "logs" / f"raw_{world}.log"
    if not raw.exists():
        untrained = out / f"raw_{world}.untrained"
        shutil.rmtree(untrained, ignore_errors=True)
        call(log, ROOT / "examples" / "make_tiny_sd3.py", untrained, "--size", model)
        if not (out / world).exists():
            call(log, HERE / f"{world}.py", out / world, "--size", size_of(untrained))
        seen = [out / world / part for part in ("curated", "noisy")]
        call(log, ROOT / "examples" / "quickstart" / "train_vae.py", untrained, *seen, threads=threads)
        untrained.rename(raw)


def train(out, run, steps):
    """Train a run, or go on with it."""
    run_dir, (script, differences, control) = out / "runs" / run.name, ARMS[run.arm]
    if (run_dir / "training_args.json").exists():
        return run_dir
    flags = training_flags(out, world_of(run.base), "curated", run_dir, 100 + run.seed, run.dropout, steps)
    flags += f"--transformer {out}/base_{run.base} --checkpointing_steps {CHECKPOINTS[0]}".split()
    flags += f"{COMMON} {differences}".split()
    if script != SFT:
        flags += ["--aux_batch_size", "48"]  # all auxiliary states at once, which is faster and changes nothing else
    command = [script, *flags] if control is None else [HERE / "train_control.py", control, script, *flags]
    call(out / "logs" / f"{run.name}.log", *command)
    return run_dir


def missing(results, name):
    return not (results / f"{name}.json").exists()


def score(out, results, base, run_dir, name, *flags):
    """Score the run, or the base, that is at `run_dir`, unless that has been done."""
    if missing(results, name):
        world = world_of(base)
        flags = [*flags, "--run", run_dir, "--base", out / f"raw_{world}", "--world", out / world]
        flags += ["--words"] if base == "words" else []
        call(out / "logs" / f"{name}.log", HERE / "evaluate.py", *flags, "--output", results / f"{name}.json")


def measure_gap(out, results, group):
    """The exposure bias of a base and the main arms' runs on it, `group`, on pictures that none has seen."""
    base, name = out / f"base_{group[0].base}", group[0].gap
    if missing(results, name):
        models = [f"base={base}", *(f"{run.slug}={out / 'runs' / run.name}" for run in group)]
        raw = out / "raw_world"
        flags = f"""--pretrained_model_name_or_path {raw} --train_data_dir {out}/world/unseen
            --resolution {size_of(raw)} --max_sequence_length {PROMPT_TOKENS} --num_samples 128 --batch_size 64
            --mixed_precision no --output_dir {out}/gap/{name} --models""".split()
        call(out / "logs" / f"{name}.log", ROOT / "examples" / "measure_exposure_bias.py", *flags, *models)
        shutil.copy(out / "gap" / name / "exposure_bias.json", results / f"{name}.json")


def do(out, results, run, steps, size):
    """Train and score one run; with the last main arm of a base and seed, measure their exposure bias, too."""
    run_dir = train(out, run, steps)
    score(out, results, run.base, run_dir, run.name, *(["--quick"] if size == "quick" else []))
    if run.arm in MAIN_ARMS and size not in ("quick", "schedule"):
        for step in (step for step in CHECKPOINTS if step < steps):
            name = f"{run.name}-step{step}"
            score(out, results, run.base, run_dir / f"checkpoint-{step}", name, "--checkpoint")
    for checkpoint in run_dir.glob("checkpoint-*"):  # most of the disk, and needed no more
        shutil.rmtree(checkpoint)
    with gap_lock:
        group = [dataclasses.replace(run, arm=arm) for arm in MAIN_ARMS]
        if run.base != "words" and all((out / "runs" / like.name / "training_args.json").exists() for like in group):
            measure_gap(out, results, group)


def main():
    parser = argparse.ArgumentParser(description="Run what is missing of the experiment.")
    parser.add_argument("size", choices=["quick", "full", "large", "schedule"])
    parser.add_argument("--out", type=Path, help="Folder of models and pictures. Default: outputs/miniature[_SIZE].")
    parser.add_argument("--results", type=Path, help="Folder of the scores. Default: results[_large], or in --out.")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="Processes at once, of one thread each.")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="Of post-training; the report takes them to be the default."
    )
    parser.add_argument("--base_steps", type=int, help=f"Default: {BASE_STEPS}; quick: {QUICK_BASE_STEPS}.")
    args = parser.parse_args()
    quick = args.size == "quick"
    if args.base_steps is None:
        args.base_steps = QUICK_BASE_STEPS if quick else BASE_STEPS
    if min(args.workers, args.steps, args.base_steps) < 1:
        parser.error("--workers, --steps and --base_steps must be at least 1")
    given = [path and path.resolve() for path in (args.out, args.results)]
    os.chdir(ROOT)
    suffix = f"_{args.size}" if args.size in ("quick", "large") else ""
    out = given[0] or Path("outputs", f"miniature{suffix}")
    own = {"quick": out / "results", "schedule": HERE / "results" / "schedule"}
    results = given[1] or own.get(args.size, HERE / f"results{suffix}")
    try:
        for folder in (out, results):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(str(error))
    planned = plan(args.size)
    runs = [run for run in planned if any(missing(results, name) for name in run.scores(args.steps, args.size))]
    bases = dict.fromkeys(run.base for run in planned if run in runs or missing(results, f"base{run.base}"))
    locks = {base: threading.Lock() for base in bases}  # a run waits for its base
    for world in dict.fromkeys(map(world_of, locks)):
        make_raw(out, world, "large" if args.size == "large" else "mini", threads=args.workers)
    failed = threading.Event()

    def work(item):
        if not failed.is_set():  # one that failed ends all; what runs is finished first
            try:
                base = item.base if isinstance(item, Run) else item
                with locks[base]:
                    base_steps = round(args.base_steps * (WORDS_BASE_PART if base == "words" else 1))
                    make_base(out, base, base_steps, threads=max(1, args.workers // len(locks)))
                    score(out, results, base, out / f"base_{base}", f"base{base}", *(["--quick"] if quick else []))
                if isinstance(item, Run):
                    do(out, results, item, args.steps, args.size)
            except BaseException:
                failed.set()
                raise

    items = [*locks, *runs]
    with ThreadPoolExecutor(args.workers) as pool:
        list(tqdm(pool.map(work, items), "Bases and runs", len(items)))


if __name__ == "__main__":
    main()
