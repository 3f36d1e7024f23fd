"""Watchdog: ends a process that makes no progress, or whose peer is lost, with a message that names the cause.

The loops report their phase and step; a thread of each process watches these, also while the main thread waits in a
collective. jax by itself detects a lost process (`runtime.launch.HEARTBEAT_SECONDS`), but never one that hangs.
"""

import contextlib
import faulthandler
import itertools
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from absl import logging

from beitv2_jax.errors import Preempted, UserError, print_error
from beitv2_jax.runtime import heartbeat, preemption
from beitv2_jax.runtime.atomic_files import write_over, write_text
from beitv2_jax.runtime.buckets import AnyPath, as_path, os_errors

FOLDER = "processes"
BEAT_SECONDS, BEATS_A_LIMIT = 5.0, 40
"""Seconds between two heartbeats, and the least number of heartbeats in a limit: short limits have short intervals."""
STILL_BEATS = 3
"""Heartbeats without progress after which a process reads those of the others; in a healthy run it never does."""
SILENT_LOOKS = 14
"""Reads without a change after which a process is lost. Together with `STILL_BEATS` this is shorter than the time in
which jax detects the loss, so that the message here comes first, and longer than file systems delay a change (60 s)."""
STEADY = ("waiting for data", "in the step", "computing targets", "computing features")
SLACK = 3.0
"""Factor of the limit in all other phases, such as starting, compiling, evaluating, saving and fitting."""
LINGER_BEATS = 3
"""Heartbeats for which process 0 waits before it exits: jax ends the others as soon as it is gone, and they must print
their own message first."""


class Watch:
    """End this process, with `Preempted.EXIT_CODE`, when it makes no progress for `limit` seconds or another is lost.

    The message names the process that is lost or behind, with its phase and step; the stacks of all threads are written
    to `workdir/processes`. Nothing is saved: the next start resumes from the newest checkpoint. Time is counted in
    heartbeats of the watching thread, so that a stopped process or a suspended machine does not count as hanging.

    Use as a context manager around all that the processes of a run do together. In a run of several processes an error
    inside it is raised only when it is known whether the loss of another process explains it.

    Args:
        workdir: where every process writes its heartbeat, a file of its own.
        limit: seconds; 0 turns the watchdog off.
        alone: watch this process only, because the others work independently.
    """

    def __init__(self, workdir: str | AnyPath, limit: float, *, alone: bool = False):
        self._folder, self._limit = as_path(workdir) / FOLDER, limit
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
        """Report progress of the main thread: its phase and step. All processes report the same sequence."""
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
            logging.error("%s (checking whether another process is lost)", self._error)
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
            # read once, so that progress between two reads is not missed
            now = self._place
            self._still = 0 if place is not now else self._still + 1
            place = now
            self._beats += 1
            self._show()
            if self._still < STILL_BEATS and not self._error:
                self._forget()
                continue
            stood = self._still * self._beat
            # all read process 0 and process 0 reads all: few reads with many processes, until the limit is near
            near_end = self._error or stood >= self._limit
            looked_at = [o for index, o in self._others.items() if self._index == 0 or index == 0 or near_end]
            for other in looked_at:
                other.look()
            # a process that failed like this one is not the cause, although it may have ended earlier
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
        """Return the processes with the least progress, the seconds since their last progress, and their limit."""
        here = {**self._place, "still": self._still}
        stands = [(self._name, here)] + [(other.name, other.shown) for other in self._others.values()]
        last = min(place.get("moves", -1) for _, place in stands)
        behind = [(name, place) for name, place in stands if place.get("moves", -1) == last]
        described = "; ".join(f"{name}, {_text(place)}" for name, place in behind)
        if len(behind) == len(stands) > 1:
            described = f"none of the processes, so a device or the network between them ({described})"
        steady = all(place.get("phase") in STEADY for _, place in behind)
        # a process that has not started yet has made no progress for as long as this one waits
        stood = min(place.get("still", self._still) for _, place in behind) * self._beat
        return described, stood, self._limit if steady else self._limit * SLACK

    def _end(self, reason: str) -> None:
        self._state = f"gave up: {reason}"
        self._show()
        stacks = self._folder / f"{self._index}.stacks.txt"
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile("w+") as file:
                faulthandler.dump_traceback(file)
                file.seek(0)
                write_text(stacks, file.read())
        print_error(
            f"{self._name} ends: {reason}\n"
            f"  Here:    {_text(self._place)}{', ' * bool(self._error)}{self._error}; stacks of all threads: {stacks}\n"
            "  Run the same command again, as the launchers do by themselves; it resumes from the newest checkpoint."
        )
        if self._index == 0 and self._others:
            time.sleep(LINGER_BEATS * self._beat)
        end_at_once(Preempted.EXIT_CODE)

    def _file(self, index: int) -> AnyPath:
        return self._folder / f"{index}.json"

    def _show(self) -> None:
        """Write the heartbeat."""
        if self._others:
            owner = {"host": socket.gethostname(), "machine": self._machine, "pid": os.getpid()}
            counts = {"still": self._still, "beats": self._beats}
            beat = {**owner, **self._place, **counts, "state": self._state, "error": self._error}
            with contextlib.suppress(OSError):  # the next heartbeat makes up for one that fails
                write_over(self._file(self._index), json.dumps(beat) + "\n")


@contextlib.contextmanager
def watched(label: str, workdir: str, hang_timeout: float) -> Iterator[Callable[[str], None]]:
    """Yield `moving` for a stage without a training loop, which preemption signals stop and a `Watch` ends if it hangs.

    Raises:
        Preempted: from the yielded function, if this process was asked to stop.
    """
    with preemption.stops(label) as stop_if_signalled, Watch(workdir, hang_timeout, alone=True) as watch:
        yield moving(watch, stop_if_signalled)


def moving(watch: Watch, stop_if_signalled: Callable[[], None]) -> Callable[[str], None]:
    """Return the function that a loop over batches calls with its phase: it counts them for `watch`, or stops."""
    batches = itertools.count(1)

    def on_move(phase: str) -> None:
        stop_if_signalled()
        watch.note(phase, next(batches))

    return on_move


def end_at_once(code: int) -> None:
    """End this process and its worker processes without running exit handlers."""
    for worker in multiprocessing.active_children():
        worker.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _Other:
    """Another process, known by its heartbeat file; what that held before this process started is of a former run."""

    def __init__(self, index: int, path: AnyPath, machine: str):
        self._index, self._path, self._machine = index, path, machine
        self._content = self._read()
        self._looks = self._silent_looks = 0
        self.shown: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return f"process {self._index}" + (f" on {self.shown['host']}" if self.shown else "")

    @property
    def failed(self) -> bool:
        """Whether it ended, or is about to end, with an error."""
        return bool(self.shown.get("error"))

    @property
    def cleared(self) -> bool:
        """Whether it is known not to be the cause of an error here: it is alive, or failed too."""
        return self.failed or self._looks > SILENT_LOOKS

    def look(self) -> None:
        """Read the file."""
        content = self._read()
        self._looks += 1
        if content == self._content:
            # a process that has not started yet is not lost: its start may take longer
            self._silent_looks += bool(self.shown)
            return
        with contextlib.suppress(ValueError):  # in the middle of being written
            self.shown = json.loads(content)
            self._content, self._silent_looks = content, 0

    def forget(self) -> None:
        """Reset the count of reads without a change."""
        self._looks = self._silent_looks = 0

    def loss(self, beat: float) -> str:
        """Return how it was lost; '' if it is running, or ended as a run ends."""
        state = self.shown.get("state", "done")
        if state.startswith("gave up: "):
            return state.removeprefix("gave up: ")
        if state == "done":
            return ""
        if heartbeat.is_dead(self._content, self._machine):
            what = "is dead"
        elif self._silent_looks >= SILENT_LOOKS:
            what = f"has sent no heartbeat for {self._silent_looks * beat:.0f} s"
        else:
            return ""
        error = self.shown["error"]
        return f"{self.name} {what}, last seen {_text(self.shown)}{', ' * bool(error)}{error}"

    def _read(self) -> bytes:
        try:
            with os_errors():
                return self._path.read_bytes()
        except OSError:
            return b""


def _text(place: dict[str, Any]) -> str:
    return f"{place['phase']} at step {place['step']}" if place else "not started"
