"""A DICOM series into the layout, against SimpleITK."""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dino3d.benchmarks import baselines
from dino3d.benchmarks.reading import read_volume
from dino3d.benchmarks.scans import scan
from dino3d.benchmarks.turns import comparison, sources, take_turns
from dino3d.command_line import UserError
from dino3d.data.conventions import LPS, format_size


def convert(device: str, repeats: int, size: Sequence[int]) -> dict[str, Any]:
    """A DICOM series to HDF5, headers checked and voxels indexed, against SimpleITK reading and writing it."""
    import SimpleITK

    from dino3d.data.scans import find_scans
    from dino3d.prepare.nlst import ScanTask, convert_scans, place_scans

    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    volume, affine, origin = scan(size)
    with tempfile.TemporaryDirectory() as folder:
        series, target = os.path.join(folder, "series"), os.path.join(folder, "out")
        write_dicom(series, volume, affine)
        paths = {kind: f"{target}.{kind}.hdf5" for kind in ("baseline", "ours", "gzip", "none")}

        def prepared(path: str, compression: str) -> Callable[[int], None]:
            def run(turn: int) -> None:
                scans = find_scans(series).scans
                task = ScanTask(
                    input=series,
                    scans=scans,
                    outputs=list(place_scans(scans).values()),
                    before=[""] * len(scans),
                    notes=[""] * len(scans),
                    one_of_them=False,
                    min_slices=16,
                    crop_to_body=None,
                    compression=compression,
                )
                for scanned in convert_scans(task):
                    if scanned.write is None:
                        reason = scanned.row["reason"]
                        raise UserError(f"the series that was written for this benchmark is refused: {reason}")
                    scanned.write(path)
                    scanned.finish(Path(path), Path(folder))

            return run

        times = take_turns(
            {
                "baseline": (lambda turn: baselines.convert_itk(series, paths["baseline"]), 1),
                "ours": (prepared(paths["ours"], "blosc"), 1),
                **{kind: (prepared(paths[kind], kind), 1) for kind in ("gzip", "none")},
            },
            repeats,
        )
        megabytes = {name: os.path.getsize(path) / 1e6 for name, path in paths.items()}
        for name in ("ours", "gzip", "none"):
            if not np.array_equal(read_volume(paths[name], (0, 0, 0), size), np.maximum(volume, -1024)):
                raise UserError(f"{name}: other voxels than the scan's")
    notes = {
        "baseline": "SimpleITK: the series read and written as .hdf5 with gzip",
        "ours": "prepare_data.py nlst: headers read twice and checked, series read, RAS, quantiles, Blosc",
        "gzip": "the same with --compression gzip",
        "none": "the same with --compression none",
    }
    result = comparison(
        2,
        f"seconds per volume of {format_size(size)} voxels on one core",
        times,
        {name: f"{megabytes[name]:5.1f} MB: {note}" for name, note in notes.items()},
        sources(baselines.convert_itk),
        {"data": origin + ", written as DICOM", "repeats": repeats, "megabytes": megabytes},
    )
    result["volumes_per_second_and_core"] = 1 / result["ours"]
    return result


def write_dicom(folder: str, volume: np.ndarray, affine: np.ndarray) -> None:
    """Write an (X, Y, Z) volume in RAS as a series of CT slices, axial and head first as scanners write them."""
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    os.makedirs(folder)
    volume, affine = volume[::-1, ::-1], affine @ np.diag([-1, -1, 1, 1])  # columns to the left, rows to the back
    lps = LPS @ affine
    lps[:3, 3] += (LPS @ affine @ np.array([1 - volume.shape[0], 1 - volume.shape[1], 0, 0]))[:3]
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    study, series = generate_uid(), generate_uid()
    for z in range(volume.shape[2]):
        header = pydicom.Dataset()
        header.file_meta = pydicom.dataset.FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = pydicom.uid.CTImageStorage
        header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = generate_uid()
        header.PatientID, header.Modality, header.ImageType = "benchmark", "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
        header.StudyInstanceUID, header.SeriesInstanceUID, header.InstanceNumber = study, series, z + 1
        header.ImagePositionPatient = [f"{value:.6f}" for value in (lps @ [0, 0, z, 1])[:3]]
        header.ImageOrientationPatient = [f"{value:.6f}" for value in (lps[:3, :2] / spacing[:2]).T.ravel()]
        header.PixelSpacing, header.SliceThickness = [f"{spacing[1]:.6f}", f"{spacing[0]:.6f}"], f"{spacing[2]:.6f}"
        header.Columns, header.Rows = volume.shape[:2]
        header.SamplesPerPixel, header.PhotometricInterpretation, header.PixelRepresentation = 1, "MONOCHROME2", 1
        header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
        header.RescaleIntercept, header.RescaleSlope = 0, 1
        header.PixelData = np.ascontiguousarray(volume[:, :, z].T).tobytes()
        header.save_as(os.path.join(folder, f"{z:04}.dcm"), enforce_file_format=True)
