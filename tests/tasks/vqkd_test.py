"""The tokenizer's training beyond the release: dead codes revived, k-means over many batches, health and its advice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from testing import quick_jit
from without_data import no_data

from beitv2_jax.models import quantizer as q
from beitv2_jax.models.vqkd import VQKD
from beitv2_jax.tasks import inputs, vqkd
from beitv2_jax.training import loop, optim, sharding
from beitv2_jax.training.state import TrainState
from beitv2_jax.training.step import make_train_step
from tests.training import laws_test as laws


def task_with(**changes):
    """Return the small tokenizer of the laws of training under changed keys, and its config."""
    config = laws.tokenizer_task()[1]
    config.run.duration = "10 steps"
    config.optim.warmup = "2 steps"
    config.update_from_flattened_dict(changes)
    with no_data(laws.TEACHER):
        return vqkd.build(config), config


def rows():
    parts = [laws.batch_of(seed) for seed in (1, 2)]
    batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    batch["example_ids"] = np.arange(16) * 71 + 3
    batch["weight"][[4, 9]] = 0.0
    return batch


def stepped(task, config, sizes=(1, 1, 1), accumulation_steps=1, step=0):
    """Return the codebook's state before and after a step in which three codes are nearly unused."""
    mesh = sharding.make_mesh(*sizes)
    optimizer, schedule = optim.for_task(task, config.optim, warmup_steps=0, num_steps=10)
    variables = laws.drawn(task)
    state = variables["model_state"]["quantizer"]
    if "usage_average" in state:
        state["usage_average"] = jnp.ones(laws.CODES).at[jnp.array([2, 7, 11])].set(jnp.array([3e-3, 1e-3, 2e-3]))
    state = TrainState(
        jnp.int32(step), variables["params"], optimizer.init(variables["params"]), variables["model_state"]
    )
    state = jax.device_put(state, sharding.param_shardings(state, mesh))
    before = jax.device_get(state.model_state["quantizer"])
    train_step = make_train_step(
        task, optimizer, schedule=schedule, seed=0, average_decay=0.0, accumulation_steps=accumulation_steps
    )
    placed = sharding.place_batch(rows(), mesh)
    compiled = loop.compile_step(train_step, state, {}, placed, mesh)
    after, metrics = compiled(state, {}, placed)
    return before, jax.device_get(after.model_state["quantizer"]), jax.device_get(metrics)


@pytest.fixture(scope="module")
def revived():
    return stepped(*task_with(revive=True))


def test_a_step_revives_the_rarest_code_with_a_token_of_a_readable_image(revived):
    before, after, _ = revived
    config = task_with()[1]
    codes = np.flatnonzero(after["usage_average"] == 1.0)
    assert codes.tolist() == [7]
    model = vqkd.make_model(config, inputs.compute(config), teacher_width=laws.TEACHER)
    batch, variables = rows(), laws.drawn(task_with()[0])
    variables = {"params": variables["params"], "codebook": variables["model_state"]}
    projected = quick_jit(lambda images: model.apply(variables, images, method=VQKD.project))
    unit = np.asarray(q.l2_normalise(projected(batch["images"] / 127.5 - 1.0)))
    nearness = np.sum(unit * after["codebook"][7], axis=-1)
    image = np.unravel_index(np.argmax(nearness), nearness.shape)[0]
    np.testing.assert_allclose(nearness.max(), 1.0, atol=1e-5)
    assert batch["weight"][image] == 1
    np.testing.assert_allclose(np.linalg.norm(after["codebook"], axis=1), 1.0, atol=1e-6)
    assert np.sum(before["codebook"][7] * after["codebook"][7]) < 0.99


@pytest.mark.parametrize(("sizes", "accumulation_steps"), [((8, 1, 1), 1), ((1, 2, 1), 4)])
def test_the_same_code_is_revived_on_other_meshes_and_by_micro_batches(revived, sizes, accumulation_steps):
    _, expected, metrics = revived
    _, found, other = stepped(*task_with(revive=True), sizes, accumulation_steps)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=2e-6, err_msg=name)
    np.testing.assert_allclose(other["quantization_distance"], metrics["quantization_distance"], rtol=1e-5)


def test_without_revival_nothing_is_kept_for_it_and_the_other_codes_move_alike(revived):
    before, after, _ = stepped(*task_with())
    assert "usage_average" not in before and "usage_average" in revived[1]
    others = np.arange(laws.CODES) != 7
    np.testing.assert_array_equal(after["codebook"][others], revived[1]["codebook"][others])
    still = after["window_counts"] == 0
    np.testing.assert_array_equal(after["codebook"][still], before["codebook"][still])
    np.testing.assert_array_equal(after["idle_steps"], still)


def test_no_code_is_revived_in_the_last_fifth_of_the_run():
    config = task_with(revive=True)[1]
    model = vqkd.make_model(config, inputs.compute(config), teacher_width=laws.TEACHER)
    assert vqkd.REVIVE_UNTIL == 0.8
    finish = vqkd.vqkd_finish(model.quantizer, window=3, revive_steps=8)
    state = laws.drawn(task_with(revive=True)[0])["model_state"]  # in which every usage average is 0
    statistics = q.CodebookStatistics(jnp.zeros((laws.CODES, 7)), jnp.zeros(laws.CODES))
    candidates = q.Candidates(jnp.ones(1), q.l2_normalise(jnp.ones((1, 7))))
    moved = [
        np.any(
            finish(state, (statistics, candidates), step)[0]["quantizer"]["codebook"] != state["quantizer"]["codebook"]
        )
        for step in (0, 7, 8, 9)
    ]
    assert moved == [True, True, False, False]


def test_k_means_over_many_batches_is_that_of_all_their_patches():
    task, config = task_with(kmeans_tokens=50, **{"run.batch_size": 8, "kmeans_again": "4 steps"})
    assert task.start_batches == 14 and task.codebook_starts == (0, 4)  # 50 x 19 tokens, 72 a batch
    variables, batches = laws.drawn(task), [laws.batch_of(seed) for seed in (3, 4, 5)]
    batches[1]["weight"][2:] = 0
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *batches)
    arguments = (variables["params"], variables["model_state"], {})
    started = quick_jit(task.start_codebook)(*arguments, stacked, jax.random.key(1))["quantizer"]
    as_one = jax.tree.map(lambda *arrays: np.concatenate(arrays)[None], *batches)
    whole = quick_jit(task.start_codebook)(*arguments, as_one, jax.random.key(1))["quantizer"]
    np.testing.assert_allclose(started["codebook"], whole["codebook"], atol=1e-5)
    model = vqkd.make_model(config, inputs.compute(config), teacher_width=laws.TEACHER)
    state = {"params": variables["params"], "codebook": variables["model_state"]}
    images = np.concatenate([batch["images"][batch["weight"] > 0] for batch in batches])
    unit = q.l2_normalise(model.apply(state, images / 127.5 - 1.0, method=VQKD.project)).reshape(-1, 7)
    ids = np.argmax(np.asarray(unit) @ np.asarray(started["codebook"]).T, axis=1)
    # ten rounds leave every used code near the mean of its patches
    means = np.stack([np.asarray(unit)[ids == code].mean(axis=0) for code in np.unique(ids)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert np.mean(np.sum(means * started["codebook"][np.unique(ids)], axis=1)) > 0.99
    assert task_with()[0].start_batches == 1 and task_with()[0].codebook_starts == (0,)


def test_codes_are_counted_over_fifty_tokens_each_where_an_epoch_has_them():
    config = task_with(**{"run.batch_size": 8, "usage_window": "3 steps"})[1]
    assert vqkd.usage_window(config, num_examples=10_000) == 14  # 950 tokens, 72 a step
    assert vqkd.usage_window(config, num_examples=80) == 10
    config.usage_window = "1 epoch"
    assert vqkd.usage_window(config, num_examples=10_000) == 1250


def test_few_codes_in_use_are_answered_with_what_to_write(caplog):
    task, _ = task_with(**{"usage_window": "20 steps", "optim.peak_lr": 1e-3, "run.batch_size": 8})
    counts = np.zeros(laws.CODES, np.float32)
    counts[:3] = 500.0
    metrics = {name: float(value) for name, value in q.codebook_health(jnp.asarray(counts)).items()}
    assert task.advise(metrics, 20) == ""  # the window is not over
    advice = task.advise(metrics, 21)
    for part in ("16% of the 19 codes", "1,500 tokens", "revive=True", "peak_lr=3e-4", "codebook_size=8", "probe"):
        assert part in advice
    revives, _ = task_with(**{"usage_window": "20 steps", "revive": True})
    assert "revive" not in revives.advise(metrics, 30)
    assert task.advise(metrics | {"codebook_usage": 0.9, "codebook_perplexity": 12.0}, 21) == ""
    # 100 images of 9 patches for 19 codes at the start
    assert "hardly" not in caplog.text
    vqkd._warn_of_too_many_codes(task_with()[1], 100)
    assert "900 patches for model.codebook_size=19" in caplog.text and "codebook_size=16 or less" in caplog.text
