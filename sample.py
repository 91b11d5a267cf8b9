"""Draw pictures from a checkpoint, which carries all that is needed: `python sample.py --checkpoint checkpoints/best.pth`."""

import csv
import io
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from src.build import build_diffusion, build_model
from src.checkpoint import load_checkpoint
from src.device import InPrecision, describe, pick_device, pick_precision, place, should_compile, synchronize
from src.flags import NOT_NEGATIVE, TRUTH, FlagParser, choice, number, text, whole
from src.labels import labelled_sheet, parse_classes
from src.pictures import PictureNoise, grid, save_gif, save_png, slerp, to_uint8
from src.samplers import SAMPLERS
from src.settings import RULES
from src.utils import FlagError, UserError, atomic_file

DEFAULT_STEPS = {"ddim": 50, "dpm++": 20}  # ddpm takes all that the model was trained with
GRID_PICTURES = 256  # the most that grid.png shows
GIF_FRAMES, GIF_PICTURES = 50, 16  # the most that denoising.gif shows


def read_flags(argv: Sequence[str]) -> SimpleNamespace:
    """The flags, each checked by itself. Raises FlagError."""
    parser = FlagParser(
        "sample.py",
        usage="python sample.py [--checkpoint PATH] [--flag VALUE ...]",
        description="Draw pictures from a checkpoint. Picture i follows from the checkpoint, the settings, --seed and i alone.",
    )
    path = text("a path", r".*\S.*", "PATH")
    ends = text("two pictures, as 3,7 or as seed:index,seed:index", r"\d+(:\d+)?,\d+(:\d+)?|next", "A,B")._replace(bare="next")
    what = parser.add_argument_group("what to draw")
    for flag, rule, comment, default in [
        ("--checkpoint", path, "the checkpoint to draw from", "checkpoints/best.pth"),
        ("--num_samples", whole(1), "how many pictures", 64),
        ("--seed", RULES["SEED"], "which series of pictures", 0),
        ("--start_index", whole(0), "number of the first picture, to draw a later part of the same series", 0),
        ("--classes", text("names, ids or indices, separated by commas, or all", r".*\S.*", "NAMES"),
         "names, ids or indices of classes, separated by commas, or all; pictures take them in turn", "all"),
        ("--guidance", NOT_NEGATIVE, "1 follows the class, 0 ignores it, 2 to 4 exaggerate it at twice the cost", 1.0),
        ("--interpolate", ends, "walk from the first picture to the next, or from A to B, each an index or seed:index", None),
        ("--interp_steps", whole(2), "pictures on that walk, both ends counted", 10),
    ]:  # fmt: skip
        parser.add(flag, rule, comment + (f" (default: {default})" if default is not None else ""), what, default)
    how = parser.add_argument_group("how")
    for flag, rule, comment, default in [
        ("--sampler", choice(*SAMPLERS), f"{', '.join(SAMPLERS)} (default: dpm++)", "dpm++"),
        ("--steps", whole(1), "network calls per picture (default: all for ddpm, 50 for ddim, 20 for dpm++)", None),
        (
            "--eta",
            number("from 0 to 1", lambda x: 0 <= x <= 1),
            "randomness of ddim, 0 none, 1 as much as ddpm (default: 0)",
            0.0,
        ),
        (
            "--weights",
            choice("ema", "raw"),
            "the running average of the weights, or the raw ones (default: ema)",
            "ema",
        ),
        ("--batch_size", whole(1), "pictures drawn at a time; changes none of them (default: 64)", 64),
        ("--device", RULES["DEVICE"], "auto, cuda, mps, cpu (default: auto)", "auto"),
        ("--precision", RULES["PRECISION"], "auto, fp32, bf16, fp16 (default: auto)", "auto"),
        ("--compile", RULES["COMPILE"], "torch.compile the network: auto, true, false (default: auto)", "auto"),
    ]:
        parser.add(flag, rule, comment, how, default)
    where = parser.add_argument_group("what to write")
    parser.add(
        "--output_dir",
        path,
        "folder for 000000.png, ..., grid.png, labels.csv (default: outputs/pictures)",
        where,
        "outputs/pictures",
    )
    parser.add("--npz", TRUTH, "also samples.npz, all pictures as arr_0, uint8 [N, H, W, 3]", where, False)
    parser.add("--gif", TRUTH, "also denoising.gif: x_t and the predicted x_0 side by side", where, False)
    parser.add("--overwrite", TRUTH, "replace what is there already", where, False)
    flags = SimpleNamespace(**parser.parse(argv))
    if flags.eta and flags.sampler != "ddim":
        raise FlagError(f"--eta: got {flags.eta:g} with --sampler {flags.sampler}; only --sampler ddim takes it.")
    if flags.interpolate and (flags.sampler == "ddpm" or flags.eta):
        raise FlagError("--interpolate: needs a sampler without randomness; allowed are dpm++, and ddim with --eta 0.")
    return flags


class Artist:
    """A checkpoint ready to draw: the network, the diffusion, the classes, and how the flags want it done."""

    def __init__(self, flags: SimpleNamespace):
        state = load_checkpoint(Path(flags.checkpoint), mmap=True)
        self.settings, self.classes, self.class_ids = state["config"], state["classes"], state["class_ids"]
        s, most = self.settings, self.settings.TIME_STEPS
        if flags.steps and flags.steps > most:
            raise FlagError(
                f"--steps: got {flags.steps}; this checkpoint was trained with TIME_STEPS {most}, allowed are 1 to {most}."
            )
        self.steps = flags.steps or min(most, DEFAULT_STEPS.get(flags.sampler, most))
        if not s.CLASS_CONDITIONAL and (flags.classes != "all" or flags.guidance != 1):
            raise FlagError("--classes, --guidance: this checkpoint knows no classes; train with --class_conditional true.")
        self.labels = parse_classes(flags.classes, self.classes, self.class_ids) if s.CLASS_CONDITIONAL else None
        self.device = pick_device(flags.device)
        self.dtype = pick_precision(flags.precision, self.device)
        model = build_model(s, len(self.classes))
        model.load_state_dict(state["ema" if flags.weights == "ema" else "model"])
        place(model.eval().requires_grad_(False), self.device)
        self.network: Callable = InPrecision(model, self.device, self.dtype)
        if should_compile(flags.compile, self.device):
            self.network = torch.compile(self.network)
        self.diffusion = build_diffusion(s).to(self.device)
        self.shape = (3, s.IMAGE_SIZE, s.IMAGE_SIZE)
        self.options = dict(sampler=flags.sampler, steps=self.steps, eta=flags.eta, guidance=flags.guidance)
        self.calls_per_step = 1 if flags.guidance in (0, 1) else 2

    def label(self, index: int) -> int | None:
        """The class of picture number `index`: the classes in turn."""
        return self.labels[index % len(self.labels)] if self.labels else None

    def to_y(self, labels: Sequence[int | None]) -> Tensor | None:
        return torch.tensor(labels, device=self.device) if self.labels else None

    def seconds(self, pictures: int, batch_size: int) -> float:
        """How long `pictures` will take, from one network call on a few of them."""
        batch = min(batch_size, pictures) if self.device.type == "cuda" else min(batch_size, pictures, 4)
        x, t = (
            torch.randn(batch, *self.shape, device=self.device),
            torch.zeros(batch, dtype=torch.int64, device=self.device),
        )
        y = self.to_y([0] * batch)
        with torch.no_grad():
            for _ in range(2):  # the first call compiles, allocates and picks kernels
                synchronize(self.device)
                start = time.perf_counter()
                self.network(x, t, y)
                synchronize(self.device)
        return (time.perf_counter() - start) / batch * pictures * self.steps * self.calls_per_step

    def draw(
        self,
        noise: Callable[[int], Tensor],
        y: Tensor | None,
        count: int,
        bar: tqdm,
        frames: list | None = None,
        network=None,
    ) -> Tensor:
        """One batch: [count, 3, S, S] uint8. frames: where to put what denoising.gif shows of it, if anywhere."""
        network = network or self.network
        trajectory = self.diffusion.trajectory(network, (count, *self.shape), noise=noise, y=y, **self.options)
        every = -(-self.steps // GIF_FRAMES)
        for k, (x, x_0) in enumerate(trajectory, start=1):
            if frames is not None and (k % every == 0 or k == self.steps):
                left, right = (grid(to_uint8(images[:GIF_PICTURES])) for images in (x, x_0))
                frames.append(torch.cat([left, right], dim=2))
            bar.update()
        return to_uint8(x)


def draw_series(artist: Artist, flags: SimpleNamespace, bar: tqdm, frames: list | None, save: Callable) -> Tensor:
    """Pictures start_index, start_index + 1, ... of the series, each saved as NUMBER.png."""
    drawn = []
    indices = list(range(flags.start_index, flags.start_index + flags.num_samples))
    for start in range(0, len(indices), flags.batch_size):
        batch = indices[start : start + flags.batch_size]
        noise = PictureNoise(flags.seed, batch, artist.shape, artist.device)
        y = artist.to_y([artist.label(i) for i in batch])
        pictures = artist.draw(noise, y, len(batch), bar, frames if start == 0 else None)
        for index, picture in zip(batch, pictures):
            save(picture, f"{index:06}.png")
        drawn.append(pictures)
    return torch.cat(drawn)


def draw_walk(artist: Artist, flags: SimpleNamespace, bar: tqdm, frames: list | None, save: Callable) -> Tensor:
    """From one picture to another: slerp in x_T, and from one class to the other in the network's prediction."""
    ends = parse_ends(flags)
    a, b = (PictureNoise(seed, [index], artist.shape, artist.device)(0)[0] for seed, index in ends)
    label_a, label_b = (artist.label(index) for _, index in ends)
    drawn = []
    shares = torch.linspace(0, 1, flags.interp_steps)
    for start in range(0, len(shares), flags.batch_size):
        batch = shares[start : start + flags.batch_size]
        x_T = torch.stack([slerp(a, b, share) for share in batch.tolist()])
        y_a, y_b = (artist.to_y([label] * len(batch)) for label in (label_a, label_b))
        weight = batch.to(artist.device)[:, None, None, None]

        def network(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            if y is None or label_a == label_b:
                return artist.network(x, t, y)
            return torch.lerp(artist.network(x, t, y_a), artist.network(x, t, y_b), weight)  # noqa: B023 (used at once)

        pictures = artist.draw(lambda k: x_T, y_a, len(batch), bar, frames if start == 0 else None, network)  # noqa: B023
        for i, picture in enumerate(pictures, start):
            save(picture, f"interpolation_{i:03}.png")
        drawn.append(pictures)
    return torch.cat(drawn)


def parse_ends(flags: SimpleNamespace) -> list[tuple[int, int]]:
    """The two (seed, index) between which --interpolate walks."""
    if flags.interpolate == "next":
        return [(flags.seed, flags.start_index), (flags.seed, flags.start_index + 1)]
    ends = [[int(part) for part in end.split(":")] for end in flags.interpolate.split(",")]
    return [(end[0], end[1]) if len(end) == 2 else (flags.seed, end[0]) for end in ends]


def save_labels(path: Path, artist: Artist, flags: SimpleNamespace) -> None:
    """labels.csv: a line for each picture."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["file", "seed", "index", "label", "class_id", "class"])
    for index in range(flags.start_index, flags.start_index + flags.num_samples):
        label = artist.label(index)
        known = ["", "", ""] if label is None else [label, artist.class_ids[label], artist.classes[label]]
        writer.writerow([f"{index:06}.png", flags.seed, index, *known])
    with atomic_file(path) as file:
        file.write(table.getvalue().encode())


def sample(flags: SimpleNamespace) -> None:
    artist, out = Artist(flags), Path(flags.output_dir)
    is_walk = flags.interpolate is not None
    count = flags.interp_steps if is_walk else flags.num_samples
    files = (
        [*(f"interpolation_{i:03}.png" for i in range(count)), "interpolation.png"] if is_walk
        else [*(f"{flags.start_index + i:06}.png" for i in range(count)), "grid.png", "labels.csv"]
    ) + ["denoising.gif"] * flags.gif + ["samples.npz"] * flags.npz  # fmt: skip
    there = [name for name in files if (out / name).exists()]
    if there and not flags.overwrite:
        raise UserError(
            f"{out / there[0]} exists already, with {len(there) - 1} more. Add --overwrite, or choose another --output_dir."
        )

    print(f"checkpoint {flags.checkpoint}, {flags.weights} weights, {artist.settings.IMAGE_SIZE}x{artist.settings.IMAGE_SIZE}")
    print(f"device     {describe(artist.device)}, {str(artist.dtype).removeprefix('torch.')}")
    seconds = artist.seconds(count, flags.batch_size)
    print(f"drawing    {count:,} pictures by {flags.sampler} in {artist.steps:,} steps: about {duration(seconds)}")

    start = time.perf_counter()
    frames: list[Tensor] | None = [] if flags.gif else None
    batches = -(-count // flags.batch_size)
    with tqdm(total=batches * artist.steps, unit="step", disable=None, dynamic_ncols=True) as bar:
        pictures = (draw_walk if is_walk else draw_series)(
            artist, flags, bar, frames, lambda picture, name: save_png(picture, out / name)
        )
    if is_walk:
        save_png(grid(pictures, columns=count), out / "interpolation.png")
    else:
        shown = pictures[:GRID_PICTURES]
        if artist.labels:
            names = [artist.classes[artist.label(flags.start_index + i)] for i in range(len(shown))]
            save_png(labelled_sheet(shown, names, columns=min(10, len(artist.labels))), out / "grid.png")
        else:
            save_png(grid(shown), out / "grid.png")
        save_labels(out / "labels.csv", artist, flags)
    if frames:
        save_gif(frames, out / "denoising.gif")
    if flags.npz:
        with atomic_file(out / "samples.npz") as file:
            np.savez(file, arr_0=pictures.permute(0, 2, 3, 1).numpy())
    print(f"Done in {duration(time.perf_counter() - start)}: {out.resolve()}/{files[0]} ... {', '.join(files[count:])}")


def duration(seconds: float) -> str:
    """62 -> "1 min 2 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{int(seconds // 60)} min {int(seconds % 60)} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def main() -> int:
    try:
        sample(read_flags(sys.argv[1:]))
        return 0
    except UserError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("sample.py: interrupted; the pictures written so far stand.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
