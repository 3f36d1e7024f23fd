"""Decode label maps: the class id of every pixel of an image.

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
      mapping: pairs (number, class), in place of the offset where there are any; several numbers may be one class.

    Raises:
      UserError: the classes do not fit into the numbers 0..255, or an ignored number is that of a class.
    """

    num_classes: int
    offset: int = 0
    ignored: Sequence[int] = ()
    mapping: Sequence[tuple[int, int]] = ()

    def __post_init__(self):
        if not 1 < self.num_classes <= IGNORED:
            raise UserError(
                f"A segmentation into {self.num_classes} classes is not possible.",
                "Is --config.model.num_classes that of another data set?",
                f"Write --config.model.num_classes=N with a number from 2 to {IGNORED}.",
            )
        if not self.mapping and not 0 <= self.offset <= 256 - self.num_classes:
            raise UserError(
                f"{self.num_classes} classes from labels.offset={self.offset} on do not fit into the numbers 0..255.",
                "Is one of the two that of another data set?",
                f"Write --config.labels.offset=N with a number from 0 to {256 - self.num_classes}, or another "
                "--config.model.num_classes.",
            )
        for number, label in self.mapping:
            if not (0 <= number <= 255 and 0 <= label < self.num_classes):
                raise UserError(
                    f"The config's labels.mapping has the pair ({number}, {label}), which is not a number from 0 to "
                    f"255 and a class from 0 to {self.num_classes - 1}.",
                    "Did you exchange the two, or count the classes from 1?",
                    "Write --config.labels.mapping='((NUMBER, CLASS), ...)' with classes from 0 on, or a higher "
                    "--config.model.num_classes.",
                )
        clash = [number for number in self.ignored if number in self._class_of or not 0 <= number <= 255]
        if clash:
            what = f"class {self._class_of[clash[0]]}" if clash[0] in self._class_of else "no number of 8 bits"
            rest = tuple(number for number in self.ignored if number not in clash)
            raise UserError(
                f"The config's labels.ignored has {clash[0]}, which is {what}.",
                "Does --config.model.num_classes count what is ignored, or is the offset that of another data set?",
                f"Write --config.labels.ignored='{rest}', or other values of --config.model.num_classes and "
                "--config.labels.offset.",
            )

    @functools.cached_property
    def _class_of(self) -> dict[int, int]:
        if self.mapping:
            return dict(self.mapping)
        return {self.offset + label: label for label in range(self.num_classes)}

    @functools.cached_property
    def table(self) -> tuple[UInt8[np.ndarray, "256"], Bool[np.ndarray, "256"]]:
        """The class of each number, `IGNORED` where there is none, and which numbers are a class or ignored."""
        classes, known = np.full(256, IGNORED, np.uint8), np.zeros(256, bool)
        numbers = list(self._class_of)
        classes[numbers] = list(self._class_of.values())
        known[numbers] = known[list(self.ignored)] = True
        return classes, known

    def classes(self, numbers: UInt8[np.ndarray, "H W"], where: str) -> UInt8[np.ndarray, "H W"]:
        """Return the class ids of a decoded map, `IGNORED` where there is none.

        Raises:
          CorruptImageError: a number that is neither a class nor ignored.
        """
        classes, known = self.table
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
