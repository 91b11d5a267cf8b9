"""Checkpoints: whole or not there, opened without running code, and refused with the way out where they do not fit."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from src.dataset import Images
from src.ema import EMA
from src.runtime.checkpoint import (
    TO_RESUME,
    VERSION,
    Checkpoints,
    DamagedCheckpoint,
    Progress,
    find_latest,
    load_checkpoint,
    load_weights,
)
from src.runtime.distributed import World
from src.runtime.folders import lock_folder
from src.runtime.monitor import Meter
from src.runtime.resume import FREE, TUNABLE, check_data, check_resume
from src.runtime.settings import KINDS, resolve
from src.utils import UserError
from tests.runs import Code, same, signal_at


@pytest.fixture(scope="module")
def settings():
    import config

    return resolve(config, ["--dataset", "shapes"]).settings


def images(train: int, val: str = "0" * 16) -> dict[str, Images]:
    """So many training images, and validation images with that fingerprint."""
    return {
        split: Images(np.zeros(count), torch.zeros(count), ["a"], ["a"], Path(), fingerprint)
        for split, count, fingerprint in (("train", train, f"{train:016}"), ("val", 3, val))
    }


class Parts:
    """The objects of a run, as small as they can be: a network of one layer that has made one step."""

    def __init__(self, size: int = 4):
        self.model = nn.Linear(size, size)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.model(torch.ones(1, size)).sum().backward()
        self.optimizer.step()
        self.table = {
            "model": self.model,
            "ema": EMA(self.model, 0.9).model,
            "optimizer": self.optimizer,
            "scaler": torch.amp.GradScaler("cpu", enabled=False),
            "meter": Meter(10, torch.device("cpu")),
        }

    def checkpoints(self, folder: Path, settings, progress: Progress, saved=None) -> Checkpoints:
        settings = replace(settings, CHECKPOINT_PATH=str(folder))
        return Checkpoints(settings, World(), images(4), progress, self.table, saved)

    def save(self, path: Path, settings, step: int = 3) -> Path:
        self.checkpoints(path.parent, settings, Progress(30, 3, step, 0.5)).save(path.stem)
        return path


# --- saving -------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded_to_the_last_bit(tmp_path, settings):
    parts = Parts()
    state = load_checkpoint(parts.save(tmp_path / "latest.pth", settings))
    assert state.keys() == {"version", "last_step", "data", "draws", *TO_RESUME}
    assert same(state["model"], dict(parts.model.state_dict()))
    assert same(state["optimizer"], parts.optimizer.state_dict())
    assert state["config"] == replace(settings, CHECKPOINT_PATH=str(tmp_path))
    assert same(load_checkpoint(tmp_path / "latest.pth", mmap=True), state)


def test_what_one_writes_the_other_restores(tmp_path, settings):
    first, second, progress = Parts(), Parts(), Progress(30, 3)
    for parts in (first, second):
        parts.table["counter"] = Meter(10, torch.device("cpu"))  # a new part is one entry
    first.table["counter"].norms += 7
    first.save(tmp_path / "latest.pth", settings)
    saved = load_checkpoint(tmp_path / "latest.pth")
    again = second.checkpoints(tmp_path, settings, progress, saved)
    assert progress == Progress(30, 3, 3, 0.5) and second.table["counter"].norms.tolist() == [7, 7]
    again.save("again")
    assert same(load_checkpoint(tmp_path / "again.pth"), saved)


def test_latest_keeps_one_predecessor(tmp_path, settings):
    for step in (1, 2, 3):
        Parts().save(tmp_path / "latest.pth", settings, step)
    steps = {path.name: load_checkpoint(path)["step"] for path in tmp_path.iterdir()}
    assert steps == {"latest.pth": 3, "latest.previous.pth": 2}


def test_what_a_killed_run_left_half_written_is_removed_and_nothing_else(tmp_path):
    mine = [".mail.part-1", ".my.part-of-it", "latest.pth", "notes.part-1"]
    for name in (".latest.pth.part-0f17ab42", ".latest.previous.pth.part-link", ".ddpm.lock", *mine):
        (tmp_path / name).touch()
    with lock_folder(tmp_path, "--checkpoint_path"):
        assert sorted(os.listdir(tmp_path)) == sorted([".ddpm.lock", *mine])
    assert sorted(os.listdir(tmp_path)) == mine, "and the lock goes with the run"


# --- loading ------------------------------------------------------------------------------------------


def test_a_pickle_with_code_is_refused_and_the_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"version": 1, "model": Code()}, tmp_path / "zip.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Code()))
    for name, says in (("zip.pth", "holds Python objects, which could run code"), ("raw.pth", "not a whole checkpoint")):
        for mmap in (False, True):
            with pytest.raises(UserError, match=says):
                load_checkpoint(tmp_path / name, mmap=mmap)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path, settings, share):
    path = Parts(64).save(tmp_path / "latest.pth", settings)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DamagedCheckpoint, match=r"latest.pth is (not a whole checkpoint|empty)"):
        load_checkpoint(path)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no such device")
def test_a_device_that_never_ends_is_not_read():
    with pytest.raises(DamagedCheckpoint, match="/dev/zero is not a whole checkpoint"):
        load_checkpoint(Path("/dev/zero"))


def written(path: Path, content) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"version": "2.1.0", "state_dict": {}}, "is a file of another program"),
        (torch.zeros(2), "is a file of another program"),
        ({"version": VERSION, "model": {}}, "lacks config, classes, class_ids, ema, step"),
    ],
)
def test_a_file_that_is_no_checkpoint_of_this_program_is_told_from_a_damaged_one(tmp_path, content, says):
    with pytest.raises(UserError, match=says) as caught:
        load_checkpoint(written(tmp_path / "latest.pth", content))
    assert not isinstance(caught.value, DamagedCheckpoint)


def test_weights_of_another_network_name_the_first_difference():
    with pytest.raises(UserError, match=r"src/model.py \(size mismatch for weight.*Undo what was changed"):
        load_weights(nn.Linear(3, 3), nn.Linear(2, 3).state_dict())
    with pytest.raises(UserError, match=r'Missing key\(s\) in state_dict: "bias"'):
        load_weights(nn.Linear(3, 3), nn.Linear(3, 3, bias=False).state_dict())


# --- the state to resume from -------------------------------------------------------------------------


def test_a_latest_that_is_whole_but_not_ours_is_refused_and_not_passed_over(tmp_path, settings):
    written(tmp_path / "latest.pth", {"version": VERSION + 1})
    Parts().save(tmp_path / "best.pth", settings)
    with pytest.raises(UserError, match="Update it"):
        find_latest(tmp_path)
    assert (tmp_path / "latest.pth").exists()


# --- settings that contradict the checkpoint ----------------------------------------------------------

OTHER = {"DATA_SIZE": 1, "DATA_MD5": "", "DATA_URL": "http://a.b/c", "NUM_WORKERS": 0, "COMPILE": "false", "DEVICE": "cpu"}


def changed(settings, name: str):
    """The settings with another value of one of them, whatever its type."""
    value = getattr(settings, name)
    if name in OTHER:
        return replace(settings, **{name: OTHER[name]})
    if isinstance(value, bool):
        return replace(settings, **{name: not value})
    if isinstance(value, (int, float)):
        return replace(settings, **{name: value + 1})
    return replace(settings, **{name: (*value, 1) if isinstance(value, tuple) else f"{value}2"})


@pytest.mark.parametrize("name", KINDS)
def test_a_setting_is_free_or_asks_for_accept_changes_or_is_refused(settings, name):
    new = changed(settings, name)
    for accept_changes in (False, True):
        if name in FREE or (name in TUNABLE and accept_changes):
            check_resume(settings, new, accept_changes)
            continue
        with pytest.raises(UserError, match=rf"other settings \({name} .* -> .*\)") as caught:
            check_resume(settings, new, accept_changes)
        assert f"--{name.lower()}" in str(caught.value) and "start anew under another name" in str(caught.value)
        assert ("--accept_changes" in str(caught.value)) == (name in TUNABLE)


def test_what_names_places_speed_or_rhythm_is_free_and_what_makes_the_network_is_not():
    assert {"EPOCHS", "SAVE_EVERY", "PRECISION", "DEVICE", "LOG_PATH"} <= FREE
    assert not {"UNET_DIM", "PREDICTION", "SEED", "TIME_STEPS", "DATASET", "IMAGE_SIZE"} & (FREE | TUNABLE)


# --- images that are not those of the checkpoint ------------------------------------------------------


def test_other_images_are_refused_with_their_counts_and_accepted_on_request(tmp_path, settings, capsys):
    saved = load_checkpoint(Parts().save(tmp_path / "latest.pth", settings))
    check_data(saved, settings, images(4), False)
    check_data({name: entry for name, entry in saved.items() if name != "data"}, settings, images(5), False)  # an older one
    assert capsys.readouterr().out == ""
    for data, says in ((images(3), "train 4 -> 3"), (images(4, "1"), "val 3 -> 3 others")):
        with pytest.raises(UserError, match=rf"other images \({says}\)\. .*--accept_changes; .*--run NAME"):
            check_data(saved, settings, data, False)
        check_data(saved, settings, data, True)
        assert f"note: going on with other images ({says})" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state | {"data": {"val": {}}}, "was measured on other images"),
        (lambda state: state | {"config": replace(state["config"], VAL_IMAGES=7)}, ""),  # there are three
        (lambda state: state | {"config": replace(state["config"], VAL_IMAGES=2)}, "was measured by 500 draws, not 501"),
        (lambda state: state | {"draws": 40}, "was measured by 42 draws, not 501"),
        (lambda state: state | {"version": 1}, "was measured by an older version of this program"),
        (lambda state: {name: entry for name, entry in state.items() if name != "data"}, ""),  # it is not known
        (lambda state: state | {"data": state["data"] | {"train": {}}}, ""),
    ],
)
def test_a_best_loss_of_another_measure_is_not_compared(tmp_path, settings, capsys, change, says):
    saved, progress = load_checkpoint(Parts().save(tmp_path / "latest.pth", settings)), Progress(30, 3)
    Parts().checkpoints(tmp_path, settings, progress, change(saved))
    assert progress == Progress(30, 3, 3, float("inf") if says else 0.5)
    out = capsys.readouterr().out
    assert (f"best.pth is chosen anew: the lowest validation loss so far, 0.50000, {says}" in out) if says else out == ""


# --- one run at a time --------------------------------------------------------------------------------


def test_the_lock_is_free_again_once_its_process_is_gone_however_it_went(run):
    first = run.start_train(signal_at(3, 0, "SIGSTOP"))
    first.wait(lambda: (run.folder / "checkpoints/.ddpm.lock").exists() and "saves to" in first.out)
    refused = run.train(code=1).err
    assert f"checkpoints is in use by process {first.pid} on " in refused
    assert f"outputs is in use by process {first.pid} on " in run.train(CHECKPOINT_PATH="others", code=1).err
    assert not (run.folder / "others").exists()
    first.send(9)
    first.wait()
    run.train(max_steps=2)
