"""What evaluate.py measures with, and the report that it fills."""

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from src.dataset import Images, obtain, prepare
from src.evaluation.picture_set import PictureSet, read_set
from src.runtime.device import describe, pick_device
from src.runtime.distributed import World
from src.runtime.pipeline import Pipeline, duration
from src.utils import make_folder

SPLITS = ("train", "val")


class Evaluation:
    """One call of evaluate.py: what it measures with, made when it is first asked for, and the report that it fills."""

    def __init__(self, flags: Namespace, world: World):
        self.flags, self.world = flags, world
        own = {None, "train", "val"}  # what only a checkpoint can say
        needed = flags.nll or flags.loss or flags.nearest or flags.samples in own or flags.reference in own
        self.artist = Pipeline(flags, world) if needed else None
        self.device = self.artist.device if self.artist else pick_device(flags.device, world.local_rank)
        stem = Path(flags.checkpoint).stem if flags.samples is None or not flags.fid else Path(flags.samples).stem
        self.out = Path(flags.output_dir) / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}.json"
        make_folder(self.out.parent, "--output_dir")
        self.cache = Path(flags.cache_path or (self.artist.settings.CACHE_PATH if self.artist else "./data/cache"))
        self.splits: dict[str, Images] = {}
        self.network: Any = None  # FeatureNetwork
        self.drawn: np.ndarray | None = None
        self.report: dict[str, Any] = {"protocol": self.protocol()}

    def protocol(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "command": self.flags.command,
            "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "device": describe(self.device),
            "torch": str(torch.__version__),
        }
        if self.artist:
            s = self.artist.settings
            found |= {
                "checkpoint": self.flags.checkpoint,
                "step": self.artist.step,
                "epoch": self.artist.epoch,
                "weights": self.flags.weights,
                "precision": str(self.artist.dtype).removeprefix("torch."),
                "dataset": f"{s.DATASET}, {s.IMAGE_SIZE}x{s.IMAGE_SIZE}",
            }
        return found

    @property
    def size(self) -> str:
        """Of the pictures that are drawn."""
        assert self.artist
        return f"{self.artist.shape[2]}x{self.artist.shape[1]}"

    def drawing(self) -> dict[str, Any]:
        """How pictures are drawn, for the protocol."""
        assert self.artist
        options = {"sampler": self.artist.sampler, "steps": self.artist.steps}
        if self.flags.sampler == "ddim":
            options["eta"] = self.artist.eta
        if self.artist.labels is not None:
            options |= {"guidance": self.artist.guidance, "classes": self.flags.classes}
        return options | {"seed": self.flags.seed}

    def split(self, name: str) -> Images:
        """A split of the checkpoint's dataset."""
        if name not in self.splits:
            assert self.artist
            s, path = self.artist.settings, self.flags.data_path or self.artist.settings.DATA_PATH
            with self.world.main_process_first():
                obtain(s.DATASET, path, s.DATA_URL, s.DATA_SIZE, s.DATA_MD5)
                self.splits[name] = prepare(s.DATASET, path, name, s.IMAGE_SIZE, self.cache, s.NUM_WORKERS)
        return self.splits[name]

    def pictures(self, source: str, flag: str) -> PictureSet:
        """What --samples or --reference names."""
        if source in SPLITS:
            assert self.artist
            return PictureSet(f"{self.artist.settings.DATASET} {source}", np.asarray(self.split(source).images))
        return read_set(Path(source), flag)

    def held_out(self, count: int) -> dict[str, Any]:
        """Which held-out pictures, for the protocol: `count` of them, always the same ones while the split is the same."""
        assert self.artist
        about = self.pictures("val", "").about()
        return about | {"used": count, "labels": "given" if self.artist.settings.CLASS_CONDITIONAL else "none"}

    def features(self) -> Any:
        """The network of --features, loaded once. Imported here: torch-fidelity takes seconds."""
        if self.network is None:
            from src.evaluation.features import load_features

            with self.world.main_process_first():  # the first may have to download the weights
                self.network = load_features(self.flags.features or "inception", self.device, self.world)
        return self.network

    def draw(self, count: int) -> np.ndarray:
        """The first `count` pictures of the series, uint8 [count, 3, S, S]; drawn once."""
        if self.drawn is None or len(self.drawn) < count:
            assert self.artist
            flags, artist = self.flags, self.artist
            say("drawing", f"{count:,} pictures: about {duration(artist.seconds(count, flags.batch_size))}")
            drawn = torch.zeros(count, *artist.shape, dtype=torch.uint8)
            steps = len(self.world.shard(range(0, count, flags.batch_size))) * artist.steps
            with tqdm(total=steps, unit="step", disable=self.world.hides_bars, dynamic_ncols=True) as bar:
                for batch, pictures in artist.series(flags.seed, range(count), flags.batch_size, bar):
                    drawn[batch[0] : batch[-1] + 1] = pictures
            self.drawn = self.world.sum(drawn).numpy()
        return self.drawn[:count]

    def writer(self) -> SummaryWriter:
        """Of a TensorBoard run of its own, so that two evaluations are two curves."""
        assert self.artist
        return SummaryWriter(Path(self.flags.log_path or self.artist.settings.LOG_PATH) / "evaluate" / self.out.stem)


def say(title: str, words: str) -> None:
    print(f"{title:<11} {words}", flush=True)


def show(title: str, values: Any) -> None:
    """A dict as lines, nested ones by dotted names; long lists only in the JSON."""
    if isinstance(values, dict):
        for name, value in values.items():
            show(f"{title}.{name}" if title else name, value)
    elif not isinstance(values, list):
        say(f"{title:<44}", f"{values:.5g}" if isinstance(values, float) else str(values))
    elif values and isinstance(values[0], dict):
        names = list(values[0])
        print(title)
        for row in [dict(zip(names, names)), *values]:
            print("  " + "".join(f"{f'{x:.5g}' if isinstance(x, float) else x:>16}" for x in row.values()))
