"""evaluate.py as a whole: it measures what train.py and sample.py do, reports it, and refuses before it draws."""

import copy
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluate
from src.dataset import DeviceImages
from src.runtime.build import build_diffusion, build_model, build_validation, open_images
from src.runtime.distributed import World
from src.runtime.judge import validate
from src.runtime.pipeline import Pipeline
from tests.evaluation.conftest import random_pictures, write_folder
from tests.runs import ROOT


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """{tag: {t: value}} of the curves of one call."""
    (run,) = folder.glob("evaluate/*")
    events = EventAccumulator(str(run)).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


# --- what it measures -----------------------------------------------------------------------------------


def test_pictures_drawn_are_those_of_the_npz_and_of_any_batch_size(tiny):
    words = ["--num_samples", "12", "--steps", "3"]
    one = tiny.call("--fid", *words, "--npz", "--nearest", "14")  # more than --fid draws
    other = tiny.call(*words, "--batch_size", "5")
    npz = one.path.with_suffix(".npz")
    assert np.load(npz)["arr_0"].shape == (12, 16, 16, 3)
    again = tiny.call("--samples", npz)
    assert again.distribution["figures"] == one.distribution["figures"]
    assert again.distribution["samples"]["fingerprint"] == one.distribution["samples"]["fingerprint"]
    assert other.distribution["figures"]["fid"] == pytest.approx(one.distribution["figures"]["fid"], rel=1e-3)


def test_the_report_says_what_was_measured_and_how(tiny):
    report = tiny.call("--num_samples", "12", "--steps", "2", "--sampler", "ddim", "--eta", "0.5")
    protocol, distribution = report.protocol, report.distribution
    assert protocol["checkpoint"].endswith("tiny.pth") and protocol["step"] == 7 and protocol["weights"] == "ema"
    assert protocol["precision"] == "float32" and "CPU" in protocol["device"] and "--sampler ddim" in protocol["command"]
    assert distribution["library"] == f"torch-fidelity {torch_fidelity.__version__}"
    samples, reference = distribution["samples"], distribution["reference"]
    assert dict(sampler="ddim", steps=2, eta=0.5, seed=0, count=12).items() <= samples.items()
    assert reference["from"] == "folder train" and reference["count"] == 114 and len(reference["fingerprint"]) == 16
    assert any("full rank" in warning for warning in distribution["warnings"])


def test_exact_and_drawn_bounds_agree_and_terms_add_up(tiny, tmp_path):
    exact = tiny.call("--nll", "--exact", "--log_path", tmp_path).bound
    drawn = tiny.call("--nll", "--nll_steps", "12").bound
    figures, rows = exact["bits_per_dimension"], exact["by_t"]
    assert figures["total"] == pytest.approx(sum(figures[name] for name in ("prior", "steps", "decoder")), rel=1e-9)
    assert figures["total"] == pytest.approx(figures["prior"] + sum(row["sum"] for row in rows), rel=1e-9)
    assert [row["t_from"] for row in rows] == list(range(30)) and len(drawn["by_t"]) == 12
    assert abs(drawn["bits_per_dimension"]["total"] - figures["total"]) < 3 * drawn["bits_per_dimension"]["standard_error"]
    curves = scalars(tmp_path)
    each, from_t_on = (curves[f"nll/bits_per_dimension_{name}"] for name in ("of_step_t", "from_t_on"))
    assert each == pytest.approx({row["t_from"]: row["sum"] for row in rows}, rel=1e-5)
    assert from_t_on[0] == pytest.approx(sum(each.values()), rel=1e-5) and from_t_on[29] == pytest.approx(each[29])


def test_the_loss_is_the_one_that_train_logs(tiny, tmp_path):
    s, loss = tiny.settings, tiny.call("--loss", "--log_path", tmp_path).loss
    batches, diffusion = build_validation(s, DeviceImages(open_images(s, "val"), "cpu")), build_diffusion(s)
    logged = validate(World(), diffusion, tiny.model.eval(), batches)
    assert loss["held_out"] == pytest.approx(logged, rel=1e-6)  # another memory layout
    bins = loss["by_t"]
    assert [row["t_to"] for row in bins] == [row["t_from"] - 1 for row in bins[1:]] + [29] and bins[0]["t_from"] == 0
    weights = diffusion.val_weight
    bounds = [(weights[row["t_from"] : row["t_to"] + 1], row["loss"] * row["count"]) for row in bins]
    total = logged * sum(row["count"] for row in bins)
    assert sum(w.min() * x for w, x in bounds) <= total * 1.0001 and total <= sum(w.max() * x for w, x in bounds)
    curve = scalars(tmp_path)["loss/eps_by_t"]
    assert [*curve.values()] == pytest.approx([row["loss"] for row in bins], rel=1e-5)


def test_copies_of_training_pictures_have_distance_0_and_noise_is_far(tiny):
    copies = tiny.call("--nearest", "6", "--samples", "train").nearest
    assert copies["pixels"]["ratio"] == 0 and copies["pixels"]["mean_distance_of_held_out"] > 0
    assert Path(copies["pixels"]["sheet"]).exists() and copies["features"]["ratio"] == 0
    drawn = tiny.call("--nearest", "4", "--steps", "2").nearest
    assert drawn["pixels"]["ratio"] > 0.5 and drawn["features"]["ratio"] > 0.5


def test_it_ends_with_what_one_wants_to_know_below_the_tables(tiny, capsys):
    report = tiny.call("--loss", "--nll", "--nll_steps", "2", "--fid", "--num_samples", "12", "--nearest", "4", "--steps", "2")
    *tables, loss, bound, fid, by_pixels, by_features, done = capsys.readouterr().out.splitlines()
    assert any(line.startswith("nearest.features.ratio ") for line in tables) and done.startswith("Done in ")
    assert loss.split() == f"loss {report.loss['held_out']:.5f} on 6 held-out pictures; lower is better".split()
    bits = report.bound["bits_per_dimension"]
    assert f"{bits['total']:.3f} ± {bits['standard_error']:.3f} bits per dimension" in bound
    assert f"{report.distribution['figures']['fid']:.4g} of 12 pictures, by three random convolutions; lower" in fid
    for line, view in ((by_pixels, "pixels"), (by_features, "features")):
        assert f"by {view}, {report.nearest[view]['ratio']:.2f} times as far" in line and "near 0 copies" in line


def test_evaluations_that_start_in_one_second_keep_their_reports_and_curves_apart(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("src.evaluation.report.time.strftime", lambda _: "20260102-030405")
    words = ["--checkpoint", str(tiny.checkpoint), "--device", "cpu", "--loss", "--log_path", str(tmp_path / "logs")]
    for k in range(3):
        assert evaluate.main([*words, "--output_dir", str(tmp_path / f"{k // 2}")]) == 0
    names = [f"{folder}/tiny-20260102-030405{n}.json" for folder, n in ((0, "-2"), (0, ""), (1, ""))]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*.json")) == names
    assert len(list((tmp_path / "logs/evaluate").iterdir())) == 3


# --- what must not cost a figure ------------------------------------------------------------------------


def test_logs_that_cannot_be_written_cost_a_warning_and_no_figure(tiny, tmp_path, capsys):
    (tmp_path / "logs").write_text("as a folder of another machine that cannot be made")
    report = tiny.call("--loss", "--nll", "--nll_steps", "2", "--log_path", tmp_path / "logs")
    out = capsys.readouterr().out
    assert f"warning     Cannot write to {tmp_path / 'logs' / 'evaluate'}" in out and "--log_path" in out
    assert report.loss["held_out"] > 0 and report.bound["bits_per_dimension"]["total"] > 0


def test_figures_are_printed_before_they_are_written(tiny, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("src.evaluation.report.atomic_file", full)
    assert evaluate.main(tiny.words("--loss", "--log_path", str(tmp_path))) == 1
    said = capsys.readouterr()
    assert "loss.held_out " in said.out and "No space left on device" in said.err and "--output_dir" in said.err


def test_names_that_are_no_utf_8_are_in_the_report_and_in_tensorboard(tiny, tmp_path):
    folder = write_folder(tmp_path / os.fsdecode(b"pictures\xff"), random_pictures(12, 1))
    report = tiny.call("--samples", folder)
    assert report.distribution["samples"]["from"] == str(folder) and "\\udcff" in report.path.read_text(encoding="ascii")
    words = ["--output_dir", tmp_path / os.fsdecode(b"\xfe"), "--log_path", tmp_path / os.fsdecode(b"\xfd")]
    assert evaluate.main(tiny.words("--loss", *words)) == 0
    (tmp_path / os.fsdecode(b"\xfd")).rename(tmp_path / "logs")  # TensorBoard's reader takes no such path
    assert scalars(tmp_path / "logs")["loss/eps_by_t"] and [*tmp_path.glob("*/tiny*.json")]


# --- refusals -------------------------------------------------------------------------------------------


def refusal(capsys, argv) -> str:
    """The exit code, and the one sentence on stderr."""
    capsys.readouterr()
    code = evaluate.main(argv)
    lines = [line for line in capsys.readouterr().err.splitlines() if "it/s" not in line and "\r" not in line and line.strip()]
    assert len(lines) == 1 and lines[0].startswith("evaluate.py: "), lines
    return f"{code} {lines[0].removeprefix('evaluate.py: ')}"


@pytest.fixture
def draws_nothing(monkeypatch):
    """A call that measures anything, or imports torch-fidelity, which takes seconds, fails."""
    for name in [name for name in sys.modules if name.startswith("torch_fidelity") or name == "src.evaluation.distribution"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setattr(Pipeline, "seconds_per_call", None)


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--npz --loss", "2 --npz: writes the pictures that --fid draws"),
        ("--features no_such_network", "2 --features: no_such_network is no file and no network; allowed are"),
        ("--features {root}", "2 --features: {root} is a folder, but a file of weights is needed"),
        ("--steps 99", "2 --steps: got 99"),
        ("--samples val --reference val", "2 --samples, --reference: both are the same pictures"),
        ("--samples {root}/val --reference {root}/val.npz", "2 --samples, --reference: both are the same pictures"),
        ("--loss --fid --num_samples 20 --kid_subset_size 1000", "1 There are 20 samples and 114 reference pictures"),
        ("--num_samples 5 --kid_subset_size 2", "1 There are 5 samples and 114 reference pictures"),
        ("--loss --fid --reference nowhere", "1 --reference: nowhere is not there"),
        ("--loss --fid --samples {root}/larger", "1 The samples are 32x32, and folder train is 16x16"),
        ("--loss --nearest --samples {root}/larger", "1 The samples are 32x32, and folder train is 16x16"),
        ("--fid --reference {root}/larger", "1 The samples are 16x16, and {root}/larger is 32x32"),
        ("--loss --nll --data_path {root}/two", "1 --nll: there is one validation picture"),
        ("--checkpoint {root}/data --loss", "1 Cannot read {root}/data: it is a folder, and a file is needed"),
        ("--loss --output_dir {root}/tiny.pth", "1 Cannot write to {root}/tiny.pth: a file stands where a folder is needed"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(tiny, capsys, draws_nothing, words, expected):
    root = tiny.root
    if not (root / "larger").exists():
        write_folder(root / "larger", random_pictures(12, 0, size=32))
        write_folder(root / "two", random_pictures(2, 0))
        np.savez(root / "val.npz", arr_0=random_pictures(12, 7).transpose(0, 2, 3, 1))
        write_folder(root / "val", random_pictures(12, 7))
    argv = tiny.words("--num_samples", "12", *words.format(root=root).split())
    sentence = refusal(capsys, argv)
    assert sentence.startswith(expected.format(root=root)), sentence


def test_data_with_other_classes_than_the_checkpoints_are_refused(tiny, capsys, draws_nothing, monkeypatch):
    settings = replace(tiny.settings, CLASS_CONDITIONAL=True)
    model, names = build_model(settings, 7), ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
    path = tiny.save("classes", model, classes=names, settings=settings)
    for words in (["--loss"], ["--nll"], ["--num_samples", "12"], ["--nearest"]):
        sentence = refusal(capsys, tiny.words("--checkpoint", path, *words))
        assert sentence.startswith("1 The checkpoint was trained on 7 classes (ant, bee, cat, dog, eel, ...), but the data at ")
        assert "have 1 class (" in sentence and "--data_path" in sentence
    monkeypatch.undo()
    for name in names:
        write_folder(tiny.root / "animals" / name, random_pictures(20, seed=len(name)))
    assert tiny.call("--checkpoint", path, "--loss", "--data_path", tiny.root / "animals").loss["held_out"] > 0


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--num_samples", "12", "--steps", "3"], "The network's prediction is not finite in step 1 of 3"),
        (["--nll", "--nll_steps", "2"], "The bound is not finite"),
        (["--loss"], "The validation loss is not finite"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_give_no_figures_but_advice(tiny, capsys, words, expected, value):
    broken = copy.deepcopy(tiny.model)
    with torch.no_grad():
        [*broken.parameters()][-1].fill_(value)
    sentence = refusal(capsys, tiny.words("--checkpoint", tiny.save("broken", broken), *words))
    assert sentence.startswith(f"1 {expected}") and "--precision fp32" in sentence
    assert not [*Path(tiny.root / "reports").glob("*/broken*.json")]


def test_help_imports_no_torch_fidelity_and_no_tensorboard():
    program = "import sys; sys.modules['torch_fidelity'] = sys.modules['tensorboard'] = None; import evaluate; evaluate.main()"
    done = subprocess.run([sys.executable, "-c", program, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "usage: python evaluate.py" in done.stdout and not done.stderr


def test_an_interrupted_call_keeps_the_sections_that_are_done(tiny, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "measure_bound", interrupt)
    argv = tiny.words("--loss", "--nll")
    assert evaluate.main(argv) == 130
    (path,) = Path(argv[3]).glob("*.json")
    assert {*json.loads(path.read_text())} == {"protocol", "loss"}


class Enough(Exception):
    pass


@pytest.mark.parametrize(
    ("typed", "idle"),
    [
        ("--fid --val_images 5 --log_path x", "val_images log_path"),
        ("--loss --reference val --kid_subset_size 5 --num_samples 9", "reference kid_subset_size num_samples"),
        ("--nll --features random --samples val", "samples features"),
        ("--fid --samples val --num_samples 9 --guidance 2 --steps 5", "num_samples guidance steps"),
        ("--fid --samples val --weights raw --precision fp32 --seed 3", "weights precision seed"),
        ("--fid --nearest --seed 3 --steps 5 --weights raw", ""),
    ],
)
def test_flags_that_have_no_effect_are_named(typed, idle, monkeypatch, capsys):
    def end(*_):
        raise Enough

    monkeypatch.setattr(evaluate, "Evaluation", end)
    with pytest.raises(Enough):
        evaluate.evaluate(evaluate.read_flags(typed.split()), World())
    assert sorted(re.findall(r"note: --(\w+) has no effect", capsys.readouterr().out)) == sorted(idle.split())
