#!/usr/bin/env bash
# Triton 3.9.0: TRITON_INTERPRET set in os.environ after "import triton" turns the interpreter on for one's own
# kernels, but not for tl.zeros and what else of triton.language is itself a kernel.
# Expected: kernels that are defined after the variable was set run as if it had been set before the import, or none
# does: a half is not expected where arithmetic, loads, stores and tl.full work.
# Seen: set before the import, tl.full, tl.zeros, tl.sum and tl.max do; set after it, tl.full does and the other three
# end with InterpreterError, "Cannot call @triton.jit'd outside of the scope of a kernel", though they were called in
# one.
# Near in the trackers: triton 11757 (closed, that message of tl.zeros), 4317 (a maintainer: set it before the import).
# Means: in test suites set it before anything imports triton, torch included where that does. Fails if the late
# setting works as the early one does, or not at all.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps triton==3.9.0  # not what a CUDA build pins
cat > "$folder/probe.py" <<'PY'
import os, sys

if sys.argv[1] == "early":
    os.environ["TRITON_INTERPRET"] = "1"
import torch, triton, triton.language as tl

os.environ["TRITON_INTERPRET"] = "1"


@triton.jit
def full(out, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), tl.full((N,), 3.0, tl.float32))


@triton.jit
def zeros(out, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), tl.zeros((N,), tl.float32) + 3)


@triton.jit
def summed(out, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), tl.sum(tl.full((N,), 0.75, tl.float32), axis=0))


@triton.jit
def largest(out, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), tl.max(tl.full((N,), 3.0, tl.float32), axis=0))


worked = {}
for name, kernel in {"tl.full": full, "tl.zeros": zeros, "tl.sum": summed, "tl.max": largest}.items():
    out = torch.empty(4)
    try:
        kernel[(1,)](out, N=4)
        worked[name] = out.tolist() == [3, 3, 3, 3]
        print(f"triton {triton.__version__}, {sys.argv[1]}: {name} gives {out.tolist()}")
    except triton.runtime.errors.InterpreterError as error:
        worked[name] = False
        print(f"triton {triton.__version__}, {sys.argv[1]}: {name} ends with {type(error).__name__}: {error}")
early = sys.argv[1] == "early"
assert worked == {"tl.full": True, "tl.zeros": early, "tl.sum": early, "tl.max": early}, worked
PY
cd "$folder"
export TRITON_CACHE_DIR="$folder/cache" OMP_NUM_THREADS=1
for when in early late; do
    env -u TRITON_INTERPRET venv/bin/python probe.py "$when"
done
