#!/usr/bin/env bash
# MONAI 1.6.1: Rand3DElastic with rotate_range turns the voxels of a MetaTensor and leaves its affine as it was; RandAffine
# with the same rotate_range moves the affine along.
# Expected: one convention. With RandAffine a voxel keeps its place in the world, so that the augmented volume, saved as
# NIfTI, lies on the original; and what was done stands in applied_operations.
# Seen: after a turn by 0.5 radians without any elastic displacement a bright spot 20 mm from the middle stands 9.9 mm from
# where it was, by the volume's own affine; applied_operations is empty. No warning. RandAffine: within 0.05 mm.
# The documentation of both has the same text on rotate_range; nothing on the affine of Rand3DElastic was found.
# Means: give coordinates, boxes or saved volumes after Rand3DElastic an affine of your own. Fails if the affine follows.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 monai==1.6.1 numpy==2.4.6
cat > "$folder/probe.py" <<'PY'
import monai, numpy as np, torch
from monai.data import MetaTensor
from monai.transforms import Rand3DElastic, RandAffine

print("monai", monai.__version__, "torch", torch.__version__)
volume = torch.zeros(1, 32, 32, 32)
volume[0, 24:28, 15:17, 15:17] = 100
volume = MetaTensor(volume, affine=np.diag([2.0, 2, 2, 1]))

def place(image):
    """(3,) mm of the spot's middle, by the image's own affine."""
    voxels = np.indices(image.shape[1:]).reshape(3, -1)
    weights = image[0].numpy().ravel()
    affine = np.asarray(image.affine)
    return affine[:3, :3] @ ((voxels * weights).sum(1) / weights.sum()) + affine[:3, 3]

turn = {"prob": 1.0, "rotate_range": (0, 0, (0.5, 0.5)), "padding_mode": "zeros"}  # exactly 0.5 radians
moved, followed = {}, {}
for transform in (RandAffine(**turn), Rand3DElastic(sigma_range=(5, 5), magnitude_range=(0, 0), **turn)):
    name = type(transform).__name__
    turned = transform.set_random_state(0)(volume)
    moved[name] = np.linalg.norm(place(turned) - place(volume))
    followed[name] = not np.allclose(turned.affine, volume.affine)
    operations = [one["class"] for one in turned.applied_operations]
    print(f"{name}: affine changed: {followed[name]}; spot moved by {moved[name]:.2f} mm; applied_operations {operations}")
assert followed["RandAffine"] and moved["RandAffine"] < 0.1
assert not followed["Rand3DElastic"] and moved["Rand3DElastic"] > 5
PY
cd "$folder" && venv/bin/python -W error::UserWarning probe.py
