"""Everything known of the codes of tokenizers on some images, as one HTML file that needs no other file and no network.

`atlas.html` beside this module is the page; its scripts read the data that is written into it here: thumbnails of the
images, from which the page cuts its patches, the code ids, and what is computed of each code.
"""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int32, UInt8
from PIL import Image, ImageDraw, ImageFont

from beitv2_jax.runtime.atomic_files import replacing, write_text

LIMIT_BYTES = 25_000_000
"""Most bytes of the page."""
SIDES = (224, 160, 128, 112, 96, 64)
"""Sides of thumbnails in pixels, of which the largest is taken that leaves the page below its limit."""
NUM_NEIGHBOURS = 5
_PLACE = "__DATA__"


class Codes(NamedTuple):
    """The codes of one tokenizer.

    Attributes:
        name: of the tokenizer, as it is shown.
        code_ids: of every image.
        codebook: the vectors of the codes.
    """

    name: str
    code_ids: Int[np.ndarray, "n gh gw"]
    codebook: Float[np.ndarray, "k c"]


class Pictures(NamedTuple):
    """The images of the page.

    Attributes:
        thumbnails: encoded squares, of `side` pixels.
        labels: classes, -1 where there is none.
        names: of the images, as they are shown.
    """

    thumbnails: Sequence[bytes]
    side: int
    labels: Int32[np.ndarray, "n"]
    names: Sequence[str]


def estimated_bytes(num_images: int, thumbnail_bytes: float, num_patches: int, num_codes: int) -> float:
    """Return about how large a page is; patches of an image and codes are those of all tokenizers together."""
    of_image = thumbnail_bytes + 2 * num_patches + 20
    of_code = 5 * 4 + 8 * NUM_NEIGHBOURS
    return len(_template()) + 4 / 3 * 1.02 * (num_images * of_image + num_codes * of_code)


def _template() -> str:
    return Path(__file__).with_name("atlas.html").read_text(encoding="utf-8")


def statistics(
    codes: Codes, labels: Int32[np.ndarray, "n"], num_classes: int
) -> dict[str, np.ndarray | tuple[int, int] | None]:
    """Return what is computed of each of the k codes.

    Returns:
        `counts`: patches that have the code. `images`: images in which it occurs. `neighbours`, 'k m': the nearest of
        the other codes in use, and `distances`, 'k m': 1 - cosine to them. `colors`, 'k 3': a colour for each code,
        alike for codes that lie near one another. Where there are labels `purity`: the fraction of its patches that
        lie in images of the class that it has most often, and `majority`: this class, -1 for an unused code.
    """
    num_codes, num_images = len(codes.codebook), len(codes.code_ids)
    flat = codes.code_ids.reshape(num_images, -1)
    counts = np.bincount(flat.ravel(), minlength=num_codes)
    occurrences = np.unique(flat + num_codes * np.arange(num_images)[:, None])
    in_images = np.bincount(occurrences % num_codes, minlength=num_codes)
    found = {"counts": counts.astype(np.uint32), "images": in_images.astype(np.uint32)}
    found["neighbours"], found["distances"] = _nearest(codes.codebook, np.flatnonzero(counts))
    found["colors"] = _colors(codes.codebook)
    if num_classes and (labels >= 0).all():
        table = np.bincount((flat * num_classes + labels[:, None]).ravel(), minlength=num_codes * num_classes)
        table = table.reshape(num_codes, num_classes)
        found["purity"] = (table.max(axis=1) / np.maximum(counts, 1)).astype(np.float32)
        found["majority"] = np.where(counts, table.argmax(axis=1), -1).astype(np.int32)
    return found


def _nearest(codebook: np.ndarray, used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    units = codebook / np.maximum(np.linalg.norm(codebook, axis=1, keepdims=True), 1e-12)
    number = min(NUM_NEIGHBOURS, len(used) - 1)
    found, distances = [], []
    for start in range(0, len(units), 1024):
        distance = 1 - units[start : start + 1024] @ units[used].T
        distance[np.arange(start, start + len(distance))[:, None] == used] = np.inf  # not a code itself
        few = np.argpartition(distance, max(0, number - 1), axis=1)[:, :number]
        order = np.argsort(np.take_along_axis(distance, few, axis=1), axis=1, kind="stable")
        few = np.take_along_axis(few, order, axis=1)
        found.append(used[few])
        distances.append(np.take_along_axis(distance, few, axis=1))
    return np.concatenate(found).astype(np.uint32), np.concatenate(distances).clip(0).astype(np.float32)


def _colors(codebook: np.ndarray) -> UInt8[np.ndarray, "k 3"]:
    """Return colours from the places of the codes along their three principal directions."""
    centred = codebook - codebook.mean(axis=0)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:3]
    places = np.zeros((len(codebook), 3))
    places[:, : len(directions)] = centred @ directions.T
    ranks = places.argsort(axis=0).argsort(axis=0) / max(1, len(codebook) - 1)
    return (30 + 210 * ranks).round().astype(np.uint8)


def write_page(
    path: Path,
    tokenizers: Sequence[Codes],
    pictures: Pictures,
    *,
    class_names: Sequence[str],
    data: str,
    num_unreadable: int,
) -> int:
    """Write the page, with as many of the images, evenly spread, as `LIMIT_BYTES` leaves room for.

    What is computed of the codes counts all images.

    Returns:
        The number of images that are in the page.
    """
    num_images = len(pictures.thumbnails)
    about = {
        "data": data,
        "numImages": num_images,
        "numUnreadable": num_unreadable,
        "side": pictures.side,
        "classes": list(class_names),
    }
    computed = [statistics(codes, pictures.labels, len(class_names)) for codes in tokenizers]
    template, number = _template(), num_images
    while True:
        chosen = np.unique(np.linspace(0, num_images - 1, number).astype(int))
        page = template.replace(_PLACE, _json({**about, **_of_images(tokenizers, computed, pictures, chosen)}))
        if len(page.encode()) < LIMIT_BYTES or number == 1:
            break
        number = max(1, int(number * min(0.98, LIMIT_BYTES / len(page.encode()))))
    write_text(path, page)
    return len(chosen)


def _of_images(
    tokenizers: Sequence[Codes], computed: Sequence[dict], pictures: Pictures, chosen: np.ndarray
) -> dict[str, Any]:
    return {
        "images": [base64.b64encode(pictures.thumbnails[i]).decode() for i in chosen],
        "names": [pictures.names[i] for i in chosen],
        "labels": _array(pictures.labels[chosen]),
        "tokenizers": [
            {
                "name": codes.name,
                "size": len(codes.codebook),
                "grid": codes.code_ids.shape[1:],
                "ids": _array(
                    codes.code_ids[chosen].astype(np.uint16 if len(codes.codebook) <= 1 << 16 else np.uint32)
                ),
                **{name: _array(array) for name, array in of_codes.items()},
            }
            for codes, of_codes in zip(tokenizers, computed, strict=True)
        ],
    }


def _array(array: np.ndarray) -> dict[str, str]:
    """Return what the page makes a typed array of."""
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return {"dtype": array.dtype.name, "data": base64.b64encode(little.tobytes()).decode()}


def _json(value: Any) -> str:
    # no text may end the element of the page that holds the data
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def draw_usage(counts: Int[np.ndarray, "k"], path: str) -> None:
    """Draw how often each code is used, the most used first, on a logarithmic scale, into the PNG file `path`."""
    width, height, left, top, bottom = 900, 320, 60, 40, 40
    canvas = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    ordered = np.sort(counts)[::-1]
    right, floor = width - 20, height - bottom
    most = int(np.ceil(np.log10(max(10, ordered[0]))))

    def up(count: float) -> float:
        # a little below 1, so that a code that is used once can be seen
        return floor - (floor - top) * (np.log10(count) + 0.1) / (most + 0.1)

    for power in range(most + 1):
        y = up(10**power)
        draw.line((left, y, right, y), fill=(229, 231, 235))
        draw.text((left - 8, y), f"{10**power:,}", fill="gray", font=font, anchor="rm")
    for x in range(left, right):
        first, last = ((place - left) * len(ordered) // (right - left) for place in (x, x + 1))
        count = ordered[first : max(first + 1, last)].mean()
        if count > 0:
            draw.line((x, floor, x, min(floor, up(count))), fill=(37, 99, 235))
    in_use = np.count_nonzero(counts)
    title = f"patches of each code, most used first: {in_use:,} of {len(counts):,} codes are in use"
    draw.text((left, 10), title, fill="black", font=font)
    draw.text((left, floor + 8), "1", fill="gray", font=font)
    draw.text((right, floor + 8), f"{len(counts):,}", fill="gray", font=font, anchor="ra")
    with replacing(path, "wb") as file:
        canvas.save(file, "PNG")
