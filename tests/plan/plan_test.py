"""Small steps compiled for TPUs that are not here: which collectives the chips would run. Needs the extra `plan`."""

import math

import jax
import pytest

from beitv2_jax.planning import planner, topologies
from beitv2_jax.planning.chips import CHIPS
from beitv2_jax.training import sharding
from tests.planning.small_configs import small

TARGET = "v5e:2x4"
MIM = {"model.depth": 2, "model.early_layer": 1, "model.head_depth": 1}
CODEBOOK = {"model.codebook_size": 251, "model.code_dim": 7}  # shapes that nothing else has
VQKD = {**CODEBOOK, "model.encoder.depth": 1, "model.decoder.depth": 1}
TPUS = [chip for chip in CHIPS.values() if chip.platform == "tpu"]


@pytest.fixture(scope="module", autouse=True)
def _compilers():
    planner.start_compilers()


def make(stage, target=TARGET, **keys):
    config = small(stage, "bfloat16", **{"run.batch_size": 32, **keys})
    return planner.compile_and_predict(planner.prepare(config, 1000), topologies.parse(target))


def parameters(plan):
    return sum(component.parameters for component in plan.components)


def over(plan, kind, axis):
    return [c for c in plan.collectives if c.kind == kind and axis in c.axes(plan.mesh)]


def kinds(plan, axis):
    """Return the kinds of collectives between chips that differ along an axis."""
    return {c.kind for c in plan.collectives if axis in c.axes(plan.mesh)}


def reduced(plan):
    """Return the bytes by element type that a step sums over `data`."""
    sums = {}
    for c in over(plan, "all-reduce", "data"):
        for dtype, size in c.dtypes.items():
            sums[dtype] = sums.get(dtype, 0) + c.count * size
    return sums


@pytest.fixture(scope="module")
def mim():
    return make("mim", **MIM)


@pytest.fixture(scope="module")
def half_gradients():
    return make("mim", **MIM, **{"efficiency.gradient_dtype": "bfloat16"})


@pytest.fixture(scope="module")
def vqkd():
    return make("vqkd", **VQKD)


@pytest.fixture(scope="module")
def accumulated():
    return make("vqkd", **VQKD, **{"efficiency.accumulation_steps": 2})


def check_metrics(plan, again=0.0):
    """Check that the metrics agree; `again` is the fraction of products that the compiler may repeat."""
    assert plan.compiled and plan.fits and 0 < plan.memory.arguments < plan.memory.peak
    assert 1 - 1e-6 < plan.compiled_flops / plan.traced_flops < 1 + again + 1e-6
    # each parameter is read and written, at least
    assert plan.bytes_moved > 2 * 4 * parameters(plan) / plan.mesh["fsdp"]


@pytest.mark.parametrize("chip", TPUS, ids=lambda chip: chip.name)
def test_every_slice_that_is_rented_has_a_topology_and_a_mesh(chip):
    for target in topologies.rented(chip):
        devices = topologies.devices(target)
        mesh = sharding.make_mesh(devices=devices)
        network = target.network(list(mesh.devices.flat))
        assert len(devices) == target.count == len({tuple(place) for place in network.coords.tolist()})
    assert target.count == 256


def test_several_slices_share_the_data_axis():
    target = topologies.parse("v6e:2x4*2")
    mesh = sharding.make_mesh(fsdp=4, devices=topologies.devices(target))
    slices = [[device.slice_index for device in row.flat] for row in mesh.devices]
    assert slices == [[0] * 4, [0] * 4, [1] * 4, [1] * 4]


@pytest.mark.parametrize(
    "target", [*(pytest.param(name, marks=pytest.mark.long) for name in ("v4:2x2x1", "v5p:2x2x1")), "v6e:2x2"]
)
def test_other_chips_sum_their_gradients_too(target):
    plan = make("finetune", target, **{"model.depth": 1})
    check_metrics(plan, again=0.02)  # v6e: the logits of attention, for each of three that read them
    assert kinds(plan, "data") == {"all-reduce", "collective-permute"}  # mixup pairs rows of different chips
    assert sum(reduced(plan).values()) >= 2 * parameters(plan)


@pytest.mark.long
def test_between_slices_the_sums_go_over_the_network():
    plan = make("finetune", "v5e:2x2*2", **{"model.depth": 1})
    check_metrics(plan)
    between = [c for c in plan.collectives if len({device // 4 for device in c.groups[0]}) == 2]
    sums = sum(c.bytes for c in between if c.kind == "all-reduce")
    # each chip of a slice sends a fraction of the sum to its counterparts, and no chip the whole
    assert 4 * parameters(plan) / 4 <= sums < 4 * 4 * parameters(plan)
    assert plan.interconnect_s > sums / plan.target.chip.network_rate


def test_mim_sums_its_gradients_in_float32_and_gathers_nothing(mim):
    check_metrics(mim)
    assert kinds(mim, "data") == {"all-reduce"}
    sums = reduced(mim)
    assert 0.98 * 4 * parameters(mim) <= sums["f32"] <= 1.02 * 4 * parameters(mim)
    assert sums.get("bf16", 0) <= 0.02 * 4 * parameters(mim)  # biases, which leave their products as they are


def test_gradients_in_bfloat16_halve_what_is_summed(mim, half_gradients):
    check_metrics(half_gradients)
    sums = reduced(half_gradients)
    assert sums["bf16"] > 0.9 * 2 * parameters(half_gradients)
    assert sum(sums.values()) < 0.6 * sum(reduced(mim).values())


def code_statistics(plan):
    """Return the element types of the sums over `data` of code vectors, once for each time."""
    arrays = [array for c in over(plan, "all-reduce", "data") for array in c.arrays * c.count]
    return [dtype for dtype, shape in arrays if sorted(shape)[-2:] in ([7, 251], [8, 251])]


def test_vqkd_sums_its_gradients_and_gathers_nothing(vqkd):
    check_metrics(vqkd)
    assert kinds(vqkd, "data") == {"all-reduce"}
    assert sum(reduced(vqkd).values()) >= 0.98 * 4 * parameters(vqkd)


def test_code_statistics_are_summed_once_a_step_in_float32(vqkd):
    assert code_statistics(vqkd) == ["f32"]


@pytest.mark.long
def test_accumulation_runs_the_same_products_and_sums_most_gradients_once(vqkd, accumulated):
    check_metrics(accumulated)
    assert accumulated.compiled_flops == vqkd.compiled_flops
    assert kinds(accumulated, "data") == {"all-reduce"}  # no row changes chips
    sums, whole = code_statistics(accumulated), sum(reduced(vqkd).values())
    assert sums == ["f32"]
    assert sum(reduced(accumulated).values()) < 1.3 * whole


def test_fsdp_gathers_weights_alone_and_over_its_own_axis():
    keys = {"mesh.data": 2, "mesh.fsdp": 4, "model.width": 48, "model.mlp_dim": 96, "run.batch_size": 32}
    step = planner.prepare(small("mim", "bfloat16", **MIM, **keys), 1000)
    plan = planner.compile_and_predict(step, topologies.parse(TARGET))
    check_metrics(plan)
    gathered = [c for c in plan.collectives if c.kind == "all-gather"]
    assert gathered and {c.axes(plan.mesh) for c in gathered} == {("fsdp",)}
    weights = {leaf.size for leaf in jax.tree.leaves(step.state.params)}
    assert {math.prod(shape) for c in gathered for _, shape in c.arrays} <= weights
    assert "all-reduce" in kinds(plan, "data")
