"""Image with label map -> arrays: the random crop to train on, and the windows that an evaluation sees.

The counterpart of `transform` for segmentation. Geometry on uint8 happens here; photometric distortion, from the
numbers drawn here, and normalisation on the device.
"""

import dataclasses
from typing import Any

import kornia_rs
import numpy as np
from jaxtyping import Float32, UInt8
from PIL.Image import Resampling, fromarray

from beitv2_jax.data import decode
from beitv2_jax.data.segmentation import windows
from beitv2_jax.data.segmentation.label_maps import LabelIds, decode_label_map
from beitv2_jax.data.segmentation.labels import IGNORED
from beitv2_jax.data.sources import Source
from beitv2_jax.data.transform import GREY, Example, identity, words_for
from beitv2_jax.rng import host_rng

_TRIES = 10

Image = UInt8[np.ndarray, "H W 3"]
LabelMap = UInt8[np.ndarray, "H W"]


def resize_image(image: Image, size: tuple[int, int]) -> Image:
    """Resample bilinearly between pixel centres, without smoothing where the image shrinks, as OpenCV does."""
    if image.shape[:2] == size:
        return image
    for axis in (0, 1):
        if image.shape[axis] == 1:  # kornia_rs wants two, which say the same
            image = np.repeat(image, 2, axis)
    return kornia_rs.imgproc.resize(np.ascontiguousarray(image), size, "bilinear")


def resize_label_map(label_map: LabelMap, size: tuple[int, int]) -> LabelMap:
    """Take the nearest label: row i of the result is row floor(i h / size) of the map, columns likewise, as OpenCV."""
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, label_map.shape, strict=True))
    return label_map[rows[:, None], columns]


def crop_corner(rng: np.random.Generator, label_map: LabelMap, crop: int, max_class_fraction: float) -> tuple[int, int]:
    """Draw the upper left corner of a crop where no class has `max_class_fraction` or more of the labelled pixels.

    After ten further draws the last one is taken in any case. A fraction of 1 takes the first draw.

    Source: mmsegmentation's `RandomCrop` with `cat_max_ratio`.
    """
    margins = [max(length - crop, 0) for length in label_map.shape]
    for tries_left in reversed(range(_TRIES + 1)):
        top, left = (int(rng.integers(margin + 1)) for margin in margins)
        if max_class_fraction >= 1 or not tries_left:
            break
        counts = np.bincount(label_map[top : top + crop, left : left + crop].reshape(-1), minlength=IGNORED + 1)
        counts = counts[:IGNORED]
        if np.count_nonzero(counts) > 1 and counts.max() < max_class_fraction * counts.sum():
            break
    return top, left


def distortion_draw(
    rng: np.random.Generator, *, brightness: float, contrast: float, saturation: float, hue: float, probability: float
) -> Float32[np.ndarray, "5"]:
    """Draw a photometric distortion: brightness shift, contrast factor, saturation factor, hue shift, contrast last.

    Each of the first four is drawn with `probability`, else it changes nothing (0, 1, 1, 0): the shift in levels
    U(-brightness, brightness), the factors U(1 - s, 1 + s), the hue in turns U(-hue, hue). `contrast last` is 0 or 1.

    Source: mmsegmentation's `PhotoMetricDistortion`, whose hue shift is a whole number of 180ths of a turn.
    """
    reach = np.array([brightness, contrast, saturation, hue])
    drawn = np.where(rng.random(4) < probability, rng.uniform(-1, 1, 4) * reach, 0.0) + np.array([0, 1, 1, 0])
    return np.append(drawn, rng.integers(2)).astype(np.float32)


def readable_pair(example: dict[str, Any], ids: LabelIds, grey_size: int) -> tuple[Image, LabelMap, str]:
    """Decode image and label map; return them and "", or a grey square, labels to ignore and "where: cause"."""
    where = words_for(example)
    try:
        if "fault" in example:
            raise decode.CorruptImageError(where, example["fault"])
        image = decode.decode_image(example["image"], where)
        label_map = ids.classes(decode_label_map(example["label_map"], where), where)
        if label_map.shape != image.shape[:2]:
            raise decode.CorruptImageError(
                where, f"its label map has {_size(label_map)} pixels, the image {_size(image)}"
            )
        return image, label_map, ""
    except decode.CorruptImageError as error:
        square = (grey_size, grey_size)
        return np.full((*square, 3), GREY, np.uint8), np.full(square, IGNORED, np.uint8), f"{where}: {error.cause}"


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]} x {array.shape[0]}"


def _padded(array: np.ndarray, size: tuple[int, int], level: int) -> np.ndarray:
    """Extend rows and columns at their ends to `size`."""
    padded = np.full((*size, *array.shape[2:]), level, np.uint8)
    padded[: array.shape[0], : array.shape[1]] = array
    return padded


@dataclasses.dataclass(frozen=True, kw_only=True)
class CropTransform:
    """Turn (encoded example, epoch) into a random crop: resized, cut, mirrored, with the numbers of its distortion.

    Drawn from (seed, example id, epoch). The image is resized to `fitted_size` times U(`min_ratio`, `max_ratio`).

    Attributes:
      image_size: side of the crop in pixels; smaller images are padded.
      long_side, short_side: the size at ratio 1.
      max_class_fraction: of a class in the crop, see `crop_corner`.
      distortion: arguments of `distortion_draw` but `rng`.
    """

    seed: int
    ids: LabelIds
    image_size: int
    long_side: int
    short_side: int
    min_ratio: float
    max_ratio: float
    max_class_fraction: float
    distortion: dict[str, float]

    def __call__(self, example: dict[str, Any], epoch: int) -> Example:
        """Return `images` and `label_maps` (uint8, padding `GREY` and `IGNORED`), `sizes` (rows and columns that are
        no padding), `distortion`, `example_ids`, `weight` and `faults`."""
        image, label_map, fault = readable_pair(example, self.ids, self.image_size)
        example_id = example["example_id"]
        rng = host_rng(self.seed, "view", example_id, epoch)
        ratio = self.min_ratio + (self.max_ratio - self.min_ratio) * rng.random()
        flip = rng.random() < 0.5
        size = windows.fitted_size(*image.shape[:2], int(self.long_side * ratio), int(self.short_side * ratio))
        image, label_map = resize_image(image, size), resize_label_map(label_map, size)
        top, left = crop_corner(rng, label_map, self.image_size, self.max_class_fraction)
        place = (slice(top, top + self.image_size), slice(left, left + self.image_size))
        image, label_map = image[place], label_map[place]
        if flip:
            image, label_map = image[:, ::-1], label_map[:, ::-1]
        square = (self.image_size, self.image_size)
        return {
            "images": _padded(image, square, GREY),
            "label_maps": _padded(label_map, square, IGNORED),
            "sizes": np.array(label_map.shape, np.int32),
            "distortion": distortion_draw(host_rng(self.seed, "distortion", example_id, epoch), **self.distortion),
            **identity(example, fault),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowTransform:
    """Turn an encoded example into the windows of all its views, and its label map at the size it was drawn in.

    A view is the image at one of `scales` of its `fitted_size`, as it is or (with `flip`) mirrored too: the views of a
    scale follow each other. `canvas` are the sizes of the arrays that hold them in a batch.
    """

    ids: LabelIds
    sliding: windows.Sliding
    canvas: windows.Canvas

    def __call__(self, example: dict[str, Any]) -> Example:
        """Return, for `v` views, and arrays that hold `w` windows and `H W` pixels,

        `windows` uint8 'v w S S 3', `corners` int32 'v w 2' of the windows in the view, `num_windows` int32 'v',
        `view_sizes` int32 'v 2', `label_maps` uint8 'H W', `sizes` int32 '2', `example_ids`, `weight`, `faults`.
        """
        image, label_map, fault = readable_pair(example, self.ids, 1)
        crop, views = self.sliding.crop, self.sliding.views(*image.shape[:2])
        places = (len(views), self.canvas.num_windows)
        cut = np.full((*places, crop, crop, 3), GREY, np.uint8)
        corners = np.zeros((*places, 2), np.int32)
        for number, view in enumerate(views):
            pixels = resize_image(image, view.size)
            pixels = pixels[:, ::-1] if view.mirrored else pixels
            corners[number, : len(view.corners)] = view.corners
            for place, (top, left) in enumerate(view.corners):
                window = pixels[top : top + crop, left : left + crop]
                cut[number, place, : window.shape[0], : window.shape[1]] = window
        return {
            "windows": cut,
            "corners": corners,
            "num_windows": np.array([len(view.corners) for view in views], np.int32),
            "view_sizes": np.array([view.size for view in views], np.int32),
            "label_maps": _padded(label_map, (self.canvas.height, self.canvas.width), IGNORED),
            "sizes": np.array(label_map.shape, np.int32),
            **identity(example, fault),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquareTransform:
    """Turn an encoded example into the whole image and its label map, both stretched to a square of `image_size`.

    Source: CAPI's dense evaluation, which resizes images by a bicubic filter and label maps to the nearest pixel.
    """

    ids: LabelIds
    image_size: int

    def __call__(self, example: dict[str, Any]) -> Example:
        """Return `images` uint8 'S S 3', `label_maps` uint8 'S S', `example_ids`, `weight` and `faults`."""
        image, label_map, fault = readable_pair(example, self.ids, self.image_size)
        filters = {"images": Resampling.BICUBIC, "label_maps": Resampling.NEAREST}
        square = {
            name: np.asarray(fromarray(array).resize((self.image_size,) * 2, filters[name]))
            for name, array in (("images", image), ("label_maps", label_map))
        }
        return {**square, **identity(example, fault)}


@dataclasses.dataclass(frozen=True)
class WindowRow:
    """The windows at a row of the finite stream of all examples, those of few windows first."""

    source: Source
    transform: WindowTransform
    order: tuple[int, ...]

    def __call__(self, row: int) -> Example:
        return self.transform(self.source[self.order[row]])


def window_row(source: Source, ids: LabelIds, sliding: windows.Sliding) -> WindowRow:
    """Return the rows of an evaluation of `source`; reads the headers of all its label maps."""
    canvas, order = windows.plan_windows(source, sliding)
    return WindowRow(source, WindowTransform(ids=ids, sliding=sliding, canvas=canvas), tuple(order))
