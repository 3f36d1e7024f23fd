"""Which windows of which views an evaluation of segmentation sees, and the sizes of the arrays that hold them.

Arithmetic on sizes alone; `data.segmentation.transforms` cuts the windows out and `models.sliding_window` merges the
logits of the network.
"""

import concurrent.futures
import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from beitv2_jax.data.segmentation.label_maps import label_map_size
from beitv2_jax.data.sources import Source

TILE = 128
"""Rows and columns of label maps in a batch are a multiple of this; the device goes through them tile by tile."""
_READ_AT_ONCE = 32


class SizedView(NamedTuple):
    """One view of an image: its size in pixels, the corners (top, left) of its windows, and whether it is mirrored."""

    size: tuple[int, int]
    corners: tuple[tuple[int, int], ...]
    mirrored: bool


class Canvas(NamedTuple):
    """Size of a batch: rows and columns of label maps, windows of a view."""

    height: int
    width: int
    num_windows: int


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Return where windows of `crop` pixels start along a side: every `stride`, the last one moved inside.

    Source: mmsegmentation's slide inference; the released test uses crop 512 and stride 341.
    """
    steps = -(-max(length - crop, 0) // stride)
    return [max(min(step * stride, length - crop), 0) for step in range(steps + 1)]


def fitted_size(height: int, width: int, long_side: int, short_side: int) -> tuple[int, int]:
    """Return the largest size of the same shape whose longer side is at most `long_side`, its shorter `short_side`.

    Source: mmcv's rescaling with `keep_ratio`, its rounding included.
    """
    scale = min(long_side / max(height, width), short_side / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sliding:
    """Square windows of `crop` pixels over an image of any size, every `stride` pixels.

    Attributes:
      long_side, short_side: the image is resized to fit into them at scale 1; with both equal to `crop` there is one
        window, the whole image.
      scales: factors of these sides; the answers of all views are averaged.
      flip: mirrored views too.
    """

    crop: int
    stride: int
    long_side: int
    short_side: int
    scales: Sequence[float] = (1.0,)
    flip: bool = False

    def views(self, height: int, width: int) -> list[SizedView]:
        """Return the views of an image of `height` x `width` pixels: scale by scale, plain before mirrored."""
        found = []
        for scale, mirrored in itertools.product(self.scales, (False, True) if self.flip else (False,)):
            size = fitted_size(height, width, int(self.long_side * scale), int(self.short_side * scale))
            corners = itertools.product(*(window_starts(length, self.crop, self.stride) for length in size))
            found.append(SizedView(size, tuple(corners), mirrored))
        return found

    @property
    def mirrored(self) -> tuple[bool, ...]:
        """Whether each view is mirrored."""
        return tuple(view.mirrored for view in self.views(1, 1))

    def num_windows(self, height: int, width: int) -> int:
        """Return the windows of the view that has most."""
        return max(len(view.corners) for view in self.views(height, width))


def plan_windows(source: Source, sliding: Sliding) -> tuple[Canvas, list[int]]:
    """Return the sizes that hold all examples of `source`, and their ids, those of few windows first.

    Reads every label map's header. What cannot be read becomes a grey square, which always fits.
    """
    with concurrent.futures.ThreadPoolExecutor(_READ_AT_ONCE) as pool:
        sizes = pool.map(lambda index: label_map_size(source[index]["label_map"]), range(len(source)))
        sizes = [size or (1, 1) for size in sizes]
    counts = [sliding.num_windows(*size) for size in sizes]
    height, width = (_rounded_up(max(side)) for side in zip(*sizes, strict=True))
    order = sorted(range(len(sizes)), key=lambda index: (counts[index], index))
    return Canvas(height, width, max(*counts, sliding.num_windows(1, 1))), order


def _rounded_up(length: int) -> int:
    return -(-length // TILE) * TILE
