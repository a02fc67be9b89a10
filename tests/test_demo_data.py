"""prepare_data.py: the demo from the command line, fetching without running foreign code, orientation, the phantom."""
import hashlib
import io
import itertools
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

import prepare_data
from data import Volume

ROOT = Path(prepare_data.__file__).parent


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """pip finds only what lies in the folder returned, here and in processes started here."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return links


def run(*arguments):
    """Run prepare_data.py as a user does; returns exit code, standard output and standard error."""
    process = subprocess.run([sys.executable, ROOT / "prepare_data.py", *map(str, arguments)],
                             capture_output=True, text=True, timeout=120)
    return process.returncode, process.stdout, process.stderr


def state(folder):
    """Modification time and content of every file below the folder."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------- the demo's command line


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """A folder that `demo --phantom` filled: read only."""
    output = tmp_path_factory.mktemp("phantoms") / "new" / "folder"
    code, out, err = run("demo", "--output", output, "--phantom")
    assert (code, err) == (0, "")
    assert "SYNTHETIC" in out
    return output


def test_phantoms_fill_the_pretraining_layout(phantoms):
    names = sorted(path.relative_to(phantoms).as_posix() for path in phantoms.rglob("*") if path.is_file())
    assert names == ["SOURCE.txt", "pretrain/lung1/t0/phantom.hdf5", "pretrain/lung2/t0/phantom.hdf5"]
    assert (phantoms / "SOURCE.txt").read_text().count("synthetic") == 2
    expected, affine = prepare_data.chest_phantom(0)
    with Volume(phantoms / names[1]) as volume:
        np.testing.assert_array_equal(volume.read(), expected)
        np.testing.assert_allclose(volume.affine, affine)
    with Volume(phantoms / names[2]) as volume:
        assert (volume.read() != expected).mean() > 0.5


@pytest.mark.parametrize("flags", [[], ["--phantom"]])
def test_a_complete_folder_is_left_alone(phantoms, offline, flags):
    before = state(phantoms)
    code, out, err = run("demo", "--output", phantoms, *flags)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert "nothing to do" in out and "synthetic" in out
    assert state(phantoms) == before


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_half_made_folder_is_completed(phantoms, offline, tmp_path, damage):
    output = tmp_path / "demo"
    kept, made = (output / "pretrain" / patient / "t0" / "phantom.hdf5" for patient in ("lung1", "lung2"))
    content = (phantoms / made.relative_to(output)).read_bytes()
    for path in (kept, made):
        path.parent.mkdir(parents=True)
        path.write_bytes((phantoms / path.relative_to(output)).read_bytes())
    os.utime(kept, ns=(0, 0))
    if damage == "missing":
        made.unlink()
    else:
        made.write_bytes(content[:len(content) // 2] if damage == "cut" else b"")

    code, _, err = run("demo", "--output", output, "--phantom")
    assert (code, err) == (0, "")
    assert kept.stat().st_mtime_ns == 0
    with Volume(made) as volume, Volume(phantoms / made.relative_to(output)) as expected:
        np.testing.assert_array_equal(volume.read(), expected.read())
    assert (output / "SOURCE.txt").read_text() == (phantoms / "SOURCE.txt").read_text()


def test_without_a_network_the_phantoms_step_in(offline, tmp_path):
    code, _, err = run("demo", "--output", tmp_path / "demo")
    assert code == 0
    assert err.count("\n") == 1
    assert "No matching distribution found for pyradiomics" in err and "SYNTHETIC" in err
    assert "synthetic" in (tmp_path / "demo" / "SOURCE.txt").read_text()


def test_a_missing_pip_is_no_obstacle(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(
        command, 1, "", f"{sys.executable}: No module named pip\n"))
    monkeypatch.setattr(prepare_data, "chest_phantom", lambda seed: (np.zeros((4, 4, 4), np.int16), np.eye(4)))
    prepare_data.demo(tmp_path, phantom=False)
    assert "No module named pip" in capsys.readouterr().err


def test_fetched_cts_are_converted_and_named(monkeypatch, tmp_path, capsys):
    """The whole of demo() but for pip: an archive as pyradiomics has it, with small images."""
    images = {patient: nrrd_bytes(tmp_path, seed) for seed, patient in enumerate(prepare_data.PATIENTS)}
    archive = tmp_path / "sdist.tar.gz"
    write_tar(archive, {prepare_data.IMAGES[patient]: content for patient, content in images.items()})
    monkeypatch.setattr(prepare_data, "fetch_sdist", lambda folder: archive)

    prepare_data.demo(tmp_path / "demo", phantom=False)
    for patient, content in images.items():
        (tmp_path / "image.nrrd").write_bytes(content)
        expected, affine = prepare_data.read_ct(tmp_path / "image.nrrd")
        with Volume(tmp_path / "demo" / "pretrain" / patient / "t0" / f"{patient}_image.hdf5") as volume:
            np.testing.assert_array_equal(volume.read(), expected)
            np.testing.assert_allclose(volume.affine, affine)
    source = (tmp_path / "demo" / "SOURCE.txt").read_text()
    assert source.count("BSD-3-Clause") == 2 and "synthetic" not in source

    before = state(tmp_path / "demo")
    with pytest.raises(prepare_data.UserError, match="already holds CTs"):
        prepare_data.demo(tmp_path / "demo", phantom=True)
    assert state(tmp_path / "demo") == before
    assert "SYNTHETIC" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("below", ["", "deeper"])
def test_an_output_that_is_a_file_is_an_error_in_one_line(tmp_path, below):
    (tmp_path / "taken").write_text("kept")
    code, out, err = run("demo", "--phantom", "--output", tmp_path / "taken" / below)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: ") and str(tmp_path / "taken") in err
    assert (tmp_path / "taken").read_text() == "kept"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_is_not_writable_is_an_error_in_one_line(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    code, out, err = run("demo", "--phantom", "--output", tmp_path / "locked")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert str(tmp_path / "locked") in err


@pytest.mark.parametrize("arguments", [["demo"], ["demo", "--output"], ["demo", "--output", "x", "--bad"], ["dem"], []])
def test_a_wrong_flag_exits_with_2_and_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        prepare_data.get_args_parser().parse_args(arguments)
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)


# ------------------------------------------------------------------------------------------------------- fetching


def write_tar(path, members):
    """A gzip tar archive of the members, a dict of name to bytes; returns its sha256."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def sdist(offline, tmp_path):
    """A source distribution that leaves a mark if anything of it runs: (sha256, mark)."""
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w').close()\n" "from setuptools import setup\nsetup(name='trap', version='1.0')\n"
    code = code.encode()
    members = {"trap-1.0/setup.py": code, "trap-1.0/setuptools.py": code, "trap-1.0/pathlib.py": code,
               "trap-1.0/PKG-INFO": b"Metadata-Version: 2.1\nName: trap\nVersion: 1.0\n",
               "trap-1.0/data/image.nrrd": b"voxels"}
    return write_tar(offline / "trap-1.0.tar.gz", members), mark


def test_nothing_of_the_package_runs(sdist, tmp_path, monkeypatch):
    sha256, mark = sdist
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "."]))  # would import from the unpacked package
    folder = tmp_path / "fetched"
    folder.mkdir()
    archive = prepare_data.fetch_sdist(folder, "trap", "1.0", sha256)
    assert prepare_data.read_members(archive, ["trap-1.0/data/image.nrrd"]) == {"trap-1.0/data/image.nrrd": b"voxels"}
    assert not mark.exists()
    assert not list(folder.rglob("image.nrrd"))  # nothing is unpacked


def test_pip_refuses_another_checksum(sdist, tmp_path):
    folder = tmp_path / "fetched"
    folder.mkdir()
    with pytest.raises(prepare_data.FetchError, match="DO NOT MATCH THE HASHES") as error:
        prepare_data.fetch_sdist(folder, "trap", "1.0", "0" * 64)
    assert "\n" not in str(error.value)
    assert not sdist[1].exists()


def test_another_checksum_is_refused_whatever_pip_says(tmp_path, monkeypatch):
    def pip(command, **_):
        downloads = Path(command[command.index("--dest") + 1])
        downloads.mkdir()
        (downloads / "pyradiomics-3.0.1.tar.gz").write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(prepare_data.FetchError, match=f"expected {prepare_data.SHA256}"):
        prepare_data.fetch_sdist(tmp_path)


def test_a_pip_that_hangs_is_ended(tmp_path, monkeypatch):
    def pip(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(prepare_data.FetchError, match="within 5 s"):
        prepare_data.fetch_sdist(tmp_path, timeout=5)


def test_only_regular_members_of_exactly_that_name_are_read(tmp_path):
    archive = tmp_path / "a.tar.gz"
    write_tar(archive, {"a/image": b"1", "a/image.bak": b"2", "../a/image": b"3"})
    assert prepare_data.read_members(archive, ["a/image"]) == {"a/image": b"1"}
    with pytest.raises(prepare_data.FetchError, match="a/label"):
        prepare_data.read_members(archive, ["a/image", "a/label"])
    with tarfile.open(archive, "w:gz") as tar:
        link = tarfile.TarInfo("a/image")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    with pytest.raises(prepare_data.FetchError, match="a/image"):
        prepare_data.read_members(archive, ["a/image"])


@pytest.mark.parametrize("text, line", [
    ("", ""),
    ("python: No module named pip\n", "python: No module named pip"),
    ("WARNING: a\nERROR: b\n  ERROR: c: d\n[notice] e\n", "c: d"),
    ("error: metadata-generation-failed\n\nhint: see above\n", "metadata-generation-failed")])
def test_last_error_line(text, line):
    assert prepare_data.last_error_line(text) == line


# ---------------------------------------------------------------------------------------------------- orientation


def nrrd_bytes(folder, seed):
    """A small CT as an NRRD file, whose voxels leave the range of HU on both sides."""
    rng = np.random.default_rng(seed)
    image = sitk.GetImageFromArray(rng.integers(-3024, 5000, (7, 6, 5)).astype(np.int16))  # (Z, Y, X)
    image.SetSpacing((0.6, 0.7, 5.0))
    image.SetOrigin((-146.0, -325.0, 777.5))
    path = folder / f"image{seed}.nrrd"
    sitk.WriteImage(image, str(path))
    return path.read_bytes()


def rotation(x, y, z):
    """The matrix that turns by these angles (degrees) about the x, then the y, then the z axis."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad((x, y, z))):
        turn = np.eye(3)
        a, b = [k for k in range(3) if k != axis]
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


@pytest.mark.parametrize("angles", [(0, 0, 0), (9, -14, 20)], ids=["aligned", "oblique"])
@pytest.mark.parametrize("permutation", list(itertools.permutations(range(3))), ids=str)
def test_read_ct_agrees_with_nibabel_for_every_flip(tmp_path, permutation, angles):
    rng = np.random.default_rng(0)
    spacing, origin = np.array([0.6, 0.7, 5.0]), np.array([-146.0, 25.0, 777.5])  # LPS mm
    voxels = rng.integers(-3024, 5000, (5, 6, 7)).astype(np.int16)  # (I, J, K), the file's own order
    for signs in itertools.product((1, -1), repeat=3):
        directions = rotation(*angles) @ np.eye(3)[:, permutation] * signs  # columns are the axis vectors
        image = sitk.GetImageFromArray(voxels.transpose(2, 1, 0))
        image.SetSpacing(spacing)
        image.SetOrigin(origin)
        image.SetDirection(directions.ravel())
        sitk.WriteImage(image, str(tmp_path / "image.nrrd"))

        affine = np.eye(4)
        affine[:3] = np.diag([-1, -1, 1]) @ np.column_stack([directions * spacing, origin])
        expected = nibabel.as_closest_canonical(nibabel.Nifti1Image(voxels, affine))

        volume, found = prepare_data.read_ct(tmp_path / "image.nrrd")
        np.testing.assert_allclose(found, expected.affine, atol=1e-4)
        np.testing.assert_array_equal(volume, np.asarray(expected.dataobj).clip(-1024, 3071))
        assert volume.dtype == np.int16 and nibabel.aff2axcodes(found) == ("R", "A", "S")


# --------------------------------------------------------------------------------------------------------- phantom


@pytest.mark.parametrize("seed, shape, spacing", [
    (0, (320, 256, 96), (1, 1, 3)), (1, (320, 256, 96), (1, 1, 3)), (7, (96, 80, 48), (3, 3, 5)),
    (3, (64, 64, 64), (1, 1, 1))])
def test_the_phantom_tells_left_from_right_front_from_back_and_up_from_down(seed, shape, spacing):
    hu, affine = prepare_data.chest_phantom(seed, shape, spacing)
    assert hu.shape == shape and hu.dtype == np.int16
    assert hu.min() >= -1024 and hu.max() <= 3071
    assert nibabel.aff2axcodes(affine) == ("R", "A", "S")
    np.testing.assert_allclose(nibabel.affines.voxel_sizes(affine), spacing)

    x, y, z = shape
    inside = hu[x // 6:-(x // 6), y // 4:-(y // 4)]  # without the air around the body
    lung = (inside > -900) & (inside < -750)
    left, right = lung[:len(lung) // 2], lung[len(lung) // 2:]
    heart = slice(int(0.25 * z), int(0.45 * z))
    assert left[:, :, heart].sum() < 0.8 * right[:, :, heart].sum()  # the heart lies on the patient's left
    midline = hu[int(0.45 * x):int(0.55 * x)].astype(float)
    bone = (midline > 250).sum((0, 2))
    assert bone[:y // 2].sum() > 2 * bone[y // 2:].sum()  # the spine lies behind
    assert lung[:, :, 0].sum() < lung[:, :, z // 2].sum() > lung[:, :, -1].sum()
    assert right[:, :, :z // 5].sum() < left[:, :, :z // 5].sum()  # the liver lifts the right dome
    assert 40 == pytest.approx(np.median(hu[(hu > -50) & (hu < 150)]), abs=10)


def test_the_phantom_is_the_seeds_alone():
    state_before = np.random.get_state()[1].copy()
    first, again, other = (prepare_data.chest_phantom(seed, (48, 40, 24))[0] for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5
    np.testing.assert_array_equal(np.random.get_state()[1], state_before)


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 8, 4), (33, 17, 5)])
def test_the_phantom_takes_any_shape(shape):
    assert prepare_data.chest_phantom(0, shape)[0].shape == shape
