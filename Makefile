# make demo    set up, then train, evaluate, score, generate and report on a small model
# make test    set up, then run the tests and compile every kernel for sm_80 and sm_90
# make setup   only the environment in .venv, for training
# make lock    write the exact versions that are installed (constraints-*.txt) anew
# make test-newest, test-oldest    a short run of everything with the newest and the oldest versions of the libraries
PYTHON ?= python3
BIN := .venv/bin
UV := uv==0.13.9
export HF_HUB_OFFLINE := 1
ifeq ($(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c GPU),)
  export DS_ACCELERATOR := cpu
  PROCESSES := --num_gpus 2
  LOCK := constraints-cpu.txt
  TRAIN := .
  TEST := .[test]
else
  LOCK := constraints-cuda.txt
  TRAIN := .[gpu]
  TEST := .[test,gpu]
endif
SMOKE := tests/versions_smoke.py tests/compat/test_names.py tests/multirank/test_engine.py tests/multirank/test_reused.py
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint $(LOCK)

.PHONY: setup demo test lint lock test-newest test-oldest clean

setup: .venv/ready

# build tools and torch first: the rest is then built beside them, not in environments of their own
.venv/ready: setup.py $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { echo "error: Python 3.11, 3.12 or 3.13 is needed; name one with make PYTHON=python3.12 ..."; exit 1; }
	@command -v g++ >/dev/null || { echo "error: g++ is needed, DeepSpeed compiles its CPU parts with it (Debian: apt-get install g++)"; exit 1; }
	@echo "== Set up .venv from $(LOCK), 1 of 2: torch"
	@$(PYTHON) -m venv .venv || { echo "error: the venv module is needed (Debian: apt-get install python3-venv)"; exit 1; }
	@$(PIP) setuptools wheel ninja torch
	@echo "== Set up .venv from $(LOCK), 2 of 2: DeepSpeed, transformers and what they need"
	@$(PIP) --no-build-isolation --editable '$(TRAIN)'
	@touch $@

.venv/ready-test: .venv/ready
	@echo "== Add to .venv what the tests need: lm-eval, optuna, wandb, Triton"
	@$(PIP) --no-build-isolation --editable '$(TEST)'
	@touch $@

demo: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" PROCESSES="$(PROCESSES)" bash launch/demo.sh

test: .venv/ready-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m ds_llm.kernels.compile_check

lint: .venv/ready-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

# exact versions of all packages that the bounds of setup.py lead to today, for Python 3.11 to 3.13 on Linux
lock: .venv-uv/bin/uv
	.venv-uv/bin/uv pip compile setup.py --extra test --extra gpu --extra qlora --universal --python-version 3.11 \
	  --upgrade --quiet --no-header --annotation-style line --output-file constraints-cuda.txt
	grep -vE '^(nvidia|cuda)-' constraints-cuda.txt > constraints-cpu.txt

# in an environment of its own: several GB of torch, of which there is no CPU build of these versions
test-oldest: .venv-uv/bin/uv
	.venv-uv/bin/uv venv --quiet --clear --python $(PYTHON) .venv-oldest
	.venv-uv/bin/uv pip install --quiet --python .venv-oldest --resolution lowest-direct --editable '.[test]'
	.venv-oldest/bin/python -m pytest $(SMOKE)

test-newest: .venv-uv/bin/uv
	.venv-uv/bin/uv venv --quiet --clear --python $(PYTHON) .venv-newest
	$(PYTHON) -m ds_llm.compat.versions > .venv-newest/lower-bounds.txt
	.venv-uv/bin/uv pip install --quiet --python .venv-newest --upgrade --override .venv-newest/lower-bounds.txt --editable '.[test]'
	.venv-newest/bin/python -m pytest $(SMOKE)

.venv-uv/bin/uv: Makefile
	$(PYTHON) -m venv .venv-uv && .venv-uv/bin/pip install --quiet --disable-pip-version-check "$(UV)"
	@touch $@

clean:
	rm -rf .venv .venv-uv .venv-newest .venv-oldest data/demo runs/demo
