"""The table of docs/reliability.md, and the functions that bring its faults about: the rows of each section in faults_*.py."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from tests.runs import ROOT, Process, Runner


class Row(NamedTuple):
    fault: str
    sentence: str
    code: int
    kept: str


DOCUMENT = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def read_table() -> list[Row]:
    """The rows of the document, but for the headings in bold."""
    text = DOCUMENT.partition("<!-- tests/runtime/faults.py reads")[2]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    rows = [row for row in cells[2:] if not row[0].startswith("**")]
    return [Row(fault, sentence.strip("`") if "`" in sentence else "", int(code), kept) for fault, sentence, code, kept in rows]


ROWS = read_table()
FAULTS: dict[str, Callable[..., Process]] = {}


def fault(row: str, /, **given: Any) -> Callable:
    """The function below, given these arguments, brings about the fault of that row, checks what is kept, and returns the
    process. Its other parameters are fixtures."""

    def note(bring_about: Callable[..., Process]) -> Callable[..., Process]:
        assert row not in FAULTS
        FAULTS[row] = partial(bring_about, **given)
        return bring_about

    return note


def as_pattern(sentence: str) -> str:
    """A regular expression that a sentence fits once something stands for each <...>."""
    return ".+".join(re.escape(part) for part in re.split("<[^>]*>", sentence))


def saved_run(run: Runner, **settings) -> dict[str, bytes]:
    """A first run of one epoch, from whose checkpoints the run at fault goes on. Returns them."""
    run.train(max_steps=10, **settings)
    return run.files("*.pth")


def kept(run: Runner, before: dict[str, bytes]) -> None:
    assert run.files("*.pth") == before, "a checkpoint was touched"
    assert not run.files(".*part-*"), "something half-made is left"


def drawn(run: Runner, trained: Runner, *words, **options: str) -> Process:
    """A call that draws a picture into the folder `drawn`."""
    checkpoint, flags = trained.folder / "checkpoints/best.pth", ["--device", "cpu", "--precision", "fp32", "--num_samples", 1]
    flags += ["--steps", 2, "--checkpoint", checkpoint, "--output_dir", "drawn"]
    return run.start("sample.py", *flags, *words, **options)
