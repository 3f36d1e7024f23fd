"""The stages' steps on one synthetic batch that stays on the device: what is trained, tokenised and extracted.

Built from `recipes` and the losses of the tasks. The images are noise after the colour jitter, whose cost is measured
in the whole loop; weights are random. Each function returns a `Step`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from beitv2_jax.data.target_cache.encoding import CODE_IDS, FeatureEncoding
from beitv2_jax.models.backbone import Compute
from beitv2_jax.models.classifier import Classifier
from beitv2_jax.models.mim import MaskedImageModel
from beitv2_jax.models.ops import implementations
from beitv2_jax.models.preprocess import to_unit_range
from beitv2_jax.models.teachers import Teacher, clip_teacher
from beitv2_jax.models.upernet import Segmenter
from beitv2_jax.models.vqkd import VQKD
from beitv2_jax.planning.traced import flops_by_component
from beitv2_jax.tasks import common
from beitv2_jax.tasks import finetune as finetune_task
from beitv2_jax.tasks import mim as mim_task
from beitv2_jax.tasks import segment as segment_task
from beitv2_jax.tasks import vqkd as vqkd_task
from beitv2_jax.tasks.api import Batch, Task
from beitv2_jax.training import optim, sharding
from beitv2_jax.training import state as state_lib
from beitv2_jax.training.state import TrainState
from beitv2_jax.training.step import lower_step, make_train_step
from beitv2_jax.typing import PyTree
from benchmarks.recipes import TEACHER_WIDTH, Recipe

SEED = 0
Init = Callable[[jax.Array], PyTree]
SCHEDULE = {"warmup_steps": 10, "num_steps": 1000}


@dataclasses.dataclass(frozen=True)
class Step:
    """A program to be timed, and what it has to do.

    Attributes:
        lowered: the program.
        start: (compiled) -> function without arguments that starts the next call and returns what to wait for; makes
            weights and batch.
        images: of one call.
        flops: FLOPs of one call by component, counted in the traced program.
        parameters: trained numbers, or those of the frozen network where nothing is trained.
        forms: what "auto" came to mean, by setting.
    """

    lowered: jax.stages.Lowered
    start: Callable[[Callable], Callable[[], Any]]
    images: int
    flops: Mapping[str, int]
    parameters: int
    forms: Mapping[str, str]

    @property
    def traced_flops(self) -> int:
        """FLOPs of one call, with those of products that rematerialisation runs again."""
        return sum(self.flops.values())


def mim(recipe: Recipe, *, live: bool = False) -> Step:
    """Return the step of masked image modelling, with stored code ids or with a tokenizer in the step."""
    model = MaskedImageModel.from_arguments({**recipe.model, "image_size": recipe.views.image_size}, compute(recipe))
    num_masked = recipe.masking.num_masked
    side = recipe.views.image_size // recipe.model.patch_size
    networks = {}

    def code_ids(frozen, batch, images):
        return batch[CODE_IDS]

    if live:
        tokenizer, networks["tokenizer"] = untrained_tokenizer(recipe)

        def code_ids(frozen, batch, images):
            return encode(tokenizer, frozen["tokenizer"], images)

    rng, batch = np.random.default_rng(SEED), images_batch(recipe)
    batch["mask"] = masks(rng, recipe.run.batch_size, side * side, num_masked)
    if not live:
        batch[CODE_IDS] = rng.integers(0, recipe.model.codebook_size, batch["mask"].shape, np.int32)
    image = jnp.zeros((1, *batch["images"].shape[1:]))
    first_mask = jnp.arange(side * side)[None] < num_masked
    task = bare_task(
        "mim",
        init=lambda key: common.init_variables(model, key, image, first_mask, num_masked=num_masked, train=False),
        loss=mim_task.mim_loss(model, num_masked=num_masked, normalization=recipe.normalization, code_ids=code_ids),
    )
    return training_step(task, recipe, batch, networks)


def vqkd(recipe: Recipe, *, live: bool = False) -> Step:
    """Return the tokenizer's training step, with stored features (8 bits) or with a teacher in the step."""
    model = VQKD.from_arguments(
        {**recipe.model, "image_size": recipe.views.image_size, "teacher_width": recipe.teacher_width}, compute(recipe)
    )
    networks, targets = {}, vqkd_task.stored_features
    batch = images_batch(recipe)
    if live:
        teacher, networks["teacher"] = untrained_teacher(recipe)

        def targets(frozen, batch):
            return teacher.features(frozen["teacher"], batch["images"])

    else:
        shape = (recipe.run.batch_size, model.grid[0] * model.grid[1], recipe.teacher_width)
        features = np.random.default_rng(SEED).standard_normal(shape, np.float32)
        batch |= FeatureEncoding("int8", *shape[1:]).shrink(features)
    image = jnp.zeros((1, *batch["images"].shape[1:]))
    task = bare_task(
        "vqkd",
        init=lambda key: common.init_variables(model, key, image, train=False),
        loss=vqkd_task.vqkd_loss(model, targets),
        finish=vqkd_task.vqkd_finish(recipe.model.ema_decay, window=SCHEDULE["num_steps"]),
    )
    return training_step(task, recipe, batch, networks)


def finetune(recipe: Recipe) -> Step:
    """Return the step of fine-tuning with mixup, CutMix and random erasing, as published."""
    model = Classifier.from_arguments({**recipe.model, "image_size": recipe.views.image_size}, compute(recipe))
    batch = images_batch(recipe)
    classes = recipe.model.num_classes
    batch["labels"] = np.random.default_rng(SEED).integers(0, classes, recipe.run.batch_size, np.int32)
    image = jnp.zeros((1, *batch["images"].shape[1:]))
    task = bare_task(
        "finetune",
        init=lambda key: common.init_variables(model, key, image, train=False),
        loss=finetune_task.finetune_loss(
            model,
            num_classes=classes,
            normalization=recipe.normalization,
            label_smoothing=recipe.label_smoothing,
            **recipe.augment,
        ),
        layer_of=lambda path: common.layer_of(path, depth=recipe.model.depth),
        num_layers=recipe.model.depth,
    )
    return training_step(task, recipe, batch, {})


def segment(recipe: Recipe) -> Step:
    """Return the step of fine-tuning on label maps under UPerNet."""
    model = Segmenter.from_arguments({**recipe.model, "image_size": recipe.views.image_size}, compute(recipe))
    rng, batch, count = np.random.default_rng(SEED), images_batch(recipe), recipe.run.batch_size
    size = recipe.views.image_size
    batch["label_maps"] = rng.integers(0, recipe.model.num_classes, (count, size, size), np.uint8)
    batch["sizes"] = np.full((count, 2), size, np.int32)
    batch["distortion"] = np.tile(np.float32([16, 1.2, 1.2, 0.05, 0]), (count, 1))
    task = bare_task(
        "segment",
        init=lambda key: segment_task.init_segmenter(model, key),
        loss=segment_task.segment_loss(model, normalization=recipe.normalization, **recipe.loss),
        finish=segment_task.segment_finish,
        layer_of=lambda path: common.layer_of(path, depth=recipe.model.depth),
        num_layers=recipe.model.depth,
    )
    return training_step(task, recipe, batch, {})


def tokenize(recipe: Recipe) -> Step:
    """Return what the tokenize stage computes for a batch, with the tokenizer of a mim recipe."""
    tokenizer, network = untrained_tokenizer(recipe)

    def apply(frozen, batch):
        return encode(tokenizer, frozen, common.view_pixels(batch))

    return _inference(apply, network, recipe)


def extract(recipe: Recipe) -> Step:
    """Return what the extract stage computes for a batch, with the teacher of a vqkd recipe: features in 8 bits."""
    teacher, network = untrained_teacher(recipe)
    encoding = FeatureEncoding("int8", teacher.grid[0] * teacher.grid[1], teacher.width)

    def apply(frozen, batch):
        return encoding.shrink(teacher.features(frozen, batch["images"]), xp=jnp)

    return _inference(apply, network, recipe)


def training_step(task: Task, recipe: Recipe, batch: Batch, networks: Mapping[str, Init]) -> Step:
    """Return the optimizer step of a task on a recipe's device, beside frozen `networks`.

    Nothing is on the device before the step is started.
    """
    mesh = sharding.make_mesh(devices=[device_of(recipe)])
    optimizer, schedule = optim.for_task(task, recipe.optim, **SCHEDULE)
    step = make_train_step(task, optimizer, schedule=schedule, seed=SEED, average_decay=0.0)
    state = state_lib.abstract(task, optimizer, mesh, SEED)
    init = functools.partial(_variables, networks)
    arguments = state, _shapes(init, mesh), _batch_shapes(batch, mesh)

    def start(compiled):
        # donated: every call goes on from the state that the last one left
        held, frozen, placed = [_started(state)], _drawn(arguments[1]), sharding.place_batch(batch, mesh)

        def run():
            held[0], metrics = compiled(held[0], frozen, placed)
            return metrics

        return run

    return Step(
        lower_step(step, *arguments, mesh),
        start,
        recipe.run.batch_size,
        flops_by_component(step, *arguments),
        _numbers(state.params),
        _forms(recipe),
    )


def _inference(apply: Callable, network: Init, recipe: Recipe) -> Step:
    mesh, batch = sharding.make_mesh(devices=[device_of(recipe)]), images_batch(recipe)
    init = functools.partial(network, jax.random.key(SEED))
    arguments = _shapes(init, mesh), _batch_shapes(batch, mesh)

    def start(compiled):
        frozen, placed = _drawn(arguments[0]), sharding.place_batch(batch, mesh)
        return lambda: compiled(frozen, placed)

    return Step(
        jax.jit(apply).lower(*arguments),
        start,
        recipe.run.batch_size,
        flops_by_component(apply, *arguments),
        _numbers(arguments[0]),
        _forms(recipe),
    )


def _started(shapes: TrainState) -> TrainState:
    """Return a state of these shapes: weights and codebook of `_drawn`, zeros else."""
    zeros = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), shapes)
    return zeros.replace(params=_drawn(shapes.params), model_state=_drawn(shapes.model_state))


def _drawn(shapes: PyTree) -> PyTree:
    """Return small random numbers, ones for scales of norms; the models' own draws would take seconds to compile."""
    rng = np.random.default_rng(SEED)

    def draw(path, leaf):
        values = 0.02 * rng.standard_normal(leaf.shape, np.float32)
        return jax.device_put(values + sharding.path_name(path).endswith("scale"), leaf.sharding)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _variables(networks: Mapping[str, Init]) -> PyTree:
    return {name: init(jax.random.key(SEED)) for name, init in networks.items()}


def _shapes(init: Callable[[], PyTree], mesh: Mesh) -> PyTree:
    shapes = jax.eval_shape(init)
    return jax.tree.map(_placed, shapes, sharding.param_shardings(shapes, mesh))


def _batch_shapes(batch: Batch, mesh: Mesh) -> PyTree:
    return jax.tree.map(lambda rows: _placed(rows, sharding.batch_sharding(mesh)), batch)


def _placed(leaf, where) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype), sharding=where)


def bare_task(name: str, **functions) -> Task:
    """Return a task that has no data."""
    return Task(name=name, num_train_examples=0, train_batches=None, no_decay=common.released_no_decay, **functions)


def compute(recipe: Recipe) -> Compute:
    """Return how the networks of a recipe compute on its device."""
    names = Compute.__dataclass_fields__
    settings = {key: value for key, value in recipe.efficiency.items() if key in names}
    return Compute(**implementations.resolve_auto(settings, device_of(recipe).platform))


def encode(model: VQKD, variables: PyTree, images: jax.Array) -> jax.Array:
    """Return the code id of every patch of pixels 0..255."""
    return model.apply(variables, to_unit_range(images), method=VQKD.encode)


def _forms(recipe: Recipe) -> dict[str, str]:
    chosen = compute(recipe)
    return {key: getattr(chosen, key) for key in implementations.AUTO}


def device_of(recipe: Recipe) -> jax.Device:
    """Return the device that a recipe names, which may be of a topology; by default the first one here."""
    return recipe.get("device") or jax.devices()[0]


def images_batch(recipe: Recipe) -> Batch:
    """Return random pixels, every image counting."""
    count, size = recipe.run.batch_size, recipe.views.image_size
    pixels = np.random.default_rng(SEED).integers(0, 256, (count, size, size, 3), np.uint8)
    return {"images": pixels, "weight": np.ones(count, np.float32)}


def masks(rng: np.random.Generator, count: int, num_patches: int, num_masked: int) -> np.ndarray:
    """Return masks that hide exactly `num_masked` patches of every image."""
    return rng.permuted(np.tile(np.arange(num_patches) < num_masked, (count, 1)), axis=1)


def untrained_tokenizer(recipe: Recipe) -> tuple[VQKD, Init]:
    """Return the tokenizer of a mim recipe, and what draws its variables."""
    size = recipe.views.image_size
    model = VQKD.from_arguments(
        {**recipe.tokenizer, "image_size": size, "teacher_width": TEACHER_WIDTH}, compute(recipe)
    )
    image = jnp.zeros((1, size, size, 3))
    return model, lambda key: model.init(key, image, train=False)


def untrained_teacher(recipe: Recipe) -> tuple[Teacher, Init]:
    """Return a teacher like CLIP of the sizes in a vqkd recipe, and what draws its weights."""
    side = recipe.views.image_size // recipe.model.encoder.patch_size
    teacher, network = clip_teacher(
        recipe.teacher,
        recipe.teacher_width,
        image_size=recipe.views.image_size,
        grid=(side, side),
        dtype=recipe.efficiency.dtype,
    )
    image = jnp.zeros((1, teacher.input_size, teacher.input_size, 3))
    return teacher, lambda key: network.init(key, image)["params"]


def _numbers(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
