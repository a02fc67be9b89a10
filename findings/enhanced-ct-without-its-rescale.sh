#!/usr/bin/env bash
# An enhanced (multi-frame) CT has the Hounsfield units of its file in highdicom 0.28.2 only: pydicom 3.0.2 and MONAI
# 1.6.1 return stored values as if nothing had to be rescaled, SimpleITK 2.5.7 and TorchIO 1.2.1 rescale all frames by
# the first one's slope and intercept.
# Expected: HU, or an error. In this class of DICOM slope and intercept stand in the functional groups, shared by all
# frames or one pair a frame, not at the top, where single-slice CTs have them.
# Seen, of four frames with stored values 1000 to 1003:
# - slope 1 and intercept -1024, shared or in each frame: pydicom's apply_modality_lut and MONAI's PydicomReader have
#   1000 for -24 HU. Lung (-850 HU) so is 174, denser than soft tissue. MONAI's affine has voxels of 1 x 1 x 1 mm, where
#   the file says 0.7 x 0.7 x 2.5; of that it warns.
# - slope and intercept of each frame, -24, -523.5, 1 and 982 HU: SimpleITK and TorchIO have -24, -23, -22 and -21.
# - intercept 0 in the first frame and -1024 in the others: they have 1001 for -23 HU.
# No other warning. highdicom is right in all cases; its get_volume() begins at the last frame.
# Near in the trackers: pydicom 2353 (open: the functional groups are not looked at), MONAI 8468 (open: a made-up
# affine); ITK 2010 (a remark: of the frames' groups GDCM reads the first).
# Means: let highdicom read enhanced CTs (get_frame or get_volume), or convert them to single slices first, and look
# whether air has -1000. Fails if any of the four has HU in all cases, or highdicom has not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 monai==1.6.1 torchio==1.2.1 \
    SimpleITK==2.5.7 pydicom==3.0.2 highdicom==0.28.2 numpy==2.4.6
cat > "$folder/probe.py" <<'PY'
import warnings

import highdicom, monai, numpy as np, pydicom, SimpleITK as sitk, torchio
from monai.transforms import LoadImage
from pydicom.dataset import Dataset, FileMetaDataset

warnings.simplefilter("error", UserWarning)
warnings.filterwarnings("ignore", message=".*nvImageCodec")  # a decoder that is not installed
warnings.filterwarnings("ignore", message="PydicomReader: ImageOrientationPatient")  # of the affine
print("pydicom", pydicom.__version__, "SimpleITK", sitk.__version__, "highdicom", highdicom.__version__,
      "MONAI", monai.__version__, "TorchIO", torchio.__version__)


def group(**values):
    """A sequence of one item with these elements."""
    item = Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    return [item]


def save(rescales, shared):
    """An enhanced CT of four frames at 0, 2.5, 5 and 7.5 mm; its HU, one voxel of each frame."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = pydicom.uid.EnhancedCTImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.2.3.1"
    data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = "1.2.4", "1.2.5", "1.2.6"
    data.Modality, data.PatientID, data.InstanceNumber = "CT", "phantom", 1
    data.ImageType, data.PixelPresentation = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], "MONOCHROME"
    data.VolumetricProperties, data.VolumeBasedCalculationTechnique = "VOLUME", "NONE"
    data.Rows = data.Columns = 4
    data.SamplesPerPixel, data.PhotometricInterpretation, data.NumberOfFrames = 1, "MONOCHROME2", 4
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    pairs = [group(RescaleSlope=s, RescaleIntercept=i, RescaleType="HU") for s, i in rescales]
    common = {"PixelMeasuresSequence": group(PixelSpacing=[0.7, 0.7], SliceThickness=2.5),
              "PlaneOrientationSequence": group(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])}
    if shared:
        common["PixelValueTransformationSequence"] = pairs[0]
    data.SharedFunctionalGroupsSequence = group(**common)
    frames = []
    for k in range(4):
        own = {"PlanePositionSequence": group(ImagePositionPatient=[0, 0, 2.5 * k]),
               "FrameContentSequence": group(StackID="1", InStackPositionNumber=k + 1, DimensionIndexValues=[1, k + 1])}
        if not shared:
            own["PixelValueTransformationSequence"] = pairs[k]
        frames += group(**own)
    data.PerFrameFunctionalGroupsSequence = frames
    data.DimensionOrganizationSequence = group(DimensionOrganizationUID="1.2.7")
    tag = pydicom.datadict.tag_for_keyword
    data.DimensionIndexSequence = [
        group(DimensionOrganizationUID="1.2.7", FunctionalGroupPointer=tag("FrameContentSequence"),
              DimensionIndexPointer=tag(name))[0]
        for name in ("StackID", "InStackPositionNumber")]
    data.PixelData = np.repeat(np.arange(1000, 1004, dtype=np.uint16), 16).tobytes()
    data.save_as("ct.dcm", enforce_file_format=True)
    return [(1000 + k) * s + i for k, (s, i) in enumerate(rescales)]


def read():
    """{library: one voxel of each frame}"""
    data, image = pydicom.dcmread("ct.dcm"), highdicom.imread("ct.dcm")
    by_monai = LoadImage(reader="PydicomReader", image_only=True)("ct.dcm")
    print("   MONAI's voxels in mm:", np.linalg.norm(np.asarray(by_monai.affine)[:3, :3], axis=0).tolist())
    found = {
        "pydicom": pydicom.pixels.apply_modality_lut(data.pixel_array, data)[:, 0, 0],
        "MONAI": np.asarray(by_monai).reshape(4, 4, 4)[0, 0],
        "SimpleITK": sitk.GetArrayFromImage(sitk.ReadImage("ct.dcm"))[:, 0, 0],
        "TorchIO": torchio.ScalarImage("ct.dcm").data.numpy()[0, 0, 0],
        "highdicom": [image.get_frame(k + 1)[0, 0] for k in range(4)],
    }
    print("   highdicom's get_volume():", image.get_volume().array[:, 0, 0].tolist())
    return {name: [float(value) for value in values] for name, values in found.items()}


wrong = {}
for what, rescales, shared in (
    ("shared by all frames", [(1, -1024)] * 4, True),
    ("the same in each frame", [(1, -1024)] * 4, False),
    ("of each frame", [(1, -1024), (0.5, -1024), (0.5, -500), (2, -1024)], False),
    ("intercept 0 in the first", [(1, 0)] + [(1, -1024)] * 3, False),
):
    right = save(rescales, shared)
    print(f"{what}: right {right}")
    for library, values in read().items():
        print(f"   {library}: {values}")
        wrong.setdefault(library, []).append(values != right)
assert wrong["highdicom"] == [False] * 4
assert wrong["pydicom"] == wrong["MONAI"] == [True] * 4
assert wrong["SimpleITK"] == wrong["TorchIO"] == [False, False, True, True]
PY
cd "$folder" && venv/bin/python probe.py
