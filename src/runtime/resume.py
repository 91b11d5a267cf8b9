"""What a run starts from: another's weights, or its own checkpoint and what it may then not change without being asked."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from src.dataset import Images, same_classes
from src.runtime.checkpoint import TO_DRAW, fingerprints, load_checkpoint
from src.runtime.settings import Settings, as_flags, as_text, differences
from src.utils import UserError

# What a resumed run may change freely: where things are, how fast, how often, how long. (check_data compares classes.)
FREE = {
    *("DATA_PATH", "DATA_URL", "DATA_SIZE", "DATA_MD5", "SKIP_DAMAGED", "CHECKPOINT_PATH", "OUTPUT_PATH", "LOG_PATH", "RUN"),
    *("CACHE_PATH", "NUM_WORKERS", "PRECISION", "COMPILE", "DEVICE", "ACTIVATION_CHECKPOINTING", "PREVIEW_GUIDANCE", "CLASSES"),
    *("EPOCHS", "NUM_SAMPLES", "PREVIEW_STEPS", "VAL_EVERY", "SAVE_EVERY", "SAVE_MINUTES", "SAMPLE_EVERY", "LOG_EVERY"),
}
# What changes the experiment but leaves the weights and the count of epochs meaningful: with --accept_changes.
TUNABLE = {
    *("HORIZONTAL_FLIP", "DROPOUT", "LABEL_DROPOUT", "MIN_SNR_GAMMA", "VAL_IMAGES"),
    *("LEARNING_RATE", "LR_SCHEDULE", "WARMUP_STEPS", "GRAD_CLIP", "EMA_DECAY"),
}


def check_resume(saved: Settings, settings: Settings, accept_changes: bool) -> None:
    """Refuse to resume from a checkpoint with settings that contradict it: say the differences and the way out."""
    changed = [(name, old, new) for name, old, new in differences(asdict(saved), asdict(settings)) if name not in FREE]
    if saved.BATCH_SIZE * saved.GRAD_ACCUM_STEPS == settings.BATCH_SIZE * settings.GRAD_ACCUM_STEPS:
        changed = [c for c in changed if c[0] not in ("BATCH_SIZE", "GRAD_ACCUM_STEPS")]  # the same images in each step
    refused = [c for c in changed if not (accept_changes and c[0] in TUNABLE)]
    if not refused:
        return
    listed = ", ".join(f"{name} {as_text(old)} -> {as_text(new)}" for name, old, new in refused)
    way_out = f"to go on, give its own settings: {as_flags({name: old for name, old, _ in refused})}"
    if all(name in TUNABLE for name, _, _ in refused):
        way_out += "; to go on with the new ones, add --accept_changes"
    found = f"The checkpoint in {settings.folder('CHECKPOINT_PATH')} was trained with other settings ({listed})"
    raise UserError(f"{found}. Either {way_out}; or start anew under another name: --run NAME.")


def check_length(saved: Mapping[str, Any] | None, settings: Settings, last_step: int, accept_changes: bool) -> None:
    """Refuse to resume a run whose learning rate decays if it would end elsewhere: the rate of each step would be another."""
    before = saved.get("last_step", last_step) if saved else last_step
    if settings.LR_SCHEDULE != "constant" and before != last_step and not accept_changes:
        found = f"the learning rate decayed towards step {before:,}, and this command ends at step {last_step:,}"
        ways_out = "Either give the same --epochs and --max_steps; or decay over the new length with --accept_changes."
        raise UserError(f"LR_SCHEDULE {settings.LR_SCHEDULE}: {found}. {ways_out}")


def check_data(saved: Mapping[str, Any], settings: Settings, data: Mapping[str, Images], accept_changes: bool) -> None:
    """Refuse to resume on other images or classes, or say how many there were. Older checkpoints do not know their images."""
    now, has_others = fingerprints(data), not same_classes(saved["classes"], data["train"].classes)
    before, own = saved.get("data", now), saved["config"].CLASSES
    counts = {split: (before[split]["images"], now[split]["images"]) for split in now if before[split] != now[split]}
    changes = [f"{split} {old:,} -> {new:,}{' others' if old == new else ''}" for split, (old, new) in counts.items()]
    is_fixed = has_others and settings.CLASS_CONDITIONAL  # a label is a row of the network
    changed = ", ".join(changes + ["other classes"] * is_fixed)
    if changed and (is_fixed or not accept_changes):
        way_back = "bring those back or name their folder with --data_path"
        if has_others and own != settings.CLASSES:
            way_back = f"give its own classes, {as_flags({'CLASSES': own})}"
        way_on = "" if is_fixed else "to go on with the new ones, add --accept_changes; "
        found = f"The checkpoint in {settings.folder('CHECKPOINT_PATH')} was trained on other images ({changed})"
        raise UserError(f"{found}. Either {way_back}; {way_on}or start anew under another name: --run NAME.")
    if changed:
        print(f"note: going on with other images ({changed}); epochs, also those done, count passes over the new ones")


# What --init_from takes from its checkpoint where it was not typed: the shape of the network and what it learned to predict.
NETWORK = {"UNET_DIM", "DIM_MULTS", "NUM_RES_BLOCKS", "ATTENTION_RESOLUTIONS", "IMAGE_SIZE", "CHANNELS"}
NETWORK |= {"TIME_STEPS", "BETA_SCHEDULE", "PREDICTION"}


def network_of(folder: Path, init_from: str) -> dict[str, Any]:
    """The NETWORK settings of the run's own checkpoint, or where there is none of that of --init_from. Raises UserError."""
    try:
        state = load_checkpoint(folder / "latest.pth", TO_DRAW, mmap=True)
    except UserError:
        state = load_checkpoint(Path(init_from), TO_DRAW, mmap=True)
    return {name: value for name, value in asdict(state["config"]).items() if name in NETWORK}


def start_from(path: str, s: Settings, model: nn.Module) -> None:
    """Take the averaged weights of a checkpoint where names and shapes agree, and say which. Raises UserError if few do."""
    state, own = load_checkpoint(Path(path), TO_DRAW), model.state_dict()
    taken = {name: weight for name, weight in state["ema"].items() if name in own and own[name].shape == weight.shape}
    changed = {name: old for name, old, _ in differences(asdict(state["config"]), asdict(s))}
    if 2 * len(taken) < len(own):
        shape = {name: old for name, old in changed.items() if name in ("UNET_DIM", "DIM_MULTS", "NUM_RES_BLOCKS")}
        found = f"{len(taken)} of this network's {len(own)} tensors have their shape in {path}, at least half are needed"
        raise UserError(f"--init_from: {found}. Give its own settings: {as_flags(shape)}.")
    model.load_state_dict(own | taken)
    anew = [name for name in own if name not in taken]
    more = f" and {len(anew) - 5} more" if len(anew) > 5 else ""
    print(f"weights    {len(taken)} of {len(own)} tensors from {path}; anew: {', '.join(anew[:5]) or 'none'}{more}")
    for name in [name for name in ("PREDICTION", "BETA_SCHEDULE", "TIME_STEPS") if name in changed]:
        print(f"Warning: {path} was trained with {as_flags({name: changed[name]})}, so its weights have to learn another task.")
