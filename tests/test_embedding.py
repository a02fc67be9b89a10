"""Weights that are found in files and folders, embeddings, and the trivial figures beside them."""

import re

import numpy as np
import pytest
import torch

from dino3d.command_line import UserError
from dino3d.features import trivial
from dino3d.features.encoder import find_weights, load_encoder
from vision_transformer import vit_micro

SIZE, PATCH = (8, 8, 4), (4, 4, 2)


def write(path, key="teacher", prefix="", **config):
    path.parent.mkdir(parents=True, exist_ok=True)
    config = {"arch": "vit_micro", "patch_size": list(PATCH), "input_size": list(SIZE), **config}
    state = {prefix + name: tensor for name, tensor in vit_micro(SIZE, PATCH).state_dict().items()}
    torch.save({key: state, "config": config}, path)
    return path


def test_weights_are_found_in_the_folders_of_runs(tmp_path):
    pretrained = write(tmp_path / "pre" / "checkpoint.pth")
    folds = [write(tmp_path / "tuned" / name / "best.pth", "model", "encoder.") for name in ("0", "1", "10")]
    write(tmp_path / "tuned" / "0" / "checkpoint.pth")
    assert find_weights(str(pretrained)) == (str(pretrained), ())
    assert find_weights(str(tmp_path / "pre")) == (str(pretrained), ())
    for fold in folds:
        assert find_weights(str(fold.parent)) == (str(fold), ())
    file, lines = find_weights(str(tmp_path / "tuned"), "--weights")
    assert file == str(folds[0])
    assert lines == (
        f"--weights {tmp_path / 'tuned'}: taken is {folds[0]}, the first of 3 folds; another one: "
        f"{tmp_path / 'tuned' / '1'}",
    )
    notices = load_encoder(str(tmp_path / "tuned"), flag="--weights").notices
    unsaid = f"{folds[0]} does not say its clip range: HU -1000 1000 become 0 and 1"
    assert notices == (*lines, f"weights of {folds[0]}: key 'model', prefix 'encoder.'", unsaid)


def test_folders_without_weights_are_refused_by_the_flag(tmp_path):
    write(tmp_path / "both" / "0" / "best.pth")
    write(tmp_path / "both" / "checkpoint.pth")
    (tmp_path / "empty" / "0").mkdir(parents=True)
    for path, told in (
        ("no", "no such file; expected a checkpoint, or the output folder of a run"),
        ("both", r"holds both a pre-training run \(checkpoint.pth\) and a fine-tuned one \(0/best.pth\)"),
        ("empty", "holds no checkpoint; expected checkpoint.pth"),
    ):
        for read in (find_weights, lambda path, flag: load_encoder(path, flag=flag)):
            with pytest.raises(UserError, match=f"^--weights {re.escape(str(tmp_path / path))}: {told}"):
                read(str(tmp_path / path), "--weights")


def test_fine_tuned_weights_know_the_spacing_of_their_crops(tmp_path):
    path = write(tmp_path / "best.pth", "model", "encoder.", crop_spacing=[1.0, 1.0, 2.0])
    assert load_encoder(str(path)).crop_spacing == [1.0, 1.0, 2.0] and load_encoder(str(path)).spacing is None
    path = write(tmp_path / "best.pth", "model", "encoder.", crop_spacing=[1.0, 0.0, 2.0])
    with pytest.raises(UserError, match=r"its config has crop_spacing \[1.0, 0.0, 2.0\], which no encoder here"):
        load_encoder(str(path))


# ----------------------------------------------------------------------------------------------------- trivial figures


def shells(hu, spacing):
    """The radial profile voxel by voxel."""
    middle = (np.array(hu.shape) - 1) / 2
    inside = [[] for _ in range(6)]
    for at in np.ndindex(*hu.shape):
        distance = np.sqrt((((at - middle) * spacing) ** 2).sum())
        if distance < 12:
            inside[int(distance // 2)].append(float(hu[at]))
    return [np.mean(one) for one in inside] + [np.std(one) for one in inside]


@pytest.mark.parametrize("shape, spacing", [((24, 24, 24), (1.0, 1.0, 1.0)), ((17, 16, 21), (1.5, 1.6, 1.25))])
def test_trivial_figures(shape, spacing):
    hu = np.random.default_rng(0).integers(-1100, 600, shape).astype(np.int16)
    mask = np.zeros(shape, np.uint8)
    mask[2:5, 3:5, 1:3] = 2
    found = trivial.trivial_figures(hu, spacing, trivial.mask_volume(mask, spacing))
    assert all(values.dtype == np.float32 for values in found.values())
    np.testing.assert_allclose(found["radial"], shells(hu, spacing), rtol=1e-6)
    np.testing.assert_allclose(found["mean"], [hu.mean(), hu.std()], rtol=1e-6)
    np.testing.assert_allclose(found["size"], [12 * np.prod(spacing)], rtol=1e-6)
    counts = np.bincount(np.clip((hu.ravel() + 1000.0) // 87.5, 0, 15).astype(int), minlength=16)
    np.testing.assert_allclose(found["histogram"], counts / hu.size, atol=1e-7)
    assert found["all"].tolist() == np.concatenate([found[name] for name in found if name != "all"]).tolist()
    assert set(trivial.trivial_figures(hu, spacing)) == {*found} - {"size"}


def test_the_centre_and_its_surroundings_are_in_mm():
    hu = np.full((48, 48, 24), -800, np.int16)
    hu[22:26, 22:26, 11:13] = 100  # 4 mm around the middle
    at = np.indices(hu.shape).reshape(3, -1).T
    near = np.linalg.norm((at - (np.array(hu.shape) - 1) / 2) * (1, 1, 2), axis=1) <= 3.5
    assert trivial.centre_hu(hu, (1, 1, 2)) == pytest.approx(hu.ravel()[near].mean())
    hu[:6] = hu[:, :6] = hu[:, :, :3] = 300  # not in the middle 36 mm
    assert trivial.hu_histogram(hu, (1, 1, 2))[[2, 12]] == pytest.approx([1 - 32 / 36**2 / 18, 32 / 36**2 / 18])
    coarse = np.arange(8, dtype=np.int16).reshape(2, 2, 2)
    assert trivial.centre_hu(coarse, (9, 9, 9)) == 3.5  # the nearest ones
    assert trivial.radial_profile(coarse, (9, 9, 9)).tolist() == [3.5] * 6 + [coarse.std()] * 6
    assert (trivial.radial_profile(coarse, (99, 99, 99)) == [3.5] * 6 + [coarse.std()] * 6).all()
