"""Pictures: rounding, files, the walk between two noises, and a series that does not depend on how it is drawn."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from src.diffusion import GaussianDiffusion
from src.model import UNet
from src.noise import PictureNoise, slerp
from src.runtime.sheets import save_gif, sheet
from src.samplers import SAMPLERS
from src.utils import save_png, to_uint8

CPU = torch.device("cpu")


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- slerp ------------------------------------------------------------------------------------------------


def angle(a, b):
    """In radians, from the chord: exact also where the two nearly agree."""
    a, b = (x.double().flatten() / x.double().norm() for x in (a, b))
    return 2 * math.asin(min(1.0, ((a - b).norm() / 2).item()))


def test_slerp_starts_at_one_and_ends_at_the_other():
    a, b = normals(3, 8, 8), normals(3, 8, 8, seed=1)
    assert torch.equal(slerp(a, b, 0.0), a) and torch.equal(slerp(a, b, 1.0), b)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_slerp_keeps_the_norm_and_walks_at_a_constant_pace(share):
    a, b = normals(3, 8, 8), normals(3, 8, 8, seed=1)
    b = b * (a.norm() / b.norm())
    x = slerp(a, b, share)
    assert x.dtype == torch.float32 and x.norm().item() == pytest.approx(a.norm().item(), rel=1e-5)
    assert angle(a, x) == pytest.approx(share * angle(a, b), rel=1e-4)
    assert angle(x, b) == pytest.approx((1 - share) * angle(a, b), rel=1e-4)


def test_slerp_is_the_same_walk_backwards():
    a, b = normals(3, 8, 8), normals(3, 8, 8, seed=1)
    torch.testing.assert_close(slerp(a, b, 0.3), slerp(b, a, 0.7))


@pytest.mark.parametrize("turn", [0.0, 1e-7, 1e-5, 1e-3])
def test_slerp_between_parallel_vectors_is_the_straight_line(turn):
    a = normals(3, 8, 8)
    b = a + turn * normals(3, 8, 8, seed=1)
    x = slerp(a, b, 0.4)
    assert x.isfinite().all()
    torch.testing.assert_close(x, torch.lerp(a, b, 0.4), rtol=0, atol=1e-5)


# --- bytes and files --------------------------------------------------------------------------------------


def test_every_byte_survives_the_way_to_minus_1_to_1_and_back():
    u = torch.arange(256).view(1, 1, 16, 16).expand(2, 3, 16, 16).to(torch.uint8)
    assert torch.equal(to_uint8(u / 127.5 - 1), u)


def test_bytes_are_rounded_not_truncated_and_never_wrap():
    levels = torch.tensor([99.4, 99.6, 0.4, 254.6, -20.0, 300.0]) / 127.5 - 1
    assert to_uint8(levels.view(1, 1, 1, 6)).flatten().tolist() == [99, 100, 0, 255, 0, 255]


def test_a_png_holds_the_very_bytes(tmp_path):
    picture = torch.randint(256, (3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_png(picture, tmp_path / "new" / "picture.png")
    with Image.open(tmp_path / "new" / "picture.png") as image:
        assert image.format == "PNG" and image.mode == "RGB" and image.size == (7, 5)
        assert torch.equal(torch.from_numpy(np.array(image)).permute(2, 0, 1), picture)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["picture.png"]


def test_a_gif_has_every_frame_and_never_ends(tmp_path):
    frames = [torch.full((3, 8, 8), level, dtype=torch.uint8) for level in (0, 80, 160, 240)]
    save_gif(frames, tmp_path / "a.gif", seconds=2.0)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 4 and image.info["loop"] == 0 and image.info["duration"] == 500
        for k, frame in enumerate(frames):
            image.seek(k)
            assert np.abs(np.array(image.convert("RGB")).astype(int) - frame[0, 0, 0].item()).max() <= 4
        assert image.info["duration"] == 1500


@pytest.mark.parametrize(
    "count, columns, size, zoom, rows, wide",
    [(3, None, 24, 4, 2, 2), (5, None, 64, 2, 2, 3), (40, None, 28, 3, 5, 8), (64, None, 96, 1, 8, 8), (7, None, 300, 1, 3, 3),
     (7, 20, 8, 12, 1, 7), (7, 2, 8, 12, 4, 2)],
)  # fmt: skip
def test_a_sheet_is_near_a_square_with_the_pictures_enlarged_in_reading_order(count, columns, size, zoom, rows, wide):
    ramp = torch.arange(size, dtype=torch.uint8).expand(3, size // 2, size) % 100  # so that a pixel can be found again
    pictures = torch.stack([ramp + i for i in range(100, 100 + count)])
    shown, high = sheet(pictures, columns=columns), size // 2 * zoom
    assert shown.dtype == torch.uint8 and shown.shape == (3, rows * (high + 4), wide * (size * zoom + 4))
    for i, picture in enumerate(pictures):
        top, left = i // wide * (high + 4) + 2, i % wide * (size * zoom + 4) + 2
        part = shown[:, top : top + high, left : left + size * zoom]
        assert torch.equal(part, picture.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2))
        shown[:, top : top + high, left : left + size * zoom] = 32
    assert (shown == 32).all()


# --- the noise of a picture -------------------------------------------------------------------------------


def test_every_seed_picture_and_step_has_noise_of_its_own():
    shape = (3, 16, 16)
    draws = torch.cat([PictureNoise(seed, range(4), shape, CPU)(k) for seed in (0, 1) for k in range(4)]).flatten(1)
    correlations = torch.corrcoef(draws) - torch.eye(len(draws))
    assert correlations.abs().max() < 4.5 / math.sqrt(draws.shape[1])


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = UNet(8, dim=8, dim_mults=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_classes=3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # the last layers start at zero: let them speak
    return model.eval()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pictures_do_not_depend_on_the_batch_they_are_drawn_in(sampler, network):
    diffusion = GaussianDiffusion(100)
    options = dict(sampler=sampler, steps=8, eta=0.7, guidance=2.0)

    def series(batch, indices=range(16)):
        drawn = []
        for part in torch.tensor(indices).split(batch):
            noise = PictureNoise(11, part.tolist(), (3, 8, 8), CPU)
            drawn.append(diffusion.sample(network, (len(part), 3, 8, 8), noise=noise, y=part % 3, **options))
        return to_uint8(torch.cat(drawn))

    whole = series(16).int()
    assert whole.float().std(dim=0).mean() > 10  # they are sixteen different pictures
    for batch in (1, 3):
        assert (series(batch).int() - whole).abs().max() <= 1
    assert (series(4, range(8, 12)).int() - whole[8:12]).abs().max() <= 1  # a later part of the same series
