"""Draw pictures from a checkpoint, which carries all that is needed: `python sample.py --checkpoint checkpoints/best.pth`."""

from src.runtime import early

if __name__ == "__main__":
    early.settle()  # before torch is imported

import csv
import io
import json
import sys
import time
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from src.noise import PictureNoise, slerp
from src.runtime.device import describe
from src.runtime.distributed import World
from src.runtime.flags import PATH, TRUTH, FlagParser, kind, number, text, whole
from src.runtime.pipeline import Pipeline, add_checkpoint_flags, add_drawing_flags, check_drawing_flags, checkpoint_of, duration
from src.runtime.settings import KINDS
from src.runtime.signals import StopRequest, run_script
from src.utils import (
    FlagError,
    UserError,
    atomic_file,
    class_columns,
    count,
    flush_folder,
    make_folder,
    reading,
    save_gif,
    save_png,
    sheet,
    writing,
)  # fmt: skip

SHEET_PICTURES = 256  # the most that grid.png shows
HALVES = ("x_t: noise becomes a picture", "x_0: the picture the network expects")  # of denoising.gif
FILES = ("grid.png", "labels.csv", "samples.npz", "denoising.gif", "interpolation.png", "interpolation.gif")


Points = list[tuple[int, int]]  # (seed, index) of the pictures of a walk; none for a plain series


def read_points(value: str) -> str | list[tuple[int | None, int]]:
    """ "3,7" or "5:3,6:7,9" to [(seed or None, index), ...], at least two; "next" stays."""
    points = [point.split(":") for point in value.split(",")]
    if value == "next":
        return value
    if len(points) < 2 or not all(len(point) in (1, 2) for point in points):
        raise ValueError
    return [(KINDS["SEED"]["type"](point[0]) if len(point) == 2 else None, INDEX["type"](point[-1])) for point in points]


INDEX = whole(0)
POINTS = kind(
    "two pictures or more, as 3,7 or as seed:index,seed:index", read_points, bool, metavar="A,B", nargs="?", const="next"
)


def read_flags(argv: Sequence[str]) -> Namespace:
    """The flags, each checked by itself. Raises FlagError."""
    parser = FlagParser(
        "sample.py",
        usage="python sample.py [--checkpoint PATH] [--flag VALUE ...]",
        description="Draw pictures from a checkpoint. Picture i depends on the checkpoint, the settings, --seed and i alone.",
    )
    names = text("names, ids or indices, separated by commas, or all", r".*\S.*", "NAMES")
    what = parser.add_argument_group("what to draw")
    add_checkpoint_flags(what)
    for flag, its_kind, default, comment in [
        ("--num_samples", whole(1, 1_000_000), 64, "how many pictures (default: 64)"),
        ("--seed", KINDS["SEED"], 0, "which series of pictures (default: 0)"),
        ("--start_index", INDEX, 0, "number of the first picture, to draw a later part of the same series (default: 0)"),
        ("--classes", names, "all", f"{names['type'].__name__}; pictures take them in turn (default: all)"),
        ("--guidance", number(0, 100), 1.0,
         "1 follows the class, 0 ignores it, 2 to 4 exaggerate it at twice the cost (default: 1)"),
        ("--interpolate", POINTS, None, "walk from the first picture to the next, or through A,B,... (index or seed:index)"),
        ("--interp_steps", whole(2, 10_000), 10, "pictures from one of these to the next, both counted (default: 10)"),
    ]:  # fmt: skip
        what.add_argument(flag, **its_kind, default=default, help=comment)
    add_drawing_flags(parser.add_argument_group("how"))
    where = parser.add_argument_group("what to write")
    where.add_argument("--output_dir", **PATH, help="folder for images/000000.png, ..., grid.png, labels.csv (default: the "
                       "next free outputs/pictures/001, 002, ...); pictures that are there already are kept")  # fmt: skip
    where.add_argument("--npz", **TRUTH, default=False, help="also samples.npz: arr_0 uint8 [N, H, W, C], arr_1 the labels")
    where.add_argument("--gif", **TRUTH, default=False, help="also denoising.gif, or with --interpolate interpolation.gif")
    where.add_argument("--overwrite", **TRUTH, default=False, help="remove pictures drawn with other settings first")
    flags = parser.parse(argv)
    check_drawing_flags(flags)
    if flags.interpolate and (flags.sampler.startswith("ddpm") or flags.eta):
        raise FlagError("--interpolate: needs a sampler without randomness; allowed are dpm++, and ddim with --eta 0.")
    flags.checkpoint = checkpoint_of(flags)
    return flags


# --- the folder: all pictures in it are drawn with the same settings --------------------------------------


def next_free(folder: Path, world: World) -> Path:
    """folder/001, or the number after the highest that is there."""
    taken = [int(path.name) for path in folder.glob("[0-9]*") if path.name.isdecimal()]
    return folder / f"{world.max(max(taken, default=0) + 1 if world.is_main else 0)[0]:03}"


def open_folder(out: Path, about: dict, overwrite: bool) -> None:
    """Make the folder, or go on in one whose pictures were drawn with the settings `about`. Others are refused, or removed
    first with overwrite. Raises UserError."""
    file, images = out / "settings.json", out / "images"
    with reading(out):
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        taken = [path for path in [*images.glob("*"), *(out / name for name in FILES)] if path.exists()]
    if taken and found != about and not overwrite:
        changed = ", ".join(
            f"{name} {found[name]} -> {value}" for name, value in about.items() if found.get(name, value) != value
        )
        why = f"drawn with other settings ({changed})" if found else f"that sample.py did not draw, {taken[0].name} for one"
        raise UserError(f"{out} holds pictures {why}. Choose another --output_dir, or remove them with --overwrite.")
    with writing(out, "--output_dir"):
        make_folder(images, "--output_dir")
        for path in taken if overwrite else []:
            path.unlink()
        with atomic_file(file) as part:
            part.write(json.dumps(about, indent=1).encode())


def pictures_of(images: Path) -> dict[int, Path]:
    """The pictures of a folder by number, in order."""
    return dict(sorted((int(path.stem), path) for path in images.glob("[0-9]*.png")))


def load(path: Path) -> Tensor:
    """[C, H, W] uint8."""
    with reading(path), Image.open(path) as image:
        return torch.from_numpy(np.atleast_3d(image)).permute(2, 0, 1)


# --- drawing ----------------------------------------------------------------------------------------------


def walk(pipeline: Pipeline, points: Points, steps: int) -> Callable:
    """A walk through pictures (seed, index), `steps` from one to the next with both counted: slerp in x_T, and from one class
    to the next in the network's prediction. Returns the `start` that Pipeline.series takes."""
    ends = [PictureNoise(seed, [index], pipeline.shape, pipeline.device)(0)[0] for seed, index in points]
    labels = [pipeline.label(index) for _, index in points]

    def start(indices: Sequence[int]) -> tuple[Callable, Tensor | None, Callable]:
        legs = [min(i // (steps - 1), len(points) - 2) for i in indices]
        shares = [i / (steps - 1) - leg for i, leg in zip(indices, legs)]
        x_T = torch.stack([slerp(ends[leg], ends[leg + 1], share) for leg, share in zip(legs, shares)])
        y_a, y_b = (pipeline.to_y([labels[leg + k] for leg in legs]) for k in (0, 1))
        weight = torch.tensor(shares, device=pipeline.device)[:, None, None, None]

        def between(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            if y is None:  # no class, also in guidance
                return pipeline.network(x, t, y)
            return torch.lerp(pipeline.network(x, t, y_a), pipeline.network(x, t, y_b), weight)

        is_one_class = all(labels[leg] == labels[leg + 1] for leg in legs)
        return lambda k: x_T, y_a, pipeline.network if is_one_class else between

    return start


def draw(pipeline: Pipeline, flags: Namespace, out: Path, points: Points) -> None:
    """Draw the pictures that are missing in out/images, this process its part of them, and denoising.gif."""
    first, number = flags.start_index, flags.num_samples
    if points:
        first, number = 0, (len(points) - 1) * (flags.interp_steps - 1) + 1
    there = pictures_of(out / "images")
    gif = out / "denoising.gif"
    is_wanted = flags.gif and not points and not gif.exists()
    missing = [i for i in range(first, first + number) if i not in there or (is_wanted and i < first + flags.batch_size)]
    seconds = pipeline.prepare(len(missing), flags.batch_size)
    how = f"{flags.sampler} in {count(pipeline.steps, 'step')}"
    print(f"drawing    {count(len(missing), 'picture')} by {how}: about {duration(seconds)}")

    frames: list[list[Tensor]] | None = [] if is_wanted else None
    start = walk(pipeline, points, flags.interp_steps) if points else partial(pipeline.start, flags.seed)
    steps = len(pipeline.world.shard(range(0, len(missing), flags.batch_size))) * pipeline.steps
    with (
        writing(out, "--output_dir"),
        ThreadPoolExecutor(4) as pool,
        tqdm(total=steps, unit="step", disable=pipeline.world.hides_bars, dynamic_ncols=True) as bar,
    ):
        saving: Iterable = ()
        for numbers, drawn in pipeline.series(missing, flags.batch_size, bar, start, frames):
            list(saving)  # the last batch is on the disk, or its error is raised here
            saving = pool.map(partial(save_png, flush=False), drawn, [out / "images" / f"{i:06}.png" for i in numbers])
        list(saving)
        flush_folder(out / "images")
        if frames:
            halves = [torch.stack([*map(sheet, pair)]) for pair in frames]
            save_gif([sheet(pair, HALVES, columns=2, zoom=1) for pair in halves], gif)


# --- what lies beside the pictures ------------------------------------------------------------------------


def finish(pipeline: Pipeline, flags: Namespace, out: Path, points: Points) -> list[str]:
    """Sheet, labels.csv, samples.npz and interpolation.gif of all pictures that are there. Returns what there is."""
    there = pictures_of(out / "images")
    shown = torch.stack([load(path) for path in list(there.values())[:SHEET_PICTURES]])
    with writing(out, "--output_dir"):
        if points:
            save_png(sheet(shown, columns=flags.interp_steps), out / "interpolation.png")
            if flags.gif:
                save_gif([sheet(load(path)[None]) for path in there.values()], out / "interpolation.gif")
        else:
            if pipeline.labels:
                names = [pipeline.classes[pipeline.label(i)] for i in list(there)[: len(shown)]]
                picture = sheet(shown, names, class_columns(len(pipeline.labels)))
            else:
                picture = sheet(shown)
            save_png(picture, out / "grid.png")
            save_labels(out / "labels.csv", pipeline, flags.seed, there)
        if flags.npz:
            save_npz(out / "samples.npz", pipeline, there)
    return [name for name in ("settings.json", *FILES) if (out / name).exists()]


def save_labels(path: Path, pipeline: Pipeline, seed: int, there: dict[int, Path]) -> None:
    """labels.csv: a line for each picture."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["file", "seed", "index", "label", "class_id", "class"])
    for index, picture in there.items():
        label = pipeline.label(index)
        known = ["", "", ""] if label is None else [label, pipeline.class_ids[label], pipeline.classes[label]]
        writer.writerow([picture.name, seed, index, *known])
    with atomic_file(path) as file:
        file.write(table.getvalue().encode("utf-8", "replace"))


def save_npz(path: Path, pipeline: Pipeline, there: dict[int, Path]) -> None:
    """samples.npz as the ADM suite reads it, one picture in memory at a time."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(there), *pipeline.shape[1:], pipeline.shape[0])}
    with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            for picture in there.values():
                array.write(load(picture).permute(1, 2, 0).contiguous().numpy().data)
        if pipeline.labels:
            with archive.open("arr_1.npy", "w") as array:
                np.save(array, np.array([pipeline.label(index) for index in there], dtype=np.int64))


# --- the script -------------------------------------------------------------------------------------------


def sample(flags: Namespace, world: World) -> None:
    start = time.perf_counter()
    pipeline = Pipeline(flags, world)
    out = Path(flags.output_dir) if flags.output_dir else next_free(Path("outputs", flags.run, "pictures"), world)
    points = flags.interpolate or []
    if points == "next":
        points = [(None, flags.start_index), (None, flags.start_index + 1)]
    points = [(flags.seed if seed is None else seed, index) for seed, index in points]
    about = (
        pipeline.about()
        | {"seed": flags.seed}
        | ({"walk": [*map(list, points)], "interp_steps": flags.interp_steps} if points else {})
    )
    with world.main_process_first():
        open_folder(out, about, flags.overwrite and world.is_main)
    size = f"{pipeline.settings.IMAGE_SIZE}x{pipeline.settings.IMAGE_SIZE}"
    print(f"checkpoint {flags.checkpoint}, {flags.weights} weights, {size}")
    print(f"device     {describe(pipeline.device)}, {str(pipeline.dtype).removeprefix('torch.')}")
    draw(pipeline, flags, out, points)
    world.barrier()
    if world.is_main:
        names = finish(pipeline, flags, out, points)
        print(f"Done in {duration(time.perf_counter() - start)}: {out}/ has images, {', '.join(names)}")


def main() -> int:
    def body(stop: StopRequest) -> None:
        flags = read_flags(sys.argv[1:])
        with World.join() as world:
            sample(flags, world)

    out_of_memory = "Out of memory. Use a smaller --batch_size; it changes no picture."
    stopped = "Stopped at once. The pictures written so far are whole, and the same command with this --output_dir goes on."
    return run_script("sample.py", body, lambda: out_of_memory, stopped)


if __name__ == "__main__":
    sys.exit(main())
