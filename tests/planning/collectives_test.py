"""Collectives read out of compiled programs: of short committed texts of TPU and GPU programs, and of real CPU ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from beitv2_jax.planning import collectives
from beitv2_jax.planning.collectives import totals
from beitv2_jax.planning.program import read_program
from beitv2_jax.training import sharding

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def find_collectives(text, num_devices, num_slices=1):
    return collectives.find_collectives(read_program(text), num_devices, num_slices)


def program(*lines, other=""):
    return "\n".join(["HloModule step", other, "ENTRY %main (p: f32[3]) -> f32[3] {", *lines, "}"])


def only(*lines, num_devices=8, other=""):
    (found,) = find_collectives(program(*lines, other=other), num_devices)
    return found


def test_a_joined_all_reduce_of_a_tpu():
    found = only(
        "  %all-reduce.69 = (f32[]{:T(128)}, f32[192]{0:T(256)S(1)}, /*index=5*/bf16[7,11]{1,0:T(8,128)(2,1)S(1)}) "
        "all-reduce(%a, %b, %c), channel_id=2, replica_groups=mesh['axis_0'=8] {'axis_0'}, use_global_device_ids=true, "
        'to_apply=%region_18.25.clone, metadata={op_name="jit(train_step)/jvp()/reduce_sum" stack_frame_id=45}'
    )
    assert found.kind == "all-reduce"
    assert found.arrays == (("f32", ()), ("f32", (192,)), ("bf16", (7, 11)))
    assert found.dtypes == {"f32": 4 + 768, "bf16": 154}
    assert found.bytes == 926
    assert found.groups == ((0, 1, 2, 3, 4, 5, 6, 7),)


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,3},{1,2}}", ((0, 3), (1, 2))),
        ("{}", (tuple(range(8)),)),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=2,'b'=4] {'a','b'}", (tuple(range(8)),)),
        ("mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'b'}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['a'=8] {'a':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=8] {'a':(4)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
    ],
)
def test_every_way_to_write_groups(written, groups):
    found = only(f"  %x = f32[5]{{0}} all-reduce(%p), channel_id=1, replica_groups={written}, to_apply=%add")
    assert found.groups == groups


def test_axes_of_groups():
    found = only("  %x = f32[5]{0} all-reduce(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add")
    assert found.axes(MESH) == ("tensor",)
    found = only("  %x = f32[5]{0} all-reduce(%p), replica_groups={{0,1,4,5},{2,3,6,7}}, to_apply=%add")
    assert found.axes(MESH) == ("data", "tensor")
    found = only("  %x = f32[5]{0} collective-permute(%p), source_target_pairs={{0,2},{2,0}}")
    assert found.axes(MESH) == ("fsdp",)


@pytest.mark.parametrize(
    ("result", "operation", "size"),
    [
        ("f32[8,3]{1,0}", "all-gather(%p)", 96),
        ("(f32[2,3]{1,0}, f32[8,3]{1,0})", "all-gather-start(%p)", 96),
        ("f32[2,3]{1,0}", "reduce-scatter(%p)", 24 * 4),
        ("((f32[8,3]{1,0}), f32[2,3]{1,0})", "reduce-scatter-start(%p)", 24 * 4),
        ("(bf16[5,7]{1,0}, bf16[5,7]{1,0}, u32[], u32[])", "collective-permute-start(%p)", 70),
        ("(f32[4,1]{1,0}, f32[4,1]{1,0})", "all-to-all(%p, %q)", 32),
        ("pred[9]{0}", "all-reduce(%p)", 9),
        ("f32[5]{0}", "all-reduce-start(%p)", 20),
    ],
)
def test_bytes_are_those_of_the_largest_side(result, operation, size):
    groups = "source_target_pairs={{0,1}}" if "permute" in operation else "replica_groups=[2,4]<=[8]"
    assert only(f"  %x = {result} {operation}, channel_id=1, {groups}").bytes == size


def test_the_end_of_an_asynchronous_operation_is_not_counted_again():
    start = "  %s = (f32[2]{0}, f32[8]{0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}"
    done = "  %d = f32[8]{0} all-gather-done(%s)"
    use = "  %all-gather.7 = f32[8]{0} add(%all-reduce.3, %d)"
    assert totals(find_collectives(program(start, done, use), 8)) == {
        "all-gather": {"count": 1, "bytes": 32, "bytes_by_type": {"f32": 32}}
    }


def test_what_goes_between_slices_is_found_where_the_hosts_get_it():
    handed = 'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
    reduced = (
        "  %send.2 = (f32[1,1,128]{2,1,0:T(1,128)}, u32[], token[]) send(%a, %after-all.2), channel_id=48, "
        + handed
        + '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    moved = (
        "  %send = (bf16[4,13]{1,0}, u32[], token[]) send(%b, %after-all), channel_id=7, "
        + handed
        + '_xla_megascale_target={{100000->200003},{200002->100001}},_xla_megascale_transfer_type="ONE_TO_ONE"}'
    )
    received = "  %recv = (f32[1,1,128]{2,1,0}, u32[], token[]) recv(%after-all.2), channel_id=49, " + handed + "}"
    inside = "  %x = f32[5]{0} reduce-scatter(%p), replica_groups=[1,4]<=[4], dimensions={0}"
    sum_, permuted, scattered = find_collectives(program(reduced, moved, received, inside), 8, 2)
    assert (sum_.kind, sum_.bytes, sum_.groups) == ("all-reduce", 512, ((0, 4), (1, 5), (2, 6), (3, 7)))
    assert (permuted.kind, permuted.bytes, permuted.groups) == ("collective-permute", 104, ((0, 7), (6, 1)))
    assert (scattered.kind, scattered.groups) == ("reduce-scatter", ((0, 1, 2, 3),))


def test_totals_tell_the_element_types():
    lines = [
        f"  %x{dtype} = {dtype}[5]{{0}} all-reduce(%p), replica_groups={{}}, to_apply=%add" for dtype in ("f32", "bf16")
    ]
    assert totals(find_collectives(program(*lines), 8))["all-reduce"] == {
        "count": 2,
        "bytes": 30,
        "bytes_by_type": {"f32": 20, "bf16": 10},
    }


def test_groups_of_one_exchange_nothing():
    assert (
        find_collectives(program("  %x = f32[5]{0} all-reduce(%p), replica_groups={{0},{1}}, to_apply=%add"), 2) == []
    )


def test_a_loop_counts_its_body_as_often_as_it_runs():
    body = "%body (a: f32[]) -> f32[] {\n  %x = f32[3]{0} all-reduce(%p), replica_groups={}, to_apply=%add\n}\n"
    fused = "%fused (a: f32[]) -> f32[] {\n  %y = f32[2]{0} all-reduce(%p), replica_groups={}, to_apply=%add\n}\n"
    outer = "%outer (a: f32[]) -> f32[] {\n  %w = f32[] while(%a), condition=%c, body=%body, backend_config=TRIPS5\n}\n"
    text = program(
        "  %w = f32[] while(%a), condition=%c, body=%outer, backend_config=TRIPS3",
        "  %f = f32[] fusion(%a), kind=kCustom, calls=%fused",
        other=body + fused + outer,
    )
    for count in (3, 5):
        text = text.replace(f"TRIPS{count}", f'{{"known_trip_count":{{"n":"{count}"}}}}')
    found = {collective.arrays[0][1]: collective for collective in find_collectives(text, 8)}
    assert (found[(3,)].count, found[(2,)].count) == (15, 1)


def test_the_body_of_a_loop_of_unknown_length_counts_once():
    body = "%body (a: f32[]) -> f32[] {\n  %x = f32[3]{0} all-reduce(%p), replica_groups={}, to_apply=%add\n}\n"
    found = only("  %w = f32[] while(%a), condition=%c, body=%body", other=body)
    assert found.count == 1


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(**MESH)


def compiled(mesh, function, shapes, out):
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in shapes]
    text = jax.jit(function, out_shardings=NamedSharding(mesh, out)).lower(*inputs).compile().as_text()
    return find_collectives(text, mesh.size)


def test_a_product_over_a_split_dimension_is_reduced(mesh):
    (found,) = compiled(mesh, jnp.matmul, [((14, 6), P(None, "data")), ((6, 10), P("data"))], P())
    assert (found.kind, found.bytes, found.axes(MESH)) == ("all-reduce", 4 * 14 * 10, ("data",))


def test_a_split_array_is_gathered(mesh):
    (found,) = compiled(mesh, lambda a: a * 2, [((8, 6), P(("data", "fsdp")))], P())
    assert (found.kind, found.bytes, found.axes(MESH)) == ("all-gather", 4 * 48, ("data", "fsdp"))


def test_a_roll_over_a_split_axis_is_a_permutation(mesh):
    (found,) = compiled(mesh, lambda a: jnp.roll(a, 1, 0), [((8, 6), P("fsdp"))], P("fsdp"))
    assert (found.kind, found.bytes, found.axes(MESH)) == ("collective-permute", 4 * 6, ("fsdp",))


def test_a_reduction_in_a_scan_runs_every_round(mesh):
    def rounds(carry, weights):
        def body(carry, _):
            return jnp.tanh(jax.lax.with_sharding_constraint(carry @ weights, NamedSharding(mesh, P()))), None

        return jax.lax.scan(body, carry, None, length=5)[0]

    found = compiled(mesh, rounds, [((8, 4), P(None, "tensor")), ((4, 4), P("tensor"))], P())
    assert sum(c.count for c in found if c.kind == "all-reduce") == 5


def test_the_whole_mesh_reduces_a_mean(mesh):
    (found,) = compiled(mesh, jnp.sum, [((8, 3), P(("data", "fsdp", "tensor")))], P())
    assert np.array_equal(np.sort(found.groups[0]), np.arange(8))
