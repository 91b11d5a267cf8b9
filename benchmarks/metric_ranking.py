"""Do the figures of evaluate.py rank pictures as eyes do? Real pictures against spoiled ones, as a Markdown table.

    python benchmarks/metric_ranking.py --data_path data/tiny-imagenet-200 --features random --count 3000

Needs Tiny ImageNet, and no checkpoint. Every set has `count` pictures; the reference is as many training pictures.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from src.dataset import prepare
from src.evaluation import distribution as metrics
from src.evaluation.features import load_features
from src.evaluation.picture_set import PictureSet
from src.runtime.device import describe, pick_device
from src.runtime.flags import FlagParser, text, whole
from src.runtime.settings import RULES
from src.utils import UserError

CLASSES_KEPT = 20  # of 200, in the set that lost most of its modes


def blurred(pictures: np.ndarray) -> np.ndarray:
    """Each pixel the mean of the 3x3 around it."""
    x = F.pad(torch.from_numpy(pictures.astype(np.float32)), (1, 1, 1, 1), mode="replicate")
    return F.avg_pool2d(x, 3, stride=1).round().to(torch.uint8).numpy()


def noisy(pictures: np.ndarray, std: float, random: np.random.Generator) -> np.ndarray:
    """With normal noise of `std` grey levels."""
    return np.clip(np.rint(pictures + random.normal(0, std, pictures.shape)), 0, 255).astype(np.uint8)


def main() -> int:
    parser = FlagParser("metric_ranking.py", description=__doc__)
    path = text("a path", r".*\S.*", "PATH")
    parser.add("--data_path", path, "Tiny ImageNet", default="./data/tiny-imagenet-200")
    parser.add("--cache_path", path, "where it is kept decoded", default="./data/cache")
    parser.add(
        "--features", text("a network, as in evaluate.py", r".*\S.*", "NAME"), "the feature network", default="inception"
    )
    parser.add("--count", whole(1000), "pictures in each set", default=10_000)
    parser.add("--device", RULES["DEVICE"], "auto, cuda, mps, cpu", default="auto")
    try:
        flags = SimpleNamespace(**parser.parse(sys.argv[1:]))
        rank(flags)
    except UserError as error:
        print(f"metric_ranking.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def rank(flags: SimpleNamespace) -> None:
    device = pick_device(flags.device)
    network = load_features(flags.features, device)
    train, val = (prepare("tiny-imagenet", flags.data_path, split, 64, flags.cache_path) for split in ("train", "val"))
    random = np.random.default_rng(0)
    rows = random.permutation(len(train))
    labels = train.labels.numpy()
    few = np.flatnonzero(labels < CLASSES_KEPT)
    few = few[~np.isin(few, rows[: flags.count])]  # none of the reference's own pictures

    def some(images: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        return np.asarray(images)[np.sort(chosen[: flags.count])]

    held_out = some(val.images, random.permutation(len(val)))
    sets: dict[str, Callable[[], np.ndarray]] = {
        "validation": lambda: held_out,
        "other training pictures": lambda: some(train.images, rows[flags.count :]),
        "validation, noise of 10 grey levels": lambda: noisy(held_out, 10, random),
        "validation, noise of 30 grey levels": lambda: noisy(held_out, 30, random),
        "validation, blurred 3x3": lambda: blurred(held_out),
        f"training, {CLASSES_KEPT} of 200 classes": lambda: some(train.images, random.permutation(few)),
        "uniform noise": lambda: random.integers(0, 256, held_out.shape, dtype=np.uint8),
    }

    def extract(name: str, pixels: np.ndarray) -> dict[str, torch.Tensor]:
        return network.extract(PictureSet(name, pixels), 64, device)

    reference = extract("the reference", some(train.images, rows))
    statistics = metrics.fid_features_to_statistics(reference[network.layers["fid"]])
    lines = []
    start = time.perf_counter()
    for name, make in sets.items():
        figures = metrics.figures(extract(name, make()), reference, statistics, network.layers, kid_subset_size=1000)
        score = f"{figures['inception_score']:.3f}" if "inception_score" in figures else "-"
        lines.append(
            f"| {name} | {figures['fid']:.3f} | {1000 * figures['kid']:.2f} ± {1000 * figures['kid_std']:.2f} | {score} "
            f"| {figures['precision']:.3f} | {figures['recall']:.3f} |"
        )
    print(f"{network.name}, {metrics.LIBRARY}, {flags.count:,} pictures a set, {describe(device)}, {time.strftime('%Y-%m-%d')}")
    print("| set | FID | KID x 1000 | Inception Score | precision | recall |\n|---|---|---|---|---|---|")
    print("\n".join(lines))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
