"""Memory that a script has freed is there for its next tensor, without a page fault for each of its pages."""

import os
import platform
import subprocess
import sys

import pytest
from conftest import ROOT

from dino3d.malloc import MALLOC_SETTINGS

SCRIPT = """
import resource, torch, utils
def main():
    for turn in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(1 << 24).mul_(2)  # 64 MiB, as the prototypes' weights
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
utils.run_script(main)
"""


def faults(**settings):
    """Page faults of each of eight times that 64 MiB are taken and freed, in a script."""
    environment = {name: value for name, value in os.environ.items() if name not in MALLOC_SETTINGS}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, env=environment | settings, capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_freed_memory_is_kept():
    pages = (64 << 20) // os.sysconf("SC_PAGE_SIZE")
    first, *again = faults()
    assert first > 0.9 * pages and max(again[3:]) < 0.1 * pages  # it may take some to settle
    # whoever has set something has a reason, and what glibc does by itself is what this is against
    assert min(faults(MALLOC_TRIM_THRESHOLD_="131072")) > 0.9 * pages


def test_other_libraries_are_left_alone(monkeypatch):
    from dino3d import malloc

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert malloc.keep_freed_memory() is False
