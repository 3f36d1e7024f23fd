"""Settings that know whether they were set explicitly, and what decides those that were not.

A config file declares every key with its published value. What a preset, a flag or a pipeline sets later counts as
given. A key that is not given, and that the weights, the stored targets or the data of the stage decide (`DECIDED`),
takes its value from them. The stages of a pipeline are declared to fit each other: nothing is taken from the run of an
earlier one, which may not exist yet.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict, FieldReference

SIZES = ("patch_size", "stem", "width", "depth", "num_heads", "mlp_dim")
"""Keys of a section that say how large a transformer is."""
ARCHITECTURE = (*SIZES, "position", "layer_scale_init", "qkv_bias", "norm_eps")
"""Keys of a section `model` that say what the backbone is."""
_HEADS = ("pooling", "early_layer", "head_depth", "shared_head")
_SEGMENTER = ("out_layers", "channels", "aux_channels")
_TOKENIZER = (
    *(f"{part}.{name}" for part in ("encoder", "decoder") for name in SIZES),
    *("codebook_size", "code_dim", "quantizer", "fsq_levels"),
)
_MASKING = ("masking.num_masked", "masking.min_patches")
_VIEWS = ("seed", *(f"views.{name}" for name in ("num_views", "interpolation", "min_scale", "color_jitter")))

DECIDED = {
    "init_from": (
        *(f"model.{name}" for name in (*ARCHITECTURE, *_HEADS, *_SEGMENTER, *_TOKENIZER)),
        *("views.image_size", "normalization", *_MASKING),
    ),
    "tokenizer.run": ("views.image_size", "model.patch_size", "model.codebook_size", *_MASKING),
    "tokenizer.codes": ("views.image_size", "model.patch_size", "model.codebook_size", *_MASKING, *_VIEWS),
    "teacher.features": (
        *("views.image_size", "model.encoder.patch_size", "model.patch_size"),
        *_MASKING,
        *_VIEWS,
    ),
    "backbone.run": ("views.image_size", "probe.layers", "backbone.layer"),
    "data.source": ("model.num_classes",),
    "probe.protocol": ("probe.duration", "probe.batch_size"),
}
"""Key that names weights, stored targets, data or a protocol -> keys that it decides, if the stage has them."""
_DECIDE_NOTHING = ("", "ours")
"""Values of these keys with which the declared values stay."""


class _Setting(FieldReference):
    """A value that knows whether it was set after it was declared."""

    def __init__(self, declared: Any):
        super().__init__(declared)
        self.is_given = False

    def set(self, value: Any, type_safe: bool = True) -> None:
        super().set(value, type_safe)
        self.is_given = True

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        super().__setstate__(state)
        self.is_given = state["is_given"]


def watch(config: ConfigDict) -> None:
    """Let every value of `config` know from now on whether it is set; one that follows another key is set already."""
    with config.unlocked(), config.ignore_type():  # both hold for all sections
        _watch_values(config)


def _watch_values(config: ConfigDict) -> None:
    for key, value in config.items(preserve_field_references=True):
        if isinstance(value, ConfigDict):
            _watch_values(value)
        elif not isinstance(value, FieldReference):
            config[key] = _Setting(value)


def undecided(config: ConfigDict) -> set[str]:
    """Return the keys of a stage that were not set and that its weights, stored targets, data or protocol decide."""
    leaves = dict(_leaves(config))
    free = {key for key, leaf in leaves.items() if isinstance(leaf, _Setting) and not leaf.is_given}
    paths = {source: _value(leaves[source]) for source in DECIDED if source in leaves}
    deciding = [source for source, path in paths.items() if path not in _DECIDE_NOTHING and "{workdir}" not in path]
    return {key for source in deciding for key in DECIDED[source]} & free


def decided(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """Return a copy of `config` in which the keys of `values` have these values, and no key is open any more."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(values)
    return config


def _leaves(config: ConfigDict, start: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items(preserve_field_references=True):
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{start}{key}.")
        else:
            yield f"{start}{key}", value


def _value(leaf: Any) -> Any:
    return leaf.get() if isinstance(leaf, FieldReference) else leaf
