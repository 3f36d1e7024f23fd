"""Infer the arguments of a model from the shapes of its weights, and the shapes from the arguments.

Shapes are keyed by our paths ('params/backbone/cls_token'), whatever the layout of the weights. Arguments that no shape
determines (the heads of a model without relative position tables, the early layer) are `None` until `fill_unknown` sets
the published value.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from beitv2_jax.convert.positions import grid_of_table
from beitv2_jax.errors import UserError
from beitv2_jax.models.backbone import Backbone
from beitv2_jax.models.classifier import Classifier
from beitv2_jax.models.mim import MaskedImageModel
from beitv2_jax.models.teachers import NormalisedViT
from beitv2_jax.models.upernet import Segmenter
from beitv2_jax.models.vqkd import VQKD
from beitv2_jax.typing import PyTree

Shape = tuple[int, ...]

MODELS = {
    "vqkd": VQKD,
    "mim": MaskedImageModel,
    "classifier": Classifier,
    "segmenter": Segmenter,
}
"""Kind of weights -> its model."""

HEAD_WIDTH = 64
"""Width of an attention head in most published models; the shapes of weights do not show the number of heads."""
_CODEBOOK = "codebook/quantizer/codebook"
_LINEAR = ("kernel", "bias")


class ShapeMismatch(Exception):
    """The shapes belong to no model: `problem` ('lacks', 'has ... in') is about the variables at our `paths`."""

    def __init__(self, problem: str, *paths: str):
        super().__init__(problem, *paths)
        self.problem, self.paths = problem, paths


def shapes(kind: str, arguments: dict) -> dict[str, Shape]:
    """Return {our path: shape} of every variable of the model; for `None` in `arguments` any valid value is used."""
    arguments = _filled(arguments, lambda width: 1)
    arguments["image_size"] = arguments["image_size"] or _patch_size(arguments)
    tree = abstract_variables(kind, arguments)
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def initialised(kind: str, arguments: dict, key: jax.Array) -> PyTree:
    """Return the variables of a new model of this kind; a 'vit' has no head, and the arguments of a `Backbone`."""
    return _init(_model(kind, arguments), arguments["image_size"], _patch_size(arguments), key)


def abstract_variables(kind: str, arguments: dict) -> PyTree:
    """Return the shapes and dtypes of what `initialised` returns."""
    return abstract_init(_model(kind, arguments), arguments["image_size"], _patch_size(arguments))


@functools.lru_cache(maxsize=64)
def abstract_init(model: nn.Module, image_size: int, patch_size: int) -> PyTree:
    """Return the shapes and dtypes of the variables of a model of images, which must not be changed in place.

    Tracing a model takes longer than reading its weights, and one command asks several times: results are kept.
    """
    return jax.eval_shape(functools.partial(_init, model, image_size, patch_size), jax.random.key(0))


def _model(kind: str, arguments: dict) -> nn.Module:
    return NormalisedViT(Backbone(**arguments)) if kind == "vit" else MODELS[kind].from_arguments(arguments)


def _init(model: nn.Module, image_size: int, patch_size: int, key: jax.Array) -> PyTree:
    rngs, images = {"params": key, "drop_path": key}, jnp.zeros((1, image_size, image_size, 3))
    if isinstance(model, NormalisedViT):
        return model.init(rngs, images)
    if isinstance(model, MaskedImageModel):
        mask = jnp.zeros((1, (image_size // patch_size) ** 2), bool)
        return model.init(rngs, images, mask, num_masked=1, train=False)
    return model.init(rngs, images, train=False)


def with_defaults(kind: str, arguments: dict) -> dict:
    """Return `arguments` with the defaults of the model for those that are missing."""
    return flat_arguments(MODELS[kind].from_arguments(arguments)) | arguments


def flat_arguments(model) -> dict:
    """Return the arguments that `from_arguments` of a model's class takes to build it again."""
    own = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    own = {name: value for name, value in own.items() if name not in ("parent", "name", "compute")}
    if isinstance(model, VQKD):
        parts = {name: dataclasses.asdict(own.pop(name)) for name in ("encoder", "decoder")}
        options = dataclasses.asdict(own.pop("quantizer"))
        return {"image_size": parts["encoder"]["image_size"], **parts, **options, **own}
    return dataclasses.asdict(own.pop("backbone")) | own


def _patch_size(arguments: dict) -> int:
    return arguments.get("encoder", arguments)["patch_size"]


def infer_arguments(kind: str, known: Mapping[str, Shape]) -> dict:
    """Return the model arguments that follow from the shapes of weights; `None` for those that do not.

    Args:
        kind: one of `MODELS`.
        known: our path -> shape, with axes in our order.

    Raises:
        ShapeMismatch: an array that an argument follows from is missing or has an impossible shape.
    """
    if kind == "vqkd":
        encoder, grid = _transformer(known, "params/encoder")
        decoder, _ = _transformer(known, "params/decoder")
        code_dim_places = ((_CODEBOOK, 1), ("params/encode_task/fc2/bias", 0), ("params/decoder/patch_embed/kernel", 2))
        return {
            "image_size": grid and grid * encoder["patch_size"],
            "encoder": encoder,
            "decoder": {name: value for name, value in decoder.items() if name != "patch_size"},
            "codebook_size": _size(known, (_CODEBOOK, 0), ("codebook/quantizer/cluster_counts", 0)),
            "code_dim": _size(known, *code_dim_places),
            "teacher_width": _features(known, "params/decode_task/fc2"),
        }
    transformer, grid = _transformer(known, "params/backbone")
    arguments = {"image_size": grid and grid * transformer["patch_size"]} | transformer
    if kind == "mim":
        head_depth = _depth(known, "params/aggregation_")
        arguments |= {"codebook_size": _features(known, "params/lm_head"), "patch_aggregation": head_depth > 0}
        if head_depth:
            own_head = any(path.startswith(("params/aggregation_norm", "params/aggregation_lm")) for path in known)
            arguments |= {"early_layer": None, "head_depth": head_depth, "shared_head": not own_head}
    if kind == "classifier":
        arguments["num_classes"] = _features(known, "params/head")
        arguments["pooling"] = "cls" if any(path.startswith("params/norm/") for path in known) else "mean"
    if kind == "segmenter":
        fusion, convolution = "params/decode_head/fusion", "params/auxiliary_head/conv_0"
        arguments |= {
            "num_classes": _size(
                known,
                *((f"params/{head}_head/classes/{leaf}", -1) for head in ("decode", "auxiliary") for leaf in _LINEAR),
            ),
            "channels": _size(known, (f"{fusion}/conv/kernel", 3), (f"{fusion}/norm/scale", 0)),
            "aux_channels": _size(known, (f"{convolution}/conv/kernel", 3), (f"{convolution}/norm/scale", 0)),
            "out_layers": None,
        }
    return arguments


def _transformer(known: Mapping[str, Shape], stem: str) -> tuple[dict, int | None]:
    """Return the arguments of the transformer at `stem`, and its patches per side (None without positions)."""
    block = f"{stem}/blocks_0"
    mlp_places = ((f"{block}/mlp/fc1/kernel", 1), (f"{block}/mlp/fc1/bias", 0), (f"{block}/mlp/fc2/kernel", 0))
    width_places = ((f"{stem}/cls_token", 2), (f"{stem}/patch_embed/bias", 0), (f"{block}/norm1/scale", 0))
    width = _size(known, *width_places)
    shared, own = f"{stem}/rel_pos_bias/table", re.compile(rf"{stem}/blocks_\d+/attn/rel_pos_bias/table")
    tables = [shared] if shared in known else [path for path in known if own.fullmatch(path)]
    position, grid, num_heads = "none", None, None
    if tables:
        position = "relative_shared" if tables == [shared] else "relative"
        num_heads = _size(known, *((path, 1) for path in tables))
        grid = _grid_of_table(_size(known, *((path, 0) for path in tables)), tables[0])
        if num_heads == 0 or width % num_heads:
            raise ShapeMismatch(f"has {num_heads} heads, which do not divide its width {width}, in", tables[0])
    elif f"{stem}/pos_embed" in known:
        position, grid = "absolute", _grid_of_embedding(known, f"{stem}/pos_embed")
    has_scale = any(re.fullmatch(rf"{stem}/blocks_\d+/gamma_[12]", path) for path in known)
    arguments = {
        "patch_size": _size(known, (f"{stem}/patch_embed/kernel", 0), (f"{stem}/patch_embed/kernel", 1)),
        "width": width,
        "depth": _depth(known, f"{stem}/blocks_"),
        "num_heads": num_heads,
        "mlp_dim": _size(known, *mlp_places),
        "position": position,
        # shapes only show whether there is layer scale; its initial value is that of the published base and large
        "layer_scale_init": (0.1 if width < 1024 else 1e-5) if has_scale else 0.0,
    }
    return arguments, grid


def _depth(known: Mapping[str, Shape], stem: str) -> int:
    return 1 + max((int(found[1]) for path in known if (found := re.match(rf"{stem}(\d+)/", path))), default=-1)


def _grid_of_embedding(known: Mapping[str, Shape], path: str) -> int:
    num_patches = _size(known, (path, 1)) - 1
    grid = round(max(num_patches, 0) ** 0.5)
    if grid < 1 or grid**2 != num_patches:
        raise ShapeMismatch(f"has {num_patches} patches, which do not form a square, in", path)
    return grid


def _grid_of_table(rows: int, path: str) -> int:
    grid = grid_of_table(rows)
    if grid is None:
        raise ShapeMismatch(f"has {rows} rows, which is not (2 g - 1)^2 + 3 for any grid of g x g patches, in", path)
    return grid


def _features(known: Mapping[str, Shape], linear: str) -> int:
    return _size(known, *((f"{linear}/{leaf}", -1) for leaf in _LINEAR))


def _size(known: Mapping[str, Shape], *places: tuple[str, int]) -> int:
    """Return the size that all `places` (path, axis) have; if they differ, the rarer size is reported as wrong."""
    paths_of: dict[int, list[str]] = {}
    for path, axis in places:
        if path not in known:
            raise ShapeMismatch("lacks", path)
        if not -len(known[path]) <= axis < len(known[path]):
            raise ShapeMismatch(f"has only {len(known[path])} axes in", path)
        paths_of.setdefault(known[path][axis], []).append(path)
    (size, common), *others = sorted(paths_of.items(), key=lambda item: -len(item[1]))
    if others:
        rare, paths = others[0]
        doubtful = paths if len(paths) < len(common) else [*common, *paths]
        raise ShapeMismatch(f"has the sizes {size} and {rare}, which should be equal, in", *dict.fromkeys(doubtful))
    return size


def fill_unknown(arguments: dict, num_heads: int | None = None) -> tuple[dict, tuple[str, ...]]:
    """Return the arguments with published values for `None`, and sentences on what was assumed.

    `num_heads`, from the user or a config, holds for every transformer in the weights.

    Raises:
        UserError: a width that is not a multiple of 64 without `num_heads`, or a `num_heads` that contradicts the
            arrays.
    """
    assumed = []

    def heads(width: int) -> int:
        if not num_heads and width % HEAD_WIDTH:
            raise UserError(
                f"A width of {width} cannot be divided into heads of width {HEAD_WIDTH}.",
                "The network may have an unusual number of heads, which its weights do not show.",
                "Run python -m beitv2_jax.convert with --num_heads=N, the number of heads that it was trained with.",
            )
        count = num_heads or width // HEAD_WIDTH
        if width % count:
            raise UserError(
                f"A width of {width} cannot be divided into {count} heads.",
                "The number of heads may be that of another network.",
                f"Write --num_heads=N with a number that divides {width}.",
            )
        if not num_heads:
            assumed.append(f"num_heads={count}: heads of width {HEAD_WIDTH}, as in every published model")
        return count

    parts = (arguments, *(value for value in arguments.values() if isinstance(value, dict)))
    inferred = {part.get("num_heads") for part in parts} - {None}
    if num_heads and inferred and inferred != {num_heads}:
        from_tables = inferred.pop()
        raise UserError(
            f"num_heads is {num_heads}, but the relative position tables have {from_tables} heads.",
            f"Did you mean {from_tables} heads, as the tables have?",
            "Leave out --num_heads: the tables determine it.",
        )
    arguments = _filled(arguments, heads, assumed.append)
    return arguments, tuple(dict.fromkeys(assumed))


def _filled(arguments: dict, heads: Callable[[int], int], note: Callable[[str], None] = lambda text: None) -> dict:
    filled = {name: _filled(value, heads) if isinstance(value, dict) else value for name, value in arguments.items()}
    if "num_heads" in filled and filled["num_heads"] is None:
        filled["num_heads"] = heads(filled["width"])
    depth = filled.get("depth")
    if "early_layer" in filled and filled["early_layer"] is None:
        filled["early_layer"] = published_early_layer(depth)
        note(f"early_layer={filled['early_layer']}: three layers before the last, as published (9 of 12, 21 of 24)")
    if "out_layers" in filled and filled["out_layers"] is None:
        filled["out_layers"] = published_out_layers(depth)
        note(f"out_layers={filled['out_layers']}: at a third, half, two thirds and all of the depth, as published")
    return filled


def published_early_layer(depth: int) -> int:
    """Return the layer, counted from 1, whose patches the aggregation head reads: three before the last."""
    return max(1, depth - 3)


def published_out_layers(depth: int) -> tuple[int, ...]:
    """Return the layers, counted from 1, that a segmentation model reads: at 1/3, 1/2, 2/3 and all of the depth."""
    return tuple(max(1, depth * sixths // 6) for sixths in (2, 3, 4, 6))
