"""What is drawn of a mask: planes of a CT with the outlines of label and prediction.

Masks are (X, Y, Z) uint8 of classes in RAS order, 0 is the background; spacing is (3,) mm.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dino3d.finetune.mask_metrics import bounding_box, components
from dino3d.training.pictures import DARK, FRAME, compose_page, radiological

if TYPE_CHECKING:
    import PIL.Image

TILE = 360  # pixels: the volume's longest side in all whole planes, and the side of a zoom
ZOOM, AROUND = 60, 10  # mm: the side of a zoom, more for a lesion that wouldn't have AROUND on each side of it
MAGNIFIED = 3  # how many times larger than the whole plane a zoom is at least
GREEN, RED, YELLOW = (0, 255, 0), (255, 0, 0), (255, 255, 0)
GREY = (150, 150, 150)


class Plane(NamedTuple):
    """A plane of a volume as a picture is seen: rows from the top, columns from the left."""

    grey: np.ndarray  # (rows, columns) uint8
    label: np.ndarray  # (rows, columns) classes, as the prediction
    predicted: np.ndarray
    mm: np.ndarray  # (2,) size of a voxel

    @property
    def extent(self) -> np.ndarray:
        return self.grey.shape * self.mm


class Window(NamedTuple):
    """A part of a plane, in mm from its upper left corner."""

    low: np.ndarray  # (2,)
    size: np.ndarray  # (2,)


def overlay(
    image: np.ndarray,
    predicted: np.ndarray,
    label: np.ndarray | None,
    spacing: Sequence[float],
    clip_range: Sequence[float],
    title: str,
) -> np.ndarray:
    """uint8 (height, width, 3) picture of a lesion in CT: three planes, each with a zoom beside it.

    image: (X, Y, Z) HU; predicted, label: (X, Y, Z) uint8, label may be None; spacing: (3,) mm
    clip_range: HU that are black and white; title: what to write above
    Each plane is the one with most of the label; of the prediction where there is no label, the middle where neither
    is. Outlines of all classes follow the faces of the voxels: green the label's, red the prediction's, yellow where
    they meet. All planes have one scale, the same along rows and columns, and are turned as radiologists see them. A
    grey frame shows what is magnified: the largest part in the plane. What is wrong in other planes is not seen.
    """
    if label is None:
        label = np.zeros_like(predicted)
        outlines = [("prediction", RED)]
    else:
        outlines = [("label", GREEN), ("prediction", RED), ("both", YELLOW)]
    reference = label if label.any() else predicted
    longest = max(n * float(s) for n, s in zip(image.shape, spacing))
    rows = []
    for axis, name, left in (
        (2, "axial", "patient's right"),
        (1, "coronal", "patient's right"),
        (0, "sagittal", "anterior"),
    ):
        index = largest_plane(reference, axis)
        cut = [radiological(volume.take(index, axis)) for volume in (image, label, predicted, reference)]
        plane = Plane(grey_of(cut[0], clip_range), *cut[1:3], np.delete(np.array(spacing, float), axis)[::-1])
        window, side = window_around(cut[3], plane, longest / MAGNIFIED)
        rows.append(
            [
                (
                    f"{name}, {'xyz'[axis]} = {index}; {left} on the left",
                    draw_plane(plane, Window(np.zeros(2), plane.extent), TILE / longest, 1, frame=window),
                ),
                (
                    f"{longest / side:.1f} times larger, {window.size[1]:.0f} x {window.size[0]:.0f} mm",
                    draw_plane(plane, window, TILE / side, 2),
                ),
            ]
        )
    return compose_page(rows, title, outlines)


def largest_plane(mask: np.ndarray, axis: int) -> int:
    """Index along an axis of the plane with most of a mask; of several, as in an empty mask, the middle one."""
    areas = np.count_nonzero(mask, axis=tuple(a for a in range(3) if a != axis))
    largest = np.flatnonzero(areas == areas.max())
    return int(largest[len(largest) // 2])


def grey_of(plane: np.ndarray, clip_range: Sequence[float]) -> np.ndarray:
    """uint8 grey values of a plane of HU."""
    low, high = clip_range
    return np.uint8(np.clip((plane.astype(np.float32) - low) / (high - low), 0, 1) * 255)


def window_around(reference: np.ndarray, plane: Plane, most: float) -> tuple[Window, float]:
    """The Window to magnify, around the largest part of a mask in a plane, and its side in mm, `most` at most.

    It stays within the plane: at a border the lesion isn't in its middle, and in a narrow plane it is no square.
    """
    low, high = np.zeros(2), plane.extent
    if reference.any():
        box = bounding_box(components(reference != 0) == 1)
        low, high = np.array([[s.start, s.stop] for s in box]).T * plane.mm
    side = min(max(ZOOM, (high - low).max() + 2 * AROUND), most)
    size = np.minimum(side, plane.extent)
    return Window(np.clip((low + high - size) / 2, 0, plane.extent - size), size), side


def draw_plane(
    plane: Plane, window: Window, scale: float, width: int, frame: Window | None = None
) -> "PIL.Image.Image":
    """PIL picture of a window of a plane, FRAME pixels around it; scale: pixels per mm; width: pixels of an outline."""
    from PIL import Image, ImageDraw

    height_width = np.maximum(np.rint(window.size * scale), 1).astype(int)
    corners = np.concatenate([window.low / plane.mm, (window.low + window.size) / plane.mm])  # top, left, bottom, right
    shown = np.minimum(corners, np.tile(plane.grey.shape, 2))[
        [1, 0, 3, 2]
    ]  # rounding must not reach beyond the picture
    grey = Image.fromarray(plane.grey).resize(height_width[::-1].tolist(), Image.Resampling.BILINEAR, shown.tolist())
    picture = Image.new("RGB", (height_width[::-1] + 2 * FRAME).tolist(), DARK)
    picture.paste(grey, (FRAME, FRAME))
    if frame is not None:
        top, left, bottom, right = (np.concatenate([frame.low, frame.low + frame.size]) * scale + FRAME).round()
        ImageDraw.Draw(picture).rectangle([left - 1, top - 1, right, bottom], outline=GREY)
    pixels = np.array(picture)
    lines = [
        outline(mask, window.low / plane.mm, plane.mm * scale, pixels.shape[:2], width)
        for mask in (plane.label, plane.predicted)
    ]
    pixels[lines[0]], pixels[lines[1]], pixels[lines[0] & lines[1]] = GREEN, RED, YELLOW
    return Image.fromarray(pixels)


def outline(mask: np.ndarray, low: np.ndarray, zoom: np.ndarray, shape: Sequence[int], width: int) -> np.ndarray:
    """(rows, columns) bool: lines of `width` pixels on the faces between voxels of different classes, and at the
    border.

    mask: (rows, columns) classes; low: (2,) the voxel coordinates of the picture's corner within FRAME
    zoom: (2,) pixels per voxel; shape: of the picture with FRAME
    """
    lines, padded = np.zeros(shape, bool), np.pad(mask, 1)
    for axis in range(2):  # along which both voxels of a face are neighbours
        inner = padded[:, 1:-1] if axis == 0 else padded[1:-1]
        starts = np.argwhere(np.diff(inner.astype(np.int16), axis=axis))  # (N, 2) corners of voxels behind the faces
        ends = starts + (np.arange(2) != axis)
        starts, ends = [np.rint((corners - low) * zoom).astype(int) + FRAME - width // 2 for corners in (starts, ends)]
        for (top, left), (bottom, right) in zip(np.maximum(starts, 0), np.maximum(ends + width, 0)):
            lines[top:bottom, left:right] = True
    return lines
