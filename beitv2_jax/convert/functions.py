"""Export a network as a function: pixels in, answers out, run without this package by jax (StableHLO) or by ONNX.

The folder holds `model.stablehlo`, which `jax.export.deserialize` reads, or `model.onnx`, and `manifest.json`, which
says what the function takes and returns. The weights are part of the function, and so is the normalisation: it takes
bytes.
"""

import calendar
import datetime
import importlib.metadata
import importlib.util
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from beitv2_jax import __version__
from beitv2_jax.convert.arguments import MODELS
from beitv2_jax.convert.teachers.load import build_teacher
from beitv2_jax.convert.weights import Weights
from beitv2_jax.errors import UserError
from beitv2_jax.models.backbone import Compute
from beitv2_jax.models.cluster import ClusterTokenizer
from beitv2_jax.models.preprocess import NORMALIZATIONS, normalize, to_unit_range
from beitv2_jax.models.upernet import resize
from beitv2_jax.models.vit import VisionTransformer
from beitv2_jax.models.vqkd import VQKD
from beitv2_jax.typing import PyTree

PLATFORMS = ("cpu", "cuda", "tpu")
MODEL_FILES = {"stablehlo": "model.stablehlo", "onnx": "model.onnx"}
"""Layout -> the file of the function."""
MANIFEST_FILE = "manifest.json"
OPSET = 23
"""Version of the operators in ONNX files."""
MAX_BYTES = 2**31 - 1
"""Largest file that either format can have."""
_COMPUTE = Compute(attention="reference", nearest_code="reference")
"""Implementations that every platform has."""
_MEANING = {
    "logits": "one number for each class; their softmax are the probabilities",
    "cls": "[CLS] after the last block, not normalised",
    "patches": "patch tokens after the last block, not normalised, by row and column",
    "code_ids": "the code of every patch, by row and column",
}


class Function(NamedTuple):
    """A serialised function, and its manifest."""

    content: bytes
    manifest: dict[str, Any]


def export_stablehlo(weights: Weights) -> Function:
    """Return the function of any batch size for all of `PLATFORMS`.

    Raises:
        UserError: the weights do not fit into one file, or the package that writes it is missing.
    """
    _check(weights, "flatbuffers", "export")
    size = weights.arguments["image_size"]
    (batch,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, size, size, 3), np.uint8)
    exported = export.export(jax.jit(_function(weights)), platforms=PLATFORMS)(images)
    written = datetime.datetime.now(datetime.UTC).date()
    details = {
        "jax_version": jax.__version__,
        "calling_convention_version": exported.calling_convention_version,
        "written": written.isoformat(),
        "expiry": _expiry(written),
        "platforms": list(PLATFORMS),
    }
    return Function(exported.serialize(), _manifest(weights, "stablehlo", "b", details))


def _expiry(written: datetime.date) -> str:
    """Return until when a function that is written on this day can be read.

    Source: the compatibility guarantees of jax.export, a window of six months between the releases of jax.
    """
    months = written.month + 5
    year, month = written.year + months // 12, months % 12 + 1
    last = min(written.day, calendar.monthrange(year, month)[1])
    until = written.replace(year=year, month=month, day=last)
    return (
        f"jax {jax.__version__} reads it, and so do the releases of jax in the six months after that one; a release "
        f"after {until.isoformat()} may refuse it, so keep the weights to write it again"
    )


def export_onnx(weights: Weights) -> Function:
    """Return the function as an ONNX model, of any batch size but for segmentation, which takes one image.

    Raises:
        UserError: the weights do not fit into one file, or the package that writes it is missing.
    """
    _check(weights, "jax2onnx", "onnx")
    from jax2onnx import to_onnx

    function, names = _function(weights), list(_outputs(weights))
    # jax2onnx cannot resize a batch of unknown size
    batch = 1 if weights.kind == "segmenter" else "b"
    size = weights.arguments["image_size"]
    images = types.SimpleNamespace(shape=(batch, size, size, 3), dtype=np.dtype(np.uint8))
    model = to_onnx(
        lambda images: tuple(function(images)[name] for name in names),
        [images],
        input_names=["images"],
        output_names=names,
        opset=OPSET,
    )
    details = {"opset": OPSET, "jax2onnx_version": importlib.metadata.version("jax2onnx")}
    return Function(model.SerializeToString(), _manifest(weights, "onnx", batch, details))


EXPORTS = {"stablehlo": export_stablehlo, "onnx": export_onnx}
"""Layout -> how it is written."""


def save(directory: Path, function: Function) -> None:
    """Write a function and its manifest to a new folder."""
    directory.mkdir()
    (directory / function.manifest["file"]).write_bytes(function.content)
    (directory / MANIFEST_FILE).write_text(json.dumps(function.manifest, indent=2) + "\n")


def _check(weights: Weights, package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"This layout is written by the package {package}, which is not installed.",
            f"Did you install beitv2_jax without its extra {extra!r}?",
            f'Run pip install "beitv2_jax[{extra}]"'
            + (" in an environment of its own, as docs/export.md shows." if extra == "onnx" else "."),
        )
    num_bytes = 4 * weights.num_params
    if num_bytes > MAX_BYTES:
        raise UserError(
            f"The weights take {num_bytes / 2**30:.1f} GiB, and a file of this layout can have 2 GiB.",
            "The largest published model that fits is ViT-L.",
            "Write another --layout, or export a smaller model.",
        )


def _function(weights: Weights) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """Return the function images 'b S S 3' of bytes -> {name: output}."""
    variables = {name: jax.tree.map(jnp.asarray, tree) for name, tree in weights.variables.items() if tree}
    if weights.kind == "cluster":
        teacher = build_teacher(weights.arguments["teacher"], _COMPUTE.dtype)
        tokenizer = ClusterTokenizer(teacher, _COMPUTE.nearest_code)
        return lambda images: {"code_ids": tokenizer.encode(variables, images).reshape(-1, *teacher.grid)}
    model = MODELS[weights.kind].from_arguments(weights.arguments, _COMPUTE)

    def normalized(images):
        return normalize(images, *NORMALIZATIONS[weights.normalization])

    def code_ids(images):
        ids = model.apply(variables, to_unit_range(images), method=VQKD.encode)
        return {"code_ids": ids.reshape(-1, *model.grid)}

    def class_logits(images):
        return {"logits": model.apply(variables, normalized(images), train=False)}

    def window_logits(images):
        logits = model.apply(variables, normalized(images), train=False).logits
        return {"logits": resize(logits, images.shape[1:3])}

    def tokens(images):
        backbone = model.backbone
        params: PyTree = {"params": variables["params"]["backbone"]}
        found = VisionTransformer(backbone, _COMPUTE).apply(params, normalized(images)).tokens
        return {"cls": found[:, 0], "patches": found[:, 1:].reshape(-1, *backbone.grid, backbone.width)}

    functions = {"vqkd": code_ids, "classifier": class_logits, "segmenter": window_logits}
    return tokens if weights.arguments.get("num_classes") == 0 else functions.get(weights.kind, tokens)


def _outputs(weights: Weights) -> dict[str, jax.ShapeDtypeStruct]:
    """Return {name: shape and type} of what the function returns for one image."""
    size = weights.arguments["image_size"]
    return jax.eval_shape(_function(weights), jax.ShapeDtypeStruct((1, size, size, 3), np.uint8))


def _manifest(weights: Weights, layout: str, batch: str | int, details: dict[str, Any]) -> dict[str, Any]:
    size = weights.arguments["image_size"]
    meaning = _MEANING | ({"logits": _MEANING["logits"].replace("softmax", "sigmoids")} if weights.multi_label else {})
    return {
        "layout": layout,
        "file": MODEL_FILES[layout],
        "kind": weights.kind,
        "written_by": f"beitv2_jax {__version__}",
        **details,
        "input": {
            "shape": [batch, size, size, 3],
            "dtype": "uint8",
            "meaning": "RGB pixels from 0 to 255; they are normalised inside the function",
            "resize_shorter_side_to": int(size / weights.crop_fraction),
            "interpolation": "bicubic",
            "center_crop": size,
        },
        "outputs": {
            name: {"shape": [batch, *output.shape[1:]], "dtype": str(output.dtype), "meaning": meaning[name]}
            for name, output in _outputs(weights).items()
        },
        "class_names": list(weights.class_names),
    }
