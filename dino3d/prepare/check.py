"""prepare_data.py check: what a prepared folder holds, and what the training scripts would refuse of it."""

import collections
import functools
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dino3d.command_line import UserError
from dino3d.data.conventions import DataError
from dino3d.data.foreground import read_occupancy
from dino3d.data.layouts import (
    UNLABELLED,
    Crop,
    Pair,
    find_crops,
    find_task,
    find_unlabelled,
    find_volumes,
    none_found,
    pairs_of,
    read_data_list,
    read_pair,
)
from dino3d.data.lists import LABEL, MASK, columns_of, crops_of_list, is_table, pairs_of_list, read_list
from dino3d.data.parallel import in_processes, progress
from dino3d.data.requirements import (
    DEFAULT_PATIENTS,
    Header,
    alike_patients,
    case_lines,
    class_faults,
    crop_faults,
    few_patients,
    header_of,
    hu_warnings,
    note_lines,
    pretraining_fault,
    voxel_problems,
)
from dino3d.data.volume import Volume
from dino3d.data.volume_cache import SMALL
from dino3d.prepare.inputs import QUANTILES


class CheckedFile(NamedTuple):
    """What check reads of a volume, or the reason why it can't be used.

    hu: least, 1 %, 50 %, 99 %, greatest; faults: of `voxel_problems`; classes: voxels of each in a case's label
    """

    path: str
    problem: str = ""
    size: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()
    hu: tuple[float, ...] = ()
    faults: tuple[str, str] = ("", "")
    classes: dict[int, int] = {}
    label_notes: tuple[str, ...] = ()
    indexed: bool = False  # whether its occupancy is stored
    slow: str = ""  # see Volume
    code: int = 0  # checksum of a crop's voxels

    @property
    def header(self) -> Header:
        return Header(self.size, self.spacing, self.notes)


Folds = Sequence[Any]  # Splits
Checked = tuple[list[CheckedFile], list[DataError], list[str]]  # files, what would be refused, lines on what is odd


def check(folder: Path, workers: int, make_folds: Callable[..., Folds], label_column: str | None = None) -> None:
    """Print what a folder of data, or a table of files, holds and what the training scripts would say and refuse of it,
    and why.

    make_folds: `finetune.splits.patient_splits`; label_column: of a table of labelled crops
    """
    if label_column and not is_table(folder):
        raise UserError(f"--label_column {label_column} is a column of a table (.csv), and {folder} is none")
    if not folder.is_dir() and not (is_table(folder) and folder.is_file()):
        if not folder.exists():
            raise UserError(f"{folder}: no such " + ("table" if is_table(folder) else "folder"))
        raise UserError(f"{folder}: is no folder" + ("" if is_table(folder) else ", and no table of files (.csv)"))
    kinds = ("images", "labels", "imagesTr", "labelsTr")
    if not folder.is_dir():
        look = look_at_table(folder, make_folds, label_column)
    elif any((folder / kind).is_dir() for kind in kinds) or (folder / "dataset.json").is_file():
        look = functools.partial(check_cases, make_folds=make_folds)
    elif any(path.is_dir() and path.name.startswith("subset") for path in folder.iterdir()):
        look = functools.partial(check_crops_of, make_folds=make_folds)
    else:
        look = check_volumes
    try:
        seen, problems, lines = look(folder, workers)
    except DataError as error:
        seen, problems, lines = [], [error], []
    print_ranges(seen)
    for line in lines:
        print(line)
    problems += [DataError(one.path, one.problem) for one in seen if one.problem]
    for problem in problems:
        print(f"refused: {problem}")
    if problems:
        raise UserError(f"{folder}: {len(problems)} things would be refused, such as {problems[0]}")
    print("nothing would be refused")


def look_at_table(
    path: Path, make_folds: Callable[..., Folds], label_column: str | None
) -> Callable[[Path, int], Checked]:
    """What looks at a table: as masks where it has such a column and no other is asked for, as labels, or as volumes
    alone."""
    columns = columns_of(path, [MASK, label_column or LABEL])
    if MASK in columns and not label_column:
        return functools.partial(check_cases, make_folds=make_folds)
    if label_column or LABEL in columns:
        return functools.partial(check_crops_of, make_folds=make_folds, label_column=label_column or LABEL)
    return check_volumes


def check_cases(folder: Path, workers: int, make_folds: Callable[..., Folds]) -> Checked:
    """What main_lts_msd.py would say of a folder or table."""
    if is_table(folder):
        found = pairs_of_list(folder)
        pairs, problems, told = found.pairs, [], found.lines
        form, patients = f"of {len(set(found.patients))} patients", found.patients
    else:
        task = find_task(folder)
        (pairs, problems), told, form = pairs_of(task, folder), [], task.form
        patients = [pair.name for pair in pairs]
    seen = check_files(check_pair, pairs, workers)
    print(f"segmentation layout: {len(pairs)} cases in {folder}: {form}")
    good = [(pair, one) for pair, one in zip(pairs, seen) if not one.problem]
    print_labels([one for _, one in good])
    usable, classes = [pair for pair, _ in good], [one.classes for _, one in good]
    problems += class_faults(classes, [pair.name for pair in usable], folder)
    headers = [one.header for _, one in good] + [one.header._replace(notes=one.label_notes) for _, one in good]
    lines = told + case_lines(usable, classes, [one.faults[1] for _, one in good], headers)
    lines += few_patients(len(set(patients)), "patients" if is_table(folder) else "cases")
    if not problems and len(good) == len(pairs):
        lines += unlearnt(make_folds, patients, [0] * len(pairs), classes, "case with class ")
    return seen, problems, lines


def check_crops_of(folder: Path, workers: int, make_folds: Callable[..., Folds], label_column: str = LABEL) -> Checked:
    """What main_lnc_luna16.py would say of a folder or table."""
    if is_table(folder):
        crops, _, problems, odd, *_ = crops_of_list(folder, label_column)
    else:
        crops, problems = find_crops(folder)
        odd = alike_patients([crop.patient for crop in crops], folder)
    seen = check_files(check_volume, [crop.path for crop in crops], workers)
    odd += same_voxels(crops, seen)
    patients = {crop.patient for crop in crops}
    print(f"classification layout: {len(crops)} crops of {len(patients)} patients in {folder}")
    print_balance(crops)
    good = [one for one in seen if not one.problem]
    faults, lines = crop_faults(
        [one.path for one in good], [one.header for one in good], {one.path: one.faults for one in good}
    )
    names = [] if is_table(folder) else find_volumes(folder)
    unlabelled = sum(name.split(os.sep)[1:2] == [UNLABELLED] for name in names)
    told = [f"note: {unlabelled} crops in {UNLABELLED} folders are for --predict: not trained on"] if unlabelled else []
    lines += told + few_patients(len(patients), "patients")
    if not problems:
        labels = [crop.label for crop in crops]
        lines += unlearnt(
            make_folds, [crop.patient for crop in crops], labels, [{k} for k in labels], "patient with label"
        )
    return seen, problems + faults, odd + lines


def unlearnt(
    make_folds: Callable[..., Folds],
    patients: Sequence[str],
    labels: Sequence[int],
    classes: Sequence[Iterable[int]],
    what: str,
) -> list[str]:
    """[] or [a line on a class that nobody has in a fold's training, with which training would not begin].

    patients, labels, classes: of each case, labels as training divides by them; what: to call one with a class
    """
    try:
        folds = make_folds(patients, labels, None, DEFAULT_PATIENTS - 1, 0)
    except UserError:  # too few, which is told
        return []
    everywhere = {k for of_case in classes for k in of_case}
    for number, fold in enumerate(folds):
        train = set(fold.train)
        trained = {k for patient, of_case in zip(patients, classes) if patient in train for k in of_case}
        if missing := everywhere - trained:
            return [
                f"warning: by the default --k_fold {DEFAULT_PATIENTS - 1} and --seed 0 fold {number} has no {what}"
                f"{min(missing)} to train on, and training would refuse: lower --k_fold or --num_test, take another "
                "--seed, or add such cases"
            ]
    return []


def check_volumes(folder: Path, workers: int) -> Checked:
    """What main_dino.py would say of a folder or table."""
    if is_table(folder):
        paths, passed_over, of_patients = list(dict.fromkeys(read_data_list(folder))), "", ""
        print(
            f"note: {folder} has no column {LABEL} or {MASK}: checked for pre-training and --predict alone; "
            "--label_column names a column of labels"
        )
        try:
            read_list(folder)
        except DataError as error:  # pre-training takes a volume twice
            print(f"note: --predict would refuse it: {error}")
    else:
        names, passed_over = find_unlabelled(folder)
        paths = [str(folder / name) for name in names]
        of_patients = f" of {len({path.relative_to(folder).parts[0] for path in map(Path, paths)})} patients"
    problems = []
    seen = check_files(check_unlabelled, paths, workers)
    print(f"pre-training layout: {len(paths)} volumes{of_patients} in {folder}")
    lines = [f"passed over: {passed_over}"] if passed_over else []
    if not paths:
        told = none_found(passed_over)
        problems.append(DataError(folder, f"holds none of the three layouts: no subset*, no images and labels, {told}"))
    good = [one for one in seen if not one.problem]
    paths = [one.path for one in good]
    lines += hu_warnings(paths, [one.faults[1] for one in good]) + note_lines(paths, [one.notes for one in good])
    if without := [one.path for one in good if not one.indexed]:
        lines.append(
            f"note: {len(without)} of {len(good)} volumes have no stored occupancy, such as {without[0]}: --foreground "
            "of main_dino.py finds it as it trains, prepare_data.py index stores it"
        )
    if slow := [one for one in good if one.slow]:
        lines.append(
            f"note: {len(slow)} of {len(good)} volumes are read through the HDF5 library, which is slower, such as "
            f"{slow[0].path} ({slow[0].slow}): prepare_data.py index stores where their chunks are"
        )
    return seen, problems, lines


def check_files(see: Callable[[Any], CheckedFile], items: Sequence[Any], workers: int) -> list[CheckedFile]:
    """[CheckedFile] of the items in their order."""
    found = {}
    with progress(len(items), "file") as bar:
        for item, seen in in_processes(see, items, workers):
            found[item] = seen or CheckedFile(getattr(item, "image", item), "the process that read it died")
            bar.update()
    return [found[item] for item in items]


def check_volume(path: str) -> CheckedFile:
    """What check reads of a volume or crop."""
    try:
        with Volume(path) as volume:
            voxels = volume.read()
            seen = check_voxels(path, voxels, Header(volume.shape, volume.spacing, tuple(volume.notes)))
            return seen._replace(code=zlib.crc32(np.ascontiguousarray(voxels)))
    except DataError as error:
        return CheckedFile(path, error.reason)


def same_voxels(crops: Sequence[Crop], seen: Sequence[CheckedFile]) -> list[str]:
    """Lines on crops that hold the same voxels and are of two patients, or of two labels."""
    found = collections.defaultdict(list)
    for crop, one in zip(crops, seen):
        if not one.problem:
            found[one.code, one.size].append(crop)
    lines = []
    for name, what in (("patient", "patients, so that one image may be trained on and tested"), ("label", "labels")):
        unlike = [of for of in found.values() if len({getattr(crop, name) for crop in of}) > 1]
        if unlike:
            one, other = unlike[0][0], next(c for c in unlike[0] if getattr(c, name) != getattr(unlike[0][0], name))
            lines.append(
                f"warning: {len(unlike)} images stand in crops of two {what}, such as {one.path} ({name} "
                f"{getattr(one, name)}) and {other.path} ({getattr(other, name)})"
            )
    return lines


def check_unlabelled(path: str) -> CheckedFile:
    """What check reads of a volume to pre-train on."""
    try:
        with Volume(path) as volume:
            voxels = volume.read()
            seen = check_voxels(path, voxels, Header(volume.shape, volume.spacing, tuple(volume.notes)))
            indexed = read_occupancy(volume) is not None
            problem = pretraining_fault(voxels, volume.converted)
            return seen._replace(problem=problem, indexed=indexed, slow=volume.slow if voxels.nbytes > SMALL else "")
    except DataError as error:
        return CheckedFile(path, error.reason)


def check_pair(pair: Pair) -> CheckedFile:
    """What check reads of a case for segmentation: of its image, and the classes in its label."""
    try:
        image, label, _ = read_pair(pair)
        header, notes = header_of(pair.image), header_of(pair.label).notes
    except DataError as error:
        return CheckedFile(error.path, error.reason)
    values, counts = np.unique(label, return_counts=True)
    seen = check_voxels(pair.image, image, header)
    return seen._replace(
        problem=seen.faults[0],
        classes={int(value): int(count) for value, count in zip(values, counts) if value},
        label_notes=notes,
    )


def check_voxels(path: str, voxels: np.ndarray, header: Header) -> CheckedFile:
    """Size, spacing and HU of (X, Y, Z) voxels, and whether they are those of a CT."""
    quantiles = np.percentile(voxels[::2, ::2], list(QUANTILES.values()))
    hu = (voxels.min(), *quantiles, voxels.max())
    return CheckedFile(path, "", *header, hu, voxel_problems(voxels))


def print_ranges(seen: Sequence[CheckedFile]) -> None:
    """A table of the least, median and greatest size, spacing and HU."""
    good = [one for one in seen if not one.problem]
    if not good:
        return
    print(f"{'':24}{'least':>10}{'median':>10}{'greatest':>10}")
    for title, name, axes in (
        ("voxels", "size", "xyz"),
        ("mm per voxel", "spacing", "xyz"),
        ("HU", "hu", ("least", "1 %", "median", "99 %", "greatest")),
    ):
        for i, axis in enumerate(axes):
            values = np.array([getattr(one, name)[i] for one in good])
            print(
                f"{title + ', ' + axis:24}"
                + "".join(f"{value:10.5g}" for value in (values.min(), np.median(values), values.max()))
            )


def print_balance(crops: Sequence[Crop]) -> None:
    """A table of crops and patients by subset and label."""
    labels = sorted({crop.label for crop in crops})
    print(f"{'':24}{'patients':>10}" + "".join(f"{'label' + str(label):>10}" for label in labels))
    for subset in [*sorted({crop.subset for crop in crops}), "all"]:
        here = [crop for crop in crops if subset in (crop.subset, "all")]
        counts = collections.Counter(crop.label for crop in here)
        print(
            f"{subset:24}{len({crop.patient for crop in here}):10}" + "".join(f"{counts[label]:10}" for label in labels)
        )


def print_labels(seen: Sequence[CheckedFile]) -> None:
    """A line for each class: in how many cases, and of what share of their voxels."""
    for value in sorted({value for one in seen for value in one.classes}):
        of = [one.classes[value] * np.prod(one.spacing) / 1000 for one in seen if value in one.classes]
        print(f"class {value}: in {len(of)} cases, {min(of):.3g} to {max(of):.3g} ml, median {np.median(of):.3g} ml")
