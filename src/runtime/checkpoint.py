"""Checkpoints: plain dicts of tensors and numbers, written whole, opened without running any code in them."""

import contextlib
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.ema import EMA
from src.runtime.meter import Meter
from src.runtime.settings import Settings, as_flags, as_text, differences, settings_from_dict
from src.utils import UserError, atomic_file, flush_folder

VERSION = 1  # of the layout below; a program reads its own and older ones
KEYS = {
    *("version", "config", "step", "epoch", "best_loss", "classes", "class_ids"),
    *("model", "ema", "optimizer", "scaler", "meter"),
}


class CheckpointError(UserError):
    """A checkpoint that cannot be used, and what to do about it."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that is not as it was written; an older one may serve."""


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
    except (OSError, RuntimeError) as error:  # torch hides what a write raises behind a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        needed = 4 * sum(t.nbytes for t in model.state_dict().values())  # the weights, their average, Adam's two moments
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
    try:
        with open(path, "rb") as file:
            is_whole = zipfile.is_zipfile(file)  # torch writes zip files, whose index stands at the end
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}. Mend its permissions, or use another one.") from None
    if not is_whole:
        raise DamagedCheckpoint(f"{path} is not a whole checkpoint: truncated, or written by another program. Use another one.")
    try:
        if not mmap and (entry := zipfile.ZipFile(path).testzip()):  # 1.5 GB take a second or two
            raise DamagedCheckpoint(f"{path} is damaged (wrong checksum of {entry}). Use another one.")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path} holds Python objects, which could run code when opened; it is refused.") from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DamagedCheckpoint(f"{path} is damaged ({str(error).splitlines()[0]}). Use another one.") from None
    if not isinstance(state, dict) or not isinstance(state.get("version"), int):
        raise CheckpointError(f"{path} is a file of another program: it has no version of this one's. Use another one.")
    if state["version"] > VERSION:
        raise CheckpointError(
            f"{path} has format version {state['version']}, this program reads up to {VERSION}. Update it (git pull)."
        )
    if missing := KEYS - state.keys():
        raise CheckpointError(f"{path} lacks {', '.join(sorted(missing))}; another program wrote it. Use another one.")
    state["config"] = settings_from_dict(state["config"])
    return state


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put a checkpoint's weights into a network. Raises CheckpointError where the network is another one."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        difference = " ".join(str(error).split("\n")[1].split())[:200].rstrip(".")
        raise CheckpointError(
            f"The checkpoint does not fit the network of src/model.py ({difference}). Undo what was changed there since, "
            f"or start anew with another folder: --checkpoint_path ./checkpoints/NAME."
        ) from None


def restore(
    state: Mapping[str, Any],
    model: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    meter: Meter,
) -> None:
    """Put a loaded checkpoint back into the objects of a run."""
    load_weights(model, state["model"])
    load_weights(ema.model, state["ema"])
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
    """The state to resume from: latest.pth, or where that is damaged or gone the newest checkpoint that loads, with a
    warning. None where there is none at all. Raises CheckpointError where there are some and none loads, or where
    latest.pth is whole but not for this program."""
    latest = folder / "latest.pth"
    others = [path for path in folder.glob("*.pth") if path != latest]
    damage: CheckpointError | None = None
    if latest.exists():
        try:
            return load_checkpoint(latest)
        except DamagedCheckpoint as error:
            damage = error
    elif not others:
        return None

    steps = {}
    for path in others:
        with contextlib.suppress(CheckpointError):
            steps[path] = load_checkpoint(path, mmap=True)["step"]
    for path in sorted(steps, key=lambda path: (steps[path], path), reverse=True):
        with contextlib.suppress(CheckpointError):
            state = load_checkpoint(path)
            if damage:
                aside = latest.with_name("latest.damaged")
                os.replace(latest, aside)
                print(f"Warning: {damage} It was set aside as {aside}.", file=sys.stderr)
            print(f"Going on from {path}, step {steps[path]:,}, the newest that loads.", file=sys.stderr)
            return state
    raise CheckpointError(
        f"No checkpoint in {folder} loads. {damage or ''} Restore one from a backup, or start anew with another folder: "
        f"--checkpoint_path ./checkpoints/NAME.".replace("  ", " ")
    )


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
