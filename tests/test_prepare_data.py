"""prepare_data.py: what nlst, luna16 and msd make of good and of bad input, and what check says of the result."""

import json
import os
import shutil

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from raw_inputs import (  # noqa: F401
    CAPTURE,
    MR,
    centres,
    contents,
    edited,
    manifest,
    outcomes,
    phantom,
    run,
    scan,
    times,
    write_decathlon,
    write_image,
    write_index,
    write_luna16,
    write_nifti,
    write_series,
    write_table,
    written,
)
from scipy.ndimage import map_coordinates

from dino3d.data.conventions import AIR
from dino3d.data.hdf5 import write_volume
from dino3d.data.layouts import find_crops, find_pairs, read_pair
from dino3d.data.points import Point
from dino3d.data.volume import Volume
from dino3d.prepare import luna16, nlst
from dino3d.prepare.inputs import safe_name

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
POINTS = ["seriesuid", "coordX", "coordY", "coordZ"]


def read(path):
    """(voxels, affine) of a converted file."""
    with Volume(path) as volume:
        return volume.read(), volume.affine


def assert_outcomes(output, expected):
    """expected: {source: (status, what its reason begins with)} of all rows of the manifest."""
    found = outcomes(output)
    assert found.keys() == expected.keys()
    assert all(reason for status, reason in expected.values() if status != "written")
    assert not {
        source: found[source]
        for source, (status, reason) in expected.items()
        if found[source][0] != status or not found[source][1].startswith(reason)
    }


# ---------------------------------------------------------------------------------------------------------------- nlst


def test_a_series_becomes_a_volume(tmp_path, run):
    """The voxels by DICOM's own formulas: rescaled, in RAS, where the scanner saw them."""
    write_series(tmp_path / "input" / "a", edit=edited(RescaleIntercept=-1024))
    result = run("nlst", "--input", tmp_path / "input", "--output", tmp_path / "output")
    assert (result.code, result.errors) == (0, [])
    assert written(tmp_path / "output") == ["P1/t0/1.2.3.1.hdf5"]
    voxels, affine = read(tmp_path / "output" / "P1" / "t0" / "1.2.3.1.hdf5")
    assert voxels.shape == (16, 12, 18) and voxels.dtype == np.int16
    np.testing.assert_allclose(affine[:3, :3], np.diag([1.25, 1.5, 2.0]))
    for column, row, k in ((0, 0, 0), (5, 4, 7), (15, 11, 17), (11, 8, 3)):
        place = [-10.0 + 1.25 * column, -9.0 + 1.5 * row, 2.0 * k, 1]  # LPS mm by PS3.3 C.7.6.2.1.1
        index = np.linalg.solve(affine, LPS @ place)[:3].round(6)
        stored = 1000 - 850 + k if 3 <= row < 9 and 4 <= column < 12 else 1040
        assert voxels[tuple(index.astype(int))] == stored - 1024
    row = manifest(tmp_path / "output")["a#1.2.3.1"]
    assert {name: row[name] for name in row if name not in ("stamp", "bytes", "hu_p1", "hu_p50", "hu_p99")} == {
        "source": "a#1.2.3.1",
        "output": "P1/t0/1.2.3.1.hdf5",
        "patient": "P1",
        "study_date": "20000102",
        "slice_thickness": "2",
        "kernel": "B30f",
        "shape": "16 x 12 x 18",
        "spacing": "1.25 x 1.5 x 2",
        "hu_min": "-874",
        "hu_max": "16",
        "status": "written",
        "reason": "",
    }
    assert int(row["bytes"]) == (tmp_path / "output" / row["output"]).stat().st_size
    assert -874 <= float(row["hu_p1"]) <= float(row["hu_p50"]) <= float(row["hu_p99"]) <= 16


def test_every_format_gives_the_same_volume(tmp_path, run):
    volume, affine, _ = phantom()
    for name in ("a.nii", "b.nii.gz", "c.mha", "d.mhd", "e.nrrd", "f.nhdr", "g.NII.GZ"):
        write_image(tmp_path / "input" / name[0] / name.lower(), scan())
        (tmp_path / "input" / name[0] / name.lower()).rename(tmp_path / "input" / name[0] / name)
    write_volume(tmp_path / "input" / "h" / "h.hdf5", volume, affine)
    result = run("nlst", "--input", tmp_path / "input", "--output", tmp_path / "output")
    assert result.code == 0 and "8 DICOM series and volumes" in result.out and "passed over" not in result.out
    assert written(tmp_path / "output") == [f"{name}/t0/{name}.hdf5" for name in "abcdefgh"]
    for name in written(tmp_path / "output"):
        voxels, its_affine = read(tmp_path / "output" / name)
        np.testing.assert_array_equal(voxels, volume)
        np.testing.assert_allclose(its_affine, affine, atol=1e-4)


def test_the_voxels_of_a_header_are_watched_too(tmp_path, run):
    """A MetaImage whose voxels stand in another file is converted again when that file changes."""
    write_image(tmp_path / "input" / "p" / "a.mhd", scan())
    flags = ["nlst", "--input", tmp_path / "input", "--output", tmp_path / "output"]
    run(*flags)
    before = read(tmp_path / "output" / "p" / "t0" / "a.hdf5")[0]
    raw = tmp_path / "input" / "p" / "a.raw"
    raw.write_bytes((np.frombuffer(raw.read_bytes(), np.int16) + 1).tobytes())
    assert run(*flags).code == 0
    assert (read(tmp_path / "output" / "p" / "t0" / "a.hdf5")[0] == before + 1).all()


@pytest.mark.parametrize(
    "sources, places",
    [
        (["scan.nii.gz"], ["scan/t0/scan"]),
        (["p1/scan.nii.gz", "p2/scan.mha"], ["p1/t0/scan", "p2/t0/scan"]),
        (["p1/a.nii.gz", "p1/b.nii.gz"], ["p1_a/t0/a", "p1_b/t0/b"]),
        (["p1/t2/ct.nii.gz", "p1/T3/x/y.mha"], ["p1/t2/ct", "p1/t3/x_y"]),
        (["nlst/p1/t0/a.hdf5", "nlst/p1/t1/a.hdf5"], ["nlst_p1/t0/a", "nlst_p1/t1/a"]),
        (["t0/ct.nii"], ["ct/t0/ct"]),
    ],
)
def test_where_volume_files_go(sources, places):
    found = nlst.place_scans([nlst.Scan(source, []) for source in sources])
    assert [found[source] for source in sources] == [place + ".hdf5" for place in places]


def test_two_volumes_never_go_to_one_place():
    sources = ["p1/t0/ct.nii.gz", "p1/t0/ct.mha", "p1/t0/a/b.nii", "p1/t0/a_b.nii"]
    found = nlst.place_scans([nlst.Scan(source, []) for source in sources])
    assert len(set(found.values())) == 4
    assert all(place.startswith(("p1/t0/ct-", "p1/t0/a_b-")) for place in found.values())
    assert found == nlst.place_scans([nlst.Scan(source, []) for source in sources[::-1]])


def test_visits_are_counted_by_date(tmp_path, run):
    """Two studies of one date are one visit; those without a date follow, each a visit, in the order of their paths."""
    studies = {
        "late": ("20010203", "9.1"),
        "early": ("19990101", "9.2"),
        "early_too": ("19990101", "9.3"),
        "b_undated": ("", "9.0"),
        "a_undated": ("", "9.9"),
    }
    for i, (folder, (date, study)) in enumerate(studies.items()):
        write_series(tmp_path / "input" / folder, series=f"1.{i}", study=study, date=date)
    write_series(tmp_path / "input" / "other", series="1.9", patient="P2", study="9.4", date="20050101")
    write_series(tmp_path / "input" / "nobody1", series="1.10", patient="", study="9.5", date="20050101")
    write_series(tmp_path / "input" / "nobody2", series="1.11", patient="", study="9.6", date="20060101")
    assert run("nlst", "--input", tmp_path / "input", "--output", tmp_path / "output").code == 0
    assert {source.split("#")[0]: row["output"] for source, row in manifest(tmp_path / "output").items()} == {
        "early": "P1/t0/1.1.hdf5",
        "early_too": "P1/t0/1.2.hdf5",
        "late": "P1/t1/1.0.hdf5",
        "a_undated": "P1/t2/1.4.hdf5",
        "b_undated": "P1/t3/1.3.hdf5",
        "other": "P2/t0/1.9.hdf5",
        "nobody1": "9.5/t0/1.10.hdf5",
        "nobody2": "9.6/t0/1.11.hdf5",
    }


def study_of_six(folder):
    """Series of one study in one folder, best first: by thickness, kernel, number of slices, name."""
    for i, (thickness, kernel, n) in enumerate(
        [(1, "B30f", 20), (1, "B30f", 18), (1, "B31f", 30), (1, "B70f", 20), (2.5, "B10f", 40), (None, "B10f", 40)]
    ):
        write_series(folder, series=f"1.2.{i}", thickness=thickness, kernel=kernel, n=n, prefix=f"{9 - i}_")


@pytest.mark.parametrize("broken", range(4))
def test_one_series_of_each_study_the_next_where_the_best_is_broken(broken, tmp_path, run):
    study_of_six(tmp_path / "input")
    for i in range(broken):
        (tmp_path / "input" / f"{9 - i}_05.dcm").unlink()
    write_series(tmp_path / "input" / "other", series="1.3", study="1.9", thickness=5)
    write_series(tmp_path / "input" / "shared", series="1.4", patient="P2", thickness=0.5)  # a study of P1 too
    write_image(tmp_path / "input" / "v" / "volume.nii.gz", scan())
    flags = ["nlst", "--input", tmp_path / "input", "--one_per_study", "--output"]
    assert run(*flags, tmp_path / "output").code == 0
    assert written(tmp_path / "output") == [
        f"P1/t0/1.2.{broken}.hdf5",
        "P1/t0/1.3.hdf5",
        "P2/t0/1.4.hdf5",
        "v/t0/volume.hdf5",
    ]
    found = outcomes(tmp_path / "output")
    for i in range(6):
        status, reason = found[f".#1.2.{i}"]
        if i < broken:
            assert status == "left out" and reason.startswith("missing slices")
        elif i > broken:
            assert (status, reason) == ("left out", f"another series of the study is preferred: .#1.2.{broken}")
    before = times(tmp_path / "output")
    run(*flags, tmp_path / "output")
    assert times(tmp_path / "output") == before


def test_without_the_flag_all_series_of_a_study_stay(tmp_path, run):
    study_of_six(tmp_path / "input")
    assert run("nlst", "--input", tmp_path / "input", "--output", tmp_path / "output").code == 0
    assert written(tmp_path / "output") == [f"P1/t0/1.2.{i}.hdf5" for i in range(6)]


NAMES = [
    "../../x",
    "..",
    ".",
    "/abs",
    "/",
    ".hidden",
    "a/b",
    "a_b",
    "a\\b",
    "a b",
    "x" * 300,
    "x" * 299 + "y",
    "Müller",
    "肺" * 100,
    "manifest.csv",
    "prepare.json",
    ".prepare",
    "c:\\d",
    "~",
    "$HOME",
    "a\nb",
    "a\0b",
    "-rf",
    "t0",
    "é",
    "CON",
]


def test_names_lead_nowhere_else(tmp_path, run):
    """PatientID and SeriesInstanceUID are what someone typed: each patient has a folder of its own in the output."""
    for i, name in enumerate(NAMES):
        write_series(tmp_path / "top" / "input" / str(i), series=f"1.{i}", patient=name, study=f"2.{i}", n=16)
    for i, series in enumerate(["../../../evil", "/evil", "..", "1/2", "1_2", "x" * 300]):
        write_series(tmp_path / "top" / "input" / f"series{i}", series=series, patient="P1", n=16)
    before = times(tmp_path)
    result = run("nlst", "--input", tmp_path / "top" / "input", "--output", tmp_path / "top" / "output")
    assert (result.code, result.errors) == (0, [])
    assert {path: time for path, time in times(tmp_path).items() if not path.startswith("top/output")} == before
    places = [name.split("/") for name in written(tmp_path / "top" / "output")]
    assert all(len(place) == 3 and place[1] == "t0" and place[2].endswith(".hdf5") for place in places)
    assert len({place[0] for place in places}) == len(NAMES) + 1
    assert len([place for place in places if place[0] == "P1"]) == 6
    rows = manifest(tmp_path / "top" / "output").values()
    folders = {row["patient"]: row["output"].split("/")[0] for row in rows}
    for kept in ("a_b", "t0", "é", "Müller", "CON"):
        assert folders[kept] == kept
    assert not any(folder.startswith(".") for folder in folders.values())
    assert all(("stands as" in row["reason"]) == (row["patient"] != row["output"].split("/")[0]) for row in rows)


@pytest.mark.parametrize("text", [*NAMES, "", " ", "\udcff", "..\udcff", "e\u0301", "\u202e", "a" * 99 + "é", "...-"])
def test_safe_names(text):
    name = safe_name(text, "nobody")
    assert name and not name.startswith(".") and "/" not in name and "\0" not in name
    assert len(os.fsencode(name)) <= 120 and name not in ("manifest.csv", "prepare.json")
    assert name == "nobody" if not text.strip() else name != "nobody"


def bad_scans(folder):
    """Fills a folder with what archives deliver besides CT; returns {source: (status, what its reason begins with)}."""
    write_series(folder / "good")
    write_image(folder / "good_volume" / "a.nii.gz", scan())
    write_series(folder / "two", series="1.1", patient="P2", prefix="a")  # two in one folder
    write_series(folder / "two", series="1.2", patient="P2", study="1.9", date="20010101", prefix="b")
    expected = {
        "good#1.2.3.1": ("written", ""),
        "good_volume/a.nii.gz": ("written", ""),
        "two#1.1": ("written", ""),
        "two#1.2": ("written", ""),
    }

    def placed(at):  # (y, z) of a slice
        return lambda one, i: setattr(one, "ImagePositionPatient", [0, *at(i)])

    def series(name, reason, status="left out", **options):
        write_series(folder / name, series=f"3.{len(expected)}", patient=name, study=f"4.{len(expected)}", **options)
        expected[f"{name}#3.{len(expected)}"] = (status, reason)

    def file(name, content, reason, status="failed"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        expected[name] = (status, reason)

    series("missing", "missing slices: 4 mm between 06.dcm and 08.dcm", edit=lambda one, i: i != 7)
    series("doubled", "doubled slices: 1, such as", edit=placed(lambda i: (0, 2 * max(i, 1))))
    series("uneven", "uneven spacing", edit=placed(lambda i: (0, 2 * i + 0.7 * (i > 8))))
    series("tilted", "tilted gantry", edit=placed(lambda i: (i, 2 * i)))
    series("mixed", "mixed slices", edit=lambda one, i: setattr(one, "PixelSpacing", [1.5 + (i % 2), 1.25]))
    series("short", "too few slices: 15, expected at least 16 (--min_slices)", n=15)
    series("scout", "not a CT image: a scout", n=1, edit=edited(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    series("mr", "not a CT image: modality MR", edit=edited(Modality="MR", SOPClassUID=MR))
    series("capture", "not a CT image: a secondary capture", edit=edited(SOPClassUID=CAPTURE))
    series("colour", "not a CT image: colour", edit=edited(SamplesPerPixel=3))
    series("nowhere", "no geometry", edit=lambda one, i: delattr(one, "ImagePositionPatient"))
    series("cut", "can't be read", "failed")
    (folder / "cut" / "04.dcm").write_bytes((folder / "cut" / "04.dcm").read_bytes()[:-200])
    series("constant", "constant: the same value in all voxels", "failed", edit=edited(PixelData=bytes(384)))
    series("headless", "missing slices: 4 mm")
    content = (folder / "headless" / "03.dcm").read_bytes()
    file("headless/03.dcm", content[:200], "can't be read: ")
    file("empty.dcm", b"", "can't be read: the file is empty")
    file("text.dcm", b"not DICOM at all", "can't be read: ")
    file("empty.nii.gz", b"", "can't be read: the file is empty")
    file("text.nii.gz", b"no volume", "can't be read")
    file("cut.nii.gz", (folder / "good_volume" / "a.nii.gz").read_bytes()[:5000], "can't be read")
    file("nul.mhd", b"NDims = 3\nElementDataFile = a\0b\n", "can't be read")
    header = b"ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_SHORT\nElementDataFile = gone.raw\n"
    file("alone.mhd", header, "can't be read")

    def volume(name, voxels, reason, status="failed", affine=np.eye(4)):
        write_nifti(folder / name, voxels, affine)
        expected[name] = (status, reason)

    noise = np.random.default_rng(0).integers(-1000, 400, (20, 20, 20)).astype(np.float32)
    nan = noise.copy()
    nan[3, 4, 5] = np.nan
    volume("nan.nii.gz", nan, "has voxels that are NaN or infinite")
    volume("time.nii.gz", np.stack([noise] * 2, 3), "is a 4D image")
    volume("flat.nii.gz", noise[:, :, :10], "too few slices: 10", "left out")
    volume("mask.nii.gz", (noise > 0).astype(np.uint8), "a mask, not a CT: 2 whole values from 0 to 1", "left out")
    sheared = sitk.GetImageFromArray(noise.astype(np.int16))
    write_image(folder / "sheared.mha", sheared)
    content = (folder / "sheared.mha").read_bytes().replace(b"Matrix = 1 0 0 0 1 0", b"Matrix = 1 0 0 0.5 1 0")
    file("sheared.mha", content, "has axes that are not at right angles")
    os.symlink("gone", folder / "link.dcm")
    os.symlink("gone", folder / "link.nii.gz")
    expected |= {name: ("failed", "can't be read: No such file or directory") for name in ("link.dcm", "link.nii.gz")}
    for name in ("pipe.dcm", "pipe.nii.gz", "pipe"):
        os.mkfifo(folder / name)
    for name in ("notes.txt", ".hidden.dcm", "._a.nii.gz", "THUMBS.DB"):
        (folder / name).write_text("of no matter")
    return expected


def test_bad_scans_stop_nothing(tmp_path, run):
    expected = bad_scans(tmp_path / "input")
    regular = {path for path in (tmp_path / "input").rglob("*") if path.is_file()}
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in regular}
    result = run("nlst", "--input", tmp_path / "input", "--output", tmp_path / "output")
    failed = sum(status == "failed" for status, _ in expected.values())
    assert result.code == 1 and len(result.errors) == 1
    assert result.errors[0].startswith(f"error: {failed} inputs failed, such as alone.mhd: can't be read")
    assert result.errors[0].endswith(f"the others are in {tmp_path / 'output' / 'manifest.csv'}")
    assert_outcomes(tmp_path / "output", expected)
    assert written(tmp_path / "output") == [
        "P1/t0/1.2.3.1.hdf5",
        "P2/t0/1.1.hdf5",
        "P2/t1/1.2.hdf5",
        "good_volume/t0/a.hdf5",
    ]
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in regular}
    stayed = times(tmp_path / "output")
    again = run("nlst", "--input", tmp_path / "input", "--output", tmp_path / "output")
    assert again.code == 1 and again.errors == result.errors and times(tmp_path / "output") == stayed
    assert run("check", tmp_path / "output").code == 0  # nothing of it is harmful


def test_names_that_are_no_text(tmp_path, run):
    """File names are bytes, some with line breaks: they are converted, and told in a manifest of one line each."""
    folder = os.fsencode(tmp_path / "input")
    write_image(tmp_path / "input" / "a.nii.gz", scan())
    write_image(tmp_path / "input" / "b.hdf5", scan(1))
    try:
        os.rename(os.path.join(folder, b"b.hdf5"), os.path.join(folder, b"\xff\xfe.hdf5"))
        for name in (b"\xff\xfe.nii.gz", b"two\nlines.nii.gz", b'a,"b;.nii.gz', b"=1+1.nii.gz"):
            shutil.copy(os.path.join(folder, b"a.nii.gz"), os.path.join(folder, name))
        write_image(tmp_path / "input" / "c.mha", scan(2))
        os.rename(os.path.join(folder, b"c.mha"), os.path.join(folder, b"\xff\xfe.mha"))
        (tmp_path / "input" / "\udcff.dcm").touch()
    except OSError:
        pytest.skip("this file system takes text only")
    result = run("nlst", "--input", tmp_path / "input", "--output", tmp_path / "output")
    assert result.code == 1 and len(result.errors) == 1 and "\\udcff.dcm" in result.errors[0]
    found = outcomes(tmp_path / "output")
    assert found["\\udcff\\udcfe.mha"] == ("failed", "can't be read: its name is not in UTF-8, rename it")  # by ITK
    for name in (
        "\\udcff\\udcfe.hdf5",
        "\\udcff\\udcfe.nii.gz",
        "two lines.nii.gz",
        'a,"b;.nii.gz',
        "=1+1.nii.gz",
        "a.nii.gz",
    ):
        assert found[name] == ("written", "")
    assert len(written(tmp_path / "output")) == 6
    assert (tmp_path / "output" / "manifest.csv").read_bytes().count(b"\n") == 9
    before = times(tmp_path / "output")
    run("nlst", "--input", tmp_path / "input", "--output", tmp_path / "output")
    assert times(tmp_path / "output") == before


def test_the_manifest_does_not_depend_on_the_language_of_the_system(tmp_path, run, monkeypatch):
    """Written and read as UTF-8, whatever encoding Python would take for text otherwise."""
    write_image(tmp_path / "input" / "Müller" / "肺.nii.gz", scan())
    flags = ["nlst", "--input", tmp_path / "input", "--output", tmp_path / "output"]
    opening = open

    def latin(path, mode="r", *arguments, encoding=None, **options):
        return opening(path, mode, *arguments, encoding=encoding or (None if "b" in mode else "latin-1"), **options)

    monkeypatch.setattr("builtins.open", latin)
    assert run(*flags).code == 0
    before = times(tmp_path / "output")
    assert run(*flags).code == 0 and times(tmp_path / "output") == before
    assert list(manifest(tmp_path / "output")) == ["Müller/肺.nii.gz"]


def test_options_of_nlst(tmp_path, run):
    volume, affine, _ = phantom(0, (64, 56, 30), (8.0, 8.0, 10.0))
    air = np.full((104, 56, 30), -1000, np.int16)
    air[20:84] = volume
    write_nifti(tmp_path / "input" / "p" / "a.nii.gz", air, affine)
    flags = ["nlst", "--input", tmp_path / "input", "--output"]
    assert run(*flags, tmp_path / "1", "--crop_to_body", 16, "--compression", "gzip").code == 0
    found, its_affine = read(tmp_path / "1" / "p" / "t0" / "a.hdf5")
    start = np.rint(np.linalg.solve(affine, its_affine[:, 3])[:3]).astype(int)
    assert found.shape[0] < 90 and start[0] > 10
    np.testing.assert_array_equal(found, air[tuple(slice(a, a + n) for a, n in zip(start, found.shape))])
    image = sitk.ReadImage(str(tmp_path / "1" / "p" / "t0" / "a.hdf5"))  # which ITK itself opens
    assert image.GetSize() == found.shape
    result = run(*flags, tmp_path / "2", "--min_slices", 31)
    assert result.code == 1 and result.errors[0].startswith(
        "error: nothing was written: 1 of 1 inputs for one reason, such as p/a.nii.gz: too few slices: 30"
    )
    assert_outcomes(tmp_path / "2", {"p/a.nii.gz": ("left out", "too few slices: 30, expected at least 31")})


def test_a_folder_without_scans(tmp_path, run):
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "readme.txt").write_text("nothing here")
    result = run("nlst", "--input", tmp_path / "input", "--output", tmp_path / "output")
    assert result.code == 1 and len(result.errors) == 1
    assert f"--input {tmp_path / 'input'}: holds no DICOM" in result.errors[0]


def test_real_dicom_as_simpleitk_reads_it(shared_data, tmp_path, run):
    assert run("nlst", "--input", shared_data / "dicom", "--output", tmp_path / "output").code == 0
    (row,) = manifest(tmp_path / "output").values()
    found, affine = read(tmp_path / "output" / row["output"])
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(shared_data / "dicom" / "lungdx_a0002" / "t0")))
    expected = sitk.GetArrayFromImage(image := reader.Execute()).T[::-1, ::-1]
    np.testing.assert_array_equal(found, np.maximum(expected, AIR))
    corner = image.TransformIndexToPhysicalPoint((image.GetSize()[0] - 1, image.GetSize()[1] - 1, 0))
    np.testing.assert_allclose(affine[:3, 3], np.array(corner) * [-1, -1, 1], atol=1e-3)


# -------------------------------------------------------------------------------------------------------------- luna16


def crops_of(output):
    """{(series, table:line): row} of the written crops."""
    return {
        tuple(source.split("/")[-1].split(".mhd#")): row
        for source, row in manifest(output).items()
        if row["status"] == "written"
    }


@pytest.mark.parametrize("spacing", [(8.0, 8.0, 14.0), (5.0, 6.0, 7.0), (0.0, 0.0, 0.0)])
def test_crops_lie_around_their_points(spacing, tmp_path, run):
    """Centre, spacing, affine and voxels of each crop, against an interpolation of the scan by its own affine."""
    write_luna16(tmp_path / "input", {"1.2.1": "subset0", "1.2.2": "subset3"})
    result = run(
        "luna16",
        "--input",
        tmp_path / "input",
        "--output",
        tmp_path / "output",
        "--size",
        12,
        11,
        6,
        "--spacing",
        *spacing,
    )
    assert (result.code, result.errors) == (0, [])
    crops, problems = find_crops(tmp_path / "output")
    assert not problems and len(crops) == len(written(tmp_path / "output"))
    rows = crops_of(tmp_path / "output")
    for (series, _), row in rows.items():
        subset, label, patient, _ = row["output"].split("/")
        assert subset == {"1.2.1": "subset0", "1.2.2": "subset3"}[series]
        assert (label, patient) == (f"label{row['label']}", series)
        crop = nibabel.load(tmp_path / "output" / row["output"])
        assert crop.shape == (12, 11, 6) and nibabel.aff2axcodes(crop.affine) == ("R", "A", "S")
        volume, affine, _ = phantom({"1.2.1": 0, "1.2.2": 1}[series])
        expected_spacing = spacing if all(spacing) else (8.0, 8.0, 14.0)
        np.testing.assert_allclose(nibabel.affines.voxel_sizes(crop.affine), expected_spacing, rtol=1e-5)
        centre = crop.affine @ [5.5, 5, 2.5, 1] @ LPS
        apart = np.abs(centre[:3] - [float(row[axis]) for axis in "xyz"])
        assert (apart <= (0.02 if all(spacing) else np.array(expected_spacing) / 2 + 0.02)).all()
        grid = np.stack([*np.meshgrid(*map(np.arange, crop.shape), indexing="ij"), np.ones(crop.shape)])
        index = np.einsum("ij,jxyz->ixyz", np.linalg.inv(affine) @ crop.affine, grid)[:3]
        linear = map_coordinates(volume.astype(float), index, order=1, mode="nearest")
        size = np.array(volume.shape).reshape(3, 1, 1, 1)
        inside, outside = ((index > 0) & (index < size - 1)).all(0), ((index < -0.6) | (index > size - 0.4)).any(0)
        voxels = np.asarray(crop.dataobj)
        assert np.abs(voxels - linear)[inside].max() <= (0 if not any(spacing) else 1.5)
        assert (voxels[outside] == AIR).all()
    assert len(rows) == 2 * 6 + len(centres(0)) + len(centres(1))


def test_all_positives_and_some_negatives(tmp_path, run):
    """Drawn once each, by seed and series alone: not by what other scans there are."""
    subsets = {"1.2.1": "subset0", "1.2.2": "subset0", "1.2.3": "subset1"}
    source = write_luna16(tmp_path / "input", subsets, negatives=30)
    flags = ["luna16", "--input", source, "--size", 2, 2, 2, "--spacing", 8, 8, 14]

    def chosen(name, *more):
        assert run(*flags, "--output", tmp_path / name, *more).code == 0
        rows = crops_of(tmp_path / name)
        for seed, series in enumerate(("1.2.1", "1.2.2", "1.2.3")):
            positives = [row for (its, _), row in rows.items() if its == series and row["label"] == "1"]
            assert len(positives) == len(centres(seed)) * (source / subsets[series] / f"{series}.mhd").exists()
        return {key for key, row in rows.items() if row["label"] == "0"}

    five = chosen("five", "--negatives_per_scan", 5)
    assert sorted(series for series, _ in five) == ["1.2.1"] * 5 + ["1.2.2"] * 5 + ["1.2.3"] * 5
    assert five == chosen("again", "--negatives_per_scan", 5)
    assert five != chosen("other", "--negatives_per_scan", 5, "--seed", 1)
    assert len(chosen("default")) == 3 * luna16.NEGATIVES_PER_SCAN == 60
    assert len(chosen("more", "--negatives_per_scan", 31)) == 90
    assert not chosen("none", "--negatives_per_scan", 0)
    shutil.rmtree(source / "subset1")
    assert {key for key in five if key[0] != "1.2.3"} == chosen("fewer", "--negatives_per_scan", 5)
    reason = f"no scan of this series below --input: {30 + len(centres(2))} points"
    assert outcomes(tmp_path / "fewer")["1.2.3"] == ("left out", reason)


def test_which_negatives_are_drawn_hangs_on_the_seed_and_the_scan():
    points = [Point("t", line, (0.0, 0.0, float(line)), line % 20 == 0) for line in range(100)]
    drawn = {
        (seed, series): tuple(one.line for one in luna16.draw_points(points, 5, seed, series))
        for seed in (0, 1)
        for series in ("1.2.3", "1.2.4")
    }
    assert len(set(drawn.values())) == 4 and all(len(lines) == 10 for lines in drawn.values())
    assert drawn[0, "1.2.3"] == tuple(one.line for one in luna16.draw_points(points, 5, 0, "1.2.3"))


def test_a_scan_of_which_no_point_is_drawn_has_its_row(tmp_path, run):
    source = write_luna16(tmp_path / "input", {"1.2.1": "subset0", "1.2.2": "subset0"}, annotated=False)
    rows = [("1.2.1", 0, 0, 0, 1), ("1.2.2", 0, 0, 0, 0), ("1.2.2", 9, 9, 9, 0)]
    write_table(source / "candidates_V2.csv", [*POINTS, "class"], rows)
    flags = ["luna16", "--input", source, "--output", tmp_path / "output", "--negatives_per_scan", 0, "--size", 8, 8, 8]
    assert run(*flags).code == 0
    assert_outcomes(
        tmp_path / "output",
        {
            "subset0/1.2.1.mhd#candidates_V2:2": ("written", ""),
            "subset0/1.2.2.mhd": ("left out", "no points: all 2 are of label 0"),
        },
    )
    before = times(tmp_path / "output")
    assert run(*flags).code == 0 and times(tmp_path / "output") == before


def test_a_candidate_that_stands_twice_is_cropped_once(tmp_path, run, monkeypatch):
    """The crops of the table without the repeats, which are counted; an output that an older version began goes on."""
    source = write_luna16(tmp_path / "input", {"1.2.1": "subset0"}, negatives=4, annotated=False)
    flags = ["luna16", "--input", source, "--size", 4, 4, 4, "--spacing", 8, 8, 14, "--negatives_per_scan", 3]
    result = run(*flags, "--output", tmp_path / "once")
    assert result.code == 0 and "repeat" not in result.out
    table = source / "candidates_V2.csv"
    header, *lines = table.read_text().splitlines()
    table.write_text("\n".join([header, *lines, lines[0], *lines[-4:]]) + "\n")
    with monkeypatch.context() as patch:
        patch.setattr(luna16, "unique_places", lambda points: points)
        assert run(*flags, "--output", tmp_path / "older").code == 0
    assert len(written(tmp_path / "older")) == len(centres(0)) + 1 + 3
    for name in ("twice", "older"):
        result = run(*flags, "--output", tmp_path / name)
        assert result.code == 0 and "note: 5 points repeat an earlier one of their table and are left out" in result.out
    once, twice, older = (contents(tmp_path / name) for name in ("once", "twice", "older"))
    images = [name for name in once if name.endswith(".nii.gz")]
    assert {name: twice[name] for name in twice if name.endswith(".nii.gz")} == {name: once[name] for name in images}
    assert all(older[name] == once[name] for name in images)


def test_annotations_without_a_candidate_are_added(tmp_path, run):
    """A nodule whose candidates all lie outside it; the others' diameters are told."""
    source = write_luna16(tmp_path / "input", {"1.2.1": "subset0"}, negatives=0)
    near, *others = centres(0)
    far = (near[0] + 5, *near[1:])  # the nodule's radius is 4.75 mm
    write_table(source / "candidates_V2.csv", [*POINTS, "class"], [("1.2.1", *place, 1) for place in (far, *others)])
    result = run("luna16", "--input", source, "--output", tmp_path / "output", "--size", 8, 8, 8)
    assert result.code == 0
    rows = crops_of(tmp_path / "output")
    added = rows["1.2.1", "annotations:2"]
    assert [float(added[axis]) for axis in "xyz"] == list(near)
    assert (added["label"], added["diameter_mm"]) == ("1", "9.5")
    assert len(rows) == len(others) + 2
    assert {line: row["diameter_mm"] for (_, line), row in rows.items()} == {
        "annotations:2": "9.5",
        "candidates_V2:2": "",
        **{f"candidates_V2:{3 + i}": "9.5" for i in range(len(others))},
    }


def test_tables_are_found_and_missed(tmp_path, run):
    source = write_luna16(tmp_path / "input", {"1.2.1": "subset0"})
    flags = ["luna16", "--input", source, "--size", 8, 8, 8, "--output"]
    assert run(*flags, tmp_path / "V2").code == 0
    (source / "candidates_V2.csv").rename(source / "candidates.csv")
    assert run(*flags, tmp_path / "first").code == 0
    found = [name.replace("candidates_V2", "candidates") for name in written(tmp_path / "V2")]
    assert found == written(tmp_path / "first")
    (source / "CSVFILES").mkdir()
    for name in ("candidates.csv", "annotations.csv"):
        (source / name).rename(source / "CSVFILES" / name)
    assert run(*flags, tmp_path / "below").code == 0
    assert written(tmp_path / "below") == written(tmp_path / "first")
    (source / "CSVFILES" / "annotations.csv").unlink()
    result = run(*flags, tmp_path / "plain")
    assert result.code == 0 and "note: no annotations.csv" in result.out
    (source / "CSVFILES" / "candidates.csv").unlink()
    result = run(*flags, tmp_path / "without")
    assert result.code == 1 and len(result.errors) == 1
    assert "neither candidates_V2.csv nor candidates.csv" in result.errors[0]


@pytest.mark.parametrize("below", ["", "LUNA16"])
def test_masks_of_the_same_names_are_no_scans(below, tmp_path, run):
    source = write_luna16(tmp_path / "input" / below, {"1.2.1": "subset0", "1.2.2": "subset1"})
    (tmp_path / "input" / "evaluation").mkdir()
    for series in ("1.2.1", "1.2.2"):
        write_image(tmp_path / "input" / "seg-lungs-LUNA16" / f"{series}.mhd", sitk.Image(4, 4, 4, sitk.sitkUInt8))
        write_image(source / "seg-lungs-LUNA16" / f"{series}.zraw.mhd", sitk.Image(4, 4, 4, sitk.sitkUInt8))
    assert run("luna16", "--input", tmp_path / "input", "--output", tmp_path / "output", "--size", 8, 8, 8).code == 0
    assert {row["output"].split("/")[0] for row in crops_of(tmp_path / "output").values()} == {"subset0", "subset1"}


def test_scans_without_subsets_are_all_in_subset0(tmp_path, run):
    table = write_table(tmp_path / "p.csv", [*POINTS, "class"], [("a", 0, 0, 0, 1), ("b", 0, 0, 0, 0)])
    write_image(tmp_path / "input" / "a.nii.gz", scan(0))
    write_image(tmp_path / "input" / "more" / "b.nrrd", scan(1))
    assert run("luna16", "--input", tmp_path / "input", "--output", tmp_path / "output", "--table", table).code == 0
    assert written(tmp_path / "output") == ["subset0/label0/b/p_000003.nii.gz", "subset0/label1/a/p_000002.nii.gz"]


def test_patients_with_several_scans_stay_in_one_subset(tmp_path, run):
    subsets = {"1.2.1": "subset3", "1.2.2": "subset0", "1.2.3": "subset1", "1.2.4": "subset2"}
    source = write_luna16(tmp_path / "input", subsets, positives=1, negatives=1)
    rows = [("1.2.2", 60, "../../Bob"), ("1.2.1", 60, "../../Bob"), ("1.2.3", 61, "Ann"), ("unknown", 1, "Eve")]
    table = write_table(tmp_path / "who.csv", ["seriesuid", "age", "patient"], rows)
    flags = ["luna16", "--input", source, "--size", 8, 8, 8, "--patients", table, "--output"]
    before = set(times(tmp_path))
    assert run(*flags, tmp_path / "output").code == 1
    rows = manifest(tmp_path / "output")
    assert (rows["subset2/1.2.4.mhd"]["status"], rows["subset2/1.2.4.mhd"]["reason"]) == (
        "failed",
        f"no patient: {table} does not name this series",
    )
    found = {row["output"].split("/")[0]: row["output"].split("/")[2] for row in rows.values() if row["output"]}
    bob = safe_name("../../Bob", "")
    assert found == {"subset3": bob, "subset1": "Ann"} and len(written(tmp_path / "output")) == 6
    assert {name for name in times(tmp_path) if not name.startswith("output")} == before

    write_table(table, ["seriesuid", "patient"], [("1.2.1", "Bob"), ("1.2.1", "Ann")])
    result = run(*flags, tmp_path / "output2")
    assert result.code == 1 and len(result.errors) == 1
    assert "line 3 names patient Ann for series 1.2.1" in result.errors[0]
    write_table(table, ["series", "patient"], [("1.2.1", "Bob")])
    result = run(*flags, tmp_path / "output2")
    assert result.code == 1 and f"{table}: has no column seriesuid, only series, patient" in result.errors[0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("separator", [",", ";"])
def test_a_table_of_ones_own(separator, encoding, tmp_path, run):
    source = write_luna16(tmp_path / "input", {"1.2.1": "subset0"})
    labels = ["0", "1", "2", "3", "4", "2.0", " 3 ", "", "text", "1.5", "-1", "1e300", "nan", "inf", "1000"]
    rows = [("1.2.1", " 1.5", "-2", "3e0", label, "Ünicode") for label in labels]
    points = [("", 0, 0), ("x", 0, 0), ("nan", 0, 0), (0, "inf", 0), (0, 0, 5000), (0, 0, 1e300)]
    rows += [("1.2.1", *point, 1, "") for point in points]
    rows += [("../../evil", 0, 0, 0, 1, ""), ("", 0, 0, 0, 1, "")]
    table = write_table(tmp_path / "my table.csv", [*POINTS, "malignancy", "note"], rows, separator, encoding)
    before = set(times(tmp_path))
    result = run(
        "luna16",
        "--input",
        source,
        "--output",
        tmp_path / "output",
        "--table",
        table,
        "--label_column",
        "malignancy",
        "--size",
        8,
        8,
        8,
    )
    name = safe_name("my table", "")
    at = f"subset0/1.2.1.mhd#{name}:"
    assert_outcomes(
        tmp_path / "output",
        {
            **{f"{at}{2 + i}": ("written", "") for i in range(8)},
            **{
                f"{at}{10 + i}": (
                    "failed",
                    f"not a label: malignancy is '{label}', expected a whole number from 0 to 999",
                )
                for i, label in enumerate(labels[8:])
            },
            **{f"{at}{17 + i}": ("failed", "not a point: ") for i in range(4)},
            **{f"{at}{21 + i}": ("failed", "outside the scan: ") for i in range(2)},
            "../../evil": ("left out", "no scan of this series below --input: 1 points"),
            "": ("left out", "no scan of this series below --input: 1 points"),
        },
    )
    assert result.code == 1 and len(result.errors) == 1
    assert result.errors[0].startswith("error: 13 inputs failed, such as ")
    assert written(tmp_path / "output") == [
        *(
            f"subset0/label{label}/1.2.1/{name}_{line:06d}.nii.gz"
            for label, line in ((0, 2), (1, 3), (2, 4), (2, 7), (3, 5), (3, 8), (4, 6))
        ),
        f"subset0/unlabelled/1.2.1/{name}_000009.nii.gz",
    ]
    assert f"note: 1 points of {table} have no label" in result.out
    assert {name for name in times(tmp_path) if not name.startswith("output")} == before


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "has no column seriesuid, only nothing"),
        (b"seriesuid,coordX,coordY,class\n", "has no column coordZ, only seriesuid"),
        (b"seriesuid,coordX,coordY,coordZ,class,CLASS,Class\n1,2,3,4,5,6,7\n", None),
        (b"seriesuid,coordX,coordY,coordZ,CLASS,Class\n1,2,3,4,5,6\n", "has 2 columns class, expected one"),
        (b"seriesuid,coordX,coordY,coordZ,class\n1,2,5,3,4,1\n", "line 2 has more cells than the header (5)"),
        (b'seriesuid,coordX,coordY,coordZ,class\n1,"2,5",3.5,4,1\n', "has 2,5 in line 2 and 3.5 in line 2"),
        (b"seriesuid;coordX;coordY;coordZ;class\n1;1.234,5;3;4;1\n", "has 1.234,5 in line 2 and 1.234,5 in line 2"),
        (b"\xff\xfes\0e\0", "can't be read as a table"),
        (b"caf\xe9,seriesuid\n", "can't be read as a table"),
        (b"PK\x03\x04\x14\0\x06\0\x08\0\0\0", "has no column seriesuid"),
        (None, "No such file or directory"),
    ],
)
def test_a_table_that_is_none_is_named(content, reason, tmp_path, run):
    source = write_luna16(tmp_path / "input", {"1.2.1": "subset0"})
    if content is not None:
        (tmp_path / "table.csv").write_bytes(content)
    result = run("luna16", "--input", source, "--output", tmp_path / "output", "--table", tmp_path / "table.csv")
    assert result.code == 1 and len(result.errors) == 1
    start = f"error: {tmp_path / 'table.csv'}: {reason}" if reason else "error: nothing was written: "
    assert result.errors[0].startswith(start)


def test_a_table_of_another_country(tmp_path, run):
    """Semicolons, decimal commas, a byte order mark, headers in other case: the same crops, and a note."""
    source = write_luna16(tmp_path / "input", {"1.2.1": "subset0"}, positives=2, negatives=2, annotated=False)
    flags = ["luna16", "--input", source, "--size", 8, 8, 8, "--output"]
    assert run(*flags, tmp_path / "plain").code == 0
    rows = [line.split(",") for line in (source / "candidates_V2.csv").read_text().splitlines()[1:]]
    rows = [(row[0], *(cell.replace(".", ",") for cell in row[1:4]), row[4]) for row in rows]
    header = ["SeriesUID", "coordx", "CoordY", " COORDZ", "Class"]
    for separator, encoding in ((";", "utf-8-sig"), ("\t", "utf-8"), (",", "utf-8")):  # the last one in quotes
        write_table(source / "candidates_V2.csv", header, rows, separator, encoding)
        output = tmp_path / f"other{ord(separator)}"
        result = run(*flags, output)
        assert result.code == 0 and "its numbers have decimal commas, such as " in result.out
        assert contents(output) == contents(tmp_path / "plain")


def test_points_without_a_label_are_cropped_for_prediction(tmp_path, run):
    source = write_luna16(tmp_path / "input", {"1.2.1": "subset0"})
    table = write_table(tmp_path / "new.csv", [*POINTS, "note"], [("1.2.1", 0, 0, 0, "a"), ("1.2.1", 9, 9, 9, "b")])
    flags = ["luna16", "--input", source, "--output", tmp_path / "output", "--table", table, "--size", 8, 8, 8]
    result = run(*flags)
    assert result.code == 0 and f"2 points of {table} have no label (it has no column class)" in result.out
    assert written(tmp_path / "output") == [f"subset0/unlabelled/1.2.1/new_{i:06d}.nii.gz" for i in (2, 3)]
    assert {row["label"] for row in manifest(tmp_path / "output").values()} == {""}
    _, problems = find_crops(tmp_path / "output")
    assert [problem.reason.split(":")[0] for problem in problems] == ["holds no crops"]
    write_nifti(tmp_path / "output" / "subset0/label0/p0/a.nii.gz", noise(), np.eye(4))
    write_nifti(tmp_path / "output" / "subset0/label1/p1/a.nii.gz", noise(), np.eye(4))
    crops, problems = find_crops(tmp_path / "output")
    assert len(crops) == 2 and not problems
    result = run("check", tmp_path / "output")
    assert result.code == 0 and "2 crops in unlabelled folders are for --predict" in result.out
    result = run(*flags[:4], tmp_path / "other", *flags[5:], "--label_column", "malignancy")
    assert result.code == 1 and f"{table}: has no column malignancy" in result.errors[0]  # asked for: a mistake


def test_scans_are_dicom_series_and_converted_files_too(tmp_path, run):
    """All three forms of a scan give the crops of the volume, for the patient that the form tells."""
    write_series(tmp_path / "dicom" / "any", series="1.2.3.1", patient="Ann", n=20)
    table = write_table(tmp_path / "t.csv", [*POINTS, "class"], [("1.2.3.1", 0, 0, 20, 1)])
    assert run("nlst", "--input", tmp_path / "dicom", "--output", tmp_path / "hdf5").code == 0
    with Volume(tmp_path / "hdf5/Ann/t0/1.2.3.1.hdf5") as volume:
        write_nifti(tmp_path / "nifti" / "1.2.3.1.nii.gz", volume.read(), volume.affine)
    (tmp_path / "hashed/Ann/t0").mkdir(parents=True)
    shutil.copy(tmp_path / "hdf5/Ann/t0/1.2.3.1.hdf5", tmp_path / "hashed/Ann/t0/1.2.3.1-0123abcd.hdf5")
    found = {}
    for form, patient in (("dicom", "Ann"), ("hdf5", "Ann"), ("hashed", "Ann"), ("nifti", "1.2.3.1")):
        output = tmp_path / f"crops_{form}"
        result = run("luna16", "--input", tmp_path / form, "--output", output, "--table", table, "--size", 8, 8, 8)
        assert result.code == 0, result
        (name,) = written(output)
        assert name == f"subset0/label1/{patient}/t_000002.nii.gz"
        found[form] = nibabel.load(output / name)
    for form, crop in found.items():
        np.testing.assert_array_equal(crop.dataobj, found["nifti"].dataobj)
        np.testing.assert_allclose(crop.affine, found["nifti"].affine, atol=1e-4)


def test_series_of_fewer_images_than_the_download_should_have_are_told(tmp_path, run):
    """By the metadata.csv of TCIA's downloader, since a stack without its end is even."""
    source = tmp_path / "input" / "manifest-1"
    for k in range(3):
        write_series(source / "NLST" / f"P{k}" / "1.000000-0OPAGELS", series=f"1.2.3.{k}", patient=f"P{k}", n=20)
    for i in range(17, 20):
        (source / "NLST" / "P1" / "1.000000-0OPAGELS" / f"{i}.dcm").unlink()
    header = ["Series UID", "Collection", "Subject ID", "Number of Images", "File Location"]
    rows = [(f"1.2.3.{k}", "NLST", f"P{k}", 20, f"./NLST/P{k}") for k in range(2)]
    flags = ["nlst", "--input", source.parent, "--output", tmp_path / "output"]
    assert "incomplete" not in run(*flags).out
    write_table(source / "metadata.csv", header, [*rows, ("1.2.3.9", "NLST", "P9", 7, ".")])  # fetched later
    write_table(source.parent / "metadata.csv", ["name", "value"], [("another", "table")])
    told = "metadata.csv has 20 images of this series, of which 17 are here"
    for _ in range(2):
        result = run(*flags)
        name = "manifest-1/NLST/P1/1.000000-0OPAGELS#1.2.3.1"
        assert result.code == 0 and f"warning: 1 series are incomplete, such as {name}: {told}" in result.out
        reasons = {source[-1]: reason for source, (_, reason) in outcomes(tmp_path / "output").items()}
        assert reasons == {"0": "", "1": f"note: {told}", "2": ""}
    table = write_table(tmp_path / "t.csv", [*POINTS, "class"], [("1.2.3.1", 0, 0, 20, 1)])
    flags = ["luna16", "--input", source.parent, "--output", tmp_path / "crops", "--table", table, "--size", 8, 8, 8]
    assert told in run(*flags).out
    write_series(source / "NLST" / "P1" / "1.000000-0OPAGELS", series="1.2.3.1", patient="P1", n=20)
    result = run("nlst", "--input", source.parent, "--output", tmp_path / "output")
    assert (
        result.code == 0 and "incomplete" not in result.out and "1 files of earlier runs were made anew" in result.out
    )
    assert outcomes(tmp_path / "output")[name] == ("written", "")


def test_scans_and_cases_that_are_no_ct_in_hu_are_left_out(tmp_path, run):
    source = write_luna16(tmp_path / "input", {f"1.2.{i}": "subset0" for i in range(3)}, positives=1, negatives=1)
    stored = sitk.ReadImage(str(source / "subset0" / "1.2.1.mhd"))
    sitk.WriteImage(stored + 1024, str(source / "subset0" / "1.2.1.mhd"))
    result = run("luna16", "--input", source, "--output", tmp_path / "crops", "--size", 8, 8, 8)
    assert result.code == 0 and "left out      2  not in HU, such as subset0/1.2.1.mhd#" in result.out
    assert {name.split("/")[2] for name in written(tmp_path / "crops")} == {"1.2.0", "1.2.2"}
    task = write_decathlon(tmp_path / "task", ["a", "b"])
    image = nibabel.load(task / "imagesTr" / "b.nii.gz")
    write_nifti(task / "imagesTr" / "b.nii.gz", (image.get_fdata() + 1024).astype(np.uint16), image.affine)
    result = run("msd", "--input", task, "--output", tmp_path / "cases")
    assert result.code == 0 and "left out      2  not in HU, such as imagesTr/b.nii.gz" in result.out
    assert written(tmp_path / "cases") == ["images/a.nii.gz", "labels/a.nii.gz"]
    for path in (task / "dataset.json", task / "imagesTr" / "a.nii.gz", task / "labelsTr" / "a.nii.gz"):
        path.unlink()
    result = run("msd", "--input", task, "--output", tmp_path / "none")
    assert result.code == 1 and result.errors[0].startswith("error: nothing was written: 2 of 2 inputs for one reason")


def test_scans_that_cannot_be_cropped_stop_nothing(tmp_path, run):
    subsets = {f"1.2.{i}": f"subset{i}" for i in range(6)}
    source = write_luna16(tmp_path / "input", subsets, positives=1, negatives=1, annotated=False)
    (source / "subset1" / "1.2.1.raw").unlink()
    (source / "subset2" / "1.2.2.mhd").write_bytes(b"")
    write_image(source / "subset3" / "1.2.3.nii.gz", scan(3))  # and so two of this series
    write_image(source / "subset4" / "1.2.9.mhd", scan(4))  # which the table does not know
    lines = (source / "candidates_V2.csv").read_text().splitlines()
    (source / "candidates_V2.csv").write_text("\n".join(lines + ["1.2.5,9000,0,0,1", "1.2.77,0,0,0,1"]))
    before = times(source)
    result = run("luna16", "--input", source, "--output", tmp_path / "output", "--size", 8, 8, 8)
    assert result.code == 1 and len(result.errors) == 1

    def at(i, suffix=".mhd"):
        return [f"subset{i}/1.2.{i}{suffix}#candidates_V2:{2 * i + 2 + k}" for k in range(2)]

    assert_outcomes(
        tmp_path / "output",
        {
            **dict.fromkeys([*at(0), *at(4), *at(5)], ("written", "")),
            **dict.fromkeys([*at(1), *at(2)], ("failed", "can't be read")),
            "subset3/1.2.3.mhd": ("failed", "two scans of one series: subset3/1.2.3.mhd and subset3/1.2.3.nii.gz"),
            "subset4/1.2.9.mhd": ("left out", "no points: the table names none in this scan"),
            "subset5/1.2.5.mhd#candidates_V2:14": ("failed", "outside the scan: 9000 x 0 x 0 mm (LPS)"),
            "1.2.77": ("left out", "no scan of this series below --input: 1 points"),
        },
    )
    assert len(written(tmp_path / "output")) == 6 and times(source) == before


def test_annotations_without_numbers_are_named(tmp_path, run):
    source = write_luna16(tmp_path / "input", {"1.2.1": "subset0"})
    for bad in ("", "nan", "large"):
        rows = [("1.2.1", 0, 0, 0, 5), ("1.2.1", 0, 0, 0, bad)]
        write_table(source / "annotations.csv", [*POINTS, "diameter_mm"], rows)
        result = run("luna16", "--input", source, "--output", tmp_path / "output")
        assert result.code == 1 and f"{source / 'annotations.csv'}: line 3 has no numbers" in result.errors[0]


def test_subset_folders_with_odd_names(tmp_path, run):
    source = write_luna16(tmp_path / "input", {"1.2.1": "subset ü/more", "1.2.2": "subset0"}, positives=1, negatives=1)
    assert run("luna16", "--input", source, "--output", tmp_path / "output", "--size", 8, 8, 8).code == 0
    assert {name.split("/")[0] for name in written(tmp_path / "output")} == {"subset0", safe_name("subset ü", "")}
    assert not find_crops(tmp_path / "output")[1]


def test_real_nodules_stand_in_the_middle_of_their_crops(shared_data, tmp_path, run):
    """LUNA16's own files: nodules are denser than lung at the centre; nothing to refuse."""
    source = shared_data / "luna16"
    assert (
        run(
            "luna16",
            "--input",
            source,
            "--output",
            tmp_path / "output",
            "--negatives_per_scan",
            5,
            "--size",
            33,
            33,
            17,
            "--spacing",
            1,
            1,
            2,
        ).code
        == 0
    )
    rows = crops_of(tmp_path / "output").values()
    assert sorted(row["label"] for row in rows) == ["0"] * 10 + ["1"] * 4
    for row in rows:
        crop = nibabel.load(tmp_path / "output" / row["output"])
        place = crop.affine @ [16, 16, 8, 1] @ LPS
        np.testing.assert_allclose(place[:3], [float(row[axis]) for axis in "xyz"], atol=0.01)
        if row["label"] == "1":
            assert np.asarray(crop.dataobj)[15:18, 15:18, 8].mean() > -500
    assert run("check", tmp_path / "output").code == 0


# ----------------------------------------------------------------------------------------------------------------- msd


def test_cases_keep_their_names_and_voxels(tmp_path, run):
    write_decathlon(tmp_path / "input", ["lung_001", "lung_002"])
    for kind in ("imagesTr", "labelsTr", "imagesTs"):
        (tmp_path / "input" / kind).mkdir(exist_ok=True)
        (tmp_path / "input" / kind / "._lung_001.nii.gz").write_bytes(b"what macOS leaves")
    before = contents(tmp_path / "input")
    result = run("msd", "--input", tmp_path / "input", "--output", tmp_path / "output")
    assert (result.code, result.errors) == (0, [])
    assert written(tmp_path / "output") == [
        f"{kind}/lung_00{i}.nii.gz" for kind in ("images", "labels") for i in (1, 2)
    ]
    assert contents(tmp_path / "input") == before
    pairs, problems = find_pairs(tmp_path / "output")
    assert not problems
    for seed, pair in enumerate(pairs):
        volume, affine, nodules = phantom(seed)
        image, label, its_affine = read_pair(pair)
        np.testing.assert_array_equal(image, volume)
        np.testing.assert_array_equal(label, nodules > 0)
        np.testing.assert_allclose(its_affine, affine, atol=1e-4)
    row = manifest(tmp_path / "output")["labelsTr/lung_001.nii.gz"]
    millilitres = (phantom(0)[2] > 0).sum() * 8 * 8 * 14 / 1000
    assert row["labels"] == "0 1" and float(row["millilitres"]) == pytest.approx(millilitres, rel=0.01)


def bad_cases(folder):
    """Fills a Decathlon task with good and bad cases; returns {source: (status, reason's beginning)}."""
    volume, affine, nodules = phantom()
    label = (nodules > 0).astype(np.uint8)
    moved = affine.copy()
    moved[:3, 3] += [0, 0, 9]
    nan = volume.astype(np.float32)
    nan[1, 2, 3] = np.nan
    nan_label = np.where(label, np.nan, 0).astype(np.float32)
    cases = {
        "good": (volume, label, affine, ("written", "")),
        "float": (volume, label.astype(np.float32), affine, ("written", "")),
        "empty": (volume, label * 0, affine, ("written", "")),
        "shape": (volume, label[:-1], affine, ("failed", "has another shape")),
        "moved": (volume, label, moved, ("failed", "lies elsewhere than its image")),
        "value": (volume, label * 2, affine, ("failed", "has label values such as 2, expected only 0, 1")),
        "half": (volume, label * np.float32(0.5), affine, ("failed", "has label values such as 0.5")),
        "minus": (volume, -label.astype(np.int16), affine, ("failed", "has label values such as -1")),
        "nan": (nan, label, affine, ("failed", "has voxels that are NaN")),
        "nan_label": (volume, nan_label, affine, ("failed", "has label values such as nan")),
        "time": (np.stack([volume] * 2, 3), label, affine, ("failed", "is a 4D image")),
    }
    expected = {}
    for name, (image, its_label, its_affine, outcome) in cases.items():
        write_nifti(folder / "imagesTr" / f"{name}.nii.gz", image, affine)
        write_nifti(folder / "labelsTr" / f"{name}.nii.gz", its_label, its_affine)
        expected |= dict.fromkeys([f"imagesTr/{name}.nii.gz", f"labelsTr/{name}.nii.gz"], outcome)
    expected["labelsTr/empty.nii.gz"] = ("written", "note: no voxel is labelled")
    whole = (folder / "imagesTr" / "good.nii.gz").read_bytes()
    for name, content in (("cut", whole[: len(whole) // 2]), ("zero", b""), ("text", b"text")):
        shutil.copy(folder / "labelsTr" / "good.nii.gz", folder / "labelsTr" / f"{name}.nii.gz")
        (folder / "imagesTr" / f"{name}.nii.gz").write_bytes(content)
        expected |= dict.fromkeys([f"imagesTr/{name}.nii.gz", f"labelsTr/{name}.nii.gz"], ("failed", "can't be read"))
    for kind, other in (("images", "label"), ("labels", "image")):
        shutil.copy(folder / f"{kind}Tr" / "good.nii.gz", folder / f"{kind}Tr" / f"no_{other}.nii.gz")
        expected[f"{kind}Tr/no_{other}.nii.gz"] = ("failed", f"no {other}: for this {kind[:-1]}")
        (folder / f"{kind}Tr" / "._good.nii.gz").write_bytes(b"what macOS leaves")
    write_index(folder, ["good", "shape", "listed"])
    expected |= dict.fromkeys([f"{kind}Tr/listed.nii.gz" for kind in ("images", "labels")], ("failed", "can't be read"))
    return expected


def test_bad_cases_stop_nothing(tmp_path, run):
    expected = bad_cases(tmp_path / "input")
    before = times(tmp_path / "input")
    result = run("msd", "--input", tmp_path / "input", "--output", tmp_path / "output")
    failed = sum(status == "failed" for status, _ in expected.values())
    assert result.code == 1 and len(result.errors) == 1
    assert result.errors[0].startswith(f"error: {failed} inputs failed, such as ")
    assert_outcomes(tmp_path / "output", expected)
    assert written(tmp_path / "output") == [
        f"{kind}/{name}.nii.gz" for kind in ("images", "labels") for name in ("empty", "float", "good")
    ]
    assert times(tmp_path / "input") == before
    assert run("check", tmp_path / "output").code == 0


def test_a_label_stored_in_another_orientation_is_on_the_same_grid(tmp_path, run):
    volume, affine, nodules = phantom()
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = volume.shape[0] - 1
    write_nifti(tmp_path / "input" / "imagesTr" / "a.nii.gz", volume, affine)
    flipped = np.ascontiguousarray((nodules > 0)[::-1]).astype(np.uint8)
    write_nifti(tmp_path / "input" / "labelsTr" / "a.nii.gz", flipped, affine @ flip)
    assert run("msd", "--input", tmp_path / "input", "--output", tmp_path / "output").code == 0
    (pair,) = find_pairs(tmp_path / "output")[0]
    np.testing.assert_array_equal(read_pair(pair)[1], nodules > 0)


def test_without_an_index_folders_tell_what_belongs_together(tmp_path, run):
    source = write_decathlon(tmp_path / "input", ["a", "b"], index=False)
    volume, affine, nodules = phantom(2)
    write_nifti(source / "imagesTr" / "c.nii.gz", volume, affine)
    write_nifti(source / "labelsTr" / "c.nii.gz", nodules, affine)  # of any classes
    result = run("msd", "--input", source, "--output", tmp_path / "output")
    assert result.code == 0 and "3 cases" in result.out and "imagesTr and labelsTr without a dataset.json" in result.out
    assert manifest(tmp_path / "output")["labelsTr/c.nii.gz"]["labels"] == " ".join(map(str, np.unique(nodules)))


def test_no_case_is_lost_for_its_name(tmp_path, run):
    """Labels with other names than their images, as the index pairs them; images of one name."""
    source = write_decathlon(tmp_path / "input", ["a", "b", "c"], index=False)
    (source / "imagesTr" / "a.nii.gz").rename(source / "imagesTr" / "a_0000.nii.gz")
    (source / "more").mkdir()
    shutil.copy(source / "imagesTr" / "b.nii.gz", source / "more" / "b.nii.gz")
    shutil.copy(source / "labelsTr" / "b.nii.gz", source / "more" / "b_label.nii.gz")
    shutil.copy(source / "imagesTr" / "b.nii.gz", source / "imagesTr" / "b.nii")
    cases = [("imagesTr/a_0000", "labelsTr/a"), ("imagesTr/b", "labelsTr/b"), ("more/b", "more/b_label")]
    (source / "dataset.json").write_text(
        json.dumps(
            {
                "labels": {"0": "", "1": ""},
                "training": [{"image": f"{image}.nii.gz", "label": f"{label}.nii.gz"} for image, label in cases],
            }
        )
    )
    assert run("msd", "--input", source, "--output", tmp_path / "output").code == 1
    assert_outcomes(
        tmp_path / "output",
        {
            **{f"{path}.nii.gz": ("written", "") for case in [*cases, ("imagesTr/c", "labelsTr/c")] for path in case},
            "imagesTr/b.nii": ("failed", "no label: for this image"),
        },
    )
    assert len(written(tmp_path / "output")) == 8 and not find_pairs(tmp_path / "output")[1]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "7",
        "null",
        "{}",
        '{"labels": 5, "training": []}',
        '{"labels": {"zero": "a"}, "training": []}',
        '{"labels": {"0": "a"}, "training": ["a"]}',
        '{"labels": {"0": "a"}, "training": [{"image": "a"}]}',
        '{"labels": {"0": "a"}, "training": [{"image": 1, "label": 2}]}',
        "\udcff",
    ],
)
def test_a_broken_index_is_named(content, tmp_path, run):
    source = write_decathlon(tmp_path / "input", ["a"])
    (source / "dataset.json").write_text(content, errors="surrogateescape")
    result = run("msd", "--input", source, "--output", tmp_path / "output")
    assert result.code == 1 and len(result.errors) == 1
    assert result.errors[0].startswith(f"error: {source / 'dataset.json'}: can't be read as a Decathlon's dataset.json")


def test_a_folder_that_is_no_task(tmp_path, run):
    (tmp_path / "input").mkdir()
    result = run("msd", "--input", tmp_path / "input", "--output", tmp_path / "output")
    assert result.code == 1 and "holds no cases: expected images/" in result.errors[0]
    write_decathlon(tmp_path / "input", [])
    result = run("msd", "--input", tmp_path / "input", "--output", tmp_path / "output")
    assert result.code == 1 and len(result.errors) == 1 and "holds no cases" in result.errors[0]


def test_an_index_that_names_files_elsewhere(tmp_path, run):
    """Names lead into images/ and labels/ whatever the index says; what it says is read, not written."""
    source = write_decathlon(tmp_path / "input", ["a"], index=False)
    names = ["../outside/b", "../outside/.", "imagesTr/gone", "/abs/c", "a\0b", "\ud800"]
    cases = [{"image": f"{name}.nii.gz", "label": f"./labelsTr/{i}.nii.gz"} for i, name in enumerate(names)]
    for image, label in (("b", 0), (".", 1)):
        write_nifti(tmp_path / "outside" / f"{image}.nii.gz", *phantom()[:2])
        shutil.copy(source / "labelsTr" / "a.nii.gz", source / "labelsTr" / f"{label}.nii.gz")
    (source / "dataset.json").write_text(json.dumps({"labels": {"0": "", "1": ""}, "training": cases}))
    before = set(times(tmp_path))
    assert run("msd", "--input", source, "--output", tmp_path / "output").code == 1
    assert {name for name in times(tmp_path) if not name.startswith("output")} == before
    assert written(tmp_path / "output") == [
        f"{kind}/{name}.nii.gz" for kind in ("images", "labels") for name in ("a", "b", safe_name(".", "case"))
    ]


def test_resampled_cases(tmp_path, run):
    """Image and label on one grid of the spacing asked for; the same extent, the same volume of nodule."""
    source = write_decathlon(tmp_path / "input", ["a", "b"])
    assert run("msd", "--input", source, "--output", tmp_path / "output", "--spacing", 4, 4, 7).code == 0
    for seed, pair in enumerate(find_pairs(tmp_path / "output")[0]):
        image, label, affine = read_pair(pair)
        volume, its_affine, nodules = phantom(seed)
        assert image.shape == tuple(2 * n for n in volume.shape)
        np.testing.assert_allclose(np.diag(affine)[:3], [4, 4, 7], rtol=1e-5)
        np.testing.assert_allclose(affine @ [-0.5, -0.5, -0.5, 1], its_affine @ [-0.5, -0.5, -0.5, 1], atol=1e-3)
        np.testing.assert_array_equal(label, (nodules > 0).repeat(2, 0).repeat(2, 1).repeat(2, 2))


def test_a_label_outside_the_body_is_not_cut_off(tmp_path, run):
    """As where an arm or a limb lies apart from the largest part."""
    volume = np.full((60, 40, 30), -1000, np.int16)
    volume[5:30, 5:30, 3:27], volume[50:56, 10:16, 10:16] = 40, 40
    volume[10:25, 10:25, 6:24] = -850
    label = np.zeros(volume.shape, np.uint8)
    label[52:54, 12:14, 12:14], label[12:14, 12:14, 12:14] = 2, 1
    write_nifti(tmp_path / "input/imagesTr/a.nii.gz", volume, np.diag([5.0, 5, 5, 1]))
    write_nifti(tmp_path / "input/labelsTr/a.nii.gz", label, np.diag([5.0, 5, 5, 1]))
    flags = ["msd", "--input", tmp_path / "input", "--crop", "body", "--margin", 5, "--output"]
    assert run(*flags, tmp_path / "output").code == 0
    ((pair,), _) = find_pairs(tmp_path / "output")
    image, found, moved = read_pair(pair)
    first = np.rint(moved[:3, 3] / 5).astype(int)
    part = tuple(slice(a, a + n) for a, n in zip(first, found.shape))
    np.testing.assert_array_equal(found, label[part])
    np.testing.assert_array_equal(image, volume[part])
    assert np.bincount(found.ravel()).tolist()[1:] == [8, 8] and part[0].stop == 54 and found.size < volume.size


def test_a_class_that_resampling_loses_is_told(tmp_path, run):
    source = write_decathlon(tmp_path / "input", ["a"], index=False)
    volume, affine, nodules = phantom()
    label = np.zeros(nodules.shape, np.uint8)
    label[4:12, 4:12, 4:12], label[10, 10, 10] = 1, 2
    write_nifti(source / "labelsTr" / "a.nii.gz", label, affine)
    flags = ["msd", "--input", source, "--output"]
    assert run(*flags, tmp_path / "whole").code == 0
    assert run(*flags, tmp_path / "coarse", "--spacing", 16, 16, 28).code == 0
    assert outcomes(tmp_path / "whole")["labelsTr/a.nii.gz"] == ("written", "")
    reason = "note: at this --spacing no voxel is left of class 2"
    assert outcomes(tmp_path / "coarse")["labelsTr/a.nii.gz"] == ("written", reason)
    ((pair,), _) = find_pairs(tmp_path / "coarse")
    assert 2 not in read_pair(pair)[1]


@pytest.mark.parametrize("crop", ["body", "label"])
def test_cropped_cases(crop, tmp_path, run):
    volume, affine, nodules = phantom()
    air = np.full((80, 32, 20), -1000, np.int16)
    label = np.zeros(air.shape, np.uint8)
    air[20:60], label[20:60] = volume, nodules > 0
    for name, its_label in (("a", label), ("b", label * 0)):
        write_nifti(tmp_path / "input" / "imagesTr" / f"{name}.nii.gz", air, affine)
        write_nifti(tmp_path / "input" / "labelsTr" / f"{name}.nii.gz", its_label, affine)
    assert (
        run("msd", "--input", tmp_path / "input", "--output", tmp_path / "output", "--crop", crop, "--margin", 16).code
        == 0
    )
    labelled, unlabelled = find_pairs(tmp_path / "output")[0]
    image, its_label, its_affine = read_pair(labelled)
    start = np.linalg.solve(affine, its_affine[:, 3])[:3].round(4).astype(int)
    box = tuple(slice(a, a + n) for a, n in zip(start, image.shape))
    np.testing.assert_array_equal(image, air[box])
    np.testing.assert_array_equal(its_label, label[box])
    assert its_label.sum() == label.sum() and image.shape[0] < 80
    if crop == "label":
        first = np.argwhere(label).min(0) - 2  # 16 mm in voxels of 8 x 8 x 14 mm, rounded up
        np.testing.assert_array_equal(start, np.maximum(first, 0))
        assert read_pair(unlabelled)[0].shape == air.shape
    else:
        assert read_pair(unlabelled)[0].shape == image.shape


def test_real_cases(shared_data, tmp_path, run):
    """The Decathlon's own files, cut down to what is labelled to be quick; nothing to refuse."""
    source = shared_data / "msd" / "Task06_Lung"
    assert run("msd", "--input", source, "--output", tmp_path / "output", "--crop", "label").code == 0
    assert len(written(tmp_path / "output")) == 8
    for row in manifest(tmp_path / "output").values():
        if row["output"].startswith("labels"):
            label = nibabel.load(source / row["source"])
            voxel = np.abs(np.linalg.det(label.affine[:3, :3])) / 1000
            assert float(row["millilitres"]) == pytest.approx((np.asarray(label.dataobj) > 0).sum() * voxel, rel=0.01)
    result = run("check", tmp_path / "output")
    assert result.code == 0 and "4 cases" in result.out


# --------------------------------------------------------------------------------------------------------------- check


def noise(seed=0, shape=(8, 8, 8)):
    return np.random.default_rng(seed).integers(-1000, 500, shape).astype(np.int16)


@pytest.fixture
def layouts(tmp_path):
    """A folder with clean folders `pretrain`, `crops` and `cases` in the three layouts."""
    for i in range(3):
        write_volume(tmp_path / "pretrain" / f"p{i}" / "t0" / "a.hdf5", noise(i, (20 + i, 20, 20)), np.eye(4))
        for k in range(2):
            write_nifti(tmp_path / "crops" / f"subset{i}/label{k}/p{i}/{k}.nii.gz", noise(i), np.eye(4))
        write_nifti(tmp_path / "cases" / "images" / f"p{i}.nii.gz", noise(i), np.eye(4))
        write_nifti(tmp_path / "cases" / "labels" / f"p{i}.nii.gz", (noise(i) > 200).astype(np.uint8), np.eye(4))
    return tmp_path


@pytest.mark.parametrize(
    "layout, told",
    [
        (
            "pretrain",
            ["pre-training layout: 3 volumes of 3 patients", "voxels, x                       20        21        22"],
        ),
        (
            "crops",
            [
                "classification layout: 6 crops of 3 patients",
                "subset1                          1         1         1",
                "all                              3         3         3",
            ],
        ),
        ("cases", ["segmentation layout: 3 cases", "class 1: in 3 cases"]),
    ],
)
def test_nothing_is_said_against_clean_folders(layout, told, layouts, run):
    before = times(layouts)
    result = run("check", layouts / layout)
    assert (result.code, result.errors) == (0, [])
    assert result.out.endswith("nothing would be refused\n")
    for line in (*told, "HU, median", "mm per voxel, z"):
        assert line in result.out
    assert times(layouts) == before


def move(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)


def spoil_crop(content):
    """Writes an array, or bytes, over one crop."""

    def spoil(folder):
        path = folder / "subset1/label0/p1/0.nii.gz"
        path.write_bytes(content) if isinstance(content, bytes) else write_nifti(path, content, np.eye(4))

    return spoil


def spoil_case(kind, voxels, spacing=1.0):
    return lambda folder: write_nifti(folder / kind / "p1.nii.gz", voxels, np.diag([1, 1, spacing, 1]))


def label_folders(folder, label):
    return [folder / f"subset{i}" / f"label{label}" for i in range(3)]


CROP = "subset1/label0/p1/0.nii.gz: "
PROBLEMS = {
    "patient in two subsets": (
        "crops",
        lambda f: shutil.copytree(f / "subset1/label0/p1", f / "subset0/label0/p1"),
        "has patient p1 in subset0 and subset1",
    ),
    "one class": (
        "crops",
        lambda f: [shutil.rmtree(path) for path in label_folders(f, 1)],
        "has crops of one class only (label0)",
    ),
    "a gap in the classes": (
        "crops",
        lambda f: [move(path, path.with_name("label2")) for path in label_folders(f, 1)],
        "has the classes 0, 2",
    ),
    "empty label folder": ("crops", lambda f: (f / "subset0/label3").mkdir(), "subset0/label3: holds no crop"),
    "no label folder": (
        "crops",
        lambda f: move(f / "subset0/label1", f / "subset0/nodules"),
        "subset0/nodules: is no label folder",
    ),
    "no crops": (
        "crops",
        lambda f: [shutil.rmtree(path) for k in range(2) for path in label_folders(f, k)],
        "holds no crops",
    ),
    "crop without patient": (
        "crops",
        lambda f: move(f / "subset0/label0/p0/0.nii.gz", f / "subset0/label0/0.nii.gz"),
        "subset0/label0/0.nii.gz: expected as subset*/label<k>/<patient>",
    ),
    "unreadable crop": ("crops", spoil_crop(b""), CROP + "can't be read"),
    "crop with NaN": ("crops", spoil_crop(noise() * np.float32(np.nan)), CROP + "has voxels that are NaN"),
    "constant crop": ("crops", spoil_crop(noise() * 0), CROP + "constant: the same value in all voxels (0)"),
    "crops of two sizes": ("crops", spoil_crop(noise(0, (8, 8, 9))), CROP + "has 8 x 8 x 9 voxels, but "),
    "image without label": (
        "cases",
        lambda f: (f / "labels/p1.nii.gz").unlink(),
        "images/p1.nii.gz: has no label of the same name",
    ),
    "label without image": (
        "cases",
        lambda f: (f / "images/p1.nii.gz").unlink(),
        "labels/p1.nii.gz: has no image of the same name",
    ),
    "label values": (
        "cases",
        spoil_case("labels", noise() / np.float32(1000)),
        "labels/p1.nii.gz: has label values such as -",
    ),
    "label of another shape": (
        "cases",
        spoil_case("labels", noise(0, (8, 8, 7))),
        "labels/p1.nii.gz: has another shape than its image: 8 x 8 x 7, not 8 x 8 x 8",
    ),
    "label elsewhere": (
        "cases",
        spoil_case("labels", (noise() > 0).astype(np.uint8), spacing=2.0),
        "labels/p1.nii.gz: lies elsewhere than its image",
    ),
    "nothing labelled": (
        "cases",
        lambda f: [
            write_nifti(path, (noise() * 0).astype(np.uint8), np.eye(4)) for path in sorted((f / "labels").glob("*"))
        ],
        "cases: has no labelled voxel in any case",
    ),
    "constant image": (
        "cases",
        spoil_case("images", noise() * 0 - 5),
        "images/p1.nii.gz: constant: the same value in all voxels (-5)",
    ),
    "no labels at all": ("cases", lambda f: shutil.rmtree(f / "labels"), "cases/labels: no such folder"),
    "no images at all": ("cases", lambda f: shutil.rmtree(f / "images"), "cases/images: no such folder"),
    "no cases": ("cases", lambda f: [path.unlink() for path in f.glob("*/*")], "holds no cases"),
    "cut volume": (
        "pretrain",
        lambda f: (f / "p1/t0/a.hdf5").write_bytes((f / "p1/t0/a.hdf5").read_bytes()[:3000]),
        "p1/t0/a.hdf5: can't be read",
    ),
    "constant volume": (
        "pretrain",
        lambda f: write_volume(f / "p1/t0/a.hdf5", noise() * 0, np.eye(4)),
        "p1/t0/a.hdf5: constant: the same value in all voxels (0)",
    ),
    "4D volume": (
        "pretrain",
        lambda f: write_nifti(f / "p3/t0/a.nii", np.stack([noise()] * 2, 3), np.eye(4)),
        "p3/t0/a.nii: is a 4D image",
    ),
    "no layout": (
        "pretrain",
        lambda f: [path.unlink() for path in f.rglob("*.hdf5")],
        "holds none of the three layouts",
    ),
}


@pytest.mark.parametrize("layout, spoil, told", PROBLEMS.values(), ids=PROBLEMS)
def test_what_would_be_refused_is_named_with_the_reason(layout, spoil, told, layouts, run):
    spoil(layouts / layout)
    result = run("check", layouts / layout)
    refused = [line for line in result.out.splitlines() if line.startswith("refused: ")]
    assert result.code == 1 and len(result.errors) == 1
    assert result.errors[0].startswith(f"error: {layouts / layout}: {len(refused)} things would be refused, such as ")
    assert len(refused) == 1 and told in refused[0]
    assert "nothing would be refused" not in result.out


def test_all_that_would_be_refused_is_told(layouts, run):
    spoil_crop(b"")(layouts / "crops")
    (layouts / "crops" / "subset0" / "label3").mkdir()
    result = run("check", layouts / "crops")
    assert result.code == 1 and result.errors[0].startswith(f"error: {layouts / 'crops'}: 2 things would be refused")
    assert f"{CROP}can't be read" in result.out and "subset0/label3: holds no crop" in result.out


def test_check_of_no_folder(tmp_path, run):
    (tmp_path / "file").touch()
    for path, reason in (
        (tmp_path / "gone", "no such folder"),
        (tmp_path / "file", "is no folder, and no table of files (.csv)"),
    ):
        result = run("check", path)
        assert result.code == 1 and result.errors == [f"error: {path}: {reason}"]


# ---------------------------------------------------------------------------------------------------------- wrong flags


IN_OUT = ["--input", "in", "--output", "out"]


@pytest.mark.parametrize(
    "flags",
    [
        ["nlst"],
        ["nlst", "--input", "in"],
        ["nlst", *IN_OUT, "--min_slices", "0"],
        ["nlst", *IN_OUT, "--workers", "0"],
        ["nlst", *IN_OUT, "--compression", "zip"],
        ["nlst", *IN_OUT, "--crop_to_body", "-1"],
        ["nlst", *IN_OUT, "--min", "3"],
        ["luna16", *IN_OUT, "--size", "0", "1", "1"],
        ["luna16", *IN_OUT, "--spacing", "0", "1", "1"],
        ["luna16", *IN_OUT, "--spacing", "1", "1"],
        ["luna16", *IN_OUT, "--label_column", "x"],
        ["luna16", *IN_OUT, "--negatives_per_scan", "-1"],
        ["msd", *IN_OUT, "--spacing", "0", "0", "0"],
        ["msd", *IN_OUT, "--crop", "lung"],
        ["msd", *IN_OUT, "--margin", "nan"],
        ["check"],
        ["check", "in", "--workers", "two"],
        ["nls"],
        [],
    ],
)
def test_a_wrong_flag_exits_with_2_and_one_line(flags, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    result = run(*flags)
    assert (result.code, result.out, len(result.errors)) == (2, "", 1)
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("command", ["nlst", "luna16", "msd"])
def test_an_input_that_is_no_folder(command, tmp_path, run):
    (tmp_path / "file").touch()
    for source, reason in ((tmp_path / "gone", "no such folder"), (tmp_path / "file", "is no folder")):
        result = run(command, "--input", source, "--output", tmp_path / "output")
        assert result.code == 1 and result.errors == [f"error: --input {source}: {reason}"]
        assert not (tmp_path / "output").exists()
