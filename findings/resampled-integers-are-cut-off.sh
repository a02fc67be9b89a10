#!/usr/bin/env bash
# SimpleITK 2.5.7 and TorchIO 1.2.1 cut off the decimals of an int16 CT that they resample, towards zero; SciPy 1.17.1
# rounds them, MONAI 1.6.1 returns floats.
# Expected: linear interpolation rounded to the nearest whole number, or floats: then the mean of a CT stays what it
# was.
# Seen, between voxels of 10 and 11: 10.25, 10.5 and 10.75 become 10, and -10.75 becomes -10. Of noise around -850 HU
# that is moved by a quarter of a voxel the mean rises by 0.37 HU, around +50 it falls by as much (SciPy, which rounds
# halves away from zero: 0.13 the other way). TorchIO's Resample hands int16 on to SimpleITK and so does the same; its
# Affine returns floats of the same image. No warning.
# Near in the trackers: SimpleITK issue 2098 (closed: integers that change with the last digits of the spacing).
# The documentation of Resample and of TorchIO's Resample does not say it.
# Means: set the output pixel type to sitkFloat32, or make a TorchIO image float, then round. Fails if values are
# rounded or come as floats.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check SimpleITK==2.5.7 torch==2.13.0 torchio==1.2.1 \
    monai==1.6.1 scipy==1.17.1 nibabel==5.4.2 numpy==2.4.6
cat > "$folder/probe.py" <<'PY'
import monai, numpy as np, scipy, SimpleITK as sitk, torch, torchio
from monai.data import MetaTensor
from scipy import ndimage

print(*(f"{library.__name__} {library.__version__}" for library in (sitk, torchio, scipy, monai)), sep=", ")
SHIFT = 0.25  # voxels along the first axis


def with_itk(voxels, kind=sitk.sitkUnknown):
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.T))
    moved = sitk.Resample(image, image, sitk.TranslationTransform(3, (SHIFT, 0, 0)), sitk.sitkLinear, 0.0, kind)
    return sitk.GetArrayFromImage(moved).T[:-1]  # without the voxels that come from outside


def with_torchio(voxels):
    """On planes twice as close, of which every second lies SHIFT of a voxel before one of the image."""
    finer = torchio.Resample((0.5, 1, 1))(torchio.ScalarImage(tensor=torch.from_numpy(voxels)[None]))
    return finer.data[0, 2::2].numpy()


def with_torchio_affine(voxels):
    move = torchio.Affine(scales=1, degrees=0, translation=(-SHIFT, 0, 0))
    return move(torchio.ScalarImage(tensor=torch.from_numpy(voxels)[None])).data[0, :-1].numpy()


def with_monai(voxels):
    move = monai.transforms.Affine(translate_params=(SHIFT, 0, 0), padding_mode="border", image_only=True)
    return move(MetaTensor(torch.from_numpy(voxels)[None], affine=np.eye(4)))[0, :-1].numpy()


def with_scipy(voxels):
    return ndimage.shift(voxels, (-SHIFT, 0, 0), order=1)[:-1]


WAYS = {
    "SimpleITK": with_itk,
    "SimpleITK, to float": lambda voxels: with_itk(voxels, sitk.sitkFloat32),
    "TorchIO Resample": with_torchio,
    "TorchIO Affine": with_torchio_affine,
    "SciPy": with_scipy,
    "MONAI": with_monai,
}
ramp = np.tile(np.array([10, 11, 12, 13], np.int16)[:, None, None], (1, 4, 4))
for sign in (1, -1):
    for part in (0.25, 0.5, 0.75):
        image = sitk.GetImageFromArray(np.ascontiguousarray(sign * ramp.T))
        moved = sitk.Resample(image, image, sitk.TranslationTransform(3, (part, 0, 0)), sitk.sitkLinear)
        read = int(sitk.GetArrayFromImage(moved)[0, 0, 0])
        print(f"{sign * (10 + part)}: SimpleITK {read}")
        assert read == sign * 10
means = {}
for level in (-850, 50):
    voxels = np.rint(np.random.default_rng(0).normal(level, 20, (64, 64, 64))).astype(np.int16)
    for name, way in WAYS.items():
        found = way(voxels)
        means[name, level] = found.mean(dtype=np.float64) - voxels.mean(dtype=np.float64)
        print(f"noise around {level} HU, {name} ({found.dtype}): mean off by {means[name, level]:+.2f}")
for name in ("SimpleITK", "TorchIO Resample"):
    assert means[name, -850] > 0.3 and means[name, 50] < -0.3
for name in ("SimpleITK, to float", "TorchIO Affine", "MONAI"):
    assert abs(means[name, -850]) < 0.05 and abs(means[name, 50]) < 0.05
assert abs(means["SciPy", -850]) < 0.2 and abs(means["SciPy", 50]) < 0.2
PY
cd "$folder" && OMP_NUM_THREADS=1 venv/bin/python probe.py
