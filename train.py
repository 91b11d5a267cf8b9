"""Train a diffusion model: `python train.py`. Every constant of config.py is a flag; `--help` lists them.

The same command goes on where the last run stopped.
"""

import signal

import src  # noqa: F401 (before torch: see there)

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() listens: Ctrl-C amid the imports shows no traceback

import contextlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import config
from src import noise
from src.batches import TrainBatches, validation_batches
from src.dataset import DATASETS, obtain_tiny_imagenet, prepare
from src.diffusion import GaussianDiffusion
from src.ema import EMA
from src.images import DeviceImages, Images
from src.model import UNet, parameter_count
from src.pictures import draw, grid, save_png, to_uint8
from src.runtime.build import build_diffusion, build_model, build_optimizer
from src.runtime.checkpoint import check_resume, find_latest, keep_previous, remove_parts, restore, save_checkpoint
from src.runtime.device import InPrecision, describe, memory_advice, pick_device, pick_precision, place, should_compile
from src.runtime.distributed import World
from src.runtime.guard import FiniteGuard
from src.runtime.lock import FolderLock
from src.runtime.meter import Meter
from src.runtime.monitor import Monitor
from src.runtime.script import run_script
from src.runtime.settings import Run, Settings, as_text, changed_from_defaults, resolve
from src.runtime.signals import StopRequest
from src.utils import UserError, make_folder, writing_to


@dataclass
class Training:
    """What a run is made of. Only the last three change hands here; everything else changes inside."""

    settings: Settings
    world: World
    device: torch.device
    dtype: torch.dtype
    images: Images
    batches: TrainBatches
    held_out: DeviceImages
    model: UNet
    ema: EMA
    diffusion: GaussianDiffusion
    optimizer: torch.optim.Adam
    scaler: torch.amp.GradScaler
    meter: Meter
    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs done, with all that end_epoch does
    best_loss: float = math.inf  # lowest held-out loss so far

    @property
    def owes_epoch_end(self) -> bool:
        """Whether the last step of an epoch is done and the rest is not: a signal came in between."""
        epoch, steps_into_epoch = divmod(self.step, self.batches.steps_per_epoch)
        return steps_into_epoch == 0 and self.epoch < epoch

    def save(self, name: str) -> None:
        folder = Path(self.settings.CHECKPOINT_PATH)
        self.meter.collect(self.world)
        if self.world.is_main:
            if name == "latest":
                keep_previous(folder / "latest.pth")
            save_checkpoint(
                folder / f"{name}.pth",
                **{part: getattr(self, part) for part in ("model", "ema", "optimizer", "scaler", "meter", "settings")},
                step=self.step,
                epoch=self.epoch,
                best_loss=self.best_loss,
                classes=self.images.classes,
                class_ids=self.images.class_ids,
            )
        self.world.barrier()  # a GPU that waited for the disk in the next step might wait too long


def set_up(run: Run, world: World) -> Training:
    """Everything that a run needs, as the last one left it if there was one."""
    s = run.settings
    world.share(s.BATCH_SIZE)
    device = pick_device(s.DEVICE, world.local_rank)
    dtype = pick_precision(s.PRECISION, device)
    folder = Path(s.CHECKPOINT_PATH)
    with world.in_turn():
        make_folder(Path(s.OUTPUT_PATH), "--output_path")
        make_folder(Path(s.LOG_PATH), "--log_path")
        if world.is_main:
            remove_parts(folder)
        saved = find_latest(folder)
        if saved:
            check_resume(saved["config"], s, run.accept_changes)
        if s.DATASET == "tiny-imagenet":
            obtain_tiny_imagenet(s.DATA_PATH, s.DATA_URL, s.DATA_SIZE, s.DATA_MD5)
        images, held_out = (
            prepare(s.DATASET, s.DATA_PATH, split, s.IMAGE_SIZE, s.CACHE_PATH, s.NUM_WORKERS) for split in ("train", "val")
        )
    world.check_same(saved["step"] if saved else 0, "the step to go on from")
    world.check_same(len(images), "the number of training images")
    model = build_model(s, len(images.classes)).train()
    place(model, device)
    training = Training(
        settings=s,
        world=world,
        device=device,
        dtype=dtype,
        images=images,
        batches=TrainBatches(images.to(device), s, world),
        held_out=held_out.to(device),
        model=model,
        ema=EMA(model, s.EMA_DECAY),
        diffusion=build_diffusion(s).to(device),
        optimizer=build_optimizer(s, model),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        meter=Meter(s.TIME_STEPS, device),
    )
    if saved:
        if saved["classes"] != images.classes:
            raise UserError(
                f"{folder}/latest.pth was trained on other classes than the data have. "
                f"Start anew with another --checkpoint_path."
            )
        restore(saved, model, training.ema, training.optimizer, training.scaler, training.meter)
        if not world.is_main:
            training.meter.sums.zero_()  # the first process has them for all
        training.step, training.epoch, training.best_loss = saved["step"], saved["epoch"], saved["best_loss"]
    return training


def train(run: Run, world: World, stop: StopRequest) -> None:
    """The training loop, from the last save to the end or to a request to stop."""
    with stop.at_once():
        tr = set_up(run, world)
    s, device, batches = tr.settings, tr.device, tr.batches
    last_step = min(s.EPOCHS * batches.steps_per_epoch, run.max_steps or math.inf)
    print_plan(run, tr, last_step)
    parallel = world.parallel(InPrecision(tr.model, device, tr.dtype), device)
    network: Callable = parallel
    if should_compile(s.COMPILE, device):
        network = torch.compile(network)
    guard = FiniteGuard(device)
    saved_at = time.monotonic()
    log_path = Path(s.LOG_PATH) if world.is_main else None
    with Monitor(log_path, tr.step, last_step, batches.images_per_step, device) as monitor, stop.postponed():
        monitor.text(tr.step, "settings", s._asdict())
        if tr.owes_epoch_end:
            end_epoch(tr, monitor, stop)
            tr.save("latest")
        is_stopped = stop.agree(world)
        while tr.step < last_step and not is_stopped:
            learning_rate = s.LEARNING_RATE * min(1.0, (tr.step + 1) / max(1, s.WARMUP_STEPS))
            tr.optimizer.param_groups[0]["lr"] = learning_rate
            if s.DROPOUT:
                torch.manual_seed(noise.integer_seed(s.SEED, noise.DROPOUT, tr.step, world.rank))

            # The update: GRAD_ACCUM_STEPS passes, one optimizer step.
            loss = torch.zeros((), device=device)
            for micro in range(s.GRAD_ACCUM_STEPS):
                x_0, t, eps, y = batches(tr.step, micro)  # x_0, eps: [B, 3, S, S]; t, y: [B]
                is_last = micro + 1 == s.GRAD_ACCUM_STEPS
                with contextlib.nullcontext() if is_last else world.keeping_gradients(parallel):
                    losses = tr.diffusion.training_losses(network, x_0, t, eps, y)  # [B], Eq. (14)
                    share = losses.mean() / s.GRAD_ACCUM_STEPS
                    tr.scaler.scale(share).backward()
                loss += share.detach()
                tr.meter.add(losses, t)
            world.sum(loss)  # finite in all processes or in none, as the gradients are
            tr.scaler.unscale_(tr.optimizer)
            norm = nn.utils.clip_grad_norm_(tr.model.parameters(), s.GRAD_CLIP or math.inf)
            tr.meter.add_norm(norm)
            if not tr.scaler.is_enabled():  # fp16 has its own way: skip the step and lower the scale
                tr.optimizer.found_inf = guard.note(tr.step + 1, loss, norm)  # type: ignore[attr-defined]  # 1: Adam skips
            tr.scaler.step(tr.optimizer)
            tr.scaler.update()
            tr.optimizer.zero_grad(set_to_none=True)
            tr.ema.update(tr.model, tr.step)
            tr.step += 1
            monitor.bar.update()

            # What happens every so often. Only here does the loop wait for the device.
            ends_epoch = tr.step % batches.steps_per_epoch == 0
            waits = ends_epoch or tr.step == last_step or tr.step % s.LOG_EVERY == 0 or device.type == "cpu"
            must_save = ends_epoch or tr.step == last_step
            if waits or world.size == 1:
                save_is_due = 0 < s.SAVE_MINUTES * 60 < time.monotonic() - saved_at
                must_save |= any(world.max(save_is_due, stop.signal or 0))
            if waits or must_save:
                guard.check(s, learning_rate, tr.scaler)
            if tr.step % s.LOG_EVERY == 0:
                tr.meter.collect(world)
                monitor.log(tr.step, tr.meter.read() | {"optimizer/learning_rate": learning_rate})
            if ends_epoch:
                end_epoch(tr, monitor, stop)
            if must_save:
                monitor.flush()  # else a kill would lose points that the resumed run does not draw again
                tr.save("latest")  # last: what came before is done again by a run that was killed meanwhile
                saved_at = time.monotonic()
                monitor.restart_clock(tr.step)
                is_stopped = stop.agree(world)  # only here: a signal that came too late for this save waits for the next
    say_goodbye(tr, last_step)


def end_epoch(tr: Training, monitor: Monitor, stop: StopRequest) -> None:
    """Held-out loss and best.pth; now and then a preview grid and a checkpoint to keep. All of it, or where a signal
    comes nothing: the next start makes up for it. (Several processes share the work and finish it.)"""
    s, epoch = tr.settings, tr.step // tr.batches.steps_per_epoch
    ema_network, raw_network = (InPrecision(model, tr.device, tr.dtype) for model in (tr.ema.model, tr.model))
    pictures = {}
    try:
        with stop.at_once() if tr.world.size == 1 else contextlib.nullcontext():  # this may take minutes
            held_out_loss = validate(tr, ema_network)
            if epoch % s.SAMPLE_EVERY == 0 or epoch == s.EPOCHS:
                pictures = {"samples/ema": preview(tr, ema_network), "samples/raw": preview(tr, raw_network)}
    except KeyboardInterrupt:
        return
    tr.epoch = epoch
    monitor.scalars(tr.step, {"loss/held_out": held_out_loss, "progress/epoch": epoch})
    monitor.say(f"epoch {epoch}, step {tr.step:,}: held-out loss {held_out_loss:.5f}")
    for tag, picture in pictures.items():
        monitor.picture(tr.step, tag, picture)
    if pictures and tr.world.is_main:
        with writing_to(Path(s.OUTPUT_PATH), "--output_path"):
            save_png(pictures["samples/ema"], Path(s.OUTPUT_PATH) / "samples" / f"epoch_{epoch:03}.png")
    if held_out_loss < tr.best_loss:
        tr.best_loss = held_out_loss
        tr.save("best")
    if epoch % s.SAVE_EVERY == 0 or epoch == s.EPOCHS:
        tr.save(f"epoch_{epoch:03}")


def validate(tr: Training, network: nn.Module) -> float:
    """Mean squared error of the predicted noise on held-out images, at fixed t and noise; comparable between runs."""
    sums = torch.zeros(2, dtype=torch.float64)  # of the losses, of the images
    for batch in validation_batches(tr.held_out, tr.settings, tr.world):
        losses = tr.diffusion.eps_losses(network, *batch).cpu()
        sums += torch.stack([losses.double().sum(), torch.tensor(len(losses))])
    loss, count = tr.world.sum(sums).tolist()
    return loss / count


def preview(tr: Training, network: nn.Module) -> Tensor:
    """A grid of NUM_SAMPLES pictures from always the same noise: those that `sample.py --seed SEED` draws. [3, H, W] uint8."""
    s, world = tr.settings, tr.world
    pictures = torch.zeros(s.NUM_SAMPLES, 3, s.IMAGE_SIZE, s.IMAGE_SIZE, dtype=torch.uint8)
    for places in world.mine(torch.arange(s.NUM_SAMPLES).split(tr.batches.size)):
        y = places.to(tr.device) % len(tr.images.classes) if s.CLASS_CONDITIONAL else None
        options = dict(sampler="dpm++", steps=min(s.PREVIEW_STEPS, s.TIME_STEPS), y=y)
        pictures[places] = to_uint8(draw(tr.diffusion, network, s.SEED, places.tolist(), s.IMAGE_SIZE, **options))
    return grid(world.sum(pictures))  # those of the other processes are zero here


def print_plan(run: Run, tr: Training, last_step: int) -> None:
    """What will happen, before it does."""
    s = run.settings
    changed = [f"{name} {as_text(new)}" for name, _, new in changed_from_defaults(s, config)]
    preset = f" (preset {run.preset})" if run.preset else ""
    done = f"going on after step {tr.step:,}" if tr.step else "starting anew"
    held_out = min(s.VAL_IMAGES, len(tr.held_out))
    together = f"; {tr.world.size} processes of {tr.batches.size} images each" if tr.world.size > 1 else ""
    per_epoch = f"{tr.batches.steps_per_epoch:,} an epoch, {tr.batches.images_per_step} images each"
    for title, text in {
        "settings": (", ".join(changed) or "all defaults") + preset,
        "device": f"{describe(tr.device)}, {as_text(tr.dtype).removeprefix('torch.')}{together}",
        "network": f"{parameter_count(tr.model):,} parameters",
        "images": f"{len(tr.images):,} for training, {held_out:,} held out, {s.IMAGE_SIZE}x{s.IMAGE_SIZE}",
        "steps": f"{last_step:,} in all ({per_epoch}), {done}",
        "saves to": Path(s.CHECKPOINT_PATH).resolve(),
        "grids in": Path(s.OUTPUT_PATH).resolve() / "samples",
        "logs in": Path(s.LOG_PATH).resolve(),
    }.items():
        print(f"{title:<9} {text}", flush=True)


def say_goodbye(tr: Training, last_step: int) -> None:
    """Where the run stands, and the next command to type."""
    folder = Path(tr.settings.CHECKPOINT_PATH)
    if tr.step < last_step or tr.owes_epoch_end:
        print(
            f"Stopped after step {tr.step:,} of {last_step:,}; {folder / 'latest.pth'} is saved. "
            f"The same command goes on from there."
        )
        return
    best = next(name for name in ("best.pth", "latest.pth") if (folder / name).exists())
    print(f"Done: step {tr.step:,}. Draw pictures with: python sample.py --checkpoint {folder / best}")


def main() -> int:
    run: Run | None = None

    def body(stop: StopRequest) -> None:
        nonlocal run
        run = resolve(config, sys.argv[1:], DATASETS)
        with World.join() as world, contextlib.ExitStack() as held:
            if world.is_main:
                held.enter_context(FolderLock(Path(run.settings.CHECKPOINT_PATH), "--checkpoint_path"))
            train(run, world, stop)

    stopped = "Stopped at once. What was saved before stands; the same command goes on."
    return run_script("train.py", body, lambda: memory_advice(run.settings) if run else "Out of memory.", stopped)


if __name__ == "__main__":
    sys.exit(main())
