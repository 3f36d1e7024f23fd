"""Which implementation of a computation 'auto' means on a platform, and which ones can run there.

`beitv2_jax.choices` names them all.

All implementations of a computation give the result of the reference, up to rounding.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from beitv2_jax import choices

AUTO = {
    "attention": {"cpu": "reference", "gpu": "reference", "tpu": "reference"},
    "nearest_code": {"cpu": "scan", "gpu": "scan", "tpu": "reference"},  # the TPU compiler never stores the matrix
    "cross_entropy": {"cpu": "reference", "gpu": "reference", "tpu": "reference"},
}
"""The default of each platform, as `jax.default_backend()` names it: never a kernel that has not run on it."""

NAMES = {"attention": choices.ATTENTION, "nearest_code": choices.NEAREST_CODE, "cross_entropy": choices.CROSS_ENTROPY}
"""Computation -> its implementations."""


def resolve_auto(settings: Mapping[str, Any], platform: str) -> dict[str, Any]:
    """Return the settings with every 'auto' replaced by the default of `platform` ('cpu', 'gpu' or 'tpu')."""
    return {
        name: AUTO[name].get(platform, "reference") if name in AUTO and value == "auto" else value
        for name, value in settings.items()
    }


def obstacle(implementation: str, platform: str, *, dtype: str, head_widths: Iterable[int]) -> str:
    """Return why an implementation cannot run on `platform` with models of these sizes; '' if it can.

    Pallas kernels run everywhere, interpreted where they are not compiled.
    """
    if implementation != "cudnn":
        return ""
    if platform != "gpu":
        return f"cuDNN needs an NVIDIA GPU, and this process runs on {platform}"
    if dtype not in ("bfloat16", "float16"):
        return f"cuDNN takes 16-bit types, and efficiency.dtype is {dtype}"
    unfit = next((width for width in head_widths if width % 8 or width > 128), None)
    return f"cuDNN takes heads whose width is a multiple of 8 up to 128, and they are {unfit} wide" if unfit else ""
