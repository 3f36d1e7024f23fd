"""Encoded bytes -> pixels: the first step of the data pipeline after a source, in front of the random view."""

import io
import struct

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from beitv2_jax.errors import UserError

# What Pillow's decoders raise on damaged files; UnidentifiedImageError is an OSError.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError)


class CorruptImageError(UserError):
    """An image that cannot be decoded; `where` names its file or example id."""

    def __init__(self, where: str, cause: str):
        super().__init__(
            f"The image of {where} cannot be decoded: {cause}",
            "the file is damaged, or it is no image in spite of its name",
            "replace or remove it; a data set prepared from it has to be prepared again",
        )
        self.where = where


def decode_image(encoded: bytes, where: str = "an unnamed example") -> UInt8[np.ndarray, "H W 3"]:
    """Decode a JPEG, PNG, WebP or BMP file held in memory to RGB levels 0..255.

    Grey, palette and CMYK images are converted to RGB; an EXIF orientation is not applied.

    Raises:
      CorruptImageError: the bytes are no complete image; the message names `where`.
    Source: torchvision's default image loader (`Image.open(...).convert("RGB")`), as the released data sets use it.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except _DECODER_ERRORS as error:
        raise CorruptImageError(where, str(error) or type(error).__name__) from error
