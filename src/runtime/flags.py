"""Flags that keep rules: argparse, with one clear sentence for everything that is refused. For all scripts.

Nothing here imports torch, so `--help` and refusals are instant.
"""

import argparse
import difflib
import math
import os
import re
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from src.utils import FlagError


class Rule(NamedTuple):
    """What one constant or flag may be."""

    expected: str  # completes "expected ..."
    accept: Callable[[Any], Any]  # the text of a flag or the value of a constant -> the value, or ValueError
    metavar: str  # stands for the value in --help
    bare: Any = None  # what the flag means without a value; None where it needs one


def whole(least: int, most: float = math.inf) -> Rule:
    def accept(value):
        number = int(str(value))  # by way of text, as int() alone takes 1.5 and True for 1
        if not least <= number <= most:
            raise ValueError
        return number

    bounds = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
    return Rule(f"a whole number {bounds}", accept, "N")


def number(bounds: str, is_allowed: Callable[[float], bool]) -> Rule:
    def accept(value):
        number = float(str(value))
        if not (math.isfinite(number) and is_allowed(number)):
            raise ValueError
        return number

    return Rule(f"a number {bounds}", accept, "X")


def choice(*words: str, meaning: Mapping[str, Any] | None = None, metavar: str = "WORD", bare: Any = None) -> Rule:
    """One of a few words, in any case. They stand for themselves, or for what `meaning` says."""
    meaning = meaning or {word.lower(): word for word in words}

    def accept(value):
        if str(value).lower() not in meaning:
            raise ValueError
        return meaning[str(value).lower()]

    return Rule(" or ".join(filter(None, [", ".join(words[:-1]), words[-1]])), accept, metavar, bare)


def text(expected: str, pattern: str, metavar: str) -> Rule:
    def accept(value):
        if not isinstance(value, (str, os.PathLike)) or not re.fullmatch(pattern, str(value), re.DOTALL):
            raise ValueError
        return str(value)

    return Rule(expected, accept, metavar)


def wholes(expected: str, fewest: int, most: float = math.inf) -> Rule:
    """Whole numbers of at least 1: "1,2,2", a tuple, a list, or one alone. Nothing at all, or 0, is ()."""

    def accept(value):
        parts = value if isinstance(value, (tuple, list)) else str(value).split(",") if str(value).strip() else ()
        numbers = tuple(int(str(part)) for part in parts)
        numbers = () if numbers == (0,) else numbers
        if min(numbers, default=1) < 1 or not fewest <= len(numbers) <= most:
            raise ValueError
        return numbers

    return Rule(f"{expected}, separated by commas", accept, "N,N")


POSITIVE = number("above 0", lambda x: x > 0)
NOT_NEGATIVE = number("of at least 0", lambda x: x >= 0)
SHARE = number("of at least 0 and below 1", lambda x: 0 <= x < 1)
YES_NO = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
TRUTH = choice("true", "false", meaning=YES_NO, metavar="BOOL", bare=True)
FOLDER = text("the path of a folder", r".*\S.*", "PATH")


class FlagParser(argparse.ArgumentParser):
    """argparse with a Rule per flag, whose every complaint is a FlagError of one sentence."""

    def __init__(self, script: str, **texts: Any):
        super().__init__(script, allow_abbrev=False, exit_on_error=False, formatter_class=Help, **texts)
        self.rules: dict[str, Rule] = {}

    def add(self, flag: str, rule: Rule, comment: str, group: Any = None, default: Any = argparse.SUPPRESS) -> None:
        """A flag that takes what the rule accepts. Without a default, `parse` returns it only where it was typed."""
        self.rules[flag] = rule

        def read(word: str) -> Any:
            try:
                return rule.accept(word)
            except ValueError:
                raise FlagError(f"{flag}: got {word!r}, expected {rule.expected}.") from None

        bare = {} if rule.bare is None else {"nargs": "?", "const": rule.bare}
        comment = comment.replace("%", "%%")  # argparse fills in %(default)s and the like
        (group or self).add_argument(flag, type=read, metavar=rule.metavar, help=comment, default=default, **bare)

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """{name: value} of the flags; of two alike the last counts. Raises FlagError."""
        words = list(argv)
        for i in range(len(words) - 1, 0, -1):  # argparse takes -1e-4 for a flag, unless `=` ties it to its own
            if re.match(r"-(\.?\d|inf|nan)", words[i]) and re.fullmatch(r"--\w+", words[i - 1]):
                words[i - 1 : i + 1] = [f"{words[i - 1]}={words[i]}"]
        try:
            values, strangers = self.parse_known_args(words)
        except argparse.ArgumentError as error:
            flag = str(error.argument_name)
            problem = f"no value given, expected {self.rules[flag].expected}" if flag in self.rules else error.message
            raise FlagError(f"{flag}: {problem}.") from None
        if strangers:
            word = strangers[0].partition("=")[0]
            problem = "no such flag" if word.startswith("-") else "a word that belongs to no flag"
            end = did_you_mean(word.lower(), [*self.rules, "--help"])
            raise FlagError(f"{word}: {problem}{end} 'python {self.prog} --help' lists them.")
        return vars(values)


class Help(argparse.RawDescriptionHelpFormatter):
    """Flags to the left, comments beside them with words kept whole: `tiny-imagenet` is not broken at its hyphen."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=31)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


def did_you_mean(word: str, names: Collection[str]) -> str:
    """The end of a sentence on a word that is none of the names."""
    match = difflib.get_close_matches(word, names, 1)
    return f"; did you mean {match[0]}?" if match else "."
