"""Load a teacher: read its weights from a run of this package or a published file, and build the network for them."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import logging
from flax import traverse_util

from beitv2_jax.choices import GRID_MATCHES, NORMALIZATIONS, POSITION_RESIZES, TEACHER_OUTPUTS
from beitv2_jax.config.paths import PIXELS
from beitv2_jax.convert.files import group_by_reason, located, read_config, read_weights
from beitv2_jax.convert.input_statistics import normalization_of
from beitv2_jax.convert.positions import resize_positions
from beitv2_jax.convert.runs import check_stage, is_run, read_run, weights_hash
from beitv2_jax.convert.teachers.weights import TeacherWeights, from_state
from beitv2_jax.errors import UserError, did_you_mean, nearest
from beitv2_jax.models.backbone import Backbone, Compute
from beitv2_jax.models.classifier import Classifier
from beitv2_jax.models.mim import MaskedImageModel, MaskedRegressor
from beitv2_jax.models.teachers import NormalisedViT, Teacher, classifier_tokens, pixel_teacher, vit_tokens
from beitv2_jax.typing import PyTree


def load_teacher(weights: str, *, dtype: str = "float32", **options: Any) -> tuple[Teacher, PyTree]:
    """Return the teacher at path `weights` and its params (NumPy).

    Args:
        weights: as `read_teacher`.
        dtype: dtype of the matrix products.
        options: of `read_teacher`: the `image_size` of the views, and how the network is used.

    Raises:
        UserError: as `read_teacher`.
    """
    description, params = read_teacher(weights, **options)
    return build_teacher(description, dtype), params


def read_teacher(
    weights: str,
    *,
    image_size: int,
    state_dict: str = "",
    grid: tuple[int, int] | None = None,
    num_heads: int = 0,
    normalization: str = "",
    output: str = "",
    activation: str = "",
    grid_match: str = "resize_input",
    position_resize: str = "",
) -> tuple[dict[str, Any], PyTree]:
    """Return what `build_teacher` needs to know of the teacher at path `weights`, as JSON holds it, and its params.

    The params are NumPy arrays, for views of `image_size` pixels.

    Args:
        weights: `PIXELS`, for which `grid` alone is used; the working directory of a run of stage 'finetune', 'mim' or
            'regress', a Hugging Face folder, or a file of a published network, which is recognised from its names.
        state_dict: which of several state dicts in a file to read ('teacher', 'model_ema'); '' takes the usual one.
        grid: rows and columns of the features; None uses the patch size of the teacher.
        num_heads: 0 uses the number in config.json beside the weights, or heads of 64.
        normalization: name of the input normalisation; '' uses the one stored next to the weights or in the run, or
            else that of the family of networks.
        output: 'projected' or 'tokens' (normalised tokens of the last block); '' uses the published choice: projected
            for CLIP, tokens for all others.
        activation: '' uses the one of the network; needed where the file does not determine it.
        grid_match: how features on `grid` are obtained. 'resize_input' resizes the images so that the network has as
            many patches, 'resample_features' runs it at its trained size and resamples its features.
        position_resize: how position embeddings are resized, one of `choices.POSITION_RESIZES`; '' uses the method of
            the network's own code.

    Raises:
        UserError: no readable weights, an option that does not exist or does not fit them, or an option that must be
            given because the weights do not determine it.
    """
    _check_choice("output", output, ("", *TEACHER_OUTPUTS))
    _check_choice("grid_match", grid_match, GRID_MATCHES)
    _check_choice("position_resize", position_resize, ("", *POSITION_RESIZES))
    _check_choice("normalization", normalization, ("", *NORMALIZATIONS))
    if weights == PIXELS:
        _refuse_options_of_pixels(grid, state_dict, num_heads, normalization, output, activation, position_resize)
        return {"name": PIXELS, "weights_hash": PIXELS, "image_size": image_size, "grid": tuple(grid)}, {}
    if not located(weights).exists():
        raise UserError(
            f"There are no teacher weights at {weights!r}.",
            "The path may be mistyped, or the stage that trains the teacher has not run yet.",
            "Write --config.teacher.weights=PATH with the directory of a run or the weights of a published network.",
        )
    if is_run(weights):
        name, network = _from_run(weights, output, normalization)
    else:
        name = Path(weights).stem
        network = _published(name, weights, state_dict, normalization, output, activation, num_heads)
    patch_size = network.arguments["patch_size"]
    grid = tuple(grid or _grid_of_views(image_size, patch_size))
    input_size = grid[0] * patch_size if grid_match == "resize_input" else network.arguments["image_size"]
    network = network._replace(position_resize=position_resize or network.position_resize)
    params = _resized_params(network, input_size)
    description = {
        "name": name,
        "weights_hash": weights_hash(params),
        "arguments": {**network.arguments, "image_size": input_size},
        "projection_dim": network.projection_dim,
        "normalization": network.normalization,
        "position_resize": network.position_resize,
        "grid_match": grid_match,
        "image_size": image_size,
        "grid": grid,
    }
    return description, params


def build_teacher(description: Mapping[str, Any], dtype: str) -> Teacher:
    """Return the teacher that `read_teacher` describes; `dtype` as in `load_teacher`."""
    if description["name"] == PIXELS:
        return pixel_teacher(PIXELS, image_size=description["image_size"], grid=tuple(description["grid"]))
    arguments, projection_dim = description["arguments"], description["projection_dim"]
    input_size = arguments["image_size"]
    model, tokens = _model(arguments, projection_dim, Compute(dtype=dtype))
    return Teacher(
        name=description["name"],
        weights_hash=description["weights_hash"],
        choices={
            "normalization": description["normalization"],
            "output": "projected" if projection_dim else "tokens",
            "activation": model.backbone.activation,
            "num_heads": model.backbone.num_heads,
            "grid_match": description["grid_match"],
            "position_resize": description["position_resize"],
            "input_size": input_size,
        },
        normalization=description["normalization"],
        image_size=description["image_size"],
        input_size=input_size,
        network_grid=(input_size // arguments["patch_size"],) * 2,
        grid=tuple(description["grid"]),
        width=projection_dim or model.backbone.width,
        num_prefix_tokens=model.backbone.num_prefix_tokens,
        tokens=tokens,
    )


def _refuse_options_of_pixels(grid: tuple[int, int] | None, *options: str | int) -> None:
    """Raise UserError if an option of a network is given where there is none."""
    if any(options) or grid is None:
        raise UserError(
            f"teacher.weights={PIXELS} names the pixels of the patches, which no network reads.",
            "Did you set an option of a network, or do you mean weights in a file or folder of this name?",
            f"Leave the other keys of teacher at their defaults, or write --config.teacher.weights=./{PIXELS}.",
        )


def _published(
    name: str, weights: str, state_dict: str, normalization: str, output: str, activation: str, num_heads: int
) -> TeacherWeights:
    """Return the network in a published file or folder; what of it is not used is logged."""
    found = read_weights(weights, state_dict)
    network = from_state(found.arrays, read_config(weights), output=output, activation=activation, num_heads=num_heads)
    for text in found.assumptions:
        logging.info("teacher %s: %s", name, text)
    for text in group_by_reason(found.dropped | network.dropped):
        logging.info("teacher %s: not used: %s", name, text)
    normalization = normalization_of(
        weights, given=normalization, usual=network.normalization, option="--config.teacher.normalization"
    )
    if not normalization:
        raise UserError(
            f"The weights of {name} do not say how their input images are normalised.",
            "Networks with these names were trained with different normalisations.",
            "Write --config.teacher.normalization=imagenet (DINO, DeiT), half (AugReg) or clip.",
        )
    return network._replace(normalization=normalization)


def _from_run(workdir: str, output: str, normalization: str) -> tuple[str, TeacherWeights]:
    check_stage(workdir, ("finetune", "mim", "regress"), "config.teacher.weights")
    if output == "projected":
        raise UserError(
            f"{workdir} holds a run of this package, which has no projection.",
            "Did you mean the normalised tokens of its last block?",
            "Write --config.teacher.output=tokens.",
        )
    run = read_run(workdir)
    config = run.config
    if normalization not in ("", config["normalization"]):
        raise UserError(
            f"{workdir} was trained with the input normalisation {config['normalization']!r}, the config has "
            f"teacher.normalization={normalization!r}.",
            "Did you mean the normalisation of another teacher?",
            f"Write --config.teacher.normalization={config['normalization']}.",
        )
    arguments = {**config["model"], "image_size": config["views"]["image_size"], "drop_path_rate": 0.0}
    params = run.params
    if config["stage"] in ("mim", "regress"):
        model = MaskedImageModel if config["stage"] == "mim" else MaskedRegressor
        arguments = dataclasses.asdict(model.from_arguments(arguments).backbone)
        params = {"backbone": params["backbone"], "norm": params["norm"]}
    return run.name, TeacherWeights(
        arguments=arguments,
        projection_dim=0,
        params=params,
        dropped={},
        normalization=config["normalization"],
        position_resize="bicubic",
    )


def _resized_params(network: TeacherWeights, input_size: int) -> PyTree:
    """Return the params with positions for images of `input_size` pixels."""
    params = dict(network.params)
    if input_size != network.arguments["image_size"]:
        flat = traverse_util.flatten_dict(params["backbone"], sep="/")
        grid = (input_size // network.arguments["patch_size"],) * 2
        num_prefix = network.arguments.get("class_token", True)
        flat = resize_positions(flat, grid, num_prefix=num_prefix, method=network.position_resize)
        params["backbone"] = traverse_util.unflatten_dict(flat, sep="/")
    return params


def _model(
    arguments: Mapping[str, Any], projection_dim: int, compute: Compute
) -> tuple[Classifier | NormalisedViT, Callable]:
    """Return the model with these arguments, and the function (params, images) -> tokens."""
    if "num_classes" in arguments:
        model = Classifier.from_arguments(arguments, compute)
        return model, classifier_tokens(model)
    model = NormalisedViT(Backbone(**arguments), projection_dim, compute)
    return model, vit_tokens(model)


def _grid_of_views(image_size: int, patch_size: int) -> tuple[int, int]:
    if image_size % patch_size:
        fitting = patch_size * max(1, round(image_size / patch_size))
        raise UserError(
            f"Views of {image_size} pixels cannot be divided into the teacher's patches of {patch_size} pixels.",
            "The features may be meant for the patches of a tokenizer with another patch size.",
            f"Write --config.teacher.tokenizer_patch_size=N, or --config.views.image_size={fitting}.",
        )
    return (image_size // patch_size,) * 2


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        named = [choice for choice in choices if choice]
        raise UserError(
            f"The teacher has no {key} {value!r}; the choices are {', '.join(named)}.",
            did_you_mean(value, named),
            f"Write --config.teacher.{key}={nearest(value, named) or named[0]}, or another of them.",
        )
