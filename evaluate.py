"""How good a checkpoint is, in figures with their protocol: `python evaluate.py --checkpoint checkpoints/best.pth`.

FID and its relatives by default; --nll, --loss and --nearest for the rest. docs/evaluation.md says what each figure means.
"""

from src.runtime import early

if __name__ == "__main__":
    early.settle()  # before torch is imported

import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from src import noise
from src.dataset import DeviceImages
from src.evaluation import likelihood
from src.evaluation.nearest import measure_nearest
from src.evaluation.report import Evaluation, conclude, say
from src.progress import Bar, duration
from src.runtime.build import build_validation
from src.runtime.distributed import World
from src.runtime.flags import PATH, TRUTH, FlagParser, Rows, command_line, print_idle, whole
from src.runtime.folders import WHICH_CHECKPOINT
from src.runtime.pipeline import HOW_TO_DRAW, WHICH_SERIES
from src.runtime.signals import StopRequest, run_script
from src.utils import FlagError, UserError, count

LOSS_BINS = 20
NEAREST = whole(1, 1_000_000) | {"nargs": "?", "const": 16}
FEWEST = 10  # pictures that the Inception Score, precision and recall need
NETWORKS = ["inception", "random", "vgg16", *(f"dinov2-vit-{size}-14" for size in "sblg")]
NETWORKS += [f"clip-{name}" for name in ("rn50", "rn101", "rn50x4", "rn50x16", "rn50x64")]
NETWORKS += [f"clip-vit-{name}" for name in ("b-32", "b-16", "l-14", "l-14-336px")]


def read_flags(argv: Sequence[str]) -> Namespace:
    """The flags, each checked by itself and beside the others. Raises FlagError."""
    source = PATH | {"metavar": "SOURCE"}
    features = "network: inception, a file of Inception weights, random (no download), vgg16, ... (default: inception)"
    rows: Rows = [
        "what to measure",
        *WHICH_CHECKPOINT,
        ("fid", TRUTH, False, "FID, KID, Inception Score, precision and recall of drawn pictures"),
        ("nll", TRUTH, False, "the variational bound on validation pictures, in bits per dimension"),
        ("loss", TRUTH, False, "the validation loss of train.py, and the loss of the noise by t"),
        ("nearest", NEAREST, None, "the training pictures nearest to the first N drawn (alone: 16)"),
        "--fid, --nearest",
        ("num_samples", whole(1, 1_000_000), 10_000, "pictures to draw"),
        ("samples", source, None, "measure these instead of drawn ones: train, val, a folder or an .npz"),
        ("reference", source, "train", "what to compare with: train, val, a folder or an .npz"),
        ("features", PATH | {"metavar": "NAME"}, None, features),
        ("kid_subset_size", whole(2, 1_000_000), 1000, "pictures in each of KID's 100 subsets"),
        *WHICH_SERIES,
        "--nll, --loss",
        ("val_images", whole(2), None, "validation pictures (default: VAL_IMAGES of the checkpoint)"),
        ("nll_steps", whole(1, 100_000), None, "steps t drawn for each picture, by --seed (default: 20)"),
        ("exact", TRUTH, False, "every step t for each picture instead"),
        "how",
        *HOW_TO_DRAW,
        "where",
        ("output_dir", PATH, None, "folder of the JSON with figures and protocol (default: outputs/[NAME/]evaluation)"),
        ("npz", TRUTH, False, "also the drawn pictures, as arr_0, uint8 [N, H, W, 3]"),
        ("data_path", PATH, None, "where the checkpoint's dataset is (default: DATA_PATH of the checkpoint)"),
        ("cache_path", PATH, None, "where decoded pictures and features are (default: CACHE_PATH of the checkpoint)"),
        ("log_path", PATH, None, "TensorBoard folder of the curves by t (default: LOG_PATH of the checkpoint)"),
    ]
    description = "Measure a checkpoint. Without --fid, --nll, --loss or --nearest it does what --fid does."
    examples = ["--run demo --loss --nll", "--run demo --num_samples 2000"]
    flags = FlagParser("evaluate.py", rows, description, examples).parse(argv)
    flags.fid = flags.fid or not (flags.nll or flags.loss or flags.nearest)
    for flag, is_given in (("--exact", flags.exact), ("--nll_steps", flags.nll_steps is not None)):
        if is_given and not flags.nll:
            raise FlagError(f"{flag}: belongs to --nll; add it, or leave this out.")
    if flags.exact and flags.nll_steps is not None:
        raise FlagError("--exact, --nll_steps: every step, or so many drawn; give one of the two.")
    if flags.npz and (flags.samples or not flags.fid):
        raise FlagError("--npz: writes the pictures that --fid draws, and here it draws none.")
    if flags.features and flags.features not in NETWORKS and not os.path.isfile(flags.features):
        problem = "a folder, but a file of weights is needed" if os.path.isdir(flags.features) else "no file and no network"
        allowed = f"a file of Inception weights and {', '.join(NETWORKS)}"
        raise FlagError(f"--features: {flags.features} is {problem}; allowed are {allowed}.")
    return flags


def check_data(ev: Evaluation) -> None:
    """Refuse what the data make impossible, before anything is drawn or measured. Raises UserError."""
    flags = ev.flags
    if flags.nll and min(ev.settings.VAL_IMAGES, len(ev.split("val"))) < 2:
        raise UserError("--nll: there is one validation picture, and a standard error needs two.")
    given = ev.pictures(flags.samples) if flags.samples and (flags.fid or flags.nearest) else None
    others = [ev.pictures(flags.reference)] if flags.fid else []
    others += [ev.pictures("train"), ev.pictures("val")] if flags.nearest else []
    for other in others:
        size = given.size if given else f"{ev.settings.IMAGE_SIZE}x{ev.settings.IMAGE_SIZE}"
        if size != other.size:
            raise UserError(f"The samples are {size}, and {other.name} is {other.size}; only pictures of one size compare.")
    if flags.fid:
        samples, reference = len(given) if given else flags.num_samples, len(others[0])
        if given and samples == reference and given.fingerprint == others[0].fingerprint:
            raise FlagError("--samples, --reference: both are the same pictures; a set compared with itself says nothing.")
        if min(samples, reference) < max(flags.kid_subset_size, FEWEST):
            found = f"There are {count(samples, 'sample')} and {count(reference, 'reference picture')}"
            needed = f"KID compares subsets of {flags.kid_subset_size:,}; precision, recall and Inception Score need {FEWEST}"
            advice = "Use more pictures, e.g. with --num_samples, or a smaller --kid_subset_size."
            raise UserError(f"{found}, but {needed}. {advice}")
    if ev.world.is_main and (flags.fid or (flags.nearest and flags.features)):
        from src.evaluation.distribution import FeatureNetwork  # here, because torch-fidelity takes seconds

        ev.network = FeatureNetwork(flags.features or "inception", ev.device)


def measure_bound(ev: Evaluation) -> dict[str, Any]:
    """Ho et al. 2020, Eq. (5), on validation pictures, in bits per dimension. See src/evaluation/likelihood.py."""
    pipeline, flags, s = ev.pipeline, ev.flags, ev.settings
    images = DeviceImages(ev.split("val"), pipeline.device)
    number = min(s.VAL_IMAGES, len(images))
    parts = likelihood.strata(s.TIME_STEPS, s.TIME_STEPS if flags.exact else min(flags.nll_steps or 20, s.TIME_STEPS))
    seconds = pipeline.seconds_per_call(number, flags.batch_size) * number * len(parts) / ev.world.size
    way = "every step" if len(parts) == s.TIME_STEPS else f"{len(parts)} of {s.TIME_STEPS:,} steps, drawn for each picture"
    say("bound", f"{count(number, 'validation picture')}, {way}: about {duration(seconds)}")

    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(noise.VALIDATION))[:number]
    nats = torch.zeros(number, 1 + len(parts), dtype=torch.float64)  # of each picture: the prior, then each part
    starts = ev.world.shard(range(0, number, flags.batch_size))
    with Bar(total=len(starts) * len(parts), unit="step", disable=not ev.world.is_main) as bar:
        for start in starts:
            batch = rows[start : start + flags.batch_size]
            x_0, labels = images.batch(batch)
            y, keys = labels if s.CLASS_CONDITIONAL else None, noise.key(flags.seed, noise.VALIDATION, batch)
            nats[start : start + len(batch), 0] = likelihood.prior_term(pipeline.diffusion, x_0)
            for k, part in enumerate(parts, start=1):
                terms = likelihood.stratum_terms(pipeline.diffusion, pipeline.network, x_0, part, keys, y)
                nats[start : start + len(batch), k] = terms
                bar.update()
    bits = likelihood.bits_per_dimension(ev.world.sum(nats), int(np.prod(pipeline.shape)))
    if not bits.isfinite().all():
        raise FloatingPointError("The bound is not finite")
    if not ev.world.is_main:
        return {}
    figures, by_t = likelihood.summary(bits, parts)
    sums = [row["sum"] for row in by_t]
    each = [((part[0] + part[-1]) // 2, so_much / len(part)) for part, so_much in zip(parts, sums)]
    ev.curve("nll/bits_per_dimension_of_step_t", each)
    ev.curve("nll/bits_per_dimension_from_t_on", [(part[0], sum(sums[k:])) for k, part in enumerate(parts)])
    return {
        "bits_per_dimension": figures,
        "pictures": ev.validation(number),
        "steps": way,
        "variance": "beta_tilde, the mean from x_0 clipped to [-1, 1], discrete decoder (DDPM, Eq. 13)",
        "seed": flags.seed,
        "by_t": by_t,
    }


def measure_loss(ev: Evaluation) -> dict[str, Any]:
    """The validation loss of train.py, on the same pictures, steps and noise, and the squared error of the noise by t."""
    pipeline, flags, s = ev.pipeline, ev.flags, ev.settings
    images = DeviceImages(ev.split("val"), pipeline.device)
    number = min(s.VAL_IMAGES, len(images))
    batches = build_validation(s, images, ev.world, flags.batch_size)
    seconds = pipeline.seconds_per_call(number, flags.batch_size) * sum(map(len, batches.draws))
    say("loss", f"{count(number, 'validation picture')}: about {duration(seconds)}")
    sums = torch.zeros(2, s.TIME_STEPS, dtype=torch.float64)  # of the losses and of the draws at each t
    for batch in Bar(batches, unit="batch", disable=not ev.world.is_main):
        loss = pipeline.diffusion.eps_losses(pipeline.network, *batch).cpu().double()
        sums.index_add_(1, batch.t.cpu(), torch.stack([loss, torch.ones_like(loss)]))
    losses, draws = ev.world.sum(sums)
    if not losses.isfinite().all():
        raise FloatingPointError("The validation loss is not finite")
    by_t = []
    for k in range(LOSS_BINS):
        low, high = (-(-edge * s.TIME_STEPS // LOSS_BINS) for edge in (k, k + 1))
        if n := int(draws[low:high].sum()):
            by_t.append({"t_from": low, "t_to": high - 1, "count": n, "loss": losses[low:high].sum().item() / n})
    if not ev.world.is_main:
        return {}
    ev.curve("loss/eps_by_t", [((row["t_from"] + row["t_to"]) // 2, row["loss"]) for row in by_t])
    weighted = losses * pipeline.diffusion.val_weight.cpu()
    return {"held_out": (weighted.sum() / draws.sum()).item(), "pictures": ev.validation(number), "by_t": by_t}


def evaluate(flags: Namespace, world: World) -> None:
    compares, models = flags.fid or flags.nearest, flags.nll or flags.loss
    draws = compares and not flags.samples
    table = {
        "without --nll or --loss": ("val_images log_path", not models),
        "without --fid": ("reference kid_subset_size num_samples", not flags.fid),
        "without --fid or --nearest": ("samples features", not compares),
        "with --samples": ("num_samples", flags.fid and flags.samples),
        "where no pictures are drawn": ("classes guidance sampler steps spacing eta", not draws),
        "where the network is not used": ("weights precision compile", not (draws or models)),
        "without --nll where no pictures are drawn": ("seed", not (draws or flags.nll)),
    }
    print_idle(flags.typed, table)
    start, ev = time.perf_counter(), Evaluation(flags, world)
    for name, value in ev.report["protocol"].items():
        say(name, value)
    check_data(ev)
    if world.is_main:
        ev.open()  # before the work: where nothing can be written that is said now
    measures = {"loss": measure_loss} if flags.loss else {}
    measures |= {"bound": measure_bound} if flags.nll else {}
    if flags.fid:
        from src.evaluation.distribution import measure_distribution

        measures["distribution"] = measure_distribution
    measures |= {"nearest": measure_nearest} if flags.nearest else {}
    for section, measure in measures.items():
        found = measure(ev)
        if world.is_main:
            ev.add(section, found)
    if world.is_main:
        conclude(ev.report)
        print(f"Done in {duration(time.perf_counter() - start)}: {ev.out.resolve()}")


def main(argv: Sequence[str] | None = None) -> int:
    def body(stop: StopRequest) -> None:
        stop.out_of_memory = "Out of memory. Use a smaller --batch_size; it changes no figure."
        flags = read_flags(command_line(argv))
        with World.join() as world:
            evaluate(flags, world)

    return run_script("evaluate.py", body, "Stopped at once. Figures printed so far are in the JSON.")


if __name__ == "__main__":
    sys.exit(main())
