"""Which examples make up which batch: a permutation for each epoch, and each process's rows of each global batch.

First station of the pipeline behind a source: numbers only, functions of (seed, step) and of nothing else.
"""

import dataclasses
import functools
import threading

import numpy as np
from jaxtyping import Int32

from beitv2_jax.errors import UserError
from beitv2_jax.rng import host_rng


@dataclasses.dataclass(frozen=True)
class BatchRows:
    """The rows of one process: one contiguous block of each global batch, in process order.

    So the blocks of 1, 2 or 4 processes, joined, are the same global batch.

    Raises:
      UserError: the batch is not divisible by the processes.
    """

    batch_size: int
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self):
        if self.batch_size % self.process_count:
            raise UserError(
                f"The batch of {self.batch_size} cannot be divided among {self.process_count} processes.",
                "Did you mean the batch of one process? A batch size is that of all processes together.",
                f"Write a multiple of {self.process_count} as --config.run.batch_size, and as "
                "--config.evaluation.batch_size of a segmentation.",
            )

    def __call__(self, step: int) -> range:
        """Return the numbers, in the global stream of rows, of this process's rows of batch `step`."""
        first = step * self.batch_size + self.process_index * self.share
        return range(first, first + self.share)

    @property
    def share(self) -> int:
        """Number of rows that each process has of a batch."""
        return self.batch_size // self.process_count


class EpochOrder:
    """The permutation of the examples in an epoch, drawn from (seed, "order", epoch).

    A permutation takes 4 bytes an example (57 MB for 14 million) and 0.1 microseconds of drawing for each. Two are
    kept, since the next epoch's first batches are prepared during the last ones of this. Grain's own `shuffle` needs
    no memory but milliseconds a row for sets of a few hundred examples.
    """

    def __init__(self, seed: int, num_examples: int):
        self._seed, self._num_examples = seed, num_examples
        self._lock = threading.Lock()
        self._permutation = functools.lru_cache(maxsize=2)(self._draw)

    def __call__(self, epoch: int) -> Int32[np.ndarray, "num_examples"]:
        """Return the example at each place of the epoch."""
        with self._lock:  # the threads that reach a new epoch together wait for one drawing
            return self._permutation(epoch)

    def _draw(self, epoch: int) -> np.ndarray:
        return host_rng(self._seed, "order", epoch).permutation(np.arange(self._num_examples, dtype=np.int32))

    def __reduce__(self):
        return EpochOrder, (self._seed, self._num_examples)
