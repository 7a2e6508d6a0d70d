#!/usr/bin/env bash
# Two machines of eight GPUs each: `sbatch docs/slurm.sh` in the repository's root, on a file system that both can see.
#SBATCH --job-name=grpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# --resume starts the run where there is none; a job that is sent again goes on with it.
srun .venv/bin/torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 8 --max_restarts 3 \
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$first:29500" \
    -m grpo_core.train --preset t4 --prompts_per_step 64 --output_dir runs/grpo --resume
