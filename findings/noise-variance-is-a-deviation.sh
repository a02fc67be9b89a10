#!/usr/bin/env bash
# batchgeneratorsv2 0.3.6 (the augmentations of nnU-Net): noise_variance of GaussianNoiseTransform is the standard
# deviation of the noise.
# Expected: a variance, as the parameter is called: of 0.25 the deviation is 0.5.
# Seen: noise_variance 0.01, 0.25 and 4 give deviations of 0.01, 0.25 and 4, not 0.1, 0.5 and 2. The default, 0 to 0.1,
# so is noise of variance 0 to 0.01. batchgenerators 0.25.5 did the same.
# There is no documentation of the parameter; nothing on it was found in the trackers.
# Means: nnU-Net's "variance of 0 to 0.1" is std=0.1 in MONAI's RandGaussianNoise (which draws from 0 to std), not
# std=0.32. Fails if the square of the deviation is the number that is given.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps batchgeneratorsv2==0.3.6  # it needs no more
cat > "$folder/probe.py" <<'PY'
from importlib.metadata import version

import torch
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform

print("batchgeneratorsv2", version("batchgeneratorsv2"), "torch", torch.__version__)
torch.manual_seed(0)
for given in (0.01, 0.25, 4.0):
    even = torch.zeros(1, 64, 64, 64)
    noisy = GaussianNoiseTransform(noise_variance=(given, given), p_per_channel=1)(image=even)["image"]
    deviation = noisy.std().item()
    print(f"noise_variance {given:g}: deviation {deviation:.3g}, of a variance it would be {given**0.5:.3g}")
    assert abs(deviation / given - 1) < 0.02
PY
cd "$folder" && OMP_NUM_THREADS=1 venv/bin/python -W ignore probe.py
