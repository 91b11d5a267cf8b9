"""FID, KID, Inception Score, precision and recall: the networks and the arithmetic of torch-fidelity.

A figure means something only beside others from the same network. Only FID from Inception with the published weights compares
with published ones. Importing this module takes seconds, because torch-fidelity does.

Features are kept here, not by torch-fidelity: its cache unpickles what it finds, and if it cannot write the figures are lost.
"""

import contextlib
import hashlib
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY as NETWORKS
from torch_fidelity.version import __version__ as version

from src import noise
from src.evaluation.picture_set import PictureSet
from src.evaluation.report import Evaluation, optional, say
from src.progress import Bar
from src.utils import UserError, atomic_file, count, make_folders, reason, stand_in

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # of the published weights
KID_SUBSETS = 100
NEIGHBOURHOOD = 3  # of precision and recall: the ball around a picture reaches to its third neighbour (arXiv:1904.06991)
PRC_PICTURES = 10_000  # of each side at most, because the pairs grow with the square
Features = dict[str, Tensor]  # see FeatureNetwork.features
SEED = 2020  # of the subsets and splits, torch-fidelity's own
NAMES = {  # ours -> torch-fidelity's
    "fid": "frechet_inception_distance",
    "kid": "kernel_inception_distance_mean", "kid_std": "kernel_inception_distance_std",
    "inception_score": "inception_score_mean", "inception_score_std": "inception_score_std",
    "precision": "precision", "recall": "recall",
}  # fmt: skip


def measure_distribution(ev: Evaluation) -> dict[str, Any]:
    """How near the distribution of the pictures is to the reference's. All processes draw, the main one does the rest."""
    flags, network = ev.flags, ev.network
    reference, samples = ev.pictures(flags.reference), ev.samples(None if flags.samples else flags.num_samples)
    if not ev.world.is_main:
        return {}
    if flags.npz:
        with optional(ev.out, "--output_dir"), atomic_file(ev.out.with_suffix(".npz")) as file:
            np.savez(file, arr_0=samples.pixels.transpose(0, 2, 3, 1))
    if not network.is_published:
        say("note", f"features of {network.name}: the figures compare with each other, not with published FID")
    drawn = network.features(samples, flags.batch_size)
    real = network.features(reference, flags.batch_size, ev.cache / "fidelity")
    found = warnings(len(samples), len(reference), len(real["mu"]))
    for warning in found:
        say("warning", warning)
    return {
        "figures": figures(drawn, real, network.layers, flags.kid_subset_size),
        "library": f"torch-fidelity {version}",
        "network": network.name,
        "comparable_with_published_inception_fid": network.is_published and not found,
        "samples": samples.about() | ev.drawing(),
        "reference": reference.about(),
        "kid": f"{KID_SUBSETS} subsets of {flags.kid_subset_size}",
        "precision_recall": f"neighbourhood {NEIGHBOURHOOD}, at most {PRC_PICTURES} a side, features {network.layers['prc']}",
        "warnings": found,
    }


class RandomConv(FeatureExtractorBase):
    """Three convolutions with random weights, always the same ones, and the mean and deviation of each channel over the
    picture. It sees colour, texture and noise but no objects: enough to rank and to test, at no download.

    Features: "pooled" [N, 224], "logits" [N, 10], a random projection of them.
    """

    def __init__(self, name: str, features_list: list[str], **_: object):
        super().__init__(name, features_list)
        shapes = [(16, 3, 5, 5), (32, 16, 3, 3), (64, 32, 3, 3), (10, 224)]
        keys = [noise.key(0, noise.WEIGHTS, torch.tensor([i])) for i in range(len(shapes))]
        weights = [noise.normal(k, s)[0] * (2 / torch.Size(s[1:]).numel()) ** 0.5 for k, s in zip(keys, shapes)]
        weights[0][8:] -= weights[0][8:].mean((2, 3), keepdim=True)  # half of them blind to flat colour: edges, noise, blur
        self.weights = nn.ParameterList(nn.Parameter(weight, requires_grad=False) for weight in weights)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        *kernels, head = self.weights
        x, pooled = x.float() / 127.5 - 1, []
        for kernel in kernels:
            x = F.relu(F.conv2d(x, kernel, stride=2, padding=kernel.shape[-1] // 2))
            spread = x.flatten(2).std(2, correction=min(1, x[0, 0].numel() - 1))  # 0 where one pixel is left of the picture
            pooled += [x.mean((2, 3)), spread]
        features = {"pooled": 4 * torch.cat(pooled, 1)}
        features["logits"] = features["pooled"] @ head.T
        return tuple(features[layer] for layer in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "pooled", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "pooled"


class FeatureNetwork:
    """The network that --features names: inception, a file of Inception weights, random, or another of torch-fidelity's.

    layers: {"isc", "fid", "kid", "prc": the layer that the figure reads}.   name: for people.   is_published: whether its
    FID is what papers report. Downloads weights that are not there. Raises UserError that says what to fetch.
    """

    def __init__(self, name: str, device: torch.device):
        path, digest, options = Path(name), "", {}
        if name == "inception":  # where torch-fidelity itself looks
            path = Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.rpartition("/")[2])
        with weights_advice(name, path):
            if name == "inception" and not path.exists():
                print(f"{path} is not there: downloading {URL_INCEPTION_V3}")
                make_folders(path.parent)
                torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), INCEPTION_SHA256)
            if name not in {"random", *NETWORKS}:
                torch.load(path, "cpu", weights_only=True)  # torch-fidelity unpickles it: see first that no code runs
                digest, options = hashlib.sha256(path.read_bytes()).hexdigest(), {"feature_extractor_weights_path": str(path)}
            full_name = "inception-v3-compat" if digest else name
            kind = RandomConv if name == "random" else NETWORKS[full_name]
            self.layers = {figure: kind.get_default_feature_layer_for_metric(figure) for figure in ("isc", "fid", "kid", "prc")}
            if not self.layers["isc"].startswith("logits"):
                del self.layers["isc"]  # the Inception Score needs the probabilities of classes
            module = kind(full_name, list(dict.fromkeys(self.layers.values())), **options)
        self.module, self.device = module.to(device).eval().requires_grad_(False), device
        self.is_published = digest == INCEPTION_SHA256
        of_inception = "Inception v3, " + ("published weights" if self.is_published else f"weights of {path}")
        self.name = of_inception if digest else "three random convolutions" if name == "random" else name
        self.key = "-".join(filter(None, [full_name, digest[:8], f"tf{version}"]))  # for file names

    @torch.no_grad()
    def features(self, pictures: PictureSet, batch_size: int, folder: Path | None = None) -> Features:
        """{layer: [N, D] float32, "mu": their mean in the layer of FID, "sigma": their covariance}, on the CPU. folder: where
        they are kept, under the fingerprint of the pictures."""
        file = folder / f"{pictures.fingerprint}-{self.key}.npz" if folder else None
        if file:
            with contextlib.suppress(Exception), np.load(file, allow_pickle=False) as kept:  # none yet, or damaged: go on
                return {name: torch.from_numpy(kept[name]) for name in (*self.module.features_list, "mu", "sigma")}
        parts = []
        with Bar(total=len(pictures), desc=f"features of {pictures.name}", unit=" picture") as bar:
            for start in range(0, len(pictures), batch_size):
                batch = torch.from_numpy(np.array(pictures.pixels[start : start + batch_size])).expand(-1, 3, -1, -1)
                parts.append([output.cpu() for output in self.module(batch.to(self.device))])
                bar.update(len(batch))
        found = dict(zip(self.module.features_list, map(torch.cat, zip(*parts))))
        found |= {name: torch.from_numpy(x) for name, x in fid_features_to_statistics(found[self.layers["fid"]]).items()}
        if file:
            with optional(file, "--cache_path"), atomic_file(file) as out:
                np.savez(out, **{name: x.numpy() for name, x in found.items()})
        return found


def figures(samples: Features, reference: Features, layers: dict[str, str], kid_subset_size: int) -> dict[str, float]:
    """All figures by name. samples, reference: as FeatureNetwork.features gives them."""
    kid, prc = layers["kid"], layers["prc"]
    statistics = [{name: features[name].numpy() for name in ("mu", "sigma")} for features in (samples, reference)]
    values = fid_statistics_to_metric(*statistics, verbose=False)
    sizes = dict(kid_subsets=KID_SUBSETS, kid_subset_size=kid_subset_size)
    values |= kid_features_to_metric(samples[kid], reference[kid], **sizes, rng_seed=SEED, verbose=False)
    sizes = dict(prc_neighborhood=NEIGHBOURHOOD, prc_batch_size=2500, save_cpu_ram=True)
    values |= prc_features_to_metric(some(samples[prc]), some(reference[prc]), **sizes, verbose=False)
    if "isc" in layers:
        values |= isc_features_to_metric(samples[layers["isc"]], splits=10, rng_seed=SEED)
    return {name: values[theirs] for name, theirs in NAMES.items() if theirs in values}


def some(features: Tensor) -> Tensor:
    """PRC_PICTURES of the rows, or all if there are fewer, in a random order that is always the same."""
    return features[torch.randperm(len(features), generator=torch.Generator().manual_seed(SEED))[:PRC_PICTURES]]


def warnings(samples: int, reference: int, dimensions: int) -> list[str]:
    """What makes the figures worth less than they look."""
    found = [
        f"FID from {count(number, name)} in {count(dimensions, 'dimension')}: a covariance of less than full rank, "
        f"the figure is far too large and compares with nothing"
        for name, number in (("sample", samples), ("reference picture", reference))
        if number <= dimensions
    ]
    if not found and samples < 10_000:
        biased = f"FID from {count(samples, 'sample')} is biased upwards"
        found = [f"{biased}; compare only at equal numbers, and report 10,000 to 50,000"]
    return found


@contextlib.contextmanager
def weights_advice(name: str, path: Path) -> Iterator[None]:
    """Say what to fetch and where to put it if weights cannot be downloaded or read. Never wait for ever."""
    before = socket.getdefaulttimeout(), torch.hub.tqdm
    socket.setdefaulttimeout(30)
    torch.hub.tqdm = Bar  # its own would fill a log
    try:
        yield
    except Exception as error:  # as many kinds as there are ways to damage a file or to lose a network
        why = reason(error)[:120].rstrip(".:")
        if isinstance(error, pickle.UnpicklingError):
            why = stand_in(path) or "it is no file of tensors alone"
        put = f"put it at {path}, or name it with" if name == "inception" else "name it with"
        fetch = f"Fetch {URL_INCEPTION_V3} with another machine and {put} --features."
        if name in NETWORKS:
            fetch = "If torch.hub names a file above, fetch it with another machine and put it there; else it needs a network."
        other = "--features random needs none, but its figures compare only with each other."
        raise UserError(f"--features: the weights of {name} cannot be used ({why}). {fetch} {other}") from None
    finally:
        socket.setdefaulttimeout(before[0])
        torch.hub.tqdm = before[1]
