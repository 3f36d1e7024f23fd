"""Convert to and recognise timm's Beit models: the released names without the index buffers, which timm computes.

timm has no tokenizer, no head for codes and no segmentation model; a masked image model is written as its backbone with
the final norm, which timm builds with `num_classes=0, global_pool='token'`. A folder has a config.json, from which
`timm.create_model("local-dir:FOLDER", pretrained=True)` builds the model.
"""

import json
import math
from pathlib import Path

import numpy as np

from beitv2_jax.convert.beit.names import INDEX, TABLE
from beitv2_jax.convert.class_names import PROBLEM_TYPE
from beitv2_jax.convert.files import write_safetensors
from beitv2_jax.errors import UserError
from beitv2_jax.models.preprocess import NORMALIZATIONS

ARCHITECTURE = "beitv2_base_patch16_224"
"""Model of timm that config.json builds with its own sizes in place of all of the published ones."""
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


def stated_heads(config: dict) -> int | None:
    """Return the number of attention heads in a config.json of timm; None if it is not stated."""
    return (config.get("model_args") or {}).get("num_heads")


def make_config(
    kind: str,
    arguments: dict,
    normalization: str,
    class_names: tuple[str, ...],
    crop_fraction: float,
    multi_label: bool = False,
) -> dict:
    """Return the config.json of a model with these arguments, which must be complete.

    timm has no word for `multi_label`; that of Hugging Face is written, which timm leaves alone.
    """
    position, size = arguments["position"], arguments["image_size"]
    mean, std = NORMALIZATIONS[normalization]
    num_classes = arguments["num_classes"] if kind == "classifier" else 0
    global_pool = "avg" if arguments.get("pooling", "cls") == "mean" else "token"
    model_args = {
        "img_size": size,
        "patch_size": arguments["patch_size"],
        "embed_dim": arguments["width"],
        "depth": arguments["depth"],
        "num_heads": arguments["num_heads"],
        "mlp_ratio": _ratio(arguments["mlp_dim"], arguments["width"]),
        "init_values": arguments["layer_scale_init"] or None,
        "use_abs_pos_emb": position == "absolute",
        "use_rel_pos_bias": position == "relative",
        "use_shared_rel_pos_bias": position == "relative_shared",
    }
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": num_classes,
        "num_features": arguments["width"],
        "global_pool": global_pool,
        "model_args": {**model_args, "global_pool": global_pool},
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": crop_fraction,
            "crop_mode": "center",
            "mean": list(mean),
            "std": list(std),
            "num_classes": num_classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    config |= {"label_names": list(class_names)} if class_names else {}
    return config | (PROBLEM_TYPE if multi_label else {})


def save(directory: Path, state: dict[str, np.ndarray], config: dict) -> None:
    """Write model.safetensors (from contiguous arrays) and config.json to a new folder."""
    directory.mkdir()
    write_safetensors(directory / "model.safetensors", state)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _ratio(mlp_dim: int, width: int) -> float:
    # timm computes int(width * ratio), which a quotient that was rounded down would make one too small
    ratio = mlp_dim / width
    return ratio if int(width * ratio) == mlp_dim else math.nextafter(ratio, math.inf)
