"""prepare_data.py demo: two lung CTs of a public Python package, and synthetic chest phantoms, in all three layouts."""

import csv
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from dino3d.command_line import UserError, available_cores
from dino3d.data import images
from dino3d.data.volume import Volume
from dino3d.files import TEXT, atomic_write, write_json
from dino3d.prepare import fetch, phantoms
from dino3d.prepare.conversion import is_complete
from dino3d.prepare.fetch import IMAGES, PACKAGE, PATIENTS, SHA256, VERSION, FetchError, read_members
from dino3d.prepare.luna16 import luna16
from dino3d.prepare.msd import msd
from dino3d.prepare.nlst import nlst

PHANTOMS = 8  # patients, besides the two CTs, that folds need
CT, PHANTOM = "CT", "synthetic phantom"
LAYOUTS = ("pretrain", "luna16", "msd", "lesion")
LESION, COPIES = "lung2", 3  # whose largest lesion is to be learnt by heart; as many names as two folds need
ORIGINS = {
    CT: f"""a patient's CT and the mask of one tumour
    from data/{{patient}}_image.nrrd and data/{{patient}}_label.nrrd of the source distribution of
    {PACKAGE} {VERSION} (sha256 {SHA256}),
    brought to RAS
    licence: BSD-3-Clause, Copyright 2017 Harvard Medical School; text in LICENSE.txt of that distribution""",
    PHANTOM: """synthetic
    a chest phantom computed by dino3d/prepare/phantoms.py, no patient's data
    licence: that of this repository""",
}


def demo(output: Path, phantom: bool) -> None:
    """Two lung CTs and synthetic chest phantoms in all three layouts, made by the commands that users type.

    pretrain holds the CTs alone; luna16 and msd hold phantoms too, since two patients make no folds; lesion holds one
    lesion of one of them under several names, so that a model is trained and tested on the same on purpose. What is
    complete stays. Raises UserError where the output can't be written to or is another version's, or --phantom is given
    for a folder that holds CTs.
    """
    try:
        if output.exists() and not output.is_dir():
            raise UserError(f"{output}: is a file, expected a folder to write to")
        source = output / "SOURCE.txt"
        before = source.read_text(**TEXT) if source.is_file() else ""
        held = CT if before == demo_source(CT) else PHANTOM if before == demo_source(PHANTOM) else None
        if phantom and held == CT:
            raise UserError(f"{output} already holds CTs: give --phantom another --output, or delete it first")
        if before and not held:
            raise UserError(
                f"{output} is the demo of another version: delete it (make clean-demo) or give another --output"
            )
        if held and all(is_complete(output / layout) for layout in LAYOUTS):
            print(f"{output} is complete, nothing to do: {' and '.join(PATIENTS)} ({held})")
            return
        output.mkdir(parents=True, exist_ok=True)
        raw = output / ".raw"
        shutil.rmtree(raw, ignore_errors=True)  # of a demo that was killed
        raw.mkdir()  # not writable: said now, not after the download
        origin = fetch_demo(raw, phantom or held == PHANTOM, held)
        with atomic_write(source) as part:
            part.write_text(demo_source(origin), **TEXT)
        lay_out_demo(raw, demo_cases(raw, origin), origin)
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
            size=[48, 48, 24],
            spacing=[2.0, 2.0, 4.0],
            negatives_per_scan=8,
            seed=0,
            table=None,
            label_column="class",
            patients=None,
        )
        msd(raw / "msd", output / "msd", workers, spacing=None, crop="none", margin=0)
        msd(raw / "lesion", output / "lesion", workers, spacing=None, crop="label", margin=30)
        shutil.rmtree(raw)
    except OSError as error:
        raise UserError(f"{error.filename or output}: {error.strerror or error}") from error


def demo_source(origin: str) -> str:
    """Text that says where each patient of the demo comes from."""
    origins = {**dict.fromkeys(PATIENTS, origin), **dict.fromkeys(phantom_names(), PHANTOM)}
    return (
        "Where the demo's patients come from\n\n"
        + "".join(f"{patient}: {ORIGINS[origin].format(patient=patient)}\n" for patient, origin in origins.items())
        + (
            f"\nlesion/ holds {COPIES} copies of the largest lesion of {LESION} and what is around it: who "
            "trains there is tested on "
            "what was trained on\n"
        )
    )


def phantom_names() -> list[str]:
    """Names of the patients that are phantoms in any case."""
    return [f"phantom{i}" for i in range(1, PHANTOMS + 1)]


def fetch_demo(folder: Path, phantom: bool, held: str | None) -> str:
    """Fetch the CTs and masks as NRRD files into a folder, unless phantoms stand for them; returns CT or PHANTOM."""
    synthetic = (
        f"{' and '.join(PATIENTS)} will be SYNTHETIC too: chest phantoms, which show that the code runs, no more"
    )
    print(
        f"{PHANTOMS} of the patients for classification and segmentation are SYNTHETIC: chest phantoms, since "
        "folds need more "
        "patients than there are CTs",
        flush=True,
    )
    if phantom:
        print(synthetic)
        return PHANTOM
    print(f"fetching {' and '.join(PATIENTS)} (34 MB) with pip", flush=True)
    try:
        names = [*IMAGES.values(), *fetch.LABELS.values()]
        contents = read_members(fetch.fetch_sdist(folder), names)
    except FetchError as error:
        if held == CT:
            raise UserError(
                f"{folder.parent}: some of it is missing, and the CTs could not be fetched ({error}); try again "
                "with a network, or delete it"
            ) from None
        print(f"note: the CTs could not be fetched ({error}); {synthetic}", file=sys.stderr, flush=True)
        return PHANTOM
    for name, content in contents.items():
        (folder / Path(name).name).write_bytes(content)
    return CT


def demo_cases(folder: Path, origin: str) -> Iterator[tuple[str, sitk.Image, sitk.Image]]:
    """(patient, image, mask that numbers its nodules from 1) of each patient of the demo, images in RAS."""
    for i, patient in enumerate([*PATIENTS, *phantom_names()]):
        if origin == CT and patient in PATIENTS:
            with Volume(folder / f"{patient}_label.nrrd") as mask:
                labelled = images.make_image(mask.read_labels(), mask.affine)
            yield (patient, images.read_image(folder / f"{patient}_image.nrrd"), sitk.ConnectedComponent(labelled != 0))
        else:
            size = {} if patient in PATIENTS else {"shape": (192, 160, 64), "spacing": (1.7, 1.6, 4.5)}
            volume, affine, nodules = phantoms.labelled_phantom(i, **size)
            yield patient, images.make_image(volume, affine), images.make_image(nodules, affine)


def lay_out_demo(folder: Path, cases: Iterable[tuple[str, sitk.Image, sitk.Image]], origin: str) -> None:
    """Write the cases as NLST, LUNA16 and the Decathlon would be downloaded, into folders of these names."""
    candidates, annotations, listed = [], [], []
    for i, (patient, image, nodules) in enumerate(cases):
        if patient in PATIENTS:
            name = f"{patient}_image" if origin == CT else "phantom"
            save_raw(folder / "nlst" / patient / "t0" / f"{name}.mha", image)
        save_raw(folder / "luna16" / f"subset{i // 2}" / f"{patient}.mhd", image)
        save_raw(folder / "msd" / "imagesTr" / f"{patient}.nii", image)
        save_raw(folder / "msd" / "labelsTr" / f"{patient}.nii", sitk.Cast(nodules != 0, sitk.sitkUInt8))
        if patient == LESION:
            largest = sitk.RelabelComponent(sitk.Cast(nodules, sitk.sitkUInt32)) == 1
            for copy in range(1, COPIES + 1):
                save_raw(folder / "lesion" / "imagesTr" / f"{patient}_copy{copy}.nii", image)
                save_raw(folder / "lesion" / "labelsTr" / f"{patient}_copy{copy}.nii", largest)
        listed.append({"image": f"imagesTr/{patient}.nii", "label": f"labelsTr/{patient}.nii"})
        shapes = sitk.LabelShapeStatisticsImageFilter()
        shapes.Execute(sitk.Cast(nodules, sitk.sitkUInt32))
        centres = {label: shapes.GetCentroid(label) for label in shapes.GetLabels()}
        annotations += [
            (patient, *centre, 2 * shapes.GetEquivalentSphericalRadius(label)) for label, centre in centres.items()
        ]
        candidates += [(patient, *centre, 1) for centre in centres.values()]
        candidates += [(patient, *place, 0) for place in lung_places(image, list(centres.values()), 12, seed=i)]
    for name, header, rows in (("candidates_V2", "class", candidates), ("annotations", "diameter_mm", annotations)):
        with open(folder / "luna16" / f"{name}.csv", "w", newline="", **TEXT) as file:
            csv.writer(file).writerows([["seriesuid", "coordX", "coordY", "coordZ", header], *rows])
    copies = [
        {"image": f"imagesTr/{LESION}_copy{copy}.nii", "label": f"labelsTr/{LESION}_copy{copy}.nii"}
        for copy in range(1, COPIES + 1)
    ]
    for task, training in (("msd", listed), ("lesion", copies)):
        content = {"labels": {"0": "background", "1": "nodule"}, "training": training}
        write_json(folder / task / "dataset.json", content)


def save_raw(path: Path, image: sitk.Image) -> None:
    """Write an image with a fixed time of change, so that a rerun finds the same input."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    for file in path.parent.glob(f"{path.stem}.*"):
        os.utime(file, (0, 0))


def lung_places(
    image: sitk.Image, centres: Sequence[Sequence[float]], count: int, seed: int
) -> list[tuple[float, ...]]:
    """LPS mm of random places inside the lungs, more than 20 mm away from any nodule."""
    from scipy.ndimage import uniform_filter

    smooth = uniform_filter(
        images.voxels_of(image).astype(np.float32), np.maximum(10 / np.array(image.GetSpacing()), 1).astype(int)
    )
    inside = np.argwhere((smooth > -930) & (smooth < -650))
    rng, places = np.random.default_rng(seed), []
    for index in inside[rng.permutation(len(inside))]:
        place = image.TransformIndexToPhysicalPoint([int(i) for i in index])
        if all(np.linalg.norm(np.subtract(place, centre)) > 20 for centre in centres):
            places.append(place)
        if len(places) == count:
            break
    return places
