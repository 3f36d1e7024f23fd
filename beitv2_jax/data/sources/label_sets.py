"""Several classes an image: which sources have them, and how they are held."""

import itertools
from collections.abc import Collection, Iterable

import numpy as np
from jaxtyping import Float32, Int


class LabelSets:
    """The classes of every example of a multi-label source: 4 bytes a label and 8 an example."""

    def __init__(self, sets: Iterable[Collection[int]], num_classes: int):
        sets = list(sets)
        self.num_classes = num_classes
        self._numbers = np.fromiter(itertools.chain.from_iterable(sets), np.int32)
        self._ends = np.cumsum([0, *map(len, sets)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Float32[np.ndarray, "k"]:
        """Return 1 for each class of an example and 0 for the others."""
        return multi_hot(self._numbers[self._ends[index] : self._ends[index + 1]], self.num_classes)

    def counts(self) -> Int[np.ndarray, "k"]:
        """Return how many examples each class has."""
        return np.bincount(self._numbers, minlength=self.num_classes)

    def taken(self, indices: Iterable[int]) -> "LabelSets":
        """Return those of some examples."""
        ends = self._ends.tolist()
        return LabelSets((self._numbers[ends[index] : ends[index + 1]] for index in indices), self.num_classes)


def is_multi_label(source) -> bool:
    """Return whether the examples of a source may have several classes: their `label` is then a vector."""
    return getattr(source, "multi_label", False)


def multi_hot(numbers: Iterable[int], num_classes: int) -> Float32[np.ndarray, "k"]:
    """Return 1 for each of the classes `numbers` and 0 for the others."""
    vector = np.zeros(num_classes, np.float32)
    vector[np.asarray(numbers, int)] = 1.0
    return vector
