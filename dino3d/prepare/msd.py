"""prepare_data.py msd: images and masks of a Decathlon task into the segmentation layout."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dino3d.command_line import UserError
from dino3d.data import images, resampling
from dino3d.data.conventions import DataError, format_size, stem
from dino3d.data.layouts import Pair, find_volumes, read_pair
from dino3d.data.scans import File
from dino3d.prepare.conversion import Job, Output, convert_all, fingerprint, open_output, report_outcome
from dino3d.prepare.inputs import IMAGE_COLUMNS, file_at, image_statistics, safe_name

MSD_COLUMNS = ["source", "output", "labels", "millilitres", *IMAGE_COLUMNS]


class PairTask(NamedTuple):
    """An image and its label, relative to the input ("" for one that is missing), and the classes that the label may
    have."""

    name: str
    files: list[File]
    image: str
    label: str
    classes: list[int] | None


def msd(input: Path, output: Path, workers: int, spacing: Sequence[float] | None, crop: str, margin: float) -> None:
    """Images and masks of a Decathlon task into the segmentation layout."""
    with open_output(output, {"command": "msd", "spacing": spacing, "crop": crop, "margin": margin}) as records:
        pairs, classes = decathlon(input)
        tasks = [
            PairTask(name, [file_at(input, path) for path in (image, label) if path], image, label, classes)
            for name, image, label in pairs
        ]
        jobs = [
            Job(
                tuple(path for path in (task.image, task.label) if path),
                fingerprint(task),
                (str(input), spacing, crop, margin, task),
            )
            for task in tasks
        ]
        outcome = convert_all(convert_pair, jobs, records, MSD_COLUMNS, workers, "case")
    report_outcome(outcome)


def decathlon(folder: Path) -> tuple[list[tuple[str, str, str]], list[int] | None]:
    """([(name, image, label)], classes or None) of a task: by dataset.json where it is there, and by the folders.

    Paths are relative to the folder, "" for what is missing. Raises UserError.
    """
    listed, classes = [], None
    index = folder / "dataset.json"
    if index.is_file():
        try:
            content = json.loads(index.read_text(encoding="utf-8-sig"))
            classes = sorted(int(value) for value in content["labels"])
            listed = [
                (os.path.normpath(case["image"]), os.path.normpath(case["label"])) for case in content["training"]
            ]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(
                f"{index}: can't be read as a Decathlon's dataset.json ({type(error).__name__}: {error})"
            ) from error
    elif not (folder / "imagesTr").is_dir() or not (folder / "labelsTr").is_dir():
        raise UserError(
            f"--input {folder}: has no dataset.json and no imagesTr and labelsTr; give the folder that holds them"
        )
    else:
        print(f"note: no dataset.json in {folder}: images and labels are paired by name, any class is taken")
    images_by_name, labels_by_name = {}, {}

    def name_of(path: str, taken: Mapping[str, str]) -> str:  # a second one of a name goes by its path
        return path if stem(path) in taken else stem(path)

    for image, label in listed:
        name = name_of(image, images_by_name)
        images_by_name[name], labels_by_name[name] = image, label
    known = {path for case in listed for path in case}
    for kind, found in (("imagesTr", images_by_name), ("labelsTr", labels_by_name)):
        for name in find_volumes(folder / kind) if (folder / kind).is_dir() else []:
            if (path := os.path.join(kind, name)) not in known:
                found[name_of(path, found)] = path
    names = sorted({*images_by_name, *labels_by_name})
    if not names:
        raise UserError(f"--input {folder}: holds no cases")
    return [(name, images_by_name.get(name, ""), labels_by_name.get(name, "")) for name in names], classes


def convert_pair(task: tuple[str, Sequence[float] | None, str, float, PairTask]) -> Iterator[Output]:
    """Outputs of a PairTask: the image and its label, both or neither."""
    folder, spacing, crop, margin, task = task
    if not task.image or not task.label:
        raise DataError(
            task.image or task.label, "no label: for this image" if task.image else "no image: for this label"
        )
    pair = Pair(task.name, *(os.path.join(folder, path) for path in (task.image, task.label)))
    image, label, affine = read_pair(pair, task.classes)
    image, label = images.make_image(image, affine), images.make_image(label, affine)
    if crop != "none":
        box = resampling.body_box(image, margin) if crop == "body" else resampling.mask_box(label != 0, image, margin)
        image, label = resampling.crop_to_box(image, box), resampling.crop_to_box(label, box)
    if spacing:
        image, label = resampling.resample(image, spacing), resampling.resample(label, spacing, is_label=True)
    name = safe_name(task.name, "case") + ".nii.gz"
    voxels, (classes, counts) = np.prod(label.GetSpacing()), np.unique(images.voxels_of(label), return_counts=True)
    volumes = [f"{count * voxels / 1000:.3g}" for value, count in zip(classes, counts) if value]
    yield Output(
        {"source": task.image, "output": f"images/{name}", **image_statistics(image)},
        lambda path: images.save_image(path, image),
    )
    yield Output(
        {
            "source": task.label,
            "output": f"labels/{name}",
            "shape": format_size(label.GetSize()),
            "labels": format_list(classes),
            "spacing": format_size(np.round(label.GetSpacing(), 4)),
            "millilitres": format_list(volumes),
            "reason": "" if volumes else "note: no voxel is labelled",
        },
        lambda path: images.save_image(path, label),
    )


def format_list(values: Iterable[Any]) -> str:
    """Values as they stand in one cell of the manifest."""
    return " ".join(map(str, values))
