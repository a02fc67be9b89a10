"""prepare_data.py msd: images and masks of a Decathlon task into the segmentation layout."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dino3d.command_line import UserError
from dino3d.data import images, resampling
from dino3d.data.conventions import DataError, format_size
from dino3d.data.layouts import Pair, find_task, read_pair
from dino3d.data.requirements import header_of, require_ct, too_bright
from dino3d.data.scans import File
from dino3d.prepare.conversion import Job, Output, convert_all, fingerprint, note_of, open_output, report_outcome
from dino3d.prepare.inputs import IMAGE_COLUMNS, files_of, image_statistics, safe_name

Box = tuple[np.ndarray, np.ndarray]  # (3,) first voxel, (3,) size
MSD_COLUMNS = ["source", "output", "labels", "millilitres", *IMAGE_COLUMNS]


class PairTask(NamedTuple):
    """A case, of which image or label may be missing (""), and its files; paths are relative to the input."""

    pair: Pair
    files: list[File]


def msd(input: Path, output: Path, workers: int, spacing: Sequence[float] | None, crop: str, margin: float) -> None:
    """Images and masks of a Decathlon task, or of one for nnU-Net, into the segmentation layout."""
    with open_output(output, {"command": "msd", "spacing": spacing, "crop": crop, "margin": margin}) as records:
        task = find_task(input)
        if not task.cases:
            raise UserError(f"--input {input}: holds no cases ({task.form})")
        print(f"{len(task.cases)} cases below {input}: {task.form}", flush=True)
        tasks = [pair_task(input, pair) for pair in task.cases]
        jobs = [
            Job(
                tuple(path for path in (task.pair.image, task.pair.label) if path),
                fingerprint(task),
                (str(input), spacing, crop, margin, task),
            )
            for task in tasks
        ]
        outcome = convert_all(convert_pair, jobs, records, MSD_COLUMNS, workers, "case")
    report_outcome(outcome)


def pair_task(folder: Path, pair: Pair) -> PairTask:
    """The PairTask of a Pair below the input folder."""
    image, label = (os.path.relpath(path, folder) if path else "" for path in (pair.image, pair.label))
    files = [file for path in (image, label) if path for file in files_of(folder, path)]
    return PairTask(pair._replace(image=image, label=label), files)


def convert_pair(task: tuple[str, Sequence[float] | None, str, float, PairTask]) -> Iterator[Output]:
    """Outputs of a PairTask: the image and its label, both or neither."""
    folder, spacing, crop, margin, (pair, _) = task
    if not pair.image or not pair.label:
        raise DataError(
            pair.image or pair.label, "no label: for this image" if pair.image else "no image: for this label"
        )
    there = pair._replace(image=os.path.join(folder, pair.image), label=os.path.join(folder, pair.label))
    image, label, affine = read_pair(there)
    require_ct(image, there.image)
    notes = [[*header_of(path).notes] for path in (there.image, there.label)]
    notes[0] += filter(None, [too_bright(image)])
    image, label, labelled = images.make_image(image, affine), images.make_image(label, affine), {*np.unique(label)}
    if crop != "none":
        box = resampling.body_box(image, margin) if crop == "body" else resampling.mask_box(label != 0, image, margin)
        if crop == "body" and labelled != {0}:  # a label may lie outside the largest part
            box = enclosing_box(box, resampling.mask_box(label != 0, image, 0))
        image, label = resampling.crop_to_box(image, box), resampling.crop_to_box(label, box)
    if spacing:
        image, label = resampling.resample(image, spacing), resampling.resample(label, spacing, is_label=True)
    name = safe_name(pair.name, "case") + ".nii.gz"
    voxels, (classes, counts) = np.prod(label.GetSpacing()), np.unique(images.voxels_of(label), return_counts=True)
    if gone := sorted(labelled - {*classes, 0}):
        notes[1].append(f"at this --spacing no voxel is left of class {format_list(gone)}")
    volumes = [f"{count * voxels / 1000:.3g}" for value, count in zip(classes, counts) if value]
    yield Output(
        {"source": pair.image, "output": f"images/{name}", **image_statistics(image), "reason": note_of(notes[0])},
        lambda path: images.save_image(path, image),
    )
    yield Output(
        {
            "source": pair.label,
            "output": f"labels/{name}",
            "shape": format_size(label.GetSize()),
            "labels": format_list(classes),
            "spacing": format_size(np.round(label.GetSpacing(), 4)),
            "millilitres": format_list(volumes),
            "reason": note_of([*([] if volumes else ["no voxel is labelled"]), *notes[1]]),
        },
        lambda path: images.save_image(path, label),
    )


def enclosing_box(one: Box, other: Box) -> Box:
    """The box around two of them."""
    low, high = np.minimum(one[0], other[0]), np.maximum(one[0] + one[1], other[0] + other[1])
    return low, high - low


def format_list(values: Iterable[Any]) -> str:
    """Values as they stand in one cell of the manifest."""
    return " ".join(map(str, values))
