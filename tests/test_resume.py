"""A resumed run is the same run: bit for bit on a CPU, wherever it stopped and however."""

import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.runs import Runner, differences, same, signal_at

VARIANTS = {
    "plain": {},
    "attention, in bf16": dict(IMAGE_SIZE=16, DIM_MULTS=(1, 2), ATTENTION_RESOLUTIONS=(8,), PRECISION="bf16", EPOCHS=2),
    "accumulation and dropout": dict(BATCH_SIZE=4, GRAD_ACCUM_STEPS=2, DROPOUT=0.2, EPOCHS=2),
}


@pytest.fixture(scope="session")
def uninterrupted(zygote, pictures, tmp_path_factory):
    """uninterrupted(variant): the Runner of a run of that variant that nothing disturbed, each made once."""
    runners: dict[str, Runner] = {}

    def run(variant: str) -> Runner:
        if variant not in runners:
            runners[variant] = Runner(zygote, tmp_path_factory.mktemp("uninterrupted"), pictures)
            runners[variant].train(**VARIANTS[variant])
        return runners[variant]

    return run


def assert_same_run(run: Runner, other: Runner) -> None:
    """What the two left behind does not tell them apart: checkpoints, curves and grids."""
    assert run.files("*.pth").keys() == other.files("*.pth").keys()
    for name in ("latest", "best", *(Path(file).stem for file in other.files("epoch_*.pth"))):
        assert differences(run.state(name), other.state(name)) == [], name
    assert run.files("samples/*") == other.files("samples/*")
    assert run.scalars() == other.scalars()
    assert run.grids() == other.grids()


@pytest.mark.parametrize("step", [1, 10, 13, 20, 29])
def test_stopping_after_any_step_and_going_on_is_the_uninterrupted_run(run, uninterrupted, step):
    run.train(signal_at(step - 1, 0, "SIGTERM"), code=143)
    assert run.state()["step"] == step
    assert f"going on after step {step}" in run.train().out
    assert_same_run(run, uninterrupted("plain"))


def test_max_steps_ends_a_run_amid_an_epoch_with_all_that_an_end_has_and_it_goes_on_with_the_same_weights(run, uninterrupted):
    """Validated, previewed, considered for best.pth."""
    out = run.train(max_steps=13).out
    assert "epoch 1, step 13: validation loss" in out and "13 in all by --max_steps 13" in out
    assert [step for step, _ in run.scalars()["loss/val"]] == [10, 13]
    assert list(run.files("*.png")) == ["outputs/samples/step_000013.png"]
    assert run.state("best")["step"] == 13 and "epoch_001.pth" not in run.files("*.pth")
    run.train()
    ours, theirs = run.state(), uninterrupted("plain").state()
    assert [part for part in ("model", "ema", "optimizer", "step", "epoch") if not same(ours[part], theirs[part])] == []


@pytest.mark.parametrize("variant", list(VARIANTS)[1:])
def test_every_kind_of_run_goes_on_as_if_it_had_not_stopped(run, uninterrupted, variant):
    settings = VARIANTS[variant]
    run.train(signal_at(3, 0, "SIGTERM"), code=143, **settings)
    last_pass = settings.get("GRAD_ACCUM_STEPS", 1) - 1
    run.train(signal_at(11, last_pass, "SIGTERM"), code=143, **settings)
    assert run.state()["step"] == 12, "the step in hand was not finished"
    run.train(**settings)
    assert_same_run(run, uninterrupted(variant))


SLOW_VALIDATION = """
import os, signal
from src.diffusion import GaussianDiffusion

work = GaussianDiffusion.eps_losses

def interrupted(self, *args, **options):
    GaussianDiffusion.eps_losses = work  # once
    os.kill(os.getpid(), signal.SIGTERM)
    assert "finishing" in open("stderr.txt").read(), "it is not said at once"
    return work(self, *args, **options)

GaussianDiffusion.eps_losses = interrupted
"""
SLOW_PREVIEW = SLOW_VALIDATION.replace("eps_losses", "sample").replace("SIGTERM", "SIGINT")


def test_a_signal_waits_for_the_end_of_a_preview_and_says_so_at_once(run, uninterrupted):
    assert "finishing the preview, then saving" in run.train(SLOW_PREVIEW, code=130).err
    assert (run.state()["step"], run.state()["epoch"]) == (20, 2)
    run.train()
    assert_same_run(run, uninterrupted("plain"))


def test_other_micro_batches_of_the_same_effective_batch_go_on_with_nearly_the_same_run(run):
    settings = {"EPOCHS": 1, "LOG_EVERY": 1}
    whole, split = run.to("whole"), run.to("split")
    whole.train(BATCH_SIZE=8, GRAD_ACCUM_STEPS=2, **settings)
    split.train(BATCH_SIZE=8, GRAD_ACCUM_STEPS=2, max_steps=3, **settings)
    split.train(BATCH_SIZE=4, GRAD_ACCUM_STEPS=4, **settings)
    a, b = whole.state(), split.state()
    assert a["step"] == b["step"] == 5
    torch.testing.assert_close(a["ema"], b["ema"], atol=1e-4, rtol=0)
    losses, others = whole.scalars()["loss/train"], split.scalars()["loss/train"]
    assert [step for step, _ in others] == [1, 2, 3, 4, 5]
    assert [loss for _, loss in others] == pytest.approx([loss for _, loss in losses], rel=1e-3)


def test_the_curves_have_one_point_a_step_after_work_that_was_lost(run, uninterrupted):
    run.train(max_steps=10)
    lost = run.start_train(SAVE_MINUTES=0)  # points of steps 12, 15, ... are written, but no checkpoint
    lost.wait(lambda: "validation loss" in lost.out)
    lost.send(signal.SIGKILL)
    lost.wait()
    run.train()
    assert run.scalars() == uninterrupted("plain").scalars()


def test_an_earlier_epoch_is_gone_back_to_by_copying_it_over_latest(run, uninterrupted):
    run.train()
    checkpoints = run.folder / "checkpoints"
    shutil.copy(checkpoints / "epoch_002.pth", checkpoints / "latest.pth")
    assert "going on after step 20" in run.train().out
    assert_same_run(run, uninterrupted("plain"))
    before = run.files("*.pth")
    assert "Done: step 30" in run.train().out
    assert run.files("*.pth") == before, "a finished run was touched"


# --- randomness follows from (SEED, step) alone -------------------------------------------------------


def test_another_seed_gives_other_weights(run, uninterrupted):
    run.train(SEED=1, EPOCHS=1)
    ours, others = run.state("epoch_001")["model"], uninterrupted("plain").state("epoch_002")["model"]
    assert all(not torch.equal(weights, others[name]) for name, weights in ours.items() if weights.ndim > 1)
