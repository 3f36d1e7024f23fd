"""The step: micro-batches against the one big batch, where their rows lie, and the dtypes of sums and of the state."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_toy as toy
from paths import CONFIGS
from testing import variables_of
from without_data import no_data

from beitv2_jax import config as config_lib
from beitv2_jax.errors import UserError
from beitv2_jax.tasks import finetune
from beitv2_jax.training import loop, optim, sharding
from beitv2_jax.training.state import TrainState
from beitv2_jax.training.step import lower_step, make_train_step, micro_batches
from tests.training import laws_test as laws

ROWS, CLASSES = 16, 7


def finetune_task(dtype="float32"):
    config = config_lib.load(f"{CONFIGS / 'finetune'}.py")
    config.views.image_size = laws.SIZE
    config.model.update(laws.ENCODER, num_classes=CLASSES, drop_path_rate=0.0)
    config.augment.update(randaugment_ops=0, mixup=0.0, cutmix=0.0, erasing=0.0)
    config.efficiency.dtype = dtype
    with no_data(0):
        return finetune.build(config), config


def mim_task(dtype="float32"):
    return laws.mim_task(dtype, drop_path_rate=0.0)


TASKS = {"vqkd": laws.tokenizer_task, "mim": mim_task, "finetune": finetune_task}


def batch(unreadable=()):
    """Return 16 rows; micro-batch i of four has rows i, i + 4, i + 8, i + 12."""
    parts = [laws.batch_of(seed) for seed in (1, 2)]
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    rows["labels"] = np.arange(ROWS) % CLASSES
    rows["weight"][list(unreadable)] = 0.0
    return rows


def prepared(build, mesh, accumulation_steps, dtype="float32", warmup_steps=0):
    """Return the step and the state at step 0 of a task on a mesh."""
    task, config = build(dtype)
    config.optim.update(eps=1e-3, layer_decay=1.0)  # a small eps magnifies the rounding of gradients near zero
    optimizer, schedule = optim.for_task(task, config.optim, warmup_steps=warmup_steps, num_steps=10)
    variables = variables_of(task)
    state = TrainState(jnp.int32(0), variables["params"], optimizer.init(variables["params"]), variables["model_state"])
    step = make_train_step(
        task, optimizer, schedule=schedule, seed=0, average_decay=0.0, accumulation_steps=accumulation_steps
    )
    return step, jax.device_put(state, sharding.param_shardings(state, mesh))


def compiled(build, mesh, accumulation_steps, rows, warmup_steps=0):
    step, state = prepared(build, mesh, accumulation_steps, warmup_steps=warmup_steps)
    placed = sharding.place_batch(rows, mesh)
    return loop.compile_step(step, state, {}, placed, mesh), state, placed


def assert_close(found, expected, bound):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        scale = np.abs(b).max() + 1e-9
        np.testing.assert_allclose(a / scale, b / scale, atol=bound, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vqkd", (4, 1, 1)),
        *(pytest.param(name, (1, 1, 1), marks=pytest.mark.long) for name in ("mim", "finetune")),
    ],
)
def test_micro_batches_take_the_step_of_the_whole_batch(name, sizes):
    """A whole micro-batch is unreadable, and one or two rows of others."""
    mesh = sharding.make_mesh(*sizes)
    rows = batch(unreadable=(0, 4, 8, 12, 5, 9, 15))
    outcomes = []
    for accumulation_steps in (1, 4):
        step, state, placed = compiled(TASKS[name], mesh, accumulation_steps, rows)
        if accumulation_steps > 1 and mesh.size > 1:
            # parameters are whole on every device of this mesh: what is left to be moved is rows
            assert not re.search("all-gather|all-to-all|collective-permute", step.as_text())
        before = jax.tree.map(np.array, state.params)  # the step takes the memory of its state
        outcomes.append(jax.device_get(step(state, {}, placed)))
    (expected, expected_metrics), (found, found_metrics) = outcomes
    assert expected_metrics["unreadable"] == found_metrics["unreadable"] == 7
    assert_close(found_metrics, expected_metrics, 2e-6)
    assert_close(found.opt_state, expected.opt_state, 2e-5)
    moved = [jax.tree.map(np.subtract, state.params, before) for state in (found, expected)]
    assert_close(*moved, 1e-3)  # Adam's step of a gradient near zero keeps few digits
    if name == "vqkd":
        found, expected = found.model_state["quantizer"], expected.model_state["quantizer"]
        assert expected["window_counts"].sum() == (ROWS - 7) * laws.PATCHES
        np.testing.assert_array_equal(found["window_counts"], expected["window_counts"])
        np.testing.assert_array_equal(found["cluster_counts"], expected["cluster_counts"])
        np.testing.assert_allclose(found["codebook"], expected["codebook"], atol=1e-6)


QUANTIZERS = {
    "simvq": {"quantizer": "simvq", "quantizer_gradient": "rotation"},
    "fsq": {"quantizer": "fsq", "fsq_levels": (5, 4, 3), "codebook_size": 60, "code_dim": 3},
}


@pytest.mark.long
@pytest.mark.parametrize("name", QUANTIZERS)
def test_other_quantizers_step_alike_on_eight_devices_and_in_micro_batches_and_rest_at_rate_zero(name):
    rows = batch(unreadable=(0, 4, 9))
    outcomes = []
    for sizes, accumulation_steps in (((1, 1, 1), 1), ((8, 1, 1), 2)):
        mesh = sharding.make_mesh(*sizes)
        build = lambda dtype: laws.tokenizer_task(dtype, **QUANTIZERS[name])  # noqa: E731
        step, state, placed = compiled(build, mesh, accumulation_steps, rows, warmup_steps=2)
        drawn = jax.device_get(state)
        still, _ = step(state, {}, placed)  # the rate of the first step of a warm-up is 0
        rested = jax.device_get(still)
        outcomes.append((drawn, rested, *jax.device_get(step(still, {}, placed))))
    for drawn, rested, moved, _ in outcomes:
        jax.tree.map(np.testing.assert_array_equal, rested.params, drawn.params)
        before, after = drawn.model_state["quantizer"], moved.model_state["quantizer"]
        assert after["window_counts"].sum() == 2 * (ROWS - 3) * laws.PATCHES
        assert {key for key in after if "count" not in key} == {"idle_steps", *(["coefficients"] * (name == "simvq"))}
        if name == "simvq":
            np.testing.assert_array_equal(after["coefficients"], before["coefficients"])
            assert np.abs(moved.params["quantizer"]["basis"] - drawn.params["quantizer"]["basis"]).max() > 1e-5
    (drawn, _, expected, expected_metrics), (_, _, found, found_metrics) = outcomes
    assert_close(found_metrics, expected_metrics, 2e-6)
    moves = [jax.tree.map(np.subtract, state.params, drawn.params) for state in (found, expected)]
    assert_close(*moves, 1e-3)
    jax.tree.map(np.testing.assert_array_equal, found.model_state, expected.model_state)


def test_micro_batches_stay_where_their_rows_are():
    mesh = sharding.make_mesh(2, 2, 2)
    placed = sharding.place_batch({"rows": np.arange(24), "images": np.arange(48.0).reshape(24, 2)}, mesh)
    with sharding.activation_rules(mesh):
        cut = jax.jit(lambda batch: micro_batches(batch, 3)).lower(placed).compile()
    assert not re.search("all-|collective", cut.as_text())
    found = cut(placed)
    for index in range(3):
        np.testing.assert_array_equal(found["rows"][index], np.arange(24)[index::3])
        np.testing.assert_array_equal(found["images"][index], np.arange(48.0).reshape(24, 2)[index::3])
    assert found["rows"].sharding.shard_shape((3, 8)) == (3, 2)


def test_micro_batches_are_rounds_of_one_loop():
    traces = []
    task = toy.make_task(on_trace=lambda: traces.append(None))
    rows = jax.tree.map(
        jnp.asarray, {name: rows for name, rows in next(toy.batches(16, 3)).items() if name != "faults"}
    )
    optimizer, schedule = optim.for_task(task, toy.config().optim, 0, 10)
    state = TrainState(
        jnp.int32(0), *(task.init(jax.random.key(0))[name] for name in ("params", "params", "model_state"))
    )
    state = state.replace(opt_state=optimizer.init(state.params))
    step = make_train_step(task, optimizer, schedule=schedule, seed=0, average_decay=0.0, accumulation_steps=2)
    program = str(jax.make_jaxpr(step)(state, task.frozen, rows))
    assert program.count("scan[") >= 1 and len(traces) <= 2  # once for the shapes of the sums, once for the loop
    _, metrics = jax.jit(step)(state, task.frozen, rows)
    assert metrics["ids"] == rows["example_ids"].sum()


def test_shares_that_cannot_be_cut_are_refused():
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    for steps in (1, 2, 3, 6):
        sharding.check_micro_batches(24, sizes, steps)
    with pytest.raises(UserError, match=r"The 6 rows .* batch of 24 .* into 4") as caught:
        sharding.check_micro_batches(24, sizes, 4)
    assert "accumulation_steps=3" in caught.value.instead


@pytest.mark.parametrize("name", TASKS)
def test_a_bfloat16_step_keeps_weights_moments_codebook_and_losses_in_float32(name):
    def build(dtype):
        task, config = TASKS[name]("bfloat16")
        config.efficiency.gradient_dtype = "bfloat16"
        return task, config

    step, state = prepared(build, sharding.make_mesh(1), 2)
    rows = jax.tree.map(jnp.asarray, batch())
    moved, metrics = jax.eval_shape(step, state, {}, rows)
    halves = str(jax.make_jaxpr(step)(state, {}, rows)).count("bf16")
    assert halves > 50
    for leaf in jax.tree.leaves((moved, metrics)):
        assert leaf.dtype in (jnp.float32, jnp.int32), leaf


def reductions(gradient_dtype, folder):
    """Return the matrices that the partitioned program reduces, by dtype, before any pass of a platform."""
    task_config = mim_task("bfloat16")[1].copy_and_resolve_references().unlock()
    task_config.efficiency.gradient_dtype = gradient_dtype
    with no_data(laws.TEACHER):
        build = lambda dtype: (laws.mim.build(task_config), task_config)  # noqa: E731
        mesh = sharding.make_mesh(8)
        step, state = prepared(build, mesh, 1)
        lowered = lower_step(step, state, {}, sharding.place_batch(batch(), mesh), mesh)
    lowered.compile(compiler_options={"xla_dump_to": str(folder), "xla_dump_hlo_pass_re": "spmd-partitioning"})
    (dump,) = folder.glob("*train_step*after_spmd-partitioning*.txt")
    found = re.findall(r"= (\w+)\[(\d+),(\d+)\]\S* all-reduce\(", dump.read_text())
    return {
        dtype: {tuple(sorted(map(int, shape))) for kind, *shape in found if kind == dtype} for dtype in ("f32", "bf16")
    }


@pytest.mark.long
def test_gradients_of_matrices_are_reduced_in_the_dtype_asked_for(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    exact, rounded = reductions("float32", tmp_path / "a"), reductions("bfloat16", tmp_path / "b")
    matrices = {(24, 72), (24, 24), (24, 36), (19, 24), (24, 48)}  # qkv, proj, both of the MLP, output layer, patches
    assert matrices <= exact["f32"] and not exact["bf16"]
    assert matrices <= rounded["bf16"] and not matrices & rounded["f32"]
