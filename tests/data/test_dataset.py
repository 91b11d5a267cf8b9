"""From files to batches: sources, conversion, the cache file, and what the user reads when something is wrong."""

import io
import os
import re
import struct
import subprocess
import sys
import textwrap
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from src import dataset as dataset_module
from src.data.folder import ImageFolder, TinyImageNet
from src.dataset import DATASETS, normalise, obtain_tiny_imagenet, prepare, to_uint8
from src.utils import UserError

ROOT = Path(__file__).parents[2]
WNIDS = ["n02", "n01", "n03"]  # not sorted: labels follow the file


def jpeg(random, mode="RGB", size=64):
    shape = (size, size) if mode == "L" else (size, size, 3)
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A zip with the layout of the real one: 3 classes x 6 in train, 9 in val, greyscale ones and strays among them."""
    random = np.random.default_rng(0)
    files = {
        "wnids.txt": "\n".join(WNIDS) + "\n",
        ".DS_Store": b"stray",
        "words.txt": "n00\tentity\nn01\tgoldfish, Carassius auratus\nn02\tmud turtle\n",
    }
    for wnid in WNIDS:
        files[f"train/{wnid}/{wnid}_boxes.txt"] = "x"
        files[f"train/{wnid}/images/Thumbs.db"] = files[f"train/{wnid}/images/._{wnid}_0.JPEG"] = b"stray"
        for i in range(6):
            files[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = jpeg(random, "L" if i == 5 else "RGB")
    lines = [f"val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t0\t62\t62" for i in range(9)]
    files["val/val_annotations.txt"] = "\n".join(lines) + "\n"
    files |= {f"val/images/val_{i}.JPEG": jpeg(random) for i in range(9)}
    path = tmp_path_factory.mktemp("archive") / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "w") as target:
        for name, data in files.items():
            target.writestr(f"tiny-imagenet-200/{name}", data)
    return path


@pytest.fixture
def tiny(archive, tmp_path):
    """The extracted folder, obtained as a user with a zip beside it obtains it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / archive.name).write_bytes(archive.read_bytes())
    obtain_tiny_imagenet(tmp_path / "data" / "tiny", "http://127.0.0.1:9/never-asked")
    return tmp_path / "data" / "tiny"


# --- Tiny ImageNet ----------------------------------------------------------------------------------
def test_labels_follow_wnids_txt_and_names_come_from_words_txt(tiny, capsys):
    train, val = TinyImageNet(tiny, "train"), TinyImageNet(tiny, "val")
    assert train.class_ids == WNIDS and train.classes == ["mud turtle", "goldfish", "n03"]
    assert [WNIDS[label] in file for file, label in zip(train.files, train.labels)] == [True] * 18
    numbers = [int(Path(file).stem.removeprefix("val_")) for file in val.files]
    assert sorted(numbers) == list(range(9)) and val.labels == [number % 3 for number in numbers]
    assert "18 pictures of 3 classes; the official set has 100,000 of 200" in capsys.readouterr().out


def test_copies_with_val_in_class_folders_or_without_images_folders_read_the_same(tiny):
    before = TinyImageNet(tiny, "val")
    for file, label in zip(before.files, before.labels):
        (tiny / "val" / WNIDS[label]).mkdir(exist_ok=True)
        os.rename(file, tiny / "val" / WNIDS[label] / Path(file).name)
    for wnid in WNIDS:
        for file in list((tiny / "train" / wnid / "images").iterdir()):
            file.rename(tiny / "train" / wnid / file.name)
    after = TinyImageNet(tiny, "val")
    assert {Path(f).name: label for f, label in zip(after.files, after.labels)} == {
        Path(f).name: label for f, label in zip(before.files, before.labels)
    }
    assert len(TinyImageNet(tiny, "train")) == 18


@pytest.mark.parametrize(
    "remove, split, says",
    [
        ("val/images/val_3.JPEG", "val", "lacks 1 of the 9.*val_3.JPEG"),
        ("val/val_annotations.txt", "val", "no readable val/val_annotations.txt"),
        ("wnids.txt", "train", "no readable wnids.txt, only 2 folders"),
        ("train/n01", "train", "no pictures for 1 of 3 classes, e.g. n01"),
    ],
)
def test_missing_parts_are_named_with_the_way_out(tiny, remove, split, says):
    os.rename(tiny / remove, tiny.parent / "elsewhere")
    with pytest.raises(UserError, match=f"{says}.*Delete the folder"):
        TinyImageNet(tiny, split)


# --- any folder of pictures -------------------------------------------------------------------------
def make_folder(path, names):
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path / name)
    return path


def test_about_one_picture_in_twenty_is_held_out_spread_over_the_classes(tmp_path):
    make_folder(tmp_path, [f"{kind}/deep/{i}.png" for kind in "abcd" for i in range(50)] + [".hidden/x.png"])
    (tmp_path / "a" / "notes.txt").touch()
    train, val = ImageFolder(tmp_path, "train"), ImageFolder(tmp_path, "val")
    assert (len(train), len(val)) == (190, 10) and not set(train.files) & set(val.files)
    assert train.classes == val.classes == list("abcd") and set(val.labels) == {0, 1, 2, 3}
    assert ImageFolder(tmp_path, "val").files == val.files


def test_without_sub_folders_there_is_one_class(tmp_path):
    make_folder(tmp_path / "mine", ["1.PNG", "2.jpg"])
    train, val = ImageFolder(tmp_path / "mine", "train"), ImageFolder(tmp_path / "mine", "val")
    assert train.classes == ["mine"] and len(train) == len(val) == 1


def test_a_folder_without_pictures_says_what_is_there(tmp_path):
    for name in ("1.txt", "2.txt", "3.csv"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"0 pictures.*2 .txt, 1 .csv, 1 folders"):
        ImageFolder(tmp_path, "train")
    with pytest.raises(UserError, match="no folder"):
        ImageFolder(tmp_path / "nowhere", "train")


# --- one picture ------------------------------------------------------------------------------------
def centre(image):
    return to_uint8(image, 8)[:, 4, 4].tolist()


def saved(image, path, **options):
    image.save(path, **options)
    return Image.open(path)


def test_every_mode_becomes_rgb_with_its_colours(tmp_path):
    red = Image.new("RGB", (20, 20), (255, 0, 0))
    assert centre(red) == centre(red.convert("P")) == [255, 0, 0]
    assert centre(Image.new("CMYK", (20, 20), (0, 255, 255, 0))) == [255, 0, 0]
    assert centre(Image.new("L", (20, 20), 77)) == centre(Image.new("LA", (20, 20), (77, 255))) == [77] * 3
    assert centre(Image.new("1", (20, 20), 1)) == [255] * 3
    grey16 = Image.fromarray(np.full((20, 20), 40_000, np.uint16))
    assert centre(saved(grey16, tmp_path / "16.png")) == centre(saved(grey16, tmp_path / "16.tif")) == [156] * 3
    assert centre(Image.fromarray(np.full((20, 20), 0.5, np.float32))) == [128] * 3


def test_transparency_lies_on_white(tmp_path):
    assert centre(Image.new("RGBA", (20, 20), (255, 0, 0, 0))) == [255, 255, 255]
    assert centre(Image.new("RGBA", (20, 20), (255, 0, 0, 128))) == [255, 127, 127]
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert centre(saved(palette, tmp_path / "p.png", transparency=1)) == [255, 255, 255]
    assert centre(saved(palette, tmp_path / "p.gif", transparency=1)) == [255, 255, 255]
    grey = Image.new("LA", (20, 20), (0, 64))
    assert centre(saved(grey, tmp_path / "la.png")) == [191, 191, 191]
    for mode, colour in (("L", 9), ("RGB", (9, 9, 9))):  # one colour of all stands for nothing
        assert centre(saved(Image.new(mode, (20, 20), colour), tmp_path / "key.png", transparency=colour)) == [255, 255, 255]


def png_of_16_bits(path, pixels):
    """Pillow writes no colour PNG of 16 bits: by hand. pixels: uint16 [H, W, channels]."""
    height, width, channels = pixels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = {b"IHDR": struct.pack(">2I5B", width, height, 16, kind, 0, 0, 0), b"IDAT": zlib.compress(rows), b"IEND": b""}
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, data in chunks.items():
            file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))
    return Image.open(path)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_are_scaled_and_not_clipped(tmp_path, channels):
    levels = np.arange(256, dtype=np.uint16) * 257  # 257 = 65535 / 255
    pixels = np.broadcast_to(levels[None, :, None], (256, 256, channels)).copy()
    if channels in (2, 4):
        pixels[..., -1] = 65535
    read = to_uint8(png_of_16_bits(tmp_path / "16.png", pixels), 256)
    assert np.array_equal(read, np.broadcast_to(np.arange(256), (3, 256, 256)))


def test_a_print_shop_s_jpeg_has_its_colours(tmp_path):
    for cmyk, rgb in {(0, 255, 255, 0): (255, 0, 0), (255, 0, 0, 0): (0, 255, 255), (0, 0, 0, 255): (0, 0, 0)}.items():
        image = saved(Image.new("CMYK", (20, 20), cmyk), tmp_path / "cmyk.jpg", quality=95)
        assert image.mode == "CMYK"
        np.testing.assert_allclose(centre(image), rgb, atol=3)


def test_pictures_smaller_than_the_image_size_keep_their_colour(tmp_path):
    for size in ((1, 1), (3, 500), (500, 3)):
        image = saved(Image.new("RGB", size, (10, 200, 30)), tmp_path / "small.png")
        assert (to_uint8(image, 32) == np.array([10, 200, 30])[:, None, None]).all()


# EXIF orientation -> how the camera's pixels must be turned, by its definition: where row 0 and column 0 really are.
TURNS = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: p[::-1].transpose(1, 0, 2),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: p[:, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "jpg"])
def test_the_camera_s_rotation_is_undone(tmp_path, suffix):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8, :8], pixels[:8, 8:], pixels[8:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)  # four corners, four colours
    for orientation, turn in TURNS.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
        turned = to_uint8(saved(Image.fromarray(pixels), tmp_path / f"{orientation}.{suffix}", exif=exif, **options), 16)
        expected = turn(pixels).transpose(2, 0, 1)
        assert np.abs(turned.astype(int) - expected).max() <= 8, f"orientation {orientation}"


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_an_animation_gives_its_first_frame(tmp_path, name):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    image = Image.open(tmp_path / name)
    assert image.n_frames == 2
    np.testing.assert_allclose(centre(image), [255, 0, 0], atol=3)


def test_a_picture_that_fits_is_not_touched_and_others_are_cut_to_the_central_square():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(pixels, 16), pixels.transpose(2, 0, 1))
    np.testing.assert_array_equal(to_uint8(torch.from_numpy(pixels).permute(2, 0, 1) / 255, 16), pixels.transpose(2, 0, 1))
    wide = np.pad(pixels, ((0, 0), (10, 10), (0, 0)))
    np.testing.assert_array_equal(to_uint8(wide, 16), pixels.transpose(2, 0, 1))


def test_scaling_down_averages_rather_than_picks():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(to_uint8(stripes, 16)[:, 2:-2, 2:-2].astype(int) - 128).max() <= 2


def test_a_normalised_tensor_is_refused():
    with pytest.raises(ValueError, match=r"expected .0, 1.: leave out its normalisation"):
        to_uint8(torch.full((3, 8, 8), -1.0), 8)


def odd_pictures(folder):
    """Twenty pictures as people have them."""
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.convert("CMYK").save(folder / "cmyk.jpg")
    noise.convert("CMYK").save(folder / "cmyk.tiff")
    noise.convert("RGBA").save(folder / "alpha.png")
    noise.convert("LA").save(folder / "grey alpha.png")
    noise.convert("P").save(folder / "palette.png", transparency=3)
    noise.convert("1").save(folder / "black and white.bmp")
    noise.convert("L").save(folder / "grey.JPG")
    noise.save(folder / "rotated.jpeg", exif=exif)
    noise.save(folder / "progressive.jpg", progressive=True)
    noise.save(folder / "animated.gif", save_all=True, append_images=[noise.rotate(90)])
    noise.save(folder / "animated.webp", save_all=True, append_images=[noise.rotate(90)])
    noise.save(folder / "a name with späces.webp", lossless=True)
    noise.save(folder / "a.ppm")
    noise.save(folder / "really a png.jpg", format="PNG")
    Image.fromarray(random.integers(0, 65536, (30, 30), dtype=np.uint16)).save(folder / "16 bit.png")
    Image.fromarray(random.random((30, 30), dtype=np.float32)).save(folder / "float.tif")
    Image.new("RGB", (6000, 4000), "green").save(folder / "huge.jpg")
    Image.new("RGB", (1, 1), "blue").save(folder / "one pixel.png")
    Image.new("RGB", (900, 2), "blue").save(folder / "a line.png")
    Image.new("L", (3, 500)).save(folder / "a tower.tif", compression="tiff_lzw")
    return folder


def test_twenty_odd_pictures_are_read_and_what_is_none_is_named(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    odd_pictures(folder)
    assert sum(len(prepare("folder", folder, split, 32, tmp_path / "cache", 0)) for split in ("train", "val")) == 20
    (folder / "no picture.jpg").write_text("hello")
    (folder / "a text.txt").write_text("hello")
    with pytest.raises(UserError, match=r"no picture.jpg is not a picture.*Delete it or move it"):
        for split in ("train", "val"):
            prepare("folder", folder, split, 32, tmp_path / "cache", 0)


def test_strays_are_left_out_and_links_that_run_in_a_circle_are_followed_once(tmp_path):
    kept = ["A.JPG", "b.Tiff", "a name with späces ☃.png", "sub/c.webp", "sub/deep/er/d.ppm"]
    make_folder(tmp_path, [*kept, ".hidden.png", "._A.JPG", ".thumbs/e.png", "__MACOSX/f.png"])
    for stray in (".DS_Store", "notes.txt", "jpg", "sub/list.csv"):
        (tmp_path / stray).write_text("x")
    (tmp_path / "folder.png").mkdir()
    if os.name != "nt":  # where links need a permission
        (tmp_path / "sub" / "up").symlink_to("..")
        (tmp_path / "gone.png").symlink_to("nowhere.png")
    found = [file for split in ("train", "val") for file in ImageFolder(tmp_path, split).files]
    assert sorted(Path(file).relative_to(tmp_path).as_posix() for file in found) == sorted(kept)


def test_train_py_copes_with_odd_pictures_and_names_one_that_is_none(run, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    odd_pictures(folder)
    settings = dict(DATA_PATH=folder, CACHE_PATH=tmp_path / "cache", VAL_IMAGES=1, EPOCHS=1, SAMPLE_EVERY=1)
    assert "19 images of 1 class at 8x8" in run.to("odd").train(**settings).out
    for name, content, says in [
        ("no picture.jpg", b"hello", "is not a picture, or is damaged at its start"),
        ("empty.png", b"", "is not a picture, or is damaged at its start"),
        ("half.jpg", (folder / "huge.jpg").read_bytes()[:20_000], "cannot be decoded (image file is truncated"),
    ]:
        (folder / name).write_bytes(content)
        refused = run.to("refused").train(**settings, code=1)
        assert re.fullmatch(f"train.py: .*{re.escape(name)} {re.escape(says)}.*Delete it or move it elsewhere.*\n", refused.err)
        (folder / name).unlink()
    run.to("refused").train(**settings)


def test_all_damaged_pictures_are_named_in_one_go_and_photographs_left_out_are_noted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dataset_module, "CHUNK", 4)  # faults in several chunks
    make_folder(tmp_path / "pictures", [f"{i:02}.png" for i in range(40)])
    damaged = {f"{i:02}.png" for i in range(0, 40, 3)}
    for name in damaged:
        (tmp_path / "pictures" / name).write_text("hello")
    (tmp_path / "pictures" / "IMG_1.HEIC").write_bytes(b"x")
    named = set()
    for split in ("train", "val"):
        try:
            prepare("folder", tmp_path / "pictures", split, 8, tmp_path / "cache", 0)
        except UserError as error:
            named |= set(re.findall(r"\d\d\.png", str(error)))
    assert named == damaged
    assert capsys.readouterr().out.count("note: 1 files such as IMG_1.HEIC are left out") == 1
    assert not list((tmp_path / "cache").glob("*train*")), "a cache was made all the same"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_picture_is_named_from_a_worker_too(tiny, tmp_path, workers, capfd, monkeypatch):
    monkeypatch.setattr(dataset_module, "CHUNK", 4)  # several chunks, so that there are workers
    victim = tiny / "train" / "n01" / "images" / "n01_2.JPEG"
    victim.write_bytes(victim.read_bytes()[:400])
    with pytest.raises(UserError, match=r"n01_2.JPEG cannot be decoded .*Delete it or move it"):
        prepare("tiny-imagenet", tiny, "train", 64, tmp_path / "cache", workers)
    assert "Traceback" not in capfd.readouterr().err
    assert os.listdir(tmp_path / "cache") == []


def test_too_many_pixels_are_an_error_with_a_name(tmp_path, monkeypatch):
    make_folder(tmp_path, ["1.png", "2.png"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UserError, match=r"[12].png has too many pixels"):
        prepare("folder", tmp_path, "train", 8, tmp_path / "cache", 0)


# --- the cache --------------------------------------------------------------------------------------
def test_the_cache_holds_the_decoded_pictures_in_order(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_module, "CHUNK", 4)
    state = torch.get_rng_state()
    images = prepare("tiny-imagenet", tiny, "train", 64, tmp_path / "cache", 2)
    assert torch.equal(state, torch.get_rng_state()), "decoding must not move the run's random numbers"
    source = TinyImageNet(tiny, "train")
    assert len(images) == 18 and images.classes == source.classes and images.class_ids == WNIDS
    assert images.labels.dtype == torch.int64 and images.labels.tolist() == source.labels
    as_a_file = np.load(images.path, mmap_mode="r")
    for index in range(18):
        with Image.open(source.files[index]) as image:
            expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        np.testing.assert_array_equal(images.images[index], expected)
        np.testing.assert_array_equal(as_a_file[index], expected)


def prepare_again(tiny, cache, capsys):
    capsys.readouterr()
    prepare("tiny-imagenet", tiny, "train", 16, cache, 0)
    return next((line for line in capsys.readouterr().out.splitlines() if "decoding" in line), "")


def test_the_cache_is_made_again_when_it_is_no_longer_true(tiny, tmp_path, capsys, monkeypatch):
    cache = tmp_path / "cache"
    assert "18 images" in prepare_again(tiny, cache, capsys)
    assert prepare_again(tiny, cache, capsys) == ""
    (tiny / "train" / "n01" / "images" / "n01_0.JPEG").write_bytes(jpeg(np.random.default_rng(1)))
    assert "the pictures have changed" in prepare_again(tiny, cache, capsys)
    (tiny / "train" / "n01" / "images" / "n01_0.JPEG").unlink()
    assert "17 images" in prepare_again(tiny, cache, capsys)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:5000], whole[:3], b"", whole + b"x", b"\x00" * 300):
        file.write_bytes(damaged)
        assert "the cache is damaged" in prepare_again(tiny, cache, capsys)
    assert file.read_bytes() == whole
    monkeypatch.setattr(dataset_module, "FORMAT", 99)
    assert "another version" in prepare_again(tiny, cache, capsys)


def test_two_folders_two_splits_and_two_sizes_have_a_file_each(tmp_path):
    for name in ("one", "two"):
        make_folder(tmp_path / name, ["1.png", "2.png"])
    files = {
        prepare("folder", tmp_path / name, split, size, tmp_path / "cache", 0).path
        for name in ("one", "two")
        for split in ("train", "val")
        for size in (8, 16)
    }
    assert len(files) == 8


def test_what_a_killed_run_left_is_removed_once_it_is_old(tmp_path):
    old, young = (tmp_path / f".shapes-val-8.npy.part-{pid}" for pid in (1, 2))
    old.touch()
    young.touch()
    os.utime(old, (0, 0))
    prepare("shapes", "", "val", 8, tmp_path, 0)
    assert not old.exists() and young.exists()


def test_a_cache_folder_that_cannot_be_made_names_the_setting(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="CACHE_PATH / --cache_path"):
        prepare("shapes", "", "val", 8, tmp_path / "file" / "cache", 0)


@pytest.mark.skipif(os.name == "nt", reason="no resource limits on Windows")
def test_a_full_disk_says_how_much_is_needed_and_leaves_nothing(tmp_path):
    program = textwrap.dedent(f"""
        import resource
        from src.dataset import prepare
        from src.utils import UserError
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        try:
            prepare("shapes", "", "val", 32, {str(tmp_path / "cache")!r}, 0)
        except UserError as error:
            print(error)
    """)
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "It needs 6 MB" in result.stdout and "--cache_path" in result.stdout, result.stderr
    assert result.returncode == 0 and os.listdir(tmp_path / "cache") == []


class Mine(Dataset):
    """A user's own: tensors, no names, no fingerprint."""

    def __init__(self, value):
        self.value = value

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.full((3, 8, 8), self.value), index % 4


def test_an_own_dataset_is_one_entry_and_its_cache_follows_its_pictures(tmp_path, monkeypatch, capsys):
    for value in (0.0, 1.0):
        monkeypatch.setitem(DATASETS, "mine", lambda path, split, image_size, value=value: Mine(value))
        images = prepare("mine", tmp_path, "train", 16, tmp_path / "cache", 0)
        assert (images.images == 255 * value).all() and images.classes == ["0", "1", "2", "3"]
    assert "the pictures have changed" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no dataset 'yours': choose one of .*shapes"):
        prepare("yours", tmp_path, "train", 16)


def test_decoding_works_in_processes_that_start_from_nothing(tmp_path):
    """spawn, as on macOS and Windows: everything handed to a worker has to pickle."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(ROOT)!r})
        import torch.multiprocessing
        from src.dataset import prepare
        if __name__ == "__main__":
            torch.multiprocessing.set_start_method("spawn")
            print(len(prepare("shapes", "", "val", 8, {str(tmp_path / "cache")!r}, 2)))
    """)
    )
    result = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert result.stdout.endswith("2000\n"), result.stderr


# --- batches ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return prepare("shapes", "", "val", 8, tmp_path_factory.mktemp("cache"), 0)


def test_a_batch_is_the_rows_asked_for_scaled_and_mirrored_where_asked(shapes):
    rows, flip = torch.tensor([1999, 0, 7, 7]), torch.tensor([False, True, True, False])
    x_0, y = shapes.to("cpu").batch(rows, flip)
    for i, row in enumerate(rows.tolist()):
        pixels = shapes.images[row].astype(np.float32) / 127.5 - 1
        np.testing.assert_allclose(x_0[i].numpy(), pixels[..., ::-1] if flip[i] else pixels, atol=1e-6)
        assert y[i] == shapes.labels[row]
    assert x_0.dtype == torch.float32 and y.dtype == torch.int64 and not shapes.to("cpu").resident


def test_black_is_minus_one_white_is_one_and_every_level_comes_back():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256)
    x = normalise(levels)
    assert x.min() == -1 and x.max() == 1
    assert torch.equal(((x + 1) * 127.5).round().to(torch.uint8), levels)


def test_a_row_outside_the_dataset_is_our_mistake(shapes):
    with pytest.raises(AssertionError):
        shapes.to("cpu").batch(torch.tensor([2000]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_resident_and_the_mapped_path_give_the_same_batch_on_a_gpu(shapes):
    rows, flip = torch.randint(2000, (64,)), torch.rand(64) < 0.5
    resident, mapped = shapes.to("cuda"), shapes.to("cuda")
    mapped.pixels = None
    assert resident.resident and not mapped.resident
    expected, labels = shapes.to("cpu").batch(rows, flip)
    for batches in (resident, mapped):
        x_0, y = batches.batch(rows, flip)
        assert torch.equal(x_0.cpu(), expected) and torch.equal(y.cpu(), labels)
