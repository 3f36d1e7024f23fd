"""The metrics of a run at Weights & Biases (`run.wandb`), as one run there however often this one is started."""

import threading
import uuid
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from absl import logging

from beitv2_jax.errors import UserError
from beitv2_jax.runtime.atomic_files import write_text
from beitv2_jax.runtime.buckets import AnyPath, as_path, is_remote

ID_FILE = "wandb_id.txt"
"""File in the workdir with the identity of the run at Weights & Biases."""
START_SECONDS, FINISH_SECONDS = 20.0, 60.0
"""How long the start of a run waits for an answer, and its end for what is not yet sent."""


def check(project: str) -> None:
    """Raise UserError if a project is given and the package wandb is not installed."""
    try:
        if project:
            metadata.version("wandb")
    except metadata.PackageNotFoundError as error:
        raise UserError(
            f"run.wandb={project!r} needs the package wandb, which is not installed.",
            "Did you install beitv2_jax without this extra?",
            'Write pip install "beitv2_jax[wandb]", or leave --config.run.wandb out.',
        ) from error


class WandbRun:
    """Send metrics to a project of Weights & Biases; what goes wrong there is logged and never stops the training.

    Args:
        project: its name.
        workdir: holds the identity of the run, so that a resumed run continues there, and the files of wandb.
        config: settings to be shown there.
    """

    def __init__(self, project: str, workdir: AnyPath, config: Mapping[str, Any]):
        self._run = None
        try:
            import wandb

            path = as_path(workdir) / ID_FILE
            if not path.exists():
                write_text(path, uuid.uuid4().hex)
            self._run = wandb.init(
                project=project,
                id=path.read_text(),
                name="/".join(as_path(workdir).parts[-2:]),
                dir=None if is_remote(workdir) else workdir,
                config=dict(config),
                resume="allow",
                settings=wandb.Settings(console="off", silent=True, init_timeout=START_SECONDS),
            )
        except Exception as error:
            self._give_up(error)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of a step; those of a step that a former start has sent are ignored there."""
        if self._run is None:
            return
        try:
            self._run.log(dict(metrics), step=step)
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Send what is left, for at most a minute."""
        if self._run is None:
            return
        sending = threading.Thread(target=self._finish, daemon=True)
        sending.start()
        sending.join(FINISH_SECONDS)
        if sending.is_alive():
            logging.warning("Weights & Biases has not got all metrics; `wandb sync` sends the rest from the workdir")

    def _finish(self) -> None:
        try:
            self._run.finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        logging.warning("Weights & Biases gets no metrics until the next start: %s", error)
