"""Common to several stages: initial variables, pixels and input range, weight decay and layer decay groups."""

import re

import jax.numpy as jnp

from beitv2_jax.models import preprocess
from beitv2_jax.tasks.api import Batch
from beitv2_jax.typing import Images, PyTree


def init_variables(model, key, *args, **kwargs) -> dict[str, PyTree]:
    """Return {"params", "model_state"} of a fresh model; its state is that of the quantizer, or empty without one."""
    variables = model.init({"params": key, "drop_path": key}, *args, **kwargs)
    return {"params": variables["params"], "model_state": variables.get("codebook", {})}


def released_no_decay(path: str) -> bool:
    """Return whether the released recipes exempt the parameter at `path` ('a/b/c') from weight decay.

    Exempt are all vectors (biases, norms, layer scale), `cls_token` and `pos_embed`. Relative position tables and the
    mask token are decayed, as released.
    """
    return re.search(r"(bias|scale|gamma_[12]|cls_token|pos_embed)$", path) is not None


def layer_of(path: str, *, depth: int) -> int:
    """Return the layer id of a parameter for layer decay: 0 embeddings, i + 1 block i, depth + 1 the rest.

    Source: the released fine-tuning recipe; the rate of layer id `j` is layer_decay^(depth + 1 - j) of the full rate.
    """
    parts = path.split("/")
    if parts[0] == "backbone":
        if parts[1] in ("cls_token", "mask_token", "pos_embed", "patch_embed"):
            return 0
        if parts[1].startswith("blocks_"):
            return int(parts[1].removeprefix("blocks_")) + 1
    return depth + 1


def view_pixels(batch: Batch, view: str = "images") -> Images:
    """Return the pixels of a view, float32 0..255, after the colour jitter drawn for the image (if any)."""
    if "jitter_factors" in batch:
        return preprocess.color_jitter(
            batch[view], batch["jitter_factors"], batch["jitter_order"], batch["jitter_gray"]
        )
    return batch[view].astype(jnp.float32)


def normalized(images: Images, normalization: str) -> Images:
    """Return the network's input of pixels 0..255; `normalization` names the range (`preprocess.NORMALIZATIONS`)."""
    return preprocess.normalize(images, *preprocess.NORMALIZATIONS[normalization])
