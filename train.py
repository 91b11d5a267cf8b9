"""Train a diffusion model: `python train.py`. Every constant of config.py is a flag; `--help` lists them.

The same command goes on where the last run stopped.
"""

from src.runtime import early

if __name__ == "__main__":
    early.settle()  # before torch is imported

import contextlib
import math
import sys
import time
from collections.abc import Sequence

import torch
from torch import nn

from src import noise
from src.dataset import DATASETS, DeviceImages, Images, same_classes
from src.ema import EMA
from src.runtime.build import build_batches, build_diffusion, build_model, build_optimizer, build_validation, open_images
from src.runtime.checkpoint import Checkpoints, Progress, find_latest
from src.runtime.device import InPrecision, compiled, memory_advice, pick_device, pick_precision, place, should_compile
from src.runtime.distributed import World
from src.runtime.flags import command_line
from src.runtime.folders import claim, lock_folder
from src.runtime.judge import Judge
from src.runtime.monitor import Meter, Monitor, work_of
from src.runtime.plan import print_plan, print_summary
from src.runtime.resume import check_data, check_length, check_resume, network_of, start_from
from src.runtime.settings import Run, Settings, resolve
from src.runtime.signals import StopRequest, run_script
from src.utils import UserError, writing

try:
    import config
except (Exception, SystemExit) as error:  # of any kind: it is the user's file
    sys.exit(f"train.py: config.py cannot be read: {error}. Undo the last change there.")

LR_FLOOR = 0.01  # of LEARNING_RATE: what a decaying schedule ends at


def train(run: Run, world: World, stop: StopRequest) -> None:
    """Algorithm 1 of Ho et al. 2020, from the last save to the last step or to a signal."""
    s = run.settings
    device = pick_device(s.DEVICE, world.local_rank)
    dtype = pick_precision(s.PRECISION, device)
    with stop.at_once():  # there is nothing to lose yet
        compiles = should_compile(s.COMPILE, device)
        saved, data = open_data(run, world)
    model = place(build_model(s, len(data["train"].classes)).train(), device, dtype)
    if run.init_from and not saved:
        start_from(run.init_from, s, model)
    ema, diffusion, meter = EMA(model, s.EMA_DECAY), build_diffusion(s).to(device), Meter(s.TIME_STEPS, device, world)
    optimizer, scaler = build_optimizer(s, model), torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    batches = build_batches(s, DeviceImages(data["train"], device), world)
    progress = Progress(run.limit(batches.steps_per_epoch)[0], batches.steps_per_epoch)
    val_batches = build_validation(s, DeviceImages(data["val"], device), world, last_step=progress.last_step)
    check_length(saved, s, progress.last_step, run.accept_changes)
    parts = {"model": model, "ema": ema.model, "optimizer": optimizer, "scaler": scaler, "meter": meter}
    checkpoints = Checkpoints(s, world, data, progress, parts, saved)
    print_plan(run, config, device, dtype, model, batches, val_batches, progress.step)
    parallel = world.parallel(InPrecision(model, device, dtype), device)
    network = compiled(parallel) if compiles else parallel
    networks = {"ema": InPrecision(ema.model, device, dtype), "raw": InPrecision(model, device, dtype)}
    work = work_of(s, world, batches, val_batches, progress.last_step)
    with Monitor(s, world, device, progress.step, progress.last_step, work) as monitor, stop.postponed("step"):
        judge, is_stopped = Judge(s, world, stop, monitor, diffusion, networks, val_batches, checkpoints), stop.agree(world)
        while progress.step < progress.last_step and not is_stopped:
            step, lr = progress.step, learning_rate(s, progress.step, progress.last_step)
            optimizer.param_groups[0]["lr"] = lr
            torch.manual_seed(noise.seed(s.SEED, noise.DROPOUT, step, world.rank))  # dropout's masks follow from the step, too
            for micro in range(s.GRAD_ACCUM_STEPS):
                x_0, t, eps, y = batches(step, micro)  # [B, C, S, S], [B], [B, C, S, S], [B] or None
                with world.no_sync(parallel, unless=micro == s.GRAD_ACCUM_STEPS - 1):
                    losses = diffusion.training_losses(network, x_0, t, eps, y)  # [B], Eq. (14)
                    scaler.scale(losses.mean() / s.GRAD_ACCUM_STEPS).backward()
                meter.add(losses, t)
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), s.GRAD_CLIP or math.inf)
            optimizer.found_inf = meter.add_norm(norm, step + 1)  # type: ignore[attr-defined]  # 1.0: fused Adam does nothing
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            ema.update(step)
            progress.step += 1
            monitor.bar.update()

            judges, logs, saves = due(s, world, stop, device, checkpoints)  # only then does the loop wait for the device
            if judges or logs or saves or device.type == "cpu":
                stop_if_not_finite(s, meter, scaler, lr)
                meter.collect()
            if logs:
                monitor.log(progress.step, meter.read() | {"optimizer/learning_rate": lr})
            if judges:
                judge()
            if saves:
                monitor.events.flush()  # else a kill would lose points that the resumed run does not draw again
                checkpoints.save("latest")  # last: a run that was killed before this does again what came before
                monitor.restart_clock(progress.step)
                is_stopped = stop.agree(world)
    print_summary(s, progress.step, progress.last_step)


def due(s: Settings, world: World, stop: StopRequest, device: torch.device, checkpoints: Checkpoints) -> Sequence[bool]:
    """Whether to judge, to log and to save after the step just done. A signal and the clock may reach one process alone, and
    all must save together: several GPUs agree on that where they wait for each other in any case."""
    progress = checkpoints.progress
    judges = progress.step == progress.last_step or progress.step % (s.VAL_EVERY * progress.steps_per_epoch) == 0
    logs = progress.step % s.LOG_EVERY == 0
    wants_save = stop.signal is not None or 0 < 60 * s.SAVE_MINUTES < time.monotonic() - checkpoints.saved_at
    may_ask = judges or logs or device.type == "cpu" or world.size == 1
    return judges, logs, judges or (may_ask and any(world.max(wants_save)))


def learning_rate(s: Settings, step: int, last_step: int) -> float:
    """Of optimizer step number `step`, from 0: a linear warm-up, then LR_SCHEDULE down to LR_FLOOR in the last step."""
    warm_up = min(1.0, (step + 1) / max(1, s.WARMUP_STEPS))
    done = min(1.0, max(0, step + 1 - s.WARMUP_STEPS) / max(1, last_step - s.WARMUP_STEPS))
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[s.LR_SCHEDULE]
    return s.LEARNING_RATE * warm_up * (LR_FLOOR + (1 - LR_FLOOR) * decay)


def open_data(run: Run, world: World) -> tuple[dict | None, dict[str, Images]]:
    """The state to resume from, if there is one, and the images of "train" and "val". Raises UserError."""
    s, folder = run.settings, run.settings.folder("CHECKPOINT_PATH")
    with world.main_process_first():
        saved = find_latest(folder)
        if saved:
            check_resume(saved["config"], s, run.accept_changes)
        for name in ("OUTPUT_PATH", "LOG_PATH"):
            with writing(s.folder(name), f"--{name.lower()}"):
                claim(s.folder(name), folder, saved["config"].folder("CHECKPOINT_PATH") if saved else None)
        data = {split: open_images(s, split) for split in ("train", "val")}
    world.check_same(saved["step"] if saved else 0, "the step to go on from")
    world.check_same(len(data["train"]), "the number of training images")
    if s.CLASS_CONDITIONAL and not same_classes(data["train"].classes, data["val"].classes):
        train_classes, val_classes = (", ".join(data[split].classes[:9]) for split in ("train", "val"))
        advice = "Give both the same ones in the same order, or train without them: --class_conditional false."
        raise UserError(f"{s.DATASET} has the classes {train_classes} to train on and {val_classes} to validate. {advice}")
    if saved:
        check_data(saved, s, data, run.accept_changes)
    return saved, data


def stop_if_not_finite(s: Settings, meter: Meter, scaler: torch.amp.GradScaler, lr: float) -> None:
    """Wait for the device; raise UserError if the gradient of any step so far was not finite. Call before anything is saved.
    fp16 has its own way: the scaler skips such a step and halves its scale, from 65536, until there is no hope."""
    latest = s.folder("CHECKPOINT_PATH") / "latest.pth"
    kept = f"{latest} is the last good state" if latest.exists() else "nothing was saved yet"
    if scaler.is_enabled() and scaler.get_scale() < 1:
        found = f"The loss or gradients overflow fp16 even unscaled, so step after step is skipped (learning rate {lr:.1e})"
        raise UserError(f"{found}; {kept}. Run again with --precision bf16 or fp32.")
    if not scaler.is_enabled() and (step := int(meter.bad_step)) >= 0:
        found = f"The loss or gradient of step {step:,} is not finite (learning rate {lr:.1e}). It did not reach the weights"
        half = f"half the learning rate (--learning_rate {s.LEARNING_RATE / 2:g} --accept_changes)"
        raise UserError(f"{found}; {kept}. Run again with {half}, more --warmup_steps, or --precision fp32.")


def main(argv: Sequence[str] | None = None) -> int:
    def body(stop: StopRequest) -> None:
        run = resolve(config, command_line(argv, "DDPM_FLAGS"), DATASETS, network_of)
        stop.out_of_memory = memory_advice(run.settings.BATCH_SIZE, run.settings.GRAD_ACCUM_STEPS)
        with World.join() as world, contextlib.ExitStack() as held:
            names = ("CHECKPOINT_PATH", "OUTPUT_PATH", "LOG_PATH") if world.is_main else ()
            for folder, name in {run.settings.folder(name): name for name in names}.items():
                held.enter_context(lock_folder(folder, f"--{name.lower()}"))
            train(run, world, stop)

    return run_script("train.py", body, "Stopped at once. What was saved before is kept; the same command goes on.")


if __name__ == "__main__":
    sys.exit(main())
