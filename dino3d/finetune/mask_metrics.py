"""What is measured and cleaned of a mask: overlap, surface distances, lesions found and missed, components.

Masks are (X, Y, Z) uint8 of classes in RAS order, 0 is the background; spacing is (3,) mm. What lies outside a volume
is background: where a mask touches the volume's border, its voxels there are surface.
"""

import math
from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk

LESION_COUNTS = ("lesions_found", "lesions_missed", "lesions_predicted", "false_positives")  # of a CT
LESION_METRICS = ("lesion_sensitivity", "lesion_precision", "lesion_f1", "false_positives_per_ct")  # of several


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
