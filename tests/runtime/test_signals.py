"""Signals: met where nothing is lost, told at once, and left alone where they are not ours."""

import contextlib
import os
import signal
import sys
import threading
from types import SimpleNamespace

import pytest

from src.runtime.distributed import World
from src.runtime.signals import StopRequest, run_script
from src.utils import FlagError, UserError


def send(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))


def test_outside_a_task_a_signal_raises_at_once():
    with pytest.raises(KeyboardInterrupt), StopRequest():
        send("SIGTERM")


def test_inside_a_task_it_waits_and_says_once_what_for(capfd):
    with StopRequest() as stop, stop.postponed("step"):
        with stop.postponed("validation"):
            send("SIGUSR2")
            send("SIGUSR2")
        assert stop.agree(World()) and stop.signal == signal.SIGUSR2
    assert capfd.readouterr().err.strip() == "SIGUSR2: finishing the validation, then saving. A second Ctrl-C stops at once."


def test_a_second_ctrl_c_raises(capfd):
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop, stop.postponed("step"):
        send("SIGINT")
        send("SIGINT")
    assert stop.signal == signal.SIGINT


def test_a_signal_that_the_block_swallowed_is_raised_at_its_end():
    swallowed = contextlib.suppress(KeyboardInterrupt)  # as a destructor does
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop, stop.at_once(), swallowed:
        send("SIGTERM")


def test_handlers_are_put_back_and_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop, stop.postponed("step"):
            send("SIGHUP")
            assert stop.signal is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_no_handler_is_touched():
    """As in a notebook's worker or a web service: Python allows handlers in the main thread alone."""
    before, codes = signal.getsignal(signal.SIGTERM), []

    def body(stop: StopRequest) -> None:
        assert signal.getsignal(signal.SIGTERM) is before
        with stop.at_once(), stop.postponed("step"):
            pass

    thread = threading.Thread(target=lambda: codes.append(run_script("train.py", body, "stopped")))
    thread.start()
    thread.join(60)
    assert codes == [0] and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "error, code, says",
    [
        (UserError("Fix it."), 1, "train.py: Fix it."),
        (FlagError("--flag: got 1."), 2, "train.py: --flag: got 1."),
        (ModuleNotFoundError("x", name="tensorboard"), 1, "train.py: tensorboard is not installed."),
        (MemoryError(), 1, "train.py: Less memory, please."),
        (FloatingPointError("The prediction is not finite in step 3"), 1, "in step 3. Try --precision fp32"),
        (KeyboardInterrupt(), 130, "train.py: Stopped."),
    ],
)
def test_what_the_user_can_fix_ends_in_one_sentence_and_an_exit_code(capfd, error, code, says):
    def body(stop: StopRequest) -> None:
        stop.out_of_memory = "Less memory, please."
        raise error

    assert run_script("train.py", body, "Stopped.") == code
    said = capfd.readouterr().err
    assert says in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("world", ["RANK=first WORLD_SIZE=2", "RANK=3 WORLD_SIZE=1"])
def test_a_process_whose_rank_says_nothing_speaks_for_itself(capfd, monkeypatch, world):
    for pair in world.split():
        monkeypatch.setenv(*pair.split("="))

    def body(stop: StopRequest) -> None:
        raise FlagError("Got 1.")

    assert run_script("train.py", body, "") == 2
    assert capfd.readouterr().err == "train.py: Got 1.\n"


def test_a_third_ctrl_c_meets_no_handler_of_ours_while_the_message_is_printed(monkeypatch):
    before, met = signal.getsignal(signal.SIGTERM), []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=lambda text: met.append(signal.getsignal(signal.SIGTERM))))
    assert run_script("train.py", lambda stop: send("SIGTERM"), "Stopped.") == 143
    assert set(met) == {before}


def test_a_bug_of_ours_is_a_traceback():
    def body(stop: StopRequest) -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        run_script("train.py", body, "")
