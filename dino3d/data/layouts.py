"""What is found below a folder: volumes at any depth, labelled crops, and images with their labels."""

import codecs
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dino3d.command_line import UserError, available_cores
from dino3d.data.conventions import VOLUME_SUFFIXES, DataError, is_kind, one_line, stem
from dino3d.data.geometry import other_grid
from dino3d.data.requirements import lone_class, no_image, owners_of
from dino3d.data.scans import Found, Scan, find_scans
from dino3d.data.volume import Volume
from dino3d.files import atomic_write, read_rows


def find_volumes(folder: Path | str) -> list[str]:
    """Names of all volumes below a folder, relative to it and sorted: files, and DICOM series as `Volume` opens them.

    Hidden files and folders are left out. Raises DataError for a folder that is missing, no folder, or can't be listed:
    going on without it would silently leave out patients.
    """
    return [scan.name for scan in _find(folder, workers=0).scans]


def case_names(paths: Sequence[str], folder: str) -> list[str]:
    """Names of cases: their paths relative to `folder` without suffix. Raises UserError where two would share one."""
    names = {}
    for path in paths:
        inside = os.path.relpath(path, folder)
        name = os.path.join(os.path.dirname(inside), stem(inside)).replace(os.sep, "/")
        if name in names:
            raise UserError(f"{path}: has the same name as {names[name]}, expected one file of each name")
        names[name] = path
    return list(names)


def find_unlabelled(folder: Path | str) -> tuple[list[str], str]:
    """(names of the volumes below a folder but labels and masks, what was passed over in one line or "").

    What is a label is told by its path, see `is_label_path`. Raises DataError, as `find_volumes`.
    """
    scans, passed_over = find_unlabelled_scans(folder)
    return [scan.name for scan in scans], passed_over


def find_unlabelled_scans(folder: Path | str) -> tuple[list[Scan], str]:
    """As `find_unlabelled`, with the Scans instead of their names."""
    found = _find(folder, available_cores())
    labels = [scan.name for scan in found.scans if is_label_path(scan.name)]
    told = [f"{len(labels)} labels or masks, such as {labels[0]}"] if labels else []
    passed_over = ", ".join([*told, *filter(None, [found.passed_over()])])
    return [scan for scan in found.scans if not is_label_path(scan.name)], passed_over


def none_found(passed_over: str) -> str:
    """What to say of a folder without a volume to take. passed_over: of `find_unlabelled`"""
    return (
        f"no volume found below it (looked for DICOM series of CT and {', '.join(VOLUME_SUFFIXES)})"
        + f"; passed over: {passed_over}" * bool(passed_over)
    )


def _find(folder: Path | str, workers: int) -> Found:
    if not os.path.isdir(folder):
        raise DataError(folder, "is a file, expected a folder" if os.path.exists(folder) else "no such folder")
    found = find_scans(folder, workers=workers)
    unlisted = [scan.problem for scan in found.problems if "can't be listed" in scan.problem.reason]
    if unlisted:
        raise unlisted[0]
    return found


# What masks and labels are called, in lower case
LABEL_FOLDERS = re.compile(
    r"(labels?|masks?|segs?|segmentations?|seg_?masks?|annotations?|ground_?truths?)(_?(tr|ts|train|test|val))?"
    r"|seg-lungs-luna16|\w+[_ -](masks?|segmentations?)"
)
LABEL_FILES = re.compile(
    r"(labels?|labelmap|masks?|seg|segmentations?)([_-]\d+)?|.+[_. -](labels?|labelmap|masks?|seg|segmentations?)"
)


def is_label_path(path: str) -> bool:
    """Whether a volume is a mask or label by its own name or by that of a folder on its path.

    path: relative to the folder that was given, whose own name does not count
    """
    *folders, name = path.lower().split(os.sep)
    return any(LABEL_FOLDERS.fullmatch(folder) for folder in folders) or bool(LABEL_FILES.fullmatch(stem(name)))


def read_data_list(path: Path | str, folder: Path | str | None = None) -> list[str]:
    """Paths in a text file, one per line, or in the column path of a table; relative ones belong to `folder` or,
    without it, to the list's own folder.

    A table ends in .csv or .tsv and has that column. Names may be any bytes, in any locale. Of other files empty lines
    and lines that start with # are passed over. Raises DataError, UserError.
    """
    try:
        content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise DataError(path, f"can't be read as a list of files ({one_line(error, path)})") from error
    if b"\0" in content:
        raise DataError(path, "can't be read as a list of files (it is no text, or not in UTF-8)")
    base = folder or os.path.dirname(path)
    lines = map(os.fsdecode, content.split(b"\n"))
    names = [os.path.join(base, line.strip()) for line in lines if line.strip() and not line.startswith("#")]
    if is_kind(path, LIST_SUFFIXES) and names and not os.path.exists(names[0]):  # a bare list may be called so too
        return [os.path.join(base, row["path"]) for _, row in read_rows(path, ["path"]) if row["path"]]
    return names


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


# --------------------------------------------------------------------------------------------- the layouts with labels


LIST_SUFFIXES = (".csv", ".tsv")  # of a list of files that is a table
UNLABELLED = "unlabelled"  # folder in the label's place, for crops that are predicted, or pre-trained on


class Crop(NamedTuple):
    """A labelled crop: file, class, whose it is, and the subset folder that it lies in."""

    path: str
    label: int
    patient: str
    subset: str


class Pair(NamedTuple):
    """A case for segmentation: its name, the files of its image and of its label, and the classes that it may have."""

    name: str
    image: str
    label: str
    classes: tuple[int, ...] | None = None


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
            if label.startswith(".") or label == UNLABELLED or not os.path.isdir(path):
                continue
            if _class_of(label) is None:
                problems.append(DataError(path, "is no label folder: expected label0, label1, ... or 0, 1, ..."))
            elif not any(name.startswith(os.path.join(subset, label) + os.sep) for name in names):
                problems.append(
                    DataError(path, "holds no crop: expected <patient>/<name>.nii.gz below it, or remove it")
                )
    for name in names:
        parts = name.split(os.sep)
        if not parts[0].startswith("subset") or parts[1] == UNLABELLED:
            continue
        if len(parts) == 4 and _class_of(parts[1]) is not None:
            crops.append(Crop(os.path.join(folder, name), _class_of(parts[1]), parts[2], parts[0]))
        elif len(parts) < 3 or _class_of(parts[1]) is not None:
            problems.append(
                DataError(os.path.join(folder, name), "expected as subset*/label<k>/<patient>/<name>.nii.gz")
            )
    if not crops:
        whole = [name for name in names if re.fullmatch(r"subset[^/]*/[^/]+", name)]
        if whole:  # each of which would be a problem of its own
            problems = [problem for problem in problems if os.path.relpath(problem.path, folder) not in whole]
        found = f", found whole scans such as {whole[0]}: prepare_data.py luna16 cuts the crops" if whole else ""
        problems.append(
            DataError(folder, f"holds no crops: expected subset*/label0|label1/<patient>/<name>.nii.gz{found}")
        )
        return crops, problems
    by_name = {}
    for crop in crops:
        first = by_name.setdefault(os.path.join(os.path.dirname(crop.path), stem(crop.path)), crop.path)
        if first != crop.path:
            problems.append(DataError(crop.path, f"has the same name as {first}: expected one file of each name"))
    return crops, problems + crops_faults(crops, folder)


def crops_faults(crops: Sequence[Crop], source: Path | str, label: str = "label") -> list[DataError]:
    """What keeps labelled crops from being trained on: one class alone, a gap in the classes, a class that one patient
    has alone, a patient in two subsets.

    source: folder or list that they are of; label: what to call a class, before its number
    """
    problems = []
    classes = sorted({crop.label for crop in crops})
    if len(classes) == 1:
        problems.append(DataError(source, f"has crops of one class only ({label}{classes[0]}), expected at least two"))
    elif classes != list(range(len(classes))):
        problems.append(
            DataError(
                source,
                f"has the classes {', '.join(map(str, classes))}: expected 0 to {len(classes) - 1} without a gap",
            )
        )
    else:
        owners = owners_of([[crop.label] for crop in crops], [crop.patient for crop in crops])
        problems += lone_class(owners, [crop.patient for crop in crops], source, "patient", label)
    subsets = {}
    for crop in crops:
        subsets.setdefault(crop.patient, set()).add(crop.subset)
    problems += [
        DataError(
            source, f"has patient {patient} in {' and '.join(sorted(where))}: expected every patient in one subset"
        )
        for patient, where in sorted(subsets.items())
        if len(where) > 1
    ]
    return problems


def _class_of(folder: str) -> int | None:
    match = re.fullmatch(r"(?:label)?(\d+)", folder)
    return int(match[1]) if match else None


class Task(NamedTuple):
    """What is found for segmentation.

    form: what to call how it lies there; cases: Pairs sorted by name, with "" for an image or label that is missing
    problems: what else is wrong with the names; classes: that dataset.json declares, or None
    """

    form: str
    cases: list[Pair]
    problems: list[DataError]
    classes: tuple[int, ...] | None = None


def find_pairs(folder: Path | str) -> tuple[list[Pair], list[DataError]]:
    """(Pairs, DataErrors) of the cases below a folder; see `find_task` and `pairs_of`. Raises DataError."""
    return pairs_of(find_task(folder), folder)


def pairs_of(task: Task, folder: Path | str) -> tuple[list[Pair], list[DataError]]:
    """(Pairs, DataErrors) of a Task: images without label, labels without image, names that stand for two files."""
    named = {problem.path for problem in task.problems}
    problems = task.problems + [
        DataError(case.image or case.label, f"has no {'label' if case.image else 'image'} of the same name")
        for case in task.cases
        if not (case.image and case.label) and not named & {case.image, case.label}
    ]
    pairs = [case for case in task.cases if case.image and case.label]
    if not pairs and not problems:
        problems.append(DataError(folder, f"holds no cases: {EXPECTED_PAIRS}"))
    return pairs, problems


EXPECTED_PAIRS = (
    "expected images/<name>.nii.gz and labels/<name>.nii.gz, or imagesTr and labelsTr of the Decathlon or nnU-Net"
)


def find_task(folder: Path | str) -> Task:
    """The Task in a folder: images/ and labels/, or imagesTr/ and labelsTr/ with or without a dataset.json.

    Pairs are those of the index' list, if it has one, and those of one name, from whose image nnU-Net's `_0000` is
    taken. Raises DataError for a folder that is missing or of none of these forms, and for an index of another kind.
    """
    folder = str(folder)
    if not os.path.isdir(folder):
        raise DataError(folder, "is a file, expected a folder" if os.path.exists(folder) else "no such folder")
    kinds, index, form = ("images", "labels"), Index(), "images and labels"
    if not any(os.path.isdir(os.path.join(folder, kind)) for kind in kinds):
        kinds, path = ("imagesTr", "labelsTr"), os.path.join(folder, "dataset.json")
        if os.path.isfile(path):
            index = read_index(path)
        elif not any(os.path.isdir(os.path.join(folder, kind)) for kind in kinds):
            raise DataError(folder, f"holds no cases: {EXPECTED_PAIRS}")
        form = index.form
    if index.classes is None:
        missing = [kind for kind in kinds if not os.path.isdir(os.path.join(folder, kind))]
        if missing:
            raise DataError(os.path.join(folder, missing[0]), "no such folder")
    images, labels = {}, {}  # {name: path}
    known, problems = set(), []
    for image, label in index.listed:
        image = _with_channel(folder, image)
        own = _case_of(image)
        name = _free_name(image, images, own.removesuffix("_0000") if own == f"{stem(label)}_0000" else own)
        images[name], labels[name] = image, label
        known |= {image, label}
    found = [_volumes_in(folder, kind, index.suffixes, known) for kind in kinds]
    for path in found[1]:
        labels[_add(path, labels, problems, folder)] = path
    channels = []
    for path in found[0]:
        case, channel = re.fullmatch(r"(.*?)(?:_(\d{4}))?", _case_of(path), re.S).groups()
        if channel is None or _case_of(path) in labels or case not in labels:
            images[_add(path, images, problems, folder)] = path
        elif int(channel):
            channels.append(path)
        else:
            images[_add(path, images, problems, folder, case)] = path
    if channels:
        raise DataError(
            os.path.join(folder, channels[0]),
            f"is a further channel of its case, as {len(channels)} files are: images of one channel, a CT, are read "
            "here; give a folder without the others",
        )
    cases = [
        Pair(name, *(os.path.join(folder, paths[name]) if name in paths else "" for paths in (images, labels)), classes)
        for classes in [index.classes]
        for name in sorted({*images, *labels})
    ]
    return Task(form, cases, problems, index.classes)


def _volumes_in(folder: str, kind: str, suffixes: tuple[str, ...], known: set[str]) -> list[str]:
    """Volumes of the folder for a kind that the index has not named, relative to `folder`; none without that folder."""
    names = find_volumes(os.path.join(folder, kind)) if os.path.isdir(os.path.join(folder, kind)) else []
    taken = [name for name in names if is_kind(name, suffixes) or not is_kind(name, VOLUME_SUFFIXES)]  # DICOM series
    return [path for name in taken if (path := os.path.join(kind, name)) not in known]


def _case_of(path: str) -> str:
    """Name of the case that a volume is, a file or the DICOM series in a folder."""
    return stem(path) if is_kind(path, VOLUME_SUFFIXES) else os.path.basename(path.rpartition("#")[0] or path)


def _free_name(path: str, taken: Mapping[str, str], name: str = "") -> str:
    """What to call a case: a second one of a name goes by its path."""
    name = name or _case_of(path)
    return path if name in taken else name


def _add(path: str, taken: Mapping[str, str], problems: list[DataError], folder: str, name: str = "") -> str:
    """What to call a case that no list names; a second file of a name is a problem."""
    free = _free_name(path, taken, name)
    if free == path:
        first = os.path.join(folder, taken[name or _case_of(path)])
        problems.append(
            DataError(os.path.join(folder, path), f"has the same name as {first}: expected one file of each name")
        )
    return free


def _with_channel(folder: str, image: str) -> str:
    """Path of an image that an index names, to whose name nnU-Net 1 adds the channel on the disk."""
    name = stem(image)
    other = os.path.join(os.path.dirname(image), name + "_0000" + os.path.basename(image)[len(name) :])
    missing = not os.path.isfile(os.path.join(folder, image))
    return other if missing and os.path.isfile(os.path.join(folder, other)) else image


class Index(NamedTuple):
    """What a dataset.json says. listed: (image, label), relative to its folder; suffixes: of the files that count"""

    form: str = "imagesTr and labelsTr without a dataset.json, paired by name, any class is taken"
    classes: tuple[int, ...] | None = None
    listed: Sequence[tuple[str, str]] = ()
    suffixes: tuple[str, ...] = VOLUME_SUFFIXES


def read_index(path: str) -> Index:
    """The Index in a dataset.json of the Decathlon, of nnU-Net 1 or of nnU-Net 2.

    Raises DataError for another file, and for tasks of a kind that is not trained here.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        labels, listed = content["labels"], content.get("training", [])
        numbers = list(labels.values())
        if all(re.fullmatch(r"\d+", name) for name in labels):  # {number: name}
            form, numbers = "the Decathlon's form", [int(name) for name in labels]
        elif any(isinstance(number, list) for number in numbers):
            region = next(name for name, number in labels.items() if isinstance(number, list))
            raise DataError(
                path, f"has regions that are several labels, such as {region}: expected one number for each name"
            )
        elif all(type(number) is int for number in numbers):  # {name: number}
            form = "nnU-Net's form"
        else:
            raise ValueError("labels are neither numbers nor names of numbers")
        if "ignore" in labels:
            raise DataError(path, "has a label to ignore, which is not done here: expected labels of classes alone")
        channels = content.get("channel_names") or content.get("modality") or {"0": "CT"}
        if len(channels) > 1:
            told = ", ".join(map(str, channels.values() if isinstance(channels, dict) else channels))
            raise DataError(path, f"has {len(channels)} channels ({told}): images of one channel, a CT, are read here")
        if isinstance(content.get("dataset"), dict):  # nnU-Net 2's list
            listed = [
                {"image": _only(one["images"], path), "label": one["label"]} for one in content["dataset"].values()
            ]
        pairs = [(os.path.normpath(case["image"]), os.path.normpath(case["label"])) for case in listed]
        pairs = list(dict.fromkeys(pairs))  # one that is listed twice is one case
        _require_own_labels(pairs, path)
        ending = content.get("file_ending")
        if ending is not None and not is_kind(ending, VOLUME_SUFFIXES):
            raise DataError(path, f"has images of kind {ending}, expected {', '.join(VOLUME_SUFFIXES)}")
        return Index(form, tuple(sorted(numbers)), pairs, (ending,) if ending else VOLUME_SUFFIXES)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, OSError) as error:
        raise DataError(
            path, f"can't be read as a Decathlon's dataset.json or nnU-Net's ({type(error).__name__}: {error})"
        ) from error


def _require_own_labels(pairs: Sequence[tuple[str, str]], path: str) -> None:
    """Raise DataError where a list gives an image two labels, a label two images, or an image the label of another."""
    images = {_case_of(image).removesuffix("_0000"): image for image, _ in pairs}
    for image, label in pairs:
        other = images.get(_case_of(label), image)
        twice = sum(image == one or label == another for one, another in pairs) > 1
        if twice or os.path.basename(other) != os.path.basename(image):
            found = "in another pair too" if twice else f"while {other} has its name"
            raise DataError(path, f"lists {label} as the label of {image}, {found}: expected a label for each image")


def _only(images: list[str], path: str) -> str:
    if len(images) > 1:
        raise DataError(path, f"has cases of {len(images)} channels: images of one channel, a CT, are read here")
    return images[0]


def read_pair(pair: Pair) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(image (X, Y, Z) int16 HU, label (X, Y, Z) uint8, affine (4, 4)) of a Pair.

    Raises DataError where one can't be used, both don't lie on the same grid, or the label has others than its classes.
    """
    with Volume(pair.image) as image, Volume(pair.label) as label:
        reason = other_grid(label.shape, label.affine, image.shape, image.affine)
        if reason:
            raise DataError(pair.label, reason)
        voxels = image.read()
        try:
            return voxels, label.read_labels(pair.classes), image.affine
        except DataError as error:
            swapped = no_image(voxels).startswith("a mask")
            told = f"; its image {pair.image} is a mask: are the two swapped?" if swapped else ""
            raise DataError(error.path, error.reason + told) from error
