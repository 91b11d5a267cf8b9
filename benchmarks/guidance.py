"""Guidance between two noise levels (arXiv:2404.07724) and by a weaker checkpoint (arXiv:2406.02507), against `--guidance`.

    python -m benchmarks.guidance --checkpoint docs/nature.pth --weak checkpoints/nature/epoch_050.pth

Each row: --count pictures of 20 steps of dpm++, judged as benchmarks.judge does. calls: of the network for a picture. The same
command goes on with the rows that are missing; two at once share them by --part 0/2 and --part 1/2.
"""

import sys
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Args, Table
from benchmarks.judge import Judge
from src.runtime.build import open_images
from src.runtime.pipeline import Pipeline

Model = Callable[..., Tensor]
ALWAYS = (0.0, 1000.0)
CASES = [  # by what, scale, and between which sigma over signal
    ("nothing", 1.0, ALWAYS), ("no class", 1.5, ALWAYS), ("weaker", 1.5, ALWAYS), ("no class", 2.0, (0.3, 3)),
    ("no class", 2.0, ALWAYS), ("weaker", 2.0, ALWAYS), ("no class", 3.0, (0.3, 3)), ("no class", 1.5, (0.3, 10)),
    ("no class", 2.0, (0.3, 10)), ("no class", 2.0, (1, 10)), ("weaker", 3.0, ALWAYS), ("no class", 3.0, ALWAYS),
    ("no class", 2.0, (0.3, 40)), ("no class", 1.75, (0.3, 40)),
]  # fmt: skip


class Guided(torch.nn.Module):
    """A network that is guided itself. between: sigma over signal at which it is; elsewhere it is asked once."""

    def __init__(self, model: Model, other: Model, scale: float, abar: Tensor, between: tuple[float, float], same_class: bool):
        super().__init__()
        self.model, self.other, self.scale, self.same_class = model, other, scale, same_class
        noise = (1 / abar - 1).sqrt()
        self.guided, self.calls = (between[0] < noise) & (noise <= between[1]), 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        prediction = self.model(x, t, y)
        self.calls += len(x)
        if self.scale == 1 or not self.guided[t[0]]:
            return prediction
        self.calls += len(x)
        other = self.other(x, t, y if self.same_class else None)
        return other + self.scale * (prediction - other)


def measure(args: Args) -> None:
    how = dict(
        classes="all", sampler="dpm++", spacing="logsnr", eta=0.0, weights="ema", precision="auto", compile="false", typed=(),
        steps=20, guidance=1.0, device=args.device, checkpoint=args.checkpoint, run="",
    )  # fmt: skip
    pipeline = Pipeline(SimpleNamespace(**how))  # type: ignore[arg-type]
    weak = Pipeline(SimpleNamespace(**how | {"checkpoint": args.weak})).network if args.weak else None  # type: ignore[arg-type]
    asked = dict(step=pipeline.step, count=args.count)
    table = Table("guidance", args, pipeline.device, **asked)
    done = {(row["by"], row["scale"], *row["between"]) for row in table.past() if asked.items() <= row.items()}
    judge, val = Judge(pipeline.settings, args.tiny), open_images(pipeline.settings, "val")
    part, parts = map(int, args.part.split("/"))
    if not part and ("real validation", 0.0, *ALWAYS) not in done:
        table.add(by="real validation", scale=0.0, between=list(ALWAYS), calls=0.0, **judge(val, val.labels))
    labels = torch.tensor([pipeline.label(i) or 0 for i in range(args.count)])
    strong = pipeline.network
    for by, scale, between in CASES[part::parts]:
        if (by, scale, *between) in done or (by == "weaker" and not weak):
            continue
        other = weak if by == "weaker" else strong
        pipeline.network = Guided(strong, other, scale, pipeline.diffusion.alphas_cumprod, between, by == "weaker")
        drawn = pipeline.series(range(args.count), 50, lambda indices: pipeline.start(0, indices))
        pixels = torch.cat([batch for _, batch in drawn])
        calls = pipeline.network.calls / args.count
        table.add(by=by, scale=scale, between=list(between), calls=calls, **judge(pixels, labels))


FLAGS = {
    "checkpoint": dict(default="docs/nature.pth", help="default: docs/nature.pth"),
    "weak": dict(default="", help="an earlier checkpoint of the same run"),
    "count": dict(type=int, default=500, help="pictures a row (default: 500)"),
    "part": dict(default="0/1", help="every second row, from the first: 0/2"),
}

if __name__ == "__main__":
    sys.exit(common.main("guidance", __doc__, measure, FLAGS))
