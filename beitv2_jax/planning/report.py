"""Print predictions as text and tables, for the terminal."""

from beitv2_jax.planning.chips import Chip
from beitv2_jax.planning.collectives import totals
from beitv2_jax.planning.prediction import Prediction, batch_shards
from beitv2_jax.report.page import markdown_table

GIB, TERA, GIGA, MEGA = 2**30, 1e12, 1e9, 1e6


def describe_prediction(prediction: Prediction) -> str:
    """Return everything that is predicted as text, each number with where it comes from."""
    target, memory, sources, config = prediction.target, prediction.memory, prediction.sources, prediction.config
    made = "estimated from the traced step, nothing was compiled"
    if prediction.compile_s:
        made = f"{'compiled' if prediction.compiled else 'refused by the compiler'} after {prediction.compile_s:.0f} s"
    verdict = "fits" if prediction.fits else f"DOES NOT FIT, {memory.excess / GIB:.2f} GiB are missing"
    mesh = " x ".join(f"{axis} {size}" for axis, size in prediction.mesh.items())
    images, steps = config.run.batch_size / batch_shards(prediction.mesh), config.efficiency.accumulation_steps
    micro_batches = f" in micro-batches of {images / steps:g}" if steps > 1 else ""
    trained = sum(component.parameters for component in prediction.components)
    compute, hbm, interconnect = (1e3 * seconds for seconds in prediction.limits)
    lines = [
        f"Plan of stage {config.stage} for {target.name} ({made})",
        "",
        f"chips         {target.count} x {target.chip.name}, mesh {mesh}, {images:g} images per chip{micro_batches}",
        f"peak rates    {_rates(target.chip)} (source: {target.chip.source})",
        f"parameters    {trained:,} trained",
        f"memory        {verdict}: peak {memory.peak / GIB:.2f} of {memory.usable / GIB:.2f} GiB usable per chip "
        f"(arguments {memory.arguments / GIB:.2f}, temporaries {memory.temporaries / GIB:.2f}; {sources['memory']})",
        f"FLOPs         {_flops(prediction)}",
        f"memory access {prediction.bytes_moved / GIGA:.1f} GB per step and chip ({sources['bytes_moved']})",
        *_collectives(prediction),
        f"roofline      compute {compute:.1f} ms, HBM {hbm:.1f} ms, interconnect {interconnect:.1f} ms: "
        f"{prediction.bottleneck} is the bottleneck (at peak rates, not measured)",
        f"at that rate  {1e3 * prediction.step_s:.1f} ms per step, {prediction.images_per_second:,.0f} images/s, "
        f"{prediction.num_steps:,} steps (epochs of {prediction.num_examples:,} images) in "
        f"{prediction.hours:,.1f} hours, {prediction.chip_hours:,.0f} chip-hours",
        "",
        _components_table(prediction),
        *(f"\nNote: {note}" for note in prediction.notes),
    ]
    if prediction.remedies:
        lines += ["", "What would make it fit:", *(f"  {remedy}" for remedy in prediction.remedies)]
    return "\n".join(lines)


def _rates(chip: Chip) -> str:
    link = "to the other GPUs of the host" if chip.per_host else "per link"
    return (
        f"{chip.flops / TERA:g} TFLOP/s bfloat16, {chip.exact_flops / TERA:.0f} in full float32, "
        f"{chip.hbm_rate / GIGA:g} GB/s memory, {chip.link_rate / GIGA:g} GB/s {link}, "
        f"{chip.network_rate / GIGA:g} GB/s network"
    )


def _flops(prediction: Prediction) -> str:
    compiled = f", {prediction.compiled_flops / TERA:.3f} compiled" if prediction.compiled_flops else ""
    return f"{prediction.traced_flops / TERA:.3f} T per step and chip traced{compiled}"


def _collectives(prediction: Prediction) -> list[str]:
    lines = []
    for kind, total in sorted(totals(prediction.collectives).items()):
        types = ", ".join(f"{size / MEGA:.1f} {dtype}" for dtype, size in sorted(total["bytes_by_type"].items()))
        lines.append(
            f"{kind:<13} {total['count']} per step, {total['bytes'] / MEGA:.1f} MB per chip ({types}; "
            f"{prediction.sources['collectives']})"
        )
    return lines or ["collectives   none"]


def _components_table(prediction: Prediction) -> str:
    whole = sum(component.flops for component in prediction.components)
    rows = [("component", "parameters", "GFLOPs per image", "fraction", "MB saved per image")]
    for component in prediction.components:
        rows.append(
            (
                component.name,
                "frozen" if component.frozen else f"{component.parameters:,}",
                f"{component.flops / GIGA:.2f}",
                f"{component.flops / whole:.1%}",
                f"{component.saved_bytes / MEGA:.1f}",
            )
        )
    return markdown_table(rows)


def compare_predictions(predictions: list[Prediction]) -> str:
    """Return a table of predictions, one per row."""
    header = ("target", "mesh", "remat", "images per chip", "micro-batch", "peak GiB", "ms per step", "bottleneck")
    rows = [(*header, "images/s", "hours", "chip-hours", "source")]
    for prediction in predictions:
        efficiency = prediction.config.efficiency
        images = prediction.config.run.batch_size / batch_shards(prediction.mesh)
        rows.append(
            (
                prediction.target.name,
                "x".join(map(str, prediction.mesh.values())),
                efficiency.get("remat", "none"),
                f"{images:g}",
                f"{images / efficiency.accumulation_steps:g}",
                f"{prediction.memory.peak / GIB:.2f}",
                f"{1e3 * prediction.step_s:.1f}",
                prediction.bottleneck if prediction.fits else "does not fit",
                f"{prediction.images_per_second:,.0f}",
                f"{prediction.hours:,.1f}",
                f"{prediction.chip_hours:,.0f}",
                "compiled" if prediction.compiled else "traced",
            )
        )
    return markdown_table(rows)
