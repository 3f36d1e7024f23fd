"""Laws of the quantizer: unit rows, straight-through gradient, sums over the global batch, k-means, usage windows."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from beitv2_jax.models import quantizer as q

BATCH, PATCHES, CODE_DIM, CODES = 3, 7, 5, 11


def projections(seed, batch=BATCH):
    return 3.0 * jax.random.normal(jax.random.key(seed), (batch, PATCHES, CODE_DIM))


@functools.partial(jax.jit, static_argnums=0)
def initial_state(module, seed):
    return module.init(jax.random.key(seed), jnp.zeros((BATCH, PATCHES, CODE_DIM)))["codebook"]


def start(seed=0, **options):
    module = q.Quantizer(q.QuantizerOptions(codebook_size=CODES, code_dim=CODE_DIM, **options))
    return module, initial_state(module, seed)


@functools.partial(jax.jit, static_argnums=0)
def lookup(module, state, vectors, weight=None):
    return module.apply({"codebook": state}, vectors, weight)


@functools.partial(jax.jit, static_argnums=0)
def apply(module, state, vectors):
    """Return a lookup, and the state that its statistics lead to."""
    out = lookup(module, state, vectors)
    return out, q.updated_state(state, out.statistics, module.options)


def reference_lookup(vectors, codebook):
    unit = np.asarray(vectors, np.float64)
    unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
    return unit, np.argmax(unit @ np.asarray(codebook, np.float64).T, axis=-1)


def test_state_is_only_the_codebook_collection_with_unit_rows():
    module, _ = start()
    variables = module.init(jax.random.key(0), projections(0))
    assert set(variables) == {"codebook"}
    state = variables["codebook"]
    chex.assert_shape(state["codebook"], (CODES, CODE_DIM))
    np.testing.assert_allclose(np.linalg.norm(state["codebook"], axis=-1), 1.0, atol=1e-6)
    for name in ("cluster_counts", "window_counts", "last_window_counts"):
        np.testing.assert_array_equal(state[name], np.zeros(CODES, np.float32))
    other = module.init(jax.random.key(1), projections(0))["codebook"]
    assert np.abs(state["codebook"] - other["codebook"]).max() > 0.1


def test_output_shapes_dtypes_and_values():
    module, state = start(commitment_weight=0.5)
    vectors = projections(1)
    out, _ = apply(module, state, vectors)
    unit, ids = reference_lookup(vectors, state["codebook"])
    chex.assert_shape([out.codes, out.unit], (BATCH, PATCHES, CODE_DIM))
    assert out.code_ids.dtype == jnp.int32
    np.testing.assert_array_equal(out.code_ids, ids)
    np.testing.assert_allclose(out.unit, unit, atol=1e-6)
    np.testing.assert_allclose(out.codes, np.asarray(state["codebook"])[ids], atol=1e-6)
    np.testing.assert_array_equal(out.statistics.counts, np.bincount(ids.ravel(), minlength=CODES))
    expected = 0.5 * np.mean((np.asarray(state["codebook"], np.float64)[ids] - unit) ** 2, axis=(1, 2))
    np.testing.assert_allclose(out.commitment, expected, rtol=1e-5)


def test_bfloat16_projections_are_quantized_in_float32():
    module, state = start()
    vectors = projections(2).astype(jnp.bfloat16)
    out, new = apply(module, state, vectors)
    same, _ = apply(module, state, vectors.astype(jnp.float32))
    chex.assert_trees_all_equal(out, same)
    chex.assert_type([out.codes, out.unit, out.commitment, *jax.tree.leaves(new)], jnp.float32)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**20), ema_decay=st.sampled_from([0.0, 0.5, 0.9, 0.99]))
def test_rows_stay_unit_and_unused_codes_never_move(seed, ema_decay):
    module, state = start(seed, ema_decay=ema_decay)
    initial = np.asarray(state["codebook"])
    hit = np.zeros(CODES, bool)
    for step in range(3):
        out, state = apply(module, state, projections(seed + step))
        hit |= np.asarray(out.statistics.counts) > 0
    np.testing.assert_allclose(np.linalg.norm(state["codebook"], axis=-1), 1.0, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(state["codebook"])[~hit], initial[~hit])
    assert np.all(np.abs(np.asarray(state["codebook"])[hit] - initial[hit]).max(axis=-1) > 1e-4)


def test_update_is_the_decayed_blend_of_directions():
    module, state = start(ema_decay=0.75)
    vectors = projections(3)
    out, new = apply(module, state, vectors)
    unit, ids = reference_lookup(vectors, state["codebook"])
    for code in range(CODES):
        row = np.asarray(state["codebook"][code], np.float64)
        members = unit[ids == code]
        if len(members):
            mean = members.mean(axis=0)
            row = 0.75 * row + 0.25 * mean / np.linalg.norm(mean)
        np.testing.assert_allclose(new["codebook"][code], row / np.linalg.norm(row), atol=1e-6)
    np.testing.assert_allclose(new["cluster_counts"], 0.25 * np.asarray(out.statistics.counts), rtol=1e-6)


def test_straight_through_gradient_is_the_identity_on_unit_projections():
    module, state = start(commitment_weight=0.0)
    vectors, probe = projections(4), projections(5)

    def through(vectors):
        out = module.apply({"codebook": state}, vectors)
        return jnp.sum(out.codes * probe) + out.commitment.sum()

    def around(vectors):
        return jnp.sum(q.l2_normalise(vectors) * probe)

    gradient = jax.grad(through)(vectors)
    np.testing.assert_allclose(gradient, jax.grad(around)(vectors), rtol=1e-6, atol=1e-7)
    assert np.abs(gradient).max() > 0.01


def rotation_of(unit, code):
    """Return the matrix R = I - 2 r r^T + 2 e z^T of the rotation trick, with r = 0 where e = -z."""
    between = unit + code
    between = between / max(np.linalg.norm(between), 1e-9)
    return np.eye(len(unit)) - 2.0 * np.outer(between, between) + 2.0 * np.outer(code, unit)


def test_the_rotation_gradient_is_that_of_the_matrix_that_takes_z_to_e():
    module, state = start(quantizer_gradient="rotation", commitment_weight=0.0)
    vectors, probe = projections(4), np.asarray(projections(5), np.float64)
    out, pull = jax.vjp(lambda vectors: module.apply({"codebook": state}, vectors).codes, vectors)
    unit, ids = reference_lookup(vectors, state["codebook"])
    codes = np.asarray(state["codebook"], np.float64)[ids]
    np.testing.assert_allclose(out, codes, atol=1e-6)
    through = np.empty_like(unit)
    for place in np.ndindex(unit.shape[:2]):
        rotation = rotation_of(unit[place], codes[place])
        np.testing.assert_allclose(rotation @ unit[place], codes[place], atol=1e-6)
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(CODE_DIM), atol=1e-6)
        through[place] = rotation.T @ probe[place]
    # and on through l2norm: (g - z (z.g)) / |x|
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    expected = (through - unit * np.sum(unit * through, axis=-1, keepdims=True)) / length
    np.testing.assert_allclose(pull(jnp.float32(probe))[0], expected, atol=2e-6)
    assert np.abs(expected - (probe - unit * np.sum(unit * probe, axis=-1, keepdims=True)) / length).max() > 0.1


def test_the_rotation_of_a_vector_to_its_opposite_is_a_reflection():
    unit = np.array([[[0.6, 0.8, 0.0]]])
    probe = np.array([[[1.0, 2.0, 3.0]]])
    codes, pull = jax.vjp(lambda unit: q.passed_codes(unit, -unit, "rotation"), jnp.float32(unit))
    np.testing.assert_allclose(codes, -unit, atol=1e-6)
    expected = rotation_of(unit[0, 0], -unit[0, 0]).T @ probe[0, 0]
    np.testing.assert_allclose(pull(jnp.float32(probe))[0][0, 0], expected, atol=1e-6)


def test_no_gradient_reaches_the_codebook_but_commitment_reaches_the_projections():
    module, state = start()

    def loss(vectors, state):
        out = module.apply({"codebook": state}, vectors)
        return out.commitment.mean() + jnp.sum(out.codes**3)

    to_vectors, to_state = jax.grad(loss, argnums=(0, 1))(projections(6), state)
    assert np.abs(to_vectors).max() > 1e-4
    chex.assert_trees_all_equal(to_state, jax.tree.map(jnp.zeros_like, state))


def test_zero_projection_has_finite_outputs_and_gradient():
    module, state = start()
    vectors = projections(7).at[1, 2].set(0.0)
    gradient = jax.grad(lambda v: module.apply({"codebook": state}, v).commitment.mean())(vectors)
    out, _ = apply(module, state, vectors)
    chex.assert_tree_all_finite((gradient, out))
    np.testing.assert_array_equal(out.unit[1, 2], np.zeros(CODE_DIM))


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_permuting_the_batch_permutes_ids_and_moves_the_codebook_alike(seed):
    module, state = start(seed)
    vectors = projections(seed, batch=5)
    order = np.random.default_rng(seed).permutation(5)
    out, new = apply(module, state, vectors)
    shuffled, new_shuffled = apply(module, state, vectors[order])
    np.testing.assert_array_equal(shuffled.code_ids, out.code_ids[order])
    chex.assert_trees_all_close(new_shuffled, new, atol=1e-6)


def test_counts_can_be_kept_without_moving_the_codebook():
    module, state = start(ema_decay=0.9)
    out, _ = apply(module, state, projections(8))
    new = q.updated_state(state, out.statistics, module.options, move=False)
    np.testing.assert_array_equal(new["codebook"], state["codebook"])
    np.testing.assert_allclose(new["cluster_counts"], 0.1 * np.asarray(out.statistics.counts), rtol=1e-5)
    np.testing.assert_array_equal(new["window_counts"], out.statistics.counts)


def test_statistics_of_parts_add_up_to_those_of_the_whole():
    module, state = start()
    vectors, weight = projections(19, batch=6), jnp.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    whole = lookup(module, state, vectors, weight).statistics
    parts = [lookup(module, state, vectors[i::3], weight[i::3]).statistics for i in range(3)]
    summed = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    np.testing.assert_array_equal(summed.counts, whole.counts)
    assert whole.counts.sum() == 4 * PATCHES
    np.testing.assert_allclose(summed.sums, whole.sums, atol=1e-6)
    counted = lookup(module, state, vectors[weight > 0]).statistics
    np.testing.assert_allclose(counted.sums, whole.sums, atol=1e-6)


def test_codes_come_from_the_codebook_before_the_update():
    module, state = start(ema_decay=0.0)
    out, new = apply(module, state, projections(9))
    np.testing.assert_allclose(out.codes, state["codebook"][out.code_ids], atol=1e-6)
    assert np.abs(out.codes - new["codebook"][out.code_ids]).max() > 0.01


def test_lowest_id_wins_a_tie_and_a_zero_row_beats_a_far_unit_row():
    codebook = jnp.array([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    np.testing.assert_array_equal(q.nearest_code(jnp.array([[1.0, 0.0], [0.6, 0.8]]), codebook), [1, 0])
    with_zero = codebook.at[0].set(0.0)
    np.testing.assert_array_equal(q.nearest_code(jnp.array([[0.6, 0.8], [0.28, 0.96]]), with_zero), [1, 0])


def test_usage_and_perplexity_by_hand():
    counts = jnp.array([3.0, 0.0, 3.0, 6.0, 0.0])
    np.testing.assert_allclose(q.codebook_usage(counts), 3 / 5, rtol=1e-6)
    entropy = 2 * 0.25 * np.log(4) + 0.5 * np.log(2)
    np.testing.assert_allclose(q.codebook_perplexity(counts), np.exp(entropy), rtol=1e-6)
    np.testing.assert_allclose(q.codebook_perplexity(jnp.full(CODES, 7.0)), CODES, rtol=1e-6)
    np.testing.assert_allclose(q.codebook_perplexity(jnp.zeros(CODES)), 1.0, rtol=1e-6)


def test_health_by_hand():
    counts = np.full(200, 10.0, np.float32)
    counts[:4] = 400.0, 100.0, 0.09, 0.0
    health = q.codebook_health(jnp.asarray(counts))
    tokens = 196 * 10 + 500.09
    np.testing.assert_allclose(health["codebook_tokens"], tokens, rtol=1e-6)
    np.testing.assert_allclose(health["codebook_usage"], 199 / 200, rtol=1e-6)
    np.testing.assert_allclose(health["codebook_top_share"], 500 / tokens, rtol=1e-6)
    assert health["codebook_dead"] == 2  # below 1/100 of 2460.09 / 200
    shares = counts[:3].astype(np.float64) / tokens
    entropy = -np.sum(shares * np.log(shares)) - 196 * 10 / tokens * np.log(10 / tokens)
    np.testing.assert_allclose(health["codebook_entropy"], entropy, rtol=1e-5)
    np.testing.assert_allclose(health["codebook_perplexity"], np.exp(entropy), rtol=1e-5)


@pytest.mark.parametrize(
    ("used", "tokens", "is_collapse"),
    [
        (100, 5000, False),
        (49, 5000, True),  # fewer than half
        (49, 60, False),  # of 60 tokens a uniform codebook hits 45 on average
        (20, 60, True),
    ],
)
def test_a_collapse_is_told_from_few_tokens(used, tokens, is_collapse):
    counts = np.zeros(100, np.float32)
    counts[:used] = tokens / used
    health = {name: float(value) for name, value in q.codebook_health(jnp.asarray(counts)).items()}
    assert bool(q.collapse_of(health, 100)) == is_collapse


def test_one_code_that_takes_most_tokens_is_a_collapse_although_all_are_used():
    counts = np.ones(100, np.float32)
    counts[7] = 900.0
    health = {name: float(value) for name, value in q.codebook_health(jnp.asarray(counts)).items()}
    assert health["codebook_usage"] == 1.0 and "take 90% of the tokens" in q.collapse_of(health, 100)


def test_quantization_distance_is_two_minus_two_cosines():
    unit, codes = (np.asarray(q.l2_normalise(projections(seed))) for seed in (40, 41))
    expected = 2.0 - 2.0 * np.sum(unit.astype(np.float64) * codes, axis=-1).mean(axis=1)
    np.testing.assert_allclose(q.quantization_distance(unit, codes), expected, rtol=1e-5)


def test_window_holds_exactly_the_hits_of_its_steps():
    module, state = start()
    window_steps, hits = 3, []
    roll = jax.jit(q.roll_window, static_argnames="window_steps")
    for steps in range(1, 9):
        out, state = apply(module, state, projections(19 + steps))
        hits.append(np.asarray(out.statistics.counts))
        state = roll(state, steps, window_steps=window_steps)
        if steps in (1, 2):
            np.testing.assert_array_equal(state["last_window_counts"], np.zeros(CODES))
        if steps in (3, 4, 5):
            np.testing.assert_array_equal(state["last_window_counts"], sum(hits[0:3]))
        if steps in (6, 7, 8):
            np.testing.assert_array_equal(state["last_window_counts"], sum(hits[3:6]))
    np.testing.assert_array_equal(state["window_counts"], hits[6] + hits[7])


def shard(array):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return jax.device_put(array, NamedSharding(mesh, P("data")))


def test_update_on_eight_devices_equals_one_device():
    module, state = start(ema_decay=0.5)
    vectors = projections(10, batch=16)
    step = jax.jit(lambda state, vectors: apply(module, state, vectors))
    out, new = step(state, vectors)
    sharded_out, sharded_new = step(state, shard(vectors))
    np.testing.assert_array_equal(sharded_out.code_ids, out.code_ids)
    np.testing.assert_array_equal(sharded_out.statistics.counts, out.statistics.counts)
    chex.assert_trees_all_close((sharded_out, sharded_new), (out, new), atol=1e-6)


def test_no_device_gathers_the_global_batch():
    module, state = start()
    text = (
        jax.jit(lambda state, vectors: apply(module, state, vectors)[1])
        .lower(state, shard(projections(10, batch=16)))
        .compile()
        .as_text()
    )
    assert "all-reduce" in text
    assert "all-gather" not in text


@pytest.mark.parametrize("num_samples", [48, 8])
def test_kmeans_on_eight_devices_equals_one_device(num_samples):
    samples = jax.random.normal(jax.random.key(11), (num_samples, CODE_DIM))
    means, counts = q.kmeans(samples, jax.random.key(12), CODES)
    sharded_means, sharded_counts = q.kmeans(shard(samples), jax.random.key(12), CODES)
    np.testing.assert_allclose(sharded_means, means, atol=1e-6)
    np.testing.assert_array_equal(sharded_counts, counts)
    assert counts.sum() == num_samples
    np.testing.assert_allclose(np.linalg.norm(means, axis=-1), 1.0, atol=1e-6)


def test_kmeans_starts_from_distinct_samples():
    samples = jax.random.normal(jax.random.key(13), (CODES, CODE_DIM))
    means, counts = q.kmeans(samples, jax.random.key(14), CODES, num_iters=1)
    np.testing.assert_array_equal(counts, np.ones(CODES))
    expected = np.asarray(q.l2_normalise(samples))
    order = np.argmax(np.asarray(means) @ expected.T, axis=-1)
    assert sorted(order) == list(range(CODES))
    np.testing.assert_allclose(means, expected[order], atol=1e-6)


def test_kmeans_finds_well_separated_directions():
    centres = np.eye(CODE_DIM, dtype=np.float32)
    noise = 0.02 * jax.random.normal(jax.random.key(15), (7, CODE_DIM, CODE_DIM))
    samples = (centres + noise).reshape(-1, CODE_DIM) * 5.0
    means, counts = q.kmeans_from(q.l2_normalise(samples), q.l2_normalise(samples[:CODE_DIM]), 3)
    np.testing.assert_array_equal(counts, np.full(CODE_DIM, 7))
    np.testing.assert_allclose(means, centres, atol=0.05)


def test_empty_cluster_keeps_its_mean():
    unit = jnp.array([[1.0, 0.0], [0.8, 0.6]])
    initial = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
    means, counts = q.kmeans_from(unit, initial, 4)
    np.testing.assert_array_equal(counts, [2, 0])
    np.testing.assert_array_equal(means[1], initial[1])
    np.testing.assert_allclose(means[0], np.array([3.0, 1.0]) / np.sqrt(10.0), atol=1e-6)


@pytest.mark.parametrize("num_counted", [30, 4])
def test_samples_of_weight_0_take_no_part_in_kmeans(num_counted):
    samples = np.asarray(jax.random.normal(jax.random.key(16), (41, CODE_DIM)))
    weight = np.random.default_rng(17).permutation(np.arange(41) < num_counted).astype(np.float32)
    means, counts = q.kmeans(samples, jax.random.key(18), CODES, weight=weight)
    other = np.where(weight[:, None] > 0, samples, 7.0)
    for left_out in (other, -other):
        left_out = np.where(weight[:, None] > 0, samples, left_out)
        again = q.kmeans(left_out, jax.random.key(18), CODES, weight=weight)
        chex.assert_trees_all_equal(again, (means, counts))
    assert counts.sum() == num_counted
    counted = q.l2_normalise(samples[weight > 0])
    if num_counted < CODES:  # every mean is one of the few samples
        np.testing.assert_allclose((means @ counted.T).max(axis=1), 1.0, atol=1e-6)
    initial = q.l2_normalise(samples[:CODES])
    found = q.kmeans_from(q.l2_normalise(samples), initial, 3, weight)
    chex.assert_trees_all_close(found, q.kmeans_from(counted, initial, 3), atol=1e-6)
    # with all weights 1 it is the k-means without weights
    everything = q.kmeans(samples, jax.random.key(18), CODES, weight=np.ones(41, np.float32))
    chex.assert_trees_all_equal(everything, q.kmeans(samples, jax.random.key(18), CODES))


IMAGES = np.array([70_001, 3, 14_000_000, 12, 5, 6, 800, 9])


def tokens_of(seed, images=IMAGES):
    """Return unit vectors of the patches of 8 images, and the codes they are given."""
    vectors = projections(seed, batch=len(images)), projections(seed + 1, batch=len(images))
    return tuple(q.l2_normalise(array) for array in vectors)


def test_candidates_are_the_best_of_log_distance_plus_gumbel_noise():
    key, (unit, codes) = jax.random.key(3), tokens_of(30)
    weight = np.array([1, 1, 0, 1, 1, 1, 1, 1], np.float32)
    found = q.drawn_candidates(unit, codes, weight, IMAGES, key, 6)
    keys = [jax.random.fold_in(key, image) for image in IMAGES]
    noise = np.stack([np.asarray(jax.random.exponential(key, (PATCHES,)), np.float64) for key in keys])
    gumbel = -np.log(noise)
    distance = 1.0 - np.sum(np.asarray(unit, np.float64) * np.asarray(codes, np.float64), axis=-1)
    scores = np.log(distance) + gumbel
    scores[2] = -np.inf  # an unreadable image
    best = np.argsort(-scores, axis=None)[:6]
    np.testing.assert_allclose(np.log(found.scores), scores.reshape(-1)[best], atol=1e-5)
    np.testing.assert_array_equal(found.vectors, np.asarray(unit).reshape(-1, CODE_DIM)[best])


def test_a_token_is_drawn_in_proportion_to_its_distance():
    angles = np.array([0.3, 1.0, 2.0, np.pi])
    unit = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)[None]
    codes = jnp.broadcast_to(jnp.array([1.0, 0.0]), unit.shape)
    keys = jax.random.split(jax.random.key(0), 4000)
    first = jax.jit(jax.vmap(lambda key: q.drawn_candidates(unit, codes, jnp.ones(1), jnp.array([5]), key, 1).vectors))
    drawn = np.asarray(first(keys))[:, 0, 0]
    frequency = np.mean(np.isclose(drawn[:, None], np.cos(angles), atol=1e-6), axis=0)
    weights = 1.0 - np.cos(angles)
    np.testing.assert_allclose(frequency, weights / weights.sum(), atol=4 * np.sqrt(0.25 / 4000))


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(8)), cut=st.sampled_from((1, 3)), seed=st.integers(0, 2**20))
def test_the_draw_is_the_same_however_the_batch_is_cut_and_ordered(order, cut, seed):
    key, (unit, codes), weight = jax.random.key(seed), tokens_of(seed), np.ones(8, np.float32)
    draw = jax.jit(q.drawn_candidates, static_argnums=5)
    whole = draw(unit, codes, weight, IMAGES, key, 5)
    merged = jax.tree.map(jnp.zeros_like, whole)
    for part in (np.array(order[:cut]), np.array(order[cut:])):
        drawn = draw(unit[part], codes[part], weight[part], IMAGES[part], key, 5)
        merged = q.merged_candidates(merged, drawn)
    chex.assert_trees_all_equal(merged, whole)
    assert len(np.unique(whole.vectors, axis=0)) == 5  # without replacement
    other = draw(unit, codes, weight, IMAGES, jax.random.key(seed + 1), 5)
    assert not np.array_equal(other.vectors, whole.vectors)


def test_the_draw_on_eight_devices_equals_one_device_and_gathers_few_rows():
    key, (unit, codes), count = jax.random.key(4), tokens_of(31), 3
    arguments = (unit, codes, np.ones(8, np.float32), IMAGES.astype(np.int32))
    program = jax.jit(lambda *arguments: q.drawn_candidates(*arguments, key, count))
    whole = program(*arguments)
    mesh = jax.make_mesh((8, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    rows = [jax.device_put(array, NamedSharding(mesh, P(("data", "fsdp")))) for array in arguments]
    with jax.set_mesh(mesh), nn.logical_axis_rules((("batch", ("data", "fsdp")),)):
        compiled = program.lower(*rows).compile()
        found = compiled(*rows)
    chex.assert_trees_all_close(found, whole, rtol=1e-6)
    gathered = re.findall(r"f32\[([\d,]*)\]\S* all-(?:gather|reduce)\(", compiled.as_text())
    sizes = [math.prod(map(int, filter(None, shape.split(",")))) for shape in gathered]
    assert max(sizes) <= 8 * count * CODE_DIM < unit.size


def test_dead_codes_move_rarest_first_at_most_a_hundredth_of_them():
    module = q.Quantizer(q.QuantizerOptions(codebook_size=250, code_dim=CODE_DIM))
    state = q.with_training_counters(module.init(jax.random.key(0), projections(0))["codebook"], revive=True)
    average = np.full(250, 0.5, np.float32)
    average[[17, 4, 99, 200]] = 0.004, 0.001, 0.009, 0.002
    state |= {"usage_average": jnp.asarray(average), "idle_steps": jnp.full(250, 700.0)}
    assert q.most_revived(250) == 3 and q.most_revived(64) == 1 and q.most_revived(8192) == 82
    vectors = q.l2_normalise(jax.random.normal(jax.random.key(1), (3, CODE_DIM)))
    after = q.revived(state, q.Candidates(jnp.array([3.0, 2.0, 1.0]), vectors))
    moved = np.flatnonzero(np.any(np.asarray(after["codebook"]) != np.asarray(state["codebook"]), axis=1))
    assert moved.tolist() == [4, 17, 200]
    for code, row in zip((4, 200, 17), vectors, strict=True):
        np.testing.assert_array_equal(after["codebook"][code], row)
    np.testing.assert_array_equal(np.asarray(after["usage_average"])[[4, 200, 17, 99]], [1, 1, 1, average[99]])
    np.testing.assert_array_equal(np.asarray(after["idle_steps"])[[4, 200, 17, 99]], [0, 0, 0, 700])
    np.testing.assert_allclose(np.linalg.norm(after["codebook"], axis=1), 1.0, atol=1e-6)
    # one candidate is left, and then none, or the time is over
    one = q.revived(state, q.Candidates(jnp.array([3.0, 0.0, 0.0]), vectors))
    np.testing.assert_array_equal(one["codebook"], state["codebook"].at[4].set(vectors[0]))
    chex.assert_trees_all_equal(q.revived(state, q.Candidates(jnp.zeros(3), vectors)), state)
    chex.assert_trees_all_equal(q.revived(state, q.Candidates(jnp.ones(3), vectors), jnp.array(False)), state)


def test_a_code_is_dead_458_steps_after_its_last_hit_and_idle_steps_are_counted():
    module, state = start()
    state = q.with_training_counters(state, revive=True)
    counts = jnp.full(CODES, 30.0).at[3].set(0.0)
    counted = jax.jit(q.counted)
    for step in range(1, 460):
        state = counted(state, counts)
        assert bool(state["usage_average"][3] < q.DEAD_FRACTION) == (step > 458)
    assert q.STEPS_UNTIL_DEAD == 459
    assert state["idle_steps"][3] == 459 and state["idle_steps"].sum() == 459
    expected = 0.99**459 + (1 - 0.99**459) * CODES / (CODES - 1)
    np.testing.assert_allclose(state["usage_average"][0], expected, rtol=1e-4)
    nothing = counted(state, jnp.zeros(CODES))  # a batch of unreadable images says nothing of usage
    np.testing.assert_array_equal(nothing["usage_average"], state["usage_average"])
    again = q.placed(state, module.init(jax.random.key(9), projections(0))["codebook"]["codebook"])
    assert not again["idle_steps"].any() and (again["usage_average"] == 1).all()
