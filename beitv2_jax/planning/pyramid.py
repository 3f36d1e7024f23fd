"""Parameters, FLOPs and bytes of the segmentation heads: UPerNet, its feature maps and the auxiliary head, by formulas.

All maps are square; a convolution has no bias and is followed by a batch norm in float32, as in `models.upernet`.
"""

from typing import Any

from beitv2_jax.planning.parts import FLOAT32, HALF, Component, join

POOL_BINS = (1, 2, 3, 6)


def segmentation_heads(config: Any) -> list[Component]:
    """Return the parts that a segment config puts on its backbone; `grid` is the side of the backbone's own map."""
    model, size = config.model, config.views.image_size
    grid, width, channels = size // model.patch_size, model.width, model.channels
    coarse, sides = grid // 2, (4 * grid, 2 * grid, grid)
    maps = [_upsample(grid, width), _norm(2 * grid, width), _upsample(2 * grid, width), _upsample(grid, width)]
    head = [_convolution(side, 1, width, channels) for side in sides]
    head += [_convolution(bins, 1, width, channels) for bins in POOL_BINS]
    head.append(_convolution(coarse, 3, width + len(POOL_BINS) * channels, channels))
    head += [_convolution(side, 3, channels, channels) for side in sides]
    head += [_convolution(4 * grid, 3, 4 * channels, channels), _classes(4 * grid, channels, model.num_classes)]
    resized = [_resize(coarse, bins, width) for bins in POOL_BINS]
    resized += [_resize(bins, coarse, channels) for bins in POOL_BINS]
    resized += [_resize(side // 2, side, channels) for side in sides]
    resized += [_resize(side, 4 * grid, channels) for side in (2 * grid, grid, coarse)]
    auxiliary = [
        _convolution(grid, 3, width, model.aux_channels),
        _classes(grid, model.aux_channels, model.num_classes),
    ]
    return [
        join("feature maps", *maps),
        join("pyramid head", *head),
        join("auxiliary head", *auxiliary),
        join("pooling and resizing", *resized),
        join("pixel logits", _logits(4 * grid, size, model.num_classes)),
        join("auxiliary pixel logits", _logits(grid, size, model.num_classes)),
    ]


def _convolution(side: int, kernel: int, fan_in: int, fan_out: int) -> Component:
    """Return a convolution and its norm; it keeps its input, and what it and the norm give."""
    numbers = kernel * kernel * fan_in * fan_out
    kept = side * side * (HALF * fan_in + 2 * FLOAT32 * fan_out)
    return Component("", numbers + 2 * fan_out, 3 * 2 * side * side * numbers, kept=kept)


def _upsample(side: int, width: int) -> Component:
    numbers = 4 * width * width
    return Component("", numbers + width, 3 * 2 * side * side * numbers, kept=side * side * 5 * HALF * width)


def _norm(side: int, width: int) -> Component:
    return Component("", 2 * width, 0, kept=2 * FLOAT32 * side * side * width)


def _classes(side: int, fan_in: int, classes: int) -> Component:
    return Component(
        "", fan_in * classes + classes, 3 * 2 * side * side * fan_in * classes, kept=FLOAT32 * side * side * fan_in
    )


def _resize(side: int, to: int, channels: int) -> Component:
    """Return products with weights, along rows and then columns or with both at once; only the map has a gradient."""
    flops = 2 * channels * min(to * side * side + to * to * side, to * to * side * side)
    return Component("", 0, 2 * flops, True, kept=FLOAT32 * to * to * channels)


def _logits(side: int, size: int, classes: int) -> Component:
    """Return the logits of every pixel and their softmax; they are there for a while only."""
    resized = _resize(side, size, classes)
    return Component("", 0, resized.flops, True, held=2 * resized.kept)
