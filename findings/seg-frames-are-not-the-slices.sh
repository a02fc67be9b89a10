#!/usr/bin/env bash
# highdicom 0.28.2, pydicom 3.0.2, SimpleITK 2.5.7 and MONAI 1.6.1: the frames of a DICOM SEG are taken for the slices
# of the CT, which they are neither in order nor in number.
# Expected: a mask that lies on its CT voxel by voxel, or an error. Each frame of a SEG says where it lies; empty
# frames may be left out, and are by highdicom's default (documented, omit_empty_frames).
# Seen, for an axial CT of 20 slices that were given to highdicom from the feet up, with a mask of their order:
# - mask on every slice: the frames are stored from the head down. pixel_array of pydicom, get_volume() of highdicom
#   and SimpleITK's array have the shape of the CT's array and are upside down on it: a Dice of 0.39 with the right
#   mask. Only the geometry beside the array tells.
# - two nodules, 9 slices apart, in one segment: SimpleITK has 5 slices of 1 x 1 x 1 mm (0.8 x 0.8 x 2.5 are in the
#   file) that rise from the topmost frame: the lower nodule lies right above the upper one, some 30 mm from its place.
# - two nodules of 3 slices each in a segment each: MONAI's PydicomReader puts both into the same 3 slices of 11.25 mm.
#   With one segment it refuses the file.
# No warning of any of them (SimpleITK's and MONAI's checked).
# Near in the trackers: highdicom 330 (closed: the order of frames is reversed), ITK-Wasm 991 (open: spacing of 1),
# dcmqi 513 (open: slices fewer than the CT's). Nothing on MONAI's two segments was found.
# Means: read a SEG with highdicom's get_pixels_by_source_instance and the UIDs of the CT in one's own order, as it is
# right in all three cases here, or match its get_volume() to the CT's geometry. Fails if any of the others is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 monai==1.6.1 highdicom==0.28.2 \
    pydicom==3.0.2 SimpleITK==2.5.7 numpy==2.4.6
cat > "$folder/probe.py" <<'PY'
import os, warnings
from importlib.metadata import version

import highdicom, numpy as np, pydicom, SimpleITK as sitk
from monai.data import PydicomReader
from monai.transforms import LoadImage
from pydicom.dataset import FileMetaDataset
from pydicom.sr.codedict import codes

print(*(f"{name} {version(name)}" for name in ("highdicom", "pydicom", "SimpleITK", "monai")), sep=", ")
SLICES, SIDE, STEP, BOTTOM = 20, 32, 2.5, 100.0


def write_ct(folder):
    """The datasets of an axial CT, from the feet up, whose voxels hold the number of their slice."""
    os.makedirs(folder)
    series = []
    for k in range(SLICES):
        data = pydicom.Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{k + 1}"
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = "1.2.4", "1.2.5", "1.2.6"
        data.Modality, data.PatientID, data.InstanceNumber, data.SeriesNumber = "CT", "phantom", k + 1, 1
        for empty in ("PatientName PatientBirthDate PatientSex StudyDate StudyTime StudyID AccessionNumber "
                      "ReferringPhysicianName PositionReferenceIndicator").split():
            setattr(data, empty, "")
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        data.ImagePositionPatient = [-20, -30, BOTTOM + STEP * k]
        data.PixelSpacing, data.SliceThickness = [0.8, 0.8], STEP
        data.Rows = data.Columns = SIDE
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.RescaleSlope, data.RescaleIntercept = 1, 0
        data.PixelData = np.full((SIDE, SIDE), k, np.int16).tobytes()
        data.save_as(f"{folder}/{k:02d}.dcm", enforce_file_format=True)
        series.append(data)
    return series


def write_seg(name, mask):
    """A SEG of `mask`, (slices, rows, columns, segments), by highdicom's defaults."""
    kind = highdicom.seg.SegmentAlgorithmTypeValues.MANUAL
    segments = [
        highdicom.seg.SegmentDescription(k + 1, f"part {k + 1}", codes.SCT.Organ, codes.SCT.Lung, kind)
        for k in range(mask.shape[3])
    ]
    seg = highdicom.seg.Segmentation(
        ct, mask.astype(np.uint8), highdicom.seg.SegmentationTypeValues.BINARY, segments, highdicom.UID(), 2,
        highdicom.UID(), 1, "maker", "model", "1", "1",
    )
    seg.save_as(name)
    found = highdicom.seg.segread(name).get_pixels_by_source_instance([data.SOPInstanceUID for data in ct])
    assert (found == mask).all()  # the way that is right
    return seg


def dice(one, other):
    return 2 * (one & other).sum() / (one.sum() + other.sum())


def slices_of(array, axis=0):
    """The voxels of a mask in each slice."""
    return np.asarray(array, int).sum(tuple(k for k in range(3) if k != axis)).tolist()


ct = write_ct("ct")
reader = sitk.ImageSeriesReader()
reader.SetFileNames(reader.GetGDCMSeriesFileNames("ct"))
image = reader.Execute()
assert sitk.GetArrayFromImage(image)[:, 0, 0].tolist() == list(range(SLICES))

print("1. a mask on every slice")
mask = np.zeros((SLICES, SIDE, SIDE, 1), bool)
rows, columns = np.indices((SIDE, SIDE))
for k in range(SLICES):  # wide below, like a lung
    mask[k, ..., 0] = (rows - 16) ** 2 + (columns - 16) ** 2 <= (14 - 0.6 * k) ** 2
write_seg("full.dcm", mask)
read = sitk.ReadImage("full.dcm")
arrays = {
    "given to highdicom": mask[..., 0],
    "pydicom, pixel_array": pydicom.dcmread("full.dcm").pixel_array > 0,
    "highdicom, get_volume()": highdicom.seg.segread("full.dcm").get_volume(combine_segments=True).array > 0,
    "SimpleITK": sitk.GetArrayFromImage(read) > 0,
}
for name, array in arrays.items():
    assert array.shape == (SLICES, SIDE, SIDE)
    print(f"{name}: voxels per slice {slices_of(array)}, Dice {dice(array, mask[..., 0]):.2f}")
    assert name == "given to highdicom" or (array == mask[::-1, ..., 0]).all()
assert dice(mask[..., 0], mask[::-1, ..., 0]) < 0.5
print(f"SimpleITK: CT at {image.GetOrigin()}, SEG at {read.GetOrigin()}, its third axis {read.GetDirection()[2::3]}")

print("2. two nodules in one segment")
mask = np.zeros((SLICES, SIDE, SIDE, 1), bool)
mask[3:5, 4:8, 4:8], mask[12:15, 20:26, 20:26] = True, True
seg = write_seg("one.dcm", mask)
read = sitk.ReadImage("one.dcm")
heights = [read.TransformIndexToPhysicalPoint((0, 0, k))[2] for k in range(read.GetSize()[2])]
print(f"CT: voxels per slice {slices_of(mask[..., 0])}; SEG: {seg.NumberOfFrames} frames")
print(f"SimpleITK: {slices_of(sitk.GetArrayFromImage(read) > 0)} at {heights} mm, spacing {read.GetSpacing()}")
true = [BOTTOM + STEP * k for k in range(SLICES) if mask[k].any()]
print(f"they are at {true} mm")
assert read.GetSpacing() == (1, 1, 1) and heights == [135, 136, 137, 138, 139] and true[:2] == [107.5, 110]
assert slices_of(sitk.GetArrayFromImage(read) > 0) == [36, 36, 36, 16, 16]

print("3. two nodules in two segments")
mask = np.zeros((SLICES, SIDE, SIDE, 2), bool)
mask[3:6, 4:8, 4:8, 0], mask[14:17, 20:26, 20:26, 1] = True, True
write_seg("two.dcm", mask)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    volume = LoadImage(PydicomReader, image_only=True)("two.dcm")
said = [str(one.message) for one in said if one.filename.endswith("image_reader.py")]
said = [text for text in said if "nvimage" not in text.lower()]  # a decoder that is not installed
places = [float((volume.affine.numpy() @ [0, 0, k, 1])[2]) for k in range(volume.shape[2])]
for k in range(2):
    print(f"segment {k + 1}: voxels per slice {slices_of(mask[..., k])}, MONAI {slices_of(volume[..., k], 2)}")
print(f"MONAI: shape {tuple(volume.shape)}, slices at {places} mm, warnings {said}")
assert not said and volume.shape == (SIDE, SIDE, 3, 2) and places == [112.5, 123.75, 135]
PY
cd "$folder"
OMP_NUM_THREADS=1 venv/bin/python probe.py 2> warnings || { cat warnings; exit 1; }
if grep -v -i nvimage warnings; then exit 1; fi
echo "no warning on stderr"
