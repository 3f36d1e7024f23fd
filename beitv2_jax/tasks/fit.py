"""Check that a stage fits the networks, stored targets and initial weights that it names, before any data are opened.

The functions that compare are those that the stage calls when it opens them. What an earlier stage of a pipeline will
write is known from the config of that stage.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from beitv2_jax import config as config_lib
from beitv2_jax.config.checks import check_layer, check_probed_layers
from beitv2_jax.convert.adapt import adapt_weights
from beitv2_jax.convert.arguments import abstract_variables, flat_arguments
from beitv2_jax.convert.files import read_config, run_directory
from beitv2_jax.convert.runs import check_stage, refuse_other_stage
from beitv2_jax.convert.teachers.load import read_teacher
from beitv2_jax.convert.weights import (
    STAGES,
    TOKENIZER_STAGES,
    Weights,
    backbone_of,
    check_image_size,
    describe,
    describe_config,
)
from beitv2_jax.data.target_cache.encoding import CODE_IDS, FEATURES
from beitv2_jax.models.backbone import Compute
from beitv2_jax.tasks import cluster, mim, regress, targets, tokenize, vqkd

Earlier = Mapping[str, ConfigDict]
"""Workdir -> resolved config, of the earlier stages of a pipeline."""

_TEACHERS = ("finetune", "mim", "regress")
_BACKBONES = tuple(stage for stage in STAGES.values() if stage != "cluster")


def check(config: ConfigDict, earlier: Earlier) -> None:
    """Check a resolved stage against what its keys name: what is there, or what `earlier` stages will write.

    Raises:
        UserError: that is of another kind, or its sizes, views or codes are not those of the stage.
    """
    flat = config_lib.flatten(config)
    for key, check_named in _CHECKS.items():
        if path := flat.get(key):
            check_named(config, path, earlier)


def writer_of(path: str, earlier: Earlier) -> ConfigDict | None:
    """Return the config of the stage that will write `path`, a run or one of its checkpoints; None if none does."""
    return earlier.get(str(run_directory(path)))


def _check_teacher(config: ConfigDict, path: str, earlier: Earlier) -> None:
    if (writer := writer_of(path, earlier)) is not None:
        refuse_other_stage(writer.stage, path, _TEACHERS, "config.teacher.weights")
    elif config.stage != "cluster":  # which uses its teacher as the features in its cache were made
        patch_size = config.teacher.get("tokenizer_patch_size") or config.model.encoder.patch_size
        arguments = targets.teacher_arguments(config, patch_size)
        del arguments["dtype"]
        read_teacher(**arguments)


def _check_features(config: ConfigDict, path: str, earlier: Earlier) -> None:
    stage = {"vqkd": vqkd, "cluster": cluster, "regress": regress}[config.stage]
    if (writer := writer_of(path, earlier)) is None:
        stage.check_features(config, targets.manifest_of(path, FEATURES))
        return
    refuse_other_stage(writer.stage, path, ("extract",), "config.teacher.features")
    side = writer.views.image_size // writer.teacher.tokenizer_patch_size
    # what the extract stage leaves open its teacher decides, which may be what this stage states
    choices = (targets.stated_choices(config) if config.stage == "vqkd" else {}) | targets.stated_choices(writer)
    manifest = targets.view_manifest(writer, "views") | {"target": FEATURES, "grid": [side, side], **choices}
    stage.check_features(config, manifest)


def _check_codes(config: ConfigDict, path: str, earlier: Earlier) -> None:
    if (writer := writer_of(path, earlier)) is None:
        manifest = targets.manifest_of(path, CODE_IDS)
    else:
        refuse_other_stage(writer.stage, path, ("tokenize",), "config.tokenizer.codes")
        sizes = _tokenizer(writer.tokenizer.run, earlier)
        manifest = targets.view_manifest(writer, "views") | {
            "target": CODE_IDS,
            "grid": list(sizes.grid),
            "codebook_size": sizes.codebook_size,
        }
    mim.check_codes(config, manifest)


def _check_tokenizer(config: ConfigDict, path: str, earlier: Earlier) -> None:
    {"tokenize": tokenize, "mim": mim}[config.stage].check_tokenizer(config, _tokenizer(path, earlier))


def _tokenizer(path: str, earlier: Earlier) -> tokenize.TokenizerSizes:
    if (config := writer_of(path, earlier)) is None:
        check_stage(path, TOKENIZER_STAGES, "config.tokenizer.run")
        config = read_config(path)
    else:
        refuse_other_stage(config.stage, path, TOKENIZER_STAGES, "config.tokenizer.run")
    return tokenize.sizes_of(config, path)


def _check_probed(config: ConfigDict, path: str, earlier: Earlier) -> None:
    weights = _described(path, "config.backbone.run", earlier)
    check_image_size(weights, config.views.image_size)
    if "probe" in config:
        check_probed_layers(config.probe.layers, backbone_of(weights).depth)
    elif "layer" in config.backbone:
        check_layer(config.backbone.layer, backbone_of(weights).depth)


def _check_initial(config: ConfigDict, path: str, earlier: Earlier) -> None:
    weights = _described(path, "config.init_from", earlier)
    kind = next(kind for kind, stage in STAGES.items() if stage == config.stage)
    options = {"teacher_width": 1} if config.stage == "vqkd" else {}  # of a layer that is initialised anew
    model = importlib.import_module(f"beitv2_jax.tasks.{config.stage}").make_model(config, Compute(), **options)
    if not weights.variables:
        weights = _abstract(weights, config.views.image_size)
    adapt_weights(weights, kind, flat_arguments(model))


def _described(path: str, key: str, earlier: Earlier) -> Weights:
    """Return what `convert.weights.describe` returns; of a run, and of a stage that will write one, only its config."""
    if (writer := writer_of(path, earlier)) is None:
        return describe(path)
    refuse_other_stage(writer.stage, path, _BACKBONES, key)
    return describe_config(writer)


def _abstract(weights: Weights, image_size: int) -> Weights:
    """Return described weights with the shapes of their variables, for images of this size where these can be."""
    arguments: dict[str, Any] = (
        {"teacher_width": 1, **weights.arguments} if weights.kind == "vqkd" else weights.arguments
    )
    if image_size % arguments.get("encoder", arguments)["patch_size"] == 0:
        arguments = {**arguments, "image_size": image_size}
    # arrays of one number in memory, with which rules that compute can compute
    variables = jax.tree.map(
        lambda shape: np.broadcast_to(np.zeros((), shape.dtype), shape.shape),
        abstract_variables(weights.kind, arguments),
    )
    return dataclasses.replace(weights, arguments=arguments, variables=variables)


_CHECKS = {
    "init_from": _check_initial,
    "teacher.weights": _check_teacher,
    "teacher.features": _check_features,
    "tokenizer.run": _check_tokenizer,
    "tokenizer.codes": _check_codes,
    "backbone.run": _check_probed,
}
"""Key that names something -> its check, from (config, path, earlier stages)."""
