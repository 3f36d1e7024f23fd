"""How input images are cropped, their mean and standard deviation, read from a JSON file next to published weights."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from beitv2_jax.convert.files import read_config
from beitv2_jax.data.augment import eval_crop_fraction
from beitv2_jax.errors import UserError
from beitv2_jax.models.preprocess import NORMALIZATIONS

_FILES = {
    "preprocessor_config.json": ("", "image_mean", "image_std"),
    "config.json": ("pretrained_cfg", "mean", "std"),
    "open_clip_config.json": ("preprocess_cfg", "mean", "std"),
}
"""File of transformers, timm or open_clip -> section, key of the mean, key of the standard deviation."""


def normalization_of(path: str, *, given: str, usual: str, option: str) -> str:
    """Return the name of the input normalisation of the weights at `path`; '' if it is not known.

    That is `given`, else the one in a file beside the weights, else `usual`. A `given` one that differs from what is
    known of the weights is logged. `option` is what sets `given`, for messages.

    Raises:
        UserError: nothing is given, and the file has numbers that belong to no normalisation with a name.
    """
    stated = _stated(path)
    if stated is None:
        known = usual
    else:
        name, mean, std = stated
        fitting = [name for name, numbers in NORMALIZATIONS.items() if np.allclose((mean, std), numbers, atol=1e-4)]
        known = fitting[0] if fitting else f"mean {mean} and standard deviation {std}"
        if not fitting and not given:
            raise UserError(
                f"The images of {path} are normalised with {known} ({name}), which this program has no name for.",
                "The network may have been trained with other statistics than those of its family.",
                f"Write {option}=NAME with one of {', '.join(NORMALIZATIONS)} to use that instead.",
            )
    if given and known and given != known:
        source = f" ({stated[0]})" if stated else ""
        logging.warning(
            "%s was trained with the input normalisation %s%s, but %s is used, as given", path, known, source, given
        )
    return given or known


def _stated(path: str) -> tuple[str, list[float], list[float]] | None:
    """Return file name, mean and standard deviation; None if no file beside the weights has them."""
    for name, (section, mean_key, std_key) in _FILES.items():
        content: Any = read_config(path, name) or {}
        content = content.get(section, content) if section else content
        if not isinstance(content, Mapping) or content.get(mean_key) is None or content.get(std_key) is None:
            continue
        mean, std = content[mean_key], content[std_key]
        if not (_is_three_numbers(mean) and _is_three_numbers(std)):
            raise UserError(
                f"{name} beside {path} has {mean_key}={mean!r} and {std_key}={std!r}, not three numbers each.",
                "The file may have been edited, or belong to a network for other images.",
                "Correct the file, or move it away.",
            )
        return (name, mean, std) if content.get("do_normalize", True) else (name, [0.0] * 3, [1.0] * 3)
    return None


def crop_fraction_of(path: str, image_size: int) -> float:
    """Return the fraction of the resized shorter side that central crops keep, as a file beside the weights states it.

    It is 0 where none does, or the images would be resized as in the released evaluation (`eval_crop_fraction`). The
    files are that of timm (`crop_pct`) and that of transformers (`size` and `crop_size`).
    """
    config: Any = read_config(path) or {}
    stated = config.get("pretrained_cfg", config)
    is_center = isinstance(stated, Mapping) and stated.get("crop_mode", "center") == "center"
    fraction = stated.get("crop_pct") if is_center else None
    preprocessor: Any = read_config(path, "preprocessor_config.json") or {}
    size, crop = preprocessor.get("size"), preprocessor.get("crop_size")
    if preprocessor.get("do_center_crop") and isinstance(size, Mapping) and isinstance(crop, Mapping):
        side, crop_side = size.get("shortest_edge"), crop.get("height")
        if side and crop_side:
            fraction = crop_side / side
            # the quotient is rounded, and must not make the resized side one pixel shorter
            fraction = fraction if int(crop_side / fraction) == side else math.nextafter(fraction, 0)
    is_fraction = isinstance(fraction, int | float) and 0 < fraction <= 1
    if not is_fraction or int(image_size / fraction) == int(image_size / eval_crop_fraction(image_size)):
        return 0.0
    return float(fraction)


def _is_three_numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(number, int | float) for number in value)
