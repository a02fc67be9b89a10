"""What is found below a folder: volumes at any depth, labelled crops, and images with their labels."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from dino3d.data.conventions import VOLUME_SUFFIXES, DataError, one_line, stem
from dino3d.data.geometry import other_grid
from dino3d.data.volume import Volume
from dino3d.files import atomic_write, walk_files


def find_volumes(folder: Path | str) -> list[str]:
    """Paths of all volumes below a folder, relative to it and sorted; hidden files and folders are left out.

    Raises DataError for a folder that is missing, no folder, or can't be listed: going on without it would silently
    leave out patients.
    """
    if not os.path.isdir(folder):
        raise DataError(folder, "is a file, expected a folder" if os.path.exists(folder) else "no such folder")

    def fail(error: OSError) -> NoReturn:
        raise DataError(error.filename, f"can't be listed ({error.strerror})") from error

    return sorted(
        os.path.relpath(os.path.join(here, name), folder)
        for here, names in walk_files(folder, fail)
        for name in names
        if name.lower().endswith(VOLUME_SUFFIXES)
    )


def read_data_list(path: Path | str, folder: Path | str | None = None) -> list[str]:
    """Paths in a text file, one per line; relative ones belong to `folder` or, without it, to the list's own folder.

    Empty lines and lines that start with # are passed over. Raises DataError.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(path, f"can't be read as a list of files ({one_line(error, path)})") from error
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return [os.path.join(folder or os.path.dirname(path), name) for name in names]


def list_volumes(folder: Path | str, index: Path | str) -> list[str]:
    """Paths of all volumes below `folder`, from the file `index` if an earlier call made it for this folder.

    Finding 100,000 files on a network drive takes minutes, so what was found is kept in `index`, which is a list that
    `read_data_list` reads. Remove it to look again.
    """
    header = f"# volumes below {os.path.abspath(folder)}"
    index = Path(index)
    if index.is_file():
        with open(index, errors="replace") as file:
            if file.readline().rstrip("\n") == header:
                return read_data_list(index, folder)
    names = find_volumes(folder)
    if names:
        lines = ["./" + name if name.startswith("#") else name for name in names]  # and no comment
        with atomic_write(index) as part:
            part.write_text("\n".join([header, *lines]) + "\n")
    return [os.path.join(folder, name) for name in names]


# --------------------------------------------------------------------------------------------- the layouts with labels


class Crop(NamedTuple):
    """A labelled crop: file, class, whose it is, and the subset folder that it lies in."""

    path: str
    label: int
    patient: str
    subset: str


class Pair(NamedTuple):
    """A case for segmentation: its name, and the files of its image and of its label."""

    name: str
    image: str
    label: str


def find_crops(folder: Path | str) -> tuple[list[Crop], list[DataError]]:
    """(Crops, DataErrors) of `subset*/label<k>/<patient>/<name>.nii.gz`, sorted; label folders may be named <k> alone.

    The errors are all that keeps the folder from being trained on as it is, as far as names tell. Raises DataError for
    a folder that is missing or can't be listed.
    """
    names, problems, crops = find_volumes(folder), [], []
    for subset in sorted(name for name in os.listdir(folder) if name.startswith("subset")):
        if not os.path.isdir(os.path.join(folder, subset)):
            continue
        for label in sorted(os.listdir(os.path.join(folder, subset))):
            path = os.path.join(folder, subset, label)
            if label.startswith(".") or not os.path.isdir(path):
                continue
            if _class_of(label) is None:
                problems.append(DataError(path, "is no label folder: expected label0, label1, ... or 0, 1, ..."))
            elif not any(name.startswith(os.path.join(subset, label) + os.sep) for name in names):
                problems.append(
                    DataError(path, "holds no crop: expected <patient>/<name>.nii.gz below it, or remove it")
                )
    for name in names:
        parts = name.split(os.sep)
        if not parts[0].startswith("subset"):
            continue
        if len(parts) == 4 and _class_of(parts[1]) is not None:
            crops.append(Crop(os.path.join(folder, name), _class_of(parts[1]), parts[2], parts[0]))
        elif len(parts) < 3 or _class_of(parts[1]) is not None:
            problems.append(
                DataError(os.path.join(folder, name), "expected as subset*/label<k>/<patient>/<name>.nii.gz")
            )
    if not crops:
        problems.append(DataError(folder, "holds no crops: expected subset*/label0|label1/<patient>/<name>.nii.gz"))
        return crops, problems
    classes = sorted({crop.label for crop in crops})
    if len(classes) == 1:
        problems.append(DataError(folder, f"has crops of one class only (label{classes[0]}), expected at least two"))
    elif classes != list(range(len(classes))):
        problems.append(
            DataError(
                folder,
                f"has the classes {', '.join(map(str, classes))}: expected 0 to {len(classes) - 1} without a gap",
            )
        )
    subsets = {}
    for crop in crops:
        subsets.setdefault(crop.patient, set()).add(crop.subset)
    problems += [
        DataError(
            folder, f"has patient {patient} in {' and '.join(sorted(where))}: expected every patient in one subset"
        )
        for patient, where in sorted(subsets.items())
        if len(where) > 1
    ]
    return crops, problems


def _class_of(folder: str) -> int | None:
    match = re.fullmatch(r"(?:label)?(\d+)", folder)
    return int(match[1]) if match else None


def find_pairs(folder: Path | str) -> tuple[list[Pair], list[DataError]]:
    """(Pairs, DataErrors) of `images/<name>.nii.gz` with `labels/<name>.nii.gz`, paired by name and sorted.

    The errors are images without label, labels without image and names that stand for two files. Raises DataError for
    a folder that is missing or can't be listed.
    """
    problems, files = [], {}
    for kind in ("images", "labels"):
        files[kind] = {}
        for name in find_volumes(os.path.join(folder, kind)):
            path = os.path.join(folder, kind, name)
            first = files[kind].setdefault(stem(name), path)
            if first != path:
                problems.append(DataError(path, f"has the same name as {first}: expected one file of each name"))
    images, labels = files["images"], files["labels"]
    problems += [
        DataError(images[name], "has no label of the same name in labels/") for name in sorted(images.keys() - labels)
    ]
    problems += [
        DataError(labels[name], "has no image of the same name in images/") for name in sorted(labels.keys() - images)
    ]
    pairs = [Pair(name, images[name], labels[name]) for name in sorted(images.keys() & labels)]
    if not pairs and not problems:
        problems.append(DataError(folder, "holds no cases: expected images/<name>.nii.gz and labels/<name>.nii.gz"))
    return pairs, problems


def read_pair(pair: Pair, classes: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(image (X, Y, Z) int16 HU, label (X, Y, Z) uint8, affine (4, 4)) of a Pair. Raises DataError where one can't be
    used, both don't lie on the same grid, or the label has others than `classes`, where those are given."""
    with Volume(pair.image) as image, Volume(pair.label) as label:
        reason = other_grid(label.shape, label.affine, image.shape, image.affine)
        if reason:
            raise DataError(pair.label, reason)
        return image.read(), label.read_labels(classes), image.affine
