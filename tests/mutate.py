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
NFT, GRPO = f"{RL}/train_sd3_nft_lora.py", f"{RL}/train_sd3_flow_grpo_lora.py"
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
    (NFT, "(1 - good, -1))", "(1 - good, 1))", "test_rl.py -k 'authors or first_gradient'"),
    (
        GRPO,
        "torch.maximum(-advantages * ratio",
        "torch.minimum(-advantages * ratio",
        "test_rl.py -k clipped",
    ),
    (
        GRPO,
        "if part.equal and off and (largest",
        "if off and (largest",
        "test_rl.py -k rounding",
    ),
    (
        NFT,
        "accelerator.unwrap_model(transformer).disable_adapters()",
        "pass",
        "test_rl.py -k starts_where",
    ),
    (NFT, "accelerator.no_sync(transformer)", "contextlib.nullcontext()", "test_rl.py -k not_waited"),
    (
        GRPO,
        "parameters_to_vector(gradients) / accelerator.num_processes",
        "parameters_to_vector(gradients)",
        "test_rl.py -k two_processes_train",
    ),
    (
        GRPO,
        "if not any(accelerate.utils.gather_object([any(p.grad is not None for p in parameters)])):",
        "if not any(p.grad is not None for p in parameters):",
        "test_rl.py -k not_waited",
    ),
    (
        NFT,
        "sum(found.get(name, 0.0) for found in each) / len(each)",
        "each[0].get(name, 0.0)",
        "test_rl.py -k two_processes_train",
    ),
    (NFT, "any(accelerate.utils.gather_object([bool(signals)]))", "bool(signals)", "test_rl.py -k stops_both"),
    (
        GRPO,
        "messages = accelerate.utils.gather_object([error and (str(error) or type(error).__name__)])",
        "messages = []",
        "test_rl.py -k ends_both",
    ),
    (
        NFT,
        'checked = means if accelerator.scaler is None else means.keys() - {"grad_norm"}',
        "checked = means",
        "test_rl.py -k fp16s",
    ),
    (
        GRPO,
        "            if trained:\n                optimizer.step()",
        "            if True:\n                optimizer.step()",
        "test_rl.py -k fp16s",
    ),
    (
        NFT,
        "args.seed = script.run_on_main(accelerator, lambda: seed)",
        "args.seed = seed",
        "test_rl.py -k without_a_seed",
    ),
    (
        NFT,
        'seed = saved_state["compared"]["seed"] if checkpoint else random.getrandbits(31)',
        "seed = random.getrandbits(31)",
        "test_rl.py -k without_a_seed",
    ),
    (NFT, "if args.num_groups % processes:", "if False:", "test_rl.py -k unequally"),
    (NFT, "derive_seed(args.seed, *what)", "derive_seed(*what)", "test_rl.py -k drawn_afresh"),
    (NFT, '("noise", *part.pictures[i][1], level)', '("noise", *part.pictures[i][1])', "test_rl.py -k drawn_afresh"),
    (GRPO, 'normal("step", *name, k)', 'normal("step", *name)', "test_rl.py -k drawn_afresh"),
    (GRPO, 'normal("start", *name)', 'normal("start", *name[:2])', "test_rl.py -k drawn_afresh"),
    (NFT, 'derive_seed(args.seed, "prompts", epoch)', 'derive_seed("prompts", epoch)', "test_rl.py -k seed_draws"),
    (GRPO, 'derive_seed(args.seed, "window", step)', 'derive_seed("window", step)', "test_rl.py -k seed_draws"),
    (
        NFT,
        'derive_seed(args.seed, "levels", *names[i])',
        'derive_seed(args.seed, "levels")',
        "test_rl.py -k seed_draws",
    ),
    (
        NFT,
        'derive_seed(args.seed, "levels", *names[i])',
        'derive_seed("levels", *names[i])',
        "test_rl.py -k seed_draws",
    ),
    (NFT, 'trainer_state["compared"]["merged"] = merged', "pass", "test_rl.py -k own_start"),
    (NFT, '"digest": digest(r)', '"digest": digest(r["text"])', "test_rl.py -k own_start"),
    (f"{RL}/compare_methods.py", "{100 + arm.seed}", "{100}", "test_rl.py -k cost_what"),
    (NFT, 'with weights_of("old"):', "with contextlib.nullcontext():", "test_rl.py -k follows_and_draws"),
    (
        NFT,
        "shadow.lerp_(parameter.detach(), 1 - decay)",
        "shadow.lerp_(parameter.detach(), decay)",
        "test_rl.py -k follows_and_draws",
    ),
    (NFT, "update == 0 and (step == 0 or decay == 0)", "(step == 0 or decay == 0)", "test_rl.py -k follows_and_draws"),
    (
        NFT,
        "decay = old_decay(args, step * args.num_updates)",
        "decay = old_decay(args, step)",
        "test_rl.py -k follows_and_draws",
    ),
    (
        NFT,
        "decay = old_decay(args, (step + 1) * args.num_updates)",
        "decay = old_decay(args, step + 1)",
        "test_rl.py -k follows_and_draws",
    ),
    (NFT, 'olds = predictions("old")', 'olds = predictions("start")', "test_rl.py -k follows_and_draws"),
    (
        NFT,
        "min(args.old_rate * max(updates - args.old_start, 0), args.old_max)",
        "args.old_rate * max(updates - args.old_start, 0)",
        "test_rl.py -k old_policys_decay",
    ),
    (
        NFT,
        "return equal and args.kl_weight == 0 and",
        "return args.kl_weight == 0 and",
        "test_rl.py -k toward_the_old",
    ),
    (NFT, "return equal and args.kl_weight == 0 and", "return equal and", "test_rl.py -k toward_the_old"),
    (GRPO, "return args.kl_weight == 0 and", "return", "test_rl.py -k toward_the_old"),
    (NFT, "loss + args.kl_weight * kl", "loss + kl", "test_rl.py -k flag_changes"),
    (GRPO, "if args.rollout_guidance != 1:", "if args.rollout_guidance > 1:", "test_rl.py -k are_the_pipelines"),
    (GRPO, '"" if null else row["text"]', 'row["text"]', "test_rl.py -k are_the_pipelines"),
    (NFT, " + (vae.config.shift_factor or 0)", "", "test_rl.py -k are_the_pipelines"),
    (NFT, "advantages, args.nft_beta)", "advantages, 1.0)", "test_rl.py -k flag_changes"),
    (NFT, "args.num_groups, args.advantage_scale)", 'args.num_groups, "global")', "test_rl.py -k flag_changes"),
    (GRPO, "args.sde_type, args.sde_noise_scale\n", "args.sde_type, 0.7\n", "test_rl.py -k flag_changes"),
    (NFT, "args.max_grad_norm or math.inf", "args.max_grad_norm", "test_rl.py -k clipped_at_0"),
    (NFT, "if args.gradient_checkpointing:", "if False:", "test_rl.py -k gradient_checkpointing"),
    (
        NFT,
        'defaults += ["--guidance_scale", "1"]',
        'defaults += ["--guidance_scale", "4.5"]',
        "test_rl.py -k defaults_are",
    ),
    (GRPO, "--lora_alpha 64 --adam", "--lora_alpha 32 --adam", "test_rl.py -k defaults_are"),
    (
        NFT,
        'os.environ["HF_TOKEN"], args.hub_token = args.hub_token, None',
        "args.hub_token = None",
        "test_rl.py -k token_is_kept",
    ),
    (NFT, "step % args.validation_steps == 0 and step < args.max_train_steps", "step < 0", "test_rl.py -k on_the_way"),
    (
        NFT,
        "step % args.validation_steps == 0 and step < args.max_train_steps",
        "step % args.validation_steps == 0",
        "test_rl.py -k on_the_way",
    ),
    (NFT, " and not args.skip_final_inference", "", "test_rl.py -k on_the_way"),
    (NFT, 'shutil.rmtree(Path(args.output_dir, "rollouts"), ignore_errors=True)', "pass", "test_rl.py -k of_the_last"),
    (NFT, "sums[name] += share / args.num_updates", "sums[name] += share", "test_rl.py -k is_logged"),
    (
        NFT,
        'sums["grad_norm"] += grad_norm / args.num_updates',
        'sums["grad_norm"] += grad_norm',
        "test_rl.py -k is_logged",
    ),
    (NFT, "for p in parameters) / args.num_updates", "for p in parameters)", "test_rl.py -k is_logged"),
    (NFT, "correction=0).item()", "correction=1).item()", "test_rl.py -k is_logged"),
    (NFT, "        lr_scheduler.step()\n", "", "test_rl.py -k is_logged"),
    (NFT, "total + weight * value", "total + value", "test_rl.py -k is_logged"),
    (
        GRPO,
        "count = sum(map(len, part.batches)) * len(part.records[0])",
        "count = sum(len(term[0]) for term in terms)",
        "test_rl.py -k what_has_no_advantage",
    ),
    (NFT, '"score" if name == metric else "soft"', '"score"', "test_rl.py -k soft_one"),
    (NFT, "key=rewards.__getitem__, reverse=True", "key=rewards.__getitem__", "test_rl.py -k best_median"),
    (NFT, 'with script.optional("The picture of the rollout"):', "if True:", "test_rl.py -k can_do_without"),
    (
        NFT,
        'with script.optional("Logging"):\n            accelerator.log',
        "if True:\n            accelerator.log",
        "test_rl.py -k can_do_without",
    ),
    (NFT, '["text"].strip().lower() in tested', '["text"].strip() in tested', "test_rl.py -k one_line_for_a_mistake"),
    (
        NFT,
        'row["text"].strip().lower() for _, row',
        'row["text"].strip() for _, row',
        "test_rl.py -k one_line_for_a_mistake",
    ),
    (
        f"{RL}/cost.py",
        'graph = step["tflop"] / args.train_batch_size',
        'graph = step["tflop"]',
        "test_rl.py -k costs_of_a_run",
    ),
    (
        f"{RL}/cost.py",
        "picture = forward * (drawing + others) + graph * graphs",
        "picture = forward * drawing + graph * graphs",
        "test_rl.py -k costs_of_a_run",
    ),
    (f"{RL}/cost.py", "(late + bool(args.kl_weight))", "late", "test_rl.py -k costs_of_the_readme"),
    (
        f"{RL}/cost.py",
        "args.max_train_steps * args.num_updates > args.old_start",
        "args.max_train_steps > args.old_start",
        "test_rl.py -k costs_of_the_readme",
    ),
    (
        f"{RL}/compare_methods.py",
        'return 1 if self.start == "SOAR" else PARTS',
        "return PARTS",
        "test_rl.py -k cost_what",
    ),
    (LORA, "    unwrapped.eval()\n", "", "test_flags.py -k lora_dropout"),
    (LORA, "    unwrapped.train()\n    images", "    images", "test_flags.py -k lora_dropout"),
    (LORA, '"alpha_pattern": config["rank_pattern"], ', "", "test_flags.py -k other_programs"),
    (SFT, "args.max_grad_norm or math.inf", "args.max_grad_norm", "test_flags.py -k max_grad_norm"),
    (LORA, '"init_lora_weights": "gaussian"', '"init_lora_weights": True', "test_flags.py -k new_lora"),
    (LORA, "        set_peft_model_state_dict(transformer, state)", "        pass", "test_flags.py -k test_lora"),
    (
        LORA,
        "args.lora_layers, args.lora_blocks, args.use_dora)",
        "args.lora_layers, args.use_dora)",
        "test_bad_input.py -k would_not_train",
    ),
    (LORA, '"use_rslora": False}', '"use_rslora": config["use_rslora"]}', "test_flags.py -k other_programs"),
    (
        LORA,
        '{"variant": None if args.transformer else args.variant}',
        '{"variant": args.variant}',
        "test_flags.py -k variant_is",
    ),
    (
        SFT,
        "variant = None if checkpoint or args.transformer else args.variant",
        "variant = None if checkpoint else args.variant",
        "test_flags.py -k variant_is",
    ),
    (
        SFT,
        "AdamW8bit(parameters, **common, bf16_stochastic_round",
        "AdamW8bit(parameters, lr=args.learning_rate, bf16_stochastic_round",
        "test_flags.py -k optimizers",
    ),
    (SFT, ' | ({"transformer"} if args.transformer else set())', "", "test_hub.py -k in_place"),
    (SFT, 'config["shift"] = config["flow_shift"]', "pass", "test_flags.py -k shift_of"),
    (
        SFT,
        "    scheduler = read_scheduler(model_dir)\n",
        '    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(f"{model_dir}/scheduler")\n',
        "test_flags.py -k shift_of",
    ),
    (SFT, 'if not config.get("use_flow_sigmas"):', "if False:", "test_bad_input.py -k without_a_shift"),
    (SFT, 'if report["missing_keys"]:', "if False:", "test_bad_input.py -k one_tensor"),
    (SFT, "    if variant and not any(", "    if False and not any(", "test_flags.py -k some_parts"),
    (SFT, "    if args.variant and not any(", "    if False and not any(", "test_bad_input.py -k no_part_has"),
    (LORA, "/ state[up].shape[1])", "/ state[up].shape[0])", "test_flags.py -k other_programs"),
    (LORA, '".lora_B.weight"), {}', '".lora_B.weight"), config', "test_flags.py -k other_programs"),
    (LORA, '"inference_mode": False, ', "", "test_flags.py -k other_programs"),
    (LORA, ', "base_model_name_or_path": None}', "}", "test_flags.py -k other_programs"),
    (LORA, "if different := state.keys() ^", "if different := state.keys() -", "test_bad_input.py -k that_is_none"),
    (LORA, ' or f"{layers[k]}.lora_B.weight" not in state]', "]", "test_bad_input.py -k that_is_none"),
    (LORA, "layers[k] not in modules or ", "", "test_bad_input.py -k that_is_none"),
    (
        SOAR,
        "if accelerator.state.dynamo_plugin.backend != accelerate.utils.DynamoBackend.NO:",
        "if False:",
        "test_bad_input.py -k accelerates_compiler",
    ),
    (
        SFT,
        ' and (flag, getattr(args, action.dest)) != ("validation_prompt", 0):',
        ":",
        "test_flags.py -k test_validation",
    ),
    (NFT, "    if merged:  # and", "    if False:  # and", "test_rl.py -k mistake"),
    (
        "examples/convert_for_ui.py",
        'if "adaLN" in key and up.shape',
        "if False and up.shape",
        "test_convert.py -k and_back",
    ),
    (
        "examples/convert_for_ui.py",
        "rows.any(dim=0)",
        "torch.ones(len(down), dtype=bool)",
        "test_convert.py -k and_back",
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
