#!/usr/bin/env bash
# MONAI 1.6.1: PydicomReader, by which LoadImage reads DICOM where the package itk is not installed, stacks a series by
# InstanceNumber. Where its slices lie is not looked at; the affine is that of even steps from the first to the last.
# Expected: slices ordered by ImagePositionPatient along their normal, as SimpleITK 2.5.7 has them: in the standard
# InstanceNumber tells images apart and has no order. And a word where slices are missing.
# Seen: four slices at 0, 5, 10 and 15 mm with the numbers 1, 3, 2 and 4 come out in the order 0, 10, 5, 15, with an
# affine that says 0, 5, 10, 15: two slices are swapped in the volume. With slices at 0, 5, 15 and 20 mm the affine
# says 0, 6.7, 13.3, 20. No warning of either (SimpleITK warns of the gap). Numbers that fall are right: the affine
# falls, too.
# Near in the trackers: MONAI 8468 (open: the reader makes up an affine for multi-frame files); ITK 6463 (its DCMTK
# reader, the same order). Nothing on MONAI's order was found.
# Means: look at positions yourself before LoadImage reads DICOM, or convert with what does. Fails if the order follows
# the positions.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 monai==1.6.1 pydicom==3.0.2 \
    SimpleITK==2.5.7 numpy==2.4.6
cat > "$folder/probe.py" <<'PY'
import os, warnings
import monai, numpy as np, pydicom, SimpleITK as sitk
from monai.transforms import LoadImage
from pydicom.dataset import FileMetaDataset

print("monai", monai.__version__, "pydicom", pydicom.__version__, "SimpleITK", sitk.__version__)


def write(folder, positions, numbers):
    """A CT series of four slices that hold their position in mm as HU."""
    os.makedirs(folder)
    for k, (position, number) in enumerate(zip(positions, numbers)):
        data = pydicom.Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{k + 1}"
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = "1.2.4", "1.2.5", "1.2.6"
        data.Modality, data.PatientID, data.InstanceNumber = "CT", "phantom", number
        data.ImageOrientationPatient, data.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, position]
        data.PixelSpacing, data.SliceThickness = [1, 1], 5
        data.Rows = data.Columns = 4
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.RescaleSlope, data.RescaleIntercept = 1, 0
        data.PixelData = np.full((4, 4), position, np.int16).tobytes()
        data.save_as(f"{folder}/{k}.dcm", enforce_file_format=True)


def compare(name, positions, numbers):
    """Positions of the slices: [as their voxels hold them, as the affine says], of MONAI and of SimpleITK."""
    write(name, positions, numbers)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        volume = loader(name)
    told = [str(one.message) for one in said if one.filename.endswith("image_reader.py")]
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(name))
    image = reader.Execute()
    by_monai = [volume[0, 0].tolist(), [float((volume.affine.numpy() @ [0, 0, k, 1])[2].round(1)) for k in range(4)]]
    places = [round(image.TransformIndexToPhysicalPoint((0, 0, k))[2], 1) for k in range(4)]
    by_itk = [sitk.GetArrayFromImage(image)[:, 0, 0].tolist(), places]
    print(f"{name}: MONAI slices {by_monai[0]}, affine {by_monai[1]}, warnings {told};")
    print(f"    SimpleITK slices {by_itk[0]}, at {by_itk[1]}")
    assert not told
    return by_monai, by_itk


loader = LoadImage(image_only=True)
print("readers, the last that fits is taken:", [type(reader).__name__ for reader in loader.readers])
assert not any(type(reader).__name__ == "ITKReader" for reader in loader.readers)
for name, numbers in (("in order", [1, 2, 3, 4]), ("falling numbers", [4, 3, 2, 1])):
    monais, itks = compare(name, [0, 5, 10, 15], numbers)
    assert monais[0] == monais[1] and itks[0] == itks[1]
monais, itks = compare("numbers 1, 3, 2, 4", [0, 5, 10, 15], [1, 3, 2, 4])
assert monais == [[0, 10, 5, 15], [0, 5, 10, 15]] and itks[0] == itks[1]
monais, itks = compare("a slice missing", [0, 5, 15, 20], [1, 2, 4, 5])
assert monais == [[0, 5, 15, 20], [0, 6.7, 13.3, 20]]
PY
cd "$folder" && env -u MONAI_DICOM_READER OMP_NUM_THREADS=1 venv/bin/python probe.py
