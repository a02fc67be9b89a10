"""Prediction of points in whole CTs: each scan is opened once, its crops are cut in memory as conversion cuts them."""

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from augmentations import scale_intensity
from dino3d.command_line import UserError, available_cores, format_values
from dino3d.data.conventions import AIR, VOLUME_SUFFIXES, DataError, is_kind, stem
from dino3d.data.images import voxels_of
from dino3d.data.points import AXES, Point, crop_around, open_ct, read_points, scans_of_series, why_no_scan
from dino3d.data.requirements import no_image
from dino3d.data.resampling import MAY_BE_RAS
from dino3d.data.scans import Scan
from dino3d.data.volume import padded
from dino3d.files import read_rows
from dino3d.finetune.crops import centre_window, read_ahead
from dino3d.finetune.inference import Known
from dino3d.finetune.prediction import Predictions
from dino3d.finetune.runtime import Runtime
from dino3d.training.checkpoint import StopRequested

LABEL_COLUMNS = ("class", "label")  # that are told to play no part
RAS_SHARE = 0.5  # of the points outside their scans that would lie inside as RAS, from which on a line says so


class PointScan(NamedTuple):
    """A scan and its Points, in the table's order; problem: why it can't be opened."""

    series: str
    path: str
    points: list[Point]
    problem: str = ""


class PointCrops(NamedTuple):
    """How crops are cut and seen. size: (3,) voxels; spacing: (3,) mm, None: the scan's own; window: (3,) voxels that
    the network sees in a crop's middle; clip_range: HU"""

    size: Sequence[int]
    spacing: Sequence[float] | None
    window: Sequence[int]
    clip_range: Sequence[float]


def find_points(table: str, source: str, output_dir: Path) -> tuple[list[PointScan], list[str]]:
    """([PointScan] for each series of a table of points, lines on what is passed over).

    source: folder with the scans, named by their series or DICOM, or one volume file. Raises UserError.
    """
    try:
        points = read_points(table)
        ignored = [name for name in LABEL_COLUMNS if name in next(read_rows(table, ["seriesuid"], LABEL_COLUMNS))[1]]
    except OSError as error:
        raise UserError(f"--points {table}: can't be read ({error.strerror or error})") from error
    lines = [f"note: the column {name} of {table} plays no part" for name in ignored]
    if Path(source).is_file() and is_kind(source, VOLUME_SUFFIXES):
        root, found, refused = str(Path(source).parent), {stem(source): [Scan(Path(source).name, [])]}, {}
    else:
        root = source
        try:
            found, refused = scans_of_series(source, [output_dir], set(points), available_cores())
        except (DataError, UserError) as error:
            raise UserError(f"--predict {error}") from error
    without = len(found.keys() - points.keys())
    if without:
        lines.append(f"note: scans below {source} without a point in {table}: {without}")
    scans = []
    for series, of_series in points.items():
        problem = why_no_scan(found.get(series, []), refused.get(series, ""), source)
        path = str(Path(root, series if problem else found[series][0].name))
        scans.append(PointScan(series, path, of_series, problem))
    return scans, lines


def known_points(scans: Sequence[PointScan]) -> list[list[Known]]:
    """What is known of the rows of each scan's points: their place in the table and, if they have any, coordinates."""
    return [[Known(point.line, point.position or ("",) * len(AXES)) for point in one.points] for one in scans]


def points_recipe(scans: Sequence[PointScan]) -> dict[str, Any]:
    """What a prediction depends on of the points."""
    text = repr([(one.series, [(point.line, point.position, point.problem) for point in one.points]) for one in scans])
    return {"points": f"{zlib.crc32(text.encode(errors='surrogateescape')):08x}"}


def predict_points(
    rows_of: Callable[[Tensor], list[list[Any]]],
    scans: Sequence[PointScan],
    crops: PointCrops,
    predictions: Predictions,
    runtime: Runtime,
) -> None:
    """Add the rows of the points of each scan, until a signal comes. rows_of: as `prediction.predict_windows` takes"""
    mine = predictions.share()

    def open_scan(at: int) -> tuple[sitk.Image, list[str]] | DataError:
        try:
            if scans[at].problem:
                raise DataError(scans[at].path, scans[at].problem)
            return open_ct(scans[at].path)
        except DataError as error:
            return error

    opened = read_ahead(open_scan, mine, 1, 1)  # the next scans while one is predicted
    with ThreadPoolExecutor(max(1, runtime.workers)) as pool, contextlib.suppress(StopRequested):
        for at, (found,) in zip(mine, opened):
            predictions.attempt(at, lambda at=at, found=found: _rows(rows_of, scans[at], found, crops, pool, runtime))


def _rows(
    rows_of: Callable[[Tensor], list[list[Any]]],
    scan: PointScan,
    found: tuple[sitk.Image, list[str]] | DataError,
    crops: PointCrops,
    pool: ThreadPoolExecutor,
    runtime: Runtime,
) -> list[list[Any] | str]:
    """The row of each point of a scan, or the reason why it has none. Raises DataError, StopRequested."""
    runtime.stop_signal.check()
    if isinstance(found, DataError):
        raise found
    image, notes = found
    for note in notes:
        print(f"note: {scan.series}: {note}", flush=True)

    def window_of(point: Point) -> np.ndarray | str:
        try:
            return window_at(image, point, crops)
        except DataError as error:
            return error.reason

    rows = []
    for first in range(0, len(scan.points), runtime.batch_size):
        runtime.stop_signal.check()
        windows = list(pool.map(window_of, scan.points[first : first + runtime.batch_size]))
        good = [window for window in windows if not isinstance(window, str)]
        made: Iterator[list[Any]] = iter(())
        if good:
            batch = torch.from_numpy(np.stack(good)).to(runtime.processes.device)
            with torch.no_grad(), runtime.autocast():
                made = iter(rows_of(scale_intensity(batch, *crops.clip_range)[:, None]))  # (B, 1, X, Y, Z)
        rows += [window if isinstance(window, str) else next(made) for window in windows]
    for line in coordinate_lines(scan, rows):
        print(line, flush=True)
    return rows


def window_at(image: sitk.Image, point: Point, crops: PointCrops) -> np.ndarray:
    """(x, y, z) int16 HU that the network sees of the crop that conversion would write. Raises DataError."""
    crop = np.maximum(voxels_of(crop_around(image, point, crops.size, crops.spacing, "")), AIR)
    if fault := no_image(crop):
        raise DataError("", fault)
    whole = np.maximum(crop.shape, crops.window)

    def inside(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return crop[tuple(map(slice, low, high))]

    return centre_window(padded(inside, crop.shape, (crop.shape - whole) // 2, whole), crops.window)


def coordinate_lines(scan: PointScan, rows: Sequence[list[Any] | str]) -> list[str]:
    """[] or [one line]: points outside a scan that would lie inside it with x and y the other way round, as in RAS."""
    outside = [p.position for p, row in zip(scan.points, rows) if isinstance(row, str) and row.startswith("outside")]
    inside = sum(isinstance(row, str) and row.endswith(MAY_BE_RAS) for row in rows)
    if not outside or inside <= RAS_SHARE * len(outside):
        return []
    return [
        f"warning: {scan.series}: {len(outside)} of {len(rows)} points lie outside, such as "
        f"{format_values(outside[0])}, but inside with x and y negated: are they RAS, as of 3D Slicer? Expected LPS"
    ]
