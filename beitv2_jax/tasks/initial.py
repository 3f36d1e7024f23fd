"""What a stage takes from its weights, stored targets and data: the keys of its config that were not set.

`config.settings.DECIDED` lists the keys, the functions here find their values. Nothing but a log line is written.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from beitv2_jax import config as config_lib
from beitv2_jax.config.settings import ARCHITECTURE, DECIDED, SIZES
from beitv2_jax.convert.adapt import TITLES
from beitv2_jax.convert.arguments import published_early_layer, published_out_layers, with_defaults
from beitv2_jax.convert.files import read_config
from beitv2_jax.convert.runs import check_stage
from beitv2_jax.convert.weights import MASKED_KINDS, TOKENIZER_STAGES, Weights, backbone_of, describe
from beitv2_jax.data.segmentation.histogram import count_classes
from beitv2_jax.data.segmentation.sources import open_label_maps
from beitv2_jax.data.sources import class_names
from beitv2_jax.data.target_cache.encoding import CODE_IDS, FEATURES
from beitv2_jax.errors import UserError
from beitv2_jax.sizes import MASKED_FRACTION
from beitv2_jax.tasks.probe import READS
from beitv2_jax.tasks.targets import manifest_of
from beitv2_jax.tasks.tokenize import sizes_of

PUBLISHED_PATCHES = 196
"""Patches of an image in the published pre-training."""

Values = dict[str, Any]
"""Config key -> value."""


def completed(
    config: ConfigDict,
    folder: str,
    *,
    former: ConfigDict | None = None,
    tolerant: bool = False,
    with_data: bool = True,
) -> ConfigDict:
    """Return a copy of the config of a stage in which every key is decided, and log what came from where.

    Args:
        config: as presets and flags have set it; a pipeline is returned as it is.
        folder: what '{workdir}' in it stands for.
        former: config of the run that is continued, which has decided already; None decides anew.
        tolerant: keep what is declared where weights, targets or data are not there, and log why.
        with_data: False keeps what is declared where the data decide, which are then not opened.

    Raises:
        UserError: they are not there, or cannot be read.
    """
    if config.stage == "pipeline":
        return config
    keys = config_lib.undecided(config)
    if former is not None:
        before = config_lib.flatten(former)
        values = {key: before[key] for key in keys if key in before}
    else:
        keys = keys if with_data else keys.difference(DECIDED["data.source"])
        values = _found(config, folder, keys, tolerant)
    return config_lib.decided(config, values)


def _found(config: ConfigDict, folder: str, keys: set[str], tolerant: bool) -> Values:
    """Return the value of each of `keys` that can be found; of two sources of one key the first decides.

    An earlier stage of a pipeline is no source.
    """
    earlier = {source for source, path in config_lib.flatten(config).items() if "{workdir}" in str(path)}
    config = config_lib.resolve(config, folder)
    values, flat = {}, config_lib.flatten(config)
    for source, find in _FINDERS.items():
        wanted = keys.intersection(DECIDED[source]) - values.keys()
        if not flat.get(source) or source in earlier or not wanted:
            continue
        try:
            title, found = find(config)
        except UserError as error:
            if not tolerant:
                raise
            logging.info("%s=%s decides nothing here: %s", source, flat[source], error.happened)
            continue
        own = {key: value for key, value in found.items() if key in wanted}
        if own:
            logging.info("%s=%s, %s, sets %s", source, flat[source], title, _listed(own))
        values |= own
    if "masking" in config and {"views.image_size", "model.patch_size"} & values.keys():
        masking = {key: value for key, value in _masking(flat | values).items() if key in keys}
        logging.info("the number of patches sets %s", _listed(masking))
        values |= masking
    return values


def _of_weights(config: ConfigDict) -> tuple[str, Values]:
    weights = describe(config.init_from)
    image_size = weights.arguments["image_size"]
    values = {"views.image_size": image_size}
    if weights.normalization_known:
        values["normalization"] = weights.normalization or "half"
    if config.stage == "vqkd":
        values |= _tokenizer(weights)
    else:
        values |= _model(config, weights)
    return f"{TITLES[weights.kind]} for {image_size} pixels", values


def _tokenizer(weights: Weights) -> Values:
    if weights.kind != "vqkd":
        trunk = dataclasses.asdict(backbone_of(weights))
        return {f"model.encoder.{name}": trunk[name] for name in SIZES}
    arguments = {"teacher_width": 1, **weights.arguments}  # a run's config leaves that open
    return {f"model.{key}": value for key, value in config_lib.flatten(with_defaults("vqkd", arguments)).items()}


def _model(config: ConfigDict, weights: Weights) -> Values:
    """Return the backbone of the weights, and of the heads what is theirs or follows from the backbone as published."""
    backbone = backbone_of(weights)
    arguments = with_defaults(weights.kind, weights.arguments) if weights.kind not in ("vqkd", "vit") else {}
    fields = dataclasses.asdict(backbone)
    fields["layer_scale_init"] = backbone.layer_scale_init or 0.0
    if "masking" not in config and backbone.position == "relative_shared":
        fields["position"] = "relative"
    values = {name: fields[name] for name in ARCHITECTURE}
    if "masking" in config:
        values["early_layer"] = published_early_layer(backbone.depth)
        if arguments.get("patch_aggregation"):
            values |= {name: arguments[name] for name in ("early_layer", "head_depth", "shared_head")}
    if config.stage == "finetune" and weights.kind == "classifier":
        values["pooling"] = arguments["pooling"]
    if config.stage == "segment":
        values |= {"out_layers": published_out_layers(backbone.depth), "channels": backbone.width}
        if weights.kind == "segmenter":
            values |= {name: arguments[name] for name in ("out_layers", "channels", "aux_channels")}
    values = {f"model.{name}": value for name, value in values.items()}
    if config.stage == "segment":
        values["views.image_size"] = _whole_patches(config.views.image_size, backbone.patch_size)
    return values


def _whole_patches(image_size: int, patch_size: int) -> int:
    """Return the image size next to that of a config whose crops are larger than the images of the weights."""
    return patch_size * max(1, round(image_size / patch_size))


def _of_tokenizer(config: ConfigDict) -> tuple[str, Values]:
    check_stage(config.tokenizer.run, TOKENIZER_STAGES, "config.tokenizer.run")
    sizes = sizes_of(read_config(config.tokenizer.run), config.tokenizer.run)
    values = _grid(config, "model", sizes.image_size, sizes.image_size // sizes.grid[0])
    return f"a tokenizer for {sizes.image_size} pixels", values | {"model.codebook_size": sizes.codebook_size}


def _of_codes(config: ConfigDict) -> tuple[str, Values]:
    manifest = manifest_of(config.tokenizer.codes, CODE_IDS)
    values = _views(config, manifest, "model")
    return f"codes of {manifest['source']}", values | {"model.codebook_size": manifest["codebook_size"]}


def _of_features(config: ConfigDict) -> tuple[str, Values]:
    manifest = manifest_of(config.teacher.features, FEATURES)
    section = "model.encoder" if "encoder" in config.model else "model"
    return f"features of {manifest['source']}", _views(config, manifest, section)


def _views(config: ConfigDict, manifest: Mapping[str, Any], section: str) -> Values:
    image_size = manifest["image_size"]
    values = {f"views.{name}": manifest[name] for name in ("num_views", "min_scale", "color_jitter")}
    if not config.views.get("tokenizer_interpolation"):
        values["views.interpolation"] = manifest["interpolation"]
    return values | {"seed": manifest["seed"]} | _grid(config, section, image_size, image_size // manifest["grid"][0])


def _grid(config: ConfigDict, section: str, image_size: int, patch_size: int) -> Values:
    """Return the image size and the patch size of a tokenizer, as far as they are the model's too."""
    if config.views.get("tokenizer_image_size"):
        return {}  # the tokenizer has a view of its own
    values = {"views.image_size": image_size}
    return values if config.get("init_from") else values | {f"{section}.patch_size": patch_size}


def _of_backbone(config: ConfigDict) -> tuple[str, Values]:
    weights = describe(config.backbone.run)
    depth, image_size = backbone_of(weights).depth, weights.arguments["image_size"]
    early_layer = published_early_layer(depth)
    if weights.kind in MASKED_KINDS:
        arguments = with_defaults(weights.kind, weights.arguments)
        early_layer = arguments["early_layer"] if arguments["patch_aggregation"] else early_layer
    values = {"probe.layers": tuple(sorted({early_layer, depth})), "views.image_size": image_size}
    if config.stage != "probe":
        whole = _whole_patches(config.views.image_size, backbone_of(weights).patch_size)
        values = {"backbone.layer": depth, "views.image_size": whole}
    return f"{TITLES[weights.kind]} for {image_size} pixels", values


def _of_data(config: ConfigDict) -> tuple[str, Values]:
    data = config.data
    if "labels" in config:
        source = open_label_maps(data.source, data.train_split, data.data_dir)
        count = len(source.class_names) or count_classes(source, **config.labels)
    else:
        count = len(class_names(data.source, data.train_split, data.data_dir))
    # fewer leave nothing to learn, which is refused when the data are opened
    return "the data set", {"model.num_classes": count} if count > 1 else {}


def _of_protocol(config: ConfigDict) -> tuple[str, Values]:
    reads = READS[config.probe.protocol]
    return "as published", {"probe.duration": reads.duration, "probe.batch_size": reads.batch_size}


def _masking(flat: Values) -> Values:
    """Return the published fraction of hidden patches, and the published smallest block or that fraction of it."""
    patches = (flat["views.image_size"] // flat["model.patch_size"]) ** 2
    return {
        "masking.num_masked": max(1, round(MASKED_FRACTION * patches)),
        "masking.min_patches": min(16, max(1, round(16 * patches / PUBLISHED_PATCHES))),
    }


def _listed(values: Values) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


_FINDERS = {
    "tokenizer.run": _of_tokenizer,
    "tokenizer.codes": _of_codes,
    "teacher.features": _of_features,
    "init_from": _of_weights,
    "backbone.run": _of_backbone,
    "data.source": _of_data,
    "probe.protocol": _of_protocol,
}
"""Key that names weights, targets or data -> what they are and the values that they say; the first ones go first."""
