"""SIGKILL at random instants: every checkpoint on disk loads, and the run ends as the uninterrupted one.

`KILLS=100 pytest -s tests/runtime/test_kill.py` kills as often and shows the count.
"""

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

from src.runtime.checkpoint import load_checkpoint
from tests.runs import Process, Runner, differences

KILLS = int(os.environ.get("KILLS", 6))
STEPS_PER_LIFE = 20  # more than a life lasts: the run is not to end before the last kill
# As the demo preset trains, on a smaller network. It saves after every step, so that it is saving most of the time.
SETTINGS = dict(CLASS_CONDITIONAL=True, PREDICTION="v", BETA_SCHEDULE="cosine", LOG_EVERY=2, SAVE_EVERY=5, SAMPLE_EVERY=5)


def where_it_died(process: Process, folder: Path) -> str:
    """What a run that was killed was doing, from what it left behind."""
    latest, previous = folder / "latest.pth", folder / "latest.previous.pth"
    if "logs in" not in process.out:
        return "starting"
    if list(folder.glob(".*.part-*")):  # the next start removes them
        return "inside a save"
    if latest.exists() and previous.exists() and latest.samefile(previous):
        return "inside a save"  # between giving latest.pth its second name and opening the new file
    return "in a step, or saving no checkpoint"


def wait_a_life(process: Process, latest: Path, dice: random.Random) -> None:
    """Let the process start, save up to 5 times, and go on until some instant before it would have saved again."""
    start, saves = time.monotonic(), dice.randrange(6)
    written = set()

    def has_saved() -> bool:
        if latest.exists():
            written.add(latest.stat().st_mtime_ns)
        return len(written) > saves

    process.wait(has_saved)
    time.sleep(dice.uniform(0, max(0.3, (time.monotonic() - start) / (saves + 1))))


def kill_again_and_again(run: Runner, kills: int, seed: int) -> Counter:
    """Start the run, kill it at a random instant, look at its checkpoints; `kills` times. Then let it end.
    Returns how many kills met it where, and under "checkpoints loaded" how many files were opened meanwhile."""
    dice, places = random.Random(seed), Counter()
    folder, epochs = run.folder / "checkpoints", kills * STEPS_PER_LIFE // 10
    for _ in range(kills):
        process = run.start_train(EPOCHS=epochs, SAVE_MINUTES=1e-9, **SETTINGS)
        wait_a_life(process, folder / "latest.pth", dice)
        process.send(signal.SIGKILL)
        assert process.wait().code == -signal.SIGKILL, f"it ended by itself:\n{process.out}{process.err}"
        assert process.err == ""
        places[where_it_died(process, folder)] += 1
        for path in folder.glob("*.pth"):
            load_checkpoint(path)  # raises where it is not whole
            places["checkpoints loaded"] += 1
    run.train(EPOCHS=epochs, **SETTINGS)
    return places


def test_killed_again_and_again_a_run_ends_as_the_uninterrupted_one(run):
    killed, calm = run.to("killed"), run.to("calm")
    places = kill_again_and_again(killed, KILLS, seed=0)
    print(f"{KILLS} kills: {places}")
    assert places["inside a save"] > 0
    calm.train(EPOCHS=KILLS * STEPS_PER_LIFE // 10, **SETTINGS)
    assert killed.files("*.pth").keys() == calm.files("*.pth").keys()
    for name in calm.files("*.pth"):
        if (stem := Path(name).stem) != "latest.previous":  # which may be of any step
            assert differences(killed.state(stem), calm.state(stem)) == [], stem
    assert killed.files("samples/*.png") == calm.files("samples/*.png")
    assert killed.scalars() == calm.scalars()
    assert killed.grids() == calm.grids()
    assert not killed.files("checkpoints/.*part*"), "half-written files stay for ever"
