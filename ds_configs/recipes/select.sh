#!/usr/bin/env bash
# Data selection from end to end, each stage starting from what the previous one wrote (docs/selection.md):
#   bash ds_configs/recipes/select.sh
# convert (the demo's mixture of experts) -> 1 train its gates -> 2 select dialogues -> 3 fine-tune the model on them, and
# on as many random ones -> 4 evaluate both against the model.
# Interrupted at any point, the same command goes on; finished stages are not repeated.
set -euo pipefail
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
run() {
    local port
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    deepspeed --quiet --master_port "$port" ${PROCESSES:-} "$@"
}

say "A mixture of experts"
[ -d runs/demo/model ] || bash launch/demo.sh

say "Convert"
[ -f models/select/config.json ] || python launch/convert.py select-moe --model runs/demo --out models/select
python launch/convert.py compare --model models/select --original runs/demo

say "Stage 1: train the quality gates"
python launch/prepare.py fetch shakespeare_chat --out data/demo/chat
run launch/train.py --config ds_configs/recipes/select_stage1.yaml

say "Stage 2: score, cluster, pick"
run launch/select_data.py --config ds_configs/recipes/select.yaml

say "Stage 3: fine-tune on the selected rows, and on as many random ones"
run launch/train.py --config ds_configs/recipes/select_stage3.yaml
run launch/train.py --config ds_configs/recipes/select_stage3.yaml output=runs/select_random \
    data.train=runs/select/random_data.jsonl

say "Stage 4: evaluate"
python launch/prepare.py fetch piqa --out data/tasks
run launch/evaluate.py harness --model runs/select_stage3 --against base=runs/demo random=runs/select_random \
    --tasks data/tasks/local_piqa.yaml --limit 200 --json runs/select_stage3/harness.json
