"""The metrics of the steps: fetched asynchronously, checked and logged, with the rate of the steps.

Between the training loop, which passes the metrics of each step, and the writer, which shows them.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent import futures

import jax
import numpy as np
from absl import logging

from beitv2_jax.runtime import startup_times
from beitv2_jax.training.schedule import Schedule
from beitv2_jax.training.stop_rules import StopRules
from beitv2_jax.training.writer import MetricWriter, Progress

MOST_UNREAD = 1000
"""Steps after which metrics are fetched where none is logged; until then no skipped step is noticed."""


class MetricLog:
    """Fetch, check and write the metrics of the steps, and measure their rate.

    Metrics stay on the devices until a step is logged; between those steps nothing is copied from there.

    Args:
        schedule: which steps are logged.
        writer: receives the metrics of logged steps.
        progress: advances by each step that has ended.
        stop_rules: checks the metrics of every step.
        advise: `(metrics of a logged step, steps) -> ` what to warn of, '' for nothing; said once.
    """

    def __init__(
        self,
        schedule: Schedule,
        writer: MetricWriter,
        progress: Progress,
        stop_rules: StopRules,
        advise: Callable[[dict[str, float], int], str] = lambda metrics, step: "",
    ):
        self._schedule, self._writer, self._progress, self._stop_rules = schedule, writer, progress, stop_rules
        self._advise, self._has_advised = advise, False
        self._running: list[_Step] = []
        self._unread: list[_Step] = []
        self._watch = futures.ThreadPoolExecutor(1, "step")
        self._window = self._total = _Window()
        self._waited = 0.0
        self.restart_clock()
        self.metrics: dict[str, float] = {}

    @property
    def images_per_second(self) -> float:
        """Rate over all steps so far, without evaluations and checkpoints."""
        total = self._total
        return total.steps * self._schedule.batch_size / total.seconds if total.seconds else 0.0

    def add(self, step: int, metrics: dict[str, jax.Array], example_ids: np.ndarray) -> None:
        """Take over the metrics of a step that may still be running, and the ids of this process's rows in it."""
        ended = self._watch.submit(_end_of, metrics["loss"])
        self._running.append(_Step(step, metrics, example_ids, ended, waited=self._waited))
        self._waited = 0.0

    def follow(self, *, leave: int) -> None:
        """Wait until all steps but the newest `leave` have ended; fetch metrics where one of these steps is logged.

        With one left running, a device has its next step before it is done with this one.

        Raises:
            UserError: as `StopRules.check`.
        """
        while len(self._running) > leave:
            oldest = self._running.pop(0)
            ended = oldest.ended.result()
            startup_times.report("first step", ended)
            self._lap(ended, oldest.waited)
            self._progress.advance()
            self._unread.append(oldest)
            if self._schedule.logs(oldest.step) or len(self._unread) == MOST_UNREAD:
                self._fetch()

    def read(self) -> None:
        """Wait for all steps and fetch their metrics; raises as `follow` does."""
        self.follow(leave=0)
        self._fetch()

    def _fetch(self) -> None:
        """Fetch the metrics of all steps that have ended, check them, and write those of logged steps."""
        ended, self._unread = self._unread, []
        for done, on_host in zip(ended, jax.device_get([done.metrics for done in ended]), strict=True):
            metrics = {name: value.item() for name, value in on_host.items()}
            self._stop_rules.check(done.step, metrics, done.example_ids)
            if self._schedule.logs(done.step):
                self._log(done.step, metrics)

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        window, self._window = self._window, _Window()
        speed = window.steps * self._schedule.batch_size / window.seconds
        share = window.waited / window.seconds
        self.metrics = {**metrics, "images_per_second": speed, "data_wait_share": share}
        self._writer.write(step, self.metrics)
        if not self._has_advised and (advice := self._advise(metrics, step)):
            self._has_advised = True
            logging.warning("step %d: %s", step, advice)
        self._progress.show({"loss": metrics["loss"], "images/s": speed, "data wait share": share})

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count, of the time spent inside, what came after the end of the last step: then the devices had no work.

        It is part of the time that the next step takes, which is counted from the end of the last one on.
        """
        started = time.monotonic()
        yield
        waited = time.monotonic() - started
        if self._running:
            last = self._running[-1]
            last.wait = started, started + waited
            # a step that still runs kept the devices busy
            waited = last.starved() if last.ended.done() else 0.0
        self._waited = waited

    def restart_clock(self) -> None:
        """Leave out the time since the last step was read: it went into something else than training."""
        self._clock = time.monotonic()

    def close(self) -> None:
        """End the thread that watches the steps."""
        self._watch.shutdown()

    def _lap(self, ended: float, waited: float) -> None:
        seconds, self._clock = ended - self._clock, ended
        self._window, self._total = (window.lap(seconds, waited) for window in (self._window, self._total))


@dataclasses.dataclass
class _Step:
    """A step that was started: metrics, ids, when it ended, and from when to when the next batch was waited for.

    `waited` are the seconds before it that the devices spent without work.
    """

    step: int
    metrics: dict[str, jax.Array]
    example_ids: np.ndarray
    ended: futures.Future
    wait: tuple[float, float] = (0.0, 0.0)
    waited: float = 0.0

    def starved(self) -> float:
        """Return for how many seconds the devices, done with this step, waited for the next batch."""
        started, ready = self.wait
        return max(0.0, ready - max(started, self.ended.result()))


def _end_of(array: jax.Array) -> float:
    jax.block_until_ready(array)
    return time.monotonic()


@dataclasses.dataclass(frozen=True)
class _Window:
    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def lap(self, seconds: float, waited: float) -> "_Window":
        return _Window(self.steps + 1, self.seconds + seconds, self.waited + waited)
