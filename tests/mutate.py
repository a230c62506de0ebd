# SPDX-License-Identifier: Apache-2.0
"""
Plant errors, one at a time, in a copy of the repository, and see whether the tests that should notice do. Before, all
of these tests must pass as they are.

    python tests/mutate.py                 # all of them, two at a time
    python tests/mutate.py --only renoise  # those whose file or line has the word

Ends with the errors that lived; the exit code is their number. `tests/README.md` lists what was planted.
"""

import argparse
import itertools
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[1]
SFT, SOAR, LORA, UTILS, DATA = (
    "train_sd3_sft.py",
    "train_sd3_soar.py",
    "train_sd3_soar_lora.py",
    "soar_utils.py",
    "data_utils.py",
)
EVALUATION, MINIATURE, RL = "examples/evaluation", "examples/miniature", "examples/rl"
FORMULAS, STEP = "test_soar_utils.py", "test_training.py -k follows_the_equations"

# A file, a text that stands in it once, what takes its place, and the tests that should see it.
MUTATIONS = [
    # The method
    (UTILS, "return (shift * u / (1 + (shift - 1) * u))", "return (shift * u / (1 + shift * u))", FORMULAS),
    (UTILS, "return sigma / (shift - (shift - 1) * sigma)", "return sigma / (shift - shift * sigma)", FORMULAS),
    (UTILS, "- 1 / num_sampling_steps).clamp(min=U_MIN)", "- 1 / num_sampling_steps)", FORMULAS),
    (UTILS, "(velocity_cond.float() - velocity_uncond)", "(velocity_uncond - velocity_cond.float())", FORMULAS),
    (UTILS, "a = (sigma_aux - sigma_next) / (1 - sigma_next)", "a = (sigma_aux - sigma_next) / 1", FORMULAS),
    (UTILS, "(aux_latents.float() - latents.float()) / sigma_aux", "aux_latents.float() - latents.float()", FORMULAS),
    (UTILS, "endpoint, std = x + (1 - sigma) * v", "endpoint, std = x + sigma * v", FORMULAS),
    (
        UTILS,
        ".square().flatten(1).mean(dim=1)",
        ".square().flatten(1).mean(dim=1).mean().expand(len(target))",
        FORMULAS,
    ),
    (UTILS, "(1 + (shift - 1) * u)).clamp(max=1)", "(1 + (shift - 1) * u))", FORMULAS),
    (UTILS, "sigma.clamp(max=sigma_max)", "sigma.clamp(max=1 - 1e-6)", FORMULAS),
    (SOAR, "velocity_cfg = velocity.detach()", "velocity_cfg = velocity", STEP),
    (SOAR, ".clamp(soar_utils.U_MIN, 1)", ".clamp(0, 1)", STEP),
    (SOAR, "latents[samples], sigma_aux)", "latents[samples.flip(0)], sigma_aux)", STEP),
    (SOAR, "sigma_next + place * (sigma_upper - sigma_next)", "sigma_next + place * (sigma_upper - sigma)", STEP),
    (SOAR, "with sync(number == len(chunks)):", "with sync(number == 1):", "test_elastic.py -k one_process_or_two"),
    (SOAR, "yield args.lambda_aux * losses.sum() / denominator", "yield losses.sum() / denominator", STEP),
    (
        SOAR,
        'batch[f"{kind}pooled_prompt_embeds"][samples]',
        'batch["pooled_prompt_embeds"][samples]',
        "test_training.py -k velocity_is_the_models",
    ),
    # Data and caches
    (SOAR, " - (vae.config.shift_factor or 0))", ")", "test_data.py -k what_reaches_the_model"),
    (SOAR, 'data_utils.derive_seed("noise", self.args.seed, position)', "position", "test_data.py -k noise_depends"),
    (SOAR, "scale = max(height / image", "scale = min(height / image", "test_data.py -k 'resize or center_crop'"),
    (SOAR, "y, x = round(top *", "x, y = round(top *", "test_data.py -k 'center_crop or random_crop'"),
    (
        SFT,
        "return data_utils.digest(image_digest, *size, crop, flip,",
        "return data_utils.digest(image_digest, *size, crop,",
        "test_data.py -k 'keyed_by_content or cached_and_online'",
    ),
    (
        SFT,
        'return data_utils.digest(caption, self.encoder_digests["text"])',
        "return data_utils.digest(caption)",
        "test_data.py -k keyed_by_content",
    ),
    (DATA, "ends = [[(epoch + i) *", "ends = [[(epoch + i + i) *", "test_elastic.py -k 'every_sample or one_size'"),
    (DATA, "self.start + self.process_index, None", "self.process_index, None", "test_elastic.py -k order_does_not"),
    (DATA, "outside.rstrip(os.sep) + os.sep", "outside.rstrip(os.sep)", "test_data_utils.py -k inside"),
    (SOAR, '"drop": drop < self.args', '"drop": top < self.args', "test_data.py -k independent"),
    (
        SFT,
        "crop = None if self.args.center_crop else self.args.seed",
        "crop = self.args.center_crop",
        "test_data.py -k keyed_by_content",
    ),
    (
        DATA,
        'self.shuffled(batches, "batches", epoch)',
        'self.shuffled(batches, "batches")',
        "test_elastic.py -k take_turns",
    ),
    (
        SOAR,
        'derive_seed("crop", self.args.seed, image_digest)',
        'derive_seed("crop", self.args.seed)',
        "test_data.py -k one_crop",
    ),
    (
        SOAR,
        'derive_seed("crop", self.args.seed, image_digest)',
        'derive_seed("crop", image_digest)',
        "test_data.py -k one_crop",
    ),
    (
        SOAR,
        'derive_seed("sample", self.args.seed, position)',
        'derive_seed("sample", position)',
        "test_data.py -k independent",
    ),
    (
        SOAR,
        'derive_seed("noise", self.args.seed, position)',
        'derive_seed("sample", self.args.seed, position)',
        "test_data.py -k independent",
    ),
    (SOAR, 'item["captions"][int(choice *', 'item["captions"][int(drop *', "test_data.py -k independent"),
    (
        SOAR,
        "self.args.random_flip and flip < 0.5",
        "self.args.random_flip and left < 0.5",
        "test_data.py -k independent",
    ),
    (
        SFT,
        "digest(rows._fingerprint, i, data_utils.file_key(path))",
        "digest(rows._fingerprint, i)",
        "test_data.py -k behind_a_data_set",
    ),
    (DATA, '"order", bucket, epoch', '"order", epoch', "test_elastic.py -k take_turns"),
    (DATA, '"/".join(map(str, parts))', '"".join(map(str, parts))', "test_elastic.py -k seeds_differ"),
    (DATA, "csv.DictReader(file, skipinitialspace=True)", "csv.DictReader(file)", "test_data.py -k two_folders"),
    (
        SFT,
        "digest(name, length, len(tokenizer), captions)",
        "digest(name, length, len(tokenizer))",
        "test_data.py -k counted_once",
    ),
    (
        SOAR,
        "rows = rows.select(range(min(args.max_train_samples, len(rows))))",
        "pass",
        "test_data.py -k max_train_samples",
    ),
    (SOAR, 'folders[:] = [name for name in folders if name[0] != "."]', "pass", "test_data.py -k captions_beside"),
    (
        SFT,
        "listed.setdefault(os.path.normpath(image), path)",
        "listed.setdefault(image, path)",
        "test_bad_input.py -k two_metadata",
    ),
    (DATA, "file = pyarrow.OSFile(path)", "raise", "test_data_utils.py -k without_memory_maps"),
    (
        DATA,
        'np.where(levels == image.info["transparency"], 0, 255)',
        'np.where(levels == image.info["transparency"], 255, 0)',
        "test_data.py -k transparent_grey",
    ),
    (DATA, 'if name == "..":', 'if name == ".." or os.path.islink(path):', "test_data.py -k links"),
    (
        SFT,
        "type(text) in (str, int)",
        "type(text) in (str, int, bool)",
        "test_bad_input.py -k 'another_shape or another_kind'",
    ),
    (SOAR, "value is None or value != value", "value is None", "test_data.py -k instance_prompt"),
    # The run
    (
        SOAR,
        "lr_scheduler.step()\n            optimizer.zero_grad()",
        "lr_scheduler.step()\n            lr_scheduler.step()\n            optimizer.zero_grad()",
        "test_faults.py -k may_be_skipped",
    ),
    (
        SFT,
        "        os.replace(unfinished, folder)",
        "        shutil.copytree(unfinished, folder)\n        shutil.rmtree(unfinished)",
        "test_faults.py -k nothing_is_written",
    ),
    (SFT, "ema.step(parameters)", "pass", "test_flags.py -k use_ema"),
    (SOAR, "            skipped_steps = 0\n", "", "test_faults.py -k may_be_skipped"),
    (
        SFT,
        "[: -args.checkpoints_total_limit]",
        "[: -args.checkpoints_total_limit - 1]",
        "test_flags.py -k test_checkpoints",
    ),
    (
        SFT,
        "except filelock.Timeout:\n        fail(",
        "except filelock.Timeout:\n        print(",
        "test_bad_input.py -k two_runs",
    ),
    (
        SOAR,
        'if options.get("quantization_config") else torch.device("meta"):',
        'if options.get("quantization_config") else torch.device("cpu"):',
        "test_training.py -k position_table",
    ),
    (SOAR, "        if not all(seen):", "        if not any(seen):", "test_faults.py -k share_their_folders"),
    (SOAR, "checkpoint, sent and hidden)", "checkpoint)", "test_elastic.py -k sharded"),
    (SOAR, "    if sent:\n", "    if False:\n", "test_elastic.py -k sharded"),
    (SOAR, "each = accelerator.is_fsdp2", "each = False", "test_elastic.py -k sharded"),
    (SOAR, '"output_dtype": None', '"output_dtype": torch.bfloat16', "test_elastic.py -k sharded"),
    (SOAR, '"reduce_dtype": torch.float32', '"reduce_dtype": torch.bfloat16', "test_elastic.py -k sharded"),
    (
        SFT,
        'data_utils.derive_seed(args.seed, "rounding", global_step)',
        'data_utils.derive_seed(args.seed, "rounding")',
        "test_flags.py -k rounds_anew",
    ),
    (
        SFT,
        "                with averaged_weights(ema, parameters):\n                    log_validation",
        "                with averaged_weights(None, parameters):\n                    log_validation",
        "test_flags.py -k sees_the_average",
    ),
    (SFT, "        ema.restore(parameters)", "        pass", "test_flags.py -k sees_the_average"),
    (
        SFT,
        'logger.warning(f"Skipped {what}")',
        'logger.warning(f"Skipped {what}") or ema.step(parameters)',
        "test_flags.py -k are_not_averaged",
    ),
    (SOAR, "accelerator.scaler.update()", "pass", "test_faults.py -k fp16"),
    (SOAR, 'key=lambda item: item[1]["number"]', 'key=lambda item: item[1]["step"]', "test_faults.py -k written_last"),
    (SFT, '"purge_step": saved_state["step"] + 1', '"purge_step": None', "test_faults.py -k tracker_forgets"),
    (SOAR, "                whole = False\n", "", "test_faults.py -k error_of_the_step"),
    (SOAR, "float(failure is not None)", "0.0", "test_faults.py -k data_that_fails_costs"),
    (
        SOAR,
        "                if path.is_file():\n                    raise\n",
        "",
        "test_faults.py -k cannot_be_synced",
    ),
    (SFT, " or answer.status_code == 429", "", "test_hub.py -k asks_to_wait"),
    (SFT, "    ask_hub(what, api.auth_check, repo, write=True)\n", "", "test_hub.py -k may_be_uploaded"),
    # Evaluation
    (
        f"{EVALUATION}/geneval.py",
        "np.maximum(np.abs(offset) - free, 0)",
        "np.abs(offset)",
        "test_geneval.py -k relations",
    ),
    (f"{EVALUATION}/geneval.py", 'if number >= clause["count"]:', 'if number > clause["count"]:', "test_geneval.py"),
    (
        f"{EVALUATION}/geneval.py",
        "scores.append(1 - abs(len(group) - count) / count)",
        "scores.append(1 - abs(len(group) - count))",
        "test_geneval.py -k soft",
    ),
    (
        f"{EVALUATION}/ocr.py",
        "min(edit_distance(wanted, text), len(wanted)) / len(wanted)",
        "edit_distance(wanted, text) / len(wanted)",
        "test_evaluation.py -k text_score",
    ),
    (
        f"{EVALUATION}/runs.py",
        "np.quantile(drawn, [0.025, 0.975])",
        "np.quantile(drawn, [0.05, 0.95])",
        "test_evaluation.py -k intervals",
    ),
    # The miniature and reinforcement learning
    (
        f"{MINIATURE}/world.py",
        "np.sign(a.cell[1] - b.cell[1]) == dx",
        "np.sign(b.cell[1] - a.cell[1]) == dx",
        "test_miniature.py -k 'truth or near_miss'",
    ),
    (
        f"{MINIATURE}/report.py",
        "np.quantile(means, [0.025, 0.975])",
        "np.quantile(means, [0.25, 0.75])",
        "test_miniature.py -k paired",
    ),
    (f"{RL}/train_sd3_nft_lora.py", "(1 - good, -1))", "(1 - good, 1))", "test_rl.py -k 'authors or first_gradient'"),
    (
        f"{RL}/train_sd3_flow_grpo_lora.py",
        "torch.maximum(-advantages * ratio",
        "torch.minimum(-advantages * ratio",
        "test_rl.py -k clipped",
    ),
    (
        f"{RL}/train_sd3_flow_grpo_lora.py",
        "if part.equal and off and (largest",
        "if off and (largest",
        "test_rl.py -k rounding",
    ),
    (
        f"{RL}/train_sd3_nft_lora.py",
        "accelerator.unwrap_model(transformer).disable_adapters()",
        "pass",
        "test_rl.py -k starts_where",
    ),
]


def passes(tests, mutation=None):
    """Whether the tests pass in a copy of the repository, with an error planted where there is one."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "repository")
        ignored = shutil.ignore_patterns(".git", ".venv*", "outputs", "__pycache__", ".pytest_cache", ".ruff_cache")
        shutil.copytree(ROOT, copy, ignore=ignored)
        if mutation is not None:
            file, old, new, _ = mutation
            text = (copy / file).read_text()
            if text.count(old) != 1:
                raise SystemExit(f"error: {file} has {text.count(old)} times: {old!r}")
            (copy / file).write_text(text.replace(old, new))
        name, _, words = tests.partition(" -k ")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{name}"]
        command += ["-k", words.strip("'")] if words else []
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        if done.returncode not in (0, 1):  # no test was found, or none could be collected
            raise SystemExit(f"error: pytest {tests} ended with code {done.returncode}: {done.stdout[-1000:]}")
        return done.returncode == 0


def main():
    parser = argparse.ArgumentParser(description="Plant errors and see whether the tests notice.")
    parser.add_argument("--only", default="", help="A word of the file, of the line, or of what takes its place.")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if args.only in " ".join(mutation)]
    selections = [*dict.fromkeys(tests for *_, tests in chosen)]
    with ThreadPoolExecutor(args.workers) as pool:
        # A test that fails anyway notices nothing.
        sound = list(tqdm(pool.map(passes, selections), "Without an error", len(selections), unit="selection"))
        if not all(sound):
            failing = [tests for tests, passed in zip(selections, sound, strict=True) if not passed]
            raise SystemExit(f"error: these fail without any error planted: {'; '.join(failing)}")
        planted = pool.map(lambda mutation: passes(mutation[-1], mutation), chosen)
        lived = list(tqdm(planted, "Planting", len(chosen), unit="error"))
    alive = list(itertools.compress(chosen, lived))
    for file, old, new, tests in alive:
        print(f"lived: {file}: {old!r} -> {new!r} ({tests})")
    print(f"{len(chosen) - len(alive)} of {len(chosen)} planted errors were noticed")
    sys.exit(len(alive))


if __name__ == "__main__":
    main()
