# SPDX-License-Identifier: Apache-2.0
"""
Draw the images of a list of prompts with any text-to-image pipeline, to score and compare them.

    python examples/evaluation/generate_images.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-3.5-medium --transformer sd3-soar \
        --prompts geneval_metadata.jsonl --images_per_prompt 4 --output_dir runs/soar
    accelerate launch examples/evaluation/generate_images.py ...   # on all GPUs

Without --transformer and --lora it is the pipeline itself: SD3.5, SD-XL, FLUX.1 or any other. The images start from
the same noise for every model: a function of --seed, the prompt's place in the list and the image's number. What is
there and whole is not drawn again, so an interrupted call is simply repeated.

--output_dir becomes an image folder that `--train_data_dir` reads, too:

    images/00012-0.png    prompt 12, image 0
    metadata.jsonl        a row an image: file_name, text, prompt_index, image_index, seed, tag if the prompt's row had
                          one, and its other fields as JSON in "prompt_fields"; written last, when all is there
    generation.json       with what they were drawn
"""

import argparse
import hashlib
import inspect
import json
import os
from pathlib import Path

import datasets
import diffusers
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image
from runs import NESTED, data_utils, script, write_whole
from tqdm.auto import tqdm
from trained import LORA_FILE, draw_images, largest_side, load_trained


OWN_FILES = ("images", "generation.json")  # what a call leaves that drew nothing
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0], allow_abbrev=False)
    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--pretrained_model_name_or_path", required=True, help="Hub id or folder of a text-to-image pipeline.")
    add("--revision", help="Hub revision of the pipeline.")
    add("--variant", help="Variant of the weight files, for example fp16.")
    add("--transformer", help="A full fine-tune: folder or hub id with `transformer/` in it.")
    add("--lora", help="A LoRA on that: folder or hub id with `pytorch_lora_weights.safetensors`.")
    add("--lora_scale", type=script.number(), default=1.0)
    add("--start_lora", help="What --lora was trained on top of: becomes part of the weights before.")
    add("--mixed_precision", choices=list(DTYPES), help="Type of the weights. Default: bf16 on a GPU, else no.")
    add("--offload", action="store_true", help="For small cards: parts of the pipeline wait in the host's memory.")

    prompts = parser.add_argument_group("prompts (exactly one of --prompts, --dataset_name)")
    add = prompts.add_argument
    add("--prompts", type=Path, help=".txt with a prompt a line, or .jsonl with objects, as GenEval's metadata.")
    add("--dataset_name", help="Hub id or folder for `datasets.load_dataset`, for example sayakpaul/drawbench.")
    add("--dataset_config_name", help="Configuration of --dataset_name.")
    add("--dataset_split", default="train")
    add("--prompt_column", default="prompt", help="Field of the .jsonl, or column of the data set.")
    add("--max_prompts", type=script.number(int, 1), help="The first N prompts.")
    add("--images_per_prompt", type=script.number(int, 1), default=1)

    sampling = parser.add_argument_group("sampling")
    add = sampling.add_argument
    add("--num_inference_steps", type=script.number(int, 1), default=40)
    add("--guidance_scale", type=script.number(float, 0), default=4.5)
    add("--resolution", type=multiple_of_16, help="Width and height in pixels. Default: the model's own.")
    add("--max_sequence_length", type=script.number(int, 1, 512), help="T5 tokens, as in training. Default: its own.")
    add("--batch_size", type=script.number(int, 1), default=4, help="Images at once, on each process.")
    add("--seed", type=script.number(int, 0), default=0)
    add("--output_dir", type=Path, required=True)
    args = parser.parse_args(input_args)
    if (args.prompts is None) == (args.dataset_name is None):
        parser.error("give exactly one of --prompts and --dataset_name")
    for flag, folder in {"lora": args.lora, "start_lora": args.start_lora}.items():
        if folder and os.path.isdir(folder) and not os.path.isfile(os.path.join(folder, LORA_FILE)):
            parser.error(f"--{flag} {folder}: no {LORA_FILE} in that folder")
    return args


def multiple_of_16(text):
    """Argparse type: a size in pixels that every pipeline takes."""
    value = script.number(int, 16)(text)
    if value % 16:
        raise argparse.ArgumentTypeError(f"must be divisible by 16, got {text}")
    return value


def read_prompts(args):
    """The prompts and the other fields of their rows, `list[tuple[str, dict]]`; a bad line ends the program."""
    column = args.prompt_column
    if args.dataset_name:
        with script.failing_with(f"--dataset_name {args.dataset_name}"):
            table = datasets.load_dataset(args.dataset_name, args.dataset_config_name, split=args.dataset_split)
        if column not in table.column_names:
            script.fail(f"--prompt_column {column}: {args.dataset_name} has {', '.join(table.column_names)}")
        texts = [(f"{args.dataset_name}, row {i}", {column: text}) for i, text in enumerate(table[column])]
    elif not args.prompts.is_file():
        script.fail(f"--prompts {args.prompts}: no such file")
    elif args.prompts.suffix == ".jsonl":
        texts = list(data_utils.read_json_lines(args.prompts))
    elif args.prompts.suffix != ".txt":
        script.fail(f"--prompts {args.prompts}: want .txt with a prompt a line, or .jsonl with an object a line")
    else:
        with script.failing_with(f"--prompts {args.prompts} is no text file"):
            lines = args.prompts.read_text(encoding="utf-8-sig").split("\n")  # not at what else ends a line in Unicode
        texts = [(f"{args.prompts}, line {n}", {column: line}) for n, line in enumerate(lines, 1) if line.strip()]
    prompts = []
    for where, row in texts[: args.max_prompts]:
        if not isinstance(row.get(column), str) or not row[column].strip():
            script.fail(f"{where}: no text in {column!r}; --prompt_column names the field of the prompt")
        prompts.append((row[column].strip(), {key: value for key, value in row.items() if key != column}))
    if not prompts:
        script.fail(f"{args.prompts or args.dataset_name}: no prompts")
    return prompts


def plan(args, prompts):
    """The rows of `metadata.jsonl`: an image each, prompt by prompt."""
    rows = []
    for index, (prompt, fields) in enumerate(prompts):
        for image in range(args.images_per_prompt):
            row = {
                "file_name": f"images/{index:05d}-{image}.png",
                "text": prompt,
                "prompt_index": index,
                "image_index": image,
                "seed": data_utils.derive_seed("image", args.seed, index, image) % 2**63,
            }
            if isinstance(fields.get("tag"), str):  # GenEval's task, which the comparison filters by
                row["tag"] = fields["tag"]
            if others := {key: value for key, value in fields.items() if row.get(key) != value}:
                row[NESTED] = json.dumps(others, sort_keys=True, ensure_ascii=False)
            rows.append(row)
    return rows


def is_whole(path):
    """Whether an image is there and can be decoded to its end."""
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError):  # PIL's words for missing, cut off, or no image
        return False
    return True


def digest_weights(args):
    """SHA-256 of the weights in local folders, as these may be trained again; `None` where all is the hub's."""
    sources = {"pretrained_model_name_or_path": "*/*", "transformer": "transformer/*"}
    sources |= {"lora": LORA_FILE, "start_lora": LORA_FILE}
    files = []
    for flag, pattern in sources.items():
        folder = getattr(args, flag)
        if folder is not None and os.path.isdir(folder):
            found = sorted(path for path in Path(folder).glob(pattern) if path.suffix == ".safetensors")
            if not found:
                script.fail(f"--{flag} {folder}: no {pattern.removesuffix('.safetensors')}.safetensors in that folder")
            files += found
    if not files:
        return None
    digest = hashlib.sha256()
    for path in tqdm(files, desc="Reading the weights", unit="file"):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def check_settings(args, rows):
    """
    Begin --output_dir, or make sure that what is in it was drawn in the same way, so that no folder mixes two models.
    """
    used = {name: value for name, value in vars(args).items() if name not in ("output_dir", "batch_size", "offload")}
    used = {name: str(value) if isinstance(value, Path) else value for name, value in used.items()}
    used["rows_digest"] = f"{data_utils.derive_seed('rows', *(json.dumps(row, sort_keys=True) for row in rows)):016x}"
    used["weights_digest"] = digest_weights(args)
    used["diffusers"] = diffusers.__version__
    path = args.output_dir / "generation.json"
    if any((args.output_dir / "images").glob("[!.]*.png")):
        if not path.exists():
            script.fail(f"--output_dir {args.output_dir} has images but no {path.name}: give another folder")
        with script.failing_with(f"{path} cannot be read"):
            before = json.loads(path.read_text())
        # One list of prompts may be called by many paths; `rows_digest` tells whether it is the same.
        if changed := [name for name, value in used.items() if before.get(name) != value and name != "prompts"]:
            changed = "; ".join(f"{name} was {before.get(name)!r}, is {used[name]!r}" for name in changed)
            script.fail(f"{args.output_dir} holds images drawn otherwise: {changed}. Give another --output_dir")
    elif args.output_dir.exists():
        with script.failing_with(f"--output_dir {args.output_dir}"):
            names = os.listdir(args.output_dir)
        if not set(names) <= set(OWN_FILES):
            script.fail(f"--output_dir {args.output_dir} holds something else: give another folder")
    return used


def load_pipeline(args, device):
    """The pipeline, with the full fine-tune and the LoRA in it, on its device."""
    source = args.pretrained_model_name_or_path
    with script.failing_with(f"--pretrained_model_name_or_path {source}"):
        kind = getattr(diffusers, DiffusionPipeline.load_config(source, revision=args.revision)["_class_name"])
    if args.max_sequence_length and "max_sequence_length" not in inspect.signature(kind.__call__).parameters:
        script.fail(f"--max_sequence_length: {kind.__name__} has no such thing")
    trained = {"--transformer": args.transformer, "--start_lora": args.start_lora, "--lora": args.lora}
    given = [f"{flag} {path}" for flag, path in trained.items() if path]
    sources = f"{' '.join(given)} on --pretrained_model_name_or_path {source}".removeprefix(" on ")
    with script.failing_with(sources):
        most = largest_side(source, args.transformer, args.revision)
    if args.resolution and args.resolution > most:
        script.fail(f"--resolution {args.resolution}: {source} draws at most {most} pixels a side")
    with script.failing_with(sources):
        pipeline = load_trained(
            source,
            args.transformer,
            args.lora,
            args.lora_scale,
            dtype=DTYPES[args.mixed_precision],
            start_lora=args.start_lora,
            revision=args.revision,
            variant=args.variant,
        )
        if args.offload:
            with script.failing_with("--offload"):
                pipeline.enable_model_cpu_offload(device=device)
        else:
            pipeline.to(device)  # complains of weights that the files did not have
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def draw(args, pipeline, rows):
    """The images of `rows`, each from its own noise, drawn on the CPU so that every device begins with the same."""
    options = {"height": args.resolution, "width": args.resolution, "max_sequence_length": args.max_sequence_length}
    options = {name: value for name, value in options.items() if value is not None}
    with script.failing_with(f"{rows[0]['file_name']} to {rows[-1]['file_name']} cannot be drawn"):
        return draw_images(
            pipeline,
            [row["text"] for row in rows],
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(row["seed"]) for row in rows],
            **options,
        )


def main(input_args=None):
    args = parse_args(input_args)
    accelerator = Accelerator()
    diffusers.utils.logging.set_verbosity_error()  # it tells of each long prompt that CLIP cuts it off
    args.mixed_precision = args.mixed_precision or ("bf16" if accelerator.device.type == "cuda" else "no")
    rows = plan(args, read_prompts(args))
    settings = check_settings(args, rows)
    there = tqdm(rows, desc="Looking what is there", unit="image", disable=not accelerator.is_main_process)
    missing = [row for row in there if not is_whole(args.output_dir / row["file_name"])]
    accelerator.wait_for_everyone()  # all processes have looked before one writes
    with script.failing_with(f"--output_dir {args.output_dir}"):
        (args.output_dir / "images").mkdir(parents=True, exist_ok=True)
    if missing:
        pipeline = load_pipeline(args, accelerator.device)
    if accelerator.is_main_process:
        print(f"{len(rows)} images, {len(rows) - len(missing)} of them there", flush=True)
        write_whole(args.output_dir / "generation.json", lambda p: p.write_text(json.dumps(settings, indent=2) + "\n"))

    batches = [missing[start : start + args.batch_size] for start in range(0, len(missing), args.batch_size)]
    own = batches[accelerator.process_index :: accelerator.num_processes]
    hidden = not accelerator.is_main_process
    with tqdm(total=sum(map(len, own)), desc="Drawing", unit="image", disable=hidden) as bar:
        for batch in own:
            images = draw(args, pipeline, batch)
            with script.failing_with(f"--output_dir {args.output_dir}"):
                for row, image in zip(batch, images, strict=True):
                    write_whole(args.output_dir / row["file_name"], lambda p, image=image: image.save(p, "PNG"))
            bar.update(len(batch))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_whole(args.output_dir / "metadata.jsonl", lambda p: p.write_text(lines, encoding="utf-8"))
        print(f"Drawn: {args.output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
