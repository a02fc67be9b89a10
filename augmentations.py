"""Multi-crop 3D augmentations for CT: drawn per sample in the loader's workers, applied per batch on any device.

Axes: volumes and crops are (X, Y, Z) in RAS, batches (B, C, X, Y, Z); positions are voxel indices in that order.

Rotation, scale, flip, elastic deformation and crop are one map from a view's voxels to the base patch. The map is
stored as the control points of a cubic B-spline: such a spline reproduces affine maps exactly, so a small lattice of
positions says everything about a view's geometry, and the device expands it at the view's own voxels only and
interpolates once. Gaussian smoothing and histogram shift follow on the view, with parameters of its own.

The augmentations themselves are the table of dino3d/policy.py.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from dino3d.bspline import (  # noqa: F401  some are part of this module's interface
    SPANS,
    Lattice,
    elastic_moves,
    enclosing_patch,
    mirror_matrix,
    rotation_matrix,
    sampling_grid,
    sampling_rows,
    warp,
)
from dino3d.intensity import (  # noqa: F401  as above
    average_blocks,
    averaging_blocks,
    gaussian_smooth,
    histogram_shift,
    scale_intensity,
    show_window,
)
from dino3d.policy import (  # noqa: F401  as above
    AUGMENTATION_FLAGS,
    AUGMENTATIONS,
    MAX_BENT,
    PAPER,
    Augmentation,
    Policy,
    add_augmentation_flags,
    paper_policy,
)
from dino3d.trilinear import sample_views

PATCH_VIEW = -1  # the key's view number for what belongs to the whole sample: where its base patch lies
VIEW_VOXELS_AT_ONCE = 2**19  # of views whose grey values are changed on a CPU
VIEWS_IN_ONE_KERNEL = False  # on a GPU with Triton: no GPU has seen it so far
OFF_BY = 0.01  # voxels, more than positions in single precision are off by rounding
MIN_IOU = 0.25  # of two global windows of a sample, before rotation and scale (the paper's rule)


def keyed_rng(seed: int, epoch: int, sample: int, view: int) -> np.random.RandomState:
    """The random generator of one view (or, with view = PATCH_VIEW, of one sample) in one epoch.

    Equal keys give equal draws whatever process, worker or rank asks. All four are integers, view >= -1.
    """
    # view + 1, and not view: SeedSequence takes a missing word for 0, so (s, e, i) and (s, e, i, 0) are one seed
    return np.random.RandomState(np.random.PCG64(np.random.SeedSequence((seed, epoch, sample, view + 1))))


# ------------------------------------------------------------------------------------------------------- multi-crop


class ViewParameters(NamedTuple):
    """All that is random about the N views of one size of a sample.

    control: (N, gx, gy, gz, 3) float32, the base-patch position in voxels at each control point of the view's spline
    intensity: N times {name: values}, the intensity augmentations that act on the view
    blocks: N times (kx, ky, kz), the voxels of the patch over which it is averaged before the view is sampled
    """

    control: np.ndarray
    intensity: list[dict[str, Any]]
    blocks: Sequence[tuple[int, ...]] = ()


class ViewBatch(NamedTuple):
    """All that is random about the N = V B views of one size of a batch: the first view of all samples comes first.

    control: (N, gx, gy, gz, 3) float32
    intensity: {name: (indices (n,), values (n, ...) float32)} of the views that each acts on, in the table's order.
               They are found on the CPU, so that the device works on those alone without the host waiting for it.
    blocks: {(kx, ky, kz): indices (n,)} of the views that are sampled from the averaged patch; None: none is
    """

    control: Tensor
    intensity: dict[str, tuple[Tensor, Tensor]]
    blocks: dict[tuple[int, ...], Tensor] | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "ViewBatch":
        """The same with a function applied to its tensors."""
        return ViewBatch(
            function(self.control),
            {name: tuple(map(function, pair)) for name, pair in self.intensity.items()},
            self.blocks and {blocks: function(indices) for blocks, indices in self.blocks.items()},
        )

    def to(self, device: torch.device | str) -> "ViewBatch":
        return self.map(functools.partial(Tensor.to, device=device, non_blocking=True))


class MultiCropAugmentation:
    """Global and local views of one base patch: where they lie, how large the patch must be, what is random.

    policy: Policy
    global_size, local_size: (3,) voxels of a view; local_number: how many local views (two views are global)
    spacing: (3,) mm per voxel of a view; None: a view's voxels are the volume's, whatever they measure
    min_iou: of two global windows before rotation and scale; 1: they lie in the middle of the patch
    global_scale, local_scale: (low, high) of resized crops: the side of a view's window relative to global_size, one
        for its three axes, drawn uniformly in [low, high] for each view; None: a view's window has its own voxels

    core: (3,) the box that holds all unrotated windows, in which two global ones overlap by an IoU of min_iou. Where
        their sides differ, as much of the smaller one lies in the other as of each of two equal ones: 2 IoU / (1 + IoU)
    patch_size: (3,) the core and a margin, so that fewer than 5 % of global views see more than 1 % outside it;
                both in voxels of a view that is not resized
    finest: (3,) the least of such voxels that a voxel of any view covers along each axis, at most 1
    """

    def __init__(
        self,
        policy: Policy,
        global_size: Sequence[int],
        local_size: Sequence[int],
        local_number: int,
        spacing: ArrayLike | None = None,
        min_iou: float = MIN_IOU,
        global_scale: tuple[float, float] | None = None,
        local_scale: tuple[float, float] | None = None,
    ) -> None:
        self.policy, self.local_number, self.spacing = policy, local_number, spacing
        self.global_size, self.local_size = tuple(global_size), tuple(local_size)
        self.global_scale, self.local_scale = global_scale, local_scale
        # Two windows of size n shifted by f n along every axis: IoU = (1 - f)^3 / (2 - (1 - f)^3)
        self._max_shift = 1 - (2 * min_iou / (1 + min_iou)) ** (1 / 3)
        largest = [n * (global_scale or (1, 1))[1] for n in self.global_size]
        self.core = tuple(math.ceil(n - 1e-6) + int(self._max_shift * n) for n in largest)
        finest = [np.ones(3)]
        for size, scale in ((self.global_size, global_scale), (self.local_size, local_scale)):
            if scale is not None:
                finest.append(scale[0] * np.array(self.global_size) / size)
        self.finest = np.min(finest, 0)
        self.lattices = [
            Lattice.for_views(size, policy, self.global_size) for size in (self.global_size, self.local_size)
        ]
        self.patch_size = self._patch_size()

    @property
    def local_stretch(self) -> np.ndarray:
        """(3,) how much longer a local view's voxels are along each axis than along the shortest, relative to a global
        view's: not 1 where resized crops are of another shape than global views."""
        stretch = np.ones(3) if self.local_scale is None else np.array(self.global_size) / self.local_size
        return stretch / stretch.min()

    def draw(
        self,
        seed: int,
        epoch: int,
        sample: int,
        patch_shape: Sequence[int] | None = None,
        patch_spacing: ArrayLike | None = None,
    ) -> list[ViewParameters | None]:
        """[global, local] ViewParameters of one sample; None where there are no local views.

        patch_shape: (3,) voxels of the patch that was read; default: patch_size
        patch_spacing: (3,) mm per voxel of it, needed where `spacing` is given
        """
        shape, groups, first = self.patch_size if patch_shape is None else patch_shape, [], 0
        for lattice, number in zip(self.lattices, (2, self.local_number)):
            if not number:
                groups.append(None)
                continue
            rngs = (keyed_rng(seed, epoch, sample, view) for view in range(first, first + number))
            control, intensity, blocks = self._draw_views(rngs, lattice, shape, patch_spacing, self.policy.up_to_last)
            groups.append(ViewParameters(control.astype(np.float32), intensity, blocks))
            first += number
        return groups

    def seen_box(self, views: Sequence[ViewParameters | None], patch_shape: Sequence[int]) -> tuple[slice, ...]:
        """Three slices of a patch, outside which a sample's views see no voxel. views: what `draw` gave"""
        reaches = []
        for lattice, group in zip(self.lattices, views):
            if group:
                blocks = np.max(group.blocks, 0)  # (3,) whose means views are made of
                margin = OFF_BY + np.where(blocks > 1, 1.5 * blocks + 1, 0)
                low, high = lattice.reach(group.control)
                reaches.append((low - margin, high + margin))
        low, high = np.min([low for low, _ in reaches], 0), np.max([high for _, high in reaches], 0)
        last = np.array(patch_shape) - 1  # what lies beyond repeats the border
        low, high = np.clip(np.floor(low), 0, last), np.clip(np.floor(high) + 1, 0, last)
        return tuple(slice(int(a), int(b) + 1) for a, b in zip(low, high))

    def _draw_views(
        self,
        rngs: Iterable[np.random.RandomState],
        lattice: Lattice,
        patch_shape: Sequence[int],
        patch_spacing: ArrayLike | None,
        names: Sequence[str],
    ) -> tuple[np.ndarray, list[dict[str, Any]], list[tuple[int, ...]]]:
        """(control (N, gx, gy, gz, 3), intensity N times {name: values}, blocks N times (kx, ky, kz)) of N views.

        rngs: of each view, from which it draws one after the other; names: see `Policy.draw_values`
        """
        size, patch_size = np.array(lattice.size), np.array(self.patch_size)
        is_global = lattice is self.lattices[0]
        low, high = (self.global_scale if is_global else self.local_scale) or (1.0, 1.0)
        window, box, room = self._window(lattice, low)  # for all, where nothing is drawn
        views = []
        for rng in rngs:
            if low < high:
                window, box, room = self._window(lattice, rng.uniform(low, high))
            # Whole voxels, so that a view that is neither turned nor scaled is not blurred by interpolation either
            views.append((window, box, rng.randint(0, room), self.policy.draw_values(rng, names)))
        window, box, start, drawn = zip(*views)
        window = np.array(window)  # (N, 3)
        start = (patch_size - np.array(box)) / 2 + np.array(start)
        shift = start + (window - 1) / 2 - (patch_size - 1) / 2  # (N, 3) of a view's centre from the patch's
        matrices, displacements, intensity = self.policy.compose(drawn, lattice.shape)
        zoom = window / size  # voxels of a view that is not resized, per voxel of this one
        mm = (1.0, 1.0) if self.spacing is None else (np.array(self.spacing), np.array(patch_spacing))  # view, patch
        centre = (np.array(patch_shape) - 1) / 2 + shift * mm[0] / mm[1]
        steps = zoom * mm[0] / mm[1]  # (N, 3) voxels of the patch per voxel of the view
        blocks = [(1, 1, 1)] * len(steps)
        if self.global_scale or self.local_scale:
            blocks = [averaging_blocks(of_view) for of_view in steps]
        return lattice.control(matrices, centre, displacements, zoom * mm[0], mm[1]), intensity, blocks

    def _window(self, lattice: Lattice, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(window, box, room), (3,) each: the sides of a view's window, of the box in the patch's middle that holds it,
        and how many places it has there."""
        is_global = lattice is self.lattices[0]
        resized = self.global_scale if is_global else self.local_scale
        window = np.array(lattice.size) if resized is None else np.array(self.global_size) * scale
        box = window + (self._max_shift * window).astype(int) if is_global else np.array(self.core)
        return window, box, np.floor(box - window + 1e-6).astype(int) + 1

    def _patch_size(self, views: int = 1200, points: int = 9) -> tuple[int, ...]:
        """The `enclosing_patch` of views that are drawn for it."""
        self.patch_size = self.core  # the draws below measure from its centre
        lattice, rng = self.lattices[0], np.random.RandomState(0)
        names = [name for name in self.policy.sequence if AUGMENTATIONS[name].kind != "window"]  # the patch is the same
        controls, *_ = self._draw_views([rng] * views, lattice, self.core, self.spacing, names)
        return enclosing_patch(controls, lattice, self.core, points)

    def render(
        self, patches: Tensor, groups: Sequence[ViewBatch | None], clip_range: tuple[float, float]
    ) -> list[Tensor]:
        """The views of a batch: [global (2 B, 1, x, y, z), local (L B, 1, x, y, z)], first view of all samples first.

        L: local_number
        patches: (B, X, Y, Z) int16 HU on any device
        groups: as `collate_views` returns them, on the same device
        clip_range: HU that become 0 and 1
        """
        with torch.autocast(patches.device.type, enabled=False):  # positions need more than bf16's three digits
            source = PatchSource(patches, clip_range, self.policy)  # for both sizes of view
            return [render_views(source, lattice, group) for lattice, group in zip(self.lattices, groups) if group]


class PatchSource:
    """What views are sampled from: patches in HU, clipped to what becomes 0 and 1, averaged over blocks of voxels.

    patches: (B, X, Y, Z) int16 HU; clip_range: HU that become 0 and 1; policy: where it draws windows of HU, views are
        clipped one by one, and the patches are not
    """

    def __init__(self, patches: Tensor, clip_range: Sequence[float], policy: Policy) -> None:
        self.patches, self.clip_range, self.clips = patches, clip_range, not policy.has_windows
        self._all = {}

    def all(self, blocks: tuple[int, ...] = (1, 1, 1)) -> Tensor:
        """(B, 1, X, Y, Z) floats of all patches, made once for both sizes of view."""
        if blocks not in self._all:
            self._all[blocks] = self.averaged(self.patches, blocks).to(torch.get_default_dtype())
        return self._all[blocks]

    def averaged(self, patches: Tensor, blocks: tuple[int, ...] = (1, 1, 1)) -> Tensor:
        """(B, 1, X, Y, Z) of patches: int16, or floats where blocks are averaged or a bound lies between whole HU."""
        patches, bounds = patches[:, None], torch.iinfo(torch.int16)
        if max(blocks) > 1:
            patches = average_blocks(patches.to(torch.get_default_dtype()), blocks)
        if not self.clips:
            return patches
        low, high = self.clip_range
        if max(blocks) == 1 and float(low).is_integer() and float(high).is_integer():
            return patches.clamp(max(int(low), bounds.min), min(int(high), bounds.max))
        return patches.to(torch.get_default_dtype()).clamp_(low, high)


def render_views(source: PatchSource, lattice: Lattice, group: ViewBatch) -> Tensor:
    """(V B, 1, x, y, z) views in [0, 1]: geometry, then intensities. group: ViewBatch of V B views"""
    on_cpu = source.patches.device.type == "cpu"
    if in_one_kernel(source.patches.device):
        views = sample_in_one_kernel(source, lattice, group)
    else:
        views = (sample_on_cpu if on_cpu else sample)(source, lattice, group)
        if "window" in group.intensity:
            views = show_window(views, view_ranges(source, group))
        else:
            low, high = source.clip_range
            views = views.sub_(low).div_(high - low).clamp_(0, 1)
    # On CPUs a few at a time: what is in between then stays in memory that is there already
    number = max(1, VIEW_VOXELS_AT_ONCE // math.prod(lattice.size)) if on_cpu else len(views)
    for name, (indices, values) in group.intensity.items():
        if AUGMENTATIONS[name].kind == "intensity":
            for some, of_some in zip(indices.split(number), values.split(number)):
                views.index_copy_(0, some, AUGMENTATIONS[name].apply(views[some], of_some))
    return views


def sample(source: PatchSource, lattice: Lattice, group: ViewBatch) -> Tensor:
    """(V B, 1, x, y, z) views in HU, a view of every patch at a time."""
    number = len(source.patches)
    if group.blocks is None:
        patches = source.all()
        return torch.cat([warp(patches, control.to(patches.dtype), lattice) for control in group.control.split(number)])
    views = torch.empty(
        len(group.control), 1, *lattice.size, dtype=torch.get_default_dtype(), device=source.patches.device
    )
    for blocks, indices in group.blocks.items():
        patches, control = source.all(blocks), in_blocks(group.control.to(views.dtype), blocks)
        for part in indices.split(number):  # as many at a time as there are patches, of which each is a copy
            views.index_copy_(0, part, warp(patches[part % number], control[part], lattice))
    return views


def view_ranges(source: PatchSource, group: ViewBatch) -> Tensor:
    """(V B, 2) HU that become 0 and 1 in each view, in the default float type."""
    number, device = len(group.control), source.patches.device
    ranges = torch.stack([torch.full((number,), float(bound), device=device) for bound in source.clip_range], 1)
    if "window" in group.intensity:
        indices, values = group.intensity["window"]
        ranges.index_copy_(0, indices, values.to(ranges.dtype))
    return ranges


def in_one_kernel(device: torch.device) -> bool:
    """Whether `sample_in_one_kernel` makes the views on a device: see VIEWS_IN_ONE_KERNEL."""
    on_gpu = device.type == "cuda" and torch.get_default_dtype() == torch.float32
    return VIEWS_IN_ONE_KERNEL and on_gpu and find_spec("triton") is not None


def sample_in_one_kernel(source: PatchSource, lattice: Lattice, group: ViewBatch) -> Tensor:
    """(V B, 1, x, y, z) views in [0, 1], before intensity augmentations."""
    from dino3d.view_kernel import write_views  # needs Triton, which builds of PyTorch without CUDA lack

    device = source.patches.device
    views = torch.empty(len(group.control), *lattice.size, device=device)
    ranges, control = view_ranges(source, group), group.control.to(views.dtype)
    weights = lattice.expansion(views.dtype, device)[2][::3, ::3]  # (gz, z): of positions' first component
    for blocks, which in (group.blocks or {(1, 1, 1): torch.arange(len(views), device=device)}).items():
        patches = source.patches if max(blocks) == 1 else source.all(blocks)[:, 0]
        rows = sampling_rows(in_blocks(control[which], blocks), lattice)
        write_views(views, patches, which, rows, weights, ranges, source.clips)
    return views[:, None]


def sample_on_cpu(source: PatchSource, lattice: Lattice, group: ViewBatch) -> Tensor:
    """As `sample`, patch by patch: new memory for all of them would cost as much as the views."""
    number, dtype = len(source.patches), torch.get_default_dtype()
    views = torch.empty(len(group.control), 1, *lattice.size, dtype=dtype)
    of_blocks = group.blocks or {(1, 1, 1): torch.arange(len(views))}
    for patch in range(number):
        for blocks, indices in of_blocks.items():
            mine = indices[indices % number == patch]
            if len(mine):
                voxels = source.averaged(source.patches[patch : patch + 1], blocks)[0, 0]
                views[mine, 0] = sample_views(voxels, in_blocks(group.control[mine].to(dtype), blocks), lattice)
    return views


def in_blocks(control: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """Positions (..., 3) of a patch as positions of what `average_blocks` made of it."""
    if max(blocks) == 1:
        return control
    return torch.stack([(at + 0.5) / k + 0.5 for at, k in zip(control.unbind(-1), blocks)], -1)


def collate_views(samples: Sequence[Sequence[ViewParameters | None]]) -> list[ViewBatch | None]:
    """[ViewBatch or None, ...], one per group, of what `MultiCropAugmentation.draw` gave for each sample."""
    groups = []
    for group in zip(*samples):
        if group[0] is None:
            groups.append(None)
            continue
        control = torch.from_numpy(np.concatenate(np.stack([part.control for part in group], 1)))  # (V B, gx, ...)
        intensity, views = {}, list(itertools.chain(*zip(*(part.intensity for part in group))))  # in control's order
        for name in AUGMENTATIONS:
            indices = [i for i, view in enumerate(views) if name in view]
            if indices:
                values = np.stack([views[i][name] for i in indices]).astype(np.float32)
                intensity[name] = torch.tensor(indices), torch.from_numpy(values)
        sides = list(itertools.chain(*zip(*(part.blocks for part in group))))
        blocks = {side: torch.tensor([i for i, s in enumerate(sides) if s == side]) for side in sorted(set(sides))}
        groups.append(ViewBatch(control, intensity, blocks if any(max(side) > 1 for side in blocks) else None))
    return groups
