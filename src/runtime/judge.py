"""What a run makes of its network every so often: the validation loss and best.pth, previews, and checkpoints to keep."""

import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from src import noise
from src.dataset import Batch, ValidationBatches
from src.diffusion import GaussianDiffusion
from src.runtime.checkpoint import Checkpoints, preview_size
from src.runtime.distributed import World
from src.runtime.monitor import Monitor
from src.runtime.settings import Settings
from src.runtime.sheets import caption, class_columns, sheet
from src.runtime.signals import StopRequest
from src.utils import save_png, to_uint8, writing


@dataclass
class Judge:
    """Looks at the network every VAL_EVERY epochs and after the last step."""

    s: Settings
    world: World
    stop: StopRequest
    monitor: Monitor
    diffusion: GaussianDiffusion
    networks: Mapping[str, nn.Module]  # ema, raw
    val_batches: ValidationBatches
    checkpoints: Checkpoints

    def __call__(self) -> None:
        """The validation loss and best.pth; every SAMPLE_EVERY epochs a preview, every SAVE_EVERY a checkpoint to keep."""
        s, monitor, progress = self.s, self.monitor, self.checkpoints.progress
        step, epoch, ends_epoch = progress.step, progress.epoch, progress.step % progress.steps_per_epoch == 0

        def is_due(every: int) -> bool:  # whether a multiple of so many epochs lies after the last validation
            return step == progress.last_step or epoch // every > (epoch - s.VAL_EVERY) // every

        with self.stop.postponed("validation"):
            val_loss = validate(self.world, self.diffusion, self.networks["ema"], monitor.track("validation", self.val_batches))
        if not math.isfinite(val_loss):
            raise FloatingPointError(f"The validation loss after step {step:,} is not finite")
        monitor.events.scalar(step, "loss/val", val_loss)
        monitor.events.scalar(step, "progress/epoch", epoch)
        monitor.bar.write(f"epoch {epoch}, step {step:,}: validation loss {val_loss:.5f}")
        if val_loss > 2 * progress.best_loss:
            best = shlex.quote(str(self.checkpoints.folder / "best.pth"))
            monitor.bar.write(
                f"Warning: that is {val_loss / progress.best_loss:.1f} times the lowest so far: the network has diverged, "
                f"for good, or it learns its pictures by heart. To start anew from the best one, add --run again "
                f"--init_from {best} --learning_rate {s.LEARNING_RATE / 2:g}"
            )
        if is_due(s.SAMPLE_EVERY):
            with self.stop.postponed("preview"):
                sheets = {name: self.preview(network) for name, network in self.networks.items()}
            for name, picture in sheets.items():
                monitor.events.image(step, f"samples/{name}", picture)
            if self.world.is_main:
                name = f"epoch_{epoch:03}.png" if ends_epoch else f"step_{step:06}.png"
                with writing(path := s.folder("OUTPUT_PATH") / "samples" / name, "--output_path"):
                    save_png(sheets["ema"], path)
        if val_loss < progress.best_loss:
            progress.best_loss = val_loss
            self.checkpoints.save("best")
        if ends_epoch and is_due(s.SAVE_EVERY):
            self.checkpoints.save(f"epoch_{epoch:03}")

    def preview(self, network: nn.Module) -> Tensor:
        """A sheet of NUM_SAMPLES pictures, fewer in a short run, always those of `sample.py --seed SEED`: [3, H, W] uint8."""
        s, device, classes = self.s, self.diffusion.signal.device, self.checkpoints.classes
        shape, steps = (s.CHANNELS, s.IMAGE_SIZE, s.IMAGE_SIZE), min(s.PREVIEW_STEPS, s.TIME_STEPS)
        number, _ = preview_size(s, self.checkpoints.progress.last_step)
        pictures = torch.zeros(number, *shape, dtype=torch.uint8)
        labels = torch.arange(number) % len(classes)
        batches = torch.arange(number).split(self.world.local_batch_size(s.BATCH_SIZE))
        for rows in self.monitor.track("preview", self.world.shard(batches)):
            x_T = noise.PictureNoise(s.SEED, rows.tolist(), shape, device)
            y = labels[rows].to(device) if s.CLASS_CONDITIONAL else None
            images = self.diffusion.sample(network, (len(rows), *shape), "dpm++", steps, noise=x_T, y=y, guidance=s.guidance)
            pictures[rows] = to_uint8(images)
        pictures = self.world.sum(pictures)  # those of the other processes are zero here
        if not s.CLASS_CONDITIONAL:
            return sheet(pictures)
        return sheet(pictures, [caption(classes[k], k) for k in labels.tolist()], class_columns(len(classes)))


def validate(world: World, diffusion: GaussianDiffusion, network: nn.Module, batches: Iterable[Batch]) -> float:
    """The mean of GaussianDiffusion.validation_losses over images, steps and noise that are always the same."""
    sums = torch.zeros(2, dtype=torch.float64)  # of the losses, of the images
    for batch in batches:
        losses = diffusion.validation_losses(network, *batch).cpu()
        sums += torch.stack([losses.double().sum(), torch.tensor(len(losses))])
    loss, count = world.sum(sums).tolist()
    return loss / count
