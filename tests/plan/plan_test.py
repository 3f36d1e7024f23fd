"""Small steps compiled for eight v5e chips: which collectives a TPU would run. Needs the extra `plan`."""

import pytest
from planning_accounting_test import small

from beitv2_jax.planning import planner, topologies

TARGET = topologies.parse("v5e:2x4")
FASTER = {"run.batch_size": 32, "efficiency.dtype": "bfloat16"}


@pytest.fixture(scope="module", autouse=True)
def _compilers():
    planner.start_compilers()


def make(stage, **keys):
    config = small(stage, **keys).copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(FASTER)
    return planner.make(planner.prepare(config.lock(), 1000), TARGET)


def parameters(plan):
    return sum(part.params for part in plan.parts)


def over(plan, kind, axis):
    return [c for c in plan.collectives if c.kind == kind and axis in c.axes(plan.mesh)]


@pytest.fixture(scope="module")
def mim():
    return make("mim")


@pytest.fixture(scope="module")
def vqkd():
    # a codebook whose shape nothing else has
    return make("vqkd", **{"model.codebook_size": 251, "model.code_dim": 7})


def check_figures(plan):
    assert plan.compiled and plan.fits and 0 < plan.memory.arguments < plan.memory.peak
    # products are most of what a TPU's compiler counts, but for sizes as small as these
    assert plan.compiler_flops > plan.arithmetic_flops == pytest.approx(plan.traced_flops)
    assert plan.bytes_moved > plan.memory.arguments


def test_mim_sums_its_gradients_and_gathers_nothing(mim):
    check_figures(mim)
    assert not over(mim, "all-gather", "data")
    # at least two bytes of every gradient, and little besides
    reduced = sum(c.count * c.bytes for c in over(mim, "all-reduce", "data"))
    assert 2 * parameters(mim) <= reduced <= 1.1 * 4 * parameters(mim)


def test_vqkd_sums_its_gradients_and_gathers_nothing(vqkd):
    check_figures(vqkd)
    assert not over(vqkd, "all-gather", "data")
    assert sum(c.count * c.bytes for c in over(vqkd, "all-reduce", "data")) >= 2 * parameters(vqkd)


def test_code_statistics_are_summed_once_a_step_in_float32(vqkd):
    arrays = [array for c in over(vqkd, "all-reduce", "data") for array in c.arrays * c.count]
    sums = [dtype for dtype, shape in arrays if sorted(shape) == [7, 251]]
    counts = [dtype for dtype, shape in arrays if sorted(shape) in ([251], [1, 251])]
    assert sums == ["f32"] and counts == ["f32"]


def test_fsdp_gathers_over_its_own_axis_only():
    plan = make("mim", **{"mesh.data": 2, "mesh.fsdp": 4, "model.width": 48, "model.mlp_dim": 96})
    check_figures(plan)
    gathered = [c for c in plan.collectives if c.kind == "all-gather"]
    assert gathered and {c.axes(plan.mesh) for c in gathered} == {("fsdp",)}
    assert over(plan, "all-reduce", "data")
