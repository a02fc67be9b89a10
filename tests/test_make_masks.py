"""results/make_masks.py and join_tables.py: lungs of phantoms by a rule, no patient of the pool; studies as a table."""

import csv
import json

import nibabel
import numpy as np
import pytest
from scipy import ndimage
from test_make_data import files_of

from dino3d.command_line import UserError
from dino3d.data import images
from dino3d.data.layouts import find_task, pairs_of
from dino3d.prepare.phantoms import chest_phantom
from results import join_tables, make_data, make_masks


def box_of(shape, *corners):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(low, high) for low, high in corners)] = True
    return mask


def test_air_around_the_body_and_pockets_are_no_lung():
    shape = (60, 50, 40)
    hu = np.full(shape, -1000, np.int16)
    hu[5:55, 5:45] = 40
    lungs = box_of(shape, (10, 25), (10, 40), (0, 40)) | box_of(shape, (35, 50), (10, 40), (5, 35))
    hu[lungs] = -850
    hu[29:31, 24:26, 20:22] = -990
    assert (make_masks.airy_parts(hu) == lungs).all()
    assert not make_masks.airy_parts(np.full(shape, 40, np.int16)).any()
    assert not make_masks.airy_parts(np.full(shape, -1000, np.int16)).any()


def test_closing_is_scipys():
    radius, rng = 3, np.random.default_rng(0)
    mask = ndimage.gaussian_filter(rng.normal(size=(30, 28, 26)), 2) > 0.02
    ball = (np.indices((2 * radius + 1,) * 3) - radius).astype(float)
    ball = (ball**2).sum(0) <= radius**2
    wide = np.pad(mask, 2 * radius)  # beyond the border is nothing
    expected = ndimage.binary_closing(wide, ball)[(slice(2 * radius, -2 * radius),) * 3]
    found = make_masks.close_by_ball(mask, radius)
    assert (found == expected).all() and found.sum() > mask.sum()


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ct")
    hu, affine = chest_phantom(0, (128, 104, 24), (1.0, 1.0, 5.0))
    nibabel.save(nibabel.Nifti1Image(hu, affine), folder / "one.nii.gz")
    return folder / "one.nii.gz"


@pytest.fixture
def collection(phantom, monkeypatch):
    """A collection of one CT."""
    data = phantom.parent
    (data / "nodules").mkdir(exist_ok=True)
    (data / make_data.CUBES_FILE).touch()
    monkeypatch.setattr(make_data, "COLLECTION", ((phantom.name, "P1", 5, "none"),))
    return data


def pool_of(path, *patients, column="patient"):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("path", column), *((f"{name}.nii", name) for name in patients)])
    return path


def test_a_slab_with_most_lung_where_it_lies_in_the_world(collection, phantom, tmp_path, capsys):
    flags = ["--data", collection, "--pool", pool_of(tmp_path / "pool.csv", "P2"), "--output", tmp_path / "out"]
    flags = [str(word) for word in flags]
    make_masks.main(flags)
    (pair,), problems = pairs_of(find_task(tmp_path / "out"), tmp_path / "out")
    assert pair.name == "P1" and not problems
    image, label = (nibabel.load(path) for path in (pair.image, pair.label))
    assert np.allclose(image.affine, label.affine) and image.header.get_zooms() == (1, 1, 1)
    hu, lung = (np.asarray(one.dataobj) for one in (image, label))
    assert hu.shape == lung.shape and hu.shape[2] == make_masks.SLAB_MM and set(np.unique(lung)) == {0, 1}
    margins = [np.flatnonzero(lung.any(axis=axes)) for axes in ((1, 2), (0, 2))]
    for where, length in zip(margins, hu.shape):
        assert where[0] <= make_masks.MARGIN_MM and length - 1 - where[-1] <= make_masks.MARGIN_MM
    # What is lung and what is not, at places of the CT itself
    whole = nibabel.load(phantom)
    source = np.asarray(whole.dataobj)
    inside = np.argwhere(ndimage.binary_erosion(lung, iterations=6))[::5000]
    assert len(inside) > 5
    at = np.rint(nibabel.affines.apply_affine(np.linalg.inv(whole.affine) @ image.affine, inside)).astype(int)
    assert np.mean(source[tuple(at.T)] < make_masks.LUNG_BELOW) > 0.8
    rim = ndimage.binary_dilation(lung, iterations=3) & (lung == 0)
    assert (hu[rim] > make_masks.LUNG_BELOW).mean() > 0.8 and lung.mean() > 0.15
    # No slab of this height has more
    every = make_masks.airy_parts(
        images.voxels_of(make_masks.resampling.resample(make_masks.open_ct(phantom)[0], (1, 1, 1), upright=True))
    ).sum((0, 1))
    sums = np.convolve(every, np.ones(make_masks.SLAB_MM), "valid")
    low = round((nibabel.affines.apply_affine(np.linalg.inv(whole.affine), image.affine[:3, 3])[2] + 0.5) * 5 - 0.5)
    assert sums[low] == sums.max()
    before = files_of(tmp_path / "out")
    (tmp_path / "out" / "labels" / "P1.nii.gz").unlink()
    make_masks.main(flags)
    assert files_of(tmp_path / "out") == before
    assert "is complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    "patients, column, said",
    [
        (("P2", "P1"), "patient", "has scans of P1, who is tested"),
        ((), "patient", "has no rows"),
        (("P2",), "who", "with the column patient"),
        (("P2", " "), "patient", "has rows without a patient"),
    ],
)
def test_pools_that_will_not_do(collection, tmp_path, patients, column, said):
    pool = pool_of(tmp_path / "pool.csv", *patients, column=column)
    with pytest.raises(UserError, match=f"--pool {pool}: .*{said}"):
        make_masks.main(["--data", str(collection), "--pool", str(pool), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_data_that_will_not_do(tmp_path):
    with pytest.raises(UserError, match="--data .*none: no such folder"):
        make_masks.main(["--data", str(tmp_path / "none"), "--pool", "p.csv", "--output", str(tmp_path / "out")])
    with pytest.raises(UserError, match="holds no nodules/nodules_51mm.npz. LUNA16 alone won't do"):
        make_masks.main(["--data", str(tmp_path), "--pool", "pool.csv", "--output", str(tmp_path / "out")])


def effect(task, weights, value, interval=None, **more):
    return {"task": task, "weights": weights, "value": value, "interval": interval, "seeds": [0, 1], **more}


def test_one_table_of_several_studies(tmp_path, capsys):
    means = [effect("segmentation", {"nodules": 1.0}, 0.8, [0.7, 0.9]), effect("segmentation", {"scratch": 1.0}, 0.6)]
    pair = effect("segmentation", {"nodules": 1.0, "scratch": -1.0}, 0.2, [0.1, 0.3], verdict="shown")
    content = {
        "study": {"arms": {"nodules": "a", "scratch": "b", "never": "c"}},
        "tasks": {"segmentation": {"metric": "Dice", "cases": 8}},
        "means": means,
        "differences": [pair],
    }
    for name in ("lungs_tuned_1", "lungs_tuned_2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(content))
    folders = [str(tmp_path / name) for name in ("lungs_tuned_1", "lungs_tuned_2")]
    join_tables.main([*folders, "--output", str(tmp_path / "all")])
    lines = (tmp_path / "all.md").read_text().splitlines()
    assert lines[0] == "| study | arm | cases | seeds | Dice | difference |"
    assert lines[2] == (
        "| lungs tuned 1 | nodules | 8 | 2 | 0.800 (0.700 to 0.900) | +0.200 (+0.100 to +0.300) to scratch * |"
    )
    assert lines[3] == "| lungs tuned 1 | scratch | 8 | 2 | 0.600 |  |"
    assert lines[4] == "| lungs tuned 1 | never | 8 | 0 | not run |  |" and len(lines) == 10
    with open(tmp_path / "all.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and float(rows[3]["difference_low"]) == 0.1 and rows[3]["minus"] == "scratch"
    with pytest.raises(UserError, match="none: can't be read as a folder of study.py --from_records"):
        join_tables.main([str(tmp_path / "none"), "--output", str(tmp_path / "all")])
    (tmp_path / "lungs_tuned_1" / "results.json").write_text("[1]")
    with pytest.raises(UserError, match="lungs_tuned_1: can't be read"):
        join_tables.main([*folders, "--output", str(tmp_path / "all")])


def test_joined_tables_mix_no_studies_and_no_figures(tmp_path):
    """Two folders of one name are refused; a study of one figure leaves the others' columns empty; dots stay."""
    figures = {"a/one": ("segmentation", "Dice"), "a/two": ("surface", "surface Dice"), "b/one": ("probe", "AUC")}
    for place, (task, metric) in figures.items():
        content = {"study": {"arms": {"x": ""}}, "tasks": {task: {"metric": metric, "cases": 8}}, "differences": []}
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "results.json").write_text(json.dumps(content | {"means": [effect(task, {"x": 1.0}, 0.5)]}))
    join_tables.main([str(tmp_path / "a/one"), str(tmp_path / "a/two"), "--output", str(tmp_path / "new/v1.2")])
    lines = (tmp_path / "new/v1.2.md").read_text().splitlines()
    assert lines[0] == "| study | arm | cases | seeds | Dice | difference | surface Dice | difference |"
    assert lines[2:4] == ["| one | x | 8 | 2 | 0.500 |  |  |  |", "| two | x | 8 | 2 |  |  | 0.500 |  |"]
    assert (tmp_path / "new/v1.2.csv").is_file()
    with pytest.raises(UserError, match="one: two folders are called so"):
        join_tables.main([str(tmp_path / "a/one"), str(tmp_path / "b/one"), "--output", str(tmp_path / "all")])
