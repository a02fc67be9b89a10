"""results/make_data.py: pairs, pool and halves, of phantoms in LUNA16's layout and, where it is there, of real CT."""

import collections
import importlib.util
import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk

from dino3d.command_line import UserError
from dino3d.data import sources
from dino3d.data.layouts import find_crops
from dino3d.data.volume import Volume
from dino3d.files import read_table
from dino3d.prepare import phantom_study
from results import make_data


@pytest.fixture(scope="module")
def luna16(tmp_path_factory):
    """Five small chests in LUNA16's layout."""
    folder = tmp_path_factory.mktemp("phantoms")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantom_study, "SHAPE", (96, 80, 40))
        patch.setattr(phantom_study, "SPACING", (3.0, 3.0, 6.0))
        patch.setattr(phantom_study, "NEGATIVES", 0)
        phantom_study.lay_out_phantoms(folder, 5)
    shutil.rmtree(folder / "nlst")
    return folder / "luna16"


@pytest.fixture(scope="module")
def made(luna16, tmp_path_factory):
    """Folder of what was made of it in one go."""
    output = tmp_path_factory.mktemp("made") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_data, "LUNA16_CROPS", 4)
        make_data.main(["--data", str(luna16), "--output", str(output)])
    return output


def files_of(folder):
    """{path: bytes} of all that stands below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def read_pool(folder, name):
    """({path: how often main_dino.py draws from it}, {path: patient}) of a list."""
    table = folder / f"pool_{name}.csv"
    found = sources.find_data(None, None, str(table), folder / "index.txt")
    assert set(found.weights) == {1}
    rows = read_table(table)
    assert found.paths == [str(folder / row["path"]) for row in rows]
    return collections.Counter(row["path"] for row in rows), {row["path"]: row["patient"] for row in rows}


def check_lists(folder):
    """The halves share out the pairs' patients, subset by subset; a pool has nothing of the half that it is without."""
    crops, problems = find_crops(folder / "pairs")
    assert not problems
    of_patient = collections.defaultdict(list)
    for crop in crops:
        of_patient[crop.patient].append(crop)
    assert all(sorted(crop.label for crop in those) == [0, 1] for those in of_patient.values())
    halves = [(folder / f"half{number}.txt").read_text().split() for number in (0, 1)]
    assert sorted(halves[0] + halves[1]) == sorted(of_patient) and abs(len(halves[0]) - len(halves[1])) <= 1
    for subset in {crop.subset for crop in crops}:
        here = [sum(of_patient[name][0].subset == subset for name in half) for half in halves]
        assert abs(here[0] - here[1]) <= 1

    everything, whose = read_pool(folder, "all")
    assert {path for path in everything} == {
        path.relative_to(folder).as_posix() for kind in ("cubes", "crops") for path in (folder / kind).iterdir()
    }
    assert all(count == (7 if path.startswith("cubes/") else 1) for path, count in everything.items())
    for number, half in enumerate(halves):
        pool, patients = read_pool(folder, f"without_half{number}")
        assert not set(half) & set(patients.values())
        assert set(halves[1 - number]) <= set(patients.values())
        assert pool == {path: count for path, count in everything.items() if whose[path] not in half}
    return of_patient, everything, whose


def test_what_is_made_of_luna16(luna16, made):
    nodules = collections.Counter(row["seriesuid"] for row in read_table(luna16 / "annotations.csv"))
    of_patient, everything, whose = check_lists(made)
    counted = collections.Counter((path.split("/")[0], patient) for path, patient in whose.items())
    assert counted == {("cubes", name): n for name, n in nodules.items()} | {("crops", name): 4 for name in nodules}
    assert 3 <= len(of_patient) <= 5  # of how many a vessel or wall is near
    for path in everything:
        with Volume(made / path) as volume:
            assert volume.shape == ((51,) * 3 if path.startswith("cubes/") else (60,) * 3)
            np.testing.assert_allclose(volume.spacing, 1, atol=1e-5)
            assert not (volume.read() == volume.read((0, 0, 0), (1, 1, 1))).all()
    said = json.loads((made / "DATA.json").read_text())
    assert (
        said["data"] == "LUNA16"
        and said["pairs"] == len(of_patient)
        and any("CC BY" in one for one in said["licences"])
    )
    assert said["pool"]["all"] == {"cubes": sum(nodules.values()), "crops": 20, "lines": sum(everything.values())}


def test_pairs_are_nodules_and_what_is_as_dense(luna16, made):
    """Each nodule's crop is centred in the largest sphere of annotations.csv, the other one off all of them."""
    rows = collections.defaultdict(list)
    for row in read_table(luna16 / "annotations.csv"):
        rows[row["seriesuid"]].append(([-float(row["coordX"]), -float(row["coordY"]), float(row["coordZ"])], row))
    for crop in find_crops(made / "pairs")[0]:
        with Volume(crop.path) as volume:
            assert volume.shape == (24, 24, 24)
            centre = (volume.affine @ [12, 12, 12, 1])[:3]  # RAS mm
            assert crop.label or volume.read((11, 11, 11), (3, 3, 3)).mean() > -700
        nodules = [(np.linalg.norm(centre - at), float(row["diameter_mm"])) for at, row in rows[crop.patient]]
        if crop.label:
            away, diameter = max(nodules, key=lambda pair: pair[1])
            assert away <= max(3, diameter / 4) + 1e-3
        else:
            assert all(away > diameter / 2 + 3 for away, diameter in nodules)


def test_crops_are_the_scans_own_voxels(luna16, made):
    """Around the lung, against SimpleITK's own resampling of the scan to the crop's grid."""
    for path in sorted((made / "crops").iterdir())[::5]:
        scan = sitk.ReadImage(str(next(luna16.glob(f"subset*/{path.name[:-8]}.mhd"))))
        crop = sitk.ReadImage(str(path))
        expected = sitk.Resample(scan, crop, sitk.Transform(), sitk.sitkLinear, -5000.0, sitk.sitkFloat32)
        expected = sitk.GetArrayFromImage(expected)
        assert expected.min() > -5000  # nothing beyond the scan
        np.testing.assert_allclose(sitk.GetArrayFromImage(crop), expected, atol=0.51)
        assert (expected[15:45, 15:45, 15:45] < -500).mean() > 0.05


class Killed(BaseException):
    pass


def test_a_killed_run_ends_with_the_same_files(luna16, made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_data, "LUNA16_CROPS", 4)
    flags = ["--data", str(luna16), "--output", str(tmp_path / "data")]
    save, calls = make_data.save_nifti, []
    for kill_at in (3, 17, 30):

        def save_or_die(path, *rest, kill_at=kill_at):
            calls.append(path)
            if len(calls) >= kill_at:
                path.write_bytes(b"half of it")  # and what a kill leaves
                shutil.copy(path, path.with_name(".part.1." + path.name))
                raise Killed
            save(path, *rest)

        monkeypatch.setattr(make_data, "save_nifti", save_or_die)
        calls.clear()
        with pytest.raises(Killed):
            make_data.main(flags)
    monkeypatch.setattr(make_data, "save_nifti", save)
    make_data.main(flags)
    assert files_of(tmp_path / "data") == files_of(made)
    assert not [path for path in (tmp_path / "data").rglob(".part*")]
    capsys.readouterr()

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*.nii*")}
    make_data.main(flags)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    said = capsys.readouterr().out
    assert said.count("done before") == 5 and "1 of 5, phantom00: " in said


def test_scans_of_one_patient_stay_together(luna16, tmp_path, monkeypatch):
    monkeypatch.setattr(make_data, "LUNA16_CROPS", 1)
    table = tmp_path / "patients.csv"
    table.write_text("seriesuid,patient\n" + "".join(f"phantom{i:02},p{i // 2}\n" for i in range(5)))
    make_data.main(["--data", str(luna16), "--output", str(tmp_path / "data"), "--patients", str(table)])
    of_patient, _, whose = check_lists(tmp_path / "data")
    assert set(of_patient) <= {"p0", "p1", "p2"} == set(whose.values())
    assert {path[6:15] for path, patient in whose.items() if patient == "p1"} == {"phantom02", "phantom03"}

    with pytest.raises(UserError, match="another --output"):  # of a resumed run, all scans are their own patients
        make_data.main(["--data", str(luna16), "--output", str(tmp_path / "data")])


def no_tables(folder):
    (folder / "annotations.csv").unlink()


def cut_off(folder):
    path = next(folder.glob("subset0/*.raw"), None) or next(folder.glob("subset0/*.zraw"))
    path.write_bytes(path.read_bytes()[:1000])


def no_number(folder):
    text = (folder / "annotations.csv").read_text().splitlines()
    (folder / "annotations.csv").write_text("\n".join([*text[:2], text[2].rsplit(",", 1)[0] + ",large"]))


def outside(folder):
    with open(folder / "annotations.csv", "a") as file:
        file.write("phantom00,5000,0,0,5\n")


def twice(folder):
    for path in folder.glob("subset0/phantom00.*"):
        shutil.copy(path, folder / "subset1")


@pytest.mark.parametrize(
    "spoil, says",
    [
        (shutil.rmtree, "no such folder"),
        (no_tables, "annotations.csv"),
        (cut_off, "phantom0"),
        (no_number, "annotations.csv: line 3"),
        (outside, "phantom00.*outside the scan"),
        (twice, "two scans of one series"),
    ],
)
def test_bad_data(luna16, tmp_path, spoil, says):
    shutil.copytree(luna16, tmp_path / "luna16")
    spoil(tmp_path / "luna16")
    with pytest.raises(UserError, match=says) as error:
        make_data.main(["--data", str(tmp_path / "luna16"), "--output", str(tmp_path / "data")])
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert not (tmp_path / "data" / "DATA.json").exists()


def test_an_output_that_holds_the_data(luna16):
    with pytest.raises(UserError, match="--output .* holds the --data"):
        make_data.main(["--data", str(luna16), "--output", str(luna16.parent)])


# ------------------------------------------------------------------------------------------------------ the real data


def test_real_pairs_are_those_of_the_first_trial(shared_data, tmp_path):
    """Voxel for voxel, as the script that made them writes them."""
    script = shared_data.parent / "evidence" / "nodule_pairs.py"
    if not script.is_file():
        pytest.skip("no ../shared/evidence/nodule_pairs.py beside the checkout")
    spec = importlib.util.spec_from_file_location("nodule_pairs", script)
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    assert theirs.make(tmp_path / "theirs") == 93

    (tmp_path / "ours" / make_data.WORK).mkdir(parents=True)
    pairs = make_data.write_pairs(make_data.read_collection(shared_data / make_data.CUBES_FILE), tmp_path / "ours")
    assert len(pairs) == 93
    known = {path.relative_to(tmp_path / "theirs") for path in (tmp_path / "theirs").rglob("*.nii.gz")}
    made = {path.relative_to(tmp_path / "ours/pairs") for path in (tmp_path / "ours/pairs").rglob("*.nii.gz")}
    assert known == made and len(made) == 186
    for name in sorted(made):
        with Volume(tmp_path / "ours/pairs" / name) as one, Volume(tmp_path / "theirs" / name) as other:
            np.testing.assert_array_equal(one.read(), other.read())


def test_patients_of_the_collections_scans_are_no_cubes(shared_data):
    """LIDC-IDRI-0001 and -0003 stand in two folders, of which one is taken, and in no cube."""
    found = make_data.find_collection(shared_data)
    scanned = {int(scan.patient[-4:]) for scan in found.scans if scan.patient.startswith("LIDC-IDRI-")}
    cut = {int(cube.patient.split("_")[0]) for cube in make_data.read_collection(found.cubes)}
    assert scanned == {1, 3} and len(cut) == 102 and not scanned & cut
    assert sum(scan.crops for scan in found.scans) == 750
    taken = {scan.path.rsplit("/", 1)[1] for scan in found.scans}
    assert "lung_001.nii.gz" in taken and not {"lung_003.nii.gz", "lung_004.nii.gz"} & taken
