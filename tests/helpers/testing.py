"""Common to several test files: small pictures, and parameters drawn without running the model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image


def write_dark_and_light(folder, *, train, validation):
    """Write PNGs of 24 pixels in the classes dark and light: `train` and `validation` of each, by one generator."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("validation", validation)):
        for label in ("dark", "light"):
            place = folder / split / label
            place.mkdir(parents=True)
            for number in range(count):
                low = rng.integers(0, 128, (4, 4, 3)) + 127 * (label == "light")
                Image.fromarray(np.uint8(low)).resize((24, 24), Image.Resampling.BICUBIC).save(place / f"{number}.png")


def drawn_variables(model, *args, seed=1, **kwargs):
    """Return variables of the model's tree with normal entries of visible size, so that no part hides at zero."""
    shapes = jax.eval_shape(functools.partial(model.init, **kwargs), jax.random.key(0), *args)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def variables_of(task):
    """Return variables of a task, none zero or large: kernels scaled by their fan-in, codes on the sphere."""
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda leaf: (rng.normal(size=leaf.shape) / np.sqrt(max(leaf.shape[:-1], default=4))).astype(np.float32),
        jax.eval_shape(task.init, jax.random.key(0)),
    )
    if variables["model_state"]:
        state = variables["model_state"]["quantizer"]
        variables["model_state"]["quantizer"] = {
            name: array / np.linalg.norm(array, axis=-1, keepdims=True) if array.ndim == 2 else np.zeros_like(array)
            for name, array in state.items()
        }
    return jax.tree.map(jnp.asarray, variables)
