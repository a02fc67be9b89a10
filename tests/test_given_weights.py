"""Fine-tuned models as --pretrained_weights and --weights of every script that trains or predicts."""

import functools
import shutil

import nibabel
import numpy as np
import pytest
import torch
from test_main_dino import run_main as pretrain
from test_main_dino import smaller_model
from test_main_lnc_luna16 import run_main as classify
from test_main_lnc_luna16 import write_cases
from test_main_lts_msd import assert_one_error, phantom, save, write_case
from test_main_lts_msd import run_main as segment

from dino3d.features.encoder import PretrainedEncoder, load_encoder
from dino3d.files import write_json
from dino3d.finetune.heads import build_classifier, build_segmenter
from dino3d.finetune.mask_inference import segment_volume
from export import weight_files

__all__ = ["smaller_model"]  # a fixture
SIZES = {"arch": "vit_micro", "patch_size": [12, 12, 6], "input_size": [24, 24, 12], "clip_range": [-1200.0, 300.0]}
QUICK = ["--num_workers", "0", "--k_fold", "2", "--epochs", "1", "--drop_path_rate", "0", "--batch_size_per_gpu", "8"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{task: output folder of a run with two folds}, the classifier's without a spacing, the segmenter's with one."""
    folders = {}
    for task in ("lnc", "lts"):
        folders[task] = tmp_path_factory.mktemp("runs") / task
        for fold in range(2):
            torch.manual_seed(fold)
            encoder = PretrainedEncoder(**SIZES, spacing=None)
            config = SIZES | {"classes": 2, "freeze_encoder": False}
            if task == "lnc":
                model = build_classifier("finetune", encoder, "cls", 0.0, 2, 0, None)
                config |= {"protocol": "finetune", "knn_k": None, "spacing": None}
                config |= {"crop_size": [24, 24, 12], "crop_spacing": [0.7, 0.7, 1.4]}
            else:
                model = build_segmenter(encoder, 0.0, "linear", 2, False)
                config |= {"decoder": "linear", "spacing": [2.0, 2.0, 3.0], "overlap": 0.0, "tolerance": 2.0}
                config |= {"largest_component": False, "min_volume": 0.0}
            (folders[task] / str(fold)).mkdir(parents=True)
            state = {"model": model.state_dict(), "config": config, "best": {"threshold": 0.5, "epoch": 1}}
            torch.save(state, folders[task] / str(fold) / "best.pth")
    return folders


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """{script: its data} that trains in a second."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(4):
        write_case(folder / "lts", f"case{i}", *phantom(i, (26, 24, 14), (2.0, 2.0, 3.0)))
        save(folder / "dino" / f"p{i}" / "scan.nii.gz", *phantom(i, (40, 40, 24))[::2])
    return {"lnc": write_cases(folder / "lnc", 6, shape=(24, 24, 12)), "lts": folder / "lts", "dino": folder / "dino"}


def encoder_of(path, prefix):
    state = torch.load(path)
    for key in ("model",) if "model" in state else ("teacher",):
        state = state[key]
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


WHERE = {"run": "", "fold": "1", "file": "1/best.pth"}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("task", ["lnc", "lts"])
def test_both_fine_tunings_start_from_a_fine_tuned_encoder(runs, data, task, where, tmp_path, capsys):
    """Architecture, sizes and clip range are the file's; the classifier is trained with a rate of 0, which changes
    nothing."""
    given = runs[task] / WHERE[where]
    flags = ["--pretrained_weights", given, *QUICK, "--lr", 0, "--min_lr", 0]
    code, said, errors = classify(capsys, "--data_dir", data["lnc"], "--output_dir", tmp_path / "a", *flags, tiny=[])
    assert code == 0 and not errors, errors
    fold = "0" if where == "run" else "1"
    assert f"weights of {runs[task] / fold / 'best.pth'}" in said
    assert ("the first of 2 folds" in said) == (where == "run")
    new = torch.load(tmp_path / "a" / "0" / "best.pth")
    assert {name: new["config"][name] for name in SIZES} == SIZES
    assert new["config"]["spacing"] == (None if task == "lnc" else [2.0, 2.0, 3.0])
    old = encoder_of(runs[task] / fold / "best.pth", "encoder.")
    assert old and all(torch.equal(tensor, new["model"][f"encoder.{name}"]) for name, tensor in old.items())
    if where == "run":
        more = ["--num_test", 1, "--patches_per_case", 1]
        code, said, errors = segment("--data_dir", data["lts"], "--output_dir", tmp_path / "b", *flags, *more, tiny=[])
        assert code == 0 and not errors, errors
        new = torch.load(tmp_path / "b" / "0" / "best.pth")
        assert {name: new["config"][name] for name in SIZES} == SIZES
        if task == "lts":
            assert new["config"]["spacing"] == [2.0, 2.0, 3.0]
        assert all(torch.equal(tensor, new["model"][f"encoder.{name}"]) for name, tensor in old.items())


@pytest.mark.parametrize("task", ["lnc", "lts"])
def test_pretraining_starts_from_a_fine_tuned_encoder(runs, data, task, tmp_path, capsys):
    flags = ["--arch", "vit_micro", "--patch_size", 12, 12, 6, "--batch_size_per_gpu", 2, "--max_steps", 1, "--lr", 0]
    flags += ["--min_lr", 0, "--data_dir", data["dino"], "--output_dir", tmp_path, "--momentum_teacher", 1]
    code, said, errors = pretrain(capsys, *flags, "--pretrained_weights", runs[task])
    assert code == 0 and not errors, errors
    assert f"starting from the backbone of {runs[task] / '0' / 'best.pth'}" in said and "the first of 2 folds" in said
    new = encoder_of(tmp_path / "checkpoint.pth", "backbone.")
    old = encoder_of(runs[task] / "0" / "best.pth", "encoder.")
    assert all(torch.equal(tensor, new[name]) for name, tensor in old.items())


def test_folds_that_are_not_finished_predict_nothing(runs, data, tmp_path, capsys):
    """Fold 0 is tested, fold 1 stopped within its training, fold 2 was not begun: all readers take fold 0 alone."""
    crop, scan = next(data["lnc"].rglob("*.nii.gz")), data["lts"] / "images" / "case0.nii.gz"
    told = "fold 1 not finished; fold 2 not begun"
    for task in ("lnc", "lts"):
        run = shutil.copytree(runs[task], tmp_path / task)
        write_json(run / "splits.json", {"data": {}, "splits": [{}] * 3})
        predict = functools.partial(classify, capsys) if task == "lnc" else segment
        made = []
        for where in (run, run / "0"):
            if where == run:
                flags = [
                    "--predict",
                    crop if task == "lnc" else scan,
                    "--weights",
                    run,
                    "--output_dir",
                    tmp_path / "no",
                ]
                assert_one_error(predict(*flags, tiny=[]), "no fold is finished (folds 0, 1 not finished; fold 2 not")
                (run / "0" / "metrics.json").write_text("{}")
            out = tmp_path / f"{task} {where.name}"
            flags = ["--predict", crop if task == "lnc" else scan, "--weights", where, "--output_dir", out]
            code, said, errors = predict(*flags, tiny=[])
            assert code == 0 and "mean of 1 fold," in said, errors
            assert (f"note: left out of {run}: {told}\n" in said) == (where == run)
            made.append((out / ("predictions.csv" if task == "lnc" else "volumes.csv")).read_bytes())
        assert made[0] == made[1]
        assert weight_files(str(run)) == [run / "0" / "best.pth"] and told in capsys.readouterr().out
        assert load_encoder(str(run)).notices[0].endswith(f"taken is {run / '0' / 'best.pth'}; left out: {told}")
    image = nibabel.load(scan)
    masks = [segment_volume(where, np.asarray(image.dataobj), image.affine) for where in (run, run / "0")]
    np.testing.assert_array_equal(*masks)


def test_each_script_predicts_with_its_own_models(runs, data, tmp_path, capsys):
    crop, scan = next(data["lnc"].rglob("*.nii.gz")), data["lts"] / "images" / "case0.nii.gz"
    for where in WHERE.values():
        out = tmp_path / (where or "run").replace("/", "_")
        predict = ["--predict", crop, "--weights", runs["lnc"] / where, "--output_dir", out / "a"]
        code, said, _ = classify(capsys, *predict, tiny=[])
        assert code == 0 and f"mean of {1 if where else 2} fold" in said
        code, said, _ = segment("--predict", scan, "--weights", runs["lts"] / where, "--output_dir", out / "b", tiny=[])
        assert code == 0 and f"mean of {1 if where else 2} fold" in said
        wrong = ["--weights", runs["lts"] / where, "--output_dir", out / "c"]
        found = classify(capsys, "--predict", crop, *wrong, tiny=[])
        assert_one_error(found, "is no checkpoint of main_lnc_luna16.py but of main_lts_msd.py; expected")
        wrong = ["--weights", runs["lnc"] / where, "--output_dir", out / "c"]
        found = segment("--predict", scan, *wrong, tiny=[])
        assert_one_error(found, "is no checkpoint of main_lts_msd.py but of main_lnc_luna16.py; expected")
    np.savez(tmp_path / "other.pth.npz", a=np.zeros(3))
    torch.save({"teacher": {}, "config": SIZES | {"out_dim": 64}}, tmp_path / "pretrained.pth")
    torch.save({"a": torch.zeros(3)}, tmp_path / "any.pth")
    for name, said in (("other.pth.npz", ""), ("pretrained.pth", "but of main_dino.py"), ("any.pth", "any.pth")):
        wrong = ["--weights", tmp_path / name, "--output_dir", tmp_path / "d"]
        assert_one_error(classify(capsys, "--predict", crop, *wrong, tiny=[]), said)
