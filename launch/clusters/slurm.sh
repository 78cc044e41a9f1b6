#!/usr/bin/env bash
# Trains under Slurm, one task per process: sbatch launch/clusters/slurm.sh --config ds_configs/recipes/pretrain.yaml key=value ...
# Change the numbers below, or override them: sbatch --nodes 4 launch/clusters/slurm.sh ...
#SBATCH --job-name=ds_llm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --signal=TERM@300 # five minutes before the end: the run saves and exits with 75
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
[[ -f .venv/bin/activate ]] && source .venv/bin/activate
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
mkdir -p logs
# Ranks and the meeting point come from the variables of srun (ds_llm/distributed/launchers.py); each rank has a log of its own. No
# --kill-on-bad-exit: the ranks end each other, and one that has saved and exits with 75 must not have the others killed.
srun --open-mode=append --output="logs/%j-rank%t.log" --error="logs/%j-rank%t.log" \
  python -u "${SCRIPT:-launch/train.py}" "$@"
code=$?
if ((code == 75)); then # interrupted after saving: the same job again goes on from there
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
