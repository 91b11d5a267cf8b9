"""The batches of training and validation: they follow from (seed, step) and the position in the step alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from src.data.cache import Images
from src.dataset import DeviceImages, TrainBatches, ValidationBatches, normalise, prepare
from tests.runs import same


def numbered() -> DeviceImages:
    """25 images that show their own number, which is also their label."""
    numbers = torch.arange(25, dtype=torch.uint8)
    pixels = numbers[:, None, None, None].expand(25, 3, 8, 8).numpy()
    names = [str(i) for i in range(25)]
    return DeviceImages(Images(pixels, numbers.long(), names, names, Path("none")), "cpu")


def train_batches(**changes) -> TrainBatches:
    """4 x 2 images a step and so 3 steps an epoch."""
    return TrainBatches(numbered(), **dict(batch_size=4, grad_accum_steps=2, label_dropout=0.0) | changes)


def test_a_batch_is_the_same_in_whatever_order_batches_are_asked_for():
    forwards, backwards = train_batches(), train_batches()
    places = [(step, micro) for step in range(7) for micro in range(2)]
    expected = {place: forwards(*place) for place in places}
    for place in reversed(places):
        assert same(tuple(expected[place]), tuple(backwards(*place)))


def test_an_epoch_shows_every_image_at_most_once_and_each_epoch_has_an_order_of_its_own():
    batches = train_batches()
    orders = [[batches(step, micro).y for step in range(3 * e, 3 * e + 3) for micro in range(2)] for e in range(20)]
    epochs = [torch.cat(order).tolist() for order in orders]
    assert all(len(set(epoch)) == len(epoch) == 24 for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 20
    assert set().union(*epochs) == set(range(25)), "an image is left out of every epoch"


def test_micro_batches_are_the_parts_of_the_step():
    parts, whole = train_batches(), train_batches(batch_size=8, grad_accum_steps=1)
    for step in range(4):
        for split, complete in zip(zip(parts(step, 0), parts(step, 1)), whole(step, 0)):
            assert torch.equal(torch.cat(split), complete)


def test_another_seed_gives_another_order_other_times_and_other_noise():
    for one, other in zip(train_batches(seed=0)(0, 0), train_batches(seed=1)(0, 0)):
        assert not torch.equal(one, other)


def test_labels_are_hidden_as_often_as_label_dropout_says():
    batches = train_batches(label_dropout=0.3)
    y = torch.cat([batches(step, micro).y for step in range(300) for micro in range(2)])
    assert (y == -1).float().mean().item() == pytest.approx(0.3, abs=0.03)


def validation(**changes) -> ValidationBatches:
    return ValidationBatches(numbered(), **dict(count=20, draws=500, batch_size=7, has_labels=True) | changes)


def joined(batches: ValidationBatches) -> list[torch.Tensor]:
    """x_0, t, eps, y of all batches."""
    return [torch.cat(parts) for parts in zip(*batches)]


def test_validation_batches_do_not_depend_on_the_batch_size():
    assert same(joined(validation(batch_size=4)), joined(validation(batch_size=7)))


@pytest.mark.parametrize("count, draws", [(20, 500), (25, 500), (2000, 2000), (7, 504)])
def test_few_validation_images_are_drawn_at_many_steps_each_and_all_steps_evenly(count, draws):
    _, t, eps, y = joined(validation(count=count, draws=draws - 3))
    n = min(count, 25)
    rounds = draws // n
    assert len(t) == draws and len(y.unique()) == n
    assert t.sort().values.tolist() == [k * 1000 // draws for k in range(draws)], "all draws are spread evenly"
    for label in y.unique():
        middles = (torch.arange(rounds) + 0.5) * 1000 / rounds
        off = (t[y == label].sort().values - middles).abs()
        assert off.max() <= 500 / rounds + 1, "one step in each part of [0, T)"
    assert len(eps.flatten(1).unique(dim=0)) == draws, "each draw has noise of its own"


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_a_batch_and_together_draw_what_one_draws(world_size):
    whole, parts = train_batches(), [train_batches(rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(4):
        for complete, *split in zip(whole(step, 1), *(part(step, 1) for part in parts)):
            assert torch.equal(torch.cat(split), complete)
    shards = [validation(rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(batch.y.tolist() for shard in shards for batch in shard) == sorted(batch.y.tolist() for batch in validation())


# --- images on a device -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return prepare("shapes", "", "val", 16, tmp_path_factory.mktemp("cache"), num_workers=0)


def test_a_batch_is_the_rows_asked_for_scaled_and_mirrored_where_asked(shapes):
    rows, flip = torch.tensor([1999, 0, 7, 7]), torch.tensor([False, True, True, False])
    x_0, y = DeviceImages(shapes, "cpu").batch(rows, flip)
    for i, row in enumerate(rows.tolist()):
        pixels = shapes[row].astype(np.float32) / 127.5 - 1
        np.testing.assert_allclose(x_0[i].numpy(), pixels[..., ::-1] if flip[i] else pixels, atol=1e-6)
        assert y[i] == shapes.labels[row]
    assert x_0.dtype == torch.float32 and y.dtype == torch.int64


def test_black_is_minus_one_white_is_one_and_every_level_comes_back():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256)
    x = normalise(levels)
    assert x.min() == -1 and x.max() == 1
    assert torch.equal(((x + 1) * 127.5).round().to(torch.uint8), levels)


def test_a_row_outside_the_dataset_is_a_bug(shapes):
    with pytest.raises(IndexError):
        DeviceImages(shapes, "cpu").batch(torch.tensor([2000]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_images_on_the_gpu_and_in_the_mapped_file_give_the_same_batch(shapes):
    rows, flip = torch.randint(2000, (64,)), torch.rand(64) < 0.5
    resident, mapped = DeviceImages(shapes, "cuda"), DeviceImages(shapes, "cuda")
    assert resident.pixels is not None
    mapped.pixels = None
    expected, labels = DeviceImages(shapes, "cpu").batch(rows, flip)
    for images in (resident, mapped):
        x_0, y = images.batch(rows, flip)
        assert torch.equal(x_0.cpu(), expected) and torch.equal(y.cpu(), labels)
