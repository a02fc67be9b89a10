"""Planes of volumes as pictures, in millimetres and turned as radiologists see them, and many of them in one
montage."""

import collections
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from augmentations import (
    AUGMENTATIONS,
    Lattice,
    MultiCropAugmentation,
    PatchSource,
    Policy,
    ViewParameters,
    collate_views,
    render_views,
)
from dino3d.files import atomic_write

if TYPE_CHECKING:
    import PIL.Image

HEADER, CAPTION, FRAME = 50, 20, 2  # pixels: title and legend, the line above a tile, what is left free around it
DARK, BRIGHT = (24, 24, 24), (230, 230, 230)
SIDE = 144  # pixels of a montage's largest tile, at least
NO_TISSUE = 0.05  # grey value below which a voxel is taken for air (-900 HU in the default clip range)
NEARLY_AIR = 0.3  # share of tissue below which a tile shows too little
EVEN = "drawn in millimetres; the patient's right on the left, anterior or superior on top"


def save_picture(path: Path | str, picture: np.ndarray) -> None:
    """Save a uint8 picture, whole or not at all."""
    from PIL import Image

    with atomic_write(path) as part:
        Image.fromarray(picture).save(part)


def radiological(plane: ArrayLike) -> np.ndarray:
    """(rows, columns) picture of a plane whose axes grow to the right and up: the patient's right is on the left.

    plane: (a, b) with a towards the patient's right (a coronal or axial plane), b towards anterior or superior; or
        (a, b, colours)
    """
    return np.asarray(plane)[::-1, ::-1].swapaxes(0, 1)


def plane(volume: np.ndarray, axis: int, spacing: ArrayLike, at: float = 0.5) -> np.ndarray:
    """Picture of a plane across an axis: 0 sagittal (anterior on the left), 1 coronal, 2 axial; its pixels are squares.

    volume: (X, Y, Z) grey values; spacing: (3,) mm per voxel, of which the smaller of the plane's two is a pixel's side
    at: where the plane lies along the axis, 0 to 1
    """
    from PIL import Image

    index = min(int(at * volume.shape[axis]), volume.shape[axis] - 1)
    picture = radiological(volume.take(index, axis)).astype(np.float32)
    mm = np.delete(np.asarray(spacing, float), axis)[::-1]  # (2,) of a row, of a column
    rows, columns = np.maximum(np.rint(picture.shape * mm / mm.min()), 1).astype(int).tolist()
    return np.asarray(Image.fromarray(picture).resize((columns, rows), Image.Resampling.BILINEAR))


def planes(view: Tensor, spacing: ArrayLike) -> list[np.ndarray]:
    """[axial, coronal] pictures of the middle planes of a view (X, Y, Z); spacing: (3,) mm."""
    view = view.float().cpu().numpy()
    return [plane(view, 2, spacing), plane(view, 1, spacing)]


def magnified(picture: np.ndarray, rows: int) -> np.ndarray:
    """A picture brought to a height in pixels."""
    from PIL import Image

    columns = max(1, round(picture.shape[1] * rows / picture.shape[0]))
    return np.asarray(Image.fromarray(picture).resize((columns, rows), Image.Resampling.BILINEAR))


def montage(
    rows: Sequence[Sequence[np.ndarray]],
    labels: Sequence[str] | None = None,
    title: str = "",
    tile: int = SIDE,
    gap: int = 2,
) -> np.ndarray:
    """uint8 (height, width) picture: rows of grey tiles in [0, 1], each row under its label, all under a title.

    The largest tile is magnified to about `tile` pixels where it is smaller, all by the same whole factor. The picture
    is as wide as its widest row or line of text.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(13)
    zoom = max(1, round(tile / max(max(image.shape) for row in rows for image in row)))
    strip, top = 18 if labels else 0, 20 if title else 0  # heights of a label, of the title
    width = max(sum(image.shape[1] * zoom + gap for image in row) for row in rows)
    width = max(width, *(int(font.getlength(text)) + 8 for text in (title, *(labels or ()))))
    heights = [max(image.shape[0] for image in row) * zoom + gap + strip for row in rows]
    canvas = Image.new("L", (width, top + sum(heights)), 40)
    draw = ImageDraw.Draw(canvas)
    draw.text((4, 2), title, 255, font)
    for row, label, height in zip(rows, labels or [""] * len(rows), heights):
        draw.text((4, top + 1), label, 255, font)
        left = 0
        for image in row:
            pixels = (np.clip(image, 0, 1) * 255).astype(np.uint8).repeat(zoom, 0).repeat(zoom, 1)
            canvas.paste(Image.fromarray(pixels), (left, top + strip))
            left += pixels.shape[1] + gap
        top += height
    return np.asarray(canvas)


def compose_page(
    rows: Sequence[Sequence[tuple[str, "PIL.Image.Image"]]],
    title: str,
    outlines: Sequence[tuple[str, tuple[int, int, int]]],
) -> np.ndarray:
    """uint8 (height, width, 3) picture of rows of (caption, picture), a title and a legend: names of colours above
    it."""
    from PIL import Image, ImageDraw, ImageFont

    large, small = ImageFont.load_default(16), ImageFont.load_default(13)
    lefts = [0, *np.cumsum([max(tile.width for _, tile in column) for column in zip(*rows)]).tolist()]
    heights = [CAPTION + max(tile.height for _, tile in row) for row in rows]
    canvas = Image.new(
        "RGB", (max(lefts[-1], math.ceil(large.getlength(title)) + 2 * FRAME), HEADER + sum(heights)), DARK
    )
    draw = ImageDraw.Draw(canvas)
    draw.text((FRAME, 4), title, BRIGHT, large)
    left = FRAME
    for name, colour in outlines:
        draw.text((left, 28), name, colour, large)
        left += large.getlength(name) + 16
    top = HEADER
    for row, height in zip(rows, heights):
        for left, (caption, tile) in zip(lefts, row):
            draw.text((left + FRAME, top + 3), caption, BRIGHT, small)
            canvas.paste(tile, (left, top + CAPTION))
        top += height
    return np.array(canvas)


def scan_name(path: Path | str) -> str:
    """The end of a file's path, which tells patients and series apart: <patient>/t<k>/<series>.hdf5."""
    return "/".join(str(path).split("/")[-3:])


def view_rows(
    views: Sequence[Tensor],
    names: Sequence[str],
    spacings: Sequence[ArrayLike],
    most: int = 4,
    local_stretch: ArrayLike = 1.0,
) -> tuple[list[list[np.ndarray]], list[str]]:
    """(rows, labels) of tiles for `montage`: at most `most` samples, those of different scans first.

    views: [global (2 B, 1, ...), local (L B, 1, ...)]; names: (B,) of the scans; spacings: (B, 3) mm per voxel
    local_stretch: sides of a local view's voxels relative to a global one's, (3,) where they differ by axis
    A sample of which a tile is nearly all air is left out where there are others.
    """
    rows = []
    for sample, spacing in enumerate(spacings):
        row = [tile for view in views[0][sample :: len(names)] for tile in planes(view[0], spacing)]
        for local in views[1:]:
            mm = np.asarray(spacing) * local_stretch
            row += [magnified(planes(view[0], mm)[0], row[0].shape[0]) for view in local[sample :: len(names)]]
        rows.append(row)
    tissue = [min(np.mean(tile > NO_TISSUE) for tile in row) for row in rows]
    shown = [sample for sample, share in enumerate(tissue) if share > NEARLY_AIR] or [int(np.argmax(tissue))]
    before, turn = collections.Counter(), {}
    for sample in shown:
        turn[sample] = before[names[sample]]
        before[names[sample]] += 1
    shown = sorted(shown, key=turn.get)[:most]
    label = "{}: two global views (axial, coronal)" + ", local views (axial, magnified)" * (len(views) > 1)
    return [rows[sample] for sample in shown], [label.format(names[sample]) for sample in shown]


def example_views(
    patch: Tensor,
    crops: MultiCropAugmentation,
    clip_range: tuple[float, float],
    draws: int = 4,
    patch_spacing: ArrayLike | None = None,
) -> dict[str, Tensor]:
    """{label: (draws, 1, x, y, z)} global views from the middle of a patch: plain, then each augmentation alone.

    patch: (X, Y, Z) int16 HU; crops: the MultiCropAugmentation whose patch it is. patch_spacing: (3,) mm per voxel of
    it, needed where the views have a spacing of their own. For a look at what the flags do: every augmentation is shown
    as strong as its flag makes it, and labelled where the policy has it off.
    """
    mm = (1.0, 1.0) if crops.spacing is None else (np.array(crops.spacing), np.array(patch_spacing))  # view, patch
    zoom = min(1.0, (crops.global_scale or (1, 1))[1])  # a patch for smaller windows is smaller than a plain view
    size = np.rint(np.array(crops.global_size) * zoom * mm[0] / mm[1])
    centre = (np.array(patch.shape) - size) // 2 + (size - 1) / 2  # on whole voxels: the plain view is not blurred
    examples = {}
    for name in (None, *AUGMENTATIONS):
        strength = {name: getattr(crops.policy, name) or AUGMENTATIONS[name].strength} if name else {}
        policy = Policy(**strength, prob=1.0)
        lattice, rng = Lattice.for_views(crops.global_size, policy), np.random.RandomState(0)
        matrices, displacements, intensity = zip(
            *(policy.draw(rng, lattice.shape, policy.sequence) for _ in range(draws))
        )
        control = np.stack(
            [
                lattice.control(matrix, centre, move, zoom * mm[0], mm[1])
                for matrix, move in zip(matrices, displacements)
            ]
        )
        (group,) = collate_views([[ViewParameters(control, list(intensity))]])
        on = name is None or name in crops.policy.on
        examples[(name or "plain") + ("" if on else " (off)")] = render_views(
            PatchSource(patch[None], clip_range, policy), lattice, group.to(patch.device)
        )
    return examples
