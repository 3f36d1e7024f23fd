"""How time, memory and work of a compiled program are taken: warmed, in several samples, with their spread."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from beitv2_jax.planning.chips import CHIPS, Chip
from beitv2_jax.planning.program import product_flops, read_program
from beitv2_jax.planning.traced import RECOMPUTED

KINDS = {
    "H200": "h200",
    "H100": "h100",
    "A100": "a100",
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
"""What a device's own description contains -> the chip in the table of peaks; the first that fits."""


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long a measurement takes: seconds of one sample, and samples."""

    seconds: float
    samples: int


FULL, QUICK = Effort(1.0, 7), Effort(0.3, 5)


def samples(runs: Mapping[str, Callable[[], Any]], effort: Effort) -> dict[str, list[float]]:
    """Return seconds of a call of each of `runs`, in samples; they take turns, so that all meet the same machine.

    A run starts work and returns what must be waited for. Each is called twice before anything is measured.
    """
    counts = {}
    for name, run in runs.items():
        jax.block_until_ready(run())
        counts[name] = max(1, round(effort.seconds / max(_seconds(run, 1), 1e-6)))
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(effort.samples):
        for name, run in runs.items():
            found[name].append(_seconds(run, counts[name]))
    return found


def _seconds(run: Callable[[], Any], count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        outputs = run()
    jax.block_until_ready(outputs)
    return (time.perf_counter() - started) / count


def spread(values: list[float]) -> dict[str, Any]:
    """Return median, lowest and highest of samples, and the samples."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "samples": values}


def rates(seconds: list[float], count: int) -> dict[str, Any]:
    """Return `count` a second, as `spread` does."""
    return spread([count / value for value in seconds])


def compiled_flops(compiled: jax.stages.Compiled, lowered: jax.stages.Lowered) -> tuple[float | None, str]:
    """Return the FLOPs of the products and convolutions of the compiled program, and the source of the count.

    Where its text shows none, as with a library's convolutions, the count is that before optimisation.
    """
    if flops := product_flops(read_program(compiled.as_text())):
        return flops, "compiled program"
    costs = lowered.cost_analysis() or {}
    return (costs["flops"], "program before optimisation") if costs.get("flops", 0) > 0 else (None, "not counted")


def work(arithmetic: int, counted: Mapping[str, Any]) -> dict[str, Any]:
    """Return FLOPs by arithmetic beside those that were counted, and the ratios of the counts to it."""
    ratios = {
        f"{name}_ratio": counted[name] / arithmetic if arithmetic and counted[name] else None
        for name in ("traced", "compiler")
    }
    return {"arithmetic": arithmetic, **counted, **ratios}


def peak_bytes(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """Return the peak memory, as the device reports it, or what the compiled program asks for."""
    in_use = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    planned = planned_bytes(compiled)
    if in_use:
        return {"bytes": in_use, "source": "device", "planned": planned}
    return {"bytes": planned, "source": "compiled program", "planned": planned}


def planned_bytes(compiled: jax.stages.Compiled) -> int:
    """Return the bytes of a program's arguments, temporaries and outputs that are not written into arguments."""
    sizes = compiled.memory_analysis()
    outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + outputs


def this_chip() -> Chip | None:
    """Return the row of the table of peaks for the device in use; None for a CPU, or a device that is not in it."""
    kind = jax.devices()[0].device_kind
    return next((CHIPS[name] for part, name in KINDS.items() if part in kind), None)


def utilisation(flops: float, seconds: list[float]) -> dict[str, Any] | None:
    """Return the share of the chip's dense bfloat16 peak that `flops` in these times are; None where it has no peak."""
    chip = this_chip()
    return rates(seconds, flops / chip.flops) if chip else None


def measure_step(step: Any, effort: Effort) -> dict[str, Any]:
    """Return what is to be known of a `steps.Step`: rates, memory, work by part, compile time."""
    started = time.perf_counter()
    compiled = step.lowered.compile()
    compile_seconds = time.perf_counter() - started
    (seconds,) = samples({"": step.start(compiled)}, effort).values()
    flops, source = compiled_flops(compiled, step.lowered)
    by_component = {name: flops for name, flops in step.flops.items() if name != RECOMPUTED}
    arithmetic = sum(by_component.values())
    counted = {"traced": step.traced_flops, "compiler": flops, "compiler_source": source}
    return {
        "batch_size": step.images,
        "parameters": step.parameters,
        "chosen": dict(step.implementations),
        "seconds": spread(seconds),
        "images_per_second": rates(seconds, step.images),
        "flops": {
            **work(arithmetic, counted),
            "per_image": {name: flops / step.images for name, flops in by_component.items()},
        },
        "utilisation": utilisation(arithmetic, seconds),
        "peak_memory": peak_bytes(compiled),
        "compile_seconds": compile_seconds,
    }
