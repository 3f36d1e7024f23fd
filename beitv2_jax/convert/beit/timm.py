"""timm's Beit models: the released classifiers' names without the index buffers, which timm computes itself.

timm has no tokenizer, no head for codes and no segmentation model; a masked image model becomes its backbone with the
final norm, as `num_classes=0, global_pool='token'` builds it.
"""

import numpy as np

from beitv2_jax.convert.beit.names import INDEX, TABLE
from beitv2_jax.errors import UserError

_PRE_TRAINING = ("mask_token", "lm_head.", "cls_pt_")


def is_timm(kind: str, state: dict[str, np.ndarray]) -> bool:
    """Tell whether a classifier under released names is timm's: relative positions without a stored index."""
    tables, indices = (any(name.endswith(ending) for name in state) for ending in (TABLE, INDEX))
    return kind == "classifier" and tables and not indices


def to_timm(kind: str, state: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return timm's state dict for a released one, and {name: reason} of what timm has no place for.

    Raises:
        UserError: timm has no model of this kind.
    """
    if kind not in ("classifier", "mim"):
        raise UserError(
            f"timm has no model of kind {kind!r}.",
            "its Beit models classify or give features.",
            "--layout=official, or weights of a classifier or a masked image model.",
        )
    left_out = {name: "timm has no head for codes" for name in state if name.startswith(_PRE_TRAINING)}
    kept = {name: array for name, array in state.items() if name not in left_out and not name.endswith(INDEX)}
    return kept, left_out
