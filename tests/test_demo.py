"""phantoms.py, fetch.py and the demo from the command line: fetching without running foreign code, the phantom."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

import prepare_data
from dino3d import command_line
from dino3d.data import images
from dino3d.data.layouts import find_crops, find_pairs, read_pair
from dino3d.data.volume import Volume
from dino3d.prepare import demo, fetch
from dino3d.prepare import phantoms as phantoms_module
from dino3d.prepare.fetch import (
    IMAGES,
    LABELS,
    PATIENTS,
    SHA256,
    FetchError,
    fetch_sdist,
    last_error_line,
    read_members,
)

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
    process = subprocess.run(
        [sys.executable, ROOT / "prepare_data.py", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
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


def test_phantoms_fill_all_layouts(phantoms):
    names = sorted(path.relative_to(phantoms).as_posix() for path in phantoms.rglob("*") if path.is_file())
    assert [name for name in names if name.startswith("pretrain")] == [
        "pretrain/lung1/t0/.phantom.hdf5.index.npz",
        "pretrain/lung1/t0/phantom.hdf5",
        "pretrain/lung2/t0/.phantom.hdf5.index.npz",
        "pretrain/lung2/t0/phantom.hdf5",
        "pretrain/manifest.csv",
        "pretrain/prepare.json",
    ]
    assert (phantoms / "SOURCE.txt").read_text().count("synthetic") == 2 + demo.PHANTOMS
    assert not list(phantoms.glob(".*"))
    expected, affine = phantoms_module.chest_phantom(0)
    for patient, same in (("lung1", True), ("lung2", False)):
        with Volume(phantoms / "pretrain" / patient / "t0" / "phantom.hdf5") as volume:
            assert (volume.read() == expected).all() == same
            np.testing.assert_allclose(volume.affine, affine)

    crops, problems = find_crops(phantoms / "luna16")
    assert not problems and {crop.subset for crop in crops} == {f"subset{i}" for i in range(5)}
    assert len({crop.patient for crop in crops}) == 2 + demo.PHANTOMS
    pairs, problems = find_pairs(phantoms / "msd")
    assert not problems and [pair.name for pair in pairs] == sorted([*PATIENTS, *demo.phantom_names()])


def test_the_lesion_to_learn_by_heart_is_one_and_the_same_under_three_names(phantoms):
    pairs, problems = find_pairs(phantoms / "lesion")
    assert not problems and [pair.name for pair in pairs] == ["lung2_copy1", "lung2_copy2", "lung2_copy3"]
    images_read, labels = zip(*((sitk.ReadImage(str(pair.image)), sitk.ReadImage(str(pair.label))) for pair in pairs))
    for image, label in zip(images_read[1:], labels[1:]):
        assert (sitk.GetArrayViewFromImage(image) == sitk.GetArrayViewFromImage(images_read[0])).all()
        assert (sitk.GetArrayViewFromImage(label) == sitk.GetArrayViewFromImage(labels[0])).all()
    shapes = sitk.LabelShapeStatisticsImageFilter()
    shapes.Execute(sitk.ConnectedComponent(labels[0] != 0))
    nodules = phantoms_module.labelled_phantom(1)[2]
    assert shapes.GetNumberOfLabels() == 1
    assert shapes.GetNumberOfPixels(1) == np.bincount(nodules[nodules > 0]).max()  # the largest
    assert "lesion/ holds 3 copies" in (phantoms / "SOURCE.txt").read_text()


def test_the_demos_crops_show_what_their_labels_say(phantoms):
    """Positive crops are centred on a nodule of the phantom, negative ones lie in the lung, away from all of them."""
    nodules = phantoms_module.labelled_phantom(0)[2]
    _, affine = phantoms_module.chest_phantom(0)
    places = affine @ np.vstack([np.argwhere(nodules > 0).T, np.ones((nodules > 0).sum())])  # (4, N) RAS mm
    crops = [crop for crop in find_crops(phantoms / "luna16")[0] if crop.patient == "lung1"]
    for crop in crops:
        with Volume(crop.path) as volume:
            centre = volume.affine @ [*(np.array(volume.shape) - 1) / 2, 1]
            distance = np.linalg.norm(places[:3].T - centre[:3], axis=1).min()
            assert distance < 3 if crop.label else distance > 15
    assert sum(crop.label for crop in crops) == nodules.max()
    pair = next(pair for pair in find_pairs(phantoms / "msd")[0] if pair.name == "lung1")
    np.testing.assert_array_equal(read_pair(pair)[1], nodules > 0)


@pytest.mark.parametrize("flags", [[], ["--phantom"]])
def test_a_complete_folder_is_left_alone(phantoms, offline, flags):
    before = state(phantoms)
    code, out, err = run("demo", "--output", phantoms, *flags)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert "nothing to do" in out and "synthetic" in out
    assert state(phantoms) == before


def test_a_half_made_folder_is_completed(phantoms, offline, tmp_path):
    """Without a network, from --phantom or not: what was synthetic stays so, what is whole stays as it is."""
    output = tmp_path / "demo"
    shutil.copytree(phantoms, output)
    cut, kept = (output / "pretrain" / patient / "t0" / "phantom.hdf5" for patient in ("lung1", "lung2"))
    cut.write_bytes(cut.read_bytes()[:1000])
    next((output / "luna16").rglob("*.nii.gz")).unlink()
    shutil.rmtree(output / "msd")
    (output / ".raw").mkdir()
    os.utime(kept, ns=(0, 0))

    code, _, err = run("demo", "--output", output)
    assert (code, err) == (0, "")
    assert kept.stat().st_mtime_ns == 0
    assert {path.relative_to(output): content for path, (_, content) in state(output).items()} == {
        path.relative_to(phantoms): content for path, (_, content) in state(phantoms).items()
    }


@pytest.fixture
def small_phantoms(monkeypatch):
    """labelled_phantom in few voxels."""
    whole = phantoms_module.labelled_phantom
    monkeypatch.setattr(phantoms_module, "labelled_phantom", lambda seed, **_: whole(seed, (64, 56, 24), (5, 5, 12)))


def test_without_a_network_the_phantoms_step_in(offline, tmp_path, small_phantoms, capsys):
    demo.demo(tmp_path / "demo", phantom=False)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "No matching distribution found for pyradiomics" in err and "SYNTHETIC" in err
    assert (tmp_path / "demo" / "SOURCE.txt").read_text() == demo.demo_source(demo.PHANTOM)


def test_a_missing_pip_is_no_obstacle(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        fetch.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 1, "", f"{sys.executable}: No module named pip\n"),
    )
    assert demo.fetch_demo(tmp_path, phantom=False, held=None) == demo.PHANTOM
    assert "No module named pip" in capsys.readouterr().err


def test_fetched_cts_are_converted_and_named(monkeypatch, tmp_path, small_phantoms, capsys):
    """The whole of demo() but for pip: an archive as pyradiomics has it, with a small CT and mask of each patient."""
    contents, expected = {}, {}
    for seed, patient in enumerate(PATIENTS):
        volume, affine, nodules = phantoms_module.labelled_phantom(seed)
        turned = images.make_image(volume, affine)[::-1, :, ::-1]  # not in RAS
        mask = images.make_image(np.where(nodules == 1, 7, 0).astype(np.uint8), affine)[::-1, :, ::-1]
        for names, image in ((IMAGES, turned), (LABELS, mask)):
            sitk.WriteImage(image, str(tmp_path / "image.nrrd"))
            contents[names[patient]] = (tmp_path / "image.nrrd").read_bytes()
        expected[patient] = volume, affine, nodules == 1
    archive = tmp_path / "sdist.tar.gz"
    write_tar(archive, contents)
    monkeypatch.setattr(fetch, "fetch_sdist", lambda folder: archive)

    demo.demo(tmp_path / "demo", phantom=False)
    pairs = {pair.name: pair for pair in find_pairs(tmp_path / "demo" / "msd")[0]}
    for patient, (voxels, affine, mask) in expected.items():
        with Volume(tmp_path / "demo" / "pretrain" / patient / "t0" / f"{patient}_image.hdf5") as volume:
            np.testing.assert_array_equal(volume.read(), voxels)
            np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
        np.testing.assert_array_equal(read_pair(pairs[patient])[1], mask)
    source = (tmp_path / "demo" / "SOURCE.txt").read_text()
    assert source.count("BSD-3-Clause") == 2 and source.count("synthetic") == demo.PHANTOMS
    assert "lung1 and lung2 will be SYNTHETIC" not in "".join(capsys.readouterr())

    before = state(tmp_path / "demo")
    with pytest.raises(command_line.UserError, match="already holds CTs"):
        demo.demo(tmp_path / "demo", phantom=True)
    assert state(tmp_path / "demo") == before

    shutil.rmtree(tmp_path / "demo" / "luna16")
    monkeypatch.setattr(fetch, "fetch_sdist", no_network)
    with pytest.raises(command_line.UserError, match="could not be fetched"):
        demo.demo(tmp_path / "demo", phantom=False)  # no mixture of CTs and phantoms under one name


def test_a_demo_of_another_version_is_left_as_it_is(tmp_path):
    """What it was made with may differ, and nobody who types `make demo` gave those flags."""
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "SOURCE.txt").write_text("Where the demo's patients came from, in other words")
    before = state(tmp_path)
    code, out, err = run("demo", "--phantom", "--output", tmp_path / "demo")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "demo of another version" in err and "make clean-demo" in err
    assert state(tmp_path) == before


def no_network(folder):
    raise FetchError("no network")


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
    code = f"open({str(mark)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='trap', version='1.0')\n"
    code = code.encode()
    members = {
        "trap-1.0/setup.py": code,
        "trap-1.0/setuptools.py": code,
        "trap-1.0/pathlib.py": code,
        "trap-1.0/PKG-INFO": b"Metadata-Version: 2.1\nName: trap\nVersion: 1.0\n",
        "trap-1.0/data/image.nrrd": b"voxels",
    }
    return write_tar(offline / "trap-1.0.tar.gz", members), mark


def test_nothing_of_the_package_runs(sdist, tmp_path, monkeypatch):
    sha256, mark = sdist
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "."]))  # would import from the unpacked package
    folder = tmp_path / "fetched"
    folder.mkdir()
    archive = fetch_sdist(folder, "trap", "1.0", sha256)
    assert read_members(archive, ["trap-1.0/data/image.nrrd"]) == {"trap-1.0/data/image.nrrd": b"voxels"}
    assert not mark.exists()
    assert not list(folder.rglob("image.nrrd"))  # nothing is unpacked


def test_pip_refuses_another_checksum(sdist, tmp_path):
    folder = tmp_path / "fetched"
    folder.mkdir()
    with pytest.raises(FetchError, match="DO NOT MATCH THE HASHES") as error:
        fetch_sdist(folder, "trap", "1.0", "0" * 64)
    assert "\n" not in str(error.value)
    assert not sdist[1].exists()


def test_another_checksum_is_refused_whatever_pip_says(tmp_path, monkeypatch):
    def pip(command, **_):
        downloads = Path(command[command.index("--dest") + 1])
        downloads.mkdir()
        (downloads / "pyradiomics-3.0.1.tar.gz").write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(FetchError, match=f"expected {SHA256}"):
        fetch_sdist(tmp_path)


def test_a_pip_that_hangs_is_ended(tmp_path, monkeypatch):
    def pip(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(FetchError, match="within 5 s"):
        fetch_sdist(tmp_path, timeout=5)


def test_only_regular_members_of_exactly_that_name_are_read(tmp_path):
    archive = tmp_path / "a.tar.gz"
    write_tar(archive, {"a/image": b"1", "a/image.bak": b"2", "../a/image": b"3"})
    assert read_members(archive, ["a/image"]) == {"a/image": b"1"}
    with pytest.raises(FetchError, match="a/label"):
        read_members(archive, ["a/image", "a/label"])
    with tarfile.open(archive, "w:gz") as tar:
        link = tarfile.TarInfo("a/image")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    with pytest.raises(FetchError, match="a/image"):
        read_members(archive, ["a/image"])


@pytest.mark.parametrize(
    "text, line",
    [
        ("", ""),
        ("python: No module named pip\n", "python: No module named pip"),
        ("WARNING: a\nERROR: b\n  ERROR: c: d\n[notice] e\n", "c: d"),
        ("error: metadata-generation-failed\n\nhint: see above\n", "metadata-generation-failed"),
    ],
)
def test_last_error_line(text, line):
    assert last_error_line(text) == line


# --------------------------------------------------------------------------------------------------------- phantom


@pytest.mark.parametrize(
    "seed, shape, spacing",
    [
        (0, (320, 256, 96), (1, 1, 3)),
        (1, (320, 256, 96), (1, 1, 3)),
        (7, (96, 80, 48), (3, 3, 5)),
        (3, (64, 64, 64), (1, 1, 1)),
    ],
)
def test_the_phantom_tells_left_from_right_front_from_back_and_up_from_down(seed, shape, spacing):
    hu, affine = phantoms_module.chest_phantom(seed, shape, spacing)
    assert hu.shape == shape and hu.dtype == np.int16
    assert hu.min() >= -1024 and hu.max() <= 3071
    assert nibabel.aff2axcodes(affine) == ("R", "A", "S")
    np.testing.assert_allclose(nibabel.affines.voxel_sizes(affine), spacing)

    x, y, z = shape
    inside = hu[x // 6 : -(x // 6), y // 4 : -(y // 4)]  # without the air around the body
    lung = (inside > -900) & (inside < -750)
    left, right = lung[: len(lung) // 2], lung[len(lung) // 2 :]
    heart = slice(int(0.25 * z), int(0.45 * z))
    assert left[:, :, heart].sum() < 0.8 * right[:, :, heart].sum()  # the heart lies on the patient's left
    midline = hu[int(0.45 * x) : int(0.55 * x)].astype(float)
    bone = (midline > 250).sum((0, 2))
    assert bone[: y // 2].sum() > 2 * bone[y // 2 :].sum()  # the spine lies behind
    assert lung[:, :, 0].sum() < lung[:, :, z // 2].sum() > lung[:, :, -1].sum()
    assert right[:, :, : z // 5].sum() < left[:, :, : z // 5].sum()  # the liver lifts the right dome
    assert 40 == pytest.approx(np.median(hu[(hu > -50) & (hu < 150)]), abs=10)


def test_the_phantom_is_the_seeds_alone():
    state_before = np.random.get_state()[1].copy()
    first, again, other = (phantoms_module.chest_phantom(seed, (48, 40, 24))[0] for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5
    np.testing.assert_array_equal(np.random.get_state()[1], state_before)


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 8, 4), (33, 17, 5)])
def test_the_phantom_takes_any_shape(shape):
    assert phantoms_module.chest_phantom(0, shape)[0].shape == shape
