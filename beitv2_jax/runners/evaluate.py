"""Evaluate trained weights on a data set: the numbers of the stages, of any weights and without a workdir.

One pass over the data for each kind of weights, with what the evaluation of its stage computes. All devices of all
processes share each batch, and every process gets the result. Protocols that need more than one pass over one data set
(neighbours, linear classifiers) belong beside these functions, with their arithmetic in `evaluation`.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int, UInt8

from beitv2_jax.convert.arguments import MODELS
from beitv2_jax.convert.teachers.load import build_teacher
from beitv2_jax.convert.weights import Weights
from beitv2_jax.data import pipeline
from beitv2_jax.data.augment import center_crop
from beitv2_jax.data.bad_records import bad_record, refuse_too_many
from beitv2_jax.data.decode import CorruptImageError
from beitv2_jax.data.segmentation.label_maps import LabelIds, decode_label_map
from beitv2_jax.data.segmentation.transforms import WindowRow, window_row
from beitv2_jax.data.segmentation.windows import Sliding
from beitv2_jax.data.sources import Source
from beitv2_jax.data.transform import readable_image
from beitv2_jax.errors import UserError
from beitv2_jax.evaluation.classes import ClassMap
from beitv2_jax.evaluation.classification import calibration_error, class_accuracies, confusion_matrix
from beitv2_jax.evaluation.code_labels import NO_LABEL, code_label_metrics, patch_labels
from beitv2_jax.models.backbone import Compute
from beitv2_jax.models.ops.implementations import AUTO, resolve_auto
from beitv2_jax.models.teachers import Teacher
from beitv2_jax.rng import host_rng
from beitv2_jax.tasks import cluster, finetune, inputs, mim, multi_label, segment, vqkd
from beitv2_jax.tasks.api import Batch
from beitv2_jax.tasks.tokenize import tokenizer_of
from beitv2_jax.training import sharding
from beitv2_jax.training.inference import outputs_ahead
from beitv2_jax.training.writer import Progress
from beitv2_jax.typing import PyTree

FLAG = "--max_bad_fraction"
MAX_PATCHES = 262_144
"""Patches of which the pixels are clustered at most."""
TOP = 5
"""Classes among which the second accuracy looks for the true one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passing:
    """How to go over the data; nothing but `dtype` moves a result, and that by rounding alone.

    Attributes:
        batch_size: images computed at once, rounded up to a multiple of the devices.
        max_bad_fraction: largest fraction of unreadable images.
        dtype: of the matrix products.
    """

    batch_size: int = 64
    max_bad_fraction: float = 0.001
    dtype: str = "float32"

    @property
    def compute(self) -> Compute:
        """How networks compute here: the default implementations of the platform, as in the stages."""
        return Compute(**resolve_auto({"dtype": self.dtype, **dict.fromkeys(AUTO, "auto")}, jax.default_backend()))

    def reading(self, mesh) -> dict:
        """Return the arguments with which `data.pipeline` gives this process its rows of every batch."""
        index, count = sharding.row_share(mesh)
        rounded = -(-self.batch_size // mesh.size) * mesh.size
        return {
            "batch_size": rounded,
            "process_index": index,
            "process_count": count,
            "num_threads": os.cpu_count() or 1,
        }


class Result(NamedTuple):
    """What an evaluation found.

    Attributes:
        metrics: by name; fractions from 0 to 1, losses and entropies in nats.
        num_examples: images that the metrics are of.
        bad_records: the others, as `data.bad_records` lists them.
        details: arrays of the kind of weights, which tables and pictures show.
    """

    metrics: dict[str, float]
    num_examples: int
    bad_records: list[dict]
    details: dict[str, np.ndarray]


def evaluate_classifier(
    weights: Weights, source: Source, classes: ClassMap, passing: Passing, *, crop_fraction: float
) -> Result:
    """Evaluate a classifier, whose labels are those of `source` by `classes`.

    Accuracies and losses are over all classes of the weights; where the data have a part of them, `among_..` has what
    is found with the logits of that part alone.

    Details: `labels`, `predicted` (classes of the weights), `confidence`, `example_ids` of every image, and `confusion`
    and `class_accuracy` by class of the data.
    """
    model = MODELS["classifier"].from_arguments(weights.arguments, passing.compute)
    logits_of = finetune.logits_of(model, weights.normalization)
    numbers = jnp.asarray(classes.numbers)
    is_part = len(classes.numbers) < weights.arguments["num_classes"]

    def evaluate(params, batch):
        logits = logits_of(params, batch)
        found = {"labels": numbers[batch["labels"]]}
        found |= _of_logits(logits, found["labels"])
        if is_part:
            among = _of_logits(logits[:, numbers], batch["labels"])
            found |= {f"among_{name}": values for name, values in among.items()}
        return {"rows": found}

    mesh = sharding.make_mesh()
    batches = pipeline.eval_batches(
        source, image_size=weights.arguments["image_size"], crop_fraction=crop_fraction, **passing.reading(mesh)
    )
    passed = _pass(evaluate, weights.variables["params"], batches, source, passing, mesh)
    rows = passed.rows
    confusion = confusion_matrix(rows["labels"], rows["predicted"], classes.numbers)
    accuracies = class_accuracies(confusion)
    metrics = _classification_metrics(rows)
    metrics["mean_class_accuracy"] = float(np.nanmean(accuracies))
    if is_part:
        among = {name.removeprefix("among_"): values for name, values in rows.items() if name.startswith("among_")}
        metrics |= {f"among_{name}": value for name, value in _classification_metrics(among).items()}
    details = {name: rows[name] for name in ("labels", "predicted", "confidence", "example_ids")}
    details |= {"confusion": confusion, "class_accuracy": accuracies}
    return passed.result(metrics, details)


def _of_logits(logits: Float[Array, "b k"], labels: Int[Array, "b"]) -> dict[str, Array]:
    _, best = jax.lax.top_k(logits, min(TOP, logits.shape[1]))
    return {
        **finetune.judged(logits, labels),
        "top": jnp.any(best == labels[:, None], axis=1),
        "predicted": jnp.argmax(logits, axis=1),
        "confidence": jnp.max(jax.nn.softmax(logits.astype(jnp.float32)), axis=1),
    }


def _classification_metrics(rows: dict[str, np.ndarray]) -> dict[str, float]:
    sums = {name: rows[name].sum(dtype=np.float64) for name in ("hits", "nll")}
    summary = finetune.summarize({**sums, "examples": np.float64(len(rows["hits"]))})
    return {
        "top1": summary["accuracy"],
        f"top{TOP}": float(rows["top"].mean()),
        "nll": summary["loss"],
        "calibration_error": calibration_error(rows["confidence"], rows["hits"]),
    }


def evaluate_multi_label(
    weights: Weights, source: Source, classes: ClassMap, passing: Passing, *, crop_fraction: float
) -> Result:
    """Evaluate a classifier on images with several classes, those of `source` by `classes`; others do not count.

    Details: `logits` and `labels` by class of the data and `example_ids` of every image, and what `Judged` has of the
    classes.
    """
    model = MODELS["classifier"].from_arguments(weights.arguments, passing.compute)
    logits_of = finetune.logits_of(model, weights.normalization)
    numbers = jnp.asarray(classes.numbers)

    def evaluate(params, batch):
        return {"rows": {"logits": logits_of(params, batch)[:, numbers], "labels": batch["labels"]}}

    mesh = sharding.make_mesh()
    batches = pipeline.eval_batches(
        source, image_size=weights.arguments["image_size"], crop_fraction=crop_fraction, **passing.reading(mesh)
    )
    passed = _pass(evaluate, weights.variables["params"], batches, source, passing, mesh)
    logits, labels = (passed.rows[name].astype(np.float64) for name in ("logits", "labels"))
    found = multi_label.judge(logits, labels)
    metrics = {**found.means, "loss": multi_label.mean_cross_entropy(logits, labels)}
    return passed.result(metrics, {**passed.rows, **found._asdict()})


def evaluate_tokenizer(
    weights: Weights,
    source: Source,
    teacher: tuple[Teacher, PyTree] | None,
    passing: Passing,
    *,
    crop_fraction: float,
    label_maps: Mapping[str, Source] = MappingProxyType({}),
    compare_pixels: bool = False,
) -> Result:
    """Evaluate a tokenizer; its reconstruction is compared with the features of `teacher`, if there is one.

    Where images have one class each or `label_maps` (by the name of what they label), their patches have labels, and
    the metrics of `evaluation.code_labels.code_label_metrics` say what the codes have to do with these; with
    `compare_pixels` also what as many k-means clusters of the pixels of the same patches have (`pixels_...`). A cluster
    tokenizer has its own teacher.

    Details: `counts` of every code, and the `code_ids` of every image.
    """
    tokenizer = tokenizer_of(weights, passing.compute)
    network, frozen = teacher or (None, {})
    targets = None if network is None else lambda frozen, batch: network.features(frozen, batch["images"])
    if weights.kind == "vqkd":
        model = MODELS["vqkd"].from_arguments(weights.arguments, passing.compute)
        of_stage = vqkd.vqkd_evaluation(model, targets)
    else:
        of_stage = cluster.cluster_evaluation(build_teacher(weights.arguments["teacher"], passing.dtype))

    def evaluate(variables, batch):
        # the compiler finds that both ask the same network the same
        code_ids = tokenizer.encode(variables, batch["images"])
        sums = of_stage(variables["params"], variables["codebook"], variables["frozen"], batch)
        return {"sums": sums, "rows": {"code_ids": code_ids, "labels": batch["labels"]}}

    mesh = sharding.make_mesh()
    batches = pipeline.eval_batches(
        source, image_size=weights.arguments["image_size"], crop_fraction=crop_fraction, **passing.reading(mesh)
    )
    variables = {**{name: weights.variables[name] for name in ("params", "codebook")}, "frozen": frozen}
    passed = _pass(evaluate, variables, batches, source, passing, mesh)
    metrics = vqkd.summarize(passed.sums)
    code_ids = passed.rows["code_ids"]
    of_images, labels = passed.rows["labels"], {}
    if of_images.ndim == 1:  # of several classes none is that of a patch
        labels["class"] = np.broadcast_to(of_images[:, None], code_ids.shape)
    size, example_ids = weights.arguments["image_size"], passed.rows["example_ids"].tolist()
    for name, maps in label_maps.items():
        labels[name] = _labels_of_patches(maps, example_ids, tokenizer.grid, size, crop_fraction)
    metrics |= code_label_metrics(code_ids, labels)
    if compare_pixels:
        drawn = host_rng(0, "raw patches").permutation(len(code_ids))[: max(1, MAX_PATCHES // code_ids.shape[1])]
        chosen = np.sort(drawn)
        crops = [
            center_crop(readable_image(source[example_id], 1)[0], weights.arguments["image_size"], crop_fraction)
            for example_id in passed.rows["example_ids"][chosen].tolist()
        ]
        pixel_ids = _clusters_of_pixels(np.stack(crops), tokenizer.grid, tokenizer.codebook_size)
        found = code_label_metrics(pixel_ids, {name: of_patches[chosen] for name, of_patches in labels.items()})
        metrics |= {f"pixels_{name}": value for name, value in found.items() if not name.startswith("majority_")}
    return passed.result(metrics, {"counts": passed.sums["counts"], "code_ids": code_ids})


def _clusters_of_pixels(
    crops: UInt8[np.ndarray, "b S S 3"], grid: tuple[int, int], num_clusters: int
) -> Int[np.ndarray, "b n"]:
    """Return the clusters of the patches of crops, by k-means of their pixels as the stage 'cluster' does it."""
    rows, columns = grid
    height, width = crops.shape[1] // rows, crops.shape[2] // columns
    patches = crops.reshape(-1, rows, height, columns, width, 3).swapaxes(2, 3)
    tokens = patches.reshape(-1, height * width * 3).astype(np.float32) / 255
    rounds = cluster.clustered(tokens, codebook_size=num_clusters, iterations=25, components=0, seed=0)
    *_, codebook = rounds
    return cluster.code_ids_of(codebook, tokens).reshape(len(crops), -1)


def _labels_of_patches(
    label_maps: Source, example_ids: list[int], grid: tuple[int, int], image_size: int, crop_fraction: float
) -> Int[np.ndarray, "b n"]:
    """Return the labels of the patches of the crops that are evaluated; `NO_LABEL` where a map cannot be read."""
    found = np.full((len(example_ids), grid[0] * grid[1]), NO_LABEL)
    for row, example_id in enumerate(example_ids):
        try:
            numbers = decode_label_map(label_maps[example_id]["label_map"])
        except CorruptImageError:
            continue
        found[row] = patch_labels(center_crop(numbers, image_size, crop_fraction, "nearest"), grid)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masking:
    """The masks of an evaluation: arguments of `data.masking.block_mask`, and the seed they are drawn from."""

    num_masked: int
    min_patches: int
    max_patches: int | None
    seed: int


def evaluate_masked_model(
    weights: Weights, source: Source, tokenizer: Weights, masking: Masking, passing: Passing, *, crop_fraction: float
) -> Result:
    """Evaluate a masked image model on the codes that `tokenizer` gives the hidden patches.

    Raises:
        UserError: the tokenizer has another number of patches or of codes than the model.
    """
    model = MODELS["mim"].from_arguments(weights.arguments, passing.compute)
    coder = tokenizer_of(tokenizer, Compute(dtype=passing.dtype))
    if coder.grid != model.backbone.grid or coder.codebook_size != model.codebook_size:
        rows, columns = model.backbone.grid
        raise UserError(
            f"The tokenizer has {coder.codebook_size} codes on a grid of {coder.grid[0]} x {coder.grid[1]} "
            f"patches, the masked model predicts {model.codebook_size} codes on {rows} x {columns} patches.",
            "Was the model trained with another tokenizer?",
            "Write --tokenizer=PATH with the tokenizer that it was trained with.",
        )
    tokenizer_size = tokenizer.arguments["image_size"]

    def code_ids(frozen, batch, images):
        return coder.encode(frozen, batch.get("tokenizer_images", images))

    drawn = dataclasses.asdict(masking)
    masks = inputs.eval_masks(drawn.pop("seed"), model.backbone.grid, drawn)
    of_stage = mim.mim_evaluation(
        model, num_masked=masking.num_masked, normalization=weights.normalization, code_ids=code_ids
    )

    def evaluate(variables, batch):
        return {"sums": of_stage(variables["params"], {}, variables["tokenizer"], batch)}

    mesh = sharding.make_mesh()
    batches = pipeline.eval_batches(
        source,
        image_size=weights.arguments["image_size"],
        tokenizer_image_size=tokenizer_size,
        crop_fraction=crop_fraction,
        **passing.reading(mesh),
    )
    frozen = {name: tokenizer.variables[name] for name in ("params", "codebook")}
    variables = {"params": weights.variables["params"], "tokenizer": frozen}
    masked = _Mapped(lambda batch: {**batch, **masks(batch)}, batches)
    passed = _pass(evaluate, variables, masked, source, passing, mesh)
    metrics = mim.summarize(passed.sums)
    metrics["loss"] = sum(value for name, value in metrics.items() if name.endswith("_loss"))
    return passed.result({**metrics, "masked_patches": int(passed.sums["patches"])}, {})


def evaluate_segmenter(
    weights: Weights, source: Source, ids: LabelIds, sliding: Sliding, passing: Passing
) -> tuple[Result, WindowRow, Callable[[Batch], Array]]:
    """Evaluate a segmentation network; return what pictures need beside the result: all rows, and batch -> label maps.

    Details: `confusion` by (true, predicted) class.
    """
    model = MODELS["segmenter"].from_arguments(weights.arguments, passing.compute)
    of_stage = segment.segment_evaluation(model, weights.normalization, sliding)

    def evaluate(variables, batch):
        return {"sums": of_stage(variables["params"], variables["batch_stats"], {}, batch)}

    mesh, rows = sharding.make_mesh(), window_row(source, ids, sliding)
    batches = pipeline.finite_batches(rows, len(source), **passing.reading(mesh))
    variables = {name: weights.variables[name] for name in ("params", "batch_stats")}
    passed = _pass(evaluate, variables, batches, source, passing, mesh)
    predict = segment.label_map_predictor(model, weights.normalization, sliding)
    return (
        passed.result(segment.summarize(passed.sums), {"confusion": passed.sums["confusion"]}),
        rows,
        lambda batch: predict(*variables.values(), batch),
    )


@dataclasses.dataclass(frozen=True)
class _Mapped:
    """Host batches, each changed by a function."""

    function: Callable[[Batch], Batch]
    batches: pipeline.Batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return map(self.function, self.batches)


class _Passed(NamedTuple):
    """Sums over the readable images in float64, their rows in the order of their ids, and the unreadable ones."""

    sums: dict[str, np.ndarray]
    rows: dict[str, np.ndarray]
    num_examples: int
    bad_records: list[dict]

    def result(self, metrics: dict[str, float], details: dict[str, np.ndarray]) -> Result:
        return Result(metrics, self.num_examples, self.bad_records, details)


def _pass(
    evaluate: Callable[[PyTree, Batch], dict],
    weights: PyTree,
    batches: Iterable[Batch],
    source: Source,
    passing: Passing,
    mesh: jax.sharding.Mesh,
) -> _Passed:
    """Go over all batches once.

    Args:
        evaluate: (weights, batch) -> `sums` over the readable rows, or `rows`, arrays with the batch axis first.

    Raises:
        UserError: more images than `passing.max_bad_fraction` are unreadable.
    """

    def compute(weights, batch):
        return {**evaluate(weights, batch), "example_ids": batch["example_ids"], "weight": batch["weight"]}

    compiled = jax.jit(compute, out_shardings=sharding.replicated(mesh))
    placed = sharding.place_weights(weights, mesh)
    sums, parts, bad, num_examples = None, [], {}, 0
    progress = Progress(len(batches), "evaluate", "batches", enabled=jax.process_index() == 0)
    tenth = max(1, len(batches) // 10)
    for batch, outputs in outputs_ahead(compiled, placed, batches, mesh):
        found = jax.tree.map(np.asarray, outputs)
        readable = found["weight"] > 0
        num_examples += int(readable.sum())
        parts.append({name: rows[readable] for name, rows in found.get("rows", {}).items()})
        parts[-1]["example_ids"] = found["example_ids"][readable]
        values = jax.tree.map(lambda value: np.asarray(value, np.float64), found.get("sums", {}))
        sums = values if sums is None else jax.tree.map(np.add, sums, values)
        for example_id, fault in zip(batch["example_ids"], batch["faults"], strict=True):
            if fault:
                bad[int(example_id)] = bad_record(source.split, int(example_id), str(fault))
        progress.advance()
        if progress.done % tenth == 0:
            progress.show({})
    progress.close()
    records = sorted(_of_all_processes(list(bad.values())), key=lambda record: record["example_id"])
    if records:
        refuse_too_many(
            len(records),
            len(source),
            passing.max_bad_fraction,
            of=f"of split {source.split} of {source.name}",
            listed=f"such as {records[0]['where']} ({records[0]['cause']})",
            flag=FLAG,
        )
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(rows["example_ids"])
    return _Passed(sums, {name: values[order] for name, values in rows.items()}, num_examples, records)


def _of_all_processes(records: list[dict]) -> list[dict]:
    """Return the records of all processes, in every process."""
    if jax.process_count() == 1:
        return records
    text = np.frombuffer(json.dumps(records).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.pad(text, (0, int(lengths.max()) - len(text)), constant_values=ord(" "))
    everyones = np.asarray(multihost_utils.process_allgather(padded))
    return [record for own in everyones for record in json.loads(own.tobytes())]
