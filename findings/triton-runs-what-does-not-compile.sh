#!/usr/bin/env bash
# Triton 3.9.0: a kernel whose parameters are annotated with typing.Any or object runs in the interpreter
# (TRITON_INTERPRET=1) and does not compile.
# Expected: annotations of other types than Triton's are passed over, as they are for "float", or refused by both.
# Seen: in the interpreter all four of the same kernel (no annotation, float, Any, object) give the right values.
# Compiled for sm_90, which needs no GPU, no annotation and float are done; Any ends with a CompilationError on global
# variables that are no constexpr, object with NameError('object is not defined'), each at the annotation.
# Near in the trackers: triton 1974 (open, NoReturn as the type that is returned).
# Means: tests in the interpreter do not show that a kernel compiles; triton.compile with a GPUTarget does, without a
# GPU. Where a linter wants annotations, leave kernels out. Fails if all of them compile, or the interpreter refuses
# one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps triton==3.9.0  # not what a CUDA build pins
cat > "$folder/probe.py" <<'PY'
import sys
from typing import Any

import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget


@triton.jit
def without(out, value, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), tl.load(out + tl.arange(0, N)) + 2 * value)


@triton.jit
def with_float(out, value: float, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), tl.load(out + tl.arange(0, N)) + 2 * value)


@triton.jit
def with_any(out: Any, value: Any, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), tl.load(out + tl.arange(0, N)) + 2 * value)


@triton.jit
def with_object(out: object, value: object, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), tl.load(out + tl.arange(0, N)) + 2 * value)


KERNELS = {"no annotation": without, "float": with_float, "Any": with_any, "object": with_object}
if sys.argv[1] == "interpret":
    print("triton", triton.__version__, "torch", torch.__version__)
    for name, kernel in KERNELS.items():
        out = torch.ones(4)
        kernel[(1,)](out, 1.5, N=4)
        print(f"{name}: interpreted, {out.tolist()}")
        assert out.tolist() == [4, 4, 4, 4]
else:
    compiled = {}
    for name, kernel in KERNELS.items():
        signature = {"out": "*fp32", "value": "fp32", "N": "constexpr"}
        source = triton.compiler.ASTSource(kernel, signature=signature, constexprs={"N": 4})
        try:
            binary = triton.compile(source, target=GPUTarget("cuda", 90, 32))
            compiled[name] = "ptx" in binary.asm
            print(f"{name}: compiled")
        except triton.CompilationError as error:
            compiled[name] = False
            print(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:160]} ...")
    assert compiled == {"no annotation": True, "float": True, "Any": False, "object": False}
PY
cd "$folder"
export TRITON_CACHE_DIR="$folder/cache" OMP_NUM_THREADS=1
TRITON_INTERPRET=1 venv/bin/python probe.py interpret
env -u TRITON_INTERPRET venv/bin/python -W ignore probe.py compile
