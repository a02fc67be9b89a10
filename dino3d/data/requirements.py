"""What a data set must be to be trained on: `prepare_data.py check` and the training scripts ask here and say the same.

Faults are DataErrors, for which training does not start; what is merely odd is a line. Both name an example and how
many there are.
"""

import collections
import contextlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dino3d.data.conventions import HDF5_SUFFIXES, DataError, LeftOut, format_size, is_kind
from dino3d.data.volume import Volume

# ------------------------------------------------------------------------------------------------ is it a CT, in HU?

DARK_HU = -300  # HU, between fat and lung
TOO_BRIGHT = 20_000  # HU that not even metal has
DARK_SHARE = 1e-3  # of voxels, that a CT has of those
FAT_HU = -50  # HU, below which fat, lung and air are
FAT_SHARE = 0.02  # of voxels but padding, that a CT has of those; a blurred border of padding has fewer
TOO_BRIGHT_SHARE = 0.01
SAMPLES = 60_000  # voxels of a volume that are looked at, unless they look wrong
MASK_VALUES = 10  # different ones, up to which small whole numbers are a mask's
MASK_FLAT = (
    0.9  # share of equal neighbours, from which on more of them are a mask too (a picture of 8 bits: 0.1 to 0.5)
)


def hu_problem(voxels: np.ndarray) -> str:
    """Why voxels are no CT in Hounsfield units, "" where they look like one. voxels: (X, Y, Z) int16, at least AIR.

    Looks at a part of them, unless that looks wrong: 1 ms for a CT of any size.
    """
    return no_image(voxels) or not_hu(voxels) or too_bright(voxels)


def voxel_problems(voxels: np.ndarray) -> tuple[str, str]:
    """(`no_image`, `hu_problem`) of voxels."""
    fault = no_image(voxels)
    return fault, fault or hu_problem(voxels)


def pretraining_fault(voxels: np.ndarray, converted: bool) -> str:
    """Why pre-training passes a volume over, "" where it does not: a file that no conversion has looked at is to be a
    CT in HU, a converted one not constant. converted: see `Volume`"""
    fault = no_image(voxels)
    if converted:
        return fault if fault.startswith("constant") else ""
    return fault or not_hu(voxels)


def require_ct(voxels: np.ndarray, source: Path | str) -> None:
    """Raise DataError for constant voxels, LeftOut for those that are no CT in HU; bright ones pass."""
    problem = no_image(voxels) or not_hu(voxels)
    if problem:
        raise (DataError if problem.startswith("constant") else LeftOut)(source, problem)


def no_image(voxels: np.ndarray) -> str:
    """Why voxels are no image at all, but constant or a mask; "" where they may be one."""
    sample = _sampled(voxels)
    if sample.min() < 0 and sample.min() < sample.max() or sample.max() > 255:
        return ""
    low, high = voxels.min(), voxels.max()
    if low == high:
        return f"constant: the same value in all voxels ({low})"
    if low < 0 or high > 255:
        return ""
    count = np.count_nonzero(np.bincount(voxels.ravel()))
    if count > MASK_VALUES and (voxels[1:, ::4, ::4] == voxels[:-1, ::4, ::4]).mean() < MASK_FLAT:
        return ""
    return f"a mask, not a CT: {count} whole values from {low} to {high}"


def not_hu(voxels: np.ndarray) -> str:
    """Why voxels that are an image are not in Hounsfield units of a CT with air or lung in it; "" where they are."""
    if not _why_not_hu(_sampled(voxels)):
        return ""
    return _why_not_hu(voxels)  # the sample may have missed it


def _why_not_hu(voxels: np.ndarray) -> str:
    low, high = int(voxels.min()), int(voxels.max())
    told = f"values from {low} to {high}"
    if 0 <= low and high <= 255:
        return f"not in HU: grey values from {low} to {high}, as of 8-bit pictures"
    if low < DARK_HU:  # may be padding around values that are something else, and blurred at its border
        rest = voxels[voxels > low]
        if len(rest) and (rest < FAT_HU).mean() < FAT_SHARE and rest.max() >= 1000:
            voxels, told = rest[rest >= FAT_HU], f"{told}, but next to none between padding and {FAT_HU}"
    if (voxels < DARK_HU).mean() < DARK_SHARE:
        if voxels.min() >= -50 and high >= 1000:
            return f"not in HU: nothing as dark as air or lung, {told}: stored + 1024, or no CT"
        return f"not a thorax CT in HU: nothing as dark as air or lung, {told}"
    return ""


def too_bright(voxels: np.ndarray) -> str:
    """What to say of a large share of voxels that are brighter than anything; "" where there is none."""
    share = float((_sampled(voxels) > TOO_BRIGHT).mean())
    if share <= TOO_BRIGHT_SHARE:
        return ""
    return f"{share:.0%} of its voxels are above {TOO_BRIGHT:,} HU: padding that its header does not tell?"


def _sampled(voxels: np.ndarray) -> np.ndarray:
    """Every n-th voxel along each axis, so that about SAMPLES are left."""
    step = max(1, int((voxels.size / SAMPLES) ** (1 / 3)))
    return voxels[::step, ::step, ::step]


# --------------------------------------------------------------------------------------------------------- what is seen


LOOKED_INTO = 200  # files of a large data set, whose headers tell what is odd in it


class Header(NamedTuple):
    """shape: (3,) voxels; spacing: (3,) mm; both along the axes of RAS; notes: see Volume."""

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    notes: tuple[str, ...] = ()


def header_of(path: Path | str) -> Header:
    """The Header of a volume. Raises DataError."""
    with Volume(path) as volume:
        return Header(volume.shape, volume.spacing, tuple(volume.notes))


SAME_SPACING = 0.05  # relative difference up to which two spacings are taken for the same


def is_same_spacing(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two spacings, (3,) mm, are the same but for what does not matter."""
    return np.allclose(one, other, rtol=SAME_SPACING, atol=0)


def most_common(spacings: Sequence[Sequence[float]]) -> Sequence[float]:
    """The spacing that most files have, the first of several."""
    rounded = [tuple(np.round(spacing, 3)) for spacing in spacings]
    return spacings[rounded.index(collections.Counter(rounded).most_common(1)[0][0])]


def spacing_warnings(
    paths: Sequence[str], spacings: Sequence[Sequence[float]], expected: Sequence[float], whose: str
) -> list[str]:
    """[] or [one line]: files whose spacing, (3,) mm, is another than expected. whose: what the expected one is"""
    other = [i for i, spacing in enumerate(spacings) if not is_same_spacing(spacing, expected)]
    if not other:
        return []
    found, wanted = (format_size(np.round(spacing, 3)) for spacing in (spacings[other[0]], expected))
    return [
        f"warning: {len(other)} of {len(paths)} files have another spacing than {whose}, {wanted} mm, such as "
        f"{paths[other[0]]}: {found} mm: things are seen at another size there"
    ]


def note_lines(paths: Sequence[str], notes: Sequence[Sequence[str]]) -> list[str]:
    """[] or [one line]: files that can be read in two ways."""
    noted = [(path, lines) for path, lines in zip(paths, notes) if lines]
    if not noted:
        return []
    path, lines = noted[0]
    return [f"note: {len(noted)} of {len(paths)} files can be read in two ways, such as {path}: {'; '.join(lines)}"]


def odd_headers(paths: Sequence[str]) -> list[str]:
    """[] or [one line]: of the files that no conversion has read, those that can be read in two ways.

    Looks into LOOKED_INTO of them at most, evenly spread; what can't be read is told when its turn comes.
    """
    raw = [path for path in paths if not is_kind(path, HDF5_SUFFIXES)]
    raw = [raw[i] for i in np.linspace(0, len(raw) - 1, min(len(raw), LOOKED_INTO)).round().astype(int)]

    def notes_of(path: str) -> tuple[str, ...]:
        with contextlib.suppress(DataError), Volume(path) as volume:
            return volume.notes
        return ()

    with ThreadPoolExecutor(8) as pool:  # mostly waiting, for network drives
        return note_lines(raw, list(pool.map(notes_of, raw)))


def hu_warnings(paths: Sequence[str], problems: Sequence[str], share: float = 0.0) -> list[str]:
    """[] or [one line]: files that are no CT in HU, where more than a share of them are none. problems: `hu_problem`"""
    wrong = [(path, problem) for path, problem in zip(paths, problems) if problem]
    if not wrong or len(wrong) <= share * len(paths):
        return []
    path, problem = wrong[0]
    return [f"warning: {len(wrong)} of {len(paths)} files are no CT in HU, such as {path}: {problem}"]


# ------------------------------------------------------------------------------------------------ crops to classify

WHOLE_CT = 200.0  # mm along two axes, beyond which a volume is a CT, not the crop of a nodule
LARGER = 2  # times the size of training's crops, beyond which a volume is no such crop


def whole_ct(
    shape: Sequence[int],
    spacing: Sequence[float],
    trained_shape: Sequence[int] | None = None,
    trained_spacing: Sequence[float] | None = None,
) -> str:
    """Why a volume is no crop of a nodule but a whole CT, "" where it may be one.

    shape: (3,) voxels; spacing: (3,) mm; trained_shape, trained_spacing: of training's crops, for a new one
    """

    def is_wide(shape: Sequence[int], spacing: Sequence[float]) -> bool:
        return (np.array(shape) * spacing > WHOLE_CT).sum() >= 2

    wide = is_wide(shape, spacing) and not (trained_spacing and is_wide(trained_shape, trained_spacing))
    if not wide and not (trained_shape and (np.array(shape) > LARGER * np.array(trained_shape)).all()):
        return ""
    limit = f"crops of {format_size(trained_shape)} voxels" if trained_shape else "a nodule in the middle of a crop"
    return (
        f"is a whole CT, not a crop: {format_size(shape)} voxels over "
        f"{format_size(np.rint(np.array(shape) * spacing))} mm, expected {limit}; prepare_data.py luna16 cuts "
        "them, and --predict with --points does so for points in new CTs"
    )


def crop_faults(
    paths: Sequence[str], headers: Sequence[Header], seen: dict[str, tuple[str, str]]
) -> tuple[list[DataError], list[str]]:
    """(faults, lines) of the crops of a data set.

    seen: {path: (`no_image`, `hu_problem`)} of those whose voxels were looked at
    """
    if not paths:
        return [], []
    faults = []
    sizes = collections.Counter(header.shape for header in headers)
    size = sizes.most_common(1)[0][0]
    first_of = {}
    for path, header in zip(paths, headers):
        first_of.setdefault(header.shape, path)
    for other in sizes:
        if other != size:
            faults.append(DataError(first_of[other], size_fault(other, first_of[size], size)))
    for path, header in zip(paths, headers):
        if fault := whole_ct(header.shape, header.spacing):
            faults.append(DataError(path, fault))
            break
    most = most_common([header.spacing for header in headers])
    faults += [DataError(path, fault) for path, (fault, _) in seen.items() if fault]
    # A crop of soft tissue alone is a sound one, a set of such crops is not
    lines = hu_warnings(list(seen), [problem for _, problem in seen.values()], share=0.5)
    lines += spacing_warnings(paths, [header.spacing for header in headers], most, "most")
    return faults, lines + note_lines(paths, [header.notes for header in headers])


def size_fault(size: Sequence[int], first_path: str, first_size: Sequence[int]) -> str:
    """What is wrong with a crop that has another size than the others."""
    return f"has {format_size(size)} voxels, but {first_path} has {format_size(first_size)}: expected crops of one size"


# ---------------------------------------------------------------------------------------------- classes and folds


def class_faults(classes: Sequence[Iterable[int]], names: Sequence[str], folder: Path | str) -> list[DataError]:
    """[] or [what keeps labels from being learnt]: none at all, a gap in the classes, one that a single case has.

    classes: of the labels of each case; names: of the cases
    """
    if not names:
        return []
    owners = owners_of(classes, names)
    seen = sorted({0, *owners})
    if seen == [0]:
        return [DataError(folder, "has no labelled voxel in any case; are these the right labels?")]
    if seen != list(range(len(seen))):
        found, last = ", ".join(map(str, seen)), len(seen) - 1
        return [DataError(folder, f"has the classes {found}: expected 0 to {last} without a gap")]
    return lone_class(owners, names, folder, "case", "class ")


def owners_of(classes: Sequence[Iterable[int]], names: Sequence[str]) -> dict[int, list[str]]:
    """{class: names of those that have it}."""
    owners = collections.defaultdict(list)
    for name, of_case in zip(names, classes):
        for value in {*of_case}:
            owners[value].append(name)
    return owners


def alike_patients(patients: Iterable[str], source: Path | str) -> list[str]:
    """[] or [a line on patients that differ in upper and lower case alone]: of one person they would be trained on and
    tested."""
    written, alike = {}, []
    for patient in sorted(set(patients)):
        other = written.setdefault(patient.casefold(), patient)
        if other != patient:
            alike.append(f"{other} and {patient}")
    if not alike:
        return []
    return [
        f"warning: {source}: {len(alike)} patients differ from another one in upper and lower case alone, such as "
        f"{alike[0]}, and are taken for two: give one person one name"
    ]


def lone_class(
    owners: dict[int, list[str]], names: Iterable[str], folder: Path | str, who: str, what: str
) -> list[DataError]:
    """[] or [a class that a single one has], who is always missing where a fold is trained or where it is evaluated."""
    alone = [value for value in sorted(owners) if len({*owners[value]}) == 1]
    if not alone or len({*names}) <= LEAST_PATIENTS:  # too few to ask for more
        return []
    return [
        DataError(
            folder,
            f"has {what}{alone[0]} in one {who} alone, {owners[alone[0]][0]}: some fold would have no {who} with "
            f"{what}{alone[0]} to train on; add such cases, or remove it",
        )
    ]


LEAST_PATIENTS = 3  # for a test set and two folds
DEFAULT_PATIENTS = 6  # for a test set and the five folds of --k_fold


def few_patients(count: int, who: str) -> list[str]:
    """[] or [one line] where patients, or cases, are too few to train on with the scripts' own --k_fold."""
    if not 0 < count < DEFAULT_PATIENTS:
        return []
    least = f"lower --k_fold (2 takes {LEAST_PATIENTS}) or " if count >= LEAST_PATIENTS else ""
    return [
        f"warning: {count} {who} are too few for a test set and --k_fold {DEFAULT_PATIENTS - 1}, the default of "
        f"training: {least}add {who}"
    ]


def case_lines(
    pairs: Sequence[Any], classes: Sequence[Iterable[int]], hu: Sequence[str], headers: Sequence[Header]
) -> list[str]:
    """Lines on what is odd about cases to segment.

    pairs: layouts.Pair of each; classes: of its label; hu: `hu_problem` of its image; headers: of all images and labels
    """
    owners, lines = owners_of(classes, [pair.name for pair in pairs]), []
    empty = [pair.name for pair, of_case in zip(pairs, classes) if not {*of_case} - {0}]
    if empty:
        lines.append(f"note: cases without a labelled voxel: {len(empty)}, such as {empty[0]}")
    declared = {value for pair in pairs for value in pair.classes or ()}
    if without := sorted(declared - {0, *owners}):
        lines.append(
            f"warning: dataset.json has the class {', '.join(map(str, without))}, which no case has: it is not learnt"
        )
    images, labels = [pair.image for pair in pairs], [pair.label for pair in pairs]
    return lines + hu_warnings(images, hu) + note_lines([*images, *labels], [header.notes for header in headers])
