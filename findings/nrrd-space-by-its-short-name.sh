#!/usr/bin/env bash
# MONAI 1.6.1: an NRRD file whose header says "space: LPS" lies elsewhere than the same file with "space:
# left-posterior-superior", its mirror image in left and right, front and back.
# Expected: one place. The definition of NRRD has "left-posterior-superior" or "LPS" for one and the same space, as
# SimpleITK 2.5.7 and TorchIO 1.2.1 read it; LoadImage's NrrdReader turns LPS into RAS by default (affine_lps_to_ras).
# Seen: with the short name the affine stays in LPS. A spot at the patient's left front (RAS -5.5, 4.5) is at (5.5,
# -4.5) in it; SaveImage writes that to NIfTI, where nibabel finds it at the right back; ResampleToMatch to the file
# with the long name, which has the same voxels, leaves none of the spot where it was. Orientation("RAS") turns the
# voxels rightly, but leaves the affine in LPS. With "left-anterior-superior" the spot's x is mirrored. Nothing warns
# of it.
# Near in the trackers: MONAI 7000 (merged; a reviewer guesses that other values of space need not be considered), 8467
# (closed: Orientation in LPS). Nothing on the short name was found.
# Means: look for "space" in the header before MONAI reads NRRD that others wrote (pynrrd writes the name it is given),
# or read with SimpleITK. Fails if both names give one affine.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 monai==1.6.1 torchio==1.2.1 \
    pynrrd==1.1.3 nibabel==5.4.2 SimpleITK==2.5.7 numpy==2.4.6
cat > "$folder/probe.py" <<'PY'
import warnings
from importlib.metadata import version

import nibabel, nrrd, numpy as np, SimpleITK as sitk, torchio
from monai.transforms import LoadImage, Orientation, ResampleToMatch, SaveImage

print(*(f"{name} {version(name)}" for name in ("monai", "pynrrd", "SimpleITK", "torchio", "nibabel")), sep=", ")
voxels = np.zeros((20, 16, 12), np.int16)
voxels[14:17, 2:5, 6:9] = 100
SPACES = {
    "left-posterior-superior": (1, 1, 1),
    "LPS": (1, 1, 1),
    "left-anterior-superior": (1, -1, 1),
    "right-anterior-superior": (-1, -1, 1),
    "RAS": (-1, -1, 1),
}


def place(array, affine):
    """(3,) mm of the spot's middle."""
    weights = np.asarray(array, float).reshape(voxels.shape)
    middle = (np.indices(weights.shape) * weights).sum((1, 2, 3)) / weights.sum()
    return np.asarray(affine)[:3, :3] @ middle + np.asarray(affine)[:3, 3]


def by_itk(name):
    image = sitk.ReadImage(name)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return place(sitk.GetArrayFromImage(image).T, np.diag([-1, -1, 1, 1]) @ affine)


load = LoadImage(image_only=True, ensure_channel_first=True)
save = SaveImage(output_dir=".", output_postfix="", separate_folder=False, print_log=False)
images, found = {}, {}
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for space, signs in SPACES.items():  # one and the same scan, written for each space
        name = f"{space}.nrrd"
        signs = np.array(signs)
        origin = signs * [-9.5, -7.5, -5.5]
        nrrd.write(name, voxels, {"space": space, "space directions": np.diag(signs * 1.0), "space origin": origin})
        images[space] = image = load(name)
        save(image)
        written = nibabel.load(f"{space}.nii.gz")
        other = torchio.ScalarImage(name)
        found[space] = {
            "SimpleITK": by_itk(name),
            "TorchIO": place(other.data[0], other.affine),
            "MONAI": place(image[0], image.affine),
            "NIfTI of MONAI": place(written.get_fdata(), written.affine),
        }
        print(f"{space}: " + ", ".join(f"{who} {where.tolist()}" for who, where in found[space].items()))
    matched = np.asarray(ResampleToMatch(mode="nearest")(images["LPS"], images["left-posterior-superior"]))[0] > 0
said = [str(one.message).lower() for one in said]
said = [text for text in said if any(word in text for word in ("space", "affine", "lps"))]
print("warnings of the space:", said)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of a default that was changed
    turned = Orientation("RAS")(images["LPS"])
print("LPS after Orientation('RAS'): diagonal of the affine", np.diag(turned.affine)[:3].tolist())
print(f"LPS on the grid of the long name: {matched.sum()} voxels, {(matched & (voxels > 0)).sum()} in the spot's place")
right = found["left-posterior-superior"]["MONAI"]
for space, places in found.items():
    assert np.allclose(places["SimpleITK"], right) and np.allclose(places["TorchIO"], right)
    signs = {"LPS": (-1, -1, 1), "left-anterior-superior": (-1, 1, 1)}.get(space, (1, 1, 1))
    assert np.allclose(places["MONAI"], signs * right) and np.allclose(places["NIfTI of MONAI"], signs * right)
assert not said and not (matched & (voxels > 0)).any() and np.diag(turned.affine)[:2].tolist() == [-1, -1]
PY
cd "$folder" && OMP_NUM_THREADS=1 venv/bin/python probe.py
