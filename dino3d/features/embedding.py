"""One vector for each volume: what the encoder's last blocks make of it, the same to the last bit every time."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import numpy as np
import torch
from torch import Tensor

from augmentations import scale_intensity
from dino3d.command_line import available_cores
from dino3d.data.conventions import Stored
from dino3d.features.encoder import PretrainedEncoder
from dino3d.features.windows import read_ct, region_of
from vision_transformer import Encoder

POOLS = ("cls", "mean", "cls+mean")


def embed(encoder: Encoder, volumes: Tensor, pool: str = "cls", layers: int = 1) -> Tensor:
    """(B, F) embeddings of volumes (B, 1, X, Y, Z) with values in [0, 1], of a ViT each after the final norm.

    pool: cls: the class tokens of the last `layers` blocks; mean: the means of their patch tokens; cls+mean: those
        class tokens and the mean of the last block's patch tokens (Caron 2021, linear evaluation). Without class
        tokens cls is what mean is, and cls+mean would be the same twice
    Blocks come shallowest first. Raises ValueError for another pool, and for more layers than the encoder has blocks.
    """
    if pool_problem(encoder, pool):
        raise ValueError(f"pool is {pool}; {pool_problem(encoder, pool)}")
    if pool == "cls" and layers == 1:
        return encoder(volumes)  # (B, D); spares the last block what nothing would read
    if pool == "mean":
        return torch.cat([one.flatten(2).mean(2) for one in encoder.get_intermediate_layers(volumes, layers, True)], 1)
    blocks = encoder.embeddings_and_maps(volumes, layers)  # of each ((B, D), (B, D, x, y, z))
    parts = [embedding for embedding, _ in blocks]
    return torch.cat(parts + ([blocks[-1][1].flatten(2).mean(2)] if pool == "cls+mean" else []), 1)


def pool_problem(encoder: Encoder, pool: str) -> str:
    """Why an encoder has no such `embed`, or ""."""
    if pool not in POOLS:
        return f"expected one of {', '.join(POOLS)}"
    if pool == "cls+mean" and not encoder.has_class_token:
        return "the encoder has no class token, its embedding is the mean of its last map: both would be the same"
    return ""


def embedding_width(encoder: Encoder, pool: str, layers: int) -> int:
    """F of `embed`."""
    depth = len(encoder.blocks)
    widths = [next((s.channels for s in encoder.stages if i <= s.block), encoder.embed_dim) for i in range(depth)]
    return sum(widths[-layers:]) + (pool == "cls+mean") * encoder.embed_dim


class Embedder:
    """Windows through encoders, to the same bits whatever else is computed beside them; a context manager.

    A matrix product rounds in another order for another batch, position in it, or number of threads. So on a CPU each
    window is alone in its batch and has one thread, of which several work on different windows; on a GPU the batches
    are of one region, from its first window on.

    encoders: built, of one geometry; clip_range: (2,) HU that become 0 and 1; autocast: gives the context they run in
    threads: windows at once on a CPU; batch_size: windows at once on a GPU
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
    ) -> None:
        self.device = torch.device(device)
        self.encoders = [encoder.to(self.device).eval() for encoder in encoders]
        self.clip_range, self.pool, self.layers, self.autocast = clip_range, pool, layers, autocast
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
            found = [embed(encoder, volumes, self.pool, self.layers) for encoder in self.encoders]
            return torch.stack([one.double().sum(0) for one in found]).cpu().numpy()

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


def embed_volume(
    encoder: PretrainedEncoder,
    hu: np.ndarray,
    affine: np.ndarray,
    pool: str = "cls",
    layers: int = 1,
    region: str = "auto",
    point: Sequence[float] | None = None,
) -> np.ndarray:
    """(F,) float32 embedding of a CT, an (X, Y, Z) array of HU with its affine (4, 4) to RAS mm in any orientation.

    encoder: of `load_encoder`; pool, layers: see `embed`; region, point: see `windows.region_of`
    It is what extract_features.py writes of the same scan. Raises DataError for what is no CT in HU.
    """
    hu = np.asarray(hu)
    stored = Stored(hu.shape, np.asarray(affine, float), lambda slices: hu[slices])
    scan = read_ct("the volume", stored)
    chosen = region_of(scan, encoder.input_size, encoder.working_spacing, region, point)
    with Embedder([encoder.build()], encoder.clip_range, pool, layers, threads=available_cores()) as embedder:
        return embedder(chosen.windows())[0]
