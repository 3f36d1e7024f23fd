"""Photographs that the input is measured on, with what is drawn for each, and Pillow's way of preparing them."""

import dataclasses
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from beitv2_jax.data import augment
from beitv2_jax.rng import host_rng

SIZE, STRENGTH, MIN_SCALE = 224, 0.4, 0.2
"""Those of the released masked image modelling recipe."""

RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@dataclasses.dataclass(frozen=True)
class Photo:
    """One JPEG with everything that was drawn for it and, for stages measured alone, what the stages before made."""

    index: int
    encoded: bytes
    pixels: np.ndarray
    view: augment.View
    factors: np.ndarray
    order: np.ndarray
    resized: np.ndarray


def draws(index: int, height: int, width: int) -> tuple[augment.View, np.ndarray, np.ndarray]:
    """Draw the view and the jitter of an image as the data pipeline does."""
    view = augment.random_view(host_rng(0, "view", index, 0), height, width, min_scale=MIN_SCALE)
    return view, *augment.jitter_draw(host_rng(0, "jitter", index, 0), STRENGTH)


def read_photos(path: str, limit: int) -> list[Photo]:
    """Read the first `limit` JPEGs of a folder or a tar, in the order of their names."""
    place = Path(path)
    if place.is_dir():
        files = [p for p in sorted(place.rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg")]
        found = [file.read_bytes() for file in files[:limit]]
    else:
        with tarfile.open(place) as archive:
            members = [m for m in archive.getmembers() if m.name.lower().endswith((".jpg", ".jpeg"))]
            found = [archive.extractfile(member).read() for member in sorted(members, key=lambda m: m.name)[:limit]]
    if not found:
        raise SystemExit(f"There are no JPEGs in {path}.")
    photos = []
    for index, encoded in enumerate(found):
        pixels = pillow_decode(encoded)
        view, factors, order = draws(index, *pixels.shape[:2])
        photos.append(Photo(index, encoded, pixels, view, factors, order, pillow_resize(cut(pixels, view))))
    return photos


def pillow_decode(encoded: bytes, draft: tuple[int, int] | None = None) -> np.ndarray:
    """Decode by Pillow; `draft` allows a smaller picture of at least that size."""
    with Image.open(io.BytesIO(encoded)) as image:
        if draft:
            image.draft("RGB", draft)
        return np.asarray(image.convert("RGB"))


def pillow_resize(box: np.ndarray, interpolation: str = "bicubic") -> np.ndarray:
    """Resize to `SIZE` by Pillow."""
    return np.asarray(Image.fromarray(box).resize((SIZE, SIZE), RESAMPLE[interpolation]))


def pillow_rows_first(box: np.ndarray, interpolation: str = "bicubic") -> np.ndarray:
    """Resize by Pillow in the order it kept to before version 13: along the rows, then along the columns."""
    rows = Image.fromarray(box).resize((SIZE, box.shape[0]), RESAMPLE[interpolation])
    return np.asarray(rows.resize((SIZE, SIZE), RESAMPLE[interpolation]))


def pillow_jitter(image: Image.Image, factors: np.ndarray, order: np.ndarray) -> Image.Image:
    """Jitter by Pillow: brightness, contrast and saturation by `factors`, in this order."""
    for operation in order:
        image = ENHANCERS[operation](image).enhance(float(factors[operation]))
    return image


def cut(pixels: np.ndarray, view: augment.View) -> np.ndarray:
    """Return the box of a view as an array of its own."""
    return np.ascontiguousarray(pixels[view.top : view.top + view.height, view.left : view.left + view.width])
