"""Source -> host batches: Grain datasets whose every element is a pure function of (seed, position).

Records are read by position, so order and draws need no state beyond the number of batches taken. Every process
takes one contiguous block of each global batch: the blocks of 1, 2 or 4 processes, in process order, are the same
global batch. Per-pixel arithmetic happens later, on the device.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import numpy as np

from beitv2_jax.data import augment, decode, masking
from beitv2_jax.data.sources import Source
from beitv2_jax.data.targets import TargetReader
from beitv2_jax.errors import UserError
from beitv2_jax.rng import host_rng

Example = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Turn (encoded example, epoch) into arrays: one random view, and what goes with it.

    The view index is the epoch where `num_views` is 0 (a new view each epoch), else the epoch modulo `num_views`.
    Views and jitter are drawn from (seed, example id, view index), masks from (seed, example id, epoch).

    Attributes:
      image_size: side of the view in pixels.
      min_scale: smallest area of a view, as a share of the image.
      interpolation: "bicubic", "lanczos" or "bilinear".
      color_jitter: strength; 0 draws no factors. The factors are applied on the device.
      mask: arguments of `masking.block_mask` but `rng`, or None for no mask.
      targets: store to read the features or code ids of the view from, or None.

    Raises:
      UserError: views that `targets` does not hold.
    """

    seed: int
    image_size: int
    min_scale: float
    num_views: int = 0
    interpolation: str = "bicubic"
    color_jitter: float = 0.0
    mask: Mapping[str, Any] | None = None
    targets: TargetReader | None = None

    def __post_init__(self):
        if self.targets is not None and not 0 < self.num_views <= self.targets.num_views:
            raise UserError(
                f"views.num_views is {self.num_views}, the stored targets hold {self.targets.num_views} views.",
                "stored targets exist for a fixed number of views only; 0 would ask for a new view each epoch",
                f"views.num_views = {self.targets.num_views}",
            )

    def __call__(self, example: dict[str, Any], epoch: int) -> Example:
        """Return `images` uint8, `labels`, `example_ids`, `views` and, as configured, `mask` (row-major),
        `jitter_factors` and `jitter_order`, `teacher_features` or `code_ids`."""
        example_id = example["example_id"]
        view_index = epoch % self.num_views if self.num_views else epoch
        image = _decode(example)
        view = augment.random_view(
            host_rng(self.seed, "view", example_id, view_index), *image.shape[:2], min_scale=self.min_scale
        )
        result = {
            "images": augment.crop_resize(image, view, self.image_size, self.interpolation),
            "labels": np.int32(example["label"]),
            "example_ids": np.int64(example_id),
            "views": np.int32(view_index),
        }
        if self.color_jitter:
            result["jitter_factors"], result["jitter_order"] = augment.jitter_draw(
                host_rng(self.seed, "jitter", example_id, view_index), self.color_jitter
            )
        if self.mask is not None:
            result["mask"] = masking.block_mask(host_rng(self.seed, "mask", example_id, epoch), **self.mask).reshape(-1)
        if self.targets is not None:
            target = self.targets[example_id, view_index]
            result[self.targets.feature] = target.astype(np.int32) if target.dtype.kind in "iu" else target
        return result


def _decode(example: dict[str, Any]) -> np.ndarray:
    return decode.decode_image(example["image"], example.get("where", f"example {example['example_id']}"))


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows of this process: `rows(j)` is the number, in the global stream, of its j-th row."""

    batch_size: int
    process_index: int
    process_count: int

    def __post_init__(self):
        if self.batch_size % self.process_count:
            raise UserError(
                f"The batch of {self.batch_size} cannot be divided among {self.process_count} processes.",
                "run.batch_size is the global batch, over all processes",
                f"run.batch_size = a multiple of {self.process_count}",
            )

    @property
    def local_batch_size(self) -> int:
        return self.batch_size // self.process_count

    def __call__(self, local_row: int) -> int:
        step, row = divmod(local_row, self.local_batch_size)
        return step * self.batch_size + self.process_index * self.local_batch_size + row


@dataclasses.dataclass(frozen=True)
class _TrainRow:
    """The transformed example at a local row of the endless training stream."""

    source: Source
    transform: Callable[[dict[str, Any], int], Example]
    rows: _Rows
    order: Callable[[int], np.ndarray]

    def __call__(self, local_row: int) -> Example:
        rows_per_epoch = len(self.source) // self.rows.batch_size * self.rows.batch_size
        epoch, row = divmod(self.rows(local_row), rows_per_epoch)
        return self.transform(self.source[int(self.order(epoch)[row])], epoch)


def _epoch_order(seed: int, num_examples: int) -> Callable[[int], np.ndarray]:
    """Return the function epoch -> permutation of the examples.

    It remembers two epochs, since threads prepare the next one's first batches during the last ones. Grain's own
    `shuffle` needs no memory but milliseconds a row for sets of a few hundred examples.
    """

    @functools.lru_cache(maxsize=2)
    def permutation(epoch: int) -> np.ndarray:
        return host_rng(seed, "order", epoch).permutation(num_examples)

    return permutation


def train_iterator(
    source: Source,
    transform: Callable[[dict[str, Any], int], Example],
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
    prefetch: int = 4,
) -> grain.DatasetIterator:
    """Return the endless iterator over this process's part of every batch.

    The order is a new permutation each epoch, a function of (seed, epoch); the ragged tail of an epoch (fewer than
    `batch_size` examples, different ones each time) is dropped. The iterator's state is the number of batches
    taken, whatever the number of processes or threads: save it with `grain.checkpoint.CheckpointSave`.

    Args:
      batch_size: global; this process yields `batch_size / process_count` rows.
      num_threads: batches prepared at the same time; 0 prepares each when asked for.
      prefetch: batches held ready, in memory.

    Raises:
      UserError: the batch is larger than the source or not divisible by the processes; targets of another length.
    """
    rows = _Rows(batch_size, process_index, process_count)
    if batch_size > len(source):
        raise UserError(
            f"The batch of {batch_size} is larger than the {len(source)} examples of {source.name}.",
            "run.batch_size was meant for a larger data set",
            f"run.batch_size <= {len(source)}",
        )
    targets = getattr(transform, "targets", None)
    if targets is not None and len(targets) != len(source):
        raise UserError(
            f"The stored targets have {len(targets)} examples, {source.name} split {source.split} has {len(source)}.",
            "they were made from another data set or another split",
            "make the targets again from this data",
        )
    order = _epoch_order(seed, len(source))
    dataset = grain.MapDataset.range(sys.maxsize).map(_TrainRow(source, transform, rows, order))
    return iter(dataset.batch(rows.local_batch_size).to_iter_dataset(_read_options(num_threads, prefetch)))


def _read_options(num_threads: int, prefetch: int) -> grain.ReadOptions:
    # Grain counts the buffer in batches here, and uses no more threads than it has places
    buffer_size = max(prefetch, num_threads) if num_threads else 0
    return grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=buffer_size)


@dataclasses.dataclass(frozen=True)
class Batches:
    """A finite sequence of host batches: `len` of them, read anew by every `iter`."""

    dataset: grain.MapDataset
    read_options: grain.ReadOptions

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.dataset.to_iter_dataset(self.read_options))


@dataclasses.dataclass(frozen=True)
class _PaddedRow:
    """The element at a local row of a finite stream; past its end the last one again, with weight 0."""

    load: Callable[[int], Example]
    num_rows: int
    rows: _Rows

    def __call__(self, local_row: int) -> Example:
        row = self.rows(local_row)
        return {**self.load(min(row, self.num_rows - 1)), "weight": np.float32(row < self.num_rows)}


def _padded_batches(
    load: Callable[[int], Example],
    num_rows: int,
    batch_size: int,
    process_index: int,
    process_count: int,
    num_threads: int,
    prefetch: int,
) -> Batches:
    rows = _Rows(batch_size, process_index, process_count)
    num_batches = -(-num_rows // batch_size)
    dataset = grain.MapDataset.range(num_batches * rows.local_batch_size).map(_PaddedRow(load, num_rows, rows))
    return Batches(dataset.batch(rows.local_batch_size), _read_options(num_threads, prefetch))


@dataclasses.dataclass(frozen=True)
class _ViewRow:
    source: Source
    transform: TrainTransform

    def __call__(self, row: int) -> Example:
        index, view_index = divmod(row, self.transform.num_views)
        return self.transform(self.source[index], view_index)


def view_batches(
    source: Source,
    *,
    seed: int,
    image_size: int,
    min_scale: float,
    num_views: int,
    batch_size: int,
    interpolation: str = "bicubic",
    color_jitter: float = 0.0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
    prefetch: int = 4,
) -> Batches:
    """Return every view of every example, in example order, the `num_views` views of an example consecutive.

    The same arguments give `train_iterator` the same views. The last batch is filled up with rows of `weight` 0.

    Raises:
      UserError: `num_views` is not positive, or the batch is not divisible by the processes.
    """
    if num_views < 1:
        raise UserError(
            f"views.num_views is {num_views}, but targets can be stored for a fixed number of views only.",
            "0 means a new view in each epoch, which needs the live network",
            "views.num_views = 1 or more",
        )
    transform = TrainTransform(
        seed=seed,
        image_size=image_size,
        min_scale=min_scale,
        num_views=num_views,
        interpolation=interpolation,
        color_jitter=color_jitter,
    )
    return _padded_batches(
        _ViewRow(source, transform),
        len(source) * num_views,
        batch_size,
        process_index,
        process_count,
        num_threads,
        prefetch,
    )


@dataclasses.dataclass(frozen=True)
class _EvalRow:
    source: Source
    image_size: int
    crop_fraction: float
    interpolation: str

    def __call__(self, row: int) -> Example:
        example = self.source[row]
        image = _decode(example)
        return {
            "images": augment.center_crop(image, self.image_size, self.crop_fraction, self.interpolation),
            "labels": np.int32(example["label"]),
            "example_ids": np.int64(example["example_id"]),
        }


def eval_batches(
    source: Source,
    *,
    image_size: int,
    batch_size: int,
    crop_fraction: float = 0.875,
    interpolation: str = "bicubic",
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
    prefetch: int = 4,
) -> Batches:
    """Return the central crop of every example, in order; the last batch is filled up with rows of `weight` 0.

    All processes get the same number of batches.

    Raises:
      UserError: the batch is not divisible by the processes.
    """
    return _padded_batches(
        _EvalRow(source, image_size, crop_fraction, interpolation),
        len(source),
        batch_size,
        process_index,
        process_count,
        num_threads,
        prefetch,
    )
