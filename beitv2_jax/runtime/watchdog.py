"""Whether a run still moves: a process that stands still too long, or that another one left, says so and ends.

The loops say where they stand; a thread of each process watches that, also while the main thread waits in a collective.
jax by itself notices a process that is lost (`runtime.launch.HEARTBEAT_SECONDS`), never one that hangs.
"""

import contextlib
import faulthandler
import itertools
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import logging

from beitv2_jax.errors import Preempted, UserError, print_error
from beitv2_jax.runtime import heartbeat
from beitv2_jax.runtime.atomic_files import write_over

FOLDER = "processes"
BEAT_SECONDS, BEATS_A_LIMIT = 5.0, 40
"""Seconds between two heartbeats; fewer where less than 40 heartbeats would fit into the limit."""
STILL_BEATS = 3
"""A process reads the heartbeats of the others only after so many beats without progress, never in a healthy run."""
SILENT_LOOKS = 14
"""A process whose heartbeat is the same in so many looks is lost. With the beats before, this is shorter than jax
takes to notice it, so that it is told here and by name, and longer than file systems take to show a change (60 s)."""
STEADY = ("waiting for data", "in the step", "computing targets", "computing features")
SLACK = 3.0
"""The limit is so many times longer in all phases that are not steady, such as starting, compiling, evaluating, saving
and fitting."""
LINGER_BEATS = 3
"""Process 0 stays so long after it gave up: jax ends the others when it is gone, before they could say why."""


class Watch:
    """End this process, with `Preempted.EXIT_CODE`, when it makes no progress for `limit` seconds or another is lost.

    What it says then names the process that is lost or behind and where that stands; the stacks of all threads go to
    `workdir/processes`. Nothing is saved: the next start goes on from the newest checkpoint. Time is counted in beats
    of the watching thread: a process that was stopped, or a machine that slept, has not stood still.

    Use as a context manager around all that the processes of a run do together. An error that leaves it, in a run of
    several processes, is held back until it is known whether the loss of another process explains it.

    Args:
        workdir: where every process writes its heartbeat, a file of its own.
        limit: seconds; 0 for no watch at all.
        alone: watch this process only, though there may be others, which go their own ways.
    """

    def __init__(self, workdir: str | Path, limit: float, *, alone: bool = False):
        self._folder, self._limit = Path(workdir) / FOLDER, limit
        self._index = jax.process_index()
        others = [] if alone else [index for index in range(jax.process_count()) if index != self._index]
        self._name = f"process {self._index} on {socket.gethostname()}"
        self._beat = min(BEAT_SECONDS, limit / BEATS_A_LIMIT)
        self._place = {"phase": "starting", "step": 0, "moves": 0}
        self._still, self._beats, self._state, self._error = 0, 0, "running", ""
        self._machine = heartbeat.machine()
        self._others = {index: _Other(index, self._file(index), self._machine) for index in others}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def note(self, phase: str, step: int) -> None:
        """Say that the main thread goes on: with what, at which step. All processes of a run say the same in turn."""
        self._place = {"phase": phase, "step": step, "moves": self._place["moves"] + 1}

    def noted(self, batches: Iterable[Any], phase: str, step: int) -> Iterator[Any]:
        """Yield `batches`, noting each."""
        for batch in batches:
            self.note(phase, step)
            yield batch

    def __enter__(self) -> "Watch":
        if self._limit:
            if self._others:
                self._folder.mkdir(parents=True, exist_ok=True)
            self._show()
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _) -> None:
        if not self._limit:
            return
        if self._others and isinstance(error, Exception) and not isinstance(error, UserError | Preempted):
            self._error = f"{kind.__name__}: {error}".splitlines()[0]
            logging.error("%s (looking whether another process is lost)", self._error)
            self._forget()
            # the thread ends this process when one is
            while not all(other.cleared for other in self._others.values()):
                time.sleep(self._beat)
        self._over.set()
        self._thread.join()
        self._state = "done" if error is None or isinstance(error, Preempted) else f"ended by {kind.__name__}"
        self._show()

    def _run(self) -> None:
        place = None
        while not self._over.wait(self._beat):
            # read once: a move between two readings would go unseen
            now = self._place
            self._still = 0 if place is not now else self._still + 1
            place = now
            self._beats += 1
            self._show()
            if self._still < STILL_BEATS and not self._error:
                self._forget()
                continue
            stood = self._still * self._beat
            # in one direction of a star: few reads where there are many processes, until the end is near
            near_end = self._error or stood >= self._limit
            looked_at = [o for index, o in self._others.items() if self._index == 0 or index == 0 or near_end]
            for other in looked_at:
                other.look()
            # one that failed as this one did is no cause of it, though it may have ended before
            suspects = [other for other in looked_at if not (self._error and other.failed)]
            losses = [loss for other in suspects if (loss := other.loss(self._beat))]
            if losses:
                self._end(losses[0])
            elif stood >= self._limit:
                behind, stood, allowed = self._behind()
                if stood >= allowed:
                    self._end(f"no progress for {stood:.0f} s, behind: {behind}")

    def _forget(self) -> None:
        for other in self._others.values():
            other.forget()

    def _behind(self) -> tuple[str, float, float]:
        """Return who comes last in the order of moves that all go through, for how long that has stood still by its own
        count, and for how long it may."""
        here = {**self._place, "still": self._still}
        stands = [(self._name, here)] + [(other.name, other.shown) for other in self._others.values()]
        last = min(place.get("moves", -1) for _, place in stands)
        behind = [(name, place) for name, place in stands if place.get("moves", -1) == last]
        told = "; ".join(f"{name}, {_text(place)}" for name, place in behind)
        if len(behind) == len(stands) > 1:
            told = f"none of the processes, so a device or the network between them ({told})"
        steady = all(place.get("phase") in STEADY for _, place in behind)
        # one that has not come yet has stood as long as this one waits
        stood = min(place.get("still", self._still) for _, place in behind) * self._beat
        return told, stood, self._limit if steady else self._limit * SLACK

    def _end(self, reason: str) -> None:
        self._state = f"gave up: {reason}"
        self._show()
        stacks = self._folder / f"{self._index}.stacks.txt"
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with stacks.open("w") as file:
                faulthandler.dump_traceback(file)
        print_error(
            f"{self._name} ends: {reason}\n"
            f"  Here:    {_text(self._place)}{', ' * bool(self._error)}{self._error}; stacks of all threads: {stacks}\n"
            "  Instead: the same command again, as launchers do by themselves; it goes on from the newest checkpoint"
        )
        if self._index == 0 and self._others:
            time.sleep(LINGER_BEATS * self._beat)
        end_at_once(Preempted.EXIT_CODE)

    def _file(self, index: int) -> Path:
        return self._folder / f"{index}.json"

    def _show(self) -> None:
        """Leave the sign of life."""
        if self._others:
            owner = {"host": socket.gethostname(), "machine": self._machine, "pid": os.getpid()}
            counts = {"still": self._still, "beats": self._beats}
            said = {**owner, **self._place, **counts, "state": self._state, "error": self._error}
            with contextlib.suppress(OSError):  # a beat that fails is made up by the next
                write_over(self._file(self._index), json.dumps(said) + "\n")


def moving(watch: Watch, stop_if_told: Callable[[], None]) -> Callable[[str], None]:
    """Return the function that a loop over batches calls with its phase: it counts them for `watch`, or stops."""
    batches = itertools.count(1)

    def on_move(phase: str) -> None:
        stop_if_told()
        watch.note(phase, next(batches))

    return on_move


def end_at_once(code: int) -> None:
    """End this process and its worker processes, without what an exit does otherwise."""
    for worker in multiprocessing.active_children():
        worker.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _Other:
    """Another process, by the file it leaves; what that held before this process started is of a former run."""

    def __init__(self, index: int, path: Path, machine: str):
        self._index, self._path, self._machine = index, path, machine
        self._content = self._read()
        self._looks = self._silent_looks = 0
        self.shown: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return f"process {self._index}" + (f" on {self.shown['host']}" if self.shown else "")

    @property
    def failed(self) -> bool:
        """Tell whether it ended, or is about to, by an error."""
        return bool(self.shown.get("error"))

    @property
    def cleared(self) -> bool:
        """Tell whether it is known not to be the cause of an error here: it lives, or has one too."""
        return self.failed or self._looks > SILENT_LOOKS

    def look(self) -> None:
        """Read the file."""
        content = self._read()
        self._looks += 1
        if content == self._content:
            # one that has not come yet is not missed: its start may take longer
            self._silent_looks += bool(self.shown)
            return
        with contextlib.suppress(ValueError):  # in the middle of being written
            self.shown = json.loads(content)
            self._content, self._silent_looks = content, 0

    def forget(self) -> None:
        """Forget for how long it was silent."""
        self._looks = self._silent_looks = 0

    def loss(self, beat: float) -> str:
        """Return how it left the run without a word of agreement, '' if it did not."""
        state = self.shown.get("state", "done")
        if state.startswith("gave up: "):
            return state.removeprefix("gave up: ")
        if state == "done":
            return ""
        if heartbeat.is_dead(self._content, self._machine):
            what = "is dead"
        elif self._silent_looks >= SILENT_LOOKS:
            what = f"has given no sign of life for {self._silent_looks * beat:.0f} s"
        else:
            return ""
        error = self.shown["error"]
        return f"{self.name} {what}, last seen {_text(self.shown)}{', ' * bool(error)}{error}"

    def _read(self) -> bytes:
        try:
            return self._path.read_bytes()
        except OSError:
            return b""


def _text(place: dict[str, Any]) -> str:
    return f"{place['phase']} at step {place['step']}" if place else "not started"
