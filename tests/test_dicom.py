"""DICOM: headers, which slices form a volume, where it lies and what its voxels are, against plain pydicom; and what is
found below a folder."""

import contextlib
import itertools
import locale
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from grids import AXES, LPS, OBLIQUE, ORIGIN, SIGNED_PERMUTATIONS, SPACING, affine_to_ras, as_hu, canonical, noise
from pydicom.pixels import apply_rescale
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless
from raw_inputs import manifest, outcomes, run, scan, write_dicom, write_image, write_series  # noqa: F401

from dino3d.data import dicom, dicom_pixels
from dino3d.data.conventions import AIR, DataError, LeftOut
from dino3d.data.dicom import Pixels, Slice, read_header
from dino3d.data.dicom_series import assemble, open_series, stored_series
from dino3d.data.scans import find_scans
from dino3d.data.volume import Volume


def read_dicom(paths, min_slices=3):
    """(voxels, affine, notes) in RAS of the series that these files are."""
    slices = [read_header(str(path)) for path in paths]
    with Volume("series", stored_series(assemble(slices, min_slices, "series"), "series")) as volume:
        return volume.read(), volume.affine, volume.notes


def assert_is(found, voxels, affine, atol=1e-6):
    assert found[0].dtype == np.int16
    np.testing.assert_array_equal(found[0], voxels)
    np.testing.assert_allclose(found[1], affine, rtol=0, atol=atol)


def by_pydicom(paths):
    """(voxels, affine) in RAS by pydicom and PS3.3 C.7.6.2.1.1 alone: an independent reading."""
    slices = [pydicom.dcmread(path) for path in paths]
    row, column = np.reshape(np.array(slices[0].ImageOrientationPatient, float), (2, 3))
    normal = np.cross(row, column)
    slices.sort(key=lambda one: normal @ np.array(one.ImagePositionPatient, float))
    first, last = (np.array(slices[k].ImagePositionPatient, float) for k in (0, -1))
    affine = np.eye(4)
    affine[:3, 0] = row / np.linalg.norm(row) * float(slices[0].PixelSpacing[1])
    affine[:3, 1] = column / np.linalg.norm(column) * float(slices[0].PixelSpacing[0])
    affine[:3, 2], affine[:3, 3] = (last - first) / (len(slices) - 1), first
    voxels = np.stack([apply_rescale(one.pixel_array, one).T for one in slices], -1)
    return canonical(as_hu(voxels), LPS @ affine)


def corners_apart(shape, one, other):
    corners = np.array([(*corner, 1.0) for corner in itertools.product(*([0, n - 1] for n in shape))]).T
    return np.abs(((one - other) @ corners)[:3]).max()


# ------------------------------------------------------------------------------------------------------- DICOM series


SHUFFLED = ["d.dcm", "a.dcm", "f", "b.ima", "c.dcm", "e.dcm"]


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_series_is_what_its_headers_say_to_pydicom_and_itk(axes, tmp_path):
    stored = noise()
    paths = write_dicom(tmp_path, stored, axes, names=SHUFFLED)
    found = read_dicom(sorted(paths))
    assert_is(found, *canonical((stored - 1024).astype(np.int16), affine_to_ras(axes)))
    assert_is(found, *by_pydicom(paths))
    assert found[2] == ()

    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    itk = sitk.DICOMOrient(reader.Execute(), "RAS")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(itk).T, found[0])
    where = np.array([itk.TransformIndexToPhysicalPoint(index) for index in ((0, 0, 0), (7, 4, 5))])
    np.testing.assert_allclose(where @ LPS[:3, :3], [found[1][:3, 3], (found[1] @ [7, 4, 5, 1])[:3]], atol=1e-6)


def test_series_of_all_24_orientations_in_reversed_order(tmp_path):
    right_handed = [axes for axes in SIGNED_PERMUTATIONS if np.linalg.det(axes) > 0]
    assert len(right_handed) == 24
    for number, axes in enumerate(right_handed):
        stored = noise((4, 3, 5), seed=number)
        paths = write_dicom(tmp_path / str(number), stored, axes)
        assert_is(read_dicom(paths[::-1]), *canonical((stored - 1024).astype(np.int16), affine_to_ras(axes)))


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize(
    "slope, intercept, signed, low, high",
    [
        (1, -1024, False, 0, 4096),
        (1, 0, True, -1024, 3072),
        (1, -1024, True, -3000, 32768),
        (1, -1024, False, 0, 65536),
        (2, -1000, False, 0, 2000),
        (0.5, -1000.25, False, 0, 65536),
        (0.37, 11.5, True, -3000, 3000),
        (1.0, 0.5, True, -900, 900),
        (-1, 50, True, -900, 900),
        (lambda k: (1, 2, 0.25)[k % 3], lambda k: -1024 + 10 * k, False, 0, 4096),
        (1, lambda k: -1024 * (k > 0), False, 0, 4096),
        (1, lambda k: -1024 + k, False, 0, 4096),
        (lambda k: 1 + k % 2, -1024, False, 0, 4096),
    ],
)
def test_values_are_rescaled_slice_by_slice(slope, intercept, signed, low, high, tmp_path):
    stored = noise(low=low, high=high)
    stored[:2, 0, 0] = low, high - 1
    slopes, intercepts = ([value(k) if callable(value) else value for k in range(6)] for value in (slope, intercept))
    paths = write_dicom(
        tmp_path,
        stored,
        signed=signed,
        RescaleSlope=lambda k: str(slopes[k]),
        RescaleIntercept=lambda k: str(intercepts[k]),
    )
    expected = as_hu(stored * np.array(slopes) + np.array(intercepts))
    assert_is(read_dicom(paths), *canonical(expected, affine_to_ras(np.eye(3))))


def test_values_without_rescale_are_hu(tmp_path):
    stored = noise(low=-1024, high=3000)
    paths = write_dicom(
        tmp_path, stored, signed=True, RescaleSlope=None, RescaleIntercept=lambda k: None if k % 2 else ""
    )
    assert_is(read_dicom(paths), *canonical(stored.astype(np.int16), affine_to_ras(np.eye(3))))


@pytest.mark.parametrize("padding, intercept", [(-2000, 0), (-3024, 0), (-2000, -1024), (-32768, 0)])
def test_padding_becomes_air(padding, intercept, tmp_path):
    stored = noise(low=-1024 - intercept, high=2000)
    stored[:3] = padding
    paths = write_dicom(tmp_path, stored, signed=True, RescaleIntercept=str(intercept), PixelPaddingValue=padding)
    voxels = read_dicom(paths)[0]
    assert voxels.min() == AIR
    np.testing.assert_array_equal(voxels, np.maximum(stored + intercept, AIR)[::-1, ::-1])


def test_signed_and_unsigned_slices_in_one_series(tmp_path):
    stored = noise()
    paths = write_dicom(tmp_path, stored, PixelRepresentation=lambda k: k % 2)
    np.testing.assert_array_equal(read_dicom(paths)[0], (stored - 1024)[::-1, ::-1])


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless, "JPEG", "JPEG2000"]
)
def test_transfer_syntaxes(syntax, tmp_path, capfd):
    stored = noise((40, 32, 5))
    own = syntax if syntax in (ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian) else ExplicitVRLittleEndian
    before = locale.setlocale(locale.LC_ALL)
    paths = write_dicom(tmp_path, stored, syntax=own)
    for path in paths if own != syntax else []:
        if syntax == RLELossless:
            one = pydicom.dcmread(path)
            one.compress(RLELossless)
            one.save_as(path)
            continue
        image = sitk.ReadImage(path)
        short = sitk.Cast(image, sitk.sitkInt16)
        for key in set(image.GetMetaDataKeys()) - {"0028|0100", "0028|0101", "0028|0102"}:
            short.SetMetaData(key, image.GetMetaData(key))
        writer = sitk.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.KeepOriginalImageUIDOn()
        writer.UseCompressionOn()
        writer.SetCompressor(syntax)
        writer.SetFileName(path)
        writer.Execute(short)
    locale.setlocale(locale.LC_ALL, before)  # the JPEG writer, not the reader, sets it to C for the whole process
    capfd.readouterr()  # what the writers print
    used = pydicom.dcmread(paths[0]).file_meta.TransferSyntaxUID
    assert used == syntax if own == syntax else used.is_compressed
    assert_is(read_dicom(paths), *canonical((stored - 1024).astype(np.int16), affine_to_ras(np.eye(3))))
    assert locale.setlocale(locale.LC_ALL) == before

    if used.is_encapsulated:
        whole = Path(paths[2]).read_bytes()
        for length in (len(whole) // 2, len(whole) - 300):
            Path(paths[2]).write_bytes(whole[:length])
            with pytest.raises(DataError, match="can't be read: 02.dcm"):
                read_dicom(paths)


@pytest.mark.usefixtures("silent")
def test_a_decoder_that_ends_its_process_is_told(tmp_path, monkeypatch):
    """As GDCM does on some damaged pixels: the file is refused, and this process lives on."""
    paths = write_dicom(tmp_path / "series", noise((40, 32, 3)))
    monkeypatch.setattr(dicom_pixels, "HARMLESS", ())
    stored = noise((40, 32, 3))
    assert_is(read_dicom(paths), *canonical((stored - 1024).astype(np.int16), affine_to_ras(np.eye(3))))
    ending = tmp_path / "python"
    ending.write_text("#!/bin/sh\nkill -ABRT $$\n")
    ending.chmod(0o755)
    monkeypatch.setattr(dicom_pixels.sys, "executable", str(ending))
    with pytest.raises(DataError, match="process that decoded it ended with -6, its compressed pixels are damaged"):
        read_dicom(paths)


@pytest.mark.usefixtures("silent")
def test_slices_that_are_cut_off_or_gone_are_refused(tmp_path):
    paths = write_dicom(tmp_path, noise((40, 32, 5)))
    whole = Path(paths[2]).read_bytes()
    pixels = 40 * 32 * 2
    for missing in (1, 2, 100, pixels // 2, pixels, pixels + 8):
        Path(paths[2]).write_bytes(whole[:-missing])
        with pytest.raises(DataError, match="can't be read: 02.dcm (is cut off|has no pixel data)") as error:
            read_dicom(paths)
        assert "\n" not in error.value.reason and str(tmp_path) not in error.value.reason
    slices = [read_header(path) for path in paths[:2]]
    series = assemble([slices[0]._replace(path=str(tmp_path / "gone.dcm")), *slices[1:]], 2, "series")
    with pytest.raises(DataError, match="gone.dcm") as error:
        stored_series(series, "series").take((slice(None),) * 3)
    assert str(tmp_path) not in error.value.reason and not isinstance(error.value, LeftOut)


@pytest.mark.parametrize("implicit, little", [(True, True), (False, True), (False, False)])
def test_files_without_preamble_and_suffix_are_dicom(implicit, little, tmp_path):
    stored = noise()
    for path in write_dicom(tmp_path, stored):
        one = pydicom.dcmread(path)
        del one.file_meta, one.preamble
        if not little:
            one["PixelData"].value = np.frombuffer(one.PixelData, "<u2").astype(">u2").tobytes()
        bare = Path(path).with_suffix("")
        pydicom.dcmwrite(bare, one, implicit_vr=implicit, little_endian=little, force_encoding=True)
        Path(path).unlink()
        assert bare.read_bytes()[128:132] != b"DICM" and dicom.is_dicom(str(bare))
    (tmp_path / "short").write_bytes(b"DI")
    (tmp_path / "eight").write_bytes(b"\x08\x00\x05\x00CS\x0a\x00" + b"x" * 3000)  # names no SOP class
    (tmp_path / "notes.txt").write_bytes(bytes(128) + b"DICM")  # by its name something else
    found = find_scans(tmp_path)
    (one,) = found.scans
    assert one.name == ".#1.2.3.4" and dict(found.others) == {"other files": 2, ".txt files": 1}
    with Volume(tmp_path / one.name) as volume:
        expected = canonical((stored - 1024).astype(np.int16), affine_to_ras(np.eye(3)))
        assert_is((volume.read(), volume.affine), *expected)


# ------------------------------------------------------------------------------------------------------- DICOM headers


SLICE = Slice(
    path="",
    patient="",
    person="",
    study="",
    date="",
    series="",
    sop_class=dicom.CT_IMAGE,
    sop="1.2.3.4.1",
    modality="",
    image_type="",
    photometric="MONOCHROME2",
    samples=1,
    frames=1,
    size=(8, 5),
    spacing=(),
    orientation=(),
    decimals=0,
    position=(),
    rescale=("", ""),
    unit="",
    thickness=0.0,
    kernel="",
    number="",
    acquisition=("",) * 5,
    content_time="",
    pixels=Pixels(ExplicitVRLittleEndian, 0, True, True, 16, 16, 15, 0, (), ()),
)


@pytest.mark.parametrize(
    "more",
    [
        {"unit": "HU"},
        {"unit": "US"},
        {"unit": ""},
        {"image_type": "DERIVED\\SECONDARY\\AXIAL\\MPR"},
        {"image_type": "AMIPS"},
    ],
)
def test_what_is_in_hu_is_taken(more):
    assert dicom.why_no_ct(SLICE._replace(modality="CT", **more)) is None


def without_offset(one):
    return one._replace(pixels=one.pixels._replace(offset=0))


def test_header_of_a_slice(tmp_path):
    (path,) = write_dicom(
        tmp_path,
        noise((8, 5, 1)),
        OBLIQUE,
        ConvolutionKernel=["B30f", "3"],
        RescaleType="HU",
        PatientID=" a patient ",
        PatientName="Doe^J",
        AcquisitionNumber=3,
        AcquisitionTime="101112.5",
        TriggerTime="40",
        InstanceNumber=7,
        PixelPaddingValue=63536,
        PixelPaddingRangeLimit=63540,
        BitsStored=12,
        HighBit=11,
    )
    found = read_header(path)
    assert without_offset(found)._replace(orientation=(), position=()) == SLICE._replace(
        path=path,
        patient="a patient",
        person="Doe^J",
        study="1.2.3",
        date="20000102",
        series="1.2.3.4",
        modality="CT",
        image_type="ORIGINAL\\PRIMARY\\AXIAL",
        spacing=(0.7, 0.9),
        decimals=14,
        rescale=("1", "-1024"),
        unit="HU",
        thickness=2.5,
        kernel="B30f\\3",
        number="7",
        acquisition=("3", "", "40", "", "101112.5"),
        pixels=SLICE.pixels._replace(stored=12, high=11, padding=(63536, 63540)),
    )
    assert Path(path).read_bytes()[found.pixels.offset :][:6] == b"\xe0\x7f\x10\x00OW"
    np.testing.assert_allclose(found.orientation, [*OBLIQUE[:, 0], *OBLIQUE[:, 1]], atol=1e-12)
    np.testing.assert_allclose(found.position, ORIGIN, atol=1e-9)


@pytest.mark.usefixtures("silent")
def test_tags_that_are_missing_or_empty(tmp_path):
    optional = [
        "PatientID",
        "StudyInstanceUID",
        "StudyDate",
        "SeriesInstanceUID",
        "Modality",
        "ImageType",
        "SamplesPerPixel",
        "PixelSpacing",
        "ImageOrientationPatient",
        "ImagePositionPatient",
        "RescaleSlope",
        "RescaleIntercept",
        "SliceThickness",
        "ConvolutionKernel",
    ]
    for value in (None, ""):
        tags = optional if value is None else [tag for tag in optional if tag != "SamplesPerPixel"]
        (path,) = write_dicom(tmp_path, noise((8, 5, 1)), **dict.fromkeys(tags, value))
        assert without_offset(read_header(path)) == SLICE._replace(path=path)


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize(
    "old, new, field, value",
    [  # of the same length: the file stays one
        (b"0.7\\0.9", b"abc\\def", "spacing", ()),
        (b"0.7\\0.9", b"0,7\\0,9", "spacing", ()),
        (b"0.7\\0.9", b"nan\\0.9", "spacing", ()),
        (b"0.7\\0.9", b"0.70.9 ", "spacing", ()),
        (b"0.7\\0.9", b"0.71234", "spacing", ()),
        (b"0.7\\0.9", b"1\\2\\3 4", "spacing", ()),
        (b"0.7\\0.9", b" 0.7\\.9", "spacing", (0.7, 0.9)),
        (b"2.5 ", b"thin", "thickness", 0.0),
        (b"2.5 ", b"inf ", "thickness", 0.0),
        (b"B30f", b"\xff\xfe3f", "kernel", "ÿþ3f"),
        (b"1.2.3.4\0", b"1.2.3.a\0", "series", "1.2.3.a"),
        (b"20000102", b"2000.1.2", "date", "2000.1.2"),
        (b"20000102", b"January ", "date", "January"),
        (b"ORIGINAL", b"orig nal", "image_type", "orig nal\\PRIMARY\\AXIAL"),
    ],
)
def test_odd_values_are_passed_over_in_silence(old, new, field, value, tmp_path):
    (path,) = write_dicom(tmp_path, noise((8, 5, 1)))
    content = Path(path).read_bytes()
    Path(path).write_bytes(content.replace(old, new))
    assert Path(path).read_bytes() != content
    assert getattr(read_header(path), field) == value


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize(
    "name, value",
    [
        ("Intercept", b"-10 4"),
        ("Intercept", b"-1\\24"),
        ("Intercept", b"--nan"),
        ("Intercept", b"-inf "),
        ("Slope", b"0    "),
        ("Slope", b"0.000"),
        ("Slope", b"x    "),
    ],
)
def test_an_odd_rescale_is_refused(name, value, tmp_path):
    """Taken for the usual one, it would give other HU."""
    paths = write_dicom(tmp_path, noise(), RescaleSlope="3.141", RescaleIntercept="-1024")
    old = {"Intercept": b"-1024", "Slope": b"3.141"}[name]
    Path(paths[2]).write_bytes(Path(paths[2]).read_bytes().replace(old, value))
    with pytest.raises(DataError, match="the rescale slope of 02.dcm is '.*', its intercept '-"):
        read_dicom(paths)


@pytest.mark.usefixtures("silent")
def test_files_that_are_no_dicom_or_cut_off_in_their_header(tmp_path):
    (source,) = write_dicom(tmp_path, noise((8, 5, 1)))
    whole = Path(source).read_bytes()
    size = whole.index(b"\x28\x00\x11\x00US")  # Columns, by which a cut is told
    path = tmp_path / "broken.dcm"
    made = {
        "empty": b"",
        "text": b"hello world\n" * 50,
        "short": b"hi",
        "page": b"<html>404 not found</html>",
        "bytes": bytes(range(256)) * 40,
        "zeros": bytes(5000),
        **{f"random {seed}": np.random.default_rng(seed).bytes(5000) for seed in range(20)},
    }
    for name, content in made.items():
        path.write_bytes(content)
        with pytest.raises(DataError) as error:
            read_header(str(path))
        assert error.value.path == str(path) and not isinstance(error.value, LeftOut), name
        assert error.value.reason.startswith("can't be read: ") and "\n" not in error.value.reason, name
    for at in range(1, len(whole) - 80, 7):
        path.write_bytes(whole[:at])
        with pytest.raises(DataError) as error:
            read_dicom([str(path)] * 3)
        if whole.index(b"\x08\x00\x16\x00UI") + 34 <= at <= size:  # from the end of the SOP class on
            assert "header is cut off" in error.value.reason
    with pytest.raises(DataError, match="No such file") as error:
        read_header(str(tmp_path / "gone.dcm"))
    assert str(tmp_path) not in error.value.reason


def test_random_damage_to_a_header_is_silent(tmp_path, silent):
    (source,) = write_dicom(tmp_path, noise((8, 5, 1)))
    whole, rng = Path(source).read_bytes(), np.random.default_rng(0)
    for _ in range(200):
        content = bytearray(whole)
        for at in rng.integers(132, len(whole) - 80, 3):
            content[at] = rng.integers(256)
        Path(source).write_bytes(content)
        try:
            assert isinstance(read_header(source), Slice)
        except DataError as error:
            assert "\n" not in error.reason and len(error.reason) < 250


def test_a_dicomdir_is_no_slice(tmp_path):
    for with_class in (True, False):
        one, meta = pydicom.Dataset(), pydicom.dataset.FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, dicom.DICOMDIR
        meta.MediaStorageSOPInstanceUID, one.file_meta, one.FileSetID = "1.2.3", meta, "DISK"
        if with_class:
            one.SOPClassUID = dicom.DICOMDIR
        one.save_as(tmp_path / "DICOMDIR", enforce_file_format=True)
        assert dicom.is_dicom(str(tmp_path / "DICOMDIR")) and read_header(str(tmp_path / "DICOMDIR")) is None


# ----------------------------------------------------------------------------------------------------- slices in order


def stack(n=20, step=2.5, axes=np.eye(3), decimals=9, **fields):
    """Headers of n even slices, positions rounded to so many decimals."""
    position = np.round(np.array(ORIGIN) + step * np.arange(n)[:, None] * axes[:, 2], decimals)
    one = SLICE._replace(
        patient="patient",
        study="1.2.3",
        date="20000102",
        series="1.2.3.4",
        modality="CT",
        image_type="ORIGINAL\\PRIMARY\\AXIAL",
        size=(512, 512),
        spacing=(0.7, 0.7),
        orientation=(*axes[:, 0], *axes[:, 1]),
        decimals=9,
        rescale=("1", "-1024"),
        unit="HU",
        thickness=2.5,
        kernel="B30f",
    )
    return [
        one._replace(path=f"folder/{k:02d}.dcm", sop=f"1.{k}", position=tuple(position[k]), **fields) for k in range(n)
    ]


def edited(slices, which, **fields):
    return [one._replace(**fields) if k == which else one for k, one in enumerate(slices)]


def moved(slices, which, by):
    """The slice `which` at another place along z."""
    x, y, z = slices[which].position
    return edited(slices, which, position=(x, y, z + by))


def tilted(by):
    """Each slice moved by so many mm towards the back against the one below."""
    return [
        one._replace(position=(one.position[0], one.position[1] + by * k, one.position[2]))
        for k, one in enumerate(stack())
    ]


LEFT_OUT = {  # name: (slices, reason)
    "scout": (stack(image_type="ORIGINAL\\PRIMARY\\LOCALIZER"), r"not a CT image: a scout \(localizer\)"),
    "MR": (stack(modality="MR", sop_class="1.2.840.10008.5.1.4.1.1.4"), "not a CT image: modality MR"),
    "no modality": (stack(modality=""), "not a CT image: modality unknown"),
    "secondary capture": (stack(sop_class=dicom.SECONDARY_CAPTURE), "not a CT image: a secondary capture"),
    "multi-frame capture": (stack(sop_class=dicom.SECONDARY_CAPTURE + ".2"), "not a CT image: a secondary capture"),
    "screen save": (stack(image_type="DERIVED\\SECONDARY\\SCREEN SAVE"), "not a CT image: a screen capture"),
    "projections": (
        stack(image_type="DERIVED\\SECONDARY\\PROJECTION IMAGE\\MIP"),
        r"a projection of slices \(PROJECTION IMAGE\)",
    ),
    "thin maximum projections": (stack(image_type="DERIVED\\SECONDARY\\MIP"), r"a projection of slices \(MIP\)"),
    "electron density": (stack(unit="ED"), "not a CT image in HU: its rescale type is ED"),
    "mass density": (stack(unit="MGML"), "not a CT image in HU: its rescale type is MGML"),
    "colour": (stack(samples=3), "not a CT image: colour, 3 values per pixel"),
    "several frames": (stack(1, frames=40), "multi-frame file of 40; convert it to NIfTI first"),
    "enhanced CT": (stack(1, sop_class=dicom.ENHANCED_CT), "multi-frame file"),
    "dose report": (stack(sop_class="1.2.840.10008.5.1.4.1.1.88.67"), "SOP class 1.2.840.10008.5.1.4.1.1.88.67"),
    "no spacing": (stack(spacing=()), "no geometry"),
    "spacing below 0": (stack(spacing=(-0.7, 0.7)), "no geometry"),
    "no orientation": (stack(orientation=()), "no geometry"),
    "no position": ([one._replace(position=()) for one in stack()], "no geometry"),
    "mostly scouts": (stack(3, modality="MR") + stack(4, image_type="LOCALIZER"), "a scout"),
    "mixed sizes": (edited(stack(), 7, size=(512, 511)), "mixed slices: sizes such as 512 x 511 and 512 x 512"),
    "mixed spacings": (
        edited(stack(), 7, spacing=(0.7, 0.75)),
        "mixed slices: spacings such as 0.7 x 0.7 and 0.7 x 0.75",
    ),
    "mixed orientations": (
        stack(10) + stack(10, axes=AXES["coronal"]),
        "mixed slices: orientations such as 1 x 0 x 0 x 0",
    ),
    "too few": (stack(15), r"too few slices: 15, expected at least 16 \(--min_slices\)"),
    "too few with scouts": (stack(15) + stack(9, image_type="LOCALIZER"), "too few slices: 15"),
    "doubled": (
        stack() + [stack()[4]._replace(path="other/again.dcm", sop="2.1")],
        "doubled slices: 1, such as 04.dcm and again.dcm at -793.1 mm",
    ),
    "all doubled": (stack() + [one._replace(sop="2" + one.sop) for one in stack()], "doubled slices: 20"),
    "all in one place": (stack(step=0), "doubled slices: 19"),
    "almost doubled": (moved(stack(), 9, 2.3), "doubled slices: 1, such as 09.dcm and 10.dcm"),
    "missing": (stack()[:8] + stack()[9:], "missing slices: 5 mm between 07.dcm and 09.dcm, 2.5 mm between most"),
    "several missing": (stack(40)[:4] + stack(40)[5:8] + stack(40)[11:], "missing slices: 10 mm between 07.dcm and 11"),
    "thin and missing": (stack(step=0.5)[:8] + stack(step=0.5)[9:], "missing slices: 1 mm"),
    "uneven": (moved(stack(), 9, 0.4), "uneven spacing: 2.9 mm between 08.dcm and 09.dcm, 2.5 mm between most"),
    "thick from the middle on": (
        stack(16)
        + [one._replace(position=(*one.position[:2], one.position[2] + 40)) for one in stack(8, step=3.5)[1:]],
        "mm between .*, 2.5 mm between most",
    ),
    "tilted gantry": (tilted(0.2), "tilted gantry: the slices are shifted sideways by up to 3.8 mm"),
}


@pytest.mark.parametrize("slices, reason", LEFT_OUT.values(), ids=LEFT_OUT)
def test_series_that_form_no_volume_are_left_out(slices, reason):
    order = np.random.default_rng(0).permutation(len(slices))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for few in (slices, [slices[k] for k in order]):
            with pytest.raises(LeftOut, match=reason) as error:
                assemble(few, 16, "folder#series")
            assert error.value.path == "folder#series" and "\n" not in error.value.reason


@pytest.mark.parametrize(
    "slices",
    [
        stack(),
        stack(axes=AXES["feet first"]),
        stack(axes=AXES["oblique"]),
        stack(axes=AXES["sagittal"]),
        stack(decimals=2, step=2.503),
        stack(decimals=2, step=0.625, axes=OBLIQUE),
        stack(200, decimals=1, step=1.25),
        stack(400, decimals=1, step=0.625),
        stack(100, decimals=1, step=3.27),
        stack(200, decimals=0, step=5.0),
        edited(stack(), 4, orientation=(1, 1e-4, 0, -1e-4, 1, 0)),
        [one._replace(orientation=(1, 0.0004999 + 2e-7 * (k % 2), 0, 0, 1, 0)) for k, one in enumerate(stack())],
        edited(stack(spacing=(0.70315, 0.70315)), 4, spacing=(0.703151, 0.703149)),
        tilted(0.01),
    ],
    ids=[
        "axial",
        "feet first",
        "oblique",
        "sagittal",
        "positions of 0.01 mm",
        "oblique of 0.01 mm",
        "1.25 mm slices in 0.1 mm",
        "0.625 mm slices in 0.1 mm",
        "3.27 mm slices in 0.1 mm",
        "whole millimetres",
        "noise in an orientation",
        "orientations beside a rounding",
        "spacings beside a rounding",
        "hardly tilted",
    ],
)
def test_slices_that_form_a_volume_are_put_in_order(slices):
    order = np.random.default_rng(1).permutation(len(slices))
    assert assemble([slices[k] for k in order], 16, "series").slices == slices
    scout = slices[3]._replace(
        path="scout.dcm", image_type="ORIGINAL\\PRIMARY\\LOCALIZER", size=(888, 733), position=()
    )
    capture = slices[3]._replace(path="capture.dcm", sop_class=dicom.SECONDARY_CAPTURE, spacing=())
    found = assemble([scout, *slices, capture], 16, "series")
    assert found.slices == slices and not any("left out" in note for note in found.notes)


def test_one_slice_is_no_volume():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(LeftOut, match="too few slices: 1, expected at least 2"):
            assemble(stack(1), 1, "series")
    assert len(assemble(stack(2), 1, "series").slices) == 2


def test_softer_kernels_come_first():
    for names in (
        ["B20f", "B30f", "B50f", "B70f"],
        ["SOFT", "STANDARD", "LUNG", "BONE", "BONEPLUS"],
        ["FC01", "FC51", "FC30", "FC81"],
        ["A", "B", "C", "D", "L"],
        ["Br36d\\3", "Br59d", "Qr69"],
        ["standard", "mine", "lung"],
    ):
        found = [dicom.sharpness(name) for name in names]
        assert found == sorted(found) and len(set(found)) == len(found), names
    assert dicom.sharpness("") == dicom.sharpness("unknown") == 50


# ------------------------------------------------------------------------------------------------------------ geometry


@pytest.mark.parametrize("decimals", [2, 3, 4, 14])
@pytest.mark.parametrize("decreasing", [False, True])
@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_rounded_cosines_lose_no_more_than_the_rounding(axes, decreasing, decimals, tmp_path):
    """The place of every corner against plain pydicom's reading of the exact headers, and of the rounded ones."""
    stored, flags = noise((40, 30, 12)), {"InstanceNumber": lambda k: 12 - k if decreasing else k + 1}
    names = [f"{11 - k if decreasing else k:02d}.dcm" for k in range(12)]
    exact = write_dicom(tmp_path / "exact", stored, axes, names=names, **flags)
    cosines = [f"{value:.{decimals}f}" for value in (*axes[:, 0], *axes[:, 1])]
    rounded = write_dicom(tmp_path / "rounded", stored, axes, names=names, ImageOrientationPatient=cosines, **flags)
    voxels, affine, notes = read_dicom(rounded)
    reach = 40 * SPACING[0] + 30 * SPACING[1]
    for paths, tolerance in ((exact, 1e-3 + reach * 10.0**-decimals), (rounded, 1e-3 + reach * 10.0**-decimals)):
        expected, where = by_pydicom(paths)
        np.testing.assert_array_equal(voxels, expected)
        assert corners_apart(voxels.shape, affine, where) < tolerance
    axes_found = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    np.testing.assert_allclose(axes_found.T @ axes_found, np.eye(3), atol=1e-9)
    assert notes == ()


@pytest.mark.parametrize("name", ["prone", "coronal", "sagittal", "oblique"])
def test_row_and_column_beside_the_right_angle_keep_their_orientation(name, tmp_path):
    """By 0.002, from where on GDCM takes the identity instead."""
    axes, stored = AXES[name], noise()
    skewed = axes[:, 1] + 0.002 * axes[:, 0]
    cosines = [f"{value:.10f}" for value in (*axes[:, 0], *skewed)]
    paths = write_dicom(tmp_path, stored, axes, ImageOrientationPatient=cosines)
    voxels, affine, _ = read_dicom(paths)
    expected, where = canonical(as_hu(stored - 1024), affine_to_ras(axes))
    np.testing.assert_array_equal(voxels, expected)
    assert corners_apart(voxels.shape, affine, where) < 0.02


@pytest.mark.parametrize(
    "cosines",
    [[1, 0, 0, 0.03, 1, 0], [0.97, 0, 0, 0, 1, 0], [1, 0, 0, 0, 1.03, 0], [1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]],
    ids=["skewed", "short", "long", "parallel", "none"],
)
def test_cosines_that_are_far_off_are_refused_by_name(cosines, tmp_path):
    paths = write_dicom(tmp_path, noise(), ImageOrientationPatient=cosines)
    with pytest.raises(LeftOut, match="orientation is none: row and column of ImageOrientationPatient"):
        read_dicom(paths)


def placed(tilt, n=12):
    """(z, y) positions of slices whose gantry is tilted by so many radians, as text of six decimals."""
    return lambda k: ["-10", f"{2.5 * k * np.sin(tilt):.6f}", f"{2.5 * k * np.cos(tilt):.6f}"]


@pytest.mark.parametrize(
    "cosines, tilt, tilted",
    [
        (["1", "0", "0", "0", "1", "0"], 0.1, True),
        (["1.0", "0.0", "0.0", "0.0", "1.0", "0.0"], 0.1, True),
        (["1.00", "0.00", "0.00", "0.00", "1.00", "0.00"], 0.1, True),
        (["1.000000", "0.000000", "0.000000", "0.000000", "1.000000", "0.000000"], 0.03, True),
        (["1.00", "0.00", "0.00", "0.00", "1.00", "0.00"], 0.004, False),
    ],
)
def test_only_what_rounding_explains_is_no_tilted_gantry(cosines, tilt, tilted, tmp_path):
    paths = write_dicom(tmp_path, noise((8, 5, 60)), ImageOrientationPatient=cosines, ImagePositionPatient=placed(tilt))
    if tilted:
        with pytest.raises(LeftOut, match="tilted gantry"):
            read_dicom(paths)
    else:
        affine = read_dicom(paths)[1]
        np.testing.assert_allclose(affine[:3, 2] / 2.5, [0, -np.sin(tilt), np.cos(tilt)], atol=1e-6)


@pytest.mark.parametrize("value", ["-2.5", "5", "0", "-7"])
def test_spacing_between_slices_plays_no_part(value, tmp_path):
    stored = noise()
    paths = write_dicom(tmp_path, stored, SpacingBetweenSlices=lambda k: value if value != "-7" or k == 0 else None)
    assert_is(read_dicom(paths), *canonical(as_hu(stored - 1024), affine_to_ras(np.eye(3))))


def test_steps_that_drift_are_refused_where_a_slice_would_lie_elsewhere(tmp_path):
    """No step is far off, but half of the slices are nearer to each other than the others."""
    steps = np.cumsum([0, *[2.3] * 20, *[2.5] * 20])  # 2 mm beside in the middle
    for name, stretch in (("small", 1), ("large", 2)):
        z = 2.4 * np.arange(41) + stretch * (steps - 2.4 * np.arange(41))
        place = lambda k, z=z: [-31.25, 47.5, f"{z[k]:.3f}"]  # noqa: E731
        write_dicom(tmp_path / name, noise((8, 5, 41)), ImagePositionPatient=place)
    with Volume(tmp_path / "small") as volume:
        assert volume.notes == ("its slices lie up to 2 mm beside the even grid that was taken",)
    with pytest.raises(DataError, match="uneven spacing: slices lie up to 4 mm beside"), Volume(tmp_path / "large"):
        pass


def test_slices_beside_the_even_grid_are_told(tmp_path):
    height = [0, 2.5, 5.0, 7.65, 10.0, 12.5]
    paths = write_dicom(tmp_path, noise(), ImagePositionPatient=lambda k: [0, 0, height[k]])
    voxels, affine, notes = read_dicom(paths)
    assert notes == ("its slices lie up to 0.15 mm beside the even grid that was taken",)


# -------------------------------------------------------------------------------------------- which slices are a volume


def volumes_in(folder, min_slices=2):
    """{name: (voxels, affine, notes)} of what is found below a folder, read by name as training reads it."""
    found = {}
    for one in find_scans(folder).scans:
        with Volume(folder / one.name) as volume:
            found[one.name] = volume.read(), volume.affine, volume.notes
    return found


def test_two_patients_of_one_series_uid_are_two_volumes(tmp_path):
    """Also in one folder, with their slices between each other, and with one PatientID."""
    first, second = noise(seed=1), noise(seed=2)
    for case, (one, other) in {
        "id": ({"PatientID": "A"}, {"PatientID": "B"}),
        "name": ({"PatientName": "A"}, {"PatientName": "B"}),
        "study": ({"StudyInstanceUID": "1.1"}, {"StudyInstanceUID": "1.2"}),
    }.items():
        folder = tmp_path / case
        write_dicom(folder, first, names=[f"a{k}" for k in range(6)], **one)
        origin = (*ORIGIN[:2], ORIGIN[2] + 1.25)
        write_dicom(folder, second, origin=origin, names=[f"b{k}" for k in range(6)], **other)
        found = volumes_in(folder)
        assert list(found) == [".#1.2.3.4", ".#1.2.3.4#2"]
        for (voxels, affine, _), stored, place in zip(found.values(), (first, second), (ORIGIN, origin)):
            assert_is((voxels, affine), *canonical(as_hu(stored - 1024), affine_to_ras(np.eye(3), origin=place)))


@pytest.mark.parametrize("shift", [0, 1.25, 7.5])
@pytest.mark.parametrize(
    "tag, values",
    [
        ("AcquisitionNumber", (1, 2)),
        ("AcquisitionTime", ("101112", "101145")),
        ("AcquisitionDateTime", ("20010101101112", "20010101101145")),
        ("TemporalPositionIdentifier", (1, 2)),
        ("TriggerTime", ("0", "400")),
        ("NominalPercentageOfCardiacPhase", (0.0, 40.0)),
        ("FrameOfReferenceUID", ("1.5", "1.6")),
    ],
)
def test_two_acquisitions_of_one_series_are_two_volumes(tag, values, shift, tmp_path):
    first, second = noise(seed=1), noise(seed=2)
    origin = (*ORIGIN[:2], ORIGIN[2] + shift)
    write_dicom(tmp_path, first, names=[f"{k}a" for k in range(6)], InstanceNumber=lambda k: k + 1, **{tag: values[0]})
    write_dicom(
        tmp_path,
        second,
        origin=origin,
        names=[f"{k}b" for k in range(6)],
        SOPInstanceUID=lambda k: f"1.7.{k}",
        InstanceNumber=lambda k: k + 7,
        **{tag: values[1]},
    )
    found = volumes_in(tmp_path)
    assert list(found) == [".#1.2.3.4", ".#1.2.3.4#2"]
    for (voxels, affine, _), stored, place in zip(found.values(), (first, second), (ORIGIN, origin)):
        assert_is((voxels, affine), *canonical(as_hu(stored - 1024), affine_to_ras(np.eye(3), origin=place)))


@pytest.mark.parametrize("tag", ["ImageType", "ConvolutionKernel", "ContentTime", "folder"])
def test_twice_the_same_places_are_told_apart_by_what_differs(tag, tmp_path):
    first, second, values = noise(seed=1), noise(seed=2), (("A\\B", "A\\C") if tag == "ImageType" else ("10", "20"))
    for k, stored in enumerate((first, second)):
        changes = {} if tag == "folder" else {tag: values[k]}
        folder = tmp_path / str(k) if tag == "folder" else tmp_path
        names = [f"{k}{i}" for i in range(6)]
        write_dicom(folder, stored, names=names, SOPInstanceUID=lambda i, k=k: f"1.{k}.{i}", **changes)
    found = volumes_in(tmp_path)
    assert list(found) == (["0#1.2.3.4", "1#1.2.3.4"] if tag == "folder" else [".#1.2.3.4", ".#1.2.3.4#2"])
    for (voxels, _, _), stored in zip(found.values(), (first, second)):
        np.testing.assert_array_equal(voxels, as_hu(stored - 1024)[::-1, ::-1])


@pytest.mark.parametrize("first", [(1, 1), (1, 7), (41, 1)], ids=["repeated", "continued", "continued from the second"])
def test_a_series_whose_patients_nothing_tells_apart_is_refused(first, tmp_path):
    """An anonymiser made all UIDs one, and the numbers, or a program numbered two times or kernels on; the slices lie
    evenly between each other."""
    for k, shift in enumerate((0, 1.25)):
        origin, names = (*ORIGIN[:2], ORIGIN[2] + shift), [f"{k}{i}" for i in range(6)]
        write_dicom(tmp_path, noise(seed=k), origin=origin, names=names, InstanceNumber=lambda i, k=k: i + first[k])
    with pytest.raises(DataError, match="several series of one UID"), Volume(tmp_path):
        pass
    for k in range(2):  # in a folder of its own each is a volume
        (tmp_path / str(k)).mkdir()
        for path in tmp_path.glob(f"{k}?"):
            path.rename(tmp_path / str(k) / path.name)
    assert list(volumes_in(tmp_path)) == ["0#1.2.3.4", "1#1.2.3.4"]


def test_a_patient_whose_name_is_written_in_two_ways_is_one(tmp_path):
    write_dicom(tmp_path, noise(), PatientName=lambda k: ("ROE^JANE", "Roe^Jane^^")[k % 2])
    ((_, (voxels, _, _)),) = volumes_in(tmp_path).items()
    np.testing.assert_array_equal(voxels, as_hu(noise() - 1024)[::-1, ::-1])


def test_two_kernels_of_one_series_between_each_other_are_two_volumes(tmp_path):
    for k, kernel in enumerate(("B30f", "B70f")):
        origin, names = (*ORIGIN[:2], ORIGIN[2] + 1.25 * k), [f"{k}{i}" for i in range(6)]
        changes = {"InstanceNumber": lambda i, k=k: i + 1 + 6 * k, "SOPInstanceUID": lambda i, k=k: f"1.{k}.{i}"}
        write_dicom(tmp_path, noise(seed=k), origin=origin, names=names, ConvolutionKernel=kernel, **changes)
    found = volumes_in(tmp_path)
    assert list(found) == [".#1.2.3.4", ".#1.2.3.4#2"]
    for k, (voxels, _, _) in enumerate(found.values()):
        np.testing.assert_array_equal(voxels, as_hu(noise(seed=k) - 1024)[::-1, ::-1])


def test_acquisitions_that_follow_each_other_are_one_volume(tmp_path):
    """A scanner's steps along the body, each with a number and time of its own."""
    stored = noise((8, 5, 12))
    write_dicom(
        tmp_path,
        stored,
        AcquisitionNumber=lambda k: k // 4 + 1,
        AcquisitionTime=lambda k: f"1011{k // 4:02d}",
        ContentTime=lambda k: f"1012{k:02d}",
        InstanceNumber=lambda k: k % 4 + 1,
    )
    ((name, (voxels, _, notes)),) = volumes_in(tmp_path).items()
    np.testing.assert_array_equal(voxels, as_hu(stored - 1024)[::-1, ::-1])
    assert notes == ()


@pytest.mark.parametrize("where", ["beside", "folder", "no UID"])
def test_copies_count_once_with_a_note(where, tmp_path):
    stored = noise()
    changes = {"SOPInstanceUID": None} if where == "no UID" else {}
    for path in map(Path, write_dicom(tmp_path / "a", stored, **changes)):
        copy = tmp_path / "b" / path.name if where == "folder" else path.with_name(f"{path.stem}(1).dcm")
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    ((name, found),) = volumes_in(tmp_path).items()
    assert name == (".#1.2.3.4" if where == "folder" else "a#1.2.3.4")
    assert_is(found, *canonical(as_hu(stored - 1024), affine_to_ras(np.eye(3))))
    assert len(found[2]) == 1 and "6 files are copies of other slices" in found[2][0]


@pytest.mark.parametrize(
    "tag, reason",
    [
        ("ImagePositionPatient", "missing slices.*1 slice .03.dcm. left out: without position"),
        ("ImageOrientationPatient", "missing slices.*1 slice .03.dcm. left out: without orientation"),
        ("PixelSpacing", "missing slices.*1 slice .03.dcm. left out: without pixel spacing"),
        ("RescaleIntercept", "mixed rescale.*1 slice .03.dcm. differ from the others"),
        ("RescaleSlope", "mixed rescale.*1 slice .03.dcm. differ from the others"),
    ],
)
def test_one_slice_without_a_tag_is_not_passed_over_in_silence(tag, reason, tmp_path):
    value = {"PixelSpacing": ["0.7", "0.9"], "RescaleIntercept": "-1024", "RescaleSlope": "1"}.get(tag)
    for k in (3, 0):  # in the middle, and at an end where no gap tells
        folder = tmp_path / str(k)
        write_dicom(folder, noise(), **({tag: lambda i, k=k: None if i == k else value} if value else {}))
        if not value:
            one = pydicom.dcmread(folder / f"{k:02d}.dcm")
            delattr(one, tag)
            one.save_as(folder / f"{k:02d}.dcm")
        if k == 3 or "rescale" in reason:
            with pytest.raises(LeftOut, match=reason.replace("03", f"{k:02d}")), Volume(folder):
                pass
        else:
            with Volume(folder) as volume:
                assert volume.shape == (8, 5, 5) and volume.notes[0].startswith("1 slice (00.dcm) left out: without")


@pytest.mark.parametrize("tag", ["AcquisitionNumber", "FrameOfReferenceUID", "AcquisitionTime", "TriggerTime"])
@pytest.mark.parametrize("without", [(1, 3, 5), (2, 3, 4)])
def test_slices_of_one_acquisition_that_lost_its_tag_are_one_volume(tag, without, tmp_path):
    stored = noise()
    write_dicom(tmp_path, stored, InstanceNumber=lambda k: k + 1, **{tag: lambda k: None if k in without else "7"})
    ((_, found),) = volumes_in(tmp_path).items()
    assert_is(found, *canonical(as_hu(stored - 1024), affine_to_ras(np.eye(3))))


def test_a_slice_that_does_not_say_that_it_is_ct_is_left_out_with_a_note(tmp_path):
    write_dicom(tmp_path, noise(), Modality=lambda k: None if k == 5 else "CT")
    write_dicom(tmp_path, noise(), names=[f"s{k}" for k in range(6)], ImageType="A\\B\\LOCALIZER")  # as in many series
    with Volume(tmp_path) as volume:
        assert volume.shape[2] == 5 and volume.notes == ("1 slice (05.dcm) left out: not a CT image: modality unknown",)


def test_a_scout_that_is_not_called_one_is_left_out_with_a_note(tmp_path):
    stored = noise()
    write_dicom(tmp_path, stored)
    write_dicom(tmp_path, noise((30, 40, 1)), AXES["coronal"], names=["scout"], SOPInstanceUID="1.7")
    ((_, found),) = volumes_in(tmp_path).items()
    assert_is(found, *canonical(as_hu(stored - 1024), affine_to_ras(np.eye(3))))
    assert found[2] == ("1 slice (scout) left out: of another orientation, such as a scout",)


# -------------------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize(
    "padding, limit, signed, bits, intercept",
    [
        (63536, None, False, 16, -1024),  # 65536 - 2000
        (63536, None, False, 16, 0),
        (65535, None, False, 16, -1024),
        (-2000, None, True, 16, 0),
        (-32768, None, True, 16, -1024),
        (63536, None, False, 12, -1024),
        (-2000, None, True, 12, 0),
        (63000, 63536, False, 16, -1024),
        (63536, 63000, False, 16, -1024),
        (-2100, -2000, True, 16, 0),
        (0, None, False, 16, -1024),
    ],
)
def test_padding_is_air_before_rescaling(padding, limit, signed, bits, intercept, tmp_path):
    """Whether its value is written as signed or unsigned, and whether it fits into the bits of the image."""
    stored = noise(low=1, high=1500)
    padded = np.zeros(stored.shape, bool)
    padded[:3] = True
    held = stored.copy()
    held[padded] = padding if limit is None else np.linspace(padding, limit, padded.sum()).astype(int)
    names = ("PixelPaddingValue", "PixelPaddingRangeLimit")
    for vr in ("US", "SS"):
        paths = write_dicom(
            tmp_path / vr,
            (held % 65536).astype(np.uint16),
            PixelRepresentation=int(signed),
            BitsStored=bits,
            HighBit=bits - 1,
            RescaleIntercept=str(intercept),
        )
        for path in paths:
            one = pydicom.dcmread(path)
            for name, value in zip(names, (padding, limit)):
                if value is not None:
                    number = value % 65536 if vr == "US" else (value + 32768) % 65536 - 32768
                    one.add_new(name, vr, number)
            one.save_as(path)
        expected = np.where(padded, AIR, as_hu(stored + intercept))
        np.testing.assert_array_equal(read_dicom(paths)[0], expected[::-1, ::-1])


def test_padding_that_looks_like_tissue_is_told(tmp_path):
    stored = noise(low=-1000, high=400)
    paths = write_dicom(tmp_path, stored, signed=True, RescaleIntercept="0", PixelPaddingValue=0)
    voxels, _, notes = read_dicom(paths)
    np.testing.assert_array_equal(voxels, np.where(stored == 0, AIR, stored)[::-1, ::-1])
    assert notes == ("its PixelPaddingValue 0 stands for 0 HU: voxels of that value became air",)


def bits(stored, signed, kind):
    """(words, tags) of 12-bit values (slope 1, intercept 0 or -1024 for unsigned), stored in several ways."""
    words, tags = (stored & 0x0FFF).astype("<u2"), {"BitsStored": 12, "HighBit": 11}
    if kind == "extended":
        words = stored.astype("<i2").view("<u2")
    elif kind == "upper bits":
        words, tags["HighBit"] = words << 4, 15
    elif kind == "overlay":
        words[2:5, 1:3] |= 0x8000
    elif kind == "undeclared":
        words[2:5, 1:3] |= 0x8000
    elif kind == "low bits":
        tags["HighBit"] = 15
    return words, tags


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("kind", ["masked", "extended", "upper bits", "overlay", "undeclared", "low bits"])
def test_bits_that_are_no_image_are_none(kind, signed, tmp_path):
    """Of what the header does not tell nothing is guessed."""
    values = noise(low=-1024, high=2047) if signed else noise(low=0, high=4096)
    words, tags = bits(values, signed, kind)
    paths = write_dicom(tmp_path, words, RescaleIntercept="0", PixelRepresentation=int(signed), **tags)
    if kind == "overlay":
        for path in paths:
            one = pydicom.dcmread(path)
            one.add_new((0x6000, 0x0102), "US", 15)
            one.save_as(path)
    if kind in ("undeclared", "low bits"):
        with pytest.raises(DataError, match="has values in other bits than its header says"):
            read_dicom(paths)
    else:
        np.testing.assert_array_equal(read_dicom(paths)[0], values[::-1, ::-1].clip(AIR))


@pytest.mark.parametrize(
    "changes",
    [
        {"PhotometricInterpretation": "MONOCHROME1"},
        {"PresentationLUTShape": "INVERSE"},
        {"PixelAspectRatio": [2, 1]},
        {"ImagerPixelSpacing": ["0.3", "0.3"]},
        {"NumberOfFrames": 1},
        {"BitsAllocated": 16, "SamplesPerPixel": None},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_for_display_changes_nothing(changes, tmp_path):
    stored = noise()
    expected = canonical(as_hu(stored - 1024), affine_to_ras(np.eye(3)))
    assert_is(read_dicom(write_dicom(tmp_path, stored, **changes)), *expected)


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "u4", "i4"])
def test_other_widths_and_byte_orders(dtype, big, tmp_path):
    size, signed = int(dtype[1]) * 8, dtype[0] == "i"
    stored = noise(low=-900 if signed else 0, high=250 if size == 8 else 3000)
    folder = tmp_path / "in"
    folder.mkdir()
    for k, path in enumerate(write_dicom(tmp_path / "first", stored)):
        one = pydicom.dcmread(path)
        one.BitsAllocated = one.BitsStored = size
        one.HighBit, one.PixelRepresentation, one.RescaleIntercept = size - 1, int(signed), "-7"
        one["PixelData"].value = stored[..., k].T.astype(f"{'>' if big else '<'}{dtype}").tobytes()
        one["PixelData"].VR = "OB" if size == 8 and not big else "OW"
        if big:
            one.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
        pydicom.dcmwrite(folder / f"{k}.dcm", one, implicit_vr=False, little_endian=not big, force_encoding=True)
    found = read_dicom(folder.iterdir())
    if big and size == 8:  # 8-bit pixels in words, whose bytes pydicom swaps: no scanner writes CT so
        return
    np.testing.assert_array_equal(found[0], as_hu(stored - 7)[::-1, ::-1])
    np.testing.assert_array_equal(found[0], by_pydicom(folder.iterdir())[0])


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"BitsAllocated": 12}, "BitsAllocated 12"),
        ({"BitsAllocated": None}, "BitsAllocated None"),
        ({"BitsStored": 17, "HighBit": 16}, "BitsStored 17"),
        ({"BitsStored": 0}, "BitsStored 0"),
        ({"PixelRepresentation": None}, "PixelRepresentation None"),
        ({"Rows": 500}, "has pixel data of 80 bytes, expected 8000"),
        ({"Rows": 2}, "has pixel data of 80 bytes, more than one image of 32"),
    ],
    ids=str,
)
def test_pixels_that_are_not_as_described_are_refused(change, reason, tmp_path):
    paths = write_dicom(tmp_path, noise(), **change)
    with pytest.raises(DataError, match=reason):
        read_dicom(paths)


def test_a_syntax_without_decoder_is_named(tmp_path):
    for path in write_dicom(tmp_path, noise((40, 32, 3))):
        one = pydicom.dcmread(path)
        one.PixelData = pydicom.encaps.encapsulate([bytes(100)])
        one["PixelData"].is_undefined_length = True
        one.file_meta.TransferSyntaxUID = pydicom.uid.HTJ2KLossless
        one.save_as(path)
    with Volume(tmp_path) as volume, pytest.raises(DataError, match="compressed as High-Throughput JPEG 2000"):
        volume.read()


# -------------------------------------------------------------------------------------------------- below a folder


def test_what_is_found_below_a_folder(tmp_path):
    write_series(tmp_path / "p1" / "deep", n=4)
    write_series(tmp_path / "p2", n=4, patient="P2", series="1.2.3.2")
    write_series(tmp_path / "p2", n=1, series="1.5", prefix="s", edit=lambda one, i: setattr(one, "Modality", "MR"))
    write_image(tmp_path / "v" / "a.mhd", scan())
    write_image(tmp_path / "v" / "b.nii.gz", scan())
    for name in ("x_Tilt_1", "x", "y_Eq_1", "y", "z_Tilt_1", "w_Tilt_1_Eq_1", "w_Tilt_1", "w"):
        write_image(tmp_path / "dcm2niix" / f"{name}.nii.gz", scan())
    for name in ("a.zip", "b.tgz", "c.tar.gz", "d.txt", "e.txt", "f.json", "g", "DICOMDIR", "h.raw"):
        (tmp_path / name).write_bytes(b"something else that is long enough")
    (tmp_path / "p1" / "broken.dcm").write_bytes(b"no")
    (tmp_path / "out").mkdir()
    write_image(tmp_path / "out" / "mine.nii.gz", scan())
    found = find_scans(tmp_path, [tmp_path / "out"])
    assert [one.name for one in found.scans] == [
        *(f"dcm2niix/{name}.nii.gz" for name in ("w_Tilt_1_Eq_1", "x_Tilt_1", "y_Eq_1", "z_Tilt_1")),
        "p1/deep#1.2.3.1",
        "p2#1.2.3.2",
        "v/a.mhd",
        "v/b.nii.gz",
    ]
    assert {one.name: one.problem.reason.split(":")[0] for one in found.problems} == {
        "dcm2niix/w.nii.gz": "uncorrected",
        "dcm2niix/w_Tilt_1.nii.gz": "uncorrected",
        "dcm2niix/x.nii.gz": "uncorrected",
        "dcm2niix/y.nii.gz": "uncorrected",
        "p1/broken.dcm": "can't be read",
        "p2#1.5": "not a CT image",
    }
    assert dict(found.others) == {
        "packed archives (unpack them)": 3,
        ".txt files": 2,
        ".json files": 1,
        ".raw files": 1,
        "DICOMDIR files": 1,
        "other files": 1,
    }
    told = found.passed_over()
    assert "\n" not in told and "3 packed archives (unpack them)" in told and "modality MR" in told
    assert pickle.loads(pickle.dumps(found)).scans == found.scans
    for one in found.scans:
        with Volume(tmp_path / one.name) as volume:
            assert volume.read().shape == volume.shape


def test_processes_and_large_folders_find_the_same(tmp_path, monkeypatch):
    """A series of which several workers see a part is put together again."""
    for k in range(3):
        write_dicom(
            tmp_path / "flat",
            noise((4, 3, 12), seed=k),
            names=[f"{k}_{i}" for i in range(12)],
            SeriesInstanceUID=f"1.{k}",
            SOPInstanceUID=lambda i, k=k: f"1.{k}.{i}",
        )
    write_dicom(tmp_path / "cd" / "0", noise((4, 3, 6)), SeriesInstanceUID="1.9")
    write_dicom(
        tmp_path / "cd" / "1",
        noise((4, 3, 6)),
        origin=(*ORIGIN[:2], ORIGIN[2] + 15),
        SeriesInstanceUID="1.9",
        SOPInstanceUID=lambda i: f"1.9.{i}",
    )
    whole = find_scans(tmp_path)
    assert [one.name for one in whole.scans] == ["cd#1.9", "flat#1.0", "flat#1.1", "flat#1.2"]
    assert [len(one.files) for one in whole.scans] == [12] * 4
    monkeypatch.setattr("dino3d.data.scans.FILES_PER_TASK", 5)
    monkeypatch.setattr("dino3d.data.scans.LARGEST_FOLDER", 6)
    assert find_scans(tmp_path) == whole
    assert find_scans(tmp_path, workers=2) == whole


def test_a_series_is_opened_by_its_folder_or_its_name(tmp_path):
    stored = noise()
    write_dicom(tmp_path / "one", stored)
    write_dicom(tmp_path / "one", noise(), SeriesInstanceUID="1.9", Modality="MR", names=[f"mr{k}" for k in range(6)])
    expected = canonical(as_hu(stored - 1024), affine_to_ras(np.eye(3)))
    for path in (tmp_path / "one", f"{tmp_path}/one#1.2.3.4"):
        with Volume(path) as volume:
            assert_is((volume.read(), volume.affine), *expected)
            np.testing.assert_array_equal(volume.read((1, 2, 3), (2, 2, 2)), expected[0][1:3, 2:4, 3:5])
            assert not volume.is_constant() and volume.read_values().base is not None
        with contextlib.ExitStack() as closing:
            taken = open_series(path, closing).take((slice(None),) * 3)
            assert not taken.flags.writeable
    with pytest.raises(DataError, match="no such DICOM series"), Volume(f"{tmp_path}/one#1.7"):
        pass
    with pytest.raises(DataError, match="no such file"), Volume(f"{tmp_path}/two#1.7"):
        pass
    write_dicom(tmp_path / "one", stored, SeriesInstanceUID="1.8", names=[f"b{k}" for k in range(6)])  # seen at once
    with pytest.raises(DataError, match="a folder with 2 DICOM series of CT"), Volume(tmp_path / "one"):
        pass
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="a folder with 0 DICOM series of CT"), Volume(tmp_path / "none"):
        pass


def test_a_folder_whose_name_holds_a_number_sign(tmp_path):
    """Beside one that is called as its name up to there."""
    stored = noise()
    for name in ("a", "a/1", "a#b/1#2"):
        write_dicom(tmp_path / name, stored, SeriesInstanceUID="1.2")
    (found,) = (scan.name for scan in find_scans(tmp_path / "a#b").scans)
    assert found == "1#2#1.2"
    with Volume(f"{tmp_path}/a#b/{found}") as volume:
        assert_is((volume.read(), volume.affine), *canonical(as_hu(stored - 1024), affine_to_ras(np.eye(3))))


def test_headers_are_read_once_for_many_patches(tmp_path, monkeypatch):
    write_dicom(tmp_path, noise())
    read = []
    monkeypatch.setattr("dino3d.data.dicom_series.read_header", lambda path: read.append(path) or read_header(path))
    for _ in range(3):
        with Volume(f"{tmp_path}#1.2.3.4") as volume:
            volume.read((0, 0, 0), (2, 2, 2))
    assert len(read) == 6


def test_training_and_conversion_read_the_same(tmp_path, run):  # noqa: F811
    """Whatever is odd about a series: one function decides, and the manifest has what training is told."""
    write_series(tmp_path / "in" / "even", n=18)
    write_series(tmp_path / "in" / "gap", series="1.2", study="2.1", patient="P2", edit=lambda one, i: i != 7)
    for part in ("a", "b"):
        write_series(tmp_path / "in" / "copied" / part, series="1.3", study="2.2", patient="P3")
    assert run("nlst", "--input", tmp_path / "in", "--output", tmp_path / "out").code == 0
    rows = manifest(tmp_path / "out")
    assert {name: row["status"] for name, row in rows.items()} == {
        "copied#1.3": "written",
        "even#1.2.3.1": "written",
        "gap#1.2": "left out",
    }
    for name, row in rows.items():
        if row["output"]:
            with Volume(tmp_path / "in" / name) as raw, Volume(tmp_path / "out" / row["output"]) as converted:
                np.testing.assert_array_equal(raw.read(), converted.read())
                np.testing.assert_allclose(raw.affine, converted.affine, atol=1e-12)
                assert row["reason"] == ("note: " + "; ".join(raw.notes) if raw.notes else "")
        else:
            with pytest.raises(DataError) as error, Volume(tmp_path / "in" / name):
                pass
            assert row["reason"] == error.value.reason


def test_undeclared_padding_is_told_in_the_manifest(tmp_path, run):  # noqa: F811
    def edit(one, i):
        words = np.frombuffer(one.PixelData, "<u2").copy().reshape(12, 16)
        words[:, :4] = 63536
        one.PixelData = words.tobytes()

    write_series(tmp_path / "in", edit=edit)
    result = run("nlst", "--input", tmp_path / "in", "--output", tmp_path / "out")
    assert result.code == 0 and "1 files have a note in the manifest, such as .#1.2.3.1: " in result.out
    (_, reason), *_ = outcomes(tmp_path / "out").values()
    assert reason == "note: 25% of its voxels are above 20,000 HU: padding that its header does not tell?"


# ------------------------------------------------------------------------------------------------------------- real CT


def test_real_dicom_is_what_pydicom_reads(shared_data):
    paths = sorted((shared_data / "dicom" / "lungdx_a0002" / "t0").iterdir())
    assert_is(read_dicom(paths, 16), *by_pydicom(paths))


@pytest.mark.parametrize("name", ["PatientID", "PatientName", "StudyInstanceUID"])
def test_a_series_that_half_lost_whose_it_is_is_left_out(name, tmp_path):
    """As two volumes it would have every second slice each; as one it might be of two patients."""
    told = {"PatientName": "ROE^JANE", name: lambda k: "1.2.3" if k % 2 else None}
    write_dicom(tmp_path / "half", noise((8, 5, 12)), **told)
    write_dicom(tmp_path / "whole", noise((8, 5, 6)), SeriesInstanceUID="1.2.3.5")
    found = find_scans(tmp_path)
    assert [scan.name for scan in found.scans] == ["whole#1.2.3.5"]
    assert {scan.problem.reason for scan in found.problems} == {f"mixed slices: only some have a {name}"}
