"""Processes that move in step and fail in every way, for training_liveness_test.py: a barrier stands for a collective.

`python watchdog_processes.py FOLDER LIMIT` runs all scenarios at the same time, each in three forked processes, and
prints {scenario: [[exit status, what was printed], ...]}; a negative status is the signal that ended the process.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import jax

from beitv2_jax.runtime import watchdog

STEPS, EVENTFUL = 9, 8
watchdog.SLACK = 1.5


class Run:
    """One process of a scenario: what it does at step EVENTFUL is `self.<scenario>`."""

    def __init__(self, name, index, count, folder, limit, barrier):
        self.name, self.index, self.limit, self.barrier = name, index, limit, barrier
        jax.process_index, jax.process_count = lambda: index, lambda: count
        self.watch = watchdog.Watch(folder, 0 if name == "unwatched" else limit, alone=name.startswith("alone"))

    def go(self):
        with self.watch:
            for step in range(1, STEPS + 1):
                self.watch.note("in the step", step)
                self.barrier.wait()
                if step == EVENTFUL:
                    getattr(self, self.name)()
                self.watch.note("waiting for data", step)
                time.sleep(0.08)

    def killed(self):
        if self.index == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def stopped(self):
        if self.index == 0:
            os.kill(os.getpid(), signal.SIGSTOP)

    def hangs_in_its_input(self):
        self.watch.note("waiting for data", EVENTFUL)
        if self.index == 0:
            time.sleep(1000)

    def hangs_everywhere(self):
        time.sleep(1000)

    def fails_with_another_dead(self):
        if self.index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.1)
        raise RuntimeError("connection reset\nby somebody")

    def fails_like_all(self):
        raise RuntimeError("its own fault")

    def fails_alone(self):
        if self.index == 2:
            raise RuntimeError("its own fault")

    def saves_slowly(self):
        self.watch.note("saving", EVENTFUL)
        if self.index == 1:
            time.sleep(1.25 * self.limit)

    def saves_for_ever(self):
        self.watch.note("saving", EVENTFUL)
        if self.index == 1:
            time.sleep(1000)

    def evaluates_long(self):
        for _ in self.watch.noted(range(8), "waiting for data", EVENTFUL):
            time.sleep(0.2 * self.limit)

    def alone_hanging(self):
        if self.index == 2:
            time.sleep(1000)

    def paused(self):
        # as a laptop that sleeps: stopped for longer than the limit, started again by the parent
        os.kill(os.getpid(), signal.SIGSTOP)

    def unwatched(self):
        time.sleep(1.3 * self.limit)
        assert all(thread.name != "watch" for thread in threading.enumerate())


SCENARIOS = [name for name in vars(Run) if not name.startswith("_") and name != "go"]


def fork(name, index, barrier, folder, limit):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(folder / f"{index}.txt", os.O_WRONLY | os.O_CREAT), 2)
        Run(name, index, 3, folder, limit, barrier).go()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main(folder: Path, limit: float) -> None:
    """Run all, and end what is left when nothing should be any more."""
    running, barriers = {}, []
    for name in SCENARIOS:
        (folder / name).mkdir()
        barriers.append(multiprocessing.get_context("fork").Barrier(3))
        for index in range(3):
            running[fork(name, index, barriers[-1], folder / name, limit)] = name, index
    codes, started = {}, time.monotonic()
    while running:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() - started > (2.5 if running[pid] == ("stopped", 0) else 8) * limit:
                os.kill(pid, signal.SIGKILL)
            elif time.monotonic() - started > 1.5 * limit and running[pid][0] == "paused":
                os.kill(pid, signal.SIGCONT)
        time.sleep(0.01)
    printed = {
        name: [(codes[name, i], (folder / name / f"{i}.txt").read_text()) for i in range(3)] for name in SCENARIOS
    }
    print(json.dumps(printed))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
