"""Random views and the evaluation crop, on decoded pixels: between decoding and batching in the data pipeline.

Only the geometry happens here; normalisation and colour jitter run on the device, from the factors drawn here.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt8
from PIL import Image

from beitv2_jax.errors import UserError

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
            "a misspelt views.interpolation in the config",
            f"one of {', '.join(sorted(INTERPOLATIONS))}",
        )
    return INTERPOLATIONS[interpolation]


def crop_resize(
    image: UInt8[np.ndarray, "H W 3"], view: View, image_size: int, interpolation: str = "bicubic"
) -> UInt8[np.ndarray, "S S 3"]:
    """Cut `view` out of `image` and resize it to a square of `image_size` pixels (Pillow's antialiased filters).

    The crop comes first, so pixels outside the box have no influence, as in torchvision; Pillow's `resize(box=...)`
    would let the filter reach beyond the box.

    Raises:
      UserError: unknown `interpolation`.
    """
    box = image[view.top : view.top + view.height, view.left : view.left + view.width]
    resized = np.asarray(Image.fromarray(box).resize((image_size, image_size), _filter(interpolation)))
    return np.ascontiguousarray(resized[:, ::-1]) if view.flip else resized


def center_crop(
    image: UInt8[np.ndarray, "H W 3"], image_size: int, crop_fraction: float = 0.875, interpolation: str = "bicubic"
) -> UInt8[np.ndarray, "S S 3"]:
    """Resize the shorter side to `int(image_size / crop_fraction)` pixels and cut the central square.

    Raises:
      ValueError: `crop_fraction` outside (0, 1].
      UserError: unknown `interpolation`.
    Source: torchvision `Resize` and `CenterCrop` as used by the released evaluation (224 / 0.875 = 256).
    """
    if not 0 < crop_fraction <= 1:
        raise ValueError(f"crop_fraction must lie in (0, 1], got {crop_fraction}")
    height, width = image.shape[:2]
    short = int(image_size / crop_fraction)
    size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    resized = np.asarray(Image.fromarray(image).resize(size, _filter(interpolation)))
    top, left = round((size[1] - image_size) / 2), round((size[0] - image_size) / 2)
    return np.ascontiguousarray(resized[top : top + image_size, left : left + image_size])


def jitter_draw(rng: np.random.Generator, strength: float) -> tuple[Float32[np.ndarray, "3"], Int32[np.ndarray, "3"]]:
    """Draw the factors of brightness, contrast and saturation, each U(max(0, 1 - strength), 1 + strength), and
    the order of the three operations (`order[j]` is the j-th to apply), a uniform permutation.

    Source: torchvision `ColorJitter(strength, strength, strength)`.
    """
    low = max(0.0, 1.0 - strength)
    factors = low + (1.0 + strength - low) * rng.random(3)
    return factors.astype(np.float32), rng.permutation(3).astype(np.int32)
