"""Encoded bytes -> pixels: the first step of the data pipeline after a source, before the random view.

JPEGs, nearly all there is, go through libjpeg-turbo (simplejpeg), which gives Pillow's pixels bit for bit in about half
the time. Everything else, and every JPEG that it finds any fault with, goes to Pillow, the reference: an image
is readable here if and only if Pillow reads it.
"""

import io
import warnings

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from beitv2_jax.errors import UserError

MAX_PIXELS = 178_956_970
"""Images with more pixels are refused from their header, before anything is decoded. The limit is Pillow's own."""

# The formats that photographs come in. Pillow knows more; some of them start other programs.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".webp", ".bmp", ".tif", ".tiff")
IMAGE_SUFFIXES += (".ppm", ".pgm", ".pbm", ".pnm")
"""Endings, in lower case, of files in the formats that are decoded; an MPO file begins with an ordinary JPEG."""
_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")

# Pillow warns of a doubtful EXIF block or of a palette with transparency, once per image: nothing anyone could act on
# among a million. Filtered for good, because a filter set around each call is not safe among threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class CorruptImageError(UserError):
    """An image that cannot be decoded; `where` names its file or example id, `cause` says what is wrong with it."""

    def __init__(self, where: str, cause: str):
        super().__init__(
            f"The image of {where} cannot be decoded: {cause.rstrip('.')}.",
            "Is the file damaged, or no image in spite of its name?",
            "Replace or remove it, and prepare data sets again that were prepared from it.",
        )
        self.where, self.cause = where, cause

    def __reduce__(self):
        # it crosses from worker processes
        return CorruptImageError, (self.where, self.cause)


def decode_image(encoded: bytes, where: str = "an unnamed example") -> UInt8[np.ndarray, "H W 3"]:
    """Decode an image file held in memory to RGB levels 0..255: JPEG, PNG, GIF, WebP, BMP, TIFF or PPM.

    Grey, palette and CMYK images are converted to RGB, the inks of the latter taken to be inverted, as Adobe writes
    them; of an animation the first frame is taken; transparency is dropped, which leaves the colours under it; an EXIF
    orientation is not applied. Of 16 bits the upper 8 are kept. The array may be read-only.

    Raises:
      CorruptImageError: the bytes are no complete image, or one of more than `MAX_PIXELS`; the message names `where`.
    Source: torchvision's default image loader (`Image.open(...).convert("RGB")`), as the released data sets use it. It
      clips 16-bit grey to the range 0..255, white that is, instead of scaling it.
    """
    if not encoded:
        raise CorruptImageError(where, "the file is empty")
    pixels = _decode_plain_jpeg(encoded, where)
    return _decode_with_pillow(encoded, where) if pixels is None else pixels


def _decode_plain_jpeg(encoded: bytes, where: str) -> UInt8[np.ndarray, "H W 3"] | None:
    """Decode a faultless grey or colour JPEG; None for anything else."""
    if not encoded.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(encoded)
    except ValueError:
        return None
    if colors not in ("YCbCr", "RGB", "Gray"):
        return None
    _check_size(width, height, where)
    try:
        # strict: what libjpeg merely warns of, the missing rest of a file above all, ends here and is left to Pillow
        return simplejpeg.decode_jpeg(encoded, "RGB", strict=True)
    except ValueError:
        return None


def _decode_with_pillow(encoded: bytes, where: str) -> UInt8[np.ndarray, "H W 3"]:
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            _check_size(*image.size, where)
            if image.mode in _DEEP_MODES:
                return _upper_bits(np.asarray(image))
            if image.mode == "F":
                raise CorruptImageError(where, "its pixels are floating-point numbers of unknown range")
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except (CorruptImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise CorruptImageError(where, f"it is none of {', '.join(_FORMATS)}") from error
    except Exception as error:  # on damaged bytes Pillow's parsers raise nearly anything: KeyError, struct.error, ...
        raise CorruptImageError(where, str(error) or type(error).__name__) from error


def _check_size(width: int, height: int, where: str) -> None:
    if width * height > MAX_PIXELS:
        raise CorruptImageError(where, f"it claims {width} x {height} pixels, more than the {MAX_PIXELS:,} allowed")


def _upper_bits(levels: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    """Return 16-bit grey levels as RGB, the upper 8 bits of each: what Pillow does to 16-bit colour."""
    upper = (np.clip(levels, 0, 65535) >> 8).astype(np.uint8)
    return np.repeat(upper[:, :, None], 3, axis=2)
