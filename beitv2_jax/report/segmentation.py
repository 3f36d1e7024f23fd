"""Draw what is said of every pixel: images beside their true and their predicted label maps."""

import colorsys
from collections.abc import Callable, Collection, Mapping, Sequence

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
_TITLE, _GAP, _ENTRY_WIDTH = 22, 4, 240


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
        wrong = (true != predicted) & (true != IGNORED)
        lines.append(
            {
                "image": image,
                **_colored({"true": true, "predicted": predicted}),
                "where wrong": np.where(wrong[..., None], np.uint8([230, 40, 40]), image // 3),
            }
        )
        seen |= set(np.unique([true, predicted]).tolist()) - {IGNORED}
    measured = {number: f"IoU {value:.1%}" for number, value in iou.items()}
    _write(path, lines, seen, measured, names)


def draw_comparison(
    images: Sequence[UInt8[np.ndarray, "H W 3"]],
    label_maps: Mapping[str, UInt8[np.ndarray, "b h w"]],
    path: str | AnyPath,
    *,
    iou: Mapping[str, Mapping[int, float]],
    names: Sequence[str],
) -> None:
    """Write a picture of images, each beside its label maps by the titles of these, which may have another size.

    Below stand the classes that are seen there, each with the IoU that each of the predicted maps has.

    Args:
        iou: title of a predicted map -> IoU of each class that has one.
        names: of the classes.
    """
    lines = [
        {"image": image, **_colored({title: maps[index] for title, maps in label_maps.items()})}
        for index, image in enumerate(images)
    ]
    seen = {int(number) for maps in label_maps.values() for number in np.unique(maps)} - {IGNORED}
    measured = {
        number: "IoU " + ", ".join(f"{of_map[number]:.1%}" for of_map in iou.values())
        for number in seen
        if all(number in of_map for of_map in iou.values())
    }
    _write(path, lines, seen, measured, names)


def _colored(label_maps: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    colors = class_colors()
    return {title: colors[label_map] for title, label_map in label_maps.items()}


def _write(
    path: str | AnyPath,
    lines: Sequence[Mapping[str, np.ndarray]],
    seen: Collection[int],
    measured: Mapping[int, str],
    names: Sequence[str],
) -> None:
    """Write lines of pictures under their titles, and the legend; nothing without lines."""
    if lines:
        drawn = [_line(list(line.values())) for line in lines]
        legend = _legend(sorted(seen), measured, names, drawn[0].width)
        with replacing(path, "wb") as file:
            _sheet([*drawn, legend], list(lines[0])).save(file, "PNG")


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


def _line(pictures: Sequence[np.ndarray]) -> Image.Image:
    """Return pictures side by side, all in the shape of the first one."""
    height = max(1, round(TILE_WIDTH * pictures[0].shape[0] / pictures[0].shape[1]))
    line = Image.new("RGB", (len(pictures) * (TILE_WIDTH + _GAP) - _GAP, height), "white")
    for column, pixels in enumerate(pictures):
        sampling = Image.Resampling.NEAREST if column else Image.Resampling.BICUBIC
        tile = Image.fromarray(np.ascontiguousarray(pixels)).resize((TILE_WIDTH, height), sampling)
        line.paste(tile, (column * (TILE_WIDTH + _GAP), 0))
    return line


def _legend(classes: list[int], measured: Mapping[int, str], names: Sequence[str], width: int) -> Image.Image:
    """Return a picture of the colours of classes, in rows, each with its name and what was measured of it."""
    in_row = max(1, width // _ENTRY_WIDTH)
    legend = Image.new("RGB", (width, _TITLE * -(-len(classes) // in_row)), "white")
    draw, font, colors = ImageDraw.Draw(legend), ImageFont.load_default(size=14), class_colors()
    for place, number in enumerate(classes):
        left, top = place % in_row * _ENTRY_WIDTH, place // in_row * _TITLE
        draw.rectangle((left + 2, top + 4, left + 16, top + 18), fill=tuple(colors[number].tolist()))
        name = names[number] if names else f"class {number}"
        ending = f"  {measured[number]}" if number in measured else ""
        text = fitted(name, font, _ENTRY_WIDTH - 28 - int(font.getlength(ending))) + ending
        draw.text((left + 22, top + 3), text, fill="black", font=font)
    return legend


def _sheet(lines: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    heights = [line.height + _GAP for line in lines]
    sheet = Image.new("RGB", (lines[0].width, _TITLE + sum(heights) - _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for column, title in enumerate(titles):
        draw.text((column * (TILE_WIDTH + _GAP) + 2, 3), title, fill="black", font=font)
    top = _TITLE
    for line, height in zip(lines, heights, strict=True):
        sheet.paste(line, (0, top))
        top += height
    return sheet
