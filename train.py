"""Train a diffusion model: `python train.py`. Every constant of config.py is a flag; `--help` lists them.

The same command goes on where the last run stopped.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below ends without a traceback

import contextlib
import math
import shlex
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import config
from src import noise
from src.dataset import DATASETS, DeviceImages, Images, TrainBatches
from src.diffusion import GaussianDiffusion
from src.ema import EMA
from src.model import parameter_count
from src.runtime.build import build_batches, build_diffusion, build_model, build_optimizer, build_validation, open_images
from src.runtime.checkpoint import Checkpoints, FolderLock, Progress, check_resume, find_latest
from src.runtime.device import InPrecision, describe, memory_advice, pick_device, pick_precision, place, should_compile
from src.runtime.distributed import World
from src.runtime.monitor import Meter, Monitor
from src.runtime.settings import Run, Settings, as_text, changed_from_defaults, resolve
from src.runtime.signals import StopRequest, run_script
from src.utils import UserError, grid, make_folder, save_png, to_uint8, writing


def train(run: Run, world: World, stop: StopRequest) -> None:
    """Algorithm 1 of Ho et al. 2020, from the last save to the last step or to a signal."""
    s = run.settings
    device = pick_device(s.DEVICE, world.local_rank)
    dtype = pick_precision(s.PRECISION, device)
    with stop.at_once():  # there is nothing to lose yet
        saved, images, held_out = open_data(run, world)
    model = place(build_model(s, len(images.classes)).train(), device, dtype)
    ema, diffusion = EMA(model, s.EMA_DECAY), build_diffusion(s).to(device)
    optimizer, scaler = build_optimizer(s, model), torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    batches, val_images = build_batches(s, DeviceImages(images, device), world), DeviceImages(held_out, device)
    meter, progress = Meter(s.TIME_STEPS, device, world), Progress()
    parts = {"model": model, "ema": ema.model, "optimizer": optimizer, "scaler": scaler, "meter": meter}
    checkpoints = Checkpoints(s, world, images, progress, parts, saved)
    last_step, limit = run.limit(batches.steps_per_epoch)
    parallel = world.parallel(InPrecision(model, device, dtype), device)
    network = torch.compile(parallel) if should_compile(s.COMPILE, device) else parallel
    networks = {"ema": InPrecision(ema.model, device, dtype), "raw": InPrecision(model, device, dtype)}
    print_plan(run, world, device, dtype, model, batches, len(val_images), progress.step, last_step, limit)

    with Monitor(s, world, device, progress.step, last_step) as monitor, stop.postponed("step"):
        is_stopped = stop.agree(world)
        while progress.step < last_step and not is_stopped:
            step, lr = progress.step, s.LEARNING_RATE * min(1.0, (progress.step + 1) / max(1, s.WARMUP_STEPS))
            optimizer.param_groups[0]["lr"] = lr
            torch.manual_seed(noise.seed(s.SEED, noise.DROPOUT, step, world.rank))  # dropout's masks follow from the step, too
            for micro in range(s.GRAD_ACCUM_STEPS):
                x_0, t, eps, y = batches(step, micro)  # [B, 3, S, S], [B], [B, 3, S, S], [B] or None
                with world.no_sync(parallel, unless=micro == s.GRAD_ACCUM_STEPS - 1):
                    losses = diffusion.training_losses(network, x_0, t, eps, y)  # [B], Eq. (14)
                    scaler.scale(losses.mean() / s.GRAD_ACCUM_STEPS).backward()
                meter.add(losses, t)
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), s.GRAD_CLIP or math.inf)
            optimizer.found_inf = meter.add_norm(norm, step + 1)  # type: ignore[attr-defined]  # 1.0, not finite: Adam skips
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            ema.update(step)
            progress.step += 1
            monitor.bar.update()

            # Every so often. Only here does the loop wait for the device.
            ends_epoch, is_last = progress.step % batches.steps_per_epoch == 0, progress.step == last_step
            wants_save = stop.signal is not None or checkpoints.is_due(s.SAVE_MINUTES)
            is_logged = progress.step % s.LOG_EVERY == 0
            if not (ends_epoch or is_last or is_logged or device.type == "cpu" or (wants_save and world.size == 1)):
                continue
            stop_if_not_finite(s, meter, scaler, lr)
            must_save = ends_epoch or is_last or any(world.max(wants_save))
            if must_save or is_logged:
                meter.collect()
            if is_logged:
                monitor.log(progress.step, meter.read() | {"optimizer/learning_rate": lr})
            if ends_epoch:
                progress.epoch = progress.step // batches.steps_per_epoch
                end_epoch(s, world, stop, monitor, diffusion, networks, val_images, progress, checkpoints)
            if must_save:
                monitor.flush()  # else a kill would lose points that the resumed run does not draw again
                checkpoints.save("latest")  # last: a run that was killed before this does again what came before
                monitor.restart_clock(progress.step)
                is_stopped = stop.agree(world)
    print_summary(s, progress, last_step)


def open_data(run: Run, world: World) -> tuple[dict | None, Images, Images]:
    """The state to resume from, if there is one, and the images of training and validation. Raises UserError."""
    s, folder = run.settings, Path(run.settings.CHECKPOINT_PATH)
    with world.main_process_first():
        make_folder(Path(s.OUTPUT_PATH), "--output_path")
        make_folder(Path(s.LOG_PATH), "--log_path")
        saved = find_latest(folder)
        if saved:
            check_resume(saved["config"], s, run.accept_changes)
        images, val_images = open_images(s, "train"), open_images(s, "val")
    world.check_same(saved["step"] if saved else 0, "the step to go on from")
    world.check_same(len(images), "the number of training images")
    if saved and saved["classes"] != images.classes:
        raise UserError(
            f"{folder}/latest.pth was trained on other classes than the data have. Start anew with another --checkpoint_path."
        )
    return saved, images, val_images


def stop_if_not_finite(s: Settings, meter: Meter, scaler: torch.amp.GradScaler, lr: float) -> None:
    """Wait for the device; raise UserError if the gradient of any step so far was not finite. Call before anything is saved.

    fp16 has its own way: the scaler skips such a step and halves its scale, from 65536, until there is no hope."""
    latest = Path(s.CHECKPOINT_PATH) / "latest.pth"
    kept = f"{latest} is the last good state" if latest.exists() else "nothing was saved yet"
    if scaler.is_enabled():
        if scaler.get_scale() < 1:
            raise UserError(
                f"The loss or gradients overflow fp16 even unscaled, so step after step is skipped (learning rate {lr:.1e}); "
                f"{kept}. Run again with --precision bf16 or fp32."
            )
    elif (step := int(meter.bad_step)) >= 0:
        raise UserError(
            f"The loss or gradient of step {step:,} is not finite (learning rate {lr:.1e}). It did not reach the weights; "
            f"{kept}. Run again with half the learning rate (--learning_rate {s.LEARNING_RATE / 2:g} --accept_changes), "
            f"more --warmup_steps, or --precision fp32."
        )


def end_epoch(
    s: Settings,
    world: World,
    stop: StopRequest,
    monitor: Monitor,
    diffusion: GaussianDiffusion,
    networks: dict[str, InPrecision],
    val_images: DeviceImages,
    progress: Progress,
    checkpoints: Checkpoints,
) -> None:
    """The validation loss and best.pth; every SAMPLE_EVERY epochs a preview, every SAVE_EVERY a checkpoint to keep."""
    epoch, is_end = progress.epoch, progress.epoch == s.EPOCHS
    with stop.postponed("validation"):
        val_loss = validate(s, world, diffusion, networks["ema"], val_images)
    monitor.scalars(progress.step, {"loss/val": val_loss, "progress/epoch": epoch})
    monitor.say(f"epoch {epoch}, step {progress.step:,}: validation loss {val_loss:.5f}")
    if epoch % s.SAMPLE_EVERY == 0 or is_end:
        with stop.postponed("preview"):
            sheets = {name: preview(s, world, diffusion, network) for name, network in networks.items()}
        for name, sheet in sheets.items():
            monitor.image(progress.step, f"samples/{name}", sheet)
        if world.is_main:
            path = Path(s.OUTPUT_PATH) / "samples" / f"epoch_{epoch:03}.png"
            with writing(path, "--output_path"):
                save_png(sheets["ema"], path)
    if val_loss < progress.best_loss:
        progress.best_loss = val_loss
        checkpoints.save("best")
    if epoch % s.SAVE_EVERY == 0 or is_end:
        checkpoints.save(f"epoch_{epoch:03}")


def validate(s: Settings, world: World, diffusion: GaussianDiffusion, network: nn.Module, val_images: DeviceImages) -> float:
    """The mean of GaussianDiffusion.validation_losses over images, steps and noise that are always the same."""
    sums = torch.zeros(2, dtype=torch.float64)  # of the losses, of the images
    for batch in build_validation(s, val_images, world):
        losses = diffusion.validation_losses(network, *batch).cpu()
        sums += torch.stack([losses.double().sum(), torch.tensor(len(losses))])
    loss, count = world.sum(sums).tolist()
    return loss / count


def preview(s: Settings, world: World, diffusion: GaussianDiffusion, network: InPrecision) -> Tensor:
    """A grid of NUM_SAMPLES pictures, always from the same noise: those that `sample.py --seed SEED` draws. [3, H, W] uint8."""
    device, shape = diffusion.signal.device, (3, s.IMAGE_SIZE, s.IMAGE_SIZE)
    pictures = torch.zeros(s.NUM_SAMPLES, *shape, dtype=torch.uint8)
    for indices in world.shard(torch.arange(s.NUM_SAMPLES).split(world.local_batch_size(s.BATCH_SIZE))):
        x_T = noise.PictureNoise(s.SEED, indices.tolist(), shape, device)
        y = indices.to(device) % network.model.num_classes if s.CLASS_CONDITIONAL else None
        steps = min(s.PREVIEW_STEPS, s.TIME_STEPS)
        pictures[indices] = to_uint8(diffusion.sample(network, (len(indices), *shape), "dpm++", steps, noise=x_T, y=y))
    return grid(world.sum(pictures))  # those of the other processes are zero here


def print_plan(
    run: Run,
    world: World,
    device: torch.device,
    dtype: torch.dtype,
    model: nn.Module,
    batches: TrainBatches,
    val_count: int,
    step: int,
    last_step: int,
    limit: str,
) -> None:
    """What will happen, before it does."""
    s = run.settings
    changed = [f"{name} {as_text(new)}" for name, _, new in changed_from_defaults(s, config)]
    preset = f" (preset {run.preset})" if run.preset else ""
    done = f"going on after step {step:,}" if step else "starting anew"
    together = f"; {world.size} processes of {batches.local_batch_size} images each" if world.size > 1 else ""
    per_epoch = f"{batches.steps_per_epoch:,} an epoch, {batches.images_per_step} images each"
    size = f"{s.IMAGE_SIZE}x{s.IMAGE_SIZE}"
    for title, text in {
        "settings": (", ".join(changed) or "all defaults") + preset,
        "device": f"{describe(device)}, {as_text(dtype).removeprefix('torch.')}{together}",
        "network": f"{parameter_count(model):,} parameters",
        "images": f"{len(batches.images):,} for training, {min(s.VAL_IMAGES, val_count):,} for validation, {size}",
        "steps": f"{last_step:,} in all by {limit} ({per_epoch}), {done}",
        "saves to": Path(s.CHECKPOINT_PATH).resolve(),
        "grids in": Path(s.OUTPUT_PATH).resolve() / "samples",
        "logs in": Path(s.LOG_PATH).resolve(),
    }.items():
        print(f"{title:<9} {text}", flush=True)


def print_summary(s: Settings, progress: Progress, last_step: int) -> None:
    """Where the run stands, and the next command to type."""
    folder = Path(s.CHECKPOINT_PATH)
    if progress.step < last_step:
        print(
            f"Stopped after step {progress.step:,} of {last_step:,}; {folder / 'latest.pth'} is saved. "
            f"The same command goes on from there."
        )
        return
    best = next(name for name in ("best.pth", "latest.pth") if (folder / name).exists())
    print(f"Done: step {progress.step:,}. Draw pictures with: python sample.py --checkpoint {shlex.quote(str(folder / best))}")


def main() -> int:
    run: Run | None = None

    def body(stop: StopRequest) -> None:
        nonlocal run
        run = resolve(config, sys.argv[1:], DATASETS)
        with World.join() as world, contextlib.ExitStack() as held:
            if world.is_main:
                held.enter_context(FolderLock(Path(run.settings.CHECKPOINT_PATH), "--checkpoint_path"))
            train(run, world, stop)

    def out_of_memory() -> str:
        return memory_advice(run.settings.BATCH_SIZE, run.settings.GRAD_ACCUM_STEPS) if run else "Out of memory."

    stopped = "Stopped at once. What was saved before is kept; the same command goes on."
    return run_script("train.py", body, out_of_memory, stopped)


if __name__ == "__main__":
    sys.exit(main())
