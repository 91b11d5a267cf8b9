"""evaluate.py: its figures against torch-fidelity called directly and against train.py, its protocol, and its refusals."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image

import config
import evaluate
import train
from src.dataset import DeviceImages
from src.ema import EMA
from src.evaluation.features import INCEPTION_SHA256, RandomConv, load_features
from src.evaluation.nearest import nearest, nearest_mirrored
from src.evaluation.picture_set import PictureSet
from src.runtime.build import build_diffusion, build_model, build_optimizer, open_images
from src.runtime.checkpoint import Checkpoints, Progress
from src.runtime.distributed import World
from src.runtime.monitor import Meter
from src.runtime.settings import resolve

CPU = torch.device("cpu")
PICTURES = 120  # 114 for training, 6 held out


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


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A checkpoint of a tiny network with random weights, its pictures, and a way to call evaluate.py on it."""
    root = tmp_path_factory.mktemp("evaluate")
    write_folder(root / "data", random_pictures(PICTURES, seed=0))
    network = "--image_size 16 --unet_dim 8 --dim_mults 1,2 --num_res_blocks 1 --attention_resolutions 0 --time_steps 30"
    paths = f"--data_path {root}/data --cache_path {root}/cache --log_path {root}/logs"
    settings = resolve(config, f"--dataset folder --num_workers 0 --batch_size 4 {network} {paths}".split()).settings
    model = build_model(settings, 1)
    with torch.no_grad():
        for i, weight in enumerate(model.parameters()):  # the head begins at 0: let it say something
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
    parts = {"model": model, "ema": EMA(model, 0.9).model, "optimizer": build_optimizer(settings, model)}
    parts |= {"scaler": torch.amp.GradScaler("cpu", enabled=False), "meter": Meter(30, CPU)}
    images = SimpleNamespace(classes=["data"], class_ids=["data"])
    Checkpoints(settings._replace(CHECKPOINT_PATH=str(root)), World(), images, Progress(7, 1), parts, None).save("tiny")

    def call(*words: str, fresh: str = "") -> dict:
        out = root / "reports" / (fresh or str(len(list(root.glob("reports/*")))))
        always = ["--checkpoint", str(root / "tiny.pth"), "--output_dir", str(out), "--device", "cpu", "--precision", "fp32"]
        assert evaluate.main([*always, *words]) == 0
        return json.loads(next(out.glob("*.json")).read_text())

    return SimpleNamespace(root=root, settings=settings, model=model, call=call)


# --- FID and its relatives ------------------------------------------------------------------------------


def test_two_folders_give_what_torch_fidelity_gives_when_called_directly(run, tmp_path):
    a, b = (write_folder(tmp_path / name, random_pictures(60 + seed, seed)) for name, seed in (("a", 1), ("b", 2)))
    words = [
        "--samples",
        str(a),
        "--reference",
        str(b),
        "--features",
        "random",
        "--kid_subset_size",
        "40",
        "--batch_size",
        "32",
    ]
    report = run.call(*words, "--cache_path", str(tmp_path / "cache"))
    if "random" not in torch_fidelity.registry.FEATURE_EXTRACTORS_REGISTRY:
        torch_fidelity.register_feature_extractor("random", RandomConv)
    direct = torch_fidelity.calculate_metrics(
        input1=str(a), input2=str(b), cuda=False, fid=True, kid=True, isc=True, prc=True, feature_extractor="random",
        kid_subset_size=40, save_cpu_ram=True, cache=False, verbose=False, batch_size=32,
    )  # fmt: skip
    figures = report["distribution"]["figures"]
    for ours, theirs in {
        "fid": "frechet_inception_distance",
        "kid": "kernel_inception_distance_mean",
        "kid_std": "kernel_inception_distance_std",
        "inception_score": "inception_score_mean",
        "inception_score_std": "inception_score_std",
        "precision": "precision",
        "recall": "recall",
    }.items():
        assert figures[ours] == pytest.approx(direct[theirs], rel=1e-5, abs=1e-7), ours
    assert not report["distribution"]["comparable_with_published_inception_fid"]


def test_pictures_drawn_into_the_metric_are_those_of_the_npz_and_of_any_batch_size(run):
    words = ["--num_samples", "12", "--steps", "3", "--features", "random", "--kid_subset_size", "10"]
    one = run.call(*words, "--npz", fresh="npz")
    other = run.call(*words, "--batch_size", "5")
    drawn = next((run.root / "reports" / "npz").glob("*.npz"))
    again = run.call("--samples", str(drawn), "--features", "random", "--kid_subset_size", "10")
    assert again["distribution"]["figures"] == one["distribution"]["figures"]
    assert again["distribution"]["samples"]["fingerprint"] == one["distribution"]["samples"]["fingerprint"]
    assert other["distribution"]["figures"]["fid"] == pytest.approx(one["distribution"]["figures"]["fid"], rel=1e-3)


def test_the_report_says_what_was_measured_and_how(run):
    report = run.call("--num_samples", "12", "--steps", "2", "--sampler", "ddim", "--eta", "0.5", "--features", "random",
                      "--kid_subset_size", "10")  # fmt: skip
    protocol, distribution = report["protocol"], report["distribution"]
    assert protocol["checkpoint"].endswith("tiny.pth") and protocol["step"] == 7 and protocol["weights"] == "ema"
    assert protocol["precision"] == "float32" and "CPU" in protocol["device"] and "--sampler ddim" in protocol["command"]
    assert distribution["library"] == f"torch-fidelity {torch_fidelity.__version__}"
    samples, reference = distribution["samples"], distribution["reference"]
    assert {name: samples[name] for name in ("sampler", "steps", "eta", "seed", "count")} == {
        "sampler": "ddim", "steps": 2, "eta": 0.5, "seed": 0, "count": 12,
    }  # fmt: skip
    assert reference["from"] == "folder train" and reference["count"] == 114 and len(reference["fingerprint"]) == 16
    assert any("full rank" in warning for warning in distribution["warnings"])


def test_the_references_features_are_kept_and_a_damaged_file_is_made_again(run, tmp_path):
    pictures, network = PictureSet("a", random_pictures(20, 3)), load_features("random", CPU)
    first = network.cached(pictures, 8, CPU, tmp_path)
    files = sorted(tmp_path.iterdir())
    assert [file.name.split("-")[0] for file in files] == [pictures.fingerprint] * 2
    network.module.forward = None  # what is kept is not computed
    assert torch.equal(network.cached(pictures, 8, CPU, tmp_path)["pooled"], first["pooled"])
    del network.module.forward
    files[0].write_bytes(b"damaged")
    assert torch.equal(network.cached(pictures, 3, CPU, tmp_path)["logits"], first["logits"])
    assert PictureSet("b", random_pictures(20, 4)).fingerprint != pictures.fingerprint


# --- bound and loss -------------------------------------------------------------------------------------


def test_exact_and_drawn_bounds_agree_and_terms_add_up(run):
    exact, drawn = (run.call("--nll", *words)["bound"] for words in (["--exact"], ["--nll_steps", "12"]))
    figures = exact["bits_per_dimension"]
    assert figures["total"] == pytest.approx(sum(figures[name] for name in ("prior", "steps", "decoder")), rel=1e-9)
    assert figures["total"] == pytest.approx(figures["prior"] + sum(row["sum"] for row in exact["by_t"]), rel=1e-9)
    assert [row["t_from"] for row in exact["by_t"]] == list(range(30)) and len(drawn["by_t"]) == 12
    assert abs(drawn["bits_per_dimension"]["total"] - figures["total"]) < 3 * drawn["bits_per_dimension"]["standard_error"]
    assert list((run.root / "logs" / "evaluate").glob("*/events*"))


def test_the_loss_is_the_one_that_train_logs(run):
    s, loss = run.settings, run.call("--loss")["loss"]
    images = DeviceImages(open_images(s, "val"), "cpu")
    logged = train.validate(s, World(), build_diffusion(s), run.model.eval(), images)
    assert loss["held_out"] == pytest.approx(logged, rel=1e-6)  # another memory layout
    bins = loss["by_t"]
    assert sum(row["loss"] * row["count"] for row in bins) / 6 == pytest.approx(loss["held_out"])


# --- neighbours -----------------------------------------------------------------------------------------


def test_the_nearest_are_those_of_all_pairs_compared():
    queries, pool = torch.from_numpy(random_pictures(5, 1)), random_pictures(300, 2)
    distances, rows = nearest(queries, pool, 4, CPU)
    pairs = torch.cdist(queries.double().flatten(1), torch.from_numpy(pool).double().flatten(1))
    expected = pairs.sort(dim=1)
    torch.testing.assert_close(distances, expected.values[:, :4])
    assert torch.equal(rows, expected.indices[:, :4])


def test_a_mirrored_copy_is_found_and_no_picture_is_named_twice():
    pool = random_pictures(50, 2)
    queries = torch.tensor(pool[[7, 9]])
    queries[1] = queries[1].flip(-1)
    found = nearest_mirrored(queries, queries.flip(-1), pool, 5, CPU)
    assert found.rows[:, 0].tolist() == [7, 9] and found.mirrored[:, 0].tolist() == [False, True]
    assert found.distances[:, 0].tolist() == [0, 0]
    assert all(len(set(rows)) == 5 for rows in found.rows.tolist())


def test_copies_of_training_pictures_have_distance_0_and_noise_is_far(run):
    copies = run.call("--nearest", "6", "--samples", "train", fresh="copies")["nearest"]["pixels"]
    assert copies["ratio"] == 0 and copies["mean_distance_of_held_out"] > 0
    assert Path(copies["sheet"]).exists()
    drawn = run.call("--nearest", "4", "--steps", "2", "--features", "random")["nearest"]
    assert drawn["pixels"]["ratio"] > 0.5 and drawn["features"]["ratio"] > 0.5


# --- refusals -------------------------------------------------------------------------------------------


def refusal(capsys, *words: str) -> str:
    """The one sentence on stderr."""
    capsys.readouterr()
    code = evaluate.main(words)
    lines = [line for line in capsys.readouterr().err.splitlines() if "it/s" not in line and "\r" not in line and line.strip()]
    assert len(lines) == 1 and lines[0].startswith("evaluate.py: "), lines
    return f"{code} {lines[0].removeprefix('evaluate.py: ')}"


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--exact", "2 --exact: belongs to --nll"),
        ("--nll --exact --nll_steps 5", "2 --exact, --nll_steps:"),
        ("--samples val --reference val", "2 --samples, --reference: both are val"),
        ("--npz --loss", "2 --npz: writes the pictures that --fid draws"),
        ("--num_samples 0", "2 --num_samples: got '0', expected a whole number from 1 to 1000000"),
        ("--nearest none", "2 --nearest: got 'none'"),
        ("--features no_such_network", "2 --features: got no_such_network"),
        ("--num_samples 20", "1 KID compares subsets of 1,000 pictures, but there are 20 samples"),
        ("--num_samples 5 --kid_subset_size 2", "1 There are 5 samples and 114 reference pictures"),
        ("--reference nowhere", "1 --reference: nowhere is neither a folder nor an .npz"),
        ("--samples {root}/empty", "1 --samples: {root}/empty holds no pictures"),
        ("--samples {root}/larger", "1 The pictures are 32x32 and the reference 16x16"),
        ("--samples {root}/mixed", "1 --samples: {root}/mixed/0001.png is 32x32, the first picture 16x16"),
        ("--samples {root}/broken.npz", "1 --samples: {root}/broken.npz cannot be read as an .npz"),
        ("--samples {root}/other.npz", "1 --samples: {root}/other.npz holds pictures; expected arr_0"),
        ("--samples {root}/float.npz", "1 --samples: {root}/float.npz holds arr_0, float64"),
        ("--features {root}/broken.npz", "1 --features: {root}/broken.npz cannot be opened as weights"),
        ("--features {root}/weights.pth", "1 --features: {root}/weights.pth holds no Inception weights"),
        ("--steps 99", "2 --steps: got 99"),
    ],
)
def test_bad_input_gets_one_sentence(run, capsys, words, expected):
    root = run.root
    if not (root / "empty").exists():
        (root / "empty").mkdir()
        write_folder(root / "larger", random_pictures(12, 0, size=32))
        write_folder(root / "mixed", random_pictures(2, 0))
        Image.new("RGB", (32, 32)).save(root / "mixed" / "0001.png")
        (root / "broken.npz").write_bytes(b"PK\x03\x04 not a zip")
        np.savez(root / "other.npz", pictures=np.zeros(3))
        np.savez(root / "float.npz", arr_0=np.zeros((2, 16, 16, 3)))
        torch.save({"some.weight": torch.zeros(3)}, root / "weights.pth")
    small = [] if "kid_subset_size" in words or "1,000" in expected else ["--kid_subset_size", "10"]
    count = [] if "num_samples" in words else ["--num_samples", "12"]
    always = ["--checkpoint", f"{root}/tiny.pth", "--output_dir", f"{root}/refused", "--device", "cpu"]
    features = [] if "--features" in words else ["--features", "random"]
    sentence = refusal(capsys, *always, *small, *count, *features, *words.format(root=root).split())
    assert sentence.startswith(expected.format(root=root)), sentence


def test_weights_that_cannot_be_had_are_named_with_where_to_put_them(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(
        "src.evaluation.features.URL_INCEPTION_V3", "http://127.0.0.1:9/weights-inception.pth"
    )  # nobody listens there
    words = ["--checkpoint", f"{run.root}/tiny.pth", "--output_dir", f"{run.root}/refused", "--kid_subset_size", "10"]
    sentence = refusal(capsys, *words, "--num_samples", "12")
    assert "Fetch http://127.0.0.1:9/weights-inception.pth" in sentence
    assert (
        f"put it at {tmp_path / 'hub' / 'checkpoints' / 'weights-inception.pth'}" in sentence
        and "--features random" in sentence
    )


def test_a_file_of_inception_weights_is_taken_and_told_apart_from_the_published_one(tmp_path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Inception

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(Inception, "load_state_dict", lambda self, state: None)
        weights = Inception("inception-v3-compat", ["2048"]).state_dict()
    torch.save(weights, tmp_path / "own.pth")
    network = load_features(str(tmp_path / "own.pth"), CPU)
    assert network.layers == {"isc": "logits_unbiased", "fid": "2048", "kid": "2048", "prc": "2048"}
    assert not network.comparable and "own.pth" in network.name and INCEPTION_SHA256[:8] not in network.key
