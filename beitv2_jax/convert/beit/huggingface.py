"""Convert between released names and those of Hugging Face's Beit models, and read and write their config.json.

Hugging Face stores queries, keys and values separately. The names are those of the published files (`BeitModel`,
`BeitForImageClassification`, `BeitForMaskedImageModeling`, `BeitForSemanticSegmentation`), which every version of
transformers reads. None of these models has the patch-aggregation head.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from beitv2_jax.convert.beit.names import INDEX, TABLE
from beitv2_jax.convert.class_names import PROBLEM_TYPE
from beitv2_jax.convert.files import write_safetensors
from beitv2_jax.errors import UserError
from beitv2_jax.models.preprocess import NORMALIZATIONS

DEFAULT_EPSILON = 1e-12
"""Layer norm epsilon if config.json has none; the released code uses 1e-6."""

_INNER = "attention.attention"
_QKV = ("query", "key", "value")
_BLOCK = (
    ("gamma_1", "lambda_1"),
    ("gamma_2", "lambda_2"),
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
    ("attn.q_bias", f"{_INNER}.query.bias"),
    ("attn.v_bias", f"{_INNER}.value.bias"),
    ("attn.qkv", f"{_INNER}.qkv"),  # queries, keys and values, concatenated
    (f"attn.{TABLE}", f"{_INNER}.relative_position_bias.{TABLE}"),
    (f"attn.{INDEX}", f"{_INNER}.relative_position_bias.{INDEX}"),
    ("attn.proj", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
)
_BACKBONE = (
    ("cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("rel_pos_bias", "encoder.relative_position_bias"),
)
_HEADS = {
    "classifier": (("head", "classifier"),),
    "mim": (("norm", "layernorm"), ("lm_head", "lm_head")),
    "segmenter": (
        ("backbone.fpn1", "fpn1"),
        ("backbone.fpn2", "fpn2"),
        ("decode_head.conv_seg", "decode_head.classifier"),
        ("auxiliary_head.conv_seg", "auxiliary_head.classifier"),
        ("decode_head", "decode_head"),
        ("auxiliary_head", "auxiliary_head"),
    ),
}
_ARCHITECTURES = {
    "classifier": "BeitForImageClassification",
    "mim": "BeitForMaskedImageModeling",
    "segmenter": "BeitForSemanticSegmentation",
}
_POOL_BINS = [1, 2, 3, 6]

Pairs = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class _Names:
    """Pairs of name prefixes, (released, Hugging Face); `stems` is the pair for the list of blocks."""

    pairs: Pairs
    stems: tuple[str, str]

    @classmethod
    def of(cls, kind: str, stem: str) -> "_Names":
        """Return the names of a kind whose Hugging Face transformer is at `stem` ('beit.', '' for a BeitModel)."""
        released = "backbone." if kind == "segmenter" else ""
        backbone = _BACKBONE
        if kind == "classifier":
            backbone += (("fc_norm", "pooler.layernorm"), ("norm", "layernorm"))
        backbone = tuple((released + official, stem + theirs) for official, theirs in backbone)
        return cls(backbone + _HEADS[kind], (f"{released}blocks", f"{stem}encoder.layer"))

    def released(self, name: str) -> str:
        """Return the released name for a Hugging Face name; an unknown name is returned unchanged."""
        return self._renamed(name, 1, 0)

    def theirs(self, name: str) -> str:
        """Return the Hugging Face name for a released name; an unknown name is returned unchanged."""
        return self._renamed(name, 0, 1)

    def _renamed(self, name: str, before: int, after: int) -> str:
        pairs, stem = self.pairs, ""
        if found := re.match(rf"{re.escape(self.stems[before])}\.(\d+)\.", name):
            pairs, stem, name = _BLOCK, f"{self.stems[after]}.{found[1]}.", name[found.end() :]
            unknown = found[0] + name
        else:
            unknown = name
        for pair in pairs:
            if name == pair[before] or name.startswith(f"{pair[before]}."):
                return stem + pair[after] + name[len(pair[before]) :]
        return unknown


def is_huggingface(state: dict[str, np.ndarray]) -> bool:
    """Return whether the names are those of a Hugging Face Beit model."""
    return any(re.match(r"(beit\.)?(embeddings\.|encoder\.layer\.)", name) for name in state)


def to_released_names(state: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Callable[[str], str]]:
    """Return the state dict with released names, and a function from released names to names in the file.

    Unknown names are kept, so that reading the released layout reports them.

    Raises:
        UserError: queries, keys or values of a block are missing, or are not matrices of the same shape.
    """
    marks = (("segmenter", "decode_head."), ("mim", "lm_head."), ("classifier", ""))
    kind = next(kind for kind, mark in marks if any(name.startswith(mark) for name in state))
    names = _Names.of(kind, "beit." if any(name.startswith("beit.") for name in state) else "")
    released = {}
    for name, array in state.items():
        piece = re.fullmatch(rf"(.*{_INNER})\.({'|'.join(_QKV)})\.weight", name)
        if piece:
            released.setdefault(names.released(f"{piece[1]}.qkv.weight"), _concatenated(state, piece[1]))
        else:
            released[names.released(name)] = array
    return released, lambda official: names.theirs(official).replace(".qkv.", ".query.")


def _concatenated(state: dict[str, np.ndarray], stem: str) -> np.ndarray:
    parts = [f"{stem}.{part}.weight" for part in _QKV]
    shape = next(state[part].shape for part in parts if part in state)
    for part in parts:
        if part not in state or state[part].shape != shape or len(shape) != 2:
            found = f"has the shape {state[part].shape}" if part in state else "is missing"
            raise UserError(
                f"{part!r} {found}; the queries, keys and values of its block must be matrices of the same shape.",
                "The file may be damaged.",
                "Copy or download it again.",
            )
    return np.concatenate([state[part] for part in parts])


def read_settings(config: dict) -> tuple[dict, tuple[str, ...]]:
    """Return the arguments that only config.json has, and sentences on what was assumed without it.

    In `out_indices`, transformers counts the embeddings as layer 1, so its index i is our layer i - 1. The published
    configs have [3, 5, 7, 11] and therefore read other layers than the released models, which read 4, 6, 8 and 12.

    Raises:
        UserError: the config is of another architecture or has another activation.
    """
    for key, ours in (("model_type", "beit"), ("hidden_act", "gelu")):
        if config.get(key, ours) != ours:
            raise UserError(
                f"config.json has {key}={config[key]!r}, but only {ours!r} can be converted.",
                "The model may be a variant of BEiT with other layers.",
                "Pass a folder whose model is a BEiT.",
            )
    settings = {"norm_eps": config.get("layer_norm_eps", DEFAULT_EPSILON)}
    if "num_attention_heads" in config:
        settings["num_heads"] = config["num_attention_heads"]
    if "out_indices" in config:
        settings["out_layers"] = tuple(index - 1 for index in config["out_indices"])
    if "layer_norm_eps" in config:
        return settings, ()
    return settings, (f"norm_eps={DEFAULT_EPSILON:g}: the default of transformers, as there is none in a config.json",)


def to_huggingface(kind: str, state: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the Hugging Face state dict for a released one, and {name: reason} of the entries that it cannot hold.

    Raises:
        UserError: Hugging Face has no model of this kind.
    """
    if kind not in _ARCHITECTURES:
        raise UserError(
            f"Hugging Face has no Beit model of kind {kind!r}.",
            "The library transformers does not include the tokenizer of BEiT v2.",
            "Write --layout=official.",
        )
    not_written = {
        name: "no Hugging Face model has the patch-aggregation head" for name in state if name.startswith("cls_pt_")
    }
    names = _Names.of(kind, "" if kind == "classifier" and "head.weight" not in state else "beit.")
    converted = {}
    for name, array in state.items():
        if name in not_written or name.endswith(INDEX):
            continue
        theirs = names.theirs(name)
        if ".qkv." in theirs:
            parts = zip(_QKV, np.split(array, 3), strict=True)
            converted |= {theirs.replace(".qkv.", f".{part}."): rows for part, rows in parts}
        else:
            converted[theirs] = array
    return converted, not_written


def make_config(kind: str, arguments: dict, class_names: tuple[str, ...] = (), multi_label: bool = False) -> dict:
    """Return the config.json of a model with these arguments, which must be complete; () numbers the classes.

    With `multi_label` transformers gives every class the sigmoid of its logit for a probability.

    Raises:
        UserError: a segmentation model that Hugging Face cannot build.
    """
    position = arguments["position"]
    config = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": "beit",
        "dtype": "float32",
        "hidden_act": "gelu",
        "hidden_size": arguments["width"],
        "num_hidden_layers": arguments["depth"],
        "num_attention_heads": arguments["num_heads"],
        "intermediate_size": arguments["mlp_dim"],
        "image_size": arguments["image_size"],
        "patch_size": arguments["patch_size"],
        "num_channels": 3,
        "layer_norm_eps": arguments["norm_eps"],
        "layer_scale_init_value": float(arguments["layer_scale_init"] or 0.0),
        "drop_path_rate": float(arguments["drop_path_rate"]),
        "use_mask_token": kind == "mim",
        "use_mean_pooling": arguments.get("pooling", "mean") == "mean",
        "use_absolute_position_embeddings": position == "absolute",
        "use_relative_position_bias": position == "relative",
        "use_shared_relative_position_bias": position == "relative_shared",
    }
    if kind == "mim":
        config["vocab_size"] = arguments["codebook_size"]
    else:
        labels = class_names or [f"LABEL_{index}" for index in range(arguments["num_classes"])]
        config["id2label"] = {str(index): label for index, label in enumerate(labels)}
        config["label2id"] = {label: int(index) for index, label in config["id2label"].items()}
    config |= PROBLEM_TYPE if multi_label else {}
    if kind == "classifier" and arguments["num_classes"] == 0:
        config |= {"architectures": ["BeitModel"], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if kind == "segmenter":
        if arguments["channels"] != arguments["width"]:
            raise UserError(
                f"The segmentation head is {arguments['channels']} wide, but the transformer {arguments['width']}.",
                "Hugging Face can only build a head that is as wide as the transformer.",
                "Write --layout=official.",
            )
        if max(arguments["out_layers"]) == arguments["depth"]:
            raise UserError(
                f"The segmentation model reads layers {arguments['out_layers']} of {arguments['depth']}.",
                "Hugging Face's segmentation model cannot read the last layer, which the released models do.",
                "Write --layout=official.",
            )
        config |= {
            "out_indices": [layer + 1 for layer in arguments["out_layers"]],
            "pool_scales": _POOL_BINS,
            "use_auxiliary_head": True,
            "auxiliary_channels": arguments["aux_channels"],
            "auxiliary_num_convs": 1,
            "auxiliary_concat_input": False,
        }
    return config


def make_preprocessor(kind: str, normalization: str, image_size: int, crop_fraction: float) -> dict:
    """Return the preprocessor_config.json of a model: how its input images are resized, cropped and normalised.

    `BeitImageProcessor` can only stretch an image to a square; that of BiT resizes the shorter side and cuts the
    centre, as our evaluation does. A segmentation model gets the whole image, stretched.
    """
    mean, std = NORMALIZATIONS[normalization]
    square = {"height": image_size, "width": image_size}
    if kind == "segmenter":
        geometry = {"image_processor_type": "BeitImageProcessor", "size": square, "do_center_crop": False}
    else:
        geometry = {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": int(image_size / crop_fraction)},
            "do_center_crop": True,
            "crop_size": square,
        }
    return {
        **geometry,
        "do_resize": True,
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": mean,
        "image_std": std,
    }


def save(directory: Path, state: dict[str, np.ndarray], config: dict, preprocessor: dict) -> None:
    """Write model.safetensors (from contiguous arrays), config.json and preprocessor_config.json to a new folder."""
    directory.mkdir()
    write_safetensors(directory / "model.safetensors", state)
    for name, content in (("config.json", config), ("preprocessor_config.json", preprocessor)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
