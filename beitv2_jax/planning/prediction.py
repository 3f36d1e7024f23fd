"""Predicted memory, FLOPs, collectives and step time of a training step on a target.

Made by `planning.planner`, printed by `planning.report`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from beitv2_jax.planning.collectives import Collective, totals
from beitv2_jax.planning.topologies import Target
from beitv2_jax.planning.traced import Component
from beitv2_jax.training import sharding

_LIMITS = ("compute", "HBM", "interconnect")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip; `peak` is what a step needs at once, `usable` what the chip offers."""

    arguments: int
    temporaries: int
    peak: int
    usable: int

    @property
    def excess(self) -> int:
        """Bytes that are missing; 0 where the step fits."""
        return max(0, self.peak - self.usable)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Memory, work and time of a config's step on a target, and of a run of such steps.

    Attributes:
        compiled: whether memory, `compiled_flops`, `bytes_moved` and `collectives` are those of a compiled program; if
            not, they are estimated from the traced step.
        components: each with its cost for one image.
        traced_flops, compiled_flops: FLOPs of one chip in a step: products and convolutions of the traced step, and of
            the compiled program, with every round of its loops.
        collectives: of one step.
        compute_s, hbm_s, interconnect_s: the least seconds that each of the three takes in a step.
        notes: what was assumed.
        remedies: a sentence on each change that was tried to make the step fit.
    """

    target: Target
    mesh: dict[str, int]
    config: Any
    compiled: bool
    num_examples: int
    num_steps: int
    components: tuple[Component, ...]
    memory: Memory
    traced_flops: float
    compiled_flops: float | None
    bytes_moved: float
    collectives: list[Collective]
    compute_s: float
    hbm_s: float
    interconnect_s: float
    compile_s: float = 0.0
    notes: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the step fits into the memory of a chip."""
        return self.memory.excess == 0

    @property
    def bottleneck(self) -> str:
        """Which of the three takes longest."""
        return max(_LIMITS, key=dict(zip(_LIMITS, self.limits, strict=True)).get)

    @property
    def limits(self) -> tuple[float, float, float]:
        """Seconds of compute, HBM and interconnect."""
        return self.compute_s, self.hbm_s, self.interconnect_s

    @property
    def step_s(self) -> float:
        """Seconds of a step at peak rates: compute and memory access overlap, the collectives come after them."""
        return max(self.compute_s, self.hbm_s) + self.interconnect_s

    @property
    def images_per_second(self) -> float:
        """Images per second of all chips, at peak rates."""
        return self.config.run.batch_size / self.step_s

    @property
    def hours(self) -> float:
        """Hours of the configured schedule, at peak rates."""
        return self.num_steps * self.step_s / 3600

    @property
    def chip_hours(self) -> float:
        """Chip-hours of the configured schedule, at peak rates."""
        return self.hours * self.target.count

    @property
    def sources(self) -> dict[str, str]:
        """Return which metrics come from a compiled program and which from the traced step; times are at peak rates."""
        how = {True: "compiled", False: "traced"}
        return {
            "memory": how[self.compile_s > 0],
            "bytes_moved": how[self.compiled],
            "collectives": how[self.compiled],
            "times": "at peak rates",
        }

    def metrics(self) -> dict[str, Any]:
        """Return everything as plain values, for a file."""
        per_kind = totals(self.collectives)
        return {
            "target": self.target.name,
            "chip": dataclasses.asdict(self.target.chip),
            "chips": self.target.count,
            "mesh": self.mesh,
            "stage": self.config.stage,
            "batch_size": self.config.run.batch_size,
            "images_per_chip": self.config.run.batch_size / batch_shards(self.mesh),
            "efficiency": self.config.efficiency.to_dict(),
            "source": "compiled" if self.compiled else "traced",
            "sources": self.sources,
            "compile_seconds": self.compile_s,
            "parameters": sum(component.parameters for component in self.components),
            "components": [dataclasses.asdict(component) for component in self.components],
            "memory_per_chip": {
                **dataclasses.asdict(self.memory),
                "hbm": self.target.chip.hbm_bytes,
                "fits": self.fits,
                "excess": self.memory.excess,
            },
            "flops_per_chip": {"traced": self.traced_flops, "compiled": self.compiled_flops},
            "bytes_moved_per_chip": self.bytes_moved,
            "collectives": per_kind,
            "roofline_seconds": {**dict(zip(_LIMITS, self.limits, strict=True)), "bottleneck": self.bottleneck},
            "step_seconds": self.step_s,
            "images_per_second": self.images_per_second,
            "num_examples": self.num_examples,
            "num_steps": self.num_steps,
            "hours": self.hours,
            "chip_hours": self.chip_hours,
            "notes": list(self.notes),
            "remedies": list(self.remedies),
        }


def batch_shards(mesh: Mapping[str, int]) -> int:
    """Return into how many shards a mesh divides a batch."""
    return math.prod(mesh[axis] for axis in sharding.BATCH_AXES)
