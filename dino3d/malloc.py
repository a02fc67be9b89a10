"""What the C library does with memory that is freed, set when a script starts: it keeps it for the next tensor.
A copy of the process, which a loader's worker begins as, gives back what it has inherited of that.

By itself glibc gives every block above 32 MiB back to the system, and smaller ones at the heap's end, so that a step
meets each page of its tensors anew: 160,000 page faults in one of vit_small, a seventh of its time on a CPU. No number
changes by it. Whoever has set one of MALLOC_SETTINGS has a reason; other C libraries are left alone.
"""

import ctypes
import os
import platform

MALLOC_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
# Numbers of glibc's malloc.h, and bytes: of the smallest block that is given back (the prototypes have 64 MiB, a whole
# CT in floats more than 128), and at the heap's end, above which the rest is
MALLOPT = {-3: 128 << 20, -1: 512 << 20}


def keep_freed_memory() -> bool:
    """Whether the C library took it."""
    if platform.libc_ver()[0] != "glibc" or os.environ.keys() & set(MALLOC_SETTINGS):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(number, size) == 1 for number, size in MALLOPT.items())


def give_back_freed_memory() -> None:
    """Let this process hold no memory that is free: of a copy of another one, it would be its own once either writes to
    it."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
