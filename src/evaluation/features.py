"""The networks whose features FID and its relatives compare, and the features of a set of pictures.

The networks are torch-fidelity's, and one of our own that needs no weights. A figure means something only beside
others from the same network; with published ones only Inception with the published weights compares.
"""

import contextlib
import hashlib
import io
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_clip import MODEL_METADATA, MODEL_URLS
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.version import __version__ as torch_fidelity_version
from torchvision.models import VGG16_Weights
from tqdm import tqdm

from src import noise
from src.data.download import fetch, plain_reason
from src.evaluation.picture_set import PictureSet
from src.runtime.device import synchronize
from src.runtime.distributed import World
from src.utils import FlagError, UserError, atomic_file

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # of the published weights
INCEPTION_BYTES = 95628359
STATISTICS = ("isc", "fid", "kid", "prc")  # torch-fidelity's names of the four
INSTEAD = "--features random needs none, but its figures compare only with each other"


class RandomConv(FeatureExtractorBase):
    """Three convolutions with random weights, always the same ones, and the mean and deviation of each channel over the
    picture. It sees colour, texture and noise but no objects: enough to rank and to test, at no download.

    Features: "pooled" [N, 224], "logits" [N, 10], a random projection of them.
    """

    def __init__(self, name: str, features_list: list[str], **_: object):
        super().__init__(name, features_list)
        kernels = [self.weights(i, shape) for i, shape in enumerate([(16, 3, 5, 5), (32, 16, 3, 3), (64, 32, 3, 3)])]
        kernels[0][8:] -= kernels[0][8:].mean((2, 3), keepdim=True)  # half of them blind to flat colour: edges, noise, blur
        self.kernels = nn.ParameterList(nn.Parameter(kernel, requires_grad=False) for kernel in kernels)
        self.head = nn.Parameter(self.weights(3, (10, 224)), requires_grad=False)

    @staticmethod
    def weights(number: int, shape: tuple[int, ...]) -> Tensor:
        key = noise.key(0, noise.WEIGHTS, torch.tensor([number]))
        return noise.normal(key, shape)[0] * (2 / torch.Size(shape[1:]).numel()) ** 0.5

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x, pooled = x.float() / 127.5 - 1, []
        for kernel in self.kernels:
            x = F.relu(F.conv2d(x, kernel, stride=2, padding=kernel.shape[-1] // 2))
            pooled += [x.mean((2, 3)), x.flatten(2).std(2)]
        features = {"pooled": 4 * torch.cat(pooled, 1)}
        features["logits"] = features["pooled"] @ self.head.T
        return tuple(features[layer] for layer in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "pooled", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "pooled"


class FeatureNetwork:
    """A network, and which of its layers each statistic reads.

    name: for people.   key: for file names; says the weights too.   comparable: whether its FID is what papers report.
    """

    def __init__(
        self, module: FeatureExtractorBase, layers: dict[str, str], name: str, key: str, comparable: bool, world: World
    ):
        self.module, self.layers, self.name, self.key, self.comparable = module, layers, name, key, comparable
        self.world = world

    def extract(self, pictures: PictureSet, batch_size: int, device: torch.device) -> dict[str, Tensor]:
        """{layer: [N, D] float32 on the CPU}, with a progress bar. Several processes share the work."""
        found: dict[str, Tensor] = {}
        title, world = f"features of {pictures.name}", self.world
        with tqdm(total=len(pictures), desc=title, unit=" pictures", disable=world.hides_bars) as bar:
            starts = range(0, len(pictures), batch_size)
            mine = world.shard(starts)
            for start in starts:
                if start == 0 or start in mine:  # the first shows every process the shapes
                    batch = torch.from_numpy(np.array(pictures.pixels[start : start + batch_size])).to(device)
                    with torch.no_grad():
                        outputs = self.module(batch)
                    for layer, output in zip(self.module.features_list, outputs):
                        if layer not in found:
                            found[layer] = torch.zeros(len(pictures), output.shape[1])
                        if start in mine:
                            found[layer][start : start + batch_size] = output
                bar.update(min(batch_size, len(pictures) - start))
        return {layer: world.sum(rows) for layer, rows in found.items()}

    def seconds(self, pictures: PictureSet, batch_size: int, device: torch.device) -> float:
        """How long one picture takes, from one batch; the first call, which allocates and picks kernels, does not count."""
        batch = torch.from_numpy(np.array(pictures.pixels[: batch_size if device.type == "cuda" else min(batch_size, 8)])).to(
            device
        )
        with torch.no_grad():
            for _ in range(2):
                synchronize(device)
                start = time.perf_counter()
                self.module(batch)
                synchronize(device)
        return (time.perf_counter() - start) / len(batch)

    def cached(self, pictures: PictureSet, batch_size: int, device: torch.device, folder: Path) -> dict[str, Tensor]:
        """As `extract`, read from `folder` where these pictures went through this network before."""
        files = {layer: self.cache_file(pictures, layer, folder) for layer in self.module.features_list}
        features, is_missing = {}, True
        with contextlib.suppress(OSError, ValueError, EOFError):  # not there, or damaged: made again
            features = {layer: torch.from_numpy(np.load(file, allow_pickle=False)) for layer, file in files.items()}
            is_missing = any(len(part) != len(pictures) for part in features.values())
        if any(self.world.max(is_missing)):
            features = self.extract(pictures, batch_size, device)
            for layer, file in files.items():
                with atomic_file(file) as out:
                    np.save(out, features[layer].numpy())
        return features

    def is_cached(self, pictures: PictureSet, folder: Path) -> bool:
        return all(self.cache_file(pictures, layer, folder).exists() for layer in self.module.features_list)

    def cache_file(self, pictures: PictureSet, layer: str, folder: Path) -> Path:
        """The pixels' fingerprint names the file: other pictures, another file."""
        return folder / f"{pictures.fingerprint}-{self.key}-{layer}.npy"


def names() -> list[str]:
    return ["inception", "random", *(name for name in FEATURE_EXTRACTORS_REGISTRY if name != "inception-v3-compat")]


def load_features(name: str, device: torch.device, world: World = World()) -> FeatureNetwork:  # noqa: B008 (immutable)
    """The network that --features names: inception, random, another of torch-fidelity's, or a file of Inception weights.
    Downloads the weights where they are not there yet. Raises UserError, saying what to fetch and where to put it."""
    weights, digest, path = {}, "", Path(name)
    if name == "inception" or (name not in names() and path.is_file()):
        path = published_inception() if name == "inception" else path
        digest = check_inception(path)
        weights = {"feature_extractor_weights_path": str(path)}
        kind = FeatureExtractorInceptionV3
        label = "Inception v3, published weights" if digest == INCEPTION_SHA256 else f"Inception v3, weights of {path}"
    elif name in names():
        kind = RandomConv if name == "random" else FEATURE_EXTRACTORS_REGISTRY[name]
        label = "three random convolutions" if name == "random" else name
    else:
        raise FlagError(
            f"--features: got {name}, which is no file of Inception weights and no network; allowed are {', '.join(names())}."
        )
    layers = {statistic: kind.get_default_feature_layer_for_metric(statistic) for statistic in STATISTICS}
    if not layers["isc"].startswith("logits"):
        del layers["isc"]  # the Inception Score needs the probabilities of classes
    with weights_advice(name):
        module = kind("inception-v3-compat" if digest else name, list(dict.fromkeys(layers.values())), **weights)
    is_inception = digest == INCEPTION_SHA256
    key = f"{'inception' if digest else name}{digest and '-' + digest[:8]}-tf{torch_fidelity_version}"
    return FeatureNetwork(module.to(device).eval().requires_grad_(False), layers, label, key, is_inception, world)


def published_inception() -> Path:
    """Where the published weights lie: in the folder where torch-fidelity itself looks. Downloaded if they are not there."""
    path = hub_folder() / URL_INCEPTION_V3.rpartition("/")[2]
    if not path.exists():
        print(f"{path} is not there: downloading {URL_INCEPTION_V3}")
        try:
            fetch(URL_INCEPTION_V3, path, INCEPTION_BYTES, attempts=2)
        except UserError as error:
            cause = plain_reason(error.__cause__) if isinstance(error.__cause__, Exception) else reason(error)
            raise UserError(
                f"The Inception weights cannot be downloaded ({cause}). Fetch {URL_INCEPTION_V3} "
                f"with another machine or mirror and put it at {path}, or name it with --features PATH; {INSTEAD}."
            ) from None
    return path


def check_inception(path: Path) -> str:
    """The sha256 of a file of Inception weights; raises UserError where it is none.

    torch-fidelity unpickles whatever it is given. Here the file must open with weights_only first, so that nothing in it runs.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        names = set(state) if isinstance(state, dict) else set()
    except Exception as error:  # as many kinds as there are ways to damage a file; none is ours
        raise UserError(f"--features: {path} cannot be opened as weights ({reason(error)}). {fetch_advice()}") from None
    if "fc.weight" not in names or "Mixed_7c.branch1x1.conv.weight" not in names:
        raise UserError(f"--features: {path} holds no Inception weights of torch-fidelity. {fetch_advice()}")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch_advice() -> str:
    return f"Fetch {URL_INCEPTION_V3} and name that file; {INSTEAD}."


@contextlib.contextmanager
def weights_advice(name: str) -> Iterator[None]:
    """Say which file to fetch where torch-fidelity cannot have or read a network's weights, and never wait for ever."""
    url, file = "", ""
    if name.startswith("clip"):
        url, file = MODEL_URLS[name], f"{name}-{MODEL_METADATA[name]['hash']}.pt"
    elif name == "vgg16":
        url = VGG16_Weights.IMAGENET1K_V1.url
        file = url.rpartition("/")[2]
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # torch.hub's own bars and notes
            yield
    except (OSError, RuntimeError, ValueError, KeyError, NotImplementedError) as error:
        if url:
            advice = f"Fetch {url} and put it at {hub_folder() / file}"
        elif name.startswith("dinov2"):
            advice = (
                "torch.hub fetches its code and weights from github.com/facebookresearch/dinov2, so it needs a network once"
            )
        else:
            advice = fetch_advice().partition(";")[0]
        raise UserError(f"--features: the weights of {name} cannot be used ({reason(error)}). {advice}; {INSTEAD}.") from None
    finally:
        socket.setdefaulttimeout(before)


def hub_folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def reason(error: BaseException) -> str:
    """The first line of what an error says, without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120].rstrip(".")
