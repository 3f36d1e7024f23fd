"""Durations such as '300 epochs', '1000 steps' or '5000 examples', and their length in steps."""

import math
import re

from beitv2_jax.errors import UserError, did_you_mean, nearest

UNITS = ("epochs", "steps", "examples")
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s+([A-Za-z]+)\s*")


def parse_duration(duration: str) -> tuple[float, str]:
    """Split a duration such as '300 epochs' or '1 step' into its amount and its unit, one of `UNITS`.

    Raises:
        UserError: no string, no unit, a negative amount or an unknown unit.
    """
    match = _DURATION.fullmatch(duration) if isinstance(duration, str) else None
    if match is None:
        raise UserError(
            f"{duration!r} is not a duration.",
            "Did you forget the unit?",
            f"Write an amount and one unit of {', '.join(UNITS)}, such as '300 epochs'.",
        )
    amount, unit = float(match[1]), match[2].lower()
    plural = unit if unit.endswith("s") else unit + "s"
    if plural not in UNITS:
        guess = nearest(plural, UNITS)
        raise UserError(
            f"{duration!r} has the unknown unit '{match[2]}'.",
            did_you_mean(plural, UNITS),
            f"Write {' or '.join(repr(f'{match[1]} {known}') for known in ([guess] if guess else UNITS))}.",
        )
    return amount, plural


def steps(duration: str, *, batch_size: int, num_examples: int, batch_key: str = "run.batch_size") -> int:
    """Return the number of steps in a duration.

    An epoch has floor(num_examples / batch_size) steps (source: the released loaders drop the last, partial batch), so
    '300 epochs' of ImageNet-1k at batch 2048 are 300 * 625. Examples round up to whole steps, fractions of an epoch
    down; only a zero amount gives zero steps.

    Args:
        duration: '300 epochs', '1000 steps' or '5000 examples'.
        batch_size: global examples per step.
        num_examples: examples of the training split.
        batch_key: config key of `batch_size`, for the error.

    Raises:
        UserError: the text is no duration, or an epoch holds no whole batch.
    """
    amount, unit = parse_duration(duration)
    if unit == "epochs":
        if num_examples < batch_size:
            raise UserError(
                f"An epoch of {num_examples} examples holds no batch of {batch_size}.",
                "Did you choose the batch size for a larger data set?",
                f"Write --config.{batch_key}={2 ** int(math.log2(max(num_examples, 1)))} or less.",
            )
        count = math.floor(amount * (num_examples // batch_size) + 1e-9)
    else:
        count = math.ceil((amount if unit == "steps" else amount / batch_size) - 1e-9)
    return max(count, 1) if amount > 0 else 0
