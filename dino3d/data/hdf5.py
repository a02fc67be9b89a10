"""ITK HDF5 files: what a conversion writes, in chunks that random crops are read from quickly."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np

from dino3d.data.chunks import ENTRY, MOST_HEAD, ChunkIndex, ChunkReader, is_readable
from dino3d.data.conventions import LPS, DataError, Stored
from dino3d.data.geometry import SHEAR, length_notes
from dino3d.data.sidecar import identity_of
from dino3d.files import atomic_write

CHUNK = 32  # voxels per side of a chunk: a random crop then touches few bytes besides its own
FILTERS = {
    "blosc": lambda: hdf5plugin.Blosc(cname="lz4", clevel=5, shuffle=hdf5plugin.Blosc.BITSHUFFLE),
    "gzip": lambda: {"compression": "gzip", "compression_opts": 4},
    "none": dict,
}


def open_hdf5(path: Path | str, closing: contextlib.ExitStack) -> Stored:
    """The Stored of an ITK HDF5 file, without trailing axes of one voxel. Raises DataError.

    closing: closes the file
    """
    voxels, affine, notes = _open_image(path, closing)

    def take(slices: tuple[slice, ...]) -> np.ndarray:
        return voxels[(*[0] * (voxels.ndim - 3), *slices[::-1])].T

    return Stored(voxels.shape[::-1][:3], affine, take, notes, converted=_is_converted(voxels))


def _open_image(path: Path | str, closing: contextlib.ExitStack) -> tuple[h5py.Dataset, np.ndarray, tuple[str, ...]]:
    """(voxels (..., z, y, x), affine (4, 4) to RAS mm, notes) of an ITK HDF5 file. Raises DataError."""
    file = closing.enter_context(h5py.File(path, "r", locking=False))  # read-only: no lock, which NFS may refuse
    names = ("VoxelData", "Spacing", "Origin", "Directions")
    image = file.get("ITKImage/0")
    missing = [name for name in names if image is None or name not in image]
    if missing:
        raise DataError(path, f"has no ITKImage/0/{missing[0]}: not an ITK HDF5 image")
    voxels, spacing, origin, directions = (image[name] for name in names)
    n = spacing.size  # axes
    fits = spacing.shape == (n,) and origin.shape == (n,) and directions.shape == (n, n) and voxels.ndim == n
    if not fits or n < 3 or any(size != 1 for size in voxels.shape[: n - 3]):
        raise DataError(
            path,
            f"has {n} spacings and voxels of shape {voxels.shape} (z, y, x), expected a 3D volume with one value per "
            "voxel",
        )
    affine = np.eye(4)
    affine[:3, :3] = directions[:3, :3].T * spacing[:3]  # the rows of Directions are the axis vectors
    affine[:3, 3] = origin[:3]

    return voxels, LPS @ affine, length_notes(directions[:3, :3].T)


def _is_converted(voxels: h5py.Dataset) -> bool:
    """Whether voxels lie as `write_volume` lays them out."""
    return voxels.chunks == tuple(min(CHUNK, n) for n in voxels.shape)


def index_chunks(path: Path | str) -> ChunkIndex | None:
    """Where the chunks of a file of `write_volume` lie; None for files and filters that can't be read by it.

    All voxels are read by it once and compared with what HDF5 reads. Raises DataError, OSError.
    """
    with contextlib.ExitStack() as closing:
        voxels, affine, notes = _open_image(path, closing)
        created, sides = voxels.id.get_create_plist(), voxels.chunks
        filters = tuple(created.get_filter(number)[0] for number in range(created.get_nfilters()))
        if voxels.ndim != 3 or not _is_converted(voxels) or not is_readable(sides, voxels.dtype, filters):
            return None
        if voxels.file.userblock_size:  # which offsets do not count
            return None
        table = np.zeros([-(-n // side) for n, side in zip(voxels.shape, sides)], ENTRY)

        def enter(chunk: h5py.h5d.StoreInfo) -> None:
            place = tuple(at // side for at, side in zip(chunk.chunk_offset, sides))
            table[place] = (chunk.byte_offset, 0, chunk.size, chunk.filter_mask, 0)

        voxels.id.chunk_iter(enter)
        if not table["size"].all():  # not all of them were written
            return None
        file = closing.enter_context(open(path, "rb"))
        head = int(table["offset"].min())
        if head > MOST_HEAD:
            return None
        index = ChunkIndex(tuple(identity_of(file, head)), voxels.shape, sides, filters, affine, notes, table.ravel())
        reader = ChunkReader(path, file.fileno(), index)
        for z in range(len(table)):  # chunk by chunk would ask HDF5 for each of them many times
            whole = voxels[z * sides[0] : (z + 1) * sides[0]]
            places = np.ndindex(*table.shape[1:])
            for (y, x), (entry, found) in zip(places, reader.decode(table[z].ravel(), new=True)):
                part = whole[:, y * sides[1] : (y + 1) * sides[1], x * sides[2] : (x + 1) * sides[2]]
                if not np.array_equal(found.reshape(sides)[tuple(map(slice, part.shape))], part):
                    return None
                table[z, y, x] = (*entry[:-1], found.min())
    return index._replace(table=table.ravel())


def read_group(path: Path | str, name: str) -> dict[str, np.ndarray]:
    """{name: array} of the data sets in a group at the root of an HDF5 file, {} without such a one. Raises OSError."""
    with h5py.File(path, "r", locking=False) as file:
        group = file.get(name)
        return {key: part[()] for key, part in group.items()} if isinstance(group, h5py.Group) else {}


def write_volume(
    path: Path | str,
    volume: np.ndarray,
    affine: np.ndarray,
    compression: str = "blosc",
    groups: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> None:
    """Write an ITK HDF5 file in chunks made for random crops, under a temporary name until it is whole.

    volume: (X, Y, Z) int16 HU; affine: (4, 4) to RAS mm, whose axes must be orthogonal (ITK stores no shear).
    compression: "blosc" (LZ4 with bitshuffle: fastest, opens wherever hdf5plugin is installed), or "gzip" or "none"
    for files that ITK itself must open. groups: {name: {name: array}} besides the image, which ITK passes over.
    Raises ValueError for a volume or affine of another kind, OSError.
    """
    volume, affine = np.asarray(volume), np.asarray(affine, float)
    if volume.dtype != np.int16 or volume.ndim != 3 or not volume.size:
        raise ValueError(f"{path}: can't write a {volume.ndim}D {volume.dtype} array {volume.shape}, expected 3D int16")
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not (spacing > 0).all():
        raise ValueError(f"{path}: the affine {affine.tolist()} has an axis without length")
    directions = (lps[:3, :3] / spacing).T
    if not np.allclose(directions @ directions.T, np.eye(3), atol=SHEAR):
        raise ValueError(f"{path}: the axes of the affine are not orthogonal, which ITK images can't store")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.ascontiguousarray(volume.T)  # (z, y, x)
    with fill_hdf5(path) as file:
        file["ITKVersion"], file["HDFVersion"] = ["5.4"], [f"HDF5 library version: {h5py.version.hdf5_version}"]
        image = file.create_group("ITKImage/0")
        image["Dimension"] = np.array(volume.shape, np.uint64)
        image["Directions"], image["Origin"], image["Spacing"] = directions, lps[:3, 3], spacing
        image["VoxelType"] = ["SHORT"]
        image.create_group("MetaData")
        image.create_dataset(
            "VoxelData", data=voxels, chunks=tuple(min(CHUNK, n) for n in voxels.shape), **FILTERS[compression]()
        )
        for group, parts in (groups or {}).items():
            for name, array in parts.items():
                file[f"{group}/{name}"] = array


@contextlib.contextmanager
def fill_hdf5(path: Path | str, **options: bool) -> Iterator[h5py.File]:
    """An HDF5 file to fill, which is on disk, whole, when the block has ended without an error. Raises OSError.

    options: of h5py.File. In memory first: on a full disk plain writing raises OSError, but the HDF5 library may end
    the process.
    """
    with h5py.File(path, "w", driver="core", backing_store=False, **options) as file:
        yield file
        file.flush()
        with atomic_write(path) as part:
            part.write_bytes(file.id.get_file_image())
