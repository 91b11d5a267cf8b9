"""Class labels as people type them: names, ids, indices; and the sheet that shows them."""

import csv

import pytest
import torch

from src.data.classes import parse_classes
from src.runtime.sheets import caption, class_columns, font_of, sheet
from src.utils import FlagError
from tests.runtime.test_choice import save

CLASSES = ["goldfish", "Egyptian cat", "tailed frog", "bullfrog", "school bus"]
IDS = ["n01443537", "n02124075", "n01644900", "n01641577", "n04146614"]


def parse(words):
    return parse_classes(words, CLASSES, IDS)


@pytest.mark.parametrize(
    "words, labels",
    [
        ("goldfish", [0]),
        ("Egyptian cat", [1]),
        ("n01644900", [2]),
        ("3", [3]),
        ("0", [0]),
        ("goldfish,n02124075,4", [0, 1, 4]),  # names, ids and indices, mixed
        ("  goldfish , school bus", [0, 4]),
        ("EGYPTIAN CAT,N01443537", [1, 0]),  # in any case
        ("bullfrog,bullfrog,goldfish", [3, 3, 0]),  # as often and in the order asked for
        ("all", [0, 1, 2, 3, 4]),
        (" ALL ", [0, 1, 2, 3, 4]),
    ],
)
def test_a_class_is_a_name_an_id_or_an_index(words, labels):
    assert parse(words) == labels


@pytest.mark.parametrize(
    "words, advice",
    [
        ("goldfihs", "did you mean goldfish"),
        ("goldfish,egyptain cat", "did you mean Egyptian cat"),
        ("frog", "tailed frog"),  # a part of the name
        ("bus", "did you mean school bus"),
        ("zzzzzz", "it has 5 classes: goldfish, Egyptian cat, "),
        ("-1", "has no class '-1'"),
        ("1.5", "has no class '1.5'"),
        ("goldfish,,bullfrog", "has no class ''"),
        ("", "has no class ''"),
    ],
)
def test_a_word_that_is_no_class_is_refused_with_the_nearest_names(words, advice):
    with pytest.raises(FlagError) as refused:
        parse(words)
    assert str(refused.value).startswith("--classes: ") and advice in str(refused.value)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("index", ["5", "1000000", "9" * 30, "index:5"])
def test_an_index_beyond_the_last_class_is_refused_with_the_range(index):
    with pytest.raises(FlagError, match=f"got {index}, but the checkpoint has 5 classes, with the indices 0 to 4"):
        parse(index)


@pytest.mark.parametrize(
    "classes, text, labels",
    [
        (["Cat", "cat", "dog"], "cat", [1]),  # exact spelling before another case
        (["Cat", "cat", "dog"], "Cat,DOG", [0, 2]),
        (["trout, brown", "trout"], "trout, brown", [0]),  # the whole text before its parts
        (["trout, brown", "trout"], "trout,index:0", [1, 0]),
        (["0", "1", "2"], "2,0", [2, 0]),  # a digit as a name, at its own index
        (["red", "ALL"], "all", [0, 1]),
        (["crane", "crane"], "n1,index:0", [1, 0]),
        (["cafe\u0301", "dog"], "caf\xe9,dog", [0, 1]),  # a Mac decomposes the names of files
        (["CAF\xc9", "dog"], "cafe\u0301", [0]),
        (["Stra\xdfe", "\U0001f41f", "\u05d3\u05d2"], "STRASSE,\u05d3\u05d2,\U0001f41f", [0, 2, 1]),
        (["trout, brown", "Trout", "dog"], "dog,Trout, Brown,trout", [2, 0, 1]),  # a comma in a name, and between names
        ([" dog ", "hot  dog"], "hot dog,dog", [1, 0]),
        (["all"], "all", [0]),
        (["all", "dog"], "index:0", [0]),
        (["index:1", "dog"], "index:1,INDEX:0", [1, 0]),  # always the index
    ],
)
def test_names_that_look_alike_are_told_apart(classes, text, labels):
    assert parse_classes(text, classes, [f"n{i}" for i in range(len(classes))]) == labels


@pytest.mark.parametrize(
    "classes, text, meanings",
    [
        (["crane", "crane"], "crane", "index:0 (crane) or index:1 (crane)"),  # ImageNet has such: a bird and a machine
        (["Cat", "cAT"], "cat", "index:0 (Cat) or index:1 (cAT)"),
        (["1", "0"], "1", "index:0 (1) or index:1 (0)"),
        (["red", "all"], "all", "index:1 (all) or every class"),
        (["cafe\u0301", "caf\xe9"], "caf\xe9", "index:0 (cafe\u0301) or index:1 (caf\xe9)"),
        ([" dog", "dog"], " dog", "index:0 ( dog) or index:1 (dog)"),
        (["red, blue", "red", "blue"], "red, blue", "index:0 (red, blue) or index:1 (red)"),
        (["a,b", "b,c", "a", "c"], "a,b,c", "index:0 (a,b) or index:2 (a)"),
        (["dog", "crane", "crane"], "dog,crane,dog", "index:1 (crane) or index:2 (crane)"),
    ],
)
def test_a_word_with_several_meanings_is_refused_with_all_of_them(classes, text, meanings):
    with pytest.raises(FlagError) as refused:
        parse_classes(text, classes, [f"n{i}" for i in range(len(classes))])
    assert f"{text!r} may mean {meanings}. Name one class by its index:N." in str(refused.value)


SCRIPTS = ["caf\xe9", "cafe\u0301", "\u0416\u043a", "\u4f60\u597d", "\u05d3\u05d2", "\U0001f41f", "\u0e01\u0e02"]


@pytest.mark.parametrize("name", ["fish", *SCRIPTS, "a\nb\tc\x00", "\u2028\u2029", "fish" * 5000, " ", "\U000e0ffe"])
def test_a_caption_is_one_line_whose_letters_are_told_apart_or_else_the_index(name):
    shown = caption(name, 7)
    letters = [letter for letter in set(shown) if letter.isalnum()]
    assert len({bytes(font_of(shown).getmask(letter)) for letter in letters}) == len(letters) > 0  # boxes would be alike
    assert shown == "index:7" if name in (" ", "\U000e0ffe") else shown.isprintable()
    labelled = sheet(torch.zeros(1, 3, 96, 96, dtype=torch.uint8), [shown], 1)
    assert labelled.shape == (3, 114, 100) and labelled[:, -14:].max() > 150


def test_a_run_on_folders_of_any_name_draws_each_of_them(run):
    names = ["all", "Cat", "a\nb", "red, blue", "blue", "red", "cafe\u0301", "7", "index:2", "\U0001f41f"]
    for i, name in enumerate(names):
        for split in ("train", "val"):
            save(run.folder / "data" / split / name / "0.png", i)
    run.train(DATA_PATH="data", CACHE_PATH="cache", CLASS_CONDITIONAL=True, EPOCHS=1, NUM_SAMPLES=10)
    draw = ("--checkpoint", "checkpoints/best.pth", "--steps", 1, "--num_samples")
    run.sample(*draw, 10)
    run.sample(*draw, 5, "--classes", "caf\xe9, CAT,red,index:9,a\\nb")
    with (run.folder / "outputs/pictures/002/labels.csv").open(encoding="utf-8") as table:
        assert [row["class"] for row in csv.DictReader(table)] == ["cafe\u0301", "Cat", "red", "\U0001f41f", "a\\nb"]
    for split in ("train", "val"):  # as a copy of the folder by another system may spell it
        (run.folder / "data" / split / "cafe\u0301").rename(run.folder / "data" / split / "caf\xe9")
    run.train(DATA_PATH="data", CACHE_PATH="cache", CLASS_CONDITIONAL=True, EPOCHS=2, NUM_SAMPLES=10)
    assert "'all' may mean index:3 (all) or every class" in run.sample(*draw, 1, "--classes", "all", code=2).err


@pytest.mark.parametrize("size", [16, 64, 128])
def test_the_sheet_shows_every_picture_with_ink_under_it(size):
    levels = torch.arange(5, dtype=torch.uint8) * 40 + 50
    pictures = levels.view(5, 1, 1, 1).expand(5, 3, size, size)
    shown = sheet(pictures, [*CLASSES[:4], "a name that is far too long to fit under any picture"], columns=3)
    assert shown.dtype == torch.uint8 and shown.shape[0] == 3
    height, width = shown.shape[1] // 2, shown.shape[2] // 3
    for i, level in enumerate(levels):
        top, left = i // 3 * height, i % 3 * width
        tile = shown[:, top : top + height, left : left + width]
        assert tile.shape == (3, height, width) and width >= 96
        assert (tile[:, 2:-16, 2:-2] == level).all()
        assert tile[:, -14:].max() > 150  # the name, white on dark
        assert (tile[:, -14:, -2:] == 32).all()  # and no name runs into its neighbour


@pytest.mark.parametrize("classes, columns", [(1, 10), (2, 10), (3, 9), (4, 8), (6, 6), (7, 7), (10, 10), (11, 10), (200, 10)])
def test_a_column_of_the_sheet_holds_one_class_and_few_classes_make_no_strip(classes, columns):
    assert class_columns(classes) == columns
    shown = sheet(torch.zeros(20, 3, 96, 96, dtype=torch.uint8), ["name"] * 20, columns)
    assert shown.shape == (3, -(-20 // columns) * 114, columns * 100)
    few = sheet(torch.zeros(4, 3, 96, 96, dtype=torch.uint8), ["name"] * 4, columns)
    assert few.shape == (3, 114, 400)  # no empty columns
