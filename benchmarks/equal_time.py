"""Which recipe learns most per minute? Settings of train.py, each trained for the same time on the same machine.

    python -m benchmarks.equal_time --minutes 4 --recipe default --recipe "narrow: --dim_mults 1,1,2,3,4" -- --batch_size 64
    python -m benchmarks.equal_time --tiny

Every recipe is a run of train.py in a folder of its own. Its clock starts when its progress bar shows the first finished
optimizer step: imports, decoding and compiling are left out, in each slice of --alternate anew. It stops with SIGTERM, on
which train.py ends the step in hand and saves. Then evaluate.py measures the held-out loss of the noise, with the average
of the weights and with the weights themselves, and sample.py draws a grid.

Losses compare where the dataset, the image size and the noise (TIME_STEPS, BETA_SCHEDULE) are the same; a note says where
they are not. The loops run without previews, and with one held-out picture instead of VAL_IMAGES after each epoch; what
they save then counts as their time.
"""

import contextlib
import json
import os
import re
import select
import shlex
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import config
from benchmarks.common import ROOT, Row, report
from src.runtime.checkpoint import load_checkpoint
from src.runtime.device import pick_device
from src.runtime.flags import FOLDER, POSITIVE, TRUTH, FlagParser, text, whole
from src.runtime.settings import Settings, resolve
from src.utils import FlagError, UserError, make_folder

# What the clock decides, or would be spent on anything but learning.
OURS = "--epochs 1000000 --save_every 1000000 --sample_every 1000000 --save_minutes 0 --val_images 1"
TINY = (
    "--preset demo --unet_dim 8 --dim_mults 1,2 --attention_resolutions 0 --batch_size 4 --num_workers 0 --device cpu "
    "--compile false"
)
TINY_RECIPES = ["default", "narrow: --dim_mults 1,1,2"]
COMPARABLE = ("DATASET", "DATA_PATH", "IMAGE_SIZE", "TIME_STEPS", "BETA_SCHEDULE")
PATIENCE = 3600  # seconds without a first step, after which a run is given up: a long decode and a long compilation fit in

COLUMNS = {
    "recipe": "recipe",
    "params": "{params:,}",
    "steps": "{steps:,}",
    "images": "{images:,}",
    "images/s": "{images_per_second:,.1f}",
    "held-out loss, EMA": "{held_out_ema:.5f}",
    "raw": "{held_out_raw:.5f}",
}


@dataclass
class Recipe:
    """Settings with a name, and how far their run has come."""

    name: str
    flags: list[str]  # of train.py, as given
    settings: Settings
    folder: Path
    step: int = 0  # optimizer steps done
    clocked_steps: int = 0  # of them, those that the clock saw
    clocked: float = 0.0  # seconds from the first to the last of those

    @property
    def words(self) -> list[str]:
        """All the flags that its train.py gets."""
        return [*self.flags, *shlex.split(OURS), *in_folder(self.folder)]

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "latest.pth"

    @property
    def images_per_step(self) -> int:
        return self.settings.BATCH_SIZE * self.settings.GRAD_ACCUM_STEPS


# --- flags ----------------------------------------------------------------------------------------------


def read_flags(argv: Sequence[str]) -> SimpleNamespace:
    """The flags. `common`: what stands behind `--`, flags of train.py for every recipe. Raises FlagError."""
    argv = list(argv)
    common = argv[argv.index("--") + 1 :] if "--" in argv else []
    parser = FlagParser(
        "-m benchmarks.equal_time",
        usage="python -m benchmarks.equal_time --recipe NAME[: FLAGS] ... [--flag VALUE ...] [-- FLAGS]",
        description=__doc__,
    )
    recipe = text("NAME or 'NAME: flags of train.py'", r"\s*[^\s:-][^:]*(:.*)?", "RECIPE")
    parser.rules["--recipe"] = recipe
    comment = "NAME or 'NAME: flags of train.py'; give it once for each recipe"
    parser.add_argument("--recipe", action="append", default=[], metavar="RECIPE", help=comment)
    for flag, rule, comment, default in [
        ("--minutes", POSITIVE, "of training for each recipe (default: 4)", None),
        ("--alternate", whole(1), "cut them into so many slices, the recipes in turn (default: 1)", 1),
        ("--val_images", whole(2), "held-out pictures of the loss (default: 2000)", None),
        ("--num_samples", whole(1), "pictures in the grid (default: 64)", None),
        ("--output_dir", FOLDER, "each call makes a folder in it (default: outputs/equal_time)", "outputs/equal_time"),
        ("--results", FOLDER, "where the JSON lines are kept (default: benchmarks/results)", str(ROOT / "benchmarks/results")),
        ("--tiny", TRUTH, "small networks and seconds, on a CPU: does it run?", False),
    ]:
        parser.add(flag, rule, comment, default=default)
    flags = SimpleNamespace(script="equal_time", **parser.parse(argv[: argv.index("--")] if common else argv))
    for word in flags.recipe:
        try:
            recipe.accept(word)
        except ValueError:
            raise FlagError(f"--recipe: got {word!r}, expected {recipe.expected}.") from None
    flags.common = [*shlex.split(TINY if flags.tiny else ""), *common]
    flags.recipe = flags.recipe or (TINY_RECIPES if flags.tiny else [])
    for name, usual, tiny in (("minutes", 4.0, 0.02), ("val_images", 2000, 20), ("num_samples", 64, 4)):
        setattr(flags, name, getattr(flags, name) or (tiny if flags.tiny else usual))
    if not flags.recipe:
        raise FlagError("--recipe: none given; name one or more, as in --recipe default --recipe 'wide: --unet_dim 192'.")
    return flags


def read_recipes(flags: SimpleNamespace, folder: Path) -> list[Recipe]:
    """Each recipe with its settings, all of them checked before any is trained. Raises FlagError."""
    recipes: list[Recipe] = []
    for recipe in flags.recipe:
        name, _, own = (part.strip() for part in recipe.partition(":"))
        slug = re.sub(r"\W+", "-", name)
        if slug in [other.folder.name for other in recipes]:
            raise FlagError(f"--recipe: {name} is there twice; give each a name of its own.")
        words = [*flags.common, *shlex.split(own)]
        try:
            settings = resolve(config, words).settings
        except UserError as error:
            raise FlagError(f"--recipe {name}: {error}") from None
        recipes.append(Recipe(name, words, settings, folder / slug))
    first = recipes[0].settings
    differing = [n for n in COMPARABLE if any(getattr(r.settings, n) != getattr(first, n) for r in recipes)]
    if differing:
        print(f"note: the recipes differ in {', '.join(differing)}: their losses do not compare")
    return recipes


def in_folder(folder: Path) -> list[str]:
    """The flags with which a run writes into this folder alone."""
    return [word for path in ("checkpoint", "output", "log") for word in (f"--{path}_path", str(folder / f"{path}s"))]


# --- training by the clock ------------------------------------------------------------------------------


class TrainProcess:
    """A run of train.py that believes its stderr to be a terminal, and so shows its progress bar: `with` ends it for sure.

    The bar tells what no log does in time: how many steps are done now.
    """

    BAR = re.compile(rb"(\d+)/\d+ \[")

    def __init__(self, recipe: Recipe):
        import fcntl  # these three are not on Windows
        import pty
        import termios

        recipe.folder.mkdir(parents=True, exist_ok=True)
        self.log = open(recipe.folder / "train.txt", "ab", buffering=0)  # noqa: SIM115
        self.terminal, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 25, 200, 0, 0))  # tqdm draws nothing on 0 columns
        command = [sys.executable, str(ROOT / "train.py"), *recipe.words]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=theirs)
        os.close(theirs)
        self.tail = b""

    def steps(self, until: float) -> Iterator[int]:
        """The numbers that the bar shows, as it shows them, until that time by time.monotonic() or the process's end."""
        while (left := until - time.monotonic()) > 0:
            if not select.select([self.terminal], [], [], left)[0]:
                return
            try:
                data = os.read(self.terminal, 65536)
            except OSError:  # the other side is closed: Linux calls that an error
                data = b""
            if not data:
                return
            self.log.write(data)
            self.tail = (self.tail + data)[-4096:]
            for number in self.BAR.findall(data):
                yield int(number)

    def stop(self) -> int:
        """SIGTERM, and the exit code once it has saved."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        for _ in self.steps(time.monotonic() + PATIENCE):
            pass
        return self.process.wait()

    def last_words(self) -> str:
        lines = [line.strip() for line in re.split(r"[\r\n]+", self.tail.decode(errors="replace")) if line.strip()]
        return lines[-1] if lines else "it said nothing"

    def __enter__(self) -> "TrainProcess":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.terminal)
        self.log.close()


def train(recipe: Recipe, seconds: float) -> None:
    """Go on with the recipe's run for that long from its next finished step. Raises UserError where train.py fails."""
    with TrainProcess(recipe) as run:
        first = next((step for step in run.steps(time.monotonic() + PATIENCE) if step > recipe.step), None)
        start = now = time.monotonic()
        last = first or 0
        if first:
            for step in run.steps(start + seconds):
                last, now = step, time.monotonic()
        code = run.stop()
        if code not in (0, 128 + signal.SIGTERM) or not first or not recipe.checkpoint.exists():
            log = recipe.folder / "train.txt"
            raise UserError(f"{recipe.name}: train.py ended with exit code {code}: {run.last_words()} See {log}.")
    recipe.step = load_checkpoint(recipe.checkpoint, mmap=True)["step"]
    recipe.clocked_steps += last - first
    recipe.clocked += now - start


# --- what was learned -----------------------------------------------------------------------------------


def call(script: str, words: Sequence[Any], log: Path) -> None:
    """main() of a script in this process, its words in a file. Raises UserError where it fails, which it has explained."""
    argv = [script, *map(str, words)]
    module = __import__(script.removesuffix(".py"))
    with open(log, "a") as file, contextlib.redirect_stdout(file), patch.object(sys, "argv", argv):
        code = module.main()
    if code:
        raise UserError(f"{shlex.join(argv)} ended with exit code {code}; see {log}.")


def measure(recipe: Recipe, flags: SimpleNamespace) -> Row:
    """The figures of a recipe that is trained."""
    s, folder = recipe.settings, recipe.folder
    how = ["--checkpoint", recipe.checkpoint, "--device", s.DEVICE, "--precision", s.PRECISION, "--compile", "false"]
    held_out = {}
    for weights in ("ema", "raw"):
        out = folder / f"loss-{weights}"
        asked = ["--loss", "--weights", weights, "--val_images", flags.val_images, "--output_dir", out]
        call("evaluate.py", [*how, *asked, "--log_path", folder / "logs"], folder / "evaluate.txt")
        (written,) = out.glob("*.json")
        held_out[f"held_out_{weights}"] = json.loads(written.read_text())["loss"]["held_out"]
    drawn = ["--num_samples", flags.num_samples, "--output_dir", folder / "pictures"]
    call("sample.py", [*how, *drawn], folder / "sample.txt")
    state = load_checkpoint(recipe.checkpoint, mmap=True)
    return {
        "recipe": recipe.name,
        "flags": shlex.join(recipe.flags),
        "params": sum(weight.numel() for weight in state["model"].values()),
        "steps": recipe.step,
        "images": recipe.step * recipe.images_per_step,
        "images_per_second": recipe.clocked_steps * recipe.images_per_step / recipe.clocked if recipe.clocked else None,
        **held_out,
    }


def race(flags: SimpleNamespace) -> None:
    folder = Path(flags.output_dir).absolute() / time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    recipes = read_recipes(flags, folder)
    for path, flag in ((Path(flags.results), "--results"), (folder, "--output_dir")):
        make_folder(path, flag)
    print(f"{len(recipes)} recipes, {flags.minutes:g} minutes each, in {folder}", flush=True)
    for part in range(flags.alternate):
        for recipe in recipes[:: 1 if part % 2 == 0 else -1]:  # there and back: drift hits all alike
            before = recipe.step
            train(recipe, 60 * flags.minutes / flags.alternate)
            slices = f", slice {part + 1} of {flags.alternate}" if flags.alternate > 1 else ""
            print(f"{recipe.name}{slices}: steps {before + 1:,} to {recipe.step:,}", flush=True)
    rows = [measure(recipe, flags) for recipe in recipes]  # only now: the GPU belonged to the runs
    about = {"minutes": flags.minutes, "slices": flags.alternate, "val_images": flags.val_images}
    report(flags, pick_device(recipes[0].settings.DEVICE), COLUMNS, rows, **about)


def main() -> int:
    try:
        if os.name == "nt":
            raise UserError("this needs a pseudo-terminal and SIGTERM, which Windows does not have.")
        race(read_flags(sys.argv[1:]))
        return 0
    except UserError as error:
        print(f"benchmarks.equal_time: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("benchmarks.equal_time: Stopped at once. The checkpoints stand.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
