"""How long torch's threads wait for one another, set before torch is loaded: import this first.

torch's wheels for Linux are linked with GNU's OpenMP, whose threads spin 300,000 times between two pieces of work
before they sleep: quick on an idle machine. On one that others use too, each spins while the one that it waits for has
no core. Where it knows that there are more threads than cores it takes 1,000, but of other processes it knows nothing.
"""

import os

SPINS = "1000"
SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:  # whoever has set one of them has a reason
    os.environ["GOMP_SPINCOUNT"] = SPINS


def openmp_settings() -> dict[str, str | None]:
    """{name in the environment: value} of what OpenMP goes by."""
    return {name: os.environ.get(name) for name in SETTINGS}
