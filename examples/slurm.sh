#!/usr/bin/env bash
# Train over several machines under Slurm, one process a GPU:
#
#   sbatch --nodes 4 examples/slurm.sh CONFIG.toml RUN --parallel.tp 8
#
# RUN and the data must be on a file system that all machines share. Slurm sends SIGUSR1 five minutes before the time
# limit: the run saves at the next step boundary, and the job asks to be queued again. It then goes on from there.
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

CONFIG=${1:?CONFIG.toml}
RUN=${2:?RUN, a folder that all machines see}
shift 2

what=("$CONFIG" --out "$RUN")
if [ -e "$RUN/config.toml" ]; then
  what=(--resume "$RUN")
fi

code=0
srun --kill-on-bad-exit=1 megakern train "${what[@]}" "$@" || code=$?
if [ "$code" -eq 138 ]; then # 128 + SIGUSR1: saved and stopped in time
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
