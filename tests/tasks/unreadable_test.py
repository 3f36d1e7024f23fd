"""Rows of weight 0: a batch with unreadable images teaches what the batch without these rows teaches, and no more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from testing import variables_of

from tests.training import laws_test as laws

BAD = 3  # of the 8 rows of a batch; which ones is drawn


def _task(name):
    if name == "vqkd":
        task, _ = laws.tokenizer_task()
    else:
        task, _ = laws.mim_task(drop_path_rate=0.0)
    return task, variables_of(task)


TASKS = {name: _task(name) for name in ("vqkd", "mim")}


def _learn(name):
    task, variables = TASKS[name]

    def learn(params, batch):
        key = jax.random.key(5)
        loss = jax.value_and_grad(task.loss, has_aux=True)
        (total, parts), grads = loss(params, variables["model_state"], {}, batch, key, jnp.int32(1))
        codebook, _ = task.finish(variables["model_state"], parts.statistics, jnp.int32(1))
        weight = jnp.maximum(parts.weight, 1.0)
        means = {"loss": total, "metrics": parts.metrics, "grads": grads}
        return jax.tree.map(lambda value: value / weight, means) | {"codebook": codebook}

    return jax.jit(learn)


LEARN = {name: _learn(name) for name in TASKS}


def _assert_close(found, expected, rtol):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        scale = float(np.abs(b).max()) + 1e-9
        np.testing.assert_allclose(a / scale, b / scale, atol=rtol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "vqkd" else pytest.mark.long) for name in TASKS]
)
@settings(max_examples=4, deadline=None)
@given(rows=st.permutations(range(laws.BATCH)), seed=st.integers(0, 2**31))
def test_unreadable_rows_change_nothing(name, rows, seed):
    bad, good = np.array(rows[:BAD]), np.sort(rows[BAD:])
    batch = laws.batch_of(seed)
    batch["weight"][bad] = 0
    _, variables = TASKS[name]
    found = LEARN[name](variables["params"], batch)
    # without them: the mean over the rows that are left
    without = LEARN[name](variables["params"], {key: value[good] for key, value in batch.items()})
    _assert_close(found, without, rtol=2e-5)
    # what stands in them has no influence at all: a grey picture, a target cache's zeros, the greatest numbers
    grey = {key: value.copy() for key, value in batch.items()}
    grey["images"][bad], grey["code_ids"][bad] = 128, 0
    grey["teacher_features"][bad] = np.array([0.0, 0.0, 1e30], np.float32)[:, None, None]
    jax.tree.map(np.testing.assert_array_equal, LEARN[name](variables["params"], grey), found)
    # and they do count when they are readable
    batch["weight"][bad] = 1
    with pytest.raises(AssertionError):
        _assert_close(LEARN[name](variables["params"], batch), without, rtol=1e-3)


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_that_is_unreadable_as_a_whole_teaches_nothing(name):
    _, variables = TASKS[name]
    batch = laws.batch_of(2)
    batch["weight"][:] = 0
    batch["teacher_features"][:] = 0
    found = LEARN[name](variables["params"], batch)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert found["loss"] == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(found["grads"]))
    if name == "vqkd":
        before = variables["model_state"]["quantizer"]
        for key in ("codebook", "window_counts"):
            np.testing.assert_array_equal(found["codebook"]["quantizer"][key], before[key])


@pytest.mark.parametrize("name", TASKS)
def test_evaluation_sums_leave_them_out(name):
    task, variables = TASKS[name]
    bad, good = np.array([1, 4, 5]), np.array([0, 2, 3, 6, 7])
    batch = laws.batch_of(3)
    batch["weight"][bad] = 0
    batch["teacher_features"][bad] = 0
    evaluate = jax.jit(task.evaluate)
    found = evaluate(variables["params"], variables["model_state"], {}, batch)
    without = {key: value[good] for key, value in batch.items()}
    _assert_close(found, evaluate(variables["params"], variables["model_state"], {}, without), rtol=1e-6)


def test_the_codebook_starts_from_readable_images():
    task, variables = TASKS["vqkd"]
    start = jax.jit(task.start_codebook)
    bad = np.array([0, 3, 6])
    codebooks = []
    for level in (0, 128, 255):
        batch = laws.batch_of(4)
        batch["weight"][bad], batch["images"][bad] = 0, level
        batches = jax.tree.map(lambda rows: rows[None], batch)
        started = start(variables["params"], variables["model_state"], {}, batches, jax.random.key(1))
        codebooks.append(started["quantizer"]["codebook"])
    np.testing.assert_array_equal(codebooks[0], codebooks[1])
    np.testing.assert_array_equal(codebooks[0], codebooks[2])
    batches["weight"][:] = 1
    started = start(variables["params"], variables["model_state"], {}, batches, jax.random.key(1))
    assert (started["quantizer"]["codebook"] != codebooks[2]).any()
