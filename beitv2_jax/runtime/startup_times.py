"""Where the time from the command to the first step goes: seconds by phase and for XLA, one line in the log of a run.

A process has one timeline at a time, from `begin` to `report`; in a pipeline every stage has its own. Imports no jax.
"""

import itertools
import os
import time
from pathlib import Path

from absl import logging

COMPILED = "/jax/core/compile/backend_compile_duration"
FOUND_IN_CACHE = "/jax/compilation_cache/cache_hits"
"""What jax calls the seconds of a compilation, or of fetching its result from the cache, and that the latter was so."""

_marks: list[tuple[str, float]] = []
"""When the timeline began, and each phase since then with its end."""
_compilations: list[float] = []
_fetched: list[str] = []


def begin(at: float | None = None) -> None:
    """Start the timeline `at` a time of `time.monotonic`, by default now; one that runs already is kept."""
    if not _marks:
        _compilations.clear()
        _fetched.clear()
        _marks.append(("", time.monotonic() if at is None else at))


def process_start() -> float:
    """Return when this process was started, as `time.monotonic` counts; now, where the system does not report it."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        age = 0.0
    return time.monotonic() - age


def ended(phase: str, at: float | None = None) -> None:
    """Say that `phase`, which began where the former one ended, is over; nothing where no timeline runs."""
    if _marks:
        _marks.append((phase, time.monotonic() if at is None else at))


def watch_compiler() -> None:
    """Count the compilations of this process from now on."""
    import jax

    def compiled(event: str, seconds: float, **_) -> None:
        if event == COMPILED:
            _compilations.append(seconds)

    def happened(event: str, **_) -> None:
        if event == FOUND_IN_CACHE:
            _fetched.append(event)

    jax.monitoring.register_event_duration_secs_listener(compiled)
    jax.monitoring.register_event_listener(happened)


def report(phase: str, at: float | None = None) -> None:
    """End the timeline with `phase`, which is over now or was `at` a time of `time.monotonic`, and log it."""
    if not _marks:
        return
    ended(phase, at)
    parts = [f"{name} {end - start:.1f}" for (_, start), (name, end) in itertools.pairwise(_marks)]
    logging.info(
        "%s done %.1f s after the start: %s; XLA: %d programs in %.1f s, %d of them from the cache",
        phase,
        _marks[-1][1] - _marks[0][1],
        ", ".join(parts),
        len(_compilations),
        sum(_compilations),
        len(_fetched),
    )
    drop()


def drop() -> None:
    """End the timeline without a word: what ran had no first step."""
    _marks.clear()
