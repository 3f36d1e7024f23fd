"""What `--plan` foretells: memory, FLOPs, exchanges and the times that follow from them.

Made by `planning.planner`, printed by `planning.report`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from beitv2_jax.planning.collectives import Collective, totals
from beitv2_jax.planning.parts import Component
from beitv2_jax.planning.topologies import Target
from beitv2_jax.training import sharding

_BOUNDS = ("compute", "HBM", "interconnect")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip; `peak` is what a step needs at once, `usable` what there is."""

    arguments: int
    temporaries: int
    peak: int
    usable: int

    @property
    def over(self) -> int:
        """Bytes missing; 0 where the step fits."""
        return max(0, self.peak - self.usable)


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a step of a config needs and takes on a target, and a run of such steps.

    Attributes:
        compiled: whether memory, `compiler_flops`, `bytes_moved` and `collectives` are those of a compiled program; if
            not, they are computed.
        parameters: trained numbers; `parts` are those and the frozen ones, each with its FLOPs of an image and step.
        arithmetic_flops, traced_flops, product_flops, compiler_flops: of one chip in a step: by formulas, in the traced
            program, the matrix products of the compiled program, and the compiler's own count, which takes in what is
            no product too. Of a loop, whose body a compiler counts once, every round is in them.
        collectives: of one step.
        compute_s, hbm_s, interconnect_s: the least seconds that each of the three takes in a step.
        notes: what was assumed.
        switches: words on each change that was tried to make the step fit, and whether it does.
    """

    target: Target
    mesh: dict[str, int]
    config: Any
    compiled: bool
    num_examples: int
    num_steps: int
    parts: list[Component]
    memory: Memory
    arithmetic_flops: float
    traced_flops: float | None
    product_flops: float | None
    compiler_flops: float | None
    bytes_moved: float
    collectives: list[Collective]
    compute_s: float
    hbm_s: float
    interconnect_s: float
    compile_s: float = 0.0
    notes: tuple[str, ...] = ()
    switches: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the step fits into the memory of a chip."""
        return self.memory.over == 0

    @property
    def binds(self) -> str:
        """Which of the three takes longest."""
        return max(_BOUNDS, key=dict(zip(_BOUNDS, self.bounds, strict=True)).get)

    @property
    def bounds(self) -> tuple[float, float, float]:
        """Seconds of compute, HBM and interconnect."""
        return self.compute_s, self.hbm_s, self.interconnect_s

    @property
    def step_s(self) -> float:
        """Seconds of a step at peak rates: compute and memory side by side, then the exchange, none of it hidden."""
        return max(self.compute_s, self.hbm_s) + self.interconnect_s

    @property
    def images_per_second(self) -> float:
        """Of all chips, at peak rates."""
        return self.config.run.batch_size / self.step_s

    @property
    def hours(self) -> float:
        """Of the configured schedule, at peak rates."""
        return self.num_steps * self.step_s / 3600

    @property
    def chip_hours(self) -> float:
        """Of the configured schedule, at peak rates."""
        return self.hours * self.target.count

    @property
    def sources(self) -> dict[str, str]:
        """Which figures a compiler gave and which are computed; what follows from both is at peak rates."""
        how = {True: "compiled", False: "computed"}
        return {
            "memory": how[self.compile_s > 0],
            "bytes_moved": how[self.compiled],
            "collectives": how[self.compiled],
            "times": "at peak rates",
        }

    def figures(self) -> dict[str, Any]:
        """Return all figures as plain values, for a file."""
        per_kind = totals(self.collectives)
        return {
            "target": self.target.name,
            "chip": dataclasses.asdict(self.target.chip),
            "chips": self.target.count,
            "mesh": self.mesh,
            "stage": self.config.stage,
            "batch_size": self.config.run.batch_size,
            "images_per_chip": self.config.run.batch_size / batch_parts(self.mesh),
            "efficiency": self.config.efficiency.to_dict(),
            "source_of_figures": "compiled" if self.compiled else "computed",
            "sources": self.sources,
            "compile_seconds": self.compile_s,
            "parameters": sum(part.params for part in self.parts if not part.frozen),
            "parts": {part.name: {"parameters": part.params, "flops_per_image": part.flops} for part in self.parts},
            "memory_per_chip": {
                **dataclasses.asdict(self.memory),
                "hbm": self.target.chip.hbm_bytes,
                "fits": self.fits,
                "over": self.memory.over,
            },
            "flops_per_chip": {
                "arithmetic": self.arithmetic_flops,
                "traced": self.traced_flops,
                "compiled_products": self.product_flops,
                "compiler": self.compiler_flops,
            },
            "bytes_moved_per_chip": self.bytes_moved,
            "collectives": per_kind,
            "roofline_seconds": {**dict(zip(_BOUNDS, self.bounds, strict=True)), "binds": self.binds},
            "step_seconds": self.step_s,
            "images_per_second": self.images_per_second,
            "num_examples": self.num_examples,
            "num_steps": self.num_steps,
            "hours": self.hours,
            "chip_hours": self.chip_hours,
            "notes": list(self.notes),
            "switches": list(self.switches),
        }


def batch_parts(mesh: Mapping[str, int]) -> int:
    """Return over how many chips a batch is divided."""
    return math.prod(mesh[axis] for axis in sharding.BATCH_AXES)
