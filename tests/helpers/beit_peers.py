"""Small models of timm and transformers from golden/beit_peers.safetensors: their arrays, inputs and answers."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from paths import GOLDEN
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from beitv2_jax.convert.arguments import MODELS

FILE = GOLDEN / "beit_peers.safetensors"
NAMES = (
    *("timm_relative", "timm_shared", "timm_absolute", "timm_features"),
    *("huggingface_relative", "huggingface_absolute", "huggingface_mim", "huggingface_features"),
    "huggingface_segmenter",
)


@dataclasses.dataclass
class Peer:
    """One model of another library: `state` with the names of its layout, `inputs` with channels last.

    `outputs` were computed in float64, and are rounded where they are stored.
    """

    state: dict[str, np.ndarray]
    config: dict | None
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]

    def write(self, path: Path) -> str:
        """Write it as its users have it: a .safetensors file, or a folder with config.json, and return where."""
        if self.config is None:
            save_file(self.state, path.with_suffix(".safetensors"))
            return str(path.with_suffix(".safetensors"))
        path.mkdir()
        save_file(self.state, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(self.config))
        return str(path)


@functools.cache
def _arrays() -> dict[str, np.ndarray]:
    return load_file(FILE)


@functools.cache
def _configs() -> dict[str, str]:
    with safe_open(FILE, "numpy") as file:
        return file.metadata()


def peer(name: str) -> Peer:
    """Return the model of that name."""

    def section(kind: str) -> dict[str, np.ndarray]:
        stem = f"{name}/{kind}/"
        return {key.removeprefix(stem): array for key, array in _arrays().items() if key.startswith(stem)}

    config = json.loads(_configs()[name])
    return Peer(section("state"), config, section("inputs"), section("outputs"))


def answers(weights, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Return our model's answer to `inputs`: logits, pooled features without a head, or codes of every patch."""
    model = MODELS[weights.kind].from_arguments(weights.arguments)
    images = jnp.asarray(inputs["images"])
    variables = {name: tree for name, tree in weights.variables.items() if tree}
    if weights.kind == "mim":
        mask = jnp.asarray(inputs["mask"]) if "mask" in inputs else None
        return np.asarray(
            jax.jit(functools.partial(model.apply, method="logits_everywhere"))(variables, images, mask).logits
        )
    if weights.kind == "classifier" and weights.arguments["num_classes"] == 0:
        features = functools.partial(model.apply, capture_intermediates=lambda module, name: module.name == "fc_norm")
        return np.asarray(jax.jit(features)(variables, images)[1]["intermediates"]["fc_norm"]["__call__"][0])
    output = jax.jit(model.apply)(variables, images)
    return np.asarray(output.logits if weights.kind == "segmenter" else output)


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the largest difference relative to the largest magnitude of theirs."""
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max())
