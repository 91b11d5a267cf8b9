"""A long job is heard of: by a bar on a terminal, elsewhere by a line a minute."""

import re
from types import SimpleNamespace

import pytest

from src import progress
from tests.test_house import MODULES


@pytest.mark.parametrize(
    "options, first",
    [
        (dict(desc="decoding", unit=" image", total=200), "decoding: image 60 of 200"),
        (dict(desc="a.zip", unit="B", total=9000, initial=5000, unit_scale=True), "a.zip: byte 5,060 of 9,000"),
        (dict(unit="step"), "step 60"),
        (dict(unit="step", disable=True), None),
    ],
)
def test_without_a_terminal_there_is_a_line_a_minute(monkeypatch, capsys, options, first):
    monkeypatch.setattr(progress, "time", clock := SimpleNamespace(now=0, monotonic=lambda: clock.now))
    bar = progress.Bar(**options)
    for clock.now in range(1, 201):
        bar.update()
    said = capsys.readouterr()
    assert said.err == "" and said.out.splitlines()[:1] == ([first] if first else [])
    assert len(said.out.splitlines()) == (3 if first else 0)


def test_a_run_and_its_pictures_are_heard_of(run):
    every = "import src.progress; src.progress.SECONDS_PER_LINE = 0"
    said = run.train(every, max_steps=10, CACHE_PATH="cache").out
    said += run.sample("--num_samples", 2, "--npz", setup=every).out
    figures = r"step 4 of 10: loss \d\.\d{4}, [\d,.]+ images/s, [\d.]+ GiB"
    for line in (figures, "decoding: image 64 of 80", r"validation: batch 1 of \d+", "preview: batch 1 of 1", "step 20 of 20"):
        assert re.search(f"(?m)^{line}$", said), line


def test_no_job_has_a_bar_of_another_kind():
    users = {name for name, path in MODULES.items() if "import tqdm" in path.read_text(encoding="utf-8")}
    assert users == {"src.progress", "src.diffusion"}
