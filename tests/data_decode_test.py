"""Decoding: formats, colour modes, and errors that name the example."""

import io

import numpy as np
import pytest
from PIL import Image

from beitv2_jax.data.decode import CorruptImageError, decode_image
from beitv2_jax.errors import UserError


def _encode(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def _noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_lossless_formats_are_exact(kind):
    pixels = _noise(7, 11)
    decoded = decode_image(_encode(Image.fromarray(pixels), kind))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "LA", "1"])
def test_every_mode_becomes_rgb(mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 16:] = 255
    decoded = decode_image(_encode(Image.fromarray(pixels).convert(mode), kind))
    assert decoded.shape == pixels.shape
    np.testing.assert_allclose(decoded.astype(int), pixels.astype(int), atol=2 if kind == "JPEG" else 0)


def test_corrupt_images_raise_and_name_the_example():
    whole = _encode(Image.fromarray(_noise(37, 41)), "JPEG")
    for encoded in (b"", b"no image", whole[: len(whole) // 2], whole[:30]):
        with pytest.raises(CorruptImageError, match=r"cat7\.jpg") as caught:
            decode_image(encoded, "folder/cat7.jpg")
        assert isinstance(caught.value, UserError) and caught.value.where == "folder/cat7.jpg"
