"""The notice that a run is to end: SIGTERM, or what jax's preemption service tells all processes of a run.

Asked by the training loop after every step.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax

from beitv2_jax.training.checkpoint import Checkpointer


@contextlib.contextmanager
def notices(checkpointer: Checkpointer) -> Iterator[Callable[[int], bool]]:
    """Yield the function that tells whether the run is to save after the step it is given, and end.

    It has to be asked after every step, by every process. A lone process listens for SIGTERM itself, until the context
    ends; a second SIGTERM kills it. Where `jax.distributed` is on, jax listens, for SIGTERM and for the maintenance
    notice of a TPU slice, and lets all processes agree on the step.
    """
    if jax.distributed.is_initialized():
        yield checkpointer.reached_preemption
        return
    told = threading.Event()

    def note(number, frame):
        told.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    former = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda step: told.is_set()
    finally:
        signal.signal(signal.SIGTERM, former)
