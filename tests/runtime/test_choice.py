"""CLASSES: a run on some classes of a dataset, from the refusal of a word to what is drawn, measured and exported."""

import csv
import json
import signal

import numpy as np
import pytest
from PIL import Image

from tests.runs import differences, ended, signal_at

NAMES = ["bird", "cat", "deer", "dog"]
WNIDS = ["n04", "n01", "n03", "n02"]
CPU = ("--device", "cpu", "--precision", "fp32")
COUNT = {"tiny-imagenet": 6, "cifar10": 10, "folder": 10}  # training pictures of a class


def noise(seed):
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def save(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed)).save(path)


def make_tiny_imagenet(root, wnids, train, val):
    """So many pictures in all of each split."""
    for i in range(train):
        save(root / "train" / wnids[i % len(wnids)] / "images" / f"{i}.JPEG", i)
    for i in range(val):
        save(root / "val" / "images" / f"{i}.JPEG", 100 + i)
    lines = [f"{i}.JPEG\t{wnids[i % len(wnids)]}\t0\n" for i in range(val)]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(wnids))


def make_cifar10(root, names, count):
    """So many pictures in each of its files."""
    root.mkdir()
    (root / "batches.meta.txt").write_text("\n".join(names))
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        records = [bytes([i % len(names)]) + noise(count * number + i).transpose(2, 0, 1).tobytes() for i in range(count)]
        (root / f"{name}.bin").write_bytes(b"".join(records))


def make_data(kind, root):
    """A dataset of four classes, the pictures of one among those of the others where its format has them so."""
    if kind == "folder":
        for split, count in {"train": 10, "val": 2}.items():
            for i in range(4 * count):
                save(root / split / NAMES[i % 4] / f"{i}.png", i)
    elif kind == "cifar10":
        make_cifar10(root, NAMES, 8)
    else:
        make_tiny_imagenet(root, WNIDS, 24, 8)
        (root / "words.txt").write_text("".join(f"{w}\t{n}, Latinus\n" for w, n in zip(WNIDS, NAMES)))
    return root


@pytest.fixture(scope="module", params=COUNT)
def data(request, tmp_path_factory):
    """(the settings of a dataset, how many training pictures a class has, the ids of its classes)"""
    root, kind = tmp_path_factory.mktemp("choice"), request.param
    settings = {"DATASET": kind, "DATA_PATH": make_data(kind, root / "data"), "CACHE_PATH": root / "cache", "BATCH_SIZE": 4}
    return settings | {"CLASS_CONDITIONAL": kind != "cifar10"}, COUNT[kind], WNIDS if kind == "tiny-imagenet" else NAMES


def test_a_run_trains_resumes_draws_and_is_measured_on_the_classes_chosen(run, data):
    settings, count, ids = data
    labelled = settings["CLASS_CONDITIONAL"]
    out = run.to("whole").train(CLASSES="dog,bird", **settings).out
    told = "" if labelled else "; not told to the network (to draw them by name: --class_conditional true --run NAME)"
    assert f"classes   2: dog, bird; chosen by CLASSES{told}\n" in out
    assert f"images    {2 * count} for training, 4 for validation" in out
    whole = run.to("whole").state()
    assert whole["classes"] == ["dog", "bird"] and whole["class_ids"] == [ids[3], ids[0]]

    half = run.to("half")
    ended(half.start_train(signal_at(4, 0, "SIGTERM"), CLASSES="dog,bird", **settings), 128 + signal.SIGTERM)
    for others in ("bird,dog", ""):
        assert "give its own classes, --classes dog,bird; " in half.train(CLASSES=others, code=1, **settings).err
    half.train(CLASSES=f"index:3,{ids[0]}", **settings)  # spelled otherwise, they are the same
    assert differences(whole, half.state()) == []

    half.sample("--checkpoint", "checkpoints/best.pth", "--num_samples", 4, "--steps", 2, "--npz")
    rows = list(csv.DictReader((half.folder / "outputs/pictures/001/labels.csv").open()))
    assert [row["class"] for row in rows] == (["dog", "bird"] * 2 if labelled else [""] * 4)
    with np.load(half.folder / "outputs/pictures/001/samples.npz") as arrays:
        assert not labelled or arrays["arr_1"].tolist() == [0, 1, 0, 1]

    ended(half.start("evaluate.py", "--loss", "--nearest", 2, "--num_samples", 2, "--steps", 2, *CPU), 0)
    (report,) = half.folder.glob("outputs/evaluation/*.json")
    assert json.loads(report.read_text())["loss"]["pictures"]["count"] == 4
    assert f"2 validation pictures among {2 * count} training pictures" in (half.folder / "stdout.txt").read_text()
    ended(half.start("export.py"), 0)
    assert "Classes, by label from 0: dog, bird." in (half.folder / "outputs/export/README.md").read_text()


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("bird,9", "got 9, but {} has 4 classes, with the indices 0 to 3."),
        ("cat,bird,index:1", "'cat,bird,index:1' names index:1 (cat) twice. Name each class once."),
    ],
)
def test_a_word_that_names_no_class_is_refused_before_anything_is_decoded(run, data, words, sentence):
    settings = data[0] | {"CACHE_PATH": "cache"}
    refused = run.train(CLASSES=words, code=2, **settings).err
    assert refused.startswith("train.py: --classes: ") and sentence.format(settings["DATASET"]) in refused
    assert not (run.folder / "cache").exists()
