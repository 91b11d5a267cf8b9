"""From settings to objects: the one place where the names of config.py meet the arguments of the classes.

train.py, sample.py and evaluate.py build through here, so the settings in a checkpoint always give the network back.
"""

import torch
from torch import nn

from src import noise
from src.dataset import DeviceImages, Images, TrainBatches, ValidationBatches, obtain, prepare
from src.diffusion import GaussianDiffusion
from src.model import UNet
from src.runtime.checkpoint import number_of_draws
from src.runtime.distributed import World
from src.runtime.settings import Settings


def build_model(settings: Settings, num_classes: int) -> UNet:
    """The network; its random weights follow from SEED. num_classes: of the data; used if CLASS_CONDITIONAL."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(noise.seed(settings.SEED, noise.WEIGHTS))
        return UNet(
            image_size=settings.IMAGE_SIZE,
            dim=settings.UNET_DIM,
            dim_mults=settings.DIM_MULTS,
            num_res_blocks=settings.NUM_RES_BLOCKS,
            attention_resolutions=settings.ATTENTION_RESOLUTIONS,
            dropout=settings.DROPOUT,
            channels=settings.CHANNELS,
            num_classes=num_classes if settings.CLASS_CONDITIONAL else 0,
            activation_checkpointing=settings.ACTIVATION_CHECKPOINTING,
        )


def build_diffusion(settings: Settings) -> GaussianDiffusion:
    return GaussianDiffusion(settings.TIME_STEPS, settings.BETA_SCHEDULE, settings.PREDICTION, settings.MIN_SNR_GAMMA)


def build_optimizer(settings: Settings, model: nn.Module) -> torch.optim.Adam:
    """Adam in its fused form: one kernel for all weights. The learning rate is set before each step."""
    return torch.optim.Adam(model.parameters(), lr=settings.LEARNING_RATE, fused=True)


def open_images(settings: Settings, split: str) -> Images:
    """The split "train" or "val" of the data, downloaded and decoded first if need be."""
    s = settings
    obtain(s.DATASET, s.DATA_PATH, s.DATA_URL, s.DATA_SIZE, s.DATA_MD5)
    how = (s.CACHE_PATH, s.NUM_WORKERS, s.CLASSES, s.CHANNELS, s.SKIP_DAMAGED)
    return prepare(s.DATASET, s.DATA_PATH, split, s.IMAGE_SIZE, *how)


def build_batches(settings: Settings, images: DeviceImages, world: World = World()) -> TrainBatches:
    world.local_batch_size(settings.BATCH_SIZE)  # raises FlagError if the processes cannot share it
    return TrainBatches(
        images,
        batch_size=settings.BATCH_SIZE,
        grad_accum_steps=settings.GRAD_ACCUM_STEPS,
        time_steps=settings.TIME_STEPS,
        horizontal_flip=settings.HORIZONTAL_FLIP,
        label_dropout=settings.LABEL_DROPOUT if settings.CLASS_CONDITIONAL else None,
        seed=settings.SEED,
        rank=world.rank,
        world_size=world.size,
    )


def build_validation(
    settings: Settings, images: DeviceImages, world: World = World(), batch_size: int = 0, last_step: int | None = None
) -> ValidationBatches:
    """batch_size: images per batch and process; 0 takes four times that of training, since no backward pass needs memory.
    last_step: of the run, if that may be a handful of steps."""
    return ValidationBatches(
        images,
        count=settings.VAL_IMAGES,
        draws=number_of_draws(settings, len(images), last_step),
        batch_size=batch_size or 4 * world.local_batch_size(settings.BATCH_SIZE),
        time_steps=settings.TIME_STEPS,
        has_labels=settings.CLASS_CONDITIONAL,
        rank=world.rank,
        world_size=world.size,
    )
