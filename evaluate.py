"""How good a checkpoint is, in figures with their protocol: `python evaluate.py --checkpoint checkpoints/best.pth`.

FID and its relatives by default; --nll, --loss and --nearest for the rest. docs/evaluation.md says what each figure means.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() listens: Ctrl-C amid the imports shows no traceback

import json
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from src import noise
from src.dataset import DeviceImages
from src.evaluation import likelihood
from src.evaluation.nearest import nearest_mirrored
from src.evaluation.picture_set import PictureSet, write_npz
from src.evaluation.report import Evaluation, say, show
from src.runtime.build import build_validation
from src.runtime.distributed import World
from src.runtime.flags import PATH, TRUTH, FlagParser, Kind, number, text, whole
from src.runtime.pipeline import add_drawing_flags, check_drawing_flags, duration
from src.runtime.settings import KINDS
from src.runtime.signals import StopRequest, run_script
from src.utils import FlagError, UserError, atomic_file, labelled_sheet, save_png, writing

LOSS_BINS = 20
SHEET_ROWS, SHEET_NEIGHBOURS = 32, 5  # of the sheet of nearest training pictures


def read_flags(argv: Sequence[str]) -> Namespace:
    """The flags, each checked by itself. Raises FlagError."""
    parser = FlagParser(
        "evaluate.py",
        usage="python evaluate.py [--checkpoint PATH] [--fid] [--nll] [--loss] [--nearest] [--flag VALUE ...]",
        description="Measure a checkpoint. Without --fid, --nll, --loss or --nearest it does what --fid does.",
    )
    source = PATH | {"metavar": "SOURCE"}
    names = text("names, ids or indices, separated by commas, or all", r".*\S.*", "NAMES")
    Flags = list[tuple[str, Kind, Any, str]]
    what: Flags = [
        ("--checkpoint", PATH, "checkpoints/best.pth", "the checkpoint to measure (default: checkpoints/best.pth)"),
        ("--fid", TRUTH, False, "FID, KID, Inception Score, precision and recall of drawn pictures"),
        ("--nll", TRUTH, False, "the variational bound on held-out pictures, in bits per dimension"),
        ("--loss", TRUTH, False, "the held-out loss of the noise by t, on the pictures, t and noise of train.py"),
        ("--nearest", whole(1, 1_000_000) | {"nargs": "?", "const": 16}, None,
         "the training pictures nearest to the first N drawn (alone: 16)"),
    ]  # fmt: skip
    distribution: Flags = [
        ("--num_samples", whole(1, 1_000_000), 10_000, "pictures to draw (default: 10000)"),
        ("--samples", source, None, "measure these instead of drawn ones: train, val, a folder or an .npz"),
        ("--reference", source, "train", "what to compare with: train, val, a folder or an .npz (default: train)"),
        ("--features", PATH | {"metavar": "NAME"}, None,
         "network: inception, a file of Inception weights, random (no download), vgg16, ... (default: inception)"),
        ("--kid_subset_size", whole(2, 1_000_000), 1000, "pictures in each of KID's 100 subsets (default: 1000)"),
        ("--seed", KINDS["SEED"], 0, "which series of pictures; of --nll, which t and noise (default: 0)"),
        ("--classes", names, "all", "classes to draw, in turn (default: all)"),
        ("--guidance", number(0, 100), 1.0, "1 follows the class, 0 ignores it, more exaggerates it (default: 1)"),
    ]  # fmt: skip
    bound: Flags = [
        ("--val_images", whole(2), None, "held-out pictures (default: VAL_IMAGES of the checkpoint)"),
        ("--nll_steps", whole(1, 100_000), None, "steps t drawn for each picture (default: 20)"),
        ("--exact", TRUTH, False, "every step t for each picture instead"),
    ]
    where: Flags = [
        ("--output_dir", PATH, "outputs/evaluation",
         "folder of the JSON with figures and protocol (default: outputs/evaluation)"),
        ("--npz", TRUTH, False, "also the drawn pictures, as arr_0, uint8 [N, H, W, 3]"),
        ("--data_path", PATH, None, "where the checkpoint's dataset is (default: DATA_PATH of the checkpoint)"),
        ("--cache_path", PATH, None, "where decoded pictures and features are kept (default: CACHE_PATH of the checkpoint)"),
        ("--log_path", PATH, None, "TensorBoard folder of the curves by t (default: LOG_PATH of the checkpoint)"),
    ]  # fmt: skip
    groups = {
        "what to measure": what,
        "--fid and --nearest": distribution,
        "--nll and --loss": bound,
        "how": [],
        "where": where,
    }
    for title, listed in groups.items():
        group = parser.add_argument_group(title)
        for flag, kind, default, comment in listed:
            group.add_argument(flag, **kind, default=default, help=comment)
        if title == "how":
            add_drawing_flags(group)
    flags = parser.parse(argv)
    flags.command = shlex.join(["python", "evaluate.py", *argv])
    flags.fid = flags.fid or not (flags.nll or flags.loss or flags.nearest)
    check_flags(flags)
    return flags


def check_flags(flags: Namespace) -> None:
    """What cannot be asked for together."""
    check_drawing_flags(flags)
    for flag, is_given in (("--exact", flags.exact), ("--nll_steps", flags.nll_steps is not None)):
        if is_given and not flags.nll:
            raise FlagError(f"{flag}: belongs to --nll; add it, or leave this out.")
    if flags.exact and flags.nll_steps is not None:
        raise FlagError("--exact, --nll_steps: every step, or so many drawn; give one of the two.")
    if flags.fid and flags.samples and flags.samples == flags.reference:
        raise FlagError(f"--samples, --reference: both are {flags.samples}; a set compared with itself says nothing.")
    if flags.npz and (flags.samples or not flags.fid):
        raise FlagError("--npz: writes the pictures that --fid draws, and here it draws none.")


# --- FID, KID, Inception Score, precision and recall ----------------------------------------------------


def measure_distribution(ev: Evaluation) -> dict[str, Any]:
    """How near the distribution of the pictures is to the reference's."""
    from src.evaluation import distribution as metrics  # torch-fidelity takes seconds

    flags, folder = ev.flags, ev.cache / "fidelity"
    reference = ev.pictures(flags.reference, "--reference")
    samples = ev.pictures(flags.samples, "--samples") if flags.samples else None
    count = len(samples) if samples else flags.num_samples
    size = samples.size if samples else ev.size
    if size != reference.size:
        raise UserError(f"The pictures are {size} and the reference {reference.size}; figures of two sizes do not compare.")
    metrics.check_counts(count, len(reference), flags.kid_subset_size)
    network = ev.features()
    if not network.comparable:
        say("note", f"features of {network.name}: the figures compare with each other, not with published FID")
    if samples is None:
        samples = PictureSet(f"{flags.checkpoint}, drawn", ev.draw(count))
        if flags.npz and ev.world.is_main:
            write_npz(ev.out.with_suffix(".npz"), samples.pixels)
    known = not any(ev.world.max(not network.is_cached(reference, folder)))
    seconds = network.seconds(samples, flags.batch_size, ev.device) * (len(samples) + (0 if known else len(reference)))
    say("features", f"{network.name}: about {duration(seconds)}" + (", the reference's are known" if known else ""))
    drawn = network.extract(samples, flags.batch_size, ev.device)
    real = network.cached(reference, flags.batch_size, ev.device, folder)
    if not ev.world.is_main:
        return {}
    statistics = metrics.fid_statistics(network, reference, real, folder)
    figures = metrics.figures(drawn, real, statistics, network.layers, flags.kid_subset_size)
    warnings = metrics.warnings(len(samples), len(reference), len(statistics["mu"]))
    for warning in warnings:
        say("warning", warning)
    return {
        "figures": figures,
        "library": metrics.LIBRARY,
        "network": network.name,
        "comparable_with_published_inception_fid": network.comparable and not warnings,
        "samples": samples.about() | (ev.drawing() if not flags.samples else {}),
        "reference": reference.about(),
        "kid": f"{metrics.KID_SUBSETS} subsets of {flags.kid_subset_size}",
        "precision_recall": f"neighbourhood {metrics.NEIGHBOURHOOD}, at most {metrics.PRC_PICTURES} pictures a side",
        "warnings": warnings,
    }


# --- the variational bound ------------------------------------------------------------------------------


def measure_bound(ev: Evaluation) -> dict[str, Any]:
    """Ho et al. 2020, Eq. (5), on held-out pictures, in bits per dimension. See src/evaluation/likelihood.py."""
    artist, flags = ev.artist, ev.flags
    assert artist
    images = DeviceImages(ev.split("val"), artist.device)
    time_steps, dimensions = artist.settings.TIME_STEPS, int(np.prod(artist.shape))
    count = min(flags.val_images or artist.settings.VAL_IMAGES, len(images))
    if count < 2:
        raise UserError("--nll: there is one held-out picture, and a standard error needs two.")
    parts = likelihood.strata(time_steps, time_steps if flags.exact else min(flags.nll_steps or 20, time_steps))
    seconds = artist.seconds_per_call(count, flags.batch_size) * count * len(parts) / ev.world.size
    way = "every step" if len(parts) == time_steps else f"{len(parts)} of {time_steps:,} steps, drawn for each picture"
    say("bound", f"{count:,} held-out pictures, {way}: about {duration(seconds)}")

    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(noise.VALIDATION))[:count]
    nats = torch.zeros(count, 1 + len(parts), dtype=torch.float64)  # of each picture: the prior, then each part
    starts = ev.world.shard(range(0, count, flags.batch_size))
    with tqdm(total=len(starts) * len(parts), unit="step", disable=ev.world.hides_bars, dynamic_ncols=True) as bar:
        for start in starts:
            batch = rows[start : start + flags.batch_size]
            x_0, y = images.batch(batch)
            keys = noise.key(flags.seed, noise.VALIDATION, batch)
            columns = [likelihood.prior_term(artist.diffusion, x_0)]
            for part in parts:
                labels = y if artist.settings.CLASS_CONDITIONAL else None
                columns.append(likelihood.stratum_terms(artist.diffusion, artist.network, x_0, part, keys, labels))
                bar.update()
            nats[start : start + len(batch)] = torch.stack(columns, 1)
    bits = likelihood.bits_per_dimension(ev.world.sum(nats), dimensions)
    if not ev.world.is_main:
        return {}
    prior_bits, term_bits = bits[:, 0], bits[:, 1:]
    return {
        "bits_per_dimension": bound_figures(prior_bits, term_bits, parts),
        "pictures": ev.held_out(count),
        "steps": way,
        "variance": "beta_tilde, the mean from x_0 clipped to [-1, 1], discrete decoder (DDPM, Eq. 13)",
        "seed": flags.seed,
        "by_t": by_t(ev, term_bits, parts),
    }


def bound_figures(prior: Tensor, terms: Tensor, parts: list[range]) -> dict[str, float]:
    """The bound with its standard error over pictures, and its terms. prior: [N], terms: [N, K], bits per dimension."""
    total, error = likelihood.mean_and_error(prior + terms.sum(1))
    later = torch.tensor([part.start > 0 for part in parts])  # a part of its own for t = 0, unless there is one part in all
    figures = {"total": total, "standard_error": error, "prior": prior.mean().item()}
    if parts[0] == range(1):
        figures |= {"steps": terms[:, later].sum(1).mean().item(), "decoder": terms[:, 0].mean().item()}
    return figures


def by_t(ev: Evaluation, terms: Tensor, parts: list[range]) -> list[dict[str, float]]:
    """What each part of [0, T) adds, and a TensorBoard curve of it per step."""
    rows = []
    with ev.writer() as writer:
        for part, column in zip(parts, terms.T):
            mean, error = likelihood.mean_and_error(column)
            rows.append({"t_from": part.start, "t_to": part.stop - 1, "sum": mean, "standard_error": error})
            writer.add_scalar("bound/bits_per_dimension_of_step_t", mean / len(part), (part.start + part.stop - 1) // 2)
        for row, so_far in zip(rows, terms.flip(1).cumsum(1).flip(1).mean(0).tolist()):
            writer.add_scalar("bound/bits_per_dimension_from_t_on", so_far, row["t_from"])
    return rows


# --- the loss by t --------------------------------------------------------------------------------------


def measure_loss(ev: Evaluation) -> dict[str, Any]:
    """Mean squared error of the noise on the batches of train.py's loss/held_out, and by t."""
    artist = ev.artist
    assert artist
    s = artist.settings
    s = replace(s, VAL_IMAGES=ev.flags.val_images or s.VAL_IMAGES)
    images = DeviceImages(ev.split("val"), artist.device)
    count = min(s.VAL_IMAGES, len(images))
    seconds = artist.seconds_per_call(count, ev.flags.batch_size) * count / ev.world.size
    say("loss", f"{count:,} held-out pictures: about {duration(seconds)}")
    sums = torch.zeros(2, s.TIME_STEPS, dtype=torch.float64)  # of the losses and of the pictures at each t
    with tqdm(total=count, unit=" pictures", disable=ev.world.hides_bars, dynamic_ncols=True) as bar:
        for batch in build_validation(s, images, ev.world, ev.flags.batch_size):
            loss = artist.diffusion.eps_losses(artist.network, *batch).cpu().double()
            sums.index_add_(1, batch.t.cpu(), torch.stack([loss, torch.ones_like(loss)]))
            bar.update(len(batch.t) * ev.world.size)
    loss_at, count_at = ev.world.sum(sums)
    if not ev.world.is_main:
        return {}
    rows = []
    with ev.writer() as writer:
        for k in range(LOSS_BINS):
            low, high = -(-k * s.TIME_STEPS // LOSS_BINS), -(-(k + 1) * s.TIME_STEPS // LOSS_BINS) - 1
            of_bin = int(count_at[low : high + 1].sum())
            if not of_bin:
                continue
            rows.append({"t_from": low, "t_to": high, "count": of_bin, "loss": loss_at[low : high + 1].sum().item() / of_bin})
            writer.add_scalar("loss/eps_by_t", rows[-1]["loss"], (low + high) // 2)
    return {"held_out": (loss_at.sum() / count_at.sum()).item(), "pictures": ev.held_out(count), "by_t": rows}


# --- the nearest training pictures ----------------------------------------------------------------------


def measure_nearest(ev: Evaluation) -> dict[str, Any]:
    """How far the first samples are from the training pictures, beside how far held-out ones are, and a sheet to look at."""
    artist, flags = ev.artist, ev.flags
    assert artist
    train, val = ev.pictures("train", ""), ev.pictures("val", "")
    samples = ev.pictures(flags.samples, "--samples") if flags.samples else None
    if samples and samples.size != train.size:
        raise UserError(f"The pictures are {samples.size} and the training pictures {train.size}; distances need one size.")
    samples = PictureSet("the samples", samples.pixels[: flags.nearest] if samples else ev.draw(flags.nearest))
    fixed = torch.Generator().manual_seed(noise.VALIDATION)
    held_out = PictureSet("held-out pictures", val.pixels[torch.randperm(len(val), generator=fixed)[: len(samples)].numpy()])

    found: dict[str, Any] = {
        "samples": len(samples),
        "held_out": len(held_out),
        "drawing": None if flags.samples else ev.drawing(),
    }
    views = {"pixels": (None, train.pixels)}
    if flags.features or flags.fid:
        network = ev.features()
        views["features"] = (
            network,
            network.cached(train, flags.batch_size, ev.device, ev.cache / "fidelity")[network.layers["fid"]].numpy(),
        )
        found["network"] = network.name
    for view, (network, pool) in views.items():

        def represent(pictures: PictureSet, mirror: bool) -> Tensor:
            pixels = np.ascontiguousarray(pictures.pixels[..., ::-1] if mirror else pictures.pixels)
            if network is None:  # noqa: B023 (used at once)
                return torch.tensor(pixels)
            return network.extract(PictureSet(pictures.name, pixels), flags.batch_size, ev.device)[network.layers["fid"]]  # noqa: B023

        say("nearest", f"{len(samples)} samples and {len(held_out)} held-out pictures among {len(pool):,}, by {view}")
        hits, ordinary = (
            nearest_mirrored(
                represent(pictures, False),
                represent(pictures, True) if artist.settings.HORIZONTAL_FLIP else None,
                pool,
                SHEET_NEIGHBOURS,
                ev.device,
            )
            for pictures in (samples, held_out)
        )
        unit = (pool.size / len(pool)) ** 0.5 if view == "pixels" else 1.0  # root mean square, in grey levels
        distances, usual = hits.distances[:, 0] / unit, ordinary.distances[:, 0] / unit
        sheet = ev.out.with_name(f"{ev.out.stem}-nearest-{view}.png")
        if not ev.world.is_main:
            continue
        save_png(nearest_sheet(samples, train, hits, unit), sheet)
        found[view] = {
            "mean_distance": distances.mean().item(),
            "smallest_distance": distances.min().item(),
            "mean_distance_of_held_out": usual.mean().item(),
            "smallest_distance_of_held_out": usual.min().item(),
            "ratio": (distances.mean() / usual.mean()).item(),
            "nearest_rows": hits.rows[:, 0].tolist(),
            "sheet": str(sheet),
        }
    return found


def nearest_sheet(samples: PictureSet, train: PictureSet, hits: Any, unit: float) -> Tensor:
    """A row for each sample: itself, then its nearest training pictures, mirrored where that is nearer, with distances."""
    pictures, names = [], []
    for i, (distances, rows, mirrored) in enumerate(zip(*(x[:SHEET_ROWS] for x in hits))):
        pictures.append(samples.pixels[i])
        names.append(f"sample {i}")
        for distance, row, mirror in zip(distances.tolist(), rows.tolist(), mirrored.tolist()):
            pictures.append(train.pixels[row][..., ::-1] if mirror else train.pixels[row])
            names.append(f"{distance / unit:.3g}" + " mirrored" * mirror)
    return labelled_sheet(torch.from_numpy(np.stack(pictures)), names, columns=1 + hits.rows.shape[1])


# --- the script -----------------------------------------------------------------------------------------


def evaluate(flags: Namespace, world: World) -> None:
    ev = Evaluation(flags, world)
    for name, value in ev.report["protocol"].items():
        say(name, value)
    start = time.perf_counter()
    for section, is_asked, measure in [
        ("loss", flags.loss, measure_loss),
        ("bound", flags.nll, measure_bound),
        ("distribution", flags.fid, measure_distribution),
        ("nearest", flags.nearest, measure_nearest),
    ]:
        if is_asked:
            ev.report[section] = measure(ev)
            if not world.is_main:
                continue
            with atomic_file(ev.out) as file:  # after each: an interrupted call keeps what is done
                file.write((json.dumps(ev.report, indent=2) + "\n").encode())
            show(section, ev.report[section])
    print(f"Done in {duration(time.perf_counter() - start)}: {ev.out.resolve()}")


def main(argv: Sequence[str] | None = None) -> int:
    def body(stop: StopRequest) -> None:
        flags = read_flags(sys.argv[1:] if argv is None else argv)
        with World.join() as world, writing(Path(flags.output_dir), "--output_dir"):
            evaluate(flags, world)

    out_of_memory = "Out of memory. Use a smaller --batch_size; it changes no figure."
    return run_script("evaluate.py", body, lambda: out_of_memory, "Stopped at once. Figures printed so far are in the JSON.")


if __name__ == "__main__":
    sys.exit(main())
