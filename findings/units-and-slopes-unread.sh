#!/usr/bin/env bash
# SimpleITK 2.5.7 turns NIfTI's unit of length into millimetres, and passes over that of MetaImage and NRRD.
# Expected: a spacing in millimetres whatever the format, as is ITK's convention, or an error. And a MetaImage's
# ElementToIntensityFunctionSlope and -Offset, from stored to real values, applied as NIfTI's and DICOM's are.
# Seen, for a spacing of 2 in the unit named: NIfTI in metres 2000 mm, in microns 0.002 mm; MetaImage in cm or um and
# NRRD in m or um 2 mm each, without a word (MetaImage's unit is at least in the metadata, NRRD's is not). Slope and
# offset of a MetaImage are neither applied nor in the metadata. nibabel 5.4.2 leaves NIfTI's affine in the file's own
# unit, so that the two libraries are a factor of 1000 apart. NRRD's unit is known (ANTsPy issue 514); of the rest
# nothing was found.
# Means: look for DistanceUnits, the slope and "space units" in the header yourself. Fails if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check nibabel==5.4.2 SimpleITK==2.5.7 numpy==2.4.6
cat > "$folder/probe.py" <<'PY'
import nibabel, numpy as np, SimpleITK as sitk
print("nibabel", nibabel.__version__, "SimpleITK", sitk.__version__)
voxels = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
META = """ObjectType = Image
NDims = 3
BinaryData = True
BinaryDataByteOrderMSB = False
DistanceUnits = {unit}
ElementSpacing = 2 2 2
DimSize = 3 4 5
ElementToIntensityFunctionSlope = 2
ElementToIntensityFunctionOffset = -1024
ElementType = MET_SHORT
ElementDataFile = LOCAL
"""
NRRD = """NRRD0004
type: short
dimension: 3
space: left-posterior-superior
sizes: 3 4 5
space directions: (2,0,0) (0,2,0) (0,0,2)
space units: "{unit}" "{unit}" "{unit}"
space origin: (0,0,0)
endian: little
encoding: raw

"""
for unit, spacing in (("meter", 2000), ("micron", 0.002)):
    image = nibabel.Nifti1Image(voxels, np.diag([2.0, 2, 2, 1]))
    image.header.set_xyzt_units(unit)
    nibabel.save(image, "a.nii")
    one, other = sitk.ReadImage("a.nii").GetSpacing()[0], float(nibabel.load("a.nii").affine[0, 0])
    print(f"NIfTI in {unit}: SimpleITK {one:g}, nibabel {other:g}")
    assert np.isclose(one, spacing) and other == 2
for file, header, units in (("a.mha", META, ("cm", "um")), ("a.nrrd", NRRD, ("m", "um"))):
    for unit in units:
        with open(file, "wb") as out:
            out.write(header.format(unit=unit).encode() + voxels.tobytes(order="F"))
        image = sitk.ReadImage(file)
        kept = [key for key in image.GetMetaDataKeys() if image.GetMetaData(key) == unit]
        print(f"{file[2:]} in {unit}: SimpleITK {image.GetSpacing()[0]:g}; the unit in the metadata: {kept}")
        assert image.GetSpacing() == (2, 2, 2) and len(kept) == (file == "a.mha")
read = sitk.ReadImage("a.mha")
array = sitk.GetArrayFromImage(read).T
print("mha, slope 2 and offset -1024: stored", voxels[:, 0, 0].tolist(), "read", array[:, 0, 0].tolist())
assert (array == voxels).all()
assert not any("-1024" in read.GetMetaData(key) for key in read.GetMetaDataKeys())
PY
cd "$folder"
venv/bin/python probe.py
