"""Linear segmentation: learn a linear layer on the patch features of a frozen backbone, on random crops.

The running statistics of batch norm are the `model_state`, as in the stage `segment`, whose crops and windows are used.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from beitv2_jax.data.segmentation.labels import IGNORED
from beitv2_jax.data.segmentation.transforms import CropTransform
from beitv2_jax.models.linear_segmenter import LinearSegmenter
from beitv2_jax.models.sliding_window import Segmented
from beitv2_jax.models.sliding_window import segment as segment_windows
from beitv2_jax.models.upernet import BATCH_STATS, FeatureMap, resize
from beitv2_jax.tasks import dense, inputs, segment
from beitv2_jax.tasks.api import Batch, LossParts, Task
from beitv2_jax.tasks.dense import FrozenBackbone
from beitv2_jax.tasks.losses import counted_sum, pixel_cross_entropy
from beitv2_jax.typing import Images, PyTree

_UNCHANGED = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "probability": 0.0}


def build(config) -> Task:
    """Build the linear segmentation on the weights `config.backbone.run`.

    Raises:
        UserError: as `dense.read_frozen` and `segment.open_sources`.
    """
    backbone = dense.read_frozen(config)
    params = backbone.random_params(config.seed) if config.backbone.random else backbone.params
    opened = inputs.Opened(segment.open_sources(config), network=backbone, frozen={"backbone": params})
    return make_task(config, opened)


def make_task(config, opened: inputs.Opened) -> Task:
    """Build the linear segmentation on data that are open and on the backbone `opened.network`."""
    model, backbone, sources = make_model(config), opened.network, opened.sources
    crops = CropTransform(seed=config.seed, ids=segment.label_ids(config), distortion=_UNCHANGED, **config.views)
    predict = predictor(model, backbone, config)
    return Task(
        name="segment_linear",
        sources=sources,
        init=functools.partial(_init, model, backbone),
        loss=linear_loss(model, backbone),
        finish=segment.segment_finish,
        frozen=opened.frozen,
        train_batches=inputs.transformed_batches(config, sources[0], crops),
        eval_batches=segment.EvalBatches(config, sources[1]),
        evaluate=lambda *arguments: {"confusion": predict(*arguments).confusion.sum(axis=0)},
        summarize=segment.summarize,
        no_decay=lambda path: False,
    )


def make_model(config) -> LinearSegmenter:
    """Build the layer to be learned."""
    return LinearSegmenter(config.model.num_classes, config.model.dropout_rate)


def _init(model: LinearSegmenter, backbone: FrozenBackbone, key) -> dict[str, PyTree]:
    rows, columns = backbone.model.backbone.grid
    variables = model.init(key, jnp.zeros((1, rows, columns, backbone.model.backbone.width)), train=False)
    return {"params": variables["params"], "model_state": variables[BATCH_STATS]}


def feature_map(backbone: FrozenBackbone, frozen: PyTree, images: Images, sizes) -> FeatureMap:
    """Return the patch tokens of pixels 0..255, of which `sizes` are rows and columns in use, in their places."""
    pixels = segment.normalized_inside(images, sizes, backbone.normalization)
    tokens = backbone.patch_tokens(frozen["backbone"], pixels)
    return tokens.reshape(len(tokens), *backbone.model.backbone.grid, -1)


def linear_loss(model: LinearSegmenter, backbone: FrozenBackbone) -> Callable:
    """Return the `loss`: the cross entropy of all pixels that have a class, logits resized to the label map."""

    def loss(params, model_state, frozen, batch, key, step):
        features = feature_map(backbone, frozen, batch["images"], batch["sizes"])
        logits, moved = model.apply(
            {"params": params, BATCH_STATS: model_state},
            features,
            train=True,
            weight=batch["weight"],
            rngs={"dropout": key},
            mutable=[BATCH_STATS],
        )
        labels = batch["label_maps"].astype(jnp.int32)
        counted = jnp.where(labels != IGNORED, batch["weight"][:, None, None].astype(jnp.float32), 0.0)
        logits = resize(logits, labels.shape[1:])
        total = counted_sum(pixel_cross_entropy(logits, labels), counted)
        hits = counted_sum(jnp.argmax(logits, axis=-1) == labels, counted)
        rows = batch["weight"].astype(jnp.float32).sum()
        statistics = {"rows": rows, BATCH_STATS: jax.tree.map(lambda of_rows: rows * of_rows, moved[BATCH_STATS])}
        return total, LossParts(counted.sum(), {"accuracy": hits}, statistics)

    return loss


def predictor(
    model: LinearSegmenter, backbone: FrozenBackbone, config
) -> Callable[[PyTree, PyTree, PyTree, Batch], Segmented]:
    """Return the function (params, model_state, frozen, batch of windows) -> classes of every pixel, and counts."""
    mirrored = segment.sliding_of(config).mirrored

    def predict(params, model_state, frozen, batch):
        def logits_of(images, sizes):
            features = feature_map(backbone, frozen, images, sizes)
            return model.apply({"params": params, BATCH_STATS: model_state}, features, train=False)

        return segment_windows(logits_of, batch, mirrored)

    return predict
