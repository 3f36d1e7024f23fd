"""Which implementation of a computation 'auto' means on a platform (`beitv2_jax.choices` names them all).

All implementations of a computation give the result of the reference, up to rounding.
"""

from collections.abc import Mapping
from typing import Any

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
