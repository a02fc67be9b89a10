"""A checkpoint that rank 0 reads is on every rank what it is on rank 0."""

import subprocess
import sys

import torch
from conftest import ROOT
from survive import free_port

from dino3d.training.broadcasting import broadcast_state, map_tensors
from dino3d.training.checkpoint import ALONE, save_checkpoint


def state():
    """Of all types, shapes and layouts that a checkpoint may have."""
    torch.manual_seed(0)
    tensors = {
        "float": torch.randn(3, 4),
        "turned": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
        "transposed": torch.randn(6, 3).t(),
        "nan": torch.tensor([float("nan"), -0.0, float("-inf")]),
        "half": torch.randn(5).half(),
        "bfloat16": torch.randn(7).bfloat16(),
        "double": torch.randn(2).double(),
        "step": torch.tensor(3.0),
        "bool": torch.tensor([True, False, True]),
        "long": torch.tensor(2**40),
        "empty": torch.empty(0, 4),
    }
    return {"config": {"arch": "a", "sizes": (1, 2)}, "model": tensors, "list": [tensors["half"], {3: None}], "step": 7}


def test_two_ranks_have_one_state(tmp_path):
    """To the bit; a file that is missing is None on both, a damaged one the same error; rank 0 alone reads."""
    path, port = tmp_path / "checkpoint.pth", str(free_port())
    save_checkpoint(path, state())
    (tmp_path / "checkpoint.pth.damaged").write_bytes(path.read_bytes()[:-700])
    command = [sys.executable, str(ROOT / "tests" / "run_broadcast.py"), str(path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([*command, str(rank), port], **pipes) for rank in range(2)]
    (one, read), (two, other) = (rank.communicate(timeout=180) for rank in ranks)
    assert not any(rank.returncode for rank in ranks), read + other
    assert one == two
    whole, missing, damaged = one.splitlines()
    assert "bfloat16" in whole and missing == "None" and damaged.endswith("start anew or put back a whole one True")
    assert [int(line) for line in read.split()] == [1, 1, 2] and [int(line) for line in other.split()] == [0, 0, 0]


def test_a_lone_process_gets_what_was_read():
    made = state()
    assert broadcast_state(lambda: made, ALONE) is made


def test_every_tensor_is_met_in_order():
    made, met = state(), []
    mapped = map_tensors(made, lambda tensor: met.append(tensor) or len(met))
    assert list(mapped["model"].values()) == list(range(1, 12)) and mapped["list"] == [12, {3: None}]
    assert mapped["config"] == {"arch": "a", "sizes": (1, 2)} and met[-1] is made["model"]["half"]
