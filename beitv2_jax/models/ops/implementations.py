"""Which forms of a computation there are, and which one 'auto' means where none can be tried.

Every form gives the plain one's results up to rounding. On an accelerator at hand `trials` settles what 'auto' means.
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
    "attention": {"cpu": "plain", "gpu": "plain", "tpu": "plain"},
    "nearest_code": {"cpu": "scan", "gpu": "scan", "tpu": "plain"},  # a TPU's compiler keeps no matrix of the plain one
    "cross_entropy": {"cpu": "plain", "gpu": "plain", "tpu": "plain"},
}
"""On a CPU as measured; for a chip that is not there what its compiler takes, never a kernel that has not run on it."""


def resolved(efficiency: Mapping[str, Any], platform: str) -> dict[str, Any]:
    """Return the settings with every 'auto' replaced by its form on `platform`, as `jax.default_backend()` names it."""
    return {
        key: AUTO[key].get(platform, "plain") if key in AUTO and value == "auto" else value
        for key, value in efficiency.items()
    }
