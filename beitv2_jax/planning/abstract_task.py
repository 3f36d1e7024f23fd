"""Build the task of a config without data, target caches or weights, to trace and compile its step but not to run it.

Planning, benchmarks and tests take their abstract inputs from here. `complete` fills in what a config leaves open with
what the published recipe used. The shapes of a batch come from the data pipeline itself, which reads one grey image.
"""

import dataclasses
import importlib
import io
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image

from beitv2_jax.config.train_labels import parse_train_labels
from beitv2_jax.convert.arguments import abstract_init, abstract_variables
from beitv2_jax.convert.files import located
from beitv2_jax.convert.runs import check_stage
from beitv2_jax.convert.teachers.load import load_teacher
from beitv2_jax.convert.weights import TOKENIZER_STAGES, Weights, backbone_of, describe_run
from beitv2_jax.convert.weights import describe as describe_weights
from beitv2_jax.data.sources import open_source
from beitv2_jax.data.target_cache.encoding import CodeEncoding, Encoding, FeatureEncoding, zero_entries
from beitv2_jax.errors import UserError
from beitv2_jax.models.backbone import Backbone, Compute
from beitv2_jax.models.teachers import clip_teacher
from beitv2_jax.models.vit import VisionTransformer
from beitv2_jax.sizes import SIZES
from beitv2_jax.tasks import inputs, targets
from beitv2_jax.tasks.api import Batch, Task
from beitv2_jax.tasks.dense import FrozenBackbone
from beitv2_jax.tasks.tokenize import load_tokenizer, tokenizer_of
from beitv2_jax.typing import PyTree

KNOWN_SETS = {
    r"imagenet2012_subset/1pct": 12_811,
    r"imagenet2012_subset/10pct": 128_116,
    r"imagenet2012|imagenet-?1k": 1_281_167,
    r"imagenet-?2[12]k": 14_197_122,
    r"(?i)ade(20k|challengedata)": 20_210,
}
"""Training images of known data sets, by pattern of data.source. Source: their descriptions; 22k is that of 2011."""
TRAINED_STAGES = ("vqkd", "mim", "regress", "finetune", "segment", "segment_linear")
_WITHOUT_STEP = {
    "extract": "every view passes through the teacher once",
    "tokenize": "every view passes through the tokenizer once",
    "cluster": "it clusters stored features",
    "probe": "every image passes through the backbone once, and what trains on its features is small",
    "dense": "every image passes through the backbone once, and what is fitted to its features is small",
    "pipeline": "it is a list of stages",
}
"""Stage without a training step -> what it does instead."""
PUBLISHED = "(published)"
TEACHER_WIDTH = 512  # of CLIP's projection
CODE_DIM = 32
_STORED_FEATURES = "int8"  # as configs/extract.py writes them
_GREY_SIDE = 64


@dataclasses.dataclass(frozen=True)
class Description:
    """A task without inputs; `batch` and `task.frozen` hold shapes, `batch` those of the whole global batch.

    `row` is one row of the batch as arrays, of a grey image and targets that are zero. `network` is the teacher or
    tokenizer that runs in the step, None where targets are stored.
    """

    task: Task
    batch: Batch
    row: Batch
    network: Any
    config: Any


def complete(config):
    """Return a copy of `config` in which nothing is left open, and a note on each assumption.

    Raises:
        UserError: the config is of a stage that trains no network.
    """
    if config.stage not in TRAINED_STAGES:
        raise UserError(
            f"The stage '{config.stage}' has no training step to plan: {_WITHOUT_STEP[config.stage]}.",
            "Did you mean the config of a stage that trains?",
            f"Pass the --config of one stage of {', '.join(TRAINED_STAGES)}, such as --config=configs/mim.py.",
        )
    config = config.copy_and_resolve_references().unlock()
    if "init_from" in config:
        config.init_from = ""
    notes = []
    section, stored_key, live_key, live = {
        "vqkd": ("teacher", "features", "weights", "CLIP ViT-B/16"),
        "mim": ("tokenizer", "codes", "run", "the published tokenizer"),
        "segment_linear": ("backbone", "", "run", "the published backbone"),
    }.get(config.stage, ("", "", "", ""))
    stored = bool(stored_key and config[section][stored_key])
    if section and not stored:
        given = config[section][live_key]
        if not located(given or PUBLISHED).exists():
            missing = " nor ".join(f"{section}.{key}" for key in (live_key, stored_key) if key)
            none_given = f"Neither {missing} is given" if stored_key else f"{missing} is not given"
            why = f"{section}.{live_key}={given!r} does not exist" if given else none_given
            notes.append(f"{why}, so {live} is assumed to run in the step.")
            config[section][live_key] = PUBLISHED
    if stored or (config.stage == "regress" and config.teacher.features):
        config.views.num_views = max(1, config.views.num_views)
    return config.lock(), tuple(notes)


def count_examples(config, given: int = 0) -> int:
    """Return the training images of an epoch: `given`, or those of the known data set, or those of the opened one.

    Raises:
        UserError: the data set is not known and cannot be opened.
    """
    data = config.data
    if given:
        return given
    for pattern, count in KNOWN_SETS.items():
        if re.search(pattern, data.source):
            return _of_train_labels(config, count)
    try:
        count = len(open_source(data.source, data.train_split, data.data_dir, data.train_split))
    except UserError as error:
        raise UserError(
            f"The number of images in data.source={data.source!r} is unknown. {error.happened}",
            "Did you mean a data set that is not on this machine?",
            "Pass its number of training images, as in --plan_examples=1281167.",
        ) from error
    return _of_train_labels(config, count)


def _of_train_labels(config, count: int) -> int:
    """Return how many of `count` images `data.train_labels` takes, for classes of one size."""
    amount = parse_train_labels(config.data.get("train_labels", ""))
    if "shots" in amount:
        return min(count, amount["shots"] * config.model.num_classes)
    return round(count * amount.get("fraction", 1.0))


def describe(config, num_examples: int, frozen_size: Mapping[str, int] = SIZES["base"]) -> Description:
    """Describe the stage that a config from `complete` trains on `num_examples` images.

    Args:
        config: as `complete` returns it.
        num_examples: training images.
        frozen_size: row of `SIZES` of the published teacher or tokenizer, where that runs in the step.

    Raises:
        UserError: weights or a run that the config names exist but cannot be read.
    """
    stage = importlib.import_module(f"beitv2_jax.tasks.{config.stage}")
    source = _Source(num_examples, config.model.get("num_classes", 1000))
    opened = inputs.Opened((source, source))
    if config.stage == "vqkd":
        opened = _with_teacher(config, opened, frozen_size)
    elif config.stage == "mim":
        opened = _with_tokenizer(config, opened, frozen_size)
    elif config.stage == "segment_linear":
        opened = _with_backbone(config, opened, frozen_size)
    elif config.stage == "regress" and config.teacher.features:
        opened = _with_features(config, opened, config.views.image_size // config.model.patch_size)
    row = _row(stage, config, opened)
    batch = batch_shapes(row, config.run.batch_size)
    return Description(stage.make_task(config, opened), batch, row, opened.network, config)


def batch_shapes(rows: Batch, batch_size: int) -> Batch:
    """Return the shapes of a batch of `batch_size` rows like these, with the dtypes that they have on a device."""
    return {
        name: jax.ShapeDtypeStruct((batch_size, *array.shape[1:]), jax.dtypes.canonicalize_dtype(array.dtype))
        for name, array in rows.items()
    }


def _with_teacher(config, opened: inputs.Opened, size: Mapping[str, int]) -> inputs.Opened:
    patch_size = config.model.encoder.patch_size
    side = config.views.image_size // patch_size
    if config.teacher.features:
        return _with_features(config, opened, side)
    if config.teacher.weights == PUBLISHED:
        teacher, network = clip_teacher(
            size,
            TEACHER_WIDTH,
            image_size=config.views.image_size,
            grid=(side, side),
            dtype=config.efficiency.dtype,
        )
        weights = abstract_init(network, teacher.input_size, network.backbone.patch_size)["params"]
    else:
        teacher, weights = load_teacher(**targets.teacher_arguments(config, patch_size))
    return dataclasses.replace(opened, network=teacher, frozen={"teacher": _shapes(weights)})


def _with_features(config, opened: inputs.Opened, side: int) -> inputs.Opened:
    encoding = FeatureEncoding(_STORED_FEATURES, side * side, TEACHER_WIDTH)
    reader = ZeroTargets(encoding, len(opened.sources[0]), config.views.num_views, {"teacher_width": TEACHER_WIDTH})
    return dataclasses.replace(opened, stored=(reader, reader))


def _with_tokenizer(config, opened: inputs.Opened, size: Mapping[str, int]) -> inputs.Opened:
    side = config.views.image_size // config.model.patch_size
    codebook_size = config.model.codebook_size
    if config.tokenizer.codes:
        encoding = CodeEncoding(codebook_size, side * side)
        reader = ZeroTargets(encoding, len(opened.sources[0]), config.views.num_views, {"codebook_size": codebook_size})
        return dataclasses.replace(opened, stored=(reader, reader))
    image_size, dtype = inputs.tokenizer_view(config).image_size, config.efficiency.dtype
    if config.tokenizer.run == PUBLISHED:
        arguments = {
            "image_size": image_size,
            "encoder": {**size, "patch_size": image_size // side},
            "decoder": {**size, "depth": min(3, size["depth"])},
            "codebook_size": codebook_size,
            "code_dim": CODE_DIM,
            "teacher_width": TEACHER_WIDTH,
        }
        weights = Weights("vqkd", arguments, {}, "official")
    else:
        check_stage(config.tokenizer.run, TOKENIZER_STAGES, "config.tokenizer.run")
        weights = describe_run(config.tokenizer.run)
        arguments = {"teacher_width": TEACHER_WIDTH, **weights.arguments}
    if weights.kind == "cluster":  # the shapes of a teacher stand in its weights alone
        tokenizer, frozen = load_tokenizer(config.tokenizer.run, image_size, dtype)
    else:
        tokenizer = tokenizer_of(dataclasses.replace(weights, arguments=arguments), Compute(dtype=dtype))
        frozen = abstract_variables(weights.kind, arguments)
    return dataclasses.replace(opened, network=tokenizer, frozen={"tokenizer": _shapes(frozen)})


def _with_backbone(config, opened: inputs.Opened, size: Mapping[str, int]) -> inputs.Opened:
    sizes = {"image_size": config.views.image_size, "depth": config.backbone.layer}
    if config.backbone.run == PUBLISHED:
        backbone = Backbone(**{**size, **sizes}, position="relative", layer_scale_init=0.1)
    else:
        backbone = dataclasses.replace(backbone_of(describe_weights(config.backbone.run)), **sizes)
    model = VisionTransformer(backbone, Compute(dtype=config.efficiency.dtype))
    params = abstract_init(model, backbone.image_size, backbone.patch_size)["params"]
    network = FrozenBackbone(model, params, "imagenet", random_params=lambda seed: params)
    return dataclasses.replace(opened, network=network, frozen={"backbone": _shapes(params)})


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _row(stage, config, opened: inputs.Opened) -> Batch:
    """Return a batch of one image as the pipeline makes it."""
    single = config.copy_and_resolve_references().unlock()
    single.run.batch_size = 1
    single.data.update(num_threads=0, num_workers=0)
    iterator = stage.make_task(single, opened).train_batches(0, 1)
    row = next(iterator)
    iterator.close()
    return {name: array for name, array in row.items() if name != "faults"}


@dataclasses.dataclass(frozen=True)
class _Source:
    """A data set of which only the length matters: every image is the same grey square."""

    length: int
    num_classes: int
    name: str = "abstract"
    split: str = "train"
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, example_id: int) -> dict[str, Any]:
        image, label_map = io.BytesIO(), io.BytesIO()
        Image.new("RGB", (_GREY_SIDE, _GREY_SIDE), (128, 128, 128)).save(image, "JPEG")
        Image.new("L", (_GREY_SIDE, _GREY_SIDE)).save(label_map, "PNG")
        return {
            "image": image.getvalue(),
            "label": 0,
            "label_map": label_map.getvalue(),
            "example_id": int(example_id),
            "where": self.name,
        }


@dataclasses.dataclass(frozen=True)
class ZeroTargets:
    """A target cache of which only the encoding matters: every target is zero."""

    encoding: Encoding
    length: int
    num_views: int
    manifest: Mapping[str, Any]

    def __len__(self) -> int:
        return self.length

    def readable(self, example_id: int, view: int) -> tuple[dict[str, np.ndarray], str]:
        return zero_entries(self.encoding), ""
