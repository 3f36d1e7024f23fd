"""What a trained stage is to the training loop: pure functions of explicit trees, and where its batches come from.

The modules of this package build a `Task` from a config; `beitv2_jax.training` runs any `Task` and never sees a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from beitv2_jax.typing import PyTree, Scalar

if TYPE_CHECKING:  # only for annotations: compiling a step needs nothing that reads data
    from beitv2_jax.data.pipeline import TrainIterator
    from beitv2_jax.data.sources import Source
    from beitv2_jax.data.target_cache.encoding import Encoding

Batch = dict[str, Any]
Params = PyTree
ModelState = PyTree


class LossParts(NamedTuple):
    """What a loss over some rows of a batch is made of, beside its sum: all of it adds up over the rows.

    Attributes:
        weight: how much the rows count, in rows or pixels; the loss and `metrics` of the whole batch are divided by it.
        metrics: sums to be logged as means.
        statistics: sums, or what `Task.merge` merges, that `Task.finish` gets undivided; None where there are none.
    """

    weight: Scalar
    metrics: dict[str, Scalar]
    statistics: PyTree = None


class Rows(NamedTuple):
    """Arrays of an evaluation that are joined over its batches, where all else is added up.

    Attributes:
        values: arrays by name, the batch axis first.
        weight: of the rows; those of weight 0 are left out when they are joined.
    """

    values: dict[str, Any]
    weight: Any


def _added(one: PyTree, other: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, one, other)


def _unchanged(model_state: ModelState, statistics: PyTree, step: Array) -> tuple[ModelState, dict[str, Scalar]]:
    return model_state, {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One trained stage, as the training loop sees it.

    The functions that compute (`init`, `loss`, `finish`, `evaluate`, `start_codebook`) are pure and are traced by jax.
    `loss` receives rows from every device's share, which are the global batch or one of its micro-batches, so it
    returns sums; the others receive the whole global batch. `model_state` is what no optimizer changes: the codebook,
    the statistics of batch norm, or `{}`.
    Batches are dicts of arrays with a leading batch axis. They carry `weight`: 1, or 0 for a row that is masked
    out of losses and metrics, because its image is unreadable or it pads the last batch of an evaluation. `faults`, if
    present, are the messages about unreadable images; they stay on the host.

    Attributes:
        name: the stage, as shown in logs.
        sources: the train and the eval split; a run recognises its data by them and lists what they leave out.
        init: `(key) -> {"params", "model_state"}`, values at step 0.
        loss: `(params, model_state, frozen, batch, key, step) -> (loss, parts)`, the float32 sum over the rows of what
            is to be minimised in the mean, and its `LossParts`.
        finish: `(model_state, statistics, step) -> (new model_state, metrics)` after the whole batch; the metrics are
            scalars.
        merge: `(statistics, statistics) -> ` those of two micro-batches as one; trees of zeros are those of no rows.
        initial: trained values that replace leaves of the trees of `init` at step 0; {} for a start from scratch.
        frozen: weights that never change (teacher, tokenizer); passed to every function, never closed over.
        train_batches: `(process_index, process_count) -> ` endless iterator of this process's host batches with
            `get_state`, `set_state` and `close`, its state JSON and the same for all processes.
        no_decay: `(path) -> ` True for a parameter ("blocks_0/attn/q_bias") that weight decay leaves alone.
        layer_of: `(path) -> ` layer id 0 .. num_layers + 1 for layer decay, None for the full rate.
        num_layers: number of blocks, `L` of layer decay.
        eval_batches: `(process_index, process_count) -> ` finite iterable of padded batches, a new one at each call.
        evaluate: `(params, model_state, frozen, batch) -> ` dict of sums over the batch's real rows, or of `Rows`.
        summarize: `(sums over all batches, on the host, and joined rows) -> ` dict of floats to log.
        start_codebook: `(params, model_state, frozen, batches, key) -> ` codebook from the next batches, as one tree
            with the axis of the batches before that of their rows.
        codebook_starts: numbers of finished steps after which `start_codebook` is called, 0 before the first one.
        start_batches: how many batches it gets.
        advise: `(logged metrics, finished steps) -> ` what to warn of, '' for nothing; the log says it once.
    """

    name: str
    sources: tuple[Source, Source]
    init: Callable[[PRNGKeyArray], dict[str, PyTree]]
    loss: Callable[[Params, ModelState, PyTree, Batch, PRNGKeyArray, Array], tuple[Scalar, LossParts]]
    train_batches: Callable[[int, int], TrainIterator]
    no_decay: Callable[[str], bool]
    finish: Callable[[ModelState, PyTree, Array], tuple[ModelState, dict[str, Scalar]]] = _unchanged
    merge: Callable[[PyTree, PyTree], PyTree] = _added
    layer_of: Callable[[str], int | None] = lambda path: None
    num_layers: int = 0
    initial: PyTree = dataclasses.field(default_factory=dict)
    frozen: PyTree = dataclasses.field(default_factory=dict)
    eval_batches: Callable[[int, int], Iterable[Batch]] | None = None
    evaluate: Callable[[Params, ModelState, PyTree, Batch], dict[str, Array]] | None = None
    summarize: Callable[[dict[str, Any]], dict[str, float]] | None = None
    start_codebook: Callable[[Params, ModelState, PyTree, Batch, PRNGKeyArray], ModelState] | None = None
    codebook_starts: tuple[int, ...] = (0,)
    start_batches: int = 1
    advise: Callable[[dict[str, float], int], str] = lambda metrics, steps: ""

    @property
    def num_train_examples(self) -> int:
        """Number of images in an epoch."""
        return len(self.sources[0])

    @property
    def num_eval_examples(self) -> int:
        """Number of images in an evaluation."""
        return len(self.sources[1])

    @property
    def splits(self) -> tuple[str, str]:
        """Names of the train and the eval split."""
        return self.sources[0].split, self.sources[1].split


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetCacheTask:
    """Hold what one target cache stage writes: the outputs of a frozen network over every fixed view of a data set.

    Attributes:
        name: the stage, as shown in logs and in the cache.
        frozen: the network's weights.
        apply: `(frozen, batch) -> ` targets of the batch's views: features `b n t` or code ids `b n`.
        encoding: how targets are stored.
        manifest: what identifies the network and the encoding; a reader compares it with what it expects.
        sources: the train and the eval split.
    """

    name: str
    frozen: PyTree
    apply: Callable[[PyTree, Batch], Array]
    encoding: Encoding
    manifest: dict[str, Any]
    sources: tuple[Any, Any]
