"""Functions on every device's own rows: values, sums and gradients are those of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beitv2_jax.models.ops.per_device import on_own_rows
from beitv2_jax.training import sharding

ROWS, WHOLE = np.random.default_rng(0).normal(size=(24, 5)), np.random.default_rng(1).normal(size=(5, 3))


def products(rows, whole):
    return jnp.tanh(rows @ whole)


def total(rows, whole):
    return products(rows, whole).sum(axis=0)


def values(rows, whole):
    return on_own_rows(products, (rows,), (whole,)), on_own_rows(total, (rows,), (whole,), summed=True)


def loss(rows, whole):
    by_row, summed = values(rows, whole)
    return jnp.sum(by_row**2) + jnp.sum(summed**3)


@pytest.mark.parametrize("num_rows", [24, 7])  # 7 cannot be divided over the devices
@pytest.mark.parametrize("mesh_sizes", [(2, 2, 2), (1, 1, 8)])
def test_values_sums_and_gradients_do_not_depend_on_the_mesh(mesh_sizes, num_rows):
    rows = ROWS[:num_rows]
    expected = (products(rows, WHOLE), total(rows, WHOLE))
    gradients = jax.grad(lambda *a: jnp.sum(products(*a) ** 2) + jnp.sum(total(*a) ** 3), argnums=(0, 1))(rows, WHOLE)
    with sharding.activation_rules(sharding.make_mesh(*mesh_sizes)):
        found = jax.jit(values)(rows, WHOLE)
        found_gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(rows, WHOLE)
    for have, want in zip((*found, *found_gradients), (*expected, *gradients), strict=True):
        np.testing.assert_allclose(have, want, atol=2e-6 * np.abs(want).max())


def test_a_device_sees_its_share_only():
    seen = []

    def shapes(rows, whole):
        seen.append((rows.shape, whole.shape))
        return rows

    with sharding.activation_rules(sharding.make_mesh(2, 2, 2)):
        jax.jit(lambda rows: on_own_rows(shapes, (rows,), (WHOLE,)))(ROWS)
    assert seen[0] == ((6, 5), (5, 3))
    seen.clear()
    on_own_rows(shapes, (ROWS,), (WHOLE,))  # without a mesh
    assert seen == [((24, 5), (5, 3))]
