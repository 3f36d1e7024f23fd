"""Which implementations of a computation exist, and which one 'auto' stands for on a platform.

All implementations of a computation give the result of the reference, up to rounding.
"""

from collections.abc import Mapping
from typing import Any

from beitv2_jax.models.ops import attention, cross_entropy, nearest_code

IMPLEMENTATIONS = {
    "attention": attention.IMPLEMENTATIONS,
    "nearest_code": nearest_code.IMPLEMENTATIONS,
    "cross_entropy": cross_entropy.IMPLEMENTATIONS,
}
AUTO = {
    "attention": {"cpu": "reference", "gpu": "reference", "tpu": "reference"},
    "nearest_code": {"cpu": "scan", "gpu": "scan", "tpu": "reference"},  # the TPU compiler never stores the matrix
    "cross_entropy": {"cpu": "reference", "gpu": "reference", "tpu": "reference"},
}
"""The default of each platform, as `jax.default_backend()` names it: never a kernel that has not run on it."""


def resolve_auto(settings: Mapping[str, Any], platform: str) -> dict[str, Any]:
    """Return the settings with every 'auto' replaced by the default of `platform` ('cpu', 'gpu' or 'tpu')."""
    return {
        name: AUTO[name].get(platform, "reference") if name in AUTO and value == "auto" else value
        for name, value in settings.items()
    }
