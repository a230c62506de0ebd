#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#SBATCH --job-name=soar --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --time=04:00:00
#SBATCH --signal=USR1@300 --requeue --open-mode=append
#
# A run that outlives its time limit: five minutes before the end Slurm signals every process, the step is finished, a
# checkpoint written, and the job queued again until the run is done.
#
#     sbatch examples/accelerate_configs/slurm.sh train_sd3_soar.py --pretrained_model_name_or_path ... \
#         --train_data_dir ... --mixed_precision bf16 --output_dir ... --resume_from_checkpoint latest
#
# Slurm starts the processes itself, one a GPU: unlike `accelerate launch` and `torchrun` it keeps their exit code, 75
# where a signal ended the run after a checkpoint.
set -uo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}
# shellcheck disable=SC2016
srun bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec python "$@"' soar "$@"
code=$?
[ "$code" = 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
