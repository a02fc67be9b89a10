"""Views made by one Triton kernel, against SciPy and the plain way. On a CPU Triton's interpreter runs the kernel."""

import importlib.util
import sys
from dataclasses import replace

import numpy as np
import pytest
import scipy.ndimage
import torch
from conftest import ROOT
from test_augmentations import PAPER, close, few_views, noise  # noqa: F401
from test_packed_step import CUDA

import augmentations
from augmentations import MultiCropAugmentation, collate_views, sampling_grid
from dino3d.bspline import Lattice, mirror_matrix, rotation_matrix

PATH = ROOT / "dino3d" / "view_kernel.py"


def new_module():
    """Not the one that is imported already, maybe with another way to run it."""
    pytest.importorskip("triton", reason="needs Triton, which PyTorch brings along on GPUs: pip install triton")
    spec = importlib.util.spec_from_file_location("dino3d.view_kernel", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["cpu", CUDA])
def device(request, monkeypatch):
    """Where the kernel runs, in place of the plain way."""
    if request.param == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    module = new_module()
    monkeypatch.setitem(sys.modules, "dino3d.view_kernel", module)
    monkeypatch.setattr(augmentations, "in_one_kernel", lambda device: module.calls.append(device) or True)
    module.calls = []
    yield request.param
    assert module.calls


def patches_of(number, shape, order, dtype=torch.int16):
    """(number, *shape) HU of noise, whose axes lie in memory in an order."""
    voxels = (noise(number, *(shape[axis] for axis in order)) * 3000 - 1500).to(dtype)
    return voxels.permute(0, *(1 + np.argsort(order)))


def by_scipy(patch, grid, clip):
    """A view as a formula has it, in float64: clipped, interpolated, scaled."""
    voxels = np.clip(patch.double().numpy(), *clip) if clip else patch.double().numpy()
    return scipy.ndimage.map_coordinates(voxels, grid.double().numpy().transpose(3, 0, 1, 2), order=1, mode="nearest")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)], ids=["z fastest", "x fastest"])
@pytest.mark.parametrize("shape", [(17, 15, 13), (1, 1, 1), (17, 1, 2)])
@pytest.mark.parametrize("drawn", [False, True], ids=["clipped", "windows"])
def test_views_are_those_of_scipy(device, shape, order, drawn):
    """Turned, mirrored, scaled, bent, beyond the border; sizes that no box of a program divides."""
    size, middle, low_high = (9, 8, 13), (np.array(shape) - 1) / 2, (-900.5, 1000.0)
    lattice = Lattice(size, (4, 4, 5))
    turned = rotation_matrix(np.radians([10, -20, 30]))
    matrices = [np.eye(3), mirror_matrix(0) @ turned, 2 * turned, np.diag([1.1, 0.7, -1])]
    moves = np.random.RandomState(1).uniform(-0.4, 0.4, (*lattice.shape, 3))
    control = np.stack([lattice.control(m, middle + i, moves * (i % 2)) for i, m in enumerate(matrices)])
    control = torch.from_numpy(control)
    patches, windows = patches_of(2, shape, order), torch.tensor([[-160.0, 240.0], [-1350.0, 150.0]])
    intensity = {"window": (torch.tensor([3, 0]), windows)} if drawn else {}
    policy = replace(PAPER, window=int(drawn))
    source = augmentations.PatchSource(patches.to(device), low_high, policy)
    group = augmentations.ViewBatch(control.float(), intensity).to(device)
    views = augmentations.render_views(source, lattice, group).cpu()
    assert views.shape == (4, 1, *size) and views.dtype == torch.float32
    grid = sampling_grid(control, lattice)
    for i, view in enumerate(views):
        low, high = windows.tolist()[[1, None, None, 0][i]] if drawn and i in (0, 3) else low_high
        expected = by_scipy(patches[i % 2], grid[i], None if drawn else low_high)
        close(view[0].double(), torch.from_numpy(((expected - low) / (high - low)).clip(0, 1)), 1e-4)


@pytest.mark.parametrize("window", [0, 1])
def test_a_batch_is_the_plain_ways(device, window, few_views):  # noqa: F811
    """All augmentations, resized crops whose patches are averaged first; on a GPU without the host waiting."""
    scales = {"global_scale": (0.5, 2.0), "local_scale": (0.2, 1.0)}
    crops = MultiCropAugmentation(replace(PAPER, prob=0.8, window=window), (24, 20, 12), (8, 7, 5), 3, **scales)
    patches = torch.from_numpy(
        (scipy.ndimage.gaussian_filter(noise(3, *crops.patch_size).numpy(), (0, 1, 1, 1)) * 3000 - 1500).astype(
            np.int16
        )
    )
    groups = collate_views([crops.draw(0, 0, i) for i in range(3)])
    assert len(groups[0].blocks) > 1
    on_device = patches.to(device), [group.to(device) for group in groups], (-1000, 1000)
    crops.render(*on_device)  # to compile, and for the lattices' weights
    torch.cuda.set_sync_debug_mode("error") if device == "cuda" else None
    try:
        found = crops.render(*on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default") if device == "cuda" else None
    plain = MultiCropAugmentation.render
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augmentations, "in_one_kernel", lambda device: False)
        expected = plain(crops, patches, groups, (-1000, 1000))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.device.type == device
        close(ours.cpu(), theirs, 1e-2 if window else 1e-4)


@pytest.mark.parametrize("voxel", ["*i16", "*fp32"])
@pytest.mark.parametrize("ones", [(), ("number", "patch_x", "step_x", "size_z")], ids=["", "ones"])
def test_it_compiles_for_a_gpu(voxel, ones, monkeypatch, tmp_path):
    """An H100, which need not be there; Triton compiles sizes and steps of 1 as constants. What the interpreter takes
    is not always what the compiler takes."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = new_module()._make_views
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    constants = {"points": 4, "clips": True, "side_x": 8, "side_y": 8, "side_z": 8, **dict.fromkeys(ones, 1)}
    types = {name: "*fp32" for name in ("views", "rows", "weights", "ranges")} | {"which": "*i64", "patches": voxel}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compiled = compile(ASTSource(kernel, signature, constexprs=values), target=GPUTarget("cuda", 90, 32))
    assert len(compiled.asm["cubin"]) > 1000


def test_it_is_off_and_falls_back(monkeypatch):
    """Until a GPU has seen it; without Triton, on a CPU, or in double precision never."""
    gpu = torch.device("cuda")
    assert not augmentations.in_one_kernel(gpu)
    monkeypatch.setattr(augmentations, "VIEWS_IN_ONE_KERNEL", True)
    monkeypatch.setattr(augmentations, "find_spec", lambda name: name == "triton")
    assert augmentations.in_one_kernel(gpu) and not augmentations.in_one_kernel(torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_default_dtype", lambda: torch.float64)
        assert not augmentations.in_one_kernel(gpu)
    monkeypatch.setattr(augmentations, "find_spec", lambda name: None)
    assert not augmentations.in_one_kernel(gpu)
