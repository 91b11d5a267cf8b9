"""How far a long job is, and how long it will take: a bar on a terminal, elsewhere a line a minute."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

SECONDS_PER_LINE = 60  # at least, between lines where there is no terminal for a bar
FIRST_LINE = 10  # seconds until the first line of a job
Work = Callable[[float], float]


class Bar(tqdm):
    """tqdm with a line a minute where its bar would not be seen. Options are those of tqdm, by name; unit: a noun for one.
    disable: True in a process that is to say nothing.   work: what the first n items cost, in any unit, where they do not cost
    the same. The time to go follows from the work since the first item, which also compiles and allocates."""

    def __init__(self, iterable: Any = None, disable: bool = False, work: Work = float, **options: Any):
        self.work, self.first, self.began = work, math.inf, 0.0
        super().__init__(iterable, disable=disable or None, dynamic_ncols=True, **options)
        self.has_lines, self.next_line = self.disable and not disable, 0.0
        self.desc, self.unit, self.postfix = options.get("desc", ""), options["unit"], None  # which tqdm may have left out

    def __iter__(self) -> Iterator:
        with self:
            for item in self.iterable:
                yield item
                self.update()

    def update(self, n: float | None = 1) -> bool | None:
        now = time.monotonic()
        if self.first == math.inf:
            self.first, self.began = self.n + n, now
            self.next_line = now + min(SECONDS_PER_LINE, FIRST_LINE if self.leave else SECONDS_PER_LINE)
        if self.has_lines:
            self.n += n
            if now >= self.next_line:
                self.next_line = now + SECONDS_PER_LINE
                print(self.line())
        return super().update(n)

    def line(self) -> str:
        """ "decoding: image 12,000 of 100,000, 1 min 20 s to go" """
        unit = {"B": "byte"}.get(self.unit, self.unit.strip())
        place = f"{unit} {self.n:,}" + (f" of {self.total:,}" if self.total else "")
        words = ": ".join(filter(None, (self.desc, place, self.postfix)))
        return words + (f", {duration(seconds)} to go" if (seconds := self.seconds_left()) else "")

    def seconds_left(self) -> float:
        """0 if nothing is left, or where that cannot be told."""
        if not self.total or self.n <= self.first:
            return 0.0
        left, done = (self.work(end) - self.work(start) for start, end in ((self.n, self.total), (self.first, self.n)))
        return (time.monotonic() - self.began) * left / done

    @property
    def format_dict(self) -> dict[str, Any]:
        """For the bar, which computes the time to go from the rate."""
        seconds = self.seconds_left()
        return super().format_dict | ({"rate": (self.total - self.n) / seconds} if seconds else {})


def duration(seconds: float) -> str:
    """62 -> "1 min 2 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{int(seconds // 60)} min {int(seconds % 60)} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
