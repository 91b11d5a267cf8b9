"""benchmarks/equal_time.py: a real dry run, its clock, and what it refuses."""

import json
import os
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("fcntl", reason="no pseudo-terminals on Windows")

from benchmarks import equal_time
from benchmarks.equal_time import Recipe, read_flags, read_recipes
from src.runtime.checkpoint import load_checkpoint
from src.utils import FlagError, UserError


def call(*words: object) -> int:
    """main() with those words, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["equal_time.py", *map(str, words)])
        patch.setenv("OMP_NUM_THREADS", "1")
        return equal_time.main()


def test_a_dry_run_trains_each_recipe_and_reports_what_it_learned(pictures, tmp_path, capsys):
    common = ["--dataset", "folder", "--data_path", pictures, "--cache_path", tmp_path / "cache", "--image_size", 8]
    recipes = ["--recipe", "default", "--recipe", "a wider one: --unet_dim 16 --grad_accum_steps 2"]
    written = ["--output_dir", tmp_path / "runs", "--results", tmp_path / "results"]
    assert call("--tiny", *recipes, "--val_images", 4, *written, "--", *common) == 0

    lines = [json.loads(line) for line in (tmp_path / "results" / "equal_time.jsonl").read_text().splitlines()]
    assert [line["recipe"] for line in lines] == ["default", "a wider one"] and all(line["tiny"] for line in lines)
    assert lines[0]["params"] < lines[1]["params"] and lines[1]["flags"].endswith("--grad_accum_steps 2")
    for line, slug, images_per_step in zip(lines, ("default", "a-wider-one"), (4, 8)):
        (folder,) = (tmp_path / "runs").glob(f"*/{slug}")
        state = load_checkpoint(folder / "checkpoints" / "latest.pth")
        assert line["steps"] == state["step"] > 0 and line["images"] == images_per_step * state["step"]
        assert line["params"] == sum(weight.numel() for weight in state["model"].values())
        assert line["images_per_second"] > 0 and line["val_images"] == 4
        for weights in ("ema", "raw"):
            (report,) = (json.loads(path.read_text()) for path in (folder / f"loss-{weights}").glob("*.json"))
            assert report["protocol"]["weights"] == weights and report["protocol"]["step"] == state["step"]
            assert report["loss"]["pictures"]["used"] == 4 and report["loss"]["held_out"] == line[f"held_out_{weights}"]
        assert (folder / "pictures" / "grid.png").exists()
        assert {"command", "hardware", "torch", "commit", "date"} <= line.keys()
    out = capsys.readouterr().out
    assert "| recipe | params | steps | images | images/s | held-out loss, EMA | raw |" in out
    assert f"| a wider one | {lines[1]['params']:,} | {lines[1]['steps']:,} |" in out


# Shows a bar as train.py does, after a start that takes its time, and notes on SIGTERM how far it came.
FAKE = """
    import pathlib, signal, sys, time
    from tqdm import tqdm
    state = pathlib.Path(sys.argv[sys.argv.index("--checkpoint_path") + 1], "latest.pth")
    first = int(state.read_text()) if state.exists() else 0
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    with tqdm(total=10**9, initial=first, unit="step", disable=None) as bar:
        time.sleep(1)
        while not stop:
            time.sleep(0.02)
            bar.update()
    state.parent.mkdir(exist_ok=True)
    state.write_text(str(bar.n))
    sys.exit(143)
"""


def test_the_clock_starts_with_the_first_finished_step_of_each_slice(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(textwrap.dedent(FAKE))
    monkeypatch.setattr(equal_time, "ROOT", tmp_path)
    monkeypatch.setattr(equal_time, "load_checkpoint", lambda path, mmap: {"step": int(path.read_text())})
    (recipe,) = read_recipes(read_flags(["--recipe", "fake"]), tmp_path)
    before = 0
    for part in (1, 2):
        equal_time.train(recipe, 0.6)
        assert 0.2 * part < recipe.clocked <= 0.65 * part, "the second before the first step is not counted"
        assert before + 5 < recipe.step <= before + 45, "the run ends when its time is over"
        before = recipe.step
    assert 0 < recipe.clocked_steps < recipe.step
    assert 5 < recipe.clocked_steps / recipe.clocked <= 55  # a step takes 20 ms at least


def test_a_recipe_whose_training_fails_is_named_with_its_last_words(tmp_path, capsys):
    written = ["--output_dir", tmp_path / "runs", "--results", tmp_path / "results"]
    common = ["--", "--dataset", "folder", "--data_path", tmp_path / "nowhere", "--cache_path", tmp_path / "cache"]
    assert call("--tiny", "--recipe", "lost", *written, *common) == 1
    error = capsys.readouterr().err
    assert "lost: train.py ended with exit code 1: train.py: There is no folder" in error and "See " in error
    assert not (tmp_path / "results" / "equal_time.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "--recipe: none given"),
        (["--recipe", "a", "--recipe", "a: --seed 1"], "--recipe: a is there twice"),
        (["--recipe", "a: --unet_dimm 8"], "--recipe a: --unet_dimm: no such flag; did you mean --unet_dim"),
        (["--recipe", "a: --batch_size 0"], "--recipe a: --batch_size: got '0', expected a whole number"),
        (["--recipe", ": --seed 1"], "--recipe: got ': --seed 1', expected NAME or"),
        (["--minutes", "0", "--recipe", "a"], "--minutes: got '0', expected a number above 0"),
        (["--recipe", "a", "--", "--seed", "x"], "--recipe a: --seed: got 'x'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(words, sentence, tmp_path):
    with pytest.raises(FlagError) as error:
        read_recipes(read_flags(words), tmp_path)
    assert str(error.value).startswith(sentence)
    assert os.listdir(tmp_path) == []


def test_recipes_whose_losses_do_not_compare_are_pointed_out(tmp_path, capsys):
    read_recipes(read_flags(["--recipe", "a", "--recipe", "b: --unet_dim 64 --prediction v"]), tmp_path)
    assert capsys.readouterr().out == ""
    read_recipes(read_flags(["--recipe", "a", "--recipe", "b: --beta_schedule cosine"]), tmp_path)
    assert "differ in BETA_SCHEDULE: their losses do not compare" in capsys.readouterr().out


def test_the_flags_behind_the_dashes_are_every_recipe_s_and_its_own_win(tmp_path):
    argv = ["--recipe", "a", "--recipe", "b: --seed 2", "--", "--seed", "1", "--batch_size", "4"]
    a, b = read_recipes(read_flags(argv), tmp_path)
    assert (a.settings.SEED, b.settings.SEED) == (1, 2) and a.settings.BATCH_SIZE == b.settings.BATCH_SIZE == 4
    assert isinstance(a, Recipe) and a.words[-1] == str(Path(tmp_path, "a", "logs"))


def test_the_error_of_a_script_that_fails_afterwards_names_its_words(tmp_path):
    with pytest.raises(UserError, match=r"sample.py --checkpoint .*nowhere.pth ended with exit code 1"):
        equal_time.call("sample.py", ["--checkpoint", tmp_path / "nowhere.pth"], tmp_path / "log.txt")
