#!/usr/bin/env bash
# MONAI 1.6.1, surface-distance 0.1 and MedPy 0.5.2: one pair of masks has a 95 % Hausdorff distance of 2.0 or of 3.6
# voxels, and a surface Dice of 0.55 or of 0.75 at a tolerance of one, all of them by default.
# Expected: figures of the same name that can be compared between papers, to the width of a voxel.
# Seen: a sphere against the same one moved by 2 voxels and a small second one. HD95: MedPy 2.0, surface-distance 3.61,
# MONAI 3.64. MedPy takes the percentile of the distances of both directions together, the others the larger of two.
# Surface Dice at 0.5, 1 and 2 voxels: MONAI 0.26, 0.55 and 0.97, surface-distance 0.38, 0.75 and 0.97; with
# use_subvoxels=True MONAI gives just those. MONAI's documentation says that its default counts voxels of the edge.
# MedPy's definition is known (issue 138, open), its documentation does not have it.
# Means: name the library and its options beside such a figure. Fails if the default figures agree.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 monai==1.6.1 surface-distance==0.1 \
    MedPy==0.5.2 scipy==1.17.1 numpy==2.4.6
cat > "$folder/probe.py" <<'PY'
from importlib.metadata import version

import numpy as np, surface_distance, torch
from medpy.metric.binary import hd95
from monai.metrics import compute_hausdorff_distance, compute_surface_dice

print(*(f"{name} {version(name)}" for name in ("monai", "surface-distance", "MedPy", "scipy")), sep=", ")
TOLERANCES = (0.5, 1, 2)


def sphere(centre, radius):
    return sum((axis - c) ** 2 for axis, c in zip(np.indices((48, 48, 48)), centre)) <= radius**2


truth = sphere((24, 24, 24), 12)
found = sphere((26, 24, 24), 12) | sphere((36, 36, 24), 3)
surfaces = surface_distance.compute_surface_distances(truth, found, (1, 1, 1))
tensors = [torch.from_numpy(mask)[None, None] for mask in (found, truth)]
distances = {
    "MedPy": hd95(found, truth),
    "surface-distance": surface_distance.compute_robust_hausdorff(surfaces, 95),
    "MONAI": compute_hausdorff_distance(*tensors, include_background=True, percentile=95).item(),
}
for name, value in distances.items():
    print(f"HD95, {name}: {value:.3f}")


def monais(**options):
    return [compute_surface_dice(*tensors, [t], include_background=True, **options).item() for t in TOLERANCES]


dice = {
    "MONAI": monais(),
    "MONAI, use_subvoxels=True": monais(use_subvoxels=True, spacing=[1, 1, 1]),
    "surface-distance": [surface_distance.compute_surface_dice_at_tolerance(surfaces, t) for t in TOLERANCES],
}
for name, values in dice.items():
    print(f"surface Dice at {TOLERANCES}, {name}: {[round(float(value), 3) for value in values]}")
assert distances["MedPy"] < 2.5 and distances["MONAI"] > 3.5 and distances["surface-distance"] > 3.5
assert np.allclose(dice["MONAI, use_subvoxels=True"], dice["surface-distance"], atol=1e-5)
assert np.all(np.subtract(dice["surface-distance"], dice["MONAI"])[:2] > 0.1)
PY
cd "$folder" && OMP_NUM_THREADS=1 venv/bin/python -W ignore probe.py
