"""Batched inference: the right rows, one batch ahead, and sums over padded batches."""

import jax
import numpy as np
import pytest

from beitv2_jax.training import inference, sharding

BATCHES = [{"images": np.arange(24.0, dtype=np.float32).reshape(8, 3) + 100 * number} for number in range(5)]


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 1)])
def test_outputs_are_the_rows_of_their_batch(sizes):
    def apply(frozen, batch):
        return {"scaled": batch["images"] * frozen["scale"], "sums": batch["images"].sum(axis=1)}

    mesh = sharding.make_mesh(*sizes)
    found = list(inference.run_batches(apply, {"scale": np.float32(2.0)}, BATCHES, mesh))
    assert len(found) == len(BATCHES)
    for (batch, outputs), expected in zip(found, BATCHES, strict=True):
        assert batch is expected
        np.testing.assert_array_equal(outputs["scaled"], 2.0 * expected["images"])
        np.testing.assert_array_equal(outputs["sums"], expected["images"].sum(axis=1))


def test_the_device_works_one_batch_ahead_and_compiles_once(capsys):
    drawn, traced = [], []

    def draw():
        for number, batch in enumerate(BATCHES):
            drawn.append(number)
            yield batch

    def apply(frozen, batch):
        traced.append(None)
        return batch["images"]

    mesh = sharding.make_mesh()
    ahead = [
        len(drawn) - done
        for done, _ in enumerate(inference.run_batches(apply, {}, draw(), mesh, total=5, label="features"), 1)
    ]
    assert ahead == [1, 1, 1, 1, 0]
    assert len(traced) == 1
    assert "features 5/5 batches" in capsys.readouterr().out


def test_no_context_is_left_behind_between_batches():
    for _ in inference.run_batches(lambda frozen, batch: batch["images"], {}, BATCHES, sharding.make_mesh()):
        assert jax.sharding.get_abstract_mesh().empty


def test_sums_are_added_over_batches():
    mesh = sharding.make_mesh(2, 2, 2)
    compiled = jax.jit(
        lambda weights, batch: {"total": weights * batch["images"].sum(), "rows": batch["images"].sum(axis=0)},
        out_shardings=sharding.replicated(mesh),
    )
    sums = inference.sum_batches(compiled, np.float32(0.5), BATCHES, mesh)
    everything = np.concatenate([batch["images"] for batch in BATCHES]).astype(np.float64)
    assert sums["total"] == 0.5 * everything.sum()
    np.testing.assert_array_equal(sums["rows"], everything.sum(axis=0))
