"""What evaluate.py measures with, and the report that it fills."""

import contextlib
import json
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch

from src.dataset import Images, same_classes
from src.evaluation.picture_set import PictureSet, read_set
from src.progress import duration
from src.runtime.build import open_images
from src.runtime.device import describe, pick_device
from src.runtime.distributed import World
from src.runtime.pipeline import Pipeline
from src.utils import FlagError, UserError, atomic_file, count, numbered, take_free, writing

SPLITS = ("train", "val")


class Evaluation:
    """One call of evaluate.py: what it measures with, made when it is first asked for, and the report that it fills."""

    def __init__(self, flags: Namespace, world: World):
        self.flags, self.world = flags, world
        self.pipeline: Any = None
        self.settings: Any = None
        self.network: Any = None  # FeatureNetwork, in the main process
        protocol = {"command": flags.command, "date": time.strftime("%Y-%m-%d %H:%M:%S %z"), "torch": str(torch.__version__)}
        own = {None, *SPLITS}  # what only a checkpoint can say
        if flags.nll or flags.loss or flags.nearest or flags.samples in own or flags.reference in own:
            self.pipeline = pipeline = Pipeline(flags, world)
            given = {name: getattr(flags, name.lower()) for name in ("DATA_PATH", "CACHE_PATH", "LOG_PATH", "VAL_IMAGES")}
            s = self.settings = replace(pipeline.settings, **{name: value for name, value in given.items() if value})
            protocol |= {"checkpoint": flags.checkpoint, "step": pipeline.step, "epoch": pipeline.epoch}
            protocol |= {"weights": flags.weights, "precision": pipeline.precision}
            protocol |= {"dataset": f"{s.DATASET}, {s.IMAGE_SIZE}x{s.IMAGE_SIZE}"}
        self.cache = Path(self.settings.CACHE_PATH if self.pipeline else flags.cache_path or "./data/cache")
        self.device = self.pipeline.device if self.pipeline else pick_device(flags.device, world.local_rank)
        self.report: dict[str, Any] = {"protocol": protocol | {"device": describe(self.device)}}

    def open(self) -> None:
        """Take a name for the JSON of this call; other files are named after it. Raises UserError."""
        flags, folder = self.flags, Path(self.flags.output_dir or Path("outputs", self.flags.run, "evaluation"))
        stem = Path(flags.checkpoint if flags.samples is None or not flags.fid else flags.samples).absolute().stem
        with writing(folder, "--output_dir"):
            self.out = take_free(numbered(folder / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}.json"))

    @cached_property
    def curves(self) -> Path:
        """The TensorBoard folder of this call alone, so that two evaluations are two curves. Raises OSError."""
        return take_free(numbered(self.settings.folder("LOG_PATH") / "evaluate" / self.out.stem), is_folder=True)

    @cache  # noqa: B019 (there is one Evaluation)
    def split(self, name: str) -> Images:
        """The split "train" or "val" of the checkpoint's dataset. Raises UserError if its classes are not those trained on."""
        advice = "Name the data that it was trained on with --data_path."
        try:
            with self.world.main_process_first():
                images = open_images(self.settings, name)
        except FlagError as error:  # for CLASSES, which was not typed here
            raise UserError(f"The checkpoint is of the classes {self.settings.CLASSES}. {error} {advice}") from None
        is_told = self.settings.CLASS_CONDITIONAL or self.settings.CLASSES
        if is_told and not same_classes(images.classes, self.pipeline.classes):
            here = f"the data at {self.settings.DATA_PATH} have {beginning(images.classes)}"
            raise UserError(f"The checkpoint was trained on {beginning(self.pipeline.classes)}, but {here}. {advice}")
        return images

    @cache  # noqa: B019
    def pictures(self, source: str) -> PictureSet:
        """What --samples or --reference names. Raises UserError."""
        if source not in SPLITS:
            return read_set(Path(source), "--samples" if source == self.flags.samples else "--reference", self.cache)
        return PictureSet(f"{self.settings.DATASET} {source}", self.split(source))

    def samples(self, number: int | None) -> PictureSet:
        """The first `number` pictures of --samples, or of the series that the flags draw. None: all."""
        every = self.pictures(self.flags.samples) if self.flags.samples else self.drawn
        return PictureSet(every.name, every.pixels[:number]) if number else every

    @cached_property
    def drawn(self) -> PictureSet:
        """As many pictures of the series as --fid and --nearest need. All processes draw their part."""
        flags, pipeline = self.flags, self.pipeline
        number = max(flags.num_samples if flags.fid else 0, flags.nearest or 0)
        say("drawing", f"{count(number, 'picture')}: about {duration(pipeline.prepare(number, flags.batch_size))}")
        pixels = torch.zeros(number, *pipeline.shape, dtype=torch.uint8)
        for batch, images in pipeline.series(range(number), flags.batch_size, partial(pipeline.start, flags.seed)):
            pixels[batch[0] : batch[-1] + 1] = images
        return PictureSet(f"{flags.checkpoint}, drawn", self.world.sum(pixels).numpy())  # those of other processes are 0 here

    def drawing(self) -> dict[str, Any]:
        """How pictures are drawn, for the protocol; {} where --samples are measured instead."""
        about = {} if self.flags.samples else self.pipeline.about() | {"seed": self.flags.seed}
        return {name: value for name, value in about.items() if name != "eta" or about["sampler"] == "ddim"}

    def validation(self, number: int) -> dict[str, Any]:
        """Which validation pictures, for the protocol: `number` of them, the same ones as long as the split is the same."""
        labels = "given" if self.settings.CLASS_CONDITIONAL else "none"
        return self.pictures("val").about() | {"used": number, "labels": labels}

    def curve(self, tag: str, points: Iterable[tuple[int, float]]) -> None:
        """A TensorBoard curve over t."""
        from src.runtime.monitor import EventFile  # here, because --help needs no TensorBoard

        with optional(self.settings.folder("LOG_PATH"), "--log_path"):
            events = EventFile(self.curves)
            for t, value in points:
                events.scalar(t, tag, value)
            events.records.close()

    def add(self, section: str, found: dict[str, Any]) -> None:
        """Print a section, and write the report so far: an interrupted call keeps what is done."""
        self.report[section] = found
        show(section, found)
        with writing(self.out, "--output_dir"), atomic_file(self.out) as file:
            file.write((json.dumps(self.report, indent=2) + "\n").encode())


@contextlib.contextmanager
def optional(path: Path, flag: str) -> Iterator[None]:
    """A block that writes what no figure needs: where it cannot, a warning says so and the evaluation goes on."""
    try:
        with writing(path, flag):
            yield
    except UserError as error:
        say("warning", str(error))


def beginning(classes: list[str]) -> str:
    names = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
    return f"{count(len(classes), 'class', 'classes')} ({names})"


def say(title: str, words: str) -> None:
    print(f"{title:<11} {words}", flush=True)


def conclude(report: dict[str, Any]) -> None:
    """Print what one wants to know, a line each: the figure with its meaning."""
    if loss := report.get("loss"):
        pictures = count(loss["pictures"]["used"], "held-out picture")
        say("loss", f"{loss['held_out']:.5f} on {pictures}; lower is better")
    if bound := report.get("bound"):
        bits = "{total:.3f} ± {standard_error:.3f}".format(**bound["bits_per_dimension"])
        pictures = count(bound["pictures"]["used"], "held-out picture")
        say("bound", f"{bits} bits per dimension of {pictures}; lower is better")
    if spread := report.get("distribution"):
        pictures = f"of {count(spread['samples']['count'], 'picture')}, by {spread['network']}"
        only = "; compare only with others of this network and count" * (not spread["comparable_with_published_inception_fid"])
        say("FID", f"{spread['figures']['fid']:.4g} {pictures}; lower is better{only}")
    for view in ("pixels", "features"):
        if (ratio := report.get("nearest", {}).get(view, {}).get("ratio")) is not None:
            meaning = "times as far from the training pictures as held-out ones are; near 1 they are as new, near 0 copies"
            say("nearest", f"by {view}, {ratio:.2f} {meaning}")


def show(title: str, values: Any) -> None:
    """A dict as lines, nested ones by dotted names; a list of dicts as a line each; other lists only in the JSON."""
    if isinstance(values, dict):
        for name, value in values.items():
            show(f"{title}.{name}", value)
    elif isinstance(values, list):
        for row in values:
            if isinstance(row, dict):
                say(title, "".join(f"{name} {value:<12.5g}" for name, value in row.items()))
    else:
        say(f"{title:<44}", f"{values:.5g}" if isinstance(values, float) else str(values))
