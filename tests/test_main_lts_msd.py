"""Lung tumour segmentation from its command line: figures against scipy, masks in world space, and what goes wrong."""

import contextlib
import functools
import io
import itertools
import json
import os
import shutil
import subprocess

import nibabel
import numpy as np
import pytest
import scipy.ndimage
import SimpleITK as sitk
import torch
from conftest import ROOT
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from scipy.spatial import KDTree
from test_main_dino import TORCHRUN, traceback_through_our_code
from test_report import check_report

import main_lts_msd
import utils
from augmentations import scale_intensity
from dino3d.data.hdf5 import write_volume
from dino3d.data.images import read_image
from dino3d.evaluation import statistics
from dino3d.features import sliding_window
from dino3d.features.encoder import ENCODER
from dino3d.features.sliding_window import grid_of
from dino3d.files import read_log, read_table
from dino3d.finetune import fold_loop
from dino3d.finetune.fold_folders import load_fold
from dino3d.finetune.heads import DECODERS, UnetrDecoder, segmenter_of
from dino3d.finetune.splits import patient_splits
from vision_transformer import ARCHITECTURES, VisionTransformer

SIZE = (24, 24, 12)
TINY = [
    "--arch",
    "vit_tiny",
    "--input_size",
    "24",
    "24",
    "12",
    "--num_workers",
    "0",
    "--batch_size_per_gpu",
    "4",
    "--k_fold",
    "2",
    "--num_test",
    "2",
    "--drop_path_rate",
    "0",
    "--overlap",
    "0.3",
    "--warmup_epochs",
    "0",
    "--precision",
    "fp32",
]
PREDICT = ["--precision", "fp32", "--num_workers", "0", "--batch_size_per_gpu", "4"]
SMALL = functools.partial(VisionTransformer, embed_dim=48, depth=3, num_heads=3)
ORIENTATIONS = ("LPS", "RAS", "IRP", "SAL")  # that cases are stored in, one after the other
COLUMNS = ["case", "fold", "class", "dice", "surface_dice", "hausdorff95_mm", "volume_ml", "predicted_ml"]
COLUMNS += ["lesions_found", "lesions_missed", "lesions_predicted", "false_positives"]
QUICK = ["--epochs", 2, "--patches_per_case", 3, "--use_elastic", "--drop_path_rate", 0.3]  # 2 and 3 steps per epoch


@pytest.fixture(scope="module", autouse=True)
def smaller_model():
    """What is called in this process trains a model of 0.2 and not 7 million weights; `command` does the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "vit_tiny", SMALL)
        patch.setitem(DECODERS, "unetr", functools.partial(UnetrDecoder, feature_size=4))
        patch.setattr(statistics, "BOOTSTRAP_ROUNDS", 50)
        yield


# ------------------------------------------------------------------------------------------------- generated volumes


def phantom(seed, shape=(40, 36, 28), spacing=None, lesions=1):
    """(HU int16, mask uint8, affine) of noisy lung with bright ellipsoids of 4 to 8 ml, the second one smaller."""
    rng = np.random.default_rng(seed)
    spacing = np.array([2, 2, 3]) * rng.uniform(0.9, 1.1, 3) if spacing is None else np.array(spacing)
    mm = np.stack(np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, spacing)), indexing="ij"), -1)
    mask = np.zeros(shape, np.uint8)
    for number in range(lesions):
        radii = rng.uniform(9, 13, 3) / (1 + 0.4 * number)
        centre = np.array(shape) * spacing * (rng.uniform(0.35, 0.65, 3) if lesions == 1 else 0.25 + 0.5 * number)
        mask[np.linalg.norm((mm - centre) / radii, axis=-1) < 1] = 1
    voxels = np.where(mask, 40, -850) + rng.normal(0, 60, shape)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = rng.uniform(-100, 100, 3)
    return voxels.astype(np.int16), mask, affine


def save(path, voxels, affine, axes="RAS"):
    """Write an array in RAS as a NIfTI file in another orientation."""
    image = nibabel.Nifti1Image(voxels, affine)
    image = image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(axes)))
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)


def write_case(folder, name, voxels, mask, affine, axes="RAS"):
    save(folder / "images" / f"{name}.nii.gz", voxels, affine, axes)
    save(folder / "labels" / f"{name}.nii.gz", mask, affine, axes)


def in_ras(path):
    """((X, Y, Z) array, affine) of a NIfTI file."""
    image = nibabel.as_closest_canonical(nibabel.load(path))
    return np.asarray(image.dataobj), image.affine


def dice(one, other):
    return 2 * (one.astype(bool) & other.astype(bool)).sum() / (one.astype(bool).sum() + other.astype(bool).sum())


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    """7 cases of about 40 x 36 x 28 voxels with one lesion each; sizes, spacings and orientations vary."""
    folder = tmp_path_factory.mktemp("cases")
    for i in range(7):
        shape = np.array([40, 36, 28]) + np.random.default_rng(100 + i).integers(-2, 3, 3)
        write_case(folder, f"lung_{i:03}", *phantom(i, shape), ORIENTATIONS[i % 4])
    return folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A pre-training checkpoint of the small model, as main_dino.py leaves it."""
    torch.manual_seed(3)
    teacher, student = (
        {f"{prefix}backbone.{name}": tensor for name, tensor in SMALL(SIZE, (12, 12, 6)).state_dict().items()}
        for prefix in ("", "module.")
    )
    config = {
        "arch": "vit_tiny",
        "patch_size": [12, 12, 6],
        "input_size": list(SIZE),
        "clip_range": [-900.0, 300.0],
        "spacing": [2.5, 2.5, 3.5],
    }
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"teacher": teacher, "student": student, "config": config}, path)
    return path


# ---------------------------------------------------------------------------------------------------------- the script


def run_main(*flags, tiny=TINY):
    """(exit code, standard output, lines of standard error) of the script, called in this process."""
    code, out, errors = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            utils.run_script(lambda: main_lts_msd.main([*tiny, *map(str, flags)]))
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), [line for line in errors.getvalue().splitlines() if line.strip()]


def command(*flags, processes, double="", tiny=TINY):
    """Run the script under torchrun with some processes."""
    return subprocess.run(
        [*TORCHRUN, f"--nproc_per_node={processes}", str(ROOT / "tests" / "run_lts.py"), *tiny, *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DOUBLE": double},
    )


def predict(folder, weights, out, *more):
    return run_main("--predict", folder, "--weights", weights, "--output_dir", out, *more, tiny=PREDICT)


def assert_one_error(found, says, code=1):
    """One line that starts with error: and no other, the exit code, and what the line has to say."""
    assert found[0] == code and len(found[2]) == 1 and found[2][0].startswith("error: "), found
    for text in [says] if isinstance(says, str) else says:
        assert text in found[2][0], found[2]


def table(folder):
    return read_table(folder / "cases.csv")


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def network_of(path):
    return load_fold(path, segmenter_of, "decoder")[0].eval()


def models(folder, fold, name="checkpoint.pth"):
    return torch.load(folder / str(fold) / name)["model"]


class Trained:
    """A finished run that has learnt something; its last epoch is not the best. said: its standard output"""

    def __init__(self, folder, cases):
        self.folder, self.flags = (
            folder,
            [
                "--data_dir",
                cases,
                "--output_dir",
                folder,
                "--epochs",
                5,
                "--patches_per_case",
                8,
                "--lr",
                0.01,
                "--tolerance",
                2.5,
                "--val_freq",
                2,
            ],
        )
        keep_best = fold_loop.keep_best

        def worse_at_the_end(state, score, validation):
            if state.progress.epoch == 5:
                validation.metrics["dice"] /= 2
            keep_best(state, score, validation)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fold_loop, "keep_best", worse_at_the_end)
            self.code, self.said, self.errors = run_main(*self.flags)


@pytest.fixture(scope="module")
def trained(cases, smaller_model, tmp_path_factory):
    return Trained(tmp_path_factory.mktemp("trained") / "out", cases)


@pytest.fixture(scope="module")
def straight(cases, smaller_model, tmp_path_factory):
    """Folder of a QUICK run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    found = run_main("--data_dir", cases, "--output_dir", folder, *QUICK)
    assert found[0] == 0 and not found[2], found
    return folder


# --------------------------------------------------------------------------------------------------- what a run leaves


def test_what_a_run_leaves(cases, trained):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = trained.folder
    assert trained.code == 0 and not trained.errors, trained.errors
    with open(out / "cases.csv") as file:
        assert file.readline().strip().split(",") == COLUMNS
    names = {path.name[:-7] for path in (cases / "images").iterdir()}
    splits = json.loads((out / "splits.json").read_text())["splits"]
    assert len(splits) == 2 and sorted(case for split in splits for case in split["validation"]) == sorted(
        names - set(splits[0]["test"])
    )
    rows = table(out)
    for fold, split in enumerate(splits):
        assert sorted(sum(split.values(), [])) == sorted(names)  # each on one side
        assert [row["case"] for row in rows if row["fold"] == str(fold)] == sorted(split["test"]) and len(
            split["test"]
        ) == 2
        folder = out / str(fold)
        assert {path.name for path in folder.iterdir()} == {
            "masks",
            "overlays",
            "best.pth",
            "checkpoint.pth",
            "log.txt",
            "cases.csv",
            "metrics.json",
        }
        assert {path.name for path in (folder / "masks").iterdir()} == {f"{case}.nii.gz" for case in split["test"]}
        assert {path.name for path in (folder / "overlays").iterdir()} == {f"{case}.png" for case in split["test"]}
        assert all(np.asarray(Image.open(path)).std() > 5 for path in (folder / "overlays").iterdir())
        log = read_log(folder / "log.txt")
        assert [record["epoch"] for record in log] == [1, 2, 3, 4, 5]
        assert ["validation_dice" in record for record in log] == [False, True, False, True, True]
        best = torch.load(folder / "best.pth", weights_only=True)
        record = metrics(folder)
        assert best["best"]["epoch"] == record["best_epoch"] < 5 and record["tolerance_mm"] == 2.5
        assert record["validation_dice"] == max(r["validation_dice"] for r in log if "validation_dice" in r) > 0.3
        assert best["config"]["classes"] == 2 and best["config"]["decoder"] == "unetr"
        events = EventAccumulator(str(out / "tensorboard" / str(fold)), {"images": 0}).Reload()
        assert {"loss", "lr", "validation_dice"} <= set(events.Tags()["scalars"])
        assert set(events.Tags()["images"]) == {f"test/{case}" for case in split["test"]}
        steps = [record["step"] for record in log if "validation_dice" in record]
        assert all([image.step for image in events.Images(tag)] == steps for tag in events.Tags()["images"])
    said = metrics(out)
    assert said["classes"] == 2 and said["cases"] == 7 and "config.json" in os.listdir(out)
    headers = [
        nibabel.as_closest_canonical(nibabel.load(cases / "images" / f"{name}.nii.gz")).header.get_zooms()
        for name in names - set(splits[0]["test"])
    ]
    np.testing.assert_allclose(said["spacing"], np.median(headers, axis=0), atol=1e-4)  # of what is not tested
    lines = trained.said.splitlines()
    assert sum(line.startswith("fold 0 epoch") for line in lines) == 5
    assert any(
        line.startswith("mean ± SD") and f"{said['mean']['dice']:.3f} ± {said['sd']['dice']:.3f}" in line
        for line in lines
    )
    for name in ("metrics.json", "cases.csv", "0/masks"):
        assert any(line.endswith(str(out / name)) for line in lines), name


def surface_points(mask, spacing):
    return np.argwhere(mask & ~scipy.ndimage.binary_erosion(mask)) * spacing


def expected_figures(predicted, label, spacing, tolerance):
    """Figures from all pairs of surface voxels, not from distance maps."""
    ml = np.prod(spacing) / 1000
    volumes = {"volume_ml": label.sum() * ml, "predicted_ml": predicted.sum() * ml}
    numbers, counts = zip(*(scipy.ndimage.label(mask, np.ones((3, 3, 3))) for mask in (label, predicted)))
    hit, right = (len(set(parts[predicted & label].tolist())) for parts in numbers)
    volumes |= {"lesions_found": hit, "lesions_missed": counts[0] - hit}
    volumes |= {"lesions_predicted": counts[1], "false_positives": counts[1] - right}
    if not predicted.any():
        return {"dice": 0.0, "surface_dice": 0.0, "hausdorff95_mm": None} | volumes
    points = [surface_points(mask, spacing) for mask in (predicted, label)]
    ways = [KDTree(b).query(a)[0] for a, b in (points, points[::-1])]
    return {
        "dice": dice(predicted, label),
        "surface_dice": np.mean(np.concatenate(ways) <= tolerance),
        "hausdorff95_mm": max(np.percentile(way, 95) for way in ways),
    } | volumes


def test_figures_are_those_of_the_saved_masks(cases, trained):
    """Each row of cases.csv from the mask's file and the label's, in whatever orientation both are stored."""
    stored = set()
    for row in table(trained.folder):
        mask = trained.folder / row["fold"] / "masks" / f"{row['case']}.nii.gz"
        label = cases / "labels" / mask.name
        stored.add(nibabel.aff2axcodes(nibabel.load(label).affine))
        assert nibabel.load(mask).shape == nibabel.load(label).shape and nibabel.load(mask).get_data_dtype() == np.uint8
        np.testing.assert_allclose(nibabel.load(mask).affine, nibabel.load(label).affine, atol=1e-4)
        (predicted, affine), (truth, _) = in_ras(mask), in_ras(label)
        expected = expected_figures(predicted == 1, truth == 1, np.linalg.norm(affine[:3, :3], axis=0), 2.5)
        found = {name: float(row[name]) if row[name] else None for name in expected}
        assert found == pytest.approx(expected, abs=1e-3), row
        assert found["dice"] > 0.3
    assert len(stored - {("R", "A", "S")}) == 2  # otherwise the draw has to be another


def check_means(folder):
    """metrics.json from cases.csv alone."""
    said, rows = metrics(folder), table(folder)
    of_fold = {}
    for name in ("dice", "surface_dice", "hausdorff95_mm"):
        values = [[float(row[name]) for row in rows if row["fold"] == fold and row[name]] for fold in "01"]
        of_fold[name] = [np.mean(v) if v else None for v in values]
        assert [record[name] for record in said["folds"]] == pytest.approx(of_fold[name], abs=1e-12)
        defined = [value for value in of_fold[name] if value is not None]
        assert said["mean"][name] == (pytest.approx(np.mean(defined)) if defined else None)
        assert said["sd"][name] == (pytest.approx(np.std(defined, ddof=1)) if len(defined) > 1 else None)
    for record in said["folds"]:
        empty = [row for row in rows if row["fold"] == str(record["fold"]) and not row["hausdorff95_mm"]]
        assert record["undefined_hausdorff95"] == len(empty)
        mine = [row for row in rows if row["fold"] == str(record["fold"])]
        found, missed, claimed, wrong = (sum(int(row[name]) for row in mine) for name in COLUMNS[-4:])
        assert [record[name] for name in COLUMNS[-4:]] == [found, missed, claimed, wrong]
        assert record["lesion_sensitivity"] == pytest.approx(found / (found + missed))
        assert record["lesion_precision"] == (pytest.approx(1 - wrong / claimed) if claimed else None)
        assert record["false_positives_per_ct"] == pytest.approx(wrong / len({row["case"] for row in mine}))
    names = sorted({row["case"] for row in rows})
    means = [np.mean([float(row["dice"]) for row in rows if row["case"] == name]) for name in names]
    assert said["all_folds"]["dice"] == pytest.approx(np.mean(means)) and said["all_folds"]["cases"] == len(names)
    assert (said["all_folds"]["dice_interval"] is None) == (len(names) < 5) == bool(said["all_folds"]["notes"])
    if len(names) >= 5:
        low, high = said["all_folds"]["dice_interval"]
        assert min(means) - 1e-9 <= low <= np.mean(means) <= high <= max(means) + 1e-9
    return said


def test_means_are_those_of_the_table(trained):
    said = check_means(trained.folder)
    assert all(said["sd"][name] for name in ("dice", "surface_dice", "hausdorff95_mm"))
    sums = [sum(record[name] for record in said["folds"]) / 2 for name in COLUMNS[-4:]]  # both test the same cases
    assert [said["all_folds"][name] for name in COLUMNS[-4:]] == sums


def test_the_report_of_a_segmentation(trained):
    """Its figures are those of metrics.json; the worst cases and the best one are shown."""
    parsed, pictures = check_report(trained.folder)
    rows = sorted(table(trained.folder), key=lambda row: float(row["dice"]))
    shown = [f"{row['case']}, fold {row['fold']}, Dice {float(row['dice']):.3f}: " for row in rows]
    assert [one["alt"].startswith(text) for one, text in zip(pictures[1:], [*shown[:3], shown[-1]])] == [True] * 4
    assert pictures[0]["alt"].startswith("Loss and Dice by epoch") and len(pictures) == 5
    assert set(COLUMNS) <= set(parsed.texts)


def test_an_empty_prediction_is_counted(cases, tmp_path, monkeypatch):
    """Where a class is missed its Hausdorff distance is undefined: no number, counted, left out of the means."""
    monkeypatch.setattr(
        main_lts_msd, "mask_of", lambda networks, image, *_: grid_of(image).image(np.zeros(image.GetSize(), np.uint8))
    )
    found = run_main("--data_dir", cases, "--output_dir", tmp_path, "--epochs", 1, "--patches_per_case", 1)
    assert found[0] == 0 and not found[2], found
    assert all(
        (row["dice"], row["surface_dice"], row["hausdorff95_mm"], row["predicted_ml"]) == ("0.0", "0.0", "", "0.0")
        for row in table(tmp_path)
    )
    assert check_means(tmp_path)["mean"].items() >= {"dice": 0.0, "surface_dice": 0.0, "hausdorff95_mm": None}.items()
    assert "2 undefined" in found[1]


def test_more_classes(tmp_path):
    """Two classes: a row for each, and all of it as with one."""
    for i in range(5):
        voxels, mask, affine = phantom(i, (30, 28, 16), lesions=2)
        mask[15:] *= 2  # the lower corner's lesion is class 1
        write_case(tmp_path / "data", f"case{i}", np.where(mask == 2, voxels + 600, voxels), mask, affine)
    found = run_main(
        "--data_dir",
        tmp_path / "data",
        "--output_dir",
        tmp_path / "out",
        "--epochs",
        2,
        "--num_test",
        1,
        "--patches_per_case",
        4,
    )
    assert found[0] == 0 and not found[2] and "3 classes with the background" in found[1], found
    rows = table(tmp_path / "out")
    assert [(row["fold"], row["class"]) for row in rows] == [("0", "1"), ("0", "2"), ("1", "1"), ("1", "2")]
    label = in_ras(tmp_path / "data" / "labels" / f"{rows[0]['case']}.nii.gz")
    for row in rows:
        predicted, affine = in_ras(tmp_path / "out" / row["fold"] / "masks" / f"{row['case']}.nii.gz")
        k, spacing = int(row["class"]), np.linalg.norm(affine[:3, :3], axis=0)
        expected = expected_figures(predicted == k, label[0] == k, spacing, 2.0)
        assert {name: float(row[name]) if row[name] else None for name in expected} == pytest.approx(expected, abs=1e-3)
    check_means(tmp_path / "out")


# ------------------------------------------------------------------------------------------------ pre-trained encoders


def test_a_frozen_encoder_stays_as_it_was(cases, tmp_path, weights):
    """All of the model's settings come from the checkpoint; training leaves its bits, and the decoder moves."""
    code, out, errors = run_main(
        "--data_dir",
        cases,
        "--output_dir",
        tmp_path,
        "--pretrained_weights",
        weights,
        "--decoder",
        "linear",
        "--freeze_encoder",
        "true",
        "--epochs",
        2,
        "--patches_per_case",
        3,
        tiny=TINY[6:],
    )
    assert code == 0 and not errors, errors
    assert "linear decoder, frozen encoder" in out and "windows of 24 24 12 voxels of 2.5 2.5 3.5 mm" in out
    before = torch.load(weights)["teacher"]
    for fold, name in itertools.product((0, 1), ("best.pth", "checkpoint.pth")):
        after = models(tmp_path, fold, name)
        assert all(torch.equal(after["encoder." + key[9:]], tensor) for key, tensor in before.items())
    first = models(tmp_path, 0)["decoder.head.weight"]
    assert first.any() and not torch.equal(first, models(tmp_path, 1)["decoder.head.weight"])
    config = torch.load(tmp_path / "0" / "best.pth")["config"]
    assert {name: config[name] for name in ENCODER} == torch.load(weights)["config"]
    assert metrics(tmp_path)["spacing"] == [2.5, 2.5, 3.5] and len(table(tmp_path)) == 4
    voxels, _, affine = phantom(50)
    save(tmp_path / "new" / "scan.nii.gz", voxels, affine)
    assert predict(tmp_path / "new", tmp_path, tmp_path / "masks")[0] == 0


@pytest.mark.parametrize("key", ["teacher", "student"])
def test_training_starts_from_the_checkpoint(cases, tmp_path, weights, key):
    """A step with a learning rate of 0 leaves the checkpoint's weights; one of the default does not."""
    flags = ["--data_dir", cases, "--pretrained_weights", weights, "--checkpoint_key", key, "--max_steps", 1]
    for out, more in (("stays", ["--lr", 0, "--min_lr", 0]), ("moves", [])):
        code, said, errors = run_main(*flags, *more, "--output_dir", tmp_path / out)
        assert code == 0 and not errors and "from scratch" not in said
    before = {name.partition("backbone.")[2]: tensor for name, tensor in torch.load(weights)[key].items()}
    stays, moves = models(tmp_path / "stays", 0), models(tmp_path / "moves", 0)
    assert all(torch.equal(stays["encoder." + name], tensor) for name, tensor in before.items())
    assert not any(
        torch.equal(moves["encoder." + name], tensor)
        for name, tensor in before.items()
        if not name.startswith(("cls_token", "norm"))
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--arch", "vit_small"],
        ["--patch_size", "6", "6", "6"],
        ["--clip_range", "-1000", "1000"],
        ["--spacing", "2", "2", "3"],
    ],
    ids=lambda flags: flags[0],
)
def test_flags_that_contradict_the_checkpoint(cases, tmp_path, weights, flags):
    assert_one_error(
        run_main("--data_dir", cases, "--output_dir", tmp_path, "--pretrained_weights", weights, *flags, tiny=TINY[6:]),
        f"{flags[0]} {' '.join(flags[1:])} contradicts --pretrained_weights",
    )


def test_another_input_size_than_the_checkpoints(cases, tmp_path, weights):
    """One step, and the line that says so; what is loaded then, test_weights.py holds to scipy."""
    flags = ["--data_dir", cases, "--output_dir", tmp_path, "--pretrained_weights", weights, "--max_steps", 1]
    code, said, errors = run_main(*flags, "--input_size", 36, 36, 18, tiny=TINY[6:])
    assert code == 0 and not errors, errors
    assert "this is 36 x 36 x 18: its position embedding is interpolated (trilinear)" in said
    assert torch.load(tmp_path / "0" / "checkpoint.pth")["config"]["input_size"] == [36, 36, 18]


# --------------------------------------------------------------------------------------------------------------- ranks


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_ranks_agree(regular, tmp_path, double):
    """One process with a batch of 4 and two with 2, with patches and test cases that two can't share: one table."""
    flags = ["--data_dir", regular, "--epochs", 1, "--num_test", 3, "--patches_per_case", 7, "--lr", 0.01]
    found = run_main(*flags, "--output_dir", tmp_path / "1")
    assert found[0] == 0 and not found[2], found
    done = command(*flags, "--output_dir", tmp_path / "2", "--batch_size_per_gpu", 2, processes=2, double="1")
    assert done.returncode == 0, done.stderr
    assert torch.load(tmp_path / "1" / "0" / "checkpoint.pth")["cases"] % 4 == 3  # for two, in the last step
    one, two = table(tmp_path / "1"), table(tmp_path / "2")
    assert len(one) == len(two) == 6
    for mine, other in zip(one, two):
        assert [mine[name] for name in COLUMNS[:3]] == [other[name] for name in COLUMNS[:3]]
        numbers = [[float(row[name] or "nan") for name in COLUMNS[3:]] for row in (mine, other)]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-4, nan_ok=True)
    for fold in "01":
        one, two = models(tmp_path / "1", fold), models(tmp_path / "2", fold)
        assert one["encoder.cls_token"].dtype == torch.float64
        assert max((one[name] - two[name]).abs().max() for name in one) < 1e-9
    assert any(float(row["predicted_ml"]) > 0.1 for row in table(tmp_path / "1"))


def test_ranks_predict_and_fail_alike(cases, trained, tmp_path):
    """Two processes share new volumes; one that is broken is told once. A broken label ends both, told once."""
    for i in range(3):
        save(tmp_path / "new" / f"scan{i}.nii.gz", *phantom(20 + i)[::2])
    (tmp_path / "new" / "broken.nii.gz").write_bytes(b"no image")
    done = command(
        "--predict",
        tmp_path / "new",
        "--weights",
        trained.folder,
        "--output_dir",
        tmp_path / "two",
        processes=2,
        tiny=PREDICT,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 1 and sum("broken.nii.gz" in line for line in lines) == 1 and len(lines) <= 2, done.stderr
    assert not traceback_through_our_code(done.stderr)
    assert predict(tmp_path / "new", trained.folder, tmp_path / "one")[0] == 1
    assert (tmp_path / "one" / "volumes.csv").read_bytes() == (tmp_path / "two" / "volumes.csv").read_bytes()
    for i in range(3):
        np.testing.assert_array_equal(*(in_ras(tmp_path / out / f"scan{i}.nii.gz")[0] for out in ("one", "two")))
    shutil.copytree(cases, tmp_path / "data")
    label_value(1, 0.5)(tmp_path / "data")
    done = command("--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out", processes=2)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 1 and sum("lung_001.nii.gz" in line for line in lines) == 1 and len(lines) <= 2, (
        done.stderr
    )
    assert not traceback_through_our_code(done.stderr)


# ------------------------------------------------------------------------------------------------------- augmentations


@pytest.fixture(scope="module")
def regular(tmp_path_factory):
    """5 cases in RAS with 2 x 2 x 3 mm, that is, on the working grid already; their HU encode the label."""
    folder = tmp_path_factory.mktemp("regular")
    for i in range(5):
        _, mask, affine = phantom(i, (36, 34, 20), (2, 2, 3))
        write_case(folder, f"case{i}", np.where(mask, 1000, -1000).astype(np.int16), mask, affine)
    return folder


class Seen:
    """What reaches the encoder and the loss. training, evaluation, labels: lists of (x, y, z) tensors"""

    def __init__(self, monkeypatch):
        self.training, self.evaluation, self.labels = [], [], []
        seen, loss = self, main_lts_msd.dice_and_cross_entropy

        class Watched(VisionTransformer):
            def get_intermediate_layers(self, volumes, *args, **kwargs):
                (seen.training if self.training else seen.evaluation).extend(volumes[:, 0].detach().clone())
                return super().get_intermediate_layers(volumes, *args, **kwargs)

        def watched(logits, labels):
            self.labels += list(labels.clone())
            return loss(logits, labels)

        monkeypatch.setitem(ARCHITECTURES, "vit_tiny", functools.partial(Watched, embed_dim=48, depth=3, num_heads=3))
        monkeypatch.setattr(main_lts_msd, "dice_and_cross_entropy", watched)


OFF = ["--use_rotation", 0, "--use_scale", 0, "--use_flip", 0]
REGULAR = ["--spacing", 2, 2, 3, "--epochs", 2, "--num_test", 1, "--patches_per_case", 4]


def watched_run(regular, out, *flags):
    """Seen of a run on the regular cases."""
    with pytest.MonkeyPatch.context() as patch:
        seen = Seen(patch)
        found = run_main("--data_dir", regular, "--output_dir", out, *REGULAR, *flags)
    assert found[0] == 0 and not found[2], found
    return seen


def windows_of(folder, kind, outside, change=lambda volume: volume):
    """[(x, y, z, 24, 24, 12) views], one of each volume: all windows of it, also those that reach beyond it."""
    volumes = [in_ras(path)[0] for path in sorted((folder / kind).iterdir())]
    volumes = [change(np.pad(volume, [(n, n) for n in SIZE], constant_values=outside)) for volume in volumes]
    return [np.lib.stride_tricks.sliding_window_view(volume, SIZE) for volume in volumes]


def is_window(tensor, views):
    """Whether a tensor is one of the windows, to the last bit."""
    window = tensor.numpy()
    brightest = np.unravel_index(window.argmax(), SIZE)  # which few windows have in the same place
    return any(
        (view[tuple(start)] == window).all()
        for view in views
        for start in np.argwhere(view[(..., *brightest)] == window[brightest])
    )


@pytest.fixture(scope="module")
def plain(regular, smaller_model, tmp_path_factory):
    return watched_run(regular, tmp_path_factory.mktemp("plain"), *OFF)


def test_only_training_data_is_augmented(regular, tmp_path, plain):
    """What evaluation sees are windows of the volumes, to the last bit and each time the same; training sees others."""
    seen = watched_run(
        regular, tmp_path, "--use_elastic", "--use_gaussian", "--use_histogram", "--shift_range", 2, 2, 1
    )
    exact = windows_of(
        regular, "images", -1024, lambda volume: scale_intensity(torch.from_numpy(volume), -1000, 1000).numpy()
    )
    assert len(seen.evaluation) > 40 and all(is_window(one, exact) for one in seen.evaluation)
    assert len(seen.training) == len(seen.labels) == 2 * 2 * 2 * 4 == len(plain.training)
    assert all((one - one.round()).abs().max() < 1e-4 and is_window(one.round(), exact) for one in plain.training)
    assert sum(bool((one - one.round()).abs().max() > 0.01) for one in seen.training) > 0.8 * len(seen.training)
    assert len(plain.evaluation) == len(seen.evaluation)
    assert all(torch.equal(one, other) for one, other in zip(plain.evaluation, seen.evaluation))
    assert all(one.min() > -1e-4 and one.max() < 1 + 1e-4 for one in seen.training)


def test_image_and_label_are_bent_alike(regular, tmp_path):
    """HU that encode the label still do after all that is geometric, but for voxels at a border."""
    seen = watched_run(regular, tmp_path, "--use_elastic", "--shift_range", 2, 2, 1)
    wrong = labelled = turned = 0
    for image, label in zip(seen.training, seen.labels):
        image, label = image.numpy(), label.numpy() == 1
        inner, outer = (
            scipy.ndimage.binary_erosion(label, np.ones((3, 3, 3)), border_value=1),
            scipy.ndimage.binary_dilation(label, np.ones((3, 3, 3))),
        )
        assert (image[inner] > 0.5).all() and (image[~outer] < 0.5).all()
        wrong, labelled = wrong + ((image > 0.5) != label).sum(), labelled + label.sum()
        turned += ((image > 0.01) & (image < 0.99)).any()
    assert labelled > 1000 and wrong < 0.05 * labelled, (wrong, labelled)
    assert turned > len(seen.training) / 2  # most windows were interpolated


def test_intensities_leave_masks_alone(regular, tmp_path, plain):
    seen = watched_run(regular, tmp_path, *OFF, "--use_gaussian", "--use_histogram")
    masks = windows_of(regular, "labels", 0)
    assert sum(bool(label.any()) for label in seen.labels) >= len(seen.labels) / 2
    assert all(is_window(label, masks) for label in seen.labels)
    assert all(torch.equal(one, other) for one, other in zip(seen.labels, plain.labels))
    changed = sum(not torch.equal(one, other) for one, other in zip(seen.training, plain.training))
    assert changed > len(seen.training) / 2
    assert all(torch.equal(image > 0.5, label == 1) for image, label in zip(plain.training, plain.labels))


# ---------------------------------------------------------------------------------------------------- stopped, resuming


def files_of(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def assert_same_run(one, two):
    """Tables, metrics, masks and weights to the last bit."""
    for name in ("cases.csv", "metrics.json", "splits.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    for fold in "01":
        first, second = models(one, fold), models(two, fold)
        assert all(torch.equal(first[name], second[name]) for name in first)
        for path in (one / fold / "masks").iterdir():
            np.testing.assert_array_equal(in_ras(path)[0], in_ras(two / fold / "masks" / path.name)[0])
        records = [read_log(folder / fold / "log.txt") for folder in (one, two)]
        for name in ("epoch", "loss", "validation_dice", "validation_loss"):
            assert name in ("loss",) or [r[name] for r in records[0]] == [r[name] for r in records[1]], name


def test_a_run_goes_on_where_it_stopped(cases, tmp_path, straight):
    """Stopped within an epoch of a fold, and in the next fold: every file as without a stop. Done, it does no more."""
    flags = ["--data_dir", cases, "--output_dir", tmp_path, *QUICK]
    steps = torch.load(straight / "0" / "checkpoint.pth")["step"]
    code, out, errors = run_main(*flags, "--max_steps", 1)
    assert code == 0 and not errors
    assert out.splitlines()[-1] == "stopped in fold 0 after 1 steps; the same command without --max_steps resumes"
    assert not (tmp_path / "metrics.json").exists() and not (tmp_path / "1").exists()
    state = torch.load(tmp_path / "0" / "checkpoint.pth")
    assert (state["epoch"], state["position"], state["step"]) == (0, 4, 1)
    code, out, _ = run_main(*flags, "--max_steps", steps)
    assert code == 0 and "fold 0: resuming after step 1" in out and f"stopped in fold 1 after {steps} steps" in out
    code, out, _ = run_main(*flags)
    assert code == 0 and "fold 0: done before" in out and "fold 1: resuming after step 1" in out
    assert_same_run(straight, tmp_path)
    files = files_of(tmp_path / "0")
    code, out, _ = run_main(*flags)
    assert code == 0 and out.count("done before") == 2 and "epoch 1" not in out and "mean ± SD" in out
    assert files == files_of(tmp_path / "0")
    assert_same_run(straight, tmp_path)


def test_a_killed_run_goes_on(cases, tmp_path, straight, monkeypatch):
    """Cut off in the middle of the second epoch, with a checkpoint of the first."""
    flags = ["--data_dir", cases, "--output_dir", tmp_path, *QUICK, "--save_every_steps", 2]
    train_step, calls = fold_loop.weighted_step, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train_step(*args)

    monkeypatch.setattr(fold_loop, "weighted_step", killed)
    assert_one_error(run_main(*flags), "interrupted", 130)
    monkeypatch.setattr(fold_loop, "weighted_step", train_step)
    code, out, errors = run_main(*flags)
    assert code == 0 and not errors and "fold 0: resuming after step 2, epoch 1" in out, out
    assert_same_run(straight, tmp_path)


def test_workers_and_the_cache_change_nothing(cases, tmp_path, straight):
    """Two loader workers, on copies that another run has made; no copies at all."""
    made = {path: path.stat().st_mtime_ns for path in (straight / "cache").glob("*/*")}
    assert len(made) == 7 * 4
    for out, flags in (
        ("workers", ["--num_workers", 2, "--cache_dir", straight / "cache"]),
        ("none", ["--cache_gb", 0]),
    ):
        code, said, errors = run_main("--data_dir", cases, "--output_dir", tmp_path / out, *QUICK, *flags)
        assert code == 0 and not errors
        assert ("cases beyond --cache_gb 0: 7" in said) == (out == "none")
        assert not list((tmp_path / out).glob("cache/*/*.hdf5"))
        assert_same_run(straight, tmp_path / out)
    assert made == {path: path.stat().st_mtime_ns for path in (straight / "cache").glob("*/*")}


def test_other_flags_are_no_way_to_go_on(cases, straight, weights, tmp_path):
    flags = ["--data_dir", cases, "--output_dir", straight, *QUICK]
    kept = (straight / "config.json").read_bytes()
    for more, says in (
        (["--decoder", "linear"], "--decoder unetr, not linear"),
        (["--lr", 0.1], "--lr 0.001, not 0.1"),
        (["--freeze_encoder", "true"], "--freeze_encoder false, not true"),
        (["--patches_per_case", 4], "--patches_per_case 3, not 4"),
        (["--overlap", 0.5], "--overlap"),
        (["--foreground_share", 0.1], "--foreground_share"),
        (["--spacing", 3, 3, 3], "--spacing"),
        (["--k_fold", 3], "k_fold 2, now it is 3"),
        (["--seed", 1], "seed 0, now it is 1"),
        (["--label_fraction", 0.5], "label_fraction None, now it is 0.5"),
        (["--use_flip", "off"], "--use_flip true, not false"),
    ):
        assert_one_error(run_main(*flags, *more, "--cache_dir", tmp_path), (says, "--output_dir"))
    assert (straight / "config.json").read_bytes() == kept


def test_other_masks_are_no_way_to_go_on(cases, tmp_path):
    """Not even where a correction keeps the file's size, its head, middle and end."""
    data, flags = tmp_path / "data", ["--output_dir", tmp_path / "out", *QUICK, "--max_steps", 1]
    for path in sorted((cases / "images").iterdir()):
        save(data / "images" / path.name, *in_ras(path))
        save(data / "labels" / path.name.removesuffix(".gz"), *in_ras(cases / "labels" / path.name))
    assert run_main("--data_dir", data, *flags)[0] == 0
    mask = data / "labels" / "lung_002.nii"
    before = mask.read_bytes()
    changed = bytearray(before)
    changed[10000] ^= 1
    mask.write_bytes(changed)
    says = "is of a run on other data: of 14 files 1 have changed, such as lung_002 (mask); put the data of before back"
    assert_one_error(run_main("--data_dir", data, *flags), says)
    mask.write_bytes(before)
    image = data / "images" / "lung_001.nii.gz"
    voxels, affine = in_ras(image)
    save(image, voxels[::-1], affine)
    assert_one_error(run_main("--data_dir", data, *flags), "1 have changed, such as lung_001 (image)")
    save(image, voxels, affine)
    code, said, errors = run_main("--data_dir", data, *flags)
    assert code == 0 and "fold 0: resuming after step 1" in said, errors


def test_a_share_of_the_cases(cases, straight, tmp_path):
    """Validation and test sides stay, and so does the spacing, which needs no labels."""
    flags = ["--data_dir", cases, "--output_dir", tmp_path, "--cache_dir", straight / "cache", *QUICK, "--max_steps", 1]
    code, said, errors = run_main(*flags, "--label_fraction", 0.5)
    assert code == 0 and not errors, errors
    fewer, whole = (json.loads((folder / "splits.json").read_text()) for folder in (tmp_path, straight))
    for split, full in zip(fewer["splits"], whole["splits"]):
        assert set(split["train"]) < set(full["train"]) and split["test"] == full["test"]
        assert split["validation"] == full["validation"]
    assert fewer["data"]["spacing"] == whole["data"]["spacing"]
    assert "training patients (--label_fraction 0.5)" in said


# ---------------------------------------------------------------------------------------------------------- prediction


@pytest.fixture(scope="module")
def new_scans(tmp_path_factory):
    """One volume in many orientations and as HDF5, in folders below each other."""
    folder = tmp_path_factory.mktemp("new") / "scans"
    voxels, _, affine = phantom(40, lesions=2)
    for name, axes in {
        "scan.nii.gz": "RAS",
        "a/scan.nii.gz": "LPS",
        "a/b/scan.nii": "SAL",
        "a/b/other.nii.gz": "IRP",
        "c/flipped.nii.gz": "LAS",
    }.items():
        save(folder / name, voxels, affine, axes)
    write_volume(folder / "hdf" / "scan.hdf5", voxels, affine)
    return folder


def test_masks_of_all_orientations(trained, new_scans, tmp_path):
    before = {path: path.read_bytes() for path in new_scans.rglob("*") if path.is_file()}
    code, out, errors = predict(new_scans, trained.folder, tmp_path)
    assert code == 0 and not errors, errors
    assert "6 volumes, mean of 2 folds" in out and str(tmp_path / "volumes.csv") in out
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    names = ["a/b/other.nii.gz", "a/b/scan.nii", "a/scan.nii.gz", "c/flipped.nii.gz", "hdf/scan.nii.gz", "scan.nii.gz"]
    pictures = [f"overlays/{name.removesuffix('.gz').removesuffix('.nii')}.png" for name in names]
    assert written == sorted([*names, *pictures, "volumes.csv", ".predicted.0.jsonl"])
    first, affine = in_ras(tmp_path / "scan.nii.gz")
    assert 0.5 < first.sum() * np.linalg.det(affine[:3, :3]) / 1000 < 30  # ml
    for name in names:
        mask, scan = nibabel.load(tmp_path / name), new_scans / name
        assert set(np.unique(mask.dataobj)) == {0, 1} and mask.get_data_dtype() == np.uint8
        if scan.exists():
            assert mask.shape == nibabel.load(scan).shape
            np.testing.assert_allclose(mask.affine, nibabel.load(scan).affine, atol=1e-4)
        upright, its_affine = in_ras(tmp_path / name)
        np.testing.assert_allclose(its_affine, affine, atol=1e-3)
        assert dice(upright, first) > 0.98, name
    rows = read_table(tmp_path / "volumes.csv")
    assert list(rows[0]) == ["case", "class", "volume_ml", "lesions", "reason"]
    assert [row["case"] for row in rows] == [name.replace(".gz", "").replace(".nii", "") for name in names]
    for row, name in zip(rows, names):
        expected = np.asarray(nibabel.load(tmp_path / name).dataobj).sum() * np.linalg.det(affine[:3, :3]) / 1000
        assert float(row["volume_ml"]) == pytest.approx(expected, rel=1e-4) and row["class"] == "1"
    assert before == {path: path.read_bytes() for path in new_scans.rglob("*") if path.is_file()}


def test_prediction_repeats_the_test(cases, trained, tmp_path):
    """A fold on its own test cases: its masks, exactly, in the orientation of the files."""
    tested = sorted({row["case"] for row in table(trained.folder)})
    (tmp_path / "new").mkdir()
    for case in tested:
        shutil.copy(cases / "images" / f"{case}.nii.gz", tmp_path / "new")
    for fold in "01":
        code, out, errors = predict(tmp_path / "new", trained.folder / fold, tmp_path / fold)
        assert code == 0 and not errors and "mean of 1 fold," in out
        for case in tested:
            one, two = (
                nibabel.load(folder / f"{case}.nii.gz") for folder in (tmp_path / fold, trained.folder / fold / "masks")
            )
            np.testing.assert_array_equal(one.dataobj, two.dataobj)
            np.testing.assert_array_equal(one.affine, two.affine)
        volumes = {row["case"]: float(row["volume_ml"]) for row in read_table(tmp_path / fold / "volumes.csv")}
        assert volumes == pytest.approx(
            {row["case"]: float(row["predicted_ml"]) for row in table(trained.folder) if row["fold"] == fold}, rel=1e-5
        )


def test_folds_are_averaged(trained, tmp_path, monkeypatch):
    """On the networks' own grid: where the mean of both folds' probabilities is above a half. The scan is read once."""
    reads = []
    monkeypatch.setattr(main_lts_msd, "read_image", lambda path: reads.append(path) or read_image(path))
    config = torch.load(trained.folder / "0" / "best.pth")["config"]
    voxels, _, _ = phantom(41, (30, 29, 17), lesions=2)
    save(tmp_path / "new" / "scan.nii.gz", voxels, np.diag([*config["spacing"], 1.0]))
    for where, out in (("", "mean"), ("0", "0"), ("1", "1")):
        assert predict(tmp_path / "new", trained.folder / where, tmp_path / out)[0] == 0
    assert len(reads) == 3  # for both folds, for the first and for the second
    masks = {out: in_ras(tmp_path / out / "scan.nii.gz")[0] for out in ("mean", "0", "1")}
    image = read_image(tmp_path / "new" / "scan.nii.gz")
    probabilities = [
        sliding_window.segment(
            [network_of(trained.folder / fold / "best.pth")],
            image,
            sliding_window.Windows(SIZE, 0.3, 4),
            config["clip_range"],
            "cpu",
        ).exp()
        for fold in "01"
    ]
    assert all(((one[1] > 0.5).numpy() == masks[fold]).all() for one, fold in zip(probabilities, "01"))
    assert ((sum(probabilities) / 2)[1] > 0.5).numpy().tolist() == (masks["mean"] == 1).tolist()
    assert (masks["mean"] != masks["0"]).any() and (masks["mean"] != masks["1"]).any()


def test_small_components_are_dropped(trained, new_scans, tmp_path):
    shutil.copytree(new_scans / "c", tmp_path / "new")
    for out, flags in (
        ("all", []),
        ("largest", ["--largest_component"]),
        ("some", ["--min_volume", 0.1]),
        ("none", ["--min_volume", 1000]),
    ):
        assert predict(tmp_path / "new", trained.folder, tmp_path / out, *flags)[0] == 0
    found = {out: in_ras(tmp_path / out / "flipped.nii.gz")[0] for out in ("all", "largest", "some", "none")}
    affine = in_ras(tmp_path / "all" / "flipped.nii.gz")[1]
    parts, count = scipy.ndimage.label(found["all"], np.ones((3, 3, 3)))
    sizes = np.bincount(parts.ravel())[1:]
    assert count > 1
    np.testing.assert_array_equal(found["largest"], parts == 1 + sizes.argmax())
    kept = 1 + np.flatnonzero(sizes * np.linalg.det(affine[:3, :3]) / 1000 >= 0.1)
    np.testing.assert_array_equal(found["some"], np.isin(parts, kept))
    assert not found["none"].any() and len({out: mask.sum() for out, mask in found.items()}) == 4
    rows = read_table(tmp_path / "largest" / "volumes.csv")
    assert float(rows[0]["volume_ml"]) == pytest.approx(sizes.max() * np.linalg.det(affine[:3, :3]) / 1000, rel=1e-4)


def test_a_volume_that_can_not_be_read(trained, new_scans, tmp_path):
    """The others are written, and the last line tells which one."""
    shutil.copytree(new_scans, tmp_path / "new")
    whole = (tmp_path / "new" / "a" / "scan.nii.gz").read_bytes()
    (tmp_path / "new" / "a" / "scan.nii.gz").write_bytes(whole[: len(whole) // 2])
    found = predict(tmp_path / "new", trained.folder, tmp_path / "out")
    assert_one_error(found, ("1 of 6 files", "a/scan: can't be read", "volumes.csv"))
    assert not (tmp_path / "out" / "a" / "scan.nii.gz").exists()
    assert len([path for path in (tmp_path / "out").rglob("*.nii*")]) == 5
    rows = read_table(tmp_path / "out" / "volumes.csv")
    assert [(row["case"], row["volume_ml"]) for row in rows if row["reason"]] == [("a/scan", "")] and len(rows) == 6


# -------------------------------------------------------------------------------------------------------- world space


CENTRES, WIDTHS = np.array([[0.0, 0, 0], [24, 12, -10]]), (32.0, 22.0)


def density(mm):
    """(...,) values from 0 to 1 of a smooth body at (..., 3) mm, whose lesion is where they are above a half."""
    parts = [0.9 * np.exp(-(((mm - centre) / width) ** 2).sum(-1)) for centre, width in zip(CENTRES, WIDTHS)]
    return 1 - np.prod([1 - part for part in parts], 0)


def rotation(degrees, axis):
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    i, j = [k for k in range(3) if k != axis]
    matrix = np.eye(3)
    matrix[[i, i, j, j], [i, j, i, j]] = c, -s, s, c
    return matrix


def grid(directions, spacing, shape):
    """An affine whose volume has its middle at the origin of the world."""
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    return affine


def millimetres(affine, shape):
    return np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]


class Thresholding(torch.nn.Module):
    """Stands in for a network: a smooth function of each voxel's value."""

    def forward(self, volumes):
        logits = (volumes - 0.5) * 20
        return torch.cat([-logits, logits], 1)


def test_oblique_and_anisotropic_scans(tmp_path, monkeypatch):
    """One body on three grids: the masks are where it is, and where each other is, in the world."""
    scans = {
        "axial": (np.eye(3), (1.5, 1.5, 1.5), (64, 60, 56)),
        "oblique": (rotation(15, 2) @ rotation(-12, 0), (1.5, 1.5, 1.5), (64, 64, 60)),
        "anisotropic": (np.diag([-1, -1, 1]), (0.9, 0.9, 2.5), (100, 96, 34)),
    }
    for name, (directions, spacing, shape) in scans.items():
        affine = grid(directions, spacing, shape)
        hu = np.rint(density(millimetres(affine, shape)) * 2000 - 1000).astype(np.int16)
        (tmp_path / "new").mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(hu, affine), tmp_path / "new" / f"{name}.nii.gz")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.pth").touch()
    config = {
        "input_size": list(SIZE),
        "clip_range": [-1000.0, 1000.0],
        "spacing": [1.5, 1.5, 2.0],
        "classes": 2,
        "overlap": 0.25,
        "largest_component": False,
        "min_volume": 0.0,
        "tolerance": 2.0,
    }
    monkeypatch.setattr(main_lts_msd, "load_folds", lambda *_: ([Thresholding()], config, [{}]))
    code, _, errors = predict(tmp_path / "new", tmp_path / "run", tmp_path / "out", "--batch_size_per_gpu", 64)
    assert code == 0 and not errors, errors
    for name, (directions, spacing, shape) in scans.items():
        mask = nibabel.load(tmp_path / "out" / f"{name}.nii.gz")
        assert mask.shape == shape
        np.testing.assert_allclose(mask.affine, grid(directions, spacing, shape), atol=1e-4)
        found = dice(np.asarray(mask.dataobj), density(millimetres(mask.affine, shape)) > 0.5)
        print(f"{name}: Dice {found:.4f} with the body")
        assert found > 0.98, name
    axial = sitk.ReadImage(str(tmp_path / "out" / "axial.nii.gz"))
    for name in ("oblique", "anisotropic"):
        other = sitk.Cast(sitk.ReadImage(str(tmp_path / "out" / f"{name}.nii.gz")), sitk.sitkFloat32)
        moved = sitk.GetArrayFromImage(sitk.Resample(other, axial, sitk.Transform(), sitk.sitkLinear)) > 0.5
        found = dice(moved, sitk.GetArrayFromImage(axial))
        print(f"{name}: Dice {found:.4f} with the axial one")
        assert found > 0.98, name


# ----------------------------------------------------------------------------------------------------------- bad input


def edited(kind, number, change):
    """A function that changes the voxels of a case's file."""

    def spoil(data):
        path = data / kind / f"lung_{number:03}.nii.gz"
        image = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(change(np.asarray(image.dataobj)), image.affine), path)

    return spoil


def label_value(number, value):
    def change(voxels):
        voxels = voxels.astype(np.float32 if value != round(value) else np.int16)
        voxels[3, 4, 5] = value
        return voxels

    return edited("labels", number, change)


def with_nan(voxels):
    voxels = voxels.astype(np.float32)
    voxels[3, 4, 5] = np.nan
    return voxels


def no_label(data):
    (data / "labels" / "lung_003.nii.gz").unlink()


def no_image(data):
    (data / "images" / "lung_003.nii.gz").unlink()


def label_elsewhere(data):
    path = data / "labels" / "lung_003.nii.gz"
    image = nibabel.load(path)
    affine = image.affine.copy()
    affine[0, 3] += 1.5
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), affine), path)


def cut_off(data):
    path = data / "images" / "lung_003.nii.gz"
    path.write_bytes(path.read_bytes()[:20000])


def gap(data):
    for number in range(7):
        label_value(number, 3)(data)


def all_empty(data):
    for number in range(7):
        edited("labels", number, np.zeros_like)(data)


def nothing(data):
    shutil.rmtree(data / "images")
    shutil.rmtree(data / "labels")
    (data / "images").mkdir()
    (data / "labels").mkdir()


NUMBER_3 = "lung_003.nii.gz"
BAD_DATA = {
    "image without label": (no_label, ["images/" + NUMBER_3, "has no label"]),
    "label without image": (no_image, ["labels/" + NUMBER_3, "has no image"]),
    "label of another shape": (
        edited("labels", 3, lambda voxels: voxels[:-1]),
        ["labels/" + NUMBER_3, "another shape"],
    ),
    "label elsewhere": (label_elsewhere, ["labels/" + NUMBER_3, "1.5 mm"]),
    "label -1": (label_value(3, -1), ["labels/" + NUMBER_3, "-1", "0 to 255"]),
    "label 0.5": (label_value(3, 0.5), ["labels/" + NUMBER_3, "0.5", "0 to 255"]),
    "label 300": (label_value(3, 300), ["labels/" + NUMBER_3, "300", "0 to 255"]),
    "gap": (gap, ["--data_dir", "classes 0, 1, 3", "without a gap"]),
    "all empty": (all_empty, ["--data_dir", "no labelled voxel"]),
    "class of one case": (label_value(3, 2), ["--data_dir", "class 2 in one case alone, lung_003"]),
    "4D": (edited("images", 3, lambda voxels: np.stack([voxels] * 2, -1)), ["images/" + NUMBER_3, "4D"]),
    "NaN": (edited("images", 3, with_nan), ["images/" + NUMBER_3, "NaN"]),
    "cut off": (cut_off, ["images/" + NUMBER_3, "can't be read"]),
    "no cases": (nothing, ["--data_dir", "holds no cases"]),
    "no folders": (shutil.rmtree, ["--data_dir", "no such folder"]),
}


@pytest.mark.parametrize("what", BAD_DATA)
def test_bad_data(cases, tmp_path, what):
    spoil, says = BAD_DATA[what]
    shutil.copytree(cases, tmp_path / "data")
    spoil(tmp_path / "data")
    assert_one_error(run_main("--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out", "--epochs", 1), says)
    assert not (tmp_path / "out" / "splits.json").exists()


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--input_size", 25, 24, 12], "--input_size"),
        (["--overlap", 1], "--overlap"),
        (["--overlap", -0.1], "--overlap"),
        (["--foreground_share", 2], "--foreground_share"),
        (["--spacing", 0, 0, 0], "--spacing"),
        (["--predict", "DIR"], "--weights"),
        (["--weights", "OUT"], "--predict"),
        (["--k_fold", 1], "--k_fold"),
        (["--label_fraction", 0], "--label_fraction"),
        (["--decoder", "resunet"], "--decoder"),
        (["--patches_per_case", 0], "--patches_per_case"),
        (["--tolerance", -1], "--tolerance"),
        (["--cache_gb", -1], "--cache_gb"),
        (["--min_volume", "nan"], "--min_volume"),
        (["--clip_range", 1000, -1000], "--clip_range"),
        (["--arch", "resnet500"], "--arch"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_flags_wrong_by_themselves(tmp_path, flags, says):
    assert_one_error(run_main("--data_dir", tmp_path, "--output_dir", tmp_path / "out", *flags), says, 2)
    assert not (tmp_path / "out").exists()


def test_data_dir_is_needed():
    assert_one_error(run_main(), "--data_dir", 2)


def test_folders_and_weights(cases, trained, new_scans, tmp_path, weights):
    (tmp_path / "pretraining").mkdir()
    (tmp_path / "pretraining" / "checkpoint.pth").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    wide = VisionTransformer(SIZE, (12, 12, 6), embed_dim=96, depth=3, num_heads=3)
    torch.save({"teacher": wide.state_dict()}, tmp_path / "wide.pth")
    best = torch.load(trained.folder / "0" / "best.pth")
    for name, config in (("classifier", {"arch": "vit_tiny"}), ("other", best["config"] | {"arch": "vit_small"})):
        (tmp_path / name).mkdir()
        torch.save(best | {"config": config}, tmp_path / name / "best.pth")
    shutil.copytree(new_scans / "a", tmp_path / "twice")
    write_volume(tmp_path / "twice" / "scan.hdf5", *phantom(0)[::2])
    data, out = ["--data_dir", cases], ["--output_dir", tmp_path / "out"]
    new = ["--predict", new_scans, *out, "--weights"]
    for flags, says in (
        ([*data, "--output_dir", tmp_path / "pretraining"], "holds a pre-training run"),
        ([*data, "--output_dir", tmp_path / "file"], "--output_dir"),
        ([*data, *out, "--k_fold", 8], ("7 patients are too few", "--k_fold 8")),
        ([*data, *out, "--num_test", 7], "--num_test 7"),
        (
            [*data, *out, "--pretrained_weights", tmp_path / "no.pth"],
            "--pretrained_weights " + str(tmp_path / "no.pth"),
        ),
        ([*data, *out, "--pretrained_weights", tmp_path / "wide.pth"], "cls_token (1, 1, 96) instead of (1, 1, 48)"),
        ([*data, *out, "--pretrained_weights", weights, "--checkpoint_key", "best"], "--checkpoint_key"),
        ([*data, *out, "--cache_dir", tmp_path / "file"], ("--cache_dir", str(tmp_path / "file"))),
        ([*data, *out, "--precision", "fp16"], "--precision fp16"),
        ([*new, tmp_path / "nowhere"], "--weights"),
        ([*new, tmp_path / "empty"], "no trained fold"),
        ([*new, tmp_path / "classifier"], ("--weights", "is no checkpoint of main_lts_msd.py")),
        ([*new, tmp_path / "other"], ("--weights", "does not fit vit_small")),
        (["--predict", tmp_path / "empty", "--weights", trained.folder, *out], "no volume found"),
        (["--predict", tmp_path / "nowhere", "--weights", trained.folder, *out], "nowhere: no such folder"),
        (["--predict", tmp_path / "twice", "--weights", trained.folder, *out], "two volumes are called"),
        (["--predict", new_scans, "--weights", trained.folder, "--output_dir", trained.folder], "holds a trained run"),
        *(
            (
                ["--predict", new_scans, "--weights", trained.folder, "--output_dir", inside],
                "lies in the --predict folder",
            )
            for inside in (new_scans, new_scans / "masks")
        ),
    ):
        assert_one_error(run_main(*flags), says)
    assert not (tmp_path / "out" / "0").exists() and not (new_scans / "volumes.csv").exists()


def test_a_classifier_s_run_is_another(cases, trained, tmp_path):
    """A folder of main_lnc_luna16.py, whose splits.json says other things."""
    splits = json.loads((trained.folder / "splits.json").read_text())
    splits["data"] = {"folds": "patients", "crop_size": [1, 1, 1], "crop_spacing": [1, 1, 1]}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    assert_one_error(run_main("--data_dir", cases, "--output_dir", tmp_path), ("splits.json", "anew"))


def test_odd_cases_that_work(cases, tmp_path):
    """A volume smaller than the window, one without a lesion, labels stored as floats: noted or taken as they are."""
    shutil.copytree(cases, tmp_path / "data")
    write_case(tmp_path / "data", "lung_000", *phantom(0, (20, 18, 9)))
    edited("labels", 1, np.zeros_like)(tmp_path / "data")
    for number in range(2, 7):
        edited("labels", number, lambda voxels: voxels.astype(np.float32))(tmp_path / "data")
    names, odd = [f"lung_{i:03}" for i in range(7)], {"lung_000", "lung_001"}
    tests = [set(patient_splits(names, [0] * 7, 2, 2, seed)[0].test) for seed in range(100)]
    for seed in (tests.index(odd), next(seed for seed in range(100) if not tests[seed] & odd)):
        out = tmp_path / str(seed)
        code, said, errors = run_main(
            "--data_dir", tmp_path / "data", "--output_dir", out, "--epochs", 1, "--patches_per_case", 2, "--seed", seed
        )
        assert code == 0 and not errors, errors
        notes = [line for line in said.splitlines() if line.startswith(("note:", "warning:"))]
        assert (
            len(notes) == 3 and "smaller than the window of 24 24 12 voxels" in notes[1] and "lung_000" in notes[1]
        ), notes
        assert "without a labelled voxel" in notes[0] and "lung_001" in notes[0]
        assert "no 95 % interval: 2 cases" in notes[2]
        assert {row["case"] for row in table(out)} == tests[seed]
        for row in table(out):
            assert (
                nibabel.load(out / row["fold"] / "masks" / f"{row['case']}.nii.gz").shape
                == nibabel.load(tmp_path / "data" / "images" / f"{row['case']}.nii.gz").shape
            )
            assert (float(row["volume_ml"]) == 0) == (row["case"] == "lung_001")


@pytest.mark.parametrize(
    "side, file",
    [
        ("test", "data/images/{}.nii.gz"),
        ("test", "out/cache/*/{}*.label.hdf5"),
        ("validation", "out/cache/*/{}*.image.hdf5"),
    ],
)
def test_files_that_break_while_it_runs(cases, tmp_path, monkeypatch, side, file):
    """An image to test on, or a copy to show or to validate on, that can't be read any more: one line that names it."""
    shutil.copytree(cases, tmp_path / "data")
    train_step, names = fold_loop.weighted_step, []

    def spoiled(*args):
        names.extend(json.loads((tmp_path / "out" / "splits.json").read_text())["splits"][0][side])
        for name in names:
            for path in tmp_path.glob(file.format(name)):
                path.write_bytes(b"no image")
        return train_step(*args)

    monkeypatch.setattr(fold_loop, "weighted_step", spoiled)
    found = run_main(
        "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out", "--epochs", 1, "--patches_per_case", 1
    )
    assert_one_error(found, "can't be read")
    assert any(name in found[2][0] for name in names)


def test_nan_stops_the_run_in_one_line(cases, tmp_path):
    assert_one_error(
        run_main(
            "--data_dir",
            cases,
            "--output_dir",
            tmp_path,
            "--epochs",
            3,
            "--lr",
            1e30,
            "--optimizer",
            "sgd",
            "--layer_decay",
            1,
            "--patches_per_case",
            2,
        ),
        "diverged",
    )
