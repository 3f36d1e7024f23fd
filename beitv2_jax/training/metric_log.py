"""What the host knows of a run: when things happen, the figures of its steps, and why it must stop.

Between the training loop, which hands over the figures of each step, and the writer, which shows them.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from beitv2_jax import config as config_lib
from beitv2_jax.data.bad_records import refuse_too_many
from beitv2_jax.errors import UserError
from beitv2_jax.runtime import startup_times
from beitv2_jax.training.writer import MetricWriter, Progress

MOST_UNREAD = 1000
"""Steps after which figures are fetched where nothing is logged for so long: until then no bad step is noticed."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Hold when things happen, in steps; 0 means never. And how many of the records may be unreadable."""

    batch_size: int
    num_examples: int
    max_bad_fraction: float
    num_steps: int
    warmup_steps: int
    log_every: int
    checkpoint_every: int
    keep_every: int
    eval_every: int
    max_nonfinite_steps: int

    @classmethod
    def from_config(cls, config: ConfigDict, num_examples: int) -> "Plan":
        """Resolve the durations of a config."""
        run = config.run
        steps = functools.partial(config_lib.steps, batch_size=run.batch_size, num_examples=num_examples)
        every = {name: steps(run[name]) for name in ("log_every", "checkpoint_every", "keep_every", "eval_every")}
        return cls(
            batch_size=run.batch_size,
            num_examples=num_examples,
            max_bad_fraction=config.data.max_bad_fraction,
            num_steps=steps(run.duration),
            warmup_steps=steps(config.optim.warmup),
            max_nonfinite_steps=run.max_nonfinite_steps,
            **every,
        )

    def schedule(self) -> dict[str, int]:
        """Return what a step means to learning rate and data: a checkpoint can go on only under the same."""
        return {name: getattr(self, name) for name in ("batch_size", "num_steps", "warmup_steps")}

    def logs(self, step: int) -> bool:
        """Tell whether the figures of the step are written; so they are wherever else something happens."""
        return self._due(step, self.log_every) or self.evaluates(step)

    def evaluates(self, step: int) -> bool:
        """Tell whether an evaluation follows the step."""
        return self._due(step, self.eval_every)

    def saves(self, step: int) -> bool:
        """Tell whether a checkpoint follows the step."""
        return self._due(step, self.checkpoint_every, self.keep_every)

    def _due(self, step: int, *periods: int) -> bool:
        return step == self.num_steps or any(period and step % period == 0 for period in periods)


class Ledger:
    """Keep what the host knows of the steps: the clock, figures not read yet, bad steps in a row, unreadable rows.

    Figures stay on the devices until a step is logged; between those steps nothing is copied from there.
    """

    def __init__(
        self,
        plan: Plan,
        writer: MetricWriter,
        progress: Progress,
        *,
        workdir: str | Path,
        skipped_steps: int = 0,
        unreadable: int = 0,
    ):
        self._plan, self._writer, self._progress, self._workdir = plan, writer, progress, workdir
        self._running: list[_Step] = []
        self._unread: list[_Step] = []
        self._watch = futures.ThreadPoolExecutor(1, "step")
        self._skipped_steps, self._skipped_run = skipped_steps, 0
        self.unreadable = unreadable
        self._window = self._total = _Window()
        self._waited = 0.0
        self.restart_clock()
        self.figures: dict[str, float] = {}

    @property
    def images_per_second(self) -> float:
        """Rate over all steps so far, without evaluations and checkpoints."""
        total = self._total
        return total.steps * self._plan.batch_size / total.seconds if total.seconds else 0.0

    def add(self, step: int, metrics: dict[str, jax.Array], example_ids: np.ndarray) -> None:
        """Take over the figures of a step that may still be running, and the ids of this process's rows in it."""
        ended = self._watch.submit(_end_of, metrics["loss"])
        self._running.append(_Step(step, metrics, example_ids, ended, waited=self._waited))
        self._waited = 0.0

    def follow(self, *, leave: int) -> None:
        """Wait until all steps but the newest `leave` have ended; fetch figures where the plan wants one logged.

        With one left running, a device has its next step before it is done with this one.

        Raises:
            UserError: `max_nonfinite_steps` steps in a row changed nothing, or too many records were unreadable.
        """
        while len(self._running) > leave:
            oldest = self._running.pop(0)
            ended = oldest.ended.result()
            startup_times.tell("first step", ended)
            self._lap(ended, oldest.waited)
            self._progress.advance()
            self._unread.append(oldest)
            if self._plan.logs(oldest.step) or len(self._unread) == MOST_UNREAD:
                self._fetch()

    def read(self) -> None:
        """Wait for all steps and fetch their figures; raises as `follow` does."""
        self.follow(leave=0)
        self._fetch()

    def _fetch(self) -> None:
        """Fetch the figures of all steps that have ended, judge them, and write those that the plan wants logged."""
        ended, self._unread = self._unread, []
        for done, metrics in zip(ended, jax.device_get([done.metrics for done in ended]), strict=True):
            figures = {name: value.item() for name, value in metrics.items()}
            self._refuse_skipped(done.step, figures, done.example_ids)
            self._refuse_unreadable(done.step, figures)
            if self._plan.logs(done.step):
                self._log(done.step, figures)

    def _log(self, step: int, figures: dict[str, float]) -> None:
        window, self._window = self._window, _Window()
        speed = window.steps * self._plan.batch_size / window.seconds
        share = window.waited / window.seconds
        self.figures = {**figures, "images_per_second": speed, "data_wait_share": share}
        self._writer.write(step, self.figures)
        self._progress.show({"loss": figures["loss"], "images/s": speed, "data wait share": share})

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

    def _refuse_skipped(self, step: int, figures: dict[str, float], example_ids: np.ndarray) -> None:
        skipped = figures["nonfinite_steps"] + figures.get("spiked_steps", 0)
        new = skipped > self._skipped_steps
        self._skipped_run = self._skipped_run + 1 if new else 0
        self._skipped_steps = skipped
        if new:
            logging.warning(
                "step %d changed nothing: loss %s, gradient norm %s, example ids here %s",
                step,
                figures["loss"],
                figures["grad_norm"],
                " ".join(map(str, example_ids)),
            )
        if self._skipped_run >= self._plan.max_nonfinite_steps > 0:
            guarded = ", or, for optim.spike_factor, a spike" if "spiked_steps" in figures else ""
            raise UserError(
                f"{self._skipped_run} steps in a row, up to step {step}, had a loss or gradient that is not finite"
                f"{guarded}.",
                "The learning rate may be too high, the warm-up too short, or the data broken"
                + (", or the loss may have risen for good." if guarded else "."),
                "Lower --config.optim.peak_lr, write --config.optim.clip_norm=3.0, or check the data. The newest "
                "checkpoint holds the parameters of the last step that changed them.",
            )

    def _refuse_unreadable(self, step: int, figures: dict[str, float]) -> None:
        # the figure is that of the global batch, so all processes stop at the same step
        self.unreadable += int(figures["unreadable"])
        seen = max(step * self._plan.batch_size, self._plan.num_examples)
        listed = f"listed in {Path(self._workdir) / 'bad_records.jsonl'}"
        refuse_too_many(self.unreadable, seen, self._plan.max_bad_fraction, of=f"up to step {step}", listed=listed)


@dataclasses.dataclass
class _Step:
    """A step that was started: figures, ids, when it ended, and from when to when the next batch was waited for.

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
