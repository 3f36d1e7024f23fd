"""Encoded label maps -> class ids of every pixel: what goes with an image where each pixel has a class of its own.

Beside `decode` in the data pipeline. Files number their classes as they like; `LabelIds` says what their numbers mean.
"""

import dataclasses
import functools
import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, UnidentifiedImageError

from beitv2_jax.data.decode import MAX_PIXELS, CorruptImageError
from beitv2_jax.data.segmentation.labels import IGNORED
from beitv2_jax.errors import UserError

# those without loss; what JPEG or WebP leave of a number is another number
_FORMATS = ("PNG", "TIFF", "BMP", "GIF", "PPM")
MAP_SUFFIXES = (".pbm", ".pgm", ".ppm", ".gif", ".bmp", ".tiff", ".tif", ".png")
"""Endings of the files of label maps; where two files have one stem, the later ending counts."""
# one number a pixel: grey, palette (whose colours mean nothing) and bilevel
_ONE_CHANNEL = ("L", "P", "1")


@dataclasses.dataclass(frozen=True)
class LabelIds:
    """What the numbers in the files mean: number - `offset` is the class, those in `ignored` are none.

    Attributes:
      num_classes: classes are 0 .. num_classes - 1.
      offset: number of class 0 in the files; 1 in ADE20K.
      ignored: numbers of pixels without a class, which become `IGNORED`; 0 in ADE20K.

    Raises:
      UserError: the classes do not fit into the numbers 0..255, or an ignored number is that of a class.
    """

    num_classes: int
    offset: int = 0
    ignored: Sequence[int] = ()

    def __post_init__(self):
        last = self.offset + self.num_classes - 1
        if self.offset < 0 or self.num_classes < 1 or last > 255 or self.num_classes > IGNORED:
            raise UserError(
                f"{self.num_classes} classes from labels.offset={self.offset} on do not fit into the numbers 0..255.",
                "num_classes or the offset is that of another data set",
                "label maps of 8 bits a pixel, at most 255 classes",
            )
        clash = [number for number in self.ignored if self.offset <= number <= last]
        if clash:
            raise UserError(
                f"labels.ignored has {clash[0]}, which is class {clash[0] - self.offset} of {self.num_classes} "
                f"from labels.offset={self.offset} on.",
                "model.num_classes counts what is ignored, or the offset is that of another data set",
                f"--config.model.num_classes={max(1, self.num_classes - 1)}, or another labels.offset",
            )

    @functools.cached_property
    def _table(self) -> tuple[UInt8[np.ndarray, "256"], Bool[np.ndarray, "256"]]:
        """Return the class of each number, and which numbers are known."""
        classes, known = np.full(256, IGNORED, np.uint8), np.zeros(256, bool)
        numbers = self.offset + np.arange(self.num_classes)
        classes[numbers], known[numbers] = np.arange(self.num_classes), True
        known[list(self.ignored)] = True
        return classes, known

    def classes(self, numbers: UInt8[np.ndarray, "H W"], where: str) -> UInt8[np.ndarray, "H W"]:
        """Return the class ids of a decoded map, `IGNORED` where there is none.

        Raises:
          CorruptImageError: a number that is neither a class nor ignored.
        """
        classes, known = self._table
        if not (fine := known[numbers]).all():
            found = int(numbers[~fine][0])
            raise CorruptImageError(where, f"its label map has the number {found}, neither a class nor ignored")
        return classes[numbers]


def decode_label_map(encoded: bytes, where: str = "an unnamed example") -> UInt8[np.ndarray, "H W"]:
    """Decode a label map held in memory, a PNG, TIFF, BMP, GIF or PPM of 8 bits a pixel, to the numbers in it.

    Grey and palette images are taken as they are; colours only if the three channels are one.

    Raises:
      CorruptImageError: the bytes are no complete image, or of another kind; the message names `where`.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise CorruptImageError(where, f"its label map claims {image.width} x {image.height} pixels")
            if image.mode in _ONE_CHANNEL:
                return np.asarray(image, np.uint8)
            if image.mode == "RGB":
                return _one_channel(np.asarray(image), where)
            mode = image.mode
    except (CorruptImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise CorruptImageError(where, f"its label map is none of {', '.join(_FORMATS)}") from error
    except Exception as error:  # on damaged bytes Pillow's parsers raise nearly anything
        raise CorruptImageError(where, f"its label map is damaged: {error}") from error
    raise CorruptImageError(where, f"its label map is of mode {mode}, not of 8 bits a pixel")


def _one_channel(pixels: UInt8[np.ndarray, "H W 3"], where: str) -> UInt8[np.ndarray, "H W"]:
    if (pixels != pixels[..., :1]).any():
        raise CorruptImageError(where, "its label map has colours: instances, or a picture for people to look at")
    return np.ascontiguousarray(pixels[..., 0])


def label_map_size(encoded: bytes) -> tuple[int, int] | None:
    """Return (height, width) as the header says; None where it cannot be read."""
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            return image.height, image.width
    except Exception:  # the example is reported where it is decoded
        return None
