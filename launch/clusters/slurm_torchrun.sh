#!/usr/bin/env bash
# The same with torchrun, one task per machine: sbatch launch/clusters/slurm_torchrun.sh --config RECIPE.yaml key=value ...
#SBATCH --job-name=ds_llm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --signal=TERM@300
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
[[ -f .venv/bin/activate ]] && source .venv/bin/activate
first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "${PROCESSES:-8}" \
  --rdzv_backend c10d --rdzv_endpoint "$first:${MASTER_PORT:-29500}" --rdzv_id "$SLURM_JOB_ID" \
  --log-dir logs --redirects 3 --tee 3 "${SCRIPT:-launch/train.py}" "$@"
