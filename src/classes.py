"""Classes as people type them: names, ids and indices."""

import difflib
from collections.abc import Sequence
from typing import Any

from src.utils import FlagError, count, printable


def parse_classes(text: str, classes: Sequence[str], class_ids: Sequence[str], owner: str = "the checkpoint") -> list[int]:
    """ "goldfish,n02124075,17" -> labels; "all" -> every label. A class is a name, an id, or an index from 0, also index:17.
    Exact spelling goes before another case, and the whole text before its parts between commas.   owner: what has the classes.
    Raises FlagError for a word that means no class, or several."""
    is_name = text in classes or text in class_ids
    if text.strip().lower() == "all" and not is_name:
        return list(range(len(classes)))
    return [find_class(word, classes, class_ids, owner) for word in ([text] if is_name else text.split(","))]


def find_labels(dataset: Any, name: str, classes: str) -> list[int]:
    """The labels of the classes that CLASSES names, in its order. Raises FlagError."""
    names = [printable(known) for known in getattr(dataset, "classes", None) or []]
    ids = [printable(known) for known in getattr(dataset, "class_ids", None) or names]
    if not names:
        raise FlagError(f"--classes: {name} does not name its classes. Give its Dataset a list `classes`, or leave this out.")
    labels = parse_classes(classes, names, ids, name)
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise FlagError(f"--classes: {classes!r} names index:{twice[0]} ({names[twice[0]]}) twice. Name each class once.")
    return labels


def find_class(word: str, classes: Sequence[str], class_ids: Sequence[str], owner: str) -> int:
    """The one label that the word means. Raises FlagError."""
    word, labels = word.strip(), range(len(classes))
    number = word.removeprefix("index:")
    index = int(number) if number.isascii() and number.isdecimal() and len(number) < 10 else -1
    names = [(names, label) for label, pair in enumerate(zip(classes, class_ids)) for names in pair]
    exact = {label for name, label in names if name == word}
    found = exact or {label for name, label in names if name.lower() == word.lower()}
    found = found | ({index} & set(labels)) if number == word else {index} & set(labels)
    meanings = [f"index:{label} ({classes[label]})" for label in sorted(found)] + ["every class"] * (word.lower() == "all")
    if len(meanings) > 1:
        raise FlagError(f"--classes: {word!r} may mean {' or '.join(meanings)}. Name one class by its index:N.")
    if found:
        return found.pop()
    if number.isdecimal():
        many = count(len(classes), "class", "classes")
        raise FlagError(f"--classes: got {word}, but the {many} of {owner} have indices 0 to {labels[-1]}.")
    spelt = {name.lower(): name for name, _ in names}
    near = difflib.get_close_matches(word.lower(), spelt, 3, cutoff=0.5) + [name for name in spelt if word.lower() in name][:3]
    meant = ", ".join(spelt[name] for name in dict.fromkeys(near))
    advice = f"did you mean {meant}?" if meant else f"there are {', '.join(classes[:10])}, ..."
    raise FlagError(f"--classes: {owner} has no class {word!r}; {advice}")
