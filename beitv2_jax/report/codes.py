"""Draw the codebook: one row of image patches per code, which shows what a code represents."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from beitv2_jax.data.augment import center_crop
from beitv2_jax.data.decode import decode_image
from beitv2_jax.data.sources import Source
from beitv2_jax.data.target_cache.reader import TargetReader
from beitv2_jax.runtime.atomic_files import replacing

TILE = 84
"""Side of one tile in the picture, in pixels."""
LABEL_WIDTH = 118


def draw_code_rows(
    source: Source, reader: TargetReader, path: str, *, num_codes: int = 16, num_tiles: int = 12
) -> np.ndarray:
    """Draw `num_tiles` patches of each of the `num_codes` most used codes over the centre crops of `source`.

    A tile shows the patch (outlined) with one patch of context on every side. The patches of a row come from different
    images, evenly spread over the data set.

    Returns:
        The number of times each code was used, 'k'.
    """
    manifest = reader.manifest
    code_ids = np.stack([reader[i, 0] for i in range(len(source))]).astype(np.int64)
    code_ids[sorted(reader.unreadable)] = -1
    counts = np.bincount(code_ids[code_ids >= 0], minlength=manifest["codebook_size"])
    rows = [code for code in np.argsort(-counts, kind="stable")[:num_codes] if counts[code]]
    wanted = {code: _spread(code_ids == code, num_tiles) for code in rows}
    images = {
        index: center_crop(
            decode_image(source[index]["image"], f"example {index}"), manifest["image_size"], manifest["crop_fraction"]
        )
        for index in {index for places in wanted.values() for index, _ in places}
    }
    canvas = Image.new("RGB", (LABEL_WIDTH + num_tiles * TILE, len(rows) * TILE), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=15)
    for row, code in enumerate(rows):
        draw.text((8, row * TILE + 20), f"code {code}", fill="black", font=font)
        draw.text(
            (8, row * TILE + 42),
            f"{counts[code] / counts.sum():.1%} of patches",
            fill="gray",
            font=ImageFont.load_default(size=12),
        )
        for column, (index, patch) in enumerate(wanted[code]):
            canvas.paste(_tile(images[index], patch, manifest["grid"]), (LABEL_WIDTH + column * TILE, row * TILE))
    with replacing(path, "wb") as file:
        canvas.save(file, "PNG")
    return counts


def _spread(hits: np.ndarray, count: int) -> list[tuple[int, int]]:
    """Return up to `count` (image, patch) places, one per image, evenly spread over the images that have a hit."""
    images = np.flatnonzero(hits.any(axis=1))
    chosen = images[np.unique(np.linspace(0, len(images) - 1, count).astype(int))]
    places = []
    for index in chosen:
        patches = np.flatnonzero(hits[index])
        places.append((int(index), int(patches[len(patches) // 2])))
    return places


def _tile(image: np.ndarray, patch: int, grid: tuple[int, int]) -> Image.Image:
    height, width = image.shape[0] // grid[0], image.shape[1] // grid[1]
    top, left = patch // grid[1] * height, patch % grid[1] * width
    padded = np.pad(image, ((height, height), (width, width), (0, 0)), constant_values=255)
    context = Image.fromarray(padded[top : top + 3 * height, left : left + 3 * width])
    tile = context.resize((TILE - 4, TILE - 4), Image.Resampling.BICUBIC)
    third = (TILE - 4) / 3
    ImageDraw.Draw(tile).rectangle((third, third, 2 * third, 2 * third), outline=(230, 30, 30), width=2)
    framed = Image.new("RGB", (TILE, TILE), "white")
    framed.paste(tile, (2, 2))
    return framed
