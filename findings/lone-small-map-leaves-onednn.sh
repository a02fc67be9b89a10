#!/usr/bin/env bash
# PyTorch 2.13.0, CPU, fp32: conv3d of one small map does not use oneDNN; of the same map in a batch of two it does.
# Expected: one implementation for one layer, so that a sample alone is computed as it is in a batch; or a choice that
# goes by the size of the map.
# Seen, with kernels of 3 and one group: a batch of 1 runs aten::slow_conv3d where channels x first axis x second axis
# is at most 20480, whatever the third axis: 64 x 6 x 18 x 18 does, 64 x 18 x 18 x 6 does not. In a batch of two nearly
# all values of the first sample differ in their last bits; above 20480 they are equal. Kernels of 5 and several groups
# are left to oneDNN. No flag or warning.
# It is meant so since 2020 (PyTorch pull request 40610: for some 2D layers the native way was faster); the rule counts
# the axes that a 2D convolution has, and nothing on it was found in the documentation.
# Means: the deep layers of a 3D network run another way for one crop than for several: compare bits and time
# convolutions at the batch size that is used. Fails if both batch sizes are computed alike.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/probe.py" <<'PY'
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

torch.manual_seed(0)
torch.set_num_threads(1)
print("torch", torch.__version__)


def convolve(x, weight, **options):
    """(y, the name of what computed it)"""
    with profile(activities=[ProfilerActivity.CPU]) as run:
        y = F.conv3d(x, weight, padding=weight.shape[-1] // 2, **options)
    names = {event.name for event in run.events()}
    return y, next(name for name in ("mkldnn_convolution", "slow_conv3d") if f"aten::{name}" in names)


def compare(channels, shape, kernel=3, groups=1):
    x = torch.randn(2, channels, *shape)
    weight = 0.02 * torch.randn(channels, channels // groups, kernel, kernel, kernel)
    (alone, one), (both, two) = convolve(x[:1], weight, groups=groups), convolve(x, weight, groups=groups)
    other = (alone != both[:1]).float().mean().item()
    size = " x ".join(map(str, (channels, *shape)))
    print(f"{size}: channels x first x second axis {channels * shape[0] * shape[1]};",
          f"alone {one}, in a batch of two {two}, {other:.0%} of its values differ")
    assert two == "mkldnn_convolution"
    assert (one == "slow_conv3d") == (other > 0)
    return one


slow, onednn = "slow_conv3d", "mkldnn_convolution"
assert compare(64, (8, 8, 8)) == slow
assert compare(64, (16, 20, 40)) == slow  # 20480
assert compare(320, (8, 8, 8)) == slow  # 20480
assert compare(321, (8, 8, 8)) == onednn
assert compare(64, (6, 18, 18)) == slow
assert compare(64, (18, 18, 6)) == onednn  # the same map, turned
print("kernel 5, two groups:")
assert compare(64, (8, 8, 8), kernel=5) == onednn
assert compare(64, (8, 8, 8), groups=2) == onednn
PY
cd "$folder" && KINETO_LOG_LEVEL=99 venv/bin/python probe.py
