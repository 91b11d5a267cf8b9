"""Checkpoints: plain dicts of tensors and numbers, written whole, opened without running any code in them."""

import contextlib
import os
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from src.ema import EMA
from src.meter import Meter
from src.settings import Settings, as_flags, as_text, differences, settings_from_dict
from src.utils import UserError, atomic_file, flush_folder

VERSION = 1  # of the layout below; a program reads its own and older ones
KEYS = {
    *("version", "config", "step", "epoch", "best_loss", "classes", "class_ids"),
    *("model", "ema", "optimizer", "scaler", "meter"),
}


class CheckpointError(UserError):
    """A checkpoint that cannot be used, and what to do about it."""


# --- what one writes the other restores ---------------------------------------------------------------


def save_checkpoint(
    path: Path,
    model: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    meter: Meter,
    settings: Settings,
    *,
    step: int,
    epoch: int,
    best_loss: float,
    classes: list[str],
    class_ids: list[str],
) -> None:
    """Write everything that exact resume and sampling need. step and epoch count what is finished. The noise and the
    order of the images follow from SEED and step, so no generator's state is kept. Raises UserError where the disk is full
    or fails; what stood at `path` then stands there still."""
    state = {
        "version": VERSION,
        "model": model.state_dict(),
        "ema": ema.model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),  # empty but for fp16
        "meter": meter.state_dict(),
        "step": step,
        "epoch": epoch,
        "best_loss": best_loss,
        "classes": classes,
        "class_ids": class_ids,
        "config": settings._asdict(),
    }
    try:
        with atomic_file(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch wraps the failure of a write in a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        needed = (
            sum(t.nbytes for t in [*model.state_dict().values(), *ema.model.state_dict().values()]) * 2
        )  # Adam: two moments
        raise UserError(
            f"Cannot save {path}: {cause.strerror}. It takes about {needed / 1e6:,.0f} MB, "
            f"{shutil.disk_usage(path.parent).free / 1e6:,.0f} MB are free there. The checkpoints saved before are whole: "
            f"make room, for example by removing an old epoch_*.pth, and the same command goes on."
        ) from None


def load_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Open a checkpoint on the CPU. mmap reads each tensor from the disk when it is first used.
    Raises CheckpointError with a sentence for each way in which the file may be wrong."""
    if not path.exists():
        found = ", ".join(str(p) for p in sorted(path.parent.glob("*.pth"))) or "none found there"
        raise CheckpointError(
            f"No checkpoint at {path}. Run 'python train.py' first, or pass --checkpoint with one of: {found}."
        )
    if not zipfile.is_zipfile(path):  # torch writes zip files, whose index stands at the end
        raise CheckpointError(f"{path} is not a whole checkpoint: truncated, or written by another program. Use another one.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path} holds Python objects, which could run code when opened; it is refused.") from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({str(error).splitlines()[0]}). Use another checkpoint.") from None
    if not isinstance(state, dict) or "version" not in state:
        raise CheckpointError(
            f"{path} is a file of another program: it has none of this one's entries. Use another checkpoint."
        )
    if state["version"] > VERSION:
        raise CheckpointError(
            f"{path} has format version {state['version']}, this program reads up to {VERSION}. Update it (git pull)."
        )
    if missing := KEYS - state.keys():
        raise CheckpointError(f"{path} lacks {', '.join(sorted(missing))}; it was not written whole. Use another checkpoint.")
    state["config"] = settings_from_dict(state["config"])
    return state


def restore(
    state: Mapping[str, Any],
    model: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    meter: Meter,
) -> None:
    """Put a loaded checkpoint back into the objects of a run."""
    model.load_state_dict(state["model"])
    ema.model.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    if scaler.is_enabled() and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    meter.load_state_dict(state["meter"])


# --- latest.pth: what a restart resumes from ----------------------------------------------------------


def keep_previous(latest: Path) -> None:
    """Give latest.pth a second name, latest.previous.pth, just before it is replaced: one predecessor survives."""
    if latest.exists():
        previous = latest.with_name("latest.previous.pth")
        link = latest.with_name(f".{previous.name}.part-{os.getpid()}")
        link.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a file system without hard links goes without the predecessor
            os.link(latest, link)
            os.replace(link, previous)
            flush_folder(latest.parent)


def remove_parts(folder: Path) -> None:
    """Remove what a run killed while saving left half-written. Call while holding the folder's lock."""
    for part in folder.glob(".*.part-*"):
        part.unlink(missing_ok=True)


def find_latest(folder: Path) -> dict[str, Any] | None:
    """The state to resume from: latest.pth, or where that does not load the newest checkpoint that does, with a warning.
    None where there is none. Raises CheckpointError where there are some and none loads."""
    latest = folder / "latest.pth"
    others = sorted((p for p in folder.glob("*.pth") if p != latest), key=lambda p: p.stat().st_mtime, reverse=True)
    if not latest.exists() and not others:
        return None
    if latest.exists():
        try:
            return load_checkpoint(latest)
        except CheckpointError as error:
            aside = latest.with_name("latest.damaged")
            os.replace(latest, aside)
            print(f"Warning: {error} It was set aside as {aside}.")
    states = []
    for path in others:
        with contextlib.suppress(CheckpointError):
            states.append((load_checkpoint(path, mmap=True)["step"], path))
    if not states:
        raise CheckpointError(f"No checkpoint in {folder} loads. Move them away to start anew, or restore one from a backup.")
    step, path = max(states)
    print(f"Going on from {path}, step {step:,}, the newest that loads.")
    return load_checkpoint(path)


# --- settings that contradict the checkpoint ----------------------------------------------------------

# What a resumed run may change freely: where things are, how fast, how often, how long.
FREE = {
    *("DATA_PATH", "DATA_URL", "DATA_SIZE", "DATA_MD5", "CACHE_PATH", "CHECKPOINT_PATH", "OUTPUT_PATH", "LOG_PATH"),
    *("NUM_WORKERS", "PRECISION", "COMPILE", "DEVICE", "ACTIVATION_CHECKPOINTING"),
    *("EPOCHS", "NUM_SAMPLES", "PREVIEW_STEPS", "SAVE_EVERY", "SAVE_MINUTES", "SAMPLE_EVERY", "LOG_EVERY"),
}
# What changes the experiment but leaves the weights and the count of epochs meaningful: with --accept_changes.
TUNABLE = {
    *("HORIZONTAL_FLIP", "DROPOUT", "LABEL_DROPOUT", "MIN_SNR_GAMMA", "VAL_IMAGES"),
    *("LEARNING_RATE", "WARMUP_STEPS", "GRAD_CLIP", "EMA_DECAY"),
}


def check_resume(saved: Settings, settings: Settings, accept_changes: bool) -> None:
    """Refuse to go on from a checkpoint with settings that contradict it: the differences, and the way out."""
    changed = [(name, old, new) for name, old, new in differences(saved._asdict(), settings._asdict()) if name not in FREE]
    if saved.BATCH_SIZE * saved.GRAD_ACCUM_STEPS == settings.BATCH_SIZE * settings.GRAD_ACCUM_STEPS:
        changed = [c for c in changed if c[0] not in ("BATCH_SIZE", "GRAD_ACCUM_STEPS")]  # the same images in each step
    refused = [c for c in changed if not (accept_changes and c[0] in TUNABLE)]
    if not refused:
        return
    listed = ", ".join(f"{name} {as_text(old)} -> {as_text(new)}" for name, old, new in refused)
    way_out = f"to go on, give its own settings: {as_flags({name: old for name, old, _ in refused})}"
    if all(name in TUNABLE for name, _, _ in refused):
        way_out += "; to go on with the new ones, add --accept_changes"
    raise CheckpointError(
        f"{settings.CHECKPOINT_PATH}/latest.pth was trained with other settings ({listed}). "
        f"Either {way_out}; or start anew with another folder: --checkpoint_path ./checkpoints/NAME."
    )
