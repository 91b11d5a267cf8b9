"""Classes as people type them: names, ids and indices."""

import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from src.utils import FlagError, count, printable


def words_of(text: str) -> tuple[str, ...]:
    """What stands between commas, as it is compared: Unicode NFC, white space at the ends gone, and elsewhere one space."""
    return tuple(" ".join(word.split()) for word in unicodedata.normalize("NFC", text).split(","))


def same_classes(some: Sequence[str], others: Sequence[str]) -> bool:
    """Whether both lists have the same names: a Mac may compose a letter otherwise than the machine that the data came from."""
    return [*map(words_of, some)] == [*map(words_of, others)]


def parse_classes(text: str, classes: Sequence[str], class_ids: Sequence[str], owner: str = "the checkpoint") -> list[int]:
    """ "goldfish,n02124075,17" -> labels; "all" -> every label. A class is a name, an id, or an index from 0, also index:17.
    Exact spelling goes before another case. Names may hold commas.   owner: what has the classes.
    Raises FlagError for a word that means no class, and for a text that can be read in several ways."""
    exact: dict[tuple[str, ...], set[int]] = defaultdict(set)
    any_case: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for label, names in enumerate(zip(classes, class_ids)):
        for name in (*names, str(label)):
            exact[words_of(name)].add(label)
            any_case[words_of(name.casefold())].add(label)
    for label in range(len(classes)):  # this is the index, whatever the names: it tells apart what they cannot
        exact[(f"index:{label}",)] = any_case[(f"index:{label}",)] = {label}
    words, longest = words_of(text), max(map(len, exact))
    ways: list[list[list[int]]] = [[[]], *([] for _ in words)]  # [n]: labels that the first n words may mean
    for end in range(1, len(words) + 1):
        for start in range(max(0, end - longest), end):
            part = words[start:end]
            labels = exact.get(part) or any_case.get(words_of(",".join(part).casefold()), set())
            ways[end] += [[*way, label] for way in ways[start] for label in sorted(labels)][:9]  # more are as bad
    found, every = sorted(ways[-1]), ["every class"] * (words_of(text.casefold()) == ("all",))
    if every and (words not in exact or len(classes) == 1):
        return list(range(len(classes)))
    if len(found + every) > 1:
        k = next((k for k in range(len(words)) if len({tuple(way[k : k + 1]) for way in found}) > 1), 0)  # before, all agree
        meant = [f"index:{label} ({classes[label]})" for way in found for label in way[k : k + 1]] + every
        raise FlagError(f"--classes: {text!r} may mean {' or '.join(dict.fromkeys(meant))}. Name one class by its index:N.")
    if found:
        return found[0]
    word = words[max(n for n, known in enumerate(ways) if known)]
    many = count(len(classes), "class", "classes")
    if re.fullmatch("(index:)?(0|[1-9][0-9]*)", word):
        raise FlagError(f"--classes: got {word}, but {owner} has {many}, with the indices 0 to {len(classes) - 1}.")
    spelled = {name.casefold(): name for pair in zip(classes, class_ids) for name in pair}
    near = difflib.get_close_matches(word.casefold(), spelled, 3, cutoff=0.5)
    near += [name for name in spelled if word and word.casefold() in name][:3]
    meant = [spelled[name] for name in dict.fromkeys(near)]
    there = f"it has {many}: {', '.join(classes[:10])}{', ...' if len(classes) > 10 else '.'}"
    advice = f"did you mean {', '.join(meant)}?" if meant else there
    raise FlagError(f"--classes: {owner} has no class {word!r}; {advice}")


def find_labels(dataset: Any, name: str, classes: str) -> list[int]:
    """The labels of the classes that CLASSES names, in its order. Raises FlagError."""
    names, ids = ([printable(known) for known in getattr(dataset, what, None) or []] for what in ("classes", "class_ids"))
    if not names:
        raise FlagError(f"--classes: {name} does not name its classes. Give its Dataset a list `classes`, or leave this out.")
    labels = parse_classes(classes, names, ids or names, name)
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise FlagError(f"--classes: {classes!r} names index:{twice[0]} ({names[twice[0]]}) twice. Name each class once.")
    return labels
