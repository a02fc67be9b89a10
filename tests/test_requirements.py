"""What a data set must be: is it a CT in HU, crops and cases that go together, and that check and training agree."""

import contextlib
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from raw_inputs import phantom, run, write_nifti  # noqa: F401

import main_lnc_luna16
import main_lts_msd
from dino3d.data.conventions import DataError
from dino3d.data.hdf5 import write_volume
from dino3d.data.pretraining import PretrainingPatches
from dino3d.data.requirements import hu_problem
from dino3d.data.sources import find_data
from dino3d.data.volume import Volume
from dino3d.finetune.crops import EvaluationCrops, new_crop_lines
from utils import Processes


def chest():
    """A chest phantom with noise, in HU."""
    voxels = phantom(0, (60, 48, 40), (5.0, 5.0, 7.0))[0]
    return np.clip(voxels + np.random.default_rng(0).normal(0, 15, voxels.shape), -1024, 3071)


def window(low, high):
    return lambda hu: ((hu - low) / (high - low) * 255).clip(0, 255)


def padded_offset(hu):
    stored = hu + 1024
    stored[:, :, :4] = -1024  # the reader's floor for a padding of -2000
    return stored


def padded_and_blurred(hu):
    stored = hu + 1024
    stored[:, :, :4], stored[:, :4, 4] = -2000, -500
    return np.maximum(stored, -1024)  # as the reader does


def padded_then_offset(hu):
    hu = hu.clip(-1024)
    hu[:, :, :4] = -2000
    return hu + 1024


NOT_HU = {
    "constant": (lambda hu: hu * 0 - 7, "constant: the same value in all voxels (-7)"),
    "a mask": (lambda hu: hu > -200, "a mask, not a CT: 2 whole values from 0 to 1"),
    "a mask of 255": (lambda hu: (hu > -200) * 255, "a mask, not a CT: 2 whole values from 0 to 255"),
    "a mask of many organs": (
        lambda hu: (np.arange(60) // 3).repeat(30)[:, None, None] * np.ones((1, 9, 9)),
        "a mask, not a CT: 20 whole values from 0 to 19",
    ),
    "a small mask, which a sample may miss": (
        lambda hu: np.pad(np.ones((1, 1, 1)), [(7, n - 8) for n in (160, 160, 160)]),
        "a mask, not a CT: 2 whole values from 0 to 1",
    ),
    "8 bits": (window(-1000, 500), "not in HU: grey values from 0 to "),
    "8 bits of a lung window": (window(-1350, 150), "not in HU: grey values from "),
    "8 bits of a soft window": (window(-160, 240), "not in HU: grey values from 0 to 255"),
    "stored + 1024": (lambda hu: (hu + 1024).clip(0), "not in HU: nothing as dark as air or lung, values from 0 to "),
    "stored + 1024, with padding": (padded_offset, "not in HU: nothing as dark as air or lung, values from -1024 to "),
    "stored + 1024, with padding whose border was resampled": (
        padded_and_blurred,
        "not in HU: nothing as dark as air or lung, values from -1024 to ",
    ),
    "stored + 1024, padding too": (padded_then_offset, "not in HU: nothing as dark as air or lung, values from -976 "),
    "an MR": (lambda hu: np.abs(hu) / 2, "not a thorax CT in HU: nothing as dark as air or lung, values from 0 to "),
    "soft tissue alone": (lambda hu: hu.clip(-160, 240), "not a thorax CT in HU: nothing as dark as air or lung"),
    "floats from 0 to 1": (lambda hu: (hu + 1024) / 1500, "a mask, not a CT: 2 whole values from 0 to 1"),
    "padding": (lambda hu: np.where(np.arange(40) < 8, 32767, hu), "20% of its voxels are above 20,000 HU"),
}


@pytest.mark.parametrize("change, told", NOT_HU.values(), ids=NOT_HU)
def test_what_is_no_ct_in_hu_is_named(change, told):
    assert hu_problem(np.rint(change(chest())).astype(np.int16)).startswith(told)


HU = {
    "as it is": lambda hu: hu,
    "clipped to what a run trains on": lambda hu: hu.clip(-1000, 1000),
    "clipped to a lung window": lambda hu: hu.clip(-1350, 150),
    "lung alone": lambda hu: np.random.default_rng(0).normal(-850, 40, hu.shape),
    "much air around": lambda hu: np.pad(hu, 40, constant_values=-1024),
    "metal": lambda hu: np.where(np.indices(hu.shape).max(0) < 3, 30000, hu),
    "one slice": lambda hu: hu[:, :, 20:21],
}


@pytest.mark.parametrize("change", HU.values(), ids=HU)
def test_nothing_is_said_of_hu(change):
    for order in "CF":
        assert hu_problem(np.asarray(np.rint(change(chest())).astype(np.int16), order=order)) == ""


def test_a_sample_never_decides_against_a_volume():
    """Lung in a few places alone, which every n-th voxel misses: looked at as a whole it is a CT."""
    voxels = np.random.default_rng(0).integers(0, 300, (200, 180, 160)).astype(np.int16)
    voxels[1::4, 1::4, 1::4] = -800
    assert hu_problem(voxels) == ""


# --------------------------------------------------------------------------------------------- check and training agree


def noise(seed=0, shape=(28, 27, 14)):
    return np.random.default_rng(seed).integers(-1000, 500, shape).astype(np.int16)


def write_crops(folder, patients=8):
    for i in range(patients):
        for k in range(2):
            write_nifti(folder / f"subset{i % 2}/label{k}/p{i}/{k}.nii.gz", noise(2 * i + k), np.eye(4))


def write_pairs(folder, cases=8):
    for i in range(cases):
        label = np.zeros((28, 27, 14), np.uint8)
        label[5:12, 5:12, 5:9] = 1
        write_nifti(folder / "images" / f"p{i}.nii.gz", noise(i), np.eye(4))
        write_nifti(folder / "labels" / f"p{i}.nii.gz", label, np.eye(4))


def spoil(path, change=lambda voxels: voxels, affine=None):
    """A function that changes a file's voxels or affine."""

    def spoil_in(folder):
        image = nibabel.load(folder / path)
        write_nifti(folder / path, change(np.asarray(image.dataobj)), image.affine if affine is None else affine)

    return spoil_in


def to_mask(voxels):
    return (voxels > 0).astype(np.uint8)


def all_crops(change):
    def spoil_in(folder):
        for path in folder.rglob("*.nii.gz"):
            spoil(path.relative_to(folder), change)(folder)

    return spoil_in


def two_forms(path):
    def spoil_in(folder):
        image = nibabel.load(folder / path)
        image.set_sform(np.eye(4), 2)
        image.set_qform(np.diag([-1.0, -1, 1, 1]), 1)
        nibabel.save(image, folder / path)

    return spoil_in


def to_nnunet(folder):
    for old, new, suffix in (("images", "imagesTr", "_0000"), ("labels", "labelsTr", "")):
        (folder / new).mkdir()
        for path in sorted((folder / old).iterdir()):
            path.rename(folder / new / path.name.replace(".nii.gz", f"{suffix}.nii.gz"))
        (folder / old).rmdir()
    index = {"labels": {"background": 0, "cancer": 1, "vein": 2}, "channel_names": {"0": "CT"}}
    (folder / "dataset.json").write_text(json.dumps(index))


ONE, IMAGE, LABEL = "subset1/label1/p3/1.nii.gz", "images/p3.nii.gz", "labels/p3.nii.gz"
FAULTS = {  # what is wrong -> (whose layout, how it is made, what both say, whether it is refused)
    "two sizes": ("lnc", spoil(ONE, lambda v: v[:-1]), f"{ONE}: has 27 x 27 x 14 voxels, but ", True),
    "crop of constant values": ("lnc", spoil(ONE, lambda v: v * 0), f"{ONE}: constant: the same value", True),
    "a mask for a crop": ("lnc", spoil(ONE, to_mask), f"{ONE}: a mask, not a CT: 2 whole values", True),
    "a crop with NaN": ("lnc", spoil(ONE, lambda v: v * np.float32(np.nan)), f"{ONE}: has voxels that are NaN", True),
    "whole CTs": (
        "lnc",
        lambda folder: [
            spoil(path.relative_to(folder), affine=np.diag([9.0, 9, 9, 1]))(folder) for path in folder.rglob("*.nii.gz")
        ],
        "is a whole CT, not a crop: 28 x 27 x 14 voxels over 252 x 243 x 126 mm",
        True,
    ),
    "a crop twice": (
        "lnc",
        lambda folder: shutil.copy(folder / ONE, folder / ONE.replace(".nii.gz", ".nii")),
        "1.nii.gz: has the same name as ",
        True,
    ),
    "a class of one patient": (
        "lnc",
        lambda folder: shutil.move(folder / "subset1/label1/p3", folder / "subset1/label2/p3"),
        "has label2 in one patient alone, p3",
        True,
    ),
    "whole scans of LUNA16": (
        "lnc",
        lambda folder: [shutil.rmtree(folder), write_nifti(folder / "subset0/1.2.nii", noise(), np.eye(4))],
        "holds no crops: expected subset*/label0|label1/<patient>/<name>.nii.gz, found whole scans such as",
        True,
    ),
    "two spacings": (
        "lnc",
        spoil(ONE, affine=np.diag([1, 1, 2.0, 1])),
        f"warning: 1 of 16 files have another spacing than most, 1 x 1 x 1 mm, such as {{}}/{ONE}: 1 x 1 x 2 mm",
        False,
    ),
    "crops stored + 1024": (
        "lnc",
        all_crops(lambda v: (v.astype(int) + 1024).astype(np.int16)),
        "warning: 16 of 16 files are no CT in HU, such as ",
        False,
    ),
    "a crop of two forms": ("lnc", two_forms(ONE), f"1 of 16 files can be read in two ways, such as {{}}/{ONE}", False),
    "a gap": ("lts", spoil(LABEL, lambda v: v * 3), "has the classes 0, 1, 3: expected 0 to 2 without a gap", True),
    "a class of one case": ("lts", spoil(LABEL, lambda v: v * 2), "has class 2 in one case alone, p3", True),
    "labels of 0.5": ("lts", spoil(LABEL, lambda v: v * np.float32(0.5)), "has label values such as 0.5", True),
    "a mask for an image": ("lts", spoil(IMAGE, to_mask), f"{IMAGE}: a mask, not a CT: 2 whole", True),
    "no label": ("lts", lambda folder: (folder / LABEL).unlink(), f"{IMAGE}: has no label of the same name", True),
    "an image twice": (
        "lts",
        lambda folder: shutil.copy(folder / IMAGE, folder / IMAGE.replace(".nii.gz", ".nii")),
        "p3.nii.gz: has the same name as ",
        True,
    ),
    "an empty label": (
        "lts",
        spoil(LABEL, lambda v: v * 0),
        "note: cases without a labelled voxel: 1, such as p3",
        False,
    ),
    "an 8-bit image": (
        "lts",
        spoil(IMAGE, lambda v: ((v.astype(int) + 1000) // 6).astype(np.uint8)),
        f"warning: 1 of 8 files are no CT in HU, such as {{}}/{IMAGE}: not in HU: grey values",
        False,
    ),
    "a label of two forms": (
        "lts",
        lambda folder: [two_forms(LABEL)(folder), two_forms(IMAGE)(folder)],
        f"note: 2 of 16 files can be read in two ways, such as {{}}/{IMAGE}: its qform and sform",
        False,
    ),
    "nnU-Net's form, a class without case": (
        "lts",
        to_nnunet,
        "warning: dataset.json has the class 2, which no case has: it is not learnt",
        False,
    ),
    "further channels": (
        "lts",
        lambda folder: shutil.copy(folder / IMAGE, folder / "images/p3_0001.nii.gz"),
        "p3_0001.nii.gz: is a further channel of its case",
        True,
    ),
}


class Started(Exception):
    """Training would begin now."""


def start_of_training(script, folder, out, monkeypatch, capsys, more=("--k_fold", 2)):
    """(whether training would begin, what the script printed) of its start."""
    from dino3d.command_line import UserError

    module = {"lnc": main_lnc_luna16, "lts": main_lts_msd}[script]

    def begin(*_, **__):
        raise Started

    monkeypatch.setattr(module, "run_fold", begin)
    flags = ["--arch", "vit_micro", "--input_size", 24, 24, 12]
    flags += ["--num_workers", 0, *more, "--data_dir", folder, "--output_dir", out]
    try:
        module.main(list(map(str, flags)))
    except Started:
        return True, capsys.readouterr().out
    except UserError as error:
        return False, str(error)
    raise AssertionError("neither began nor refused")


@pytest.mark.parametrize("script, spoil, told, refused", FAULTS.values(), ids=FAULTS)
def test_check_and_training_name_the_same_fault(script, spoil, told, refused, tmp_path, run, monkeypatch, capsys):
    folder = tmp_path / "data"
    {"lnc": write_crops, "lts": write_pairs}[script](folder)
    spoil(folder)
    told = told.format(folder)
    began, said = start_of_training(script, folder, tmp_path / "out", monkeypatch, capsys)
    result = run("check", folder)
    assert told in said and told in result.out, (said, result)
    assert began is not refused and (result.code == 1) is refused
    assert refused or result.out.endswith("nothing would be refused\n")


@pytest.mark.parametrize("script", ["lnc", "lts"])
def test_neither_says_anything_of_sound_data(script, tmp_path, run, monkeypatch, capsys):
    folder = tmp_path / "data"
    {"lnc": write_crops, "lts": write_pairs}[script](folder)
    began, said = start_of_training(script, folder, tmp_path / "out", monkeypatch, capsys)
    result = run("check", folder)
    assert began and result.code == 0
    for text in (said, result.out):
        assert "warning:" not in text and "note:" not in text


@pytest.mark.parametrize(
    "shape, spacing, told",
    [
        ((28, 27, 14), 1.0, ""),
        ((56, 54, 28), 1.0, ""),  # twice as large
        ((60, 60, 14), 1.0, ""),
        ((60, 60, 30), 1.0, "is a whole CT, not a crop: 60 x 60 x 30 voxels over 60 x 60 x 30 mm, expected crops"),
        ((40, 40, 10), 6.0, "is a whole CT, not a crop: 40 x 40 x 10 voxels over 240 x 240 x 60 mm"),
    ],
)
def test_a_whole_ct_is_no_new_crop(shape, spacing, told, tmp_path):
    path = write_nifti(tmp_path / "a.nii.gz", noise(0, shape), np.diag([spacing] * 3 + [1]))
    trained = (28, 27, 14), (1.0, 1.0, 1.0)
    sample = EvaluationCrops([str(path)], (24, 24, 12), trained=trained)[0]
    assert sample.startswith(f"{path}: {told}") if told else sample[0].shape == (24, 24, 12)
    write_nifti(path, to_mask(noise(0, (28, 27, 14))), np.eye(4))
    assert EvaluationCrops([str(path)], (24, 24, 12), trained=trained)[0].startswith(f"{path}: a mask, not a CT")


SEEN = (12, 12, 12)  # voxels of a crop that the model sees


def test_new_crops_that_are_smaller_are_told(tmp_path):
    """Where the model saw more of training's crops: what it saw is no larger than they, nor than its input."""
    paths = [str(tmp_path / f"{i}.nii.gz") for i in range(3)]
    for path, side in zip(paths, (12, 13, 11)):
        write_nifti(Path(path), noise(0, (14, side, 12)), np.eye(4))
    (line,) = new_crop_lines(paths, (1.0, 1.0, 1.0), SEEN, Processes())
    assert line.startswith(
        "warning: 1 of 3 files have less than the 12 x 12 x 12 voxels that the model saw of training's "
    )
    assert line.endswith(f"{paths[2]}: 14 x 11 x 12: air is put around them")
    assert not new_crop_lines(paths, (1.0, 1.0, 1.0), (12, 11, 12), Processes())


def test_new_crops_of_other_spacings_are_told(tmp_path):
    paths = [str(tmp_path / f"{i}.nii.gz") for i in range(3)]
    for path, spacing in zip(paths, (1.0, 1.01, 2.0)):
        write_nifti(Path(path), noise(), np.diag([spacing, 1, 1, 1]))
    (tmp_path / "broken.nii.gz").write_bytes(b"")  # which has its own row
    (line,) = new_crop_lines([str(tmp_path / "broken.nii.gz"), *paths], (1.0, 1.0, 1.0), SEEN, Processes())
    assert line.startswith("warning: 1 of 3 files have another spacing than training's crops, 1 x 1 x 1 mm, such as ")
    assert f"{paths[2]}: 2 x 1 x 1 mm" in line
    assert not new_crop_lines(paths[:2], (1.0, 1.0, 1.0), SEEN, Processes()) and not new_crop_lines(
        paths, None, SEEN, Processes()
    )


@pytest.mark.parametrize("raised, told", [(2, False), (3, True), (5, True)])
def test_new_crops_that_are_not_in_hu_are_told(raised, told, tmp_path):
    """Where most are: a crop of soft tissue alone is a sound one, and a mask has a row with its reason."""
    paths = [str(tmp_path / f"{i}.nii.gz") for i in range(5)]
    for i, path in enumerate(paths):
        write_nifti(Path(path), noise(i) + 1024 * (i < raised), np.eye(4))
    write_nifti(tmp_path / "mask.nii.gz", to_mask(noise()), np.eye(4))
    lines = new_crop_lines([*paths, str(tmp_path / "mask.nii.gz")], (1.0, 1.0, 1.0), SEEN, Processes())
    assert len(lines) == told and all(line.startswith(f"warning: {raised} of 5 files are no CT in") for line in lines)


def test_check_tells_too_few_patients(tmp_path, run):
    for count, told in ((2, "add cases"), (5, "lower --k_fold (2 takes 3) or add cases")):
        write_pairs(tmp_path / str(count), count)
        result = run("check", tmp_path / str(count))
        assert f"warning: {count} cases are too few for a test set and --k_fold 5" in result.out
        assert result.code == 0 and told in result.out


@pytest.mark.parametrize("carriers, fold", [((3, 5), 0), ((3, 6), 2), ((0, 1), None), ((0, 2), None)])
def test_check_tells_where_a_default_fold_lacks_a_class(carriers, fold, tmp_path, run, monkeypatch, capsys):
    """Two cases have class 2; by the default flags 3 and 5 are tested and 6 is the third fold's validation."""
    folder = tmp_path / "data"
    write_pairs(folder)
    for i in carriers:
        spoil(f"labels/p{i}.nii.gz", lambda voxels: np.where(np.arange(14) == 7, 2 * voxels, voxels))(folder)
    began, said = start_of_training("lts", folder, tmp_path / "out", monkeypatch, capsys, more=())
    result, told = run("check", folder), f"fold {fold} has no case with class 2 to train on"
    assert began is (fold is None) and (told in said) is (told in result.out) is not began
    assert result.code == 0 and ("warning:" in result.out) is not began
    (folder / "images" / "p4.nii.gz").write_bytes(b"no image")  # whose classes are not known
    result = run("check", folder)
    assert result.code == 1 and "to train on" not in result.out


def test_check_takes_lists_as_pre_training_does(tmp_path, run):
    """Which may name a volume twice, to weight it."""
    for i in range(2):
        write_nifti(tmp_path / f"{i}.nii.gz", noise(i), np.eye(4))
    table = tmp_path / "table.csv"
    table.write_text("path\n0.nii.gz\n1.nii.gz\n0.nii.gz\n")
    assert len(find_data(None, None, str(table), tmp_path / "index").paths) == 3
    result = run("check", table)
    assert result.code == 0 and "2 volumes" in result.out
    assert f"note: --predict would refuse it: {table}: lines 2 and 4 name one file" in result.out
    table.write_text("path\n0.nii.gz\n2.nii.gz\n")
    result = run("check", table)
    assert result.code == 1 and "2.nii.gz: can't be read: no such file" in result.errors[0]


def test_pre_training_data_is_looked_at_without_its_labels(tmp_path, run):
    for i in range(3):
        write_nifti(tmp_path / "in" / f"s{i}" / "ct.nii.gz", noise(i), np.eye(4))
        write_nifti(tmp_path / "in" / f"s{i}" / "segmentations" / "lung.nii.gz", to_mask(noise(i)), np.eye(4))
    write_volume(tmp_path / "in" / "s3" / "ct.hdf5", noise(3) + np.int16(1024), np.eye(4))
    result = run("check", tmp_path / "in")
    assert result.code == 0 and "pre-training layout: 4 volumes of 4 patients" in result.out
    assert "passed over: 3 " in result.out
    assert f"warning: 1 of 4 files are no CT in HU, such as {tmp_path}/in/s3/ct.hdf5: not in HU" in result.out
    raw = write_nifti(tmp_path / "in" / "s4" / "ct.nii.gz", noise(3) + np.int16(1024), np.eye(4))
    result = run("check", tmp_path / "in")
    assert result.code == 1 and f"refused: {raw}: not in HU: nothing as dark as air" in result.out
    with Volume(raw) as volume, pytest.raises(DataError, match="ct.nii.gz: not in HU: nothing as dark as air"):
        PretrainingPatches([raw], None, 0)._require_ct(volume)


def test_hdf5_of_other_programs_is_looked_at(tmp_path):
    """Only what a conversion laid out itself is trusted to be in HU."""
    for name, offset, refused in (("ct.hdf5", 0, False), ("offset.hdf5", 1024, True)):
        voxels = noise(3) + np.int16(offset)
        sitk.WriteImage(sitk.GetImageFromArray(np.ascontiguousarray(voxels.T)), str(tmp_path / name))
        write_volume(tmp_path / f"own-{name}", voxels, np.eye(4))
        for path, told in ((tmp_path / name, refused), (tmp_path / f"own-{name}", False)):
            with Volume(path) as volume, pytest.raises(DataError) if told else contextlib.nullcontext():
                PretrainingPatches([path], None, 0)._require_ct(volume)


def test_one_person_in_two_writings_and_one_image_of_two_are_told(tmp_path, run, capsys):  # noqa: F811
    voxels = np.random.default_rng(0).integers(-900, 100, (12, 8, 8, 8)).astype(np.int16)
    voxels[3], voxels[5] = voxels[2], voxels[4]
    for n, (label, patient) in enumerate(
        [(0, "Pat0"), (1, "pat0"), (0, "a"), (0, "b"), (0, "c"), (1, "c"), *((n % 2, f"p{n}") for n in range(6, 12))]
    ):
        path = tmp_path / f"data/subset{n % 2}/label{label}/{patient}/{n}.nii.gz"
        if patient == "c":
            path = tmp_path / f"data/subset0/label{label}/{patient}/{n}.nii.gz"
        path.parent.mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(voxels[n], np.eye(4)), path)
    told = run("check", tmp_path / "data", "--workers", 1).out
    assert "1 patients differ from another one in upper and lower case alone, such as Pat0 and pat0" in told
    assert "1 images stand in crops of two patients" in told and "(patient a)" in told and "(b)" in told
    assert "1 images stand in crops of two labels" in told and "(label 0)" in told and "(1)" in told
    _, lines = main_lnc_luna16.find_cases(str(tmp_path / "data"), None, "label", tmp_path / "out")
    assert len(lines) == 1 and "Pat0 and pat0" in lines[0]
