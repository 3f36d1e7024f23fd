"""Draw the codebook: one row of image patches per code, which shows what a code represents."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from beitv2_jax.data.augment import center_crop
from beitv2_jax.data.decode import decode_image
from beitv2_jax.data.sources import Source
from beitv2_jax.data.target_cache.reader import TargetReader
from beitv2_jax.runtime.atomic_files import replacing

TILE = 84
"""Side of one tile in the picture, in pixels."""
LABEL_WIDTH = 118
CONTEXT = 3
"""Patches on a side of what a tile shows."""


def draw_code_rows(source: Source, reader: TargetReader, path: str, *, num_codes: int = 16) -> np.ndarray:
    """Draw frequent and rare codes of a target cache over the centre crops of `source`.

    Returns:
        The number of times each code was used, 'k'.
    """
    manifest = reader.manifest
    code_ids = np.stack([reader[i, 0] for i in range(len(source))]).astype(np.int64)
    code_ids[sorted(reader.unreadable)] = -1
    counts = np.bincount(code_ids[code_ids >= 0], minlength=manifest["codebook_size"])

    def crop(index: int) -> UInt8[np.ndarray, "S S 3"]:
        image = decode_image(source[index]["image"], f"example {index}")
        return center_crop(image, manifest["image_size"], manifest["crop_fraction"])

    draw_rows(code_ids, crop, manifest["grid"], frequent_and_rare(counts, num_codes), path)
    return counts


def frequent_and_rare(counts: Int[np.ndarray, "k"], number: int) -> list[int]:
    """Return up to `number` codes in use, by decreasing use: half are the most used, half even steps to the rarest."""
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    if len(order) <= number:
        return order.tolist()
    frequent = number // 2
    return order[[*range(frequent), *np.linspace(frequent, len(order) - 1, number - frequent).astype(int)]].tolist()


def draw_rows(
    code_ids: Int[np.ndarray, "n l"],
    crop: Callable[[int], UInt8[np.ndarray, "S S 3"]],
    grid: tuple[int, int],
    codes: Sequence[int],
    path: str,
    *,
    num_tiles: int = 12,
) -> None:
    """Draw `num_tiles` patches of each of `codes`, a row each, into the PNG file `path`.

    A tile shows the patch (outlined) and those around it. The patches of a row come from different images, evenly
    spread over the data set.

    Args:
        code_ids: of the patches of each image, -1 for those of unreadable images.
        crop: number of an image -> the pixels that its code ids belong to.
        grid: rows and columns of patches.
    """
    total = np.count_nonzero(code_ids >= 0)
    hits = {code: code_ids == code for code in codes}
    wanted = {code: _spread(hits[code], num_tiles) for code in codes}
    images = {index: crop(index) for index in {index for places in wanted.values() for index, _ in places}}
    canvas = Image.new("RGB", (LABEL_WIDTH + num_tiles * TILE, len(codes) * TILE), "white")
    draw = ImageDraw.Draw(canvas)
    font, small = ImageFont.load_default(size=15), ImageFont.load_default(size=12)
    for row, code in enumerate(codes):
        top, count = row * TILE, np.count_nonzero(hits[code])
        draw.text((8, top + 14), f"code {code}", fill="black", font=font)
        draw.text((8, top + 36), f"{count / total:.2%} of patches", fill="gray", font=small)
        draw.text((8, top + 52), f"in {hits[code].any(axis=1).sum()} images", fill="gray", font=small)
        for column, (index, patch) in enumerate(wanted[code]):
            canvas.paste(_tile(images[index], patch, grid), (LABEL_WIDTH + column * TILE, top))
    with replacing(path, "wb") as file:
        canvas.save(file, "PNG")


def _spread(hits: np.ndarray, count: int) -> list[tuple[int, int]]:
    """Return up to `count` (image, patch) places, one per image, evenly spread over the images that have a hit."""
    images = np.flatnonzero(hits.any(axis=1))
    chosen = images[np.unique(np.linspace(0, len(images) - 1, count).astype(int))]
    places = []
    for index in chosen:
        patches = np.flatnonzero(hits[index])
        places.append((int(index), int(patches[len(patches) // 2])))
    return places


def _tile(image: UInt8[np.ndarray, "S S 3"], patch: int, grid: tuple[int, int]) -> Image.Image:
    height, width = image.shape[0] // grid[0], image.shape[1] // grid[1]
    row, column = divmod(patch, grid[1])
    # at a border the context lies on the other side only, so that a tile is never partly empty
    rows, columns = min(CONTEXT, grid[0]), min(CONTEXT, grid[1])
    top, left = min(max(row - 1, 0), grid[0] - rows), min(max(column - 1, 0), grid[1] - columns)
    shown = image[top * height : (top + rows) * height, left * width : (left + columns) * width]
    side = TILE - 4
    tile = Image.fromarray(shown).resize((side, side), Image.Resampling.BICUBIC)
    across, down = side / columns, side / rows
    place = ((column - left) * across, (row - top) * down)
    end = (place[0] + across - 1, place[1] + down - 1)
    ImageDraw.Draw(tile).rectangle((*place, *end), outline=(230, 30, 30), width=2)
    framed = Image.new("RGB", (TILE, TILE), "white")
    framed.paste(tile, (2, 2))
    return framed
