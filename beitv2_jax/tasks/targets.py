"""Target caches, for the stages that write and read them: parts, manifests, rows, opening and checking.

A target cache is the workdir of an extract or tokenize stage. Its part "views" holds the `num_views` random views of
the train split, its part "centre" one centre crop of the eval split.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from beitv2_jax.convert.teachers.terms import terms_of_weights
from beitv2_jax.data.augment import AUGMENTATION_VERSION, eval_crop_fraction
from beitv2_jax.data.sources import Source
from beitv2_jax.data.target_cache.manifest import check_manifest, check_views, identity, read_manifest
from beitv2_jax.data.target_cache.reader import TargetReader
from beitv2_jax.data.transform import EvalTransform, Example, TrainTransform
from beitv2_jax.errors import UserError
from beitv2_jax.tasks import inputs

PARTS = ("views", "centre")
TEACHER_CHOICES = ("num_heads", "normalization", "output", "activation", "grid_match", "position_resize")
"""Keys of a config's `teacher` that say how its weights are used."""


def teacher_arguments(config, patch_size: int) -> dict:
    """Return what a config says of its teacher, as keyword arguments of `load_teacher`.

    `patch_size` is the tokenizer's: the teacher is to give one feature for each of its patches.
    """
    teacher = {key: config.teacher[key] for key in ("weights", "state_dict", *TEACHER_CHOICES)}
    grid = (config.views.image_size // patch_size,) * 2
    return {**teacher, "image_size": config.views.image_size, "grid": grid, "dtype": config.efficiency.dtype}


def teacher_manifest(teacher) -> dict:
    """Return what identifies the features of a teacher, in the manifest of their cache."""
    return {
        "grid": list(teacher.grid),
        "teacher": teacher.name,
        "teacher_hash": teacher.weights_hash,
        "teacher_width": teacher.width,
        **{f"teacher_{key}": value for key, value in teacher.choices.items()},
    }


def teacher_terms(config) -> dict:
    """Return the licence and the origin of a config's teacher, in the manifest of a cache of its features."""
    teacher = config.teacher
    terms = terms_of_weights(teacher.weights, license=teacher.license, origin=teacher.origin)
    return {f"teacher_{name}": terms[name] for name in ("license", "origin")}


def stated_choices(config) -> dict:
    """Return the teacher options that a config sets, as in the manifest of a target cache; '' and 0 are not set."""
    return {f"teacher_{key}": config.teacher[key] for key in TEACHER_CHOICES if config.teacher[key]}


def cache_manifest(config, source: Source, part: str) -> dict:
    """Return what identifies the views of one part of a target cache: equal manifests mean equal pixels per view.

    In the config of a stage that reads cached codes it is the tokenizer's own view that counts, where it has one.
    """
    of_data = {"source": source.name, "split": source.split, "num_examples": len(source)}
    return of_data | view_manifest(config, part)


def view_manifest(config, part: str) -> dict:
    """Return the part of `cache_manifest` that the config says, whatever the data are."""
    views, seen = config.views, inputs.tokenizer_view(config)
    common = {
        "part": part,
        "image_size": seen.image_size,
        "augmentation_version": AUGMENTATION_VERSION,
    }
    if part == "centre":
        interpolation = EvalTransform.interpolation
        return {
            **common,
            "num_views": 1,
            "interpolation": interpolation,
            "crop_fraction": eval_crop_fraction(views.image_size),
        }
    return {
        **common,
        "num_views": views.num_views,
        "interpolation": seen.interpolation,
        "seed": config.seed,
        "min_scale": float(views.min_scale),
        "color_jitter": float(views.color_jitter),
    }


def view_rows(config, source: Source, part: str, views: range) -> Callable[[int], list[Example]]:
    """Return the function example id -> rows of its `views` in a part of a target cache, from one decoding."""
    if part == "centre":
        image_size = config.views.image_size
        return CentreRow(source, EvalTransform(image_size, eval_crop_fraction(image_size)))
    return ViewRows(source, TrainTransform(seed=config.seed, **config.views), views)


@dataclasses.dataclass(frozen=True)
class ViewRows:
    """The random `views` of an example id, from one decoding."""

    source: Source
    transform: TrainTransform
    views: range

    def __call__(self, example_id: int) -> list[Example]:
        return self.transform.views(self.source[example_id], self.views)


@dataclasses.dataclass(frozen=True)
class CentreRow:
    """The one centre crop of an example id."""

    source: Source
    transform: EvalTransform

    def __call__(self, example_id: int) -> list[Example]:
        return [self.transform(self.source[example_id])]


def manifest_of(directory: str, target: str) -> dict:
    """Return the manifest of the train split in a target cache, which can be read before the data are open.

    Raises:
        UserError: there is no finished target cache, or it holds something else than `target`.
    """
    manifest = read_manifest(os.path.join(directory, PARTS[0]))
    check_manifest(manifest, {"target": target}, directory)
    return manifest


def check_targets(
    manifest: Mapping[str, Any],
    directory: str,
    config,
    target: str,
    grid: tuple[int, int],
    made_with: Mapping | None = None,
) -> None:
    """Check the manifest of a train split as `open_cache` does, without the data: same arguments, same errors."""
    expected = _expected(config, PARTS[0], target, grid, made_with)
    check_views(manifest, expected, directory, _flags(config, manifest))


def _expected(config, part: str, target: str, grid: tuple[int, int], made_with: Mapping | None) -> dict[str, Any]:
    return {"target": target, **view_manifest(config, part), "grid": list(grid), **(made_with or {})}


def _flags(config, found: Mapping[str, Any]) -> dict[str, str]:
    """Return, by field of a manifest, the flag that gives the stage of `config` the value that is `found` in it."""
    own_view = {name: f"tokenizer_{name}" for name in ("image_size", "interpolation")}
    keys = {name: f"views.{name}" for name in ("num_views", "image_size", "interpolation", "min_scale", "color_jitter")}
    keys |= {name: f"views.{own}" for name, own in own_view.items() if config.views.get(own)}
    keys |= {"seed": "seed", **{f"teacher_{name}": f"teacher.{name}" for name in TEACHER_CHOICES}}
    flags = {field: f"--config.{key}={found[field]}" for field, key in keys.items() if field in found}
    rows = found["grid"][0]
    if config.views.image_size % rows == 0:
        section = "model.encoder" if "encoder" in config.model else "model"
        flags["grid"] = f"--config.{section}.patch_size={config.views.image_size // rows}"
    return flags


def open_parts(directory: str, sources: tuple[Source, Source]) -> tuple[TargetReader, TargetReader]:
    """Open both parts of the cache that an extract or tokenize stage left in `directory`: (views, centre).

    Raises:
        UserError: there is no finished target cache, or it is damaged, or of other splits.
    """
    views, centre = (
        TargetReader(os.path.join(directory, part), source.split) for part, source in zip(PARTS, sources, strict=True)
    )
    return views, centre


def open_cache(
    directory: str,
    config,
    sources: tuple[Source, Source],
    target: str,
    grid: tuple[int, int],
    made_with: Mapping | None = None,
) -> tuple[TargetReader, TargetReader]:
    """Open both parts of a target cache and check that it holds `target` of the views of this run: (views, centre).

    `made_with` holds further entries that its manifest must have. The cache may hold more views than the run's
    `views.num_views`, which takes the first ones.

    Raises:
        UserError: there is no finished target cache, or it was made from other views or other data, with other choices
            or on another grid; the field of its manifest that differs is named.
    """
    for part, source in zip(PARTS, sources, strict=True):
        # before the split, which another data set may not have
        check_manifest(read_manifest(os.path.join(directory, part)), {"source": source.name}, directory)
    readers = open_parts(directory, sources)
    for part, source, reader in zip(PARTS, sources, readers, strict=True):
        expected = cache_manifest(config, source, part) | _expected(config, part, target, grid, made_with)
        reader.check(expected, _flags(config, reader.manifest))
    networks = [
        {name: value for name, value in identity(reader.manifest).items() if _of_network(name)} for reader in readers
    ]
    if networks[0] != networks[1]:
        name = next(name for name in networks[0] if networks[0][name] != networks[1].get(name))
        raise UserError(
            f"The parts views and centre in {directory} were made with {name} = {networks[0][name]!r} and "
            f"{networks[1].get(name)!r}.",
            "One of them may have been computed again with another network.",
            f"Delete both folders in {directory} and run the stage again.",
        )
    return readers


def _of_network(field: str) -> bool:
    return field.startswith(("teacher", "tokenizer", "codebook", "compute_dtype"))


def stored_views(reader: TargetReader | None) -> Callable[[dict], dict]:
    """Return an `extra` for `eval_batches_with` that adds the stored targets of view 0 of each example."""

    def extra(batch: dict) -> dict:
        if reader is None:
            return {}
        entries, faults = zip(*(reader.readable(int(i), 0) for i in batch["example_ids"]), strict=True)
        named = [
            f"example {i}: {fault}" if fault else "" for i, fault in zip(batch["example_ids"], faults, strict=True)
        ]
        return {
            "weight": np.where(np.array(named) != "", np.float32(0), batch["weight"]),
            "faults": np.where(batch["weight"] > 0, named, batch["faults"]),
            **{name: np.stack([entry[name] for entry in entries]) for name in entries[0]},
        }

    return extra
