"""Trained weights of any layout as one thing: read, resized to another image size, written.

A layout is how a file names its arrays: 'official' (the released PyTorch code), 'timm', 'huggingface' (a directory with
config.json), or 'run', a run directory of ours. The kind of model is recognised from the names.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from beitv2_jax.convert.arguments import HEAD_WIDTH, complete, infer, published_out_layers, settle
from beitv2_jax.convert.beit import huggingface, timm
from beitv2_jax.convert.beit.official import WINDOWS, dropped, from_official, recognise, to_official
from beitv2_jax.convert.files import read_config, read_weights
from beitv2_jax.convert.positions import resize_positions
from beitv2_jax.convert.runs import is_run, read_run, write_run
from beitv2_jax.convert.torch_files import writer
from beitv2_jax.errors import UserError
from beitv2_jax.typing import PyTree

STAGES = {"vqkd": "vqkd", "mim": "mim", "classifier": "finetune", "segmenter": "segment"}
"""Kind of weights -> the stage that trains them."""
_MOVING = {"segmenter": "batch_stats"}
"""Kind of weights -> the collection that its runs keep as their codebook: what steps move without an optimizer."""

_NUM_MASKED = 75 / 196  # share of hidden patches in the published pre-training
RELEASED_EPSILON = 1e-6
"""Layer norm epsilon of every released model."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """Trained weights and the model they belong to.

    Attributes:
        kind: 'vqkd', 'mim', 'classifier' or 'segmenter'.
        arguments: keyword arguments of the model of that kind.
        variables: {'params', 'codebook', 'batch_stats'} as NumPy trees; the latter two may be empty or absent.
        layout: where they come from: 'official', 'timm', 'huggingface' or 'run'.
        dropped: {name: reason} of what was left out.
        assumptions: what nothing told and was therefore assumed, in words.
        normalization: name of the input statistics; '' for a tokenizer, which takes [-1, 1].
    """

    kind: str
    arguments: dict
    variables: dict[str, PyTree]
    layout: str
    dropped: dict[str, str] = dataclasses.field(default_factory=dict)
    assumptions: tuple[str, ...] = ()
    normalization: str = ""

    @property
    def num_params(self) -> int:
        """Number of trained parameters; codebook and batch statistics are no parameters."""
        return sum(array.size for array in traverse_util.flatten_dict(self.variables["params"]).values())

    @property
    def num_arrays(self) -> int:
        """Number of arrays of all collections."""
        return len(traverse_util.flatten_dict(self.variables))


def read(path: str, *, image_size: int | None = None, num_heads: int | None = None) -> Weights:
    """Read weights of any layout, with positions resized to `image_size` if it differs from theirs.

    `num_heads` is needed where the width is no multiple of 64 and neither tables nor a config tell.

    Raises:
        UserError: nothing readable at `path`, an entry unknown, missing or wrongly shaped, or sizes that do not fit.
    """
    weights = _from_run(path) if is_run(path) else _from_state(read_weights(path), read_config(path) or {}, num_heads)
    if weights.arguments["image_size"] is None and image_size is None:
        raise UserError(
            f"{path} holds a model without positions, whose arrays do not tell an image size.",
            "it was trained without position embeddings.",
            "--image_size=N with the size it was trained at.",
        )
    if image_size is None or image_size == weights.arguments["image_size"]:
        return weights
    return resized(weights, image_size)


def resized(weights: Weights, image_size: int) -> Weights:
    """Return the weights for another image size: position tables and embeddings as the released loaders resize them.

    Raises:
        UserError: `image_size` is no multiple of the patch size.
    """
    patch_size = weights.arguments.get("encoder", weights.arguments)["patch_size"]
    if image_size % patch_size:
        raise UserError(
            f"Images of {image_size} pixels cannot be cut into patches of {patch_size}.",
            "the image size is a slip.",
            f"--image_size={patch_size * max(1, round(image_size / patch_size))}",
        )
    flat = traverse_util.flatten_dict(weights.variables, sep="/", keep_empty_nodes=True)
    flat = resize_positions(flat, (image_size // patch_size,) * 2)
    return dataclasses.replace(
        weights,
        arguments={**weights.arguments, "image_size": image_size},
        variables=traverse_util.unflatten_dict(flat, sep="/"),
    )


def write(weights: Weights, path: str, layout: str) -> dict[str, str]:
    """Write weights to a new file or directory and return {our path: reason} of what the layout has no place for.

    'official' and 'timm' go to .safetensors, .npz or .pth ({'model': state dict}, as the released scripts load it),
    'huggingface' and 'run' to a directory. Nothing is left at `path` unless all of it was written.

    Raises:
        UserError: there is something at `path`, or the model has no form in that layout.
    """
    target = Path(path)
    if target.exists():
        raise UserError(f"{path} exists.", "an earlier conversion wrote it.", "another path, or remove that one first.")
    save, left_out = _WRITERS[layout](weights, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # a sibling, so that renaming moves nothing between disks; the name keeps its ending, which tells the format
    unfinished = target.with_name(f".unfinished-{target.name}")
    try:
        save(unfinished)
        unfinished.rename(target)
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        unfinished.unlink(missing_ok=True)
    return left_out


def _from_run(path: str) -> Weights:
    run = read_run(path)
    kinds = {stage: kind for kind, stage in STAGES.items()}
    if run.config["stage"] not in kinds:
        raise UserError(
            f"{path} holds a run of stage {run.config['stage']!r}, which trains no model.",
            "the path of another stage was given.",
            f"the directory of a run of stage {', '.join(kinds)}.",
        )
    kind = kinds[run.config["stage"]]
    arguments = {**run.config["model"], "image_size": run.config["views"]["image_size"]}
    if kind == "vqkd":
        arguments["teacher_width"] = run.params["decode_task"]["fc2"]["kernel"].shape[-1]
    if kind == "segmenter":
        arguments["out_layers"] = tuple(arguments["out_layers"])  # JSON has lists only
    return Weights(
        kind=kind,
        arguments=arguments,
        variables={"params": run.params, "codebook": {}, _MOVING.get(kind, "codebook"): run.codebook},
        layout="run",
        normalization=run.config.get("normalization", ""),
    )


def _from_state(state: dict[str, np.ndarray], config: dict, num_heads: int | None) -> Weights:
    layout, spell, known, assumptions = "official", str, {}, ()
    if huggingface.is_huggingface(state):
        layout = "huggingface"
        state, spell = huggingface.to_released_names(state)
        known, assumptions = huggingface.read_settings(config)
        num_heads = known.pop("num_heads", None) or num_heads
    kind = recognise(state)
    variables = from_official(kind, state, spell)
    if layout == "official" and timm.is_timm(kind, state):
        layout = "timm"
    flat = traverse_util.flatten_dict(variables, sep="/")
    told = infer(kind, {path: array.shape for path, array in flat.items()})
    told |= {name: value for name, value in known.items() if name in told or name == "norm_eps"}
    arguments, assumed = settle(told, num_heads)
    assumptions += assumed
    normalization = ""
    if kind != "vqkd":
        normalization = "half" if kind == "mim" and not arguments["patch_aggregation"] else "imagenet"
        assumptions += (f"normalization={normalization}: no array tells; BEiT v2 takes imagenet, most of BEiT v1 half",)
    return Weights(
        kind=kind,
        arguments=arguments,
        variables=variables,
        layout=layout,
        dropped={spell(name): reason for name, reason in dropped(kind, state).items()},
        assumptions=assumptions,
        normalization=normalization,
    )


_Save = Callable[[Path], None]


def _official_writer(weights: Weights, target: Path) -> tuple[_Save, dict[str, str]]:
    state = to_official(weights.kind, weights.variables)
    windows = {path: "counts codes during training" for path in WINDOWS if weights.kind == "vqkd"}
    return _state_saver(state, target), windows | _untold(weights)


def _timm_writer(weights: Weights, target: Path) -> tuple[_Save, dict[str, str]]:
    state, left_out = timm.to_timm(weights.kind, to_official(weights.kind, weights.variables))
    return _state_saver(state, target), left_out | _untold(weights)


def _huggingface_writer(weights: Weights, target: Path) -> tuple[_Save, dict[str, str]]:
    official = to_official(weights.kind, weights.variables)
    state, left_out = huggingface.to_huggingface(weights.kind, official)
    config = huggingface.config_of(weights.kind, complete(weights.kind, weights.arguments))
    state = _contiguous(state)
    return lambda path: huggingface.save(path, state, config), left_out


def _run_writer(weights: Weights, target: Path) -> tuple[_Save, dict[str, str]]:
    config = run_config(weights)
    moving = weights.variables.get(_MOVING.get(weights.kind, "codebook"), {})
    variables = {"params": weights.variables["params"], "codebook": moving}
    return lambda path: write_run(str(path), config, variables), {}


_WRITERS = {
    "official": _official_writer,
    "timm": _timm_writer,
    "huggingface": _huggingface_writer,
    "run": _run_writer,
}


def run_config(weights: Weights) -> dict:
    """Return what later stages read of the config of a run; it is no config that the run could be continued with.

    Raises:
        UserError: a classifier without classes.
    """
    if weights.arguments.get("num_classes") == 0:
        raise UserError(
            "The classifier has no head, and the stages know none without.",
            "the weights are those of a bare backbone.",
            "--layout=huggingface or --layout=timm; --config.init_from takes the source as it is.",
        )
    model = dict(weights.arguments)
    image_size = model.pop("image_size")
    config = {"stage": STAGES[weights.kind], "converted_from": weights.layout, "views": {"image_size": image_size}}
    if weights.kind == "vqkd":
        del model["teacher_width"]
    else:
        config["normalization"] = weights.normalization
    if weights.kind == "mim":
        config["masking"] = {"num_masked": max(1, round((image_size // model["patch_size"]) ** 2 * _NUM_MASKED))}
    return config | {"model": model}


def _untold(weights: Weights) -> dict[str, str]:
    """Return what no array tells and readers of the layout will therefore take to be as published, where it is not."""
    arguments = complete(weights.kind, weights.arguments)
    epsilon = arguments.get("norm_eps", RELEASED_EPSILON)
    untold = {}
    if epsilon != RELEASED_EPSILON:
        untold["norm_eps"] = f"{epsilon:g} has no place in this layout, whose models take {RELEASED_EPSILON:g}"
    for part in (arguments, arguments.get("encoder") or {}, arguments.get("decoder") or {}):
        has_table = part.get("position", "absolute").startswith("relative")
        if part.get("width", 0) != HEAD_WIDTH * part.get("num_heads", 0) and not has_table:
            untold["num_heads"] = f"{part['num_heads']} has no place in this layout: read it with --num_heads"
    if arguments.get("patch_aggregation") and arguments["early_layer"] != max(1, arguments["depth"] - 3):
        untold["early_layer"] = f"{arguments['early_layer']} has no place in this layout, read as three before the last"
    if "out_layers" in arguments and tuple(arguments["out_layers"]) != published_out_layers(arguments["depth"]):
        untold["out_layers"] = f"{arguments['out_layers']} has no place in this layout, read as the published ones"
    return untold


def _state_saver(state: dict[str, np.ndarray], target: Path) -> _Save:
    savers = {
        ".safetensors": lambda path: save_file(_contiguous(state), path, metadata={"format": "pt"}),
        ".npz": lambda path: np.savez(path, **state),
        ".pth": lambda path: writer.save(path, {"model": _contiguous(state)}),
    }
    if target.suffix not in savers:
        raise UserError(
            f"{target} ends in none of {', '.join(savers)}.",
            "a directory was meant, or the ending was left out.",
            f"{target.with_suffix('.safetensors')}, or another --layout.",
        )
    return savers[target.suffix]


def _contiguous(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.asarray(array, order="C") for name, array in state.items()}  # ascontiguousarray would add an axis
