"""Checkpoints: plain dicts of tensors and numbers, written whole, opened without running any code in them."""

import contextlib
import os
import pickle
import shlex
import sys
import time
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.dataset import Images, validation_draws
from src.runtime.distributed import World
from src.runtime.folders import no_checkpoint
from src.runtime.settings import Settings, settings_from_dict
from src.utils import UserError, atomic_file, flush_folder, numbered, reading, stand_in, take_free, writing

VERSION = 2  # of the layout. This program reads its own version and older ones.
FEWEST_DRAWS = 500  # of a validation: they choose the checkpoint that 2,000 choose (docs/recipes.md)
TO_DRAW = ("config", "classes", "class_ids", "ema")
TO_TRAIN = ("model", "optimizer", "scaler", "meter")
TO_RESUME = (*TO_DRAW, "step", "epoch", "best_loss", *TO_TRAIN)


class DamagedCheckpoint(UserError):
    """A checkpoint that is not as it was written. An older one may serve."""


@dataclass
class Progress:
    """How far a run has come."""

    last_step: int
    steps_per_epoch: int
    step: int = 0  # optimizer steps done
    best_loss: float = float("inf")  # lowest validation loss of the EMA weights so far

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.step // self.steps_per_epoch


class Checkpoints:
    """The checkpoints of a run in their folder. A new part of the run is one entry in `parts`. The noise and the order of the
    images follow from SEED and step, so no state of a random generator is kept.
    data: {"train": images, "val": images}.   parts: {name: object with state_dict and load_state_dict}.   saved: to restore."""

    def __init__(self, s: Settings, world: World, data: dict[str, Images], progress: Progress, parts: dict, saved: dict | None):
        self.folder, self.world, self.progress, self.parts = s.folder("CHECKPOINT_PATH"), world, progress, parts
        self.classes: list[str] = data["train"].classes
        self.about: dict[str, Any] = {"config": asdict(s), "last_step": progress.last_step, "data": fingerprints(data)}
        self.about |= {"classes": self.classes, "class_ids": data["train"].class_ids}
        self.about |= {"draws": number_of_draws(s, len(data["val"]), progress.last_step)}
        self.saved_at = time.monotonic()
        if not saved:
            return
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                load_weights(part, saved[name])
            elif saved[name]:  # the scaler's state is empty but for fp16
                part.load_state_dict(saved[name])
        progress.step, progress.best_loss = saved["step"], saved["best_loss"]
        if why := other_measure(saved, s, self.about):
            print(f"note: best.pth is chosen anew: the lowest validation loss so far, {progress.best_loss:.5f}, {why}")
            progress.best_loss = float("inf")

    def save(self, name: str) -> None:
        """Write NAME.pth, whole. Raises UserError if the disk is full or fails; the file that stood there stays."""
        if self.world.is_main:
            self.write(name)
        self.world.barrier()  # a GPU that waited for the disk in the next step might wait too long
        self.saved_at = time.monotonic()

    def write(self, name: str) -> None:
        states = {part: thing.state_dict() for part, thing in self.parts.items()}
        states |= {name: getattr(self.progress, name) for name in ("step", "epoch", "best_loss")}
        path, needed = self.folder / f"{name}.pth", 4 * sum(t.nbytes for t in states["model"].values())  # Adam's moments, EMA
        note = f"A checkpoint takes about {needed / 1e6:,.0f} MB. Those saved before are whole, and the same command goes on; "
        note += "for another place move them there first."
        if name == "latest":
            keep_previous(path)
        with writing(path, "--checkpoint_path", note):
            try:
                with atomic_file(path) as file:
                    torch.save({"version": VERSION} | self.about | states, file)
            except RuntimeError as error:  # torch hides what a write raises behind a RuntimeError
                raise (error.__context__ if isinstance(error.__context__, (OSError, KeyboardInterrupt)) else error) from None


def fingerprints(data: Mapping[str, Images]) -> dict[str, dict[str, Any]]:
    """What tells the images of a run from others, wherever they lie, by split."""
    return {split: {"images": len(images), "fingerprint": images.fingerprint} for split, images in data.items()}


def most_passes(s: Settings, last_step: int) -> int:
    """How many passes of the network a validation or a preview may take: ten for each image that the whole run trains on. So a
    run of a handful of steps does not spend minutes on looking at itself."""
    return 10 * last_step * s.BATCH_SIZE * s.GRAD_ACCUM_STEPS


def preview_size(s: Settings, last_step: int) -> tuple[int, int]:
    """How many pictures a preview shows, and the passes for each: two networks at every step, with guidance twice."""
    passes = 2 * min(s.PREVIEW_STEPS, s.TIME_STEPS) * (1 if s.guidance in (0, 1) else 2)
    return max(1, min(s.NUM_SAMPLES, most_passes(s, last_step) // passes)), passes


def number_of_draws(s: Settings, images: int, last_step: int | None = None) -> int:
    """Of the validation loss: one for each of VAL_IMAGES images, and where there are few FEWEST_DRAWS in all."""
    draws = max(min(s.VAL_IMAGES, images), FEWEST_DRAWS)
    return draws if last_step is None else min(draws, most_passes(s, last_step))


def other_measure(saved: Mapping[str, Any], settings: Settings, now: Mapping[str, Any]) -> str:
    """Why validation losses of the checkpoint do not compare with those to come; "" if they do. now: as Checkpoints.about."""
    if saved["version"] == 1:
        return "was measured by an older version of this program, with other weights"
    if saved.get("data", now["data"])["val"] != now["data"]["val"]:
        return "was measured on other images"
    images, count = now["data"]["val"]["images"], saved["config"].VAL_IMAGES
    before = validation_draws(images, count, saved.get("draws", max(count, 500)), settings.TIME_STEPS)  # older ones: see there
    after = validation_draws(images, settings.VAL_IMAGES, now["draws"], settings.TIME_STEPS)
    return "" if all(map(torch.equal, before, after)) else f"was measured by {len(before[0]):,} draws, not {len(after[0]):,}"


def load_checkpoint(path: Path, needs: Collection[str] = TO_RESUME, mmap: bool = False) -> dict[str, Any]:
    """Open a checkpoint on the CPU and check its checksums. needs: the entries it must have.
    mmap: read each tensor from the disk when it is first used.
    Raises UserError with a sentence for each way in which the file may be wrong."""
    with reading(path, "Use another one."):
        try:
            with open(path, "rb") as file:
                is_whole = os.path.isfile(path) and zipfile.is_zipfile(file)  # as torch writes them, with an index at the end
        except FileNotFoundError:
            raise UserError(no_checkpoint(path)) from None
    if not is_whole:
        what = stand_in(path) or "is not a whole checkpoint: truncated, or written by another program"
        raise DamagedCheckpoint(f"{path} {what}. Use another one.")
    try:
        if entry := zipfile.ZipFile(path).testzip():  # 1.5 GB take a second or two
            raise DamagedCheckpoint(f"{path} is damaged (wrong checksum of {entry}). Use another one.")
        is_utf_8 = str(path).encode("utf-8", "ignore").decode() == str(path)  # torch maps no file of another name
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_utf_8)
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds Python objects, which could run code when opened; it is refused.") from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DamagedCheckpoint(f"{path} is damaged ({str(error).splitlines()[0]}). Use another one.") from None
    if isinstance(state, dict) and "ema" in state and "classes" in state:
        state = {"version": 1, "class_ids": state["classes"]} | state  # for a file that was stripped by hand
    if not isinstance(state, dict) or not isinstance(state.get("version"), int):
        raise UserError(f"{path} is a file of another program: it has no version of this one's. Use another one.")
    if (version := state["version"]) > VERSION:
        raise UserError(f"{path} has format version {version}, this program reads up to {VERSION}. Update it (git pull).")
    missing = [name for name in needs if name not in state]
    if missing and all(name in state for name in TO_DRAW):
        advice = f"A new run can start from its weights: add --init_from {shlex.quote(str(path))} --run NAME"
        if missing == ["model"]:
            advice = "Leave out --weights raw"
        raise UserError(f"{path} holds only what drawing needs: it lacks {', '.join(missing)}. {advice}.")
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; another program wrote it. Use another one.")
    for part in state.keys() & {"model", "ema"} if version == 1 else ():
        renamed = {"stages": "blocks", "shrink": "downsample", "grow": "upsample"}
        names = {name: ".".join(renamed.get(word, word) for word in name.split(".")) for name in state[part]}
        state[part] = {new: state[part][old] for old, new in names.items()}
    state["config"] = settings_from_dict(state["config"])
    return state


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put a checkpoint's weights into a network. Raises UserError if the network is another one."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        difference = " ".join(str(error).split("\n")[1].split())[:200].rstrip(".")
        advice = "Undo what was changed there since, use another one, or train anew under another name: --run NAME."
        raise UserError(f"The checkpoint does not fit the network of src/model.py ({difference}). {advice}") from None


def keep_previous(latest: Path) -> None:
    """Hard-link latest.pth to latest.previous.pth before replacing it, so that one older checkpoint is kept."""
    previous = latest.with_name("latest.previous.pth")
    link = latest.with_name(f".{previous.name}.part-link")
    with contextlib.suppress(OSError):  # there is none yet; or a file system without hard links
        link.unlink(missing_ok=True)
        os.link(latest, link)
        os.replace(link, previous)
        flush_folder(latest.parent)


def find_latest(folder: Path) -> dict[str, Any] | None:
    """The state to resume from: latest.pth, or if that is damaged or gone the newest checkpoint that loads, with a warning.
    None if there is none. Raises UserError if none of them loads, or if latest.pth is whole but not for this program."""
    latest, steps, reasons = folder / "latest.pth", dict[Path, int](), list[UserError]()
    if latest.exists():
        try:
            return load_checkpoint(latest)
        except DamagedCheckpoint as error:
            reasons.append(error)
    for path in {*folder.glob("*.pth")} - {latest}:
        try:
            steps[path] = load_checkpoint(path, mmap=True)["step"]
        except UserError as error:
            reasons.append(error)
    if not steps and not reasons:
        return None
    if not steps:
        way_out = "Restore one from a backup, or start anew under another name: --run NAME."
        raise UserError(f"No checkpoint in {folder} loads. {reasons[0]} {way_out}")
    newest = max(steps, key=lambda path: (steps[path], path))
    if latest.exists():
        aside = take_free(numbered(latest.with_name("latest.damaged")))  # an earlier one stays
        os.replace(latest, aside)
        print(f"Warning: {reasons[0]} It was set aside as {aside}.", file=sys.stderr)
    print(f"Going on from {newest}, step {steps[newest]:,}, the newest that loads.", file=sys.stderr)
    return load_checkpoint(newest)
