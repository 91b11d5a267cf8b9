"""The built-in dataset: what its pictures promise."""

import numpy as np
import pytest

from src.data.shapes import KINDS, Shapes


@pytest.mark.parametrize("size", [8, 32, 48, 65])
def test_any_size_gives_uint8_rgb_and_a_label(size):
    picture, label = Shapes("train", size)[7]
    assert picture.shape == (size, size, 3) and picture.dtype == np.uint8 and label == 7


def test_a_picture_follows_from_split_and_index_alone():
    once, again = Shapes("train", 32), Shapes("train", 32)
    again[5]  # what was drawn before changes nothing
    np.testing.assert_array_equal(once[123][0], again[123][0])


def test_splits_have_their_sizes_and_share_no_picture():
    train, val = Shapes("train", 16), Shapes("val", 16)
    assert (len(train), len(val)) == (10_000, 2_000)
    seen = {train[i][0].tobytes() for i in range(2_000)}
    assert len(seen) == 2_000
    assert not seen & {val[i][0].tobytes() for i in range(500)}


def test_classes_are_balanced():
    val = Shapes("val", 8)
    assert np.bincount([val[i][1] for i in range(len(val))]).tolist() == [200] * 10
    assert len(val.classes) == len(set(val.classes)) == 10


@pytest.mark.parametrize("label", range(10))
def test_the_ink_is_the_named_colour_large_enough_and_stands_out(label):
    colour = np.array(KINDS[Shapes.classes[label]][0]) * 255
    for index in range(label, 400, 10):
        picture = Shapes("train", 32)[index][0].astype(float)
        ink = np.abs(picture - colour).max(-1) < 0.05 * 255
        assert 0.02 < ink.mean() < 0.5
        ground = picture[np.abs(picture - colour).max(-1) > 0.3 * 255]
        assert len(ground) > 0.3 * 32 * 32 and np.median(ground) < 0.4 * 255


def test_edges_are_anti_aliased():
    """A shape drawn at four times the size and averaged down is the shape drawn small."""
    for index in range(10):
        small = Shapes("val", 32)[index][0].astype(float)
        large = Shapes("val", 128)[index][0].astype(float).reshape(32, 4, 32, 4, 3).mean((1, 3))
        assert np.abs(small - large).mean() < 1.0 and np.abs(small - large).max() < 70


def test_an_index_beyond_the_end_ends_iteration():
    with pytest.raises(IndexError):
        Shapes("val", 8)[2_000]
