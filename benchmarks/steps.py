"""The step of every stage on one synthetic batch that stays on the device: training, tokenising, extracting.

Built from the real configs by `planning.abstract_task`, without data or trained weights. Each function returns a
`Step`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from beitv2_jax.data.target_cache.encoding import FeatureEncoding
from beitv2_jax.models.ops import implementations
from beitv2_jax.planning import abstract_task
from beitv2_jax.planning.abstract_task import PUBLISHED, Description
from beitv2_jax.planning.traced import flops_by_component
from beitv2_jax.sizes import SIZES
from beitv2_jax.tasks.api import Batch
from beitv2_jax.tasks.common import view_pixels
from beitv2_jax.training import optim, sharding
from beitv2_jax.training import state as state_lib
from beitv2_jax.training.state import TrainState
from beitv2_jax.training.step import lower_step, make_train_step
from beitv2_jax.typing import PyTree
from benchmarks.configs import SMALL

SEED = 0
NUM_EXAMPLES = 1_281_167
SCHEDULE = {"warmup_steps": 10, "num_steps": 1000}


@dataclasses.dataclass(frozen=True)
class Step:
    """A program to be timed, and the work that it does.

    Attributes:
        lowered: the program.
        start: (compiled) -> function without arguments that starts the next call and returns what to wait for; makes
            weights and batch.
        images: of one call.
        flops: FLOPs of one call by component, counted in the traced program (`planning.traced.flops_by_component`).
        parameters: number of trained parameters, or of the parameters of the frozen network if nothing is trained.
        implementations: the implementations that it uses, by setting.
    """

    lowered: jax.stages.Lowered
    start: Callable[[Callable], Callable[[], Any]]
    images: int
    flops: Mapping[str, int]
    parameters: int
    implementations: Mapping[str, str]

    @property
    def traced_flops(self) -> int:
        """FLOPs of one call, with those of products that rematerialisation runs again."""
        return sum(self.flops.values())


def mim(config: ConfigDict, *, live: bool = False) -> Step:
    """Return the step of masked image modelling, with stored code ids or with a tokenizer in the step."""
    return _training_step(config, {"tokenizer.run": PUBLISHED} if live else {"tokenizer.codes": "stored"})


def vqkd(config: ConfigDict, *, live: bool = False) -> Step:
    """Return the tokenizer's training step, with stored features (8 bits) or with a teacher in the step."""
    return _training_step(config, {"teacher.weights": PUBLISHED} if live else {"teacher.features": "stored"})


def finetune(config: ConfigDict) -> Step:
    """Return the step of fine-tuning with mixup, CutMix and random erasing, as published."""
    return _training_step(config, {})


def segment(config: ConfigDict) -> Step:
    """Return the step of fine-tuning on label maps under UPerNet."""
    return _training_step(config, {})


def tokenize(config: ConfigDict) -> Step:
    """Return what the tokenize stage computes for a batch, with the tokenizer of a mim config."""
    description = describe(config, {"tokenizer.run": PUBLISHED})
    tokenizer = description.network
    return _inference(
        lambda frozen, batch: tokenizer.encode(frozen, view_pixels(batch)),
        description.task.frozen["tokenizer"],
        description,
    )


def extract(config: ConfigDict) -> Step:
    """Return what the extract stage computes for a batch, with the teacher of a vqkd config: features in 8 bits."""
    description = describe(config, {"teacher.weights": PUBLISHED})
    teacher = description.network
    encoding = FeatureEncoding("int8", teacher.grid[0] * teacher.grid[1], teacher.width)
    return _inference(
        lambda frozen, batch: encoding.shrink(teacher.features(frozen, batch["images"]), xp=jnp),
        description.task.frozen["teacher"],
        description,
    )


def describe(config: ConfigDict, changes: Mapping[str, Any]) -> Description:
    """Return the task of a config; small configs get a small teacher or tokenizer."""
    config = config.copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(changes)
    if any(value == "stored" for value in changes.values()):
        config.views.num_views = 1
    model = config.model.get("encoder", config.model)
    return abstract_task.describe(config.lock(), NUM_EXAMPLES, SIZES["base"] if model.width >= 768 else SMALL)


def _training_step(config: ConfigDict, changes: Mapping[str, Any]) -> Step:
    """Return the optimizer step of a config on its device; nothing is on the device before it is started."""
    description = describe(config, changes)
    task, mesh = description.task, sharding.make_mesh(devices=[config.device])
    optimizer, schedule = optim.for_task(task, config.optim, **SCHEDULE)
    step = make_train_step(task, optimizer, schedule=schedule, seed=SEED, average_decay=0.0)
    state = state_lib.abstract(task, optimizer, mesh, SEED)
    batch = make_batch(description)
    arguments = state, _placed_shapes(task.frozen, mesh), _batch_shapes(description, mesh)

    def start(compiled):
        # the state is donated: every call continues from the one that the last call left
        held, frozen, placed = [_started(state)], _drawn(arguments[1]), sharding.place_batch(batch, mesh)

        def run():
            held[0], metrics = compiled(held[0], frozen, placed)
            return metrics

        return run

    return Step(
        lower_step(step, *arguments, mesh),
        start,
        config.run.batch_size,
        flops_by_component(step, *arguments),
        _count(state.params),
        _implementations(config),
    )


def _inference(apply: Callable, frozen: PyTree, description: Description) -> Step:
    config = description.config
    mesh, batch = sharding.make_mesh(devices=[config.device]), make_batch(description)
    arguments = _placed_shapes(frozen, mesh), _batch_shapes(description, mesh)

    def start(compiled):
        weights, placed = _drawn(arguments[0]), sharding.place_batch(batch, mesh)
        return lambda: compiled(weights, placed)

    return Step(
        jax.jit(apply).lower(*arguments),
        start,
        config.run.batch_size,
        flops_by_component(apply, *arguments),
        _count(frozen),
        _implementations(config),
    )


def make_batch(description: Description) -> Batch:
    """Return a batch of random pixels, masks and labels; everything else is that of the row in `description`."""
    config, rng = description.config, np.random.default_rng(SEED)
    count = config.run.batch_size
    batch = {name: np.repeat(array, count, axis=0) for name, array in description.row.items()}
    batch["images"] = rng.integers(0, 256, batch["images"].shape, np.uint8)
    if "mask" in batch:
        batch["mask"] = rng.permuted(batch["mask"], axis=1)
    for name, limit in (
        ("code_ids", config.model.get("codebook_size")),
        ("labels", config.model.get("num_classes")),
        ("label_maps", config.model.get("num_classes")),
    ):
        if name in batch and limit:
            batch[name] = rng.integers(0, limit, batch[name].shape, batch[name].dtype)
    return batch


def _started(shapes: TrainState) -> TrainState:
    """Return a state of these shapes: weights and model state of `_drawn`, zeros elsewhere."""
    zeros = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), shapes)
    return zeros.replace(params=_drawn(shapes.params), model_state=_drawn(shapes.model_state))


def _drawn(shapes: PyTree) -> PyTree:
    """Return small random numbers, near one for the scales of norms; real initialisation would take long to compile."""
    rng = np.random.default_rng(SEED)

    def draw(path, leaf):
        values = 0.02 * rng.standard_normal(leaf.shape, np.float32)
        return jax.device_put(values + sharding.path_name(path).endswith("scale"), leaf.sharding)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _placed_shapes(shapes: PyTree, mesh: Mesh) -> PyTree:
    return sharding.placed_shapes(shapes, sharding.param_shardings(shapes, mesh))


def _batch_shapes(description: Description, mesh: Mesh) -> PyTree:
    rows = sharding.batch_sharding(mesh)
    return sharding.placed_shapes(description.batch, jax.tree.map(lambda _: rows, description.batch))


def _implementations(config: ConfigDict) -> dict[str, str]:
    return {key: config.efficiency[key] for key in implementations.AUTO if key in config.efficiency}


def _count(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
