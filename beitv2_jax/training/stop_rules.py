"""When a run must stop: too many skipped steps in a row, or too many unreadable records."""

import numpy as np
from absl import logging

from beitv2_jax.data.bad_records import refuse_too_many
from beitv2_jax.errors import UserError
from beitv2_jax.runtime.buckets import AnyPath, as_path
from beitv2_jax.training.schedule import Schedule


class StopRules:
    """Judge the metrics of every step, in order. They are those of the global batch, so all processes stop at one step.

    Args:
        schedule: that of the run.
        max_nonfinite_steps: skipped steps in a row that end the run; 0 for any number.
        max_bad_fraction: largest fraction of unreadable records.
        workdir: of the run, for messages.
        skipped_steps: those that the state has counted so far.
        unreadable: records that were unreadable so far.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        max_nonfinite_steps: int,
        max_bad_fraction: float,
        workdir: str | AnyPath,
        skipped_steps: int = 0,
        unreadable: int = 0,
    ):
        self._schedule, self._workdir = schedule, workdir
        self._max_nonfinite_steps, self._max_bad_fraction = max_nonfinite_steps, max_bad_fraction
        self._skipped_steps, self._skipped_in_a_row = skipped_steps, 0
        self.unreadable = unreadable

    def check(self, step: int, metrics: dict[str, float], example_ids: np.ndarray) -> None:
        """Check a step; `example_ids` are those of this process's rows.

        Raises:
            UserError: `max_nonfinite_steps` steps in a row changed nothing, or too many records were unreadable.
        """
        self._check_skipped(step, metrics, example_ids)
        self._check_unreadable(step, metrics)

    def _check_skipped(self, step: int, metrics: dict[str, float], example_ids: np.ndarray) -> None:
        skipped = metrics["nonfinite_steps"] + metrics.get("spiked_steps", 0)
        new = skipped > self._skipped_steps
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if new else 0
        self._skipped_steps = skipped
        if new:
            logging.warning(
                "step %d changed nothing: loss %s, gradient norm %s, example ids here %s",
                step,
                metrics["loss"],
                metrics["grad_norm"],
                " ".join(map(str, example_ids)),
            )
        if self._skipped_in_a_row >= self._max_nonfinite_steps > 0:
            guarded = ", or, for optim.spike_factor, a spike" if "spiked_steps" in metrics else ""
            raise UserError(
                f"{self._skipped_in_a_row} steps in a row, up to step {step}, had a loss or gradient that is not finite"
                f"{guarded}.",
                "The learning rate may be too high, the warm-up too short, or the data broken"
                + (", or the loss may have risen for good." if guarded else "."),
                "Lower --config.optim.peak_lr, write --config.optim.clip_norm=3.0, or check the data. The newest "
                "checkpoint holds the parameters of the last step that changed them.",
            )

    def _check_unreadable(self, step: int, metrics: dict[str, float]) -> None:
        self.unreadable += int(metrics["unreadable"])
        seen = max(step * self._schedule.batch_size, self._schedule.num_examples)
        listed = f"listed in {as_path(self._workdir) / 'bad_records.jsonl'}"
        refuse_too_many(self.unreadable, seen, self._max_bad_fraction, of=f"up to step {step}", listed=listed)
