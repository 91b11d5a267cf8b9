"""One picture of any kind becomes uint8 RGB: colours, cut, rotation; and a damaged one is named."""

import io
import os
import random
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, TiffImagePlugin

from src.data import decode
from src.data.decode import PictureNote, open_image, to_uint8
from src.utils import UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
RAMP = np.broadcast_to(np.arange(64, dtype=np.uint16)[None, :, None], (64, 64, 3)) / 63  # black to white


def saved(image, path, **options):
    image.save(path, **options)
    return open_image(path)


def whole(image):
    """[H, W, 3], uncut."""
    return to_uint8(image, 0).transpose(1, 2, 0)


def centre(image):
    return to_uint8(image, 8)[:, 4, 4].tolist()


def read(data, tmp_path, size=64):
    """(pixels, notes) of a file of these bytes."""
    (tmp_path / "x").write_bytes(data)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        pixels = to_uint8(open_image(tmp_path / "x"), size)
    return pixels, [str(w.message.args[1]) for w in warned if isinstance(w.message, PictureNote)]


def png(pixels, **chunks):
    """Pillow writes no colour PNG of 16 bits: by hand. pixels: uint16 [H, W, channels].   chunks: more of them, by name."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">2I5B", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    names = {"IHDR": head} | chunks | {"IDAT": zlib.compress(rows), "IEND": b""}
    parts = [name.encode() + data for name, data in names.items()]
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def encoded(suffix, image=NOISE, **options):
    file = io.BytesIO()
    image.save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix), **options)
    return file.getvalue()


def tiff(pixels, deflated=False, **tags):
    """By hand, too. pixels: of any type, [H, W] or [H, W, 3].   tags: more of them, as t281=4095."""
    data = zlib.compress(pixels.tobytes()) if deflated else pixels.tobytes()
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    folder = TiffImagePlugin.ImageFileDirectory_v2()
    values = {256: pixels.shape[1], 257: pixels.shape[0], 258: (8 * pixels.itemsize,) * channels, 259: 8 if deflated else 1}
    values |= {262: 2 if channels == 3 else 1, 277: channels, 278: pixels.shape[0], 273: (0,), 279: (len(data),)}
    values |= {339: ({"u": 1, "i": 2, "f": 3}[pixels.dtype.kind],) * channels}
    for number, value in (values | {int(name[1:]): value for name, value in tags.items()}).items():
        folder[number] = value
    return b"II*\0" + struct.pack("<I", 8) + folder.tobytes(8) + data


# --- colour -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode, colour, rgb", [
    ("RGB", (255, 0, 0), [255, 0, 0]), ("CMYK", (0, 255, 255, 0), [255, 0, 0]), ("L", 77, [77] * 3), ("1", 1, [255] * 3),
    ("LA", (77, 255), [77] * 3), ("LA", (0, 64), [191] * 3), ("RGBA", (255, 0, 0, 0), [255] * 3),
    ("RGBA", (255, 0, 0, 128), [255, 127, 127]),
])  # fmt: skip
def test_every_mode_becomes_rgb_with_its_colours_on_white(tmp_path, mode, colour, rgb):
    image = Image.new(mode, (20, 20), colour)
    assert centre(image) == centre(saved(image, tmp_path / "x.tif")) == rgb


def test_files_with_colours_by_number_or_one_that_stands_for_nothing(tmp_path):
    palette, fax = Image.new("P", (20, 20), 1), Image.new("1", (20, 20), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert centre(palette) == [9, 9, 9]
    assert centre(saved(fax, tmp_path / "fax.tif", compression="group4")) == [255] * 3
    for name, image, key in (("p.png", palette, 1), ("p.gif", palette, 1), ("l.png", Image.new("L", (20, 20), 9), 9),
                             ("c.png", Image.new("RGB", (20, 20), (9, 9, 9)), (9, 9, 9))):  # fmt: skip
        assert centre(saved(image, tmp_path / name, transparency=key)) == [255] * 3


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("top", [65535, 4095])
def test_a_16_bit_colour_that_stands_for_nothing_is_white(tmp_path, channels, top):
    pixels = np.round(RAMP[..., :channels] * top).astype(np.uint16)
    pixels[:, 30:34] = 0x0317
    shown, _ = read(png(pixels, tRNS=struct.pack(f">{channels}H", *[0x0317] * channels)), tmp_path)
    assert (shown[:, :, 30:34] == 255).all() and (shown[:, 5, 20] < 100).all()


def test_a_print_shop_s_jpeg_has_its_colours(tmp_path):
    for cmyk, rgb in {(0, 255, 255, 0): (255, 0, 0), (255, 0, 0, 0): (0, 255, 255), (0, 0, 0, 255): (0, 0, 0)}.items():
        image = saved(Image.new("CMYK", (20, 20), cmyk), tmp_path / "cmyk.jpg", quality=95)
        assert image.mode == "CMYK"
        np.testing.assert_allclose(centre(image), rgb, atol=3)


def test_a_colour_profile_is_applied_and_srgb_changes_nothing(tmp_path):
    """A profile in which the primaries red and green have changed places: its red is sRGB's green."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"tmp.").replace(b"gXYZ", b"rXYZ").replace(b"tmp.", b"gXYZ")
    for suffix in ("png", "tif", "webp"):
        options = {"lossless": True} if suffix == "webp" else {}
        image = saved(NOISE, tmp_path / f"x.{suffix}", icc_profile=swapped, **options)
        np.testing.assert_allclose(whole(image).astype(int), np.asarray(NOISE)[..., [1, 0, 2]], atol=2)
        np.testing.assert_array_equal(whole(saved(NOISE, tmp_path / f"x.{suffix}", icc_profile=srgb, **options)), NOISE)
    grey = saved(Image.new("L", (20, 20), 77), tmp_path / "grey.jpg", icc_profile=swapped)
    np.testing.assert_allclose(centre(grey), 77, atol=2)  # a profile for colour in a grey picture is common


def linear_grey_profile():
    """A colour profile by hand: grey whose samples are proportional to the light."""
    d50 = struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)
    tags = {
        b"desc": b"desc\0\0\0\0\0\0\0\2x" + bytes(80), b"cprt": b"text\0\0\0\0x\0\0\0",
        b"wtpt": b"XYZ \0\0\0\0" + d50, b"kTRC": b"curv" + bytes(8),
    }  # fmt: skip
    table, data = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += name + struct.pack(">2I", 128 + 4 + 12 * len(tags) + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    head = struct.pack(">I4sI", 128 + len(table) + len(data), b"lcms", 0x02400000) + b"mntrGRAYXYZ " + bytes(12) + b"acsp"
    return (head + bytes(28) + d50).ljust(128, b"\0") + table + data


def test_a_grey_profile_is_applied_with_and_without_alpha(tmp_path):
    for mode in ("L", "LA"):
        image = Image.fromarray(np.arange(0, 256, dtype=np.uint8).reshape(16, 16)).convert(mode)
        shown = whole(saved(image, tmp_path / "x.png", icc_profile=linear_grey_profile()))
        light = np.arange(256)[:, None] / 255
        expected = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255  # the curve of sRGB
        np.testing.assert_allclose(shown.reshape(256, 3)[8:], expected[8:].repeat(3, 1), atol=1.5)  # lcms is coarse in the dark


@pytest.mark.parametrize("profile", [b"", b"nonsense", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_broken_profile_is_ignored_and_said(tmp_path, profile, mode):
    pixels, notes = read(encoded("jpg", NOISE.convert(mode), icc_profile=profile), tmp_path)
    np.testing.assert_array_equal(pixels, read(encoded("jpg", NOISE.convert(mode)), tmp_path)[0])
    assert sum("colour profile" in note for note in notes) == bool(profile)


# --- more than 8 bits -------------------------------------------------------------------------------
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_are_scaled_and_not_clipped(tmp_path, channels):
    levels = np.arange(256, dtype=np.uint16) * 257  # 257 = 65535 / 255
    pixels = np.broadcast_to(levels[None, :, None], (256, 256, channels)).copy()
    if channels in (2, 4):
        pixels[..., -1] = 65535
    shown, notes = read(png(pixels), tmp_path, 256)
    assert np.array_equal(shown, np.broadcast_to(np.arange(256), (3, 256, 256))) and not notes


def show_ramp(tmp_path, data, note="", top=255):
    """A ramp from black to white, or half as bright, must come out as one. note: words of what is said about it."""
    pixels, notes = read(data, tmp_path)
    np.testing.assert_allclose(pixels, np.broadcast_to(np.arange(64) * top / 63, (3, 64, 64)), atol=1)
    assert [note in line for line in notes] == [True] * bool(note), notes


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_fewer_bits_in_16_bit_files_are_scaled_by_their_range_and_said(tmp_path, bits):
    """A machine camera writes its 12 bits into 16 and says no word about it."""
    pixels = np.round(RAMP * (2**bits - 1)).astype(np.uint16)
    opaque = np.concatenate([pixels, np.full((64, 64, 1), 65535, np.uint16)], 2)
    for data in (png(pixels[..., :1]), png(pixels), png(opaque), tiff(pixels[..., 0]), tiff(pixels), tiff(pixels, True)):
        show_ramp(tmp_path, data, f"taken as {bits} bits")


def test_samples_are_scaled_by_what_the_file_says(tmp_path):
    def to(top):
        return np.round(RAMP * top).astype(np.uint16)

    for data in (
        png(to(2048)[..., :1], sBIT=b"\x0c"),
        png(to(2048), sBIT=b"\x0c\x0c\x0c"),
        tiff(to(2048)[..., 0], t281=4095),
        tiff(to(5000)[..., 0], t341=10_000.0),
        tiff((RAMP[..., 0] * 100).astype(np.float32), t341=200.0),
        tiff((RAMP[..., 0] / 2).astype(np.float32)),
        b"P5 64 64 4095\n" + to(2048)[..., 0].astype(">u2").tobytes(),
        b"P6 64 64 4095\n" + to(2048).astype(">u2").tobytes(),
    ):
        show_ramp(tmp_path, data, top=128)
    a, b = np.round(RAMP[..., 0] * 4095).astype(int).reshape(64, 32, 2).transpose(2, 0, 1)  # two samples in three bytes
    data = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype(np.uint8).reshape(64, -1)
    show_ramp(tmp_path, tiff(data, t256=64, t258=12))
    show_ramp(tmp_path, tiff(65535 - to(65535)[..., 0], t262=0))  # white is 0


def test_floats_and_whole_numbers_of_any_range_are_shown(tmp_path):
    ramp = RAMP[..., 0]
    show_ramp(tmp_path, tiff(ramp.astype(np.float32)))
    show_ramp(tmp_path, tiff((ramp * 255).astype(np.float32)), "taken as 8 bits")
    for data in ((ramp * 5).astype(np.float32), (ramp * 2 - 1).astype(np.float32), (ramp * 1e6).astype(np.int32)):
        show_ramp(tmp_path, tiff(data), "the darkest one becomes black")
    holes = ramp.astype(np.float32)
    holes[0, :3] = np.nan, np.inf, -np.inf
    shown = read(tiff(holes), tmp_path)[0]
    assert shown[0, 0, :3].tolist() == [0, 255, 0] and shown[0, 5, 63] == 255
    assert (read(tiff(np.full((64, 64), np.nan, np.float32)), tmp_path)[0] == 0).all()
    assert centre(Image.fromarray(np.full((20, 20), 0.5, np.float32))) == [128] * 3  # from a Dataset, not from a file


def test_a_large_picture_of_16_bits_is_not_blown_up_to_float64(tmp_path):
    Image.fromarray(np.full((1500, 2000), 40_000, np.uint16)).save(tmp_path / "large.png")
    image = open_image(tmp_path / "large.png")
    tracemalloc.start()
    to_uint8(image, 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1500 * 2000 * 9  # the samples, twice in older versions of Pillow, the result and a strip


# --- cut and scale ----------------------------------------------------------------------------------
def test_a_picture_that_fits_is_not_touched_and_others_are_cut_to_the_central_square():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(pixels, 16), pixels.transpose(2, 0, 1))
    np.testing.assert_array_equal(to_uint8(torch.from_numpy(pixels).permute(2, 0, 1) / 255, 16), pixels.transpose(2, 0, 1))
    for left, right in ((10, 10), (10, 11)):
        wide = np.pad(pixels, ((0, 0), (left, right), (0, 0)))
        np.testing.assert_array_equal(to_uint8(wide, 16), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("width", [65, 66, 67, 71, 201])
def test_the_cut_is_central_to_a_fraction_of_a_pixel(width):
    """So that the mirrored picture gives the mirrored result."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, width, 3), dtype=np.uint8)
    for picture in (pixels, pixels.transpose(1, 0, 2)):
        there, back = to_uint8(picture[:, ::-1], 16)[..., ::-1], to_uint8(picture, 16)
        assert np.abs(there.astype(int) - back).max() <= 1


@pytest.mark.parametrize("width", range(1024, 1032))
def test_a_jpeg_that_is_decoded_at_an_eighth_is_cut_where_others_are(tmp_path, width):
    """Left of the middle it is black, right of it white: half of the cut must be white, and so of the negative."""
    x = np.arange(width) - (width - 1) / 2  # 0 in the middle
    edge = np.broadcast_to((255 / (1 + np.exp(-x / 20)))[None, :, None], (520, width, 3)).round().astype(np.uint8)
    whiteness = []
    for picture in (edge, 255 - edge):
        image = saved(Image.fromarray(picture), tmp_path / "edge.jpg", quality=100, subsampling=0)
        whiteness.append(to_uint8(image, 32).mean())
        assert image.size == (-(-width // 8), 65)  # it was decoded at an eighth
    assert (whiteness[0] - whiteness[1]) * 520 / 255 / 2 == pytest.approx(0, abs=0.1)  # pixels of the file


def test_scaling_down_averages_rather_than_picks():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(to_uint8(stripes, 16)[:, 2:-2, 2:-2].astype(int) - 128).max() <= 2


def test_pictures_smaller_than_the_image_size_keep_their_colour(tmp_path):
    for size in ((1, 1), (3, 500), (500, 3), (1, 30_000), (30_000, 1)):
        image = saved(Image.new("RGB", size, (10, 200, 30)), tmp_path / "small.png")
        assert (to_uint8(image, 32) == np.array([10, 200, 30])[:, None, None]).all()


# EXIF orientation -> how the camera's pixels must be turned, by its definition: where row 0 and column 0 really are.
TURNS = {
    1: lambda p: p, 2: lambda p: p[:, ::-1], 3: lambda p: p[::-1, ::-1], 4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1), 6: lambda p: p[::-1].swapaxes(0, 1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1), 8: lambda p: p[:, ::-1].swapaxes(0, 1),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "jpg"])
@pytest.mark.parametrize("width", [16, 24])
def test_the_camera_s_rotation_is_undone(tmp_path, suffix, width):
    pixels = np.zeros((16, width, 3), np.uint8)
    left = (width - 16) // 2
    pixels[:8, left : left + 8], pixels[:8, left + 8 :], pixels[8:, : left + 8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    square = pixels[:, left : left + 16]  # four corners, four colours
    for orientation, turn in TURNS.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
        image = saved(Image.fromarray(pixels), tmp_path / f"{orientation}.{suffix}", exif=exif, **options)
        turned = to_uint8(image, 16)
        assert np.abs(turned.astype(int) - turn(square).transpose(2, 0, 1)).max() <= 8, f"orientation {orientation}"


def test_damaged_exif_data_count_as_none(tmp_path):
    endless = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02" + b"\xff" * 8  # a text of four billion letters
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + endless):
        for suffix in ("jpg", "png", "webp"):
            image = saved(Image.new("RGB", (20, 20), "red"), tmp_path / f"x.{suffix}", exif=exif)
            np.testing.assert_allclose(centre(image), [255, 0, 0], atol=3)


def test_arrays_of_another_range_or_shape_are_refused():
    with pytest.raises(ValueError, match=r"expected .0, 1.: leave out its normalisation"):
        to_uint8(torch.full((3, 8, 8), -1.0), 8)
    for array in (np.zeros((8, 8, 3)), np.zeros((8, 8, 4), np.uint8), torch.zeros(8, 8, 3), np.zeros(8, np.uint8)):
        with pytest.raises(ValueError, match=r"expected uint8 .H, W, 3. or a tensor"):
            to_uint8(array, 8)


# --- files that lie, and damaged ones ---------------------------------------------------------------
def test_what_viewers_read_is_read(tmp_path):
    """Phones append data, programs give a wrong suffix, cameras write many segments."""
    jpg, phone = encoded("jpg"), encoded("mpo", save_all=True, append_images=[NOISE.rotate(90)])
    parts = encoded("jpg", comment=b"x" * 60_000, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0", icc_profile=b"x" * 100_000)
    files = {"trailing.jpg": jpg + b"x" * 999, "lie.png": jpg, "parts.jpg": parts, "phone.jpg": phone}
    for name, data in (files | {"lie.jpg": encoded("png") + b"\0" * 9}).items():
        (tmp_path / name).write_bytes(data)
        expected = NOISE if name == "lie.jpg" else Image.open(io.BytesIO(jpg))
        np.testing.assert_array_equal(whole(open_image(tmp_path / name)), np.asarray(expected))
    assert open_image(tmp_path / "phone.jpg").format == "MPO"


def damage(data, random):
    """A bit flips, or a block of the disk is lost, behind the first tenth."""
    at, damaged = random.randrange(len(data) // 10, len(data)), bytearray(data)
    if random.random() < 0.5:
        damaged[at] ^= 1 << random.randrange(8)
    else:
        damaged[at : at + 64] = bytes(len(damaged[at : at + 64]))
    return bytes(damaged)


KINDS = {
    **{suffix: encoded(suffix) for suffix in ("jpg", "png", "gif", "webp", "bmp", "ppm", "tif")},
    "progressive": encoded("jpg", progressive=True),
    "lossless": encoded("webp", lossless=True),
    **{name: encoded("tif", compression=name) for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")},
    "group4": encoded("tif", NOISE.convert("1"), compression="group4"),
    "palette": encoded("png", NOISE.convert("P")),
    "animated": encoded("png", save_all=True, append_images=[NOISE.rotate(90)]),
}


@pytest.mark.parametrize("kind", ["png", "palette", "animated", "tiff_adobe_deflate"])
def test_any_damage_is_found_in_formats_with_checksums(tmp_path, kind):
    data, random_numbers = KINDS[kind], random.Random(0)
    read(data, tmp_path)
    for _ in range(60):
        if (damaged := damage(data, random_numbers)) != data:
            with pytest.raises(UserError, match=r"x (cannot be decoded|is not a picture)"):
                read(damaged, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_is_named_and_no_library_says_more(tmp_path, kind, capfd):
    data = KINDS[kind]
    for share in (0, 0.2, 0.5, 0.8, 0.95):
        with pytest.raises(UserError, match=r"x (cannot be decoded \(\S.*\)|is not a picture|is empty|is cut short)"):
            read(data[: int(share * len(data))], tmp_path)
    assert capfd.readouterr().err == ""


def test_damaged_pixels_do_not_pass_for_damaged_exif_data(tmp_path, monkeypatch):
    """Pillow decodes a PNG inside getexif."""
    monkeypatch.setattr(decode, "check_png", lambda image, data: None)
    with pytest.raises(UserError, match="cannot be decoded"):
        read(encoded("png")[:-2000], tmp_path)


def test_too_many_pixels_and_a_file_that_is_gone_are_named(tmp_path, monkeypatch):
    NOISE.save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UserError, match=r"x.png has too many pixels .*exceeds limit"):
        open_image(tmp_path / "x.png")
    for name, says in {"gone.png": "gone.png: No such file", "": ": it is a folder, and a file is needed"}.items():
        with pytest.raises(UserError, match=f"Cannot read .*{says}"):
            open_image(tmp_path / name)


def test_stderr_works_again_after_a_tiff(tmp_path, capfd):
    with pytest.raises(UserError):
        read(KINDS["tiff_lzw"][:2000], tmp_path)
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"
