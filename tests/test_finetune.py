"""What the downstream scripts share: folds, crops, batches, learning rates and the bootstrap against formulas."""

import argparse
import itertools
import json
import os

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from augmentations import PAPER, Policy, collate_views, paper_policy, scale_intensity
from dino3d.command_line import Preempted, UserError
from dino3d.data.conventions import DataError
from dino3d.data.layouts import case_names
from dino3d.evaluation.statistics import bootstrap_interval, interval_notes, mean_and_deviation
from dino3d.features.encoder import ENCODER, find_weights, load_encoder
from dino3d.files import append_json, read_json, read_table, write_json, write_table
from dino3d.finetune.crops import (
    READ_AHEAD,
    EvaluationCrops,
    TrainingBatches,
    WindowAugmentation,
    centre_window,
    check_crops,
    collate_crops,
    read_ahead,
    read_crop,
)
from dino3d.finetune.fold_folders import fold_files
from dino3d.finetune.fold_loop import FoldProgress, TrainConfig
from dino3d.finetune.inference import gather_rows
from dino3d.finetune.runtime import Runtime
from dino3d.finetune.same_data import contents_of
from dino3d.finetune.splits import (
    Split,
    count_by_patient,
    default_num_test,
    divide,
    fraction_text,
    labelled_share,
    make_splits,
    patient_splits,
    save_splits,
    subset_splits,
)
from dino3d.training.layer_decay import layer_groups, set_learning_rate
from utils import Processes
from vision_transformer import ARCHITECTURES, VisionTransformer


def write_crop(path, crop, spacing=(1.0, 1.0, 1.0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(crop.astype(np.int16), np.diag([*spacing, 1.0])), path)
    return str(path)


def random_crop(shape, seed=0):
    return np.random.default_rng(seed).integers(-1000, 600, shape).astype(np.int16)


# ------------------------------------------------------------------------------------------------------------- folds


def random_patients(seed, patients=40, classes=2, most=6):
    """(patients, labels) of each case, some patients with many cases."""
    rng = np.random.default_rng(seed)
    names, labels = [], []
    for patient in range(patients):
        for _ in range(rng.integers(1, most + 1)):
            names.append(f"p{patient:03}")
            labels.append(int(rng.choice(classes, p=[0.7] + [0.3 / (classes - 1)] * (classes - 1))))
    return names, labels


@pytest.mark.parametrize("seed", range(8))
def test_divide_is_as_even_as_scikit_learns(seed):
    """Spread of the classes over folds, against StratifiedGroupKFold; each patient on one side; no side empty."""
    from sklearn.model_selection import StratifiedGroupKFold

    names, labels = random_patients(seed)
    patients, counts = count_by_patient(names, labels)
    sides = divide(counts, np.full(5, 0.2), np.random.default_rng(seed))
    ours = np.stack([counts[sides == side].sum(0) for side in range(5)])
    theirs = StratifiedGroupKFold(5).split(names, labels, names)
    theirs = np.stack([np.bincount(np.array(labels)[test], minlength=2) for _, test in theirs])
    assert ours.sum(0).tolist() == theirs.sum(0).tolist() == np.bincount(labels).tolist()
    assert ours.std(0).sum() <= theirs.std(0).sum() + 0.5 and (ours.sum(1) > 0).all()


@pytest.mark.parametrize("cases, wanted", [(185, 37), (61, 12), (200, 37), (61, 30)])
def test_a_test_set_has_the_size_asked_for(cases, wanted):
    """One case per patient: exactly as many cases as asked for, with the classes in their proportion."""
    labels = [int(i % 4 == 0) for i in range(cases)]
    split = patient_splits([f"p{i:03}" for i in range(cases)], labels, wanted, 5, 0)[0]
    assert len(split.test) == pytest.approx(wanted, abs=1)
    positive = sum(labels[int(patient[1:])] for patient in split.test)
    assert positive == pytest.approx(wanted * np.mean(labels), abs=1)


def test_divide_leaves_no_side_empty():
    for counts in ([[100, 0], [1, 0], [0, 1]], [[50, 50], [50, 50], [50, 50]], [[0, 3], [0, 3], [9, 0]]):
        for shares in ((0.01, 0.99), (1 / 3, 1 / 3, 1 / 3)):
            sides = divide(counts, shares, np.random.default_rng(0))
            assert set(sides) == set(range(len(shares)))


def test_patient_splits():
    names, labels = random_patients(0)
    splits = patient_splits(names, labels, None, 5, 0)
    everyone = set(names)
    assert len(splits) == 5 and all(split.test == splits[0].test for split in splits)
    for split in splits:
        sides = [set(side) for side in split]
        assert set().union(*sides) == everyone and sum(map(len, sides)) == len(everyone)  # nobody on two sides
    validated = [patient for split in splits for patient in split.validation]
    assert sorted(validated) == sorted(everyone - set(splits[0].test))  # everyone else validates once
    assert patient_splits(names, labels, None, 5, 0) == splits
    assert patient_splits(names, labels, None, 5, 1) != splits


def test_default_test_set():
    for cases, wanted in ((3, 1), (61, 12), (110, 22), (111, 37), (185, 37), (370, 37), (371, 74), (1000, 200)):
        assert default_num_test(cases) == wanted


@pytest.mark.parametrize(
    "patients, num_test, k_fold, says",
    [(5, None, 5, "--k_fold 5"), (8, 7, 5, "--k_fold 5"), (8, 8, 2, "--num_test 8"), (2, None, 2, "2 patients")],
)
def test_too_few_patients(patients, num_test, k_fold, says):
    with pytest.raises(UserError, match=says):
        labels = [i % 2 for i in range(patients)]
        patient_splits([f"p{i}" for i in range(patients)], labels, num_test, k_fold, 0)


def test_subset_splits():
    subsets = ["subset10", "subset2", "subset1", "subset1"]
    splits = subset_splits(["a", "b", "c", "d"], subsets)
    assert [split.test for split in splits] == [["c", "d"], ["b"], ["a"]]  # subset10 after subset2
    assert [split.validation for split in splits] == [["b"], ["a"], ["c", "d"]]
    assert [split.train for split in splits] == [["a"], ["c", "d"], ["b"]]
    with pytest.raises(UserError, match="at least 3 subsets.*subset1, subset2"):
        subset_splits(["a", "b"], ["subset2", "subset1"])


def test_splits_are_read_back(tmp_path):
    path, make = tmp_path / "splits.json", make_splits
    names, labels = random_patients(1)
    flags = ("patients", 5, None, 0, names, labels, ["subset0"] * len(names), ("crop_size", "crop_spacing"))
    splits, data = make(path, *flags)
    save_splits(path, splits, data | {"crop_size": [3, 3, 3], "crop_spacing": [1, 1, 1]})
    assert make(path, *flags)[0] == splits and make(path, *flags)[1]["crop_size"] == [3, 3, 3]
    for other in (
        ("subsets", *flags[1:]),
        ("patients", 4, *flags[2:]),
        (*flags[:3], 1, *flags[4:]),
        (*flags[:5], [*labels[:-1], 1 - labels[-1]], *flags[6:]),
        (*flags[:4], [name.replace("p", "q") for name in names], *flags[5:]),
    ):
        with pytest.raises(UserError, match="splits.json.*another --output_dir"):
            make(path, *other)
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match="can't be read"):
        make(path, *flags)


def test_a_files_content_is_known_again_wherever_it_lies(tmp_path):
    """By its size and some of its bytes, or by all; not by its time or place."""
    path, copy = tmp_path / "a.nii", tmp_path / "b" / "a.nii"
    path.write_bytes(np.random.default_rng(0).bytes(40000))
    copy.parent.mkdir()
    copy.write_bytes(path.read_bytes())
    os.utime(copy, (0, 0))

    def of(path, whole):
        return contents_of({"a": str(path)}, whole)

    kept = {whole: of(path, whole) for whole in (False, True)}
    assert all(of(copy, whole) == kept[whole] and kept[whole]["a"].startswith("40000 bytes, ") for whole in kept)
    for at, seen in ((0, True), (10000, False), (20000, True), (39999, True)):
        changed = bytearray(path.read_bytes())
        changed[at] ^= 1
        copy.write_bytes(changed)
        assert (of(copy, False) != kept[False]) == seen and of(copy, True) != kept[True]
    assert of(tmp_path / "none.nii", False) == {"a": ""}
    many = {str(n): str(path) for n in range(1234)}
    assert contents_of(many) == dict.fromkeys(many, kept[False]["a"]) and contents_of({}) == {}


def test_a_header_is_known_by_the_voxels_beside_it(tmp_path):
    volume = sitk.GetImageFromArray(np.zeros((4, 5, 6), np.int16))
    sitk.WriteImage(volume, str(tmp_path / "a.mhd"))
    before = contents_of({"a": str(tmp_path / "a.mhd")})
    (tmp_path / "a.raw").write_bytes(b"\1" * 240)
    assert contents_of({"a": str(tmp_path / "a.mhd")}) != before


def test_splits_remember_the_files(tmp_path):
    path, names = tmp_path / "splits.json", list("abcdefgh")
    flags = ("patients", 3, 2, 0, names, [0] * 8, [""] * 8, ())
    files = {name: f"9 bytes, 0000000{name}" for name in names}
    splits, data = make_splits(path, *flags)
    assert "files" not in data
    save_splits(path, splits, data)  # as an older version did
    assert make_splits(path, *flags, contents=files)[1]["files"] == files
    splits, data = make_splits(path, *flags, contents=files | {"b": ""})
    save_splits(path, splits, data)
    assert make_splits(path, *flags, contents=files | {"c": ""}) == (splits, data | {"files": files})  # what is known
    moved = {name: one for name, one in files.items() if name != "a"} | {"z": "9 bytes, 00000000"}
    for now, says in (
        (files | {"c": "8 bytes, 0000000c", "d": "9 bytes, 00000000"}, "of 8 files 2 have changed, such as c; put"),
        (moved, "of 8 files 1 are gone, such as a, 1 are new, such as z; put the data of before back, or choose"),
    ):
        with pytest.raises(UserError, match=f"^{path}: is of a run on other data: {says}"):
            make_splits(path, *flags, contents=now)
    save_splits(path, splits, data | {"files": 5})
    with pytest.raises(UserError, match="can't be read"):
        make_splits(path, *flags, contents=files)


FRACTIONS = (0.05, 0.1, 0.25, 0.5, 0.9, 1)


@pytest.mark.parametrize("seed", range(3))
def test_smaller_shares_of_the_labels_lie_in_larger_ones(seed):
    names, labels = random_patients(seed, patients=80, classes=3)
    splits = patient_splits(names, labels, None, 4, seed)
    everyone, before = set(names), [set() for _ in splits]
    carried = {name: {label for other, label in zip(names, labels) if other == name} for name in everyone}
    for fraction in FRACTIONS:
        fewer = labelled_share(splits, fraction, seed, names, labels)
        assert fewer == labelled_share(splits, fraction, seed, names, labels)
        for fold, (split, whole) in enumerate(zip(fewer, splits)):
            chosen = set(split.train)
            assert split[1:] == whole[1:] and chosen <= set(whole.train) and before[fold] <= chosen
            assert len(chosen) == len(split.train) == round(fraction * len(whole.train))
            assert set().union(*(carried[name] for name in chosen)) == {0, 1, 2}
            before[fold] = chosen
            for kind in {frozenset(carried[name]) for name in whole.train}:  # stratified by the labels of a patient
                of_kind = {name for name in whole.train if carried[name] == kind}
                assert abs(len(of_kind & chosen) - fraction * len(of_kind)) <= (2 if fraction < 0.2 else 1.01)
    assert [split.train for split in fewer] == [split.train for split in splits]
    assert labelled_share(splits, 0.25, seed + 1, names, labels) != labelled_share(splits, 0.25, seed, names, labels)
    halves = [split.train for split in labelled_share([splits[0], splits[0]], 0.5, seed, names, labels)]
    assert halves[0] != halves[1]  # drawn anew for each fold


def test_a_share_that_leaves_a_label_to_nobody():
    names, labels = [f"p{i:02}" for i in range(50)], [int(i == 7) for i in range(50)]
    split = [Split(names, [], [])]
    assert "p07" in labelled_share(split, 0.04, 0, names, labels)[0].train
    with pytest.raises(UserError, match="--label_fraction 0.02 leaves 1 of 50.*fold 0.*label0; take 0.04 or more"):
        labelled_share(split, 0.02, 0, names, labels)
    assert len(labelled_share(split, 0.001, 0, names, [0] * 50)[0].train) == 1  # of one label, one patient


def test_splits_remember_their_share_of_the_labels(tmp_path):
    path = tmp_path / "splits.json"
    names, labels = random_patients(1)
    flags = ("patients", 5, None, 0, names, labels, ["subset0"] * len(names), ())
    whole, described = make_splits(path, *flags)
    splits, data = make_splits(path, *flags, label_fraction=0.5)
    assert described["label_fraction"] is None and data["label_fraction"] == 0.5
    used, of = (len(side[0].train) for side in (splits, whole))
    assert fraction_text(splits[:1], 40, 0.5) == f"; {used} of {of} training patients (--label_fraction 0.5)"
    assert "" == fraction_text(whole, 40, 1) and " to " in fraction_text([*splits, *whole], 40, 0.5)

    save_splits(path, splits, data)
    assert make_splits(path, *flags, label_fraction=0.5)[0] == splits
    for fraction in (1, 0.25):
        with pytest.raises(UserError, match=f"label_fraction 0.5, now it is {None if fraction == 1 else fraction}"):
            make_splits(path, *flags, label_fraction=fraction)
    del described["label_fraction"]  # as older runs have left it
    save_splits(path, whole, described)
    assert make_splits(path, *flags)[0] == whole
    with pytest.raises(UserError, match="label_fraction None, now it is 0.5"):
        make_splits(path, *flags, label_fraction=0.5)


# ------------------------------------------------------------------------------------------------------------- crops


def test_crops_are_read_around_their_centre(tmp_path):
    crop = random_crop((8, 5, 6))
    path = write_crop(tmp_path / "crop.nii.gz", crop)
    assert (read_crop(path, (4, 4, 4)) == crop).all()
    padded = read_crop(path, (4, 8, 6))
    assert padded.shape == (8, 8, 6) and (padded[:, 2:7] == crop).all() and (padded[:, [0, 1, 7]] == -1024).all()
    window = centre_window(crop, (4, 2, 6))
    assert (window == crop[2:6, 1:3]).all()
    (window,), *_ = [EvaluationCrops([path], (4, 8, 4))[0][:1]]
    assert (window[:, 2:7] == crop[2:6, :, 1:5]).all()


def test_crops_of_two_sizes_are_told_with_both_names(tmp_path):
    first = write_crop(tmp_path / "first.nii.gz", random_crop((8, 8, 8)))
    second = write_crop(tmp_path / "second.nii.gz", random_crop((8, 8, 9)))
    with pytest.raises(
        UserError, match=r"second.nii.gz: has 8 x 8 x 9 voxels, but .*first.nii.gz has 8 x 8 x 8"
    ) as caught:
        check_crops([first, second], Processes())
    assert caught.value.everywhere
    with pytest.raises(DataError, match=r"second.nii.gz: has 8 x 8 x 9 voxels, but .*first.nii.gz has 8 x 8 x 8"):
        read_crop(second, (4, 4, 4), (first, [8, 8, 8]))
    found, _ = check_crops([first, first], Processes())
    assert found == {"crop_size": [8, 8, 8], "crop_spacing": [1.0, 1.0, 1.0], "crop_spacings_differ": False}


def test_names_are_paths_without_suffix():
    assert case_names(["/d/a/x.nii.gz", "/d/b/x.hdf5"], "/d") == ["a/x", "b/x"]
    with pytest.raises(UserError, match="same name"):
        case_names(["/d/a/x.nii.gz", "/d/a/x.nii"], "/d")


def drawn_window(augmentation, crop, seed=0, epoch=0, case=0):
    group = collate_views([augmentation.draw(seed, epoch, case, crop.shape)])[0]
    return augmentation.render(torch.from_numpy(crop)[None], group, (-1000, 600))[0, 0]


@pytest.mark.parametrize(
    "shape, size", [((20, 18, 11), (12, 12, 6)), ((12, 12, 6), (12, 12, 6)), ((13, 14, 7), (12, 12, 6))]
)
def test_without_augmentations_training_sees_what_evaluation_sees(shape, size):
    crop = random_crop(shape)
    window = drawn_window(WindowAugmentation(Policy(), size, (0, 0, 0)), crop)
    expected = scale_intensity(torch.from_numpy(centre_window(crop, np.array(size))), -1000, 600)
    torch.testing.assert_close(window, expected, atol=1e-5, rtol=0)


def test_shift_moves_the_centre_by_whole_voxels():
    crop = random_crop((20, 20, 12))
    augmentation = WindowAugmentation(Policy(), (12, 12, 6), (3, 0, 2))
    full, seen = scale_intensity(torch.from_numpy(crop), -1000, 600), set()
    for case in range(60):
        window = drawn_window(augmentation, crop, case=case)
        found = [
            (x, z)
            for x, z in itertools.product(range(-3, 4), range(-2, 3))
            if (full[4 + x : 16 + x, 4:16, 3 + z : 9 + z] - window).abs().max() < 1e-4
        ]
        assert len(found) == 1
        seen.update(found)
    assert {x for x, _ in seen} == set(range(-3, 4)) and {z for _, z in seen} == set(range(-2, 3))


def test_augmentations_depend_on_seed_epoch_and_case_alone():
    crop = random_crop((20, 20, 12))
    augmentation = WindowAugmentation(paper_policy(PAPER), (12, 12, 6), (2, 2, 2))
    windows = {key: drawn_window(augmentation, crop, *key) for key in itertools.product((0, 1), repeat=3)}
    for (a, first), (b, second) in itertools.combinations(windows.items(), 2):
        assert not torch.equal(first, second), (a, b)
    assert all(torch.equal(window, drawn_window(augmentation, crop, *key)) for key, window in windows.items())


def test_rotations_in_mm():
    """With a spacing, control points are turned as a rigid body in mm: distances between them are kept in mm."""
    spacing = np.array([0.5, 0.7, 2.0])
    augmentation = WindowAugmentation(Policy(rotation=30, prob=1), (12, 12, 6), (0, 0, 0), spacing)
    control = augmentation.draw(0, 0, 0, (12, 12, 6))[0].control[0]  # (gx, gy, gz, 3) in voxels
    lattice = augmentation.lattice
    for axis in range(3):
        steps = np.linalg.norm(np.diff(control, axis=axis) * spacing, axis=-1)
        np.testing.assert_allclose(steps, lattice.spacing[axis] * spacing[axis], rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------- batches


def global_batches(cases, batch, world, position=0, epochs=2):
    """[counted cases of all ranks] for each step, and what each rank got."""

    def order_of(epoch):
        return np.random.default_rng(epoch).permutation(cases)

    ranks = [list(TrainingBatches(order_of, batch, rank, world, 0, position, epochs)) for rank in range(world)]
    assert len({len(steps) for steps in ranks}) == 1  # every rank takes every step
    assert all(len(share) >= 1 for steps in ranks for share in steps)
    return [
        [(epoch, case) for share in step for epoch, case, counted in share if counted] for step in zip(*ranks)
    ], ranks


@pytest.mark.parametrize("cases", [1, 7, 12, 13])
def test_ranks_share_the_same_batches(cases):
    one, _ = global_batches(cases, 6, 1)
    two, _ = global_batches(cases, 3, 2)
    three, ranks = global_batches(cases, 2, 3)
    assert one == two == three
    for epoch in range(2):
        seen = [case for step in one for e, case in step if e == epoch]
        assert sorted(seen) == list(range(cases))  # every case once, the last smaller batch too
    if cases == 13:
        assert [not share[0][2] for steps in ranks for share in steps[2::3]] == [False, False, True, True, True, True]


def test_batches_go_on_from_a_position():
    whole, _ = global_batches(13, 3, 2)
    rest, _ = global_batches(13, 3, 2, position=6)
    assert rest == whole[1:]


def test_progress_counts_to_the_end_of_an_epoch():
    done = FoldProgress()
    for cases in (6, 6, 1, 6):
        done.count_step(cases, 13)
    assert (done.epoch, done.position, done.step, done.cases) == (1, 6, 4, 19)


def test_each_case_has_one_row():
    class Two(Processes):
        def all_gather(self, value):
            return [value, other]

    other, runtime = ({3: np.array([3.0])}, None, False), Runtime(Two(), torch.float32, 1, 0)
    assert gather_rows(runtime, [1, 3], {1: np.array([1.0])}).tolist() == [[1.0], [3.0]]
    for cases, mine in (([1, 3], {3: np.zeros(1)}), ([1, 3], {}), ([3], {1: np.zeros(1)})):
        with pytest.raises(RuntimeError):
            gather_rows(runtime, cases, mine)
    failures, other = {1: "cut off"}, ({}, {3: "empty"}, False)
    with pytest.raises(UserError, match="not one of 2 cases could be evaluated"):
        gather_rows(runtime, [1, 3], {}, failures)
    other = ({3: np.array([3.0])}, {}, False)
    assert gather_rows(runtime, [1, 3], {}, failures).tolist() == [[3.0]] and failures.keys() == {1, 3}
    other = ({}, None, True)  # the other process was interrupted
    with pytest.raises(Preempted):
        gather_rows(runtime, [1, 3], {1: np.zeros(1)})
    assert gather_rows(runtime, [1], {1: np.array([1.0])}).tolist() == [[1.0]]  # nothing was left out


# ----------------------------------------------------------------------------------------------------- optimisation


def test_learning_rates_fall_from_layer_to_layer():
    from dino3d.finetune.heads import Classifier, LinearHead

    model = Classifier(
        VisionTransformer((24, 24, 12), (12, 12, 6), embed_dim=24, depth=3, num_heads=3), LinearHead(24, 2)
    )
    groups = layer_groups(model, "encoder.", model.encoder, 0.5, 0.05)
    place = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(place) == len(list(model.parameters()))
    expected = {
        "encoder.patch_embed": 0.5**4,
        "encoder.cls_token": 0.5**4,
        "encoder.pos_embed": 0.5**4,
        "encoder.blocks.0.": 0.5**3,
        "encoder.blocks.1.": 0.25,
        "encoder.blocks.2.": 0.5,
        "encoder.norm": 1,
        "head": 1,
    }
    for name, parameter in model.named_parameters():
        group = place[id(parameter)]
        assert group["scale"] == next(scale for start, scale in expected.items() if name.startswith(start)), name
        plain = parameter.ndim == 1 or name.endswith(("cls_token", "pos_embed"))
        assert group["weight_decay"] == (0 if plain else 0.05), name
    optimizer = torch.optim.SGD(groups, lr=1.0)
    set_learning_rate(optimizer, 0.2)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([0.0125, 0.025, 0.05, 0.1, 0.2])
    frozen = Classifier(model.encoder, model.head, freeze_encoder=True)
    assert sum(len(group["params"]) for group in layer_groups(frozen, "encoder.", frozen.encoder, 0.5, 0.05)) == 2


def test_learning_rate_over_a_fold():
    config = TrainConfig(
        epochs=10,
        val_freq=1,
        optimizer="sgd",
        lr=1.0,
        min_lr=0.1,
        warmup_epochs=2,
        weight_decay=0,
        layer_decay=1,
        seed=0,
        max_skipped_steps=1,
    )
    rates = [config.learning_rate(50, seen) for seen in (0, 50, 100, 300, 500)]
    assert rates == pytest.approx([0, 0.5, 1, 0.55, 0.1])


# ---------------------------------------------------------------------------------------------------------- figures


def test_bootstrap_draws_patients():
    """A mean's interval: 1.96 standard errors over patients, with ten equal cases of each or one."""
    values = np.random.default_rng(0).normal(size=400)
    half = 1.96 * values.std() / 20
    for cases in (1, 10):
        repeated, patients = np.repeat(values, cases), np.repeat(np.arange(400), cases)
        low, high = bootstrap_interval(lambda w, v=repeated: float((w * v).sum() / w.sum()), patients)
        assert [low, high] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.02)
    assert bootstrap_interval(lambda weights: None, range(6)) is None


@pytest.mark.parametrize("patients, given", [("aaaabbccd", False), ("abcde", True), ("aabbccddeee", True)])
def test_no_interval_of_fewer_than_five_patients(patients, given):
    """However many cases they have."""
    patients, values = list(patients), np.arange(len(patients)) / 10
    interval = bootstrap_interval(lambda weights: float(np.average(values, weights=weights)), patients)
    assert (interval is not None) == given == (interval_notes(patients) == [])
    if not given:
        assert interval_notes(patients) == ["no 95 % interval: 4 patients, and it takes 5 to give one"]
        assert interval_notes("a", "case") == ["no 95 % interval: 1 case, and it takes 5 to give one"]


def test_mean_and_deviation():
    records = [
        {"auc": 0.5, "one": 1.0, "none": None},
        {"auc": 0.7, "one": None, "none": None},
        {"auc": 0.9, "one": None, "none": None},
    ]
    means, deviations = mean_and_deviation(records, ["auc", "one", "none"])
    assert means == {"auc": pytest.approx(0.7), "one": 1.0, "none": None}
    assert deviations == {"auc": pytest.approx(np.std([0.5, 0.7, 0.9], ddof=1)), "one": None, "none": None}


def test_tables_keep_all_digits(tmp_path):
    value = float(np.float64(1) / 3)
    write_table(tmp_path / "t.csv", ["case", "p"], [["a,b", value], ["c", 1e-17]])
    rows = read_table(tmp_path / "t.csv")
    assert [(row["case"], float(row["p"])) for row in rows] == [("a,b", value), ("c", 1e-17)]
    with pytest.raises(ValueError):
        write_json(tmp_path / "m.json", {"auc": float("nan")})
    assert not (tmp_path / "m.json").exists()


# ---------------------------------------------------------------------------------------------------------- encoder


GIVEN = dict.fromkeys(ENCODER)


@pytest.fixture
def pretrained(tmp_path, monkeypatch):
    """A checkpoint of a small encoder with a config."""
    import functools

    small = functools.partial(VisionTransformer, embed_dim=24, depth=2, num_heads=3)
    monkeypatch.setitem(ARCHITECTURES, "vit_tiny", small)
    torch.manual_seed(0)
    model = ARCHITECTURES["vit_tiny"]((24, 24, 12), (12, 12, 6))
    state = {"backbone." + name: tensor for name, tensor in model.state_dict().items()}
    config = {
        "arch": "vit_tiny",
        "patch_size": [12, 12, 6],
        "input_size": [24, 24, 12],
        "clip_range": [-1350.0, 150.0],
        "spacing": [1.0, 1.0, 2.0],
    }
    torch.save({"teacher": state, "student": state, "config": config}, tmp_path / "model.pth")
    return tmp_path / "model.pth", config, model


def test_the_encoder_is_as_the_checkpoint_says(pretrained):
    path, config, model = pretrained
    encoder = load_encoder(str(path), "teacher", GIVEN)
    assert encoder.settings() == config
    built = encoder.build()
    assert built.img_size == (24, 24, 12)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in built.state_dict().items())
    same = load_encoder(str(path), "teacher", GIVEN | {"arch": "vit_tiny", "input_size": [24, 24, 12]})
    assert same.settings() == config


def test_a_file_without_config_needs_flags(pretrained, tmp_path):
    path, config, model = pretrained
    torch.save(
        {"teacher": model.state_dict(), "args": argparse.Namespace(arch="vit_tiny", lr=1.0)}, tmp_path / "old.pth"
    )
    with pytest.raises(UserError, match="pos_embed.*--arch vit_tiny"):  # of the default size
        load_encoder(str(tmp_path / "old.pth"), "teacher", GIVEN)
    encoder = load_encoder(str(tmp_path / "old.pth"), "teacher", GIVEN | {"input_size": [24, 24, 12]})
    assert encoder.arch == "vit_tiny" and encoder.clip_range == [-1000.0, 1000.0] and encoder.spacing is None


@pytest.mark.parametrize(
    "given, says",
    [
        ({"arch": "vit_small"}, "--arch vit_small contradicts"),
        ({"patch_size": [6, 6, 6]}, "--patch_size 6 6 6 contradicts"),
        ({"clip_range": [-1000.0, 1000.0]}, "--clip_range -1000 1000 contradicts"),
        ({"spacing": [2.0, 2.0, 2.0]}, "--spacing 2 2 2 contradicts"),
    ],
)
def test_contradictions(pretrained, given, says):
    with pytest.raises(UserError, match=says) as caught:
        load_encoder(str(pretrained[0]), "teacher", GIVEN | given)
    assert caught.value.everywhere and "\n" not in str(caught.value)


def test_weights_that_are_missing_or_broken(pretrained, tmp_path):
    path = pretrained[0]
    (tmp_path / "broken.pth").write_bytes(path.read_bytes()[:1000])
    for name, key, says in (
        (tmp_path / "no.pth", "teacher", "no such file"),
        (tmp_path / "broken.pth", "teacher", "can't be read"),
        (path, "best", "--checkpoint_key"),
    ):
        with pytest.raises(UserError, match=says):
            load_encoder(str(name), key, GIVEN)


def test_folds_of_a_run(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        fold_files(tmp_path / "nowhere")
    for fold in (0, 2, 10):
        (tmp_path / str(fold)).mkdir()
    with pytest.raises(UserError, match="no trained fold"):
        fold_files(tmp_path)
    for fold in (0, 2, 10):
        (tmp_path / str(fold) / "best.pth").touch()
    assert fold_files(tmp_path) == [tmp_path / fold / "best.pth" for fold in ("0", "2", "10")]
    assert fold_files(tmp_path / "2") == [tmp_path / "2" / "best.pth"] == fold_files(tmp_path / "2" / "best.pth")


def test_only_finished_folds_of_a_run_are_taken(tmp_path, capsys):
    """By metrics.json, which a fold writes last; splits.json, which a run writes first, tells how many there are."""
    write_json(tmp_path / "splits.json", {"data": {}, "splits": [{}] * 5})
    with pytest.raises(UserError, match=r"no fold is finished \(folds 0, 1, 2, 3, 4 not begun\): start"):
        fold_files(tmp_path)
    for fold in (0, 1, 2, 3):
        (tmp_path / str(fold)).mkdir()
    best = [tmp_path / str(fold) / "best.pth" for fold in (0, 1, 2)]
    for path in best:
        path.touch()
    for read in (fold_files, lambda path: find_weights(str(path), "--weights")):
        with pytest.raises(UserError, match=f"^--weights {tmp_path}: no fold is finished .*such as {best[0]}$"):
            read(tmp_path)
    for fold in (1, 2, 3):
        (tmp_path / str(fold) / "metrics.json").touch()
    assert fold_files(tmp_path) == best[1:]
    told = "fold 0 not finished; fold 3 without best.pth; fold 4 not begun"
    assert capsys.readouterr().out == f"note: left out of {tmp_path}: {told}\n"
    file, lines = find_weights(str(tmp_path))
    assert file == str(best[1]) and lines[0].endswith(f"{tmp_path / '2'}; left out: {told}") and len(lines) == 1
    (tmp_path / "splits.json").write_text("{")  # then what was not begun is not known
    assert fold_files(tmp_path) == best[1:] and "fold 0 not finished\n" in capsys.readouterr().out
    assert fold_files(tmp_path / "0") == best[:1] == fold_files(best[0]) and not capsys.readouterr().out


def test_a_fold_of_fewer_epochs_than_another_is_not_finished(tmp_path, capsys):
    """As where a start with more --epochs has come to fold 0 alone; a fold without a log does not tell."""
    for fold, epochs in enumerate((6, 2, 2, 0)):
        (tmp_path / str(fold)).mkdir()
        for name in ("best.pth", "metrics.json"):
            (tmp_path / str(fold) / name).touch()
        for epoch in range(1, epochs + 1):
            append_json(tmp_path / str(fold) / "log.txt", {"epoch": epoch, "step": 3 * epoch})
    assert fold_files(tmp_path) == [tmp_path / fold / "best.pth" for fold in "03"]
    told = "folds 1, 2 of 2 epochs, where fold 0 has 6"
    assert capsys.readouterr().out == f"note: left out of {tmp_path}: {told}\n"
    assert find_weights(str(tmp_path))[1][0].endswith(f"left out: {told}")
    for fold in "03":
        (tmp_path / fold / "metrics.json").unlink()
    with pytest.raises(UserError, match=f"no fold is finished .folds 0, 3 not finished; {told}.: start its training"):
        fold_files(tmp_path)


def test_json_is_readable(tmp_path):
    write_json(tmp_path / "x.json", {"a": None})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None} == read_json(tmp_path / "x.json")


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_read_ahead_in_order_and_not_all_at_once(workers):
    asked = []

    class Cases:
        def __getitem__(self, case):
            asked.append(case)
            return "broken" if case == 99 else (np.full((2, 2, 2), case, np.int16), case, True, None)

    cases, seen = [5, 3, 8, 1, 9, 2, 7, 4, 6, 0, 11], []
    for batch in map(collate_crops, read_ahead(Cases().__getitem__, cases, 2, workers)):
        assert (batch.crops == batch.cases[:, None, None, None]).all()
        seen += batch.cases.tolist()
        assert len(asked) <= len(seen) + 2 * READ_AHEAD
    assert seen == cases and sorted(asked) == sorted(cases)
    broken = map(collate_crops, read_ahead(Cases().__getitem__, [1, 99, 2], 2, workers))
    assert [batch.fatal for batch in broken] == ["broken", ""]
    assert not list(read_ahead(Cases().__getitem__, [], 2, workers))


def test_a_score_has_a_direction():
    from dino3d.finetune.fold_loop import Score

    high, low = Score("auc", "AUC"), Score("mm", "mm", higher_is_better=False)
    assert high.rank({"auc": 0.7, "loss": 1.0}) > high.rank({"auc": 0.6, "loss": 0.1})
    assert low.rank({"mm": 2.0, "loss": 1.0}) > low.rank({"mm": 3.0, "loss": 0.1})
    assert high.rank({"auc": 0.7, "loss": 0.1}) > high.rank({"auc": 0.7, "loss": 0.2})


def test_another_scripts_checkpoint_in_a_folds_folder_is_named(tmp_path):
    from dino3d.finetune.fold_folders import start_run
    from dino3d.training.checkpoint import save_checkpoint

    (tmp_path / "0").mkdir()
    save_checkpoint(tmp_path / "0" / "checkpoint.pth", {"student": {}, "teacher": {}, "config": {"lr": 0.1}})
    with pytest.raises(UserError, match="is a checkpoint of DINO pre-training .* it has no 'model'"):
        start_run(tmp_path, {"lr": 0.5, "weights_crc32": ""}, ("lr",), [], {}, Processes(), 3)
    assert not (tmp_path / "splits.json").exists()


def test_every_folds_checkpoint_is_of_the_run_that_is_started(tmp_path):
    """Also where fold 0's folder was removed, to train it again."""
    from dino3d.finetune.fold_folders import PARTS, start_run
    from dino3d.training.checkpoint import save_checkpoint

    config = {"lr": 0.1, "weights_crc32": "a", "pretrained_weights": "w.pth", "epochs": 3}

    def start(**changed):
        start_run(tmp_path, config | changed, ("lr",), [], {}, Processes(), 3)

    for fold, (epoch, position) in {2: (1, 0), 10: (2, 4)}.items():
        (tmp_path / str(fold)).mkdir()
        state = dict.fromkeys(PARTS) | {"epoch": epoch, "position": position, "config": config}
        save_checkpoint(tmp_path / str(fold) / "checkpoint.pth", state)
    start()
    start(epochs=5)
    kept = (tmp_path / "config.json").read_bytes()
    for changed, says in (
        ({"lr": 0.5}, "2/checkpoint.pth: is of a run with --lr 0.1, not 0.5"),
        ({"weights_crc32": "b"}, "w.pth: holds other weights than when .*2/checkpoint.pth was made"),
        ({"epochs": 2}, "^--epochs 2: .*10/checkpoint.pth has come to epoch 3, .* give --epochs 3 or more, or"),
    ):
        with pytest.raises(UserError, match=says):
            start(**changed)
    assert (tmp_path / "config.json").read_bytes() == kept
