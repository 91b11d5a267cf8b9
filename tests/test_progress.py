"""A long job is heard of: by a bar on a terminal, elsewhere by a line a minute."""

import re
from types import SimpleNamespace

import pytest

import config
from src import progress
from src.runtime.distributed import World
from src.runtime.monitor import work_of
from src.runtime.settings import resolve
from tests.test_house import MODULES


@pytest.mark.parametrize(
    "options, first",
    [
        (dict(desc="decoding", unit=" image", total=200), "decoding: image 11 of 200, 3 min 9 s to go"),
        (
            dict(desc="a.zip", unit="B", total=9000, initial=5000, unit_scale=True),
            "a.zip: byte 5,011 of 9,000, 1 h 6 min to go",
        ),
        (dict(unit="step"), "step 11"),
        (dict(unit="step", disable=True), None),
    ],
)
def test_without_a_terminal_there_is_a_line_after_ten_seconds_and_then_one_a_minute(monkeypatch, capsys, options, first):
    monkeypatch.setattr(progress, "time", clock := SimpleNamespace(now=0, monotonic=lambda: clock.now))
    bar = progress.Bar(**options)
    for clock.now in range(1, 201):
        bar.update()
    said = capsys.readouterr()
    assert said.err == "" and said.out.splitlines()[:1] == ([first] if first else [])
    assert len(said.out.splitlines()) == (4 if first else 0)


@pytest.mark.parametrize("first", [0, 400, 625])
def test_the_time_to_go_counts_validations_and_previews_in_from_the_second_step_on(monkeypatch, first):
    """In a run whose network calls take a thousandth of a second each, and whose first step compiles for a minute."""
    s = resolve(config, ["--preset", "demo", "--val_every", "2", "--sample_every", "3"]).settings
    monkeypatch.setattr(progress, "time", clock := SimpleNamespace(now=0.0, monotonic=lambda: clock.now))
    batches = SimpleNamespace(steps_per_epoch=125, images_per_step=16)
    last, ends, left = 4001, {}, {}
    work = work_of(s, World(), batches, SimpleNamespace(draws=[range(300), range(200)]), last)
    bar = progress.Bar(total=last, initial=first, unit="step", work=work)
    for n in range(first + 1, last + 1):
        clock.now += 3 * 16 / 1000 + 60 * (n == first + 1)
        bar.update()
        ends[n], left[n] = clock.now, bar.seconds_left()
        if n == last or n % 250 == 0:  # train.judge
            epoch = n // 125
            is_drawn = n == last or epoch // 3 > (epoch - 2) // 3
            clock.now += (500 + is_drawn * 2 * 20 * 20 * 2) / 1000  # two networks, 20 pictures, 20 steps, guided
    for n in range(first + 2, last):
        assert left[n] == pytest.approx(clock.now - ends[n], rel=1e-6)


def test_a_run_and_its_pictures_are_heard_of(run):
    every = "import src.progress; src.progress.SECONDS_PER_LINE = 0"
    said = run.train(every, max_steps=10, CACHE_PATH="cache").out
    said += run.sample("--num_samples", 2, "--npz", setup=every).out
    figures = r"step 4 of 10: loss \d\.\d{4}, [\d,.]+ images/s, [\d.]+ GiB, [\d.]+ s to go"
    for line in (figures, "decoding: image 64 of 80", r"validation: batch 1 of \d+", "preview: batch 1 of 1", "step 20 of 20"):
        assert re.search(f"(?m)^{line}$", said), line


def test_no_job_has_a_bar_of_another_kind():
    users = {name for name, path in MODULES.items() if "import tqdm" in path.read_text(encoding="utf-8")}
    assert users == {"src.progress", "src.diffusion"}
