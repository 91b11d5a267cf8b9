"""FID and its relatives: torch-fidelity's figures, features that are kept, and weights that cannot run code."""

import shutil

import numpy as np
import pytest
import torch
import torch_fidelity
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

import evaluate
from src.evaluation import distribution
from src.evaluation.distribution import INCEPTION_SHA256, NAMES, FeatureNetwork, RandomConv, some, warnings, weights_advice
from src.evaluation.picture_set import PictureSet
from src.utils import UserError
from tests.evaluation.conftest import CPU, random_pictures, write_folder
from tests.runs import Code


def test_two_folders_give_what_torch_fidelity_gives_when_called_directly(tiny, tmp_path):
    a, b = (write_folder(tmp_path / name, random_pictures(60 + seed, seed)) for name, seed in (("a", 1), ("b", 2)))
    words = ["--samples", a, "--reference", b, "--kid_subset_size", "40", "--batch_size", "32", "--cache_path", tmp_path]
    found = tiny.call(*words).distribution
    if "random" not in torch_fidelity.registry.FEATURE_EXTRACTORS_REGISTRY:
        torch_fidelity.register_feature_extractor("random", RandomConv)
    direct = torch_fidelity.calculate_metrics(
        input1=str(a), input2=str(b), cuda=False, fid=True, kid=True, isc=True, prc=True, feature_extractor="random",
        kid_subset_size=40, save_cpu_ram=True, cache=False, verbose=False, batch_size=32,
    )  # fmt: skip
    torch_fidelity.registry.FEATURE_EXTRACTORS_REGISTRY.pop("random")
    for ours, theirs in NAMES.items():
        assert found["figures"][ours] == pytest.approx(direct[theirs], rel=1e-6, abs=1e-9), ours
    assert "features pooled" in found["precision_recall"] and not found["comparable_with_published_inception_fid"]


def test_the_networks_that_the_flag_allows_are_those_of_torch_fidelity():
    assert {*evaluate.NETWORKS} == {"inception", "random", *distribution.NETWORKS} - {"inception-v3-compat"}


@pytest.mark.parametrize(
    "samples, reference, count, words",
    [(224, 10_000, 1, "224 samples in 224 dim"), (50, 60, 2, "full rank"), (225, 300, 1, "biased"), (10_000, 225, 0, "")],
)
def test_warnings_say_when_fid_is_worth_little(samples, reference, count, words):
    found = warnings(samples, reference, dimensions=224)
    assert len(found) == count and all(words in warning for warning in found)


def test_precision_and_recall_take_the_same_10000_pictures_each_time():
    rows = torch.arange(10_500)[:, None]
    assert len(some(rows).unique()) == 10_000 and torch.equal(some(rows), some(rows))
    assert torch.equal(some(rows[:10_000]).sort(0).values, rows[:10_000])


def test_the_random_network_has_finite_features_of_the_smallest_pictures():
    features = FeatureNetwork("random", CPU).features(PictureSet("", random_pictures(3, 0, size=8)), 2)
    assert all(values.isfinite().all() for values in features.values())


# --- features that are kept -----------------------------------------------------------------------------


def test_features_are_computed_once_for_the_same_pictures_and_again_if_the_file_is_damaged(tmp_path):
    pixels, network = random_pictures(20, 3), FeatureNetwork("random", CPU)
    first = network.features(PictureSet("a", pixels), 8, tmp_path)
    shapes = {name: tuple(x.shape) for name, x in first.items()}
    assert shapes == {"logits": (20, 10), "pooled": (20, 224), "mu": (224,), "sigma": (224, 224)}
    (file,) = tmp_path.iterdir()
    network.module.forward = None  # what is kept is not computed
    again = network.features(PictureSet("other spelling", pixels), 8, tmp_path)
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    del network.module.forward
    whole = file.read_bytes()
    np.savez(tmp_path / "pickle.npz", pooled=np.array([{}], dtype=object))
    for damaged in (b"damaged", whole[:-100], (tmp_path / "pickle.npz").read_bytes()):
        file.write_bytes(damaged)
        assert torch.equal(network.features(PictureSet("a", pixels), 8, tmp_path)["logits"], first["logits"])
        assert len(file.read_bytes()) == len(whole), "made again"
    network.features(PictureSet("b", random_pictures(20, 4)), 8, tmp_path)
    assert len([*tmp_path.glob("*tf*.npz")]) == 2


def test_a_cache_that_cannot_be_written_costs_a_warning_and_no_figure(tiny, tmp_path, capsys):
    words = ["--samples", tiny.root / "data", "--reference", write_folder(tmp_path / "b", random_pictures(20, 2))]
    (tmp_path / "cache").write_text("a file where a folder is needed")
    found = tiny.call(*words, "--cache_path", tmp_path / "cache").distribution
    out = capsys.readouterr().out
    assert f"Cannot write to {tmp_path / 'cache' / 'fidelity'}" in out and "--cache_path" in out
    assert found["figures"] == tiny.call(*words, "--cache_path", tmp_path / "good").distribution["figures"]


# --- weights --------------------------------------------------------------------------------------------


def test_a_file_of_weights_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Code()}, tmp_path / "own.pth")
    with pytest.raises(UserError, match=r"own\.pth cannot be used \(it is no file of tensors alone\)"):
        FeatureNetwork(str(tmp_path / "own.pth"), CPU)
    assert not (tmp_path / "made").exists()


def test_inception_weights_are_looked_for_where_torch_fidelity_looks_and_told_apart_by_their_sha256(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    monkeypatch.setattr("torch.nn.Conv2d.reset_parameters", lambda self: None)  # which takes seconds
    place = tmp_path / "hub" / "checkpoints" / distribution.URL_INCEPTION_V3.rpartition("/")[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distribution, "URL_INCEPTION_V3", f"http://127.0.0.1:9/{place.name}")  # nobody listens there
        with pytest.raises(UserError, match=f"refused.*Fetch http://127.0.0.1:9/.*put it at {place}.*--features random"):
            FeatureNetwork("inception", CPU)
    torch.save({"fc.weight": torch.zeros(3)}, place)
    network = FeatureNetwork("inception", CPU)
    assert network.layers == {"isc": "logits_unbiased", "fid": "2048", "kid": "2048", "prc": "2048"}
    assert not network.is_published and network.name == f"Inception v3, weights of {place}"
    assert INCEPTION_SHA256[:8] not in network.key
    shutil.copy(place, tmp_path / "own.pth")
    assert FeatureNetwork(str(tmp_path / "own.pth"), CPU).key == network.key


def test_a_file_of_other_weights_and_a_network_that_cannot_be_fetched_are_one_sentence(tmp_path):
    torch.save({"some.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth cannot be used \(Error.* loading state_dict.*Fetch https:.*--features"):
        FeatureNetwork(str(tmp_path / "other.pth"), CPU)
    says = r"vgg16 cannot be used \(no route\)\. If torch\.hub names a file above.*--features random"
    with pytest.raises(UserError, match=says), weights_advice("vgg16", tmp_path):
        raise OSError("no route")
