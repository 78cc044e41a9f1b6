#!/usr/bin/env bash
# Fetch the wheels that a GPU machine with Python 3.12, torch and transformers but no network may lack into FOLDER:
#
#   benchmarks/gpu_wheels.sh FOLDER
#
# Versions are those of this environment (PYTHON, by default .venv's), and the newest ones of what it lacks. `python -m
# benchmarks.gpu_check --wheels FOLDER` installs those that the machine lacks.
set -euo pipefail
out=${1:?usage: benchmarks/gpu_wheels.sh FOLDER}
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
limit_mb=40
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1
mkdir -p "$out"

# deepspeed's needs; ours; what the kernel table and the trainers' benchmark compare with; what tests/kernels import
names=(pydantic pydantic-core typing-inspection annotated-types hjson msgpack py-cpuinfo einops ninja psutil
  omegaconf datasets dill multiprocess xxhash zstandard filelock
  liger-kernel cut-cross-entropy trl
  pytest pluggy iniconfig pytest-timeout pytest-xdist execnet hypothesis sortedcontainers)

pinned() { # NAME==VERSION of what is installed here, else NAME
  "$python" -c 'import sys
from importlib.metadata import PackageNotFoundError, version
try:
    print(sys.argv[1] + "==" + version(sys.argv[1]))
except PackageNotFoundError:
    print(sys.argv[1])' "$1"
}

platforms=()
for glibc in 2_28 2_27 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
for old in 2014 2010 1; do platforms+=(--platform "manylinux${old}_x86_64"); done
for name in "${names[@]}"; do
  wanted=$(pinned "$name")
  echo "$wanted"
  "$python" -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
    -d "$out" "$wanted"
done
# published as source: a wheel without compiled operators is pure Python
wanted=$(pinned deepspeed)
echo "$wanted (built)"
DS_BUILD_OPS=0 "$python" -m pip wheel --no-deps --no-build-isolation -w "$out" "$wanted"

for wheel in "$out"/*.whl; do
  case ${wheel##*/} in
    *-py3-none-any.whl | *-py2.py3-none-any.whl | *-py312-none-any.whl) ;;
    *-cp312-cp312-*x86_64.whl | *-cp3*-abi3-*x86_64.whl | *-py3-none-*x86_64.whl | *-py2.py3-none-*x86_64.whl) ;;
    *) echo "error: $wheel: not for Python 3.12 on x86-64" >&2 && exit 1 ;;
  esac
done
size=$(du -cm "$out"/*.whl | tail -1 | cut -f1)
((size < limit_mb)) || { echo "error: $out: $size MB, more than $limit_mb MB" >&2 && exit 1; }
echo "$(ls "$out"/*.whl | wc -l) wheels, $size MB, in $out"
