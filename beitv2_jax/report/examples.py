"""Draw some images of a data set, with their classes."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from beitv2_jax.data.augment import center_crop
from beitv2_jax.data.decode import CorruptImageError, decode_image
from beitv2_jax.data.sources import Source
from beitv2_jax.runtime.atomic_files import replacing

TILE, TITLE = 120, 20
"""Side of an image and height of the name below it, in pixels."""


def draw_examples(source: Source, path: str, *, num_images: int = 8) -> None:
    """Write a row of up to `num_images` images, evenly spread over the data set, without those that cannot be read.

    Nothing is written if none can be read.
    """
    tiles = []
    for index in np.unique(np.linspace(0, len(source) - 1, num_images).astype(int)):
        example = source[int(index)]
        try:
            pixels = center_crop(decode_image(example["image"], example["where"]), TILE, 1.0)
        except CorruptImageError:
            continue
        label = example.get("label", -1)
        labels = np.flatnonzero(label) if np.ndim(label) else [label]
        names = [source.class_names[number] for number in labels if 0 <= number < len(source.class_names)]
        tiles.append((pixels, ", ".join(names)))
    if not tiles:
        return
    has_names = any(name for _, name in tiles)
    sheet = Image.new("RGB", (len(tiles) * (TILE + 4) - 4, TILE + TITLE * has_names), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for column, (pixels, name) in enumerate(tiles):
        left = column * (TILE + 4)
        sheet.paste(Image.fromarray(pixels), (left, 0))
        while name and draw.textlength(name, font=font) > TILE:
            name = name[:-1]
        draw.text((left + 2, TILE + 3), name, fill="black", font=font)
    with replacing(path, "wb") as file:
        sheet.save(file, "JPEG", quality=90)
