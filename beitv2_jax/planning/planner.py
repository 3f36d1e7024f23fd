"""A run planned before any hardware is there: does its step fit, what binds it, how long and how many chip-hours.

`make` compiles the real training step for a described topology, from the config alone. `compute` gives the same figures
by arithmetic. Both return a `Forecast`, whose `compiled` says which it is.
"""

import dataclasses
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import AbstractMesh, AxisType, Mesh

from beitv2_jax import config as config_lib
from beitv2_jax.errors import UserError
from beitv2_jax.models.ops import implementations
from beitv2_jax.planning import abstract_task, accounting, topologies
from beitv2_jax.planning.chips import Network
from beitv2_jax.planning.collectives import Collective, find_collectives
from beitv2_jax.planning.components import components, transformers
from beitv2_jax.planning.figures import Forecast, Memory, batch_parts
from beitv2_jax.planning.parts import FLOAT32, Component, total_flops
from beitv2_jax.planning.program import memory_bytes, missed_flops, product_flops, read_program
from beitv2_jax.planning.topologies import Target
from beitv2_jax.training import optim, sharding
from beitv2_jax.training import state as state_lib
from beitv2_jax.training.step import lower_step, make_train_step
from beitv2_jax.typing import PyTree

USABLE_SHARE = {"cuda": 0.95, "tpu": 15.75 / 16}
"""Of a chip's memory: what a GPU's allocator and libraries leave, and what the TPU compiler takes for available."""
TEMPORARIES = {"cuda": 1.1, "tpu": 1.0}
"""Temporary memory that a compiler takes, over that by arithmetic; a GPU's fuses less. Fitted to a step of MIM base."""
STATE_TRAFFIC = 32
"""Bytes that a step moves for each parameter: gradient read for its norm, all four read, and three of them written."""
PART_TRAFFIC = 24
"""... and for each further part of a batch whose gradients are accumulated: weights read, sums read and written."""
PASSES = {"cuda": (9.4, 9.4), "tpu": (1.0, 11.2)}
"""Least and most times that a step moves each byte that passes through it, fitted to compiled programs. A TPU keeps
what it can in its cores' own memory."""
KEPT_STREAM = 70e6
"""Bytes of the residual stream of a chip's images at which the times lie halfway between."""
OPTIONS = {"cuda": {"xla_gpu_enable_triton_gemm": False}, "tpu": {}}
"""Without tuning on a real GPU its compiler finds no tiles for Triton's matrix products."""

_JAX_NAMES = {"tpu": "tpu", "cuda": "gpu"}
_REFUSED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.IGNORECASE)
_REFUSED_TEMPORARIES = re.compile(
    r"required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A training step as its config describes it, before any mesh: the same for every target.

    `state`, `frozen` and `batch` hold the shapes of the whole run. `notes` say what the config left open. `frozen_vit`
    is that of `planning.abstract_task.Description`. `function` and `traced_flops` are None where there is
    arithmetic only.
    """

    config: Any
    num_examples: int
    notes: tuple[str, ...]
    function: Callable | None
    state: PyTree
    frozen: PyTree
    batch: PyTree
    parts: list[Component]
    frozen_vit: Mapping[str, Mapping[str, int]]
    traced_flops: int | None

    @property
    def num_steps(self) -> int:
        """Steps of the configured schedule."""
        return _steps(self.config, self.num_examples)[1]

    def placed(self, mesh: Mesh | AbstractMesh) -> "Stage":
        """Return the stage with its shapes on a mesh.

        Raises:
            UserError: the batch cannot be divided over it.
        """
        batch_size, steps = self.config.run.batch_size, self.config.efficiency.accumulation_steps
        parts = batch_parts(dict(mesh.shape)) * steps
        if batch_size % parts:
            chips = f"{parts // steps} chips (data x fsdp)" + (f" in {steps} steps" if steps > 1 else "")
            raise UserError(
                f"A batch of {batch_size} cannot be divided over {chips}.",
                "the batch size was chosen for fewer chips.",
                f"--config.run.batch_size={-(-batch_size // parts) * parts}, or a smaller target.",
            )
        rows = sharding.batch_sharding(mesh)
        return dataclasses.replace(
            self,
            state=_placed(self.state, sharding.param_shardings(self.state, mesh)),
            frozen=_placed(self.frozen, sharding.param_shardings(self.frozen, mesh)),
            batch=_placed(self.batch, jax.tree.map(lambda _: rows, self.batch)),
        )


def prepare(config, num_examples: int = 0, *, platform: str = "tpu") -> Stage:
    """Describe the stage that a config trains; what the config leaves open is what the published recipe used.

    Args:
        num_examples: images of an epoch; 0 takes those of the data set.
        platform: that of the target's chip, whose forms of computing "auto" means.

    Raises:
        UserError: the config is inconsistent, of a stage without training, or of a set of unknown length.
    """
    config, notes = abstract_task.complete(config)
    forms = implementations.resolve_auto(config.efficiency, _JAX_NAMES[platform])
    config = _changed(config, {f"efficiency.{key}": value for key, value in forms.items()})
    config_lib.validate(config)
    num_examples = abstract_task.count_examples(config, num_examples)
    config_lib.validate(config, num_examples)
    return _stage(config, num_examples, notes)


def varied(stage: Stage, **keys) -> Stage:
    """Return the stage of the same config with other values of `{"section.key": value}`."""
    return _stage(_changed(stage.config, keys), stage.num_examples, stage.notes)


def estimated(stage: Stage, **keys) -> Stage:
    """Return what `varied` does, at once and for arithmetic only; `keys` must leave the network's shapes alone."""
    config = _changed(stage.config, keys)
    batch_size = config.run.batch_size
    batch = {
        name: jax.ShapeDtypeStruct((batch_size, *leaf.shape[1:]), leaf.dtype) for name, leaf in stage.batch.items()
    }
    parts = components(config, stage.frozen_vit)
    return dataclasses.replace(stage, config=config, batch=batch, parts=parts, function=None, traced_flops=None)


def _changed(config, keys: Mapping[str, Any]):
    config = config.copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(keys)
    return config.lock()


def _stage(config, num_examples: int, notes: tuple[str, ...]) -> Stage:
    description = abstract_task.describe(config, num_examples)
    task, ema_decay = description.task, config.optim.ema_decay
    optimizer, schedule = optim.for_task(task, config.optim, *_steps(config, num_examples))
    mesh = _abstract_mesh(dict.fromkeys(sharding.AXES, 1))
    state = state_lib.abstract(task, optimizer, mesh, config.seed, keep_ema=ema_decay > 0)
    function = make_train_step(
        task,
        optimizer,
        schedule=schedule,
        seed=config.seed,
        ema_decay=ema_decay,
        accumulation_steps=config.efficiency.accumulation_steps,
    )
    return Stage(
        config,
        num_examples,
        notes,
        function,
        state,
        task.frozen,
        description.batch,
        components(config, description.frozen_vit),
        description.frozen_vit,
        accounting.traced_flops(function, state, task.frozen, description.batch),
    )


def start_compilers() -> None:
    """Let compilers start for chips that are not here; call it before jax looks for devices."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    jax.config.update("jax_platforms", "cpu")  # jax has read its environment already


def make(stage: Stage, target: Target) -> Forecast:
    """Compile the step of a stage for a target, on the mesh that its config asks for, and return its forecast.

    Raises:
        UserError: the compiler is missing, or batch and mesh do not fit the target.
    """
    mesh = sharding.make_mesh(**stage.config.mesh, devices=topologies.devices(target))
    network = target.network(list(mesh.devices.flat))
    stage = stage.placed(mesh)
    forecast = _computed(stage, target, dict(mesh.shape), network)
    started = time.monotonic()
    try:
        compiled = _compile(stage, mesh, target)
    except jax.errors.JaxRuntimeError as error:
        refused = _refusal(str(error), forecast.memory.arguments)
        if refused is None:
            raise
        note = "the compiler refused the step: memory is its count, bytes moved and collectives are computed"
        return dataclasses.replace(
            forecast,
            memory=refused,
            compile_s=time.monotonic() - started,
            notes=(*forecast.notes, note),
        )
    return _measured(forecast, compiled, network, time.monotonic() - started)


def compute(stage: Stage, target: Target, mesh: Mapping[str, int] | None = None) -> Forecast:
    """Return the forecast of a stage by arithmetic: nothing is compiled, no compiler is needed.

    Args:
        mesh: sizes of the axes, those of the config if None.

    Raises:
        UserError: batch and mesh do not fit the target.
    """
    sizes = sharding.mesh_sizes(target.count, **(mesh or stage.config.mesh))
    return _computed(stage.placed(_abstract_mesh(sizes)), target, sizes, target.network())


def _abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _steps(config, num_examples: int) -> tuple[int, int]:
    """Return warm-up and length of the schedule in steps."""
    sizes = {"batch_size": config.run.batch_size, "num_examples": num_examples}
    return config_lib.steps(config.optim.warmup, **sizes), config_lib.steps(config.run.duration, **sizes)


def _placed(tree: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree, shardings
    )


def _compile(stage: Stage, mesh: Mesh, target: Target):
    logging.info("compiling the step for %s on %s", dict(mesh.shape), target.name)
    lowered = lower_step(stage.function, stage.state, stage.frozen, stage.batch, mesh)
    return lowered.compile(compiler_options=OPTIONS[target.chip.platform])


def _refusal(message: str, arguments: int) -> Memory | None:
    """Return the memory that a TPU compiler says a step lacks when it refuses it, None of another fault.

    Args:
        message: which tells of everything, or of the temporaries alone.
        arguments: bytes of the step's arguments.
    """
    if match := _REFUSED.search(message):
        used, usable = _size(*match.groups()[:2]), _size(*match.groups()[2:])
        return Memory(arguments, used - arguments, used, usable)
    if match := _REFUSED_TEMPORARIES.search(message):
        temporaries, usable = _size(*match.groups()[:2]), _size(*match.groups()[2:])
        return Memory(arguments, temporaries, arguments + temporaries, usable)
    return None


def _size(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit.upper()])


def _computed(stage: Stage, target: Target, shape: dict[str, int], network: Network) -> Forecast:
    chip, config = target.chip, stage.config
    images = config.run.batch_size / batch_parts(shape)
    share = config.run.batch_size / math.prod(shape.values())
    frozen_bytes = accounting.device_bytes(stage.frozen)
    arguments = accounting.device_bytes(stage.state) + frozen_bytes + accounting.device_bytes(stage.batch)
    steps = config.efficiency.accumulation_steps
    temporaries = accounting.temporary_bytes(stage.parts, images, stage.state.params, steps)
    temporaries = int(TEMPORARIES[chip.platform] * temporaries)
    usable = int(USABLE_SHARE[chip.platform] * chip.hbm_bytes)
    memory = Memory(arguments, temporaries, arguments + temporaries, usable)
    collectives = expected_collectives(stage, shape, images)
    passed = sum(part.passed or part.kept + part.held for part in stage.parts)
    local_params = accounting.device_bytes(stage.state.params) / FLOAT32
    moved = (STATE_TRAFFIC + (steps - 1) * PART_TRAFFIC) * local_params
    moved += _passes(config, chip.platform, images / steps) * images * passed + steps * frozen_bytes
    # what is gathered is written, and read again; what is scattered likewise
    moved += 2 * sum(c.count * c.bytes for c in collectives if c.kind != "all-reduce")
    plain, exact = (share * total_flops(stage.parts, exact=value) for value in (False, True))
    return Forecast(
        target=target,
        mesh=shape,
        config=config,
        compiled=False,
        num_examples=stage.num_examples,
        num_steps=stage.num_steps,
        parts=stage.parts,
        memory=memory,
        arithmetic_flops=plain + exact,
        traced_flops=stage.traced_flops and stage.traced_flops / math.prod(shape.values()),
        product_flops=None,
        compiler_flops=None,
        bytes_moved=moved,
        collectives=collectives,
        compute_s=plain / chip.flops + exact / chip.exact_flops,
        hbm_s=moved / chip.hbm_rate,
        interconnect_s=_exchange_seconds(collectives, network),
        notes=stage.notes,
    )


def _passes(config, platform: str, images: float) -> float:
    """Return how often a step moves each byte that passes through it, with so many images on a chip at once."""
    least, most = PASSES[platform]
    stream = FLOAT32 * images * max(blocks.tokens * blocks.width for blocks in transformers(config))
    return least + (most - least) * stream / (stream + KEPT_STREAM)


def _exchange_seconds(collectives: Iterable[Collective], network: Network) -> float:
    return sum(collective.count * network.seconds(collective) for collective in collectives)


def _measured(forecast: Forecast, compiled, network: Network, seconds: float) -> Forecast:
    """Return the forecast with what a compiled program says in place of arithmetic."""
    chip, target = forecast.target.chip, forecast.target
    sizes = compiled.memory_analysis()
    arguments, temporaries = sizes.argument_size_in_bytes, sizes.temp_size_in_bytes
    # outputs that are not written into arguments, and the program itself, need room too
    outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    code = sizes.generated_code_size_in_bytes
    peak = max(getattr(sizes, "peak_memory_in_bytes", 0), arguments + temporaries + outputs + code)
    program = read_program(compiled.as_text())
    collectives = find_collectives(program, target.count, target.slices)
    costs = compiled.cost_analysis() or {}
    flops, moved, notes = None, memory_bytes(program), list(forecast.notes)
    if costs.get("flops"):
        missed, counted = missed_flops(program), costs["bytes accessed"]
        flops = costs["flops"] + missed
        if missed:
            notes.append(
                f"the compiler counts the body of a loop once: {missed / 1e12:.3f} TFLOPs of the other rounds are "
                "added from the program's text"
            )
        if moved < 0.9 * counted:
            notes.append(
                f"the compiler itself counts {counted / 1e9:.1f} GB moved, with what stays in a core's own memory; "
                "those above reach the chip's memory by the program's text"
            )
    else:
        notes.append("this compiler counts no FLOPs: the products are those of the program's text")
    return dataclasses.replace(
        forecast,
        compiled=True,
        compile_s=seconds,
        memory=Memory(arguments, temporaries, peak, forecast.memory.usable),
        product_flops=product_flops(program),
        compiler_flops=flops,
        bytes_moved=moved,
        collectives=collectives,
        hbm_s=moved / chip.hbm_rate,
        interconnect_s=_exchange_seconds(collectives, network),
        notes=tuple(notes),
    )


def expected_collectives(stage: Stage, shape: dict[str, int], images: float) -> list[Collective]:
    """Return the collectives that a step on a mesh must run, by arithmetic; `images` are those of one chip.

    Gradients are summed over `data` and, in shares, over `fsdp`, where weights are gathered for the forward and for the
    backward pass. Over `tensor` each block sums its two outputs, forward and backward. The tokenizer sums its code
    statistics over the whole batch. With accumulation what goes over `data` does so once, in float32, as the TPU's
    compiler moves it out of the loop; the rest happens for each part of the batch.
    """
    config, local = stage.config, accounting.device_bytes(stage.state.params)
    steps = config.efficiency.accumulation_steps
    summed = "bf16" if config.efficiency.gradient_dtype == "bfloat16" and steps == 1 else "f32"
    found = []

    def add(kind: str, size: float, axes: tuple[str, ...], count: int = 1, dtype: str = "f32") -> None:
        group = _first_group(shape, axes)
        if len(group) > 1 and count:
            parts = len(group) if kind == "reduce-scatter" else 1
            numbers = int(size) // FLOAT32 // parts
            found.append(Collective(kind, ((dtype, (numbers,)),), (group,), count))

    if shape["fsdp"] > 1:
        whole = local * shape["fsdp"]
        add("all-gather", whole, ("fsdp",), 2 * steps)
        add("reduce-scatter", whole, ("fsdp",), steps, dtype=summed)
    add("all-reduce", local, ("data",), dtype=summed)
    if shape["tensor"] > 1:
        for blocks in transformers(config):
            size = images / steps * FLOAT32 * blocks.tokens * blocks.width
            add("all-reduce", size, ("tensor",), 4 * blocks.depth * steps)
    if config.stage == "vqkd":
        add(
            "all-reduce",
            FLOAT32 * config.model.codebook_size * (config.model.code_dim + 1),
            ("data", "fsdp"),
        )
    return found


def _first_group(shape: dict[str, int], axes: tuple[str, ...]) -> tuple[int, ...]:
    """Return the devices that differ from the first one in `axes` alone."""
    ids = np.arange(math.prod(shape.values())).reshape(tuple(shape.values()))
    return tuple(ids[tuple(slice(None) if axis in axes else 0 for axis in shape)].reshape(-1).tolist())
