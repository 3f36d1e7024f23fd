"""Output of a run: metrics to metrics.jsonl, TensorBoard and maybe a service, progress to the terminal.

Process 0 only.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from absl import logging
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tqdm import tqdm

from beitv2_jax.runtime.atomic_files import json_text, write_text
from beitv2_jax.runtime.buckets import AnyPath, as_path, is_remote, write_object
from beitv2_jax.training.wandb_run import WandbRun

METRICS_FILE = "metrics.jsonl"
REWRITE_SECONDS = 60.0
"""In a bucket, where files are written as a whole: time after which new lines are written without being asked for."""


def read_metrics(workdir: str | AnyPath) -> list[dict[str, float]]:
    """Return what `workdir/metrics.jsonl` says of each step, in order; lines that a crash damaged are left out."""
    path = as_path(workdir) / METRICS_FILE
    if not path.exists():
        return []
    lines: dict[int, dict[str, float]] = {}
    for text in path.read_bytes().decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            line = json.loads(text)
            lines.setdefault(int(line["step"]), {}).update(line)
    return list(lines.values())


class MetricWriter:
    """Write one JSON object a logged step, `{"step": finished steps, name: value, ...}`, and the same to TensorBoard.

    Metrics written for one step in several calls become one line, which reaches the disk at `flush`; metrics that come
    after that, those of an evaluation, are another line of the same step. A value that is not finite is `null`. Lines
    that cannot be written are kept until they can; TensorBoard then gets no more. In a bucket both are written as a
    whole, at `flush` or after `REWRITE_SECONDS`.

    Args:
        workdir: holds metrics.jsonl and tensorboard/.
        enabled: False on every process but one; then nothing is written.
        resume_step: finished steps of the state the run continues from; lines beyond it are dropped.
        service: also gets the metrics, where the run has one.
    """

    def __init__(
        self, workdir: str | AnyPath, *, enabled: bool = True, resume_step: int = 0, service: WandbRun | None = None
    ):
        self._enabled, self._service = enabled, service
        self._step: int | None = None
        self._metrics: dict[str, float] = {}
        self._unwritten = b""
        self._whole: bytes | None = None
        self._written = 0.0
        if not enabled:
            return
        as_path(workdir).mkdir(parents=True, exist_ok=True)
        self._path = as_path(workdir) / METRICS_FILE
        kept = "".join(json_text(line) + "\n" for line in read_metrics(workdir) if line["step"] <= resume_step)
        write_text(self._path, kept)
        self._size = len(kept)
        if is_remote(workdir):
            self._whole, self._written = kept.encode(), time.monotonic()
        self._tensorboard: _Events | None = None
        try:
            self._tensorboard = _Events(as_path(workdir) / "tensorboard", resume_step + 1)
        except OSError as error:
            logging.warning("TensorBoard gets no metrics until the next start: %s", error.strerror)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add metrics to the line of `step`."""
        if step != self._step:
            self._end_line()
            if self._whole is None or time.monotonic() - self._written > REWRITE_SECONDS:
                self.flush()
        self._step = step
        self._metrics.update(metrics)

    def flush(self) -> OSError | None:
        """Bring all lines to the disk; return what prevented that, after which the next call tries again."""
        self._end_line()
        if not self._unwritten:
            return None
        self._written = time.monotonic()
        try:
            self._append(self._unwritten)
        except OSError as error:
            logging.warning("%s is not written at step %s: %s", self._path, self._step, error.strerror)
            with contextlib.suppress(OSError):
                os.truncate(self._path, self._size)
            return error
        self._unwritten = b""
        self._show(_Events.upload)
        return None

    def close(self) -> None:
        """Flush and close all."""
        self.flush()
        if self._service is not None:
            self._service.close()
        if self._enabled and self._tensorboard is not None:
            with contextlib.suppress(OSError):
                self._tensorboard.close()

    def _end_line(self) -> None:
        """Let the metrics of the step be a line that is to be written."""
        step, metrics, self._metrics = self._step, self._metrics, {}
        if self._enabled and metrics:
            self._unwritten += (json_text({"step": step, **metrics}) + "\n").encode()
            self._show(lambda tensorboard: tensorboard.write(step, metrics))
            if self._service is not None:
                self._service.write(step, metrics)

    def _append(self, text: bytes) -> None:
        if self._whole is not None:
            write_object(self._path, self._whole + text)
            self._whole += text
            return
        # opened each time, so that a failed write leaves neither a buffer nor a part of a line
        with self._path.open("r+b") as file:
            file.truncate(self._size)
            file.seek(self._size)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self._size += len(text)

    def _show(self, show: Callable[["_Events"], None]) -> None:
        if self._tensorboard is None:
            return
        try:
            show(self._tensorboard)
        except OSError as error:
            logging.warning("TensorBoard gets no more metrics until the next start: %s", error.strerror)
            self._tensorboard = None


class _Events:
    """A TensorBoard file without the thread of `SummaryWriter`, which would wait for ever once a write has failed.

    That of a bucket lies on this machine, and is copied there by `upload`.
    """

    def __init__(self, folder: AnyPath, first_step: int):
        self._bucket, self._copied = (folder, tempfile.TemporaryDirectory()) if is_remote(folder) else (None, None)
        local = Path(self._copied.name) if self._copied else folder
        local.mkdir(parents=True, exist_ok=True)
        self._file = EventsWriter(str(local / "events"))
        # hides what a former start showed of this step and later ones
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._file.write_event(event_pb2.Event(wall_time=time.time(), step=first_step, session_log=start))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            shown = summary.scalar(name, value)
            self._file.write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=shown))
        self._file.flush()

    def upload(self) -> None:
        if self._copied is not None:
            for file in Path(self._copied.name).iterdir():
                write_object(self._bucket / file.name, file.read_bytes())

    def close(self) -> None:
        self._file.close()
        self.upload()
        if self._copied is not None:
            self._copied.cleanup()


class Progress:
    """Show how far a loop is: a bar on a terminal, else one plain line at each `show`.

    Args:
        total: units to do, None if unknown.
        label: what runs.
        unit: what is counted, in the plural.
        done: units done before.
        enabled: False on every process but one.
    """

    def __init__(self, total: int | None, label: str, unit: str, *, done: int = 0, enabled: bool = True):
        self._total, self._label, self._unit, self._enabled = total, label, unit, enabled
        self._first = self._done = done
        self._started = time.monotonic()
        self._bar = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=label, unit=f" {unit}", initial=done, dynamic_ncols=True)

    @property
    def done(self) -> int:
        """Units that are done."""
        return self._done

    def advance(self, count: int = 1) -> None:
        """Count `count` more units as done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)

    def show(self, metrics: Mapping[str, float]) -> None:
        """Show metrics beside the count."""
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in metrics.items()})
        elif self._enabled:
            total = "" if self._total is None else f"/{self._total}"
            parts = [f"{self._label} {self._done}{total} {self._unit}"]
            parts += [f"{name} {value:.4g}" for name, value in metrics.items()]
            parts += [] if (eta := self._eta()) is None else [f"eta {eta}"]
            print("  ".join(parts), flush=True)

    def show_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Print the metrics of an evaluation as a line that stays, without those of every single class."""
        if not self._enabled:
            return
        parts = [f"{self._label} {self._done}/{self._total} {self._unit}"]
        parts += [f"{name} {value:.4g}" for name, value in metrics.items() if name.count("/") < 2]
        line = "  ".join(parts)
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Release the terminal line."""
        if self._bar is not None:
            self._bar.close()

    def _eta(self) -> str | None:
        done = self._done - self._first
        if self._total is None or not done:
            return None
        seconds = round((time.monotonic() - self._started) / done * (self._total - self._done))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
