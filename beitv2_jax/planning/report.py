"""A plan in words and tables, for the terminal."""

from beitv2_jax.planning.chips import Chip
from beitv2_jax.planning.collectives import totals
from beitv2_jax.planning.figures import Forecast, batch_parts
from beitv2_jax.planning.parts import total_flops
from beitv2_jax.report.pipeline import markdown_table

GIB, TERA, GIGA, MEGA = 2**30, 1e12, 1e9, 1e6


def describe_forecast(forecast: Forecast) -> str:
    """Return all that a plan says, as text; each figure with where it comes from."""
    chip, memory, sources, config = forecast.target.chip, forecast.memory, forecast.sources, forecast.config
    made = "computed by arithmetic, nothing was compiled"
    if forecast.compile_s:
        made = f"{'compiled' if forecast.compiled else 'refused by the compiler'} after {forecast.compile_s:.0f} s"
    verdict = "fits" if forecast.fits else f"DOES NOT FIT: {memory.over / GIB:.2f} GiB over"
    mesh = " x ".join(f"{axis} {size}" for axis, size in forecast.mesh.items())
    images, steps = config.run.batch_size / batch_parts(forecast.mesh), config.efficiency.accumulation_steps
    at_once = f" ({images / steps:g} at once)" if steps > 1 else ""
    trained = sum(part.params for part in forecast.parts if not part.frozen)
    compute, hbm, interconnect = (1e3 * seconds for seconds in forecast.bounds)
    lines = [
        f"Plan of stage {config.stage} for {forecast.target.name} ({made})",
        "",
        f"chips         {forecast.target.count} x {chip.name}, mesh {mesh}, {images:g} images a chip{at_once}",
        f"peak rates    {_rates(chip)} (source: {chip.source})",
        f"parameters    {trained:,} trained",
        f"memory        {verdict}: peak {memory.peak / GIB:.2f} of {memory.usable / GIB:.2f} GiB usable a chip "
        f"(arguments {memory.arguments / GIB:.2f}, temporaries {memory.temporaries / GIB:.2f}; {sources['memory']})",
        f"FLOPs         {_flops(forecast)}",
        f"bytes moved   {forecast.bytes_moved / GIGA:.1f} GB a step and chip ({sources['bytes_moved']})",
        *_exchanges(forecast),
        f"roofline      compute {compute:.1f} ms, HBM {hbm:.1f} ms, interconnect {interconnect:.1f} ms: "
        f"{forecast.binds} binds (at peak rates, not measured)",
        f"at that rate  {1e3 * forecast.step_s:.1f} ms a step, {forecast.images_per_second:,.0f} images/s, "
        f"{forecast.num_steps:,} steps of {forecast.num_examples:,} images an epoch in {forecast.hours:,.1f} hours, "
        f"{forecast.chip_hours:,.0f} chip-hours",
        "",
        _parts_table(forecast),
        *(f"\nNote: {note}" for note in forecast.notes),
    ]
    if forecast.switches:
        lines += ["", "What would make it fit:", *(f"  {words}" for words in forecast.switches)]
    return "\n".join(lines)


def _rates(chip: Chip) -> str:
    link = "to the other GPUs of the host" if chip.per_host else "a link"
    return (
        f"{chip.flops / TERA:g} TFLOP/s bfloat16, {chip.exact_flops / TERA:.0f} in full float32, "
        f"{chip.hbm_rate / GIGA:g} GB/s memory, {chip.link_rate / GIGA:g} GB/s {link}, "
        f"{chip.network_rate / GIGA:g} GB/s network"
    )


def _flops(forecast: Forecast) -> str:
    counts = [("by arithmetic", forecast.arithmetic_flops), ("in the traced program", forecast.traced_flops)]
    counts += [("products compiled", forecast.product_flops), ("by the compiler", forecast.compiler_flops)]
    told = ", ".join(f"{count / TERA:.3f} {how}" for how, count in counts if count)
    return f"{told} (T a step and chip)"


def _exchanges(forecast: Forecast) -> list[str]:
    lines = []
    for kind, total in sorted(totals(forecast.collectives).items()):
        types = ", ".join(f"{size / MEGA:.1f} {dtype}" for dtype, size in sorted(total["bytes_by_type"].items()))
        lines.append(
            f"{kind:<13} {total['count']} a step, {total['bytes'] / MEGA:.1f} MB a chip ({types}; "
            f"{forecast.sources['collectives']})"
        )
    return lines or ["collectives   none"]


def _parts_table(forecast: Forecast) -> str:
    whole = total_flops(forecast.parts)
    rows = [("part", "parameters", "GFLOPs an image", "share")]
    for part in forecast.parts:
        count = "frozen" if part.frozen else f"{part.params:,}"
        rows.append((part.name, count, f"{part.flops / GIGA:.2f}", f"{part.flops / whole:.1%}"))
    return markdown_table(rows)


def compare_forecasts(forecasts: list[Forecast]) -> str:
    """Return a table of plans, one a row."""
    header = ("target", "mesh", "remat", "images a chip", "in steps of", "peak GiB", "ms a step", "binds", "images/s")
    rows = [(*header, "hours", "chip-hours", "")]
    for forecast in forecasts:
        efficiency, images = forecast.config.efficiency, forecast.config.run.batch_size / batch_parts(forecast.mesh)
        rows.append(
            (
                forecast.target.name,
                "x".join(map(str, forecast.mesh.values())),
                efficiency.remat,
                f"{images:g}",
                f"{images / efficiency.accumulation_steps:g}",
                f"{forecast.memory.peak / GIB:.2f}",
                f"{1e3 * forecast.step_s:.1f}",
                forecast.binds if forecast.fits else "does not fit",
                f"{forecast.images_per_second:,.0f}",
                f"{forecast.hours:,.1f}",
                f"{forecast.chip_hours:,.0f}",
                "compiled" if forecast.compiled else "computed",
            )
        )
    return markdown_table(rows)
