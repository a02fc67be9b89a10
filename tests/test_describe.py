"""describe.py: every question about a checkpoint, against what it was made of."""

import hashlib
import json
import zlib

import nibabel
import numpy as np
import pytest
import torch
from conftest import ROOT

import describe
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
    assert found["seen"] == ["pre-training: 5: Pat1, Pat2, loose, scan7, scan9"]
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
    assert found["cases"][0] == "pre-training: 2 names: Pat2, loose"  # a crop's file name is no scan's

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
        "fold 0, train: 1 names: New",
        "fold 0, validation: none of them",
        "fold 0, test: 1 names: pat2",
    ]
    assert found["cases"][3].endswith("checkpoint.pth: pre-training: 2 names: Pat2, loose")
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
