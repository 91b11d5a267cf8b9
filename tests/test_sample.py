"""sample.py: a checkpoint and nothing else; picture i hangs on the checkpoint, the settings, the seed and i alone."""

import csv
import json
import re
import shutil
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from PIL import Image

from src.evaluation.picture_set import read_set
from tests.runs import ROOT, ended


def picture(path) -> np.ndarray:
    """[H, W, 3] uint8 as integers that can be subtracted."""
    return np.array(Image.open(path)).astype(int)


def drawn(run, folder: str) -> dict[str, np.ndarray]:
    return {path.name: picture(path) for path in sorted((run.folder / folder / "images").iterdir())}


def labels(run, folder: str) -> list[dict[str, str]]:
    return list(csv.DictReader((run.folder / folder / "labels.csv").open()))


def assert_alike(some: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> None:
    """The same pictures by the same names, to one grey level."""
    assert some.keys() == others.keys() and some
    for name in some:
        assert abs(some[name] - others[name]).max() <= 1, name


@pytest.fixture
def sample(run, trained, trained_with_classes):
    """sample(*flags, classes=False, to="drawn") draws 5 pictures in 3 steps from a trained checkpoint."""

    def draw(*flags, classes: bool = False, to: str = "drawn", setup: str = "", code: int = 0):
        runner = trained_with_classes if classes else trained
        words = ["--checkpoint", runner.folder / "checkpoints" / "best.pth", "--output_dir", to]
        return run.sample(*words, "--num_samples", 5, "--steps", 3, "--precision", "fp32", *flags, setup=setup, code=code)

    return draw


# --- what it needs ------------------------------------------------------------------------------------


def test_it_needs_a_checkpoint_and_no_config(tmp_path, trained):
    """In a copy of the repository whose config.py ends who reads it, from an empty folder, as a user starts it."""
    program, empty = tmp_path / "program", tmp_path / "empty"
    shutil.copytree(ROOT / "src", program / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "sample.py", program)
    (program / "config.py").write_text("raise SystemExit('config.py was read')")
    empty.mkdir()
    shutil.copy(trained.folder / "checkpoints" / "best.pth", empty)
    command = [sys.executable, program / "sample.py", "--checkpoint", "best.pth", "--num_samples", "2", "--device", "cpu"]
    subprocess.run(command, cwd=empty, check=True, timeout=120)
    names = {path.name for path in empty.glob("outputs/pictures/001/*")}
    assert names == {"grid.png", "images", "labels.csv", "settings.json"}
    assert len(list(empty.glob("outputs/pictures/001/images/0*.png"))) == 2


# --- what it writes -----------------------------------------------------------------------------------


def test_pictures_grid_labels_and_npz_are_written_and_agree(run, sample):
    said = sample("--npz").out
    assert "5 pictures by dpm++ in 3 steps" in said and said.splitlines()[-1].startswith("Done in ")
    pictures = drawn(run, "drawn")
    assert list(pictures) == [f"{i:06}.png" for i in range(5)]
    assert all(pixels.shape == (8, 8, 3) for pixels in pictures.values())
    assert picture(run.folder / "drawn/grid.png").shape == (200, 300, 3)  # 2 rows, 3 columns, each pixel 12 times as wide
    with np.load(run.folder / "drawn/samples.npz") as file:
        assert file.files == ["arr_0"]
        assert file["arr_0"].dtype == np.uint8 and file["arr_0"].shape == (5, 8, 8, 3)
        assert (file["arr_0"] == np.stack(list(pictures.values()))).all()
    assert read_set(run.folder / "drawn/samples.npz", "--samples").size == "8x8"
    rows = labels(run, "drawn")
    assert [row["file"] for row in rows] == [f"images/{name}" for name in pictures], "the path from where the table lies"
    assert {row["class"] for row in rows} == {""}


def test_labels_tell_the_class_of_each_picture(run, sample):
    sample("--classes", "blue circle,0,GREEN SQUARE", "--npz", classes=True)
    rows = labels(run, "drawn")
    assert [row["class"] for row in rows] == ["blue circle", "blue circle", "green square", "blue circle", "blue circle"]
    assert [row["label"] for row in rows] == ["0", "0", "1", "0", "0"]
    with np.load(run.folder / "drawn/samples.npz") as file:
        assert file["arr_1"].dtype == np.int64 and file["arr_1"].tolist() == [0, 0, 1, 0, 0]


def test_the_gif_shows_every_step_and_sheets_have_the_columns_and_the_zoom_asked_for(run, sample):
    assert sample("--gif", "--columns", 2, "--zoom", 3, to="small").err == ""
    assert picture(run.folder / "small/grid.png").shape == (3 * 28, 2 * 28, 3)
    with Image.open(run.folder / "small/denoising.gif") as gif:
        assert gif.size == (2 * 88, 2 * 28 + 18)
    sample("--gif")
    with Image.open(run.folder / "drawn/denoising.gif") as gif:
        assert gif.n_frames == 3
        assert gif.size == (2 * 304, 218)  # x_t and x_0 side by side, each a sheet of 3 x 2 with a name below


def test_a_sheet_of_the_first_pictures_says_so(run, sample):
    out = sample("--num_samples", 257, "--steps", 1, "--batch_size", 257).out
    assert "note: grid.png shows the first 256 of 257 pictures\n" in out


# --- the folder ---------------------------------------------------------------------------------------


def test_without_output_dir_each_call_gets_the_next_number(run, trained):
    words = ["--checkpoint", trained.folder / "checkpoints" / "best.pth", "--num_samples", 1, "--steps", 2]
    said = run.sample(*words, "--overwrite").out
    assert "outputs/pictures/001" in said and "note: --overwrite has no effect without --output_dir" in said
    (run.folder / "outputs/pictures/007").mkdir()
    assert "outputs/pictures/008" in run.sample(*words).out
    assert "outputs/mine/pictures/001" in run.sample(*words, "--run", "mine").out


def test_a_series_goes_on_where_it_stands_and_everything_beside_it_covers_all_of_it(run, sample):
    sample("--num_samples", 2, "--npz", classes=True)
    (run.folder / "drawn/images/000000.png").unlink()
    said = sample("--start_index", 3, "--num_samples", 2, "--npz", classes=True).out
    assert "2 pictures" in said and list(drawn(run, "drawn")) == ["000001.png", "000003.png", "000004.png"]
    said = sample("--num_samples", 5, "--npz", classes=True).out
    assert "2 pictures" in said, "those that are missing"
    sample("--npz", classes=True, to="at once")
    assert_alike(drawn(run, "drawn"), drawn(run, "at once"))
    assert labels(run, "drawn") == labels(run, "at once")
    assert run.files("drawn/grid.png").popitem()[1] == run.files("at once/grid.png").popitem()[1]
    with np.load(run.folder / "drawn/samples.npz") as file:
        assert file["arr_0"].shape == (5, 8, 8, 3) and file["arr_1"].tolist() == [0, 1, 2, 3, 0]


def test_another_checkpoint_is_another_setting(run, sample, trained):
    sample()
    another = trained.folder / "checkpoints/epoch_002.pth"
    assert "(weights " in sample("--checkpoint", another, code=1).err


def test_overwrite_removes_what_sample_py_drew_and_nothing_else(run, sample):
    mine = ["images/holiday.png", "images/12 dogs.png", "images/0000001.png", "images/000000.png.bak", "notes.txt", "a/b.png"]
    sample("--num_samples", 1, "--gif", "--sampler", "ddim")
    for name in [*mine, "images/000009.png", "images/1000000.png"]:
        (run.folder / "drawn" / name).parent.mkdir(exist_ok=True)
        (run.folder / "drawn" / name).write_text("mine or an old one")
    assert "remove them with --overwrite." in sample("--num_samples", 1, code=1).err
    sample("--num_samples", 1, "--overwrite")
    left = {name.removeprefix("drawn/") for name in run.files("drawn/**/*")}
    assert left == {*mine, "settings.json", "images/000000.png", "grid.png", "labels.csv"}


def test_settings_json_tells_who_drew_and_older_ones_go_on_where_they_do_not_contradict(run, sample, trained):
    sample("--num_samples", 1, "--spacing", "even")
    file = run.folder / "drawn/settings.json"
    told = json.loads(file.read_text())
    assert (told["precision"], told["step"], told["run"]) == ("float32", 30, "") and "CPU" in told["device"]
    assert told["checkpoint"].endswith("best.pth") and "--spacing even" in told["command"] and told["date"].startswith("20")
    assert "(precision float32 -> bfloat16)" in sample("--spacing", "even", "--precision", "bf16", code=1).err
    assert "(spacing even -> logsnr)" in sample(code=1).err
    for name in ("spacing", "precision", "step", "run", "device", "checkpoint", "command", "date"):
        del told[name]
    for changes, refused in (({"device": "another"}, ""), ({"walk": [[0, 1], [0, 2]]}, "(walk [[0, 1], [0, 2]] -> none)")):
        file.write_text(json.dumps(told | changes))
        assert refused in sample("--num_samples", 1, "--spacing", "even", code=bool(refused)).err


# Each waits before it draws until the other has its folder.
TOGETHER = """
import glob, time
from src.runtime.pipeline import Pipeline

prepare = Pipeline.prepare

def wait(self, *args):
    while len(glob.glob("outputs/pictures/*/settings.json")) < 2:
        time.sleep(0.003)
    return prepare(self, *args)

Pipeline.prepare = wait
"""


def test_two_calls_at_once_take_two_folders(run, trained):
    words = ["--device", "cpu", "--checkpoint", trained.folder / "checkpoints/best.pth", "--num_samples", 1, "--steps", 2]
    for process in [run.start("sample.py", *words, "--seed", k, setup=TOGETHER, name=str(k)) for k in (0, 1)]:
        ended(process, 0)
    assert sorted(json.loads(text)["seed"] for text in run.files("outputs/**/settings.json").values()) == [0, 1]


# --- what a picture hangs on --------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["--seed 1", "--weights raw", "--sampler ddpm", "--steps 5", "--guidance 3", "--classes 1"])
def test_each_of_these_changes_the_pictures(run, sample, flags):
    sample(classes=True)
    sample(*flags.split(), classes=True, to="other")
    ours, theirs = drawn(run, "drawn"), drawn(run, "other")
    assert max(abs(ours[name] - theirs[name]).max() for name in ours) > 1


# --- walks --------------------------------------------------------------------------------------------


def test_a_walk_passes_the_plain_pictures(run, sample):
    sample("--guidance", 2, classes=True)
    walk = ["--guidance", 2, "--interp_steps", 4, "--batch_size", 3]
    sample("--interpolate", *walk, classes=True, to="next")
    sample("--interpolate", "4,0:1,2", *walk, "--gif", classes=True, to="chosen")
    plain = list(drawn(run, "drawn").values())
    for folder, stations in (("next", [0, 1]), ("chosen", [4, 1, 2])):
        steps = list(drawn(run, folder).values())
        assert len(steps) == 3 * (len(stations) - 1) + 1
        for k, station in enumerate(stations):
            assert abs(steps[3 * k] - plain[station]).max() <= 1
        assert not (run.folder / folder / "grid.png").exists()
    assert picture(run.folder / "next/interpolation.png").shape == (114, 4 * 100, 3)
    shown = picture(run.folder / "chosen/interpolation.png")
    assert shown.shape == (2 * 114, 4 * 100, 3)  # a row for each leg: 4 to 1 of seed 0, on to 2
    assert (shown[:100, 300:] == shown[114:214, :100]).all()
    for row, k in product((0, 1), range(4)):
        is_inked = (shown[row * 114 + 98 : row * 114 + 112, k * 100 : k * 100 + 100] > 150).any()
        assert is_inked == (k in (0, 3)), "only ends have names"
    with Image.open(run.folder / "chosen/interpolation.gif") as gif:
        assert gif.n_frames == 7 and gif.size == (100, 114)
    said = sample(*walk[:2], classes=True, to="chosen", code=1).err
    assert "drawn with other settings (walk [[0, 4], [0, 1], [0, 2]] -> none, interp_steps 4 -> none)" in said


def test_the_labels_of_a_walk_are_those_of_its_nearer_ends(run, sample):
    for points, interp_steps, expected in [("2,12", 3, [2, 2, 0]), ("2,6,3", 4, [2, 2, 2, 2, 2, 3, 3]), ("1,5", 2, [1, 1])]:
        sample("--interpolate", points, "--interp_steps", interp_steps, "--npz", classes=True, to=points)
        with np.load(run.folder / points / "samples.npz") as file:
            assert file["arr_1"].tolist() == expected


@pytest.mark.parametrize(
    ("flags", "notes"),
    [
        ("--interp_steps 4", ["interp_steps has no effect without --interpolate"]),
        ("--interpolate --start_index 2", ["num_samples has no effect with --interpolate"]),
        ("--interpolate 1:2,3:4 --start_index 2 --seed 1", ["num_samples", "start_index", "seed has no effect where --interp"]),
        ("--interpolate 1:2,3 --seed 1", ["num_samples"]),
        ("--spacing even --steps 50", ["spacing has no effect where all 50 steps are taken"]),
        ("--run mine --spacing even", ["run has no effect with --checkpoint and --output_dir"]),
        ("--about --zoom 2", ["device", "num_samples", "output_dir", "precision", "steps", "zoom has no effect with --about"]),
        ("--eta 0 --guidance 1 --classes all --compile false --gif false", []),
    ],
)
def test_what_is_typed_is_used_or_said_not_to_be(sample, flags, notes):
    said = re.findall("(?m)^note: --(.*)$", sample(*flags.split()).out)
    assert len(said) == len(notes) and all(line.startswith(note) for line, note in zip(said, notes))


# --- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "classes", "says"),
    [
        ("0", False, "this checkpoint knows no classes; train with --class_conditional true."),
        ("blue circel", True, "the checkpoint has no class 'blue circel'; did you mean blue circle"),
        ("9", True, "got 9, but the checkpoint has 4 classes, with the indices 0 to 3."),
    ],
)
def test_classes_that_there_are_not_are_refused_in_one_sentence(run, sample, words, classes, says):
    said = sample("--classes", words, classes=classes, code=2).err
    assert says in said and said.startswith("sample.py: --classes") and len(said.splitlines()) == 1
    assert not run.files("*.png")


# The second batch is met by SIGTERM.
SIGTERM_IN_BATCH_2 = """
import os, signal, src.runtime.pipeline

batches, to_uint8 = [], src.runtime.pipeline.to_uint8

def to_uint8_under_fire(x):
    batches.append(x)
    if len(batches) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return to_uint8(x)

src.runtime.pipeline.to_uint8 = to_uint8_under_fire
"""


def test_a_signal_leaves_whole_pictures_of_the_batches_done(run, sample):
    said = sample("--batch_size", 2, setup=SIGTERM_IN_BATCH_2, code=143).err
    assert said.startswith("sample.py: Stopped at once. The pictures written so far are whole")
    assert list(drawn(run, "drawn")) == ["000000.png", "000001.png"]
    sample()  # the same command goes on
    assert len(drawn(run, "drawn")) == 5


def test_a_picture_of_another_size_in_the_folder_is_named_and_stays(run, sample):
    sample()
    Image.new("RGB", (9, 9)).save(strange := run.folder / "drawn/images/000006.png")
    assert "000006.png is 3x9x9 (channels, height, width), not 3x8x8" in sample("--num_samples", 8, code=1).err
    strange.unlink()
    sample("--num_samples", 8)
