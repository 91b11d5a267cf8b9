"""CHANNELS = 1, from the cache to what is drawn, measured and taken elsewhere: exactly grey."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from src.data.decode import to_uint8
from src.diffusion import GaussianDiffusion
from src.evaluation.picture_set import PictureSet
from tests.runs import Runner, ended


@pytest.fixture(scope="module")
def grey(zygote, pictures, tmp_path_factory) -> Runner:
    """A finished run in one channel, and 12 pictures of it. Only to be read."""
    runner = Runner(zygote, tmp_path_factory.mktemp("grey"), pictures)
    runner.train(CHANNELS=1, CLASS_CONDITIONAL=True, EPOCHS=1, SAMPLE_EVERY=1)
    words = ["--checkpoint", "checkpoints/best.pth", "--steps", 3, "--precision", "fp32"]
    runner.sample(*words, "--num_samples", 12, "--npz", "--gif", "--output_dir", "drawn")
    runner.sample(*words, "--interpolate", "0,1", "--interp_steps", 3, "--gif", "--output_dir", "walk")
    return runner


def test_all_that_is_drawn_is_exactly_grey(grey):
    drawn = sorted(path for kind in ("png", "gif") for path in grey.folder.rglob(f"*.{kind}"))
    assert len(drawn) == 12 + 3 + 2 + 2 + 1  # pictures, those of the walk, sheets, GIFs, the preview
    for path in drawn:
        r, g, b = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)
        assert np.array_equal(r, g) and np.array_equal(g, b), path
    pixels = [np.asarray(Image.open(path)) for path in sorted((grey.folder / "drawn" / "images").iterdir())]
    assert np.array_equal(np.load(grey.folder / "drawn" / "samples.npz")["arr_0"], np.stack(pixels)[..., None])
    assert grey.state("best")["ema"]["stem.weight"].shape == (8, 1, 3, 3)


def test_it_is_measured_as_it_would_be_in_colour(grey):
    """The same pictures as files, which are read as RGB, give the same figures; the bound is per one channel's dimensions."""
    reports = []
    for number, samples in enumerate(([], ["--samples", "drawn"])):
        words = ["--checkpoint", "checkpoints/best.pth", "--fid", "--nearest", 12, "--steps", 3, "--num_samples", 12, *samples]
        words += ["--features", "random", "--kid_subset_size", 10, "--precision", "fp32", "--output_dir", f"report{number}"]
        ended(grey.start("evaluate.py", "--device", "cpu", *words, *[[], ["--nll", "--nll_steps", 2]][not samples]), 0)
        reports += [json.loads(path.read_text()) for path in (grey.folder / f"report{number}").glob("*.json")]
    drawn, files = reports
    assert drawn["distribution"]["figures"] == pytest.approx(files["distribution"]["figures"], rel=1e-4)
    for view in ("pixels", "features"):
        assert drawn["nearest"][view]["nearest_rows"] == files["nearest"][view]["nearest_rows"]
    x_0 = np.load(next((grey.pictures.parent / "cache").glob("folder-val-8-grey-*.npy"))) / 127.5 - 1
    abar = GaussianDiffusion(50).alphas_cumprod[-1].item()
    prior = 0.5 * (abar * (x_0**2 - 1) - np.log1p(-abar)).mean() / np.log(2)  # L_T of one dimension, in bits
    assert drawn["bound"]["bits_per_dimension"]["prior"] == pytest.approx(prior, rel=1e-4)


def test_a_grey_picture_keeps_its_levels_and_colours_become_their_luma():
    levels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    for mode in ("L", "RGB", "RGBA"):
        assert np.array_equal(to_uint8(Image.fromarray(levels).convert(mode), 8, 1)[0], levels)
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    luma = colours @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    grey = to_uint8(Image.fromarray(colours), 8, 1)
    assert np.array_equal(grey, PictureSet("", colours.transpose(2, 0, 1)[None]).with_channels(1).pixels[0])
    assert abs(grey[0] - luma).max() <= 0.51
    assert np.array_equal(PictureSet("", grey[None]).with_channels(3).pixels[0], np.stack([grey[0]] * 3))
    assert np.array_equal(to_uint8(torch.from_numpy(levels)[None], 8, 1)[0], levels)


def test_a_run_in_colour_does_not_go_on_in_grey_but_lends_its_weights(run, trained):
    start = trained.folder / "checkpoints" / "best.pth"
    said = run.train(CHANNELS=1, init_from=start, max_steps=1).out
    assert "anew: stem.weight, head.2.weight, head.2.bias\n" in said
    assert "CHANNELS 1 -> 3" in run.train(max_steps=2, code=1).err
