"""What is found below a folder: volumes at any depth, labelled crops, and images with their labels."""

import codecs
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dino3d.command_line import available_cores
from dino3d.data.conventions import VOLUME_SUFFIXES, DataError, one_line, stem
from dino3d.data.geometry import other_grid
from dino3d.data.scans import Found, find_scans
from dino3d.data.volume import Volume
from dino3d.files import atomic_write


def find_volumes(folder: Path | str) -> list[str]:
    """Names of all volumes below a folder, relative to it and sorted: files, and DICOM series as `Volume` opens them.

    Hidden files and folders are left out. Raises DataError for a folder that is missing, no folder, or can't be listed:
    going on without it would silently leave out patients.
    """
    return [scan.name for scan in _find(folder).scans]


def find_unlabelled(folder: Path | str) -> tuple[list[str], str]:
    """(names of the volumes below a folder but labels and masks, what was passed over in one line or "").

    What is a label is told by its path, see `is_label_path`. Raises DataError, as `find_volumes`.
    """
    found = _find(folder)
    labels = [scan.name for scan in found.scans if is_label_path(scan.name)]
    told = [f"{len(labels)} labels or masks, such as {labels[0]}"] if labels else []
    passed_over = ", ".join([*told, *filter(None, [found.passed_over()])])
    return [scan.name for scan in found.scans if not is_label_path(scan.name)], passed_over


def none_found(passed_over: str) -> str:
    """What to say of a folder without a volume to take. passed_over: of `find_unlabelled`"""
    return (
        f"no volume found below it (looked for DICOM series of CT and {', '.join(VOLUME_SUFFIXES)})"
        + f"; passed over: {passed_over}" * bool(passed_over)
    )


def _find(folder: Path | str) -> Found:
    if not os.path.isdir(folder):
        raise DataError(folder, "is a file, expected a folder" if os.path.exists(folder) else "no such folder")
    found = find_scans(folder, workers=available_cores())
    unlisted = [scan.problem for scan in found.problems if "can't be listed" in scan.problem.reason]
    if unlisted:
        raise unlisted[0]
    return found


def read_data_list(path: Path | str, folder: Path | str | None = None) -> list[str]:
    """Paths in a text file, one per line; relative ones belong to `folder` or, without it, to the list's own folder.

    Names may be any bytes, in any locale. Empty lines and lines that start with # are passed over. Raises DataError.
    """
    try:
        content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise DataError(path, f"can't be read as a list of files ({one_line(error, path)})") from error
    if b"\0" in content:
        raise DataError(path, "can't be read as a list of files (it is no text, or not in UTF-8)")
    lines = map(os.fsdecode, content.split(b"\n"))
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return [os.path.join(folder or os.path.dirname(path), name) for name in names]


def list_volumes(folder: Path | str, index: Path | str) -> tuple[list[str], str]:
    """What `find_unlabelled` finds below `folder`, as paths, from the file `index` if an earlier call made it for this
    folder.

    Finding 100,000 files on a network drive takes minutes, so what was found is kept in `index`, which is a list that
    `read_data_list` reads. Remove it to look again.
    """
    header, second = os.fsencode(f"# volumes below {os.path.abspath(folder)}\n"), "# passed over: "
    index = Path(index)
    if index.is_file():
        with open(index, "rb") as file:
            if file.readline() == header:
                line = os.fsdecode(file.readline()).rstrip("\n")
                return read_data_list(index, folder), line.removeprefix(second) if line.startswith(second) else ""
    names, passed_over = find_unlabelled(folder)
    if names and not any("\n" in name for name in names):
        lines = ["./" + name if name.startswith("#") or name != name.strip() else name for name in names]  # no comment
        lines = [*([second + passed_over.replace("\n", " ")] if passed_over else []), *lines]
        with atomic_write(index) as part:
            part.write_bytes(header + b"".join(os.fsencode(line) + b"\n" for line in lines))
    return [os.path.join(folder, name) for name in names], passed_over


def is_label_path(name: str) -> bool:
    """stands in until the real one is merged"""
    return bool(re.search(r"(^|/)(labels?(Tr|Ts)?|segmentations?|masks?)/", name))


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
