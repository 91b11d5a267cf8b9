"""Runs by name: which checkpoint is meant, what it holds, and which others there are."""

import math
import os
import time
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

from src.runtime.checkpoint import TO_DRAW, load_checkpoint
from src.runtime.flags import PATH, RUN
from src.runtime.folders import RUNS, known_checkpoints
from src.runtime.settings import as_flags, changed_from_defaults
from src.utils import FlagError, count, reading


def add_checkpoint_flags(group: Any) -> None:
    comment = "name of a run: its checkpoint is checkpoints/NAME/best.pth, its outputs lie below outputs/NAME"
    group.add_argument("--run", **RUN, default="", help=comment)
    group.add_argument("--checkpoint", **PATH, help="the checkpoint (default: checkpoints/[NAME/]best.pth)")


def choose_checkpoint(flags: Namespace) -> None:
    """Settle flags.checkpoint and flags.run, each by the other where it alone is given. Raises UserError."""
    if typed := flags.checkpoint:
        for folder in map(os.path.abspath, (typed, RUNS / typed)):
            if os.path.dirname(folder) == str(RUNS.absolute()) and os.path.isdir(folder):
                raise FlagError(f"--checkpoint: {typed} is a run, expected a file. Use --run {os.path.basename(folder)}.")
        folder = Path(os.path.abspath(typed)).parent
        if not flags.run and folder.parent == RUNS.absolute():
            flags.run = folder.name
        return
    best, latest = (RUNS / flags.run / name for name in ("best.pth", "latest.pth"))
    flags.checkpoint = str(best)
    with reading(best):
        if latest.exists() and not best.exists():  # stopped before its first validation
            print(f"note: there is no {best} yet, so this is {latest}")
            flags.checkpoint = str(latest)


def tell(flags: Namespace, config: ModuleType | None) -> None:
    """Print what the checkpoint holds; without --checkpoint and --run, which runs there are. config: config.py, if any."""
    if not flags.checkpoint and not flags.run:
        for path in known_checkpoints():
            print(path, "of", time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime)))
        return print("python sample.py --run NAME --about tells more, as does --checkpoint PATH --about")
    choose_checkpoint(flags)
    state = load_checkpoint(Path(flags.checkpoint), TO_DRAW, mmap=True)
    s, classes, step, loss = state["config"], state["classes"], state.get("step", 0), state.get("best_loss", math.inf)
    images = "".join(f", {about['images']:,} in {split}" for split, about in state.get("data", {}).items())
    changed = {name: new for name, _, new in (changed_from_defaults(s, config) if config else [])}
    for title, words in {
        "checkpoint": f"{flags.checkpoint}, {Path(flags.checkpoint).stat().st_size / 1e6:,.1f} MB",
        "trained": f"{count(step, 'step')}, {count(state.get('epoch', 0), 'epoch')}" if step else "it does not say how long",
        "validation": f"{loss:.5f}, the lowest loss so far" if math.isfinite(loss) else "not done yet",
        "data": f"{s.DATASET}, {s.IMAGE_SIZE}x{s.IMAGE_SIZE}{images}",
        "classes": f"{len(classes)}{'' if s.CLASS_CONDITIONAL else ', not used'}: {', '.join(classes[:20])}",
        "network": f"{sum(weight.numel() for weight in state['ema'].values()):,} parameters",
        "settings": f"other than in config.py: {as_flags(changed)}" if changed else "as in config.py" if config else "",
    }.items():
        print(f"{title:<11}{words}")
