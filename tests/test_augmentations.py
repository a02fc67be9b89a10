"""The augmentations against MONAI, SciPy and formulas written out: geometry, grey values, multi-crop, keyed draws."""

import hashlib
import itertools
import pickle
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import replace
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch
from scipy.interpolate import BSpline
from scipy.spatial.transform import Rotation
from scipy.special import erf

import augmentations
from augmentations import (
    AUGMENTATION_FLAGS,
    AUGMENTATIONS,
    MAX_BENT,
    MIN_IOU,
    PATCH_VIEW,
    Augmentation,
    Lattice,
    MultiCropAugmentation,
    Policy,
    add_augmentation_flags,
    collate_views,
    gaussian_smooth,
    histogram_shift,
    keyed_rng,
    paper_policy,
    rotation_matrix,
    sampling_grid,
    scale_intensity,
    warp,
)

ROOT = Path(augmentations.__file__).parent
STRENGTHS = {"rotation": 30.0, "scale": 0.25, "flip": 1, "elastic": MAX_BENT, "gaussian": 2.0, "histogram": 10}
PAPER = Policy(**STRENGTHS)
CLIP = (-1000, 1000)


def noise(*shape, seed=0, dtype=torch.float64):
    """Uniform in [0, 1]: unlike a smooth image it shows a position that is off by a hundredth of a voxel."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def middle(size):
    return (np.array(size) - 1) / 2


def index_grid(size):
    return np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij"), -1).astype(float)


def close(ours, theirs, tolerance):
    ours, theirs = (torch.as_tensor(values, dtype=torch.float64) for values in (ours, theirs))
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def batch_of(crops, patches, samples=None, seed=0, **drawing):
    """The views of a batch, drawn and rendered as pre-training does."""
    groups = collate_views([crops.draw(seed, 0, i, **drawing) for i in samples or range(len(patches))])
    return crops.render(patches, groups, CLIP)


@pytest.fixture
def few_views(monkeypatch):
    """Patch sizes found from few drawn views, for tests that make many MultiCropAugmentations."""
    monkeypatch.setattr(MultiCropAugmentation._patch_size, "__defaults__", (40, 3))


@pytest.fixture
def geometries(monkeypatch):
    """A list that collects the (matrix, centre, moves) of each view drawn."""
    seen, control = [], Lattice.control

    def spy(self, matrix, centre, moves, *spacings):
        seen.extend(zip(np.array(matrix), np.array(centre), np.array(moves)))  # of all views of a size
        return control(self, matrix, centre, moves, *spacings)

    monkeypatch.setattr(Lattice, "control", spy)
    return seen


# --- affine maps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bent, points", [(MAX_BENT, 7), (0, 4)])
@pytest.mark.parametrize("size", [(23, 17, 12), (12, 14, 9)])
@pytest.mark.parametrize(
    "degrees, factors",
    [
        ((30, -30, 30), (0.75, 1.25, 0.75)),
        ((-30, -30, -30), (1.25, 0.75, 1.25)),
        ((30, 30, 30), (-1.25, 1, 1)),
        ((30, -30, -30), (1.25, -0.75, 0.75)),
        ((17, 0, -8), (1.1, 0.9, -1)),
        ((0, 0, 0), (1, 1, 1)),
    ],
)
def test_affine_equals_monai(size, degrees, factors, bent, points):
    from monai.transforms import Affine, AffineGrid

    image = noise(2, 23, 17, 12)
    angles = tuple(np.radians(degrees))
    lattice = Lattice.for_views(size, Policy(elastic=bent))
    assert lattice.shape == (points,) * 3
    matrix = rotation_matrix(angles) @ np.diag(factors)
    control = lattice.control(matrix, middle(image.shape[1:]), np.zeros((*lattice.shape, 3)))
    control = torch.from_numpy(control)[None]

    grid, _ = AffineGrid(rotate_params=angles, scale_params=factors, dtype=np.float64)(spatial_size=size)
    positions = grid[:3].permute(1, 2, 3, 0) + torch.from_numpy(middle(image.shape[1:]))
    close(sampling_grid(control, lattice)[0], positions, 1e-4)
    theirs = Affine(
        rotate_params=angles,
        scale_params=factors,
        spatial_size=size,
        padding_mode="border",
        dtype=np.float64,
        image_only=True,
    )(image)
    close(warp(image[None], control, lattice)[0], theirs, 1e-4)


@pytest.mark.parametrize("degrees", [(30, 30, 30), (-30, 30, -30), (90, 0, 0), (0, 90, 0), (0, 0, 90), (5, -20, 170)])
def test_rotation_matrix_equals_scipy(degrees):
    angles = np.radians(degrees)
    np.testing.assert_allclose(rotation_matrix(angles), Rotation.from_euler("XYZ", angles).as_matrix(), atol=1e-12)


@pytest.mark.parametrize("end, sign", [(0, -1), (1, 1)])
@pytest.mark.parametrize("axis", range(3))
def test_the_ends_of_the_ranges_are_the_papers(end, sign, axis):
    class AtTheEnd:
        def rand(self):
            return 0.0

        def uniform(self, low, high, size):
            return np.full(size, (low, high)[end], float)

        def randint(self, _):
            return axis

    factors = np.full(3, (0.75, 1.25)[end])
    factors[axis] *= -1
    expected = Rotation.from_euler("XYZ", [30 * sign] * 3, degrees=True).as_matrix() @ np.diag(factors)
    matrix, *_ = PAPER.draw(AtTheEnd(), (4, 4, 4), ["rotation", "scale", "flip"])
    np.testing.assert_allclose(matrix, expected, atol=1e-12)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rotation": -1},
        {"scale": 1.0},
        {"flip": 2},
        {"elastic": 0.41},
        {"gaussian": -0.1},
        {"histogram": 2},
        {"prob": 1.1},
    ],
)
def test_policy_refuses_what_makes_no_sense(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = "):
        Policy(**wrong)


# --- splines and elastic deformation ------------------------------------------------------------------------------


def spline_basis(lattice, axis, at, derivative=0):
    """(n, g) SciPy's cubic B-splines on uniform knots, control point i at (i - 1) times the spacing."""
    g, h = lattice.shape[axis], lattice.spacing[axis]
    basis = BSpline((np.arange(g + 4) - 3) * h, np.eye(g), 3)
    return (basis.derivative(derivative) if derivative else basis)(at)


def dense(values, lattice):
    """(x, y, z, 3) values given at the control points, at each voxel, by SciPy."""
    bases = (spline_basis(lattice, axis, np.arange(n)) for axis, n in enumerate(lattice.size))
    return np.einsum("xi,yj,zk,ijkc->xyzc", *bases, values, optimize=True)


LATTICES = [
    Lattice.for_views((24, 15, 10), PAPER),  # fractional spacings
    Lattice.for_views((11, 8, 5), PAPER, (24, 15, 10)),  # a local view
    Lattice.for_views((24, 15, 10), Policy(rotation=30)),  # a single span
    Lattice((24, 15, 9), (4, 2.5, 1.5)),
]


@pytest.mark.parametrize("lattice", LATTICES, ids=lambda lattice: str(lattice.size))
@pytest.mark.parametrize("axis", range(3))
def test_weights_are_cubic_b_splines(lattice, axis):
    n = lattice.size[axis]
    np.testing.assert_allclose(lattice.weights(axis), spline_basis(lattice, axis, np.arange(n)), atol=1e-12)
    between = np.linspace(0, n - 1, 101)
    weights = lattice.weights(axis, between)
    np.testing.assert_allclose(weights, spline_basis(lattice, axis, between), atol=1e-12)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(weights @ lattice.points.swapaxes(0, axis)[:, 0, 0, axis], between, atol=1e-12 * n)


@pytest.mark.parametrize("lattice", LATTICES, ids=lambda lattice: str(lattice.size))
def test_geometry_written_out(lattice):
    rng = np.random.RandomState(0)
    moves = rng.uniform(-MAX_BENT, MAX_BENT, (*lattice.shape, 3))
    matrix = rotation_matrix(np.radians([30, -30, 20])) @ np.diag([0.75, -1.25, 1.1])
    centre, ours, theirs = np.array([20.5, 9, 14.25]), np.array([1, 1.5, 2.5]), np.array([0.7, 0.8, 1.25])
    control = lattice.control(matrix, centre, moves, ours, theirs)
    bent = index_grid(lattice.size) + dense(moves, lattice) * lattice.spacing  # x + u(x), in the view's voxels
    expected = centre + np.einsum("ij,xyzj->xyzi", matrix, (bent - middle(lattice.size)) * ours) / theirs
    close(sampling_grid(torch.from_numpy(control)[None], lattice)[0], expected, 1e-9)
    close(sampling_grid(torch.from_numpy(control)[None].float(), lattice)[0], expected, 1e-4)


@pytest.mark.filterwarnings("ignore:monai.networks.blocks.Warp")
def test_elastic_equals_monai_warp():
    from monai.networks.blocks import Warp

    size, rng = (24, 15, 10), np.random.RandomState(1)
    images, lattice = noise(3, 2, *size), Lattice.for_views(size, PAPER)
    moves = rng.uniform(-MAX_BENT, MAX_BENT, (3, *lattice.shape, 3))
    control = torch.from_numpy(np.stack([lattice.control(np.eye(3), middle(size), m) for m in moves]))
    displacement = sampling_grid(control, lattice) - torch.from_numpy(index_grid(size))
    assert (displacement.abs().amax((0, 1, 2, 3)) > 0.15 * torch.from_numpy(lattice.spacing)).all()
    close(displacement, np.stack([dense(m, lattice) * lattice.spacing for m in moves]), 1e-9)
    theirs = Warp(mode="bilinear", padding_mode="border")(images, displacement.permute(0, 4, 1, 2, 3))
    close(warp(images, control, lattice), theirs, 1e-6)


def determinants(moves, lattice, at):
    """(n, x, y, z) Jacobian determinants of maps without rotation or scale, at the positions `at` of each axis."""
    control = np.stack([lattice.control(np.eye(3), np.zeros(3), m) for m in moves])
    columns = []
    for along in range(3):
        bases = [spline_basis(lattice, axis, at[axis], int(axis == along)) for axis in range(3)]
        columns.append(np.einsum("xi,yj,zk,nijkc->nxyzc", *bases, control, optimize=True))
    return np.linalg.det(np.stack(columns, -1))


def worst_moves(lattice, point, bound, rng, rounds=12):
    """Control points moved by +-bound so that the determinant at `point` is as small as can be found.

    It is linear in the moves along each axis, so those along one are best at the ends, given those along the others.
    """
    gradient = []  # of each control point's weight at the point
    for along in range(3):
        bases = [spline_basis(lattice, axis, point[axis : axis + 1], int(axis == along))[0] for axis in range(3)]
        gradient.append(np.einsum("i,j,k->ijk", *bases).ravel())
    gradient = np.array(gradient)  # (3, points)
    moves = rng.choice([-bound, bound], gradient.shape)
    for axis in itertools.islice(itertools.cycle(range(3)), 3 * rounds):
        jacobian = np.eye(3) + lattice.spacing[:, None] * (moves @ gradient.T)
        cofactors = np.cross(jacobian[(axis + 1) % 3], jacobian[(axis + 2) % 3])
        moves[axis] = -bound * np.sign(cofactors @ gradient)
    return moves.T.reshape(*lattice.shape, 3)


def smallest_determinant(bound):
    lattice, rng = LATTICES[3], np.random.RandomState(2)
    smallest = np.inf
    for offset in itertools.product((0, 0.25, 0.5), repeat=3):
        point = (3 + np.array(offset)) * lattice.spacing
        moves = np.stack([worst_moves(lattice, point, bound, rng) for _ in range(6)])
        smallest = min(smallest, determinants(moves, lattice, [[x] for x in point]).min())
    return smallest


def test_elastic_never_folds():
    lattice, rng = LATTICES[3], np.random.RandomState(3)
    at = [np.linspace(0, n - 1, points) for n, points in zip(lattice.size, (24, 21, 22))]
    policy = Policy(elastic=MAX_BENT, prob=1.0)
    drawn = np.stack([policy.draw(rng, lattice.shape, ["elastic"])[1] for _ in range(60)])
    assert 0.9 * MAX_BENT < np.abs(drawn).max() <= MAX_BENT and (np.abs(drawn).max((1, 2, 3, 4)) < 0.2).any()
    assert determinants(drawn, lattice, at).min() > 0

    board = MAX_BENT * (-1.0) ** np.indices(lattice.shape).sum(0)
    extreme = [board[..., None] * signs for signs in itertools.product((1, -1), repeat=3)]
    extreme += [
        MAX_BENT * (-1.0) ** np.indices(lattice.shape)[list(axes)].transpose(1, 2, 3, 0)
        for axes in itertools.permutations(range(3))
    ]
    extreme += list(rng.choice([-MAX_BENT, MAX_BENT], (40, *lattice.shape, 3)))
    assert determinants(np.stack(extreme), lattice, at).min() > 0
    assert smallest_determinant(MAX_BENT) > 0


def test_the_search_for_folds_finds_them_beyond_the_bound():
    assert smallest_determinant(1.05 * MAX_BENT) < 0
    assert smallest_determinant(1.5 * MAX_BENT) < -0.3


# --- Gaussian smoothing -------------------------------------------------------------------------------------------


SIGMAS = [[2.0, 0.0, 1.3], [0.4, 2.0, 2.0], [0.0, 0.0, 0.0], [1e-4, 0.7, 0.0], [2.0, 2.0, 2.0]]


def erf_smooth(view, sigma):
    """Float64: the mass of a Gaussian over each voxel, written out; the border repeated by SciPy."""
    for axis, s in enumerate(sigma):
        if s > 0:
            offsets = np.arange(-20, 21)
            kernel = (erf((offsets + 0.5) / (s * 2**0.5)) - erf((offsets - 0.5) / (s * 2**0.5))) / 2
            view = scipy.ndimage.correlate1d(view, kernel, axis, mode="nearest")
    return view


@pytest.mark.parametrize("size", [(24, 21, 23), (7, 3, 5), (1, 9, 2)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 1e-6)])
def test_gaussian_equals_the_formula_up_to_the_edges(size, dtype, tolerance):
    views = noise(len(SIGMAS), 2, *size)
    theirs = np.stack([[erf_smooth(channel, s) for channel in view] for view, s in zip(views.numpy(), SIGMAS)])
    ours = gaussian_smooth(views.to(dtype), torch.tensor(SIGMAS))
    assert ours.dtype == dtype
    close(ours, theirs, tolerance)


def test_gaussian_equals_monai_away_from_the_edges():
    from monai.networks.layers import GaussianFilter
    from monai.transforms import GaussianSmooth

    views = noise(len(SIGMAS), 2, 29, 30, 28, dtype=torch.float32)
    ours = gaussian_smooth(views, torch.tensor(SIGMAS))
    assert not torch.allclose(ours[0], views[0], atol=0.1)
    for view, smooth, sigma in zip(views, ours, SIGMAS):
        inside = (slice(None), *(slice(int(6 * s + 1), -int(6 * s + 1)) for s in sigma))
        close(smooth[inside], GaussianFilter(3, sigma, truncated=6.0)(view[None])[0][inside], 1e-5)
        # The default kernel ends at 4 sigma and loses 6e-5 of the mass per axis, which shows in the mean alone
        inside = (slice(None), *(slice(int(4 * s + 1), -int(4 * s + 1)) for s in sigma))
        close((smooth - 0.5)[inside], GaussianSmooth(sigma, approx="erf")(view - 0.5)[inside], 1e-4)


def test_gaussian_keeps_a_constant():
    close(
        gaussian_smooth(torch.full((len(SIGMAS), 1, 9, 6, 4), 0.7), torch.tensor(SIGMAS)),
        torch.full((len(SIGMAS), 1, 9, 6, 4), 0.7),
        1e-6,
    )


# --- histogram shift ----------------------------------------------------------------------------------------------


def curves(number, points=10):
    rng = np.random.RandomState(0)
    return np.stack([AUGMENTATIONS["histogram"].draw(rng, points) for _ in range(number)])


@pytest.mark.parametrize("low, high", [(0, 1), (-1000, 2976), (-0.3, 0.1), (5, 5.5)])
@pytest.mark.parametrize("points", [3, 10])
def test_histogram_equals_monai(low, high, points):
    from monai.transforms import RandHistogramShift

    views, drawn = low + (high - low) * noise(6, 2, 9, 7, 5), curves(6, points)
    theirs = RandHistogramShift(points)
    theirs._do_transform, theirs.reference_control_points = True, np.linspace(0, 1, points)
    ours = histogram_shift(views, torch.from_numpy(drawn))
    ours_float = histogram_shift(views.float(), torch.from_numpy(drawn).float())
    assert (ours - views).abs().max() > 0.1 * (high - low)
    for i in range(6):
        theirs.floating_control_points = drawn[i]
        expected = theirs(views[i], randomize=False)
        close(ours[i], expected, 1e-9 * (high - low))
        close(ours_float[i], expected, 1e-4 * (high - low))
        close((ours[i].min(), ours[i].max()), (views[i].min(), views[i].max()), 1e-9 * (high - low))


@pytest.mark.parametrize("points", [3, 4, 5, 10, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_histogram_leaves_a_constant_view_alone(points, dtype):
    values = [0.0, 0.3, 1.0, -700.0]
    views = torch.tensor(values, dtype=dtype)[:, None, None, None, None].expand(4, 2, 5, 4, 3)
    assert torch.equal(histogram_shift(views, torch.from_numpy(curves(4, points))), views)


@pytest.mark.parametrize("width", [1e-45, 1e-38, 1e-30, 1e-7])
def test_histogram_is_finite_on_an_almost_constant_view(width):
    view = noise(1, 1, 5, 4, 3, dtype=torch.float32) * width
    assert histogram_shift(view, torch.from_numpy(curves(1))).isfinite().all()


@pytest.mark.parametrize("prob", [1.0, 0.5])
def test_histogram_draws_as_monai_draws(prob):
    from monai.transforms import RandHistogramShift

    ours, theirs, shifted = Policy(histogram=10, prob=prob), RandHistogramShift(10, prob=prob), 0
    for seed in range(40):
        theirs.set_random_state(seed=seed).randomize()
        expected = theirs.floating_control_points if theirs._do_transform else np.linspace(0, 1, 10)
        shifted += theirs._do_transform
        drawn = ours.draw(np.random.RandomState(seed), (4, 4, 4), ["histogram"])[2]
        np.testing.assert_array_equal(drawn.get("histogram", np.linspace(0, 1, 10)), expected)
    assert shifted == 40 if prob == 1 else 0 < shifted < 40


# --- grey values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32, torch.float64])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_scale_intensity_is_the_formula_and_leaves_its_input(dtype, default):
    volume = torch.tensor([-32768, -1001, -1000, -999, 0, 37, 399, 400, 401, 32767], dtype=dtype)[:, None]
    before = volume.clone()
    torch.set_default_dtype(default)
    try:
        scaled = scale_intensity(volume, -1000, 400)
    finally:
        torch.set_default_dtype(torch.float32)
    assert scaled.dtype == default and torch.equal(volume, before)
    expected = [[min(max((v + 1000) / 1400, 0), 1)] for v in before[:, 0].tolist()]
    close(scaled, expected, 1e-12 if default == torch.float64 else 1e-6)


# --- the MONAI transforms -----------------------------------------------------------------------------------------


SPATIAL = {
    "RandRotation": {"degrees": 30},
    "RandScale": {"amount": 0.25},
    "RandFlip": {},
    "RandElastic": {"amount": MAX_BENT},
    "RandSpatial": {"rotation": 30, "scale": 0.25, "flip": 1, "elastic": MAX_BENT},
}
TRANSFORMS = {**SPATIAL, "RandGaussianSmooth": {"sigma": 2.0}, "RandHistogramShift": {"points": 10}}
each_transform = pytest.mark.parametrize("name", TRANSFORMS)


def transform(name, prob=1.0):
    from dino3d import monai_transforms

    return getattr(monai_transforms, name)(**TRANSFORMS[name], prob=prob)


def drawn_by(augmentation):
    parts = augmentation.drawn.values() if isinstance(augmentation.drawn, dict) else augmentation.drawn
    return tuple(np.concatenate([np.ravel(part) for part in parts]))


@each_transform
def test_transform_follows_the_random_state_of_its_pipeline(name):
    from monai.transforms import Compose, Randomizable

    volume = noise(1, 9, 8, 7)
    pipeline = Compose([transform(name), transform(name)])
    assert all(isinstance(part, Randomizable) for part in pipeline.transforms)

    def outcomes(seed):
        pipeline.set_random_state(seed=seed)
        return [pipeline(volume) for _ in range(3)]

    first, other = outcomes(0), outcomes(1)
    np.random.seed(1), torch.manual_seed(1)  # the global generators have no say
    again = outcomes(0)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not all(torch.equal(a, b) for a, b in zip(first, other))
    assert not all(torch.equal(first[0], later) for later in first[1:])
    assert not torch.equal(first[0], volume)


@each_transform
def test_transform_draws_from_each_part_of_a_key(name):
    augmentation, start = transform(name), (7, 3, 11, 0)

    def drawn(key):
        augmentation.randomize(key)
        return drawn_by(augmentation)

    assert drawn(start) == drawn(start)
    assert len({drawn(start), *(drawn((7, 3, 11, view)) for view in (PATCH_VIEW, 1, 2, 3, 4, 5, 6))}) > 1
    distinct = 2 if name == "RandFlip" else 8  # a flip has three outcomes
    for part in range(4):
        keys = [tuple(k + i - 1 if j == part else k for j, k in enumerate(start)) for i in range(8)]
        assert len({drawn(key) for key in keys}) >= distinct, f"part {part} of the key"
    if name != "RandFlip":
        assert drawn((7, 3, 11, PATCH_VIEW)) != drawn((7, 3, 11, 0))
    assert len({drawn_by(augmentation) for _ in range(12) if augmentation.randomize() is None}) >= distinct


@each_transform
def test_transform_keeps_the_kind_of_its_input(name):
    from monai.data import MetaTensor

    affine, volume = torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0], dtype=torch.float64)), noise(2, 9, 8, 7)
    augmentation = transform(name).set_random_state(seed=0)
    expected = augmentation(volume)
    assert type(expected) is torch.Tensor and expected.dtype == torch.float64 and expected.shape == volume.shape
    kinds = {"array": volume.numpy(), "meta": MetaTensor(volume, affine=affine), "float": volume.float()}
    for kind, given in kinds.items():
        before = given.copy() if kind == "array" else given.clone()
        same = augmentation(given, randomize=False)
        assert type(same) is type(given) and same.dtype == given.dtype, kind
        close(np.asarray(same), expected, 1e-9 if kind != "float" else 1e-4)
        assert (given == before).all(), kind
        if kind == "meta":
            matrix = torch.as_tensor(augmentation.drawn[0]) if name in SPATIAL else torch.eye(3, dtype=torch.float64)
            close(same.affine[:3, :3], affine[:3, :3] @ matrix, 1e-12)  # the rest: tests/test_monai_dict.py
            close(given.affine, affine, 0)
    whole = augmentation((volume.numpy() * 2000 - 1000).astype(np.int16), randomize=False)
    assert isinstance(whole, np.ndarray) and whole.dtype == np.float32
    close((whole + 1000) / 2000, expected, 1e-3)


@each_transform
def test_channels_share_what_was_drawn(name):
    """Half of the grey values and the whole: every augmentation but the histogram's is linear, and that keeps order."""
    channel, augmentation = noise(1, 9, 8, 7), transform(name).set_random_state(seed=0)
    seen = augmentation(torch.cat([channel, channel / 2 + 0.25, channel]))
    assert not torch.allclose(seen[0], channel[0], atol=0.01)
    close(seen[2], seen[0], 1e-9)
    if name != "RandHistogramShift":
        close(seen[1], seen[0] / 2 + 0.25, 1e-9)


@each_transform
def test_transform_refuses_another_rank(name):
    for shape in ((9, 8, 7), (1, 1, 9, 8, 7)):
        with pytest.raises(ValueError, match=rf"{name}.*\(C, X, Y, Z\)"):
            transform(name)(torch.zeros(shape))


@each_transform
def test_probability_0_leaves_the_volume(name):
    volume = noise(2, 13, 8, 7, dtype=torch.float32)
    augmentation = transform(name, prob=0.0).set_random_state(seed=0)
    for _ in range(3):
        close(augmentation(volume), volume, 1e-5)


@each_transform
@pytest.mark.parametrize("size", [(1, 5, 2), (6, 3, 12), (4, 1, 7)])
def test_transform_of_a_thin_volume(name, size):
    volume = noise(1, *size)
    seen = transform(name).set_random_state(seed=0)(volume)
    assert seen.shape == volume.shape and seen.isfinite().all()
    assert volume.min() - 1e-9 <= seen.min() and seen.max() <= volume.max() + 1e-9


@pytest.mark.parametrize("name", ["RandRotation", "RandScale"])
def test_rotation_and_scale_equal_monai(name):
    from monai.transforms import Affine

    volume, augmentation = noise(1, 19, 16, 11), transform(name).set_random_state(seed=5)
    for _ in range(4):
        ours = augmentation(volume)
        matrix = augmentation.drawn[0]
        factors = np.linalg.norm(matrix, axis=0)
        angles = Rotation.from_matrix(matrix / factors).as_euler("XYZ")
        if name == "RandRotation":
            assert (factors.round(9) == 1).all() and 0.01 < np.abs(angles).max() <= np.radians(30)
        else:
            assert (angles == 0).all() and 0.01 < np.abs(factors - 1).max() <= 0.25
        theirs = Affine(
            rotate_params=angles.tolist(),
            scale_params=factors.tolist(),
            padding_mode="border",
            dtype=np.float64,
            image_only=True,
        )
        close(ours, theirs(volume), 1e-4)


def test_flip_mirrors_one_axis():
    volume, augmentation = noise(1, 9, 8, 7), transform("RandFlip").set_random_state(seed=0)
    mirrored = [volume.flip(axis) for axis in (1, 2, 3)]
    counts = np.zeros(3)
    for _ in range(30):
        seen = augmentation(volume)
        counts += [torch.allclose(seen, other, atol=1e-9) for other in mirrored]
    assert counts.sum() == 30 and (counts > 3).all()


def test_gaussian_and_histogram_transforms_equal_monai():
    from monai.transforms import GaussianSmooth, RandHistogramShift

    volume = noise(1, 24, 22, 23, dtype=torch.float32)
    smooth = transform("RandGaussianSmooth").set_random_state(seed=4)
    ours, sigma = smooth(volume - 0.5), smooth.drawn["gaussian"]
    assert 1 < sigma.max() <= 2
    inside = (slice(None), *(slice(int(4 * s + 1), -int(4 * s + 1)) for s in sigma))
    close(ours[inside], GaussianSmooth(tuple(sigma), approx="erf")(volume - 0.5)[inside], 1e-4)

    ours = transform("RandHistogramShift").set_random_state(seed=9)(volume * 300 - 700)
    theirs = RandHistogramShift(10, prob=1.0).set_random_state(seed=9)(volume * 300 - 700)
    close(ours, theirs, 300 * 1e-4)


def test_labels_move_with_the_image_and_stay_labels():
    labels = torch.zeros(1, 21, 16, 13, dtype=torch.float64)
    labels[:, 5:15, 4:12, 3:10] = 3
    labels[:, 8:12, 6:10, 5:8] = 7
    augmentation = transform("RandSpatial").set_random_state(seed=2)
    augmentation.randomize()
    moved = augmentation.apply(labels[None], mode="nearest")[0]
    assert set(moved.unique().tolist()) == {0, 3, 7} and not torch.equal(moved, labels)
    for label in (0, 3, 7):  # where all eight neighbours carry a label, so does the nearest
        share = augmentation((labels == label).double(), randomize=False)
        assert (moved[share > 1 - 1e-9] == label).all() and (share > 1 - 1e-9).any()


def test_each_row_has_its_transform():
    from dino3d import monai_transforms

    assert set(TRANSFORMS) - {"RandSpatial"} == {AUGMENTATIONS[name].monai for name in augmentations.PAPER}
    for name, row in AUGMENTATIONS.items():
        made = getattr(monai_transforms, row.monai)
        arguments = {row.argument: row.strength} if row.argument else {}
        if name == "window":
            arguments = {"clip_range": (-1000, 1000)}
        assert {key: p.default for key, p in signature(made).parameters.items()} == {**arguments, "prob": 0.5}
        assert made().policy == paper_policy([name])
        assert (
            made(*arguments.values(), 0.25).policy
            == made(**arguments, prob=0.25).policy
            == replace(paper_policy([name]), prob=0.25)
        )
        with pytest.raises(TypeError):
            made(wrong=1)
        made = made(prob=1.0).set_random_state(seed=0)
        assert torch.equal(pickle.loads(pickle.dumps(made))(noise(1, 9, 8, 7)), made(noise(1, 9, 8, 7)))  # to workers
    with pytest.raises(TypeError, match="RandSpatial takes rotation, scale, flip, elastic, got gaussian"):
        monai_transforms.RandSpatial(gaussian=2)


def test_all_six_in_one_pipeline():
    from monai.transforms import Compose

    from dino3d import monai_transforms

    pipeline = Compose([getattr(monai_transforms, name)() for name in TRANSFORMS]).set_random_state(seed=0)
    seen = [pipeline(noise(1, 12, 10, 8, dtype=torch.float32)) for _ in range(5)]
    assert all(view.isfinite().all() and 0 <= view.min() and view.max() <= 1.00001 for view in seen)
    assert not torch.equal(seen[0], seen[1])


# --- keyed draws --------------------------------------------------------------------------------------------------


def test_keyed_rng_tells_every_part_of_a_key():
    start = (5, 2, 9, 1)
    keys = {
        start,
        (5, 2, 9, 0),
        (5, 2, 9, PATCH_VIEW),
        (5, 2, 9, 2),
        (5, 2, 8, 1),
        (5, 0, 9, 1),
        (0, 2, 9, 1),
        (2, 5, 9, 1),
        (5, 9, 2, 1),
        (0, 0, 0, 0),
        (0, 0, 0, PATCH_VIEW),
        (5, 2, 0, PATCH_VIEW),
        (5, 2, 0, 0),
    }
    assert len({keyed_rng(*key).randint(2**62) for key in keys}) == len(keys)
    assert keyed_rng(*start).randint(2**62) == keyed_rng(*start).randint(2**62)


ALL = (30, 0.25, 1, 0.4, 2.0, 10)
KEYS = [(4, 0, 0), (4, 0, 1), (4, 1, 2), (0, 0, 0)]
# Of what was drawn before there was a table: a run that is gone on with must see the views that it would have seen
DIGESTS = {
    (*ALL, 0.5): """
        da59ff74dbd435c6ddfa3e43224aabdb585ac4583534245a33e0ce73a90e302d
        be5cd4fdc491ccd38fb625484b45a208adfcb44314e57299fe46582a55c5ddc0
        0a86f5a5f2ba9016d2f9fdc0f6b87cfba0a768c6e6200eadd79a0f4434321326
        a8dfcd16078f7049bb47a19a6248541cfba8d16be1628effa399e038d340b435""",
    (30, 0.25, 1, 0, 0, 0, 0.5): """
        7fff3165edde51a8c8cd9e95719b4a946d3f778f05a35c5b5d1034bbb5c05492
        1179c2451ae77ab915006ad650f1d0e9d7ece03b0cb4e76ef7afc01b1cffb705
        01a1099d27c94b68b1fa827ce2f1aa1a413ea404e08ad5ad777257e96f8ba918
        2d3c2fc189b23d9411c35dbfc74009d9c30a4c4d0e10d80b8099d97612293637""",
    (*ALL, 1.0): """
        69102fc1dcbe97e59b65ca0bc28845123010ec87c6bd529f7e0905a42f1e8264
        84e829ed4f0dbcf43db6084ecb8d20f75c46e5bd67dcb0d4c8a52a4c45ef7578
        a34d3b45ebb5b1b350e4eaa8dec4aa95ed505c9c514cf384fdca5310efc29cc5
        b38192edd9de438abb2a222a553f43acb9f9348cbefc5650b0a62893e20e01a1""",
}
ELSEWHERE = """
import sys
sys.path[:0] = sys.argv[1:]
from test_augmentations import ALL, KEYS, digest
print(*(digest((*ALL, 0.5), key) for key in KEYS[::-1]))
"""


def all_drawn(groups, points=10):
    """[(control, sigma, curve)] of each view, float32; no smoothing and a straight curve where nothing acts."""
    plain = {"gaussian": np.zeros(3), "histogram": np.linspace(0, 1, points)}
    return [
        (control, *(np.float32(intensity.get(name, none)) for name, none in plain.items()))
        for group in groups
        if group
        for control, intensity in zip(group.control, group.intensity)
    ]


def digest(strengths, key):
    policy = Policy(**dict(zip([*STRENGTHS, "prob"], strengths)))
    crops = MultiCropAugmentation(policy, (10, 8, 6), (6, 5, 4), 3)
    views = all_drawn(crops.draw(*key), max(strengths[5], 2))
    return hashlib.sha256(b"".join(part.tobytes() for view in views for part in view)).hexdigest()


@pytest.mark.parametrize("strengths", DIGESTS)
def test_draws_are_those_of_earlier_versions(strengths):
    assert [digest(strengths, key) for key in KEYS] == DIGESTS[strengths].split()


def test_draws_are_the_same_in_any_order_and_process():
    ours = []
    for key in KEYS:
        np.random.seed(len(ours))
        ours.append(digest((*ALL, 0.5), key))
    elsewhere = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(ROOT), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert elsewhere.stdout.split() == ours[::-1] and len(set(ours)) == len(KEYS)


@pytest.mark.parametrize("kind", ["affine", "deformation", "intensity"])
def test_a_new_row_leaves_what_the_others_draw(kind, monkeypatch):
    """Off or on: matrices, moves, sigmas, curves and base patches of the six stay what they were."""
    apply = {
        "affine": lambda values: np.eye(3),
        "deformation": lambda values, lattice: np.zeros((*lattice, 3)),
        "intensity": lambda views, values: 1 - views,
    }[kind]
    row = Augmentation(1.0, (0, 1), "", False, "", kind, lambda rng, _: rng.uniform(0, 1, 7), apply, "RandNew", None)
    monkeypatch.setitem(AUGMENTATIONS, "new", row)
    monkeypatch.setattr(Policy, "new", 0, raising=False)
    for strengths in DIGESTS:
        assert [digest(strengths, key) for key in KEYS] == DIGESTS[strengths].split()
    monkeypatch.setattr(Policy, "new", 1.0)
    policy, lattice = replace(PAPER, prob=1.0), (4, 4, 4)
    for seed in range(3):
        drawn = policy.draw(np.random.RandomState(seed), lattice)
        before = policy.draw(np.random.RandomState(seed), lattice, STRENGTHS)
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(drawn[:2], before[:2]))
        assert list(drawn[2]) == [*before[2], *["new"] * (kind == "intensity")]
        assert all(np.array_equal(drawn[2][name], values) for name, values in before[2].items())
    if kind == "intensity":  # the device applies it after the others, to the views that it acts on
        crops = MultiCropAugmentation(Policy(*ALL), (10, 8, 6), (6, 5, 4), 3)
        patches = np.random.RandomState(1).randint(-1200, 1200, (2, *crops.patch_size)).astype(np.int16)
        patches, groups = torch.from_numpy(patches), collate_views([crops.draw(3, 0, i) for i in range(2)])
        seen = crops.render(patches, groups, CLIP)
        acting = [group.intensity.pop("new")[0] for group in groups]
        for views, without, acts in zip(seen, crops.render(patches, groups, CLIP), acting):
            assert 0 < len(acts) < len(views)
            without[acts] = 1 - without[acts]
            close(views, without, 0)


def test_the_table_is_the_papers():
    assert list(STRENGTHS.items()) == list(augmentations.PAPER.items())
    assert paper_policy(STRENGTHS) == PAPER and paper_policy([]) == Policy() and PAPER.on == list(STRENGTHS)
    assert paper_policy(["scale", "elastic"]).on == ["scale", "elastic"]
    assert {row.kind for row in AUGMENTATIONS.values()} <= {"affine", "deformation", "intensity", "window"}
    assert pickle.loads(pickle.dumps(PAPER)) == PAPER  # spawned workers get it so


def test_flags_are_the_tables():
    parser = ArgumentParser()
    add_augmentation_flags(parser.add_argument_group("augmentations"))
    args = vars(parser.parse_args([]))
    assert {AUGMENTATION_FLAGS[flag] for flag, on in args.items() if on} == {"rotation", "scale", "flip"}
    assert list(args) == [f"use_{name}" for name in AUGMENTATIONS]
    text = " ".join(parser.format_help().split())
    assert all(row.help in text for row in AUGMENTATIONS.values())


def test_all_views_of_a_sample_differ():
    crops = MultiCropAugmentation(replace(PAPER, prob=1.0), (10, 8, 6), (6, 5, 4), 8)
    seen = set()
    for control, sigma, curve in all_drawn(crops.draw(0, 0, 0)):
        seen.add((control.ravel()[:12].tobytes(), sigma.tobytes(), curve.tobytes()))
    for part in range(3):
        assert len({view[part] for view in seen}) == 10


@pytest.mark.parametrize("off", STRENGTHS)
def test_switching_one_augmentation_off_leaves_the_others(off, few_views, geometries):
    def drawn(policy):
        crops = MultiCropAugmentation(policy, (10, 8, 6), (6, 5, 4), 2)
        geometries.clear()
        groups = [crops.draw(1, 2, sample) for sample in range(6)]
        matrices, centres, moves = zip(*geometries)
        shifts = np.array(centres) - middle(crops.patch_size)
        _, sigma, histogram = zip(*(view for drawn in groups for view in all_drawn(drawn)))
        return np.array(matrices), shifts, moves, np.array(sigma), np.array(histogram)

    full, part = drawn(replace(PAPER, prob=0.8)), drawn(replace(PAPER, prob=0.8, **{off: 0}))
    np.testing.assert_allclose(part[1], full[1])  # where the windows lie
    matrices, turned = part[0], full[0]  # whatever is on, a matrix is a rotation times a diagonal
    sizes = np.linalg.norm(turned, axis=1, keepdims=True)
    if off == "rotation":
        np.testing.assert_allclose(np.abs(matrices), np.eye(3) * sizes, atol=1e-12)
        np.testing.assert_allclose(np.linalg.det(matrices), np.linalg.det(turned))
    elif off == "scale":
        np.testing.assert_allclose(matrices, turned / sizes, atol=1e-12)
    elif off == "flip":
        signs = np.einsum("nij,nij->nj", matrices, turned) / sizes[:, 0] ** 2
        np.testing.assert_allclose(np.abs(signs), 1)
        np.testing.assert_allclose(matrices * signs[:, None], turned, atol=1e-12)
        assert (np.linalg.det(matrices) > 0).all() and (np.linalg.det(turned) < 0).any()
    else:
        np.testing.assert_array_equal(matrices, turned)
    for ours, theirs in zip(part[2], full[2]):
        np.testing.assert_array_equal(ours, np.zeros((4, 4, 4, 3)) if off == "elastic" else theirs)
    np.testing.assert_array_equal(part[3], 0 if off == "gaussian" else full[3])
    straight = np.float32(np.linspace(0, 1, 10))
    np.testing.assert_array_equal(part[4], np.tile(straight, (len(full[4]), 1)) if off == "histogram" else full[4])


def test_each_augmentation_acts_on_half_of_the_views_on_its_own(few_views, geometries):
    crops = MultiCropAugmentation(PAPER, (10, 8, 6), (6, 5, 4), 0)
    geometries.clear()
    groups = [crops.draw(0, 0, sample)[0] for sample in range(1000)]
    matrices, _, moves = (np.array(part) for part in zip(*geometries))
    _, sigma, histogram = (np.array(part) for part in zip(*all_drawn(groups)))
    factors = np.linalg.norm(matrices, axis=1)  # (2000, 3)
    mirrored = np.linalg.det(matrices) < 0
    axis = np.argmin(np.diagonal(matrices / factors[:, None], axis1=1, axis2=2), 1)  # the mirrored one, if any
    rotations = matrices / factors[:, None] * np.where(mirrored[:, None], 1 - 2 * np.eye(3)[axis], 1)[:, None]
    angles = Rotation.from_matrix(rotations).as_euler("XYZ", degrees=True)
    straight = np.linspace(0, 1, 10)
    acts = np.stack(
        [
            np.abs(angles).max(1) > 1e-6,
            np.abs(factors - 1).max(1) > 1e-9,
            mirrored,
            np.abs(moves).max((1, 2, 3, 4)) > 0,
            sigma.max(1) > 0,
            np.abs(histogram - straight).max(1) > 1e-6,
        ],
        1,
    )  # (2000, 6)
    assert (np.abs(acts.mean(0) - 0.5) < 4.5 * 0.5 / 2000**0.5).all()
    assert np.abs(np.corrcoef(acts.T) - np.eye(6)).max() < 0.1  # 4.5 / sqrt(2000)
    assert np.abs([np.corrcoef(a[0::2], a[1::2])[0, 1] for a in acts.T]).max() < 0.15  # the two views of a sample

    ranges = [(factors[acts[:, 1]], 0.75, 1.25), (sigma[acts[:, 4]], 0, 2), (angles[acts[:, 0]], -30, 30)]
    for values, low, high in ranges:  # uniform from end to end
        assert low - 1e-4 <= values.min() and values.max() <= high + 1e-4
        quantiles = (np.quantile(values, [0.01, 0.5, 0.99], axis=0).T - low) / (high - low)
        np.testing.assert_allclose(quantiles, np.tile([0.01, 0.5, 0.99], (3, 1)), atol=0.06)
    assert (np.bincount(axis[mirrored], minlength=3) / mirrored.sum() > 0.28).all()


# --- multi-crop ---------------------------------------------------------------------------------------------------


def windows(crops, samples, seed=0):
    """[(samples, views, 3)] first voxels of the unturned windows, from the middle of the patch, per group."""
    groups = [crops.draw(seed, 0, sample) for sample in range(samples)]
    return [
        np.stack([draw[i].control[:, 1, 1, 1] for draw in groups]) - middle(crops.patch_size)
        for i in range(2 if crops.local_number else 1)
    ]


def test_core_of_the_default_crop_and_overlap_of_its_global_windows():
    crops = MultiCropAugmentation(Policy(), (96, 96, 48), (24, 24, 12), 0)
    assert crops.core == (121, 121, 60) and crops.patch_size == crops.core  # no view is turned: no margin
    (starts,) = windows(crops, 2000)
    shift = np.abs(starts[:, 0] - starts[:, 1])
    shared = np.prod(np.array(crops.global_size) - shift, 1)
    iou = shared / (2 * 96 * 96 * 48 - shared)
    assert MIN_IOU <= iou.min() < 0.35 and iou.max() > 0.9
    assert (shift.max(0) == np.array(crops.core) - crops.global_size).all()
    corner = np.prod(np.array(crops.global_size) * 2 - crops.core)  # the furthest that any two can lie apart
    assert MIN_IOU <= corner / (2 * 96 * 96 * 48 - corner) < 0.27


@pytest.mark.parametrize("size", [(96, 96, 48), (40, 64, 52), (8, 6, 5), (1, 3, 2)])
def test_the_core_is_as_large_as_the_overlap_allows(size, few_views):
    core = np.array(MultiCropAugmentation(Policy(), size, (1, 1, 1), 0).core)
    shared = np.prod(2.0 * np.array(size) - core)
    assert shared / (2 * np.prod(size) - shared) >= MIN_IOU
    wider = np.prod(np.maximum(2.0 * np.array(size) - core - 1, 0))  # one more voxel along each axis
    assert wider / (2 * np.prod(size) - wider) < MIN_IOU


@pytest.mark.parametrize("size, local, number", [((24, 20, 12), (8, 6, 5), 4), ((10, 8, 7), (10, 2, 7), 3)])
def test_windows_lie_inside_the_core_and_reach_its_ends(size, local, number, few_views):
    crops = MultiCropAugmentation(replace(PAPER, prob=0.5), size, local, number)
    assert all((p - c) % 2 == 0 and p >= c for p, c in zip(crops.patch_size, crops.core))
    crops.policy = replace(PAPER, prob=0.0)
    for starts, n in zip(windows(crops, 300), (size, local)):
        starts = starts + middle(crops.core)  # now from the core's first voxel
        np.testing.assert_allclose(starts.min((0, 1)), 0, atol=1e-3)
        np.testing.assert_allclose(starts.max((0, 1)), np.array(crops.core) - n, atol=1e-3)


def shares_that_spill(crops, views, step):
    """Shares of global views of which more than 1 % lies outside the patch, and outside of its inner four fifths.

    step: 1 looks at every voxel, 2 at the middle of every eight.
    """
    lattice, last = crops.lattices[0], np.array(crops.patch_size, np.float32) - 1
    bases = [
        lattice.weights(axis, (np.arange(n // step) + 0.5) * step - 0.5).astype(np.float32)
        for axis, n in enumerate(lattice.size)
    ]
    spilling = np.zeros(2)
    for start in range(0, views // 2, 20):
        controls = [crops.draw(99, 5, i, crops.patch_size, crops.spacing)[0].control for i in range(start, start + 20)]
        seen = np.einsum("xi,yj,zk,nijkc->ncxyz", *bases, np.concatenate(controls), optimize=True)
        reach = np.abs(seen - last[:, None, None, None] / 2)
        for i, share in enumerate((1.0, 0.8)):
            outside = reach > share * last[:, None, None, None] / 2 + 1e-3
            spilling[i] += (outside.any(1).mean((1, 2, 3)) > 0.01).sum()
    return spilling / views


@pytest.mark.parametrize(
    "strengths, size, spacing, views, step",
    [
        (STRENGTHS, (96, 96, 48), None, 160, 2),
        (STRENGTHS, (24, 24, 16), (1.0, 1.5, 2.5), 600, 1),
        ({**STRENGTHS, "prob": 1.0}, (20, 16, 12), (0.8, 1.0, 2.5), 600, 1),
        ({"rotation": 30}, (28, 24, 14), None, 600, 1),
        ({"scale": 0.25}, (30, 26, 18), None, 600, 1),
        ({"elastic": MAX_BENT}, (24, 16, 20), None, 600, 1),
        ({"flip": 1}, (12, 10, 9), None, 600, 1),
        (STRENGTHS, (8, 6, 5), None, 1000, 1),
    ],
)
def test_few_views_see_beyond_the_patch(strengths, size, spacing, views, step):
    crops = MultiCropAugmentation(Policy(**strengths), size, (1, 1, 1), 0, spacing)
    beyond, beyond_less = shares_that_spill(crops, views, step)
    assert beyond < 0.05 < beyond_less


@pytest.mark.parametrize("policy", [Policy(), PAPER], ids=["affine", "bent"])
def test_plain_views_are_voxels_of_the_patch(policy, few_views):
    crops = MultiCropAugmentation(policy, (24, 17, 12), (8, 7, 5), 3)
    crops.policy = replace(policy, prob=0.0)
    patches = torch.from_numpy(np.random.RandomState(0).randint(-1200, 1200, (3, *crops.patch_size)).astype(np.int16))
    scaled = scale_intensity(patches, *CLIP)
    seen = batch_of(crops, patches)
    for views, starts, size in zip(seen, windows(crops, 3), (crops.global_size, crops.local_size)):
        starts = (starts + middle(crops.patch_size)).swapaxes(0, 1)  # (views, samples, 3)
        whole = starts.round().astype(int)
        np.testing.assert_allclose(starts, whole, atol=1e-4)
        for view, start, patch in zip(views, whole.reshape(-1, 3), scaled.repeat(len(whole), 1, 1, 1)):
            inside = tuple(slice(s, s + n) for s, n in zip(start, size))
            close(view[0], patch[inside], 1e-4)  # noise over the whole range, positions in float32
            assert (view[0] - patch[inside]).abs().mean() < 1e-5


@pytest.mark.parametrize("flags", list(itertools.product((0, 1), repeat=6)), ids=lambda flags: "".join(map(str, flags)))
def test_every_combination_of_flags_renders(flags, few_views):
    policy = Policy(**{name: value for on, (name, value) in zip(flags, STRENGTHS.items()) if on}, prob=0.8)
    crops = MultiCropAugmentation(policy, (10, 8, 6), (6, 5, 3), 2)
    patches = np.random.RandomState(0).randint(-1500, 1500, (3, *crops.patch_size)).astype(np.int16)
    patches[1] = -1024  # air alone
    views = batch_of(crops, torch.from_numpy(patches))
    assert [tuple(v.shape) for v in views] == [(6, 1, 10, 8, 6), (6, 1, 6, 5, 3)]
    for group in views:
        assert group.isfinite().all() and 0 <= group.min() and group.max() <= 1 + 1e-5
        assert group.unflatten(0, (2, 3))[:, 1].abs().max() < 1e-6  # air stays air
        assert group.unflatten(0, (2, 3))[:, 0].std() > 0.05


def test_no_local_views(few_views):
    crops = MultiCropAugmentation(PAPER, (10, 8, 6), (6, 5, 3), 0)
    assert crops.draw(0, 0, 0)[1] is None
    (views,) = batch_of(crops, torch.zeros(2, *crops.patch_size, dtype=torch.int16))
    assert views.shape == (4, 1, 10, 8, 6)


@pytest.mark.parametrize("default, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_a_batch_is_its_samples_one_by_one_first_views_first(default, tolerance, few_views):
    crops = MultiCropAugmentation(PAPER, (10, 8, 6), (6, 5, 3), 3)
    patches = torch.from_numpy(np.random.RandomState(1).randint(-1200, 1200, (4, *crops.patch_size)).astype(np.int16))
    torch.set_default_dtype(default)
    try:
        together = batch_of(crops, patches)
        alone = [batch_of(crops, patches[i : i + 1], samples=[i]) for i in range(4)]
    finally:
        torch.set_default_dtype(torch.float32)
    for group, number in enumerate((2, 3)):
        assert together[group].dtype == default
        for view, sample in itertools.product(range(number), range(4)):
            close(together[group][view * 4 + sample], alone[sample][group][view], tolerance)


def test_smoothing_comes_after_the_geometry_and_grey_values_last(few_views):
    crops = MultiCropAugmentation(replace(PAPER, prob=1.0), (12, 10, 8), (6, 5, 4), 0)
    patches = torch.from_numpy(np.random.RandomState(1).randint(-1200, 1200, (2, *crops.patch_size)).astype(np.int16))
    groups = collate_views([crops.draw(3, 0, i) for i in range(2)])
    group, expected = groups[0], []
    assert list(group.intensity) == ["gaussian", "histogram"]
    sigma, curves = (values.double().numpy() for indices, values in group.intensity.values() if len(indices) == 4)
    for view in range(4):
        patch = scale_intensity(patches[view % 2], *CLIP)[None, None]
        plain = warp(patch, group.control[view : view + 1], crops.lattices[0])[0, 0]
        smooth = erf_smooth(plain.double().numpy(), sigma[view])
        low, high = smooth.min(), smooth.max()
        expected.append(np.interp(smooth, np.linspace(low, high, 10), low + curves[view] * (high - low)))
    close(crops.render(patches, groups, CLIP)[0][:, 0], np.stack(expected), 1e-5)


# --- millimetres --------------------------------------------------------------------------------------------------


SPACING, PATCH_SPACING = np.array([1.0, 1.25, 2.5]), np.array([0.7, 0.9, 1.4])


def positions_mm(policy, samples=6):
    """(views, x, y, z, 3) where global views look, in mm from the middle of the patch, read off three ramps in mm."""
    crops = MultiCropAugmentation(policy, (14, 11, 7), (6, 5, 4), 0, SPACING)
    size = np.array(crops.patch_size) * SPACING / PATCH_SPACING
    shape = tuple(int(n) for n in np.ceil(size) + 40)  # more than is read: no view leaves the ramps
    ramps = torch.from_numpy((index_grid(shape) - middle(shape)) * PATCH_SPACING).float()
    groups = collate_views([crops.draw(8, 0, i, shape, PATCH_SPACING) for i in range(samples)])
    seen = [crops.render(ramp.expand(samples, *shape), groups, (-200, 200))[0][:, 0] for ramp in ramps.unbind(-1)]
    return crops, torch.stack(seen, -1).double().numpy() * 400 - 200


def test_views_are_sampled_at_their_spacing(few_views):
    crops, seen = positions_mm(Policy())
    for view in seen:
        start = view[0, 0, 0] / SPACING + middle(crops.patch_size)  # whole voxels, were the patch's spacing the view's
        np.testing.assert_allclose(start, start.round(), atol=1e-3)
        np.testing.assert_allclose(view, view[0, 0, 0] + index_grid(crops.global_size) * SPACING, atol=1e-3)
    assert len({tuple(view[0, 0, 0].round(2)) for view in seen}) > 6


@pytest.mark.parametrize("strengths", [{"rotation": 30}, {"rotation": 30, "scale": 0.25}])
def test_rotation_and_scale_act_in_millimetres(strengths, few_views):
    crops, seen = positions_mm(Policy(**strengths, prob=1.0))
    steps = np.stack(
        [
            np.diff(seen, axis=axis + 1)[
                :, : -1 if axis else None, : -1 if axis - 1 else None, : -1 if axis - 2 else None
            ]
            for axis in range(3)
        ],
        -1,
    )
    steps = steps / SPACING  # (views, x, y, z, 3, 3): columns are mm moved per mm along each axis of the view
    matrices = steps.mean((1, 2, 3))
    np.testing.assert_allclose(steps, np.broadcast_to(matrices[:, None, None, None], steps.shape), atol=1e-3)
    lengths = np.linalg.norm(matrices, axis=1)
    if "scale" in strengths:
        assert (lengths > 0.749).all() and (lengths < 1.251).all() and lengths.std() > 0.1
    else:
        np.testing.assert_allclose(lengths, 1, atol=1e-4)
    rotations = matrices / lengths[:, None]
    products = rotations.transpose(0, 2, 1) @ rotations
    np.testing.assert_allclose(products, np.broadcast_to(np.eye(3), products.shape), atol=1e-3)
    angles = Rotation.from_matrix(rotations).as_euler("XYZ", degrees=True)
    assert np.abs(angles).max() < 30.01 and np.abs(angles).max(1).min() > 1


@pytest.mark.parametrize("degrees", [(0, 0, 0), (30, 0, 0), (30, -30, 30)])
def test_a_turned_sphere_stays_a_sphere(degrees):
    """A Gaussian ball of 6 mm, sampled finely enough for linear interpolation to be off by a hundredth."""
    shape, size, centre = (70, 60, 40), (25, 21, 13), np.array([33.2, 30.4, 19.7])
    offsets = (index_grid(shape) - centre) * PATCH_SPACING
    ball = torch.from_numpy(np.exp(-(offsets**2).sum(-1) / 72))[None, None]
    lattice = Lattice.for_views(size, PAPER)
    matrix, still = rotation_matrix(np.radians(degrees)), np.zeros((*lattice.shape, 3))
    expected = np.exp(-(((index_grid(size) - middle(size)) * SPACING) ** 2).sum(-1) / 72)

    def error(*spacings):
        control = lattice.control(matrix, centre, still, *spacings)
        return np.abs(warp(ball, torch.from_numpy(control)[None], lattice)[0, 0].numpy() - expected).max()

    assert error(SPACING, PATCH_SPACING) < 0.02
    assert error(SPACING / PATCH_SPACING) > 0.1 or not any(degrees)  # turned in voxels it becomes an ellipsoid


# --- GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_renders_what_the_cpu_renders(few_views):
    from dino3d.data.pretraining import Batch

    crops = MultiCropAugmentation(replace(PAPER, prob=0.8), (24, 20, 12), (8, 7, 5), 3)
    smooth = scipy.ndimage.gaussian_filter(np.random.RandomState(0).randn(4, *crops.patch_size), (0, 1, 1, 1))
    patches = torch.from_numpy((smooth * 3000).astype(np.int16))
    groups = collate_views([crops.draw(0, 0, i) for i in range(4)])
    batch = Batch(patches, groups, [], "").to("cuda")
    for ours, theirs in zip(crops.render(batch.patches, batch.groups, CLIP), crops.render(patches, groups, CLIP)):
        assert ours.is_cuda
        close(ours.cpu(), theirs, 1e-4)
