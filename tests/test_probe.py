"""The probe of pre-training: its figures against scikit-learn; it neither changes a run nor is lost with one."""

import contextlib
import functools
import io
import json
import random
import shutil

import nibabel
import numpy as np
import pytest
import torch
from survive import differences, make_volumes, start
from test_main_dino import TINY, run_main
from torch import nn

import main_dino
import vision_transformer
from augmentations import MultiCropAugmentation
from dino3d.command_line import UserError
from dino3d.evaluation.protocols import NEIGHBOURS, STRENGTHS, nested_splits
from dino3d.evaluation.statistics import bootstrap_interval
from dino3d.evaluation.weighted_metrics import weighted_auc
from dino3d.features import probe, probe_crops
from dino3d.features.embedding import embed
from dino3d.features.encoder import load_encoder
from dino3d.files import read_log
from dino3d.training.events import EventWriter
from resnet3d import BasicBlock, ResNet
from utils import Processes
from vision_transformer import DINOHead, VisionTransformer

PATIENTS = 20


@pytest.fixture(autouse=True)
def smaller_model(monkeypatch):
    make_smaller(monkeypatch)


def make_smaller(monkeypatch):
    small = functools.partial(VisionTransformer, embed_dim=48, depth=2, num_heads=3)
    monkeypatch.setitem(vision_transformer.ARCHITECTURES, "vit_tiny", small)
    monkeypatch.setattr(main_dino, "DINOHead", lambda *args, **more: DINOHead(*args, **(more | {"hidden_dim": 64})))
    # A third of a run's start: the same for all runs of these sizes, and pictures of them
    monkeypatch.setattr(MultiCropAugmentation, "_patch_size", patch_size)
    monkeypatch.setattr(main_dino, "show_pictures", lambda *args: (args[-1].output_dir / "views.png").touch())


drawn_sizes, draw_size = {}, MultiCropAugmentation._patch_size


def patch_size(crops):
    key = repr((crops.policy, crops.global_size, crops.local_size, crops.spacing))
    crops.patch_size = drawn_sizes[key] if key in drawn_sizes else drawn_sizes.setdefault(key, draw_size(crops))
    return crops.patch_size


def write_crops(folder, patients=PATIENTS, shape=(26, 24, 14), affine=(-1, -1, 2, 1), labels=2):
    """Two crops of each patient, one of each class: noise, a little brighter with the label."""
    for patient in range(patients):
        rng = np.random.default_rng(patient)
        for label in range(labels):
            voxels = rng.normal(-700 + 60 * label + rng.normal(0, 60), 150, shape).astype(np.int16)
            path = folder / f"subset{patient % 3}" / f"label{label}" / f"p{patient:02}" / "crop.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(voxels, np.diag(affine).astype(float)), path)
    return folder


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    return write_crops(tmp_path_factory.mktemp("crops"))


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    return make_volumes(tmp_path_factory.mktemp("noise"))


@pytest.fixture(scope="module")
def flags(noise, crops):
    return [
        *("--data_dir", noise, "--probe_dir", crops, "--probe_every", 1, "--epochs", 3, "--batch_size_per_gpu", 4),
        *("--lr", 0.05, "--drop_path_rate", 0.3, "--momentum_teacher", 0.8, "--saveckp_freq", 1),
    ]


@pytest.fixture(scope="module")
def straight(flags, tmp_path_factory):
    """(output folder, standard output) of a run of these flags that nobody disturbed."""
    out, said = tmp_path_factory.mktemp("straight"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        make_smaller(patch)
        main_dino.main([*TINY, *map(str, flags), "--output_dir", str(out)])
    return out, said.getvalue()


def run(capsys, flags, out, *more):
    code, said, errors = run_main(capsys, *flags, "--output_dir", out, *more)
    assert code == 0 and not errors, errors
    return said


def probed(out):
    """The figures of all probes of a run, without what they took."""
    records = read_log(out / "log.txt")
    return [
        {name: value for name, value in record.items() if name.startswith("probe_") and name != "probe_seconds"}
        for record in records
    ]


def read_state(path):
    return torch.load(path, weights_only=True)


# ------------------------------------------------------------------------------------------------------------- figures


def features_by_hand(crops, weights):
    """(N, 2 D) features, (N,) labels and patients: nibabel, NumPy and the ViT's own methods, crop by crop."""
    state = read_state(weights)
    encoder = vision_transformer.ARCHITECTURES["vit_tiny"]((24, 24, 12), (12, 12, 6))
    encoder.load_state_dict(
        {k.removeprefix("backbone."): v for k, v in state["teacher"].items() if k.startswith("backbone.")}
    )
    encoder.eval()
    rows, labels, patients = [], [], []
    for path in sorted(crops.glob("*/*/*/*.nii.gz")):
        hu = np.asarray(nibabel.as_closest_canonical(nibabel.load(path)).dataobj)[1:-1, :, 1:-1]
        grey = np.clip((hu.astype(np.float32) + 1000) / 2000, 0, 1)
        with torch.no_grad():
            tokens = encoder.forward_tokens(torch.from_numpy(grey)[None, None])[0]
        rows.append(torch.cat([tokens[0], tokens[1:].mean(0)]).numpy())
        labels.append(int(path.parts[-3][-1]))
        patients.append(path.parts[-2])
    return np.stack(rows), np.array(labels), patients


def test_figures_are_those_of_scikit_learn(straight, crops):
    """AUC by logistic regression and kNN, each with its setting chosen in inner folds by the Brier score."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import StandardScaler

    records = probed(straight[0])
    x, y, patients = features_by_hand(crops, straight[0] / "checkpoint0002.pth")
    (splits,) = nested_splits(patients, y, folds=5, repeats=1, seed=0)

    made = {
        "logistic": [LogisticRegression(C=c, tol=1e-8, max_iter=10_000) for c in STRENGTHS],
        "knn": [
            lambda n, k=k: KNeighborsClassifier(min(k, n), metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
            for k in NEIGHBOURS
        ],
    }

    def predict(model, train, test):
        scaler = StandardScaler().fit(x[train])
        model = model(len(train)) if callable(model) else model
        return model.fit(scaler.transform(x[train]), y[train]).predict_proba(scaler.transform(x[test]))[:, 1]

    for name, grid in made.items():
        found, folds = np.zeros(len(y)), np.zeros(len(y), int)
        for fold, (train, inner, test) in enumerate(splits):
            assert not {patients[i] for i in train} & {patients[i] for i in test}
            errors = [
                sum(
                    ((predict(model, train[inner != k], train[inner == k]) - y[train[inner == k]]) ** 2).sum()
                    for k in range(5)
                )
                for model in grid
            ]
            found[test], folds[test] = predict(grid[int(np.argmin(np.round(errors, 9)))], train, test), fold
        parts = [(roc_auc_score(y[folds == k], found[folds == k]), y[folds == k]) for k in range(5)]
        pairs = [(part == 0).sum() * (part == 1).sum() for _, part in parts]
        expected = np.average([auc for auc, _ in parts], weights=pairs)
        assert records[1][f"probe_{name}_auc"] == pytest.approx(expected, abs=1e-9), name
    assert 0.5 < records[0]["probe_start_logistic_auc"] < 1  # a question that is neither hopeless nor given away


def test_intervals_are_a_bootstrap_over_patients():
    rng = np.random.default_rng(0)
    x, labels, patients = rng.normal(size=(40, 5)), np.arange(40) % 2, [f"p{i // 2}" for i in range(40)]
    x[:, 0] += labels
    figures, values = probe.judge(x, labels, patients)
    (splits,) = nested_splits(patients, labels, 5, 1, 0)
    folds = np.zeros(40, int)
    for fold, split in enumerate(splits):
        folds[split.test] = fold
    expected = bootstrap_interval(lambda weights: weighted_auc(labels, values, weights, folds), patients)
    assert figures["logistic_auc_interval"] == pytest.approx(expected)
    again, _ = probe.judge(x, labels, patients, start_values=values.tolist())
    assert again["logistic_auc_minus_start"] == 0 and again["logistic_auc_minus_start_interval"] == [0, 0]
    worse, _ = probe.judge(x, labels, patients, start_values=1 - values)
    assert worse["logistic_auc_minus_start"] == pytest.approx(2 * figures["logistic_auc"] - 1)


@pytest.mark.parametrize("patients", [5, 6, 9])
def test_few_patients_of_one_label_each(patients):
    """Each fold tests both labels, so that the figure rests on more than a pair by chance."""
    labels, names = np.arange(patients) % 2, [f"p{i}" for i in range(patients)]
    x = np.random.default_rng(0).normal(size=(patients, 3))
    x[:, 0] = labels
    figures, values = probe.judge(x, labels, names)
    assert figures["logistic_auc"] == 1 and np.isfinite(values).all()
    x[0, 0] = 5  # of label 0, seen to be of label 1: wrong in every pair of its fold
    pairs = min(PATIENTS // 4, patients // 2)
    assert probe.judge(x, labels, names)[0]["logistic_auc"] <= 1 - 1 / (2 * pairs)


def test_log_and_tensorboard_hold_the_same(straight):
    """Curves under one tag: the teacher's, and the constant ones beside it in folders of their own."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, said = straight
    records, logged = probed(out), read_log(out / "log.txt")
    for curve in ("", "start", "trivial-all", "trivial-radial", "trivial-histogram", "trivial-mean", "trivial-centre"):
        events = EventAccumulator(str(out / "tensorboard" / curve)).Reload()
        for name in ("logistic_auc", "knn_auc"):
            field = "_".join(filter(None, ["probe", curve.replace("-", "_"), name]))
            shown = events.Scalars(f"probe/{name}")
            assert [event.step for event in shown] == [record["step"] for record in logged] == [2, 4, 6]
            assert [event.value for event in shown] == pytest.approx([record[field] for record in records], abs=1e-6)
            if curve:
                assert len({record[field] for record in records}) == 1
    best = max(records, key=lambda record: record["probe_logistic_auc"])
    assert said.count("\nprobe after epoch") == 3 and "of the run so far" in said
    assert f"best after epoch {records.index(best) + 1} ({out / 'best_probe.pth'}); probes took" in said
    share = sum(record["probe_seconds"] for record in logged) / sum(
        record["probe_seconds"] + record["seconds"] for record in logged
    )
    assert f"{share:.1%} of the run's time" in said and all(record["seconds"] > 0 for record in logged)


def test_every_few_epochs_and_after_the_last(flags, tmp_path, capsys):
    run(capsys, flags, tmp_path, "--probe_every", 2)
    assert [bool(record) for record in probed(tmp_path)] == [False, True, True]


def test_three_classes(noise, tmp_path, capsys):
    crops = write_crops(tmp_path / "crops", patients=8, labels=3)
    run(capsys, ["--data_dir", noise, "--probe_dir", crops, "--epochs", 1, "--batch_size_per_gpu", 8], tmp_path / "out")
    (record,) = probed(tmp_path / "out")
    assert 0 <= record["probe_logistic_auc"] <= 1 and 0 <= record["probe_knn_auc"] <= 1


# ------------------------------------------------------------------------------------------------- the run is the same


def test_training_is_the_same_with_and_without(flags, straight, tmp_path, capsys, monkeypatch):
    """Every bit of the state, and all random numbers that anyone might draw."""
    measure, checked = probe.Probe.measure, []

    def watched(self, teacher, *progress):
        def state():
            return torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state()), random.getstate()

        before, modes = state(), [module.training for module in teacher.modules()]
        result = measure(self, teacher, *progress)
        checked.append(before == state() and modes == [module.training for module in teacher.modules()])
        return result

    monkeypatch.setattr(probe.Probe, "measure", watched)
    run(capsys, flags, tmp_path / "with", "--epochs", 1)
    assert checked == [True]
    at = flags.index("--probe_dir")
    run(capsys, flags[:at] + flags[at + 4 :], tmp_path / "without")
    one, two = (read_state(folder / "checkpoint.pth") for folder in (straight[0], tmp_path / "without"))
    del one["config"], two["config"]
    assert not differences(one, two)
    losses = [[one["loss"] for one in read_log(out / "log.txt")] for out in (straight[0], tmp_path / "without")]
    assert losses[0] == losses[1]


def test_an_encoder_is_left_as_it_was():
    encoder = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
    encoder[2].eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    x = torch.rand(8, 3) + 5
    with probe.in_evaluation(encoder, eager=False):
        y = encoder(x)
        assert not y.requires_grad and torch.equal(y, encoder(x))
    assert [module.training for module in encoder] == [True, True, False] and encoder.training
    assert not differences(before, dict(encoder.state_dict()))
    with pytest.raises(ValueError), probe.in_evaluation(encoder, eager=False):
        raise ValueError
    assert encoder.training and torch.is_grad_enabled()


def test_two_ranks_give_the_figures_of_one(noise, crops, tmp_path, capsys):
    """To the last digit, of weights that stay as they are: two ranks train on other sums than one does."""
    flags = [*TINY, "--data_dir", noise, "--probe_dir", crops, "--probe_every", 1, "--epochs", 1, "--lr", 0]
    flags += ["--min_lr", 0]
    out = ["--batch_size_per_gpu", 2, "--output_dir", tmp_path / "2"]
    ranks = start([*flags, *out], tmp_path / "p", 2, "run_small.py")
    run(capsys, [*flags[len(TINY) :], "--batch_size_per_gpu", 4], tmp_path / "1")
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), errors
    one, two = (json.loads((tmp_path / name / "probe.json").read_text()) for name in "12")
    assert one == two and len(one["start_values"]) == 2 * PATIENTS
    assert probed(tmp_path / "1") == probed(tmp_path / "2")
    assert probed(tmp_path / "1")[0]["probe_logistic_auc_minus_start"] == 0
    assert not differences(*(read_state(tmp_path / name / "best_probe.pth")["probe"] for name in "12"))


# ------------------------------------------------------------------------------------------------------------ resuming


class Killed(BaseException):
    pass


@pytest.mark.parametrize("where", ["embed", "save_checkpoint"])
def test_a_run_killed_in_a_probe_goes_on_to_the_same(flags, straight, tmp_path, capsys, monkeypatch, where):
    # Calls at the start and in the first probe, and in the second one before it is over
    calls = {"embed": 3 + 3 + 1, "save_checkpoint": 0}[where]
    call, original = iter(range(100)), getattr(probe, where)

    def killed(*args, **kwargs):
        if next(call) == calls:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(probe, where, killed)
    with pytest.raises(Killed):
        run_main(capsys, *flags, "--output_dir", tmp_path / "killed")
    monkeypatch.setattr(probe, where, original)
    assert len(read_log(tmp_path / "killed" / "log.txt")) == (where != "save_checkpoint")
    before = (tmp_path / "killed" / "probe.json").stat().st_mtime_ns
    run(capsys, flags, tmp_path / "killed")
    kept = (tmp_path / "killed" / "probe.json").stat().st_mtime_ns == before
    assert kept == (where != "save_checkpoint")  # made anew with a run that has no checkpoint yet
    assert probed(tmp_path / "killed") == probed(straight[0])
    for name, parts in {
        "checkpoint.pth": ("student", "teacher", "optimizer"),
        "best_probe.pth": ("teacher", "probe"),
    }.items():
        one, two = (read_state(folder / name) for folder in (straight[0], tmp_path / "killed"))
        assert not differences([one[part] for part in parts], [two[part] for part in parts])


def test_a_run_without_a_probe_so_far_gets_one(flags, straight, tmp_path, capsys):
    """The encoder before training is made anew, and not taken from the weights that are resumed from."""
    at = flags.index("--probe_dir")
    run(capsys, flags[:at] + flags[at + 4 :], tmp_path / "later", "--max_steps", 4)
    said = run(capsys, flags, tmp_path / "later")
    assert "the encoder before training is made anew from --seed" in said
    assert (tmp_path / "later" / "probe.json").read_text() == (straight[0] / "probe.json").read_text()
    assert probed(tmp_path / "later")[2] == probed(straight[0])[2] | {"probe_best_epoch": 3}
    run(capsys, flags[:at] + flags[at + 4 :], tmp_path / "later", "--epochs", 4)  # and may go on without


def test_other_crops_are_refused_when_a_run_is_resumed(flags, crops, tmp_path, capsys):
    shutil.copytree(crops, tmp_path / "crops")
    run(capsys, flags, tmp_path / "out", "--probe_dir", tmp_path / "crops", "--epochs", 1)
    shutil.move(tmp_path / "crops", tmp_path / "moved")  # the same ones elsewhere
    run(capsys, flags, tmp_path / "out", "--probe_dir", tmp_path / "moved", "--epochs", 2)
    shutil.rmtree(next((tmp_path / "moved" / "subset1" / "label0").iterdir()))
    state = (tmp_path / "out" / "checkpoint.pth").read_bytes()
    code, _, errors = run_main(capsys, *flags, "--output_dir", tmp_path / "out", "--probe_dir", tmp_path / "moved")
    assert code == 1 and "probe.json: is of other crops" in errors[0] and "to measure anew" in errors[0], errors
    (tmp_path / "out" / "probe.json").unlink()
    code, _, errors = run_main(capsys, *flags, "--output_dir", tmp_path / "out", "--probe_dir", tmp_path / "moved")
    assert code == 1 and "best_probe.pth: is of other crops" in errors[0]
    assert (tmp_path / "out" / "checkpoint.pth").read_bytes() == state
    (tmp_path / "out" / "best_probe.pth").unlink()
    (tmp_path / "out" / "probe.json").unlink()
    run(capsys, flags, tmp_path / "out", "--probe_dir", tmp_path / "moved")


def test_a_run_of_an_older_version_is_probed_on_as_it_was(flags, tmp_path, capsys, monkeypatch):
    """Its files name no pool: class token and mean of the patch tokens."""
    with monkeypatch.context() as older:
        older.setattr(probe, "PROBE_POOL", "cls+mean")
        run(capsys, flags, tmp_path / "whole")
        run(capsys, flags, tmp_path / "older", "--max_steps", 4)
    path, best = tmp_path / "older" / "probe.json", tmp_path / "older" / "best_probe.pth"
    content = json.loads(path.read_text())
    assert content.pop("pool") == "cls+mean"
    path.write_text(json.dumps(content))
    state = torch.load(best, weights_only=False)
    assert state["probe"].pop("pool") == "cls+mean"
    torch.save(state, best)
    pools = []
    monkeypatch.setattr(probe, "embed", lambda *args: pools.append(args[2]) or embed(*args))
    assert "read by cls+mean in fp32" in run(capsys, flags, tmp_path / "older")
    assert set(pools) == {"cls+mean"} and probed(tmp_path / "older") == probed(tmp_path / "whole")
    # figures of two ways to read are never compared
    path.unlink()
    code, _, errors = run_main(capsys, *flags, "--output_dir", tmp_path / "older", "--epochs", 4)
    assert (
        code == 1
        and "best_probe.pth: its figures are of features by cls+mean, those of probe.json by cls+centre" in errors[0]
    )


def test_damaged_files_of_a_probe(flags, tmp_path, capsys):
    run(capsys, flags, tmp_path, "--epochs", 1)
    whole = (tmp_path / "probe.json").read_text()
    for broken in ("", "[]", whole.replace('"start"', '"x"')):
        (tmp_path / "probe.json").write_text(broken)
        code, _, errors = run_main(capsys, *flags, "--output_dir", tmp_path)
        assert code == 1 and len(errors) == 1 and "probe.json: can't be read" in errors[0], errors
    (tmp_path / "probe.json").write_text(whole)
    (tmp_path / "best_probe.pth").write_bytes((tmp_path / "best_probe.pth").read_bytes()[:-500])
    said = run(capsys, flags, tmp_path, "--epochs", 2)
    assert "warning: " in said and "best_probe.pth: can't be read" in said
    assert read_state(tmp_path / "best_probe.pth")["epoch"] == 2


def test_events_of_the_step_that_is_resumed_from_stay(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, done in (((2, 4, 6), 0), ((6, 8), 4)):
        writer = EventWriter(tmp_path, done)
        for step in steps:
            writer.add_scalar("probe/auc", 10 * done + step, step)
        writer.close()
    shown = EventAccumulator(str(tmp_path)).Reload().Scalars("probe/auc")
    assert sorted((event.step, event.value) for event in shown) == [(2, 2), (4, 4), (6, 46), (8, 48)]


# ------------------------------------------------------------------------------------------------------ the best epoch


def test_the_best_epochs_weights_are_kept(flags, tmp_path, capsys, monkeypatch):
    """Not the last one's; every script takes them; of equal ones the first."""
    scores, judge = iter([0.6, 0.9, 0.9, 0.7]), probe.judge

    def judged(*args):
        figures, values = judge(*args)
        if args[3] is not None:  # a teacher's, with what it is compared with
            figures["logistic_auc"] = next(scores)
        return figures, values

    monkeypatch.setattr(probe, "judge", judged)
    run(capsys, flags, tmp_path, "--epochs", 4)
    best = read_state(tmp_path / "best_probe.pth")
    assert (best["epoch"], best["step"]) == (2, 4) and best["probe"]["logistic_auc"] == 0.9
    assert not differences(best["teacher"], read_state(tmp_path / "checkpoint0002.pth")["teacher"])
    assert differences(best["teacher"], read_state(tmp_path / "checkpoint0003.pth")["teacher"])
    assert [record["probe_best_epoch"] for record in probed(tmp_path)] == [1, 2, 2, 2]
    encoder = load_encoder(str(tmp_path / "best_probe.pth"))
    assert encoder.arch == "vit_tiny" and encoder.input_size == [24, 24, 12]
    for name, value in encoder.build().state_dict().items():
        assert torch.equal(value, best["teacher"]["backbone." + name])
    model = main_dino.build_model("vit_tiny", (24, 24, 12), (12, 12, 6), 64, False, 0.0, False)
    (notice,) = main_dino.load_initial_weights(model, str(tmp_path / "best_probe.pth"), "teacher")
    assert notice.startswith("starting from") and torch.equal(
        model.head.mlp[0].weight, best["teacher"]["head.mlp.0.weight"]
    )


def test_a_full_disk_costs_the_best_weights_and_not_the_run(flags, tmp_path, capsys, monkeypatch):
    """The file of the first probe can't be written; that of the second is, although it be worse than the first."""
    scores, judge, save, full = iter([0.9, 0.8]), probe.judge, probe.save_checkpoint, iter([True, False])

    def judged(*args):
        figures, values = judge(*args)
        if args[3] is not None:
            figures["logistic_auc"] = next(scores)
        return figures, values

    def failing(path, state):
        if next(full):
            raise UserError(f"{path}: the checkpoint can't be written (No space left on device)")
        save(path, state)

    monkeypatch.setattr(probe, "judge", judged)
    monkeypatch.setattr(probe, "save_checkpoint", failing)
    said = run(capsys, flags, tmp_path, "--epochs", 2)
    assert "best_probe.pth: the checkpoint can't be written (No space left on device); the best teacher so far" in said
    assert "no best_probe.pth yet" in said and [one["probe_best_epoch"] for one in probed(tmp_path)] == [None, 2]
    assert read_state(tmp_path / "best_probe.pth")["epoch"] == 2


# --------------------------------------------------------------------------------------------------------------- crops


def test_crops_of_another_spacing_are_resampled(tmp_path):
    """Linearly around the crop's middle, as SciPy does it; those of the run's spacing are taken as they are."""
    from scipy.ndimage import map_coordinates

    shape, own = (40, 40, 20), (0.8, 0.8, 1.5)
    folder = write_crops(tmp_path, patients=5, shape=shape, affine=(*own, 1))
    path = str(folder / "subset0" / "label0" / "p00" / "crop.nii.gz")
    hu = np.maximum(np.asarray(nibabel.load(path).dataobj), -1024)
    size, spacing = (24, 24, 12), (1, 1, 2)
    at = [(n - 1) / 2 + (np.arange(m) - (m - 1) / 2) * s / o for n, m, s, o in zip(shape, size, spacing, own)]
    expected = map_coordinates(hu.astype(float), np.meshgrid(*at, indexing="ij"), order=1)
    assert np.abs(probe_crops.read_window(path, size, spacing).window - expected).max() <= 0.51
    assert (probe_crops.read_window(path, (24, 24, 12), (0.8, 0.8, 1.5)).window == hu[8:32, 8:32, 4:16]).all()
    assert (probe_crops.read_window(path, (24, 24, 12), None).window == hu[8:32, 8:32, 4:16]).all()
    padded = probe_crops.read_window(path, (24, 24, 24), None).window
    assert (padded[:, :, 2:22] == hu[8:32, 8:32]).all() and (padded[:, :, [0, 1, 22, 23]] == -1024).all()
    crops = probe_crops.ProbeCrops(str(folder), (24, 24, 24), (1, 1, 2), Processes())
    lines, _ = crops.read(trivial=False)
    assert any("10 of the 10 crops of --probe_dir are resampled from 0.8 0.8 1.5 mm" in line for line in lines)
    assert any("are 32 32 30 mm, smaller than the window of 24 24 48 mm" in line for line in lines), lines


def test_crops_too_many_for_memory_are_read_again(crops, monkeypatch):
    kept = probe_crops.ProbeCrops(str(crops), (24, 24, 12), None, Processes())
    kept.read(trivial=False)
    monkeypatch.setattr(probe_crops, "KEPT_BYTES", 0)
    again = probe_crops.ProbeCrops(str(crops), (24, 24, 12), None, Processes())
    again.read(trivial=False)
    assert len(kept.mine()) == len(kept._kept) == 3 and not again._kept and kept.identity == again.identity
    for batch in kept.mine():
        assert (kept.windows(batch) == again.windows(batch)).all()
    assert (kept.windows(2)[2 * PATIENTS - 32 :] == 0).all()


def test_storage_that_fails_in_the_middle_of_a_run_ends_nothing(flags, crops, tmp_path, capsys, monkeypatch):
    shutil.copytree(crops, tmp_path / "crops")
    monkeypatch.setattr(probe_crops, "KEPT_BYTES", 0)
    measure, moves = probe.Probe.measure, {2: ("crops", "hidden"), 3: ("hidden", "crops")}

    def failing(self, teacher, epoch, step):
        if epoch in moves:
            shutil.move(*(tmp_path / name for name in moves[epoch]))
        return measure(self, teacher, epoch, step)

    monkeypatch.setattr(probe.Probe, "measure", failing)
    said = run(capsys, flags, tmp_path / "out", "--probe_dir", tmp_path / "crops")
    assert "warning: no probe after epoch 2: " in said and "crop.nii.gz" in said
    assert [bool(record) for record in probed(tmp_path / "out")] == [True, False, True]


def test_features_that_are_not_finite_end_nothing(flags, tmp_path, capsys, monkeypatch):
    embed, calls = probe.embed, iter(range(100))

    def broken(*args):
        return embed(*args) * (torch.nan if next(calls) == 3 else 1)

    monkeypatch.setattr(probe, "embed", broken)
    said = run(capsys, flags, tmp_path)
    assert "no probe after epoch 1: the teacher's features are not finite" in said
    assert [bool(record) for record in probed(tmp_path)] == [False, True, True]


# -------------------------------------------------------------------------------------------------------------- errors


def one_class(folder):
    write_crops(folder, labels=1)


def few_patients(folder):
    write_crops(folder, patients=3)


def unreadable(folder):
    path = next(write_crops(folder).glob("subset2/label1/*/*.nii.gz"))
    path.write_bytes(path.read_bytes()[:-100])


def masks(folder):
    path = next(write_crops(folder).glob("subset2/label1/*/*.nii.gz"))
    mask = np.zeros((26, 24, 14), np.uint8)
    mask[5:9] = 1
    nibabel.save(nibabel.Nifti1Image(mask, np.diag([-1.0, -1, 2, 1])), path)


def two_sizes(folder):
    write_crops(folder)
    write_crops(folder, patients=1, shape=(30, 30, 20))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.mkdir(), "holds no crops: expected subset*/label0|label1/<patient>/<name>.nii.gz"),
        (one_class, "one class only"),
        (few_patients, "has crops of 3 patients, of label0 of 3: expected at least 5"),
        (unreadable, "crop.nii.gz: can't be read"),
        (masks, "a mask, not a CT"),
        (two_sizes, "expected crops of one size"),
    ],
)
def test_crops_that_can_t_be_used_end_a_run_before_it_trains(noise, tmp_path, capsys, make, expected):
    make(tmp_path / "crops")
    out = tmp_path / "out"
    flags = ["--data_dir", noise, "--probe_dir", tmp_path / "crops", "--batch_size_per_gpu", 4, "--output_dir", out]
    code, _, errors = run_main(capsys, *flags)
    assert code == 1 and len(errors) == 1 and "--probe_dir" in errors[0] and expected in errors[0], errors
    assert not out.exists()


def test_flags_that_contradict(noise, tmp_path, capsys):
    code, _, errors = run_main(capsys, "--data_dir", noise, "--probe_every", 2, "--output_dir", tmp_path / "out")
    assert code == 2 and len(errors) == 1 and "--probe_every needs --probe_dir" in errors[0]
    code, _, errors = run_main(capsys, "--data_dir", noise, "--probe_dir", noise, "--probe_every", 0)
    assert code == 2 and len(errors) == 1 and "--probe_every" in errors[0]
    assert not (tmp_path / "out").exists()


def test_of_a_resnet_the_last_map_is_judged(noise, crops, tmp_path, monkeypatch, capsys):
    """Its mean, as it has no class token, and its middle; and batch norm's statistics are those of a run without a
    probe."""
    small = functools.partial(ResNet, BasicBlock, (1, 1, 1, 1), width=4)
    monkeypatch.setitem(vision_transformer.ARCHITECTURES, "resnet18", small)
    seen = []
    monkeypatch.setattr(probe, "embed", lambda *args: seen.append(embed(*args)) or seen[-1])
    flags = ["--arch", "resnet18", "--data_dir", noise, "--epochs", 1, "--batch_size_per_gpu", 4]
    run(capsys, flags, tmp_path / "probed", "--probe_dir", crops)
    run(capsys, flags, tmp_path / "plain")
    assert len(seen) == 6 and seen[0].shape == (16, 2 * 32)  # before training and after it, three batches of 40 crops
    one, other = (torch.load(tmp_path / name / "checkpoint.pth")["teacher"] for name in ("probed", "plain"))
    assert any("running" in name for name in one) and all(torch.equal(one[name], other[name]) for name in one)
    assert 0 <= probed(tmp_path / "probed")[0]["probe_logistic_auc"] <= 1
