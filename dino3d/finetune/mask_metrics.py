"""What is measured and cleaned of masks: overlap, surface distances, lesions found and missed, components; and the
figures of several cases.

Masks are (X, Y, Z) uint8 of classes in RAS order, 0 is the background; spacing is (3,) mm. What lies outside a volume
is background: where a mask touches the volume's border, its voxels there are surface.
"""

import collections
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import SimpleITK as sitk

from dino3d.evaluation.statistics import bootstrap_interval, interval_notes

MASK_METRICS = ("dice", "surface_dice", "hausdorff95_mm")
LESION_COUNTS = ("lesions_found", "lesions_missed", "lesions_predicted", "false_positives")  # of a CT
LESION_METRICS = ("lesion_sensitivity", "lesion_precision", "lesion_f1", "false_positives_per_ct")  # of several
COLUMNS = ("case", "fold", "class", *MASK_METRICS, "volume_ml", "predicted_ml", *LESION_COUNTS)  # of cases.csv


def evaluate_masks(
    predicted: np.ndarray, label: np.ndarray, spacing: Sequence[float], classes: int, tolerance: float
) -> list[dict[str, float | None]]:
    """What a predicted mask is worth: a list with a dict for each foreground class, 1 to classes - 1.

    predicted, label: (X, Y, Z) uint8; spacing: (3,) mm; tolerance: mm
    class            its number
    dice             twice the overlap over the sum of both volumes
    surface_dice     share of both surfaces that lies within the tolerance of the other: the normalised surface Dice of
                     Nikolov et al. 2018 (arXiv 1809.04430), surfaces measured in voxels (Seidlitz et al. 2021, arXiv
                     2111.05408; MONAI's default)
    hausdorff95_mm   the larger of the two directed 95th percentiles of the distances between the surfaces
    volume_ml, predicted_ml    of the label and of the prediction
    lesions_found, lesions_missed, lesions_predicted, false_positives    see `count_lesions`
    Where both are empty, dice and surface_dice are 1 and hausdorff95_mm is 0. Where one of them is, dice and
    surface_dice are 0 and hausdorff95_mm is None: undefined, to be counted and left out of means.
    """
    box = bounding_box(predicted | label)
    predicted, label = predicted[box], label[box]
    return [{"class": c} | _evaluate_class(predicted == c, label == c, spacing, tolerance) for c in range(1, classes)]


def _evaluate_class(
    predicted: np.ndarray, label: np.ndarray, spacing: Sequence[float], tolerance: float
) -> dict[str, float | None]:
    sizes = [int(np.count_nonzero(mask)) for mask in (label, predicted)]
    voxel = math.prod(float(s) for s in spacing) / 1000  # ml
    volumes = {"volume_ml": sizes[0] * voxel, "predicted_ml": sizes[1] * voxel} | count_lesions(predicted, label)
    if not all(sizes):
        same = float(sizes[0] == sizes[1])
        return {"dice": same, "surface_dice": same, "hausdorff95_mm": 0.0 if same else None} | volumes
    distances = _surface_distances(predicted, label, spacing)
    near = sum(int(np.count_nonzero(d <= float(tolerance))) for d in distances)
    return {
        "dice": 2 * int(np.count_nonzero(predicted & label)) / sum(sizes),
        "surface_dice": near / sum(map(len, distances)),
        "hausdorff95_mm": max(float(np.percentile(d, 95)) for d in distances),
    } | volumes


def count_lesions(predicted: np.ndarray, label: np.ndarray) -> dict[str, int]:
    """How many lesions of a label were found or missed, how many were predicted, and how many of those are false.

    predicted, label: (X, Y, Z) bool. A lesion is a component of a mask, however small; voxels that share a corner are
    connected. One of the label is found where a predicted voxel lies in it, one of the prediction is a false positive
    where no voxel of the label does (any overlap, as in the WMH and autoPET challenges).
    """
    truth, found = components(label), components(predicted)
    hit, right = (len(np.unique(parts[(truth > 0) & (found > 0)])) for parts in (truth, found))
    lesions, lesions_predicted = int(truth.max(initial=0)), int(found.max(initial=0))
    return {
        "lesions_found": hit,
        "lesions_missed": lesions - hit,
        "lesions_predicted": lesions_predicted,
        "false_positives": lesions_predicted - right,
    }


def lesion_metrics(
    found: np.ndarray, missed: np.ndarray, predicted: np.ndarray, false_positives: np.ndarray, weights: np.ndarray
) -> dict[str, float | None]:
    """{name: value} of LESION_METRICS of CTs together, None where there is nothing to find or nothing was predicted.

    All (N,), counts of each CT as `count_lesions` gives them, or their means over folds; weights: of each CT
    lesion_sensitivity, lesion_precision, lesion_f1    share of the label's lesions that were found, share of the
        predicted ones that are true, and the harmonic mean of both
    false_positives_per_ct    predicted lesions that are none
    """
    hits, lost, claimed, wrong = (float(weights @ counts) for counts in (found, missed, predicted, false_positives))
    sensitivity = hits / (hits + lost) if hits + lost else None
    precision = (claimed - wrong) / claimed if claimed else None
    both = (sensitivity or 0) + (precision or 0)
    f1 = 2 * (sensitivity or 0) * (precision or 0) / both if both else 0.0
    return {
        "lesion_sensitivity": sensitivity,
        "lesion_precision": precision,
        "lesion_f1": None if sensitivity is None and precision is None else f1,
        "false_positives_per_ct": wrong / float(weights.sum()),
    }


def _surface_distances(predicted: np.ndarray, label: np.ndarray, spacing: Sequence[float]) -> list[np.ndarray]:
    """[(N,), (M,)] float32 mm from each surface voxel of one mask to the nearest of the other, and back. Neither is
    empty."""
    # MONAI's surface Dice and Hausdorff distance are made of these. Each would search for the nearest on its own, and
    # its percentile fails beyond 16 million voxels: the speckle of an untrained model has more.
    from monai.metrics import get_mask_edges, get_surface_distance

    box = bounding_box(predicted | label)
    surfaces, mm = get_mask_edges(predicted[box], label[box]), [float(s) for s in spacing]
    return [get_surface_distance(*pair, spacing=mm) for pair in (surfaces, surfaces[::-1])]


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Slices of the smallest box with all non-zero elements of an array; of an empty one where there are none."""
    others = [tuple(a for a in range(mask.ndim) if a != axis) for axis in range(mask.ndim)]
    found = [np.flatnonzero(mask.any(axis=axes)) for axes in others]
    return tuple(slice(int(f[0]), int(f[-1]) + 1) if len(f) else slice(0, 0) for f in found)


# -------------------------------------------------------------------------------------------------------- several cases


def table_value(column: str, value: float) -> float | int | None:
    """A figure of a case as it stands in cases.csv; NaN is undefined."""
    return None if math.isnan(value) else int(value) if column in LESION_COUNTS else float(value)


def mean_metrics(rows: Sequence[Sequence[Any]]) -> dict[str, float | int | None]:
    """{figure: mean over cases, classes alike}, and how many Hausdorff distances are undefined. rows: as COLUMNS"""
    means = {}
    for name in MASK_METRICS:
        values = [row[COLUMNS.index(name)] for row in rows]
        defined = [value for value in values if value is not None]
        means[name] = float(np.mean(defined)) if defined else None
    undefined = sum(row[COLUMNS.index("hausdorff95_mm")] is None for row in rows)
    return means | {"undefined_hausdorff95": undefined} | lesions_of(rows)


def lesions_of(rows: Sequence[Sequence[Any]], patients: dict[str, str] | None = None) -> dict[str, Any]:
    """{name: value} of LESION_COUNTS and LESION_METRICS of the cases of rows and, given the patient of each case,
    {name_interval: 95 % interval over patients}.

    rows: as COLUMNS; a case's classes add up, and a case that several folds tested counts once, with their mean; of
    older versions' rows, which have no counts, all is None
    """
    names = [f"{name}_interval" for name in LESION_METRICS if patients is not None]
    by_case = collections.defaultdict(lambda: collections.defaultdict(lambda: np.zeros(len(LESION_COUNTS))))
    for row in rows:
        counts = row[COLUMNS.index(LESION_COUNTS[0]) :]
        if any(count in (None, "") for count in counts):
            return dict.fromkeys((*LESION_COUNTS, *LESION_METRICS, *names))
        by_case[row[COLUMNS.index("case")]][row[COLUMNS.index("fold")]] += np.array(counts, float)
    counts = np.array([np.mean(list(folds.values()), axis=0) for folds in by_case.values()])  # (cases, counts)

    def metrics(weights: np.ndarray) -> dict[str, float | None]:
        return lesion_metrics(*counts.T, weights)

    sums = [int(total) if total.is_integer() else total for total in counts.sum(0).tolist()]
    found = dict(zip(LESION_COUNTS, sums)) | metrics(np.ones(len(counts)))
    for name, metric in zip(names, LESION_METRICS):
        found[name] = bootstrap_interval(
            lambda weights, metric=metric: metrics(weights)[metric], [patients[case] for case in by_case]
        )
    return found


def pool_cases(rows: Sequence[Sequence[Any]], patients: dict[str, str]) -> dict[str, Any]:
    """{"cases", each of MASK_METRICS, LESION_COUNTS and LESION_METRICS, their "_interval", "notes"}: each case once,
    the mean of its folds' and classes' figures; bootstrap over patients. patients: of each case

    A distance that is undefined is left out of its case's mean.
    """
    found, intervals = {}, {}
    for name in MASK_METRICS:
        values = collections.defaultdict(list)
        for row in rows:
            if row[COLUMNS.index(name)] not in (None, ""):
                values[row[COLUMNS.index("case")]].append(float(row[COLUMNS.index(name)]))
        means = np.array([np.mean(of_case) for of_case in values.values()])
        found[name] = float(means.mean()) if len(means) else None
        intervals[f"{name}_interval"] = bootstrap_interval(
            lambda weights, means=means: float(np.average(means, weights=weights)), [patients[case] for case in values]
        )
    names = [row[COLUMNS.index("case")] for row in rows]
    owners = [patients[name] for name in names]
    notes = interval_notes(owners, "case" if owners == names else "patient")
    return {"cases": len(set(names)), **found, **intervals, **lesions_of(rows, patients), "notes": notes}


# ------------------------------------------------------------------------------------------------------------ cleaning


def clean(mask: np.ndarray, spacing: Sequence[float], largest_component: bool, min_volume: float) -> np.ndarray:
    """A mask without the small components of each class, which are likely false: the mask itself where nothing is
    asked.

    mask: (X, Y, Z) uint8, stays as it is; spacing: (3,) mm
    largest_component: keep only the largest component of each class; voxels that share a corner are connected
    min_volume: millilitres; components below it are dropped, the largest as well
    """
    if not largest_component and min_volume <= 0:
        return mask
    voxels = math.ceil(min_volume * 1000 / math.prod(float(s) for s in spacing) - 1e-6)  # rounding costs none
    cleaned, box = np.zeros_like(mask), bounding_box(mask)
    for c in np.unique(mask[box]):
        if c:
            parts = components(mask[box] == c, voxels)
            cleaned[box][(parts == 1) if largest_component else (parts > 0)] = c
    return cleaned


def components(mask: np.ndarray, min_size: int = 0) -> np.ndarray:
    """Numbers of the components of a mask with `min_size` voxels or more, 1 for the largest; 0 elsewhere."""
    if not mask.any():
        return np.zeros(mask.shape, np.uint32)  # where it has no voxels either, ITK would end the process
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    return sitk.GetArrayFromImage(sitk.RelabelComponent(sitk.ConnectedComponent(image, True), min_size))
