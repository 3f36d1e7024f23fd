"""Look for better plans: the switches that make a step fit, and the best meshes and batches for a kind of chip."""

import dataclasses
import time
from collections.abc import Callable, Iterator

from absl import logging

from beitv2_jax.errors import UserError
from beitv2_jax.planning import planner, topologies
from beitv2_jax.planning.chips import find_chip
from beitv2_jax.planning.figures import Forecast, batch_parts
from beitv2_jax.planning.planner import Stage
from beitv2_jax.planning.topologies import Target

SHOWN = 5
SHOWN_OF_A_TARGET = 2
"""... of them where numbers of chips are compared too."""
NEAR = 1.1
"""Plans that cost at most so many times the cheapest compete by time."""
REMAT = ("none", "dots", "full")
"""From what keeps most to what keeps least."""
ACCUMULATION = (1, 2, 4, 8, 16)
GIB = 2**30

Make = Callable[[Stage, Target], Forecast]


def with_switches(forecast: Forecast, stage: Stage, *, confirm: Make | None) -> Forecast:
    """Return the forecast, with words on what would make it fit where it does not.

    Each switch is computed, and scaled by what the compiler made of the refused step; the first one that should fit
    is compiled by `confirm`.
    """
    if forecast.fits:
        return forecast
    usable = forecast.memory.usable
    scale = forecast.memory.peak / planner.compute(stage, forecast.target).memory.peak
    words, helping = [], []
    for keys in _switches(stage, forecast):
        name = " ".join(f"--config.{key}={value}" for key, value in keys.items())
        try:
            need, how = (
                planner.compute(planner.estimated(stage, **keys), forecast.target).memory.peak * scale,
                "computed",
            )
            if need <= usable and confirm is not None:
                tried, confirm = confirm(planner.varied(stage, **keys), forecast.target), None
                need, how = tried.memory.peak, tried.sources["memory"]
        except UserError as error:
            words.append(f"{name}: not possible. {error.happened}")
            continue
        verdict = "fits" if need <= usable else f"is {(need - usable) / GIB:.1f} GiB over"
        words.append(f"{name}: {need / GIB:.1f} GiB a chip ({how}), {verdict}")
        helping += [name] if need <= usable else []
    words.append(f"In short: {helping[0] if helping else 'none of these; more chips, or chips with more memory'}")
    return dataclasses.replace(forecast, switches=tuple(words))


def _switches(stage: Stage, refused: Forecast) -> Iterator[dict[str, object]]:
    """Yield changed keys of a config: those that leave the result as it is, then smaller batches."""
    efficiency, target, mesh = stage.config.efficiency, refused.target, refused.mesh
    more = REMAT[REMAT.index(efficiency.remat) + 1 :]
    for remat in more:
        yield {"efficiency.remat": remat}
    rows = stage.config.run.batch_size // batch_parts(mesh) // efficiency.accumulation_steps
    divisors = [share for share in (2, 4, 8, 16) if rows % share == 0]
    for share in divisors:
        yield {"efficiency.accumulation_steps": share * efficiency.accumulation_steps}
    share = min(target.count // target.slices, 8)
    if mesh["fsdp"] == 1 and share > 1:
        for remat in (efficiency.remat, *more[-1:]):
            yield {"mesh.fsdp": share, "efficiency.remat": remat}
    for share in divisors:
        yield {"run.batch_size": stage.config.run.batch_size // share}


def auto(stage: Stage, kind: str, *, make: Make | None, minutes: float) -> list[Forecast]:
    """Return the best SHOWN plans for chips of a kind (`v5e`) or for one target (`v5e:64`), the best one first.

    Meshes, numbers of chips, remat and accumulation, and so the batch that a chip holds at once, are tried by
    arithmetic. Among the plans that fit and cost at most NEAR times the chip-hours of the cheapest, the faster is
    better; then come the others, the cheaper ones first. From the best one on `make` then compiles them, and leaves
    out those that do not fit after all, until SHOWN are found, at most SHOWN_OF_A_TARGET of one number of chips; no
    compilation is begun that would probably end after `minutes`, so that the last may be computed still.

    Raises:
        UserError: no such chip or target, or nothing fits.
    """
    chosen = [topologies.parse(kind)] if ":" in kind else topologies.rented(find_chip(kind))
    tried = [forecast for target in chosen for forecast in _tried(stage, target)]
    fitting = [forecast for forecast in tried if forecast.fits]
    if not fitting:
        least = min((forecast.memory.over for forecast in tried), default=None)
        raise UserError(
            f"None of {len(tried)} plans for {kind} holds this step"
            + (f", the best is {least / GIB:.1f} GiB over." if tried else "."),
            "the batch of one chip is too large, or the model." if tried else "the batch has fewer images than chips.",
            "another --config.run.batch_size, or another kind of chip.",
        )
    logging.info("%d plans for %s tried by arithmetic, %d fit", len(tried), kind, len(fitting))

    cheapest = min(forecast.chip_hours for forecast in fitting)

    def rank(forecast: Forecast) -> tuple[bool, float]:
        near = forecast.chip_hours <= NEAR * cheapest
        return (not near, forecast.hours if near else forecast.chip_hours)

    best: list[Forecast] = []
    most = SHOWN if len(chosen) == 1 else SHOWN_OF_A_TARGET
    started, longest = time.monotonic(), 0.0
    for forecast in sorted(fitting, key=rank):
        if len(best) == SHOWN:
            break
        if [plan.target for plan in best].count(forecast.target) == most:
            continue
        if make is not None and time.monotonic() - started + longest < 60 * minutes:
            forecast = make(planner.varied(stage, **keys_of(forecast)), forecast.target)
            longest = max(longest, forecast.compile_s)
            if not forecast.fits:
                logging.info("%s, mesh %s: does not fit after all", forecast.target.name, forecast.mesh)
                continue
        best.append(forecast)
    if not best:
        raise UserError(
            f"The compiler refused all {len(fitting)} plans for {kind} that fit by arithmetic.",
            "arithmetic is a few per cent off.",
            "--plan= of one of them says what is missing, or another --config.run.batch_size.",
        )
    return sorted(best, key=rank)


def _tried(stage: Stage, target: Target) -> Iterator[Forecast]:
    """Yield plans of every mesh: the fastest that fits with the least remat that any fits with, and those that do not.

    Fewer images at once may be the faster: more of what passes stays on a core.
    """
    variants = {
        remat: {
            steps: planner.estimated(stage, **{"efficiency.remat": remat, "efficiency.accumulation_steps": steps})
            for steps in ACCUMULATION
        }
        for remat in REMAT
    }
    for mesh in _meshes(target):
        rows, left = divmod(stage.config.run.batch_size, batch_parts(mesh))
        for by_steps in variants.values():
            possible = (plan for steps, plan in by_steps.items() if not left and rows % steps == 0)
            plans = [planner.compute(plan, target, mesh) for plan in possible]
            yield from (forecast for forecast in plans if not forecast.fits)
            if fitting := [forecast for forecast in plans if forecast.fits]:
                yield min(fitting, key=lambda forecast: forecast.step_s)
                break


def _meshes(target: Target) -> Iterator[dict[str, int]]:
    """Yield meshes over all chips; `fsdp` and `tensor` stay inside a slice."""
    inside = target.count // target.slices
    for fsdp in (size for size in (1, 2, 4, 8, 16) if inside % size == 0):
        for tensor in (size for size in (1, 2, 4) if (inside // fsdp) % size == 0):
            yield {"data": target.count // fsdp // tensor, "fsdp": fsdp, "tensor": tensor}


def keys_of(forecast: Forecast) -> dict[str, object]:
    """Return the keys of a config that ask for a plan's mesh, remat and accumulation."""
    efficiency = forecast.config.efficiency
    sizes = {f"mesh.{axis}": size for axis, size in forecast.mesh.items()}
    return {
        **sizes,
        "efficiency.remat": efficiency.remat,
        "efficiency.accumulation_steps": efficiency.accumulation_steps,
    }
