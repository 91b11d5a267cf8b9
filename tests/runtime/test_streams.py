"""Output that cannot be written is lost, and nothing else: real shells, real pipes, and a disk that is always full."""

import io
import os
import subprocess
import sys

import pytest

from src.runtime.signals import run_script
from tests.runs import ROOT, ended
from tests.runtime.faults_run import CLOSED, DISK_FULL, READER_GONE


def shell(program: str, redirection: str, **variables: object) -> int:
    """The exit code of the program, not of what reads it. It imports no torch. PYTHONUNBUFFERED would hide faults."""
    program = "import os, sys\nfrom src.runtime.streams import unfailing_output\nwith unfailing_output():" + program
    environment = os.environ | {"PYTHONUNBUFFERED": "", "PYTHON": sys.executable, "PROGRAM": program}
    environment |= {name: str(value) for name, value in variables.items()}
    line = f'"$PYTHON" -c "$PROGRAM" {redirection}; exit ${{PIPESTATUS[0]}}'
    return subprocess.run(["bash", "-c", line], cwd=ROOT, env=environment, capture_output=True, timeout=60).returncode


@pytest.mark.parametrize(
    "redirection",
    ["| head -n 1", "2>&1 | head -n 1", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1", ">&-", "2>&-", "<&- >&- 2>&-"],
)
def test_no_output_that_fails_stops_a_program_or_changes_its_exit_code(tmp_path, redirection):
    program = """
    for i in range(3000):  # more than a pipe holds: head is gone before the end
        print("a line of thirty characters and", file=sys.stderr)
        print("a line of thirty characters and")
    with open(os.environ["KEPT"], "w") as file:
        print(file.fileno() > 2, file=file)
sys.exit(3)
"""
    assert shell(program, redirection, KEPT=tmp_path / "kept") == 3
    assert (tmp_path / "kept").read_text() == "True\n", "a file of ours has become the output"


def test_each_line_is_in_the_log_at_once_and_in_any_encoding(tmp_path):
    shell("print('café'); os.kill(os.getpid(), 9)", '> "$LOG"', PYTHONIOENCODING="ascii", LOG=tmp_path / "log")
    assert (tmp_path / "log").read_text() == "caf\\xe9\n"


def test_a_stream_of_the_host_may_fail_and_is_put_back(monkeypatch):
    monkeypatch.setattr(sys, "stdout", its_own := io.StringIO())
    its_own.close()
    assert run_script("train.py", lambda stop: print("a line"), "") == 0
    assert sys.stdout is its_own


@pytest.mark.parametrize(
    "script, argv, lost",
    [
        ("sample.py", ["--num_samples", 2, "--steps", 2], READER_GONE),
        ("evaluate.py", ["--loss"], DISK_FULL),
        ("export.py", ["--weights_only"], CLOSED),
    ],
)
def test_each_script_does_its_work_unheard(run, trained, script, argv, lost):
    checkpoint = trained.folder / "checkpoints" / "best.pth"
    ended(run.start(script, "--checkpoint", checkpoint, "--output_dir", "there", *argv, setup=lost), 0)
    assert os.listdir(run.folder / "there")
