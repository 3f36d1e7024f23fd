"""Which form of a computation 'auto' means on a platform; every form gives the plain one's results up to rounding.

`AUTO` names only forms that have run on that platform. The others are tested against the plain form and compiled for
it, but wait for a measurement there; they are had by name.
"""

from collections.abc import Mapping
from typing import Any

from beitv2_jax.models import attention, cross_entropy, nearest

IMPLEMENTATIONS = {
    "attention": attention.IMPLEMENTATIONS,
    "nearest_code": nearest.IMPLEMENTATIONS,
    "cross_entropy": cross_entropy.IMPLEMENTATIONS,
}
AUTO = {
    "attention": {"cpu": "plain", "gpu": "plain", "tpu": "plain"},
    "nearest_code": {"cpu": "scan", "gpu": "scan", "tpu": "plain"},  # a TPU's compiler keeps no matrix of the plain one
    "cross_entropy": {"cpu": "plain", "gpu": "plain", "tpu": "plain"},
}


def resolved(efficiency: Mapping[str, Any], platform: str) -> dict[str, Any]:
    """Return the settings with every 'auto' replaced by its form on `platform`, as `jax.default_backend()` names it."""
    return {
        key: AUTO[key].get(platform, "plain") if key in AUTO and value == "auto" else value
        for key, value in efficiency.items()
    }
