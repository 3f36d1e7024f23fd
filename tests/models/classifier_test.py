"""The classifier: pooling, names, head scale, sizes of the released models."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from testing import drawn_variables

from beitv2_jax.models.classifier import Classifier

BATCH, CLASSES, WIDTH = 5, 13, 6
TINY = dict(image_size=21, patch_size=7, width=WIDTH, depth=2, num_heads=3, mlp_dim=11, num_classes=CLASSES)


def build(arguments, **changes):
    return Classifier.from_arguments({**arguments, **changes})


def images(seed=0):
    return jax.random.normal(jax.random.key(seed), (BATCH, 21, 21, 3))


@pytest.mark.parametrize(("pooling", "norm"), [("mean", "fc_norm"), ("cls", "norm")])
def test_pooling(pooling, norm):
    model = build(TINY, pooling=pooling)
    variables = drawn_variables(model, images())
    params = variables["params"]
    assert set(params) == {"backbone", "head", norm}
    logits, tokens = model.apply(variables, images()), model.apply(variables, images(), method="features")
    chex.assert_shape(logits, (BATCH, CLASSES))
    chex.assert_shape(tokens, (BATCH, 10, WIDTH))
    unit = (tokens - params[norm]["bias"]) / params[norm]["scale"]
    np.testing.assert_allclose(unit.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(unit.std(-1), 1, atol=1e-3)
    if pooling == "cls":
        np.testing.assert_allclose(logits, tokens[:, 0] @ params["head"]["kernel"] + params["head"]["bias"], atol=1e-4)
    else:  # the mean is taken before the norm, so [CLS] and the norm of single patches do not enter
        pooled = logits - params["head"]["bias"]
        np.testing.assert_array_less(0.1, np.abs(pooled - tokens[:, 1:].mean(1) @ params["head"]["kernel"]).max())


def test_head_starts_scaled_down():
    def head(**kwargs):
        model = build(TINY, width=48, num_classes=509, depth=0, **kwargs)
        return model.init(jax.random.key(2), images())["params"]["head"]

    np.testing.assert_allclose(jnp.std(head()["kernel"]), 0.02 * 0.001, rtol=0.03)
    np.testing.assert_allclose(head(head_init_scale=1.0)["kernel"] * 0.001, head()["kernel"], rtol=1e-5)
    assert not head()["bias"].any()


def test_only_training_is_random():
    model = build(TINY, drop_path_rate=0.9)
    variables = drawn_variables(model, images())

    def run(seed, train):
        return model.apply(variables, images(), train=train, rngs={"drop_path": jax.random.key(seed)})

    chex.assert_trees_all_equal(run(3, False), run(4, False))
    assert (run(3, True) != run(4, True)).any()


def test_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="'max'"):
        build(TINY, pooling="max")
