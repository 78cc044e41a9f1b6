#!/usr/bin/env bash
# Trains under Open MPI: HOSTS=node1:8,node2:8 bash launch/clusters/openmpi.sh --config RECIPE.yaml key=value ...
# Rank 0 runs on the first host. Open MPI takes the output of each rank into logs/ besides.
set -euo pipefail
HOSTS="${HOSTS:-localhost:2}"
[[ -f .venv/bin/activate ]] && source .venv/bin/activate
first="${HOSTS%%[:,]*}"
exec mpirun --host "$HOSTS" --map-by slot --bind-to none --output-filename logs \
  -x PATH -x MASTER_ADDR="${MASTER_ADDR:-$first}" -x MASTER_PORT="${MASTER_PORT:-29500}" \
  -x OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" ${MPI_FLAGS:-} \
  python -u "${SCRIPT:-launch/train.py}" "$@"
