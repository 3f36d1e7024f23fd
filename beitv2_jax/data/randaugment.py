"""RandAugment of the fine-tuning recipes, on the host: between the random view and the batch of the data pipeline.

It works on 8-bit images at the size of the crop, by Pillow, as the released recipes do.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

FILL = (124, 116, 104)
"""Colour of pixels that a turn, shear or shift brings in from outside: ImageNet's mean."""

MAX_MAGNITUDE = 10.0
_ADDED_BELOW = 128


class Operation(NamedTuple):
    """One of the `OPERATIONS` by name, its magnitude in [0, 10] and its direction, 1 or -1 (where it has one)."""

    name: str
    magnitude: float
    sign: int


def _moved(image: Image.Image, *matrix: float) -> Image.Image:
    """Return the image whose pixel (x, y) is that at (a x + b y + c, d x + e y + f) of `image`."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL)


def _enhanced(enhancer: type) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, level: enhancer(image).enhance(1.0 + 0.9 * level)


def _posterize(image: Image.Image, level: float) -> Image.Image:
    # at full strength no bit is left, which Pillow's own posterize refuses nowadays
    kept = 256 - 2 ** (8 - (4 - int(4 * level)))
    return image.point([v & kept for v in range(256)] * 3)


def _solarize_add(image: Image.Image, level: float) -> Image.Image:
    added = int(110 * level)
    return image.point([min(255, v + added) if v < _ADDED_BELOW else v for v in range(256)] * 3)


# Each takes the image and level = sign * magnitude / 10; those that know no direction get a positive level.
_SIGNED = {
    "rotate": lambda image, level: image.rotate(30.0 * level, Image.Resampling.BICUBIC, fillcolor=FILL),
    "shear_x": lambda image, level: _moved(image, 1, 0.3 * level, 0, 0, 1, 0),
    "shear_y": lambda image, level: _moved(image, 1, 0, 0, 0.3 * level, 1, 0),
    "translate_x": lambda image, level: _moved(image, 1, 0, 0.45 * level * image.width, 0, 1, 0),
    "translate_y": lambda image, level: _moved(image, 1, 0, 0, 0, 1, 0.45 * level * image.height),
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
}
_UNSIGNED = {
    "auto_contrast": lambda image, level: ImageOps.autocontrast(image),
    "equalize": lambda image, level: ImageOps.equalize(image),
    "invert": lambda image, level: ImageOps.invert(image),
    "posterize": _posterize,
    "solarize": lambda image, level: ImageOps.solarize(image, 256 - int(256 * level)),
    "solarize_add": _solarize_add,
}
OPERATIONS = (*_UNSIGNED, *_SIGNED)
"""Names of the 15 operations; the first three know no magnitude, the others do more the larger it is."""


def apply(image: UInt8[np.ndarray, "H W 3"], operation: Operation) -> UInt8[np.ndarray, "H W 3"]:
    """Apply one operation to an image.

    With l = magnitude / 10 and s the sign: `rotate` 30 s l degrees; `shear_*` 0.3 s l; `translate_*` 0.45 s l of the
    side; `color`, `contrast`, `brightness`, `sharpness` by a factor of 1 + 0.9 s l; `posterize` keeps 4 - int(4 l)
    bits; `solarize` inverts levels from 256 - int(256 l) on; `solarize_add` adds int(110 l) to levels below 128.
    """
    name, magnitude, sign = operation
    level = magnitude / MAX_MAGNITUDE
    pillow = Image.fromarray(image)
    changed = _UNSIGNED[name](pillow, level) if name in _UNSIGNED else _SIGNED[name](pillow, sign * level)
    return np.asarray(changed)


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Change an image by `ops` random operations, drawn with replacement from 15, each left out with probability 1/2.

        magnitude = clip(N(magnitude, std), 0, 10), drawn anew for each; the direction is a fair coin's

    Source: Cubuk et al. 2019; timm's "rand-m9-mstd0.5-inc1", which the released recipes name, has 2 operations,
    magnitude 9 and std 0.5, and draws from global generators.
    """

    ops: int = 2
    magnitude: float = 9.0
    std: float = 0.5

    def draw(self, rng: np.random.Generator) -> list[Operation]:
        """Draw the operations that are applied, in order. `rng` is consumed; the number of draws is constant."""
        which = rng.integers(len(OPERATIONS), size=self.ops)
        applied, negative = rng.random((2, self.ops)) < 0.5
        magnitudes = np.clip(rng.normal(self.magnitude, self.std, self.ops), 0.0, MAX_MAGNITUDE)
        return [
            Operation(OPERATIONS[index], float(magnitude), -1 if minus else 1)
            for index, magnitude, minus in zip(which[applied], magnitudes[applied], negative[applied], strict=True)
        ]

    def __call__(self, image: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "H W 3"]:
        """Return the changed image; `rng` belongs to (seed, "randaugment", example id, epoch)."""
        for operation in self.draw(rng):
            image = apply(image, operation)
        return image
