# make demo    set up, then train, evaluate, score, generate and report on a small model
# make test    set up, then run the tests and compile every kernel for sm_80 and sm_90
# make setup   only the environment in .venv
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1
ifeq ($(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c GPU),)
  export DS_ACCELERATOR := cpu
  PROCESSES := --num_gpus 2
  # the CPU build where a package index has one; without a pin, CUDA's gigabytes come along
  TORCH := torch==2.13.0
else
  TORCH := torch>=2.11
endif

.PHONY: setup demo test lint clean

setup: .venv/ready

.venv/ready: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or later is needed; name one with make PYTHON=python3.11 ..."; exit 1; }
	@command -v g++ >/dev/null || { echo "error: g++ is needed, DeepSpeed compiles its CPU parts with it (Debian: apt-get install g++)"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "error: the venv module is needed (Debian: apt-get install python3-venv)"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

demo: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" PROCESSES="$(PROCESSES)" bash launch/demo.sh

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m ds_llm.kernels.compile_check

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf .venv data/demo runs/demo
