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


def build_model(s: Settings, num_classes: int) -> UNet:
    """The network; its random weights follow from SEED. num_classes: of the data; used if CLASS_CONDITIONAL."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(noise.seed(s.SEED, noise.WEIGHTS))
        return UNet(
            image_size=s.IMAGE_SIZE,
            dim=s.UNET_DIM,
            dim_mults=s.DIM_MULTS,
            num_res_blocks=s.NUM_RES_BLOCKS,
            attention_resolutions=s.ATTENTION_RESOLUTIONS,
            dropout=s.DROPOUT,
            channels=s.CHANNELS,
            num_classes=num_classes if s.CLASS_CONDITIONAL else 0,
            activation_checkpointing=s.ACTIVATION_CHECKPOINTING,
        )


def build_diffusion(s: Settings) -> GaussianDiffusion:
    return GaussianDiffusion(s.TIME_STEPS, s.BETA_SCHEDULE, s.PREDICTION, s.MIN_SNR_GAMMA)


def build_optimizer(s: Settings, model: nn.Module) -> torch.optim.Adam:
    """Adam in its fused form: one kernel for all weights. The learning rate is set before each step."""
    return torch.optim.Adam(model.parameters(), lr=s.LEARNING_RATE, fused=True)


def open_images(s: Settings, split: str) -> Images:
    """The split "train" or "val" of the data, downloaded and decoded first if need be."""
    obtain(s.DATASET, s.DATA_PATH, s.DATA_URL, s.DATA_SIZE, s.DATA_MD5)
    how = (s.CACHE_PATH, s.NUM_WORKERS, s.CLASSES, s.CHANNELS, s.SKIP_DAMAGED)
    return prepare(s.DATASET, s.DATA_PATH, split, s.IMAGE_SIZE, *how)


def build_batches(s: Settings, images: DeviceImages, world: World = World()) -> TrainBatches:
    world.local_batch_size(s.BATCH_SIZE)  # raises FlagError if the processes cannot share it
    return TrainBatches(
        images,
        batch_size=s.BATCH_SIZE,
        grad_accum_steps=s.GRAD_ACCUM_STEPS,
        time_steps=s.TIME_STEPS,
        horizontal_flip=s.HORIZONTAL_FLIP,
        label_dropout=s.LABEL_DROPOUT if s.CLASS_CONDITIONAL else None,
        seed=s.SEED,
        rank=world.rank,
        world_size=world.size,
    )


def build_validation(
    s: Settings, images: DeviceImages, world: World = World(), batch_size: int = 0, last_step: int | None = None
) -> ValidationBatches:
    """batch_size: images per batch and process; 0 takes four times that of training, since no backward pass needs memory.
    last_step: of the run, if that may be a handful of steps."""
    return ValidationBatches(
        images,
        count=s.VAL_IMAGES,
        draws=number_of_draws(s, len(images), last_step),
        batch_size=batch_size or 4 * world.local_batch_size(s.BATCH_SIZE),
        time_steps=s.TIME_STEPS,
        has_labels=s.CLASS_CONDITIONAL,
        rank=world.rank,
        world_size=world.size,
    )
