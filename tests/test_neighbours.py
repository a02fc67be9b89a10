"""The rows most like another one, against scikit-learn's, and their picture."""

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from dino3d.features.neighbours import nearest, neighbour_picture, spread


def test_neighbours_are_scikit_learns():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 8)).astype(np.float32)
    patients = [f"p{number % 20}" for number in range(60)]
    reference = NearestNeighbors(metric="cosine").fit(features)
    for query in range(60):
        distances, rows = reference.kneighbors(features[query : query + 1], 60)
        everyone = [(row, 1 - d) for row, d in zip(rows[0].tolist(), distances[0]) if row != query]
        others = [(row, s) for row, s in everyone if patients[row] != patients[query]]
        for same, expected in ((True, everyone), (False, others)):
            found = nearest(features, patients, query, 5, same)
            assert [one.row for one in found] == [row for row, _ in expected[:5]]
            assert [one.similarity for one in found] == pytest.approx([s for _, s in expected[:5]], abs=1e-5)


def test_rows_without_features_are_nobodys_neighbours():
    features = np.array([[1, 0], [2, 0], [np.nan, np.nan], [0, 1], [0, 0]], np.float32)
    found = nearest(features, list("abcde"), 0, 9)
    assert [(one.row, one.similarity) for one in found] == [(1, 1.0), (3, 0.0), (4, 0.0)]
    assert nearest(features, ["a"] * 5, 0, 9) == []


def test_equals_come_in_their_order():
    assert [one.row for one in nearest(np.ones((5, 2), np.float32), list("abcde"), 2, 3)] == [0, 1, 3]


def test_queries_are_spread_over_all_rows():
    assert spread(list(range(100)), 4) == [0, 33, 66, 99]
    assert spread([4, 7], 6) == [4, 7] and spread([], 3) == [] and spread([1, 2, 3], 1) == [1]


def test_a_row_of_planes_for_each():
    volume = np.zeros((8, 6, 4), np.float32)
    volume[4:, 3:, 2:] = 1  # right, anterior, superior
    picture = neighbour_picture([volume, 1 - volume], [(1, 1, 2)] * 2, ["query: a", "0.9: b"])
    assert picture.dtype == np.uint8 and picture.ndim == 2
    zoom, top = 15, 20 + 18
    for above, bright in ((top, 255), (top + 8 * zoom + 20, 0)):
        for left, width, height in ((0, 8, 6), (8 * zoom + 2, 8, 8), (16 * zoom + 4, 6, 8)):
            tile = picture[above : above + height * zoom, left : left + width * zoom]
            assert tile[2, 2] == bright and tile[-3, -3] == 255 - bright
