# SPDX-License-Identifier: Apache-2.0
"""
SFT, SOAR, DiffusionNFT and Flow-GRPO on one base, in the miniature world: train what is missing, and score it.

    python examples/rl/compare_methods.py                 # all of it, into examples/rl/results
    python examples/rl/compare_methods.py --seeds 1 --results outputs/rl/results
    python examples/rl/report_comparison.py examples/rl/results

Reinforcement learning starts from the base, from SFT and from SOAR. Its reward is the exact detector's; of words, what
a real OCR reads. A budget is what the SOAR run costs in forwards of the model (a backward counts as two), drawing
included: from the base and from SFT every method has one, from SOAR half of one. An interrupted run is resumed, one
that has its scores is not run again.
"""

import argparse
import dataclasses
import os
import sys
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm


HERE = Path(__file__).resolve().parent
MINIATURE = HERE.parent / "miniature"
sys.path.insert(0, str(MINIATURE))
import experiment  # noqa: E402


NFT, GRPO = HERE / "train_sd3_nft_lora.py", HERE / "train_sd3_flow_grpo_lora.py"
WINDOW = "--sde_type cps --sde_noise_scale 0.8 --sde_window_size 3"
# A method: its script, what differs from the script's defaults, and its forwards a picture.
METHODS = {
    "NFT": (NFT, "--num_train_sigmas 4 --old_start 1000000", 22),
    "Flow-GRPO": (GRPO, f"--rollout_guidance 1 {WINDOW} --kl_weight 0 --clip_range 1e-5", 19),
    "Flow-GRPO, plain": (GRPO, "", 92),
}
STARTS = {"base": None, "SFT": "SFT", "SOAR": "SOAR K=40"}
COMMON = "--num_groups 12 --group_size 12 --train_batch_size 36 --rank 16 --learning_rate 1e-3 --adam_epsilon 1e-15"
PICTURES = 12 * 12  # a rollout
BUDGET = 1000 * 8 * 22  # SOAR's optimizer steps, batch and forwards a sample
PARTS = 2  # of a budget, each scored
SETTINGS = {"end": ["4.5,20", "1,20", "2,20"], "checkpoint": ["4.5,20", "1,20"]}
SEEDS = 3
PROMPTS = 100  # a task, of the training part
start_locks = defaultdict(threading.Lock)


@dataclasses.dataclass(frozen=True)
class Arm:
    method: str
    start: str
    seed: int
    world: str = "world"

    @property
    def name(self):
        slug = self.method.lower().replace(", ", "_")
        return f"{slug}-{self.start.lower()}-seed{self.seed}{'-words' if self.world == 'words' else ''}"

    @property
    def base(self):
        return "words" if self.world == "words" else 0

    @property
    def parts(self):
        return 1 if self.start == "SOAR" else PARTS

    @property
    def part(self):
        """Rollouts of a part of the budget."""
        return round(BUDGET / PARTS / PICTURES / METHODS[self.method][2])

    @property
    def steps(self):
        return self.part * self.parts

    def forwards(self, step):
        """What it has cost by then, without its start."""
        return step * PICTURES * METHODS[self.method][2]

    def checkpoints(self):
        return range(self.part, self.steps, self.part)

    def scores(self):
        return [self.name, *(f"{self.name}-step{step}" for step in self.checkpoints())]


def start_run(start, seed):
    """The run of the miniature experiment that is a start, or `None` for the base."""
    return experiment.Run(STARTS[start], 0.1, 0, seed) if STARTS[start] else None


def plan(seeds):
    """What there is to do, seed by seed: the runs that are starts, then the arms."""
    items = []
    for seed in range(seeds):
        items += [start_run(start, seed) for start in STARTS if STARTS[start]]
        items += [Arm(method, start, seed) for method in ("NFT", "Flow-GRPO") for start in STARTS]
        if seed == 0:
            items += [Arm("Flow-GRPO, plain", "base", 0)]
            items += [Arm(method, "base", 0, "words") for method in ("NFT", "Flow-GRPO")]
    return items


def train_start(out, run):
    """Train a start, once, however many arms wait for it: its folder."""
    with start_locks[run]:
        return experiment.train(out, run, experiment.STEPS)


def train(out, arm):
    """Train an arm, or go on with it: `tuple[Path, Path]`, its folder and that of its start."""
    run_dir, (script, differences, _) = out / "rl" / arm.name, METHODS[arm.method]
    run = start_run(arm.start, arm.seed)
    start = train_start(out, run) if run else out / f"base_{arm.base}"
    prompts = out / "rl" / f"{arm.world}.jsonl"
    if not (run_dir / "training_args.json").exists():
        pipeline = out / f"raw_{arm.world}"
        flags = f"""--pretrained_model_name_or_path {pipeline} --transformer {start} --output_dir {run_dir}
            --cache_dir {out}/cache --resolution {experiment.size_of(pipeline)}
            --max_sequence_length {experiment.PROMPT_TOKENS} --prompts {prompts} --reward {arm.world}:reward=1
            --max_train_steps {arm.steps} --checkpointing_steps {arm.part} --seed {100 + arm.seed} --save_dtype fp32
            --mixed_precision no --report_to tensorboard --resume_from_checkpoint latest {COMMON} {differences}"""
        experiment.call(out / "logs" / f"{arm.name}.log", script, *flags.split(), cwd=MINIATURE)
    return run_dir, start


def do(out, results, arm):
    """Train and score an arm."""
    run_dir, start = train(out, arm)
    score = [out, results, arm.base]
    for step in arm.checkpoints():
        flags = "--start", start, "--checkpoint", "--settings", *SETTINGS["checkpoint"]
        experiment.score(*score, run_dir / f"checkpoint-{step}", f"{arm.name}-step{step}", *flags)
    experiment.score(*score, run_dir, arm.name, "--start", start, "--settings", *SETTINGS["end"])


def write_prompts(out):
    """The training part's prompts of both worlds, which the rewards take rows of."""
    import words
    import world

    (out / "rl").mkdir(parents=True, exist_ok=True)
    for name, module in (("world", world), ("words", words)):
        path = out / "rl" / f"{name}.jsonl"
        if not path.exists():
            module.write_prompts(path.with_suffix(".partial"), "train", PROMPTS)
            path.with_suffix(".partial").rename(path)


def main():
    parser = argparse.ArgumentParser(description="Train and score what is missing of the comparison.")
    parser.add_argument("--out", type=Path, default=Path("outputs/miniature"), help="Folder of models and pictures.")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="Folder of the scores.")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="Processes at once, of one thread each.")
    args = parser.parse_args()
    out, results = args.out.resolve(), args.results.resolve()
    os.chdir(experiment.ROOT)
    planned = plan(args.seeds)

    def missing(item):
        names = [item.name] if isinstance(item, experiment.Run) else item.scores()
        return any(experiment.missing(results, name) for name in names)

    items = [item for item in planned if missing(item)]
    bases = dict.fromkeys(item.base for item in items)
    for base in bases:
        experiment.make_raw(out, experiment.world_of(base), "mini", threads=args.workers)
        steps = round(experiment.BASE_STEPS * (experiment.WORDS_BASE_PART if base == "words" else 1))
        experiment.make_base(out, base, steps, threads=args.workers)
        experiment.score(out, results, base, out / f"base_{base}", f"base{base}", "--settings", *SETTINGS["end"])
    write_prompts(out)
    failed = threading.Event()

    def work(item):
        if failed.is_set():  # one that failed ends all; what runs is finished first
            return
        try:
            if isinstance(item, Arm):
                do(out, results, item)
            else:
                run_dir = train_start(out, item)
                experiment.score(out, results, item.base, run_dir, item.name, "--settings", *SETTINGS["end"])
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(args.workers) as pool:
        list(tqdm(pool.map(work, items), "Runs", len(items)))


if __name__ == "__main__":
    main()
