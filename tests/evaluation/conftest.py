"""What the tests of evaluate.py share: pictures made by chance, and a checkpoint of a tiny network to measure."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import config
import evaluate
from src.dataset import Images
from src.ema import EMA
from src.runtime.build import build_model, build_optimizer
from src.runtime.checkpoint import Checkpoints, Progress
from src.runtime.distributed import World
from src.runtime.monitor import Meter
from src.runtime.settings import resolve

CPU = torch.device("cpu")
PICTURES = 120  # 114 for training, 6 for validation


def random_pictures(count, seed, size=16):
    """uint8 [count, 3, size, size]: sixteen squares, tinted, with a little noise."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (count, 3, 4, 4)).repeat(size // 4, 2).repeat(size // 4, 3)
    tint, noise = random.integers(0, 100, (count, 3, 1, 1)), random.normal(0, 5, coarse.shape)
    return np.clip(coarse * 0.6 + tint + noise, 0, 255).astype(np.uint8)


def write_folder(folder: Path, pixels) -> Path:
    folder.mkdir(parents=True)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture.transpose(1, 2, 0)).save(folder / f"{i:04}.png")
    return folder


class Tiny:
    """A checkpoint of a tiny network with random weights, its pictures, and a way to call evaluate.py on it."""

    def __init__(self, root: Path):
        self.root, self.checkpoint = root, root / "tiny.pth"
        write_folder(root / "data", random_pictures(PICTURES, seed=0))
        network = "--image_size 16 --unet_dim 8 --dim_mults 1,2 --num_res_blocks 1 --attention_resolutions 0 --time_steps 30"
        paths = f"--data_path {root}/data --cache_path {root}/cache --log_path {root}/logs --checkpoint_path {root}"
        self.settings = resolve(
            config, f"--dataset folder --num_workers 0 --batch_size 64 --val_images 6 {network} {paths}".split()
        ).settings
        self.model = build_model(self.settings, 1)
        with torch.no_grad():
            for i, weight in enumerate(self.model.parameters()):  # the head begins at 0: let it say something
                weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
        self.save("tiny", self.model)

    def save(self, name, model, classes=("data",), settings=None) -> Path:
        parts = {"model": model, "ema": EMA(model, 0.9).model, "optimizer": build_optimizer(self.settings, model)}
        parts |= {"scaler": torch.amp.GradScaler("cpu", enabled=False), "meter": Meter(30, CPU)}
        images = Images(np.zeros(3), torch.zeros(3), list(classes), list(classes), Path(), "of the test")
        data = {"train": images, "val": images}
        Checkpoints(settings or self.settings, World(), data, Progress(30, 7, 7), parts, None).save(name)
        return self.root / f"{name}.pth"

    def words(self, *words: str) -> list[str]:
        """Flags of evaluate.py, of which the last of two alike counts."""
        out = self.root / "reports" / str(len(list(self.root.glob("reports/*"))))
        out.mkdir(parents=True)
        always = ["--checkpoint", self.checkpoint, "--output_dir", out, "--device", "cpu", "--precision", "fp32"]
        return [str(word) for word in (*always, "--features", "random", "--kid_subset_size", "10", *words)]

    def call(self, *words: str) -> SimpleNamespace:
        """The report, and the files beside it by suffix."""
        argv = self.words(*words)
        assert evaluate.main(argv) == 0
        (path,) = Path(argv[3]).glob("*.json")
        return SimpleNamespace(path=path, **json.loads(path.read_text()))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("evaluate"))
