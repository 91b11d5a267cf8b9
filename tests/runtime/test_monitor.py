"""Means of the loss, and gradients that are not finite: they reach neither the means nor the weights."""

import re

import pytest
import torch
from torch import nn

import config
from src.runtime.flags import print_idle
from src.runtime.monitor import Meter
from src.runtime.plan import idle_flags, warnings_of
from src.runtime.settings import Settings, resolve
from src.utils import UserError
from train import stop_if_not_finite

CPU = torch.device("cpu")
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def resolved(words: str) -> Settings:
    return resolve(config, ["--dataset", "shapes", *words.split()]).settings


UNSAVED = resolved("--checkpoint_path ./none")


def guarded_step(gradient: float) -> tuple[Meter, nn.Parameter]:
    """Step number 1 of the fused Adam with this gradient, as train.py makes it."""
    weight, meter = nn.Parameter(torch.ones(3)), Meter(4, CPU)
    optimizer = torch.optim.Adam([weight], lr=0.1, fused=True)
    weight.grad = torch.full((3,), gradient)
    norm = nn.utils.clip_grad_norm_([weight], 1.0)
    optimizer.found_inf = meter.add_norm(norm, 1)
    optimizer.step()
    return meter, weight


@pytest.mark.parametrize("gradient", [torch.inf, -torch.inf, torch.nan, 1e30])  # the last: its square overflows
def test_a_step_that_is_not_finite_does_not_reach_the_weights_and_stops_the_run(gradient):
    meter, weight = guarded_step(gradient)
    assert torch.equal(weight, torch.ones(3))
    says = r"step 1 is not finite .*nothing was saved yet.*--learning_rate 5e-05 --accept_changes"
    with pytest.raises(UserError, match=says):
        stop_if_not_finite(UNSAVED, meter, NO_SCALER, 1e-4)


def test_a_finite_step_goes_through():
    meter, weight = guarded_step(1.0)
    assert torch.allclose(weight, torch.full((3,), 0.9))
    stop_if_not_finite(UNSAVED, meter, NO_SCALER, 1e-4)


def test_the_first_of_several_bad_steps_is_named():
    meter = Meter(4, CPU)
    for step, norm in ((4, 1.0), (5, torch.nan), (6, torch.nan), (7, 1.0)):
        meter.add_norm(torch.tensor(norm), step)
    with pytest.raises(UserError, match="step 5 "):
        stop_if_not_finite(UNSAVED, meter, NO_SCALER, 1e-4)


def test_under_fp16_scaling_a_bad_step_is_skipped_and_the_scale_falls_until_there_is_no_hope():
    weight, meter, scaler = nn.Parameter(torch.ones(3)), Meter(4, CPU), torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = torch.optim.Adam([weight], lr=0.1, fused=True)
    for scale in (2.0, 1.0, 0.5):
        scaler.scale(torch.ones(())).clone()  # which makes the scale
        weight.grad = torch.full((3,), torch.inf)
        scaler.unscale_(optimizer)
        optimizer.found_inf = meter.add_norm(torch.tensor(torch.inf), 1)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale and torch.equal(weight, torch.ones(3))
        if scale >= 1:
            stop_if_not_finite(UNSAVED, meter, scaler, 1e-4)
    with pytest.raises(UserError, match=r"overflow fp16 even unscaled.*--precision bf16 or fp32"):
        stop_if_not_finite(UNSAVED, meter, scaler, 1e-4)


def test_means_leave_out_what_is_not_finite():
    meter = Meter(4, CPU)
    meter.add(torch.tensor([1.0, torch.inf, 3.0, torch.nan]), torch.tensor([0, 1, 2, 3]))
    meter.add_norm(torch.tensor(torch.inf), 1)
    meter.add_norm(torch.tensor(5.0), 2)
    assert meter.read() == {"loss/train": 2.0, "loss_by_t/t 0-0": 1.0, "loss_by_t/t 2-2": 3.0, "optimizer/gradient_norm": 5.0}
    meter.add_norm(torch.tensor(torch.nan), 3)
    assert meter.read() == {}


@pytest.mark.parametrize(
    "words, last_step, steps_per_epoch, says",
    [
        ("", 100, 1, ["100 steps in all.*--max_steps 10000.*--preset small", "warm-up of 1,000 steps.*--warmup_steps 10"]),
        ("--warmup_steps 0", 1, 1, ["1 step in all"]),
        ("", 2100, 21, ["after every 21 steps.*--val_every 10"]),
        ("", 1999, 1999, ["1,999 steps in all", "warm-up of 1,000 steps"]),
        ("", 50_000, 6250, []),
        ("--preset demo", 3750, 625, []),
        ("--preset small", 18_000, 18, []),
        ("--class_conditional", 50_000, 6250, ["There is one class, all, .*--class_conditional false"]),
    ],
)
def test_a_run_that_cannot_work_is_warned_about_with_what_to_type(words, last_step, steps_per_epoch, says):
    classes = ["all"] if "class_conditional" in words else ["cat", "dog"]
    warnings = warnings_of(resolved(words), last_step, steps_per_epoch, classes=classes)
    assert len(warnings) == len(says) and all(re.search(pattern, text) for pattern, text in zip(says, warnings))
    for warning in warnings:  # what it tells to type ends it
        advice = warning.partition(". ")[2]
        for typed in re.findall(r"--(?!preset)\w+ \w+", advice):
            s, last = resolved(f"{words} {typed}"), int(typed.split()[1]) if "max_steps" in typed else last_step
            assert not any(advice in other for other in warnings_of(s, last, steps_per_epoch, classes=classes)), typed


@pytest.mark.parametrize(
    ("words", "step", "idle"),
    [
        ("--label_dropout 0.2 --preview_guidance 3", 0, "label_dropout preview_guidance"),
        ("--data_path x --data_size 5", 0, "data_path data_size"),
        ("--label_dropout 0.2 --preview_guidance 3 --class_conditional --dataset folder --data_path x", 0, ""),
        ("--init_from x --preview_steps 30 --time_steps 20", 0, "preview_steps"),
        ("--init_from x --accept_changes", 5, "init_from"),
        ("--accept_changes --skip_damaged", 0, "accept_changes skip_damaged"),
        ("--preview_guidance 3 --class_conditional --label_dropout 0", 0, "preview_guidance"),
        ("--dataset cifar10 --data_url http://x --data_size 0", 5, ""),
        ("--preset demo", 5, ""),
    ],
)
def test_what_is_typed_is_used_or_said_not_to_be(capsys, words, step, idle):
    run = resolve(config, ["--dataset", "shapes", *words.split()])
    print_idle(run.typed, idle_flags(run, step))
    assert re.findall("note: --([a-z_]+) has no effect", capsys.readouterr().out) == idle.split()
