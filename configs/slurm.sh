#!/bin/bash
# One run on several machines of a SLURM cluster, one process a GPU:
#   sbatch configs/slurm.sh --config configs/atari_fast.yaml
# What follows the script's name goes to `fit`; what stands before it (sbatch --nodes 4 ...) changes the lines below.
#SBATCH --job-name=lightning_dqn
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --output=slurm-%j.txt
#SBATCH --open-mode=append
# 90 seconds before the time is up all ranks get a signal: they save, and the job is requeued and resumes from there
#SBATCH --signal=SIGUSR1@90
#SBATCH --requeue

set -euo pipefail

# an environment of one's own is activated here: source .venv/bin/activate

# srun does not inherit the number of cores from sbatch
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

# all ranks must see this folder, in which runs/ is made; if one of them fails, the others need not wait for it
exec srun --kill-on-bad-exit=1 python -m lightning_dqn fit --trainer.strategy ddp "$@" \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE"
