# SPDX-License-Identifier: Apache-2.0
"""
The paper's table, stage by stage, each a command line of this collection that is printed before it runs.

    python examples/paper/paper.py full --plan                # what it would take, before anything runs
    python examples/paper/paper.py one --data "--train_data_dir my_images"
    python examples/paper/paper.py full --data "--dataset_name OWNER/NAME" \
        --launcher "accelerate launch --config_file examples/accelerate_configs/ddp.yaml" --gpus 8

What is done is not done again; an interrupted stage goes on from where it was. A stage that cannot run, as its weights
or packages are missing, is named in the report with all that needs it, and tried again by the next call; the others
go on.
"""

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "examples" / "rl"))

SFT, SOAR, LORA = "train_sd3_sft.py", "train_sd3_soar.py", "train_sd3_soar_lora.py"
EVALUATION = "examples/evaluation"
GRPO = "examples/rl/train_sd3_flow_grpo_lora.py"
EXIT_INTERRUPTED = 75  # of the training scripts: stopped by a signal, after a checkpoint

# Forwards of the model a sample and optimizer step, gradient checkpointing included: what ../benchmark counts.
FORWARDS = {"sft": 4, "soar": 29, "sft_lora": 3, "soar_lora": 23}
H100, UTILISATION = 989e12, 0.2  # dense bf16 operations a second as published; the share of them that is assumed
MEDIUM = "SD3.5-M, 512 px"
# Models that are drawn with beside SD3.5-Medium: hub id, guidance, steps, gigabytes, and the licence to accept.
BASELINES = {
    "SD3.5-L": ("stabilityai/stable-diffusion-3.5-large", 4.5, 40, 27),
    "SD-XL": ("stabilityai/stable-diffusion-xl-base-1.0", 5.0, 50, 7),
    "FLUX.1-dev": ("black-forest-labs/FLUX.1-dev", 3.5, 50, 34),
}
LICENCES = {
    "stabilityai/stable-diffusion-3.5-medium": "gated: Stability AI Community License",
    "stabilityai/stable-diffusion-3.5-large": "gated: Stability AI Community License",
    "stabilityai/stable-diffusion-xl-base-1.0": "CreativeML Open RAIL++-M",
    "black-forest-labs/FLUX.1-dev": "gated: FLUX.1 [dev] Non-Commercial License",
}
METRIC_GIGABYTES = {"geneval": 2, "clipscore": 1.7, "pickscore": 3.9, "hpsv2": 2, "imagereward": 1.8}
PREFERENCE = "clipscore,pickscore,hpsv2,imagereward,aesthetic"


@dataclasses.dataclass(frozen=True)
class Stage:
    """
    A command line and what it takes.

    `after` names the stages whose results it needs. With `drop_missing` it runs with those of its folders that are
    there. One that `may_fail` is named as missing, any other ends the run. `launched` ones run on all GPUs.
    """

    name: str
    command: str
    after: tuple = ()
    forwards: float = 0.0
    model: str = MEDIUM
    gigabytes: float = 0.0
    downloads: tuple = ()
    launched: bool = False
    may_fail: bool = False
    drop_missing: bool = False


@dataclasses.dataclass(frozen=True)
class Size:
    """What the sizes of the experiment differ in."""

    model: str
    training: str  # flags of every training script, the batch of one process among them
    drawing: str
    steps: int
    global_batch: int
    batch: int  # of one process
    checkpoints: int  # that the curves are scored at
    sets: dict  # of prompts: flags, images, metrics
    curve_prompts: int
    rewards: dict  # of the reward-specific curves: flags of the filter, and of Flow-GRPO's guidance
    rl: str
    rl_steps: int
    exposure_bias: str
    inference_steps: int
    lora: bool = False
    baselines: tuple = ()
    checkpoint_gigabytes: float = 0.0


def sizes(out):
    data = "tests/data"
    published = {
        "geneval": (f"--prompts {data}/geneval_metadata.jsonl --images_per_prompt 4", 2212, "geneval"),
        "ocr": (f"--prompts {data}/ocr_prompts.txt", 1018, "ocr"),
        "drawbench": ("--dataset_name sayakpaul/drawbench --prompt_column Prompts", 200, PREFERENCE),
    }
    medium = {
        "model": "stabilityai/stable-diffusion-3.5-medium",
        "drawing": "--resolution 512 --num_inference_steps 40 --guidance_scale 4.5 --batch_size 16",
        "sets": published,
        "curve_prompts": 200,
        "rewards": {"aesthetic": "--min_score 6.8", "clipscore": "--top_fraction 0.2"},
        "inference_steps": 40,
        "baselines": tuple(BASELINES),
        "exposure_bias": "--num_samples 64 --num_sigmas 8 --num_own_steps 1 4 --resolution 512 --mixed_precision bf16",
    }
    bf16 = "--resolution 512 --mixed_precision bf16 --gradient_checkpointing"
    rl = "--rollout_guidance 4.5 --kl_weight 0.02 --adam_epsilon 1e-15 --max_sequence_length 128 " + bf16
    return {
        "tiny": Size(
            model=f"{out}/model",
            training="--resolution 64 --max_sequence_length 16 --train_batch_size 2 --learning_rate 1e-3",
            drawing="--resolution 64 --num_inference_steps 2 --max_sequence_length 16 --batch_size 16",
            steps=4,
            global_batch=2,
            batch=2,
            checkpoints=2,
            sets={"ocr": (f"--prompts {out}/data/test.txt", 2, "ocr")},
            curve_prompts=1,
            rewards={"ocr": "--top_fraction 0.5"},
            rl="--resolution 64 --max_sequence_length 16 --train_batch_size 4 --num_groups 1 --group_size 2 "
            "--num_rollout_steps 3 --learning_rate 1e-3",
            rl_steps=2,
            exposure_bias="--num_samples 2 --num_sigmas 2 --num_own_steps 1 --num_inference_steps 4 --resolution 64 "
            "--max_sequence_length 16 --mixed_precision no",
            inference_steps=2,
        ),
        "one": Size(
            training=f"{bf16} --rank 32 --learning_rate 1e-4 --train_batch_size 8 --cache_latents "
            "--cache_prompt_embeds",
            steps=2000,
            global_batch=8,
            batch=8,
            checkpoints=4,
            rl=f"{rl} --train_batch_size 8 --num_groups 8 --group_size 12",
            rl_steps=150,
            lora=True,
            checkpoint_gigabytes=0.3,
            **medium,
        ),
        "full": Size(
            training=f"{bf16} --learning_rate 2e-5 --train_batch_size 4 --cache_latents --cache_prompt_embeds "
            "--allow_tf32 --dataloader_num_workers 16",
            steps=10_000,
            global_batch=32,
            batch=4,
            checkpoints=5,
            rl=f"{rl} --train_batch_size 8 --num_groups 48 --group_size 24 --num_updates 2",
            rl_steps=1000,
            checkpoint_gigabytes=27,
            **medium,
        ),
    }


def plan(name, out, data, gpus=1, baselines=None):
    """
    The stages of a size, in an order in which they can run: `list[Stage]`.

    Args:
        name (`str`): `"tiny"`, `"one"` or `"full"`.
        out (`str`): Folder of all that they write.
        data (`str`): The data set, as flags of the training scripts.
        gpus (`int`): Processes of a training; the global batch stays the same.
        baselines (`list[str]`, *optional*): Of [`BASELINES`]. Default: the size's.
    """
    size, stages = sizes(out)[name], []
    kind = "_lora" if size.lora else ""
    plain = (LORA, "--lambda_aux 0") if size.lora else (SFT, "")
    soar = (LORA if size.lora else SOAR, "")
    parts = size.global_batch // (size.batch * gpus)
    if parts * size.batch * gpus != size.global_batch:
        raise SystemExit(f"error: {gpus} GPUs with {size.batch} samples each do not divide {size.global_batch}")
    arms = {}  # of each one that is drawn: flags of the model, and the stage that makes it

    def add(stage, command, **more):
        stages.append(Stage(stage, " ".join(command.split()), **more))

    def train(arm, script, source, steps, forwards, after=(), extra="", keep=1):
        every, extra = max(1, steps // size.checkpoints), f"{extra} --checkpoints_total_limit {keep}"
        flags = f"""{script} --pretrained_model_name_or_path {size.model} {source} --output_dir {out}/runs/{arm}
            --cache_dir {out}/cache {size.training} --gradient_accumulation_steps {parts} --max_train_steps {steps}
            --checkpointing_steps {every} --seed 42 --report_to tensorboard --resume_from_checkpoint latest {extra}"""
        add(
            f"train-{arm}",
            flags,
            after=after,
            forwards=steps * size.global_batch * forwards,
            gigabytes=(keep + 1.3) * size.checkpoint_gigabytes,  # one while it is written, and the result
            downloads=(size.model,) if name != "tiny" else (),
            launched=True,
        )
        arms[arm] = f"--{'lora' if size.lora else 'transformer'} {out}/runs/{arm}", f"train-{arm}"

    def reinforce(arm, reward, start, after):
        pictures, forwards = rl_costs(size)
        every = max(1, size.rl_steps // size.checkpoints)
        begin = f"--{'lora' if size.lora else 'transformer'} {out}/runs/{start}" if start else ""
        flags = f"""{GRPO} --pretrained_model_name_or_path {size.model} {begin} --output_dir {out}/runs/{arm}
            --cache_dir {out}/cache --prompts {out}/prompts.txt --reward {reward}=1 {size.rl}
            --max_train_steps {size.rl_steps} --checkpointing_steps {every} --seed 42 --report_to tensorboard
            --resume_from_checkpoint latest"""
        add(
            f"train-{arm}",
            flags,
            after=after,
            forwards=size.rl_steps * pictures * forwards,
            gigabytes=size.checkpoints * 0.3,
            launched=True,
            may_fail=True,  # where the reward's weights are missing
        )
        begin = begin.replace("--lora", "--start_lora")
        arms[arm] = f"{begin} --lora {out}/runs/{arm}", f"train-{arm}"

    def draw(folder, source, flags, after, prompts, images, **more):
        command = f"""{EVALUATION}/generate_images.py --pretrained_model_name_or_path {source} {flags} {prompts}
            --output_dir {out}/images/{folder}"""
        costs = {"forwards": images * 2 * size.inference_steps, "gigabytes": images * 0.0005}
        more = {"launched": True, "may_fail": name != "tiny"} | costs | more
        add(f"draw-{folder.replace('/', '-')}", command, after=after, **more)

    # 1. Data
    if name == "tiny":
        add("data", f"examples/paper/make_data.py tiny {out}/data")
        add("model", f"examples/make_tiny_sd3.py {out}/model --overwrite")
        data = f"--train_data_dir {out}/data/train"
    for reward, cut in size.rewards.items():
        add(
            f"filter-{reward}",
            f"{EVALUATION}/filter_dataset.py {data} --metric {reward} {cut} --output_dir {out}/filtered/{reward}",
            may_fail=name != "tiny",
        )
    held_out = " ".join(flags.split()[1] for flags, *_ in size.sets.values() if flags.startswith("--prompts"))
    add("prompts", f"examples/paper/make_data.py prompts {data} --held_out {held_out} --output {out}/prompts.txt")

    # 2. Training
    train("sft", plain[0], data, size.steps, FORWARDS["sft" + kind], extra=plain[1])
    train("soar", soar[0], data, size.steps, FORWARDS["soar" + kind])
    longer = round(size.steps * FORWARDS["soar" + kind] / FORWARDS["sft" + kind])
    train("sft-at-soars-cost", plain[0], data, longer, FORWARDS["sft" + kind], extra=plain[1])
    control = f"examples/miniature/train_control.py sigma_mixture {plain[0]}"
    train("sft-soars-noise", control, data, size.steps, FORWARDS["sft" + kind], extra=plain[1])
    general = list(arms)
    curves = {}
    for reward in size.rewards:
        source, after, every = f"--train_data_dir {out}/filtered/{reward}", (f"filter-{reward}",), size.checkpoints
        train(f"sft-{reward}", plain[0], source, size.steps, FORWARDS["sft" + kind], after, plain[1], every)
        train(f"soar-{reward}", soar[0], source, size.steps, FORWARDS["soar" + kind], after, keep=every)
        reinforce(f"flow-grpo-{reward}", reward, None, ("prompts",))
        reinforce(f"soar-then-flow-grpo-{reward}", reward, f"soar-{reward}", ("prompts", f"train-soar-{reward}"))
        curves[reward] = [f"{arm}-{reward}" for arm in ("sft", "soar", "flow-grpo", "soar-then-flow-grpo")]

    # 3. Pictures and scores
    for prompts, (flags, images, metrics) in size.sets.items():
        drawn = {"base": f"{out}/images/{prompts}/base"}
        draw(f"{prompts}/base", size.model, size.drawing, (), flags, images)
        for arm in [*general, *(arm for names in curves.values() for arm in names)]:
            draw(f"{prompts}/{arm}", size.model, f"{arms[arm][0]} {size.drawing}", (arms[arm][1],), flags, images)
            drawn[arm] = f"{out}/images/{prompts}/{arm}"
        for baseline in size.baselines if baselines is None else baselines:
            model, guidance, steps, gigabytes = BASELINES[baseline]
            settings = f"--resolution 1024 --num_inference_steps {steps} --guidance_scale {guidance} --batch_size 4"
            gigabytes = images * 0.002 + gigabytes * (prompts == next(iter(size.sets)))  # downloaded once
            more = {"model": f"{baseline}, 1024 px", "downloads": (model,), "gigabytes": gigabytes}
            branches = 1 if baseline == "FLUX.1-dev" else 2
            more["forwards"] = images * branches * steps
            draw(f"{prompts}/{baseline}", model, settings, (), flags, images, **more)
            drawn[baseline] = f"{out}/images/{prompts}/{baseline}"
        folders = " ".join(drawn.values())
        add(
            f"score-{prompts}",
            f"{EVALUATION}/score_images.py {folders} --metrics {metrics}",
            downloads=tuple(f"{m} {METRIC_GIGABYTES[m]} GB" for m in metrics.split(",") if m in METRIC_GIGABYTES),
            may_fail=name != "tiny",
            drop_missing=True,
        )
        folders = " ".join(f"{arm}={folder}" for arm, folder in drawn.items())
        compare = f"{EVALUATION}/compare.py {folders} --output_dir {out}/compare/{prompts}"
        add(f"compare-{prompts}", compare, may_fail=name != "tiny", drop_missing=True)

    # 4. Curves: the checkpoints of the reward-specific runs, by that reward
    prompts = list(size.sets)[-1]
    flags = f"{size.sets[prompts][0]} --max_prompts {size.curve_prompts}"
    for reward, names in curves.items():
        folders = []
        for arm in names:
            steps = size.rl_steps if "grpo" in arm else size.steps
            every = max(1, steps // size.checkpoints)
            for step in range(every, steps + 1, every):
                model = arms[arm][0].replace(f"/runs/{arm}", f"/runs/{arm}/checkpoint-{step}")
                folders.append(f"curves/{reward}/{arm}-{step}")
                draw(folders[-1], size.model, f"{model} {size.drawing}", (arms[arm][1],), flags, size.curve_prompts)
        folders = " ".join(f"{out}/images/{folder}" for folder in folders)
        add(
            f"score-curves-{reward}",
            f"{EVALUATION}/score_images.py {folders} --metrics {reward}",
            may_fail=name != "tiny",
            drop_missing=True,
        )

    # 5. Exposure bias, and the report
    models = " ".join(f"{arm}={out}/runs/{arm}" for arm in general)
    add(
        "exposure-bias",
        f"examples/measure_exposure_bias.py --pretrained_model_name_or_path {size.model} {data} {size.exposure_bias} "
        f"--output_dir {out}/exposure_bias --models base={size.model} {models}",
        after=tuple(f"train-{arm}" for arm in general),
        forwards=64 * 8 * 17 * (1 + len(general)) if name != "tiny" else 0,
    )
    add("report", f"examples/paper/report_paper.py {name} {out}")
    return stages


def rl_costs(size):
    """Pictures of a rollout, and forwards of each, by what Flow-GRPO's own arguments say."""
    import cost
    import train_sd3_flow_grpo_lora as method

    required = ["--pretrained_model_name_or_path", "model", "--prompts", __file__, "--reward", "ocr=1"]
    args = method.parse_args([*required, *size.rl.split()])
    drawing, graphs, others = cost.forwards(method, args)
    return args.num_groups * args.group_size, drawing + graphs * FORWARDS["sft_lora"] + others


def tflop(stage):
    """Operations of a stage, in units of 1e12."""
    counted = json.loads((HERE / "models.json").read_text())
    return stage.forwards * counted[stage.model]


def hours(stage, gpus):
    """Computed hours on H100s; only what is launched on several of them is shared out, perfectly."""
    return tflop(stage) * 1e12 / H100 / UTILISATION / 3600 / (gpus if stage.launched else 1)


def summary(stages):
    """The sums of a plan, by what the stages do: a table."""
    kinds = {
        "training, SFT and SOAR": lambda stage: stage.name.startswith("train") and "grpo" not in stage.name,
        "training, Flow-GRPO": lambda stage: stage.name.startswith("train") and "grpo" in stage.name,
        "drawing, SD3.5-M": lambda stage: stage.name.startswith("draw") and stage.model == MEDIUM,
        "drawing, the other models": lambda stage: stage.model != MEDIUM,
        "all": lambda stage: True,
    }
    lines = ["| | thousand TFLOP | hours, one H100 | hours, eight | disk |", "| --- | --: | --: | --: | --: |"]
    for kind, fits in kinds.items():
        found = [stage for stage in stages if fits(stage)]
        sums = [sum(map(tflop, found)) / 1000, *(sum(hours(stage, gpus) for stage in found) for gpus in (1, 8))]
        disk = sum(stage.gigabytes for stage in found)
        lines.append(f"| {kind} | {sums[0]:,.0f} | {sums[1]:,.0f} | {sums[2]:,.0f} | {disk:,.0f} GB |")
    return "\n".join(lines)


def show_plan(stages, out):
    """Print each stage with what it takes, and the sums."""
    print("| stage | forwards | hours, one H100 | eight | disk | downloads |")
    print("| --- | --: | --: | --: | --: | --- |")
    for stage in stages:
        print(
            f"| {stage.name} | {stage.forwards:,.0f} | {hours(stage, 1):.1f} | {hours(stage, 8):.1f} "
            f"| {stage.gigabytes:.1f} GB | {', '.join(stage.downloads)} |"
        )
    print(f"\n{summary(stages)}\n")
    print(
        f"Computed, not measured: counted operations over {UTILISATION:.0%} of an H100's {H100 / 1e12:.0f} TFLOP/s.\n"
        "Encoding, decoding and the metrics come on top. To accept before:"
    )
    models = dict.fromkeys(model for stage in stages for model in stage.downloads if model in LICENCES)
    for model in models:
        print(f"- https://huggingface.co/{model} ({LICENCES[model]})")
    print(f"\nEverything is written to {out}. The commands:\n")
    for stage in stages:
        print(f"{stage.name}:\n    python {stage.command}")


def call(command):
    """Run a command and show what it says: its exit code, and its last line of complaint. Signals are its own."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),  # a terminal sends it to the command, too
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
    }
    tail = b""
    while chunk := process.stderr.read1(4096):
        sys.stderr.buffer.write(chunk)
        sys.stderr.flush()
        tail = (tail + chunk)[-4000:]
    code = process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    lines = [line.strip() for line in tail.decode(errors="replace").replace("\r", "\n").splitlines()]
    return code, next((line for line in reversed(lines) if line), "")


def run(stages, out, launcher):
    """Run what is not done: the exit code. `missing.json` has what could not run, and why."""
    done, missing = Path(out, ".done"), {}
    done.mkdir(parents=True, exist_ok=True)
    for number, stage in enumerate(stages, start=1):
        marker = done / stage.name
        words = shlex.split(stage.command)
        needed = [name for name in stage.after if name in missing]
        if stage.drop_missing:
            words = [w for w in words if not (f"{out}/images/" in w and not Path(w.split("=")[-1]).exists())]
        text = shlex.join(words)
        is_report = stage.name == "report"
        if marker.exists() and marker.read_text() == text and not (is_report and missing):
            continue
        if needed:
            missing[stage.name] = f"needs {', '.join(needed)}"
            continue
        program = shlex.split(launcher) if stage.launched and launcher else [sys.executable]
        print(f"\n=== {number} of {len(stages)}, {stage.name}\npython {text}", flush=True)
        Path(out, "missing.json").write_text(json.dumps(missing, indent=1) + "\n")
        code, last = call([*program, *words])
        if code == 0:
            marker.write_text(text)
            if not is_report:
                (done / "report").unlink(missing_ok=True)  # it is made anew after anything else
        elif code in (EXIT_INTERRUPTED, -signal.SIGINT, -signal.SIGTERM):
            print(f"\nInterrupted in {stage.name}; the same command goes on.")
            return EXIT_INTERRUPTED
        elif stage.may_fail:
            missing[stage.name] = last or f"exit code {code}"
        else:
            print(f"error: {stage.name} ended with code {code}: {last}", file=sys.stderr)
            return 1
    Path(out, "missing.json").write_text(json.dumps(missing, indent=1) + "\n")
    for name, why in missing.items():
        print(f"missing: {name}: {why}")
    print(f"\nLook at {out}/report.html")
    return 0


def main(input_args=None):
    parser = argparse.ArgumentParser(description="The paper's table, stage by stage.", allow_abbrev=False)
    parser.add_argument("size", choices=["tiny", "one", "full"])
    parser.add_argument("--data", help='As flags of the training scripts: "--train_data_dir my_images".')
    parser.add_argument("--plan", action="store_true", help="Print what it takes, and run nothing.")
    parser.add_argument("--out", help="Folder of all that is written. Default: outputs/paper_SIZE.")
    parser.add_argument("--gpus", type=int, default=1, help="Processes of --launcher.")
    parser.add_argument("--launcher", default="", help='For several GPUs: "accelerate launch --config_file ...".')
    parser.add_argument("--baselines", nargs="*", choices=list(BASELINES), help="Default: all, but in tiny none.")
    args = parser.parse_args(input_args)
    if args.size != "tiny" and not args.data and not args.plan:
        parser.error('--data is missing: for example --data "--train_data_dir my_images"')
    if args.gpus < 1:
        parser.error("--gpus must be at least 1")
    for flag, words in (("--data", args.data), ("--launcher", args.launcher)):
        try:
            words = shlex.split(words or "")
        except ValueError as error:
            parser.error(f"{flag}: {error}")
    if words and not shutil.which(words[0]):
        parser.error(f"--launcher: there is no program {words[0]}")
    out = os.path.abspath(args.out) if args.out else f"outputs/paper_{args.size}"
    os.chdir(ROOT)
    stages = plan(args.size, out, args.data or "--train_data_dir my_images", args.gpus, args.baselines)
    if args.plan:
        show_plan(stages, out)
        return 0
    try:
        os.makedirs(f"{out}/.done", exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    return run(stages, out, args.launcher)


if __name__ == "__main__":
    sys.exit(main())
