"""The tokenizer's training beyond the release: dead codes revived, k-means over many batches, health and its advice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from testing import variables_of
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


FSQ = {"quantizer": "fsq", "fsq_levels": (5, 4), "codebook_size": 20, "code_dim": 2}
REVIVES, PLAIN = task_with(revive=True), task_with()


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
    variables = variables_of(REVIVES[0])
    average = jnp.ones(laws.CODES).at[jnp.array([2, 7, 11])].set(jnp.array([3e-3, 1e-3, 2e-3]))
    state = {**variables["model_state"]["quantizer"], "usage_average": average}
    wanted = jax.eval_shape(task.init, jax.random.key(0))["model_state"]["quantizer"]
    variables["model_state"] = {"quantizer": {name: state[name] for name in wanted}}
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
    return stepped(*REVIVES)


def test_a_step_revives_the_rarest_code_with_a_token_of_a_readable_image(revived):
    before, after, _ = revived
    config = REVIVES[1]
    codes = np.flatnonzero(after["usage_average"] == 1.0)
    assert codes.tolist() == [7]
    model = vqkd.make_model(config, inputs.compute(config), teacher_width=laws.TEACHER)
    batch, variables = rows(), variables_of(REVIVES[0])
    variables = {"params": variables["params"], "codebook": variables["model_state"]}
    projected = jax.jit(lambda images: model.apply(variables, images, method=VQKD.project))
    unit = np.asarray(q.l2_normalise(projected(batch["images"] / 127.5 - 1.0)))
    nearness = np.sum(unit * after["codebook"][7], axis=-1)
    image = np.unravel_index(np.argmax(nearness), nearness.shape)[0]
    np.testing.assert_allclose(nearness.max(), 1.0, atol=1e-5)
    assert batch["weight"][image] == 1
    np.testing.assert_allclose(np.linalg.norm(after["codebook"], axis=1), 1.0, atol=1e-6)
    assert np.sum(before["codebook"][7] * after["codebook"][7]) < 0.99


@pytest.mark.long
def test_the_same_code_is_revived_on_eight_devices_and_by_micro_batches(revived):
    _, expected, metrics = revived
    _, found, other = stepped(*REVIVES, (8, 1, 1), accumulation_steps=2)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=2e-6, err_msg=name)
    np.testing.assert_allclose(other["quantization_distance"], metrics["quantization_distance"], rtol=1e-5)


def finish_of(built, step):
    """Return the codebook's state before and after hits of all codes but 2 and 7, which both are dead, at a step."""
    task, _ = built
    state = dict(variables_of(REVIVES[0])["model_state"]["quantizer"])
    state["usage_average"] = jnp.ones(laws.CODES).at[jnp.array([2, 7])].set(jnp.array([3e-3, 1e-3]))
    wanted = jax.eval_shape(task.init, jax.random.key(0))["model_state"]["quantizer"]
    before = {name: state[name] for name in wanted}
    counts = jnp.full(laws.CODES, 4.0).at[jnp.array([2, 7])].set(0.0)
    statistics = q.CodebookStatistics(counts[:, None] * jnp.roll(state["codebook"], 1, axis=1), counts)
    if built is REVIVES:
        statistics = statistics, q.Candidates(jnp.ones(1), q.l2_normalise(jnp.ones((1, 7))))
    after, _ = jax.jit(task.finish)({"quantizer": before}, statistics, step)
    return before, after["quantizer"]


def moved_codes(before, after):
    return np.flatnonzero(np.any(before["codebook"] != after["codebook"], axis=1))


def test_without_revival_nothing_is_kept_for_it_and_dead_codes_stay():
    before, after = finish_of(PLAIN, 0)
    assert "usage_average" not in before and before.keys() == after.keys()
    others = [code for code in range(laws.CODES) if code not in (2, 7)]
    assert moved_codes(before, after).tolist() == others
    np.testing.assert_array_equal(after["idle_steps"], np.isin(np.arange(laws.CODES), (2, 7)))
    _, revived = finish_of(REVIVES, 0)
    np.testing.assert_array_equal(revived["codebook"][np.array(others)], after["codebook"][np.array(others)])


def test_a_step_that_ends_a_window_shows_the_counts_of_that_window():
    """Half of the hits are of code 0 and half of code 1 in the first three steps, all of code 2 in the next three."""
    finish = jax.jit(vqkd.vqkd_finish(q.QuantizerOptions(codebook_size=laws.CODES, code_dim=7), window=3))
    codebook, perplexities = {"quantizer": variables_of(PLAIN[0])["model_state"]["quantizer"]}, []
    for step in range(7):
        codes = jnp.array([0, 1]) if step < 3 else jnp.array([2])
        counts = jnp.zeros(laws.CODES).at[codes].set(4.0)
        statistics = q.CodebookStatistics(counts[:, None] * codebook["quantizer"]["codebook"], counts)
        codebook, metrics = finish(codebook, statistics, step)
        perplexities.append(float(metrics["codebook_perplexity"]))
    np.testing.assert_allclose(perplexities, [2, 2, 2, 2, 2, 1, 1], rtol=1e-5)


@pytest.mark.parametrize(("step", "is_revived"), [(0, True), (7, True), (8, False), (9, False)])
def test_no_code_is_revived_in_the_last_fifth_of_the_run(step, is_revived):
    """The run has ten steps."""
    assert (7 in moved_codes(*finish_of(REVIVES, step))) == is_revived


def test_k_means_over_many_batches_is_that_of_all_their_patches():
    task, config = task_with(kmeans_tokens=50, **{"run.batch_size": 8, "kmeans_again": "4 steps"})
    assert task.start_batches == 14 and task.codebook_starts == (0, 4)  # 50 x 19 tokens, 72 a batch
    variables, batches = variables_of(task), [laws.batch_of(seed) for seed in (3, 4, 5)]
    batches[1]["weight"][2:] = 0
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *batches)
    arguments = (variables["params"], variables["model_state"], {})
    started = jax.jit(task.start_codebook)(*arguments, stacked, jax.random.key(1))["quantizer"]
    model = vqkd.make_model(config, inputs.compute(config), teacher_width=laws.TEACHER)
    state = {"params": variables["params"], "codebook": variables["model_state"]}
    images = np.concatenate([batch["images"][batch["weight"] > 0] for batch in batches])
    projected = jax.jit(lambda images: model.apply(state, images, method=VQKD.project))
    unit = q.l2_normalise(projected(images / 127.5 - 1.0)).reshape(-1, 7)
    ids = np.argmax(np.asarray(unit) @ np.asarray(started["codebook"]).T, axis=1)
    # ten rounds leave every used code near the mean of its patches
    means = np.stack([np.asarray(unit)[ids == code].mean(axis=0) for code in np.unique(ids)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert np.mean(np.sum(means * started["codebook"][np.unique(ids)], axis=1)) > 0.99
    assert PLAIN[0].start_batches == 1 and PLAIN[0].codebook_starts == (0,)


def test_codes_are_counted_over_fifty_tokens_each_where_an_epoch_has_them():
    config = task_with(**{"run.batch_size": 8, "usage_window": "3 steps"})[1]
    assert vqkd.usage_window(config, num_examples=10_000) == 14  # 950 tokens, 72 a step
    assert vqkd.usage_window(config, num_examples=80) == 10
    config.usage_window = "1 epoch"
    assert vqkd.usage_window(config, num_examples=10_000) == 1250


@pytest.mark.parametrize(("steps", "warns"), [(572, True), (573, False)])
def test_revival_in_a_run_that_is_too_short_for_it_is_warned_of(caplog, steps, warns):
    """A code is dead after 459 steps without a patch at the earliest, and 0.8 x 573 = 458.4 lets 459 steps revive."""
    task_with(**{"revive": True, "run.duration": f"{steps} steps"})
    assert ("no code is dead before step 459" in caplog.text) == warns
    assert ("--config.run.duration='573 steps'" in caplog.text) == warns


def test_few_codes_in_use_are_answered_with_what_to_write(caplog):
    changes = {"usage_window": "20 steps", "optim.peak_lr": 1e-3, "run.batch_size": 8}
    task, _ = task_with(**changes, **{"run.duration": "573 steps"})
    counts = np.zeros(laws.CODES, np.float32)
    counts[:3] = 500.0
    metrics = {name: float(value) for name, value in q.codebook_health(jnp.asarray(counts)).items()}
    assert task.advise(metrics, 19) == ""  # the window is not over
    advice = task.advise(metrics, 20)
    for part in ("16% of the 19 codes", "1,500 tokens", "revive=True", "peak_lr=3e-4", "codebook_size=8", "probe"):
        assert part in advice
    too_short, _ = task_with(**changes, **{"run.duration": "572 steps"})  # in which no code would be revived
    assert "revive" not in too_short.advise(metrics, 20) and "codebook_size=8" in too_short.advise(metrics, 20)
    revives, _ = task_with(**{"usage_window": "20 steps", "revive": True})
    assert (
        revives.advise(metrics, 39) == ""
    )  # codes are revived until step 8, so the second window is the first without
    assert "revive" not in revives.advise(metrics, 40) and "codebook_size=8" in revives.advise(metrics, 40)
    for quantizer, meant in ({"quantizer": "simvq"}, "codebook_size=8"), (FSQ, "fsq_levels=LEVELS with a product of 8"):
        other, _ = task_with(**{"usage_window": "20 steps", **{f"model.{key}": quantizer[key] for key in quantizer}})
        assert meant in other.advise(metrics, 21) and "revive" not in other.advise(metrics, 21)
        assert other.start_codebook is None
    assert task.advise(metrics | {"codebook_usage": 0.9, "codebook_perplexity": 12.0}, 21) == ""
    # 100 images of 9 patches for 19 codes at the start
    assert "hardly" not in caplog.text
    vqkd._warn_of_too_many_codes(PLAIN[1], 100)
    assert "900 patches for model.codebook_size=19" in caplog.text and "codebook_size=16 or less" in caplog.text
