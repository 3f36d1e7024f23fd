"""Random views and the evaluation crop, on decoded pixels: between decoding and batching in the data pipeline.

Only the geometry happens here; normalisation and colour jitter run on the device, from the numbers drawn here.
"""

import functools
import math
from typing import NamedTuple

import kornia_rs
import numpy as np
from jaxtyping import Float32, Int, Int32, UInt8
from PIL import Image

from beitv2_jax.errors import UserError, did_you_mean

AUGMENTATION_VERSION = "1"
"""Changes whenever the same draw would give a view other pixels; target caches carry it in their manifest."""

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class View(NamedTuple):
    """A crop of an image in whole pixels, and whether it is mirrored left to right after the resize."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def random_view(
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    min_scale: float,
    max_scale: float = 1.0,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip_probability: float = 0.5,
) -> View:
    """Draw a random resized crop and a flip of an image of `height` x `width` pixels.

        area = s H W,  s ~ U(min_scale, max_scale);   w / h = r,  ln r ~ U(ln ratio[0], ln ratio[1])

    Ten attempts to fit the box into the image, then the largest centred box whose ratio lies within `ratio`.
    `rng` is consumed; the caller derives it from (seed, "view", example id, view index).

    Source: torchvision `RandomResizedCrop` followed by `RandomHorizontalFlip(0.5)` (the released recipes).
    """
    flip = bool(rng.random() < flip_probability)
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    # all ten attempts in one call: scalar draws would cost more than the rest of this function
    for scale, shape, place_y, place_x in rng.random((10, 4)).tolist():
        area = height * width * (min_scale + (max_scale - min_scale) * scale)
        aspect = math.exp(log_low + (log_high - log_low) * shape)
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = int(place_y * (height - box_height + 1)), int(place_x * (width - box_width + 1))
            return View(top, left, box_height, box_width, flip)
    box_height, box_width = height, width
    if width / height < ratio[0]:
        box_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        box_width = round(height * ratio[1])
    return View((height - box_height) // 2, (width - box_width) // 2, box_height, box_width, flip)


def _filter(interpolation: str) -> Image.Resampling:
    if interpolation not in INTERPOLATIONS:
        raise UserError(
            f"There is no interpolation {interpolation!r}.",
            did_you_mean(interpolation, INTERPOLATIONS),
            f"Write --config.views.interpolation=NAME with one of {', '.join(sorted(INTERPOLATIONS))}.",
        )
    return INTERPOLATIONS[interpolation]


def crop_resize(
    image: UInt8[np.ndarray, "H W 3"], view: View, image_size: int, interpolation: str = "bicubic"
) -> UInt8[np.ndarray, "S S 3"]:
    """Cut `view` out of `image` and resize it to a square of `image_size` pixels (Pillow's antialiased filters).

    The crop comes first, so pixels outside the box have no influence, as in torchvision; Pillow's `resize(box=...)`
    would let the filter reach beyond the box. Rows are resized before columns, as Pillow did before its version 13,
    which chooses the cheaper order and rounds otherwise for it.

    Raises:
      UserError: unknown `interpolation`.
    """
    resample = _filter(interpolation)
    box = np.ascontiguousarray(image[view.top : view.top + view.height, view.left : view.left + view.width])
    if interpolation == "bilinear":  # kornia_rs does not antialias this one
        resized = np.asarray(Image.fromarray(box).resize((image_size, image_size), resample))
    else:
        resized = kornia_rs.imgproc.resize(box, (image_size, image_size), interpolation)
    return kornia_rs.imgproc.horizontal_flip(resized) if view.flip else resized


def center_crop(
    image: UInt8[np.ndarray, "H W 3"], image_size: int, crop_fraction: float = 0.875, interpolation: str = "bicubic"
) -> UInt8[np.ndarray, "S S 3"]:
    """Resize the shorter side to `int(image_size / crop_fraction)` pixels and cut the central square.

    Pillow does the resize, to the last bit as published: an evaluation reads each image once and can afford it.

    `image` may also be a label map 'H W', with the interpolation 'nearest'.

    Raises:
      ValueError: `crop_fraction` outside (0, 1].
      UserError: unknown `interpolation`.
    Source: torchvision `Resize` and `CenterCrop` as used by the released evaluation (224 / 0.875 = 256).
    """
    if not 0 < crop_fraction <= 1:
        raise ValueError(f"crop_fraction must lie in (0, 1], got {crop_fraction}")
    resample = Image.Resampling.NEAREST if interpolation == "nearest" else _filter(interpolation)
    height, width = image.shape[:2]
    short = int(image_size / crop_fraction)
    size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    resized = np.asarray(Image.fromarray(image).resize(size, resample))
    top, left = round((size[1] - image_size) / 2), round((size[0] - image_size) / 2)
    return np.ascontiguousarray(resized[top : top + image_size, left : left + image_size])


def eval_crop_fraction(image_size: int, chosen: float = 0.0) -> float:
    """Return the fraction of the resized shorter side that the evaluation crop keeps.

    That is `chosen`, or where it is 0 the released value: 0.875, and 1 from 384 pixels on.

    Source: the released evaluation.
    """
    return chosen or (0.875 if image_size < 384 else 1.0)


def jitter_draw(rng: np.random.Generator, strength: float) -> tuple[Float32[np.ndarray, "3"], Int32[np.ndarray, "3"]]:
    """Draw the factors of brightness, contrast and saturation, each U(max(0, 1 - strength), 1 + strength), and
    the order of the three operations (`order[j]` is the j-th to apply), a uniform permutation.

    Source: torchvision `ColorJitter(strength, strength, strength)`.
    """
    low = max(0.0, 1.0 - strength)
    factors = low + (1.0 + strength - low) * rng.random(3)
    return factors.astype(np.float32), rng.permutation(3).astype(np.int32)


_GRAY_SAMPLES = 32


def jitter_gray(
    image: UInt8[np.ndarray, "H W 3"], factors: Float32[np.ndarray, "3"], order: Int32[np.ndarray, "3"]
) -> np.float32:
    """Return the mean grey level of the whole `image` at the moment when colour jitter changes its contrast.

    The published recipe jitters the image before it is cropped, so contrast blends with this level, after what
    `order` puts before it; `models.preprocess.color_jitter`, which sees the crop, is given it. `factors` and
    `order` as `jitter_draw` returns them. Estimated on a regular grid of at most 32 x 32 pixels, hence exact up to
    that size; docs/decoding.md has the error for larger ones.
    """
    pixels = image.reshape(-1, 3).take(_spread_pixels(*image.shape[:2]), axis=0).astype(np.float32)
    for operation in order.tolist():
        if operation == 1:
            break
        factor = factors[operation]
        blended = factor * pixels
        if operation == 2:
            blended += (1 - factor) * _gray(pixels)[:, None]
        pixels = np.floor(np.maximum(np.minimum(blended, 255.0), 0.0))
    return _gray(pixels).mean()


_GRAY_WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)


@functools.lru_cache(maxsize=4096)
def _spread_pixels(height: int, width: int) -> Int[np.ndarray, "k"]:
    """Return the indices, in row-major order, of at most 32 x 32 pixels, one in each of as many equal cells.

    The place in the cell moves by the golden ratio, from row to row along and from column to column down, so that no
    stripes of a picture fall in with it.
    """
    rows, columns = (min(length, _GRAY_SAMPLES) for length in (height, width))
    row, column = np.arange(rows)[:, None], np.arange(columns)
    down = ((row + (0.6180339887 * column + 0.5) % 1.0) * (height / rows)).astype(np.intp)
    right = ((column + (0.6180339887 * row + 0.5) % 1.0) * (width / columns)).astype(np.intp)
    return (down * width + right).reshape(-1)


def _gray(pixels: Float32[np.ndarray, "k 3"]) -> Float32[np.ndarray, "k"]:
    """Return the grey levels (ITU-R 601), rounded as Pillow's 8-bit images are."""
    return np.floor(pixels @ _GRAY_WEIGHTS + np.float32(0.5))
