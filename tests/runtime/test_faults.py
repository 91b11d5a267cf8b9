"""Each row of the table in docs/reliability.md, brought about for real: the sentence, the exit code, what is kept."""

import contextlib
import inspect
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from src.runtime.checkpoint import load_checkpoint
from tests.data.test_download import DATA
from tests.runs import differences, signal_at
from tests.runtime import faults_data, faults_disk, faults_download  # noqa: F401 (their rows)
from tests.runtime.faults import DOCUMENT, FAULTS, ROWS, as_pattern
from tests.runtime.faults_run import GPU_IS_FULL, INFINITE, TERMINAL_GONE, stopped_while_decoding


def test_each_row_has_a_test_and_each_test_a_row():
    assert sorted(row.fault for row in ROWS) == sorted(FAULTS)


@pytest.mark.parametrize(("codes", "starts"), [([143, 137, 0], 3), ([143, 1], 2), ([2], 1), ([130], 1)])
def test_the_loop_for_pre_empted_machines_starts_again_after_a_kill_alone(tmp_path, codes, starts):
    loop = re.search(r"```bash\n(.*)\n```", DOCUMENT)[1]
    python = f"codes=({' '.join(map(str, codes))}); python() {{ echo start; return ${{codes[$((n++))]}}; }}; sleep() {{ :; }};"
    assert subprocess.run(["bash", "-c", python + loop], capture_output=True, text=True).stdout == "start\n" * starts


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.fault)
def test_fault(row, request):
    bring_about = FAULTS[row.fault]
    parameters = inspect.signature(bring_about).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    process = bring_about(**{name: request.getfixturevalue(name) for name in needed})
    lines = (process.out + process.err).splitlines()
    assert "Traceback" not in process.err, process.err
    assert (128 - process.code if process.code < 0 else process.code) == row.code, lines
    if row.sentence:
        assert any(re.fullmatch(as_pattern(row.sentence), line) for line in lines), "\n".join([row.sentence, "", *lines])
    if row.sentence.startswith(("train.py: ", "sample.py: ")):
        said = [line for line in process.err.splitlines() if line and "finishing the" not in line]
        assert len(said) == 1, f"more than the one sentence:\n{process.err}"


# --- what the table has no room for -------------------------------------------------------------------


def test_ctrl_c_while_pictures_are_decoded_is_quiet(run):
    process = stopped_while_decoding(run, signal.SIGINT)
    assert process.code == 130
    assert process.err == "train.py: Stopped at once. What was saved before is kept; the same command goes on.\n"


def test_ctrl_c_twice_amid_a_save_leaves_whole_checkpoints(run):
    """The second one raises inside a write that torch's C++ code asked for."""
    run.train(max_steps=10)
    setup = """
import os, signal, torch

class UnderFire:
    def __init__(self, file):
        self.file, self.writes, self.flush = file, 0, file.flush

    def write(self, data):
        self.writes += 1
        if self.writes == 20:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return self.file.write(data)

save = torch.save
torch.save = lambda state, file: save(state, UnderFire(file))
"""
    said = run.train(setup, SAVE_MINUTES=1e-9, code=130).err
    assert said.endswith("\ntrain.py: Stopped at once. What was saved before is kept; the same command goes on.\n")
    assert {load_checkpoint(run.folder / name)["step"] for name in run.files("*.pth")} == {10}
    assert not run.files(".*part-*")


def test_a_signal_amid_a_download_keeps_what_has_arrived(run, server):
    url = f"{server.url}/always-stall/a.zip"
    process = run.start_train(DATASET="tiny-imagenet", DATA_PATH="data/tiny-imagenet-200", DATA_URL=url, DATA_SIZE=0)
    part = run.folder / "data" / "tiny-imagenet-200.zip.part"
    process.wait(lambda: part.exists() and part.stat().st_size > 0)
    process.send(signal.SIGTERM)
    assert process.wait().code == 143
    assert process.err == "train.py: Stopped at once. What was saved before is kept; the same command goes on.\n"
    assert DATA.startswith(part.read_bytes())


def test_a_signal_that_the_starter_ignores_stays_ignored_as_under_nohup(run):
    run.train("import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)" + signal_at(3, 0, "SIGHUP"), max_steps=5)


def test_a_closed_terminal_ends_the_run_as_sigterm_does(run):
    """The terminal of its own session: the kernel sends SIGHUP, and every line to it fails."""
    made = "os.openpty()\n"
    run.train(TERMINAL_GONE.replace(made, f"{made}os.open(os.ttyname(theirs), os.O_RDWR)\n"), code=129)
    assert run.state()["step"] == 4


def test_a_step_that_is_not_finite_leaves_the_state_before_it(run):
    whole, bad = run.to("whole"), run.to("bad")
    whole.train(max_steps=13)
    process = bad.start_train(INFINITE, SAVE_MINUTES=1e-9).wait()
    assert process.code == 1 and "step 14 is not finite" in process.err
    assert set(differences(bad.state(), whole.state())) <= {"last_step", "best_loss"}  # the end that was aimed at, and its loss


def test_advice_that_is_followed_helps(run, trained):
    """The flags that the sentence on memory gives are accepted, and the run goes on."""
    run.train(max_steps=10)
    advice = run.train(GPU_IS_FULL, code=1).err
    batch, passes = map(int, re.search(r"--batch_size (\d+) --grad_accum_steps (\d+)", advice).groups())
    run.train(BATCH_SIZE=batch, GRAD_ACCUM_STEPS=passes)
    torch.testing.assert_close(run.state()["ema"], trained.state()["ema"], atol=1e-2, rtol=0)


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A disk in memory; the test is skipped where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


needs_mount = pytest.mark.skipif(not shutil.which("mount"), reason="there is no mount here")


@needs_mount
def test_a_disk_that_fills_up_keeps_whole_checkpoints_and_room_lets_the_run_go_on(run, trained):
    size = len(trained.files("latest.pth")["checkpoints/latest.pth"])
    with mounted(run.folder / "checkpoints", f"size={size * 4.5:.0f}") as folder:
        process = run.train(code=1)
        assert "No space left on device" in process.err
        assert re.search(r"takes about (\d+) MB", process.err)
        assert {load_checkpoint(path)["step"] for path in folder.glob("*.pth")} == {10, 20}
        assert not list(folder.glob(".*part-*"))
        subprocess.run(["mount", "-o", "remount,size=50m", folder], check=True)
        run.train()
        assert differences(run.state(), trained.state()) == []


@needs_mount
def test_a_cache_on_a_read_only_disk_is_read(run):
    with mounted(run.folder / "cache", "size=10m") as folder:
        run.train(max_steps=1, CACHE_PATH="cache")
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        run.train(max_steps=2, CACHE_PATH="cache")
        assert "Read-only file system" in run.train(CACHE_PATH="cache", IMAGE_SIZE=16, RUN="other", code=1).err
