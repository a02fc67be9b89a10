"""Pictures of scans: in millimetres, the right way round, with names, and without tiles that show nothing."""

import json
import os
import types

import numpy as np
import pytest
import torch

from augmentations import AUGMENTATIONS, MultiCropAugmentation, Policy, scale_intensity
from dino3d.evaluation.classification_metrics import pool_predictions
from dino3d.files import truncate_log, write_config
from dino3d.finetune import classification_pictures
from dino3d.training import pictures
from dino3d.training.pictures import (
    example_views,
    magnified,
    montage,
    plane,
    planes,
    radiological,
    save_picture,
    view_rows,
)
from utils import Processes

SPACING = np.array([0.7, 1.0, 3.0])


def sphere(radius_mm=24, size_mm=70, spacing=SPACING):
    """(X, Y, Z) a ball in the middle, in voxels of `spacing`."""
    shape = np.rint(size_mm / spacing).astype(int)
    grids = np.meshgrid(*((np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing)), indexing="ij")
    return (sum(grid**2 for grid in grids) < radius_mm**2).astype(np.float32)


def extent(picture):
    """(rows, columns) that are bright."""
    bright = picture > 0.5
    return np.array([bright.any(1).sum(), bright.any(0).sum()])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_ball_of_flat_voxels_is_drawn_round(axis):
    picture = plane(sphere(), axis, SPACING)
    fine = np.delete(SPACING, axis).min()
    assert np.allclose(extent(picture) * fine, 48, atol=3.1)  # one slice more or less
    rows, columns = extent(picture)
    assert rows / columns == pytest.approx(1, abs=0.08)
    assert (picture > 0.5).sum() / (rows * columns) == pytest.approx(np.pi / 4, abs=0.06)
    assert np.allclose(np.array(picture.shape) * fine, 70, atol=2)


def test_equal_voxels_are_drawn_as_they_are():
    volume = np.random.RandomState(0).rand(5, 6, 7).astype(np.float32)
    for axis in range(3):
        np.testing.assert_array_equal(
            plane(volume, axis, (2, 2, 2)), radiological(volume.take(volume.shape[axis] // 2, axis))
        )


def test_sides_are_where_radiologists_expect_them():
    volume = np.zeros((6, 6, 6), np.float32)
    volume[-1, -1, -1] = 1  # right, anterior, superior
    for axis, at in ((2, 0.99), (1, 0.99), (0, 0.99)):
        picture = plane(volume, axis, (1, 1, 2), at)
        assert picture[0, 0] == picture.max() > 0.9


def rows_of(views, names, spacing=(1, 1, 1), most=4):
    return view_rows(views, names, [spacing] * len(names), most)


def some_views(tissue, local=2):
    """[global, local] views of a batch, grey where `tissue` says so, black elsewhere."""
    grey = torch.tensor([0.5 if here else 0.0 for here in tissue])
    return [
        grey.repeat(2)[:, None, None, None, None].expand(-1, 1, 8, 8, 4),
        grey.repeat(local)[:, None, None, None, None].expand(-1, 1, 4, 4, 2),
    ]


def test_black_samples_are_left_out_while_there_are_others():
    rows, labels = rows_of(some_views([False, True, False, True]), ["a", "b", "c", "d"])
    assert [label[0] for label in labels] == ["b", "d"]
    assert all(tile.max() > 0.4 for row in rows for tile in row)
    assert len(rows_of(some_views([False, False]), ["a", "b"])[0]) == 1  # nothing else to show


def test_one_black_tile_is_enough_to_leave_a_sample_out():
    views = some_views([True, True])
    views[1] = views[1].clone()
    views[1][2] = 0  # the second local view of the first sample
    assert [label[0] for label in rows_of(views, ["a", "b"])[1]] == ["b"]


def test_different_scans_come_first():
    _, labels = rows_of(some_views([True] * 6), ["a", "a", "a", "a", "b", "b"], most=3)
    assert [label[0] for label in labels] == ["a", "b", "a"]


def test_rows_are_full_and_in_millimetres():
    rows, _ = rows_of(some_views([True] * 2), ["a", "b"], spacing=(1, 1, 2))
    assert all([tile.shape for tile in row] == [(8, 8)] * 6 for row in rows)  # 2 global in two planes, 2 local ones


def test_planes_are_axial_and_coronal():
    view = torch.zeros(4, 6, 3)
    assert [picture.shape for picture in planes(view, (1, 1, 2))] == [(6, 4), (6, 4)]
    assert magnified(np.zeros((3, 6), np.float32), 12).shape == (12, 24)


def test_a_montage_is_as_wide_as_its_text():
    from PIL import ImageFont

    font, text = ImageFont.load_default(13), "a patient with a long name/t0/" + "1.2.840." * 8
    tile = np.ones((8, 8), np.float32)
    canvas = montage([[tile]], [text], "a title", tile=8)
    assert font.getlength(text) < canvas.shape[1] < font.getlength(text) + 20
    strip = canvas[20:38]
    last = np.flatnonzero((strip > 200).any(0))[-1]
    assert last < canvas.shape[1] - 2 and last > 0.95 * font.getlength(text)


def test_a_montage_shows_its_tiles_the_right_way_up():
    grows = np.zeros((4, 6))  # grows to the right and up
    grows[3, 5] = 1  # the patient's right, anterior: left and up in a radiological picture
    picture = radiological(grows)
    assert picture.shape == (6, 4) and picture[0, 0] == 1
    canvas = montage([[picture, 1 - picture], [picture]], ["1", "2"], tile=12)
    assert canvas[18, 0] == 255 and canvas[18, 4] == 0 and canvas.shape == (2 * (18 + 12 + 2), 2 * (8 + 2))


def test_scan_name_tells_patients_and_series_apart():
    assert pictures.scan_name("/data/nlst/patient1/t0/series.hdf5") == "patient1/t0/series.hdf5"
    assert pictures.scan_name("scan.nii.gz") == "scan.nii.gz"


def test_examples_show_each_augmentation_alone():
    crops = MultiCropAugmentation(Policy(rotation=30, gaussian=2), (11, 9, 7), (6, 5, 4), 0)
    patch = torch.from_numpy(np.random.RandomState(1).randint(-1200, 1200, (17, 15, 13)).astype(np.int16))
    shown = example_views(patch, crops, (-1000, 1000), draws=3)
    labels = [name if name in ("rotation", "gaussian") else f"{name} (off)" for name in AUGMENTATIONS]
    assert list(shown) == ["plain", *labels]
    plain = scale_intensity(patch, -1000, 1000)[None, None, 3:14, 3:12, 3:10].expand(3, 1, 11, 9, 7)
    torch.testing.assert_close(shown["plain"], plain, rtol=0, atol=1e-4)
    for name, views in shown.items():
        assert views.shape == (3, 1, 11, 9, 7) and views.isfinite().all()
        assert name == "plain" or not torch.allclose(views, shown["plain"], atol=0.01)


def test_examples_have_the_views_spacing():
    """A ramp: views of 2 x 2 x 4 mm, of a patch of 1 x 1 x 2 mm, grow twice as fast as it does."""
    crops = MultiCropAugmentation(Policy(rotation=30), (8, 8, 6), (4, 4, 4), 0, spacing=(2, 2, 4))
    ramp = torch.arange(20, dtype=torch.int16)[:, None, None] * 10 + torch.zeros(20, 20, 16, dtype=torch.int16)
    plain = example_views(ramp, crops, (0, 1000), draws=1, patch_spacing=(1, 1, 2))["plain"][0, 0]
    expected = torch.linspace(0.025, 0.165, 8)[:, None, None].expand(8, 8, 6)
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5)


def test_files_that_a_full_disk_cuts_off_stay_as_they_were(tmp_path, monkeypatch):
    """Pictures, config.json and log.txt are rewritten when a run is resumed, on a disk that may be full by then."""
    record = [{"step": 2}, {"step": 4}]
    writers = {
        "views.png": lambda path: save_picture(path, np.zeros((300, 300), np.uint8)),
        "log.txt": lambda path: truncate_log(path, 2),
        "config.json": lambda path: write_config(path, {}, Processes(), "CPU"),
    }
    before = "".join(json.dumps(line) + "\n" for line in record)
    for name in writers:
        (tmp_path / name).write_text(before)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)  # the last step: what is written before stands in another file
    for name, write in writers.items():
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path / name)
        assert (tmp_path / name).read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(writers)
    monkeypatch.undo()
    for name, write in writers.items():
        write(tmp_path / name)
        assert (tmp_path / name).read_bytes() != before.encode()


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("classes", [2, 3])
def test_the_errors_stand_beside_their_thresholds(classes, tmp_path, monkeypatch):
    """Two folds with thresholds of their own, and a case that both tested."""
    labels, shown = np.array([1, 0, 1, 1]), {}
    cases = types.SimpleNamespace(
        names=list("abcd"), paths=list("abcd"), patients=list("abcd"), labels=labels, classes=classes
    )
    columns = ["probability"] if classes == 2 else ["probability_0", "probability_1", "probability_2"]

    def row(case, p):
        return {"case": case} | dict(zip(columns, map(str, [p] if classes == 2 else [1 - p, p / 2, p / 2])))

    tables = [[row("a", 0.3), row("b", 0.5), row("c", 0.9)], [row("a", 0.5), row("d", 0.65)]]
    together = pool_predictions(tables, [{"threshold": 0.4}, {"threshold": 0.7}], cases)
    monkeypatch.setattr(classification_pictures, "spacing_of", lambda path: np.ones(3))
    monkeypatch.setattr(classification_pictures, "read_crop", lambda path, size: np.zeros((8, 8, 8), np.int16))
    monkeypatch.setattr(
        classification_pictures,
        "montage",
        lambda rows, labels, title: shown.update(labels=labels, title=title) or np.zeros((4, 4), np.uint8),
    )
    encoder = types.SimpleNamespace(input_size=[8, 8, 8], clip_range=[-1000, 1000])
    count = classification_pictures.draw_errors(tmp_path / "errors.png", together, cases, encoder)
    assert count == len(shown["labels"])
    if classes == 2:
        assert shown["labels"] == [
            "label1, p(label1) = 0.400, threshold 0.550: a",
            "label0, p(label1) = 0.500, threshold 0.400: b",
            "label1, p(label1) = 0.650, threshold 0.700: d",
        ]
        assert shown["title"].startswith("3 of 3 errors, farthest from the threshold first; ")
    else:
        assert all("threshold" not in text for text in (shown["title"], *shown["labels"]))
    assert len(together.metrics["notes"]) == 1 and together.metrics["auc_interval"] is None
