"""Which numbers label maps hold, and whether a config gives them classes: looked at before anything is trained."""

import concurrent.futures
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Bool, Int

from beitv2_jax.data.decode import CorruptImageError
from beitv2_jax.data.segmentation.label_maps import LabelIds, decode_label_map
from beitv2_jax.data.segmentation.labels import IGNORED
from beitv2_jax.errors import UserError, listed

MAX_MAPS = 1000
"""Label maps of a split that are looked at, spread evenly over it; decoding one of ADE20K takes about 2 ms."""
_READ_AT_ONCE = 32
_MAX_LISTED = 12


class Histogram(NamedTuple):
    """Numbers in the label maps of a split.

    Attributes:
      pixels: number of pixels with each number.
      occurs: whether each number occurs in each map that could be decoded.
      fault: cause of the first one that could not; "" if there is none.
    """

    pixels: Int[np.ndarray, "256"]
    occurs: Bool[np.ndarray, "maps 256"]
    fault: str

    def listed(self) -> str:
        """Return the numbers with their fraction of the pixels, as "0: 61.2%, 255: 38.8%"; the most frequent ones."""
        present = np.flatnonzero(self.pixels)
        kept = np.sort(present[np.argsort(-self.pixels[present], kind="stable")][:_MAX_LISTED])
        text = ", ".join(f"{number}: {self.pixels[number] / self.pixels.sum():.1%}" for number in kept)
        return text + (f" and {len(present) - len(kept)} more" if len(present) > len(kept) else "")


def count_numbers(source, max_maps: int = MAX_MAPS) -> Histogram:
    """Count the numbers in up to `max_maps` label maps of a source, spread evenly over it."""

    def of_map(index: int) -> Int[np.ndarray, "256"] | str:
        example = source[index]
        try:
            numbers = decode_label_map(example["label_map"], example["where"])
        except CorruptImageError as error:
            return f"{error.where}: {error.cause}"
        return np.bincount(numbers.reshape(-1), minlength=256)

    chosen = np.unique(np.linspace(0, len(source) - 1, max_maps).astype(int)).tolist()
    with concurrent.futures.ThreadPoolExecutor(_READ_AT_ONCE) as pool:
        found = list(pool.map(of_map, chosen))
    counts = [counted for counted in found if not isinstance(counted, str)]
    faults = [fault for fault in found if isinstance(fault, str)]
    stacked = np.array(counts, np.int64).reshape(-1, 256)
    return Histogram(stacked.sum(axis=0), stacked > 0, faults[0] if faults else "")


def count_classes(source, offset: int, ignored: Sequence[int], mapping: Sequence[tuple[int, int]]) -> int:
    """Return how many classes all label maps of a source hold: one more than the highest; 0 if they hold none.

    The arguments are those of `LabelIds`. Every map is read: about 2 ms each.
    """
    if mapping:
        return 1 + max(label for _, label in mapping)
    present = np.flatnonzero(count_numbers(source, len(source)).pixels)
    return max([0, *(int(number) - offset + 1 for number in present if number not in ignored)])


def check_numbers(source, ids: LabelIds, *, max_bad_fraction: float, is_training: bool) -> None:
    """Compare the numbers in the label maps of a split with what the config makes of them.

    A class that never occurs, and numbers without a class in few maps, are logged as warnings.

    Args:
      source: an opened split.
      ids: what the config says of the numbers.
      max_bad_fraction: of maps with a number that is neither a class nor ignored, which makes them unreadable.
      is_training: whether the split is to be learned from, for which two classes must occur.

    Raises:
      UserError: no map can be read, no pixel has a class, only one class occurs, or more maps than `max_bad_fraction`
        hold numbers that are neither classes nor ignored.
    """
    histogram = count_numbers(source)
    where = f"the label maps of split {source.split} of {source.name}"
    if not len(histogram.occurs):
        raise UserError(
            f"None of {where} can be read; the first one is {histogram.fault}.",
            "Are they images of one number a pixel, 8 bits each?",
            "Write label maps as PNG files whose pixels are the numbers of the classes.",
        )
    where = f"{where} ({len(histogram.occurs)} of {len(source)} were read, with the numbers {histogram.listed()})"
    class_of, known = ids.table
    present = histogram.pixels > 0
    unknown = present & ~known
    occurring = set(class_of[present & known].tolist()) - {IGNORED}
    enough = len(occurring) >= (2 if is_training else 1)
    if unknown.any() and enough:
        text = f"The numbers {_some(np.flatnonzero(unknown))} are neither a class nor ignored, but occur in {where}."
        if histogram.occurs[:, unknown].any(axis=1).mean() > max_bad_fraction:
            ignored = tuple(sorted({*ids.ignored, *np.flatnonzero(unknown).tolist()}))
            raise UserError(
                text,
                "Is --config.labels.offset, or --config.model.num_classes, that of another data set?",
                f"Write --config.labels.ignored='{ignored}' to leave them out, or {_mapping(present)}.",
            )
        logging.warning("%s These maps count as unreadable.", text)
    if not enough:
        raise UserError(
            f"{len(occurring)} of {ids.num_classes} classes occur in {where}.",
            "Is --config.labels.offset that of another data set, or are numbers of classes in --config.labels.ignored?",
            "Write another --config.data.source, whose label maps hold at least two classes."
            if np.count_nonzero(present) < 2
            else f"Write {_mapping(present)}.",
        )
    if absent := sorted(set(range(ids.num_classes)) - occurring):
        text = "%d of %d classes never occur in %s: %s"
        logging.warning(text, len(absent), ids.num_classes, where, _some(absent))


def _mapping(present: Bool[np.ndarray, "256"]) -> str:
    """Return the flags that make a class of every number that occurs."""
    pairs = tuple((number, label) for label, number in enumerate(np.flatnonzero(present).tolist()))
    flags = f"--config.labels.mapping='{pairs}' --config.labels.ignored='()' --config.model.num_classes={len(pairs)}"
    return f"{flags} to make each number a class"


def _some(numbers: Sequence[int]) -> str:
    return listed([str(number) for number in numbers], _MAX_LISTED)
