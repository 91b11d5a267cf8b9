"""Draw pictures from a checkpoint, which carries all that is needed: `python sample.py --checkpoint checkpoints/best.pth`."""

from src.runtime import early

if __name__ == "__main__":
    early.settle()  # before torch is imported

import contextlib
import csv
import io
import sys
import time
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from src.noise import PictureNoise, slerp
from src.progress import Bar, duration
from src.runtime.device import describe
from src.runtime.distributed import World
from src.runtime.flags import PATH, TRUTH, FlagParser, Rows, command_line, kind, print_idle, whole
from src.runtime.folders import BESIDE, WHICH_CHECKPOINT, next_folder, picture_folder, pictures_of
from src.runtime.pipeline import HOW_TO_DRAW, WHICH_SERIES, Pipeline, tell
from src.runtime.settings import KINDS
from src.runtime.sheets import class_columns, save_gif, sheet
from src.runtime.signals import StopRequest, run_script
from src.utils import FlagError, UserError, atomic_file, count, flush_folder, load_png, save_png, writing

SHEET_PICTURES = 256  # the most that grid.png shows
HALVES = ("x_t: noise becomes a picture", "x_0: the picture the network expects")  # of denoising.gif


def read_points(value: str) -> str | list[tuple[int | None, int]]:
    """ "3,7" or "5:3,6:7,9" to [(seed or None, index), ...]; "next" stays."""
    if value == "next":
        return value
    points = [point.rpartition(":") for point in value.split(",")]
    return [(KINDS["SEED"]["type"](seed) if colon else None, INDEX["type"](index)) for seed, colon, index in points]


INDEX = whole(0)
POINTS = kind("two pictures or more, as 3,7 or as seed:index,seed:index", read_points, lambda points: len(points) > 1)
POINTS |= {"metavar": "A,B", "nargs": "?", "const": "next"}


def read_flags(argv: Sequence[str]) -> Namespace:
    """The flags, each checked by itself. Raises FlagError."""
    out = "folder for images/, grid.png, ...; keeps pictures there (default: the next free outputs/[NAME/]pictures/001, ...)"
    rows: Rows = [
        "what to draw",
        *WHICH_CHECKPOINT,
        ("about", TRUTH, False, "only tell what the checkpoint holds, or alone which runs there are"),
        ("num_samples", whole(1, 1_000_000), 64, "how many pictures"),
        ("start_index", INDEX, 0, "number of the first picture, to draw a later part of the same series"),
        *WHICH_SERIES,
        ("interpolate", POINTS, None, "walk from the first picture to the next, or through A,B,... (index or seed:index)"),
        ("interp_steps", whole(2, 10_000), 10, "pictures from one of these to the next, both counted"),
        "how",
        *HOW_TO_DRAW,
        "what to write",
        ("output_dir", PATH, None, out),
        ("npz", TRUTH, False, "also samples.npz: arr_0 uint8 [N, H, W, C], arr_1 the labels"),
        ("gif", TRUTH, False, "also denoising.gif, or with --interpolate interpolation.gif"),
        ("columns", whole(1, 256), None, "of the sheet (default: near a square, one class each, or one leg)"),
        ("zoom", whole(1, 64), None, "how wide a pixel gets in the sheet and GIFs (default: 96 / image size)"),
        ("overwrite", TRUTH, False, "remove pictures drawn with other settings first"),
    ]
    description = "Draw pictures from a checkpoint. Picture i depends on the checkpoint, the settings, --seed and i alone."
    examples = ["--run demo --guidance 2", "--checkpoint docs/shapes.pth --num_samples 16 --gif"]
    flags = FlagParser("sample.py", rows, description, examples).parse(argv)
    if flags.interpolate and (flags.sampler.startswith("ddpm") or flags.eta):
        raise FlagError("--interpolate: needs a sampler without randomness; allowed are dpm++, and ddim with --eta 0.")
    return flags


class Series:
    """Pictures in a row, from --start_index on, one of each class, then again.
    numbers: of the pictures.   about: what they depend on, beside the settings.   label(i): the class of picture i.
    start: as Pipeline.series takes it.   sheet, columns, shown: its file and what is in it, None for all pictures.
    caption(i): what stands below picture i."""

    sheet = "grid.png"

    def __init__(self, pipeline: Pipeline, flags: Namespace):
        self.numbers = range(flags.start_index, flags.start_index + flags.num_samples)
        self.about = {"seed": flags.seed}
        self.label, self.start = pipeline.label, partial(pipeline.start, flags.seed)
        self.columns = class_columns(len(pipeline.labels)) if pipeline.labels else None
        self.pipeline, self.shown = pipeline, None

    def caption(self, i: int) -> str:
        return self.pipeline.caption(self.label(i))


class Walk:
    """A walk through pictures of a series, its ends. A leg goes from one end to the next and has `steps` pictures, both ends
    counted. Each picture stands on a leg at a share, 0 to 1, of the way: slerp gives x_T there, and the network's prediction
    goes from the one class to the other. The attributes are those of a Series."""

    sheet = "interpolation.png"

    def __init__(self, pipeline: Pipeline, flags: Namespace):
        self.pipeline, self.steps, points = pipeline, flags.interp_steps, flags.interpolate
        if points == "next":
            points = [(None, flags.start_index), (None, flags.start_index + 1)]
        self.points = points = [(flags.seed if seed is None else seed, index) for seed, index in points]
        self.ends = [PictureNoise(seed, [index], pipeline.shape, pipeline.device)(0)[0] for seed, index in points]
        self.columns = min(self.steps, 20)
        self.shown = [leg * (self.steps - 1) + k for leg in range(len(points) - 1) for k in range(self.steps)]  # a row a leg
        self.labels = [pipeline.label(index) for _, index in points]
        self.numbers = range((len(points) - 1) * (self.steps - 1) + 1)
        self.about = {"seed": flags.seed, "walk": [*map(list, points)], "interp_steps": self.steps}

    def place(self, i: int) -> tuple[int, float]:
        """(leg, share) of picture i; the last picture ends the last leg."""
        leg = min(i // (self.steps - 1), len(self.ends) - 2)
        return leg, i / (self.steps - 1) - leg

    def label(self, i: int) -> int | None:
        """The class of the nearer end."""
        leg, share = self.place(i)
        return self.labels[leg + (share > 0.5)]

    def caption(self, i: int) -> str:
        """At an end how --interpolate names it, and its class."""
        leg, share = self.place(i)
        if share not in (0, 1):
            return ""
        seed, index = self.points[leg + int(share)]
        return f"{seed}:{index} {self.pipeline.caption(self.label(i))}".rstrip()

    def start(self, indices: Sequence[int]) -> tuple[Callable, Tensor | None, Callable]:
        network, (legs, shares) = self.pipeline.network, zip(*map(self.place, indices))
        x_T = torch.stack([slerp(self.ends[leg], self.ends[leg + 1], share) for leg, share in zip(legs, shares)])
        y_a, y_b = (self.pipeline.to_y([self.labels[leg + k] for leg in legs]) for k in (0, 1))
        weight = torch.tensor(shares, device=x_T.device)[:, None, None, None]

        def between(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            if y is None:  # no class, also in guidance
                return network(x, t, y)
            return torch.lerp(network(x, t, y_a), network(x, t, y_b), weight)

        is_one_class = all(self.labels[leg] == self.labels[leg + 1] for leg in legs)
        return lambda k: x_T, y_a, network if is_one_class else between


def draw(pipeline: Pipeline, flags: Namespace, out: Path, series: Series | Walk) -> None:
    """Draw the pictures that are missing in out/images, this process its part of them, and denoising.gif."""
    there, numbers, gif = pictures_of(out / "images"), series.numbers, out / "denoising.gif"
    frames: list[list[Tensor]] | None = [] if flags.gif and isinstance(series, Series) and not gif.exists() else None
    missing = [i for i in numbers if i not in there or (frames is not None and i < numbers[0] + flags.batch_size)]
    seconds = pipeline.prepare(len(missing), flags.batch_size)
    how = f"{flags.sampler} in {count(pipeline.steps, 'step')}"
    print(f"drawing    {count(len(missing), 'picture')} by {how}: about {duration(seconds)}")

    with writing(out, "--output_dir"), ThreadPoolExecutor(4) as pool:
        saving: Iterable = ()
        for batch, drawn in pipeline.series(missing, flags.batch_size, series.start, frames):
            list(saving)  # the last batch is on the disk, or its error is raised here
            saving = pool.map(partial(save_png, flush=False), drawn, [out / "images" / f"{i:06}.png" for i in batch])
        list(saving)
        flush_folder(out / "images")
        if frames:
            halves = [torch.stack([sheet(half, zoom=flags.zoom) for half in pair]) for pair in frames]
            save_gif([sheet(pair, HALVES, columns=2, zoom=1) for pair in halves], gif)


# --- what lies beside the pictures ------------------------------------------------------------------------


def finish(pipeline: Pipeline, flags: Namespace, out: Path, series: Series | Walk) -> list[str]:
    """Sheet, labels.csv, samples.npz and interpolation.gif of all pictures that are there. Returns what there is."""
    there = pictures_of(out / "images")
    every = series.shown or list(there)
    shown = every[:SHEET_PICTURES]
    if len(every) > len(shown):
        print(f"note: {series.sheet} shows the first {len(shown)} of {count(len(every), 'picture')}")
    names, columns = [*map(series.caption, shown)], flags.columns or series.columns
    picture = sheet(torch.stack([load(there[i], pipeline) for i in shown]), names if any(names) else [], columns, flags.zoom)
    with writing(out, "--output_dir"):
        save_png(picture, out / series.sheet)
        if isinstance(series, Walk) and flags.gif:
            frames = [sheet(load(path, pipeline)[None], [series.caption(i)], zoom=flags.zoom) for i, path in there.items()]
            save_gif(frames, out / "interpolation.gif")
        if isinstance(series, Series):
            save_labels(out / "labels.csv", pipeline, flags.seed, there)
        if flags.npz:
            save_npz(out / "samples.npz", pipeline, series, there)
    return [name for name in ("settings.json", *BESIDE) if (out / name).exists()]


def load(path: Path, pipeline: Pipeline) -> Tensor:
    """A picture of the folder. Raises UserError for one that sample.py did not write there."""
    if (picture := load_png(path)).shape != pipeline.shape:
        found, expected = ("x".join(map(str, shape)) for shape in (picture.shape, pipeline.shape))
        raise UserError(f"{path} is {found} (channels, height, width), not {expected}: another program's. Move it away.")
    return picture


def save_labels(path: Path, pipeline: Pipeline, seed: int, there: dict[int, Path]) -> None:
    """labels.csv: a line for each picture; its file by the path from here."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["file", "seed", "index", "label", "class_id", "class"])
    for index, picture in there.items():
        label = pipeline.label(index)
        known = ["", "", ""] if label is None else [label, pipeline.class_ids[label], pipeline.classes[label]]
        writer.writerow([f"images/{picture.name}", seed, index, *known])
    with atomic_file(path) as file:
        file.write(table.getvalue().encode("utf-8", "replace"))


def save_npz(path: Path, pipeline: Pipeline, series: Series | Walk, there: dict[int, Path]) -> None:
    """samples.npz as the ADM suite reads it, one picture in memory at a time."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(there), *pipeline.shape[1:], pipeline.shape[0])}
    with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            for picture in Bar(there.values(), desc=path.name, unit="picture", leave=False):
                array.write(load(picture, pipeline).permute(1, 2, 0).contiguous().numpy().data)
        if pipeline.labels:
            with archive.open("arr_1.npy", "w") as array:
                np.save(array, np.array([series.label(i) for i in there], dtype=np.int64))


def sample(flags: Namespace, world: World) -> None:
    start = time.perf_counter()
    print_idle(flags.typed, {"without --output_dir": ("overwrite", not flags.output_dir)})
    pipeline = Pipeline(flags, world)
    series = (Walk if flags.interpolate else Series)(pipeline, flags)
    out = Path(flags.output_dir) if flags.output_dir else next_folder(Path("outputs", flags.run, "pictures"), world)
    facts = {"device": describe(pipeline.device), "checkpoint": flags.checkpoint, "run": flags.run, "step": pipeline.step}
    facts |= {"command": flags.command, "date": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    about = pipeline.about() | series.about
    with picture_folder(out, about, facts, flags.overwrite) if world.is_main else contextlib.nullcontext():
        world.barrier()
        size = f"{pipeline.settings.IMAGE_SIZE}x{pipeline.settings.IMAGE_SIZE}"
        print(f"checkpoint {flags.checkpoint}, {flags.weights} weights, {size}")
        print(f"device     {facts['device']}, {pipeline.precision}")
        draw(pipeline, flags, out, series)
        world.barrier()
        if world.is_main:
            names = finish(pipeline, flags, out, series)
            print(f"Done in {duration(time.perf_counter() - start)}: {out}/ has images, {', '.join(names)}")


def main(argv: Sequence[str] | None = None) -> int:
    def body(stop: StopRequest) -> None:
        stop.out_of_memory = "Out of memory. Use a smaller --batch_size; it changes no picture."
        flags = read_flags(command_line(argv))
        if flags.about:
            others = sorted(flags.typed - {"about", "run", "checkpoint"})
            print_idle(flags.typed, {"with --about": (" ".join(others), True)})
            config = None
            with contextlib.suppress(Exception):  # of any kind: it is the user's file
                config = import_module("config")
            return tell(flags, config)
        with World.join() as world:
            sample(flags, world)

    stopped = "Stopped at once. The pictures written so far are whole, and the same command with this --output_dir goes on."
    return run_script("sample.py", body, stopped)


if __name__ == "__main__":
    sys.exit(main())
