"""What a run does and leaves behind: it learns, at the rate it says, and its files are the ones promised."""

import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import config
import evaluate
import export
import sample
import train
from src.dataset import DeviceImages
from src.runtime.build import build_diffusion, build_model, build_validation, open_images
from src.runtime.checkpoint import TO_RESUME, load_checkpoint
from tests.runs import ROOT, differences, signal_at

# --- learning -----------------------------------------------------------------------------------------


def test_the_loss_falls(run):
    run.train(EPOCHS=10, WARMUP_STEPS=10, LEARNING_RATE=3e-3, EMA_DECAY=0.99, LOG_EVERY=10, SAMPLE_EVERY=100, SAVE_EVERY=100)
    curves = run.scalars()
    train, val = ([loss for _, loss in curves[tag]] for tag in ("loss/train", "loss/val"))
    assert train[0] > 0.8, "the network does not start near zero, where the loss is the variance of the noise"
    assert train[-1] < 0.5 * train[0]
    assert val[-1] < 0.6 * val[0]


@pytest.mark.parametrize(
    "schedule, share",
    [
        ("constant", lambda done: 1),
        ("linear", lambda done: 0.01 + 0.99 * (1 - done)),
        ("cosine", lambda done: 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2),
    ],
)
def test_the_learning_rate_rises_linearly_and_then_stays_or_decays_to_a_hundredth_in_the_last_step(run, schedule, share):
    run.train(max_steps=10, WARMUP_STEPS=4, LEARNING_RATE=1e-3, LOG_EVERY=1, LR_SCHEDULE=schedule)
    rates = [rate for _, rate in run.scalars()["optimizer/learning_rate"]]
    assert rates[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert rates[4:] == pytest.approx([1e-3 * share((k + 1) / 6) for k in range(6)])


def test_a_decaying_run_goes_on_exactly(run):
    whole, parts = run.to("whole"), run.to("parts")
    whole.train(LR_SCHEDULE="cosine", EPOCHS=2)
    parts.train(signal_at(6, 0, "SIGTERM"), code=143, LR_SCHEDULE="cosine", EPOCHS=2)
    parts.train(LR_SCHEDULE="cosine", EPOCHS=2)
    assert differences(parts.state(), whole.state()) == []
    assert parts.scalars()["optimizer/learning_rate"] == whole.scalars()["optimizer/learning_rate"]


def test_val_every_epochs_are_judged_drawn_and_kept_at_the_next_of_them(run):
    run.train(EPOCHS=5, VAL_EVERY=2, SAMPLE_EVERY=3, SAVE_EVERY=3)
    assert [step for step, _ in run.scalars()["loss/val"]] == [20, 40, 50]
    assert {Path(name).name for name in run.files("*.png")} == {"epoch_004.png", "epoch_005.png"}
    assert {"epoch_004.pth", "epoch_005.pth"} == {Path(name).name for name in run.files("epoch_*.pth")}


def test_the_closing_hint_draws_also_where_no_label_was_hidden(run):
    said = run.train(CLASS_CONDITIONAL=True, LABEL_DROPOUT=0, max_steps=2).out
    assert "--guidance" not in said
    run.sample(*re.search(r"python sample.py (.*)", said)[1].split(), "--num_samples", 1)
    hint = run.to("guided").train(CLASS_CONDITIONAL=True, LABEL_DROPOUT=0.1, max_steps=2).out
    run.to("guided").sample(*re.search(r"python sample.py (.*--guidance 2)", hint)[1].split(), "--num_samples", 1)


def first_gradient(run, **settings):
    """The gradient that Adam was given in step 1, whose first moment is a tenth of it, as one long vector."""
    run.train(max_steps=1, LOG_EVERY=1, **settings)
    state = run.state()["optimizer"]["state"]
    return torch.cat([10 * state[i]["exp_avg"].flatten() for i in range(len(state))])


def test_the_gradient_is_clipped_to_grad_clip_and_logged_as_it_was(run):
    free, clipped = run.to("free"), run.to("clipped")
    whole, short = first_gradient(free, GRAD_CLIP=0), first_gradient(clipped, GRAD_CLIP=0.01)
    assert whole.norm() > 0.02
    torch.testing.assert_close(short, whole * 0.01 / whole.norm(), atol=1e-7, rtol=1e-4)
    for runner in (free, clipped):
        assert runner.scalars()["optimizer/gradient_norm"] == [(1, pytest.approx(whole.norm().item(), rel=1e-4))]


def test_two_passes_of_four_images_are_one_step_of_eight(run):
    split = first_gradient(run.to("split"), BATCH_SIZE=4, GRAD_ACCUM_STEPS=2)
    whole = first_gradient(run.to("whole"), BATCH_SIZE=8, GRAD_ACCUM_STEPS=1)
    torch.testing.assert_close(split, whole, atol=1e-6 * whole.abs().max().item(), rtol=1e-4)
    one, other = (run.to(name).scalars()["loss/train"][0][1] for name in ("split", "whole"))
    assert one == pytest.approx(other, rel=1e-6)


# --- files --------------------------------------------------------------------------------------------


def test_the_files_are_those_promised(trained):
    names = ("latest", "latest.previous", "best", "epoch_002", "epoch_003")
    assert set(trained.files("*.pth")) == {f"checkpoints/{name}.pth" for name in names}
    assert set(trained.files("*.png")) == {"outputs/samples/epoch_002.png", "outputs/samples/epoch_003.png"}
    assert not trained.files(".*.part-*"), "half-made files were left"


def test_checkpoints_are_plain_dicts_with_the_keys_promised(trained):
    for name in ("latest", "best", "epoch_002"):
        state = trained.state(name)
        assert set(state) == {"version", "last_step", "data", "draws", *TO_RESUME}
        assert set(state) >= {"model", "ema", "optimizer", "step", "epoch", "config"}
        assert (state["step"], state["epoch"]) == {"epoch_002": (20, 2)}.get(name, (30, 3))
        assert state["config"]["UNET_DIM"] == 8


def test_best_is_the_lowest_validation_loss_of_the_ema_weights(run):
    run.train(EPOCHS=2)
    run.train(EPOCHS=3, LEARNING_RATE=1.0, accept_changes=True)  # which spoils the weights
    assert run.state()["config"]["LEARNING_RATE"] == 1.0
    points = run.scalars()["loss/val"]
    lowest = min(points, key=lambda point: point[1])
    best = load_checkpoint(run.folder / "checkpoints" / "best.pth")
    assert (best["step"], best["best_loss"]) == (lowest[0], pytest.approx(lowest[1], rel=1e-6))
    assert best["epoch"] != 3, "the test wants a run whose last epoch is not its best"

    settings = best["config"]
    model, diffusion = build_model(settings, len(best["classes"])), build_diffusion(settings)
    model.load_state_dict(best["ema"])
    errors = []
    for x_0, t, eps, _ in build_validation(settings, DeviceImages(open_images(settings, "val"), "cpu")):
        abar = diffusion.alphas_cumprod[t].float()[:, None, None, None]
        with torch.no_grad():
            error = (model.eval()(abar.sqrt() * x_0 + (1 - abar).sqrt() * eps, t) - eps).square().mean((1, 2, 3))
        errors.append(error * (5 * (1 - abar) / abar).flatten().clamp(max=1))
    assert torch.cat(errors).mean().item() == pytest.approx(best["best_loss"], rel=1e-4)


@pytest.mark.parametrize("kind", ["trained", "trained_with_classes"])
def test_the_preview_is_the_sheet_that_sample_py_draws(run, kind, request):
    """With classes it is guided, and their names stand under the pictures."""
    trained = request.getfixturevalue(kind)
    epoch = trained.folder / "checkpoints" / "epoch_002.pth"
    guidance = ["--guidance", config.PREVIEW_GUIDANCE] if kind == "trained_with_classes" else []
    words = ["--checkpoint", epoch, "--num_samples", 4, "--steps", 3, "--precision", "fp32", "--output_dir", "drawn"]
    run.sample(*words, *guidance)
    paths = (trained.folder / "outputs/samples/epoch_002.png", run.folder / "drawn/grid.png")
    preview, sheet = (np.array(Image.open(path)).astype(int) for path in paths)
    assert preview.shape == sheet.shape and abs(preview - sheet).max() <= 1


def test_a_run_of_a_handful_of_steps_looks_at_itself_in_proportion(run):
    """At most ten passes of the network for each image it trains on; a picture of the preview takes 2 x 3 of them."""
    run.train(max_steps=1, BATCH_SIZE=1)
    assert run.state("best")["draws"] == 10
    run.to("longer").train(max_steps=3, BATCH_SIZE=1)
    names = ("outputs/samples/step_000001.png", "longer/outputs/samples/step_000003.png")
    one, four = (Image.open(run.folder / name).size for name in names)
    assert one < four


# --- TensorBoard --------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["logs", "logs/tensorboard"])
def test_tensorboard_shows_curves_grids_and_settings_from_either_folder(trained, folder):
    folders = [path.parent for path in (trained.folder / folder).rglob("events.out.tfevents.*")]
    assert folders, f"TensorBoard finds no events below {folder}"
    tags = trained.events(os.path.relpath(folders[0], trained.folder)).Tags()
    assert set(tags["scalars"]) == {
        *("loss/train", "loss/val", *(f"loss_by_t/t {q}" for q in ("0-12", "13-24", "25-37", "38-49"))),
        *("optimizer/learning_rate", "optimizer/gradient_norm", "progress/epoch"),
        *("speed/images_per_second", "speed/peak_memory_GiB"),
    }
    assert set(tags["images"]) == {"samples/ema", "samples/raw"}
    assert tags["tensors"] == ["settings/text_summary"]


def test_points_stand_where_the_settings_say(trained):
    curves, grids = trained.scalars(), trained.grids()
    assert [step for step, _ in curves["loss/train"]] == list(range(3, 31, 3))
    assert curves["progress/epoch"] == [(10, 1.0), (20, 2.0), (30, 3.0)]
    assert [step for step, _ in grids["samples/ema"]] == [step for step, _ in grids["samples/raw"]] == [20, 30]
    settings = trained.events().Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| --unet_dim | 8 |" in settings and "| --class_conditional | false |" in settings
    assert "| --epochs | 3 |" in settings and "_path" not in settings and "--data_url" not in settings


# --- as a user starts it ------------------------------------------------------------------------------


def start(folder, *words):
    """python WORDS ... in that folder, as a process of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *words], cwd=folder, **pipes)


def test_a_process_started_from_the_shell_ends_with_the_weights_of_a_fork(run, trained):
    with start(run.folder, ROOT / "train.py", *run.flags()) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.endswith("Done: step 30. Draw pictures with: python sample.py --checkpoint checkpoints/best.pth\n")
    assert differences(run.state(), trained.state()) == []


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux to see how far the process is")
@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_ctrl_c_while_torch_is_imported_shows_no_traceback(tmp_path, script):
    with start(tmp_path, ROOT / script) as process:
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGINT
    assert out == err == ""


def test_each_script_takes_a_list_and_runs_in_a_thread_as_in_a_notebook(run, monkeypatch):
    """wandb/wandb issue 834: signal only works in main thread."""
    monkeypatch.chdir(run.folder)
    calls = [(train, [*run.flags(), "--max_steps", 3]), (sample, ["--num_samples", 2]), (evaluate, ["--loss"])]
    calls += [(export, ["--weights_only"]), (export, ["--help"]), (export, ["--nope"])]
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.extend(script.main(argv) for script, argv in calls))
    thread.start()
    thread.join(120)
    assert codes == [0, 0, 0, 0, 0, 2]
