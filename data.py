"""CT volumes on disk: the HDF5 format, what is found below a folder, and the patches that pre-training reads.

Volumes are (X, Y, Z) arrays of int16 Hounsfield units in RAS: indices grow towards the patient's right, anterior and
superior side. Affines are 4 x 4, from voxel indices to RAS millimetres. Files may lie in any orientation: what is
read from them is flipped and its axes swapped (never interpolated) to the nearest RAS axes.
"""
import contextlib
import os
import re
import threading
from pathlib import Path
from typing import NamedTuple

import h5py
import hdf5plugin
import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, get_worker_info

from augmentations import PATCH_VIEW, collate_views, keyed_rng

AIR = -1024  # HU; what lies outside a volume, and the floor for padding values of -2000 to -3024
SUFFIXES = (".hdf5", ".h5", ".nii", ".nii.gz")  # what Volume reads
CHUNK = 32   # voxels per side of a chunk: a random crop then touches few bytes besides its own
RUN = 8      # patches of one volume that follow each other in an epoch, read with one opening of its file
FILTERS = {
    "blosc": lambda: hdf5plugin.Blosc(cname="lz4", clevel=5, shuffle=hdf5plugin.Blosc.BITSHUFFLE),
    "gzip": lambda: {"compression": "gzip", "compression_opts": 4},
    "none": dict,
}
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's world has x and y the other way round


class DataError(Exception):
    """A file that can't be used: which, what was found in it and what was expected."""

    def __init__(self, path, reason):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason


# -------------------------------------------------------------------------------------------------------- one volume


class Volume:
    """A volume on disk in RAS, of which parts can be read; a context manager that closes the file.

    shape: (3,) voxels; spacing: (3,) mm; affine: (4, 4). Raises DataError where the file is no 3D image.
    """

    def __init__(self, path):
        self.path = path
        self._closing = contextlib.ExitStack()
        try:
            opener = _open_hdf5 if is_hdf5(path) else _open_nifti
            with _reading(path):
                shape, affine, self._take = opener(path, self._closing)
            self._orient(shape, affine)
        except DataError:
            self.close()
            raise
        except Exception as error:  # the libraries raise many kinds for a broken file
            self.close()
            raise DataError(path, f"can't be read ({_first_line(error)})") from error

    def _orient(self, shape, affine):
        from nibabel.orientations import inv_ornt_aff, io_orientation
        if len(shape) != 3:
            raise DataError(self.path, f"is a {len(shape)}D image of shape {tuple(shape)}, expected a 3D volume")
        if min(shape) < 1:
            raise DataError(self.path, f"is empty: shape {tuple(shape)}")
        if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise DataError(self.path, "has spacings and directions that span no volume")
        orientation = io_orientation(affine)  # (3, 2): the RAS axis of each axis of the file, and its sign
        self._axes = np.argsort(orientation[:, 0])  # (3,): the file's axis for each RAS axis
        self._signs = orientation[self._axes, 1]
        self.shape = tuple(int(shape[axis]) for axis in self._axes)
        self.affine = affine @ inv_ornt_aff(orientation, shape)
        self.spacing = tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))

    def read(self, start=(0, 0, 0), size=None):
        """(x, y, z) int16 HU from `start` on; what lies outside the volume is air. Default: all of it."""
        return padded(self._read_inside, self.shape, start, self.shape if size is None else size)

    def read_values(self):
        """(X, Y, Z) numbers as they are stored, of whatever type. Raises DataError where they are none."""
        voxels = self._take_oriented(np.zeros(3, int), np.array(self.shape))
        if voxels.dtype.kind not in "iuf":
            raise DataError(self.path, f"has voxels of type {voxels.dtype}, expected numbers")
        return voxels

    def read_labels(self):
        """(X, Y, Z) uint8 classes of a mask. Raises DataError for values that are no whole numbers from 0 to 255."""
        voxels = self.read_values()
        found = np.unique(voxels)
        if not ((found >= 0) & (found <= 255) & (found == np.floor(found))).all():
            wrong = [f"{value:g}" for value in found if not (0 <= value <= 255 and value == np.floor(value))][:3]
            raise DataError(self.path, f"has label values such as {', '.join(wrong)}, expected whole numbers from 0 to 255")
        return voxels.astype(np.uint8)

    def _read_inside(self, low, high):
        voxels = to_int16(self._take_oriented(low, high), self.path)
        ours = type(voxels) is np.ndarray and voxels.flags.writeable and min(voxels.strides) > 0  # no file, and not flipped
        return np.maximum(voxels, AIR, out=voxels if ours else None)

    def _take_oriented(self, low, high):
        slices = [None] * 3
        for axis, sign, n, a, b in zip(self._axes, self._signs, self.shape, low, high):
            slices[axis] = slice(int(a), int(b)) if sign > 0 else slice(int(n - b), int(n - a))
        try:
            with _reading(self.path):
                voxels = self._take(tuple(slices))
        except Exception as error:
            raise DataError(self.path, f"can't be read ({_first_line(error)})") from error
        flips = tuple(slice(None, None, int(sign)) for sign in self._signs)
        return voxels.transpose(self._axes)[flips]

    def is_constant(self):
        """True if all voxels are equal: such a file holds no image. Reads until it sees a second value."""
        first = self.read(size=(1, 1, 1)).item()
        return all((self.read((0, 0, z), (*self.shape[:2], min(CHUNK, self.shape[2] - z))) == first).all()
                   for z in range(0, self.shape[2], CHUNK))

    def close(self):
        self._closing.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def padded(read_inside, shape, start, size):
    """(x, y, z) int16 box of a volume from `start` on, air where it reaches beyond.

    read_inside: gives what lies between (3,) voxels low and high of a volume of this shape
    """
    start, size = np.asarray(start), np.asarray(size)
    low, high = np.clip(start, 0, shape), np.clip(start + size, 0, shape)
    if (high <= low).any():
        return np.full(size, AIR, np.int16)
    inside = read_inside(low, high)
    if (inside.shape == size).all():
        return inside
    box = np.full(size, AIR, np.int16)
    box[tuple(slice(a, b) for a, b in zip(low - start, high - start))] = inside
    return box


def is_hdf5(path):
    return str(path).lower().endswith((".hdf5", ".h5"))


def _open_hdf5(path, closing):
    """(shape, affine, take) in the file's own axis order (x, y, z); take(three slices) gives an array."""
    file = closing.enter_context(h5py.File(path, "r", locking=False))  # read-only: no lock, which NFS may refuse
    names = ("VoxelData", "Spacing", "Origin", "Directions")
    image = file.get("ITKImage/0")
    missing = [name for name in names if image is None or name not in image]
    if missing:
        raise DataError(path, f"has no ITKImage/0/{missing[0]}: not an ITK HDF5 image")
    voxels, spacing, origin, directions = (image[name] for name in names)
    if voxels.ndim != 3 or spacing.shape != (3,) or origin.shape != (3,) or directions.shape != (3, 3):
        raise DataError(path, f"has {spacing.size} spacings and voxels of shape {voxels.shape} (z, y, x), expected a 3D "
                              "volume with one value per voxel")
    affine = np.eye(4)
    affine[:3, :3] = directions[()].T * spacing[()]  # the rows of Directions are the axis vectors
    affine[:3, 3] = origin[()]
    return voxels.shape[::-1], LPS @ affine, lambda slices: voxels[slices[::-1]].T


def _open_nifti(path, closing):
    import nibabel
    image = nibabel.load(path)
    return image.shape, image.affine, lambda slices: np.asanyarray(image.dataobj[slices])


def to_int16(voxels, path):
    """An array of numbers, rounded and clamped to int16; itself if it is. Raises DataError for NaN or other types."""
    if voxels.dtype == np.int16:
        return voxels
    if voxels.dtype.kind not in "iuf":
        raise DataError(path, f"has voxels of type {voxels.dtype}, expected numbers")
    if voxels.dtype.kind == "f":
        if not np.isfinite(voxels).all():
            raise DataError(path, "has voxels that are NaN or infinite")
        voxels = np.rint(voxels)
    return np.clip(voxels, -32768, 32767).astype(np.int16)


def _first_line(error):
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)  # libraries put paths and much else around it
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def write_volume(path, volume, affine, compression="blosc"):
    """Write an ITK HDF5 file in chunks made for random crops, under a temporary name until it is whole.

    volume: (X, Y, Z) int16 HU; affine: (4, 4) to RAS mm, whose axes must be orthogonal (ITK stores no shear).
    compression: "blosc" (LZ4 with bitshuffle: fastest, opens wherever hdf5plugin is installed), or "gzip" or "none"
    for files that ITK itself must open. Raises ValueError for a volume or affine of another kind, OSError.
    """
    volume, affine = np.asarray(volume), np.asarray(affine, float)
    if volume.dtype != np.int16 or volume.ndim != 3 or not volume.size:
        raise ValueError(f"{path}: can't write a {volume.ndim}D {volume.dtype} array {volume.shape}, expected 3D int16")
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not (spacing > 0).all():
        raise ValueError(f"{path}: the affine {affine.tolist()} has an axis without length")
    directions = (lps[:3, :3] / spacing).T
    if not np.allclose(directions @ directions.T, np.eye(3), atol=1e-3):
        raise ValueError(f"{path}: the axes of the affine are not orthogonal, which ITK images can't store")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    voxels = np.ascontiguousarray(volume.T)  # (z, y, x)
    try:
        # In memory first: on a full disk plain writing raises OSError, which the HDF5 library can't be trusted to do
        with h5py.File(part, "w", driver="core", backing_store=False) as file:
            file["ITKVersion"], file["HDFVersion"] = ["5.4"], [f"HDF5 library version: {h5py.version.hdf5_version}"]
            image = file.create_group("ITKImage/0")
            image["Dimension"] = np.array(volume.shape, np.uint64)
            image["Directions"], image["Origin"], image["Spacing"] = directions, lps[:3, 3], spacing
            image["VoxelType"] = ["SHORT"]
            image.create_group("MetaData")
            image.create_dataset("VoxelData", data=voxels, chunks=tuple(min(CHUNK, n) for n in voxels.shape),
                                 **FILTERS[compression]())
            file.flush()
            part.write_bytes(file.id.get_file_image())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------- storage that hangs


_reading = contextlib.nullcontext  # in a loader worker: notes the file that is being read, see ReadWatch


class ReadWatch:
    """Notices a file that is being read for too long: loader workers note what they are at, and a thread looks on.

    workers: of the loader; a process that reads itself can't be looked after, as HDF5 lets no other thread run meanwhile
    seconds: that an opening or a read may take
    end: called from that thread with what to tell. It has to end the process without waiting for the workers: not even
    SIGKILL reaches one that the system holds in a read.
    at_start: a worker_init_fn besides
    """

    LONGEST = 1000  # bytes that are kept of a path, the last ones

    def __init__(self, workers, seconds, end, at_start=None):
        self.seconds, self.end, self.at_start = seconds, end, at_start
        self.counts = torch.zeros(workers, dtype=torch.int64).share_memory_()  # odd: in a read
        self.paths = torch.zeros(workers, self.LONGEST, dtype=torch.uint8).share_memory_()

    def start_worker(self, worker):
        """Let this process note, as that worker, all that it reads."""
        global _reading

        @contextlib.contextmanager
        def reading(path):
            name = os.fsencode(path)[-self.LONGEST:]
            self.paths[worker] = torch.frombuffer(bytearray(name.ljust(self.LONGEST, b"\0")), dtype=torch.uint8)
            self.counts[worker] += 1
            try:
                yield
            finally:
                self.counts[worker] += 1
        _reading = reading
        if self.at_start:
            self.at_start(worker)

    @contextlib.contextmanager
    def running(self):
        done = threading.Event()
        threading.Thread(target=self._look_on, args=(done,), daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def _look_on(self, done):
        """Looks are counted and no clock is read: a job that was suspended for a day has not waited for its files."""
        pause = min(self.seconds / 10, 5)
        before, same = self.counts.clone(), torch.zeros_like(self.counts)
        while not done.wait(pause):
            now = self.counts.clone()
            same = torch.where((now == before) & (now % 2 == 1), same + 1, 0)
            worker, before = int(same.argmax()), now
            if same[worker] * pause >= self.seconds:
                path = os.fsdecode(bytes(self.paths[worker].tolist()).rstrip(b"\0"))
                self.end(f"{path}: loader worker {worker} has been reading it for {self.seconds:g} s: the storage hangs. See "
                         "to it and start again, which goes on, or raise --read_timeout (0: wait without end)")


def watched(loader, seconds, end):
    """An iterator over a DataLoader's batches, which calls end(message) where one file is read for `seconds` (0: never)."""
    if not loader.num_workers or not seconds:
        return iter(loader)
    watch = ReadWatch(loader.num_workers, seconds, end, loader.worker_init_fn)
    loader.worker_init_fn = watch.start_worker
    batches = iter(loader)  # here, so that the workers start at once

    def give():
        with watch.running():
            yield from batches
    return give()


# ----------------------------------------------------------------------------------------------------- many volumes


def walk_files(folder, fail):
    """(subfolder, names of its files) below a folder, sorted; hidden files and folders are left out.

    Links to folders are followed, each real folder once. fail: called with the OSError of a folder that can't be listed.
    """
    seen = set()
    for here, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield here, sorted(name for name in files if not name.startswith("."))


def find_volumes(folder):
    """Paths of all volumes below a folder, relative to it and sorted; hidden files and folders are left out.

    Raises DataError for a folder that is missing, no folder, or can't be listed: going on without it would silently
    leave out patients.
    """
    if not os.path.isdir(folder):
        raise DataError(folder, "is a file, expected a folder" if os.path.exists(folder) else "no such folder")

    def fail(error):
        raise DataError(error.filename, f"can't be listed ({error.strerror})") from error
    return sorted(os.path.relpath(os.path.join(here, name), folder) for here, names in walk_files(folder, fail)
                  for name in names if name.lower().endswith(SUFFIXES))


def read_data_list(path, folder=None):
    """Paths in a text file, one per line; relative ones belong to `folder` or, without it, to the list's own folder.

    Empty lines and lines that start with # are passed over. Raises DataError.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(path, f"can't be read as a list of files ({_first_line(error)})") from error
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return [os.path.join(folder or os.path.dirname(path), name) for name in names]


def list_volumes(folder, index):
    """Paths of all volumes below `folder`, from the file `index` if an earlier call made it for this folder.

    Finding 100,000 files on a network drive takes minutes, so what was found is kept in `index`, which is a list that
    `read_data_list` reads. Remove it to look again.
    """
    header = f"# volumes below {os.path.abspath(folder)}"
    index = Path(index)
    if index.is_file():
        with open(index, errors="replace") as file:
            if file.readline().rstrip("\n") == header:
                return read_data_list(index, folder)
    names = find_volumes(folder)
    if names:
        part = index.with_name(index.name + ".part")
        lines = ["./" + name if name.startswith("#") else name for name in names]  # and no comment
        part.write_text("\n".join([header, *lines]) + "\n")
        os.replace(part, index)
    return [os.path.join(folder, name) for name in names]


# ----------------------------------------------------------------------------------------- the layouts with labels


class Crop(NamedTuple):
    """A labelled crop: file, class, whose it is, and the subset folder that it lies in."""
    path: str
    label: int
    patient: str
    subset: str


class Pair(NamedTuple):
    """A case for segmentation: its name, and the files of its image and of its label."""
    name: str
    image: str
    label: str


def stem(path):
    """Name of a volume's file without folders and suffix: scan for a/scan.nii.gz."""
    name = os.path.basename(path)
    return next((name[:-len(suffix)] for suffix in SUFFIXES if name.lower().endswith(suffix)), name)


def find_crops(folder):
    """(Crops, DataErrors) of `subset*/label<k>/<patient>/<name>.nii.gz`, sorted; label folders may be named <k> alone.

    The errors are all that keeps the folder from being trained on as it is, as far as names tell. Raises DataError for
    a folder that is missing or can't be listed.
    """
    names, problems, crops = find_volumes(folder), [], []
    for subset in sorted(name for name in os.listdir(folder) if name.startswith("subset")):
        if not os.path.isdir(os.path.join(folder, subset)):
            continue
        for label in sorted(os.listdir(os.path.join(folder, subset))):
            path = os.path.join(folder, subset, label)
            if label.startswith(".") or not os.path.isdir(path):
                continue
            if _class_of(label) is None:
                problems.append(DataError(path, "is no label folder: expected label0, label1, ... or 0, 1, ..."))
            elif not any(name.startswith(os.path.join(subset, label) + os.sep) for name in names):
                problems.append(DataError(path, "holds no crop: expected <patient>/<name>.nii.gz below it, or remove it"))
    for name in names:
        parts = name.split(os.sep)
        if not parts[0].startswith("subset"):
            continue
        if len(parts) == 4 and _class_of(parts[1]) is not None:
            crops.append(Crop(os.path.join(folder, name), _class_of(parts[1]), parts[2], parts[0]))
        elif len(parts) < 3 or _class_of(parts[1]) is not None:
            problems.append(DataError(os.path.join(folder, name), "expected as subset*/label<k>/<patient>/<name>.nii.gz"))
    if not crops:
        problems.append(DataError(folder, "holds no crops: expected subset*/label0|label1/<patient>/<name>.nii.gz"))
        return crops, problems
    classes = sorted({crop.label for crop in crops})
    if len(classes) == 1:
        problems.append(DataError(folder, f"has crops of one class only (label{classes[0]}), expected at least two"))
    elif classes != list(range(len(classes))):
        problems.append(DataError(folder, f"has the classes {', '.join(map(str, classes))}: expected 0 to {len(classes) - 1}"
                                          " without a gap"))
    subsets = {}
    for crop in crops:
        subsets.setdefault(crop.patient, set()).add(crop.subset)
    problems += [DataError(folder, f"has patient {patient} in {' and '.join(sorted(where))}: expected every patient in "
                                   "one subset") for patient, where in sorted(subsets.items()) if len(where) > 1]
    return crops, problems


def _class_of(folder):
    match = re.fullmatch(r"(?:label)?(\d+)", folder)
    return int(match[1]) if match else None


def find_pairs(folder):
    """(Pairs, DataErrors) of `images/<name>.nii.gz` with `labels/<name>.nii.gz`, paired by name and sorted.

    The errors are images without label, labels without image and names that stand for two files. Raises DataError for
    a folder that is missing or can't be listed.
    """
    problems, files = [], {}
    for kind in ("images", "labels"):
        files[kind] = {}
        for name in find_volumes(os.path.join(folder, kind)):
            path = os.path.join(folder, kind, name)
            first = files[kind].setdefault(stem(name), path)
            if first != path:
                problems.append(DataError(path, f"has the same name as {first}: expected one file of each name"))
    images, labels = files["images"], files["labels"]
    problems += [DataError(images[name], "has no label of the same name in labels/") for name in sorted(images.keys() - labels)]
    problems += [DataError(labels[name], "has no image of the same name in images/") for name in sorted(labels.keys() - images)]
    pairs = [Pair(name, images[name], labels[name]) for name in sorted(images.keys() & labels)]
    if not pairs and not problems:
        problems.append(DataError(folder, "holds no cases: expected images/<name>.nii.gz and labels/<name>.nii.gz"))
    return pairs, problems


def read_pair(pair):
    """(image (X, Y, Z) int16 HU, label (X, Y, Z) uint8, affine (4, 4)) of a Pair. Raises DataError where one can't be
    used, or both don't lie on the same grid."""
    with Volume(pair.image) as image, Volume(pair.label) as label:
        reason = other_grid(label.shape, label.affine, image.shape, image.affine)
        if reason:
            raise DataError(pair.label, reason)
        return image.read(), label.read_labels(), image.affine


def other_grid(shape, affine, image_shape, image_affine):
    """Why a label does not lie on its image's grid; None if it does, to a tenth of a voxel at every corner."""
    if tuple(shape) != tuple(image_shape):
        return f"has another shape than its image: {' x '.join(map(str, shape))}, not {' x '.join(map(str, image_shape))}"
    corners = np.stack(np.meshgrid(*([0, n - 1] for n in shape), [1], indexing="ij")).reshape(4, -1)  # (4, 8)
    apart = np.linalg.norm(((affine - image_affine) @ corners)[:3], axis=0).max()
    if not apart <= 0.1 * np.linalg.norm(image_affine[:3, :3], axis=0).min():
        return f"lies elsewhere than its image: up to {apart:.3g} mm apart at the corners"
    return None


# ----------------------------------------------------------------------------------------------------- pre-training


class Sample(NamedTuple):
    """patch: (x, y, z) int16, from the file `path`; views: what `MultiCropAugmentation.draw` gave; bad: DataErrors met on
    the way, as (path, reason)."""
    patch: np.ndarray
    views: list
    bad: list
    path: str = ""


class Failure(NamedTuple):
    """Why there are no samples, in one line, and all (path, reason) that a worker has met in the epoch."""
    reason: str
    bad: list


class Batch(NamedTuple):
    """patches: (B, X, Y, Z) int16; groups: see `collate_views`; bad: (path, reason) pairs; fatal: why nothing came;
    paths: the file of each patch."""
    patches: torch.Tensor
    groups: list
    bad: list
    fatal: str
    paths: tuple = ()

    def to(self, device):
        def move(part):
            if isinstance(part, torch.Tensor):
                return part.to(device, non_blocking=True)
            if isinstance(part, tuple):
                return type(part)(*map(move, part)) if hasattr(part, "_fields") else tuple(map(move, part))
            return part
        return self._replace(patches=move(self.patches), groups=[move(group) for group in self.groups])


class PretrainingPatches(Dataset):
    """A random base patch of each volume and the parameters of its views, for keys (epoch, sample).

    paths: the volumes; multi_crop: augmentations.MultiCropAugmentation; seed: of all draws
    patches_per_volume: sample // patches_per_volume is the volume
    strict: an unreadable file ends the run; otherwise the next readable one in the list takes its place
    max_bad: unreadable files of an epoch that one worker puts up with; None: any number
    """

    def __init__(self, paths, multi_crop, seed, patches_per_volume=1, strict=False, max_bad=None):
        self.paths, self.multi_crop, self.seed = paths, multi_crop, seed
        self.patches_per_volume, self.strict = patches_per_volume, strict
        self.max_bad = len(paths) if max_bad is None else max_bad
        self._epoch, self._bad = None, {}  # path -> reason; this worker's memory, so that no file is tried twice in an epoch

    def __getitems__(self, keys):
        """The samples of a batch; neighbours from one volume share one opening of its file."""
        samples, opened = [], None
        try:
            for epoch, sample in keys:
                bad = []
                if epoch != self._epoch:  # what failed may have been the network's fault, which passes
                    self._epoch, self._bad = epoch, {}
                for attempt in range(len(self.paths)):
                    path = self.paths[(sample // self.patches_per_volume + attempt) % len(self.paths)]
                    try:
                        if path in self._bad:
                            raise DataError(path, self._bad[path])
                        if opened is None or opened.path != path:
                            if opened is not None:
                                opened.close()
                            opened = None
                            opened = Volume(path)
                        samples.append(Sample(*self._draw(opened, epoch, sample), bad, path))
                        break
                    except DataError as error:
                        self._bad[path] = error.reason
                        bad.append((error.path, error.reason))
                        if self.strict:
                            raise
                        if len(self._bad) > self.max_bad:
                            raise DataError(f"{len(self._bad)} of {len(self.paths)} files",
                                            f"can't be used, such as {path}: {error.reason}") from error
                else:
                    raise DataError(f"{len(self.paths)} files", f"not one can be used, such as {bad[0][0]}: {bad[0][1]}")
        except DataError as error:  # an exception would reach the main process as a traceback's text
            return [Failure(str(error), list(self._bad.items()))]
        finally:
            if opened is not None:
                opened.close()
        return samples

    def _draw(self, volume, epoch, sample):
        """(patch, views) of one sample: where spacing is given, a much finer volume is averaged first."""
        crops, rng = self.multi_crop, keyed_rng(self.seed, epoch, sample, PATCH_VIEW)
        spacing = np.array(volume.spacing)
        stretch = np.ones(3) if crops.spacing is None else np.array(crops.spacing) / spacing  # volume voxels per view's
        # Spacings in files are rounded: - 1e-3 below keeps a view's voxels on the file's where both are meant to be equal
        factors = np.where(stretch > 1.5, np.rint(stretch), 1).astype(int)
        size = np.ceil(np.array(crops.patch_size) * stretch / factors - 1e-3).astype(int) * factors
        start = place_patch(rng, np.array(volume.shape), np.ceil(np.array(crops.core) * stretch - 1e-3).astype(int), size)
        patch = volume.read(start, size)
        low, high = np.clip(-start, 0, size), np.clip(volume.shape - start, 0, size)
        inside = patch[tuple(map(slice, low, high))]  # air around it would hide a constant volume from some draws
        if is_flat(inside[::8, ::8, ::8]) and is_flat(inside) and volume.is_constant():  # the first tells in most cases
            raise DataError(volume.path, f"has the same value in all voxels ({inside.flat[0]})")
        patch = block_mean(patch, factors)
        return patch, crops.draw(self.seed, epoch, sample, patch.shape, spacing * factors)


def place_patch(rng, shape, core, size):
    """(3,) first voxel of a patch of `size` whose middle `core` lies anywhere in a volume of `shape`.

    The margin around the core stays inside too, so that turned views don't look beyond the volume, unless that left
    less than half of the room to choose from. A volume smaller than the core sits in its middle.
    """
    room = shape - core
    margin = (size - core) // 2  # before the core; behind it there may be one voxel more
    low = np.where(room > 0, np.minimum(margin, room // 4), room // 2)
    high = np.where(room > 0, room - np.minimum(size - core - margin, room // 4), room // 2)
    return rng.randint(low, high + 1) - margin


def block_mean(patch, factors):
    """Mean over blocks of factors[0] x factors[1] x factors[2] voxels, which must divide the patch; int16, rounded."""
    if (np.asarray(factors) == 1).all():
        return patch
    x, y, z = np.array(patch.shape) // factors
    blocks = patch.reshape(x, factors[0], y, factors[1], z, factors[2])
    return np.rint(blocks.mean((1, 3, 5), dtype=np.float32)).astype(np.int16)


def is_flat(voxels):
    return voxels.min() == voxels.max()


def collate(samples):
    """A Batch of Samples. Patches of different sizes are padded at their far ends by repeating the border.

    That is what views see beyond a patch anyway, so they don't depend on which samples share a batch. In memory x is the
    fastest axis, as in files; a loader's worker writes straight into memory that it shares with the main process.
    """
    if isinstance(samples[0], Failure):
        return Batch(torch.empty(0), [], samples[0].bad, samples[0].reason)
    size = np.max([sample.patch.shape for sample in samples], axis=0).tolist()
    patches = torch.empty((len(samples), *size[::-1]), dtype=torch.int16).permute(0, 3, 2, 1)  # (B, X, Y, Z)
    if get_worker_info():
        patches.share_memory_()
    for slot, sample in zip(patches.numpy(), samples):
        x, y, z = sample.patch.shape
        slot[:x, :y, :z] = sample.patch
        slot[x:] = slot[x - 1:x]
        slot[:, y:] = slot[:, y - 1:y]
        slot[:, :, z:] = slot[:, :, z - 1:z]
    bad = list(dict.fromkeys(pair for sample in samples for pair in sample.bad))
    return Batch(patches, collate_views([sample.views for sample in samples]), bad, "",
                 tuple(sample.path for sample in samples))


def epoch_order(volumes, patches_per_volume, seed, epoch):
    """(volumes * patches_per_volume,) sample numbers in the order of an epoch, the same on every rank.

    Up to RUN patches of one volume follow each other, so that its file is opened once for them.
    """
    run = min(patches_per_volume, RUN)
    starts = np.arange(0, patches_per_volume, run)
    runs = (np.arange(volumes)[:, None] * patches_per_volume + starts).ravel()
    runs = np.random.default_rng(np.random.SeedSequence((seed, epoch))).permutation(runs)
    order = (runs[:, None] + np.arange(run)).ravel()
    ends = (runs // patches_per_volume + 1) * patches_per_volume
    return order[order < np.repeat(ends, run)]  # a volume's last run may be shorter


class BatchStream(Sampler):
    """Batches of keys (epoch, sample) from a position in the run to its end, without a pause between epochs.

    The epoch's order is cut into global batches and each of those into the ranks' shares, so that the samples of a
    step do not depend on the number of ranks, nor on the batches that each share is cut into. What is left at an
    epoch's end and fills no global batch is dropped.

    volumes, patches_per_volume, seed: see `epoch_order`
    batch_size: of one rank; rank, world_size
    epoch, position: where to start, in epochs and in samples of that epoch; epochs: where to end
    accumulate_steps: batches of one rank that make its share of a global batch
    """

    def __init__(self, volumes, patches_per_volume, batch_size, rank, world_size, seed, epoch, position, epochs,
                 accumulate_steps=1):
        self.order_of = lambda epoch: epoch_order(volumes, patches_per_volume, seed, epoch)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.start, self.epochs, self.accumulate_steps = (epoch, position), epochs, accumulate_steps

    def __iter__(self):
        first, position = self.start
        for epoch in range(first, self.epochs):
            order = self.order_of(epoch)
            share = self.batch_size * self.accumulate_steps
            step = share * self.world_size
            for at in range(position, len(order) - step + 1, step):
                mine = order[at + self.rank * share:][:share]
                for batch in mine.reshape(self.accumulate_steps, self.batch_size):
                    yield [(epoch, int(sample)) for sample in batch]
            position = 0
