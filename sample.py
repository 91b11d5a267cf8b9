"""Draw pictures from a checkpoint, which carries all that is needed: `python sample.py --checkpoint checkpoints/best.pth`."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() listens: Ctrl-C amid the imports shows no traceback

import csv
import io
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from src.noise import PictureNoise, slerp
from src.runtime.device import describe
from src.runtime.distributed import World
from src.runtime.flags import PATH, TRUTH, FlagParser, Kind, kind, number, text, whole
from src.runtime.pipeline import Pipeline, add_drawing_flags, check_drawing_flags, duration
from src.runtime.settings import KINDS
from src.runtime.signals import StopRequest, run_script
from src.utils import FlagError, UserError, atomic_file, grid, labelled_sheet, make_folder, save_gif, save_png, writing

GRID_PICTURES = 256  # the most that grid.png shows


def read_ends(value: str) -> str | list[tuple[int | None, int]]:
    """ "3,7" or "5:3,6:7" to [(seed or None, index), ...]; "next" stays."""
    ends = [end.split(":") for end in value.split(",")]
    if value == "next":
        return value
    if [len(end) in (1, 2) for end in ends] != [True, True]:
        raise ValueError
    return [(KINDS["SEED"]["type"](end[0]) if len(end) == 2 else None, INDEX["type"](end[-1])) for end in ends]


INDEX = whole(0)
ENDS = kind("two pictures, as 3,7 or as seed:index,seed:index", read_ends, bool, metavar="A,B", nargs="?", const="next")


def read_flags(argv: Sequence[str]) -> Namespace:
    """The flags, each checked by itself. Raises FlagError."""
    parser = FlagParser(
        "sample.py",
        usage="python sample.py [--checkpoint PATH] [--flag VALUE ...]",
        description="Draw pictures from a checkpoint. Picture i follows from the checkpoint, the settings, --seed and i alone.",
    )
    names = text("names, ids or indices, separated by commas, or all", r".*\S.*", "NAMES")
    what = parser.add_argument_group("what to draw")
    flags: list[tuple[str, Kind, Any, str]] = [
        ("--checkpoint", PATH, "checkpoints/best.pth", "the checkpoint to draw from (default: checkpoints/best.pth)"),
        ("--num_samples", whole(1, 1_000_000), 64, "how many pictures (default: 64)"),
        ("--seed", KINDS["SEED"], 0, "which series of pictures (default: 0)"),
        ("--start_index", INDEX, 0, "number of the first picture, to draw a later part of the same series (default: 0)"),
        ("--classes", names, "all", f"{names['type'].__name__}; pictures take them in turn (default: all)"),
        ("--guidance", number(0, 100), 1.0,
         "1 follows the class, 0 ignores it, 2 to 4 exaggerate it at twice the cost (default: 1.0)"),
        ("--interpolate", ENDS, None, "walk from the first picture to the next, or from A to B, each an index or seed:index"),
        ("--interp_steps", whole(2, 10_000), 10, "pictures on that walk, both ends counted (default: 10)"),
    ]  # fmt: skip
    for flag, its_kind, default, comment in flags:
        what.add_argument(flag, **its_kind, default=default, help=comment)
    add_drawing_flags(parser.add_argument_group("how"))
    where = parser.add_argument_group("what to write")
    comment = "folder for 000000.png, ..., grid.png, labels.csv (default: outputs/pictures)"
    where.add_argument("--output_dir", **PATH, default="outputs/pictures", help=comment)
    where.add_argument("--npz", **TRUTH, default=False, help="also samples.npz, all pictures as arr_0, uint8 [N, H, W, 3]")
    where.add_argument("--gif", **TRUTH, default=False, help="also denoising.gif: x_t and the predicted x_0 side by side")
    where.add_argument("--overwrite", **TRUTH, default=False, help="replace what is there already")
    chosen = parser.parse(argv)
    check_drawing_flags(chosen)
    if chosen.interpolate and (chosen.sampler.startswith("ddpm") or chosen.eta):
        raise FlagError("--interpolate: needs a sampler without randomness; allowed are dpm++, and ddim with --eta 0.")
    return chosen


def draw_series(pipeline: Pipeline, flags: Namespace, bar: tqdm, frames: list | None, save: Callable) -> Tensor:
    """Pictures start_index, start_index + 1, ... of the series, each saved as NUMBER.png. [N, 3, S, S] uint8."""
    drawn = torch.zeros(flags.num_samples, *pipeline.shape, dtype=torch.uint8)
    indices = range(flags.start_index, flags.start_index + flags.num_samples)
    for batch, pictures in pipeline.series(flags.seed, indices, flags.batch_size, bar, frames):
        for index, picture in zip(batch, pictures):
            save(picture, f"{index:06}.png")
            drawn[index - flags.start_index] = picture
    return pipeline.world.sum(drawn)  # those of other processes are zero here


def draw_walk(pipeline: Pipeline, flags: Namespace, bar: tqdm, frames: list | None, save: Callable) -> Tensor:
    """From one picture to another: slerp in x_T, and from one class to the other in the network's prediction."""
    ends = parse_ends(flags)
    a, b = (PictureNoise(seed, [index], pipeline.shape, pipeline.device)(0)[0] for seed, index in ends)
    label_a, label_b = (pipeline.label(index) for _, index in ends)
    drawn = torch.zeros(flags.interp_steps, *pipeline.shape, dtype=torch.uint8)
    shares = torch.linspace(0, 1, flags.interp_steps)
    for start in pipeline.world.shard(range(0, len(shares), flags.batch_size)):
        batch = shares[start : start + flags.batch_size]
        x_T = torch.stack([slerp(a, b, share) for share in batch.tolist()])
        y_a, y_b = (pipeline.to_y([label] * len(batch)) for label in (label_a, label_b))
        weight = batch.to(pipeline.device)[:, None, None, None]

        def network(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            if y is None or label_a == label_b:
                return pipeline.network(x, t, y)
            return torch.lerp(pipeline.network(x, t, y_a), pipeline.network(x, t, y_b), weight)  # noqa: B023 (used at once)

        pictures = pipeline.draw(lambda k: x_T, y_a, bar, frames if start == 0 else None, network)  # noqa: B023
        for i, picture in enumerate(pictures, start):
            save(picture, f"interpolation_{i:03}.png")
            drawn[i] = picture
    return pipeline.world.sum(drawn)


def parse_ends(flags: Namespace) -> list[tuple[int, int]]:
    """The two (seed, index) between which --interpolate walks."""
    if flags.interpolate == "next":
        return [(flags.seed, flags.start_index), (flags.seed, flags.start_index + 1)]
    return [(flags.seed if seed is None else seed, index) for seed, index in flags.interpolate]


def save_labels(path: Path, pipeline: Pipeline, flags: Namespace) -> None:
    """labels.csv: a line for each picture."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["file", "seed", "index", "label", "class_id", "class"])
    for index in range(flags.start_index, flags.start_index + flags.num_samples):
        label = pipeline.label(index)
        known = ["", "", ""] if label is None else [label, pipeline.class_ids[label], pipeline.classes[label]]
        writer.writerow([f"{index:06}.png", flags.seed, index, *known])
    with atomic_file(path) as file:
        file.write(table.getvalue().encode())


def sample(flags: Namespace, world: World) -> None:
    pipeline, out = Pipeline(flags, world), Path(flags.output_dir)
    is_walk = flags.interpolate is not None
    count = flags.interp_steps if is_walk else flags.num_samples
    files = (
        [*(f"interpolation_{i:03}.png" for i in range(count)), "interpolation.png"] if is_walk
        else [*(f"{flags.start_index + i:06}.png" for i in range(count)), "grid.png", "labels.csv"]
    ) + ["denoising.gif"] * flags.gif + ["samples.npz"] * flags.npz  # fmt: skip
    there = [name for name in files if (out / name).exists()]
    if world.is_main and there and not flags.overwrite:  # another process may look when the first has begun to write
        raise UserError(
            f"{out / there[0]} exists already, with {len(there) - 1} more. Add --overwrite, or choose another --output_dir."
        )

    make_folder(out, "--output_dir")

    size = f"{pipeline.settings.IMAGE_SIZE}x{pipeline.settings.IMAGE_SIZE}"
    print(f"checkpoint {flags.checkpoint}, {flags.weights} weights, {size}")
    print(f"device     {describe(pipeline.device)}, {str(pipeline.dtype).removeprefix('torch.')}")
    seconds = pipeline.seconds(count, flags.batch_size)
    print(f"drawing    {count:,} pictures by {flags.sampler} in {pipeline.steps:,} steps: about {duration(seconds)}")

    start = time.perf_counter()
    frames: list[Tensor] | None = [] if flags.gif else None
    batches = len(world.shard(range(0, count, flags.batch_size)))
    with tqdm(total=batches * pipeline.steps, unit="step", disable=world.hides_bars, dynamic_ncols=True) as bar:
        pictures = (draw_walk if is_walk else draw_series)(
            pipeline, flags, bar, frames, lambda picture, name: save_png(picture, out / name)
        )
    if not world.is_main:
        return
    if is_walk:
        save_png(grid(pictures, columns=count), out / "interpolation.png")
    else:
        shown = pictures[:GRID_PICTURES]
        if pipeline.labels:
            names = [pipeline.classes[pipeline.label(flags.start_index + i)] for i in range(len(shown))]
            save_png(labelled_sheet(shown, names, columns=min(10, len(pipeline.labels))), out / "grid.png")
        else:
            save_png(grid(shown), out / "grid.png")
        save_labels(out / "labels.csv", pipeline, flags)
    if frames:
        save_gif(frames, out / "denoising.gif")
    if flags.npz:
        with atomic_file(out / "samples.npz") as file:
            np.savez(file, arr_0=pictures.permute(0, 2, 3, 1).numpy())
    print(f"Done in {duration(time.perf_counter() - start)}: {out.resolve()}/{files[0]} ... {', '.join(files[count:])}")


def main() -> int:
    def body(stop: StopRequest) -> None:
        flags = read_flags(sys.argv[1:])
        with World.join() as world, writing(flags.output_dir, "--output_dir"):
            sample(flags, world)

    out_of_memory = "Out of memory. Use a smaller --batch_size; it changes no picture."
    return run_script("sample.py", body, lambda: out_of_memory, "Stopped at once. The pictures written so far are whole.")


if __name__ == "__main__":
    sys.exit(main())
