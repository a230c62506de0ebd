#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Everything that examples/benchmark/README.md shows, into examples/benchmark/results/*.json; then the tables and the
# picture. What is there is not run again.
#
#     bash examples/benchmark/run.sh count    # any machine, 30 minutes: operations and memory at SD3.5-Medium's size
#     bash examples/benchmark/run.sh cpu      # any machine, 5 minutes: ratios of times of a small model
#     bash examples/benchmark/run.sh rehearse # any machine with 24 GB of memory: real runs of a random SD3.5-Medium
#     bash examples/benchmark/run.sh gpu      # one GPU: times and memory of what fits; `gpu chunks lora`: these parts
#     bash examples/benchmark/run.sh runs     # one GPU: whole runs as on cards of 8, 12, 16 and 24 GB
#     bash examples/benchmark/run.sh rollouts # one GPU: rollouts of reinforcement learning, stage by stage
#
# STEPS="--warmup 1 --steps 3" times fewer steps.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/benchmark results=${RESULTS:-examples/benchmark/results}
export HF_HUB_OFFLINE=1

cached="--cache_latents --cache_prompt_embeds"
bf16="--mixed_precision bf16"
one="$bf16 $cached --train_batch_size 1"

step=(
    "reference $bf16" "reference $bf16 --gradient_checkpointing"
    "reference $bf16 $cached" "reference $bf16 $cached --gradient_checkpointing"
    "soar $bf16 $cached" "soar $bf16 $cached --gradient_checkpointing"
    "sft $bf16 $cached" "sft $bf16 $cached --gradient_checkpointing"
    "soar $bf16 $cached --full_bf16"
)
nf4=(--bnb_quantization_config_path examples/configs/nf4.json --use_8bit_adam)
chunks=("soar $bf16 $cached") cost=() small=() lora=("soar_lora $bf16 $cached")
for chunk in 12 24 8 2 1; do chunks+=("soar $bf16 $cached --aux_batch_size $chunk"); done
for paths in 1 2; do
    for length in 1 2 4 6 8; do
        cost+=("soar $bf16 $cached --num_rollout_paths $paths --trajectory_length $length")
    done
done
for resolution in 512 1024; do
    for checkpointing in "" " --gradient_checkpointing"; do
        small+=("soar $one --full_bf16 --resolution $resolution$checkpointing")
        small_lora="soar_lora $one --rank 32 --resolution $resolution$checkpointing"
        small+=("$small_lora" "$small_lora ${nf4[*]}")
    done
done

benchmark() { # NAME PIPELINE FLAGS... -- CONFIGURATIONS...
    local name=$1
    shift
    python "$here/benchmark_step.py" --output "$results/$name.json" "$@"
}

whole() { # NAME LIMIT_GIB SCRIPT RESOLUTION FLAGS...: the recipe of the README, every stage of it, on a smaller card
    [ -e "$results/run_$1.json" ] && return
    while (($(jobs -rp | wc -l) >= ${WORKERS:-1})); do wait -n || failed=1; done
    python "$here/run_capped.py" "$2" --output "$results/run_$1.json" -- "$3" --resolution "$4" "${@:5}" $one --offload \
        --pretrained_model_name_or_path outputs/medium --train_data_dir "outputs/world_$4/curated" --max_train_steps 3 \
        --validation_prompt "two red circles" --validation_steps 2 --num_validation_images 1 --num_inference_steps 4 \
        --seed 0 --report_to none --output_dir "outputs/capped_$1" --overwrite_output_dir \
        >"outputs/capped_$1.log" 2>&1 &
}

make() { # SIZE FLAGS...
    [ -e "outputs/$1$2/model_index.json" ] || python examples/make_tiny_sd3.py "outputs/$1$2" --size "$1" ${2:+--configs_only}
}

case ${1:-} in
count)
    make medium _configs
    for part in step chunks cost small lora; do
        declare -n list=$part
        benchmark "count_$part" outputs/medium_configs --count_only "${list[@]}"
    done
    ;;
cpu)
    make small ""
    export OMP_NUM_THREADS=1
    benchmark cpu_step outputs/small --steps 20 \
        "reference --resolution 64" "soar $cached --resolution 64" "sft $cached --resolution 64" \
        "soar $cached --resolution 64 --gradient_checkpointing" "soar $cached --resolution 64 --torch_compile"
    ;;
rehearse)
    make rehearsal ""
    [ -d outputs/world_512 ] ||
        python examples/miniature/world.py outputs/world_512 --noisy 8 --curated 8 --unseen 8 --size 512
    python "$here/rehearse.py" outputs/rehearsal outputs/world_512/curated --output "$results/rehearsal.json"
    ;;
runs)
    make medium ""
    for size in 512 1024; do
        [ -d "outputs/world_$size" ] ||
            python examples/miniature/world.py "outputs/world_$size" --noisy 8 --curated 8 --unseen 8 --size $size
    done
    failed=0
    whole nf4_512 8 train_sd3_soar_lora.py 512 "${nf4[@]}"
    whole lora_512 12 train_sd3_soar_lora.py 512
    whole full_512 24 train_sd3_soar.py 512 --full_bf16
    whole nf4_1024 8 train_sd3_soar_lora.py 1024 "${nf4[@]}" --gradient_checkpointing
    whole full_512_16 16 train_sd3_soar.py 512 --full_bf16 --gradient_checkpointing
    whole lora_1024 12 train_sd3_soar_lora.py 1024 --gradient_checkpointing
    whole full_1024 24 train_sd3_soar.py 1024 --full_bf16 --gradient_checkpointing
    while (($(jobs -rp | wc -l))); do wait -n || failed=1; done
    ((failed)) && tail -n 3 outputs/capped_*.log && exit 1
    ;;
gpu)
    make medium ""
    compiled=("soar_lora $bf16 $cached --torch_compile" "soar $bf16 $cached --torch_compile"
        "soar $bf16 $cached --torch_compile --aux_batch_size 12" "sft $bf16 $cached --torch_compile")
    (($# > 1)) || set -- gpu step lora compiled chunks cost small
    for part in "${@:2}"; do
        declare -n list=$part
        benchmark "gpu_$part" outputs/medium --profile ${STEPS:-} --counted "$results"/count_*.json -- "${list[@]}"
    done
    ;;
rollouts)
    make medium ""
    small="$bf16 --gradient_checkpointing --no_text_encoder_3 --num_groups 2 --group_size 12 --train_batch_size 4"
    large="$bf16 --gradient_checkpointing --no_text_encoder_3 --num_groups 2 --group_size 16 --train_batch_size 16"
    nft="--num_train_sigmas 4 --old_rate 0.0075"
    window="--rollout_guidance 1 --sde_type cps --sde_noise_scale 0.8 --sde_window_size 3 --kl_weight 0"
    python examples/rl/time_rollouts.py outputs/medium --output "${RESULTS:-examples/rl/results}/rollouts.json" \
        "nft $large $nft" "nft $small $nft" "flow_grpo $large $window" "flow_grpo $small $window"
    ;;
*)
    sed -n '4,14p' "$0"
    exit 2
    ;;
esac
python "$here/report_benchmark.py" "$results"
