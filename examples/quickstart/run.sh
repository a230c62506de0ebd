#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# SOAR from nothing to pictures, on two CPU cores, in about sixteen minutes:
#
#     bash examples/quickstart/run.sh
#
# Writes a toy Stable Diffusion 3.5, trains it on messy data, then post-trains it on a small clean set, in three ways:
# SFT, SOAR and SOAR with LoRA, and draws what each model makes of the same prompts from the same noise.
# Safe to run again: finished stages are skipped, an interrupted one is resumed or redone. To start over, remove
# outputs/quickstart.

set -euo pipefail
cd "$(dirname "$0")/../.."
out=outputs/quickstart
mkdir -p "$out/.done"

# stage NAME COMMAND...: run the command unless it has succeeded before.
stage() {
    local name=$1
    shift
    if [ -e "$out/.done/$name" ]; then
        printf '\n=== %s: done before\n' "$name"
        return
    fi
    printf '\n=== %s\n' "$name"
    "$@"
    touch "$out/.done/$name"
}

printf '=== install\n'
[ -x .venv/bin/pip ] || python3 -m venv --clear .venv
.venv/bin/pip install --quiet --disable-pip-version-check \
    -r requirements.txt -r examples/quickstart/requirements.txt -c tests/constraints.txt
python=.venv/bin/python

# Messy pictures, of which some have wrong captions, to train the base model on; clean ones to post-train it on.
draw() {
    rm -rf "$out/world"
    $python examples/miniature/world.py "$out/world" --noisy 1500 --curated 1000 --unseen 10 --size 48
}

# The VAE learns from both sets; the text encoders stay random.
make_model() {
    $python examples/make_tiny_sd3.py "$out/small" --size small --overwrite
    $python examples/quickstart/train_vae.py "$out/small" "$out/world/noisy" "$out/world/curated"
}

# train SCRIPT DATA NAME ARGUMENTS...
train() {
    local script=$1 data=$2 name=$3
    shift 3
    $python "$script" --pretrained_model_name_or_path "$out/small" --train_data_dir "$out/world/$data" \
        --output_dir "$out/$name" --cache_dir "$out/cache" --resolution 48 --center_crop --max_sequence_length 12 \
        --cache_latents --cache_prompt_embeds --cond_dropout_rate 0.1 --train_batch_size 16 --mixed_precision no \
        --lr_warmup_steps 50 --checkpointing_steps 200 --checkpoints_total_limit 1 --resume_from_checkpoint latest \
        --report_to tensorboard --seed 0 "$@"
}

steps=600
# The authors' settings are 6 points, 40 steps and guidance 4.5; fewer points fit the time, larger steps a young model.
soar="--trajectory_length 1 --num_sampling_steps 10 --cfg_scale_sampling 3"
full="--max_train_steps $steps --learning_rate 2e-3 --lr_scheduler cosine"
# The base knows little yet, so the LoRA has much to learn: all large layers get one, not only the attention layers.
layers=attn.to_q,attn.to_k,attn.to_v,attn.to_out.0,attn.add_q_proj,attn.add_k_proj,attn.add_v_proj,attn.to_add_out
layers+=,attn2.to_q,attn2.to_k,attn2.to_v,attn2.to_out.0,ff.net.0.proj,ff.net.2,ff_context.net.0.proj,ff_context.net.2
layers+=,norm1.linear,norm1_context.linear
lora="--max_train_steps 450 --learning_rate 4e-3 --lr_scheduler cosine --rank 64 --lora_layers $layers"

# shellcheck disable=SC2086
{
    stage pictures draw
    stage toy-model make_model
    stage base train train_sd3_sft.py noisy base --max_train_steps 600 --learning_rate 1e-3 \
        --lr_scheduler constant_with_warmup
    stage SFT train train_sd3_sft.py curated sft --transformer "$out/base" $full
    stage SOAR train train_sd3_soar.py curated soar --transformer "$out/base" $full $soar
    stage SOAR-LoRA train train_sd3_soar_lora.py curated soar_lora --transformer "$out/base" $lora $soar
}

# compare NAME MODEL=FOLDER...: a sheet of the models' pictures.
compare() {
    local name=$1
    shift
    $python examples/quickstart/compare_models.py --pretrained_model_name_or_path "$out/small" --transformer "$out/base" \
        --models "$@" --output "$out/$name.png" --max_sequence_length 12 --num_inference_steps 20 --guidance_scale 3 \
        --prompts "a red circle" "a blue star" "two hearts" "three triangles" "four crosses" \
        "a square left of a heart" "a circle above a star" "a blue square and an orange heart"
}

stage samples compare samples base="$out/base" SFT="$out/sft" SOAR="$out/soar"
# By itself, as it has fewer steps and weights, and the base knows next to nothing: its shapes are blunter.
stage samples-lora compare samples_lora base="$out/base" SOAR="$out/soar" SOAR-LoRA="$out/soar_lora"
stage losses $python examples/quickstart/plot_losses.py SFT="$out/sft" SOAR="$out/soar" SOAR-LoRA="$out/soar_lora" \
    --output "$out/loss.png"

cat <<END

Look at
    $out/samples.png                                 the models' pictures, a row each; samples_lora.png the LoRA's
    $out/loss.png                                    the losses of the three post-training runs
    $out/soar_lora/pytorch_lora_weights.safetensors  the LoRA file, for pipeline.load_lora_weights
    $out/soar/README.md                              a model card; each run has one

The same for Stable Diffusion 3.5 Medium, on a GPU, with a folder of your images, a NAME.txt with its caption beside each:

    .venv/bin/accelerate launch train_sd3_soar_lora.py \\
        --pretrained_model_name_or_path stabilityai/stable-diffusion-3.5-medium \\
        --train_data_dir my_images --resolution 1024 --center_crop --cache_latents --cache_prompt_embeds \\
        --mixed_precision bf16 --gradient_checkpointing --train_batch_size 1 --gradient_accumulation_steps 4 \\
        --max_train_steps 1000 --validation_prompt "a photo of two clocks" --output_dir outputs/sd35-soar-lora
END
