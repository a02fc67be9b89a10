"""prepare_data.py phantoms: synthetic chests for pre-training and for telling nodules from vessels."""

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from dino3d.command_line import UserError, available_cores
from dino3d.data import images
from dino3d.files import TEXT
from dino3d.prepare import phantoms
from dino3d.prepare.conversion import is_complete
from dino3d.prepare.demo import save_raw
from dino3d.prepare.luna16 import luna16
from dino3d.prepare.nlst import nlst

SUBSETS = 4  # that patients are shared out to, for --folds subsets
NEGATIVES = 6  # vessels of each patient
SHAPE, SPACING = (128, 104, 58), (2.5, 2.5, 5.0)  # voxels, mm: a chest of 320 x 260 x 290 mm
CROP_VOXELS, CROP_SPACING = (32, 32, 32), (2.5, 2.5, 2.5)  # voxels, mm
FIRST_SEED = 100  # of the patients: none of the demo's


def make_phantoms(output: Path, count: int) -> None:
    """`count` synthetic patients in the layouts of pre-training and classification; label1 is a nodule, label0 a vessel
    of the same density, so that the voxel in the middle does not tell them apart. What is complete stays. Raises
    UserError."""
    try:
        if output.exists() and not output.is_dir():
            raise UserError(f"{output}: is a file, expected a folder to write to")
        if all(is_complete(output / layout) for layout in ("pretrain", "luna16")):
            held = len(list((output / "pretrain").glob("phantom*")))
            if held != count:
                raise UserError(f"{output}: holds {held} phantoms, not {count}: give another --output, or delete it")
            print(f"{output} is complete, nothing to do: {count} synthetic patients")
            return
        raw = output / ".raw"
        shutil.rmtree(raw, ignore_errors=True)  # of a call that was killed
        raw.mkdir(parents=True)
        lay_out_phantoms(raw, count)
        workers = available_cores()
        nlst(
            raw / "nlst",
            output / "pretrain",
            workers,
            one_per_study=False,
            min_slices=16,
            crop_to_body=None,
            compression="blosc",
        )
        luna16(
            raw / "luna16",
            output / "luna16",
            workers,
            size=list(CROP_VOXELS),
            spacing=list(CROP_SPACING),
            negatives_per_scan=NEGATIVES,
            seed=0,
            table=None,
            label_column="class",
            patients=None,
        )
        shutil.rmtree(raw)
    except OSError as error:
        raise UserError(f"{error.filename or output}: {error.strerror or error}") from error


def lay_out_phantoms(folder: Path, count: int) -> None:
    """Write the patients as NLST and LUNA16 would be downloaded, into folders of these names."""
    candidates, annotations = [], []
    for i in range(count):
        patient = f"phantom{i:02}"
        volume, affine, nodules = phantoms.labelled_phantom(FIRST_SEED + i, SHAPE, SPACING)
        image = images.make_image(volume, affine)
        save_raw(folder / "nlst" / patient / "t0" / f"{patient}.mha", image)
        save_raw(folder / "luna16" / f"subset{i % SUBSETS}" / f"{patient}.mhd", image)
        shapes = sitk.LabelShapeStatisticsImageFilter()
        shapes.Execute(sitk.Cast(images.make_image(nodules, affine), sitk.sitkUInt32))
        centres = {label: shapes.GetCentroid(label) for label in shapes.GetLabels()}
        annotations += [
            (patient, *centre, 2 * shapes.GetEquivalentSphericalRadius(label)) for label, centre in centres.items()
        ]
        candidates += [(patient, *centre, 1) for centre in centres.values()]
        vessels = vessel_places(volume, nodules, NEGATIVES, seed=i)
        candidates += [(patient, *image.TransformIndexToPhysicalPoint(place), 0) for place in vessels]
    for name, header, rows in (("candidates_V2", "class", candidates), ("annotations", "diameter_mm", annotations)):
        with open(folder / "luna16" / f"{name}.csv", "w", newline="", **TEXT) as file:
            csv.writer(file).writerows([["seriesuid", "coordX", "coordY", "coordZ", header], *rows])


def vessel_places(volume: np.ndarray, nodules: np.ndarray, count: int, seed: int) -> list[Sequence[int]]:
    """Voxels in vessels inside the lungs, more than 20 mm away from any nodule. volume, nodules: (X, Y, Z)"""
    from scipy.ndimage import distance_transform_edt, uniform_filter

    around = uniform_filter(volume.astype(np.float32), (9, 9, 5))  # 22 mm
    away = distance_transform_edt(nodules == 0, sampling=SPACING) > 20
    inside = np.argwhere((volume > -150) & (around > -850) & (around < -550) & away)
    rng = np.random.default_rng(seed)
    return [[int(n) for n in index] for index in inside[rng.permutation(len(inside))[:count]]]
