"""From settings to objects: the one place where the names of config.py meet the arguments of the classes.

train.py, sample.py and evaluate.py build through here, so that a checkpoint's settings always give the network back.
"""

import torch
from torch import nn

from src import noise
from src.diffusion import GaussianDiffusion
from src.model import UNet
from src.runtime.settings import Settings


def build_model(settings: Settings, num_classes: int) -> UNet:
    """The network, its random weights a function of SEED. num_classes: of the data; used where CLASS_CONDITIONAL."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(noise.integer_seed(settings.SEED, noise.WEIGHTS))
        return UNet(
            image_size=settings.IMAGE_SIZE,
            dim=settings.UNET_DIM,
            dim_mults=settings.DIM_MULTS,
            num_res_blocks=settings.NUM_RES_BLOCKS,
            attention_resolutions=settings.ATTENTION_RESOLUTIONS,
            dropout=settings.DROPOUT,
            num_classes=num_classes if settings.CLASS_CONDITIONAL else 0,
            activation_checkpointing=settings.ACTIVATION_CHECKPOINTING,
        )


def build_diffusion(settings: Settings) -> GaussianDiffusion:
    return GaussianDiffusion(settings.TIME_STEPS, settings.BETA_SCHEDULE, settings.PREDICTION, settings.MIN_SNR_GAMMA)


def build_optimizer(settings: Settings, model: nn.Module) -> torch.optim.Adam:
    """Adam in its fused form: one kernel over all weights. The learning rate is set before each step."""
    return torch.optim.Adam(model.parameters(), lr=settings.LEARNING_RATE, fused=True)
