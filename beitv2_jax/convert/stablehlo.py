"""Export a network as a compiled function: pixels in, answers out, run by jax alone, without this package.

The folder holds `model.stablehlo`, which `jax.export.deserialize` reads, and `manifest.json`, which says what the
function takes and returns. The weights are part of the function, and so is the normalisation: it takes bytes.
"""

import datetime
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from beitv2_jax import __version__
from beitv2_jax.convert.arguments import MODELS
from beitv2_jax.convert.weights import Weights
from beitv2_jax.data.augment import eval_crop_fraction
from beitv2_jax.errors import UserError
from beitv2_jax.models.backbone import Compute
from beitv2_jax.models.preprocess import NORMALIZATIONS, normalize, to_unit_range
from beitv2_jax.models.upernet import resize
from beitv2_jax.models.vit import VisionTransformer
from beitv2_jax.models.vqkd import VQKD
from beitv2_jax.typing import PyTree

PLATFORMS = ("cpu", "cuda", "tpu")
MODEL_FILE, MANIFEST_FILE = "model.stablehlo", "manifest.json"
GUARANTEE_DAYS = 180
"""jax reads a function for six months after the release that wrote it."""
MAX_BYTES = 2**31 - 1
"""Largest file that jax can serialise."""
_COMPUTE = Compute(attention="reference", nearest_code="reference")
"""Implementations that every platform has."""
_MEANING = {
    "logits": "one number for each class; their softmax are the probabilities",
    "cls": "[CLS] after the last block, not normalised",
    "patches": "patch tokens after the last block, not normalised, by row and column",
    "code_ids": "the code of every patch, by row and column",
}


def export_function(weights: Weights) -> tuple[bytes, dict[str, Any]]:
    """Return the serialised function of any batch size for the `PLATFORMS`, and its manifest.

    Raises:
        UserError: the weights do not fit into one file, or the package that writes it is missing.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError(
            "jax needs the package flatbuffers to write a function, and it is not installed.",
            "Did you install beitv2_jax without its extra 'export'?",
            'Run pip install "beitv2_jax[export]".',
        )
    num_bytes = 4 * weights.num_params
    if num_bytes > MAX_BYTES:
        raise UserError(
            f"The weights take {num_bytes / 2**30:.1f} GiB, and jax can serialise a function of up to 2 GiB.",
            "The largest model that fits is ViT-L.",
            "Write another --layout, or export a smaller model.",
        )
    size = weights.arguments["image_size"]
    (batch,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, size, size, 3), np.uint8)
    exported = export.export(jax.jit(_function(weights)), platforms=PLATFORMS)(images)
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    return exported.serialize(), _manifest(weights, exported.calling_convention_version, outputs)


def save(directory: Path, function: bytes, manifest: dict[str, Any]) -> None:
    """Write the function and its manifest to a new folder."""
    directory.mkdir()
    (directory / MODEL_FILE).write_bytes(function)
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")


def _function(weights: Weights) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """Return the function images 'b S S 3' of bytes -> {name: output}."""
    model = MODELS[weights.kind].from_arguments(weights.arguments, _COMPUTE)
    variables = {name: jax.tree.map(jnp.asarray, tree) for name, tree in weights.variables.items() if tree}

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

    functions = {"vqkd": code_ids, "classifier": class_logits, "segmenter": window_logits, "mim": tokens}
    return tokens if weights.arguments.get("num_classes") == 0 else functions[weights.kind]


def _manifest(weights: Weights, calling_convention: int, outputs: dict[str, jax.core.ShapedArray]) -> dict[str, Any]:
    size = weights.arguments["image_size"]
    today = datetime.datetime.now(datetime.UTC).date()
    return {
        "format": "jax.export",
        "file": MODEL_FILE,
        "kind": weights.kind,
        "written_by": f"beitv2_jax {__version__}",
        "jax_version": jax.__version__,
        "calling_convention_version": calling_convention,
        "written": today.isoformat(),
        "guaranteed_until": (today + datetime.timedelta(days=GUARANTEE_DAYS)).isoformat(),
        "platforms": list(PLATFORMS),
        "input": {
            "shape": ["b", size, size, 3],
            "dtype": "uint8",
            "meaning": "RGB pixels from 0 to 255; they are normalised inside the function",
            "resize_shorter_side_to": int(size / eval_crop_fraction(size)),
            "interpolation": "bicubic",
            "center_crop": size,
        },
        "outputs": {
            name: {"shape": list(map(str, output.shape)), "dtype": str(output.dtype), "meaning": _MEANING[name]}
            for name, output in outputs.items()
        },
        "class_names": list(weights.class_names),
    }
