"""Preemption signals: SIGTERM, which launchers, clusters and machines that shut down send, and SIGINT (Ctrl-C).

Training loops ask after every step and save; stages without a training loop ask after every batch.
"""

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax

from beitv2_jax.errors import Preempted


@contextlib.contextmanager
def notices(agreed_step: Callable[[int], bool]) -> Iterator[Callable[[int], bool]]:
    """Yield a function of the step that returns whether the run must save after that step and end.

    It has to be asked after every step, by every process. A lone process listens itself, until the context ends. Where
    `jax.distributed` is on, jax listens, and `agreed_step` (of the checkpoint manager) is True at the step on which all
    processes agree when one of them is signalled.
    """
    if jax.distributed.is_initialized():
        # jax listens to SIGTERM alone
        with _handling(signal.SIGINT, lambda: os.kill(os.getpid(), signal.SIGTERM)):
            yield agreed_step
        return
    with _listening() as signalled:
        yield lambda step: signalled.is_set()


@contextlib.contextmanager
def stops(label: str) -> Iterator[Callable[[], None]]:
    """Yield a function that raises `Preempted` if this process was asked to stop, for stages without a training loop.

    Processes of such a stage agree on nothing: each listens itself, also where `jax.distributed` is on.
    """
    with _listening() as signalled:

        def stop_if_signalled() -> None:
            if signalled.is_set():
                raise Preempted(f"{label} was preempted: finished work is saved; rerun the same command to resume.")

        yield stop_if_signalled


@contextlib.contextmanager
def _listening() -> Iterator[threading.Event]:
    """Yield the event that SIGTERM and SIGINT set; a second one of the same kind ends the process at once."""
    signalled = threading.Event()
    with _handling(signal.SIGTERM, signalled.set), _handling(signal.SIGINT, signalled.set):
        yield signalled


@contextlib.contextmanager
def _handling(number: int, answer: Callable[[], None]) -> Iterator[None]:
    """Answer the first signal `number`; a second one ends the process. Signals that are ignored stay so."""
    if signal.getsignal(number) == signal.SIG_IGN:
        yield
        return

    def handle(number, frame):
        signal.signal(number, signal.SIG_DFL)
        answer()

    # that of jax is no Python function: signal.signal neither returns it nor takes it back
    former_in_c = _getsig(number)
    former = signal.signal(number, handle)
    try:
        yield
    finally:
        signal.signal(number, former or signal.SIG_DFL)
        _setsig(number, former_in_c)


_getsig, _setsig = ctypes.pythonapi.PyOS_getsig, ctypes.pythonapi.PyOS_setsig
_getsig.argtypes, _getsig.restype = (ctypes.c_int,), ctypes.c_void_p
_setsig.argtypes, _setsig.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
