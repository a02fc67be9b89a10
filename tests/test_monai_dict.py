"""The MONAI transforms for dictionaries: against the array versions, MONAI's own, and in MONAI's pipelines."""

import pickle
from inspect import signature

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from augmentations import AUGMENTATIONS, MAX_BENT
from dino3d import monai_transforms

SIZE = (17, 14, 11)
SPATIAL = {
    "RandRotation": {"degrees": 30},
    "RandScale": {"amount": 0.25},
    "RandFlip": {},
    "RandElastic": {"amount": MAX_BENT},
    "RandSpatial": {"rotation": 30, "scale": 0.25, "flip": 1, "elastic": MAX_BENT},
}
INTENSITY = {"RandGaussianSmooth": {"sigma": 2.0}, "RandHistogramShift": {"points": 10}}
KEYS, BOTH = ["image", "label"], ["bilinear", "nearest"]
AFFINE = torch.tensor([[0, -0.7, 0, 12], [0.8, 0, 0.1, -3], [0, 0, 2.5, 40], [0, 0, 0, 1]], dtype=torch.float64)
spatial = pytest.mark.parametrize("name", SPATIAL)


def transform(name, *keys, prob=1.0, **more):
    return getattr(monai_transforms, name)(*keys, **(SPATIAL | INTENSITY)[name.removesuffix("d")], prob=prob, **more)


def case(seed=0, kind=np.float32, labels=np.uint8, size=SIZE):
    """An image, the labels of its grey values, which lie where they lie, and what no transform should touch."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((1, 3, 3, 3))
    image = np.asarray(torch.nn.functional.interpolate(torch.tensor(coarse)[None], size=size, mode="trilinear")[0])
    label = np.digitize(image, [0.35, 0.5, 0.65]) * 40
    return {"image": (image * 2000 - 1000).astype(kind), "label": label.astype(labels), "name": f"case{seed}"}


@spatial
def test_images_are_those_of_the_array_version(name):
    data = case()
    arrays, both = transform(name), transform(f"{name}d", KEYS, BOTH)
    for one in (arrays, both):
        one.set_random_state(seed=3)
    moved = 0
    for _ in range(4):
        seen = both(data)
        assert np.array_equal(seen["image"], arrays(data["image"])) and not np.array_equal(seen["image"], data["image"])
        assert seen["name"] == "case0" and np.array_equal(data["image"], case()["image"])
        expected = arrays.apply(torch.from_numpy(data["label"]).float()[None], "nearest")[0]
        assert np.array_equal(seen["label"], expected)
        moved += not np.array_equal(seen["label"], data["label"])
    assert moved


@pytest.mark.parametrize("name", INTENSITY)
def test_intensities_leave_the_label_alone(name):
    data, arrays, one = case(), transform(name), transform(f"{name}d", "image")
    arrays.set_random_state(seed=3), one.set_random_state(seed=3)
    seen = one(data)
    assert np.array_equal(seen["image"], arrays(data["image"])) and seen["label"] is data["label"]


@spatial
@pytest.mark.parametrize("labels", [np.uint8, np.int16, np.int32, np.int64, bool, np.float32, np.float64])
def test_labels_keep_values_and_type(name, labels):
    data = case(labels=labels)
    if labels in (np.int32, np.int64):
        data["label"] = np.where(data["label"] == 40, 2**24 + 1, data["label"]).astype(labels)  # no float32 has it
    if labels is np.int64:
        data["label"][data["label"] == 80] = 2**40 + 1
    both = transform(f"{name}d", KEYS, BOTH).set_random_state(seed=1)
    for make in (lambda one: one, torch.from_numpy):
        seen = both(data | {"label": make(data["label"])})["label"]
        assert type(seen) is type(make(data["label"])) and seen.dtype == make(data["label"]).dtype
        assert set(np.unique(seen)) <= set(np.unique(data["label"])) and len(np.unique(seen)) > 1


@spatial
def test_image_and_label_move_together(name):
    """What the image shows is what the label says, as before, but where interpolation mixes two classes."""
    data = case(5, np.float64, size=(33, 30, 27))
    seen = transform(f"{name}d", KEYS, BOTH).set_random_state(seed=2)(data)
    again = np.digitize((seen["image"] + 1000) / 2000, [0.35, 0.5, 0.65]) * 40
    off, as_before = (again != seen["label"]).mean(), (data["label"] != seen["label"]).mean()
    assert off < 0.1 and off < as_before / (1 if name == "RandElastic" else 2)  # which moves little


# ---------------------------------------------------------------------------------------------------------- the affine


def blob(centre, size=(41, 37, 31)):
    """A Gaussian around a voxel position, in world terms at AFFINE @ centre."""
    from monai.data import MetaTensor

    at = np.meshgrid(*map(np.arange, size), indexing="ij")
    squares = sum((a - c) ** 2 for a, c in zip(at, centre))
    return MetaTensor(torch.tensor(np.exp(-squares / 8))[None], affine=AFFINE)


def world_of(image):
    """(3,) mm of the centre of mass."""
    weights = image[0].as_tensor().double()
    at = torch.stack(torch.meshgrid(*(torch.arange(n).double() for n in weights.shape), indexing="ij"))
    centre = (at * weights).sum((1, 2, 3)) / weights.sum()
    return (image.affine @ torch.cat([centre, torch.ones(1)]))[:3]


@pytest.mark.parametrize("name", ["RandRotation", "RandScale", "RandFlip"])
def test_what_lies_somewhere_still_lies_there(name):
    data = {"image": blob((23, 16, 17)), "label": blob((18, 20, 13))}
    both = transform(f"{name}d", KEYS, BOTH).set_random_state(seed=4)
    for _ in range(3):
        seen = both(data)
        assert not torch.equal(seen["image"].affine, AFFINE) and torch.equal(data["image"].affine, AFFINE)
        for key, tolerance in (("image", 0.05), ("label", 0.5)):  # mm, where a voxel has up to 2.5
            torch.testing.assert_close(world_of(seen[key]), world_of(data[key]), rtol=0, atol=tolerance)
        assert torch.equal(seen["image"].affine, seen["label"].affine)


def test_affine_is_monais():
    from monai.transforms import Affine, Flip

    image = blob((20, 18, 15))
    turn = transform("RandRotation").set_random_state(seed=5)
    seen, angles = turn(image), Rotation.from_matrix(turn.drawn[0]).as_euler("XYZ")
    theirs = Affine(rotate_params=angles.tolist(), padding_mode="border", dtype=np.float64, image_only=True)(image)
    torch.testing.assert_close(seen.affine, theirs.affine, rtol=0, atol=1e-5)
    torch.testing.assert_close(seen.as_tensor(), theirs.as_tensor().double(), rtol=0, atol=1e-4)

    flip = transform("RandFlip").set_random_state(seed=5)
    seen = flip(image)
    theirs = Flip(int(np.argmin(np.diag(flip.drawn[0]))))(image)
    torch.testing.assert_close(seen.affine, theirs.affine, rtol=0, atol=1e-5)


def test_bending_and_grey_values_leave_the_affine():
    data = {"image": blob((20, 18, 15))}
    for name, more in (("RandElasticd", ["bilinear"]), ("RandGaussianSmoothd", []), ("RandHistogramShiftd", [])):
        seen = transform(name, "image", *more).set_random_state(seed=0)(data)["image"]
        assert torch.equal(seen.affine, AFFINE) and not torch.equal(seen.as_tensor(), data["image"].as_tensor())


# ---------------------------------------------------------------------------------------------------- MONAI's pipelines


def pipeline(dictionary):
    """All transforms, as dictionaries or as arrays."""
    from monai.transforms import Compose, EnsureTyped

    names = [*SPATIAL, *INTENSITY]
    if not dictionary:
        return Compose([transform(name, prob=0.7) for name in names])
    args = {name: (KEYS, BOTH) if name in SPATIAL else ("image",) for name in names}
    steps = [transform(f"{name}d", *args[name], prob=0.7) for name in names]
    return Compose([EnsureTyped(KEYS, dtype=None), *steps])


def test_compose_draws_as_for_arrays():
    from monai.transforms import Compose

    both, arrays = pipeline(True), pipeline(False)
    both = Compose(both.transforms[1:])  # the same number of transforms, so that each has the same seed
    both.set_random_state(seed=11), arrays.set_random_state(seed=11)
    for seed in range(4):
        data = case(seed)
        assert np.array_equal(both(data)["image"], arrays(data["image"]))
    both.set_random_state(seed=11)
    arrays.set_random_state(seed=12)
    assert not np.array_equal(both(case())["image"], arrays(case()["image"]))


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_and_batched(workers):
    """What is cached stays as it was, each epoch draws anew, and the seed decides."""
    from monai.data import CacheDataset, DataLoader, MetaTensor

    data = [case(seed) for seed in range(4)]
    for one in data:
        one["image"] = MetaTensor(torch.from_numpy(one["image"]), affine=AFFINE)

    def epochs():
        steps = pipeline(True)
        dataset = CacheDataset(data, steps, num_workers=0, progress=False)
        steps.set_random_state(seed=7)
        torch.manual_seed(0)  # of which the loader gives each worker its seed
        loader = DataLoader(dataset, batch_size=2, num_workers=workers, shuffle=False)
        found = [list(loader) for _ in range(2)]
        for i, one in enumerate(data):
            assert torch.equal(dataset._cache[i]["image"].as_tensor(), one["image"].as_tensor())
            assert torch.equal(dataset._cache[i]["image"].affine, AFFINE)
        return found

    first, again = epochs(), epochs()
    for one, other in zip((*first[0], *first[1]), (*again[0], *again[1])):
        assert one["image"].shape == (2, 1, *SIZE) and one["label"].dtype == torch.uint8
        assert set(one["label"].unique().tolist()) <= {0, 40, 80, 120} and one["image"].isfinite().all()
        assert torch.equal(one["image"], other["image"]) and torch.equal(one["label"], other["label"])
    assert not torch.equal(first[0][0]["image"], first[1][0]["image"])


def test_missing_keys_and_sizes_that_differ():
    data = case()
    del data["label"]
    with pytest.raises(KeyError, match="label"):
        transform("RandRotationd", KEYS, BOTH)(data)
    allowing = transform("RandRotationd", KEYS, BOTH, allow_missing_keys=True).set_random_state(seed=0)
    arrays = transform("RandRotation").set_random_state(seed=0)
    assert allowing({"name": "x"}) == {"name": "x"}  # and nothing is drawn
    assert np.array_equal(allowing(data)["image"], arrays(data["image"]))
    with pytest.raises(ValueError, match=r"keys of one size are transformed together, got .*label.*17, 14, 10"):
        transform("RandRotationd", KEYS, BOTH)(data | {"label": np.zeros((1, 17, 14, 10))})
    with pytest.raises(ValueError, match=r"\(C, X, Y, Z\), got shape \(17, 14, 11\)"):
        transform("RandRotationd", KEYS, BOTH)(case() | {"label": np.zeros(SIZE)})


def test_each_has_its_dictionary_version():
    for name, row in AUGMENTATIONS.items():
        made = getattr(monai_transforms, f"{row.monai}d")
        modes = [] if name in ("gaussian", "histogram", "window") else ["mode"]
        strength = [row.argument] if row.argument else ["clip_range"] * (name == "window")
        assert [*signature(made).parameters] == ["keys", *modes, *strength, "prob", "allow_missing_keys"]
        one = made("image", *["nearest" for _ in modes], prob=1.0)
        assert one.augmentation.policy == getattr(monai_transforms, row.monai)(prob=1.0).policy
        assert one.augmentation.__class__.__name__ == row.monai and one.__class__.__name__ == f"{row.monai}d"
        data, copy = case(), pickle.loads(pickle.dumps(one.set_random_state(seed=0)))  # to workers
        assert np.array_equal(copy(data)["image"], one(data)["image"])
        with pytest.raises(TypeError):
            made()
    with pytest.raises(TypeError, match="mode"):  # labels would be blurred without a word
        monai_transforms.RandRotationd(KEYS)
    with pytest.raises(ValueError, match="mode is linear, expected bilinear or nearest for each key"):
        monai_transforms.RandRotationd(KEYS, "linear")
    with pytest.raises(ValueError):
        monai_transforms.RandRotationd(KEYS, ["bilinear"])


def test_channels_that_are_last_are_refused():
    for shape in ((17, 14, 11, 1), (2, 14, 11, 1)):
        with pytest.raises(ValueError, match="channel seems to be last"):
            transform("RandRotationd", "image", "bilinear")({"image": np.zeros(shape, np.float32)})
    thin = np.zeros((1, 14, 11, 1), np.float32)
    assert transform("RandRotationd", "image", "bilinear")({"image": thin})["image"].shape == thin.shape
