"""Store the features of any teacher: a function of the crops, or numbers that were computed from them elsewhere.

    from beitv2_jax import config
    from beitv2_jax.runners.features import write_features

    vqkd = config.load("configs/vqkd.py")
    write_features(vqkd, "runs/features", lambda crops: network(crops.images), name="my network")

The directory then serves as `--config.teacher.features` of that vqkd stage, like one of the extract stage.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from ml_collections import ConfigDict

from beitv2_jax import config as config_lib
from beitv2_jax.convert.teachers.terms import UNKNOWN
from beitv2_jax.data.target_cache.encoding import FeatureEncoding
from beitv2_jax.data.view_stream import view_stream
from beitv2_jax.errors import UserError
from beitv2_jax.runners import stages
from beitv2_jax.runners import targets as runner
from beitv2_jax.tasks import inputs
from beitv2_jax.tasks import targets as targets_lib
from beitv2_jax.tasks.api import Batch, TargetCacheTask


class Crops(NamedTuple):
    """Crops of which features are needed.

    Attributes:
        part: 'views' for random views of the train split, 'centre' for centre crops of the eval split.
        view: number of the view, from 0; always 0 in the part 'centre'.
        example_ids: places of the images in their split.
        images: the pixels, from 0 to 255.
    """

    part: str
    view: int
    example_ids: Int[np.ndarray, "b"]
    images: UInt8[np.ndarray, "b S S 3"]


Teacher = Callable[[Crops], Float[np.ndarray, "b gh gw t"]]
"""Crops -> their features, one for each patch of the tokenizer, by row and column."""


def fixed_views(config: ConfigDict) -> Iterator[Crops]:
    """Yield all crops whose features a vqkd stage needs, in batches of `run.batch_size` or fewer.

    Features that are stored with their `part`, `view` and `example_ids` can be computed by another program, and a
    function that looks them up is a teacher for `write_features`. Images that cannot be read are left out.

    Args:
        config: of the vqkd stage.

    Raises:
        UserError: the config is not one of a vqkd stage with stored views, or the data are missing.
    """
    config = _checked(config, "")
    for part, source in zip(targets_lib.PARTS, inputs.open_sources(config), strict=True):
        views = range(config.views.num_views if part == targets_lib.PARTS[0] else 1)
        size = config.run.batch_size
        chunks = (range(start, min(start + size, len(source))) for start in range(0, len(source), size))
        load = targets_lib.view_rows(config, source, part, views)
        for batch in view_stream(load, chunks, views, batch_size=size, **inputs.reading(config)):
            crops, _ = _readable(part, batch)
            if len(crops.images):
                yield crops


def write_features(
    config: ConfigDict,
    workdir: str,
    teacher: Teacher,
    *,
    name: str,
    dtype: str = "int8",
    shard_examples: int = 8192,
) -> dict[str, float]:
    """Write the features of every fixed view of a vqkd stage to `workdir`; return counts of examples and faults.

    An interrupted call continues where it stopped, features of more views are added to a finished directory, and any
    number of processes may do the same call at the same time, as in the extract stage.

    Args:
        config: of the vqkd stage that will learn from the features; its data, views, seed and patch size count, and
            its `teacher.license` and `teacher.origin` are kept with the features.
        workdir: directory of the features.
        teacher: is called with crops of one view of different images, `run.batch_size` or fewer.
        name: of the teacher; it is kept with the features, and another one is refused in the same directory.
        dtype: of the stored numbers, 'int8' (with a scale for each token), 'bfloat16', 'float16' or 'float32'.
        shard_examples: images whose features are written, and after an interruption computed again, together.

    Raises:
        UserError: the config is not one of a vqkd stage with stored views, the data are missing, the features have
            another shape or are not finite, or other features are in `workdir`.
        ValueError: unknown `dtype`.
    """
    config = _checked(config, workdir)
    stages.check_writable(workdir)
    sources = inputs.open_sources(config)
    grid = (config.views.image_size // config.model.encoder.patch_size,) * 2
    teacher = _CheckedTeacher(teacher, grid)
    encoding = FeatureEncoding(dtype, grid[0] * grid[1], teacher(_one_crop(config, sources[0])).shape[-1])
    task = TargetCacheTask(
        name="extract",
        frozen={},
        apply=lambda frozen, batch: None,
        encoding=encoding,
        manifest={
            **{f"teacher_{key}": config.teacher[key] for key in targets_lib.TEACHER_CHOICES},
            "grid": list(grid),
            "teacher": name,
            "teacher_hash": "",
            "teacher_width": encoding.width,
            "teacher_input_size": config.views.image_size,
            "teacher_license": config.teacher.license or UNKNOWN,
            "teacher_origin": config.teacher.origin or UNKNOWN,
            "target": encoding.target,
            "dtype": encoding.dtype,
            "compute_dtype": "",
        },
        sources=sources,
    )

    def apply_to(part: str) -> runner.Apply:
        def apply(batches: Iterable[Batch]) -> Iterator[tuple[Batch, Mapping[str, np.ndarray]]]:
            for batch in batches:
                crops, rows = _readable(part, batch)
                features = np.zeros((len(batch["weight"]), encoding.num_tokens, encoding.width), np.float32)
                if len(rows):
                    features[rows] = teacher(crops).reshape(len(rows), *features.shape[1:])
                yield batch, encoding.shrink(features)

        return apply

    return runner.fill(task, config, workdir, apply_to, shard_examples=shard_examples)


@dataclasses.dataclass(frozen=True)
class _CheckedTeacher:
    """A teacher whose answers are checked."""

    function: Teacher
    grid: tuple[int, int]

    def __call__(self, crops: Crops) -> Float[np.ndarray, "b gh gw t"]:
        features = np.asarray(self.function(crops), np.float32)
        expected = (len(crops.images), *self.grid)
        if features.ndim != 4 or features.shape[:3] != expected:
            rows, columns = self.grid
            raise UserError(
                f"The teacher gave features of the shape {features.shape} for {len(crops.images)} crops, which is not "
                f"({', '.join(map(str, expected))}, width).",
                "Did you leave [CLS] in, or is its grid another one than that of the tokenizer?",
                f"Return an array of the shape (crops, {rows}, {columns}, width): one feature for each patch.",
            )
        return features


def _checked(config: ConfigDict, workdir: str) -> ConfigDict:
    """Return the resolved config of a vqkd stage that reads the features in `workdir`."""
    if config.get("stage") != "vqkd" or not config.views.num_views:
        raise UserError(
            f"The config is of the stage {config.get('stage')!r} with views.num_views={config.views.num_views}."
            if "views" in config
            else f"The config is of the stage {config.get('stage')!r}.",
            "Features can be stored of fixed views only, which the config of the vqkd stage names.",
            'Pass config.load("configs/vqkd.py") with views.num_views of 1 or more.',
        )
    config = config_lib.resolve(config, "").unlock()
    config.teacher.update(weights="", features=workdir or "features")
    config_lib.validate(config)
    return config.lock()


def _one_crop(config: ConfigDict, source: Any) -> Crops:
    """Return the first view of the first image that can be read."""
    load = targets_lib.view_rows(config, source, targets_lib.PARTS[0], range(1))
    for example_id in range(len(source)):
        (row,) = load(example_id)
        if row["weight"] > 0:
            return Crops(targets_lib.PARTS[0], 0, np.array([example_id]), row["images"][None])
    raise UserError(
        f"None of the {len(source)} images of {source.name} can be read.",
        "The files may have been damaged when they were copied.",
        "Copy them again, or write another config.data.source.",
    )


def _readable(part: str, batch: Batch) -> tuple[Crops, Int[np.ndarray, "n"]]:
    """Return the crops of a batch that are of images and readable, and their rows."""
    rows = np.flatnonzero(batch["weight"] > 0)
    return Crops(part, int(batch["views"][0]), batch["example_ids"][rows], batch["images"][rows]), rows
