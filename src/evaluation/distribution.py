"""FID, KID, Inception Score, precision and recall: torch-fidelity's arithmetic on features that are already there."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torch_fidelity.version import __version__ as torch_fidelity_version

from src.evaluation.features import FeatureNetwork
from src.evaluation.picture_set import PictureSet
from src.utils import UserError, atomic_file

LIBRARY = f"torch-fidelity {torch_fidelity_version}"
KID_SUBSETS = 100
NEIGHBOURHOOD = 3  # of precision and recall: the ball around a picture reaches to its third neighbour (arXiv:1904.06991)
PRC_PICTURES = 10_000  # of each side at most, as the pairs grow with the square; more are drawn by lot, always the same
ISC_SPLITS = 10
SEED = 2020  # of the subsets and splits, torch-fidelity's own


def check_counts(samples: int, reference: int, kid_subset_size: int) -> None:
    """Raises UserError where a statistic cannot be had from so few pictures."""
    fewest = min(samples, reference)
    if fewest < kid_subset_size:
        raise UserError(
            f"KID compares subsets of {kid_subset_size:,} pictures, but there are {samples:,} samples and {reference:,} "
            f"reference pictures. Use more, e.g. with --num_samples, or a smaller --kid_subset_size."
        )
    if fewest < ISC_SPLITS:
        raise UserError(
            f"There are {samples:,} samples and {reference:,} reference pictures; precision, recall and the Inception Score "
            f"need at least {ISC_SPLITS} of each, and FID thousands."
        )


def warnings(samples: int, reference: int, dimensions: int) -> list[str]:
    """What makes the figures worth less than they look."""
    found = []
    for name, count in (("samples", samples), ("reference pictures", reference)):
        if count <= dimensions:
            found.append(
                f"FID from {count:,} {name} in {dimensions:,} dimensions: a covariance of less than full rank, "
                f"the figure is far too large and compares with nothing"
            )
    if not found and samples < 10_000:
        found.append(
            f"FID from {samples:,} samples is biased upwards; compare only at equal numbers, and report 10,000 to 50,000"
        )
    return found


def figures(
    samples: dict[str, Tensor], reference: dict[str, Tensor], statistics: dict, layers: dict[str, str], kid_subset_size: int
) -> dict[str, float]:
    """All figures by name. samples, reference: {layer: [N, D]}.   statistics: of the reference, as `fid_statistics`."""
    fid, kid, prc = layers["fid"], layers["kid"], layers["prc"]
    values = fid_statistics_to_metric(fid_features_to_statistics(samples[fid]), statistics, verbose=False)
    values |= kid_features_to_metric(
        samples[kid], reference[kid], kid_subsets=KID_SUBSETS, kid_subset_size=kid_subset_size, rng_seed=SEED, verbose=False
    )
    values |= prc_features_to_metric(
        some(samples[prc]),
        some(reference[prc]),
        prc_neighborhood=NEIGHBOURHOOD,
        prc_batch_size=2500,
        save_cpu_ram=True,
        verbose=False,
    )
    if "isc" in layers:
        values |= isc_features_to_metric(samples[layers["isc"]], ISC_SPLITS, rng_seed=SEED)
    names = {
        "fid": "frechet_inception_distance",
        "kid": "kernel_inception_distance_mean",
        "kid_std": "kernel_inception_distance_std",
        "inception_score": "inception_score_mean",
        "inception_score_std": "inception_score_std",
        "precision": "precision",
        "recall": "recall",
    }
    return {name: values[theirs] for name, theirs in names.items() if theirs in values}


def some(features: Tensor) -> Tensor:
    """PRC_PICTURES of the rows at random, always the same ones; all of them where there are no more."""
    if len(features) <= PRC_PICTURES:
        return features
    return features[torch.randperm(len(features), generator=torch.Generator().manual_seed(SEED))[:PRC_PICTURES]]


def fid_statistics(
    network: FeatureNetwork, pictures: PictureSet, features: dict[str, Tensor], folder: Path
) -> dict[str, np.ndarray]:
    """Mean and covariance of a set's features, kept in `folder`: of 100,000 pictures in 2,048 dimensions they take a while."""
    file = network.cache_file(pictures, f"{network.layers['fid']}-statistics", folder).with_suffix(".npz")
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in ("mu", "sigma")}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        statistics = fid_features_to_statistics(features[network.layers["fid"]])
        with atomic_file(file) as out:
            np.savez(out, **statistics)
        return statistics
