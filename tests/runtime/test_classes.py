"""Class labels as people type them: names, ids, indices; and the sheet that shows them."""

import pytest
import torch

from src.classes import parse_classes
from src.utils import FlagError, class_columns, sheet

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
        ("zzzzzz", "there are goldfish, Egyptian cat, "),
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
    with pytest.raises(FlagError, match=f"got {index}, but the 5 classes of the checkpoint have indices 0 to 4"):
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
    ],
)
def test_a_word_with_several_meanings_is_refused_with_all_of_them(classes, text, meanings):
    with pytest.raises(FlagError) as refused:
        parse_classes(text, classes, [f"n{i}" for i in range(len(classes))])
    assert f"{text!r} may mean {meanings}. Name one class by its index:N." in str(refused.value)


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
