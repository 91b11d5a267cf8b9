"""How far a long job is: a bar on a terminal, elsewhere a line a minute."""

import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

SECONDS_PER_LINE = 60  # at least, between lines where there is no terminal for a bar


class Bar(tqdm):
    """tqdm with a line a minute where its bar would not be seen. Options are those of tqdm, by name; unit: a noun for one.
    disable: True in a process that is to say nothing."""

    def __init__(self, iterable: Any = None, disable: bool = False, **options: Any):
        super().__init__(iterable, disable=disable or None, dynamic_ncols=True, **options)
        self.has_lines, self.line_clock = self.disable and not disable, time.monotonic()
        self.desc, self.unit, self.postfix = options.get("desc", ""), options["unit"], None  # which tqdm may have left out

    def __iter__(self) -> Iterator:
        with self:
            for item in self.iterable:
                yield item
                self.update()

    def update(self, n: float | None = 1) -> bool | None:
        if self.has_lines:
            self.n += n
            if time.monotonic() - self.line_clock >= SECONDS_PER_LINE:
                self.line_clock = time.monotonic()
                print(self.line())
        return super().update(n)

    def line(self) -> str:
        """ "decoding: image 12,000 of 100,000" """
        unit = {"B": "byte"}.get(self.unit, self.unit.strip())
        place = f"{unit} {self.n:,}" + (f" of {self.total:,}" if self.total else "")
        return ": ".join(filter(None, (self.desc, place, self.postfix)))
