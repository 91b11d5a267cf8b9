"""A resumed run is the same run: bit for bit on a CPU, wherever it stopped and however."""

import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import config
from src.batches import TrainBatches, validation_batches
from src.images import Images
from src.runtime.settings import Settings
from tests.runs import Runner, differences, same, signal_at

VARIANTS = {
    "plain": {},
    "two levels with attention, in bf16": {
        "IMAGE_SIZE": 16,
        "DIM_MULTS": (1, 2),
        "ATTENTION_RESOLUTIONS": (8,),
        "PRECISION": "bf16",
        "EPOCHS": 2,
    },
    "accumulation and dropout": {"BATCH_SIZE": 4, "GRAD_ACCUM_STEPS": 2, "DROPOUT": 0.2, "EPOCHS": 2},
    "classes, hidden at times, predicting v": {
        "CLASS_CONDITIONAL": True,
        "LABEL_DROPOUT": 0.3,
        "PREDICTION": "v",
        "EPOCHS": 2,
    },
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
    run.train(max_steps=step)
    assert run.state()["step"] == step
    assert f"going on after step {step}" in run.train().out
    assert_same_run(run, uninterrupted("plain"))


@pytest.mark.parametrize("variant", list(VARIANTS)[1:])
def test_every_kind_of_run_goes_on_as_if_it_had_not_stopped(run, uninterrupted, variant):
    settings = VARIANTS[variant]
    run.train(max_steps=4, **settings)
    last_pass = settings.get("GRAD_ACCUM_STEPS", 1) - 1
    run.train(signal_at(11, last_pass, "SIGTERM"), code=143, **settings)
    assert run.state()["step"] == 12, "the step in hand was not finished"
    run.train(**settings)
    assert_same_run(run, uninterrupted(variant))


SLOW_VALIDATION = """
import os, signal, time, src.batches

batches = src.batches.validation_batches

def slow_batches(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(300)
    yield from batches(*args)

src.batches.validation_batches = slow_batches
"""
SLOW_PREVIEW = """
import os, signal, time, src.pictures

def slow_draw(*args, **options):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(300)

src.pictures.draw = slow_draw
"""


@pytest.mark.parametrize(("setup", "step", "code"), [(SLOW_VALIDATION, 10, 143), (SLOW_PREVIEW, 20, 130)])
def test_a_signal_does_not_wait_for_the_end_of_a_validation_or_preview_and_the_next_start_makes_up_for_it(
    run, uninterrupted, setup, step, code
):
    stopped = run.train(setup, code=code)
    assert f"Stopped after step {step} of 30" in stopped.out
    state = run.state()
    assert (state["step"], state["epoch"]) == (step, step // 10 - 1)
    run.train()
    assert_same_run(run, uninterrupted("plain"))


def test_a_signal_in_the_preview_of_the_last_epoch_leaves_a_run_that_is_not_yet_done(run, uninterrupted):
    run.train(max_steps=20)
    assert "Stopped after step 30 of 30" in run.train(SLOW_PREVIEW, code=130).out
    assert "Done: step 30" in run.train().out
    assert_same_run(run, uninterrupted("plain"))
    before = run.files("*.pth")
    assert "Done: step 30" in run.train().out
    assert run.files("*.pth") == before, "a finished run was touched"


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
    lost.wait(lambda: "held-out" in lost.out)
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


# --- randomness follows from (SEED, step) alone -------------------------------------------------------


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(run, uninterrupted):
    again, other = run.to("again"), run.to("other")
    again.train()
    assert differences(again.state(), uninterrupted("plain").state()) == []
    assert again.scalars() == uninterrupted("plain").scalars()
    other.train(SEED=1, EPOCHS=1)
    again_weights, other_weights = again.state("epoch_002")["model"], other.state("epoch_001")["model"]
    assert all(not torch.equal(weights, other_weights[name]) for name, weights in again_weights.items() if weights.ndim > 1)


def train_batches(**changes) -> TrainBatches:
    """Of 25 pictures that show their own number, 4 x 2 a step and so 3 steps an epoch."""
    numbers = torch.arange(25, dtype=torch.uint8)
    pictures = numbers[:, None, None, None].expand(25, 3, 8, 8).numpy()
    images = Images(pictures, numbers.long(), [str(i) for i in range(25)], [str(i) for i in range(25)], Path("none"))
    settings = {"BATCH_SIZE": 4, "GRAD_ACCUM_STEPS": 2, "CLASS_CONDITIONAL": True, "LABEL_DROPOUT": 0.0} | changes
    return TrainBatches(images.to("cpu"), Settings(**vars(config_constants()) | settings))


def config_constants() -> SimpleNamespace:
    return SimpleNamespace(**{name: getattr(config, name) for name in Settings._fields})


def test_a_batch_is_the_same_in_whatever_order_batches_are_asked_for():
    forwards, backwards = train_batches(), train_batches()
    places = [(step, micro) for step in range(7) for micro in range(2)]
    expected = {place: forwards(*place) for place in places}
    for place in reversed(places):
        assert same(tuple(expected[place]), tuple(backwards(*place)))


def test_an_epoch_shows_every_image_at_most_once_and_each_epoch_has_an_order_of_its_own():
    batches = train_batches()
    orders = [[batches(step, micro).y for step in range(3 * e, 3 * e + 3) for micro in range(2)] for e in range(20)]
    epochs = [torch.cat(order).tolist() for order in orders]
    assert all(len(set(epoch)) == len(epoch) == 24 for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 20
    assert set().union(*epochs) == set(range(25)), "an image is left out of every epoch"


def test_micro_batches_are_the_parts_of_the_step():
    parts, whole = train_batches(), train_batches(BATCH_SIZE=8, GRAD_ACCUM_STEPS=1)
    for step in range(4):
        for split, complete in zip(zip(parts(step, 0), parts(step, 1)), whole(step, 0)):
            assert torch.equal(torch.cat(split), complete)


def test_another_seed_gives_another_order_other_times_and_other_noise():
    for one, other in zip(train_batches(SEED=0)(0, 0), train_batches(SEED=1)(0, 0)):
        assert not torch.equal(one, other)


def test_labels_are_hidden_as_often_as_label_dropout_says():
    batches = train_batches(LABEL_DROPOUT=0.3)
    y = torch.cat([batches(step, micro).y for step in range(300) for micro in range(2)])
    assert (y == -1).float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_validation_batches_depend_neither_on_the_seed_nor_on_the_batch_size():
    train = train_batches()
    lists = [
        list(validation_batches(train.images, train.settings._replace(SEED=seed, BATCH_SIZE=size, VAL_IMAGES=20)))
        for seed, size in ((0, 4), (1, 7))
    ]
    one, other = ([torch.cat(parts) for parts in zip(*batches)] for batches in lists)
    assert same(one, other)
    assert sorted(one[1].tolist()) == [i * 1000 // 20 for i in range(20)], "times are not spread evenly"
