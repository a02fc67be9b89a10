#!/usr/bin/env bash
# PyTorch 2.13.0 (oneDNN 3.12), CPU with AVX-512 and bf16: the weight gradient of a 3D convolution of a small map in bf16
# is what lies in memory.
# Expected: the gradient that single precision gives, within bf16's rounding (3 decimal digits).
# Seen: Conv3d(64, 64, 3, padding=1) on maps that are 2 deep, whatever their height and width: values up to 1e38 or NaN,
# others from run to run. At depths 1, 3, 4 and more it is right; so it is in the forward pass, in single precision, and
# for 8 channels. Kernels of 5 do the same at depths of 2 to 4. No warning. With DNNL_VERBOSE=1 the implementation is
# jit_bf16:avx512_core_bf16, backward_weights.
# Near in the trackers: oneDNN 5717 (bf16 matrix products with AMX). Nothing on this gradient was found.
# Means: in 3D networks trained in bf16 on CPUs (torch.autocast) the deepest maps of small inputs are such maps; where what
# lies in memory is not huge, the gradient is wrong without a word. Convolve maps shallower than the kernel in single
# precision. Fails if the gradient is right at depth 2, as it is on CPUs without these instructions.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/probe.py" <<'PY'
import torch
import torch.nn.functional as F

torch.manual_seed(0)
torch.set_num_threads(1)
print("torch", torch.__version__)


def off(depth, channels=64, tries=5):
    """Largest difference of the bf16 gradient from that in single precision, relative to the largest value."""
    x = torch.randn(16, channels, depth, 3, 3).bfloat16()
    weight = (0.02 * torch.randn(channels, channels, 3, 3, 3)).bfloat16()
    exact = weight.float().requires_grad_()
    y = F.conv3d(x.float(), exact, padding=1)
    gradient = torch.randn_like(y).bfloat16()
    y.backward(gradient.float())
    worst = 0.0
    for _ in range(tries):
        memory = [torch.full((n,), 3e38) for n in range(10_000, 400_000, 20_000)]  # that is used again
        del memory
        found = weight.clone().requires_grad_()
        F.conv3d(x, found, padding=1).backward(gradient)
        error = ((found.grad.float() - exact.grad).abs().max() / exact.grad.abs().max()).item()
        worst = max(worst, error) if error == error else float("inf")
    return worst


found = {depth: off(depth) for depth in (1, 2, 3, 4, 8)}
for depth, error in found.items():
    print(f"map of {depth} x 3 x 3, 64 channels: off by {error:.2g}")
print(f"map of 2 x 3 x 3, 8 channels: off by {off(2, 8):.2g}")
assert all(error < 0.02 for depth, error in found.items() if depth != 2) and off(2, 8) < 0.02
assert found[2] > 1
PY
cd "$folder" && venv/bin/python probe.py
