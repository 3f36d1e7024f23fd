"""Frozen features of a data set, as the protocols of the probe read them, and what a protocol is and returns."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Int, Num

from beitv2_jax.errors import UserError
from beitv2_jax.evaluation.saved import SavedParts
from beitv2_jax.evaluation.standardization import Standardization


@dataclasses.dataclass(frozen=True)
class Features:
    """Frozen features of every readable image of a split, in the order of the data set.

    Attributes:
        arrays: name -> 'examples layers width', of patch tokens 'examples layers patches width'. They are mapped from
            the disk: an index or a slice reads what it asks for. Names are those of `tasks.probe`.
        labels: class of each example.
        layers: numbers (from 1) of the blocks on the second axis.
        num_classes: number of classes, those without an example included.
        made_from: hash of what they were made from.
    """

    arrays: Mapping[str, np.ndarray]
    labels: Int[np.ndarray, "b"]
    layers: tuple[int, ...]
    num_classes: int
    made_from: str = ""

    def last(self, name: str) -> Num[np.ndarray, "b ..."]:
        """Return a view of the features `name` after the last of `layers`; nothing is read."""
        return self.arrays[name][:, -1]


@dataclasses.dataclass(frozen=True)
class ProbeSettings:
    """Numbers of the probe's own section of the config (durations already in steps).

    The named protocols take `num_steps`, `batch_size` and `seed`; their other numbers are part of the protocol.
    """

    num_steps: int
    batch_size: int
    learning_rates: tuple[float, ...]
    weight_decay: float
    knn_neighbors: int
    knn_temperature: float
    validation_fraction: float
    seed: int


class Result(NamedTuple):
    """What a protocol found.

    Attributes:
        accuracies: name -> fraction of the evaluated images that are right, such as 'cls_normed/knn_20'.
        chosen: name -> a number that was chosen or that explains an accuracy, such as 'cls_normed/sgd_rate'.
    """

    accuracies: dict[str, float]
    chosen: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some rows of an array on the disk, which are read and standardised when they are indexed."""

    array: Num[np.ndarray, "n d"]
    rows: Int[np.ndarray, "m"]
    standard: Standardization

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice) -> Float[np.ndarray, "i d"]:
        return self.standard(self.array[self.rows[index]])


OnMove = Callable[[str], None]
"""Is called with what is done at least once a second or so; it raises where the process is to end."""


class Evaluate(Protocol):
    """A protocol: fit on the features `train`, measure on `test`, one of the `parts` after the other."""

    def __call__(
        self, train: Features, test: Features, settings: ProbeSettings, on_move: OnMove, parts: SavedParts
    ) -> Result:
        """Return accuracies on `test`."""


def held_out(num_rows: int, fraction: float, seed: int) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "m"]]:
    """Return the rows to fit on and those held out to choose by: the last `fraction` of a seeded permutation.

    Raises:
        UserError: as `divided`.
    """
    return divided(np.random.default_rng(seed).permutation(num_rows), fraction)


def divided(order: Int[np.ndarray, "b"], fraction: float) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "m"]]:
    """Return the first images of `order`, to fit on, and the last `fraction` of it, at least one, to choose by.

    Raises:
        UserError: there is none to fit on.
    """
    if len(order) < 2:
        raise UserError(
            f"The training split has {len(order)} readable image(s), and one has to be held out to choose by.",
            "Did you mean another split, or another folder?",
            "Write a --config.data.source of at least two training images.",
        )
    num_held = min(max(1, int(len(order) * fraction)), len(order) - 1)
    return order[:-num_held], order[-num_held:]
