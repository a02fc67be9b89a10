"""A run of two processes that is killed and killed again ends as one that nobody disturbed; `python tests/survive.py`
is the long form."""

import torch
from survive import differences, make_volumes, survive


def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path):
    record, different = survive(tmp_path, make_volumes(tmp_path / "data"), kills=2, epochs=14)
    assert len(record) == 2 and all(0 < kill["step"] < kill["last_step"] for kill in record), record
    assert different == []


def test_a_single_bit_is_a_difference():
    one = {"a": torch.ones(3), "b": [{"c": torch.zeros(2)}, 1.0]}
    two = {"a": torch.ones(3), "b": [{"c": torch.tensor([0.0, 1e-45])}, 1.0]}
    assert differences(one, one) == [] and differences(one, two) == ["state.b.0.c"]
    assert differences(one, {"a": torch.ones(3).double(), "b": one["b"]}) == ["state.a"]
    assert differences(one, {"a": one["a"]}) == ["state"]
