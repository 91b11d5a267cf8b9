"""The networks and training steps of other libraries, at a shape as equal as possible, for the benchmarks.

Each in two modes. "script" is what its own training script does by default, in the order it does it: diffusers'
examples/unconditional_image_generation/train_unconditional.py (float32, AdamW, clipping, no average of the weights) and
the Trainer of denoising_diffusion_pytorch (float32, Adam, clipping, average every 10 steps). "best" is the same in bf16
by autocast, channels_last, with a fused optimizer, without waiting for the loss, and compiled on CUDA.
Their pictures lie on the device already: what their data loaders cost is not counted.
"""

import contextlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.model import norm_groups
from src.runtime.device import pick_precision
from src.runtime.settings import Settings

PACKAGES = {"diffusers": "diffusers", "lucidrains": "denoising_diffusion_pytorch"}  # name here -> module
MODES = ("script", "best")
HEAD_DIM = 64  # channels per attention head, as ours

# Multipliers at which lucidrains' network has about as many parameters as ours: 86.5M beside 92.0M.
LUCIDRAINS_MULTS = {(1, 2, 3, 4): (1, 2, 3, 6)}


def is_installed(peer: str) -> bool:
    return importlib.util.find_spec(PACKAGES[peer]) is not None


def diffusers_unet(s: Settings) -> Any:
    """UNet2DModel with the channels, blocks and attention of ours; its step enters by addition, its own default."""
    from diffusers import UNet2DModel

    has_attention = [s.IMAGE_SIZE >> level in s.ATTENTION_RESOLUTIONS for level in range(len(s.DIM_MULTS))]
    return UNet2DModel(
        sample_size=s.IMAGE_SIZE,
        block_out_channels=[s.UNET_DIM * mult for mult in s.DIM_MULTS],
        layers_per_block=s.NUM_RES_BLOCKS,
        down_block_types=["AttnDownBlock2D" if there else "DownBlock2D" for there in has_attention],
        up_block_types=["AttnUpBlock2D" if there else "UpBlock2D" for there in reversed(has_attention)],
        attention_head_dim=min(HEAD_DIM, s.UNET_DIM),
        norm_num_groups=norm_groups(s.UNET_DIM),
    )


def lucidrains_unet(s: Settings) -> Any:
    from denoising_diffusion_pytorch import Unet

    return Unet(dim=s.UNET_DIM, dim_mults=LUCIDRAINS_MULTS.get(s.DIM_MULTS, s.DIM_MULTS))


UNETS = {"diffusers": diffusers_unet, "lucidrains": lucidrains_unet}


class Mode:
    """What "script" and "best" mean for a network."""

    def __init__(self, mode: str, device: torch.device):
        self.is_best, self.device = mode == "best", device
        self.dtype = pick_precision("auto", device) if self.is_best else torch.float32

    def place(self, model: nn.Module) -> nn.Module:
        model = model.to(self.device)
        return model.to(memory_format=torch.channels_last) if self.is_best else model

    def compile(self, model: nn.Module) -> nn.Module:
        """Typed as a module, which the result is; the compiled network shares its weights with the one given."""
        return torch.compile(model) if self.is_best and self.device.type == "cuda" else model  # type: ignore[return-value]

    def precision(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


class DiffusersStep:
    """x_0: [B, 3, S, S] in [-1, 1], on the device."""

    def __init__(self, s: Settings, x_0: Tensor, mode: str):
        from diffusers import DDPMScheduler

        self.x_0, self.mode = x_0, Mode(mode, x_0.device)
        self.model = self.mode.place(diffusers_unet(s).train())
        self.network = self.mode.compile(self.model)
        self.scheduler: Any = DDPMScheduler(num_train_timesteps=s.TIME_STEPS)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, fused=self.mode.is_best or None
        )

    def __call__(self) -> None:
        noise = torch.randn_like(self.x_0)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(self.x_0),), device=self.x_0.device)
        x_t = self.scheduler.add_noise(self.x_0, noise, t)
        with self.mode.precision():
            prediction = self.network(x_t, t).sample
        loss = F.mse_loss(prediction.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not self.mode.is_best:
            loss.item()  # the script logs it every step


class LucidrainsStep:
    """x_0: as above; the library scales [0, 1] to [-1, 1] itself."""

    def __init__(self, s: Settings, x_0: Tensor, mode: str):
        from denoising_diffusion_pytorch import GaussianDiffusion
        from ema_pytorch import EMA

        self.x_0, self.mode = (x_0 + 1) / 2, Mode(mode, x_0.device)
        self.model = lucidrains_unet(s)
        self.diffusion = self.mode.place(GaussianDiffusion(self.model, image_size=s.IMAGE_SIZE, timesteps=s.TIME_STEPS).train())
        self.ema = EMA(self.diffusion, beta=0.995, update_every=10, use_foreach=self.mode.is_best).to(x_0.device)
        self.ema.step += 1000  # in its first hundred steps it copies instead
        self.diffusion.model = self.mode.compile(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4, betas=(0.9, 0.99), fused=self.mode.is_best or None)

    def __call__(self) -> None:
        with self.mode.precision():
            loss = self.diffusion(self.x_0)
        if not self.mode.is_best:
            loss.item()  # the Trainer shows it every step
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()


STEPS: dict[str, Callable[..., Callable[[], None]]] = {"diffusers": DiffusersStep, "lucidrains": LucidrainsStep}
