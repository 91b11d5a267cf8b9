"""export.py: diffusers draws the same pictures, and weights alone are a checkpoint to draw from and to start from."""

import itertools
import json
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import config
import export
from src.runtime.build import build_diffusion, build_model
from src.runtime.checkpoint import VERSION
from src.runtime.resume import NETWORK
from src.runtime.settings import Settings, as_flags, resolve
from src.utils import UserError
from tests.runs import TINY, ended

diffusers = pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors.torch")

SMALL = dict(DATASET="shapes", NUM_RES_BLOCKS=1, TIME_STEPS=20)
NETWORKS = {
    "demo": dict(config.PRESETS["demo"], IMAGE_SIZE=16, ATTENTION_RESOLUTIONS=(4,)),
    "default": dict(IMAGE_SIZE=16, UNET_DIM=64, ATTENTION_RESOLUTIONS=(4, 2)),  # heads of 64 channels: 1, 2, 3, 4
    "as wide as the default": dict(IMAGE_SIZE=8, UNET_DIM=128, DIM_MULTS=(1, 2), ATTENTION_RESOLUTIONS=(4,), NUM_RES_BLOCKS=2),
    "one head of 96 channels": dict(IMAGE_SIZE=8, UNET_DIM=96, DIM_MULTS=(1, 1), ATTENTION_RESOLUTIONS=(8, 4)),
    "single heads of two widths": dict(IMAGE_SIZE=8, UNET_DIM=16, DIM_MULTS=(1, 2), ATTENTION_RESOLUTIONS=(8,)),
    "grey": dict(IMAGE_SIZE=8, UNET_DIM=64, DIM_MULTS=(1, 2), ATTENTION_RESOLUTIONS=(), CHANNELS=1),
    "one level": dict(IMAGE_SIZE=8, UNET_DIM=16, DIM_MULTS=(1,), ATTENTION_RESOLUTIONS=()),
}


def settings_of(**changes) -> Settings:
    return resolve(config, as_flags(SMALL | changes).split()).settings


def checkpoint(folder: Path, **changes) -> tuple[Path, Settings, torch.nn.Module]:
    """A file of random weights, none of them zero, as a GPU run leaves them: channels_last."""
    s = settings_of(**changes)
    model = build_model(s, 3).eval()
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    model.to(memory_format=torch.channels_last)
    state = {"version": VERSION, "config": asdict(s), "classes": ["cat", "dog", "cow"], "ema": model.state_dict(), "step": 7}
    folder.mkdir(exist_ok=True)
    torch.save(state | {"best_loss": 0.25}, folder / "made.pth")
    return folder / "made.pth", s, model


def run_export(checkpoint: Path, out: Path, *flags: str) -> Path:
    export.export(export.read_flags(["--checkpoint", str(checkpoint), "--output_dir", str(out), *flags]))
    return out


# --- diffusers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("network", "prediction"), [("demo", "x0"), *itertools.product(["demo", "default"], ["eps", "v"])])
def test_the_pipeline_of_diffusers_draws_our_pictures(tmp_path, network, prediction):
    changes = NETWORKS[network] | dict(PREDICTION=prediction, CLASS_CONDITIONAL=False)
    path, s, model = checkpoint(tmp_path, **changes)
    pipeline = diffusers.DDPMPipeline.from_pretrained(run_export(path, tmp_path / "out"))
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    theirs = pipeline(2, generators[0], num_inference_steps=s.TIME_STEPS, output_type="np").images
    ours = build_diffusion(s).sample(model, (2, 3, s.IMAGE_SIZE, s.IMAGE_SIZE), generator=generators[1])
    assert ours.std() > 0.1
    np.testing.assert_allclose(theirs, (ours / 2 + 0.5).permute(0, 2, 3, 1).numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_every_network_has_the_same_output_there(tmp_path, network):
    path, s, model = checkpoint(tmp_path, **NETWORKS[network] | dict(CLASS_CONDITIONAL=True))
    unet = diffusers.UNet2DModel.from_pretrained(run_export(path, tmp_path / "out"))
    x, t = torch.randn(3, s.CHANNELS, s.IMAGE_SIZE, s.IMAGE_SIZE), torch.tensor([0, 9, 19])
    ours = model(x, t, torch.tensor([2, 0, -1]))
    assert ours.std() > 0.1
    torch.testing.assert_close(unet(x, t, class_labels=torch.tensor([2, 0, 3])).sample, ours, rtol=0, atol=2e-5)


@pytest.mark.parametrize("changes", [
    dict(UNET_DIM=96, DIM_MULTS=(1, 2), ATTENTION_RESOLUTIONS=(8,)),  # one head of 96, three of 64
    dict(UNET_DIM=16, DIM_MULTS=(2, 2), ATTENTION_RESOLUTIONS=(8,)),
])  # fmt: skip
def test_what_diffusers_cannot_express_is_refused_before_anything_is_written(tmp_path, changes):
    path, *_ = checkpoint(tmp_path, IMAGE_SIZE=8, **changes)
    with pytest.raises(UserError, match=r"cannot express this network \(UNET_DIM .*with --weights_only\.$"):
        run_export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run_export(path, tmp_path / "out", "--weights_only")


@pytest.mark.parametrize("classes", [False, True])
def test_the_card_tells_what_the_model_is_and_its_code_draws(tmp_path, monkeypatch, classes):
    path, *_ = checkpoint(tmp_path, **NETWORKS["one level"], CLASS_CONDITIONAL=classes, SEED=5)
    monkeypatch.chdir(run_export(path, tmp_path / "out"))
    card = Path("README.md").read_text()
    facts = ["optimizer steps | 7", "lowest validation loss so far | 0.25000", "DATASET | shapes", "SEED | 5", "DIM_MULTS | 1"]
    assert all(f"| {fact} |\n" in card for fact in facts)
    assert ("cat, dog, cow. Label 3 means no class." in card) == classes
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(code, {})
        with Image.open("pictures.png") as image:
            assert image.size == (8 * 98 + 2, 98 + 2) and np.array(image).std() > 5
        Path("pictures.png").unlink()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("changes", "guidance"),
    [(dict(PREDICTION="eps"), 1.0), (dict(CLASS_CONDITIONAL=True), 2.0), (dict(CLASS_CONDITIONAL=True, LABEL_DROPOUT=0), 1.0)],
)
def test_the_quick_code_of_the_card_draws_the_pictures_of_sample_py(tmp_path, monkeypatch, changes, guidance, schedule):
    path, s, model = checkpoint(tmp_path, **NETWORKS["demo"] | dict(CLASS_CONDITIONAL=False, BETA_SCHEDULE=schedule) | changes,
                                TIME_STEPS=200)  # fmt: skip
    monkeypatch.chdir(run_export(path, tmp_path / "out"))
    code, there = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)[0], {}
    exec(code.replace("# noise", "; x_T = x"), there)
    y = torch.arange(8) % 3 if s.CLASS_CONDITIONAL else None
    ours = build_diffusion(s).sample(model, (8, 3, 16, 16), "dpm++", 20, noise=there["x_T"], y=y, guidance=guidance)
    assert len(there["scheduler"].timesteps) == 20 and ours.std() > 0.1
    torch.testing.assert_close(there["x"], ours, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_weights_have_the_dtype_asked_for_and_the_ordinary_layout(tmp_path, dtype):
    path, *_ = checkpoint(tmp_path, **NETWORKS["one level"])
    out = run_export(path, tmp_path / "out", "--dtype", dtype)
    run_export(path, out, "--weights_only", "--dtype", dtype)
    theirs = safetensors.load_file(out / "unet/diffusion_pytorch_model.safetensors")
    ours = torch.load(out / "weights.pth", weights_only=True)["ema"]
    for tensor in (*theirs.values(), *ours.values()):
        assert tensor.dtype == export.DTYPES[dtype] and tensor.is_contiguous()
    assert json.loads((out / "unet/config.json").read_text())["attn_norm_num_groups"] == 8


def test_a_run_that_is_named_beside_both_paths_is_said_to_have_no_effect(tmp_path, capsys):
    path, *_ = checkpoint(tmp_path, **NETWORKS["one level"])
    run_export(path, tmp_path / "out", "--run", "mine", "--weights_only")
    assert "note: --run has no effect with --checkpoint and --output_dir\n" in capsys.readouterr().out


def test_a_file_that_is_there_stays(tmp_path):
    path, *_ = checkpoint(tmp_path, **NETWORKS["one level"])
    (tmp_path / "README.md").symlink_to("somebody's, gone for now")
    with pytest.raises(UserError, match=r"README.md exists already. Remove it, or choose another folder with --output_dir."):
        run_export(path, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "made.pth"]


def test_without_safetensors_it_says_what_to_do(tmp_path, monkeypatch):
    path, *_ = checkpoint(tmp_path, **NETWORKS["one level"])
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match=r"Run 'pip install safetensors', or export the weights alone with --weights_only\.$"):
        run_export(path, tmp_path / "out")
    run_export(path, tmp_path / "out", "--weights_only")


# --- weights alone ----------------------------------------------------------------------------------------


@pytest.fixture
def weights(run, trained, trained_with_classes):
    """weights(classes=False, dtype="fp32"): the file that the script writes of a finished run's best.pth."""

    def make(classes: bool = False, dtype: str = "fp32") -> Path:
        runner = trained_with_classes if classes else trained
        place = shutil.copytree(runner.folder / "checkpoints", run.folder / "checkpoints/done", dirs_exist_ok=True)
        said = ended(run.start("export.py", "--run", "done", "--weights_only", "--dtype", dtype), 0)
        assert said.out.endswith("python sample.py --checkpoint outputs/done/export/weights.pth\n")
        shutil.rmtree(place)
        return (run.folder / "outputs/done/export/weights.pth").rename(run.folder / f"{dtype}.pth")

    return make


def drawn(run, path: Path, *flags) -> np.ndarray:
    words = ["--num_samples", 4, "--steps", 5, "--precision", "fp32", "--output_dir", f"of {path.stem}", *flags]
    run.sample("--checkpoint", path, *words)
    images = sorted((run.folder / f"of {path.stem}/images").iterdir())
    return np.stack([np.array(Image.open(image)).astype(int) for image in images])


@pytest.mark.parametrize("classes", [False, True])
def test_weights_alone_draw_the_pictures_of_the_checkpoint(run, trained, trained_with_classes, weights, classes):
    whole = (trained_with_classes if classes else trained).folder / "checkpoints/best.pth"
    alone = weights(classes)
    assert alone.stat().st_size < 0.4 * whole.stat().st_size
    expected = drawn(run, whole)
    assert (drawn(run, alone) == expected).all()
    for dtype, most in {"fp16": 0.2, "bf16": 2}.items():  # grey levels of 255
        difference = abs(drawn(run, weights(classes, dtype)) - expected).mean()
        assert 0 < difference <= most, dtype


def test_a_file_stripped_by_hand_draws_and_is_evaluated_and_exported(run, trained):
    state, path = trained.state("best"), run.folder / "stripped.pth"
    torch.save({name: state[name] for name in ("ema", "config", "classes")}, path)
    assert (drawn(run, path) == drawn(run, trained.folder / "checkpoints/best.pth")).all()
    assert evaluated(run, path) == evaluated(run, trained.folder / "checkpoints/best.pth")
    run_export(path, run.folder / "out")
    assert "| optimizer steps | not recorded |" in (run.folder / "out/README.md").read_text()
    refused = run.sample("--checkpoint", path, "--weights", "raw", code=1).err
    assert refused == f"sample.py: {path} holds only what drawing needs: it lacks model. Leave out --weights raw.\n"


def evaluated(run, path: Path) -> dict:
    """The losses that evaluate.py finds."""
    ended(run.start("evaluate.py", "--checkpoint", path, "--loss", "--device", "cpu", "--output_dir", path.stem), 0)
    (file,) = (run.folder / path.stem).glob("*.json")
    return json.loads(file.read_text())["loss"]


# --- a new run from given weights: train.py --init_from ---------------------------------------------------


def test_fine_tuning_from_weights_alone_starts_ahead_and_is_resumed_by_the_same_command(run, trained, weights):
    command = dict(init_from=weights(dtype="fp16"), RUN="fine", EPOCHS=1, LEARNING_RATE=1e-4)
    out = run.train(max_steps=4, **command).out
    assert f"{len(trained.state()['ema'])} of {len(trained.state()['ema'])} tensors from" in out and "anew: none" in out
    first = run.folder / "checkpoints/fine/latest.pth"
    assert torch.load(first, weights_only=True)["step"] == 4
    again = run.train(**command).out
    assert "going on after step 4" in again and "tensors from" not in again
    fine = torch.load(first, weights_only=True)
    assert (fine["step"], fine["epoch"]) == (10, 1)
    assert fine["best_loss"] < 0.9 * trained.scalars()["loss/val"][0][1], "no better than a first epoch from random weights"
    run.sample("--run", "fine", "--num_samples", 1, "--steps", 2)


def test_the_weights_and_their_average_start_as_those_of_the_file(run, trained):
    run.train(init_from=trained.folder / "checkpoints/best.pth", max_steps=1, LEARNING_RATE=1e-9)
    for part in ("model", "ema"):
        torch.testing.assert_close(run.state()[part], trained.state("best")["ema"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("start_has_classes", [False, True])
def test_with_another_number_of_classes_only_their_embedding_starts_anew(run, trained, trained_with_classes, start_has_classes):
    start = (trained_with_classes if start_has_classes else trained).folder / "checkpoints/best.pth"
    two = run.folder / "two"  # of the four classes
    for folder in sorted(run.pictures.iterdir())[:2]:
        shutil.copytree(folder, two / folder.name)
    out = run.train(init_from=start, CLASS_CONDITIONAL=True, DATA_PATH=two, CACHE_PATH=run.folder / "cache", max_steps=1).out
    assert f"tensors from {start}; anew: class_embedding.weight\n" in out
    assert len(run.state()["model"]["class_embedding.weight"]) == 3


def test_a_new_run_takes_the_shape_of_the_network_from_its_start_and_later_goes_on_without_it(run, trained):
    start = Path(shutil.copy(trained.folder / "checkpoints/best.pth", run.folder / "start.pth"))
    command = dict(init_from="start.pth", WARMUP_STEPS=0, RUN="fine") | dict.fromkeys(NETWORK & TINY.keys())  # None: not typed
    assert "(network of start.pth)" in run.train(**command, max_steps=2).out
    start.unlink()
    out = run.train(**command, max_steps=3).out
    assert "going on after step 2" in out and "\nnote: --init_from has no effect on a run that has a checkpoint" in out
    own = torch.load(run.folder / "checkpoints/fine/latest.pth", weights_only=True)["config"]
    assert all(own[name] == TINY[name] for name in NETWORK & TINY.keys())


def test_weights_that_learned_another_task_are_pointed_out(run, trained):
    out = run.train(init_from=trained.folder / "checkpoints/best.pth", PREDICTION="v", max_steps=1).out
    assert "was trained with --prediction eps, so its weights have to learn another task." in out


@pytest.mark.parametrize("name", ["latest", "mine"])
def test_resuming_from_weights_alone_is_refused_with_the_flags_that_work(run, weights, name):
    path = run.folder / f"checkpoints/{name}.pth"
    path.parent.mkdir()
    weights().rename(path)
    said = run.train(code=1).err
    assert f"checkpoints/{name}.pth holds only what drawing needs: it lacks model, optimizer, scaler, meter. " in said
    advice = re.search(r"A new run can start from its weights: add (--init_from \S+) (--run) NAME\.", said)
    assert "anew: none" in ended(run.start("train.py", *run.flags(max_steps=1), *advice[1].split(), advice[2], "new"), 0).out


def test_a_missing_file_is_refused_before_data_are_read(run):
    said = run.train(init_from="nowhere.pth", DATA_PATH="no folder", code=1).err
    assert said.startswith("train.py: No checkpoint at nowhere.pth. Choose one of: ")
