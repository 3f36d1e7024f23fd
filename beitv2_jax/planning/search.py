"""Look for better plans: changes that make a step fit, and the best meshes and micro-batches for a kind of chip."""

import dataclasses
import time
from collections.abc import Callable, Iterator

from absl import logging
from ml_collections import ConfigDict

from beitv2_jax.errors import UserError
from beitv2_jax.planning import planner, topologies
from beitv2_jax.planning.chips import find_chip
from beitv2_jax.planning.planner import PlannedStep
from beitv2_jax.planning.prediction import Prediction, batch_shards
from beitv2_jax.planning.topologies import Target

SHOWN = 5
"""Plans that a search returns."""
SHOWN_PER_TARGET = 2
"""The most plans with the same number of chips, where several numbers are compared."""
COST_TOLERANCE = 1.1
"""Plans that cost at most this multiple of the cheapest compete by time."""
REMAT = ("none", "dots", "full")
"""In the order of what they save, the most first."""
ACCUMULATION = (1, 2, 4, 8, 16)
GIB = 2**30

Make = Callable[[PlannedStep, Target], Prediction]


def with_remedies(prediction: Prediction, step: PlannedStep, *, confirm: Make | None) -> Prediction:
    """Return the prediction, with a sentence on each change that might make the step fit where it does not.

    Each change is estimated, and scaled by the ratio of the refused step's compiled memory to its estimate; the first
    one that should fit is compiled by `confirm`.
    """
    if prediction.fits:
        return prediction
    usable = prediction.memory.usable
    scale = prediction.memory.peak / planner.predict(step, prediction.target).memory.peak
    remedies, helpful = [], []
    for keys in _changes(step, prediction):
        flags = " ".join(f"--config.{key}={value}" for key, value in keys.items())
        try:
            changed = planner.varied(step, **keys)
            needed, source = planner.predict(changed, prediction.target).memory.peak * scale, "traced"
            if needed <= usable and confirm is not None:
                tried, confirm = confirm(changed, prediction.target), None
                needed, source = tried.memory.peak, tried.sources["memory"]
        except UserError as error:
            remedies.append(f"{flags}: not possible. {error.happened}")
            continue
        verdict = "fits" if needed <= usable else f"{(needed - usable) / GIB:.1f} GiB are missing"
        remedies.append(f"{flags}: {needed / GIB:.1f} GiB per chip ({source}), {verdict}")
        helpful += [flags] if needed <= usable else []
    advice = helpful[0] if helpful else "none of these; use more chips, or chips with more memory"
    return dataclasses.replace(prediction, remedies=(*remedies, f"In short: {advice}"))


def _changes(step: PlannedStep, refused: Prediction) -> Iterator[dict[str, object]]:
    """Yield changed keys of a config: those that leave the result as it is, then smaller batches."""
    efficiency, target, mesh = step.config.efficiency, refused.target, refused.mesh
    own, *more = _remat_keys(efficiency)
    yield from more
    rows = step.config.run.batch_size // batch_shards(mesh) // efficiency.accumulation_steps
    divisors = [divisor for divisor in (2, 4, 8, 16) if rows % divisor == 0]
    for divisor in divisors:
        yield {"efficiency.accumulation_steps": divisor * efficiency.accumulation_steps}
    shards = min(target.count // target.slices, 8)
    if mesh["fsdp"] == 1 and shards > 1:
        for remat in (own, *more[-1:]):
            yield {"mesh.fsdp": shards, **remat}
    for divisor in divisors:
        yield {"run.batch_size": step.config.run.batch_size // divisor}


def _remat_keys(efficiency: ConfigDict, first: str = "") -> list[dict[str, object]]:
    """Return the key of a config for each remat from `first` on, or from its own; a frozen backbone has no remat."""
    if "remat" not in efficiency:
        return [{}]
    return [{"efficiency.remat": remat} for remat in REMAT[REMAT.index(first or efficiency.remat) :]]


def find_best(step: PlannedStep, kind: str, *, make: Make | None, minutes: float) -> list[Prediction]:
    """Return the best SHOWN plans for chips of a kind (`v5e`) or for one target (`v5e:64`), the best one first.

    Meshes, numbers of chips, remat and accumulation are tried with estimates from the traced step. Among the plans that
    fit and cost at most COST_TOLERANCE times the chip-hours of the cheapest, the faster is better; then come the
    others, the cheaper ones first. From the best one on `make` then compiles them, and leaves out those that do not fit
    after all, until SHOWN are found, at most SHOWN_PER_TARGET of one number of chips. No compilation is begun that
    would probably end after `minutes`, so the last plans may be estimates still.

    Raises:
        UserError: no such chip or target, or nothing fits.
    """
    chosen = [topologies.parse(kind)] if ":" in kind else topologies.rented(find_chip(kind))
    tried = [prediction for target in chosen for prediction in _tried(step, target)]
    fitting = [prediction for prediction in tried if prediction.fits]
    if not tried:
        raise UserError(
            f"No number of chips of {kind} divides a batch of {step.config.run.batch_size} images.",
            "Did you mean a larger batch?",
            f"Pass --config.run.batch_size={chosen[0].count}, or a multiple of it.",
        )
    if not fitting:
        least, size = min(prediction.memory.excess for prediction in tried), _fitting_batch(step, chosen[-1])
        raise UserError(
            f"None of {len(tried)} plans for {kind} fits into memory; the best one lacks {least / GIB:.1f} GiB.",
            "Did you mean a smaller batch?" if size else "Did you mean a smaller network?",
            f"Pass --config.run.batch_size={size}, or choose another kind of chip."
            if size
            else "Choose another kind of chip or a smaller network: no smaller batch fits either.",
        )
    logging.info("estimated %d plans for %s, %d fit", len(tried), kind, len(fitting))

    cheapest = min(prediction.chip_hours for prediction in fitting)

    def rank(prediction: Prediction) -> tuple[bool, float]:
        cheap = prediction.chip_hours <= COST_TOLERANCE * cheapest
        return (not cheap, prediction.hours if cheap else prediction.chip_hours)

    best: list[Prediction] = []
    most = SHOWN if len(chosen) == 1 else SHOWN_PER_TARGET
    started, longest = time.monotonic(), 0.0
    for prediction in sorted(fitting, key=rank):
        if len(best) == SHOWN:
            break
        if [plan.target for plan in best].count(prediction.target) == most:
            continue
        if make is not None and time.monotonic() - started + longest < 60 * minutes:
            prediction = make(planner.varied(step, **config_keys(prediction)), prediction.target)
            longest = max(longest, prediction.compile_s)
            if not prediction.fits:
                logging.info("%s with mesh %s does not fit after all", prediction.target.name, prediction.mesh)
                continue
        best.append(prediction)
    if not best:
        raise UserError(
            f"The compiler refused all {len(fitting)} plans for {kind} that fit by estimate.",
            "Did you mean a smaller batch?",
            f"Pass --config.run.batch_size={max(step.config.run.batch_size // 2, 1)}, or choose another kind of chip.",
        )
    return sorted(best, key=rank)


def _fitting_batch(step: PlannedStep, target: Target) -> int:
    """Return the largest power of two below the batch of `step` with which a plan for `target` fits; 0 if none does."""
    size = 1 << (step.config.run.batch_size - 1).bit_length() >> 1
    while size and not any(plan.fits for plan in _tried(planner.varied(step, **{"run.batch_size": size}), target)):
        size //= 2
    return size


def _tried(step: PlannedStep, target: Target) -> Iterator[Prediction]:
    """Yield plans of every mesh: the fastest that fits with the least remat that any fits with, and those that do not.

    Smaller micro-batches may be faster, as more of their arrays stay in on-chip memory.
    """
    for mesh in _meshes(target):
        rows, remainder = divmod(step.config.run.batch_size, batch_shards(mesh))
        possible = [steps for steps in ACCUMULATION if not remainder and rows % steps == 0]
        for remat in _remat_keys(step.config.efficiency, REMAT[0]):
            keys = [{**remat, "efficiency.accumulation_steps": steps} for steps in possible]
            plans = [planner.predict(planner.varied(step, **changes), target, mesh) for changes in keys]
            yield from (plan for plan in plans if not plan.fits)
            if fitting := [plan for plan in plans if plan.fits]:
                yield min(fitting, key=lambda plan: plan.step_s)
                break


def _meshes(target: Target) -> Iterator[dict[str, int]]:
    """Yield meshes over all chips; `fsdp` and `tensor` stay inside a slice."""
    inside = target.count // target.slices
    for fsdp in (size for size in (1, 2, 4, 8, 16) if inside % size == 0):
        for tensor in (size for size in (1, 2, 4) if (inside // fsdp) % size == 0):
            yield {"data": target.count // fsdp // tensor, "fsdp": fsdp, "tensor": tensor}


def config_keys(prediction: Prediction) -> dict[str, object]:
    """Return the keys of a config that ask for a plan's mesh, remat and accumulation."""
    efficiency = prediction.config.efficiency
    sizes = {f"mesh.{axis}": size for axis, size in prediction.mesh.items()}
    return {**sizes, **_remat_keys(efficiency)[0], "efficiency.accumulation_steps": efficiency.accumulation_steps}
