"""Draw what a segmentation network says: images beside their true and their predicted label maps."""

import colorsys
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from beitv2_jax.data.decode import decode_image
from beitv2_jax.data.segmentation.labels import IGNORED
from beitv2_jax.data.segmentation.transforms import WindowRow
from beitv2_jax.report.captions import fitted
from beitv2_jax.runtime.atomic_files import replacing
from beitv2_jax.runtime.buckets import AnyPath
from beitv2_jax.tasks.api import Batch

TILE_WIDTH = 300
"""Width of one picture, in pixels."""
_TITLE, _GAP, _ENTRY_WIDTH = 22, 4, 200
_COLUMNS = ("image", "true", "predicted", "where wrong")


def draw_segmentations(
    rows: WindowRow,
    predict: Callable[[Batch], UInt8[np.ndarray, "b H W"]],
    path: str | AnyPath,
    *,
    iou: Mapping[int, float],
    names: Sequence[str] = (),
    num_images: int = 6,
) -> None:
    """Write a picture of up to `num_images` images: image, true map, predicted map, wrong pixels.

    The images are evenly spread over the split. Pixels without a true class are black in the true map and never wrong.
    Below stand the classes that are seen there, each with its IoU over the whole split.

    Args:
        rows: of the evaluation.
        predict: a batch of them -> classes of every pixel.
        path: of the picture.
        iou: of each class that has one.
        names: of the classes; none shows their numbers.
    """
    lines, seen = [], set()
    for row in np.unique(np.linspace(0, len(rows.order) - 1, num_images).astype(int)):
        example = rows(row)
        if example["faults"]:
            continue
        batch = {name: array[None] for name, array in example.items() if name != "faults"}
        height, width = example["sizes"]
        predicted = np.asarray(predict(batch))[0, :height, :width]
        image = decode_image(rows.source[rows.order[row]]["image"])
        true = example["label_maps"][:height, :width]
        lines.append(_line(image, true, predicted))
        seen |= set(np.unique([true, predicted]).tolist()) - {IGNORED}
    if lines:
        with replacing(path, "wb") as file:
            _sheet([*lines, _legend(sorted(seen), iou, names, lines[0].width)]).save(file, "PNG")


def class_colors(num_colors: int = 256) -> UInt8[np.ndarray, "n 3"]:
    """Return a colour for each class, neighbours far apart in hue, and black for labels to ignore."""
    hues = (np.arange(num_colors) * 0.618034) % 1.0
    levels = [
        colorsys.hsv_to_rgb(hue, 0.45 + 0.5 * (index % 3) / 2, 1.0 - 0.45 * (index % 2))
        for index, hue in enumerate(hues)
    ]
    colors = np.round(255 * np.array(levels)).astype(np.uint8)
    colors[IGNORED:] = 0
    return colors


def _line(image: np.ndarray, true: np.ndarray, predicted: np.ndarray) -> Image.Image:
    colors = class_colors()
    wrong = (true != predicted) & (true != IGNORED)
    faint = image // 3
    pictures = (image, colors[true], colors[predicted], np.where(wrong[..., None], np.uint8([230, 40, 40]), faint))
    height = max(1, round(TILE_WIDTH * image.shape[0] / image.shape[1]))
    line = Image.new("RGB", (len(pictures) * (TILE_WIDTH + _GAP) - _GAP, height), "white")
    for column, pixels in enumerate(pictures):
        sampling = Image.Resampling.NEAREST if column else Image.Resampling.BICUBIC
        tile = Image.fromarray(np.ascontiguousarray(pixels)).resize((TILE_WIDTH, height), sampling)
        line.paste(tile, (column * (TILE_WIDTH + _GAP), 0))
    return line


def _legend(classes: list[int], iou: Mapping[int, float], names: Sequence[str], width: int) -> Image.Image:
    """Return a picture of the colours of classes, in rows, each with its number and its IoU where it has one."""
    in_row = max(1, width // _ENTRY_WIDTH)
    legend = Image.new("RGB", (width, _TITLE * -(-len(classes) // in_row)), "white")
    draw, font, colors = ImageDraw.Draw(legend), ImageFont.load_default(size=14), class_colors()
    for place, number in enumerate(classes):
        left, top = place % in_row * _ENTRY_WIDTH, place // in_row * _TITLE
        draw.rectangle((left + 2, top + 4, left + 16, top + 18), fill=tuple(colors[number].tolist()))
        name = names[number] if names else f"class {number}"
        measured = f"  IoU {iou[number]:.1%}" if number in iou else ""
        text = fitted(name, font, _ENTRY_WIDTH - 28 - int(font.getlength(measured))) + measured
        draw.text((left + 22, top + 3), text, fill="black", font=font)
    return legend


def _sheet(lines: list[Image.Image]) -> Image.Image:
    heights = [line.height + _GAP for line in lines]
    sheet = Image.new("RGB", (lines[0].width, _TITLE + sum(heights) - _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for column, title in enumerate(_COLUMNS):
        draw.text((column * (TILE_WIDTH + _GAP) + 2, 3), title, fill="black", font=font)
    top = _TITLE
    for line, height in zip(lines, heights, strict=True):
        sheet.paste(line, (0, top))
        top += height
    return sheet
