"""Start of the process: logging, jax, the other processes of the run; and its exit."""

import contextlib
import errno
import os
import socket
import sys
import threading
from collections.abc import Mapping
from logging import ERROR, WARNING, Formatter, LogRecord
from pathlib import Path
from typing import Any, TextIO

from absl import logging

from beitv2_jax.errors import UserError
from beitv2_jax.runtime import startup_times
from beitv2_jax.runtime.buckets import as_path

HEARTBEAT_SECONDS = 100
"""jax regards a process that was silent for this long as lost, and aborts the others (exit code 134). A process that
hangs still sends heartbeats; `runtime.watchdog` notices it."""
SHUTDOWN_SECONDS = 10.0
MAX_ERROR_LENGTH = 200
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
JAX_SETTINGS = {
    "jax_enable_x64": False,
    "jax_disable_jit": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
}
"""Settings of jax that must have their default: with another, the first four stop a run with an error inside jax, and
the others silently change every random draw."""


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Return whether this is one of several processes of one run: SLURM, Open MPI, a TPU slice or JAX_NUM_PROCESSES.

    Raises:
        UserError: a variable that holds the number of processes holds something else.
    """
    return (
        any(
            (_number(environment, name) or 1) > 1
            for name in ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
        )
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or "," in environment.get("TPU_PROCESS_ADDRESSES", "")
    )


def process_place(environment: Mapping[str, str]) -> dict[str, int]:
    """Return number and index of the processes as a launcher gives them; {} lets jax detect the cluster.

    JAX_NUM_PROCESSES and JAX_PROCESS_ID are read here; JAX_COORDINATOR_ADDRESS, which goes with them, jax reads itself.

    Raises:
        UserError: one of them is not a number.
    """
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    found = {argument: _number(environment, name) for argument, name in names.items()}
    return {argument: number for argument, number in found.items() if number is not None}


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """Return the whole number that a variable of the environment holds; None if it is not set, or empty."""
    value = environment.get(name, "").strip()
    if not value:
        return None
    try:
        return int(value)
    except ValueError:
        raise UserError(
            f"The environment variable {name} is {value!r}, which is not a whole number.",
            "Did a launcher or a script leave something unfinished in it?",
            f"Set {name} to a number, or unset it for a run of one process.",
        ) from None


def check_jax_settings() -> None:
    """Import jax, and raise UserError if the environment gives it a setting with which this program cannot compute."""
    try:
        import jax
    except ValueError as error:  # what jax raises where a variable of its own has a value that it does not know
        raise UserError(
            f"jax cannot be imported: {error}.",
            "Did you set one of its environment variables (JAX_...) to a value that it does not know?",
            "Unset that variable.",
        ) from error
    for name, needed in JAX_SETTINGS.items():
        if (value := getattr(jax.config, name)) != needed:
            raise UserError(
                f"jax is set to {name}={value}, by the environment variable {name.upper()} or by a program.",
                "Did you set it for another program?",
                f"Unset {name.upper()}: this program needs the default, {needed}.",
            )


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

    Raises:
        UserError: the environment gives jax a setting, a number of processes or a platform that cannot be used.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    check_jax_settings()
    import jax

    compilation_cache = os.path.expanduser(compilation_cache)
    if compilation_cache.startswith("~"):
        logging.warning("no compilation cache, as the home directory in %s is unknown", compilation_cache)
    elif compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.fspath(as_path(compilation_cache)))
    if in_cluster(os.environ) if distributed is None else distributed:
        if not os.environ.get("JAX_COORDINATOR_ADDRESS", "").strip():
            os.environ.pop("JAX_COORDINATOR_ADDRESS", None)  # jax takes an empty one for an address
        try:
            jax.distributed.initialize(**process_place(os.environ), heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        except (ValueError, IndexError) as error:  # the latter for an address without a port
            raise UserError(
                f"The processes of this run cannot be connected: {str(error).rstrip('.')}.",
                "Did the launcher set only a part of what every process has to know?",
                "Set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID in every process, or "
                "write --nodistributed for a run of one process.",
            ) from error
        logging.info(
            "process %d of %d, on %s; what jax calls the leader task or the coordination service is process 0",
            jax.process_index(),
            jax.process_count(),
            socket.gethostname(),
        )
    startup_times.watch_compiler()
    startup_times.ended("jax")
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        if jax.distributed.is_initialized():
            raise  # a machine may be lost, and after a UserError launchers would not start again
        platforms = jax.config.jax_platforms
        raise UserError(
            f"jax finds no device it can use: {str(error).partition(chr(10))[0] or 'none'}.",
            f"Does this machine lack what JAX_PLATFORMS={platforms} names, or is its driver or plugin not installed?"
            if platforms
            else "Is the accelerator in use by another process?",
            "Unset JAX_PLATFORMS to let jax choose, or set JAX_PLATFORMS=cpu to compute on the CPU.",
        ) from error
    startup_times.ended("devices")


def failed_write(error: Exception) -> UserError | None:
    """Return the message for an error of the system that concerns the disk or permissions; None for another error."""
    if not isinstance(error, OSError) or error.errno not in CANNOT_WRITE:
        return None
    return UserError(
        f"{error.filename or 'A file of this run'} cannot be opened or written: {os.strerror(error.errno)}.",
        "Is the disk of the workdir or of the temporary files full, or do the files there belong to another user?",
        "Free space there or change the permissions and give the same command again, or use another --workdir.",
    )


def ended(code: int) -> int:
    """Return the exit code of a command; one of several processes leaves if it failed, as others may wait for it."""
    if code and _is_one_of_several():
        leave(code)
    return code


def leave(code: int) -> None:
    """Exit with `code`; one of several processes does not wait long for the others, which may be waiting for it."""
    if _is_one_of_several():
        import jax

        from beitv2_jax.runtime import watchdog

        # processes that all end normally meet here; otherwise the exit of process 0 would abort the others
        shutdown = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        shutdown.start()
        shutdown.join(SHUTDOWN_SECONDS)
        watchdog.end_at_once(code)
    sys.exit(code)


def _is_one_of_several() -> bool:
    jax = sys.modules.get("jax")  # before jax is loaded, a process is alone
    return jax is not None and jax.distributed.is_initialized()
