"""Stage 3, segmentation: fine-tune a pre-trained backbone under UPerNet to give every pixel a class.

The running statistics of batch norm are the `model_state` of this stage: every step updates them, without optimizer.
"""

import functools
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from beitv2_jax.data import pipeline
from beitv2_jax.data.segmentation import windows
from beitv2_jax.data.segmentation.histogram import check_numbers
from beitv2_jax.data.segmentation.label_maps import LabelIds
from beitv2_jax.data.segmentation.sources import open_label_maps
from beitv2_jax.data.segmentation.transforms import CropTransform, WindowRow, window_row
from beitv2_jax.data.sources import Source
from beitv2_jax.models import preprocess
from beitv2_jax.models.backbone import Compute
from beitv2_jax.models.sliding_window import Segmented, segment
from beitv2_jax.models.upernet import BATCH_STATS, Segmenter, moved_statistics
from beitv2_jax.tasks import inputs
from beitv2_jax.tasks.api import Batch, LossParts, Task
from beitv2_jax.tasks.common import layer_of, normalized
from beitv2_jax.tasks.losses import segmentation_loss
from beitv2_jax.typing import Images, PyTree


def make_model(config, compute: Compute) -> Segmenter:
    """Build the segmentation model that a segment config describes."""
    return Segmenter.from_arguments({**config.model, "image_size": config.views.image_size}, compute)


def init_segmenter(model: Segmenter, key) -> dict[str, PyTree]:
    """Return {"params", "model_state"} of a fresh segmentation model; its state is the statistics of batch norm."""
    images = jnp.zeros((1, model.backbone.image_size, model.backbone.image_size, 3))
    variables = model.init({"params": key, "drop_path": key}, images, train=False)
    return {"params": variables["params"], "model_state": variables[BATCH_STATS]}


def normalized_inside(images: Images, sizes: Float[Array, "b 2"], normalization: str) -> Images:
    """Return the network's input of pixels 0..255, with zeros beyond the `sizes` (rows and columns) of each image."""
    rows, columns = (jnp.arange(length) < sizes[:, axis, None] for axis, length in enumerate(images.shape[1:3]))
    inside = rows[:, :, None, None] & columns[:, None, :, None]
    return jnp.where(inside, normalized(images, normalization), 0.0)


def segment_loss(model: Segmenter, *, normalization: str, auxiliary_weight: float, count_unlabelled: bool) -> Callable:
    """Return the `loss` of segmentation; its statistics are those of the batch norms, times the rows."""

    def loss(params, model_state, frozen, batch, key, step):
        key_drop, key_dropout = jax.random.split(key)
        pixels = preprocess.photometric_distortion(batch["images"], batch["distortion"])
        output, moved = model.apply(
            {"params": params, BATCH_STATS: model_state},
            normalized_inside(pixels, batch["sizes"], normalization),
            train=True,
            weight=batch["weight"],
            rngs={"drop_path": key_drop, "dropout": key_dropout},
            mutable=[BATCH_STATS],
        )
        total, pixel_count, metrics = segmentation_loss(
            output.logits,
            output.auxiliary_logits,
            batch["label_maps"].astype(jnp.int32),
            batch["weight"],
            auxiliary_weight=auxiliary_weight,
            count_unlabelled=count_unlabelled,
        )
        rows = batch["weight"].astype(jnp.float32).sum()
        statistics = {"rows": rows, BATCH_STATS: jax.tree.map(lambda of_rows: rows * of_rows, moved[BATCH_STATS])}
        return total, LossParts(pixel_count, metrics, statistics)

    return loss


def segment_finish(model_state, statistics, step):
    """Move the running statistics towards the mean of the micro-batches' own; rows that do not count move nothing."""
    rows = statistics["rows"]
    of_batch = jax.tree.map(lambda total: total / jnp.maximum(rows, 1.0), statistics[BATCH_STATS])
    moved = moved_statistics(model_state, of_batch)
    return jax.tree.map(lambda new, old: jnp.where(rows > 0, new, old), moved, model_state), {}


def build(config) -> Task:
    """Build the segmentation task.

    Raises:
        UserError: the initial weights or the data set are missing, there are no label maps, or their numbers are not
            those of the classes.
    """
    inputs.check_implementations(config)
    initial = inputs.initial_variables(config, "segmenter", make_model(config, Compute()))
    return make_task(config, inputs.Opened(open_sources(config), initial=initial))


def open_sources(config) -> tuple[Source, Source]:
    """Open the train and eval splits that `config.data` names, with their label maps.

    Raises:
        UserError: there are no label maps, or their numbers are not those of the classes.
    """
    data = config.data
    train, test = (open_label_maps(data.source, split, data.data_dir) for split in (data.train_split, data.eval_split))
    for source, is_training in ((train, True), (test, False)):
        check_numbers(source, label_ids(config), max_bad_fraction=data.max_bad_fraction, is_training=is_training)
    return train, test


def make_task(config, opened: inputs.Opened) -> Task:
    """Build the segmentation task on data that are open."""
    source, eval_source = opened.sources
    model = make_model(config, inputs.compute(config))
    return Task(
        name="segment",
        init=functools.partial(init_segmenter, model),
        initial=opened.initial,
        loss=segment_loss(
            model,
            normalization=config.normalization,
            auxiliary_weight=config.loss.auxiliary_weight,
            count_unlabelled=config.loss.count_unlabelled,
        ),
        finish=segment_finish,
        sources=opened.sources,
        train_batches=_train_batches(config, source),
        eval_batches=EvalBatches(config, eval_source),
        evaluate=segment_evaluation(model, config.normalization, sliding_of(config)),
        summarize=summarize,
        no_decay=no_decay,
        layer_of=functools.partial(layer_of, depth=config.model.depth),
        num_layers=config.model.depth,
    )


def predict(
    model: Segmenter, normalization: str, sliding: windows.Sliding, params: PyTree, batch_stats: PyTree, batch: Batch
) -> Segmented:
    """Return the classes of every pixel of a batch of windows, and counts of (true, predicted) pairs of each image."""

    def logits_of(images, sizes):
        return model.apply(
            {"params": params, BATCH_STATS: batch_stats}, normalized_inside(images, sizes, normalization)
        ).logits

    return segment(logits_of, batch, sliding.mirrored)


def segment_evaluation(model: Segmenter, normalization: str, sliding: windows.Sliding) -> Callable:
    """Return the `evaluate` of segmentation: pixels by (true, predicted) class."""

    def evaluate(params, model_state, frozen, batch):
        found = predict(model, normalization, sliding, params, model_state, batch)
        return {"confusion": found.confusion.sum(axis=0)}

    return evaluate


def label_map_predictor(model: Segmenter, normalization: str, sliding: windows.Sliding) -> Callable:
    """Return the compiled function (params, batch_stats, batch) -> classes of every pixel."""
    return jax.jit(
        lambda params, batch_stats, batch: predict(model, normalization, sliding, params, batch_stats, batch).label_maps
    )


def iou_of_classes(metrics: Mapping[str, float], prefix: str = "") -> dict[int, float]:
    """Return {class: IoU} from the metrics of `summarize`, whose names begin with `prefix`."""
    start = f"{prefix}iou/"
    return {int(name.removeprefix(start)): value for name, value in metrics.items() if name.startswith(start)}


def sliding_of(config) -> windows.Sliding:
    """Return how an evaluation of a segment config goes over an image."""
    evaluation = config.evaluation
    return windows.Sliding(
        crop=config.views.image_size,
        stride=evaluation.stride,
        long_side=evaluation.long_side,
        short_side=evaluation.short_side,
        scales=evaluation.scales,
        flip=evaluation.flip,
    )


def label_ids(config) -> LabelIds:
    """Return what the numbers in the label maps of a segment config mean."""
    return LabelIds(config.model.num_classes, **config.labels)


def no_decay(path: str) -> bool:
    """Return whether the released recipe exempts the parameter at `path` from weight decay: all vectors.

    Unlike the other released recipes it decays [CLS], as its list of exemptions misses the prefix of the backbone.
    """
    return re.search(r"(bias|scale|gamma_[12])$", path) is not None


def summarize(sums: dict[str, np.ndarray]) -> dict[str, float]:
    """Return mean IoU, mean accuracy and pixel accuracy of a confusion matrix (rows: true, columns: predicted).

        IoU_c = C_cc / (sum_j C_cj + sum_i C_ic - C_cc),   accuracy_c = C_cc / sum_j C_cj

    The means are over the classes for which they exist: those that are there or predicted, and those that are there.
    The IoU of each such class c is `iou/c`.
    """
    hits, true, predicted = class_counts(sums["confusion"])
    union = true + predicted - hits
    return {
        "mean_iou": _mean_of_ratios(hits, union),
        "mean_accuracy": _mean_of_ratios(hits, true),
        "pixel_accuracy": float(hits.sum() / max(true.sum(), 1.0)),
        **{f"iou/{number}": float(hits[number] / union[number]) for number in np.flatnonzero(union)},
    }


def class_counts(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, by class, the pixels that are hit, that are there and that are predicted.

    Columns beyond those of the classes are predictions of no class.
    """
    return np.diagonal(confusion), confusion.sum(axis=1), confusion.sum(axis=0)[: len(confusion)]


def _mean_of_ratios(parts: np.ndarray, wholes: np.ndarray) -> float:
    exists = wholes > 0
    return float(np.mean(parts[exists] / wholes[exists])) if exists.any() else 0.0


def _train_batches(config, source):
    views = {name: value for name, value in config.views.items() if name != "distortion"}
    transform = CropTransform(
        seed=config.seed, ids=label_ids(config), distortion=config.views.distortion.to_dict(), **views
    )
    return inputs.transformed_batches(config, source, transform)


class EvalBatches:
    """Every example of a split as its windows; the sizes of the arrays that hold them are found at the first call."""

    def __init__(self, config, source):
        self._config, self._source = config, source

    @functools.cached_property
    def rows(self) -> WindowRow:
        """The rows of the batches, as host arrays."""
        return window_row(self._source, label_ids(self._config), sliding_of(self._config))

    def __call__(self, process_index: int, process_count: int) -> pipeline.Batches:
        return pipeline.finite_batches(
            self.rows,
            len(self._source),
            batch_size=self._config.evaluation.batch_size,
            process_index=process_index,
            process_count=process_count,
            **inputs.reading(self._config),
        )
