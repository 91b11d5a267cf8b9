"""Names of files and classes that are no ASCII, or no UTF-8: whole runs on a terminal that can print neither."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from src.runtime.checkpoint import find_latest, load_checkpoint
from tests.runs import ROOT, Runner, same

POSIX = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture
def odd(tmp_path):
    """A folder whose name is not UTF-8."""
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    try:
        os.mkdir(path)
    except OSError:
        pytest.skip("this file system takes names in UTF-8 alone")
    return path


def test_a_run_with_such_names_trains_goes_on_and_draws(run, odd):
    pictures = os.path.join(odd, b"pictures")
    shutil.copytree(os.fsencode(run.pictures), pictures)
    first, second, *_ = sorted(os.listdir(pictures))
    for old, new in ((first, "日本語".encode()), (second, b"\xff\xfe")):
        os.rename(os.path.join(pictures, old), os.path.join(pictures, new))
    folder = os.path.join(pictures, "日本語".encode())
    os.rename(os.path.join(folder, min(os.listdir(folder))), os.path.join(folder, b"na\xefve.png"))

    def call(script: str, *words: str | bytes) -> str:
        command = [sys.executable, ROOT / script, *words]
        done = subprocess.run(command, cwd=odd, env=os.environ | POSIX, capture_output=True, timeout=120)
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr.decode(errors="replace")
        return done.stdout.decode("ascii")  # all that this terminal can print

    flags = run.flags(DATA_PATH=None, CACHE_PATH="cache", CLASS_CONDITIONAL=True, EPOCHS=2)
    call("train.py", *flags, "--data_path", pictures, "--max_steps", "13")
    out = call("train.py", *flags, "--data_path", pictures)
    assert "80 images of 4 classes" in out and "going on after step 13" in out
    checkpoint = os.path.join(odd, b"checkpoints", b"best.pth")
    call("sample.py", "--checkpoint", checkpoint, "--num_samples", "4", "--steps", "3", "--device", "cpu")
    drawn = os.path.join(odd, b"outputs", b"pictures", b"001")
    assert len(os.listdir(os.path.join(drawn, b"images"))) == 4 and os.path.exists(os.path.join(drawn, b"grid.png"))


def test_a_checkpoint_below_a_folder_of_such_a_name_opens_in_every_way(odd, trained: Runner):
    checkpoints = os.path.join(odd, b"checkpoints")
    shutil.copytree(os.fsencode(trained.folder / "checkpoints"), checkpoints)
    path = Path(os.fsdecode(checkpoints))
    assert same(load_checkpoint(path / "best.pth", mmap=True)["ema"], trained.state("best")["ema"])
    (path / "latest.pth").write_bytes(b"damaged")
    assert find_latest(path)["step"] == 30
