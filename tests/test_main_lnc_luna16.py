"""Lung nodule classification: its figures against scikit-learn, and the script itself from its command line."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import torch
from conftest import ROOT
from test_main_dino import TORCHRUN, traceback_through_our_code

import main_lnc_luna16
import utils
from augmentations import scale_intensity
from dino3d.data.volume import Volume
from dino3d.evaluation import statistics
from dino3d.evaluation.classification_metrics import CASE_METRICS, area_under_roc, choose_threshold, evaluate_cases
from dino3d.features.encoder import PretrainedEncoder
from dino3d.files import read_log, read_table
from dino3d.finetune import fold_loop
from main_lnc_luna16 import case_order, draw_negatives
from vision_transformer import ARCHITECTURES, VisionTransformer

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
    "6",
    "--k_fold",
    "2",
    "--drop_path_rate",
    "0",
    "--precision",
    "fp32",
]
SMALL = functools.partial(VisionTransformer, embed_dim=48, depth=2, num_heads=3)


@pytest.fixture(autouse=True)
def smaller_model(monkeypatch):
    """What is called in this process trains a model of 0.1 and not 5 million weights; `command` takes the real one."""
    monkeypatch.setitem(ARCHITECTURES, "vit_tiny", SMALL)
    monkeypatch.setattr(statistics, "BOOTSTRAP_ROUNDS", 50)


def write_cases(folder, patients=11, classes=2, subsets=4, shape=(28, 27, 14), name="label{}"):
    """Labelled crops: noise with a ball in the middle, larger for higher labels; some patients have two crops."""
    x, y, z = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij")
    distance = np.sqrt(x**2 + y**2 + (2 * z) ** 2)
    for patient in range(patients):
        rng = np.random.default_rng(patient)
        for crop in range(1 + (patient % 3 == 0)):
            label = (patient + crop) % classes
            voxels = np.where(distance < 3 + 4 * label + rng.uniform(0, 2), 50, -850) + rng.normal(0, 60, shape)
            path = folder / f"subset{patient % subsets}" / name.format(label) / f"p{patient:02}" / f"crop{crop}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(voxels.astype(np.int16), np.diag([0.7, 0.7, 1.4, 1.0])), path)
    return folder


@pytest.fixture(scope="session")
def crops(tmp_path_factory):
    """15 cases of 11 patients."""
    return write_cases(tmp_path_factory.mktemp("crops"))


@pytest.fixture
def weights(tmp_path):
    """A pre-training checkpoint of the small model."""
    torch.manual_seed(3)
    model = ARCHITECTURES["vit_tiny"]((24, 24, 12), (12, 12, 6))
    state = {"backbone." + name: tensor for name, tensor in model.state_dict().items()}
    config = {
        "arch": "vit_tiny",
        "patch_size": [12, 12, 6],
        "input_size": [24, 24, 12],
        "clip_range": [-1000.0, 1000.0],
        "spacing": None,
    }
    torch.save({"teacher": state, "config": config}, tmp_path / "model.pth")
    return tmp_path / "model.pth"


def run_main(capsys, *flags, tiny=TINY):
    """(exit code, standard output, lines of standard error) of the script, called in this process."""
    code = 0
    try:
        utils.run_script(lambda: main_lnc_luna16.main([*tiny, *map(str, flags)]))
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, [line for line in captured.err.splitlines() if line.strip()]


def command(*flags, processes=0, script=ROOT / "tests" / "run_lnc.py", double=""):
    """Run the script as users do, under torchrun with some processes or, with 0, by itself."""
    start = [*TORCHRUN, f"--nproc_per_node={processes}", str(script)] if processes else [sys.executable, str(script)]
    return subprocess.run(
        [*start, *TINY, *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DOUBLE": double},
    )


def predictions(folder):
    """{(case, fold): probability} of a predictions.csv."""
    return {(row["case"], row.get("fold")): float(row["probability"]) for row in read_table(folder / "predictions.csv")}


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def check_metrics(folder):
    """metrics.json says what scikit-learn makes of predictions.csv, to 1e-6."""
    from sklearn.metrics import accuracy_score, average_precision_score, recall_score, roc_auc_score

    rows = read_table(folder / "predictions.csv")
    said = metrics(folder)
    for record in said["folds"]:
        mine = [row for row in rows if int(row["fold"]) == record["fold"]]
        labels, p = np.array([int(row["label"]) for row in mine]), np.array([float(row["probability"]) for row in mine])
        predicted = p >= record["threshold"]
        assert record["cases"] == len(mine) == len({row["case"] for row in mine})
        assert record["auc"] == pytest.approx(roc_auc_score(labels, p), abs=1e-6)
        assert record["average_precision"] == pytest.approx(average_precision_score(labels, p), abs=1e-6)
        assert record["accuracy"] == pytest.approx(accuracy_score(labels, predicted), abs=1e-6)
        assert record["sensitivity"] == pytest.approx(recall_score(labels, predicted), abs=1e-6)
        assert record["specificity"] == pytest.approx(recall_score(1 - labels, ~predicted), abs=1e-6)
    for name in CASE_METRICS:
        values = [record[name] for record in said["folds"]]
        assert said["mean"][name] == pytest.approx(np.mean(values))
        assert said["sd"][name] == pytest.approx(np.std(values, ddof=1))
    return said


# -------------------------------------------------------------------------------------------------------- arithmetic


def some_predictions(classes, cases=60, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=cases)
    return labels, rng.dirichlet(np.ones(classes), cases), [f"p{i % 20}" for i in range(cases)]


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_figures_are_scikit_learns(classes):
    from sklearn.metrics import accuracy_score, average_precision_score, confusion_matrix, roc_auc_score

    labels, p, patients = some_predictions(classes)
    found = evaluate_cases(labels, p, patients, 0.4)
    predicted = (p[:, 1] >= 0.4).astype(int) if classes == 2 else p.argmax(1)
    matrix = confusion_matrix(labels, predicted)
    hits, of_class, as_class = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    specificity = 1 - (as_class - hits) / (len(labels) - of_class)
    chosen = [1] if classes == 2 else list(range(classes))
    expected = {
        "auc": roc_auc_score(labels, p[:, 1]) if classes == 2 else roc_auc_score(labels, p, multi_class="ovr"),
        "average_precision": np.mean([average_precision_score(labels == k, p[:, k]) for k in chosen]),
        "accuracy": accuracy_score(labels, predicted),
        "sensitivity": (hits / of_class)[chosen].mean(),
        "specificity": specificity[chosen].mean(),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    low, high = found["auc_interval"]
    assert low < found["auc"] < high


def test_weighted_auc_is_scikit_learns():
    from sklearn.metrics import roc_auc_score

    for seed in range(20):
        rng = np.random.default_rng(seed)
        labels, scores, weights = rng.random(40) < 0.4, rng.integers(8, size=40) / 8, rng.integers(3, size=40)
        p = np.stack([1 - scores, scores], 1)
        assert area_under_roc(labels, p) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
        expected = roc_auc_score(labels, scores, sample_weight=weights)
        assert area_under_roc(labels, p, weights) == pytest.approx(expected, abs=1e-12)


def test_auc_of_one_class_is_undefined():
    labels, p, patients = np.zeros(5, int), some_predictions(2, 5)[1], list("abcde")
    found = evaluate_cases(labels, p, patients, 0.5)
    assert found["auc"] is None and found["auc_interval"] is None and found["average_precision"] is None
    assert found["sensitivity"] is None and found["specificity"] == found["accuracy"]


@pytest.mark.parametrize("seed", range(5))
def test_threshold_is_the_best_of_all(seed):
    labels, p, _ = some_predictions(2, 25, seed)

    def youden(threshold):
        return (p[labels == 1, 1] >= threshold).mean() + (p[labels == 0, 1] < threshold).mean()

    assert youden(choose_threshold(labels, p)) == pytest.approx(max(map(youden, np.linspace(0, 1, 2001))), abs=1e-9)
    assert choose_threshold(np.ones(25, int), p) == 0.5 == choose_threshold(labels, np.full((25, 3), 1 / 3))


def test_negatives_are_drawn_without_replacement_and_anew():
    labels = np.array([0] * 40 + [1] * 6 + [2] * 4)
    train = np.arange(50)[labels != 2].tolist() + [46, 47]
    train = np.array(sorted(train))
    epochs = [draw_negatives(train, labels, 1.0, 0, epoch) for epoch in range(60)]
    for drawn in epochs:
        assert len(set(drawn)) == len(drawn) == 16 and set(drawn) <= set(train)
        assert set(drawn[labels[drawn] != 0]) == {*range(40, 48)}
    assert len({tuple(drawn) for drawn in epochs}) == 60  # another draw each epoch
    assert set(np.concatenate(epochs)) == set(train)  # in time all of them
    assert (draw_negatives(train, labels, 0, 0, 0) == train).all()
    assert (draw_negatives(train, labels, 100, 0, 0) == train).all()  # not more than there are
    order = case_order(train, labels, 1.0, 0, 3)
    assert sorted(order) == epochs[3].tolist() and order.tolist() != sorted(order)


def test_loss_is_weighted_over_the_global_batch():
    """The gradient of a share, with the other rank's weights added to the normaliser, is its part of the whole's."""
    torch.manual_seed(0)
    model, volumes = torch.nn.Linear(4, 3).double(), torch.randn(7, 4, dtype=torch.float64)
    labels, class_weights = torch.tensor([0, 1, 2, 2, 1, 0, 0]), torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    torch.nn.functional.cross_entropy(model(volumes), labels, class_weights).backward()
    expected = model.weight.grad.clone()

    class Two(utils.Processes):
        def sum(self, tensor):
            return class_weights[labels].sum() if tensor.ndim == 0 else tensor

    total = torch.zeros_like(expected)
    for share in (slice(0, 5), slice(5, 7)):
        optimizer, scaler = utils.make_optimizer("sgd", model.parameters()), torch.amp.GradScaler("cpu", enabled=False)
        losses = torch.nn.functional.cross_entropy(model(volumes[share]), labels[share], reduction="none")
        fold_loop.weighted_step(model, optimizer, scaler, losses, class_weights[labels[share]], Two(world_size=2))
        total += model.weight.grad / 2  # as DDP averages
    torch.testing.assert_close(total, expected)


# ------------------------------------------------------------------------------------------------ ranks and protocols


@pytest.mark.parametrize("protocol", ["finetune", "linear", "knn"])
def test_ranks_agree(crops, tmp_path, capsys, protocol):
    """One process with a batch of 6 and two with 3: the same probabilities to 1e-4; figures that are scikit-learn's."""
    flags = ["--data_dir", crops, "--protocol", protocol, "--epochs", 2, "--num_test", 5]
    assert run_main(capsys, *flags, "--output_dir", tmp_path / "0", "--batch_size_per_gpu", 6)[0] == 0
    done = command(*flags, "--output_dir", tmp_path / "2", "--batch_size_per_gpu", 3, processes=2)
    assert done.returncode == 0, done.stderr
    one, two = predictions(tmp_path / "0"), predictions(tmp_path / "2")
    assert one.keys() == two.keys() and max(abs(one[key] - two[key]) for key in one) < 1e-4
    for folder in (tmp_path / "0", tmp_path / "2"):
        said = check_metrics(folder)
        assert said["protocol"] == protocol and len(said["folds"]) == 2


def test_metrics_with_three_ranks(crops, tmp_path):
    """Cases that three ranks can't share evenly, and a rank without a case: each case once."""
    done = command(
        "--data_dir",
        crops,
        "--output_dir",
        tmp_path,
        "--protocol",
        "knn",
        "--num_test",
        5,
        processes=3,
        script=ROOT / "main_lnc_luna16.py",
    )
    assert done.returncode == 0, done.stderr
    assert check_metrics(tmp_path)["folds"][0]["cases"] % 3
    assert len(predictions(tmp_path)) == len(read_table(tmp_path / "predictions.csv"))
    done = command(
        "--predict",
        crops / "subset3",
        "--weights",
        tmp_path,
        "--output_dir",
        tmp_path / "new",
        processes=3,
        script=ROOT / "main_lnc_luna16.py",
    )
    assert done.returncode == 0, done.stderr
    assert len(predictions(tmp_path / "new")) == len(list((crops / "subset3").rglob("*.nii.gz")))


def test_ranks_train_the_weights_of_one_process(crops, tmp_path):
    """float64: the weights of all ranks are equal, and those of one process with the whole batch to 1e-9; the last
    smaller batches of an epoch, which leave one of three ranks without a case, included."""
    flags = [
        "--data_dir",
        crops,
        "--epochs",
        2,
        "--num_test",
        3,
        "--k_fold",
        3,
        "--negatives",
        0,
        "--use_elastic",
        "--use_gaussian",
        "--use_histogram",
        "--shift_range",
        1,
        1,
        1,
    ]
    for processes, batch in ((0, 6), (2, 3), (3, 2)):
        done = command(
            *flags,
            "--output_dir",
            tmp_path / str(processes),
            "--batch_size_per_gpu",
            batch,
            processes=processes,
            double="1",
        )
        assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    start = PretrainedEncoder("vit_tiny", [12, 12, 6], [24, 24, 12], [-1000.0, 1000.0], None).build().state_dict()
    lengths = []
    for fold in ("0", "1", "2"):
        one = torch.load(tmp_path / "0" / fold / "weights0.pth")
        assert one["encoder.cls_token"].dtype == torch.float64
        assert all((one["encoder." + name] - tensor).abs().max() > 1e-6 for name, tensor in start.items())  # it moved
        for processes in (2, 3):
            ranks = [torch.load(tmp_path / str(processes) / fold / f"weights{rank}.pth") for rank in range(processes)]
            assert all(torch.equal(ranks[0][name], rank[name]) for rank in ranks for name in one)
            assert max((one[name] - ranks[0][name]).abs().max() for name in one) < 1e-9
        lengths.append(torch.load(tmp_path / "0" / fold / "checkpoint.pth")["cases"] // 2)
    assert any(length % 6 == 2 for length in lengths), lengths  # two cases are left for three ranks


def test_a_linear_run_leaves_the_encoder(crops, tmp_path, capsys, weights):
    flags = ["--data_dir", crops, "--pretrained_weights", weights, "--epochs", 3, "--lr", 0.1, "--drop_path_rate", 0.3]
    before = torch.load(weights)["teacher"]
    for out, more in (("linear", ["--protocol", "linear"]), ("frozen", ["--freeze_encoder", "true"])):
        code, _, errors = run_main(capsys, *flags, *more, "--output_dir", tmp_path / out)
        assert code == 0 and not errors, errors
        assert metrics(tmp_path / out)["protocol"] == "linear"
        for name in ("best.pth", "checkpoint.pth"):
            after = torch.load(tmp_path / out / "1" / name)["model"]
            assert all(torch.equal(after["encoder." + key[9:]], tensor) for key, tensor in before.items())
            assert after["head.linear.bias"].any() and (after["head.standardise.deviation"] != 1).any()
    assert predictions(tmp_path / "linear") == predictions(tmp_path / "frozen")
    run_main(capsys, *flags, "--output_dir", tmp_path / "finetune")
    after = torch.load(tmp_path / "finetune" / "1" / "best.pth")["model"]
    assert not any(torch.equal(after["encoder." + name[9:]], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("protocol", ["finetune", "linear", "knn"])
def test_only_training_data_is_augmented(crops, tmp_path, capsys, monkeypatch, protocol):
    """On the tensors that reach the model: in evaluation exactly the scaled centre windows of the right cases."""
    seen = {True: [], False: []}

    class Watched(VisionTransformer):
        def forward(self, volumes):
            stack = sys._getframe()
            while stack.f_code.co_name not in ("train_one_epoch", "infer_windows"):
                stack = stack.f_back
            seen[stack.f_code.co_name == "train_one_epoch"] += list(volumes[:, 0].detach().clone())
            return super().forward(volumes)

    monkeypatch.setitem(ARCHITECTURES, "vit_tiny", functools.partial(Watched, embed_dim=48, depth=2, num_heads=3))
    code, _, _ = run_main(
        capsys,
        "--data_dir",
        crops,
        "--output_dir",
        tmp_path,
        "--protocol",
        protocol,
        "--epochs",
        2,
        "--use_elastic",
        "--use_gaussian",
        "--use_histogram",
        "--shift_range",
        2,
        2,
        1,
    )
    assert code == 0
    exact = []
    for path in sorted(crops.rglob("*.nii.gz")):
        with Volume(path) as volume:
            exact.append(scale_intensity(torch.from_numpy(volume.read((2, 1, 1), (24, 24, 12))), -1000, 1000))
    assert len(seen[False]) > 15 and all(any(torch.equal(view, window) for window in exact) for view in seen[False])
    assert bool(seen[True]) == (protocol != "knn")
    assert not any(torch.equal(view, window) for view in seen[True] for window in exact)  # a shift at least
    assert all(view.min() >= 0 and view.max() <= 1 for view in seen[True])


# -------------------------------------------------------------------------------------------------- stopped, resuming


def test_a_run_goes_on_where_it_stopped(crops, tmp_path, capsys):
    """Stopped within an epoch of a fold, and in the next fold: every file as without a stop, to the last bit."""
    flags = ["--data_dir", crops, "--epochs", 2, "--drop_path_rate", 0.3, "--batch_size_per_gpu", 2, "--use_elastic"]
    assert run_main(capsys, *flags, "--output_dir", tmp_path / "straight")[0] == 0
    steps = torch.load(tmp_path / "straight" / "0" / "checkpoint.pth")["step"]
    assert steps >= 4
    code, out, _ = run_main(capsys, *flags, "--output_dir", tmp_path / "broken", "--max_steps", 1)
    assert code == 0 and "stopped in fold 0 after 1 steps" in out
    assert not (tmp_path / "broken" / "metrics.json").exists()
    state = torch.load(tmp_path / "broken" / "0" / "checkpoint.pth")
    assert (state["epoch"], state["position"], state["step"]) == (0, 2, 1)
    code, out, _ = run_main(capsys, *flags, "--output_dir", tmp_path / "broken", "--max_steps", steps)
    assert code == 0 and "fold 0: resuming after step 1" in out and "stopped in fold 1 after" in out
    code, out, _ = run_main(capsys, *flags, "--output_dir", tmp_path / "broken")
    assert code == 0 and "fold 0: done before" in out and "fold 1: resuming after step 1" in out
    for name in ("predictions.csv", "metrics.json", "splits.json"):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    for fold in ("0", "1"):
        one, two = (torch.load(tmp_path / out / fold / "checkpoint.pth") for out in ("straight", "broken"))
        assert all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])
        records = [read_log(tmp_path / out / fold / "log.txt") for out in ("straight", "broken")]
        assert [r["validation_loss"] for r in records[0]] == [r["validation_loss"] for r in records[1]]
    before = (tmp_path / "broken" / "0" / "best.pth").stat().st_mtime_ns
    code, out, _ = run_main(capsys, *flags, "--output_dir", tmp_path / "broken")
    assert code == 0 and out.count("done before") == 2
    assert before == (tmp_path / "broken" / "0" / "best.pth").stat().st_mtime_ns
    code, out, _ = run_main(capsys, *flags, "--output_dir", tmp_path / "broken", "--epochs", 3)
    assert code == 0 and [len(read_log(tmp_path / "broken" / fold / "log.txt")) for fold in "01"] == [3, 3]


@pytest.mark.parametrize(
    "saving",
    [["--save_every_steps", 2], ["--save_every_minutes", 1e-9], ["--save_every_minutes", 0]],
    ids=lambda saving: f"{saving[0]} {saving[1]}",
)
def test_a_killed_run_goes_on(crops, tmp_path, capsys, monkeypatch, saving):
    """Cut off without a word in the middle of an epoch, with a checkpoint of some step before or none at all."""
    flags, saved = ["--data_dir", crops, "--epochs", 3, "--batch_size_per_gpu", 2, *saving], saving[1] != 0
    assert run_main(capsys, *flags, "--output_dir", tmp_path / "straight")[0] == 0
    train_step, calls = fold_loop.weighted_step, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return train_step(*args)

    monkeypatch.setattr(fold_loop, "weighted_step", killed)
    assert run_main(capsys, *flags, "--output_dir", tmp_path / "killed")[0] == 130
    assert (tmp_path / "killed" / "0" / "checkpoint.pth").exists() == saved
    monkeypatch.setattr(fold_loop, "weighted_step", train_step)
    code, out, _ = run_main(capsys, *flags, "--output_dir", tmp_path / "killed")
    assert code == 0 and ("resuming" in out) == saved
    assert predictions(tmp_path / "straight") == predictions(tmp_path / "killed")
    assert len(read_log(tmp_path / "killed" / "0" / "log.txt")) == 3


@pytest.mark.parametrize(
    "where, call",
    [("weighted_step", 2), ("weighted_step", 11), ("classify", 2), ("classify", 9)],
    ids=["inside an epoch", "in a later one", "first validation", "later evaluation"],
)
def test_a_signal_ends_a_run_that_goes_on(crops, tmp_path, capsys, monkeypatch, where, call):
    """SIGTERM in training: after that step; in an evaluation: after that batch, and the evaluation is done again."""
    flags = ["--data_dir", crops, "--epochs", 3, "--batch_size_per_gpu", 2, "--num_test", 5, "--drop_path_rate", 0.3]
    assert run_main(capsys, *flags, "--output_dir", tmp_path / "straight")[0] == 0
    module = fold_loop if where == "weighted_step" else main_lnc_luna16
    function, calls = getattr(module, where), []

    def signalled(*args):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args)

    monkeypatch.setattr(module, where, signalled)
    code, _, errors = run_main(capsys, *flags, "--output_dir", tmp_path / "broken")
    assert (
        code == 75
        and errors == ["ended by SIGTERM; everything is saved, the same command resumes"]
        and len(calls) == call
    )
    assert "SIGTERM" in (tmp_path / "broken" / "preempted").read_text()
    assert not (tmp_path / "broken" / "metrics.json").exists()
    code, out, _ = run_main(capsys, *flags, "--output_dir", tmp_path / "broken")
    assert code == 0 and "resuming after step" in out and not (tmp_path / "broken" / "preempted").exists()
    for name in ("predictions.csv", "metrics.json"):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    for fold in ("0", "1"):
        one, two = (torch.load(tmp_path / out / fold / "checkpoint.pth") for out in ("straight", "broken"))
        assert all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])
        records = [read_log(tmp_path / out / fold / "log.txt") for out in ("straight", "broken")]
        assert [r["validation_loss"] for r in records[0]] == [r["validation_loss"] for r in records[1]]


def test_a_process_that_is_killed(crops, tmp_path):
    """SIGKILL while a fold is training, as batch systems do it; the same command ends with the same probabilities."""
    flags = [*TINY, "--data_dir", str(crops), "--epochs", "12", "--batch_size_per_gpu", "2"]
    script, environment = str(ROOT / "tests" / "run_lnc.py"), os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, script, *flags, "--output_dir", str(tmp_path / "killed")],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("fold 0 epoch 3/"):
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "killed" / "0" / "metrics.json").exists()
    for out in ("killed", "straight"):
        assert command(*flags[len(TINY) :], "--output_dir", tmp_path / out).returncode == 0
    assert predictions(tmp_path / "straight") == predictions(tmp_path / "killed")


def test_folds_of_one_run_have_the_same_flags_and_epochs(crops, tmp_path, capsys):
    """Fold 0's folder removed, to train it again; fewer epochs; more epochs, which fold 1 has not come to."""
    out = tmp_path / "out"
    flags = ["--data_dir", crops, "--output_dir", out, "--batch_size_per_gpu", 2, "--warmup_epochs", 0]
    code, said, _ = run_main(capsys, *flags, "--epochs", 2)
    assert code == 0 and "never falls" not in said
    steps = torch.load(out / "0" / "checkpoint.pth")["step"] // 2
    code, _, errors = run_main(capsys, *flags, "--epochs", 1)
    assert code == 1 and len(errors) == 1 and errors[0].startswith("error: --epochs 1: ")
    assert "has come to epoch 2, and" in errors[0] and "give --epochs 2 or more, or" in errors[0]
    assert run_main(capsys, *flags, "--epochs", 3, "--max_steps", steps)[0] == 0
    predict = ["--predict", crops / "subset0", "--weights", out, "--output_dir"]
    code, said, _ = run_main(capsys, *predict, tmp_path / "half", tiny=[])
    assert code == 0 and "fold 1 of 2 epochs, where fold 0 has 3" in said and "mean of 1 fold," in said
    assert run_main(capsys, *flags, "--epochs", 3)[0] == 0
    code, said, _ = run_main(capsys, *predict, tmp_path / "whole", tiny=[])
    assert code == 0 and "mean of 2 folds" in said and "left out" not in said
    shutil.rmtree(out / "0")
    code, _, errors = run_main(capsys, *flags, "--epochs", 3, "--lr", 0.1)
    assert code == 1 and len(errors) == 1 and "1/checkpoint.pth: is of a run with --lr 0.001, not 0.1" in errors[0]
    code, said, _ = run_main(capsys, *flags, "--epochs", 3, tiny=TINY[:-2])
    assert code == 0 and "fold 1: done before" in said
    assert "--precision fp32: in which the run was trained before" in said


def test_other_flags_are_no_way_to_go_on(crops, tmp_path, capsys, weights):
    flags = ["--data_dir", crops, "--output_dir", tmp_path / "out", "--epochs", 1]
    assert run_main(capsys, *flags)[0] == 0
    kept = (tmp_path / "out" / "config.json").read_bytes()
    for more, says in (
        (["--protocol", "linear"], "--protocol finetune, not linear"),
        (["--pool", "centre"], "--pool cls, not centre"),
        (["--lr", 0.1], "--lr 0.001, not 0.1"),
        (["--pretrained_weights", weights], "--pretrained_weights"),
        (["--k_fold", 3], "k_fold 2, now it is 3"),
        (["--seed", 1], "seed 0, now it is 1"),
        (["--label_fraction", 0.5], "label_fraction None, now it is 0.5"),
        (["--arch", "vit_small"], "--arch vit_tiny, not vit_small"),
        (["--use_flip", "off"], "--use_flip true, not false"),
    ):
        code, _, errors = run_main(capsys, *flags, *more)
        assert code == 1 and len(errors) == 1 and says in errors[0] and "--output_dir" in errors[0], errors
    assert (tmp_path / "out" / "config.json").read_bytes() == kept


def test_other_data_are_no_way_to_go_on(crops, tmp_path, capsys):
    """Other voxels under the same names; labels or subsets that two patients exchange. A copy elsewhere is the same."""
    data, out = shutil.copytree(crops, tmp_path / "data"), tmp_path / "out"
    flags = ["--output_dir", out, "--protocol", "knn", "--num_test", 4]
    assert run_main(capsys, "--data_dir", data, *flags)[0] == 0
    kept = {path: path.read_bytes() for path in out.glob("**/*.csv")} | {"splits": (out / "splits.json").read_bytes()}
    first, changed = data / "subset1" / "label1" / "p01", tmp_path / "changed"

    def assert_refused(says):
        code, said, errors = run_main(capsys, "--data_dir", changed, *flags)
        assert code == 1 and not said and len(errors) == 1 and says in errors[0], errors
        assert f"error: {out / 'splits.json'}: is of a run on other data: of 15 files " in errors[0]
        shutil.rmtree(changed)

    path = shutil.copytree(data, changed) / first.relative_to(data) / "crop0.nii.gz"
    voxels = np.asarray(nibabel.load(path).dataobj) + np.int16(20)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([0.8, 0.8, 1.4, 1.0])), path)
    assert_refused("1 have changed, such as subset1/label1/p01/crop0; put the data of before back, or choose another")
    for one, other in (  # counts of labels, subsets and patients stay
        (("subset1/label1/p01", "subset1/label0/p01"), ("subset2/label0/p02", "subset2/label1/p02")),
        (("subset1/label1/p01", "subset3/label1/p01"), ("subset3/label1/p07", "subset1/label1/p07")),
    ):
        shutil.copytree(data, changed)
        for old, new in (one, other):
            (changed / new).parent.mkdir(exist_ok=True)
            (changed / old).rename(changed / new)
        assert_refused(f"2 are gone, such as {one[0]}/crop0, 2 are new, such as ")
    copy = tmp_path / "copy"
    shutil.copytree(data, copy, copy_function=shutil.copyfile)
    shutil.rmtree(data)
    code, said, _ = run_main(capsys, "--data_dir", copy, *flags)
    assert code == 0 and said.count("done before") == 2
    assert kept == {path: path.read_bytes() for path in out.glob("**/*.csv")} | {
        "splits": (out / "splits.json").read_bytes()
    }


def test_a_run_of_before_pool_was_a_flag_read_the_class_token(crops, tmp_path, capsys):
    flags = ["--data_dir", crops, "--output_dir", tmp_path / "out", "--epochs", 1]
    assert run_main(capsys, *flags)[0] == 0
    table = (tmp_path / "out" / "predictions.csv").read_bytes()
    for path in (tmp_path / "out").glob("*/*.pth"):
        state = torch.load(path, weights_only=False)
        del state["config"]["pool"]
        torch.save(state, path)
    code, _, errors = run_main(capsys, *flags, "--pool", "centre")
    assert code == 1 and len(errors) == 1 and "--pool cls, not centre" in errors[0]
    assert run_main(capsys, *flags)[0] == 0 and (tmp_path / "out" / "predictions.csv").read_bytes() == table
    out = tmp_path / "new"
    assert run_main(capsys, "--predict", crops, "--weights", tmp_path / "out", "--output_dir", out)[0] == 0


def test_other_weights_under_the_same_path_are_no_way_to_go_on(crops, tmp_path, capsys, weights):
    """As a pre-training run that goes on leaves them: the folds would start from several encoders."""
    file = shutil.copy(weights, tmp_path / "encoder.pth")
    flags = ["--data_dir", crops, "--output_dir", tmp_path / "out", "--protocol", "linear", "--epochs", 1]
    flags += ["--pretrained_weights", file]
    assert run_main(capsys, *flags, "--max_steps", 1)[0] == 0
    state = torch.load(weights)
    state["teacher"] = {name: tensor * 0.5 for name, tensor in state["teacher"].items()}
    torch.save(state, file)
    code, _, errors = run_main(capsys, *flags)
    assert code == 1 and len(errors) == 1 and "encoder.pth: holds other weights than when" in errors[0], errors
    shutil.copy(weights, file)
    code, _, errors = run_main(capsys, *flags)
    assert code == 0 and not errors, errors


def test_loader_workers_change_nothing(crops, tmp_path, capsys):
    for workers in (0, 2):
        code, _, errors = run_main(
            capsys,
            "--data_dir",
            crops,
            "--output_dir",
            tmp_path / str(workers),
            "--epochs",
            2,
            "--num_workers",
            workers,
            "--use_elastic",
        )
        assert code == 0 and not errors
    assert predictions(tmp_path / "0") == predictions(tmp_path / "2")


# ------------------------------------------------------------------------------------------------- results and flags


def test_what_a_run_leaves(crops, tmp_path, capsys, weights):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    code, said, errors = run_main(
        capsys,
        "--data_dir",
        crops,
        "--output_dir",
        out,
        "--pretrained_weights",
        weights,
        "--epochs",
        3,
        "--val_freq",
        2,
        tiny=TINY[6:],
    )  # the rest is the checkpoint's
    assert code == 0 and not errors
    table = read_table(out / "predictions.csv")
    assert list(table[0]) == ["case", "patient", "fold", "label", "probability", "uncalibrated"]
    splits = json.loads((out / "splits.json").read_text())["splits"]
    for row in table:
        subset, label, patient, name = row["case"].split("/")
        assert (crops / subset / label / patient / f"{name}.nii.gz").is_file() and label == f"label{row['label']}"
        assert patient == row["patient"] and patient in splits[int(row["fold"])]["test"]
    assert {row["patient"] for row in table} == set(splits[0]["test"]) == set(splits[1]["test"])
    said_of = check_metrics(out)
    assert said_of["classes"] == 2 and said_of["cases"] == 15 and said_of["patients"] == 11
    for fold in ("0", "1"):
        log = read_log(out / fold / "log.txt")
        assert [record["epoch"] for record in log] == [1, 2, 3]
        assert ["validation_auc" in record for record in log] == [False, True, True]
        best = torch.load(out / fold / "best.pth")
        assert best["best"]["epoch"] in (2, 3) and best["config"]["input_size"] == [24, 24, 12]
        assert best["config"]["clip_range"] == [-1000.0, 1000.0] and best["config"]["crop_spacing"] == [0.7, 0.7, 1.4]
    assert torch.load(out / "0" / "best.pth", weights_only=True)
    for name in ("curves.png", "errors.png"):
        assert np.asarray(Image.open(out / name)).std() > 5
    events = EventAccumulator(str(out / "tensorboard" / "1")).Reload()
    assert {"loss", "lr", "validation_auc"} <= set(events.Tags()["scalars"])
    assert json.loads((out / "config.json").read_text())["arguments"]["arch"] == "vit_tiny"
    lines = said.splitlines()
    assert sum(line.startswith("fold 0 epoch") for line in lines) == 3
    for name in ("metrics.json", "predictions.csv", "curves.png", "errors.png"):
        assert any(line.endswith(str(out / name)) for line in lines)
    assert any(
        line.startswith("mean ± SD") and f"{said_of['mean']['auc']:.3f} ± {said_of['sd']['auc']:.3f}" in line
        for line in lines
    )


def test_all_folds_together_are_the_mean_model(crops, tmp_path, capsys):
    from sklearn.metrics import roc_auc_score

    assert run_main(capsys, "--data_dir", crops, "--output_dir", tmp_path, "--epochs", 2, "--num_test", 6)[0] == 0
    rows = read_table(tmp_path / "predictions.csv")
    p, labels = {}, {}
    for row in rows:
        p.setdefault(row["case"], []).append(float(row["probability"]))
        labels[row["case"]] = int(row["label"])
    assert metrics(tmp_path)["all_folds"]["auc"] == pytest.approx(
        roc_auc_score([labels[case] for case in p], [np.mean(values) for values in p.values()])
    )


def test_prediction_repeats_the_test(crops, tmp_path, capsys):
    """A fold on its own test cases: the probabilities of its best epoch, not its last. All folds: their mean."""
    flags = [
        "--data_dir",
        crops,
        "--output_dir",
        tmp_path / "out",
        "--epochs",
        6,
        "--lr",
        0.01,
        "--drop_path_rate",
        0.3,
    ]
    assert run_main(capsys, *flags)[0] == 0
    for record in metrics(tmp_path / "out")["folds"]:
        log = read_log(tmp_path / "out" / str(record["fold"]) / "log.txt")
        best = max(log, key=lambda epoch: (epoch["validation_auc"], -epoch["validation_loss"]))
        assert record["best_epoch"] == best["epoch"] and record["validation_auc"] == best["validation_auc"]
    assert any(record["best_epoch"] < 6 for record in metrics(tmp_path / "out")["folds"])
    tested = predictions(tmp_path / "out")
    for case, _ in tested:
        target = tmp_path / "new" / f"{case}.nii.gz"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(crops / f"{case}.nii.gz", target)
    for weights, out in (("out/0", "one"), ("out", "all")):
        code, said, errors = run_main(
            capsys,
            "--predict",
            tmp_path / "new",
            "--weights",
            tmp_path / weights,
            "--output_dir",
            tmp_path / out,
            tiny=["--precision", "fp32", "--num_workers", "0"],
        )
        assert code == 0 and not errors and str(tmp_path / out / "predictions.csv") in said
    one, mean = predictions(tmp_path / "one"), predictions(tmp_path / "all")
    assert {case for case, _ in one} == {case for case, _ in tested}
    for case, _ in one:
        assert one[case, None] == pytest.approx(tested[case, "0"], abs=1e-6)
        assert mean[case, None] == pytest.approx((tested[case, "0"] + tested[case, "1"]) / 2, abs=1e-6)


@pytest.mark.parametrize("protocol", ["finetune", "linear"])
def test_a_fold_that_stopped_early_does_not_predict(crops, tmp_path, capsys, protocol):
    """The best of its first epochs is there, and is no result yet; the finished run predicts with all folds."""
    out, flags = tmp_path / "out", ["--data_dir", crops, "--output_dir", tmp_path / "out", "--epochs", 3]
    flags += ["--protocol", protocol, "--batch_size_per_gpu", 64]  # an epoch is a step
    predict = ["--predict", crops / "subset3", "--weights", out, "--output_dir"]
    assert run_main(capsys, *flags, "--max_steps", 2)[0] == 0
    code, _, errors = run_main(capsys, *predict, tmp_path / "early")
    assert code == 1 and "no fold is finished (fold 0 not finished; fold 1 not begun)" in errors[0]
    assert errors[0].endswith(f"or give a fold's best epoch so far, such as {out / '0' / 'best.pth'}")
    assert run_main(capsys, *flags, "--max_steps", 2)[0] == 0
    assert (out / "1" / "best.pth").is_file() and (out / "0" / "metrics.json").is_file()
    code, said, _ = run_main(capsys, *predict, tmp_path / "new")
    assert code == 0 and f"note: left out of {out}: fold 1 not finished\n" in said and "mean of 1 fold," in said
    assert run_main(capsys, *flags)[0] == 0
    code, said, _ = run_main(capsys, *predict, tmp_path / "whole")
    assert code == 0 and "left out" not in said and "mean of 2 folds" in said


@pytest.mark.parametrize("protocol, pool", [("linear", "cls"), ("knn", "cls+mean"), ("finetune", "cls+centre")])
def test_prediction_by_protocol_and_pool(crops, tmp_path, capsys, protocol, pool):
    flags = ["--data_dir", crops, "--output_dir", tmp_path / "out", "--epochs", 1]
    flags += ["--input_size", 36, 36, 18]  # three patches along each axis, of which the middle is one
    code, out, errors = run_main(capsys, *flags, "--protocol", protocol, "--pool", pool)
    assert code == 0 and f"vit_tiny ({protocol}, {pool})" in out, errors
    code, _, _ = run_main(
        capsys, "--predict", crops, "--weights", tmp_path / "out" / "1", "--output_dir", tmp_path / "new"
    )
    tested, new = predictions(tmp_path / "out"), predictions(tmp_path / "new")
    assert code == 0 and len(new) == 15
    assert all(new[case, None] == pytest.approx(p, abs=1e-6) for (case, fold), p in tested.items() if fold == "1")


def test_more_classes_and_bare_label_names(tmp_path, capsys):
    data = write_cases(tmp_path / "data", 18, classes=3, name="{}")
    for protocol in ("finetune", "knn"):
        out = tmp_path / protocol
        code, _, errors = run_main(
            capsys, "--data_dir", data, "--output_dir", out, "--epochs", 2, "--protocol", protocol
        )
        assert code == 0 and not errors
        rows = read_table(out / "predictions.csv")
        p = np.array([[float(row[f"probability_{k}"]) for k in range(3)] for row in rows])
        assert list(rows[0])[4:7] == ["probability_0", "probability_1", "probability_2"]
        np.testing.assert_allclose(p.sum(1), 1, atol=1e-9)
        assert {row["label"] for row in rows} == {"0", "1", "2"} and (out / "curves.png").is_file()
        assert (
            run_main(
                capsys, "--predict", data / "subset0", "--weights", out, "--output_dir", tmp_path / f"new {protocol}"
            )[0]
            == 0
        )


def test_rotating_subsets(crops, tmp_path, capsys):
    code, out, errors = run_main(
        capsys, "--data_dir", crops, "--output_dir", tmp_path, "--epochs", 1, "--folds", "subsets"
    )
    assert code == 0 and not errors
    rows = read_table(tmp_path / "predictions.csv")
    assert len({row["case"] for row in rows}) == len(rows) == 15  # every case is tested once
    assert all(row["case"].startswith(f"subset{row['fold']}/") for row in rows)


def test_a_share_of_the_labels(crops, tmp_path, capsys):
    """The other sides stay, summary and report say whose labels were used, and the k-NN has no other features."""
    flags = ["--data_dir", crops, "--protocol", "knn", "--negatives", 0]
    for out, more in (("all", []), ("half", ["--label_fraction", 0.5])):
        code, said, errors = run_main(capsys, *flags, *more, "--output_dir", tmp_path / out)
        assert code == 0, errors
    whole, half = (json.loads((tmp_path / out / "splits.json").read_text()) for out in ("all", "half"))
    assert whole["data"]["label_fraction"] is None and half["data"]["label_fraction"] == 0.5
    report = (tmp_path / "half" / "report.html").read_text()
    for fold, (fewer, split) in enumerate(zip(half["splits"], whole["splits"])):
        used, of = (set(one["train"]) for one in (fewer, split))
        assert used < of and all(fewer[side] == split[side] for side in ("validation", "test"))
        assert "training patients (--label_fraction 0.5)" in said and f"{len(used)} of {len(of)}" in report
        head = torch.load(tmp_path / "half" / str(fold) / "best.pth", weights_only=True)["model"]
        assert len(head["head.labels"]) == sum(1 for path in crops.glob("*/*/*/*") if path.parent.name in used)
    code, _, errors = run_main(capsys, *flags, "--label_fraction", 0.1, "--output_dir", tmp_path / "few")
    assert code == 1 and len(errors) == 1 and "none of them with label" in errors[0], errors
    assert not (tmp_path / "few" / "splits.json").exists()


def test_a_test_fold_of_one_class_is_no_crash(tmp_path, capsys):
    data = write_cases(tmp_path / "data", 8)
    for subset, patient in (("subset4", "q0"), ("subset4", "q1")):
        shutil.copytree(data / "subset0" / "label0" / "p00", data / subset / "label0" / patient)
    code, out, errors = run_main(
        capsys, "--data_dir", data, "--output_dir", tmp_path / "out", "--epochs", 2, "--folds", "subsets"
    )
    assert code == 0 and not errors
    said = metrics(tmp_path / "out")
    assert said["folds"][4]["auc"] is None and any("undefined" in note for note in said["folds"][4]["notes"])
    assert said["folds"][3]["validation_auc"] is None and "note: fold 3: validation cases are of one class" in out
    assert said["mean"]["auc"] == pytest.approx(np.mean([r["auc"] for r in said["folds"] if r["auc"] is not None]))


def test_fewer_negatives_in_evaluation_if_asked_for(crops, tmp_path, capsys):
    for out in ("a", "b"):
        assert (
            run_main(
                capsys,
                "--data_dir",
                crops,
                "--output_dir",
                tmp_path / out,
                "--epochs",
                1,
                "--protocol",
                "knn",
                "--eval_negatives",
                0.5,
                "--num_test",
                6,
            )[0]
            == 0
        )
    rows = read_table(tmp_path / "a" / "predictions.csv")
    labels = [row["label"] for row in rows if row["fold"] == "0"]
    assert labels.count("0") == max(1, round(labels.count("1") / 2))
    assert predictions(tmp_path / "a") == predictions(tmp_path / "b")


@pytest.mark.parametrize(
    "flags",
    [
        ["--optimizer", "sgd", "--lr", "0.01"],
        ["--precision", "bf16"],
        ["--layer_decay", "1"],
        ["--negatives", "0"],
        ["--use_rotation", "0", "--use_scale", "0", "--use_flip", "0"],
        ["--warmup_epochs", "500"],
        ["--spacing", "0.7", "0.7", "1.4"],
        ["--input_size", "36", "36", "18"],
        ["--protocol", "knn", "--knn_k", "3"],
        ["--pool", "mean"],
    ],
    ids=lambda flags: " ".join(flags[:2]),
)
def test_other_settings_run(crops, tmp_path, capsys, flags):
    code, out, errors = run_main(capsys, "--data_dir", crops, "--output_dir", tmp_path, "--epochs", 1, *flags)
    assert code == 0 and not errors, errors
    assert ("air is put around" in out) == (flags[0] == "--input_size")


@pytest.mark.parametrize(
    "flags, idle",
    [
        (["--protocol", "knn"], ["--lr", 0.5, "--drop_path_rate", 0.5, "--use_rotation", "false", "--epochs", 9]),
        (["--protocol", "linear", "--epochs", 2], ["--layer_decay", 0.1, "--drop_path_rate", 0.9, "--knn_k", 2]),
        (["--protocol", "knn", "--folds", "subsets"], ["--k_fold", 3, "--num_test", 2, "--checkpoint_key", "student"]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_flags_that_change_nothing_are_told(crops, tmp_path, capsys, flags, idle):
    """The probabilities with them are those without them, to the last digit."""
    flags = ["--data_dir", crops, *flags, "--shift_range", 0, 0, 0]
    for folder, more in (("a", []), ("b", idle)):
        code, out, _ = run_main(capsys, *flags, *more, "--output_dir", tmp_path / folder)
        lines = " ".join(line for line in out.splitlines() if line.startswith("no effect"))
        assert code == 0 and all(f"{flag} {value}" in lines for flag, value in zip(more[::2], more[1::2]))
        assert more or not any(f"{flag} " in lines for flag in idle[::2] if flag not in TINY)
    assert predictions(tmp_path / "a") == predictions(tmp_path / "b")
    code, out, _ = run_main(
        capsys, "--predict", crops, "--weights", tmp_path / "a", "--output_dir", tmp_path / "c", *idle[:2]
    )
    assert code == 0 and f"{idle[0]} {idle[1]}" in out.partition("no effect with --predict, ")[2].partition("\n")[0]


def test_warnings(crops, tmp_path, capsys, weights):
    state = torch.load(weights)
    state["config"]["spacing"] = [0.7, 0.7, 2.5]
    torch.save(state, weights)
    code, out, _ = run_main(
        capsys,
        "--data_dir",
        crops,
        "--output_dir",
        tmp_path / "a",
        "--pretrained_weights",
        weights,
        "--protocol",
        "knn",
    )
    assert code == 0 and "warning: the crops have a spacing of 0.7 0.7 1.4 mm, the encoder knows 0.7 0.7 2.5 mm" in out
    assert "random encoder" not in out
    code, out, _ = run_main(capsys, "--data_dir", crops, "--output_dir", tmp_path / "b", "--protocol", "knn")
    assert code == 0 and "random encoder" in out and "spacing of" not in out
    code, out, _ = run_main(
        capsys, "--data_dir", crops, "--output_dir", tmp_path / "c", "--epochs", 1, "--batch_size_per_gpu", 4
    )
    assert code == 0 and "training from scratch" in out and "warning:" not in out and "is one step" not in out
    code, out, _ = run_main(
        capsys, "--data_dir", crops, "--output_dir", tmp_path / "d", "--epochs", 1, "--batch_size_per_gpu", 20
    )
    assert code == 0 and "is one step: 1 epochs are 1 steps" in out
    told = "--warmup_epochs 5 of --epochs 1: the learning rate rises to the end and never falls: lower --warmup_epochs"
    assert out.count(told) == 1


def test_older_flags_are_accepted(crops, tmp_path, capsys):
    code, out, _ = run_main(
        capsys,
        "--data_path",
        crops,
        "--output_dir",
        tmp_path,
        "--protocol",
        "knn",
        "--use_fp16",
        "true",
        "--dist_url",
        "env://",
        "--local_rank",
        "0",
    )
    assert code == 0
    assert all(sum(flag in line for line in out.splitlines()) == 1 for flag in ("dist_url", "local_rank", "use_fp16"))


def test_nan_stops_the_run_in_one_line(crops, tmp_path, capsys):
    flags = [
        "--data_dir",
        crops,
        "--epochs",
        3,
        "--lr",
        1e30,
        "--optimizer",
        "sgd",
        "--layer_decay",
        1,
        "--warmup_epochs",
        0,
    ]
    code, _, errors = run_main(capsys, *flags, "--output_dir", tmp_path / "a")
    assert code == 1 and len(errors) == 1 and "diverged" in errors[0], errors
    code, _, errors = run_main(
        capsys, *flags, "--output_dir", tmp_path / "b", "--batch_size_per_gpu", 2, "--max_skipped_steps", 1
    )
    samples = json.loads((tmp_path / "b" / "0" / "skipped_batch_rank0.json").read_text())["samples"]
    assert code == 1 and len(errors) == 1 and all(sample["file"] in errors[0] for sample in samples), errors
    assert len(samples) == 2 and samples[0]["loss"] is None and samples[0]["crop"]["not_finite"] == 0


# ------------------------------------------------------------------------------------------------------- bad input


def one_class(data):
    for label in data.glob("*/label1"):
        shutil.rmtree(label)


def patient_twice(data):
    shutil.copytree(data / "subset0" / "label0" / "p00", data / "subset1" / "label0" / "p00")


def empty_label(data):
    (data / "subset9" / "label1").mkdir(parents=True)


def unreadable(data):
    path = next((data / "subset0" / "label0").rglob("*.nii.gz"))
    path.write_bytes(b"this is no image")


def cut_off(data):
    path = next((data / "subset0" / "label0").rglob("*.nii.gz"))
    path.write_bytes(path.read_bytes()[:-4000])


def two_sizes(data):
    write_cases(data, 1, shape=(20, 20, 10))


def strange_label(data):
    shutil.move(data / "subset0" / "label0", data / "subset0" / "benign")


def too_few(data):
    for subset in sorted(data.iterdir())[1:]:
        for label in subset.iterdir():
            shutil.rmtree(label)
        subset.rmdir()


def nothing(data):
    shutil.rmtree(data)
    data.mkdir()


def lone_class(data):
    """Label 2 belongs to one patient: it can't be trained on in every fold."""
    shutil.move(data / "subset0" / "label0" / "p00", data / "subset0" / "label2" / "p00")


@pytest.mark.parametrize(
    "spoil, flags, says",
    [
        (one_class, [], "one class only (label0)"),
        (patient_twice, [], "patient p00 in subset0 and subset1"),
        (empty_label, [], "subset9/label1: holds no crop"),
        (unreadable, [], "can't be read"),
        (cut_off, [], "can't be read"),
        (two_sizes, [], "crops of one size"),
        (strange_label, [], "benign: is no label folder"),
        (too_few, ["--k_fold", "5"], "3 patients are too few"),
        (too_few, ["--folds", "subsets"], "at least 3 subsets"),
        (nothing, [], "holds no crops"),
        (lone_class, [], "some fold would have no patient with label2"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_bad_data(crops, tmp_path, capsys, spoil, flags, says):
    shutil.copytree(crops, tmp_path / "data")
    spoil(tmp_path / "data")
    code, _, errors = run_main(
        capsys, "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out", "--epochs", 1, *flags
    )
    assert code == 1 and len(errors) == 1 and says in errors[0], errors
    if not flags and spoil is not lone_class:
        assert str(tmp_path / "data") in errors[0]  # which file or folder
    assert not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--input_size", "25", "24", "12"], "--input_size"),
        (["--clip_range", "1000", "-1000"], "--clip_range"),
        (["--k_fold", "1"], "--k_fold"),
        (["--num_test", "0"], "--num_test"),
        (["--label_fraction", "0"], "--label_fraction"),
        (["--label_fraction", "1.5"], "--label_fraction"),
        (["--protocol", "svm"], "--protocol"),
        (["--folds", "random"], "--folds"),
        (["--arch", "resnet500"], "did you mean resnet50?"),
        (["--lr", "nan"], "--lr"),
        (["--layer_decay", "0"], "--layer_decay"),
        (["--negatives", "-1"], "--negatives"),
        (["--shift_range", "1", "1"], "--shift_range"),
        (["--freeze_encoder", "maybe"], "--freeze_encoder"),
        (["--predict", "DIR"], "--weights"),
        (["--weights", "OUT"], "--predict"),
    ],
)
def test_flags_wrong_by_themselves(tmp_path, capsys, flags, says):
    code, _, errors = run_main(capsys, "--data_dir", tmp_path, "--output_dir", tmp_path / "out", *flags)
    assert code == 2 and len(errors) == 1 and says in errors[0], errors
    assert not (tmp_path / "out").exists()


def test_data_dir_is_needed(capsys):
    code, _, errors = run_main(capsys)
    assert code == 2 and len(errors) == 1 and "--data_dir" in errors[0]


def test_another_input_size_than_the_checkpoints(crops, tmp_path, capsys, weights):
    """What is loaded then, test_weights.py holds to scipy."""
    flags = ["--data_dir", crops, "--output_dir", tmp_path, "--pretrained_weights", weights, "--protocol", "knn"]
    code, said, errors = run_main(capsys, *flags, "--input_size", 36, 24, 18, tiny=TINY[6:])
    assert code == 0 and not errors, errors
    assert "this is 36 x 24 x 18: its position embedding is interpolated (trilinear)" in said
    assert torch.load(tmp_path / "0" / "best.pth")["config"]["input_size"] == [36, 24, 18]


def test_folders_and_weights(crops, tmp_path, capsys, weights):
    (tmp_path / "pretraining").mkdir()
    (tmp_path / "pretraining" / "checkpoint.pth").touch()
    (tmp_path / "empty").mkdir()
    wide = VisionTransformer((24, 24, 12), (12, 12, 6), embed_dim=96, depth=2, num_heads=3)
    torch.save({"teacher": wide.state_dict()}, tmp_path / "wide.pth")
    assert run_main(capsys, "--data_dir", crops, "--output_dir", tmp_path / "done", "--protocol", "knn")[0] == 0
    data, out = ["--data_dir", crops], ["--output_dir", tmp_path / "out"]
    new = ["--predict", crops, "--weights"]
    for flags, says in (
        (["--data_dir", tmp_path / "nowhere", *out], "nowhere: no such folder"),
        ([*data, "--output_dir", tmp_path / "pretraining"], "holds a pre-training run"),
        (
            [*data, *out, "--pretrained_weights", tmp_path / "no.pth"],
            "--pretrained_weights " + str(tmp_path / "no.pth"),
        ),
        ([*data, *out, "--pretrained_weights", tmp_path / "wide.pth"], "cls_token (1, 1, 96) instead of (1, 1, 48)"),
        ([*data, *out, "--pretrained_weights", weights, "--arch", "vit_small"], "--arch vit_small contradicts"),
        ([*data, *out, "--pretrained_weights", weights, "--checkpoint_key", "best"], "--checkpoint_key"),
        ([*data, *out, "--precision", "fp16"], "--precision fp16"),
        ([*data, *out, "--num_test", 15], "--num_test 15"),
        ([*new, tmp_path / "nowhere", *out], "--weights"),
        ([*new, tmp_path / "empty", *out], "no trained fold"),
        (["--predict", tmp_path / "empty", "--weights", tmp_path / "done", *out], "no volume found"),
        (["--predict", tmp_path / "nowhere", "--weights", tmp_path / "done", *out], "nowhere: no such folder"),
        ([*new, tmp_path / "done", "--output_dir", tmp_path / "done"], "holds a trained run"),
    ):
        code, _, errors = run_main(capsys, *flags)
        assert code == 1 and len(errors) == 1 and says in errors[0], errors


def test_errors_under_torchrun(crops, tmp_path):
    """All ranks end with exit code 1, the reason is told once; also for a crop that only one rank meets."""
    shutil.copytree(crops, tmp_path / "data")
    done = command("--data_dir", tmp_path / "nowhere", "--output_dir", tmp_path / "a", processes=2)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 1 and sum("no such folder" in line for line in lines) == 1 and len(lines) <= 2
    cut_off(tmp_path / "data")
    done = command("--data_dir", tmp_path / "data", "--output_dir", tmp_path / "b", "--epochs", 2, processes=2)
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode == 1 and any("crop" in line and "can't be read" in line for line in lines), done.stderr
    assert not traceback_through_our_code(done.stderr)


# ------------------------------------------------------------------------------------------------------- real data


def test_real_nodules(shared_data, tmp_path, capsys):
    """The nodule cubes in the classification layout, malignancy at least 4 against at most 2: every protocol runs."""
    nodules = np.load(shared_data / "nodules" / "nodules_51mm.npz")
    hu, malignancy = nodules["hu"], nodules["malignancy"]
    for number, i in enumerate(np.flatnonzero(malignancy != 3)[:30]):
        folder = tmp_path / "data" / f"subset{number % 5}" / f"label{int(malignancy[i] >= 4)}"
        path = folder / nodules["name"][i] / "nodule.nii.gz"
        path.parent.mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(hu[i].T, np.diag([-1.0, -1.0, 1.0, 1.0])), path)
    for protocol in ("finetune", "linear", "knn"):
        code, _, errors = run_main(
            capsys,
            "--data_dir",
            tmp_path / "data",
            "--output_dir",
            tmp_path / protocol,
            "--epochs",
            1,
            "--protocol",
            protocol,
            "--input_size",
            48,
            48,
            48,
            "--batch_size_per_gpu",
            16,
        )
        assert code == 0 and not errors
        check_metrics(tmp_path / protocol)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "flags",
    [
        ["--precision", "bf16"],
        ["--precision", "fp16"],
        ["--precision", "fp32"],
        ["--protocol", "linear"],
        ["--protocol", "knn"],
    ],
    ids=lambda flags: flags[1],
)
def test_gpu_run(crops, tmp_path, capsys, flags):
    code, _, errors = run_main(
        capsys,
        "--data_dir",
        crops,
        "--output_dir",
        tmp_path,
        "--epochs",
        3,
        "--num_workers",
        2,
        "--use_elastic",
        "--use_gaussian",
        "--use_histogram",
        *flags,
    )
    assert code == 0 and not errors
    check_metrics(tmp_path)
