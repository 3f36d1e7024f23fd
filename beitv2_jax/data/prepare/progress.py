"""How far a long preparation is: a bar on a terminal, a plain line now and then otherwise."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 30

Item = TypeVar("Item")


def progress(items: Iterable[Item], label: str, total: int, unit: str) -> Iterator[Item]:
    """Yield `items` and show on stderr how many of the `total` are done; `unit` is what is counted, in the plural."""
    if sys.stderr.isatty():
        yield from tqdm(items, label, total, unit=f" {unit}", dynamic_ncols=True)
        return
    started = shown = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if done == total or now - shown >= _SECONDS_BETWEEN_LINES:
            shown = now
            left = round((now - started) / done * (total - done))
            print(f"{label}: {done}/{total} {unit}, {left} s left", file=sys.stderr, flush=True)
