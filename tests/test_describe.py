"""describe.py: every question about a checkpoint, against what it was made of."""

import argparse
import hashlib
import json
import shutil
import sys
import zlib

import nibabel
import numpy as np
import pytest
import torch
from conftest import ROOT
from raw_inputs import write_series

import describe
import prepare_data
from dino3d.command_line import UserError
from dino3d.training.checkpoint import save_checkpoint
from vision_transformer import vit_micro

SIZE, PATCH = (24, 24, 12), (12, 12, 6)
CONFIG = {
    "arch": "vit_micro",
    "patch_size": list(PATCH),
    "input_size": list(SIZE),
    "clip_range": [-1350.0, 150.0],
    "spacing": [0.8, 0.8, 1.6],
    "momentum_teacher": 0.996,
    "epochs": 3,
    "out_dim": 64,
}
RECORD = {
    "teacher_entropy": 3.0,
    "kl": 0.4,
    "winning_prototypes": 12,
    "effective_rank": 9.0,
    "effective_rank_first_steps": 10.0,
}


def crc32(network):
    """Of names and bytes in the order of names, by hand."""
    value = 0
    for name, tensor in sorted(network.state_dict().items()):
        value = zlib.crc32(tensor.numpy().tobytes(), zlib.crc32(name.encode(), value))
    return f"{value:08x}"


def backbone(network):
    return {"backbone." + name: tensor for name, tensor in network.state_dict().items()}


@pytest.fixture
def run(tmp_path):
    """(folder, teacher, student) of a pre-training run, two epochs of three."""
    teacher, student = vit_micro(SIZE, PATCH), vit_micro(SIZE, PATCH)
    folder = tmp_path / "run"
    folder.mkdir()
    state = {"teacher": backbone(teacher), "student": backbone(student), "optimizer": {}, "config": CONFIG}
    save_checkpoint(folder / "checkpoint.pth", state | {"epoch": 2, "step": 20, "samples": 80})
    records = [RECORD | {"epoch": epoch, "step": 10 * epoch} for epoch in (1, 2, 3)]
    records[2]["kl"] = 0.7  # after the checkpoint
    (folder / "log.txt").write_text("".join(json.dumps(one) + "\n" for one in records))
    (folder / "config.json").write_text(json.dumps({"arguments": CONFIG, "git_revision": "abc", "versions": {}}))
    (folder / "data_list.txt").write_text("# volumes below DIR\nPat1/t0/scan7.hdf5\nPat2/t1/scan9.hdf5\nloose.nii.gz\n")
    return folder, teacher, student


def told(capsys, *flags):
    """{heading: lines} that describe.py prints."""
    describe.main(["--weights", *map(str, flags)])
    found, heading = {}, ""
    for line in capsys.readouterr().out.splitlines():
        first = line.split("  ")[0]
        heading = first or heading
        found.setdefault(heading, []).append(line[len(first) :].strip())
    return found


def test_a_pretraining_run(run, capsys):
    folder, teacher, student = run
    found = told(capsys, folder)
    file = folder / "checkpoint.pth"
    assert found["file"][1:] == [
        "whole: it matches its checksum",
        f"SHA-256 {hashlib.sha256(file.read_bytes()).hexdigest()}",
    ]
    assert crc32(teacher) in found["teacher"][0] and "is given" in found["teacher"][0]
    assert crc32(student) in found["student"][0] and "is given" not in found["student"][0]
    assert f"{sum(one.numel() for one in teacher.parameters()):,} parameters" in found["encoder"][0]
    assert found["input"][1:] == [
        "0.8 0.8 1.6 mm per voxel",
        "HU -1350 150 become 0 and 1; what lies beyond is clipped",
    ]
    assert found["trained"] == ["2 of 3 epochs, 20 steps, 80 samples"]
    assert found["figures"][0].startswith("epoch 2: kl 0.4,")  # the log goes on behind the checkpoint
    assert found["figures"][1].startswith("no sign of collapse")
    assert "revision abc" in found["code"][0] and len(found["code"]) == 1
    assert found["seen"] == ["pre-training by data_list.txt: 3 volumes: Pat1, Pat2, loose"]
    assert "--out_dim 64" in found["flags"][0]


def test_what_the_log_says_of_a_collapse(run, capsys):
    folder, *_ = run
    record = RECORD | {"epoch": 2, "step": 20, "winning_prototypes": 1, "teacher_entropy": 0.01}
    record |= {"probe_logistic_auc": 0.7, "probe_start_logistic_auc": 0.6}
    (folder / "log.txt").write_text(json.dumps(record) + "\n")
    found = told(capsys, folder)
    assert "it has collapsed" in found["figures"][1]
    assert found["probe"][0].endswith(" 0.600 before training, 0.700 after epoch 2")


def test_another_start(run, capsys):
    folder, *_ = run
    (folder / "config.json").write_text(json.dumps({"arguments": CONFIG | {"epochs": 9}}))
    assert told(capsys, folder)["code"][1].endswith("is of another start than this file: other epochs")


def test_whom_it_has_seen(run, tmp_path, capsys):
    """By patient in crops, by file too of scans; and by way of the weights that a fold began from."""
    folder, teacher, _ = run
    image = nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4))
    for name in ("subset0/label1/pat2/scan9", "subset0/label0/New/scan7", "whole/loose"):
        path = tmp_path / "cases" / f"{name}.nii.gz"
        path.parent.mkdir(parents=True)
        nibabel.save(image, path)
    found = told(capsys, folder, "--cases", tmp_path / "cases")
    by_list = "pre-training by data_list.txt: 2 of 3 cases, by Pat2, loose"
    assert found["cases"][0] == by_list  # a crop's file name is no scan's

    fold = tmp_path / "tuned" / "0"
    fold.mkdir(parents=True)
    encoder = {"encoder." + name: tensor for name, tensor in teacher.state_dict().items()}
    config = CONFIG | {"protocol": "finetune", "pretrained_weights": str(folder), "weights_crc32": crc32(teacher)}
    config.pop("momentum_teacher")
    save_checkpoint(fold / "best.pth", {"model": encoder, "best": {"auc": 0.75, "epoch": 2}, "config": config})
    sides = {"train": ["New"], "validation": ["Other"], "test": ["pat2"]}
    (fold.parent / "splits.json").write_text(json.dumps({"splits": [sides]}))
    (fold / "metrics.json").write_text(json.dumps({"auc": 0.625}))
    found = told(capsys, fold, "--cases", tmp_path / "cases")
    assert found["cases"][:3] == [
        "fold 0, train: 1 of 3 cases, by New",
        "fold 0, validation, which chose its epoch: none of 3 cases",
        "fold 0, test, not trained on: 1 of 3 cases, by pat2",
    ]
    assert found["cases"][3].endswith(f"checkpoint.pth: {by_list}")
    assert found["figures"] == ["validation: auc 0.75", "test: auc 0.625"]
    assert found["trained"][1] == f"from {folder}, CRC-32 {crc32(teacher)}"
    with pytest.raises(UserError, match="--cases nothing: no such file or folder"):
        describe.main(["--weights", str(fold), "--cases", "nothing"])
    (folder / "checkpoint.pth").unlink()
    (folder / "log.txt").unlink()
    folder.rename(tmp_path / "elsewhere")
    assert told(capsys, fold)["seen"][3] == f"{folder}, which it began from: not known"
    (fold.parent / "splits.json").write_text('{"splits": []}')
    with pytest.raises(UserError, match="does not say who is in fold 0"):
        describe.main(["--weights", str(fold)])


@pytest.mark.parametrize(
    "volume, case, by",
    [
        ("LIDC-1/2001/ct/a#1.2.3", "subset0/label1/lidc-1/crop", "LIDC-1"),  # DICOM, as it was downloaded
        ("/other/place/Pat1/t0/scan7.hdf5", "Pat1/new", "Pat1"),  # of a list
        ("Pat1/study/scan7.nii.gz", "a/b/Pat1/new", "Pat1"),
        ("Pat1/t0/scan7.hdf5", "subset0/label1/Pat11/scan7", None),
    ],
)
def test_names_on_paths(run, tmp_path, capsys, volume, case, by):
    folder, *_ = run
    (folder / "data_list.txt").write_text(f"# volumes below DIR\n{volume}\nPat2/t1/scan9.hdf5\nloose.nii.gz\n")
    path = tmp_path / "cases" / f"{case}.nii.gz"
    path.parent.mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), path)
    found = told(capsys, folder, "--cases", tmp_path / "cases")["cases"][0]
    assert found.endswith(f": 1 of 1 cases, by {by}" if by else ": none of 1 cases")


def test_what_all_files_of_a_pool_are_called_is_nobodys_name(run, tmp_path, capsys):
    folder, *_ = run
    (folder / "data_list.txt").write_text("# volumes below DIR\nPat1/ct.nii.gz\nPat2/ct.nii.gz\n")
    for name in ("Pat2", "New"):
        path = tmp_path / "cases" / name / "ct.nii.gz"
        path.parent.mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), path)
    found = told(capsys, folder, "--cases", tmp_path / "cases")["cases"][0]
    assert found == "pre-training by data_list.txt: 1 of 2 cases, by Pat2"


def test_a_patient_of_dicom_files_as_the_converter_calls_him(run, tmp_path, capsys, monkeypatch):
    folder, *_ = run
    source, output = tmp_path / "dicom", tmp_path / "converted"
    for number, name in enumerate(("Doe^John", "other")):
        write_series(source / str(number), series=f"1.2.{number}", patient=name)
    flags = ["nlst", "--input", str(source), "--output", str(output), "--workers", "1"]
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *flags])
    prepare_data.main()
    volumes = [str(path.relative_to(output)) for path in output.glob("Doe*/*/*.hdf5")]
    (folder / "data_list.txt").write_text("\n".join(["# volumes below DIR", *volumes, "Pat2/t1/scan9.hdf5", ""]))
    found = told(capsys, folder, "--cases", source)["cases"][0]
    assert len(volumes) == 1 and ": 1 of 2 cases, by Doe_John-" in found


def test_every_list_and_every_beginning(run, tmp_path, capsys):
    """A run that was begun with a folder and resumed with a list; two that began from one another; other weights."""
    folder, teacher, student = run
    table = tmp_path / "list.csv"
    table.write_text("path,patient\na/x.hdf5,Pat7\na/y.hdf5,Pat8\n")
    config = CONFIG | {"data_list": str(table), "pretrained_weights": str(tmp_path / "second")}
    (tmp_path / "second").mkdir()
    for where, start in ((folder, tmp_path / "second"), (tmp_path / "second", folder)):
        state = {"teacher": backbone(teacher), "config": config | {"pretrained_weights": str(start)}}
        save_checkpoint(where / "checkpoint.pth", state)
    seen = told(capsys, folder)["seen"]
    assert seen[0] == "pre-training by data_list.txt: 3 volumes: Pat1, Pat2, loose"
    assert seen[1] == "pre-training by list.csv: 2 volumes: Pat7, Pat8"
    assert len(seen) == 3 and seen[2].endswith("checkpoint.pth: pre-training by list.csv: 2 volumes: Pat7, Pat8")

    fold = tmp_path / "tuned" / "0"
    fold.mkdir(parents=True)
    sides = {"train": ["subset0/label1/Pat9/crop"], "validation": [], "test": []}  # of a table without patients
    (fold.parent / "splits.json").write_text(json.dumps({"splits": [sides]}))
    encoder = {"encoder." + name: tensor for name, tensor in student.state_dict().items()}
    for weights, others in ((teacher, False), (student, True)):
        of_fold = CONFIG | {"protocol": "finetune", "pretrained_weights": str(folder)}
        of_fold["weights_crc32"] = crc32(weights)
        del of_fold["momentum_teacher"]
        save_checkpoint(fold / "best.pth", {"model": encoder, "best": {"epoch": 1}, "config": of_fold})
        seen = told(capsys, fold)["seen"]
        assert ("whose weights are others by now" in seen[3]) is others
    image = tmp_path / "subset1/label0/pat9/other.nii.gz"
    image.parent.mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), image)
    found = told(capsys, fold, "--cases", image)["cases"]
    assert found[0] == "fold 0, train: 1 of 1 cases, by Pat9" and found[2].endswith(": none of 1 cases")


def test_a_copy_without_its_folder(run, tmp_path, capsys):
    folder, *_ = run
    (tmp_path / "copy").mkdir()
    copy = (folder / "checkpoint.pth").rename(tmp_path / "copy" / "found.pth")
    found = told(capsys, copy)
    assert found["seen"] == ["pre-training: not known"]
    assert found["figures"][0].startswith("not known") and found["code"][0].startswith("not known")
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    with pytest.raises(UserError, match="does not match its checksum"):
        describe.main(["--weights", str(copy)])
    copy.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cut off"):
        describe.main(["--weights", str(copy)])


def test_weights_of_other_code(tmp_path, capsys):
    network = vit_micro(SIZE, PATCH)
    torch.save({"model_ema": network.state_dict()}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no network in it loads"):
        describe.main(["--weights", str(tmp_path / "other.pth")])
    assert "model_ema: 128 features, 4 blocks, patches of 12 12 6: a vit_micro" in capsys.readouterr().out
    config = {"arch": "vit_micro", "patch_size": list(PATCH), "input_size": list(SIZE)}
    torch.save({"student": network.state_dict(), "config": config}, tmp_path / "student.pth")
    found = told(capsys, tmp_path / "student.pth")
    assert "is not loaded: has no 'teacher'" in found["teacher"][0] and crc32(network) in found["student"][0]
    assert "taken for granted, as the file does not say it: clip_range, spacing" in found["input"][-1]


def test_the_patients_of_a_probe_chose_its_best_epoch(run, tmp_path, capsys):
    folder, teacher, _ = run
    image = tmp_path / "probe/subset0/label1/Pat5/crop.nii.gz"
    image.parent.mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), image)
    state = {"teacher": backbone(teacher), "config": CONFIG | {"probe_dir": str(tmp_path / "probe")}, "probe": {}}
    save_checkpoint(folder / "best_probe.pth", state)
    found = told(capsys, folder / "best_probe.pth", "--cases", image)
    assert found["seen"][1] == f"probe, which chose its epoch, {tmp_path / 'probe'}: 1 patient: Pat5"
    assert found["cases"][1].endswith(": 1 of 1 cases, by Pat5")
    shutil.rmtree(tmp_path / "probe")
    assert told(capsys, folder / "best_probe.pth")["seen"][1].endswith(": not known")
    assert len(told(capsys, folder)["seen"]) == 1  # the newest state, which no probe chose


def test_files_that_are_no_checkpoint_of_one_network(tmp_path, capsys):
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(UserError, match="holds a Tensor, expected a checkpoint's dict"):
        describe.main(["--weights", str(tmp_path / "tensor.pth")])
    (tmp_path / "encoder.onnx").write_bytes(b"graph")
    with pytest.raises(UserError, match="is a graph; .*encoder.json says what it is"):
        describe.main(["--weights", str(tmp_path / "encoder.onnx")])
    config = {"arch": "vit_micro", "patch_size": list(PATCH), "input_size": list(SIZE), "pretrained_weights": 7}
    folds = [vit_micro(SIZE, PATCH) for _ in range(2)]  # as export.py writes a classifier's
    tensors = {f"{k}.encoder.{name}": one for k, fold in enumerate(folds) for name, one in fold.state_dict().items()}
    torch.save(tensors | {"config": config}, tmp_path / "folds.pth")
    found = told(capsys, tmp_path / "folds.pth")
    assert crc32(folds[0]) in found["0.encoder"][0] and 'checkpoint_key="0.encoder"' in found["load"][0]
    args = argparse.Namespace(arch="vit_micro", momentum_teacher=0.996, data_list=5, out_dim=64, epochs=9)
    torch.save({"teacher": backbone(folds[0]), "args": args, "epoch": 9, "optimizer": {}}, tmp_path / "theirs.pth")
    (tmp_path / "log.txt").write_text('{"train_loss": 1.0, "epoch": 8}\n')  # of DINO's own code
    with pytest.raises(UserError, match="no network in it loads"):
        describe.main(["--weights", str(tmp_path / "theirs.pth")])
    assert "9 of 9 epochs\n" in capsys.readouterr().out


def test_the_state_of_a_fold_that_trains(run, tmp_path, capsys):
    """Its weights are those of its newest epoch, its figures those of its best."""
    _, teacher, _ = run
    fold = tmp_path / "tuned" / "1"
    fold.mkdir(parents=True)
    encoder = {"encoder." + name: tensor for name, tensor in teacher.state_dict().items()}
    config = {name: value for name, value in CONFIG.items() if name != "momentum_teacher"} | {"protocol": "finetune"}
    state = {"model": encoder, "best": {"auc": 0.75, "epoch": 1}, "config": config}
    save_checkpoint(fold / "checkpoint.pth", state | {"optimizer": {}, "epoch": 2})
    (fold / "log.txt").write_text("")
    found = told(capsys, fold / "checkpoint.pth")
    assert found["trained"] == ["fold 1: 2 of 3 epochs; the best: 1", "from random weights"]
    assert found["figures"] == ["validation, of the best: auc 0.75", "test: none, its training has not ended"]
    save_checkpoint(fold / "checkpoint.pth", state | {"best": None, "optimizer": {}, "epoch": 0})
    assert told(capsys, fold / "checkpoint.pth")["trained"][0] == "fold 1: 0 of 3 epochs; the best: none yet"
    save_checkpoint(tmp_path / "copy.pth", state)
    found = told(capsys, tmp_path / "copy.pth")
    assert found["trained"][0] == "best of 3 epochs: 1" and found["figures"][1] == "test: not known"
    assert found["seen"] == ["training: not known"]


def test_published_weights(tmp_path, capsys):
    weights = ROOT / "results/weights/nodules.safetensors"
    about = json.loads(weights.with_suffix(".json").read_text())
    found = told(capsys, weights)
    assert found["file"][1].startswith("whole: ") and about["git_revision"] in found["what"][0]
    assert about["weights_crc32"][0] in found["network"][0]
    (tmp_path / weights.name).write_bytes(weights.read_bytes())
    about["weights_from"] = [{"file": "run.pth", "network": "key 'student'", "epoch": 3}]  # newer exports have it
    (tmp_path / "nodules.json").write_text(json.dumps(about))
    found = told(capsys, tmp_path / weights.name)
    assert found["what"][0].endswith(" of file run.pth, network key 'student', epoch 3")
    about["files"][weights.name]["sha256"] = "0" * 64
    (tmp_path / "nodules.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="another file"):
        describe.main(["--weights", str(tmp_path / weights.name)])
    (tmp_path / "nodules.json").write_text('{"files": ["of another program"]}')
    assert told(capsys, tmp_path / weights.name)["file"][1].startswith("read to its end")
