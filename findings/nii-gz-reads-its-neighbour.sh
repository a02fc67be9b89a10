#!/usr/bin/env bash
# SimpleITK 2.5.7: asked for scan.nii.gz, it returns the voxels of scan.nii if that lies beside it, under the header of
# scan.nii.gz.
# Expected: the file that was named, as nibabel 5.4.2 reads it.
# Seen: shape and spacing of scan.nii.gz, voxels of scan.nii, filled up with zeros if that is smaller; exit 0, nothing
# on stderr. Asked for scan.nii it reads scan.nii. Known since 2021 (ITK issue 2243, open; nifti_clib issue 133): the
# NIfTI library looks for the voxels by the name without its ending, whatever file was named.
# Means: where a file was unpacked, changed and packed, and both are left, readers see the voxels of the unpacked one.
# Keep one. Fails if the named file is read.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check nibabel==5.4.2 SimpleITK==2.5.7 numpy==2.4.6
cat > "$folder/probe.py" <<'PY'
import os
import nibabel, numpy as np, SimpleITK as sitk
print("nibabel", nibabel.__version__, "SimpleITK", sitk.__version__)

def save(name, value, shape, spacing):
    nibabel.save(nibabel.Nifti1Image(np.full(shape, value, np.int16), np.diag([*[spacing] * 3, 1.0])), name)

def values(name):
    image = sitk.ReadImage(name)
    found = np.unique(sitk.GetArrayFromImage(image)).tolist()
    print(f"{name}: SimpleITK {image.GetSize()}, {image.GetSpacing()[0]:g} mm, values {found};",
          "nibabel", np.unique(np.asanyarray(nibabel.load(name).dataobj)).tolist())
    return found

save("scan.nii.gz", 2, (4, 4, 4), 1.0)
assert values("scan.nii.gz") == [2]
save("scan.nii", 7, (4, 4, 4), 3.0)
print("scan.nii, of 7s and 3 mm, beside it:")
assert values("scan.nii.gz") == [7] and values("scan.nii") == [7]
save("scan.nii", 7, (2, 2, 2), 3.0)
print("scan.nii of 2 x 2 x 2 voxels beside it:")
assert values("scan.nii.gz") == [0, 7]
os.remove("scan.nii")
assert values("scan.nii.gz") == [2]
PY
cd "$folder"
venv/bin/python probe.py 2> warnings || { cat warnings; exit 1; }
if [ -s warnings ]; then cat warnings; exit 1; fi
echo "no warning on stderr"
