"""Convert to and recognise timm's Beit models: the released names without the index buffers, which timm computes.

timm has no tokenizer, no head for codes and no segmentation model; a masked image model is written as its backbone with
the final norm, which timm builds with `num_classes=0, global_pool='token'`.
"""

import numpy as np

from beitv2_jax.convert.beit.names import INDEX, TABLE
from beitv2_jax.errors import UserError

_PRE_TRAINING = ("mask_token", "lm_head.", "cls_pt_")


def is_timm(kind: str, state: dict[str, np.ndarray]) -> bool:
    """Return whether a classifier with released names is from timm: relative positions without a stored index."""
    tables, indices = (any(name.endswith(ending) for name in state) for ending in (TABLE, INDEX))
    return kind == "classifier" and tables and not indices


def to_timm(kind: str, state: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return timm's state dict for a released one, and {name: reason} of the entries that timm does not have.

    Raises:
        UserError: timm has no model of this kind.
    """
    if kind not in ("classifier", "mim"):
        raise UserError(
            f"timm has no model of kind {kind!r}.",
            "Its Beit models are classifiers and backbones.",
            "Write --layout=official, or pass weights of a classifier or a masked image model.",
        )
    not_written = {name: "timm has no head for codes" for name in state if name.startswith(_PRE_TRAINING)}
    kept = {name: array for name, array in state.items() if name not in not_written and not name.endswith(INDEX)}
    return kept, not_written
