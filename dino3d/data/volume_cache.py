"""Volumes that stay in memory: small ones, and those of formats that are read whole for every patch."""

import math

from dino3d.data.conventions import DataError, Stored, is_kind
from dino3d.data.volume import Volume
from dino3d.files import file_state

SMALL = 4 * 2**20  # bytes of a converted volume, from which one patch is read faster than all of it


def is_quick(path: str) -> bool:
    """Whether a file that was not converted is read as fast as one that was: small NIfTI that is not compressed."""
    return is_kind(path, (".nii",)) and file_state(path)[0] <= SMALL


class VolumeCache:
    """Gives open volumes and keeps in memory what is worth it, first come, until `max_bytes` are full; 0: none.

    A kept one gives the same voxels. What doesn't fit is read from the disk each time, as all of it would be without.
    """

    def __init__(self, max_bytes: int = 0) -> None:
        self.room = max_bytes
        self._kept: dict[str, Stored] = {}

    def get(self, path: str) -> Volume:
        """Raises DataError."""
        if path in self._kept:
            return Volume(path, self._kept[path])
        volume = Volume(path)
        size = 2 * math.prod(volume.shape)  # bytes of int16
        if size > self.room or volume.converted and size > SMALL:
            return volume
        try:
            voxels = volume.read()
        except DataError:  # damaged at a place that not every patch meets
            return volume
        voxels.flags.writeable = False  # what reads from it gets a copy
        self.room -= size
        self._kept[path] = Stored(volume.shape, volume.affine, voxels.__getitem__, volume.notes, volume.converted)
        volume.close()
        return Volume(path, self._kept[path])
