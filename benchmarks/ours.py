"""The training step of this repository, as train.py's loop takes it, for the benchmarks."""

import math
from collections.abc import Callable
from typing import NamedTuple
from unittest.mock import patch

import torch
from src.images import Images
from torch import Tensor, nn

from src import noise
from src.dataset import Batch, TrainBatches
from src.ema import EMA
from src.model import Upsample
from src.runtime.build import build_diffusion, build_model, build_optimizer
from src.runtime.device import InPrecision, pick_precision, place, should_compile
from src.runtime.monitor import FiniteGuard, Meter
from src.runtime.settings import Settings


class Variant(NamedTuple):
    """What of the step goes through torch.compile, and how; and what else is tried."""

    part: str = ""  # "network", or "loss" with the network inside it
    mode: str | None = None  # of torch.compile
    noise: bool = False  # the noise of the batch too
    short_cut: bool = False  # whatever the device, Upsample takes the way with fewer products


VARIANTS = {
    "eager": Variant(),
    "network": Variant("network"),
    "graphs": Variant("network", "reduce-overhead"),
    "max-autotune": Variant("network", "max-autotune"),
    "loss": Variant("loss"),
    "loss-graphs": Variant("loss", "reduce-overhead"),
    "step-noise": Variant("loss", noise=True),
    "short-cut": Variant("network", short_cut=True),
}


class Step:
    """step() is one optimizer step of train.py, from the batch to the average, but for the seed of dropout;
    tests/test_benchmarks.py compares the weights.

    variant: one of VARIANTS, or None for what train.py picks.
    """

    def __init__(self, settings: Settings, device: torch.device, images: Images, variant: str | None = None):
        s = self.settings = settings
        self.device = device
        default = "network" if should_compile(s.COMPILE, device) else "eager"
        self.variant = VARIANTS[variant or default]
        dtype = pick_precision(s.PRECISION, device)
        self.model = build_model(s, len(images.classes)).train()
        for layer in self.model.modules():
            if isinstance(layer, Upsample) and self.variant.short_cut:
                layer.short_cut_on = (device.type,)
        place(self.model, device)
        self.batches = TrainBatches(images.to(device), s)
        self.ema = EMA(self.model, s.EMA_DECAY)
        self.diffusion = build_diffusion(s).to(device)
        self.optimizer = build_optimizer(s, self.model)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.meter = Meter(s.TIME_STEPS, device)
        self.guard = FiniteGuard(device)
        self.step = 0

        network: Callable = InPrecision(self.model, device, dtype)
        if self.variant.part == "network":
            network = torch.compile(network, mode=self.variant.mode)

        def losses(x_0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None) -> Tensor:
            return self.diffusion.training_losses(network, x_0, t, eps, y)

        self.losses = torch.compile(losses, mode=self.variant.mode) if self.variant.part == "loss" else losses
        self.normal = torch.compile(noise.normal) if self.variant.noise else noise.normal

    def __call__(self) -> None:
        s = self.settings
        self.optimizer.param_groups[0]["lr"] = s.LEARNING_RATE * min(1.0, (self.step + 1) / max(1, s.WARMUP_STEPS))
        loss = torch.zeros((), device=self.device)
        for micro in range(s.GRAD_ACCUM_STEPS):
            batch = self.batch(micro)
            if self.variant.mode:
                torch.compiler.cudagraph_mark_step_begin()
            losses = self.losses(*batch)
            share = losses.mean() / s.GRAD_ACCUM_STEPS
            self.scaler.scale(share).backward()
            loss += share.detach()
            self.meter.add(losses, batch.t)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), s.GRAD_CLIP or math.inf)
        self.meter.add_norm(norm)
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = self.guard.note(self.step + 1, loss, norm)  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model, self.step)
        self.step += 1

    def batch(self, micro: int = 0) -> Batch:
        with patch.object(noise, "normal", self.normal):
            return self.batches(self.step, micro)

    def bare(self, batch: Batch) -> None:
        """The least that a step can be: a batch that is there already, no guard, no meter."""
        self.losses(*batch).mean().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.GRAD_CLIP or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model, self.step)
        self.step += 1
