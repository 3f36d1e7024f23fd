"""Start of the process: logging, jax, the other processes of the run; and its exit."""

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Mapping
from logging import ERROR, WARNING, Formatter, LogRecord
from pathlib import Path
from typing import Any, TextIO

from absl import logging

from beitv2_jax.runtime import startup_times

HEARTBEAT_SECONDS = 100
"""jax regards a process that was silent for this long as lost, and aborts the others (exit code 134). A process that
hangs still sends heartbeats; `runtime.watchdog` notices it."""
SHUTDOWN_SECONDS = 10.0
MAX_ERROR_LENGTH = 200


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Return whether this is one of several processes of one run: SLURM, Open MPI, a TPU slice or JAX_NUM_PROCESSES."""
    return (
        int(environment.get("JAX_NUM_PROCESSES", 1)) > 1
        or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1
        or int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or "," in environment.get("TPU_PROCESS_ADDRESSES", "")
    )


def process_place(environment: Mapping[str, str]) -> dict[str, int]:
    """Return number and index of the processes as a launcher gives them; {} lets jax detect the cluster.

    JAX_NUM_PROCESSES and JAX_PROCESS_ID are read here; JAX_COORDINATOR_ADDRESS, which goes with them, jax reads itself.
    """
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    return {argument: int(environment[name]) for argument, name in names.items() if name in environment}


def _shorten_orbax_errors(record: LogRecord) -> bool:
    """Shorten the long errors that the threads of Orbax log when a save fails: the checkpointer reports the failure."""
    if record.levelno >= ERROR and ("/orbax/" in record.pathname or record.name == "asyncio"):
        record.msg, record.args, record.exc_info = record.getMessage()[:MAX_ERROR_LENGTH], (), None
    return True


class _Unfailing:
    """A text stream whose writes do not fail: what a full disk or a closed pipe does not take is kept or lost."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def keep_running_without_log() -> None:
    """Let no write to stdout or stderr fail from now on, nor the flush at the exit, which would change the exit code.

    `... > FILE` on a full disk and `... | head` take the log away from a run, which is to go on.
    """
    sys.stdout, sys.stderr = (stream and _Unfailing(stream) for stream in (sys.stdout, sys.stderr))


def start_logging(verbosity_given: bool) -> None:
    """Show the messages of this package and the warnings of libraries, unless --verbosity was given."""
    if verbosity_given:
        return
    package = str(Path(__file__).parents[1])
    handler = logging.get_absl_handler()
    handler.addFilter(_shorten_orbax_errors)
    handler.addFilter(lambda record: record.levelno >= WARNING or record.pathname.startswith(package))
    handler.setFormatter(Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.set_verbosity(logging.INFO)


def start_jax(distributed: bool | None, compilation_cache: str) -> None:
    """Start jax: quiet, with its compilation cache, connected to the other processes of the run where there are any.

    Args:
        distributed: whether to connect; None decides by the environment.
        compilation_cache: directory, '' for none.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import jax

    if compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(compilation_cache))
    if in_cluster(os.environ) if distributed is None else distributed:
        jax.distributed.initialize(**process_place(os.environ), heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        logging.info(
            "process %d of %d, on %s; what jax calls the leader task or the coordination service is process 0",
            jax.process_index(),
            jax.process_count(),
            socket.gethostname(),
        )
    startup_times.watch_compiler()
    startup_times.ended("jax")
    jax.devices()
    startup_times.ended("devices")


def leave(code: int) -> None:
    """Exit with `code`; one of several processes does not wait long for the others, which may be waiting for it."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        from beitv2_jax.runtime import watchdog

        # processes that all end normally meet here; otherwise the exit of process 0 would abort the others
        shutdown = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        shutdown.start()
        shutdown.join(SHUTDOWN_SECONDS)
        watchdog.end_at_once(code)
    sys.exit(code)
