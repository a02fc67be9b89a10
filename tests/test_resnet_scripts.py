"""Fine-tuning, prediction, features and export of a ResNet by their command lines."""

import functools
import json
import os
import subprocess

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ROOT
from test_extract_features import extract, read_csv
from test_main_dino import TORCHRUN
from test_main_lnc_luna16 import write_cases
from test_main_lts_msd import phantom, save, write_case

import export
import main_lnc_luna16
import main_lts_msd
import utils
from augmentations import scale_intensity
from dino3d.data.volume import Volume
from dino3d.evaluation import statistics
from dino3d.features.encoder import load_encoder
from dino3d.files import read_json, read_table
from dino3d.finetune import heads
from resnet3d import RESNETS, BasicBlock, ResNet
from vision_transformer import ARCHITECTURES

SIZE = (24, 24, 12)
TINY = ["--precision", "fp32", "--num_workers", "0", "--k_fold", "2", "--warmup_epochs", "0"]
SCRIPTS = {"lnc": main_lnc_luna16, "lts": main_lts_msd}


@pytest.fixture(scope="module", autouse=True)
def smaller_models():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "resnet18", functools.partial(ResNet, BasicBlock, (1, 1, 1, 1), width=4))
        patch.setitem(heads.DECODERS, "unet", functools.partial(heads.UnetDecoder, feature_size=2))
        patch.setattr(statistics, "BOOTSTRAP_ROUNDS", 50)
        yield


def run_main(capsys, script, *flags):
    """(exit code, standard output, lines of standard error) of a script, called in this process."""
    code = 0
    capsys.readouterr()
    try:
        utils.run_script(lambda: SCRIPTS[script].main([*TINY, *map(str, flags)]))
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    return code, said.out, [line for line in said.err.splitlines() if line.strip()]


def must(found):
    assert found[0] == 0 and not found[2], found
    return found[1]


def refused(found, *says, code=1):
    assert found[0] == code and len(found[2]) == 1, found
    assert all(text in found[2][0] for text in says), found[2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A pre-training checkpoint as main_dino.py leaves it, with statistics as of some training."""
    torch.manual_seed(3)
    model = ARCHITECTURES["resnet18"](SIZE).train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.rand(4, 1, 40, 40, 20))
    config = {"arch": "resnet18", "patch_size": None, "input_size": list(SIZE), "clip_range": [-900.0, 300.0]}
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "checkpoint.pth"
    torch.save({"teacher": state, "config": config | {"spacing": [2.0, 2.0, 3.0], "drop_path_rate": None}}, path)
    return path


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """15 cases of 11 patients."""
    return write_cases(tmp_path_factory.mktemp("crops"))


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """4 cases with 2 x 2 x 3 mm."""
    folder = tmp_path_factory.mktemp("cases")
    for i in range(4):
        write_case(folder, f"lung_{i:03}", *phantom(i, (30, 27, 15), (2, 2, 3)))
    return folder


CLASSIFICATION = ["--epochs", 2, "--batch_size_per_gpu", 3, "--num_test", 4, "--negatives", 0]
SEGMENTATION = ["--epochs", 2, "--batch_size_per_gpu", 3, "--num_test", 1, "--patches_per_case", 3, "--val_freq", 2]


@pytest.fixture(scope="module")
def classified(crops, weights, tmp_path_factory):
    """Output folder of a fine-tuned classifier."""
    out = tmp_path_factory.mktemp("lnc") / "out"
    main_lnc_luna16.main(
        [*TINY, *map(str, ["--data_dir", crops, "--output_dir", out, "--pretrained_weights", weights, *CLASSIFICATION])]
    )
    return out


@pytest.fixture(scope="module")
def segmented(cases, weights, tmp_path_factory):
    """Output folder of a fine-tuned segmenter."""
    out = tmp_path_factory.mktemp("lts") / "out"
    main_lts_msd.main(
        [*TINY, *map(str, ["--data_dir", cases, "--output_dir", out, "--pretrained_weights", weights, *SEGMENTATION])]
    )
    return out


def assert_same_folds(one, two):
    """Weights, running statistics and optimizer, to the last bit."""
    for fold in "01":
        mine, other = (torch.load(folder / fold / "checkpoint.pth") for folder in (one, two))
        assert mine["step"] == other["step"] > 0
        assert all(torch.equal(tensor, other["model"][name]) for name, tensor in mine["model"].items())
        assert mine["model"]["encoder.bn1.num_batches_tracked"] > 20  # of pre-training
        for index, state in mine["optimizer"]["state"].items():
            assert all(torch.equal(value, other["optimizer"]["state"][index][name]) for name, value in state.items())


# ---------------------------------------------------------------------------------------------------------- fine-tuning


def test_a_classifier_is_trained_and_predicts(crops, classified, tmp_path, capsys):
    config = read_json(classified / "config.json")["arguments"]
    assert config["arch"] == "resnet18" and config["patch_size"] is config["drop_path_rate"] is None
    assert config["input_size"] == list(SIZE) and config["clip_range"] == [-900, 300]
    predict = ["--predict", crops, "--weights", classified / "0", "--output_dir", tmp_path]
    must(run_main(capsys, "lnc", *predict))
    tested = {row["case"]: float(row["probability"]) for row in read_table(classified / "0" / "predictions.csv")}
    predicted = {row["case"]: float(row["probability"]) for row in read_table(tmp_path / "predictions.csv")}
    assert len(set(tested.values())) > 1
    assert all(predicted[case] == pytest.approx(probability, abs=1e-6) for case, probability in tested.items())


def test_a_classifier_resumes_within_an_epoch(crops, classified, weights, tmp_path, capsys):
    flags = ["--data_dir", crops, "--output_dir", tmp_path / "out", "--pretrained_weights", weights, *CLASSIFICATION]
    assert "stopped in fold 0 after 1 steps" in must(run_main(capsys, "lnc", *flags, "--max_steps", 1))
    assert torch.load(tmp_path / "out" / "0" / "checkpoint.pth")["position"] > 0
    must(run_main(capsys, "lnc", *flags))
    assert_same_folds(tmp_path / "out", classified)


def test_a_segmenter_is_trained_and_predicts(cases, segmented, tmp_path, capsys):
    config = read_json(segmented / "config.json")["arguments"]
    assert config["decoder"] == "unet" and config["spacing"] == [2, 2, 3]
    must(run_main(capsys, "lts", "--predict", cases / "images", "--weights", segmented / "0", "--output_dir", tmp_path))
    (tested,) = sorted((segmented / "0" / "masks").iterdir())
    with Volume(tested) as mine, Volume(tmp_path / tested.name) as other:
        assert np.array_equal(mine.read_labels(), other.read_labels()) and mine.shape == (30, 27, 15)


def test_a_segmenter_resumes_within_an_epoch(cases, segmented, weights, tmp_path, capsys):
    flags = ["--data_dir", cases, "--output_dir", tmp_path / "out", "--pretrained_weights", weights, *SEGMENTATION]
    must(run_main(capsys, "lts", *flags, "--max_steps", 1))
    must(run_main(capsys, "lts", *flags))
    assert_same_folds(tmp_path / "out", segmented)


@pytest.mark.parametrize(
    "script, flags",
    [
        ("lnc", ["--protocol", "linear", *CLASSIFICATION]),
        ("lnc", ["--protocol", "knn", *CLASSIFICATION]),
        ("lts", ["--decoder", "linear", "--freeze_encoder", "true", *SEGMENTATION]),
    ],
)
def test_a_frozen_encoder_stays_as_it_was(crops, cases, weights, tmp_path, capsys, script, flags):
    data = {"lnc": crops, "lts": cases}[script]
    flags = ["--data_dir", data, "--output_dir", tmp_path, "--pretrained_weights", weights, *flags]
    must(run_main(capsys, script, *flags))
    before = torch.load(weights)["teacher"]
    for fold in "01":
        state = torch.load(tmp_path / fold / "best.pth")["model"]
        assert all(torch.equal(state[name.replace("backbone", "encoder")], one) for name, one in before.items())


def test_another_tasks_encoder_starts_a_run(cases, classified, tmp_path, capsys):
    """Its architecture and geometry are read from the checkpoint."""
    flags = ["--data_dir", cases, "--output_dir", tmp_path, "--pretrained_weights", classified, *SEGMENTATION]
    said = must(run_main(capsys, "lts", *flags, "--lr", 0, "--min_lr", 0, "--weight_decay", 0))
    assert "resnet18 with unet decoder" in said
    before, after = (torch.load(one / "0" / "best.pth")["model"] for one in (classified, tmp_path))
    weights = [name for name in before if name.startswith("encoder.") and "running" not in name and "num_" not in name]
    assert all(torch.equal(before[name], after[name]) for name in weights)


@pytest.mark.parametrize(
    "flags, code, says",
    [
        (["--arch", "resnet18", "--patch_size", 12, 12, 6], 2, "--patch_size 12 12 6: resnet18 has none"),
        (["--arch", "resnet18", "--drop_path_rate", 0.1], 2, "--drop_path_rate 0.1: resnet18 has none"),
        (["--pretrained_weights", "W", "--patch_size", 12, 12, 6], 1, "--patch_size 12 12 6: resnet18 has none"),
        (["--pretrained_weights", "W", "--drop_path_rate", 0.1], 1, "--drop_path_rate 0.1: resnet18 has none"),
        (["--pretrained_weights", "W", "--arch", "vit_tiny"], 1, "--arch vit_tiny contradicts"),
        (["--pretrained_weights", "BARE", "--arch", "vit_tiny"], 1, "does not fit the model"),
        (["--pretrained_weights", "VIT", "--arch", "resnet18"], 1, "does not fit the model"),
        (["--pretrained_weights", "W", "--batch_size_per_gpu", 1], 1, "--batch_size_per_gpu 1: the last step of"),
    ],
)
def test_what_a_resnet_has_not_is_refused_in_one_line(crops, weights, tmp_path, capsys, flags, code, says):
    torch.save(torch.load(weights)["teacher"], tmp_path / "bare.pth")
    torch.save(ARCHITECTURES["vit_micro"](SIZE, (12, 12, 6)).state_dict(), tmp_path / "vit.pth")
    files = {"W": weights, "BARE": tmp_path / "bare.pth", "VIT": tmp_path / "vit.pth"}
    flags = [files.get(flag, flag) for flag in flags]
    found = run_main(capsys, "lnc", "--data_dir", crops, "--output_dir", tmp_path / "out", *CLASSIFICATION, *flags)
    refused(found, says, code=code)


def test_decoders_of_others_are_refused(cases, weights, tmp_path, capsys):
    data = ["--data_dir", cases, "--output_dir", tmp_path / "out", *SEGMENTATION]
    found = run_main(capsys, "lts", *data, "--pretrained_weights", weights, "--decoder", "unetr")
    refused(found, "--decoder unetr with --arch resnet18", "take unet")
    found = run_main(capsys, "lts", *data, "--arch", "vit_micro", "--input_size", *SIZE, "--decoder", "unet")
    refused(found, "--decoder unet with --arch vit_micro", "take unetr")
    found = run_main(capsys, "lts", *data, "--pretrained_weights", weights, "--input_size", 16, 16, 8)
    refused(found, "an input of (16, 16, 8) voxels is too small")


def test_two_ranks_train_the_weights_of_one_process(crops, tmp_path):
    """float64: also what batch norm keeps, and with a last step that two ranks can't share evenly."""
    for processes, batch in ((1, 6), (2, 3)):
        start = [*TORCHRUN, f"--nproc_per_node={processes}", ROOT / "tests" / "run_lnc.py", *TINY]
        flags = ["--arch", "resnet18", "--input_size", *SIZE, *CLASSIFICATION, "--batch_size_per_gpu", batch]
        flags += ["--data_dir", crops, "--output_dir", tmp_path / str(processes)]
        done = subprocess.run(
            [*map(str, [*start, *flags])],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1", "DOUBLE": "1"},
        )
        assert done.returncode == 0, done.stderr
    uneven = 0
    for fold in "01":
        one = torch.load(tmp_path / "1" / fold / "weights0.pth")
        ranks = [torch.load(tmp_path / "2" / fold / f"weights{rank}.pth") for rank in range(2)]
        assert one["encoder.bn1.running_var"].dtype == torch.float64
        assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in one)
        assert max((one[name] - ranks[0][name]).abs().max() for name in one) < 1e-9
        uneven += torch.load(tmp_path / "1" / fold / "checkpoint.pth")["cases"] // 2 % 6 in (3, 5)
    assert uneven


# -------------------------------------------------------------------------------------------------- features and export


def test_features_of_a_resnet(weights, tmp_path, capsys):
    """What a few lines of torch make of the window in the middle; with --layers the means of the last blocks' maps."""
    for i in range(2):
        voxels = np.random.default_rng(i).integers(-900, 400, (34, 28, 14)).astype(np.int16)
        save(tmp_path / "scans" / f"scan{i}.nii.gz", voxels, np.diag([2, 2, 3, 1]))
    flags = ["--weights", weights, "--input", tmp_path / "scans"]
    more = ["--layers", 2, "--random", 1, "--maps", tmp_path / "maps", "--point_ras", 30, 28, 21]
    code, out, errors = extract(capsys, *flags, "--output", tmp_path / "a.csv", *more)
    assert code == 0 and not errors, (out, errors)
    assert "resnet18 has no class token: its maps have no attention" in out
    assert {path.name for path in (tmp_path / "maps" / "scan0").iterdir()} == {
        "maps.json", "maps.png", "pca.nii.gz", "similarity1.nii.gz", "similarity1.png"
    }  # fmt: skip
    found, random = (read_csv(tmp_path / name)[1] for name in ("a.csv", "a.random0.csv"))
    encoder = load_encoder(str(weights)).build().eval()
    for i, row in enumerate(found):
        with Volume(tmp_path / "scans" / f"scan{i}.nii.gz") as volume:
            hu = torch.from_numpy(volume.read()[5:29, 2:26, 1:13].copy())
        with torch.no_grad():
            maps = encoder.get_intermediate_layers(scale_intensity(hu, -900, 300)[None, None], 2)
        np.testing.assert_allclose(row, torch.cat([one[0].mean((1, 2, 3)) for one in maps]), atol=1e-4)
    assert found.shape == random.shape == (2, 16 + 32) and not np.allclose(found, random, atol=1e-2)
    code, _, errors = extract(capsys, *flags, "--output", tmp_path / "b.csv", "--pool", "cls+mean")
    assert code == 1 and "--pool cls+mean: resnet18: the encoder has no class token" in errors[0]
    code, _, errors = extract(capsys, *flags, "--output", tmp_path / "b.csv", "--layers", 5)
    assert code == 1 and "--layers 5: resnet18 has 4 blocks" in errors[0]


def test_weights_of_monai_are_known_by_their_names(crops, tmp_path, capsys, monkeypatch):
    """Of a whole classifier, as DataParallel saves it: for fine-tuning, frozen, and for features."""
    from monai.networks.nets import resnet18

    monkeypatch.setitem(ARCHITECTURES, "resnet18", RESNETS["resnet18"])
    torch.manual_seed(0)
    theirs = resnet18(n_input_channels=1, num_classes=2, conv1_t_stride=(2, 2, 1), bias_downsample=False).eval()
    state = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "monai.pth")
    flags = ["--data_dir", crops, "--output_dir", tmp_path / "out", "--pretrained_weights", tmp_path / "monai.pth"]
    out = must(run_main(capsys, "lnc", *flags, "--input_size", *SIZE, "--protocol", "knn", *CLASSIFICATION))
    assert "by its tensors' names it is a resnet18" in out and "resnet18 (knn, cls)" in out
    encoder = load_encoder(str(tmp_path / "monai.pth"), flag="--weights")
    assert (encoder.arch, encoder.patch_size) == ("resnet18", None)
    theirs.fc, volumes = torch.nn.Identity(), torch.rand(2, 1, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(encoder.build().eval()(volumes), theirs(volumes), atol=1e-5, rtol=1e-5)
    found = run_main(capsys, "lnc", *flags[:2], "--output_dir", tmp_path / "2", *flags[4:], "--arch", "resnet34")
    refused(found, "--arch resnet34 contradicts --pretrained_weights", "which has resnet18")


def hounsfield(count):
    return np.random.default_rng(0).uniform(-1500, 600, (count, 1, *SIZE)).astype(np.float32)


@pytest.mark.parametrize("model", ["encoder", "classifier", "segmenter"])
def test_a_resnet_is_exported(weights, classified, segmented, tmp_path, capsys, model):
    """ONNX against the networks, of HU beyond the clip range, in batches of 1 and 3."""
    source = {"encoder": weights, "classifier": classified, "segmenter": segmented / "0"}[model]
    export.main(["--weights", str(source), "--output", str(tmp_path / "model.onnx")])
    about = json.loads((tmp_path / "model.json").read_text())
    assert about["architecture"]["patch_size"] is None and about["architecture"]["arch"] == "resnet18"
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 3):
        hu = hounsfield(count)
        found = session.run(None, {"hu": hu})
        volumes = scale_intensity(torch.from_numpy(hu).clamp_min(-1024), -900, 300)
        networks = export.load_source(str(source), None, "teacher").networks
        with torch.no_grad():
            if model == "encoder":
                assert [one["name"] for one in about["outputs"]] == ["embedding", "feature_map"]
                assert about["outputs"][1]["shape"] == ["batch", 32, 1, 1, 1]
                expected = [networks[0](volumes), networks[0].get_intermediate_layers(volumes)[0]]
            elif model == "segmenter":
                expected = [networks[0](volumes)[:, None]]
            else:
                assert len(networks) == 2
                expected = []  # calibrated: test_export.py
                np.testing.assert_allclose(found[0].sum(1), 1, atol=1e-5)
        for one, other in zip(found, expected):
            np.testing.assert_allclose(one, other, atol=1e-4)


def test_safetensors_of_a_resnet_load(weights, tmp_path, capsys):
    export.main(["--weights", str(weights), "--output", str(tmp_path / "encoder.safetensors")])
    before, after = (load_encoder(str(one)) for one in (weights, tmp_path / "encoder.safetensors"))
    assert before.settings() == after.settings() and before.crc32 == after.crc32
