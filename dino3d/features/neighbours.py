"""Retrieval: the rows of a table of features that are most like one of them, as a table and as pictures."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dino3d.data.points import AXES
from dino3d.training.pictures import EVEN, montage, plane

NEIGHBOUR_COLUMNS = ("query", "query_patient", "rank", "name", "patient", "similarity")
PLACE_COLUMNS = (*(f"query_{axis}" for axis in AXES), *AXES)  # of a table of points besides: which those are, LPS mm
NEIGHBOUR_TILE = 120  # pixels of the largest plane, at least
AXIAL_CORONAL_SAGITTAL = (2, 1, 0)


class Neighbour(NamedTuple):
    """A row like another one. row: its number; similarity: the cosine of the angle between their features"""

    row: int
    similarity: float


def nearest(
    features: np.ndarray, patients: Sequence[str], query: int, count: int, same_patient: bool = False
) -> list[Neighbour]:
    """The rows most like row `query` by cosine similarity, most similar first, at most `count`; of equals the first.

    features: (N, F), NaN where a row has none, which is then no neighbour; patients: (N,) whose the rows are
    same_patient: whether rows of the query's own patient count; the query itself never does
    """
    lengths = np.linalg.norm(features, axis=1)  # NaN for a row without features
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = np.clip(features @ features[query] / np.maximum(lengths * lengths[query], 1e-12), -1, 1)
    allowed = np.isfinite(cosines)
    allowed[query] = False
    if not same_patient:
        allowed &= np.array([one != patients[query] for one in patients], bool)
    rows = np.flatnonzero(allowed)
    order = np.argsort(-cosines[rows], kind="stable")[:count]
    return [Neighbour(int(row), float(cosines[row])) for row in rows[order]]


def spread(rows: Sequence[int], count: int) -> list[int]:
    """At most `count` of some rows, evenly spread over them, the first and the last among them."""
    if len(rows) <= count:
        return list(rows)
    return [rows[int(at)] for at in np.linspace(0, len(rows) - 1, count).round()]


def neighbour_picture(
    volumes: Sequence[np.ndarray], spacings: Sequence[Sequence[float]], labels: Sequence[str]
) -> np.ndarray:
    """uint8 (height, width) picture of volumes, one a row, each with its axial, coronal and sagittal middle plane.

    volumes: (X, Y, Z) grey values in [0, 1], first the query's; spacings: (3,) mm of each; labels: what stands above
    each
    """
    rows = [[plane(one, axis, mm) for axis in AXIAL_CORONAL_SAGITTAL] for one, mm in zip(volumes, spacings)]
    return montage(rows, labels, f"axial, coronal, sagittal (anterior on the left); {EVEN}", tile=NEIGHBOUR_TILE)
