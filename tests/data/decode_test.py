"""Decoding: fast and slow way alike to the last bit, every odd kind of file, and errors that say what is wrong."""

import io
import pickle
import struct
import subprocess
import sys
import textwrap
import zlib

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from beitv2_jax.data import decode
from beitv2_jax.data.decode import CorruptImageError, decode_image
from beitv2_jax.errors import UserError


def _encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def _smooth(height, width):
    """Return a picture that a JPEG keeps well, different in every pixel and channel."""
    y, x = np.mgrid[:height, :width]
    return np.stack([40 + 150 * x / width, 220 - 190 * y / height, 60 + 90 * (x / width + y / height)], -1).astype(
        np.uint8
    )


def _with_pillow(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def refused(encoded: bytes, cause: str, where: str = "folder/cat7.jpg") -> None:
    with pytest.raises(CorruptImageError, match=cause) as caught:
        decode_image(encoded, where)
    assert isinstance(caught.value, UserError)
    assert caught.value.where == where and where in str(caught.value) and caught.value.cause in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF"])
def test_lossless_formats_are_exact(kind):
    pixels = _noise(7, 11)
    decoded = decode_image(_encode(Image.fromarray(pixels), kind))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.parametrize("size", [(1, 1), (37, 41), (8, 500), (3, 2)])
@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2, "quality": 30},
        {"progressive": True},
        {"progressive": True, "subsampling": 0, "optimize": True},
        {"keep_rgb": True},
        {"restart_marker_blocks": 1},
    ],
)
def test_jpegs_have_pillow_s_pixels(size, options, monkeypatch):
    colored = _encode(Image.fromarray(_noise(*size) // 2 + _smooth(*size) // 2), "JPEG", **options)
    options.pop("keep_rgb", None)
    grey = _encode(Image.fromarray(_noise(*size)[..., 0]), "JPEG", **options)
    expected = [_with_pillow(encoded) for encoded in (colored, grey)]
    monkeypatch.setattr(decode, "_decode_with_pillow", None)  # the fast way alone
    for encoded, pixels in zip((colored, grey), expected, strict=True):
        np.testing.assert_array_equal(decode_image(encoded), pixels)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_every_mode_becomes_rgb(mode):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 16:] = 255
    np.testing.assert_array_equal(decode_image(_encode(Image.fromarray(pixels).convert(mode), "PNG")), pixels)


@pytest.mark.parametrize("subsampling", [0, 2])
def test_cmyk_and_its_adobe_inversion(subsampling):
    pixels = _smooth(32, 48)
    plain = _encode(Image.fromarray(pixels).convert("CMYK"), "JPEG", quality=95, subsampling=subsampling)
    # Pillow writes inverted inks with Adobe's marker, as everyone does, and takes them to be so without the marker too
    start = plain.index(b"\xff\xee")
    length = struct.unpack(">H", plain[start + 2 : start + 4])[0]
    assert plain[start + 4 : start + 9] == b"Adobe"
    unmarked = plain[:start] + plain[start + 2 + length :]
    for encoded in (plain, unmarked):
        np.testing.assert_allclose(decode_image(encoded).astype(int), pixels.astype(int), atol=8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_the_upper_eight(kind):
    levels = np.linspace(0, 65535, 300).astype(np.uint16).reshape(15, 20)
    decoded = decode_image(_encode(Image.fromarray(levels), kind))
    np.testing.assert_array_equal(decoded, np.repeat((levels >> 8).astype(np.uint8)[..., None], 3, 2))


def _png(width: int, height: int, bits: int, color_type: int, rows: bytes) -> bytes:
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_sixteen_bits_of_colour_likewise():
    levels = np.array([0x00FF, 0x7F80, 0xFFFF, 0x0100, 0xABCD, 0x8001], ">u2")
    decoded = decode_image(_png(2, 1, 16, 2, b"\0" + levels.tobytes()))
    np.testing.assert_array_equal(decoded.reshape(-1), [0, 0x7F, 0xFF, 1, 0xAB, 0x80])


def test_floating_point_pixels_are_refused():
    refused(_encode(Image.fromarray(np.linspace(0, 1, 12).reshape(3, 4).astype(np.float32)), "TIFF"), "floating-point")


def test_transparency_is_dropped_and_the_colour_under_it_kept():
    pixels = _noise(5, 6)
    alpha = np.arange(30, dtype=np.uint8).reshape(5, 6, 1) * 8
    np.testing.assert_array_equal(
        decode_image(_encode(Image.fromarray(np.concatenate([pixels, alpha], 2)), "PNG")), pixels
    )
    palette = Image.fromarray((np.arange(30, dtype=np.uint8).reshape(5, 6) % 4), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    for transparency in (2, bytes([0, 255, 128, 7])):
        decoded = decode_image(_encode(palette, "PNG", transparency=transparency))
        np.testing.assert_array_equal(decoded[0, :4, 0], [10, 40, 70, 100])


def test_an_exif_rotation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    pixels = _smooth(16, 40)
    for kind in ("JPEG", "PNG"):
        encoded = _encode(Image.fromarray(pixels), kind, exif=exif)
        assert Image.open(io.BytesIO(encoded)).getexif()[0x0112] == 6
        assert decode_image(encoded).shape == (16, 40, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [Image.fromarray(np.full((9, 13, 3), level, np.uint8)) for level in (40, 200, 90)]
    options = {"lossless": True} if kind == "WEBP" else {}
    encoded = _encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(encoded)).n_frames == 3
    np.testing.assert_array_equal(decode_image(encoded), np.full((9, 13, 3), 40, np.uint8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_smallest_and_thinnest_images(kind, size):
    assert decode_image(_encode(Image.fromarray(_noise(*size)), kind)).shape == (*size, 3)


def test_what_is_no_image_is_told_so():
    refused(b"", "the file is empty")
    refused(b"<html>404 not found</html>", "none of JPEG, ")
    refused(b"\xff\xd8\xff", "none of JPEG, ")
    refused(_encode(Image.fromarray(_noise(20, 20)), "ICO"), "none of JPEG, ")


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_truncated_jpeg_is_refused(options):
    whole = _encode(Image.fromarray(_noise(37, 41)), "JPEG", **options)
    for length in (len(whole) // 3, len(whole) // 2, len(whole) - 20):
        refused(whole[:length], "[Tt]runcated")


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_other_truncated_files_are_refused(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    whole = _encode(Image.fromarray(_noise(37, 41)), kind, **options)
    refused(whole[: len(whole) // 2], "decoded: .")


JPEGS = [_encode(Image.fromarray(_noise(23, 19) // 3 + _smooth(23, 19) // 2), "JPEG", progressive=p) for p in (0, 1)]


@settings(max_examples=300, deadline=None)
@given(
    jpeg=st.sampled_from(JPEGS),
    length=st.floats(0.05, 1.0),
    changes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=2),
)
def test_a_damaged_jpeg_is_refused_exactly_when_pillow_refuses_it(jpeg, length, changes):
    damaged = bytearray(jpeg)
    for place, value in changes:
        damaged[int(place * len(damaged))] = value
    damaged = bytes(damaged[: round(length * len(damaged))])
    try:
        expected = decode._decode_with_pillow(damaged, "x")
    except CorruptImageError as error:
        with pytest.raises(CorruptImageError) as caught:
            decode_image(damaged, "x")
        assert caught.value.cause == error.cause
    else:
        np.testing.assert_array_equal(decode_image(damaged, "x"), expected)


def _with_sides(jpeg: bytes, height: int, width: int) -> bytes:
    start = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:start] + struct.pack(">HH", height, width) + jpeg[start + 4 :]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "CMYK"])
def test_a_decompression_bomb_is_refused_from_its_header(kind, monkeypatch):
    if kind == "PNG":
        bomb = _png(20_000, 20_000, 8, 2, b"")
    else:
        image = Image.fromarray(_noise(16, 16)).convert("CMYK" if kind == "CMYK" else "RGB")
        bomb = _with_sides(_encode(image, "JPEG"), 20_000, 20_000)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)
    monkeypatch.setattr(Image.Image, "convert", None)
    refused(bomb, r"(20000 x 20000|400000000) pixels.* 178,?956,?970")


def test_large_images_below_the_limit_are_read(monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 35)
    for kind in ("JPEG", "PNG"):
        assert decode_image(_encode(Image.fromarray(_noise(5, 7)), kind)).shape == (5, 7, 3)
        refused(_encode(Image.fromarray(_noise(6, 6)), kind), "6 x 6")


def test_errors_cross_from_worker_processes():
    error = pickle.loads(pickle.dumps(CorruptImageError("a", "b")))
    assert (error.where, error.cause) == ("a", "b") and "a" in str(error)


def test_nothing_is_written_to_stderr(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = _encode(Image.fromarray(_noise(40, 40)), "JPEG", exif=exif)
    start = whole.index(b"Exif\0\0") + 6
    broken_exif = whole[:start] + whole[start : start + 8] + b"\xff\xff" + whole[start + 10 :]
    extra = whole.index(b"\xff\xda")
    palette = Image.new("P", (4, 4))
    palette.putpalette([1, 2, 3, 4, 5, 6])
    files = {
        "broken_exif": broken_exif,
        "extraneous": whole[:extra] + b"\x12\x34" + whole[extra:],
        "truncated": whole[:-300],
        "palette": _encode(palette, "PNG", transparency=bytes([0, 9])),
        "large": _png(10_000, 10_000, 1, 0, b"".join(b"\0" + bytes(1250) for _ in range(10_000))),
        "text": b"hello",
        "png": _encode(Image.fromarray(_noise(30, 30)), "PNG")[:900],
        "tiff": _encode(Image.fromarray(_noise(30, 30)), "TIFF", compression="tiff_lzw")[:-40],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    program = """
        import pathlib, sys
        from beitv2_jax.data.decode import CorruptImageError, decode_image
        for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
            try:
                print(path.name, decode_image(path.read_bytes(), path.name).shape)
            except CorruptImageError as error:
                print(path.name, error.cause)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    printed = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert printed["broken_exif"] == printed["extraneous"] == "(40, 40, 3)"
    assert printed["large"] == "(10000, 10000, 3)" and printed["palette"] == "(4, 4, 3)"
    assert "truncated" in printed["truncated"] and "none of" in printed["text"]
