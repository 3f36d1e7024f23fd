"""Attentive pooling against loops over images, heads and tokens, its gradient against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beitv2_jax.evaluation.attentive import efficient_pool, largest_divisor, multihead_pool


def softmax(scores):
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def efficient_by_hand(tokens, queries, values):
    """Keys are the tokens; every query weighs its own part of the projected tokens."""
    count, width = len(queries), tokens.shape[-1]
    part = width // count
    rows = []
    for image in tokens:
        projected = image @ values
        row = []
        for number, query in enumerate(queries):
            weights = softmax(np.array([token @ query / width**0.5 for token in image]))
            own = projected[:, number * part : (number + 1) * part]
            row.extend(sum(weight * token for weight, token in zip(weights, own, strict=True)))
        rows.append(row)
    return np.array(rows)


def multihead_by_hand(tokens, query, keys, values, value_bias, key_bias=0.0):
    """The query as it is, keys and values projected for every token, the heads side by side."""
    heads, head_width = query.shape
    rows = []
    for image in tokens:
        row = []
        for head in range(heads):
            all_keys = image @ keys[:, head] + key_bias
            all_values = image @ values[:, head] + value_bias[head]
            weights = softmax(all_keys @ query[head] / head_width**0.5)
            row.extend(weights @ all_values)
        rows.append(row)
    return np.array(rows)


def drawn(*shapes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape) for shape in shapes]


def as_float32(arrays):
    return [array.astype(np.float32) for array in arrays]


EFFICIENT = ((3, 5, 8), (4, 8), (8, 8))
MULTIHEAD = ((3, 5, 6), (2, 3), (6, 2, 3), (6, 2, 3), (2, 3))


def test_efficient_pool_is_the_loop():
    arrays = drawn(*EFFICIENT)
    np.testing.assert_allclose(jax.jit(efficient_pool)(*as_float32(arrays)), efficient_by_hand(*arrays), atol=2e-6)


def test_multihead_pool_is_the_loop_with_any_bias_of_the_keys():
    arrays = drawn(*MULTIHEAD)
    expected = multihead_by_hand(*arrays, key_bias=np.array([0.5, -2.0, 1.0]))
    np.testing.assert_allclose(jax.jit(multihead_pool)(*as_float32(arrays)), expected, atol=2e-6)


@pytest.mark.parametrize(
    "pool, by_hand, shapes",
    [(efficient_pool, efficient_by_hand, EFFICIENT), (multihead_pool, multihead_by_hand, MULTIHEAD)],
)
def test_gradients_are_finite_differences_of_the_loop(pool, by_hand, shapes):
    arrays = drawn(*shapes)
    cotangent = np.random.default_rng(1).normal(size=(3, shapes[0][-1]))
    of_params = jax.jit(jax.grad(lambda params, tokens: jnp.sum(pool(tokens, *params) * cotangent.astype(np.float32))))(
        as_float32(arrays[1:]), as_float32(arrays)[0]
    )
    step = 1e-5
    for number, gradient in enumerate(of_params, 1):
        expected = np.zeros(gradient.shape)
        for place in np.ndindex(gradient.shape):
            ends = []
            for sign in (1, -1):
                moved = [array.copy() for array in arrays]
                moved[number][place] += sign * step
                ends.append(np.sum(by_hand(*moved) * cotangent))
            expected[place] = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(gradient, expected, atol=1e-5 * max(1, np.abs(expected).max()))


def test_published_widths_have_the_published_numbers():
    assert [largest_divisor(width, 32) for width in (192, 768, 1024)] == [32, 32, 32]
    assert [width // largest_divisor(width, 64) for width in (384, 768, 1024)] == [6, 12, 16]
    assert largest_divisor(544, 64) == 34 and largest_divisor(7, 4) == 1
