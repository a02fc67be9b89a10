"""extract_features.py on what people have: tables beside their own results, points in RAS, names, full disks."""

import csv
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT
from raw_inputs import write_nifti
from test_extract_features import SPACING, chest, extract, read_csv, write_checkpoint

from dino3d.data import images
from dino3d.features.cases import find_subjects
from dino3d.features.tables import FeatureTable, file_names, write_features
from dino3d.weights import load_file

AFFINE = np.diag([*SPACING, 1.0])
HEADER = "seriesuid,coordX,coordY,coordZ"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "checkpoint.pth")


@pytest.fixture
def scans(tmp_path):
    """Folder with two scans from the origin to -46, -42 and 48 mm (LPS)."""
    for seed, name in enumerate(("1.2.3", "1.2.4")):
        write_nifti(tmp_path / "scans" / f"{name}.nii", chest(seed, (24, 22, 13)), AFFINE)
    return tmp_path / "scans"


def with_points(path, *rows, header=HEADER):
    path.write_text("\n".join((header, *rows)) + "\n")
    return path


@pytest.mark.parametrize("name", ["FEATURES", "1.2.3.h5"])
def test_results_beside_the_scans_are_no_scans_of_the_same_name(tmp_path, capsys, weights, scans, name):
    """The second run would take them for another scan of the series, and write that over them."""
    table = with_points(scans / "points.csv", "1.2.3,-20,-20,20", "1.2.4,-20,-20,20")
    flags = ["--weights", weights, "--input", table, "--output"]
    for output in (scans / name, scans / name, scans / "again.csv"):
        code, _, errors = extract(capsys, *flags, output)
        assert code == 0 and not errors
    where = scans / name
    with h5py.File(where if where.is_file() else where / "1.2.3.h5") as file:
        found = file["features"][0] if where.is_file() else file["y_hat"][:]
    np.testing.assert_array_equal(found, read_csv(scans / "again.csv")[1][0])
    code, out, _ = extract(capsys, "--weights", weights, "--input", scans, "--output", tmp_path / "all.csv")
    assert code == 0 and read_csv(tmp_path / "all.csv")[0]["name"] == ["1.2.3", "1.2.4"]


def test_maps_beside_the_scans_are_no_scans(tmp_path, capsys, weights, scans):
    flags = ["--weights", weights, "--overlap", "0", "--maps", scans / "maps", "--input"]
    assert extract(capsys, *flags, scans / "1.2.3.nii", "--output", tmp_path / "a.csv")[0] == 0
    (scans / "maps" / "1.2.3" / "mine.nii").write_bytes((scans / "1.2.3.nii").read_bytes())
    assert extract(capsys, "--weights", weights, "--input", scans, "--output", tmp_path / "b.csv")[0] == 0
    assert read_csv(tmp_path / "b.csv")[0]["name"] == ["1.2.3", "1.2.4", "maps/1.2.3/mine"]


def test_rows_of_points_that_are_none(tmp_path, capsys, weights, scans):
    """Each is its own row and keeps no other from its features or its map."""
    rows = ["1.2.3,-20,-20,20", "1.2.3,nan,-20,20", "1.2.3,-20,1e400,20", ",,,", "1.2.3,20,20,20", "1.2.4,-20,-20,20"]
    flags = ["--weights", weights, "--input", with_points(tmp_path / "points.csv", *rows), "--scans", scans]
    code, _, errors = extract(capsys, *flags, "--output", tmp_path / "t.csv")
    columns, features = read_csv(tmp_path / "t.csv")
    assert code == 1 and "3 of 5 rows have no features" in errors[0]  # what spreadsheets leave below a table is no row
    assert np.isfinite(features).all(1).tolist() == [True, False, False, False, True]
    assert columns["coordX"] == ["-20.0", "", "", "20.0", "-20.0"]
    assert columns["reason"][3].endswith("with the signs of the first two changed it is inside: is it in RAS?")
    flags[3] = with_points(tmp_path / "fewer.csv", *rows[:3], "9,1,2,3")
    code, out, _ = extract(capsys, *flags, "--output", tmp_path / "u.csv", "--maps", tmp_path / "maps", "--overlap", 0)
    assert "point 1: -20 -20 20 mm (LPS) is voxel 10 10 5" in out
    assert out.count("no maps") == 1 and "9: no maps: no scan of this series" in out


def test_a_scan_is_of_one_patient(tmp_path, capsys, weights, scans):
    rows = ["1.2.3,-20,-20,20,", "1.2.3,-20,-20,20,A", "1.2.4,-20,-20,20,"]
    table = with_points(tmp_path / "points.csv", *rows, header=f"{HEADER},patient")
    flags = ["--weights", weights, "--input", table, "--scans", scans, "--output", tmp_path / "t.csv"]
    assert extract(capsys, *flags)[0] == 0 and read_csv(tmp_path / "t.csv")[0]["patient"] == ["A", "A", "1.2.4"]
    with_points(table, *rows, "1.2.3,-20,-20,20,B", header=f"{HEADER},patient")
    code, _, errors = extract(capsys, *flags)
    assert code == 1 and "line 5 has patient B for 1.2.3, another line A" in errors[0]


@pytest.mark.parametrize("column", ["label", "patient_id", "PatientID", "mrn"])
def test_a_table_that_tells_no_patient_is_told(tmp_path, scans, column):
    """As --data_list does; a column that tells them by another name is named."""
    (tmp_path / "paths.csv").write_text(f"path,{column}\nscans/1.2.3.nii,A\nscans/1.2.4.nii,A\n")
    with_points(tmp_path / "points.csv", "1.2.3,1,2,3,A", "1.2.3,4,5,6,A", "1.2.4,1,2,3,A", header=f"{HEADER},{column}")
    remedy = "add the column" if column == "label" else f"does {column} tell whose they are, call it patient"
    for name in ("paths.csv", "points.csv"):
        subjects, lines = find_subjects(str(tmp_path / name), str(scans) if name == "points.csv" else None)
        assert {one.patient for one in subjects} == {"1.2.3", "1.2.4"} and len(lines) == 1
        assert "has no column patient: each of 2 scans counts as a patient of its own" in lines[0]
        assert lines[0].endswith(f"; {remedy}")
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text.replace(column, "Patient"))
        subjects, lines = find_subjects(str(tmp_path / name), str(scans) if name == "points.csv" else None)
        assert {one.patient for one in subjects} == {"A"} and not lines


def test_a_scan_of_many_points_is_copied_once(tmp_path, capsys, weights, scans, monkeypatch):
    made, make_image = [], images.make_image

    def counted(volume, affine):
        made.append(volume.shape)
        return make_image(volume, affine)

    monkeypatch.setattr(images, "make_image", counted)
    table = with_points(tmp_path / "points.csv", *(f"1.2.3,-20,-20,{z}" for z in range(20, 28)))
    code, _, _ = extract(
        capsys, "--weights", weights, "--input", table, "--scans", scans, "--output", tmp_path / "t.csv"
    )
    assert code == 0 and made.count((24, 22, 13)) == 1 and len(made) == 9


def test_crops_that_are_not_in_hu_are_told(tmp_path, capsys, weights):
    hu = chest(1, (24, 22, 13))
    for name, voxels in (("hu", hu), ("hu2", hu), ("offset", np.maximum(hu + 1024, 0).astype(np.uint16))):
        write_nifti(tmp_path / "in" / f"{name}.nii", voxels, AFFINE)
    flags = ["--weights", weights, "--input", tmp_path / "in", "--region", "centre"]
    code, out, _ = extract(capsys, *flags, "--output", tmp_path / "t.csv")
    assert code == 0 and "warning: 1 of 3 files are no CT in HU, such as" in out and "offset.nii: not in HU" in out
    (tmp_path / "in" / "offset.nii").unlink()
    code, out, _ = extract(capsys, *flags, "--output", tmp_path / "u.csv")
    assert code == 0 and "no CT in HU" not in out


def test_tables_of_others_are_not_written_over(tmp_path, capsys, weights, scans):
    flags = ["--weights", weights, "--input", scans, "--output", tmp_path / "t.csv", "--region", "centre"]
    (tmp_path / "t.trivial-all.csv").write_text("mine")
    code, _, errors = extract(capsys, *flags, "--trivial")
    assert code == 1 and "t.trivial-all.csv is there already" in errors[0]
    assert (tmp_path / "t.trivial-all.csv").read_text() == "mine" and extract(capsys, *flags)[0] == 0


def test_names_that_no_row_has_are_told_before_any_work(tmp_path, capsys, weights, scans):
    flags = ["--weights", weights, "--input", scans, "--output", tmp_path / "t.csv", "--neighbours", 2, "--queries"]
    code, out, errors = extract(capsys, *flags, "1.2.5")
    assert code == 1 and "no row with features of this name: did you mean 1.2." in errors[0]
    assert not (tmp_path / "t.csv").exists()
    code, out, _ = extract(capsys, "--weights", weights, "--input", scans / "1.2.3.nii", *flags[4:], "1.2.3")
    assert code == 0 and "1.2.3 has no neighbours: no row of another patient" in out
    with open(tmp_path / "t.neighbours" / "neighbours.csv") as file:
        assert len(list(csv.reader(file))) == 1


def test_names_of_files_fit_and_stay_apart(tmp_path):
    names = ["胸" * 80 + "/" + "胸" * 80 + end for end in "ab"] + ["a/b", "a_b"]
    table = FeatureTable(names, names, [""] * 4, np.ones((4, 2), np.float32))
    write_features(tmp_path / "out", table)
    assert len({path.name for path in (tmp_path / "out").glob("*.h5")}) == 4 and len(set(file_names(names))) == 4


def test_scans_of_one_stem_have_names_of_their_own(tmp_path, capsys, weights):
    files = ["a.nii", "a.nii.gz", "a.nii.nii"]
    for name in files:
        write_nifti(tmp_path / "in" / name, chest(0, (24, 22, 13)), AFFINE)
    assert extract(capsys, "--weights", weights, "--input", tmp_path / "in", "--output", tmp_path / "t.csv")[0] == 0
    assert read_csv(tmp_path / "t.csv")[0]["name"] == files


FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from dino3d.features.tables import FeatureTable, write_features
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
names = [f"scan{k}" for k in range(9)]
table = FeatureTable(names, names, [""] * 9, np.ones((9, 400), np.float32))
for name in ("t.csv", "t.npz", "t.h5", "t"):
    try:
        write_features(Path(sys.argv[1]) / name, table)
    except OSError as error:
        print(name, error.errno)
"""


def test_a_full_disk_is_an_error_and_leaves_no_part(tmp_path):
    """The HDF5 library would end the process. A limit of the size of files stands for the disk."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    assert done.returncode == 0 and [line.split()[0] for line in done.stdout.splitlines()] == [
        "t.csv", "t.npz", "t.h5", "t"
    ], done.stderr  # fmt: skip
    assert {path.name for path in tmp_path.rglob("*.*")} == {".written.json"}


def test_a_table_that_cannot_be_written_is_named(tmp_path, capsys, weights, scans, monkeypatch):
    flags = ["--weights", weights, "--input", scans, "--output", tmp_path / "t.h5", "--region", "centre"]

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("extract_features.write_features", full)
        code, _, errors = extract(capsys, *flags)
        assert code == 1 and "t.h5: can't be written (No space left on device)" in errors[0]
    code, out, _ = extract(capsys, *flags)
    assert code == 0 and "resumed: 2 of 2 rows were done before" in out


def test_weights_that_do_not_say_what_they_are(tmp_path, capsys, weights, scans):
    """What is assumed of a file without a config is told; docs/features.md shows how to give it one."""
    content = torch.load(weights)
    torch.save(content["teacher"], tmp_path / "bare.pth")
    flags = ["--input", scans, "--region", "centre", "--output", tmp_path / "t.csv", "--weights"]
    code, _, errors = extract(capsys, *flags, tmp_path / "bare.pth")
    assert code == 1 and "it does not say its architecture, and vit_small was taken" in errors[0]
    config = {name: content["config"][name] for name in ("arch", "patch_size", "input_size")}
    torch.save({"teacher": load_file(str(tmp_path / "bare.pth")), "config": config}, tmp_path / "some.pth")
    code, out, _ = extract(capsys, *flags, tmp_path / "some.pth")
    assert code == 0 and "does not say its clip range: HU -1000 1000 become 0 and 1" in out
    code, out, _ = extract(capsys, "--weights", weights, *flags[:4], "--output", tmp_path / "u.csv")
    assert code == 0 and "does not say" not in out


def test_masks_that_are_not_there(tmp_path, capsys, weights, scans):
    flags = ["--weights", weights, "--input", scans, "--output", tmp_path / "t.csv", "--trivial", "--masks"]
    code, _, errors = extract(capsys, *flags, tmp_path / "none")
    assert code == 1 and "--masks" in errors[0] and "no such folder" in errors[0]
    (tmp_path / "masks").mkdir()
    code, _, errors = extract(capsys, *flags, tmp_path / "masks")
    assert code == 1 and f"no mask: {tmp_path / 'masks'} has no 1.2.3 with any of" in errors[0]
