#!/usr/bin/env bash
# MONAI 1.6.1: PydicomReader, by which LoadImage reads a folder of DICOM where the package itk is not installed, takes all
# files of the folder for slices of one volume. SeriesInstanceUID is not looked at.
# Expected: an error or a warning where a folder holds two series, or one of them, as SimpleITK 2.5.7 and TorchIO 1.2.1
# give. A CT is often stored as several reconstructions of the same slices (soft and sharp kernel, thin and thick),
# and a download by study may put them into one folder.
# Seen: two reconstructions of slices at 0, 5, 10 and 15 mm become one volume of 8 slices in which they take turns, not
# even strictly, with an affine that says 2.14 mm (15 / 7) a slice: its extent in mm is right, so that nothing looks
# wrong but the picture. No warning. SimpleITK and TorchIO read the series whose UID comes first, in silence too.
# Near in the trackers: MONAI 4607 (closed: other files in the folder are taken for slices), 5551 (open: series_name of
# the ITK reader). Nothing on series that are mixed was found.
# Means: one folder for each SeriesInstanceUID before MONAI reads DICOM. Fails if a reader keeps the series apart or
# says that there are two.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 monai==1.6.1 pydicom==3.0.2 \
    SimpleITK==2.5.7 torchio==1.2.1 numpy==2.4.6
cat > "$folder/probe.py" <<'PY'
import os, warnings
import monai, numpy as np, pydicom, SimpleITK as sitk, torchio
from monai.transforms import LoadImage
from pydicom.dataset import FileMetaDataset

print("monai", monai.__version__, "torchio", torchio.__version__, "SimpleITK", sitk.__version__)
MM = [0, 5, 10, 15]


def write(folder, series, kernel, hu, first, positions=MM):
    """A CT series whose slices hold `hu` plus their position in mm."""
    os.makedirs(folder, exist_ok=True)
    for k, position in enumerate(positions):
        data = pydicom.Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{first + k}"
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = "1.2.4", series, "1.2.6"
        data.Modality, data.PatientID, data.InstanceNumber = "CT", "phantom", k + 1
        data.ConvolutionKernel, data.SeriesNumber = kernel, int(series[-1])
        data.ImageOrientationPatient, data.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, position]
        data.PixelSpacing, data.SliceThickness = [1, 1], 5
        data.Rows = data.Columns = 4
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.RescaleSlope, data.RescaleIntercept = 1, 0
        data.PixelData = np.full((4, 4), hu + position, np.int16).tobytes()
        data.save_as(f"{folder}/{first + k}.dcm", enforce_file_format=True)


def read(folder):
    """Voxels along z by MONAI, its step in mm, and what SimpleITK and TorchIO have; no reader may have warned."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        volume = loader(folder)
        other = torchio.ScalarImage(folder).data[0, 0, 0].tolist()
    told = [str(one.message) for one in said if "series" in str(one.message).lower()]
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(folder))
    by_itk = sitk.GetArrayFromImage(reader.Execute())[:, 0, 0].tolist()
    slices, step = [round(float(one)) for one in volume[0, 0]], float(volume.affine[2, 2])
    print(f"{folder}: MONAI {slices}, {step:.3f} mm; SimpleITK {by_itk}; TorchIO {other}; warnings {told}")
    assert not told
    return slices, step, by_itk, other


loader = LoadImage(image_only=True)
assert not any(type(reader).__name__ == "ITKReader" for reader in loader.readers)
write("one", "1.2.5.1", "SOFT", 0, 100)
slices, step, by_itk, other = read("one")
assert slices == by_itk == other == MM and step == 5
write("two", "1.2.5.2", "SHARP", 1000, 100)
write("two", "1.2.5.1", "SOFT", 0, 200)
slices, step, by_itk, other = read("two")
assert sorted(slices) == [*MM, *(1000 + mm for mm in MM)] and [one % 1000 for one in slices] == sorted(2 * MM)
assert abs(step - 15 / 7) < 1e-6 and by_itk == other == MM
PY
cd "$folder" && env -u MONAI_DICOM_READER OMP_NUM_THREADS=1 venv/bin/python probe.py
