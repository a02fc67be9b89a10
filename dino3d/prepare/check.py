"""prepare_data.py check: what a prepared folder holds, and what the training scripts would refuse of it."""

import collections
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dino3d.command_line import UserError
from dino3d.data.conventions import DataError, format_size
from dino3d.data.layouts import Crop, Pair, find_crops, find_pairs, find_volumes, read_pair
from dino3d.data.parallel import in_processes, progress
from dino3d.data.volume import Volume
from dino3d.prepare.inputs import QUANTILES


class CheckedFile(NamedTuple):
    """What check reads of a volume, or the reason why it can't be used; classes: voxels of each in a case's label."""

    path: str
    problem: str = ""
    size: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    hu: tuple[float, ...] = ()  # least, 1 %, 50 %, 99 %, greatest
    classes: dict[int, int] = {}


def check(folder: Path, workers: int) -> None:
    """Print what a prepared folder holds and what the training scripts would refuse of it, and why."""
    if not folder.is_dir():
        raise UserError(f"{folder}: " + ("is no folder" if folder.exists() else "no such folder"))
    if (folder / "images").is_dir() or (folder / "labels").is_dir():
        missing = [kind for kind in ("images", "labels") if not (folder / kind).is_dir()]
        pairs, problems = ([], [DataError(folder / missing[0], "no such folder")]) if missing else find_pairs(folder)
        seen = check_files(check_pair, pairs, workers)
        print(f"segmentation layout: {len(pairs)} cases in {folder}")
        print_labels(seen)
        if seen and not any(value for one in seen for value in one.classes):
            problems.append(DataError(folder, "has no labelled voxel in any case"))
    elif any(path.is_dir() and path.name.startswith("subset") for path in folder.iterdir()):
        crops, problems = find_crops(folder)
        seen = check_files(check_volume, [crop.path for crop in crops], workers)
        print(
            f"classification layout: {len(crops)} crops of {len({crop.patient for crop in crops})} patients in {folder}"
        )
        print_balance(crops)
        sizes = collections.Counter(one.size for one in seen if one.size)
        for size, _ in sizes.most_common()[1:]:
            other = next(one for one in seen if one.size == size)
            problems.append(
                DataError(
                    other.path,
                    f"has {format_size(size)} voxels, most crops have {format_size(sizes.most_common(1)[0][0])}",
                )
            )
    else:
        paths = [str(folder / name) for name in find_volumes(folder)]
        seen, problems = check_files(check_volume, paths, workers), []
        patients = {path.relative_to(folder).parts[0] for path in map(Path, paths)}
        print(f"pre-training layout: {len(paths)} volumes of {len(patients)} patients in {folder}")
        if not paths:
            problems.append(
                DataError(folder, "holds none of the three layouts: no subset*, no images and labels, no volumes")
            )
    print_ranges(seen)
    problems += [DataError(one.path, one.problem) for one in seen if one.problem]
    for problem in problems:
        print(f"refused: {problem}")
    if problems:
        raise UserError(f"{folder}: {len(problems)} things would be refused, such as {problems[0]}")
    print("nothing would be refused")


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
            return check_voxels(path, volume.read(), volume.spacing)
    except DataError as error:
        return CheckedFile(path, error.reason)


def check_pair(pair: Pair) -> CheckedFile:
    """What check reads of a case for segmentation: of its image, and the classes in its label."""
    try:
        image, label, affine = read_pair(pair)
    except DataError as error:
        return CheckedFile(error.path, error.reason)
    values, counts = np.unique(label, return_counts=True)
    return check_voxels(pair.image, image, np.linalg.norm(affine[:3, :3], axis=0))._replace(
        classes={int(value): int(count) for value, count in zip(values, counts) if value}
    )


def check_voxels(path: str, voxels: np.ndarray, spacing: Sequence[float] | np.ndarray) -> CheckedFile:
    """Size, spacing and HU of (X, Y, Z) voxels; a problem where all are equal."""
    low, high = voxels.min(), voxels.max()
    if low == high:
        return CheckedFile(path, f"has the same value in all voxels ({low})")
    quantiles = np.percentile(voxels[::2, ::2], list(QUANTILES.values()))
    return CheckedFile(path, "", tuple(voxels.shape), tuple(spacing), (low, *quantiles, high))


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
    good = [one for one in seen if not one.problem]
    for value in sorted({value for one in good for value in one.classes}):
        of = [one.classes[value] * np.prod(one.spacing) / 1000 for one in good if value in one.classes]
        print(f"class {value}: in {len(of)} cases, {min(of):.3g} to {max(of):.3g} ml, median {np.median(of):.3g} ml")
    empty = sum(not one.classes for one in good)
    if empty:
        print(f"no labelled voxel: {empty} cases")
