"""Predict a run before any hardware is there: does its step fit, what limits it, how long does it take.

`predict` follows the traced step alone. `compile_and_predict` also compiles the real training step for a described
topology, and takes memory, bytes moved and collectives from the compiled program. Both return a `Prediction`.
"""

import dataclasses
import functools
import math
import os
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import AbstractMesh, AxisType, Mesh

from beitv2_jax import config as config_lib
from beitv2_jax.errors import UserError
from beitv2_jax.models.ops import implementations
from beitv2_jax.planning import abstract_task, topologies, traced
from beitv2_jax.planning.chips import Network
from beitv2_jax.planning.collectives import Collective, find_collectives
from beitv2_jax.planning.prediction import Memory, Prediction, batch_shards
from beitv2_jax.planning.program import memory_bytes, product_flops, read_program
from beitv2_jax.planning.topologies import Target
from beitv2_jax.training import optim, sharding
from beitv2_jax.training import state as state_lib
from beitv2_jax.training.step import TrainStep, lower_step, make_train_step
from beitv2_jax.typing import PyTree

USABLE_FRACTION = {"cuda": 0.95, "tpu": 15.75 / 16}
"""Fraction of a chip's memory that a GPU's allocator and libraries leave, and that the TPU compiler has available."""
STATE_TRAFFIC = 32
"""Bytes that a step moves for each parameter: it reads the gradient for its norm and again with the weight and both
moments, and writes the last three."""
ACCUMULATION_TRAFFIC = 24
"""Bytes that each further micro-batch moves for each parameter: weights read, sums of gradients read and written."""
TRAFFIC_RATIO = {"cuda": (3.2, 3.2), "tpu": (0.6, 2.8)}
"""Least and greatest ratio of the bytes that a compiled step moves for its images to those that its products read and
write. Fitted to the compiled programs of docs/scaling.md. A TPU keeps small arrays in its on-chip memory."""
ON_CHIP_BYTES = 150e6
"""Bytes that one product moves for the images of a chip where the ratio is halfway; fitted in the same way."""
COMPILER_OPTIONS = {"cuda": {"xla_gpu_enable_triton_gemm": False}, "tpu": {}}
"""Without tuning on a real GPU its compiler finds no tiles for Triton's matrix products."""

FLOAT32_BYTES = 4
_JAX_NAMES = {"tpu": "tpu", "cuda": "gpu"}
_OUT_OF_MEMORY = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.IGNORECASE)
_TEMPORARIES_OUT_OF_MEMORY = re.compile(
    r"required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SAME_TRACE = ("run.batch_size", "efficiency.accumulation_steps", "mesh.data", "mesh.fsdp", "mesh.tensor")
"""Keys of a config that leave the cost of one image as it is."""


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """A training step as its config describes it, before any mesh: the same for every target.

    `state`, `frozen` and `batch` hold the shapes of the whole run. `notes` say what the config left open.
    """

    config: Any
    num_examples: int
    notes: tuple[str, ...]
    state: PyTree
    frozen: PyTree
    batch: PyTree
    cost: traced.StepCost

    @property
    def num_steps(self) -> int:
        """Steps of the configured schedule."""
        return _schedule_steps(self.config, self.num_examples)[1]

    def placed(self, mesh: Mesh | AbstractMesh) -> "PlannedStep":
        """Return the step with its shapes on a mesh.

        Raises:
            UserError: the batch cannot be divided over it.
        """
        batch_size, steps = self.config.run.batch_size, self.config.efficiency.accumulation_steps
        shards = batch_shards(dict(mesh.shape))
        if batch_size % (shards * steps):
            micro_batches = f" in {steps} micro-batches" if steps > 1 else ""
            size = -(-batch_size // (shards * steps)) * shards * steps
            raise UserError(
                f"A batch of {batch_size} images cannot be divided over {shards} chips (data x fsdp){micro_batches}.",
                f"Did you mean a batch of {size} images?",
                f"Pass --config.run.batch_size={size}, or choose a target with fewer chips.",
            )
        rows = sharding.batch_sharding(mesh)
        return dataclasses.replace(
            self,
            state=sharding.placed_shapes(self.state, sharding.param_shardings(self.state, mesh)),
            frozen=sharding.placed_shapes(self.frozen, sharding.param_shardings(self.frozen, mesh)),
            batch=sharding.placed_shapes(self.batch, jax.tree.map(lambda _: rows, self.batch)),
        )


def prepare(config, num_examples: int = 0, *, platform: str = "tpu") -> PlannedStep:
    """Describe the step that a config trains; what the config leaves open is what the published recipe used.

    Args:
        num_examples: images of an epoch; 0 takes those of the data set.
        platform: that of the target's chip, whose implementations "auto" means.

    Raises:
        UserError: the config is inconsistent, of a stage without training, or of a set of unknown length.
    """
    config, notes = abstract_task.complete(config)
    chosen = implementations.resolve_auto(config.efficiency, _JAX_NAMES[platform])
    config = _changed(config, {f"efficiency.{key}": value for key, value in chosen.items()})
    config_lib.validate(config)
    num_examples = abstract_task.count_examples(config, num_examples)
    config_lib.validate(config, num_examples)
    return _planned(config, num_examples, notes)


def varied(step: PlannedStep, **keys) -> PlannedStep:
    """Return the step of the same config with other values of `{"section.key": value}`.

    It is traced again only where the cost of one image may have changed.
    """
    return _planned(_changed(step.config, keys), step.num_examples, step.notes)


def _planned(config, num_examples: int, notes: tuple[str, ...]) -> PlannedStep:
    probe = _changed(config, dict(zip(_SAME_TRACE, (traced.PROBE_BATCH, 1, -1, 1, 1), strict=True)))
    state, frozen, rows, cost = _traced(config_lib.to_json(probe))
    batch = abstract_task.batch_shapes(rows, config.run.batch_size)
    return PlannedStep(config, num_examples, notes, state, frozen, batch, cost)


@functools.lru_cache(maxsize=16)
def _traced(config_json: str) -> tuple[PyTree, PyTree, PyTree, traced.StepCost]:
    """Return the shapes of state, frozen networks and probe batch of a config, and the cost of its step."""
    config = config_lib.from_json(config_json)
    task, batch, function, state = _train_step(config, 1000 * traced.PROBE_BATCH)
    return state, task.frozen, batch, traced.step_cost(function, state.params, state, task.frozen, batch)


def _train_step(config, num_examples: int) -> tuple[Any, PyTree, TrainStep, PyTree]:
    """Return the task of a config, the shapes of its batch, its step, and the shapes of its state."""
    description = abstract_task.describe(config, num_examples)
    task, average_decay = description.task, config.optim.weight_average
    optimizer, schedule = optim.for_task(task, config.optim, *_schedule_steps(config, num_examples))
    mesh = _abstract_mesh(dict.fromkeys(sharding.AXES, 1))
    state = state_lib.abstract(task, optimizer, mesh, config.seed, keep_average=average_decay > 0)
    function = make_train_step(
        task,
        optimizer,
        schedule=schedule,
        seed=config.seed,
        average_decay=average_decay,
        accumulation_steps=config.efficiency.accumulation_steps,
    )
    return task, description.batch, function, state


def _changed(config, keys: Mapping[str, Any]):
    config = config.copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(keys)
    return config.lock()


def start_compilers() -> None:
    """Let compilers start for chips that are not here; call it before jax looks for devices."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    jax.config.update("jax_platforms", "cpu")  # jax has read its environment already


def compile_and_predict(step: PlannedStep, target: Target) -> Prediction:
    """Compile a step for a target, on the mesh that its config asks for, and return its prediction.

    Raises:
        UserError: the compiler is missing, or batch and mesh do not fit the target.
    """
    mesh = sharding.make_mesh(**step.config.mesh, devices=topologies.devices(target))
    network = target.network(list(mesh.devices.flat))
    step = step.placed(mesh)
    prediction = _from_trace(step, target, dict(mesh.shape), network)
    started = time.monotonic()
    try:
        compiled = _compile(step, mesh, target)
    except jax.errors.JaxRuntimeError as error:
        memory = _out_of_memory(str(error), prediction.memory.arguments)
        if memory is None:
            raise
        note = "The compiler refused the step: memory is its count, bytes moved and collectives follow the traced step."
        return dataclasses.replace(
            prediction,
            memory=memory,
            compile_s=time.monotonic() - started,
            notes=(*prediction.notes, note),
        )
    return _from_compiled(prediction, compiled, network, time.monotonic() - started)


def predict(step: PlannedStep, target: Target, mesh: Mapping[str, int] | None = None) -> Prediction:
    """Return the prediction of a step from its trace: nothing is compiled, no compiler is needed.

    Args:
        mesh: sizes of the axes, those of the config if None.

    Raises:
        UserError: batch and mesh do not fit the target.
    """
    sizes = sharding.mesh_sizes(target.count, **(mesh or step.config.mesh))
    return _from_trace(step.placed(_abstract_mesh(sizes)), target, sizes, target.network())


def _abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _schedule_steps(config, num_examples: int) -> tuple[int, int]:
    """Return warm-up and length of the schedule in steps."""
    sizes = {"batch_size": config.run.batch_size, "num_examples": num_examples}
    return config_lib.steps(config.optim.warmup, **sizes), config_lib.steps(config.run.duration, **sizes)


def _compile(step: PlannedStep, mesh: Mesh, target: Target):
    logging.info("compiling the step for %s on %s", dict(mesh.shape), target.name)
    _, _, function, _ = _train_step(step.config, step.num_examples)
    lowered = lower_step(function, step.state, step.frozen, step.batch, mesh)
    return lowered.compile(compiler_options=COMPILER_OPTIONS[target.chip.platform])


def _out_of_memory(message: str, arguments: int) -> Memory | None:
    """Return the memory that the message of a compiler names which refuses a step; None if it names none."""
    if match := _OUT_OF_MEMORY.search(message):
        peak, usable = _size(*match.groups()[:2]), _size(*match.groups()[2:])
        return Memory(arguments, peak - arguments, peak, usable)
    if match := _TEMPORARIES_OUT_OF_MEMORY.search(message):
        temporaries, usable = _size(*match.groups()[:2]), _size(*match.groups()[2:])
        return Memory(arguments, temporaries, arguments + temporaries, usable)
    return None


def _size(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit.upper()])


def _from_trace(step: PlannedStep, target: Target, mesh: dict[str, int], network: Network) -> Prediction:
    chip, config, cost = target.chip, step.config, step.cost
    accumulation_steps = config.efficiency.accumulation_steps
    images = config.run.batch_size / batch_shards(mesh)
    images_of_chip = config.run.batch_size / math.prod(mesh.values())
    frozen_bytes, weight_bytes = traced.device_bytes(step.frozen), traced.device_bytes(step.state.params)
    arguments = traced.device_bytes(step.state) + frozen_bytes + traced.device_bytes(step.batch)
    weights_fraction = weight_bytes / (FLOAT32_BYTES * cost.parameters)
    temporaries = cost.peak_live_bytes(images / accumulation_steps, weights_fraction)
    temporaries = int(temporaries + (weight_bytes if accumulation_steps > 1 else 0))  # the sums of the gradients
    usable = int(USABLE_FRACTION[chip.platform] * chip.hbm_bytes)
    collectives = expected_collectives(step, mesh, images)
    moved = (STATE_TRAFFIC + (accumulation_steps - 1) * ACCUMULATION_TRAFFIC) * weight_bytes / FLOAT32_BYTES
    moved += _traffic_ratio(cost, chip.platform, images / accumulation_steps) * images * cost.product_bytes
    moved += accumulation_steps * frozen_bytes
    # what is gathered or scattered is written and read again
    moved += 2 * sum(c.count * c.bytes for c in collectives if c.kind != "all-reduce")
    fast_flops = cost.flops - cost.exact_flops
    return Prediction(
        target=target,
        mesh=mesh,
        config=config,
        compiled=False,
        num_examples=step.num_examples,
        num_steps=step.num_steps,
        components=cost.components,
        memory=Memory(arguments, temporaries, arguments + temporaries, usable),
        traced_flops=images_of_chip * cost.flops,
        compiled_flops=None,
        bytes_moved=moved,
        collectives=collectives,
        compute_s=images_of_chip * (fast_flops / chip.flops + cost.exact_flops / chip.exact_flops),
        hbm_s=moved / chip.hbm_rate,
        interconnect_s=_collective_seconds(collectives, network),
        notes=step.notes,
    )


def _traffic_ratio(cost: traced.StepCost, platform: str, images: float) -> float:
    """Return the bytes moved for images over those that products read and write, with `images` on a chip."""
    least, greatest = TRAFFIC_RATIO[platform]
    product = images * cost.product_bytes / cost.num_products
    return least + (greatest - least) * product / (product + ON_CHIP_BYTES)


def _collective_seconds(collectives: Iterable[Collective], network: Network) -> float:
    return sum(collective.count * network.seconds(collective) for collective in collectives)


def _from_compiled(prediction: Prediction, compiled, network: Network, seconds: float) -> Prediction:
    """Return the prediction with what a compiled program says in place of what follows from the trace."""
    target = prediction.target
    sizes = compiled.memory_analysis()
    arguments, temporaries = sizes.argument_size_in_bytes, sizes.temp_size_in_bytes
    # outputs that are not written into arguments, and the program itself, take memory too
    outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    code = sizes.generated_code_size_in_bytes
    peak = max(getattr(sizes, "peak_memory_in_bytes", 0), arguments + temporaries + outputs + code)
    program = read_program(compiled.as_text())
    collectives = find_collectives(program, target.count, target.slices)
    moved = memory_bytes(program)
    return dataclasses.replace(
        prediction,
        compiled=True,
        compile_s=seconds,
        memory=Memory(arguments, temporaries, peak, prediction.memory.usable),
        compiled_flops=product_flops(program),
        bytes_moved=moved,
        collectives=collectives,
        hbm_s=moved / target.chip.hbm_rate,
        interconnect_s=_collective_seconds(collectives, network),
    )


def expected_collectives(step: PlannedStep, mesh: dict[str, int], images: float) -> list[Collective]:
    """Return the collectives that a step on a mesh must run; `images` are those of one chip.

    Gradients are summed over `data` and, in parts, over `fsdp`, where weights are gathered for the forward and for the
    backward pass. Over `tensor` each product whose input is sharded sums its output in the forward pass, and the
    product before it does so in the backward pass. The tokenizer sums its code statistics over the whole batch. With
    accumulation what goes over `data` does so once, in float32, as the TPU's compiler moves it out of the loop; the
    rest happens for each micro-batch.
    """
    config, local = step.config, traced.device_bytes(step.state.params)
    steps = config.efficiency.accumulation_steps
    summed = "bf16" if config.efficiency.get("gradient_dtype") == "bfloat16" and steps == 1 else "f32"
    found = []

    def add(kind: str, size: float, axes: tuple[str, ...], count: int = 1, dtype: str = "f32") -> None:
        group = _first_group(mesh, axes)
        if len(group) > 1 and count:
            parts = len(group) if kind == "reduce-scatter" else 1
            numbers = int(size) // FLOAT32_BYTES // parts
            found.append(Collective(kind, ((dtype, (numbers,)),), (group,), count))

    if mesh["fsdp"] > 1:
        whole = local * mesh["fsdp"]
        add("all-gather", whole, ("fsdp",), 2 * steps)
        add("reduce-scatter", whole, ("fsdp",), steps, dtype=summed)
    add("all-reduce", local, ("data",), dtype=summed)
    if mesh["tensor"] > 1:
        for size in _sharded_input_outputs(step):
            add("all-reduce", images / steps * FLOAT32_BYTES * size, ("tensor",), 2 * steps)
    if config.stage == "vqkd":
        # a sum of unit vectors and a count of each code; the other quantizers only count
        numbers = config.model.code_dim + 1 if config.model.quantizer == "ema" else 1
        add("all-reduce", FLOAT32_BYTES * config.model.codebook_size * numbers, ("data", "fsdp"))
    return found


def _sharded_input_outputs(step: PlannedStep) -> list[float]:
    """Return how many numbers each trained product whose weights are sharded along their input yields for an image."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(step.state.params):
        module = jax.tree_util.keystr(path[:-1], simple=True, separator="/")
        axes = (*leaf.sharding.spec, *(None,) * leaf.ndim)[: leaf.ndim]
        if leaf.ndim > 1 and "tensor" in np.atleast_1d(axes[-2] or ""):
            found.append(step.cost.output_sizes[module])
    return found


def _first_group(mesh: dict[str, int], axes: tuple[str, ...]) -> tuple[int, ...]:
    """Return the devices that differ from the first one in `axes` alone."""
    ids = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    return tuple(ids[tuple(slice(None) if axis in axes else 0 for axis in mesh)].reshape(-1).tolist())
