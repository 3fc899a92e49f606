#!/bin/bash
# One run on several machines of a SLURM cluster, one process per GPU:
#   sbatch configs/slurm.sh --config configs/atari_fast.yaml
# Arguments after the script's name are passed to `fit`; options before it (sbatch --nodes 4 ...) override those below.
#SBATCH --job-name=lightning_dqn
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --output=slurm-%j.txt
#SBATCH --open-mode=append
# 90 s before the time limit all ranks get a signal and save a checkpoint; the job is requeued and resumes from it
#SBATCH --signal=SIGUSR1@90
#SBATCH --requeue

set -euo pipefail

# activate a virtual environment here: source .venv/bin/activate

# srun does not inherit the number of cores from sbatch
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

# a folder shared by all ranks, in which runs/ is created; if a rank fails, srun ends the others
exec srun --kill-on-bad-exit=1 python -m lightning_dqn fit --trainer.strategy ddp "$@" \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE"
