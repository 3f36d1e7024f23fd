"""Look for better plans: the switches that make a step fit, and the best meshes and batches for a kind of chip."""

import dataclasses
from collections.abc import Iterator

from beitv2_jax.errors import UserError
from beitv2_jax.planning import planner, topologies
from beitv2_jax.planning.chips import find_chip
from beitv2_jax.planning.figures import Plan, batch_parts
from beitv2_jax.planning.planner import Stage
from beitv2_jax.planning.topologies import Target

SHOWN = 5
NEAR = 1.1
"""Plans that cost at most so many times the cheapest compete by time."""
GIB = 2**30


def switches(refused: Plan, stage: Stage, *, confirm: bool) -> tuple[str, ...]:
    """Return words on each switch that might make a step fit: what it would need, and whether that fits.

    Needs are computed and scaled by what the compiler made of the refused step; with `confirm` the first one that
    should fit is compiled.
    """
    target, usable = refused.target, refused.memory.usable
    scale = refused.memory.peak / planner.compute(stage, target).memory.peak
    words, confirmed = [], not confirm

    def fits(name: str, **keys) -> bool:
        nonlocal confirmed
        try:
            need, how = planner.compute(planner.estimated(stage, **keys), target).memory.peak * scale, "computed"
            if need <= usable and not confirmed:
                tried = planner.make(planner.varied(stage, **keys), target)
                need, how, confirmed = tried.memory.peak, "compiled", tried.fits
        except UserError as error:
            words.append(f"{name}: not possible. {error.happened}")
            return False
        verdict = "fits" if need <= usable else f"is {(need - usable) / GIB:.1f} GiB over"
        words.append(f"{name}: {need / GIB:.1f} GiB a chip ({how}), {verdict}")
        return need <= usable

    for name, keys in _switches(stage, refused.mesh, target):
        fits(name, **keys)
    for remat in sorted({bool(stage.config.efficiency.remat), True}):
        batch_size, parts = stage.config.run.batch_size, batch_parts(refused.mesh)
        while batch_size % (2 * parts) == 0:
            batch_size //= 2
            name = f"{batch_size // parts} images a chip{' with remat' if remat else ''}, --config.run.batch_size="
            name += f"{batch_size} or more chips"
            if fits(name, **{"run.batch_size": batch_size, "efficiency.remat": remat}):
                break
    return tuple(words)


def _switches(stage: Stage, mesh: dict[str, int], target: Target) -> Iterator[tuple[str, dict]]:
    """Yield (name, changed keys) of the switches that leave the batch of a chip as it is."""
    efficiency = stage.config.efficiency
    remat = {} if efficiency.remat else {"efficiency.remat": True}
    share = min(target.count, 8)
    if remat:
        yield "--config.efficiency.remat=True", remat
    if efficiency.get("scan") is False:
        yield "--config.efficiency.scan=True with remat", {**remat, "efficiency.scan": True}
    if mesh["fsdp"] == 1 and share > 1:
        yield f"--config.mesh.fsdp={share}", {"mesh.fsdp": share}
        if remat:
            yield f"--config.mesh.fsdp={share} with remat", {**remat, "mesh.fsdp": share}


def auto(stage: Stage, kind: str, *, compile_it: bool) -> list[Plan]:
    """Return the best plans for chips of a kind (`v5e`) or for one target (`v5e:64`), the best one first.

    Meshes, chip counts, and so batches of a chip, and remat are tried by arithmetic. Among the plans that fit and cost
    at most NEAR times the chip-hours of the cheapest, the faster is better; with `compile_it` the best are then
    compiled, and those that do not fit after all are dropped.

    Raises:
        UserError: no such chip or target, or nothing fits.
    """
    chosen = [topologies.parse(kind)] if ":" in kind else topologies.rented(find_chip(kind))
    both = [planner.estimated(stage, **{"efficiency.remat": remat}) for remat in (False, True)]
    tried = [plan for one in both for target in chosen for plan in _meshes(one, target)]
    fitting = [plan for plan in tried if plan.fits]
    if not fitting:
        least = min((plan.memory.over for plan in tried), default=None)
        raise UserError(
            f"None of {len(tried)} meshes on {kind} holds this step"
            + (f", the best is {least / GIB:.1f} GiB over." if tried else "."),
            "the batch of one chip is too large, or the model." if tried else "the batch has fewer images than chips.",
            "another --config.run.batch_size, or another kind of chip.",
        )
    cheapest = min(plan.chip_hours for plan in fitting)
    near = [plan for plan in fitting if plan.chip_hours <= NEAR * cheapest]
    plans = sorted(near, key=lambda plan: plan.hours)[:SHOWN]
    if not compile_it:
        return plans
    made = [planner.make(planner.varied(stage, **_keys(plan)), plan.target) for plan in plans]
    return sorted((plan for plan in made if plan.fits), key=lambda plan: plan.hours) or made


def _meshes(stage: Stage, target: Target) -> Iterator[Plan]:
    for fsdp in (size for size in (1, 2, 4, 8, 16) if target.count % size == 0):
        for tensor in (size for size in (1, 2, 4) if (target.count // fsdp) % size == 0):
            data = target.count // fsdp // tensor
            if stage.config.run.batch_size % (data * fsdp) == 0:
                yield planner.compute(stage, target, {"data": data, "fsdp": fsdp, "tensor": tensor})


def _keys(plan: Plan) -> dict[str, object]:
    """Return the keys of a config that ask for a plan's mesh and remat."""
    sizes = {f"mesh.{axis}": size for axis, size in plan.mesh.items()}
    return {**sizes, "efficiency.remat": bool(plan.config.efficiency.remat)}


def with_switches(plan: Plan, stage: Stage, *, confirm: bool) -> Plan:
    """Return the plan, with words on what would make it fit where it does not."""
    return plan if plan.fits else dataclasses.replace(plan, switches=switches(plan, stage, confirm=confirm))
