"""Faults of docs/reliability.md: disks and checkpoints."""

import io
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import torch

from tests.runs import Code, Process, Runner, differences, ended
from tests.runtime.faults import drawn, fault, kept, saved_run

# --- disk ---------------------------------------------------------------------------------------------


@fault("The disk is full while saving")
def full_disk(run):
    """A limit on the size of files, as a quota sets it; tmpfs, which needs root, is below."""
    before = saved_run(run)
    limit = len(before["checkpoints/latest.pth"]) * 2 // 3
    process = run.start_train(f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))").wait()
    assert run.files("*.pth").items() >= before.items() and not run.files(".*part-*")
    (run.folder / "checkpoints").rename(run.folder / "larger")  # as it advises
    moved = run.start("train.py", *run.flags(CHECKPOINT_PATH="larger", max_steps=11), name="_moved")
    assert "going on after step 10" in ended(moved, 0).out
    return process


@fault("The disk is full under LOG_PATH")
def full_disk_of_logs(run):
    """The event file is the device that is always full."""
    before = saved_run(run)
    process = run.start_train("import src.runtime.monitor as m; m.open = lambda *_: open('/dev/full', 'wb')").wait()
    kept(run, before)
    return process


@fault("The disk is full under OUTPUT_PATH")
def full_disk_of_grids(run):
    before = saved_run(run)
    setup = """
import errno, io
from PIL import Image

save = Image.Image.save

def full(image, file, **options):
    if not isinstance(file, io.BytesIO):  # which TensorBoard's images go through
        raise OSError(errno.ENOSPC, "No space left on device")
    save(image, file, **options)

Image.Image.save = full
"""
    process = run.start_train(setup).wait()
    kept(run, before)
    assert list(run.files("*.png")) == ["outputs/samples/epoch_001.png"]
    return process


def below_a_file(run: Runner) -> Path:
    """A folder that nobody can make, root included."""
    (run.folder / "file").touch()
    return run.folder / "file" / "folder"


@fault("No permission to write checkpoints", place="CHECKPOINT_PATH")
@fault("No permission to write grids", place="OUTPUT_PATH")
@fault("No permission to write logs", place="LOG_PATH")
@fault("No permission to write the cache", place="CACHE_PATH")
def no_permission(run, place):
    return run.start_train(**{place: below_a_file(run)}).wait()


LITTLE_DISK = """
import shutil, src.data.folder
src.data.folder.open_image = None  # nothing is decoded
usage = shutil.disk_usage
shutil.disk_usage = lambda path: usage(path)._replace(free=1000)
"""


@fault("The disk is too small for the cache")
def little_disk_for_the_cache(run):
    process = run.start_train(LITTLE_DISK, CACHE_PATH="cache").wait()
    assert not run.files("cache/*")
    return process


@fault("The cache cannot be read")
def unreadable_cache(run):
    run.train(max_steps=1, CACHE_PATH="cache")
    (path,) = (run.folder / "cache").glob("*train*")
    path.unlink()
    path.mkdir()
    return run.start_train(CACHE_PATH="cache").wait()


@fault("No permission to write pictures")
def no_permission_for_pictures(run, trained):
    return drawn(run, trained, "--output_dir", below_a_file(run)).wait()


# --- checkpoints --------------------------------------------------------------------------------------


@fault("latest.pth is truncated", change=lambda data: data[:-1000])
@fault("A bit of latest.pth has flipped", change=lambda data: data[:200_000] + bytes([data[200_000] ^ 4]) + data[200_001:])
def damaged(run: Runner, trained: Runner, change: Callable[[bytes], bytes]) -> Process:
    """A run that meets a changed latest.pth and goes on from the newest that loads to the same end."""
    run.train(max_steps=10)
    run.train(max_steps=13)
    latest = run.folder / "checkpoints" / "latest.pth"
    latest.write_bytes(change(latest.read_bytes()))
    latest.with_name("epoch_099.pth").write_bytes(b"damaged too")
    process = run.start_train().wait()
    assert "Going on from checkpoints/best.pth, step 13" in process.err
    assert latest.with_name("latest.damaged").exists()
    assert differences(run.state(), trained.state()) == []
    curves = {tag: [point for point in curve if point[0] != 13] for tag, curve in run.scalars().items()}
    assert curves == trained.scalars()  # but for the loss that ended the first run
    return process


@fault("latest.pth is gone")
def gone(run, trained):
    run.train(max_steps=13)
    (run.folder / "checkpoints" / "latest.pth").unlink()
    process = run.start_train().wait()
    assert differences(run.state(), trained.state()) == []
    return process


def as_bytes(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@fault("No checkpoint in the folder loads", content=b"damaged")
@fault("A checkpoint of another program", content=as_bytes({"state_dict": {"weight": torch.zeros(3)}}))
def met_at_start(run: Runner, content: bytes, setup: str = "", **settings) -> Process:
    """A run that finds this as its only checkpoint, and leaves it alone."""
    latest = run.folder / "checkpoints" / "latest.pth"
    latest.parent.mkdir()
    latest.write_bytes(content)
    process = run.start_train(setup, **settings).wait()
    kept(run, {"checkpoints/latest.pth": content})
    return process


@fault("A checkpoint with code in it")
def code(run):
    process = met_at_start(run, as_bytes({"version": 1, "model": Code()}))
    assert not (run.folder / "made").exists()
    return process


OTHER_NETWORK = """
import torch, src.runtime.build

class OtherUNet(src.runtime.build.UNet):
    def __init__(self, **options):
        super().__init__(**options)
        self.extra = torch.nn.Linear(3, 3)

src.runtime.build.UNet = OtherUNet
"""


def with_settings(state: dict, **changes: object) -> dict:
    return state | {"config": state["config"] | changes}


def of_cats(state: dict) -> dict:
    return with_settings(state, CLASS_CONDITIONAL=True) | {"classes": ["cat"], "class_ids": ["cat"]}


@fault("A checkpoint without its optimizer", change=lambda state: {name: state[name] for name in ("ema", "config", "classes")})
@fault("A checkpoint of a newer format", change=lambda state: state | {"version": 99})
@fault("A checkpoint that lacks a setting", change=lambda state: state["config"].pop("PREVIEW_STEPS") and state)
@fault("A checkpoint with a setting of a newer program", change=lambda state: with_settings(state, FUTURE=1))
@fault("Other settings that a run may take up", LEARNING_RATE=1e-5)
@fault("The network in src/model.py was changed", setup=OTHER_NETWORK)
@fault("Data with other classes", change=of_cats, CLASS_CONDITIONAL=True)
def meets_another(run, trained, change=lambda state: state, **settings):
    """A run that finds the checkpoint of a finished one, changed."""
    return met_at_start(run, as_bytes(change(trained.state())), **settings)


@fault("Other settings than the checkpoint's")
def other_settings(run, trained):
    process = meets_another(run, trained, UNET_DIM=16)
    assert "(UNET_DIM 8 -> 16)" in process.err and "give its own settings: --unet_dim 8;" in process.err
    return process


@fault("The previews or curves of another run are in the folder")
def folders_of_another_run(run):
    run.train(max_steps=1)
    before = run.files("*")
    run.train(RUN="mine", max_steps=1)  # the command that works
    process = run.start_train(CHECKPOINT_PATH="checkpoints/other").wait()
    after = run.files("*")
    assert all(after[name] == data for name, data in before.items() if "std" not in name)
    return process


@fault("A run was moved, renamed or copied")
def moved(run):
    run.train(RUN="a", max_steps=10)
    for folder in ("checkpoints", "outputs", "logs/tensorboard"):
        (run.folder / folder / "a").rename(run.folder / folder / "b")
    assert "going on after step 10" in run.train(RUN="b", max_steps=13).out
    shutil.copytree(run.folder / "checkpoints" / "b", run.folder / "disk" / "b")
    process = run.start_train(RUN="b", CHECKPOINT_PATH="disk", max_steps=16).wait()
    assert "going on after step 13" in process.out
    assert "holds previews or curves" in run.train(RUN="b", code=1).err, "the copy has them now"
    run.train(RUN="free", max_steps=1)
    shutil.rmtree(run.folder / "checkpoints" / "free")
    assert "starting anew" in run.train(RUN="free", CHECKPOINT_PATH="disk", max_steps=1).out
    return process


def half_of_the_pictures(run: Runner) -> dict[str, object]:
    few = run.folder / "few"
    shutil.copytree(run.pictures, few)
    for path in sorted(few.rglob("*.png"))[::2]:
        path.unlink()
    return {"DATA_PATH": few, "CACHE_PATH": "cache"}


@fault("Pictures were added, removed or edited since")
def other_pictures(run, trained):
    process = meets_another(run, trained, **half_of_the_pictures(run))
    assert "trained on other images (train 80 -> 40, val 4 -> 2)" in process.err
    return process


@fault("The same, with --accept_changes")
def other_pictures_accepted(run):
    run.train(max_steps=20)
    fewer, best = half_of_the_pictures(run), run.state("best")["best_loss"]
    process = run.start_train(accept_changes=True, EPOCHS=5, **fewer).wait()
    assert f"the lowest validation loss so far, {best:.5f}, was measured on other images" in process.out
    assert run.state()["step"] == run.state("best")["step"] == 25
    assert "note" not in ended(run.start("train.py", *run.flags(EPOCHS=6, **fewer), name="_again"), 0).out, "it is said once"
    return process


@fault("No checkpoint to draw from", words=[])
@fault("A damaged checkpoint to draw from", words=["--checkpoint", "half.pth"])
@fault("A checkpoint with a name that no disk takes", words=["--checkpoint", 300 * "a"])
def nothing_to_draw_from(run, words):
    (run.folder / "half.pth").write_bytes(b"PK half a file")
    return run.start("sample.py", *words).wait()


def run_called_mine(run: Runner, trained: Runner) -> str:
    """A run of that name with latest.pth alone."""
    (run.folder / "checkpoints/mine").mkdir(parents=True)
    return shutil.copy(trained.folder / "checkpoints/latest.pth", run.folder / "checkpoints/mine")


@fault("A run named where a file is needed")
def run_as_checkpoint(run, trained):
    run_called_mine(run, trained)
    assert run.start("sample.py", "--checkpoint", "./checkpoints/mine/").wait().err.endswith("Use --run mine.\n")
    return run.start("sample.py", "--checkpoint", "mine").wait()


@fault("A run that does not exist")
def run_that_is_not_there(run, trained):
    run_called_mine(run, trained)
    process = run.start("sample.py", "--run", "mien").wait()
    assert "one of: checkpoints/mine/latest.pth, " in process.err and "docs/shapes.pth" in process.err
    return process


@fault("A run that was stopped before its first validation")
def run_without_best(run, trained):
    run_called_mine(run, trained)
    return run.sample("--run", "mine", "--num_samples", 1, "--steps", 2)


# --- folders of pictures ------------------------------------------------------------------------------


@fault("Pictures drawn with other settings are in the folder")
def pictures_of_other_settings(run, trained):
    drawn(run, trained).wait()
    before = run.files("drawn/**/*")
    process = drawn(run, trained, "--seed", 1, "--sampler", "ddim", "--precision", "bf16").wait()
    assert "(sampler dpm++ -> ddim, precision float32 -> bfloat16, seed 0 -> 1)" in process.err
    assert run.files("drawn/**/*") == before
    return process


@fault("Files of your own are in the folder")
def files_of_others(run, trained):
    strangers = {"a": "images/holiday.png", "b": "images/000000.png", "c": "grid.png", "d": "settings.json"}
    for folder, name in strangers.items():
        file = run.folder / "drawn" / name
        file.parent.mkdir(parents=True)
        file.write_text('{"editor.fontSize": 12}')
        for flags in ((), ("--overwrite",)):
            process = drawn(run, trained, *flags).wait()
            assert f"drawn holds {file.name}, which" in process.err
            assert run.files("drawn/**/*") == {f"drawn/{name}": b'{"editor.fontSize": 12}'}
        (run.folder / "drawn").rename(run.folder / folder)
    return process


@fault("Another call draws into the folder")
def two_calls_at_once(run, trained):
    setup = "import os, signal; from src.runtime.pipeline import Pipeline as P; P.prepare = lambda *_: signal.pause()"
    first = drawn(run, trained, setup=setup, name="first").wait(lambda: (run.folder / "drawn/settings.json").exists())
    before = run.files("drawn/**/*")
    process = drawn(run, trained, "--overwrite").wait()
    assert run.files("drawn/**/*") == before and f"process {first.pid} on" in process.err
    first.send(signal.SIGKILL)
    first.wait()
    assert drawn(run, trained, "--seed", 1, name="third").wait().code == 0, (
        "nothing was drawn, and a lock that was left locks nothing"
    )
    assert sorted(os.listdir(run.folder / "drawn")) == ["grid.png", "images", "labels.csv", "settings.json"]
    return process
