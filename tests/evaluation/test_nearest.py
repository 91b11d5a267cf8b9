"""The nearest pictures are those of all pairs compared."""

import numpy as np
import pytest
import torch

from src.evaluation.nearest import nearest, nearest_sheet
from tests.evaluation.conftest import CPU, random_pictures


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("is_float", [False, True])
def test_the_nearest_are_those_of_all_pairs_compared(views, is_float, monkeypatch):
    monkeypatch.setattr("src.evaluation.nearest.CHUNK", 64)
    queries, pool = np.stack([random_pictures(5, 1), random_pictures(5, 1)[..., ::-1]][:views]), random_pictures(300, 2)
    if is_float:  # features, of which the mirrored ones may be longer
        queries = queries.reshape(views, 5, -1)[..., :224] / np.float32(255)
        pool = pool.reshape(300, -1)[:, :224] / np.float32(255)
        queries[-1] *= 1.1
    found = nearest(np.ascontiguousarray(queries), pool, 4, CPU)
    pairs = torch.cdist(torch.tensor(queries.copy()).flatten(2).double(), torch.from_numpy(pool).flatten(1).double())
    expected = pairs.amin(0).sort(dim=1)
    torch.testing.assert_close(found.distances, expected.values[:, :4])
    assert torch.equal(found.rows, expected.indices[:, :4])
    assert torch.equal(found.mirrored, pairs.argmin(0).gather(1, found.rows) == 1)


def test_a_copy_has_distance_0_also_mirrored_and_no_picture_is_named_twice():
    pool = random_pictures(50, 2)
    queries = pool[[7, 9]].copy()
    queries[1] = queries[1, :, :, ::-1]
    found = nearest(np.stack([queries, queries[..., ::-1]]), pool, 5, CPU)
    assert found.rows[:, 0].tolist() == [7, 9] and found.mirrored[:, 0].tolist() == [False, True]
    assert found.distances[:, 0].tolist() == [0, 0]
    assert all(len(set(rows)) == 5 for rows in found.rows.tolist())
    assert nearest(queries[None], pool[:3], 5, CPU).rows.shape == (2, 3), "there are no more than the pool has"


def test_the_sheet_shows_each_sample_beside_its_neighbours_as_they_lie_nearest():
    pool = random_pictures(50, 2)
    queries = np.ascontiguousarray(pool[[9], :, :, ::-1])
    found = nearest(np.stack([queries, queries[..., ::-1]]), pool, 5, CPU)
    sheet = nearest_sheet(queries, pool, found, unit=1.0)
    width = sheet.shape[2] // 6
    assert torch.equal(sheet[:, :96, :width], sheet[:, :96, width : 2 * width]), "the mirrored copy stands as the sample does"
    assert not torch.equal(sheet[:, :96, :width], sheet[:, :96, 2 * width : 3 * width])
