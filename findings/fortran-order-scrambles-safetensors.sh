#!/usr/bin/env bash
# safetensors 0.8.0: safetensors.numpy.save_file writes an array that is not in C order as it lies in memory, under its
# own shape: what is read back has the right shape, type and values, at other places.
# Expected: the same array, as safetensors 0.7.0, NumPy's savez and h5py have it; or an error, as safetensors.torch
# raises for such tensors. The documentation asks for contiguous and dense arrays, which those of nibabel and of
# scikit-learn are, in Fortran's order (flags.contiguous is about C order and would tell).
# Seen: nibabel 5.4.2 hands out volumes in Fortran's order. Of a CT phantom with one nodule 75 % of the voxels are
# others after saving and loading, with the same histogram, and the nodule of 9 x 9 x 9 voxels is strewn over 13 x 34 x
# 32; a cube that was transposed comes back as it was before. components_ of scikit-learn 1.9.1's PCA (full solver, 50
# rows of 16 features) are in that order, too: features projected by what was read back correlate by 0.08 to 0.63 with
# the right ones. No warning.
# Near in the trackers: safetensors 825 (open: Fortran order is garbage since 0.8.0), 826 and 829 (open, to mend it).
# Means: numpy.ascontiguousarray before safetensors.numpy saves; files that 0.8.0 wrote of such arrays are to be made
# anew. Fails if what is read back is what was saved, or saving is refused.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 0.7.0 0.8.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet --disable-pip-version-check "safetensors==$version" nibabel==5.4.2 \
        scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6
done
cat > "$folder/probe.py" <<'PY'
import warnings

import nibabel, numpy as np, safetensors
from safetensors.numpy import load_file, save_file
from sklearn.decomposition import PCA

warnings.simplefilter("error")
works = safetensors.__version__ == "0.7.0"
print("safetensors", safetensors.__version__)


def again(array):
    """The array as it is once saved and loaded."""
    save_file({"x": array}, "x.safetensors")
    found = load_file("x.safetensors")["x"]
    assert found.shape == array.shape and found.dtype == array.dtype
    return found


draw = np.random.default_rng(0)
place = np.indices((48, 40, 32))
body = ((place[0] - 24) / 20) ** 2 + ((place[1] - 20) / 16) ** 2 < 1
nodule = sum((place[k] - c) ** 2 for k, c in enumerate((30, 18, 12))) < 25
hu = np.where(nodule, 40, np.where(body, -850, -1000)) + draw.integers(-9, 10, body.shape) * body
nibabel.save(nibabel.Nifti1Image(hu.astype(np.int16), np.eye(4)), "ct.nii.gz")
volume = np.asanyarray(nibabel.load("ct.nii.gz").dataobj)
found = again(volume)
others = (found != volume).mean()
spans = [(np.ptp(np.argwhere(one > -500), axis=0) + 1).tolist() for one in (volume, found)]
same = np.array_equal(np.sort(found, axis=None), np.sort(volume, axis=None))
print(f"nibabel's volume: {others:.0%} of the voxels are others; same histogram: {same}; nodule {spans[0]}: {spans[1]}")
assert same and spans[0] == [9, 9, 9]
assert (others == 0) if works else (others > 0.5 and max(spans[1]) > 30)
assert np.array_equal(again(np.ascontiguousarray(volume)), volume)

cube = draw.integers(-1000, 1000, (8, 8, 8)).astype(np.int16)
print("a transposed cube comes back", "right" if np.array_equal(again(cube.T), cube.T) else "as it was before")
assert np.array_equal(again(cube.T), cube.T if works else cube)

features = (draw.normal(size=(50, 16)) * np.linspace(3, 0.5, 16)) @ np.linalg.qr(draw.normal(size=(16, 16)))[0]
components = PCA(4, svd_solver="full").fit(features).components_
right, read = (features @ weights.T for weights in (components, again(components)))
alike = [abs(np.corrcoef(right[:, k], read[:, k])[0, 1]) for k in range(4)]
print("components of a PCA: correlation of its features with the right ones", [round(float(r), 2) for r in alike])
assert min(alike) > 0.999 if works else max(alike) < 0.8
PY
cd "$folder"
for version in 0.7.0 0.8.0; do
    "$version/bin/python" probe.py
done
