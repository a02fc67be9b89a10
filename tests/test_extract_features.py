"""extract_features.py: the same vector from every file format and however the work is shared, tables and resuming."""

import csv
import os
import signal
import subprocess
import sys

import h5py
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from conftest import ROOT
from raw_inputs import phantom, write_dicom, write_nifti, write_series

import extract_features
import utils
from dino3d.data.conventions import DataError
from dino3d.data.volume import Volume, write_volume
from dino3d.features.cases import find_subjects
from dino3d.features.embedding import embed_volume
from dino3d.features.encoder import load_encoder
from dino3d.features.journal import Journal
from vision_transformer import vit_micro

SIZE, PATCH, SPACING = (24, 24, 12), (12, 12, 6), [2.0, 2.0, 4.0]
SHAPE, FINE = (64, 56, 24), (0.78125, 0.65625, 2.5)  # mm, which lie between two steps of 1e-4


def write_checkpoint(path, seed=0, arch=vit_micro, **config):
    torch.manual_seed(seed)
    config = {
        "arch": "vit_micro",
        "patch_size": list(PATCH),
        "input_size": list(SIZE),
        "spacing": SPACING,
        "clip_range": [-1000.0, 400.0],
        **config,
    }
    torch.save(
        {"teacher": {f"backbone.{k}": v for k, v in arch(SIZE, PATCH).state_dict().items()}, "config": config}, path
    )
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "checkpoint.pth")


def extract(capsys, *flags):
    """(exit code, standard output, lines of errors) of the script, called in this process."""
    capsys.readouterr()
    code = 0
    before, sys.argv = sys.argv, ["extract_features.py", *map(str, flags)]
    try:
        utils.run_script(extract_features.main)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    return code, out, [line for line in err.splitlines() if line.startswith("error")]


def read_csv(path):
    """({column: texts} but the features, (N, F) float32) of a table."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.startswith("feature_")]
    features = np.array([[np.float32(row[name] or "nan") for name in names] for row in rows], np.float32)
    return {name: [row[name] for row in rows] for name in rows[0] if name not in names}, features


def chest(seed=0, shape=SHAPE):
    """(X, Y, Z) int16 HU of a part of a phantom, at least -1000."""
    whole = phantom(seed % 3, (64, 60, 36), (5.0, 4.5, 8.0))[0]
    start = (np.array(whole.shape) - shape) // 2
    return np.maximum(whole[tuple(slice(a, a + n) for a, n in zip(start, shape))], -1000)


def write_all_formats(folder, axes=np.eye(3), origin=(-123.45675, 47.5, -803.1)):
    """Paths of one scan as DICOM, NIfTI of ITK and of nibabel, MetaImage, NRRD, our HDF5, flipped and permuted."""
    stored = (chest() + 1024).astype(np.uint16)
    write_dicom(folder / "dicom", stored, axes, FINE, origin)
    image = sitk.GetImageFromArray(np.ascontiguousarray((stored.astype(np.int16) - 1024).T))
    image.SetSpacing(FINE)
    image.SetOrigin(origin)
    image.SetDirection(axes.ravel().tolist())
    for name in ("scan.nii.gz", "scan.mhd", "scan.mha", "scan.nrrd"):
        sitk.WriteImage(image, str(folder / name))
    turned = sitk.PermuteAxes(sitk.Flip(image, [True, False, True]), [2, 0, 1])
    sitk.WriteImage(turned, str(folder / "turned.nrrd"))
    sitk.WriteImage(turned, str(folder / "turned.nii.gz"))
    with Volume(folder / "dicom") as volume:
        write_volume(folder / "p" / "t0" / "scan.hdf5", volume.read(), volume.affine)
        write_nifti(folder / "ras.nii", volume.read().astype(np.float32), volume.affine)
    return ["dicom", *sorted(path.name for path in folder.glob("*.*") if path.suffix != ".raw"), "p/t0/scan.hdf5"]


def tilted(angle):
    """A rotation about x and a little about z, whose columns are the axes."""
    c, s = np.cos(angle), np.sin(angle)
    d, t = np.cos(0.05), np.sin(0.05)
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ np.array([[d, -t, 0], [t, d, 0], [0, 0, 1]])


@pytest.mark.parametrize("axes", [np.eye(3), tilted(0.2)], ids=["upright", "tilted"])
def test_every_format_gives_the_same_bits(tmp_path, capsys, weights, axes):
    """Of whole scans, crops and points, from files in any order of the axes."""
    names = write_all_formats(tmp_path / "scans", axes)
    (tmp_path / "list.txt").write_text("\n".join(f"scans/{name}" for name in names))
    for region in ("whole", "centre"):
        output = tmp_path / f"{region}.csv"
        code, out, errors = extract(
            capsys, "--weights", weights, "--input", tmp_path / "list.txt", "--output", output, "--region", region,
            "--pool", "cls+mean", "--layers", 2
        )  # fmt: skip
        assert code == 0, errors
        features = read_csv(output)[1]
        assert features.shape == (len(names), 3 * 128) and len(np.unique(features, axis=0)) == 1
    middle = np.array([-123.45675, 47.5, -803.1]) + axes @ (np.array(SHAPE) / 2.3 * FINE)
    encoder = load_encoder(str(weights))
    found = []
    for name in names:
        with Volume(tmp_path / "scans" / name) as volume:
            found.append(embed_volume(encoder, volume.read(), volume.affine, point=middle.round(2)))
    assert len(np.unique(found, axis=0)) == 1


def test_the_vector_is_what_ten_lines_of_torch_make_of_the_file(tmp_path, capsys, weights):
    hu = chest(1, (40, 34, 22))
    write_nifti(tmp_path / "crop.nii.gz", hu, np.diag([*SPACING, 1]))
    code, out, _ = extract(
        capsys, "--weights", weights, "--input", tmp_path / "crop.nii.gz", "--output", tmp_path / "one.npz",
        "--region", "centre", "--pool", "cls+mean",
    )  # fmt: skip
    assert code == 0 and "1 read as crops: one window in the middle of each" in out
    w = {name.removeprefix("backbone."): value for name, value in torch.load(weights)["teacher"].items()}
    norm = lambda x, n: torch.layer_norm(x, (128,), w[f"{n}.weight"], w[f"{n}.bias"], 1e-6)  # noqa: E731
    linear = lambda x, n: x @ w[f"{n}.weight"].T + w[f"{n}.bias"]  # noqa: E731
    x = (torch.from_numpy(hu[8:32, 5:29, 5:17].astype(np.float32)) + 1000).div(1400).clamp(0, 1)[None, None]
    x = torch.conv3d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=PATCH).flatten(2).mT
    x = torch.cat([w["cls_token"], x], 1) + w["pos_embed"]
    for b in (f"blocks.{i}" for i in range(4)):
        q, k, v = linear(norm(x, f"{b}.norm1"), f"{b}.attn.qkv").reshape(-1, 3, 4, 32).permute(1, 2, 0, 3)
        x = x + linear(((q @ k.mT / 32**0.5).softmax(-1) @ v).transpose(0, 1).reshape(1, -1, 128), f"{b}.attn.proj")
        x = x + linear(torch.nn.functional.gelu(linear(norm(x, f"{b}.norm2"), f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
    tokens = norm(x, "norm")[0]
    with np.load(tmp_path / "one.npz") as table:
        found = table["features"][0]
    assert np.abs(found - torch.cat([tokens[0], tokens[1:].mean(0)]).numpy()).max() < 5e-6


def test_the_centre_of_a_whole_scan_is_refused(tmp_path, capsys, weights):
    for name, shape in (("crop", (24, 24, 12)), ("scan", SHAPE)):
        write_nifti(tmp_path / "in" / f"{name}.nii.gz", chest(0, shape), np.diag([*SPACING, 1]))
    flags = ["--weights", weights, "--input", tmp_path / "in", "--output", tmp_path / "out.csv", "--pool", "cls+centre"]
    code, out, errors = extract(capsys, *flags, "--tta", "8")
    assert code == 1 and "cls+centre of the last 1 block, mean over 8 orientations" in out
    assert len(errors) == 1 and "is larger than a crop, and pool cls+centre reads the middle of" in errors[0]
    features = read_csv(tmp_path / "out.csv")[1]
    assert features.shape == (2, 256) and np.isfinite(features).all(1).sum() == 1
    with Volume(tmp_path / "in" / "crop.nii.gz") as volume:
        encoder, hu = load_encoder(str(weights)), volume.read()
        found = embed_volume(encoder, hu, volume.affine, "cls+centre", tta=8)
        with pytest.raises(ValueError, match="tta is 7; expected one of 1, 8, 48"):
            embed_volume(encoder, hu, volume.affine, tta=7)
        with pytest.raises(DataError, match="tta 48 turns windows, which must be cubes"):
            embed_volume(encoder, hu, volume.affine, tta=48)
        with pytest.raises(DataError, match="the volume: is larger than a crop, and pool centre reads the middle"):
            embed_volume(encoder, np.tile(hu, (2, 2, 2)), volume.affine, "centre")
    assert (found == features[np.isfinite(features).all(1)][0]).all()


def test_a_whole_scan_is_the_mean_over_its_windows_without_air(tmp_path, capsys, weights):
    hu = chest(2, (58, 40, 30))
    hu[40:] = -1000  # the last of three rows of windows, x from 34 on, still has a few columns of the body
    hu[34:] = -1000
    hu[50, 5, 5] = 300  # noise
    write_nifti(tmp_path / "in" / "scan.nii.gz", hu, np.diag([*SPACING, 1]))
    flags = ["--weights", weights, "--input", tmp_path / "in", "--output", tmp_path / "scan.csv"]
    code, out, _ = extract(capsys, *flags)
    assert code == 0
    assert "1 read as whole scans: the mean over 12 of 18 windows, without those of nothing but air" in out
    model = load_encoder(str(weights)).build().eval()
    starts = [(x, y, z) for x in (0, 17) for y in (0, 16) for z in (0, 9, 18)]
    windows = np.stack([hu[x : x + 24, y : y + 24, z : z + 12] for x, y, z in starts]).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy((windows + 1000) / 1400).clamp(0, 1)[:, None]).double().mean(0)
    np.testing.assert_allclose(read_csv(tmp_path / "scan.csv")[1][0], expected, atol=2e-6)
    code, out, _ = extract(capsys, *flags[:4], "--region", "centre", "--output", tmp_path / "centre.csv")
    assert code == 0 and "1 read as crops" in out


def test_crops_are_known_by_their_folders_and_their_size(tmp_path, capsys, weights):
    for name, shape in (
        ("subset0/label1/p1/a.nii.gz", (60, 60, 30)),
        ("subset3/0/p2/b.nii.gz", (24, 24, 12)),
        ("small.nii.gz", (36, 36, 18)),
        ("large.nii.gz", (37, 36, 18)),
        ("p5/t0/scan.nii.gz", (20, 60, 10)),
        ("labels/small.nii.gz", (36, 36, 18)),
    ):
        write_nifti(tmp_path / "in" / name, chest(0, shape), np.diag([*SPACING, 1]))
    code, out, _ = extract(capsys, "--weights", weights, "--input", tmp_path / "in", "--output", tmp_path / "t.csv")
    assert code == 0 and "passed over below" in out and "1 labels or masks, such as labels/small.nii.gz" in out
    assert "3 read as crops" in out and "2 read as whole scans" in out
    assert "warning: 1 of them are smaller than a window: air is put around them" in out  # p5's
    columns, features = read_csv(tmp_path / "t.csv")
    assert columns["name"] == ["large", "p5/t0/scan", "small", "subset0/label1/p1/a", "subset3/0/p2/b"]
    assert columns["patient"] == ["large", "p5", "small", "p1", "p2"] and columns["reason"] == [""] * 5
    assert features.shape == (5, 128) and np.isfinite(features).all()


def test_points_are_the_centres_of_crops_around_them(tmp_path, capsys, weights):
    """As prepare_data.py luna16 cuts them, in the order of the table; a point off the scan has its reason."""
    from dino3d.data import images, resampling

    hu, spacing = chest(3), (0.7813, 0.6563, 2.5)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -20.5, 30.25, -100
    write_nifti(tmp_path / "scans" / "sub" / "1.2.3.nii.gz", hu, affine)
    voxels = ((23.5, 30.25, 12), (33.33, 19.1, 8.01), (999, 0, 0), (27, 30, 15.75))
    lps = [(np.array([-1, -1, 1]) * (affine[:3, 3] + spacing * np.array(voxel))).tolist() for voxel in voxels]
    rows = [
        ["7.7", 1, 2, 3, 0],
        *(["1.2.3", *point, 1] for point in lps[:3]),
        ["1.2.3", "x", 2, 3, 1],
        ["1.2.3", *lps[3], 0],
    ]
    with open(tmp_path / "points.csv", "w", newline="") as file:
        csv.writer(file).writerows([["seriesuid", "coordX", "coordY", "coordZ", "class"], *rows])
    flags = ["--weights", weights, "--input", tmp_path / "points.csv", "--output", tmp_path / "points.h5"]
    code, out, errors = extract(capsys, *flags)
    assert code == 1 and errors[0].startswith(
        "error: 3 of 6 rows have no features, such as 7.7: no scan of this series"
    )
    with h5py.File(tmp_path / "points.h5") as table:
        assert {*table} == {"name", "patient", "reason", "features", "coord"}
        assert table["name"].asstr()[:].tolist() == ["7.7", *["1.2.3"] * 5]
        reasons, features, coord = table["reason"].asstr()[:], table["features"][:], table["coord"][:]
    assert [bool(reason) for reason in reasons] == [True, False, False, True, True, False]
    assert "outside the scan" in reasons[3] and reasons[4].startswith("not a point: x, 2, 3")
    assert np.isnan(features[[0, 3, 4]]).all() and coord[1].tolist() == lps[0]
    model, image = load_encoder(str(weights)).build().eval(), images.make_image(hu, affine)
    for point, row in zip((lps[0], lps[1], lps[3]), features[[1, 2, 5]]):
        crop = images.voxels_of(resampling.crop_at(image, point, SIZE, SPACING, "")).astype(np.float32)
        with torch.no_grad():
            expected = model(torch.from_numpy((crop + 1000) / 1400).clamp(0, 1)[None, None])[0]
        np.testing.assert_allclose(row, expected, atol=2e-6)
    code, out, _ = extract(capsys, *flags)  # resumes, with those that failed alone
    assert code == 1 and "resumed: 3 of 6 rows were done before" in out
    moved = tmp_path / "tables" / "p.csv"
    moved.parent.mkdir()
    moved.write_text(
        "".join(line for line in (tmp_path / "points.csv").open() if line.startswith(("series", "1.2.3,2")))
    )
    code, out, _ = extract(
        capsys, *flags[:2], "--input", moved, "--scans", tmp_path / "scans", "--output", tmp_path / "q.npz"
    )
    assert code == 0, out
    with np.load(tmp_path / "q.npz") as table:
        assert (table["features"] == features[1]).all() and table["patient"].tolist() == ["1.2.3"]


def test_every_form_of_output_holds_the_same(tmp_path, capsys, weights):
    for seed, name in enumerate(("a", "b/c")):
        write_nifti(tmp_path / "in" / f"{name}.nii.gz", chest(seed, (26, 26, 14)), np.diag([*SPACING, 1]))
    (tmp_path / "in" / "broken.nrrd").write_text("NRRD0004\n")
    flags = ["--weights", weights, "--input", tmp_path / "in", "--pool", "mean", "--layers", 2]
    for output in ("t.csv", "t.npz", "t.h5", "t"):
        code, _, errors = extract(capsys, *flags, "--output", tmp_path / output)
        told = tmp_path / output if "." in output else tmp_path / "t" / "failed.csv"
        assert code == 1 and len(errors) == 1, errors
        assert errors[0].startswith("error: 1 of 3 rows have no features, such as broken: can't be read")
        assert errors[0].endswith(f"the reasons are in {told}")
    columns, features = read_csv(tmp_path / "t.csv")
    assert columns["name"] == ["a", "b/c", "broken"] and columns["patient"] == columns["name"]
    assert [*columns] == ["name", "patient", "reason"] and columns["reason"][:2] == ["", ""]
    assert columns["reason"][2] and features.shape == (3, 256) and np.isnan(features[2]).all()
    with np.load(tmp_path / "t.npz") as table:  # no pickles
        assert {*table.files} == {"name", "patient", "reason", "features"} and table["features"].dtype == np.float32
        np.testing.assert_array_equal(table["features"], features)
        assert all(table[name].tolist() == columns[name] for name in columns)
    with h5py.File(tmp_path / "t.h5") as table:
        np.testing.assert_array_equal(table["features"][:], features)
        assert all(table[name].asstr()[:].tolist() == columns[name] for name in columns)
    assert sorted(path.name for path in (tmp_path / "t").glob("[!.]*")) == ["a.h5", "b_c.h5", "failed.csv"]
    for at, name in enumerate(("a.h5", "b_c.h5")):
        with h5py.File(tmp_path / "t" / name) as file:
            np.testing.assert_array_equal(file["y_hat"][:], features[at])
            assert dict(file.attrs) == {"name": columns["name"][at], "patient": columns["name"][at]}
    (tmp_path / "in" / "broken.nrrd").unlink()
    (tmp_path / "in" / "a.nii.gz").rename(tmp_path / "in" / os.fsdecode(b"\xe4.nii.gz"))  # any bytes
    (tmp_path / "t" / "mine.h5").touch()
    code, _, _ = extract(capsys, *flags, "--output", tmp_path / "t")
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "t").glob("[!.]*")) == ["_.h5", "b_c.h5", "mine.h5"]
    with h5py.File(tmp_path / "t" / "_.h5") as file:
        np.testing.assert_array_equal(file["y_hat"][:], features[0])
    for name in ("n.npz", "n.h5", "n.csv"):
        assert extract(capsys, *flags, "--output", tmp_path / name)[0] == 0
    with np.load(tmp_path / "n.npz") as table, h5py.File(tmp_path / "n.h5") as same:
        assert table["name"].tolist() == ["b/c", os.fsdecode(b"\xe4")]
        assert same["name"][:].tolist() == [b"b/c", b"\xe4"] and b"\n\xe4,\xe4,," in (tmp_path / "n.csv").read_bytes()
    (tmp_path / "in" / os.fsdecode(b"\xe4.nii.gz")).rename(tmp_path / "in" / "a.nii.gz")
    code, _, _ = extract(capsys, *flags, "--output", tmp_path / "t.csv")
    np.testing.assert_array_equal(read_csv(tmp_path / "t.csv")[1], features[:2])


def test_random_encoders_and_trivial_figures_stand_beside(tmp_path, capsys, weights):
    hu = chest(1, (24, 24, 12))
    mask = np.zeros(hu.shape, np.uint8)
    mask[3:7, 2:5, 8] = 1
    write_nifti(tmp_path / "in" / "subset0" / "label1" / "p" / "a.nii.gz", hu, np.diag([*SPACING, 1]))
    write_nifti(tmp_path / "masks" / "subset0" / "label1" / "p" / "a.nii", mask, np.diag([*SPACING, 1]))
    flags = ["--weights", weights, "--input", tmp_path / "in", "--random", 2, "--trivial"]
    code, _, _ = extract(capsys, *flags, "--masks", tmp_path / "masks", "--output", tmp_path / "o" / "t.csv")
    which = ("centre", "histogram", "mean", "radial", "size", "all")
    tables = {path.name: read_csv(path) for path in (tmp_path / "o").glob("[!.]*.csv")}
    assert {*tables} == {"t.csv", "t.random0.csv", "t.random1.csv", *(f"t.trivial-{name}.csv" for name in which)}
    assert all(
        columns["name"] == ["subset0/label1/p/a"] and columns["patient"] == ["p"] for columns, _ in tables.values()
    )
    assert tables["t.trivial-size.csv"][1] == 12 * 16 and tables["t.trivial-all.csv"][1].shape == (
        1,
        1 + 16 + 2 + 12 + 1,
    )
    np.testing.assert_allclose(tables["t.trivial-mean.csv"][1][0], [hu.mean(), hu.std()], rtol=1e-6)
    for seed in range(2):
        torch.manual_seed(seed)
        model = vit_micro(SIZE, PATCH).eval()
        with torch.no_grad():
            expected = model(torch.from_numpy((hu.astype(np.float32) + 1000) / 1400).clamp(0, 1)[None, None])[0]
        np.testing.assert_allclose(tables[f"t.random{seed}.csv"][1][0], expected, atol=2e-6)
    write_nifti(tmp_path / "masks" / "subset0" / "label1" / "p" / "a.nii", mask[1:], np.diag([*SPACING, 1]))
    code, _, errors = extract(capsys, *flags, "--masks", tmp_path / "masks", "--output", tmp_path / "o" / "t.csv")
    assert code == 1 and "has another shape than its image" in errors[0]


@pytest.fixture
def crops(tmp_path):
    """Folder with eight crops."""
    for seed in range(8):
        write_nifti(tmp_path / "in" / f"{seed}.nii.gz", chest(seed % 3, (24 + seed, 30, 14)), np.diag([*SPACING, 1]))
    return tmp_path / "in"


DYING = """
import os, sys, signal
import extract_features, utils
from dino3d.features.journal import Journal
add = Journal.add
def dying(self, key, *what):
    add(self, key, *what)
    if key == "4":
        with open(self._own, "a") as file:
            file.write('{"key": "5", "state": "')
        os.kill(os.getpid(), signal.SIGKILL)
Journal.add = dying
utils.run_script(extract_features.main)
"""


def test_a_run_that_was_killed_or_ended_resumes_to_the_same_table(tmp_path, capsys, monkeypatch, weights, crops):
    flags = ["--weights", weights, "--input", crops, "--pool", "cls+mean", "--random", 1, "--output"]
    assert extract(capsys, *flags, tmp_path / "whole.csv")[0] == 0
    whole = [(tmp_path / f"whole{part}.csv").read_bytes() for part in ("", ".random0")]

    def tables(name):
        return [(tmp_path / f"{name}{part}.csv").read_bytes() for part in ("", ".random0")]

    command = [sys.executable, "-c", DYING, *map(str, flags), tmp_path / "killed.csv"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    assert not (tmp_path / "killed.csv").exists()
    code, out, _ = extract(capsys, *flags, tmp_path / "killed.csv")
    assert code == 0 and "resumed: 5 of 8 rows were done before" in out and tables("killed") == whole

    add = Journal.add

    def ended(self, key, *what):
        add(self, key, *what)
        if key == "2":
            os.kill(os.getpid(), signal.SIGTERM)

    gathered, all_gather = [], utils.Processes.all_gather
    monkeypatch.setattr(
        utils.Processes, "all_gather", lambda self, value: gathered.append(type(value)) or all_gather(self, value)
    )
    monkeypatch.setattr(Journal, "add", ended)
    assert extract(capsys, *flags, tmp_path / "ended.csv")[0] == 75
    assert gathered[:2] == [tuple, bool]  # as a process that no signal has reached
    assert not (tmp_path / "ended.csv").exists()
    monkeypatch.undo()
    code, out, _ = extract(capsys, *flags, tmp_path / "ended.csv")
    assert code == 0 and "resumed: 3 of 8 rows were done before" in out and tables("ended") == whole


def test_changed_files_are_done_anew_and_other_settings_refused(tmp_path, capsys, weights, crops):
    flags = ["--weights", weights, "--input", crops, "--output", tmp_path / "t.npz"]
    assert extract(capsys, *flags)[0] == 0
    with np.load(tmp_path / "t.npz") as table:
        before = table["features"]
    code, out, _ = extract(capsys, *flags)
    assert code == 0 and "resumed: 8 of 8 rows were done before" in out
    write_nifti(crops / "3.nii.gz", chest(5, (30, 30, 14)), np.diag([*SPACING, 1]))
    (crops / "5.nii.gz").unlink()
    code, out, _ = extract(capsys, *flags)
    assert code == 0 and "resumed: 6 of 7 rows were done before" in out
    with np.load(tmp_path / "t.npz") as table:
        assert table["name"].tolist() == ["0", "1", "2", "3", "4", "6", "7"]
        assert (table["features"] == before[[0, 1, 2, 3, 4, 6, 7]]).all(1).tolist() == [True] * 3 + [False] + [True] * 3
    for more in (["--pool", "mean"], ["--weights", write_checkpoint(tmp_path / "other.pth", 1)], ["--region", "whole"]):
        code, _, errors = extract(capsys, *flags, *more)
        what = more[0].removeprefix("--")
        assert code == 1 and f"t.npz: was begun with another {what}; choose another output" in errors[0]


def test_the_batch_the_threads_and_the_processes_do_not_matter(tmp_path, capsys, weights, crops):
    """Two processes with a thread each write what one with several threads does, and each crop alone."""
    flags = ["--weights", str(weights), "--input", str(crops), "--region", "whole"]
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert extract(capsys, *flags, "--output", tmp_path / "one.csv")[0] == 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "extract_features.py", *flags]
    done = subprocess.run([*command, "--output", tmp_path / "two.csv"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    assert "8 scans or crops" in done.stdout and "8 read as whole scans" in done.stdout
    encoder, features = load_encoder(str(weights)), read_csv(tmp_path / "one.csv")[1]
    for at in (0, 5):
        with Volume(crops / f"{at}.nii.gz") as volume:
            assert (embed_volume(encoder, volume.read(), volume.affine, region="whole") == features[at]).all()


@pytest.mark.parametrize(
    "more, code, told",
    [
        (["--masks", "m"], 2, "--masks DIR goes with --trivial"),
        (["--output", "x.tsv"], 2, "--output x.tsv: .tsv is not written, expected .csv, .npz, .h5; a new folder of"),
        (["--output", "x.CSV"], 2, "--output x.CSV: .CSV is not written"),
        (["--output", ".csv"], 2, "has a suffix alone"),
        (["--pool", "max"], 2, "max: choose one of cls, mean, centre, cls+mean, cls+centre"),
        (["--pool", "centre", "--region", "whole"], 2, "--pool centre: reads the middle of a window, which --region"),
        (["--tta", "4"], 2, "4: choose one of 1, 8, 48"),
        (["--tta", "48"], 1, "--tta 48: turns windows, which must be cubes for that, in voxels and mm; this"),
        (["--layers", "0"], 2, "out of range, expected at least 1"),
        (["--layers", "5"], 1, "--layers 5: vit_micro has 4 blocks; give at most that"),
        (["--weights", "no.pth"], 1, "--weights no.pth: no such file"),
        (["--weights", "in"], 1, "--weights in: holds no checkpoint"),
        (["--precision", "fp16"], 1, "fp16 needs a GPU"),
        (["--input", "no"], 1, "--input no: no such file or folder"),
        (["--input", "empty"], 1, "--input empty: no volume found below it"),
        (["--input", "notes.pdf"], 1, "--input notes.pdf: is of no kind that is read here; expected a folder, a scan"),
        (["--input", "empty.txt"], 1, "--input empty.txt: names no scan"),
        (["--input", "no.csv"], 1, "--input no.csv: no such file"),
        (["--input", "other.csv"], 1, "has neither a column path nor seriesuid, coordX, coordY, coordZ, only a, b"),
        (["--input", "half.csv"], 1, "half.csv: has no column coordX, only seriesuid"),
        (["--input", "none.csv"], 1, "none.csv: holds no points"),
        (["--input", "twice.csv"], 1, "--input twice.csv: has 0.nii.gz twice"),
        (["--input", "paths.csv", "--scans", "in"], 1, "--scans in: goes with a table of points"),
        (["--scans", "in"], 1, "--scans in: goes with a table of points"),
        (["--input", "points.csv", "--scans", "no"], 1, "no: is no such folder"),
        (["--output", "in"], 1, "--output in: is there already and not of this script"),
        (["--output", "paths.csv"], 1, "--output paths.csv: is there already and not of this script"),
        (["--output", "folder.csv"], 1, "--output folder.csv: is a folder, expected a file by its suffix"),
        (
            ["--output", "file"],
            1,
            "--output file: is a file; expected one with the suffix .csv, .npz, .h5, or a folder",
        ),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, monkeypatch, weights, more, code, told):
    monkeypatch.chdir(tmp_path)
    write_nifti(tmp_path / "in" / "0.nii.gz", chest(0, (24, 24, 12)), np.diag([*SPACING, 1]))
    for name in ("empty", "folder.csv"):
        (tmp_path / name).mkdir()
    for name, text in (
        ("notes.pdf", "x"),
        ("file", "x"),
        ("empty.txt", "# nothing\n\n"),
        ("other.csv", "a,b\n1,2\n"),
        ("half.csv", "seriesuid\n1\n"),
        ("none.csv", "seriesuid,coordX,coordY,coordZ\n"),
        ("points.csv", "seriesuid,coordX,coordY,coordZ\n0,1,2,3\n"),
        ("paths.csv", "path,patient\nin/0.nii.gz,p\n"),
        ("twice.csv", "path\nin/0.nii.gz\nin/0.nii.gz\n"),
    ):
        (tmp_path / name).write_text(text)
    before = sorted(path.name for path in tmp_path.iterdir())
    flags = ["--weights", weights, "--input", "in", "--output", "out.csv"]
    found, _, errors = extract(capsys, *flags, *more)
    assert found == code and len(errors) == 1 and told in errors[0], errors
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_tables_and_lists_of_paths(tmp_path, capsys, weights, crops):
    """Relative to the table; a missing file is a row, and patients are the table's where it names them."""
    (tmp_path / "list.csv").write_text("patient;label;path\nP1;1;in/3.nii.gz\n;0;in/1.nii.gz\nP1;0;in/none.nii.gz\n")
    flags = ["--weights", weights, "--region", "centre"]
    code, _, errors = extract(capsys, *flags, "--input", tmp_path / "list.csv", "--output", tmp_path / "a.csv")
    assert code == 1 and "1 of 3 rows have no features, such as none: can't be read: no such file" in errors[0]
    columns, features = read_csv(tmp_path / "a.csv")
    assert columns["name"] == ["3", "1", "none"] and columns["patient"] == ["P1", "1", "P1"]
    (tmp_path / "list.txt").write_text(f"{crops}/1.nii.gz\n# a comment\nin/3.nii.gz\n")
    assert extract(capsys, *flags, "--input", tmp_path / "list.txt", "--output", tmp_path / "b.csv")[0] == 0
    assert (read_csv(tmp_path / "b.csv")[1] == features[[1, 0]]).all()


def test_outputs_in_the_input_are_no_scans(tmp_path, capsys, weights, crops):
    (crops / "sub").mkdir()
    for output in (crops / "t.h5", crops / "sub" / "folder"):
        for _ in range(2):
            code, out, errors = extract(
                capsys, "--weights", weights, "--input", crops, "--output", output, "--random", 1
            )
            assert code == 0 and "8 scans or crops" in out, errors
        assert "resumed: 8 of 8" in out
        for path in crops.glob("*.h5"):
            path.unlink()


def test_a_dicom_series_has_its_patient(tmp_path, capsys, weights):
    write_dicom(tmp_path / "in" / "a", (chest(0) + 1024).astype(np.uint16), spacing=FINE, PatientID="Q7")
    write_dicom(tmp_path / "in", (chest(1) + 1024).astype(np.uint16), spacing=FINE, SeriesInstanceUID="1.5")
    code, _, _ = extract(capsys, "--weights", weights, "--input", tmp_path / "in", "--output", tmp_path / "t.csv")
    columns, features = read_csv(tmp_path / "t.csv")
    assert code == 0 and columns["name"] == ["1.5", "a#1.2.3.4"] and columns["patient"] == ["patient", "Q7"]
    one = ["--weights", weights, "--input", tmp_path / "in" / "a", "--output", tmp_path / "one.csv"]
    assert extract(capsys, *one)[0] == 0 and (read_csv(tmp_path / "one.csv")[1][0] == features[1]).all()


def test_dicom_series_have_the_same_patients_however_they_are_named(tmp_path):
    """By their folder, a list, a table or one by one: those that pydicom finds; Joe's UID begins Ann's."""
    series = [("a", "9.9.10", "Ann"), ("b", "9.9.1", "Joe"), ("c", "9.9.5", "A"), ("d", "9.9.5", "B")]
    for prefix, uid, patient in series:
        write_series(tmp_path / "all", series=uid, patient=patient, prefix=prefix)
    owners = {file.name[0]: pydicom.dcmread(file).PatientID for file in (tmp_path / "all").glob("*00.dcm")}
    names = dict(zip("abcd", ("9.9.10", "9.9.1", "9.9.5", "9.9.5#2")))
    expected = {uid: owners[prefix] for prefix, uid in names.items()}
    (tmp_path / "list.txt").write_text("".join(f"all#{uid}\n" for uid in expected))
    (tmp_path / "table.csv").write_text("path\n" + (tmp_path / "list.txt").read_text())
    for source in ("all", "list.txt", "table.csv"):
        found = find_subjects(str(tmp_path / source))[0]
        assert {one.name.removeprefix("all#"): one.patient for one in found} == expected
    for uid, patient in expected.items():
        assert [one.patient for one in find_subjects(f"{tmp_path}/all#{uid}")[0]] == [patient]


def test_what_is_no_ct_is_a_row_with_its_reason(tmp_path, capsys, weights):
    affine = np.diag([*SPACING, 1])
    write_nifti(tmp_path / "in" / "air.nii.gz", np.where(chest() > -900, -1000, chest()), affine)
    write_nifti(tmp_path / "in" / "constant.nii.gz", np.full(SHAPE, 7, np.int16), affine)
    write_nifti(tmp_path / "in" / "mr.nii.gz", np.abs(chest()) % 250, affine)
    write_nifti(tmp_path / "in" / "nan.nii.gz", np.full(SHAPE, np.nan, np.float32), affine)
    write_nifti(tmp_path / "in" / "ok.nii.gz", chest(1), affine)
    code, _, errors = extract(capsys, "--weights", weights, "--input", tmp_path / "in", "--output", tmp_path / "t.csv")
    assert code == 1 and errors[0].startswith("error: 4 of 5 rows have no features")
    reasons = dict(zip(*(read_csv(tmp_path / "t.csv")[0][name] for name in ("name", "reason"))))
    assert reasons.pop("ok") == ""
    for name, told in (("air", "nothing but air"), ("constant", "constant"), ("mr", "not in HU"), ("nan", "NaN")):
        assert told in reasons[name]


def test_without_a_spacing_voxels_are_taken_as_they_are(tmp_path, capsys):
    path = write_checkpoint(tmp_path / "c.pth", spacing=None)
    hu = chest(0, (30, 28, 16))
    write_nifti(tmp_path / "a.nii.gz", hu, np.diag([0.5, 0.7, 3.1, 1]))
    code, out, _ = extract(capsys, "--weights", path, "--input", tmp_path / "a.nii.gz", "--output", tmp_path / "t.csv")
    assert code == 0 and "does not say the spacing that it was trained at: voxels are taken as they are" in out
    model = load_encoder(str(path)).build().eval()
    with torch.no_grad():
        window = torch.from_numpy((hu[3:27, 2:26, 2:14].astype(np.float32) + 1000) / 1400).clamp(0, 1)
        np.testing.assert_allclose(read_csv(tmp_path / "t.csv")[1], model(window[None, None]), atol=2e-6)
