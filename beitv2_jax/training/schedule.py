"""When a run logs, saves, evaluates and ends: its durations, resolved to steps."""

import dataclasses
import functools

from ml_collections import ConfigDict

from beitv2_jax import config as config_lib


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When a run logs, saves, evaluates and ends, in steps; 0 means never."""

    batch_size: int
    num_examples: int
    num_steps: int
    warmup_steps: int
    log_every: int
    checkpoint_every: int
    keep_every: int
    eval_every: int

    @classmethod
    def from_config(cls, config: ConfigDict, num_examples: int) -> "Schedule":
        """Resolve the durations of a config."""
        run = config.run
        steps = functools.partial(config_lib.steps, batch_size=run.batch_size, num_examples=num_examples)
        every = {name: steps(run[name]) for name in ("log_every", "checkpoint_every", "keep_every", "eval_every")}
        return cls(
            batch_size=run.batch_size,
            num_examples=num_examples,
            num_steps=steps(run.duration),
            warmup_steps=steps(config.optim.warmup),
            **every,
        )

    def meaning_of_a_step(self) -> dict[str, int]:
        """Return what decides a step's learning rate and data; a checkpoint can be resumed only with the same."""
        return {name: getattr(self, name) for name in ("batch_size", "num_steps", "warmup_steps")}

    def logs(self, step: int) -> bool:
        """Return whether the metrics of the step are logged; they are before every evaluation, and at the end."""
        return self._due(step, self.log_every) or self.evaluates(step)

    def evaluates(self, step: int) -> bool:
        """Return whether an evaluation follows the step."""
        return self._due(step, self.eval_every)

    def saves(self, step: int) -> bool:
        """Return whether a checkpoint follows the step."""
        return self._due(step, self.checkpoint_every, self.keep_every)

    def _due(self, step: int, *periods: int) -> bool:
        return step == self.num_steps or any(period and step % period == 0 for period in periods)
