"""A plan in words and tables, for the terminal."""

from beitv2_jax.planning.accounting import total_flops
from beitv2_jax.planning.collectives import totals
from beitv2_jax.planning.figures import Plan, batch_parts
from beitv2_jax.report.pipeline import markdown_table

GIB, TERA, GIGA = 2**30, 1e12, 1e9


def describe_plan(plan: Plan) -> str:
    """Return all that a plan says, as text."""
    chip, memory = plan.target.chip, plan.memory
    made = "computed by arithmetic, nothing was compiled"
    if plan.compile_s:
        made = f"{'compiled' if plan.compiled else 'refused by the compiler'} after {plan.compile_s:.0f} s"
    sized = "the compiler's" if plan.compile_s else "computed"
    compiler = (
        f"{plan.compiler_flops / TERA:.3f} by the compiler" if plan.compiler_flops else "not counted by the compiler"
    )
    traced = f"{plan.traced_flops / TERA:.3f} in the traced program, " if plan.traced_flops else ""
    counted = "compiled" if plan.compiler_flops else "computed"
    verdict = "fits" if plan.fits else f"DOES NOT FIT: {memory.over / GIB:.2f} GiB over"
    how = "compiled" if plan.compiled else "computed"
    images = plan.config.run.batch_size / batch_parts(plan.mesh)
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    trained = sum(part.params for part in plan.parts if not part.frozen)
    lines = [
        f"Plan of stage {plan.config.stage} for {plan.target.name} ({made})",
        "",
        f"chips         {plan.target.count} x {chip.name}, mesh {mesh}, {images:g} images a chip",
        f"parameters    {trained:,} trained",
        f"memory        {verdict}: peak {memory.peak / GIB:.2f} of {memory.usable / GIB:.2f} GiB usable a chip "
        f"(arguments {memory.arguments / GIB:.2f}, temporaries {memory.temporaries / GIB:.2f}; {sized})",
        f"FLOPs         {plan.arithmetic_flops / TERA:.3f} T a step and chip by arithmetic, {traced}{compiler}",
        f"bytes moved   {plan.bytes_moved / GIGA:.1f} GB a step and chip ({counted})",
    ]
    for kind, total in sorted(totals(plan.collectives).items()):
        lines.append(f"{kind:<13} {total['count']} a step, {total['bytes'] / 1e6:.1f} MB a chip ({how})")
    if not plan.collectives:
        lines.append("collectives   none")
    compute, hbm, interconnect = (1e3 * seconds for seconds in plan.bounds)
    lines += [
        f"roofline      compute {compute:.1f} ms, HBM {hbm:.1f} ms, interconnect {interconnect:.1f} ms: "
        f"{plan.binds} binds",
        f"at that rate  {1e3 * plan.step_s:.1f} ms a step, {plan.images_per_second:,.0f} images/s, {plan.num_steps:,} "
        f"steps of {plan.num_examples:,} images an epoch in {plan.hours:,.1f} hours, {plan.chip_hours:,.0f} chip-hours",
        "",
        _parts_table(plan),
    ]
    lines += [f"\nNote: {note}" for note in plan.notes]
    if plan.switches:
        lines += ["", "What would make it fit:", *(f"  {words}" for words in plan.switches)]
    return "\n".join(lines)


def _parts_table(plan: Plan) -> str:
    whole = total_flops(plan.parts)
    rows = [("part", "parameters", "GFLOPs an image", "share")]
    for part in plan.parts:
        count = "frozen" if part.frozen else f"{part.params:,}"
        rows.append((part.name, count, f"{part.flops / GIGA:.2f}", f"{part.flops / whole:.1%}"))
    return markdown_table(rows)


def compare_plans(plans: list[Plan]) -> str:
    """Return a table of plans, one a row."""
    rows = [
        (
            "target",
            "mesh",
            "remat",
            "images a chip",
            "peak GiB",
            "ms a step",
            "binds",
            "images/s",
            "hours",
            "chip-hours",
            "",
        )
    ]
    for plan in plans:
        rows.append(
            (
                plan.target.name,
                "x".join(map(str, plan.mesh.values())),
                "yes" if plan.config.efficiency.remat else "no",
                f"{plan.config.run.batch_size / batch_parts(plan.mesh):g}",
                f"{plan.memory.peak / GIB:.2f}",
                f"{1e3 * plan.step_s:.1f}",
                plan.binds if plan.fits else "does not fit",
                f"{plan.images_per_second:,.0f}",
                f"{plan.hours:,.1f}",
                f"{plan.chip_hours:,.0f}",
                "compiled" if plan.compiled else "computed",
            )
        )
    return markdown_table(rows)
