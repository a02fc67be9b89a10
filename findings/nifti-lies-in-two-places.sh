#!/usr/bin/env bash
# SimpleITK 2.5.7 and nibabel 5.4.2 place one valid NIfTI file in two places, and neither warns.
# Expected: two readers of one standard agree on where a voxel lies, or one of them says that the header can be read in
# two ways. nibabel documents its order: the sform if its code is above 0, else the qform. Of ITK one reads that it
# prefers the sform since 2020; its pull request 1868 does so for an sform of code 1 (scanner) only. With a qform beside
# it, an sform of code 2, 3 or 4 (aligned to another scan or an atlas, as registration leaves it) is passed over.
# Seen: where both forms are coded and apart, the two libraries differ for 12 of 16 pairs of codes. With both codes 0
# they differ, too: nibabel mirrors x and puts 0 at the centre, SimpleITK mirrors x and y and puts 0 at the first voxel;
# the standard's own formula mirrors nothing and leaves the orientation open.
# Means: read an image and its mask with the same library, or compare both forms first. Fails if the two ever agree.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check nibabel==5.4.2 SimpleITK==2.5.7 numpy==2.4.6
cat > "$folder/probe.py" <<'PY'
import warnings
import nibabel, numpy as np, SimpleITK as sitk
warnings.simplefilter("error")
print("nibabel", nibabel.__version__, "SimpleITK", sitk.__version__)
qform, sform = np.diag([2.0, 2, 2, 1]), np.diag([2.0, 2, 2, 1])
qform[:3, 3], sform[:3, 3] = [10, 20, 30], [-100, -50, -20]

def read(q, s):
    """Affines to RAS mm of a file with these codes: nibabel's and SimpleITK's."""
    image = nibabel.Nifti1Image(np.zeros((3, 4, 5), np.int16), None)
    image.header.set_qform(qform, 1)
    image.header.set_sform(sform, 1)
    image.header["qform_code"], image.header["sform_code"] = q, s
    nibabel.save(image, "scan.nii.gz")
    itk, affine = sitk.ReadImage("scan.nii.gz"), np.eye(4)
    affine[:3, :3] = np.reshape(itk.GetDirection(), (3, 3)) * itk.GetSpacing()
    affine[:3, 3] = itk.GetOrigin()
    return nibabel.load("scan.nii.gz").affine, np.diag([-1, -1, 1, 1]) @ affine

def name(affine):
    return "qform" if np.allclose(affine, qform) else "sform" if np.allclose(affine, sform) else "neither"

apart = []
for q in range(1, 5):
    for s in range(1, 5):
        one, other = (name(affine) for affine in read(q, s))
        print(f"qform_code {q}, sform_code {s}: nibabel {one}, SimpleITK {other}")
        apart += [(q, s)] if one != other else []
print(len(apart), "of 16 pairs of codes differ")
none = read(0, 0)
for library, affine in zip(("nibabel", "SimpleITK"), none):
    axes, first = np.diag(affine)[:3].tolist(), affine[:3, 3].tolist()
    print(f"both codes 0: {library} axes {axes} mm, voxel (0, 0, 0) at {first}")
assert apart == [(q, s) for q in range(1, 5) for s in (2, 3, 4)] and not np.allclose(*none)
PY
cd "$folder"
venv/bin/python probe.py 2> warnings || { cat warnings; exit 1; }
if [ -s warnings ]; then cat warnings; exit 1; fi
echo "no warning on stderr"
