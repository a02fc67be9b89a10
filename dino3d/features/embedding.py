"""One vector for each volume: what the encoder's last blocks make of it, the same to the last bit every time."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import numpy as np
import torch
from torch import Tensor

from augmentations import scale_intensity
from dino3d.command_line import available_cores, format_values
from dino3d.data.conventions import DataError, Stored
from dino3d.features.encoder import PretrainedEncoder
from dino3d.features.pooling import embed, orientation_problem, orientations, reads_centre
from dino3d.features.windows import CtScan, Region, read_ct, region_of
from vision_transformer import Encoder


class Embedder:
    """Windows through encoders, to the same bits whatever else is computed beside them; a context manager.

    A matrix product rounds in another order for another batch, position in it, or number of threads. So on a CPU each
    window is alone in its batch and has one thread, of which several work on different windows; on a GPU the batches
    are of one region, from its first window on.

    encoders: built, of one geometry; clip_range: (2,) HU that become 0 and 1; autocast: gives the context they run in
    threads: windows at once on a CPU; batch_size: windows at once on a GPU
    tta: `orientations` of each window, whose mean is taken (test-time augmentation)
    """

    def __init__(
        self,
        encoders: Sequence[Encoder],
        clip_range: Sequence[float],
        pool: str = "cls",
        layers: int = 1,
        device: torch.device | str = "cpu",
        autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        threads: int = 1,
        batch_size: int = 32,
        tta: int = 1,
    ) -> None:
        self.device = torch.device(device)
        self.encoders = [encoder.to(self.device).eval() for encoder in encoders]
        self.clip_range, self.pool, self.layers, self.autocast, self.tta = clip_range, pool, layers, autocast, tta
        self.batch_size = 1 if self.device.type == "cpu" else batch_size
        # The number of threads is each thread's own
        self._threads = ThreadPoolExecutor(max(1, threads), initializer=lambda: torch.set_num_threads(1))
        self._ahead = 2 * max(1, threads)

    def __call__(self, windows: Iterable[np.ndarray], before: Callable[[], None] = lambda: None) -> np.ndarray:
        """(encoders, F) float32 mean over windows, each (x, y, z) int16 HU. before: called before each batch; what it
        raises ends the work"""
        totals, count, waiting = None, 0, []
        for batch in _batches(windows, self.batch_size):
            before()
            waiting.append(self._threads.submit(self._embed, batch))
            count += len(batch)
            if len(waiting) > self._ahead:
                totals = waiting[0].result() if totals is None else totals + waiting[0].result()
                del waiting[0]
        for one in waiting:
            totals = one.result() if totals is None else totals + one.result()
        return (totals / count).astype(np.float32)

    def _embed(self, batch: list[np.ndarray]) -> np.ndarray:
        """(encoders, F) float64 sum over the windows of a batch."""
        with torch.inference_mode(), self.autocast():
            hu = torch.from_numpy(np.stack(batch)).to(self.device)  # (B, x, y, z)
            volumes = scale_intensity(hu, *self.clip_range)[:, None]  # (B, 1, x, y, z)
            return torch.stack([self._sum(encoder, volumes) for encoder in self.encoders]).cpu().numpy()

    def _sum(self, encoder: Encoder, volumes: Tensor) -> Tensor:
        """(F,) float64 sum over volumes (B, 1, x, y, z), each the mean over its orientations."""
        turned = orientations(volumes, self.tta)
        found = [embed(encoder, one, self.pool, self.layers).double().sum(0) for one in turned]
        return torch.stack(found).mean(0)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _batches(windows: Iterable[np.ndarray], size: int) -> Iterable[list[np.ndarray]]:
    batch = []
    for window in windows:
        batch.append(window)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def region_to_embed(
    scan: CtScan,
    encoder: PretrainedEncoder,
    pool: str,
    tta: int,
    region: str = "auto",
    point: Sequence[float] | None = None,
    source: str = "the volume",
) -> Region:
    """The Region of a scan that an encoder makes a vector of. Raises DataError as `region_of` does, and for windows
    that have no middle to read, or no `orientations`."""
    found = region_of(scan, encoder.input_size, encoder.working_spacing, region, point, source)
    if found.how == "whole" and reads_centre(pool):
        raise DataError(
            source,
            f"is larger than a crop, and pool {pool} reads the middle of one: give points in it, or region centre for "
            "its own middle",
        )
    if problem := orientation_problem(found.size, found.spacing, tta):
        raise DataError(source, f"tta {tta} {problem}; they are of {format_values(found.spacing)} mm")
    return found


def embed_volume(
    encoder: PretrainedEncoder,
    hu: np.ndarray,
    affine: np.ndarray,
    pool: str = "cls",
    layers: int = 1,
    region: str = "auto",
    point: Sequence[float] | None = None,
    tta: int = 1,
) -> np.ndarray:
    """(F,) float32 embedding of a CT, an (X, Y, Z) array of HU with its affine (4, 4) to RAS mm in any orientation.

    encoder: of `load_encoder`; pool, layers: see `pooling.embed`; region, point: see `windows.region_of`; tta: see
    `Embedder`
    It is what extract_features.py writes of the same scan. Raises DataError for what is no CT in HU, and as
    `region_to_embed`; ValueError for another pool or tta.
    """
    hu = np.asarray(hu)
    stored = Stored(hu.shape, np.asarray(affine, float), lambda slices: hu[slices])
    scan = read_ct("the volume", stored)
    chosen = region_to_embed(scan, encoder, pool, tta, region, point)
    with Embedder([encoder.build()], encoder.clip_range, pool, layers, threads=available_cores(), tta=tta) as embedder:
        return embedder(chosen.windows())[0]
