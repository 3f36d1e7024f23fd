"""How time and memory grow with batch size, sequence length, depth and codebook size, and the exponents of it.

    cost = c * size^exponent, by least squares between the logarithms

A fixed cost beside the growing one shows as an exponent below 1, so the exponents between neighbouring sizes stand
beside the fitted one. Memory is what the compiled program asks for.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks import parts, steps, timing
from benchmarks.configs import load_config

BATCHES = {True: (2, 8, 32), False: (32, 64, 128, 256, 512)}
SIDES = {True: (64, 112, 192), False: (112, 160, 224, 320, 448)}
DEPTHS = {True: (1, 2, 4), False: (6, 12, 24, 48)}
CODES = (1024, 4096, 8192, 16384, 65536)
LENGTH_TOKENS = {True: 512, False: 25088}
"""Patches of a batch over which the sequence length grows: the fewer images, the longer they are."""


def over_batch(found: ConfigDict, *, effort: timing.Effort, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the growth of the mim step with the batch."""
    return _over(found, "run.batch_size", BATCHES[options["quick"]], effort, options, images=lambda value: value)


def over_length(found: ConfigDict, *, effort: timing.Effort, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the growth of the mim step with the tokens of an image, at about as many patches in a batch."""
    points, lengths = [], []
    for side in SIDES[options["quick"]]:
        patches = (side // found.model.patch_size) ** 2
        images = max(1, LENGTH_TOKENS[options["quick"]] // patches)
        changes = {**options["changes"], "views.image_size": side, "run.batch_size": images}
        lengths.append(patches + 1)
        points.append(_step_point(changes, effort, options))
        points[-1].update(image_size=side, batch_size=images)
    return _fitted("tokens of an image, costs of one image", lengths, points)


def over_depth(found: ConfigDict, *, effort: timing.Effort, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the growth of the mim step with the blocks of its backbone."""
    points = []
    for depth in DEPTHS[options["quick"]]:
        changes = {**options["changes"], "model.depth": depth, "model.early_layer": max(1, depth * 3 // 4)}
        points.append(_step_point(changes, effort, options))
    return _fitted("blocks, costs of one image", DEPTHS[options["quick"]], points)


def over_codes(found: ConfigDict, *, effort: timing.Effort, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the growth of lookup, sums and update with the codes, in every implementation of the lookup."""
    by_implementation = {}
    for size in CODES:
        part = parts.quantizer(
            load_config("vqkd", quick=options["quick"], changes={**options["changes"], "model.codebook_size": size})
        )
        for name, measured in parts.measure(part, effort)["implementations"].items():
            point = {"seconds": measured["seconds"], "bytes": measured["planned_bytes"], "size": size}
            by_implementation.setdefault(name, []).append(point)
    along = "codes, costs of one batch"
    fitted = {name: _fitted(along, CODES, points) for name, points in by_implementation.items()}
    return {"along": along, "implementations_growth": fitted}


def _over(found, key, values, effort, options, images: Callable[[int], int]) -> dict[str, Any]:
    points = [_step_point({**options["changes"], key: value}, effort, options, images(value)) for value in values]
    return _fitted(f"{key}, costs of one batch", values, points)


def _step_point(changes, effort, options, images: int | None = None) -> dict[str, Any]:
    """Return seconds and bytes of a mim step with these changes: of `images`, or of one where that is None."""
    step = steps.mim(load_config("mim_base", quick=options["quick"], changes=changes))
    compiled = step.lowered.compile()
    (seconds,) = timing.samples({"": step.start(compiled)}, effort).values()
    share = 1 if images else step.images
    point = {
        "seconds": timing.spread([value / share for value in seconds]),
        "bytes": timing.planned_bytes(compiled) / share,
        "flops": step.traced_flops / share,
    }
    jax.clear_caches()
    return point


def _fitted(along: str, sizes: Sequence[float], points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    fits = {"seconds": fit(sizes, [point["seconds"]["median"] for point in points])}
    fits["bytes"] = fit(sizes, [point["bytes"] for point in points])
    if "flops" in points[0]:
        fits["flops"] = fit(sizes, [point["flops"] for point in points])
    return {
        "along": along,
        "growth": [{"size": size, **point} for size, point in zip(sizes, points, strict=True)],
        "fits": fits,
    }


def fit(sizes: Sequence[float], costs: Sequence[float]) -> dict[str, Any]:
    """Return the exponent of costs over sizes, its standard error, and the exponents between neighbouring sizes."""
    x, y = np.log(sizes), np.log(costs)
    centred = x - x.mean()
    exponent = float(centred @ y / (centred @ centred))
    residuals = y - y.mean() - exponent * centred
    freedom = len(x) - 2
    error = math.sqrt(residuals @ residuals / freedom / (centred @ centred)) if freedom > 0 else None
    return {"exponent": exponent, "standard_error": error, "between_neighbours": (np.diff(y) / np.diff(x)).tolist()}
