"""Names are taken by making them, refused commands leave nothing, and a run's checkpoint is found by its name."""

import re
import shutil
import threading
from itertools import islice
from pathlib import Path

import pytest

from src.utils import UserError, atomic_file, numbered, reading, take_free, writing


@pytest.mark.parametrize("is_folder", [True, False])
def test_of_many_that_look_at_once_each_gets_a_name_of_its_own(tmp_path, is_folder):
    together, found = threading.Barrier(8), list[Path]()

    def take():
        together.wait()
        found.append(take_free(numbered(tmp_path / "new" / "x.json"), is_folder))

    threads = [threading.Thread(target=take) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(found) == sorted(islice(numbered(tmp_path / "new" / "x.json"), 8)) == sorted((tmp_path / "new").iterdir())
    assert found[0].parent / "x-8.json" in found
    with pytest.raises(OSError):  # a file where their folder would be: no reason to try the next name for ever
        take_free(numbered(Path(__file__) / "x.json"), is_folder)


def put(path: Path, error: OSError | None = None) -> None:
    with atomic_file(path) as file:
        file.write(b"content")
        if error:
            raise error


FULL = OSError(28, "No space left on device")
AT_FAULT = {
    "c: it is a folder, and a file is needed. ": lambda folder: put(folder / "c"),
    "a: a file stands where a folder is needed. ": lambda folder: put(folder / "a/b"),
    "b: No space left on device. ": lambda folder: put(folder / "b", FULL),
    "x: File name too long. ": lambda folder: (folder / (256 * "x")).mkdir(),
    "gone: No such file or directory. ": lambda folder: (folder / "gone").read_text(),
}


@pytest.mark.parametrize("says", AT_FAULT)
def test_a_message_blames_the_file_at_fault_whatever_else_the_block_does(tmp_path, says):
    (tmp_path / "c").mkdir()
    for what, block in (("write to", writing(tmp_path, "--output_dir")), ("read", reading(tmp_path))):
        with pytest.raises(UserError) as told, block:
            put(tmp_path / "a")
            AT_FAULT[says](tmp_path)
        assert str(told.value).startswith(f"Cannot {what} {tmp_path}/") and says in str(told.value)


REFUSED = {
    "no data": ("train.py", dict(DATA_PATH="nothere"), []),
    "no weights to start from": ("train.py", dict(init_from="gone.pth"), []),
    "deep folders": ("train.py", dict(DATA_PATH="nothere", RUN="mine", LOG_PATH="a/b/c", CACHE_PATH="d/e"), []),
    "no checkpoint": ("sample.py", {}, ["--output_dir", "a/b"]),
    "no class": ("sample.py", {}, ["--checkpoint", "best.pth", "--classes", "cat"]),
    "other pictures": ("evaluate.py", {}, ["--checkpoint", "best.pth", "--reference", "bad", "--features", "random"]),
    "too few": ("evaluate.py", {}, ["--checkpoint", "best.pth", "--num_samples", "2", "--output_dir", "a/b"]),
    "nothing to export": ("export.py", {}, ["--checkpoint", "gone.pth", "--output_dir", "a/b"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_command_leaves_nothing_behind(run, trained, case):
    script, settings, words = REFUSED[case]
    run.folder.mkdir(exist_ok=True)
    shutil.copy(trained.folder / "checkpoints/best.pth", run.folder)
    (run.folder / "bad").mkdir()
    for name in "abc":
        (run.folder / f"bad/{name}.png").write_text("no picture")
    before = sorted(run.folder.rglob("*"))
    process = run.start(script, *(run.flags(**settings) if settings else words)).wait()
    assert process.code in (1, 2) and "Traceback" not in process.err, process.err
    assert sorted(set(run.folder.rglob("*")) - {process.out_path, process.err_path}) == before


# --- a run by its name ----------------------------------------------------------------------------------


def test_pictures_of_a_run_lie_in_its_folder_whichever_way_its_checkpoint_is_named(run, trained):
    (run.folder / "checkpoints/mine").mkdir(parents=True)
    shutil.copy(trained.folder / "checkpoints/latest.pth", run.folder / "checkpoints/mine")
    words = ["--num_samples", 1, "--steps", 2]
    latest = "checkpoints/mine/latest.pth"
    run.sample("--run", "mine", *words)
    for k, path in enumerate([latest, f"./checkpoints/../{latest}", run.folder / latest], start=2):
        assert f": outputs/mine/pictures/{k:03}/ has images" in run.sample("--checkpoint", path, *words).out


def test_about_tells_what_a_checkpoint_holds_and_which_runs_there_are(run, trained):
    shutil.copytree(trained.folder / "checkpoints", run.folder / "checkpoints")
    shutil.copytree(trained.folder / "checkpoints", run.folder / "checkpoints/fine")
    note, *listed = run.sample("--about").out.splitlines()
    assert note == "note: --device has no effect with --about"
    for path, line in zip(["checkpoints/best.pth", "checkpoints/fine/best.pth", ".*docs/.*.pth"], listed, strict=False):
        assert re.fullmatch(rf"{path} of 20\d\d-.*", line)
    for named in (["--run", "fine"], ["--checkpoint", "checkpoints/fine/best.pth"]):
        told = run.sample(*named, "--about").out
        for words in ("30 steps, 3 epochs", "folder, 8x8, 80 in train, 4 in val", "blue circle", "--unet_dim 8 "):
            assert words in told and len(told.splitlines()) <= 11, told  # with that note
    assert not (run.folder / "outputs").exists()
