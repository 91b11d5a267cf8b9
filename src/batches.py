"""What each micro-batch holds, from (SEED, step) and each image's place in the step alone.

Nothing here has a state that a resumed run would have to restore, and two processes that share a batch draw what one
would have drawn.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from src import noise
from src.images import DeviceImages
from src.runtime.distributed import World
from src.runtime.settings import Settings
from src.utils import UserError


class Batch(NamedTuple):
    x_0: Tensor  # [B, 3, S, S] float32, pixels in [-1, 1]
    t: Tensor  # [B] int64 in [0, T)
    eps: Tensor  # [B, 3, S, S] float32, standard normal
    y: Tensor | None  # [B] int64 labels, -1 where hidden; None for a network without labels


class TrainBatches:
    """batches(step, micro) -> Batch, for optimizer step number `step` and its pass number `micro`, both from 0. Of several
    processes each gets its share of the batch, a stretch of BATCH_SIZE / world.size images.

    Each epoch is a new order of all images, cut into steps of BATCH_SIZE * GRAD_ACCUM_STEPS; what is left over is not
    used in that epoch. Raises UserError where there are fewer images than a step takes.
    """

    def __init__(self, images: DeviceImages, settings: Settings, world: World = World()):  # noqa: B008 (immutable)
        self.images, self.settings, self.device = images, settings, images.device
        self.size = world.share(settings.BATCH_SIZE)  # images per pass of this process
        self.first = world.rank * self.size
        self.images_per_step = settings.BATCH_SIZE * settings.GRAD_ACCUM_STEPS
        self.steps_per_epoch = len(images) // self.images_per_step
        if not self.steps_per_epoch:
            raise UserError(
                f"{len(images)} training images are fewer than one step takes, BATCH_SIZE {settings.BATCH_SIZE} x "
                f"GRAD_ACCUM_STEPS {settings.GRAD_ACCUM_STEPS}. Use a smaller --batch_size."
            )
        self.epoch, self.order = -1, torch.empty(0)

    def rows(self, step: int, places: Tensor) -> Tensor:
        """Which images stand at these places of the step. places: [B] int64 in [0, images_per_step). Returns [B] int64."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            shuffle = torch.Generator().manual_seed(noise.integer_seed(self.settings.SEED, noise.DATA_ORDER, epoch))
            self.epoch, self.order = epoch, torch.randperm(len(self.images), generator=shuffle)
        return self.order[position * self.images_per_step + places]

    def __call__(self, step: int, micro: int) -> Batch:
        s = self.settings
        first = micro * s.BATCH_SIZE + self.first
        places = torch.arange(first, first + self.size)

        def keys(purpose: int) -> Tensor:
            return noise.address(s.SEED, purpose, step, places)

        flip = noise.chance(keys(noise.TRAIN_FLIP), 0.5) if s.HORIZONTAL_FLIP else None
        x_0, y = self.images.batch(self.rows(step, places), flip)
        t = noise.integers(keys(noise.TRAIN_TIME), s.TIME_STEPS).to(self.device, non_blocking=True)
        eps = noise.normal(keys(noise.TRAIN_NOISE).to(self.device, non_blocking=True), x_0.shape[1:])
        if not s.CLASS_CONDITIONAL:
            return Batch(x_0, t, eps, None)
        hidden = noise.chance(keys(noise.TRAIN_LABEL), s.LABEL_DROPOUT).to(self.device, non_blocking=True)
        return Batch(x_0, t, eps, torch.where(hidden, -1, y))


def validation_batches(images: DeviceImages, settings: Settings, world: World = World()) -> Iterator[Batch]:  # noqa: B008
    """VAL_IMAGES held-out images, each always with the same t and noise. They depend neither on SEED nor on the batch size,
    so that runs compare; the steps are spread evenly over [0, T), dealt out at random. Of several processes each gets
    every world.size-th batch, of as many images as it trains with."""
    count = min(settings.VAL_IMAGES, len(images))
    fixed = torch.Generator().manual_seed(noise.VALIDATION)
    rows = torch.randperm(len(images), generator=fixed)[:count]  # at random: held-out images come class by class
    times = (torch.arange(count) * settings.TIME_STEPS // count)[torch.randperm(count, generator=fixed)]
    for places in world.mine(torch.arange(count).split(world.share(settings.BATCH_SIZE))):
        x_0, y = images.batch(rows[places])
        eps = noise.normal(noise.address(0, noise.VALIDATION, places).to(images.device), x_0.shape[1:])
        yield Batch(x_0, times[places].to(images.device), eps, y if settings.CLASS_CONDITIONAL else None)
