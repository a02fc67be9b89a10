"""Small inputs for prepare_data.py as scanners and archives deliver them, and the script called without processes."""

import csv
import functools
import json
import os
import pickle
import sys
import warnings
from typing import NamedTuple

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

import prepare_data
import utils
from dino3d import run_lock
from dino3d.data import images, scans
from dino3d.data.sidecar import index_path
from dino3d.prepare import check, conversion
from dino3d.prepare.phantoms import labelled_phantom

CT, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


# ------------------------------------------------------------------------------------------------------------- inputs


@functools.cache
def phantom(seed=0, shape=(40, 32, 20), spacing=(8.0, 8.0, 14.0)):
    """(volume, affine, numbered nodules) of a chest phantom in RAS."""
    return labelled_phantom(seed, shape, spacing)


def scan(seed=0, *size, **sizes):
    """A chest phantom as a SimpleITK.Image."""
    return images.make_image(*phantom(seed, *size, **sizes)[:2])


def write_image(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return path


def write_series(
    folder,
    series="1.2.3.1",
    patient="P1",
    study="1.2.3",
    date="20000102",
    n=18,
    thickness=2.0,
    kernel="B30f",
    edit=None,
    prefix="",
):
    """n CT slices of 16 x 12 pixels as DICOM files <prefix>00.dcm, <prefix>01.dcm, ..., 2 mm apart.

    Stored values are HU + 1000; a lung-like box lies in soft tissue. edit: called with each slice's Dataset and its
    number before it is written; the file is not written where it returns False.
    """
    folder.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", module="pydicom")  # scanners and archives break the rules too
    for i in range(n):
        hu = np.full((12, 16), 40, np.int16)
        hu[3:9, 4:12] = -850 + i
        meta = pydicom.dataset.FileMetaDataset()
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        one = pydicom.Dataset()
        one.file_meta = meta
        one.SpecificCharacterSet = "ISO_IR 192"
        one.SOPClassUID, one.SOPInstanceUID, one.Modality = CT, f"1.9.{i + 1}", "CT"
        one.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        one.PatientID, one.StudyInstanceUID, one.SeriesInstanceUID, one.StudyDate = patient, study, series, date
        one.SliceThickness, one.ConvolutionKernel = thickness, kernel
        one.Rows, one.Columns = hu.shape
        one.PixelSpacing, one.ImageOrientationPatient = [1.5, 1.25], [1, 0, 0, 0, 1, 0]
        one.ImagePositionPatient = [-10.0, -9.0, 2.0 * i]
        one.RescaleSlope, one.RescaleIntercept = 1, -1000
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 0
        one.PixelData = (hu + 1000).astype(np.uint16).tobytes()
        if edit is None or edit(one, i) is not False:
            meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = one.SOPClassUID, one.SOPInstanceUID
            one.save_as(folder / f"{prefix}{i:02d}.dcm", enforce_file_format=True)
    return folder


def write_dicom(
    folder,
    stored,
    axes=np.eye(3),
    spacing=(0.9, 0.7, 2.5),
    origin=(-31.25, 47.5, -803.1),
    names=None,
    signed=False,
    syntax=pydicom.uid.ExplicitVRLittleEndian,
    **changes,
):
    """Paths of CT slices with these stored values (columns, rows, slices).

    changes: tags of other values, or of functions of the slice's number; None leaves a tag out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k in range(stored.shape[2]):
        one, meta = pydicom.Dataset(), pydicom.dataset.FileMetaDataset()
        meta.TransferSyntaxUID = syntax
        one.file_meta = meta
        fields = {
            "SOPClassUID": CT,
            "SOPInstanceUID": f"1.2.3.4.{k + 1}",
            "StudyDate": "20000102",
            "Modality": "CT",
            "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
            "PatientID": "patient",
            "StudyInstanceUID": "1.2.3",
            "SeriesInstanceUID": "1.2.3.4",
            "SliceThickness": "2.5",
            "ConvolutionKernel": "B30f",
            "Columns": stored.shape[0],
            "Rows": stored.shape[1],
            "PixelSpacing": [f"{spacing[1]}", f"{spacing[0]}"],
            "ImageOrientationPatient": [f"{value:.16f}"[:16] for value in (*axes[:, 0], *axes[:, 1])],
            "ImagePositionPatient": [f"{value:.12f}"[:16] for value in np.array(origin) + k * spacing[2] * axes[:, 2]],
            "RescaleSlope": "1",
            "RescaleIntercept": "-1024",
            "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2",
            "BitsAllocated": 16,
            "BitsStored": 16,
            "HighBit": 15,
            "PixelRepresentation": int(signed),
            **changes,
        }
        for name, value in fields.items():
            value = value(k) if callable(value) else value
            if value is not None:
                setattr(one, name, value)
        one.add_new("PixelData", "OW", stored[..., k].T.astype("<i2" if signed else "<u2").tobytes())
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CT, f"1.2.3.4.{k + 1}"
        paths.append(str(folder / (names[k] if names else f"{k:02d}.dcm")))
        one.save_as(paths[-1], enforce_file_format=True)
    return paths


def edited(**fields):
    """An `edit` of write_series that sets fields of every slice."""

    def edit(one, i):
        for name, value in fields.items():
            setattr(one, name, value)

    return edit


def write_table(path, header, rows, separator=",", encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=separator).writerows([header, *rows])
    return path


def centres(seed=0, **size):
    """LPS mm of the phantom's nodules."""
    _, affine, nodules = phantom(seed, **size)
    found = [np.argwhere(nodules == k).mean(0) for k in range(1, nodules.max() + 1) if (nodules == k).any()]
    return [tuple((np.diag([-1, -1, 1, 1]) @ affine @ [*index, 1])[:3].round(3)) for index in found]


def write_luna16(folder, subsets, positives=None, negatives=6, annotated=True, seeds=3, **size):
    """subsets: {series: subset folder}. A scan, its nodules (or so many of them) and some other candidates of each."""
    candidates, annotations = [], []
    for i, (series, subset) in enumerate(subsets.items()):
        write_image(folder / subset / f"{series}.mhd", scan(i % seeds, **size))
        nodules = centres(i % seeds, **size)[:positives]
        candidates += [(series, *place, 1) for place in nodules]
        others = np.random.default_rng(i).uniform(-60, 60, (negatives, 3)).round(2)
        candidates += [(series, *place, 0) for place in others]
        annotations += [(series, *place, 9.5) for place in nodules]
    write_table(folder / "candidates_V2.csv", ["seriesuid", "coordX", "coordY", "coordZ", "class"], candidates)
    if annotated:
        write_table(folder / "annotations.csv", ["seriesuid", "coordX", "coordY", "coordZ", "diameter_mm"], annotations)
    return folder


def write_decathlon(folder, names, index=True, seeds=3, **size):
    """A case of each name, with a label of 0 and 1."""
    for i, name in enumerate(names):
        volume, affine, nodules = phantom(i % seeds, **size)
        write_nifti(folder / "imagesTr" / f"{name}.nii.gz", volume, affine)
        write_nifti(folder / "labelsTr" / f"{name}.nii.gz", (nodules > 0).astype(np.uint8), affine)
    if index:
        write_index(folder, names)
    return folder


def write_index(folder, names):
    cases = [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in names]
    (folder / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "nodule"}, "training": cases}))


def write_nifti(path, voxels, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path


# ------------------------------------------------------------------------------------------------- running and looking


class Result(NamedTuple):
    code: int
    out: str
    errors: list


def call(capsys, *flags):
    """The Result of prepare_data.py, called in this process."""
    before, sys.argv = sys.argv, ["prepare_data.py", *map(str, flags)]
    if capsys:
        sys.stderr.reconfigure(errors="backslashreplace")  # as Python's own is
    code = 0
    try:
        utils.run_script(prepare_data.main)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = before
    out, err = capsys.readouterr() if capsys else ("", "")
    return Result(code, out, err.splitlines())


def without_processes(monkeypatch):
    """Let the script do all work in this process, at once; what would go to another is pickled all the same."""

    def one_by_one(function, items, workers):
        for item in items:
            yield item, pickle.loads(pickle.dumps(function))(pickle.loads(pickle.dumps(item)))

    for module in (check, conversion, scans):
        monkeypatch.setattr(module, "in_processes", one_by_one)


@pytest.fixture
def run(capsys, monkeypatch):
    """Calls prepare_data.py in this process with flags and gives a Result; the processes have their own tests."""
    without_processes(monkeypatch)
    return functools.partial(call, capsys)


def contents(folder):
    """{relative path: bytes} of all files below a folder but for the machine's own notes of an unfinished run."""
    return {
        os.path.relpath(path, folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not {conversion.WORK, run_lock.NAME} & set(path.parts)
    }


def times(folder):
    """{relative path: time of change} of all files below a folder but for the lock of a run that was killed."""
    return {
        os.path.relpath(path, folder): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and path.name != run_lock.NAME
    }


def manifest(output):
    """{source: row} of a manifest, in its order."""
    with open(output / conversion.MANIFEST, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["source"] for row in rows] == sorted(row["source"] for row in rows)
    assert len({row["source"] for row in rows}) == len(rows), "an input with two rows"
    return {row["source"]: row for row in rows}


def outcomes(output):
    """{source: (status, reason)} of a manifest."""
    return {source: (row["status"], row["reason"]) for source, row in manifest(output).items()}


def written(output):
    """Paths of the files that a manifest says were written, after a look at whether exactly those stand there, and
    hidden files beside no others."""
    listed = sorted(row["output"] for row in manifest(output).values() if row["output"])
    beside = {os.path.relpath(index_path(output / name), output) for name in listed}
    assert listed == sorted(set(contents(output)) - {conversion.MANIFEST, conversion.RECIPE} - beside)
    assert not (output / conversion.WORK).exists()
    return listed
