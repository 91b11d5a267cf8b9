"""A checkpoint ready to draw, for the scripts: the flags that say how to draw, and the drawing itself."""

import hashlib
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from src.dataset import parse_classes
from src.diffusion import Model
from src.noise import PictureNoise
from src.progress import Bar
from src.runtime.build import build_diffusion, build_model
from src.runtime.checkpoint import TO_DRAW, load_checkpoint, load_weights
from src.runtime.device import InPrecision, compiled, pick_device, pick_precision, place, should_compile, synchronize
from src.runtime.distributed import World
from src.runtime.flags import CLASSES, Rows, choice, number, print_idle, whole
from src.runtime.folders import choose_checkpoint, known_checkpoints
from src.runtime.settings import KINDS, as_flags, changed_from_defaults
from src.runtime.sheets import caption
from src.samplers import SAMPLERS, SPACINGS, Noise
from src.utils import FlagError, count, to_uint8

DEFAULT_STEPS = {"ddim": 50, "dpm++": 20}  # ddpm takes all that the model was trained with
Start = Callable[[Sequence[int]], tuple[Noise, Tensor | None, Model]]
GIF_FRAMES, GIF_IMAGES = 50, 16  # the most that denoising.gif shows

WHICH_SERIES: Rows = [
    ("seed", KINDS["SEED"], 0, "which series of pictures"),
    ("classes", CLASSES, "", f"{CLASSES['type'].__name__}; one picture of each, then again (default: all)"),
    ("guidance", number(0, 100), 1.0, "1 follows the class, 0 ignores it, 2 to 4 exaggerate it at twice the cost"),
]
HOW_TO_DRAW: Rows = [
    ("sampler", choice(*SAMPLERS), "dpm++", ", ".join(SAMPLERS)),
    ("steps", whole(1, 100_000), None, "network calls per picture (default: all for ddpm, 50 for ddim, 20 for dpm++)"),
    ("spacing", choice(*SPACINGS), "logsnr", "which steps: even in the log-SNR, or in t"),
    ("eta", number(0, 1), 0.0, "randomness of ddim, 0 none, 1 as much as ddpm"),
    ("weights", choice("ema", "raw"), "ema", "the running average of the weights, or the raw ones"),
    ("batch_size", whole(1, 100_000), 64, "pictures drawn at a time; changes none of them"),
    ("device", KINDS["DEVICE"], "auto", "auto, cuda, mps, cpu"),
    ("precision", KINDS["PRECISION"], "auto", "auto, fp32, bf16, fp16"),
    ("compile", KINDS["COMPILE"], "auto", "torch.compile: auto (on CUDA, from 2,000 calls on), true, false"),
]


class Pipeline:
    """A checkpoint ready to draw: the network, the diffusion, the classes, and how the flags want it done."""

    def __init__(self, flags: Namespace, world: World = World()):
        if flags.eta and flags.sampler != "ddim":
            raise FlagError(f"--eta: got {flags.eta:g} with --sampler {flags.sampler}; only --sampler ddim takes it.")
        choose_checkpoint(flags)
        self.world = world
        weights = "ema" if flags.weights == "ema" else "model"
        state = load_checkpoint(Path(flags.checkpoint), (*TO_DRAW, weights), mmap=True)
        self.settings, self.classes, self.class_ids = state["config"], state["classes"], state["class_ids"]
        self.step, self.epoch = state.get("step"), state.get("epoch")
        s, most = self.settings, self.settings.TIME_STEPS
        if flags.steps and flags.steps > most:
            allowed = f"this checkpoint was trained with TIME_STEPS {most}, allowed are 1 to {most}"
            raise FlagError(f"--steps: got {flags.steps}; {allowed}.")
        self.steps = flags.steps or min(most, DEFAULT_STEPS.get(flags.sampler, most))
        walk = getattr(flags, "interpolate", None)  # sample.py has it
        points = [] if walk in (None, "next") else walk
        table = {
            "without --interpolate": ("interp_steps", not walk),
            "with --interpolate": ("num_samples", walk),
            "where --interpolate names its pictures": ("start_index", points),
            "where --interpolate names the seeds": ("seed", points and all(seed is not None for seed, _ in points)),
            f"where all {most:,} steps are taken": ("spacing", self.steps == most),
        }
        print_idle(flags.typed, table)
        if not s.CLASS_CONDITIONAL and (flags.classes not in ("", "all") or flags.guidance != 1):
            raise FlagError("--classes, --guidance: this checkpoint knows no classes; train with --class_conditional true.")
        if s.CLASS_CONDITIONAL and not s.LABEL_DROPOUT and flags.guidance != 1:
            found = f"got {flags.guidance:g}, but this checkpoint was trained with LABEL_DROPOUT 0: it saw no hidden label"
            raise FlagError(f"--guidance: {found}. Allowed is 1; for other values train with --label_dropout 0.1.")
        every = [*range(len(self.classes))] if s.CLASS_CONDITIONAL else None
        self.labels = parse_classes(flags.classes, self.classes, self.class_ids) if every and flags.classes else every
        self.device = pick_device(flags.device, world.local_rank)
        self.dtype = pick_precision(flags.precision, self.device)
        self.precision = str(self.dtype).removeprefix("torch.")
        model = build_model(s, len(self.classes))
        self.weights = state[weights]
        load_weights(model, self.weights)
        place(model.eval().requires_grad_(False), self.device, self.dtype)
        self.network: Callable = InPrecision(model, self.device, self.dtype)
        self.choice, self.is_compiled = flags.compile, False
        self.compile_for(0)  # if the flag says so, whatever the number of calls
        self.diffusion = build_diffusion(s).to(self.device)
        self.shape = (s.CHANNELS, s.IMAGE_SIZE, s.IMAGE_SIZE)
        self.sampler, self.spacing, self.eta, self.guidance = flags.sampler, flags.spacing, flags.eta, flags.guidance

    def label(self, index: int) -> int | None:
        """The class of picture number `index`: one picture of each class, then again."""
        return self.labels[index % len(self.labels)] if self.labels else None

    def caption(self, label: int | None) -> str:
        """What stands on a sheet below a picture of this class."""
        return "" if label is None else caption(self.classes[label], label)

    def to_y(self, labels: Sequence[int | None]) -> Tensor | None:
        return torch.tensor(labels, device=self.device) if self.labels else None

    def about(self) -> dict[str, Any]:
        """What pictures depend on, but for their seed and number: pictures with the same may lie in one folder."""
        digest = hashlib.sha256()
        for weight in self.weights.values():
            digest.update(weight.contiguous().flatten().view(torch.uint8).numpy().data)
        about = {"weights": digest.hexdigest()[:16], "sampler": self.sampler, "steps": self.steps, "eta": self.eta}
        about |= {"spacing": self.spacing, "precision": self.precision}
        return about | ({"guidance": self.guidance, "classes": self.labels} if self.labels else {})

    def seconds_per_call(self, pictures: int, batch_size: int) -> float:
        """Time of the network for one picture in a batch of the usual size, of four on a CPU where that takes seconds."""
        usual = min(batch_size, pictures)
        batch = usual if self.device.type == "cuda" else min(usual, 4)
        seconds = self.seconds_of(batch)
        if batch < usual and seconds * usual / batch < 0.5:
            batch, seconds = usual, self.seconds_of(usual)
        return seconds / batch

    @torch.no_grad()
    def seconds_of(self, batch: int) -> float:
        """Time of one call on a batch: the mean of five, or of as many as fit in half a second."""
        x, t = torch.randn(batch, *self.shape, device=self.device), torch.zeros(batch, dtype=torch.int64, device=self.device)
        y = self.to_y([0] * batch)
        seconds: list[float] = []
        while len(seconds) < 6 and sum(seconds[1:]) < 0.5:
            synchronize(self.device)
            start = time.perf_counter()
            self.network(x, t, y)
            synchronize(self.device)
            seconds.append(time.perf_counter() - start)
        return sum(seconds[1:]) / len(seconds[1:])  # the first call compiles, allocates and picks kernels

    def compile_for(self, calls: float) -> None:
        """Compile the network if so many calls of it pay for that."""
        self.is_compiled = should_compile(self.choice, self.device, calls)
        if self.is_compiled:
            self.network = compiled(self.network)

    def prepare(self, pictures: int, batch_size: int) -> float:
        """Compile the network if drawing so many pictures pays for that. Returns how many seconds the processes take."""
        if not pictures:
            return 0.0
        batches, calls_per_picture = -(-pictures // batch_size), self.steps * (1 if self.guidance in (0, 1) else 2)
        processes = min(self.world.size, batches)
        if self.choice == "auto":
            self.compile_for(batches * calls_per_picture / processes)
        return self.seconds_per_call(pictures, batch_size) * pictures * calls_per_picture / processes

    def start(self, seed: int, indices: Sequence[int]) -> tuple[Noise, Tensor | None, Model]:
        """What pictures number `indices` of the series `seed` start from: their noise, their classes, and the network."""
        return PictureNoise(seed, indices, self.shape, self.device), self.to_y([*map(self.label, indices)]), self.network

    def series(self, indices: Sequence[int], batch_size: int, start: Start, frames: list | None = None) -> Iterator[tuple]:
        """This process's part of the pictures number `indices`, batch by batch: (their numbers, [B, C, S, S] uint8).
        start: what pictures start from, as the method above says.   frames: a list that gets the first images of the first
        batch on their way: a pair (x_t, the x_0 predicted) of [at most 16, C, S, S] uint8 for each frame of denoising.gif."""
        firsts = self.world.shard(range(0, len(indices), batch_size))
        with Bar(total=len(firsts) * self.steps, unit="step", disable=not self.world.is_main) as bar:
            for first in firsts:
                batch = indices[first : first + batch_size]
                # Fill up the last batch: another shape would be compiled anew, and for 1 to 3 pictures a CPU rounds otherwise.
                least = max(batch_size * (self.is_compiled and first > firsts[0]), 4 * (self.device.type == "cpu"))
                drawn = [*batch, *[batch[-1]] * (least - len(batch))]
                yield batch, self.draw(*start(drawn), bar, frames if first == 0 else None)[: len(batch)]

    @torch.no_grad()
    def draw(self, noise: Noise, y: Tensor | None, network: Model, bar: Bar, frames: list | None = None) -> Tensor:
        """One batch from noise(0), [B, C, S, S], as uint8."""
        path, denoiser = self.diffusion.path(self.steps, self.spacing), self.diffusion.denoiser(network, y, self.guidance)
        every = -(-self.steps // GIF_FRAMES)
        states = self.diffusion.trajectory(self.sampler, noise(0), path, denoiser, noise, self.eta)
        for k, (x, x_0) in enumerate(states, start=1):
            if frames is not None and (k % every == 0 or k == self.steps):
                frames.append([to_uint8(images[:GIF_IMAGES]) for images in (x, x_0)])
            bar.update()
        return to_uint8(x)


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
