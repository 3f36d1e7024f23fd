"""Encoded example -> arrays: what is drawn and cut for one row of a training or an evaluation batch.

Between the order of the examples and the batches of `pipeline`. Geometry on uint8 happens here, per-pixel arithmetic
later, on the device. A record that cannot be decoded becomes a grey row of weight 0 that carries its fault.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from beitv2_jax.data import augment, decode, masking
from beitv2_jax.data.sources import Source
from beitv2_jax.data.target_cache.reader import TargetReader
from beitv2_jax.errors import UserError
from beitv2_jax.rng import host_rng

Example = dict[str, np.ndarray]

GREY = 128
"""Level of all pixels of an unreadable image."""


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Turn (encoded example, epoch) into arrays: one random view, and what goes with it.

    The view index is the epoch where `num_views` is 0 (a new view each epoch), else the epoch modulo `num_views`.
    Views and jitter are drawn from (seed, example id, view index), masks and RandAugment from (seed, example id,
    epoch).

    Attributes:
      image_size: side of the view in pixels.
      min_scale: smallest area of a view, as a fraction of the image.
      interpolation: "bicubic", "lanczos" or "bilinear".
      tokenizer_image_size, tokenizer_interpolation: of a second view for the tokenizer, the same box and flip resized
        once more; 0 and "" are those of the first. Where nothing differs there is no second view.
      color_jitter: strength; 0 draws no factors. The factors are applied on the device.
      randaugment: `(image, generator) -> image` on the view's uint8 pixels, or None.
      mask: arguments of `masking.block_mask` but `rng`, or None for no mask.
      targets: cache to read the features or code ids of the view from, or None.

    Raises:
      UserError: views that `targets` does not hold.

    Source: the released MIM recipe cuts one box for both views (`second_input_size`, `second_interpolation`).
    """

    seed: int
    image_size: int
    min_scale: float
    num_views: int = 0
    interpolation: str = "bicubic"
    tokenizer_image_size: int = 0
    tokenizer_interpolation: str = ""
    color_jitter: float = 0.0
    randaugment: Callable[[UInt8[np.ndarray, "H W 3"], np.random.Generator], UInt8[np.ndarray, "H W 3"]] | None = None
    mask: Mapping[str, Any] | None = None
    targets: TargetReader | None = None

    def __post_init__(self):
        if self.targets is not None and not 0 < self.num_views <= self.targets.num_views:
            raise UserError(
                f"The config asks for views.num_views={self.num_views}, but the stored targets hold "
                f"{self.targets.num_views} views.",
                "Did you mean all stored views? With 0 every epoch would have a new view, which is not stored.",
                f"Write --config.views.num_views={self.targets.num_views}.",
            )

    def __call__(self, example: dict[str, Any], epoch: int) -> Example:
        """Return `images` uint8, `labels`, `example_ids`, `views`, `weight` (1, or 0 for an unreadable record) and
        `faults` ("" or "where: cause"), and as configured `tokenizer_images`, `mask` (row-major), `jitter_factors`,
        `jitter_order` and `jitter_gray`, and the stored targets as their encoding ships them."""
        return self.views(example, (epoch,))[0]

    def views(self, example: dict[str, Any], epochs: Iterable[int]) -> list[Example]:
        """Return what a call returns, for each of several epochs, decoding the image once."""
        image, fault = readable_image(example, self.image_size)
        return [self._row(example, image, fault, epoch) for epoch in epochs]

    def _row(self, example: dict[str, Any], image: UInt8[np.ndarray, "H W 3"], fault: str, epoch: int) -> Example:
        example_id = example["example_id"]
        view_index = epoch % self.num_views if self.num_views else epoch
        targets, targets_fault = ({}, "") if self.targets is None else self.targets.readable(example_id, view_index)
        if targets_fault and not fault:
            fault = f"{words_for(example)}: {targets_fault}"
        view = augment.random_view(
            host_rng(self.seed, "view", example_id, view_index), *image.shape[:2], min_scale=self.min_scale
        )
        result = {
            "images": augment.crop_resize(image, view, self.image_size, self.interpolation),
            **_identity(example, fault),
            "views": np.int32(view_index),
        }
        second = (
            self.tokenizer_image_size or self.image_size,
            self.tokenizer_interpolation or self.interpolation,
        )
        if second != (self.image_size, self.interpolation):
            result["tokenizer_images"] = augment.crop_resize(image, view, *second)
        if self.randaugment is not None:
            result["images"] = self.randaugment(result["images"], host_rng(self.seed, "randaugment", example_id, epoch))
        if self.color_jitter:
            rng = host_rng(self.seed, "jitter", example_id, view_index)
            factors, order = augment.jitter_draw(rng, self.color_jitter)
            result |= {
                "jitter_factors": factors,
                "jitter_order": order,
                "jitter_gray": augment.jitter_gray(image, factors, order),
            }
        if self.mask is not None:
            result["mask"] = masking.block_mask(host_rng(self.seed, "mask", example_id, epoch), **self.mask).reshape(-1)
        return result | targets


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Turn an encoded example into its central crop; `tokenizer_image_size` as in `TrainTransform`."""

    image_size: int
    crop_fraction: float = 0.875
    interpolation: str = "bicubic"
    tokenizer_image_size: int = 0

    def __call__(self, example: dict[str, Any]) -> Example:
        """Return `images` uint8, `labels`, `example_ids`, `weight`, `faults` and, as configured, `tokenizer_images`."""
        image, fault = readable_image(example, self.image_size)
        sizes = {"images": self.image_size}
        if self.tokenizer_image_size not in (0, self.image_size):
            sizes["tokenizer_images"] = self.tokenizer_image_size
        crops = {
            name: augment.center_crop(image, size, self.crop_fraction, self.interpolation)
            for name, size in sizes.items()
        }
        return {**crops, **_identity(example, fault)}


def readable_image(example: dict[str, Any], grey_size: int) -> tuple[UInt8[np.ndarray, "H W 3"], str]:
    """Decode a source's record; return its pixels and "", or a grey square of `grey_size` and "where: cause"."""
    where = words_for(example)
    try:
        if fault := example.get("fault", ""):
            raise decode.CorruptImageError(where, fault)
        return decode.decode_image(example["image"], where), ""
    except decode.CorruptImageError as error:
        return np.full((grey_size, grey_size, 3), GREY, np.uint8), f"{where}: {error.cause}"


def words_for(example: dict[str, Any]) -> str:
    """Return the words by which errors name a source's record."""
    return example.get("where", f"example {example['example_id']}")


def _identity(example: dict[str, Any], fault: str) -> Example:
    label = example["label"]
    return {"labels": label if np.ndim(label) else np.int32(label), **identity(example, fault)}


def identity(example: dict[str, Any], fault: str) -> Example:
    """Return what identifies a row and whether it counts: `example_ids`, `weight` and `faults`."""
    return {
        "example_ids": np.int64(example["example_id"]),
        "weight": np.float32(not fault),
        "faults": np.str_(fault),
    }


@dataclasses.dataclass(frozen=True)
class TrainRow:
    """The transformed example at a row of the endless training stream."""

    source: Source
    transform: Callable[[dict[str, Any], int], Example]
    order: Callable[[int], np.ndarray]
    rows_per_epoch: int

    def __call__(self, row: int) -> Example:
        epoch, place = divmod(row, self.rows_per_epoch)
        return self.transform(self.source[int(self.order(epoch)[place])], epoch)


@dataclasses.dataclass(frozen=True)
class EvalRow:
    """The transformed example at a row of the finite stream of all examples."""

    source: Source
    transform: Callable[[dict[str, Any]], Example]

    def __call__(self, row: int) -> Example:
        return self.transform(self.source[row])


@dataclasses.dataclass(frozen=True)
class PaddedRow:
    """The element at a row of a finite stream; past its end the last one again, with weight 0 and no fault."""

    load: Callable[[int], Example]
    num_rows: int

    def __call__(self, row: int) -> Example:
        if row < self.num_rows:
            return self.load(row)
        return {**self.load(self.num_rows - 1), "weight": np.float32(0), "faults": np.str_("")}
