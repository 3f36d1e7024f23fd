"""The segmentation model's parts against plain loops, published parameter counts, and windows over larger images."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from testing import drawn_variables

from beitv2_jax.models.upernet import (
    BATCH_STATS,
    BatchNorm,
    ConvHead,
    Segmenter,
    Upsample,
    moved_statistics,
    pool_to,
    resize,
)

TINY = dict(
    image_size=12,
    patch_size=2,
    width=10,
    depth=2,
    num_heads=2,
    mlp_dim=7,
    num_classes=5,
    out_layers=(1, 2, 2, 1),
    channels=11,
    aux_channels=13,
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def drawn(model, features, **kwargs):
    """Return drawn variables with running variances that are positive."""
    variables = drawn_variables(model, features, **kwargs)
    flat = traverse_util.flatten_dict(variables)
    return traverse_util.unflatten_dict(
        {path: np.abs(leaf) + 0.5 if path[-1] == "var" else leaf for path, leaf in flat.items()}
    )


def test_maps_have_a_quarter_to_a_thirtysecond_of_the_image_and_logits_the_finest():
    model, images = Segmenter.from_arguments(TINY), jnp.zeros((2, 12, 12, 3))
    output, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    chex.assert_shape(output.logits, (2, 24, 24, 5))
    chex.assert_shape(output.auxiliary_logits, (2, 6, 6, 5))
    assert [level.shape[1:] for level in output.features] == [(24, 24, 10), (12, 12, 10), (6, 6, 10), (3, 3, 10)]


@pytest.mark.parametrize("layers", [(1, 2, 1), (0, 1, 2, 1), (1, 2, 2, 3)])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(ValueError, match="out_layers"):
        Segmenter.from_arguments({**TINY, "out_layers": layers})


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_pooling_averages_cells_that_may_overlap(bins):
    features = normal(2, 5, 7, 3)
    pooled = pool_to(features, bins)
    for row in range(bins):
        for column in range(bins):
            top, bottom = int(np.floor(row * 5 / bins)), int(np.ceil((row + 1) * 5 / bins))
            left, right = int(np.floor(column * 7 / bins)), int(np.ceil((column + 1) * 7 / bins))
            expected = features[:, top:bottom, left:right].mean(axis=(1, 2))
            np.testing.assert_allclose(pooled[:, row, column], expected, atol=1e-6)


@pytest.mark.parametrize("size", [(3, 2), (5, 7), (11, 17)])
def test_resizing_reads_between_pixel_centres_and_repeats_the_edge(size):
    features = normal(2, 5, 7, 3)

    def read(array, axis, length):
        source = array.shape[axis]
        places = np.clip((np.arange(length) + 0.5) * source / length - 0.5, 0, None)
        low = np.floor(places).astype(int)
        share = (places - low).reshape([-1 if axis == 1 else 1, -1 if axis == 2 else 1, 1])
        high = np.minimum(low + 1, source - 1)
        return array.take(low, axis) * (1 - share) + array.take(high, axis) * share

    expected = read(read(features.astype(np.float64), 1, size[0]), 2, size[1])
    np.testing.assert_allclose(resize(features, size), expected, atol=1e-6)


def test_upsampling_writes_each_pixel_into_its_own_two_by_two_cells():
    model, features = Upsample(3), normal(2, 5, 7, 4)
    variables = drawn_variables(model, features)
    kernel, bias = (np.asarray(variables["params"][name]) for name in ("kernel", "bias"))
    out = model.apply(variables, features)
    chex.assert_shape(out, (2, 10, 14, 3))
    for row, column in ((0, 0), (3, 1), (4, 6)):
        for y in range(2):
            for x in range(2):
                expected = features[:, row, column] @ kernel[y, x] + bias
                np.testing.assert_allclose(out[:, 2 * row + y, 2 * column + x], expected, rtol=1e-5, atol=1e-5)


def test_batch_norm_in_training_is_of_the_batch_and_moves_the_unbiased_variance():
    model, features = BatchNorm(), 3.0 * normal(2, 5, 7, 4) + 11.0
    variables = drawn(model, features, train=False)
    out, of_batch = model.apply(variables, features, train=True, mutable=["batch_stats"])
    scale, bias = variables["params"]["scale"], variables["params"]["bias"]
    mean, var = features.mean((0, 1, 2)), features.var((0, 1, 2))
    np.testing.assert_allclose(out, (features - mean) / np.sqrt(var + 1e-5) * scale + bias, atol=2e-5)
    before = variables["batch_stats"]
    after = moved_statistics(before, of_batch["batch_stats"])
    np.testing.assert_allclose(after["mean"], 0.9 * before["mean"] + 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(after["var"], 0.9 * before["var"] + 0.1 * features.var((0, 1, 2), ddof=1), rtol=1e-5)
    out = model.apply(variables, features, train=False)
    expected = (features - before["mean"]) / np.sqrt(before["var"] + 1e-5) * scale + bias
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_rows_of_weight_zero_have_no_part_in_batch_norm():
    model, features = BatchNorm(), normal(5, 3, 7, 4)
    variables = drawn(model, features, train=False)
    kept = np.array([0, 2, 4])
    expected, statistics = model.apply(variables, features[kept], train=True, mutable=["batch_stats"])
    weight = np.array([1.0, 0.0, 1.0, 0.0, 1.0], np.float32)
    out, found = model.apply(variables, features, train=True, weight=weight, mutable=["batch_stats"])
    np.testing.assert_allclose(out[kept], expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(found, statistics, rtol=1e-5)
    nothing, _ = model.apply(variables, features, train=True, weight=0 * weight, mutable=["batch_stats"])
    assert np.isfinite(nothing).all()


def test_batch_statistics_of_one_and_eight_devices_are_those_of_the_whole_batch():
    model, features = BatchNorm(), normal(8, 3, 5, 7)
    variables = drawn(model, features, train=False)
    apply = jax.jit(lambda features: model.apply(variables, features, train=True, mutable=["batch_stats"]))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(features, jax.NamedSharding(mesh, jax.P("data")))
    chex.assert_trees_all_close(apply(features), apply(spread), rtol=1e-6, atol=1e-6)


def test_dropout_takes_whole_channels_in_training_only():
    model, features = ConvHead(channels=11, num_classes=5, dropout_rate=0.5), normal(1, 3, 5, 7)
    variables = drawn(model, features, train=False)
    kernel = variables["params"]["classes"]["kernel"]
    kernel[:], kernel[3] = 0.0, 1.0  # reads one channel alone
    variables["params"]["classes"]["bias"][:] = 0.0
    apply = jax.jit(
        lambda key: model.apply(variables, features, train=True, mutable=[BATCH_STATS], rngs={"dropout": key})
    )
    outputs = [apply(jax.random.key(seed))[0] for seed in range(12)]
    kept = [bool(np.any(logits)) for logits in outputs]
    assert 0 < sum(kept) < 12
    whole = outputs[kept.index(True)]
    for logits, is_kept in zip(outputs, kept, strict=True):
        np.testing.assert_array_equal(logits, whole if is_kept else 0.0)
    without = ConvHead(channels=11, num_classes=5, dropout_rate=0.0)
    expected = without.apply(variables, features, train=True, mutable=[BATCH_STATS])[0]
    np.testing.assert_allclose(whole, 2.0 * expected, rtol=1e-5, atol=1e-5)
