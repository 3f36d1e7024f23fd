"""Run the dense evaluation: cache the patch features of both splits, then classify the pixels of the eval split.

The number of neighbours, their distance and the strength of the logistic regression are chosen on training images that
are held out. The eval split is used once, by what was chosen, fitted on all training images.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8
from ml_collections import ConfigDict

from beitv2_jax.data.decode import decode_image
from beitv2_jax.data.segmentation.labels import IGNORED
from beitv2_jax.data.sources import Source
from beitv2_jax.evaluation import dense as arithmetic
from beitv2_jax.evaluation.dense import Neighbors
from beitv2_jax.evaluation.features import OnMove, divided
from beitv2_jax.evaluation.standardization import Standardization, standardization
from beitv2_jax.report.segmentation import draw_comparison
from beitv2_jax.rng import host_rng
from beitv2_jax.runners.feature_cache import cached_arrays
from beitv2_jax.runtime import watchdog
from beitv2_jax.runtime.buckets import AnyPath, as_path
from beitv2_jax.tasks import dense, segment
from beitv2_jax.tasks.dense import Dense
from beitv2_jax.tasks.frozen import FeatureSet
from beitv2_jax.training.inference import apply_batches
from beitv2_jax.training.sharding import make_mesh

BANK_ROWS = 262_144
"""Patches of the bank on a device at a time."""
QUERY_ROWS = 2048
"""Patches that are classified at a time, on all devices of the process."""
DRAWN_IMAGES = 5
TITLES = {"knn": "nearest patches", "logistic": "logistic regression"}
"""Classifier -> its title in the picture."""


class Patches(NamedTuple):
    """The patches of images: their features, the classes of their pixels, and the examples that the images are."""

    features: Float[np.ndarray, "b n d"]
    labels: UInt8[np.ndarray, "b n p"]
    example_ids: Int[np.ndarray, "b"]

    def of(self, images: np.ndarray) -> "Patches":
        """Return the patches of some of the images."""
        return Patches(*(array[images] for array in self))


class Bank(NamedTuple):
    """Patches to learn from, most of whose pixels have a class."""

    features: Float[np.ndarray, "m d"]
    labels: UInt8[np.ndarray, "m p"]
    majority: UInt8[np.ndarray, "m"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a classifier is fitted to and scored on.

    Attributes:
        train: patches of all training images.
        fit: images to learn from while something is to be chosen.
        held_out: patches of the other ones, which choose.
        test: of the eval split.
        standard: what standardises features, by those of `fit`.
        num_classes: number of classes.
        settings: the section `dense` of the config.
        seed: of draws.
    """

    train: Patches
    fit: Int[np.ndarray, "b"]
    held_out: Patches
    test: Patches
    standard: Standardization
    num_classes: int
    settings: ConfigDict
    seed: int

    def bank(self, patches: Patches) -> Bank:
        """Return those of `patches` to learn from: `dense.max_patches` at most, by a draw."""
        return bank_of(patches, self.settings.max_patches, self.seed)


class Scored(NamedTuple):
    """What one classifier makes of the eval split: metrics, and predicted label maps of the images to draw."""

    metrics: dict[str, float]
    drawn: UInt8[np.ndarray, "b S S"]


def run(task: Dense, config, workdir: str) -> dict[str, float]:
    """Evaluate every feature set and return its metrics as {'pretrained/knn/mean_iou': ..., ...}.

    `train_examples` and `eval_examples` say how many images they are of: those that could be read. The IoU of a class
    has its name, or its number where the data have no names. `dense.png` shows what the pre-trained features say.

    Features are cached in `features/<set>_<split>.<hash>/` under `workdir`, the hash of what they were made from; what
    is cached is not computed again. Processes share the computing of the features, and each classifies for itself.

    Raises:
        Preempted: this process was asked to stop; cached features stay.
    """
    with watchdog.watched("dense", workdir, config.run.hang_timeout) as on_move:
        return _run(task, config, workdir, on_move)


def _run(task: Dense, config, workdir: str, on_move: OnMove) -> dict[str, float]:
    names, metrics = _class_names(task, config), {}
    for feature_set in task.feature_sets:
        train, test = (cached_patches(feature_set, task, source, config, workdir, on_move) for source in task.sources)
        metrics |= {"train_examples": len(train.features), "eval_examples": len(test.features)}
        order = host_rng(config.seed, "held out images").permutation(len(train.features))
        # the first ones are held out
        fit, held = map(np.sort, divided(order[::-1], config.dense.validation_fraction))
        problem = Problem(
            train=train,
            fit=fit,
            held_out=train.of(held),
            test=test,
            standard=standardization(train.features, fit, on_move),
            num_classes=config.model.num_classes,
            settings=config.dense,
            seed=config.seed,
        )
        scored = {"knn": by_neighbors(problem, on_move), "logistic": by_regression(problem, on_move)}
        for name, of_classifier in scored.items():
            for key, value in of_classifier.metrics.items():
                label = names[int(key.removeprefix("iou/"))] if key.startswith("iou/") else ""
                metrics[f"{feature_set.name}/{name}/{f'iou/{label}' if label else key}"] = value
        if feature_set.name == "pretrained" and jax.process_index() == 0:
            _draw(task, test, scored, names, as_path(workdir) / "dense.png")
    return metrics


def by_neighbors(problem: Problem, on_move: OnMove) -> Scored:
    """Classify by the nearest patches: every pixel has the most frequent class of theirs at its place in the patch."""
    bank, queries, found = problem.bank(problem.train.of(problem.fit)), problem.held_out, {}
    for cosine in (True, False):
        neighbors = nearest(bank, queries, problem.standard, max(problem.settings.neighbors), cosine, on_move)
        for count in problem.settings.neighbors:
            confusion, _ = _judged(queries, _votes(bank, neighbors, count, on_move), problem.num_classes)
            found[count, cosine] = segment.summarize({"confusion": confusion})["mean_iou"]
    count, cosine = max(found, key=found.get)
    bank = problem.bank(problem.train)
    neighbors = nearest(bank, problem.test, problem.standard, count, cosine, on_move)
    confusion, drawn = _judged(problem.test, _votes(bank, neighbors, count, on_move), problem.num_classes)
    chosen = {"neighbors": count, "cosine": float(cosine), "held_out_mean_iou": found[count, cosine]}
    return Scored(chosen | segment.summarize({"confusion": confusion}), drawn)


def by_regression(problem: Problem, on_move: OnMove) -> Scored:
    """Classify by logistic regression on the most frequent class of each patch, which all its pixels are given."""

    def judged(bank: Bank, queries: Patches, strength: float):
        on_move("fitting")
        fitted = arithmetic.fit_logistic(
            bank.features,
            bank.majority,
            problem.standard,
            num_classes=problem.num_classes,
            strength=strength,
            max_iterations=problem.settings.max_iterations,
        )
        return _judged(queries, _decided(fitted, queries, problem.standard, on_move), problem.num_classes)

    bank, found = problem.bank(problem.train.of(problem.fit)), {}
    for strength in problem.settings.strengths:
        confusion, _ = judged(bank, problem.held_out, strength)
        found[strength] = segment.summarize({"confusion": confusion})["mean_iou"]
    strength = max(found, key=found.get)
    confusion, drawn = judged(problem.bank(problem.train), problem.test, strength)
    chosen = {"strength": strength, "held_out_mean_iou": found[strength]}
    return Scored(chosen | segment.summarize({"confusion": confusion}), drawn)


def bank_of(patches: Patches, max_patches: int, seed: int) -> Bank:
    """Return the patches whose most frequent label is a class; `max_patches` of them by a draw, unless that is 0."""
    features, labels = (array.reshape(-1, array.shape[-1]) for array in (patches.features, patches.labels))
    majority = np.concatenate([arithmetic.majority(of_image) for of_image in patches.labels])
    rows = np.flatnonzero(majority != IGNORED)
    if 0 < max_patches < len(rows):
        rows = np.sort(host_rng(seed, "bank patches").choice(rows, max_patches, replace=False))
    return Bank(features[rows], labels[rows], majority[rows])


def nearest(
    bank: Bank, queries: Patches, standard: Standardization, count: int, cosine: bool, on_move: OnMove
) -> Neighbors:
    """Return the `count` patches of the bank, or all if it has fewer, that are nearest to each patch of the queries."""
    rows, count = queries.features.reshape(-1, queries.features.shape[-1]), min(count, len(bank.features))
    part_rows = min(BANK_ROWS, len(bank.features))
    found = None
    for first in range(0, len(bank.features), part_rows):
        part = bank.features[first : first + part_rows]
        frozen = {
            "part": _padded(part, part_rows),
            "counted": np.arange(part_rows) < len(part),
            "standard": tuple(standard),
        }
        outputs = list(_in_batches(_nearest_in_part(count, cosine), frozen, rows, on_move))
        of_part = {name: np.concatenate([output[name] for output in outputs]) for name in outputs[0]}
        found = arithmetic.merged(found, Neighbors(**of_part), first, count)
    return found


@functools.cache  # one function, which is compiled once
def _nearest_in_part(count: int, cosine: bool) -> Callable:
    def in_part(frozen, batch):
        standard = Standardization(*frozen["standard"])
        part, queries = standard(frozen["part"]), standard(batch["rows"])
        return arithmetic.nearest_in_part(
            queries, part, frozen["counted"], num_neighbors=count, cosine=cosine
        )._asdict()

    return in_part


def _votes(bank: Bank, neighbors: Neighbors, count: int, on_move: OnMove) -> Iterator[UInt8[np.ndarray, "q p"]]:
    """Yield the classes of the pixels of the queries by their `count` nearest patches, some queries at a time."""
    for first in range(0, len(neighbors.rows), QUERY_ROWS):
        on_move("classifying")
        rows = _padded(neighbors.rows[first : first + QUERY_ROWS, :count], QUERY_ROWS)
        left = len(neighbors.rows) - first
        yield np.asarray(arithmetic.vote(bank.labels[rows]))[:left]


def _decided(
    fitted, queries: Patches, standard: Standardization, on_move: OnMove
) -> Iterator[UInt8[np.ndarray, "q p"]]:
    """Yield the classes of the pixels of the queries by a logistic regression, some queries at a time."""
    frozen = {"fitted": tuple(map(np.asarray, fitted)), "standard": tuple(standard)}
    rows, pixels = queries.features.reshape(-1, queries.features.shape[-1]), queries.labels.shape[-1]
    for output in _in_batches(_decide, frozen, rows, on_move):
        yield np.repeat(output["classes"][:, None], pixels, axis=1)


def _decide(frozen, batch):
    kernel, bias = frozen["fitted"]
    features = Standardization(*frozen["standard"])(batch["rows"])
    logits = jnp.matmul(features, kernel, precision=jax.lax.Precision.HIGHEST) + bias
    return {"classes": jnp.argmax(logits, axis=-1).astype(jnp.uint8)}


def _in_batches(function: Callable, frozen: dict, rows: np.ndarray, on_move: OnMove) -> Iterator[dict[str, np.ndarray]]:
    """Yield the outputs of `function(frozen, {'rows': ...})` for all rows in their order, on this process's devices."""
    devices = jax.local_devices()
    at_once = -(-QUERY_ROWS // len(devices)) * len(devices)
    starts = range(0, len(rows), at_once)
    batches = ({"rows": _padded(rows[first : first + at_once], at_once)} for first in starts)
    outputs = apply_batches(function, frozen, batches, make_mesh(devices=devices))
    for first, (_, output) in zip(starts, outputs, strict=True):
        on_move("classifying")
        yield {name: array[: len(rows) - first] for name, array in output.items()}


def _padded(rows: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([rows, np.zeros((count - len(rows), *rows.shape[1:]), rows.dtype)])


def _judged(
    queries: Patches, predicted: Iterator[UInt8[np.ndarray, "q p"]], num_classes: int
) -> tuple[Int[np.ndarray, "k k_and_none"], UInt8[np.ndarray, "b S S"]]:
    """Return the confusion of all pixels of the queries, and the predicted label maps of the images to draw."""
    classes = np.concatenate(list(predicted)).reshape(queries.labels.shape)
    confusion = arithmetic.pixel_confusion(queries.labels, classes, num_classes)
    return confusion, arithmetic.from_patches(classes[_drawn(len(classes))])


def _drawn(count: int) -> Int[np.ndarray, "b"]:
    return np.unique(np.linspace(0, count - 1, DRAWN_IMAGES).astype(int))


def _class_names(task: Dense, config) -> tuple[str, ...]:
    """Return the names of the classes, or their numbers where the data have no names for them."""
    names, count = task.sources[0].class_names, config.model.num_classes
    return names if len(names) == count else tuple(map(str, range(count)))


def _draw(task: Dense, test: Patches, scored: dict[str, Scored], names: tuple[str, ...], path: AnyPath) -> None:
    """Draw some images of the eval split with their true classes and those that each classifier found."""
    chosen = _drawn(len(test.labels))
    images = [decode_image(task.sources[1][int(number)]["image"]) for number in test.example_ids[chosen]]
    true = {"true": arithmetic.from_patches(test.labels[chosen])}
    found = {
        f"{TITLES[name]}: mean IoU {of_classifier.metrics['mean_iou']:.1%}": of_classifier
        for name, of_classifier in scored.items()
    }
    draw_comparison(
        images,
        true | {title: of_classifier.drawn for title, of_classifier in found.items()},
        path,
        iou={title: segment.iou_of_classes(of_classifier.metrics) for title, of_classifier in found.items()},
        names=names,
    )


def cached_patches(
    feature_set: FeatureSet, task: Dense, source: Source, config, workdir: str, on_move: OnMove = lambda phase: None
) -> Patches:
    """Return the patches of a whole split, cached as `cached_arrays` does it.

    Raises:
        UserError: as `cached_arrays`.
    """
    _, arrays = cached_arrays(
        feature_set,
        source,
        config,
        workdir,
        on_move,
        batches=dense.batches,
        beside=lambda batch: {"labels": arithmetic.to_patches(batch["label_maps"], task.patch_size)},
        made_from=[config.backbone.layer, config.labels.to_dict(), config.model.num_classes],
        smaller="a smaller --config.views.image_size",
    )
    return Patches(**arrays)
