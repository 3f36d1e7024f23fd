"""The model family: every row builds, and has the parameters that arithmetic by hand says."""

import jax
import numpy as np
import pytest

from beitv2_jax.models.classifier import Classifier
from beitv2_jax.sizes import SIZES


def count_by_hand(patch_size, width, depth, num_heads, mlp_dim, grid):
    embedding = patch_size**2 * 3 * width + width + width  # patches, their bias, [CLS]
    attention = 3 * width**2 + 2 * width + width**2 + width + ((2 * grid - 1) ** 2 + 3) * num_heads
    mlp = width * mlp_dim + mlp_dim + mlp_dim * width + width
    norms_and_scales = 2 * 2 * width + 2 * width
    return embedding + depth * (attention + mlp + norms_and_scales) + 2 * width + width * 1000 + 1000


@pytest.mark.parametrize(("name", "patches_per_side"), [*((name, 14) for name in SIZES), ("tiny", 3)])
def test_parameters_of_every_size(name, patches_per_side):
    size = {**SIZES[name], "depth": 2}  # all blocks are alike; tests/steps_test.py counts whole published models
    assert size["width"] % size["num_heads"] == 0
    image_size = patches_per_side * size["patch_size"]
    model = Classifier.from_arguments({"image_size": image_size, "num_classes": 1000, **size})
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == count_by_hand(**size, grid=patches_per_side)
