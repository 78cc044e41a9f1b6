#!/usr/bin/env bash
# What `make demo` runs, each line as a user would type it. Finished steps are not repeated.
set -euo pipefail
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

say "Fetch public-domain text, clean it, train a tokenizer, tokenise"
python launch/prepare.py fetch shakespeare --out data/demo/raw
python launch/prepare.py clean data/demo/raw/train.jsonl --out data/demo/train.jsonl
python launch/prepare.py clean data/demo/raw/val.jsonl --out data/demo/val.jsonl
python launch/prepare.py tokenizer data/demo/train.jsonl --out data/demo/tokenizer --vocab-size 4096
python launch/prepare.py tokens data/demo/train.jsonl --tokenizer data/demo/tokenizer --out data/demo/train.bin
python launch/prepare.py tokens data/demo/val.jsonl --tokenizer data/demo/tokenizer --out data/demo/val.bin

say "Train a mixture-of-experts decoder with DeepSpeed ZeRO-2"
deepspeed --quiet --master_port "$(free_port)" ${PROCESSES:-} launch/train.py --config ds_configs/recipes/demo.yaml

say "Evaluate the exported model"
python launch/evaluate.py perplexity --model runs/demo --data data/demo/val.bin --window 256

say "Score the beginning of every passage of the held-out text"
deepspeed --quiet --master_port "$(free_port)" ${PROCESSES:-} launch/score.py --model runs/demo \
  --data data/demo/val.jsonl --metric entropy perplexity --out runs/demo/scores.jsonl --overwrite

say "Generate"
python launch/generate.py --model runs/demo --prompt $'ROMEO.\n' --max-new-tokens 80 --seed 1

say "Done"
echo "report of the training: $PWD/runs/demo/report.html"
echo "report of the scores:   $PWD/runs/demo/scores.jsonl.d/report.html"
