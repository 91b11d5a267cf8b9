"""What the scripts settle before torch is imported: how OpenMP's threads wait, and how many there are."""

import os
import subprocess
import sys

import pytest
import torch

from src.runtime import early
from src.runtime.device import describe
from src.utils import count
from tests.runs import ROOT

IDLE, BUSY, ODD = "0.1 0.2 0.3 1/200 7", "0.1 0.2 0.3 99999/200 7", "no numbers"
PROGRAM = """
import os, pathlib, sys
from src.runtime import early
early.LOAD, early.CPU_MAX = (pathlib.Path(name) for name in sys.argv[1:])
early.settle()
print(*(os.environ.get(name) for name in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS")), "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    "load, cpu_max, given, expected",
    [
        (IDLE, "max 100000", {}, (early.SPINS, None)),
        (BUSY, "max 100000", {}, ("0", None)),  # as many threads as ever: the last bits of the weights depend on it
        (ODD, "", {}, (early.SPINS, None)),
        (IDLE, "150000 100000", {}, (early.SPINS, "1")),
        (IDLE, "50000 100000", {}, (early.SPINS, "1")),
        (IDLE, "99900000 100000", {}, (early.SPINS, str(early.cores()))),  # more than there are
        (BUSY, "100000 100000", {"OMP_NUM_THREADS": "2"}, ("0", "2")),
        (BUSY, "max 100000", {"GOMP_SPINCOUNT": "7"}, ("7", None)),
        (BUSY, "max 100000", {"OMP_WAIT_POLICY": "ACTIVE"}, (None, None)),
    ],
)
def test_threads_wait_for_a_short_time_and_beside_busy_processes_not_at_all(tmp_path, load, cpu_max, given, expected):
    files = [tmp_path / "loadavg", tmp_path / "cpu.max"]
    for file, text in zip(files, (load, cpu_max)):
        file.write_text(text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP", "GOMP"))} | given
    command = [sys.executable, "-c", PROGRAM, *files]
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout
    assert said.split() == [*map(str, expected), "False"]


@pytest.mark.parametrize("load, threads, says", [(IDLE, 2, ""), (BUSY, 1, ""), (ODD, 2, ""), (BUSY, 2, " (99998 of other")])
def test_the_device_line_says_what_to_try_on_a_busy_machine(tmp_path, monkeypatch, load, threads, says):
    (tmp_path / "loadavg").write_text(load)
    monkeypatch.setattr(early, "LOAD", tmp_path / "loadavg")
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    said = describe(torch.device("cpu"))
    assert said.startswith(f"CPU, {count(threads, 'thread')}{says}") and ("OMP_NUM_THREADS=1" in said) == bool(says)
