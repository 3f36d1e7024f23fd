"""Find a teacher's weights by path and build the teacher around them: a run of ours, or published weights."""

import dataclasses
from collections import Counter
from pathlib import Path

import jax
import numpy as np
from absl import logging
from flax import traverse_util

from beitv2_jax.convert.files import read_config, read_weights
from beitv2_jax.convert.positions import resize_position_embedding, resize_relative_table
from beitv2_jax.convert.runs import is_run, read_run, weights_hash
from beitv2_jax.convert.teachers.weights import OUTPUTS, TeacherWeights, from_state
from beitv2_jax.errors import UserError
from beitv2_jax.models.backbone import Backbone, Compute
from beitv2_jax.models.classifier import Classifier
from beitv2_jax.models.mim import MaskedImageModel
from beitv2_jax.models.preprocess import NORMALIZATIONS
from beitv2_jax.models.teachers import NormalisedViT, Teacher, classifier_tokens, vit_tokens
from beitv2_jax.typing import PyTree

GRID_MATCHES = ("resize_input", "resample_features")
POSITION_RESIZES = ("bicubic", "offset", "antialias")
_OFFSET = 0.1


def load_teacher(
    weights: str,
    *,
    image_size: int,
    grid: tuple[int, int] | None = None,
    num_heads: int = 0,
    normalization: str = "",
    output: str = "",
    activation: str = "",
    grid_match: str = "resize_input",
    position_resize: str = "",
    dtype: str = "float32",
) -> tuple[Teacher, PyTree]:
    """Return the teacher at path `weights` and its params (NumPy), for views of `image_size` pixels.

    Args:
        weights: the working directory of a run of stage 'finetune' or 'mim', a Hugging Face folder, or a file of a
            published network; which network it is, is read from the names in it.
        grid: rows and columns of the features; None takes the network's own patch size.
        num_heads: 0 takes what the weights' config says, or heads of 64.
        normalization: input range, '' is the network's own. A run of ours always has its own.
        output: 'projected' or 'tokens' (normalised tokens of the last block); '' does as published: projected for CLIP,
            tokens for all others.
        activation: '' is the network's own; needed where the file does not tell.
        grid_match: how the network comes to `grid`. 'resize_input' gives it images of as many patches,
            'resample_features' runs it at the size it was trained with and resamples its features.
        position_resize: how its position embeddings come to another grid. 'bicubic' is PyTorch's without antialiasing,
            'antialias' with it, 'offset' as DINO's code does, 0.1 added to the target grid; '' as its own code does.
        dtype: of the matrix products.

    Raises:
        UserError: nothing usable at `weights`, an option that does not exist or does not suit them, or one left open
            that they do not settle.
    """
    if not Path(weights).exists():
        raise UserError(
            f"There are no teacher weights at {weights!r}.",
            "the path is mistyped, or the stage that trains the teacher has not run.",
            "--config.teacher.weights=PATH of a run's working directory, or of a published network's weights.",
        )
    _check_choice("output", output, ("", *OUTPUTS))
    _check_choice("grid_match", grid_match, GRID_MATCHES)
    _check_choice("position_resize", position_resize, ("", *POSITION_RESIZES))
    if is_run(weights):
        name, network = _from_run(weights, output)
    else:
        name = Path(weights).stem
        arrays, config = read_weights(weights), read_config(weights)
        network = from_state(arrays, config, output=output, activation=activation, num_heads=num_heads)
        network = network._replace(normalization=normalization or network.normalization)
        for reason, count in Counter(network.dropped.values()).items():
            logging.info("teacher %s: %d entries not used: %s.", name, count, reason)
    if network.normalization not in NORMALIZATIONS:
        _refuse_normalization(name, network.normalization)
    return _build(
        name,
        network,
        image_size=image_size,
        grid=grid or _own_grid(image_size, network.arguments["patch_size"]),
        grid_match=grid_match,
        position_resize=position_resize or network.positions,
        dtype=dtype,
    )


def _build(
    name: str,
    network: TeacherWeights,
    *,
    image_size: int,
    grid: tuple[int, int],
    grid_match: str,
    position_resize: str,
    dtype: str,
) -> tuple[Teacher, PyTree]:
    trained_size, patch_size = network.arguments["image_size"], network.arguments["patch_size"]
    input_size = grid[0] * patch_size if grid_match == "resize_input" else trained_size
    network_grid = (input_size // patch_size,) * 2
    backbone = _resized(network.params["backbone"], network_grid, position_resize, network.arguments)
    params = {**network.params, "backbone": backbone}
    arguments, compute = {**network.arguments, "image_size": input_size}, Compute(dtype=dtype)
    if "num_classes" in arguments:
        model = Classifier.from_arguments(arguments, compute)
        tokens = classifier_tokens(model)
    else:
        model = NormalisedViT(Backbone(**arguments), network.projection_dim, compute)
        tokens = vit_tokens(model)
    teacher = Teacher(
        name=name,
        weights_hash=weights_hash(params),
        choices={
            "normalization": network.normalization,
            "output": "projected" if network.projection_dim else "tokens",
            "activation": model.backbone.activation,
            "num_heads": model.backbone.num_heads,
            "grid_match": grid_match,
            "position_resize": position_resize,
            "input_size": input_size,
        },
        normalization=network.normalization,
        image_size=image_size,
        input_size=input_size,
        network_grid=network_grid,
        grid=tuple(grid),
        width=network.projection_dim or model.backbone.width,
        num_prefix_tokens=model.backbone.num_prefix_tokens,
        tokens=tokens,
    )
    return teacher, params


def _resized(backbone: PyTree, grid: tuple[int, int], how: str, arguments: dict) -> PyTree:
    """Return the backbone's params with position embedding and relative tables for `grid`."""
    side = arguments["image_size"] // arguments["patch_size"]
    if grid == (side, side):
        return backbone
    flat = traverse_util.flatten_dict(backbone, sep="/")
    for path, array in flat.items():
        if path == "pos_embed":
            flat[path] = resize_positions(array, grid, how, num_prefix=arguments.get("class_token", True))
        elif path.endswith("rel_pos_bias/table"):
            flat[path] = resize_relative_table(array, grid)
    return traverse_util.unflatten_dict(flat, sep="/")


def resize_positions(embedding: np.ndarray, grid: tuple[int, int], how: str, *, num_prefix: int) -> np.ndarray:
    """Return a position embedding '1 p+n d' for another grid; `how` is one of POSITION_RESIZES."""
    if how != "antialias":
        return resize_position_embedding(
            embedding, grid, num_prefix=num_prefix, offset=_OFFSET if how == "offset" else 0.0
        )
    special, patches = np.split(embedding, [num_prefix], axis=1)
    side, width = round(patches.shape[1] ** 0.5), patches.shape[2]
    # jax's cubic kernel is PyTorch's where that antialiases (a = -0.5)
    patches = jax.image.resize(patches.reshape(side, side, width), (*grid, width), "cubic")
    return np.concatenate([special, np.asarray(patches).reshape(1, -1, width)], axis=1)


def _from_run(workdir: str, output: str) -> tuple[str, TeacherWeights]:
    run = read_run(workdir)
    config = run.config
    if config["stage"] not in ("finetune", "mim"):
        raise UserError(
            f"{workdir} holds a run of stage {config['stage']!r}, which is no teacher.",
            "the path of another stage was given.",
            "the working directory of a run of stage 'finetune' or 'mim'.",
        )
    if output == "projected":
        raise UserError(
            f"{workdir} holds a run of ours, which has no projection.",
            "the option was left over from a CLIP teacher.",
            "--config.teacher.output=tokens",
        )
    arguments = {**config["model"], "image_size": config["views"]["image_size"], "drop_path_rate": 0.0}
    params = run.params
    if config["stage"] == "mim":
        arguments = dataclasses.asdict(MaskedImageModel.from_arguments(arguments).backbone)
        params = {"backbone": params["backbone"], "norm": params["norm"]}
    return run.name, TeacherWeights(
        arguments=arguments,
        projection_dim=0,
        params=params,
        dropped={},
        normalization=config["normalization"],
        positions="bicubic",
    )


def _own_grid(image_size: int, patch_size: int) -> tuple[int, int]:
    if image_size % patch_size:
        raise UserError(
            f"Views of {image_size} pixels hold no whole number of the teacher's patches of {patch_size} pixels.",
            "the features are meant for the patches of the tokenizer.",
            "--config.teacher.tokenizer_patch_size=N, or --config.views.image_size="
            f"{patch_size * max(1, round(image_size / patch_size))}",
        )
    return (image_size // patch_size,) * 2


def _check_choice(key: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise UserError(
            f"Unknown {key} {value!r} for the teacher.",
            "a slip in the name.",
            f"--config.teacher.{key}={' or '.join(name for name in valid if name)}",
        )


def _refuse_normalization(name: str, normalization: str) -> None:
    if normalization:
        _check_choice("normalization", normalization, tuple(NORMALIZATIONS))
    raise UserError(
        f"Nothing in the weights of {name} tells the range of their input.",
        "networks of the same names were trained with different ones.",
        "--config.teacher.normalization=imagenet (DINO, DeiT), half (AugReg) or clip.",
    )
