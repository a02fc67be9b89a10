"""What a data set must be: is it a CT in HU, crops and cases that go together, and that check and training agree."""

import numpy as np
import pytest
from raw_inputs import phantom

from dino3d.data.requirements import hu_problem


def chest():
    """A chest phantom with noise, in HU."""
    voxels = phantom(0, (60, 48, 40), (5.0, 5.0, 7.0))[0]
    return np.clip(voxels + np.random.default_rng(0).normal(0, 15, voxels.shape), -1024, 3071)


def window(low, high):
    return lambda hu: ((hu - low) / (high - low) * 255).clip(0, 255)


def padded_offset(hu):
    stored = hu + 1024
    stored[:, :, :4] = -1024  # the reader's floor for a padding of -2000
    return stored


NOT_HU = {
    "constant": (lambda hu: hu * 0 - 7, "constant: the same value in all voxels (-7)"),
    "a mask": (lambda hu: hu > -200, "a mask, not a CT: 2 whole values from 0 to 1"),
    "a mask of 255": (lambda hu: (hu > -200) * 255, "a mask, not a CT: 2 whole values from 0 to 255"),
    "a mask of many organs": (
        lambda hu: (np.arange(60) // 3).repeat(30)[:, None, None] * np.ones((1, 9, 9)),
        "a mask, not a CT: 20 whole values from 0 to 19",
    ),
    "a small mask, which a sample may miss": (
        lambda hu: np.pad(np.ones((1, 1, 1)), [(7, n - 8) for n in (160, 160, 160)]),
        "a mask, not a CT: 2 whole values from 0 to 1",
    ),
    "8 bits": (window(-1000, 500), "not in HU: grey values from 0 to "),
    "8 bits of a lung window": (window(-1350, 150), "not in HU: grey values from "),
    "8 bits of a soft window": (window(-160, 240), "not in HU: grey values from 0 to 255"),
    "stored + 1024": (lambda hu: (hu + 1024).clip(0), "not in HU: nothing as dark as air or lung, values from 0 to "),
    "stored + 1024, with padding": (padded_offset, "not in HU: nothing as dark as air or lung, values from -1024 to "),
    "an MR": (lambda hu: np.abs(hu) / 2, "not a thorax CT in HU: nothing as dark as air or lung, values from 0 to "),
    "soft tissue alone": (lambda hu: hu.clip(-160, 240), "not a thorax CT in HU: nothing as dark as air or lung"),
    "floats from 0 to 1": (lambda hu: (hu + 1024) / 1500, "a mask, not a CT: 2 whole values from 0 to 1"),
    "padding": (lambda hu: np.where(np.arange(40) < 8, 32767, hu), "20% of its voxels are above 20,000 HU"),
}


@pytest.mark.parametrize("change, told", NOT_HU.values(), ids=NOT_HU)
def test_what_is_no_ct_in_hu_is_named(change, told):
    assert hu_problem(np.rint(change(chest())).astype(np.int16)).startswith(told)


HU = {
    "as it is": lambda hu: hu,
    "clipped to what a run trains on": lambda hu: hu.clip(-1000, 1000),
    "clipped to a lung window": lambda hu: hu.clip(-1350, 150),
    "lung alone": lambda hu: np.random.default_rng(0).normal(-850, 40, hu.shape),
    "much air around": lambda hu: np.pad(hu, 40, constant_values=-1024),
    "metal": lambda hu: np.where(np.indices(hu.shape).max(0) < 3, 30000, hu),
    "one slice": lambda hu: hu[:, :, 20:21],
}


@pytest.mark.parametrize("change", HU.values(), ids=HU)
def test_nothing_is_said_of_hu(change):
    for order in "CF":
        assert hu_problem(np.asarray(np.rint(change(chest())).astype(np.int16), order=order)) == ""


def test_a_sample_never_decides_against_a_volume():
    """Lung in a few places alone, which every n-th voxel misses: looked at as a whole it is a CT."""
    voxels = np.random.default_rng(0).integers(0, 300, (200, 180, 160)).astype(np.int16)
    voxels[1::4, 1::4, 1::4] = -800
    assert hu_problem(voxels) == ""
