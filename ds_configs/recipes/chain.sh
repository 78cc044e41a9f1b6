#!/usr/bin/env bash
# From raw text to a model that answers, each stage starting from what the previous one wrote:
#   bash ds_configs/recipes/chain.sh
# pretrain (the demo's mixture of experts on Shakespeare) -> sft (dialogues of his plays) -> dpo (the reply given against
# the reply to something else) -> chat.
# Interrupted at any point, the same command goes on; finished stages are not repeated.
set -euo pipefail
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
train() {
    local port
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    deepspeed --quiet --master_port "$port" ${PROCESSES:-} launch/train.py "$@"
}

say "Pretrain"
bash launch/demo.sh

say "Fine-tune on dialogues"
python launch/prepare.py fetch shakespeare_chat --out data/demo/chat
train --config ds_configs/recipes/sft.yaml output=runs/demo_sft model.path=runs/demo \
    data.train=data/demo/chat/train.jsonl data.val=data/demo/chat/val.jsonl data.seq_len=256 \
    train.dtype=fp32 train.accumulation_steps=1 train.max_steps=300 optim.lr=3e-4 \
    'eval.prompts=["Who goes there?"]' eval.max_new_tokens=40 eval.max_windows=100

say "Prefer the reply that was given"
train --config ds_configs/recipes/dpo.yaml output=runs/demo_dpo model.path=runs/demo_sft lora.enabled=false \
    data.train=data/demo/chat/train_pairs.jsonl data.val=data/demo/chat/val_pairs.jsonl data.seq_len=256 \
    train.dtype=fp32 train.batch_size=4 train.max_steps=100 optim.lr=1e-4 eval.max_windows=100

say "Chat"
echo "Who goes there?" | python launch/generate.py --model runs/demo_dpo --interactive --chat --max-new-tokens 60 --seed 1
