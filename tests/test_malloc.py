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


WORKER = """
import gc, os, sys, torch, utils
from torch.utils.data import DataLoader, Dataset
from dino3d.training.loading import start_reading_process

class Own(Dataset):
    def __len__(self):
        return 2
    def __getitem__(self, number):
        gc.collect()
        own = counts = 0
        for line in open("/proc/self/smaps"):
            words = line.split()
            if not words[0].endswith(":"):
                counts = words[1].endswith("p")
            elif counts and words[0] == "Private_Dirty:":
                own += int(words[1])
        return own << 10

def main():
    held = [[number] for number in range(1 << 20)]  # objects, and below it memory that is free
    torch.ones(1 << 24), [str(number) for number in range(1 << 20)]
    start = start_reading_process if sys.argv[1] == "ours" else None
    how = {"num_workers": 2, "worker_init_fn": start, "multiprocessing_context": "fork"}
    print(max(DataLoader(Own(), batch_size=None, **how)))
utils.run_script(main)
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="asks Linux and glibc")
def test_a_reading_process_writes_to_nothing_that_it_has_inherited():
    def own_bytes(start):
        command = [sys.executable, "-c", WORKER, start]
        environment = {name: value for name, value in os.environ.items() if name not in MALLOC_SETTINGS}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert own_bytes("ours") < 24 << 20  # it has not much to do here
    assert own_bytes("plain") > 64 << 20  # what a collection alone writes to
