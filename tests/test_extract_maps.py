"""extract_features.py --maps and --neighbours: what is written, resuming, and what is refused."""

import csv
import json
import os
import re

import nibabel
import numpy as np
import pytest
from test_extract_features import FINE, chest, extract, read_csv, write_checkpoint

from dino3d.data.volume import Volume, write_volume
from dino3d.features.neighbours import nearest

AFFINE = np.diag([*FINE, 1.0]) + np.array([[0, 0, 0, 20.0], [0, 0, 0, 30.0], [0, 0, 0, -40.0], [0, 0, 0, 0]])
SHAPE = (40, 32, 12)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "checkpoint.pth")


@pytest.fixture
def scans(tmp_path):
    """Folder with scans of two patients, two of them of one name in different folders."""
    for number, name in enumerate(("p0/t0/scan", "p1/t0/scan", "p1/t1/other")):
        write_volume(tmp_path / "scans" / f"{name}.hdf5", chest(number, SHAPE), AFFINE)
    return tmp_path / "scans"


def lps(voxel):
    return (np.diag([-1, -1, 1, 1]) @ AFFINE @ [*voxel, 1])[:3]


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*.*")}


FILES = {
    "attention.nii.gz",
    *(f"attention_head{k}.nii.gz" for k in (1, 2, 3, 4)),
    "pca.nii.gz",
    "heads.png",
    "maps.png",
}
FILES |= {"similarity1.nii.gz", "similarity1.png", "maps.json"}


def test_maps_of_every_scan_are_made_once(tmp_path, capsys, weights, scans):
    maps, point = tmp_path / "maps", lps((20, 15, 8))
    with Volume(scans / "p0" / "t0" / "scan.hdf5") as volume:
        hu = volume.read()[20, 15, 8]
    flags = ["--weights", weights, "--input", scans, "--output", tmp_path / "a.csv", "--maps", maps]
    flags += ["--overlap", "0", "--point", *point]
    code, out, errors = extract(capsys, *flags)
    assert code == 0 and not errors, (out, errors)
    assert f"is voxel 20 15 8 of the file, {hu} HU" in out
    names = {"p0_t0_scan", "p1_t0_scan", "p1_t1_other"}
    before = files_of(maps)
    assert before.keys() == {f"{name}/{file}" for name in names for file in FILES}
    for name in names:
        for file in ("attention.nii.gz", "pca.nii.gz", "similarity1.nii.gz"):
            image = nibabel.load(maps / name / file)
            np.testing.assert_allclose(image.affine, AFFINE, atol=1e-3)
            assert image.shape == SHAPE
    summary = json.loads((maps / "p0_t0_scan" / "maps.json").read_text())
    assert summary["points"] == [{"lps_mm": pytest.approx(point.tolist()), "voxel": [20, 15, 8], "hu": hu}]

    code, out, _ = extract(capsys, *flags)
    assert code == 0 and "maps of 3 scans; 3 of them were done before" in out and files_of(maps) == before
    (maps / "p1_t0_scan" / "pca.nii.gz").unlink()
    code, out, _ = extract(capsys, *flags)
    changed = {file for file, time in files_of(maps).items() if before[file] != time}
    assert code == 0 and changed == {f"p1_t0_scan/{file}" for file in FILES}
    # In RAS, the same point: nothing is made anew
    code, out, _ = extract(capsys, *flags[:-4], "--point_ras", -point[0], -point[1], point[2])
    assert code == 0 and "3 of them were done before" in out


def test_a_scan_that_has_changed_is_drawn_anew(tmp_path, capsys, weights, scans):
    maps = tmp_path / "maps"
    flags = ["--weights", weights, "--input", scans, "--output", tmp_path / "a.csv", "--maps", maps, "--overlap", "0"]
    assert extract(capsys, *flags)[0] == 0
    before = files_of(maps)
    write_volume(scans / "p0" / "t0" / "scan.hdf5", chest(7, SHAPE), AFFINE)
    code, out, _ = extract(capsys, *flags)
    changed = {file.split("/")[0] for file, time in files_of(maps).items() if before[file] != time}
    assert code == 0 and "2 of them were done before" in out and changed == {"p0_t0_scan"}


def test_points_of_a_table_are_compared_with(tmp_path, capsys, weights, scans):
    rows = [["scan", *lps((20, 15, 8))], ["scan", *lps((30, 12, 4))]]
    with open(tmp_path / "points.csv", "w", newline="") as file:
        csv.writer(file).writerows([["seriesuid", "coordX", "coordY", "coordZ"], *rows])
    flags = ["--weights", weights, "--input", tmp_path / "points.csv", "--scans", scans / "p0", "--overlap", "0"]
    code, out, errors = extract(capsys, *flags, "--output", tmp_path / "a.csv", "--maps", tmp_path / "maps")
    assert code == 0, (out, errors)
    assert sorted(path.name for path in (tmp_path / "maps").glob("*/sim*.png")) == [
        "similarity1.png",
        "similarity2.png",
    ]
    with open(tmp_path / "many.csv", "w", newline="") as file:
        rows = [["scan", *lps((20, 15, z / 4))] for z in range(17)]
        csv.writer(file).writerows([["seriesuid", "coordX", "coordY", "coordZ"], *rows])
    flags[3] = tmp_path / "many.csv"
    code, out, errors = extract(capsys, *flags, "--output", tmp_path / "b.csv", "--maps", tmp_path / "others")
    assert code == 1 and "scan has 17 points" in errors[0] and not (tmp_path / "b.csv").exists()


def test_one_scans_failure_is_its_own(tmp_path, capsys, weights, scans):
    """A point that lies in one scan alone: the others have no maps, all have features."""
    write_volume(scans / "p0" / "t0" / "scan.hdf5", chest(0, SHAPE), AFFINE + np.eye(4, k=3) * 500)
    maps, table = tmp_path / "maps", tmp_path / "a.csv"
    flags = ["--weights", weights, "--input", scans, "--output", table, "--maps", maps, "--overlap", "0"]
    code, out, errors = extract(capsys, *flags, "--point", *lps((20, 15, 8)))
    assert code == 1 and "p0/t0/scan: no maps: point 1: outside the scan" in out
    assert len(errors) == 1 and "1 of 3 scans have no maps, such as p0/t0/scan: point 1: outside" in errors[0]
    assert {path.name for path in maps.iterdir()} == {"p1_t0_scan", "p1_t1_other"}
    assert len(read_csv(table)[1]) == 3


def test_maps_are_not_mixed_with_others(tmp_path, capsys, weights, scans):
    maps = tmp_path / "maps"
    flags = ["--input", scans / "p0" / "t0" / "scan.hdf5", "--maps", maps, "--overlap"]
    assert extract(capsys, "--weights", weights, *flags, "0", "--output", tmp_path / "a.csv")[0] == 0
    other = write_checkpoint(tmp_path / "other.pth", seed=1)
    for changed in (["--weights", other, *flags, "0"], ["--weights", weights, *flags, "0.5"]):
        code, _, errors = extract(capsys, *changed, "--output", tmp_path / "b.csv")
        assert code == 1 and "scan: holds maps of other weights or settings" in errors[0]
        assert not (tmp_path / "b.csv").exists()  # told before any work


@pytest.mark.parametrize(
    "flags, code, reason",
    [
        (["--point", "1", "2", "3"], 2, "--point and --point_ras go with --maps"),
        (["--point_ras", "1", "2", "3"], 2, "--point and --point_ras go with --maps"),
        (["--maps", "M", "--point", "1", "2", "nan"], 2, "nan is out of range"),
        (["--maps", "M", "--overlap", "1"], 2, "--overlap: 1 is out of range"),
        (["--queries", "a"], 2, "--queries and --same_patient go with --neighbours"),
        (["--maps", "scans/maps"], 1, "lies in --input"),
        (["--maps", "a file"], 1, "is a file, expected a folder"),
        (["--maps", "a file/maps/deep"], 1, "a file is a file, expected a folder"),
        (
            ["--neighbours", "2", "--queries", "p1/t0/scam"],
            1,
            "--queries p1/t0/scam: no row with features .*mean p1/t0/scan",
        ),
    ],
)
def test_wrong_flags_are_told(flags, code, reason, tmp_path, capsys, weights, scans, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_text("")
    found, out, errors = extract(capsys, "--weights", weights, "--input", "scans", "--output", "a.csv", *flags)
    assert found == code and len(errors) == 1, (out, errors)
    assert re.search(reason, errors[0])


def test_neighbours_are_those_of_the_table(tmp_path, capsys, weights):
    for number in range(5):
        write_volume(tmp_path / "in" / f"p{number // 2}" / "t0" / f"{number}.hdf5", chest(number, (40, 36, 14)), AFFINE)
    flags = ["--weights", weights, "--input", tmp_path / "in", "--output", tmp_path / "a.csv", "--region", "centre"]
    code, out, errors = extract(capsys, *flags, "--neighbours", 2)
    assert code == 0, (out, errors)
    columns, features = read_csv(tmp_path / "a.csv")
    names, patients = columns["name"], columns["patient"]
    folder = tmp_path / "a.neighbours"
    with open(folder / "neighbours.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [
        (names[query], str(rank), names[one.row])
        for query in range(5)
        for rank, one in enumerate(nearest(features, patients, query, 2), 1)
    ]
    assert [(row["query"], row["rank"], row["name"]) for row in rows] == expected and len(expected) == 10
    assert all(row["patient"] != row["query_patient"] for row in rows)
    assert len(list(folder.glob("*.png"))) == 5
    code, _, _ = extract(capsys, *flags, "--neighbours", 4, "--same_patient", "--queries", names[0])
    with open(folder / "neighbours.csv", newline="") as file:
        assert {row["name"] for row in csv.DictReader(file)} == set(names[1:])
    assert os.path.isfile(folder / "p0_t0_0.png")


def test_neighbours_of_points_say_where_they_are(tmp_path, capsys, weights):
    """Several points of a scan have its name: each neighbour is found in the table by its place."""
    for number, series in enumerate(("1.2.3", "4.5.6")):
        write_volume(tmp_path / "in" / f"{series}.hdf5", chest(number, (40, 36, 14)), AFFINE)
    voxels = {"1.2.3": [(12, 16, 5), (20, 15, 8), (28, 18, 6)], "4.5.6": [(16, 20, 7), (20, 15, 8)]}
    points = [(series, *lps(voxel).tolist()) for series, those in voxels.items() for voxel in those]
    lines = ["seriesuid,coordX,coordY,coordZ", *(",".join(map(str, point)) for point in points)]
    (tmp_path / "points.csv").write_text("\n".join(lines) + "\n")
    flags = ["--weights", weights, "--input", tmp_path / "points.csv", "--scans", tmp_path / "in"]
    code, out, errors = extract(capsys, *flags, "--output", tmp_path / "a.csv", "--neighbours", 2)
    assert code == 0, (out, errors)
    vectors = {}
    with open(tmp_path / "a.csv", newline="") as file:
        for row in csv.DictReader(file):
            vector = [float(value) for name, value in row.items() if name.startswith("feature_")]
            vectors[row["name"], row["coordX"], row["coordY"], row["coordZ"]] = np.array(vector)
    with open(tmp_path / "a.neighbours" / "neighbours.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(points)
    for row in rows:
        one = vectors[row["query"], row["query_coordX"], row["query_coordY"], row["query_coordZ"]]
        other = vectors[row["name"], row["coordX"], row["coordY"], row["coordZ"]]
        cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
        assert float(row["similarity"]) == pytest.approx(cosine, abs=1e-5)
