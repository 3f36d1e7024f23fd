"""Compiled programs read from their text: products, loops and memory access."""

import jax
import jax.numpy as jnp
import pytest

from beitv2_jax.planning.program import (
    flops_by_type,
    memory_bytes,
    product_flops,
    read_program,
)
from beitv2_jax.planning.traced import traced_flops

DEPTH, ROWS, WIDTH, INNER = 5, 67, 24, 36


def program(*lines, other=""):
    return read_program("\n".join(["HloModule step", other, "ENTRY %main (p: f32[3]) -> f32[3] {", *lines, "}"]))


def layer(x, weights):
    return x + jnp.tanh(x @ weights["a"]) @ weights["b"]


def scanned(x, weights):
    return jax.lax.scan(lambda x, w: (layer(x, w), None), x, weights)[0].sum()


def unrolled(x, weights):
    for i in range(DEPTH):
        x = layer(x, jax.tree.map(lambda w, i=i: w[i], weights))
    return x.sum()


def shapes():
    weights = {"a": (DEPTH, WIDTH, INNER), "b": (DEPTH, INNER, WIDTH)}
    make = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    return make((ROWS, WIDTH)), {name: make(shape) for name, shape in weights.items()}


@pytest.fixture(scope="module")
def compiled():
    return {
        function: jax.jit(jax.grad(function, (0, 1))).lower(*shapes()).compile() for function in (scanned, unrolled)
    }


def test_the_products_of_a_scan_are_those_of_its_trace(compiled):
    program = read_program(compiled[scanned].as_text())
    assert product_flops(program) == traced_flops(jax.grad(scanned, (0, 1)), *shapes())
    # of the last layer nothing needs its output: the sum alone is differentiated
    needless = 2 * ROWS * INNER * WIDTH
    assert product_flops(read_program(compiled[unrolled].as_text())) == product_flops(program) - needless


def test_a_scan_costs_what_the_unrolled_program_does(compiled):
    scan, plain = compiled[scanned], compiled[unrolled]
    whole = plain.cost_analysis()
    looped, unlooped = (read_program(one.as_text()) for one in (scan, plain))
    assert scan.cost_analysis()["flops"] < 0.3 * whole["flops"]  # the compiler counts the body of a loop once
    assert product_flops(looped) == pytest.approx(whole["flops"], rel=0.06)
    # this compiler's own count, of a processor that keeps nothing beside its memory
    assert memory_bytes(unlooped) == pytest.approx(whole["bytes accessed"], rel=0.15)
    # a scan also writes what it keeps into one array for all rounds
    assert memory_bytes(unlooped) < memory_bytes(looped) < 2.5 * memory_bytes(unlooped)


def test_products_over_batches_written_as_convolutions():
    """A TPU's compiler writes 7 x 3 products of 5 x 11 by 11 x 13 as a window of which one place in 7 x 3 counts."""
    found = program(
        "  %a = bf16[7,5,11,3]{3,2,1,0} parameter(0)",
        "  %b = bf16[7,13,3,11]{3,2,1,0} parameter(1)",
        "  ROOT %c = f32[7,3,5,13]{3,2,1,0:T(8,128)(2,1)S(1)} convolution(%a, %b), "
        "window={size=7x3 stride=6x2 lhs_dilate=7x3}, dim_labels=0bf1_0o1i->01bf",
    )
    assert product_flops(found) == 2 * 7 * 3 * 5 * 13 * 11


def test_padding_and_groups_of_convolutions():
    found = program(
        "  %a = f32[2,9,6]{2,1,0} parameter(0)",
        "  %k = f32[3,3,4]{2,1,0} parameter(1)",
        "  ROOT %c = f32[2,9,4]{2,1,0} convolution(%a, %k), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f, "
        "feature_group_count=2",
    )
    assert product_flops(found) == 2 * 2 * 4 * 3 * (9 * 3 - 2)


def test_rounds_of_a_loop_read_their_slice_of_what_stands_for_all():
    fused = (
        "%part (w: f32[5,7], i: s32[]) -> f32[7] {\n  %w = f32[5,7]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n"
        "  %s = f32[1,7]{1,0} dynamic-slice(%w, %i, %z), dynamic_slice_sizes={1,7}\n"
        "  ROOT %o = f32[7]{0} bitcast(%s)\n}\n"
        "%whole (y: f32[5,7], v: f32[7], i: s32[]) -> f32[5,7] {\n  %y = f32[5,7]{1,0} parameter(0)\n"
        "  %v = f32[1,7]{1,0} parameter(1)\n  %j = s32[] parameter(2)\n"
        "  ROOT %u = f32[5,7]{1,0} dynamic-update-slice(%y, %v, %j, %z)\n}\n"
    )
    body = (
        "%body (t: (f32[5,7])) -> (f32[5,7]) {\n  %t = (f32[5,7]{1,0}, s32[]) parameter(0)\n"
        "  %all = f32[5,7]{1,0} get-tuple-element(%t), index=0\n  %n = s32[] get-tuple-element(%t), index=1\n"
        "  %f = f32[7]{0} fusion(%all, %n), kind=kLoop, calls=%part\n"
        "  %g = f32[5,7]{1,0} fusion(%all, %f, %n), kind=kLoop, calls=%whole\n}\n"
    )
    loop = '  %w = (f32[5,7]) while(%a), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}'
    found = program(loop, other=fused + body)
    read, written = (28 + 4) + 28, (28 + 4) + 28  # a slice or what replaces it, and the index; the result
    assert memory_bytes(found) == 5 * (read + written)


def loop_of(*condition):
    body = "%body (t: (s32[])) -> (s32[]) {\n  %x = f32[3,5]{1,0} dot(%p, %q), lhs_contracting_dims={1}\n}\n"
    body = body.replace("%x =", "%p = f32[3,7]{1,0} parameter(0)\n  %q = f32[7,5]{1,0} parameter(1)\n  %x =")
    lines = "\n".join(f"  {line}" for line in condition)
    return program(
        "  %w = (s32[], f32[3,5]) while(%t), condition=%below, body=%body",
        other=f"{body}%below (t: (s32[])) -> pred[] {{\n{lines}\n}}\n",
    )


def test_rounds_that_a_tpu_program_tells_by_its_condition_alone():
    one = 2 * 3 * 7 * 5
    i, bound = "%i = s32[]{:T(128)} get-tuple-element(%t), index=0", "%n = s32[]{:T(128)} constant(12)"
    counted = loop_of("%t = (s32[]) parameter(0)", i, bound, "ROOT %less = pred[] compare(%i, %n), direction=LT")
    assert product_flops(counted) == 12 * one
    # until something else than a number of rounds
    unknown = loop_of(i, bound, "%a = pred[] compare(%i, %n), direction=LT", "ROOT %b = pred[] and(%a, %done)")
    assert product_flops(unknown) == one


def test_kernels_state_their_products():
    found = program(
        "  %a = bf16[6,9]{1,0} parameter(0)",
        "  %b = f32[9,4]{1,0} parameter(1)",
        "  %d = f32[6,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        '  ROOT %k = f32[6,4]{1,0} custom-call(%d), custom_call_target="tpu_custom_call", '
        'backend_config={"custom_call_config":{"cost_estimate":{"flops":"131","transcendentals":"0"}}}',
    )
    assert product_flops(found) == 2 * 6 * 9 * 4 + 131
    assert flops_by_type(found) == {"bf16 x f32": 2 * 6 * 9 * 4, "kernels": 131}


def test_what_stays_on_a_core_moves_nothing_to_memory():
    found = program(
        "  %a = f32[8,16]{1,0:T(8,128)} parameter(0)",
        "  %c = (f32[8,16]{1,0:T(8,128)S(1)}, f32[8,16]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)",
        "  %d = f32[8,16]{1,0:T(8,128)S(1)} copy-done(%c)",
        "  %s = ((f32[8,16]{1,0:T(8,128)}), f32[2,16]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:2]}",
        "  %n = f32[8,16]{1,0:T(8,128)S(1)} negate(%d)",
        "  ROOT %e = f32[8,16]{1,0:T(8,128)} exponential(%n)",
    )
    assert memory_bytes(found) == 4 * (8 * 16 + 2 * 16 + 8 * 16)
