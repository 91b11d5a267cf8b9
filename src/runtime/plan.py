"""What a run says before its first step, what it will do and what may go wrong, and after its last."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from src.dataset import OBTAIN, TrainBatches, ValidationBatches
from src.model import UNet, forward_gflop, parameter_count
from src.runtime.device import describe
from src.runtime.flags import print_idle
from src.runtime.settings import Run, Settings, as_text, changed_from_defaults
from src.utils import count

FEW_STEPS = 2000  # fewer in all are warned about


def print_plan(
    run: Run,
    config: ModuleType,
    device: torch.device,
    dtype: torch.dtype,
    model: UNet,
    batches: TrainBatches,
    val_batches: ValidationBatches,
    step: int,
) -> None:
    """What will happen, before it does."""
    s, (last_step, limit) = run.settings, run.limit(batches.steps_per_epoch)
    changed = [f"{name} {as_text(new)}" for name, _, new in changed_from_defaults(s, config)]
    origin = [f"preset {run.preset}"] * bool(run.preset) + [f"network of {run.init_from}"] * bool(run.init_from and not step)
    done = f"going on after step {step:,}" if step else "starting anew"
    processes = s.BATCH_SIZE // batches.local_batch_size
    together = f"; {processes} processes of {batches.local_batch_size} images each" if processes > 1 else ""
    per_epoch = f"{batches.steps_per_epoch:,} an epoch, {count(batches.images_per_step, 'image')} each"
    size, gflop = f"{s.IMAGE_SIZE}x{s.IMAGE_SIZE}", forward_gflop(model, s.IMAGE_SIZE)
    pflop = 3 * gflop * last_step * batches.images_per_step / 1e6  # a backward pass takes two forward passes
    for title, text in {
        "settings": (", ".join(changed) or "all defaults") + (f" ({', '.join(origin)})" if origin else ""),
        "device": f"{describe(device)}, {as_text(dtype).removeprefix('torch.')}{together}",
        "network": f"{parameter_count(model):,} parameters, {gflop:.3g} GFLOP forward an image, {pflop:,.2f} PFLOP in all",
        "images": f"{len(batches.images):,} for training, {len(val_batches.rows.unique()):,} for validation, {size}",
        "classes": class_line(s, batches.images.classes),
        "steps": f"{last_step:,} in all by {limit} ({per_epoch}), {done}",
        "saves to": s.folder("CHECKPOINT_PATH").resolve(),
        "grids in": s.folder("OUTPUT_PATH").resolve() / "samples",
        "logs in": s.folder("LOG_PATH").resolve(),
    }.items():
        if text:
            print(f"{title:<9} {text}")
    print_idle(run.typed, idle_flags(run, step))
    for warning in warnings_of(s, last_step, batches.steps_per_epoch, not run.init_from, batches.images.classes):
        print(f"Warning: {warning}")


def class_line(s: Settings, classes: list[str]) -> str:
    """Which classes there are, and whether the network is told them; "" for pictures that are not sorted."""
    names = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
    how = "; chosen by CLASSES" if s.CLASSES else ""
    if not s.CLASS_CONDITIONAL:
        how += "; not told to the network (to draw them by name: --class_conditional true --run NAME)"
    return f"{len(classes):,}: {names}{how}" if len(classes) > 1 or s.CLASSES else ""


def idle_flags(run: Run, step: int) -> dict[str, tuple[str, bool]]:
    """When flags have no effect, as print_idle takes it. step: of the checkpoint that the run goes on from, or 0."""
    s = run.settings
    return {
        "on a run that has a checkpoint; --run NAME starts another": ("init_from", run.init_from is not None and step > 0),
        "on a new run": ("accept_changes", not step),
        "without --class_conditional": ("label_dropout preview_guidance", not s.CLASS_CONDITIONAL),
        f"above TIME_STEPS {s.TIME_STEPS}": ("preview_steps", s.PREVIEW_STEPS > s.TIME_STEPS),
        "on --dataset shapes": ("data_path skip_damaged", s.DATASET == "shapes"),
        "with LABEL_DROPOUT 0": ("preview_guidance", s.CLASS_CONDITIONAL and not s.LABEL_DROPOUT),
        f"on --dataset {s.DATASET}, which has no such address": ("data_url data_size data_md5", s.DATASET not in OBTAIN),
    }


def warnings_of(
    s: Settings, last_step: int, steps_per_epoch: int, starts_from_noise: bool = True, classes: Sequence[str] = ()
) -> list[str]:
    """What makes a run fail in silence: one sentence each, with what to type instead."""
    every = s.VAL_EVERY * steps_per_epoch
    table = {
        f"{count(last_step, 'step')} in all: most networks draw only noise before some thousands. Use --max_steps 10000, or "
        f"for a folder of 100 to 1,000 pictures --preset small.": starts_from_noise and last_step < FEW_STEPS,
        f"The warm-up of {s.WARMUP_STEPS:,} steps takes more than half of the run, so the learning rate hardly gets to work. "
        f"Use --warmup_steps {last_step // 10}.": last_step < 2 * s.WARMUP_STEPS,
        f"A validation and a save after every {count(every, 'step')} may take longer than these. "
        f"Use --val_every {-(-FEW_STEPS // (10 * steps_per_epoch))}.": every < FEW_STEPS / 20 and last_step > FEW_STEPS,
        f"There is one class, {', '.join(classes)}, so CLASS_CONDITIONAL tells the network nothing. Sort the pictures into a "
        f"folder for each class, or use --class_conditional false.": s.CLASS_CONDITIONAL and len(classes) == 1,
    }
    return [sentence for sentence, is_so in table.items() if is_so]


def print_summary(s: Settings, step: int, last_step: int) -> None:
    """Where the run stands, and the next command to type."""
    latest, best = (s.folder("CHECKPOINT_PATH") / name for name in ("latest.pth", "best.pth"))
    if step < last_step:
        kept = f"{latest} is saved" if latest.exists() else "there is nothing to save yet"
        print(f"Stopped after step {step:,} of {last_step:,}; {kept}. The same command goes on from there.")
        return
    is_default = s.RUN and Path(s.CHECKPOINT_PATH) == Path("checkpoints")
    which = f"--run {s.RUN}" if is_default else f"--checkpoint {shlex.quote(str(best))}"
    guidance = f" --guidance {s.guidance:g}" if s.guidance != 1 else ""
    print(f"Done: step {step:,}. Draw pictures with: python sample.py {which}{guidance}")
