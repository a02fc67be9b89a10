"""Figures of masks against scipy and MONAI on whole volumes, cleaning against scipy, and where pictures show what."""

import json
import warnings

import numpy as np
import pytest
import torch
from scipy import ndimage

from dino3d.finetune import mask_metrics, mask_pictures
from dino3d.training import pictures

SPACINGS = [(1.0, 1.0, 1.0), (0.7, 0.8, 2.5), (0.6, 3.0, 1.1)]
GREEN, RED, YELLOW = (0, 255, 0), (255, 0, 0), (255, 255, 0)


def blobs(seed, shape=(24, 20, 16), classes=3, sigma=2.0):
    """Random (X, Y, Z) classes in smooth shapes, which also touch the border."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma, mode="wrap")
    return np.digitize(field, np.quantile(field, np.linspace(0.7, 1, classes)[:-1])).astype(np.uint8)


def moved(mask, seed):
    """A mask with its voxels shifted and some of them changed."""
    rng = np.random.default_rng(seed)
    other = np.roll(mask, rng.integers(1, 3, 3), (0, 1, 2))
    other[tuple(rng.integers(0, n, 12) for n in mask.shape)] = 1
    return other


def surface_of(mask):
    return mask & ~ndimage.binary_erosion(mask)  # what lies outside the volume is background


def distances(predicted, label, spacing):
    """From each surface voxel to the nearest of the other mask: two arrays."""
    ours, theirs = surface_of(predicted), surface_of(label)
    return (
        ndimage.distance_transform_edt(~theirs, sampling=spacing)[ours],
        ndimage.distance_transform_edt(~ours, sampling=spacing)[theirs],
    )


def expected(predicted, label, spacing, tolerance):
    """Dice, surface Dice and 95 % Hausdorff distance of two masks that aren't empty, by scipy."""
    there, back = distances(predicted, label, spacing)
    near = (there <= tolerance).sum() + (back <= tolerance).sum()
    return {
        "dice": 2 * (predicted & label).sum() / (predicted.sum() + label.sum()),
        "surface_dice": near / (len(there) + len(back)),
        "hausdorff95_mm": max(np.percentile(there, 95), np.percentile(back, 95)),
    }


def by_monai(predicted, label, spacing, tolerance):
    """The same of whole volumes by MONAI."""
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

    pair = [torch.from_numpy(mask)[None, None] for mask in (predicted, label)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an argument that MONAI itself still gives
        return {
            "dice": compute_dice(*pair).item(),
            "surface_dice": compute_surface_dice(*pair, [tolerance], True, spacing=spacing).item(),
            "hausdorff95_mm": compute_hausdorff_distance(
                *pair, True, percentile=95, directed=False, spacing=spacing
            ).item(),
        }


def values(found, like):
    return {name: found[name] for name in like}


# ----------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("seed, spacing", list(enumerate(SPACINGS * 3)))
def test_figures_are_those_of_scipy_and_monai(seed, spacing):
    """Three classes in random shapes, several of which touch the border; MONAI is given the whole volumes."""
    label = blobs(seed)
    predicted = moved(label, seed)
    tolerance = 1.37  # no distance on these grids
    found = mask_metrics.evaluate_masks(predicted, label, spacing, 3, tolerance)
    assert [row["class"] for row in found] == [1, 2]
    for row in found:
        pair = predicted == row["class"], label == row["class"]
        for reference in (expected(*pair, spacing, tolerance), by_monai(*pair, spacing, tolerance)):
            assert values(row, reference) == pytest.approx(reference, abs=1e-4)  # MONAI's percentile is float32
        for name, mask in (("volume_ml", label), ("predicted_ml", predicted)):
            assert row[name] == pytest.approx((mask == row["class"]).sum() * np.prod(spacing) / 1000)
    assert 0 < found[0]["surface_dice"] < 1 and found[0]["hausdorff95_mm"] > 0


@pytest.mark.parametrize(
    "where",
    [
        (slice(0, 4), slice(0, 5), slice(0, 3)),
        (slice(-4, None), slice(3, 9), slice(-3, None)),
        (slice(None), slice(None), slice(None)),
        (slice(None), slice(6, 9), slice(4, 7)),
    ],
)
def test_a_mask_at_the_border_has_a_surface_there(where):
    """As on a volume with background all around it, which is what MONAI and scipy take for granted too."""
    shape, spacing = (14, 12, 10), (0.9, 1.1, 2.0)
    label, predicted = np.zeros((2, *shape), np.uint8)
    label[where] = 1
    predicted[where] = 1
    predicted[5:9, 4:8, 3:6] ^= 1
    found = mask_metrics.evaluate_masks(predicted, label, spacing, 2, 1.37)[0]
    wide = mask_metrics.evaluate_masks(np.pad(predicted, 7), np.pad(label, 7), spacing, 2, 1.37)[0]
    assert found == wide
    for reference in (expected, by_monai):
        reference = reference(predicted > 0, label > 0, spacing, 1.37)
        assert values(found, reference) == pytest.approx(reference, abs=1e-4)


def test_a_false_positive_far_away_counts():
    """Nothing that belongs to a class is cut off, wherever it is."""
    label, predicted = np.zeros((2, 60, 50, 40), np.uint8)
    label[3:9, 4:9, 5:9] = predicted[3:9, 4:9, 5:9] = 1
    predicted[50:58, 40:48, 30:38] = 1
    row = mask_metrics.evaluate_masks(predicted, label, (1.0, 1.0, 2.0), 2, 1.0)[0]
    reference = expected(predicted > 0, label > 0, (1.0, 1.0, 2.0), 1.0)
    assert values(row, reference) == pytest.approx(reference, abs=1e-3) and row["hausdorff95_mm"] > 70


def test_figures_of_single_voxels():
    """Three voxels along x and one along z apart: the distance between their centres, on either side of the
    tolerance."""
    label, predicted = np.zeros((2, 9, 9, 9), np.uint8)
    label[2, 4, 4] = predicted[5, 4, 5] = 1
    row = mask_metrics.evaluate_masks(predicted, label, (1.0, 1.0, 4.0), 2, 5.0)[0]
    assert row == {
        "class": 1,
        "dice": 0.0,
        "surface_dice": 1.0,
        "hausdorff95_mm": 5.0,
        "volume_ml": 0.004,
        "predicted_ml": 0.004,
        "lesions_found": 0,
        "lesions_missed": 1,
        "lesions_predicted": 1,
        "false_positives": 1,
    }
    assert mask_metrics.evaluate_masks(predicted, label, (1.0, 1.0, 4.0), 2, 4.9)[0]["surface_dice"] == 0
    row = mask_metrics.evaluate_masks(label, label, (1.0, 1.0, 4.0), 2, 0.0)[0]
    assert (row["dice"], row["surface_dice"], row["hausdorff95_mm"]) == (1, 1, 0)


@pytest.mark.parametrize("seed", range(6))
def test_lesions_are_those_of_scipy(seed):
    """Components of random speckle, down to single voxels, matched pair by pair."""
    rng = np.random.default_rng(seed)
    label, predicted = rng.random((2, 14, 11, 9)) < [[[[0.03]]], [[[0.02 * (1 + seed)]]]]
    predicted[6:9, 4:6] |= label[6:9, 4:6]
    (truth, lesions), (found, claimed) = (ndimage.label(mask, np.ones((3, 3, 3))) for mask in (label, predicted))
    pairs = [
        (k, m) for k in range(1, lesions + 1) for m in range(1, claimed + 1) if ((truth == k) & (found == m)).any()
    ]
    hits, right = ({pair[side] for pair in pairs} for side in (0, 1))
    assert mask_metrics.count_lesions(predicted, label) == {
        "lesions_found": len(hits),
        "lesions_missed": lesions - len(hits),
        "lesions_predicted": claimed,
        "false_positives": claimed - len(right),
    }
    assert 0 < len(hits) < lesions and 0 < len(right) < claimed


def test_lesions_of_empty_masks():
    lesion, none = np.zeros((5, 5, 5), bool), np.zeros((5, 5, 5), bool)
    lesion[1:3, 2, 2] = True
    assert list(mask_metrics.count_lesions(none, none).values()) == [0, 0, 0, 0]
    assert list(mask_metrics.count_lesions(none, lesion).values()) == [0, 1, 0, 0]
    assert list(mask_metrics.count_lesions(lesion, none).values()) == [0, 0, 1, 1]
    assert list(mask_metrics.count_lesions(np.zeros((0, 3, 3), bool), np.zeros((0, 3, 3), bool)).values()) == [0] * 4


def test_one_prediction_over_two_lesions_finds_both():
    label, predicted = np.zeros((9, 3, 3), bool), np.ones((9, 3, 3), bool)
    label[[1, 6]] = True
    assert list(mask_metrics.count_lesions(predicted, label).values()) == [2, 0, 1, 0]
    assert list(mask_metrics.count_lesions(label, predicted).values()) == [1, 0, 2, 0]


def test_lesions_of_several_cts():
    """Sums over CTs, as the bootstrap weighs them; nothing to find or nothing predicted is no number."""

    def metrics(*counts, weights=None):
        weights = np.ones(len(counts)) if weights is None else weights
        return list(mask_metrics.lesion_metrics(*np.array(counts, float).T, weights).values())

    assert list(mask_metrics.lesion_metrics(*np.ones((5, 1)))) == list(mask_metrics.LESION_METRICS)
    assert metrics([1, 1, 4, 2], [2, 0, 2, 0]) == [3 / 4, 4 / 6, pytest.approx(2 / (4 / 3 + 6 / 4)), 1.0]
    weighted = metrics([1, 1, 4, 2], [2, 0, 2, 0], weights=np.array([2, 1]))
    assert weighted == metrics([1, 1, 4, 2], [1, 1, 4, 2], [2, 0, 2, 0])
    assert metrics([0, 0, 0, 0]) == [None, None, None, 0.0]
    assert metrics([0, 0, 3, 3]) == [None, 0.0, 0.0, 3.0]
    assert metrics([0, 2, 0, 0]) == [0.0, None, 0.0, 0.0]


def test_intervals_of_several_cts_are_over_patients():
    """Cases that a patient has twice tell no more than once; taken for other patients they would."""
    rng = np.random.default_rng(0)
    once = [[f"c{i}", 0, 1, *rng.random(5), *rng.integers(1, 4, 4)] for i in range(8)]
    twice = once + [[f"again{row[0]}", *row[1:]] for row in once]
    single = mask_metrics.pool_cases(once, {row[0]: row[0] for row in once})
    paired = mask_metrics.pool_cases(twice, {row[0]: row[0].removeprefix("again") for row in twice})
    apart = mask_metrics.pool_cases(twice, {row[0]: row[0] for row in twice})
    assert not single["notes"] and paired["cases"] == 16
    for name in ("dice", "lesion_sensitivity", "lesion_f1"):
        assert paired[name] == pytest.approx(single[name]) == apart[name]
        assert paired[f"{name}_interval"] == pytest.approx(single[f"{name}_interval"])
        assert np.ptp(apart[f"{name}_interval"]) < 0.9 * np.ptp(paired[f"{name}_interval"])
    four = [row for row in twice if row[0][-1] in "0123"]
    notes = mask_metrics.pool_cases(four, {row[0]: row[0].removeprefix("again") for row in four})["notes"]
    assert notes == ["no 95 % interval: 4 patients, and it takes 5 to give one"]


def test_the_tolerance_includes_its_own_value():
    """Whatever the last digit of spacing times voxels is: 3 x 0.7 is a little less than 2.1, 3 x 1.1 more than 3.3."""
    label, predicted = np.zeros((2, 9, 5, 5), np.uint8)
    label[2, 2, 2] = predicted[5, 2, 2] = 1
    for spacing, tolerance in ((0.7, 2.1), (1.1, 3.3), (np.float32(0.1), np.float64(0.3)), (0.1, 0.3)):
        assert mask_metrics.evaluate_masks(predicted, label, (spacing, 1, 1), 2, tolerance)[0]["surface_dice"] == 1, (
            spacing
        )


def test_the_larger_of_both_directions_counts():
    label, predicted = np.zeros((2, 30, 8, 8), np.uint8)
    label[2:4, 2:4, 2:4] = predicted[2:4, 2:4, 2:4] = predicted[20:28, 2:4, 2:4] = 1
    for pair in ((predicted, label), (label, predicted)):
        there, back = distances(pair[0] > 0, pair[1] > 0, (1, 1, 1))
        assert {np.percentile(there, 95) > 20, np.percentile(back, 95) > 20} == {True, False}
        assert mask_metrics.evaluate_masks(*pair, (1, 1, 1), 2, 1)[0]["hausdorff95_mm"] > 20


def test_empty_masks_follow_the_rule():
    empty, some = np.zeros((2, 8, 7, 6), np.uint8)
    some[2:4, 2:5, 3] = 1
    rows = [
        mask_metrics.evaluate_masks(*pair, (1.0, 2.0, 5.0), 2, 2.0)[0]
        for pair in ((empty, empty), (some, empty), (empty, some))
    ]
    for row in rows:
        for name in mask_metrics.LESION_COUNTS:
            row.pop(name)
    assert rows == [
        {"class": 1, "dice": 1, "surface_dice": 1, "hausdorff95_mm": 0, "volume_ml": 0, "predicted_ml": 0},
        {"class": 1, "dice": 0, "surface_dice": 0, "hausdorff95_mm": None, "volume_ml": 0, "predicted_ml": 0.06},
        {"class": 1, "dice": 0, "surface_dice": 0, "hausdorff95_mm": None, "volume_ml": 0.06, "predicted_ml": 0},
    ]
    rows = mask_metrics.evaluate_masks(some, 2 * some, (1, 1, 1), 4, 2)  # each class on its own
    assert [row["dice"] for row in rows] == [0, 0, 1] and [row["hausdorff95_mm"] for row in rows] == [None, None, 0]


def test_figures_take_views_and_give_plain_numbers():
    """Read-only transposed arrays and the float32 spacing of a NIfTI header, as the readers give them; JSON takes the
    rest."""
    label = blobs(0)
    predicted = moved(label, 0)
    views = [np.ascontiguousarray(mask.T).T for mask in (predicted, label)]
    for view in views:
        view.flags.writeable = False
    spacing = np.float32([0.5, 0.75, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = mask_metrics.evaluate_masks(*views, spacing, 3, np.float32(2))
    assert found == mask_metrics.evaluate_masks(predicted, label, (0.5, 0.75, 2.0), 3, 2)
    assert all(type(value) in (int, float) for row in found for value in row.values()) and json.dumps(found)


# ---------------------------------------------------------------------------------------------------------- cleaning


def cleaned(mask, spacing, largest_component, min_volume):
    """The same by scipy."""
    result = np.zeros_like(mask)
    for c in range(1, 256):
        parts, count = ndimage.label(mask == c, np.ones((3, 3, 3)))
        sizes = np.bincount(parts.ravel(), minlength=count + 1)
        for part in range(1, count + 1):
            if largest_component and part != 1 + sizes[1:].argmax():
                continue
            if sizes[part] * np.prod(spacing) / 1000 >= min_volume:
                result[parts == part] = c
    return result


@pytest.mark.parametrize("largest_component", [False, True])
@pytest.mark.parametrize("min_volume", [0, 0.02, 0.1])
def test_clean_is_that_of_scipy(largest_component, min_volume):
    changed = 0
    for seed, spacing in enumerate(SPACINGS):
        mask = moved(blobs(seed, classes=4, sigma=1.2), seed)
        before = mask.copy()
        result = mask_metrics.clean(mask, spacing, largest_component, min_volume)
        assert result.dtype == np.uint8 and (mask == before).all()
        np.testing.assert_array_equal(result, cleaned(mask, spacing, largest_component, min_volume))
        changed += (result != mask).sum()
    assert (changed > 0) == (largest_component or min_volume > 0)


def test_clean_with_nothing_to_do():
    mask = blobs(0)
    assert mask_metrics.clean(mask, (1, 1, 1), False, 0) is mask
    empty = np.zeros((5, 6, 7), np.uint8)
    assert not mask_metrics.clean(empty, (1, 1, 1), True, 1.0).any()


def test_clean_at_its_limits():
    """A component of just the volume asked for stays, whatever the rounding; corners connect; small largest ones go."""
    mask = np.zeros((12, 12, 12), np.uint8)
    mask[:10] = 1
    for spacing in ((0.1, 0.1, 0.1), (0.7, 0.7, 2.5), (0.9, 0.9, 0.9)):
        volume = 1440 * np.prod(spacing) / 1000
        assert mask_metrics.clean(mask, spacing, False, volume).sum() == 1440
        assert mask_metrics.clean(mask, spacing, False, volume * 1.001).sum() == 0
    mask[:] = 0
    mask[1, 1, 1] = mask[2, 2, 2] = mask[5, 5, 5] = 1
    assert mask_metrics.clean(mask, (1, 1, 1), True, 0).sum() == 2
    assert mask_metrics.clean(mask, (10, 10, 10), True, 2.5).sum() == 0


# ---------------------------------------------------------------------------------------------------------- pictures


AXES = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}  # those that run to the left and up
CLIP = (-1000, 400)


def box_mask(shape, low, high, value=1):
    mask = np.zeros(shape, np.uint8)
    mask[tuple(slice(a, b) for a, b in zip(low, high))] = value
    return mask


def tiles(picture, shape, spacing):
    """{plane: [whole, zoom]} cut out of a picture of a volume with at least 60 mm along each axis."""
    edge, extent = pictures.FRAME, np.array(shape) * spacing
    wholes = {name: np.rint(extent[list(axes)[::-1]] * 360 / extent.max()).astype(int) for name, axes in AXES.items()}
    second = max(columns for _, columns in wholes.values()) + 2 * edge
    found = {}
    for row, (name, (height, width)) in enumerate(wholes.items()):
        top = pictures.HEADER + row * (pictures.CAPTION + 360 + 2 * edge) + pictures.CAPTION + edge
        found[name] = [
            picture[top : top + height, edge : edge + width],
            picture[top : top + 360, second + edge : second + edge + 360],
        ]
    assert picture.shape[0] == top + 360 + edge
    return found


def box_of_colours(tile, *colours):
    """[first row, first column, last row, last column], ends excluded, of the pixels of some colours."""
    there = np.any([(tile == colour).all(-1) for colour in colours], axis=0)
    rows, columns = np.nonzero(there)
    return [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1] if len(rows) else None


def expected_box(shape, spacing, name, low, high):
    """Where a box of voxels is in the whole tile: both axes of a plane run against rows and columns."""
    a, b = AXES[name]
    scale = 360 / max(n * s for n, s in zip(shape, spacing))
    return [
        (shape[b] - high[b]) * spacing[b] * scale,
        (shape[a] - high[a]) * spacing[a] * scale,
        (shape[b] - low[b]) * spacing[b] * scale,
        (shape[a] - low[a]) * spacing[a] * scale,
    ]


SHAPE, SPACING = (110, 90, 31), (1.5, 1.0, 5.0)
LOW, HIGH = (70, 20, 18), (84, 36, 22)


@pytest.mark.parametrize(
    "shape, spacing, low, high",
    [
        (SHAPE, SPACING, LOW, HIGH),
        ((120, 100, 160), (1.0, 1.0, 1.0), (10, 70, 20), (30, 82, 60)),
        ((80, 200, 90), (2.0, 0.5, 0.8), (0, 0, 0), (6, 20, 12)),  # at the border
        ((80, 200, 90), (2.0, 0.5, 0.8), (74, 185, 80), (80, 200, 90)),
    ],
)
def test_outlines_and_ct_are_where_the_lesion_is(shape, spacing, low, high):
    """A bright box and its outlines in whole and zoom: no flip, no transposition, in mm."""
    label = box_mask(shape, low, high)
    image = np.where(label, 300, -900).astype(np.int16)
    picture = mask_pictures.overlay(image, label * 0, label, spacing, CLIP, "box")
    assert picture.dtype == np.uint8 and picture.ndim == 3
    for name, (whole, zoom) in tiles(picture, shape, spacing).items():
        wanted = expected_box(shape, spacing, name, low, high)
        assert box_of_colours(whole, GREEN) == pytest.approx(wanted, abs=1.6), name
        top, left, bottom, right = np.rint(wanted).astype(int)
        grey = whole[..., 0].astype(float)  # of the CT, where no line is
        assert grey[top + 4 : bottom - 4, left + 4 : right - 4].min() > 150, name
        grey[max(top - 4, 0) : bottom + 4, max(left - 4, 0) : right + 4] = 0
        assert np.quantile(grey, 0.9) < 30 and grey.max() <= 150, name  # but for the frame

        magnified = box_of_colours(zoom, GREEN)
        factor = 360 / min(60, max(n * s for n, s in zip(shape, spacing)) / 3)
        sides = [(high[axis] - low[axis]) * spacing[axis] * factor for axis in AXES[name][::-1]]
        rows, columns = magnified[2] - magnified[0], magnified[3] - magnified[1]
        assert [rows, columns] == pytest.approx(sides, abs=3), name
        middle = [(x + y) // 2 for x, y in zip(magnified[:2], magnified[2:])]
        assert zoom[middle[0] - 8 : middle[0] + 8, magnified[1] + 6 : middle[1] - 6].min() > 150, name


@pytest.mark.parametrize(
    "step, where",
    [
        ((-6, 0, 0), {"axial": (0, 1), "coronal": (0, 1)}),
        ((0, 6, 0), {"axial": (-1, 0), "sagittal": (0, -1)}),
        ((0, 0, 2), {"coronal": (-1, 0), "sagittal": (-1, 0)}),
    ],
)
def test_a_shifted_prediction_is_red_on_its_side(step, where):
    """To the patient's left: to the right; to anterior: up, and left in the sagittal plane; to superior: up."""
    label = box_mask(SHAPE, LOW, HIGH)
    predicted = box_mask(SHAPE, np.add(LOW, step), np.add(HIGH, step))
    picture = mask_pictures.overlay(np.zeros(SHAPE, np.int16), predicted, label, SPACING, CLIP, "")
    for name, pair in tiles(picture, SHAPE, SPACING).items():
        for tile in pair:
            green, red = box_of_colours(tile, GREEN, YELLOW), box_of_colours(tile, RED, YELLOW)
            side = [np.sign((red[i] + red[i + 2]) - (green[i] + green[i + 2])) for i in (0, 1)]
            assert tuple(side) == where.get(name, (0, 0)), name


def test_the_same_mask_is_yellow():
    label = box_mask(SHAPE, LOW, HIGH)
    for pair in tiles(mask_pictures.overlay(np.zeros(SHAPE), label, label, SPACING, CLIP, ""), SHAPE, SPACING).values():
        for tile in pair:
            assert box_of_colours(tile, YELLOW) and not box_of_colours(tile, GREEN, RED)


def test_pixels_are_square_in_mm():
    """A cube of 20 mm is a square in all planes, whatever the voxels; 20 of 60 mm make a third of a zoom."""
    spacing, shape = (0.5, 2.0, 5.0), (360, 95, 40)
    label = box_mask(shape, (100, 40, 10), (140, 50, 14))
    for name, (whole, zoom) in tiles(
        mask_pictures.overlay(np.zeros(shape), label, label, spacing, CLIP, ""), shape, spacing
    ).items():
        for tile, side in ((whole, 20 * 360 / 200), (zoom, 120)):
            top, left, bottom, right = box_of_colours(tile, YELLOW)
            assert [bottom - top, right - left] == pytest.approx([side, side], abs=2), name
        assert [top + bottom, left + right] == pytest.approx([360, 360], abs=3)  # in the middle of the zoom


@pytest.mark.parametrize("given", ["label", "prediction", "neither"])
def test_planes_are_those_with_most_of_the_label(given):
    """Grey values tell which plane was cut: each axis of the image in turn counts its own planes."""
    shape, spacing = (70, 80, 90), (1.0, 1.0, 1.0)
    label, predicted = box_mask(shape, (20, 30, 50), (40, 45, 60)), box_mask(shape, (50, 60, 10), (65, 70, 30))
    for mask, (x, y, z) in ((label, (37, 32, 58)), (predicted, (52, 68, 12))):  # a disc of its own along each axis
        mask[x, y - 9 : y + 9, z - 9 : z + 9] = mask[x - 9 : x + 9, y, z - 9 : z + 9] = mask[
            x - 9 : x + 9, y - 9 : y + 9, z
        ] = 1
    wanted = {"label": (37, 32, 58), "prediction": (52, 68, 12), "neither": (35, 40, 45)}[given]
    label[:] *= given == "label"
    predicted[:] *= given != "neither"
    for axis, name in enumerate(("sagittal", "coronal", "axial")):
        image = np.broadcast_to(np.arange(shape[axis]).reshape([-1 if a == axis else 1 for a in range(3)]), shape)
        whole = tiles(
            mask_pictures.overlay(image.astype(np.int16), predicted, label, spacing, (0, 102), ""), shape, spacing
        )[name][0]
        values, counts = np.unique(whole.reshape(-1, 3), axis=0, return_counts=True)
        assert values[counts.argmax()].tolist() == [int(wanted[axis] / 102 * 255)] * 3


def test_masks_that_are_empty_or_missing():
    image, empty = np.full(SHAPE, -300, np.int16), np.zeros(SHAPE, np.uint8)
    some = box_mask(SHAPE, LOW, HIGH)
    coloured = {}
    for name, pair in {
        "neither": (empty, empty),
        "label": (empty, some),
        "prediction": (some, empty),
        "none": (some, None),
        "nothing": (empty, None),
    }.items():
        picture = mask_pictures.overlay(image, *pair, SPACING, CLIP, name)
        found = [tile for pair in tiles(picture, SHAPE, SPACING).values() for tile in pair]
        coloured[name] = [
            [box_of_colours(tile, colour) is not None for tile in found] for colour in (GREEN, RED, YELLOW)
        ]
        assert (picture[: pictures.HEADER] == GREEN).all(-1).any() == (pair[1] is not None)  # the legend
        assert (found[0][5, 5] == 127).all()  # -300 HU is in the middle of the clip range
    no, yes = [False] * 6, [True] * 6
    assert coloured == {
        "neither": [no, no, no],
        "label": [yes, no, no],
        "prediction": [no, yes, no],
        "none": [no, yes, no],
        "nothing": [no, no, no],
    }


def test_all_classes_are_outlined():
    """Two classes side by side: a line between them too."""
    label = box_mask(SHAPE, LOW, HIGH)
    label[77:84] *= 2
    zoom = tiles(mask_pictures.overlay(np.zeros(SHAPE), label, label, SPACING, CLIP, ""), SHAPE, SPACING)["axial"][1]
    top, left, bottom, right = box_of_colours(zoom, YELLOW)
    lines = (zoom[(top + bottom) // 2] == YELLOW).all(-1)
    assert np.flatnonzero(np.diff(lines.astype(int), prepend=0) == 1) == pytest.approx(
        [left, (left + right) / 2 - 1, right - 2], abs=1.5
    )


def test_a_lesion_of_one_voxel_is_seen():
    shape = (512, 400, 50)
    label = box_mask(shape, (300, 200, 20), (301, 201, 21))
    for whole, zoom in tiles(
        mask_pictures.overlay(np.zeros(shape), label * 0, label, (0.6, 0.6, 5), CLIP, ""), shape, (0.6, 0.6, 5)
    ).values():
        assert box_of_colours(whole, GREEN) and box_of_colours(zoom, GREEN)


def test_the_largest_part_is_magnified():
    """Two lesions far from each other: the zoom is on the larger one and not between them, the frame as well."""
    label = box_mask(SHAPE, (10, 10, 20), (14, 14, 22)) | box_mask(SHAPE, LOW, HIGH)
    for name, (whole, zoom) in tiles(
        mask_pictures.overlay(np.zeros(SHAPE), label, label, SPACING, CLIP, ""), SHAPE, SPACING
    ).items():
        top, left, bottom, right = box_of_colours(zoom, YELLOW)
        assert (bottom - top) * (right - left) > 5000, name
        scale = 360 / (SHAPE[0] * SPACING[0])
        frame, box = box_of_colours(whole, mask_pictures.GREY), expected_box(SHAPE, SPACING, name, LOW, HIGH)
        assert frame[2] - frame[0] == pytest.approx(min(55, 165 / 3) * scale, abs=3)
        assert frame[0] <= box[0] < box[2] <= frame[2] and frame[1] <= box[1] < box[3] <= frame[3]


def test_volumes_of_any_proportion():
    """Smaller than a zoom, a single slice, a long thin one; a large lesion; and a title wider than the planes."""
    for shape, spacing in (
        ((20, 16, 12), (1, 1, 1)),
        ((64, 50, 1), (1, 1, 5)),
        ((3, 4, 300), (1, 1, 1.5)),
        ((1, 1, 1), (1, 1, 1)),
    ):
        for mask in (np.zeros(shape, np.uint8), np.ones(shape, np.uint8)):
            picture = mask_pictures.overlay(np.zeros(shape, np.int16), mask, mask, spacing, CLIP, "x" * 300)
            assert picture.shape[1] > 1000 and picture.shape[2] == 3
            assert (picture[pictures.HEADER :] == YELLOW).all(-1).any() == mask.any()
