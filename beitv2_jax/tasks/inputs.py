"""Common to all stages: how they compute, their initial weights, their sources, and their batches."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jaxtyping import Float

from beitv2_jax.config.train_labels import parse_train_labels
from beitv2_jax.convert.adapt import adapt_weights
from beitv2_jax.convert.arguments import flat_arguments
from beitv2_jax.convert.files import group_by_reason
from beitv2_jax.convert.weights import Weights, read_backbone
from beitv2_jax.data import pipeline
from beitv2_jax.data.augment import eval_crop_fraction
from beitv2_jax.data.masking import block_mask
from beitv2_jax.data.randaugment import RandAugment
from beitv2_jax.data.sources import LabelledSource, Source, open_splits
from beitv2_jax.data.sources.labels import few_labels
from beitv2_jax.data.target_cache.reader import TargetReader
from beitv2_jax.data.transform import TrainTransform
from beitv2_jax.errors import UserError
from beitv2_jax.models.backbone import Compute
from beitv2_jax.models.ops import implementations
from beitv2_jax.rng import host_rng
from beitv2_jax.typing import PyTree


def compute(config) -> Compute:
    """Return how the networks of a run compute: `config.efficiency` with every 'auto' resolved for this platform."""
    names = {field.name for field in dataclasses.fields(Compute)}
    requested = {name: value for name, value in config.efficiency.items() if name in names}
    platform = jax.default_backend()
    chosen = implementations.resolve_auto(requested, platform)
    described = [f"{name} {chosen[name]}" for name in implementations.AUTO if name in chosen]
    logging.info("implementations on %s: %s", platform, ", ".join(described))
    return Compute(**chosen)


def check_implementations(config) -> None:
    """Check that what `config.efficiency` of a trained stage names can run on this platform; a plan does not call it.

    Raises:
        UserError: an implementation cannot run here, or not with the sizes of the model.
    """
    if "attention" not in config.get("efficiency", {}):
        return
    parts = [config.model] if "width" in config.model else [config.model.encoder, config.model.decoder]
    situation = {
        "platform": jax.default_backend(),
        "dtype": config.efficiency.dtype,
        "head_widths": [part.width // part.num_heads for part in parts],
    }
    for name, valid in implementations.NAMES.items():
        chosen = config.efficiency.get(name, "auto")
        if problem := implementations.obstacle(chosen, **situation):
            others = [other for other in valid if not implementations.obstacle(other, **situation)]
            raise UserError(
                f"efficiency.{name}={chosen!r} cannot run here: {problem}.",
                "Did you mean the implementation that is the default here?",
                f"Write --config.efficiency.{name}=auto, or one of those that run here: {', '.join(others)}.",
            )


def initial_variables(config, kind: str, model) -> dict[str, PyTree]:
    """Return what `config.init_from` gives a fresh model of `kind`, as the `initial` of a task; {} without it.

    Raises:
        UserError: there are no readable weights, or they do not fit the model.
    """
    if not config.init_from:
        return {}
    weights = read_backbone(config.init_from)
    if kind == "vqkd" and not weights.normalization_known:
        weights = dataclasses.replace(weights, normalization=config.teacher.normalization or weights.normalization)
    _compare_normalization(config, weights)
    _note_resized_positions(config, weights)
    for text in (*weights.assumptions, *(f"not read: {text}" for text in group_by_reason(weights.dropped))):
        logging.info("%s: %s", config.init_from, text)
    weights = adapt_weights(weights, kind, flat_arguments(model))
    found = {"params": weights.variables["params"], "model_state": weights.model_state}
    variables = {name: tree for name, tree in found.items() if tree}
    given = sum(array.size for array in jax.tree.leaves(variables))
    logging.info("initialised %s parameters from %s (layout: %s)", f"{given:,}", config.init_from, weights.layout)
    for text in group_by_reason(weights.dropped):
        logging.info("not used from %s: %s", config.init_from, text)
    return variables


def _compare_normalization(config, weights: Weights) -> None:
    """Log a warning if the run normalises its images otherwise than its initial weights were trained with."""
    trained = "half" if weights.kind == "vqkd" else weights.normalization  # both map images to [-1, 1]
    used = config.get("normalization", trained)
    if weights.normalization_known and used != trained:
        logging.warning(
            "normalization=%s, but the weights of %s were trained with %s; write --config.normalization=%s to keep it",
            used,
            config.init_from,
            trained,
            trained,
        )


def _note_resized_positions(config, weights: Weights) -> None:
    """Log that the positions of the initial weights are those of another grid, where they are."""
    encoder = weights.arguments.get("encoder", weights.arguments)
    grids = [size // encoder["patch_size"] for size in (weights.arguments["image_size"], config.views.image_size)]
    if grids[0] != grids[1] and encoder.get("position", "absolute") != "none":
        logging.info(
            "the positions of %s are resized from a grid of %d x %d patches to %d x %d",
            config.init_from,
            *(side for side in grids for _ in range(2)),
        )


@dataclasses.dataclass(frozen=True)
class Opened:
    """What a trained stage learns from.

    Attributes:
        sources: the train and the eval split.
        stored: readers of their stored targets, where those are stored.
        network: the teacher or tokenizer that makes the targets in the step, where they are not.
        frozen: its weights, by its name.
        initial: trained weights that the model starts from, as `initial_variables` returns them.
        class_weights: how much an image of each class counts in the loss, of a multi-label set how much one without it
            and one with it; None: every image counts 1.
    """

    sources: tuple[Source, Source]
    stored: tuple[TargetReader | None, TargetReader | None] = (None, None)
    network: Any = None
    frozen: PyTree = dataclasses.field(default_factory=dict)
    initial: PyTree = dataclasses.field(default_factory=dict)
    class_weights: Float[np.ndarray, "k"] | Float[np.ndarray, "2 k"] | None = None


def open_sources(config) -> tuple[Source, Source]:
    """Open the train and eval splits that `config.data` names."""
    data = config.data
    return open_splits(data.source, data.train_split, data.eval_split, data.data_dir)


def open_labelled_sources(config) -> tuple[Source, Source]:
    """Open the train and eval splits for a stage that learns labels; examples without a label count as unreadable.

    Of the training split the images are taken that `config.data.train_labels` asks for, by the seed of the config.

    Raises:
        UserError: as `open_sources`, or fewer than two classes have images to learn from.
    """
    source, eval_source = open_sources(config)
    if (num_classes := num_classes_with_images(source)) < 2:
        raise UserError(
            f"{source.name} has {num_classes} classes with images in its split {source.split}, which leaves nothing to "
            "classify.",
            "Did you mean a data set with labels, or the folder above this one?",
            "Write --config.data.source=folder:PATH with one folder per class, or tfds:NAME of a labelled data set; "
            "where labels are numbers or texts without names, put labels.txt with one class name a line beside the "
            "records.",
        )
    if amount := config.data.get("train_labels", ""):
        source = few_labels(source, seed=config.seed, **parse_train_labels(amount))
    return LabelledSource(source), LabelledSource(eval_source)


def num_classes_with_images(source: Source) -> int:
    """Return how many classes can be learnt from a source; below two there is nothing to classify."""
    return source.num_classes - len(source.empty_classes)


def train_batches(
    config,
    source: Source,
    *,
    mask: dict | None = None,
    targets: TargetReader | None = None,
    randaugment: RandAugment | None = None,
):
    """Return the factory (process_index, process_count) -> iterator of training batches of random views.

    Each example comes with its mask (`mask`: arguments of `block_mask`) and its stored targets where asked for; these
    make a tokenizer's own view needless.
    """
    views = {**config.views, **({} if targets is None else _ONE_VIEW)}
    transform = TrainTransform(seed=config.seed, mask=mask, targets=targets, randaugment=randaugment, **views)
    return transformed_batches(config, source, transform)


def transformed_batches(config, source: Source, transform: Callable) -> Callable[[int, int], pipeline.TrainIterator]:
    """Return the factory (process_index, process_count) -> iterator of batches of transformed examples."""

    def batches(process_index: int, process_count: int) -> pipeline.TrainIterator:
        return pipeline.train_iterator(
            source,
            transform,
            batch_size=config.run.batch_size,
            seed=config.seed,
            process_index=process_index,
            process_count=process_count,
            **reading(config),
        )

    return batches


_ONE_VIEW = {"tokenizer_image_size": 0, "tokenizer_interpolation": ""}


class TokenizerView(NamedTuple):
    """The view that the tokenizer sees of an image: side in pixels, and how it was resized to it."""

    image_size: int
    interpolation: str


def tokenizer_view(config) -> TokenizerView:
    """Return the tokenizer's view of a config, which is the model's unless the config has another for it."""
    views = config.views
    return TokenizerView(
        views.get("tokenizer_image_size", 0) or views.image_size,
        views.get("tokenizer_interpolation", "") or views.interpolation,
    )


def reading(config) -> dict:
    """Return how a config wants batches to be prepared, as arguments of `pipeline.Reading`; no result depends on it."""
    return {"num_threads": config.data.num_threads, "num_workers": config.data.num_workers}


def eval_batches(source: Source, config, process_index: int, process_count: int) -> pipeline.Batches:
    """Return every example of `source` once as a centre crop, and as the tokenizer's own one where it has another size.

    The last batch is padded; `weight` 0 marks padding and unreadable images.
    """
    return pipeline.eval_batches(
        source,
        image_size=config.views.image_size,
        tokenizer_image_size=config.views.get("tokenizer_image_size", 0),
        batch_size=config.run.batch_size,
        crop_fraction=eval_crop_fraction(
            config.views.image_size, config.get("evaluation", {}).get("crop_fraction", 0.0)
        ),
        process_index=process_index,
        process_count=process_count,
        **reading(config),
    )


def eval_batches_with(extra: Callable[[dict], dict], source: Source, config, process_index: int, process_count: int):
    """Yield `eval_batches` with entries added that `extra` computes from the batch on the host: targets, masks."""
    for batch in eval_batches(source, config, process_index, process_count):
        yield {**batch, **extra(batch)}


def eval_masks(seed: int, grid: tuple[int, int], masking: dict) -> Callable[[dict], dict]:
    """Return an `extra` for `eval_batches_with` that adds one mask per example, a function of (seed, example id)."""

    def extra(batch: dict) -> dict:
        rngs = (host_rng(seed, "eval_mask", int(i)) for i in batch["example_ids"])
        return {"mask": np.stack([block_mask(rng, grid, **masking).reshape(-1) for rng in rngs])}

    return extra
