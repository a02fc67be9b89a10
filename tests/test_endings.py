"""How a run of two processes ends: with its exit code and message, and nothing of the process group left behind."""

import sys

import pytest
from survive import start


@pytest.mark.skipif(sys.platform != "linux", reason="threads are listed by /proc")
@pytest.mark.parametrize(
    "how, codes, says",
    [
        ("well", [0, 0], ["", ""]),
        ("preempted", [75, 75], ["ended by a test", ""]),
        ("together", [1, 1], ["error: the same on all ranks", "error: rank 1 stops as rank 0 does"]),
        ("alone", [1, 1], ["error: another process of this run has ended", "error: of one rank"]),
        ("bug", [1, 1], ["error: another process of this run has ended", "ZeroDivisionError"]),
        (
            "interrupted",
            [1, 130],
            ["error: another process of this run has ended", "error: rank 1 stops as rank 0 does"],
        ),
    ],
)
def test_processes_end_in_order(tmp_path, how, codes, says):
    """With collectives under way, at whose end a thread frees the last reference to a tensor."""
    ranks = start([how], tmp_path / "progress", script="run_ending.py")
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == codes, errors
    for error, text in zip(errors, says):
        assert text in error and "terminate called" not in error, errors
        left = [line.split()[1:] for line in error.splitlines() if line.startswith("threads")]
        if how in ("well", "preempted", "together"):
            assert len(left) == 1 and not any("gloo" in name for name in left[0]), errors
        else:  # whoever ends alone ends at once: those threads may wait for the others
            assert not left, errors
