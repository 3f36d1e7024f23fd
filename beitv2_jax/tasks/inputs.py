"""What the stages share: views and their identity, evaluation batches, targets beside them, decay grouping."""

import dataclasses
import os
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from beitv2_jax.convert.adapt import for_run
from beitv2_jax.convert.weights import read as read_weights
from beitv2_jax.data import pipeline
from beitv2_jax.data.masking import block_mask
from beitv2_jax.data.sources import Source, open_source
from beitv2_jax.data.targets import TargetReader
from beitv2_jax.models import preprocess
from beitv2_jax.rng import host_rng
from beitv2_jax.typing import PyTree

EVAL_CROP_FRACTION = 0.875
"""Share of the resized shorter side that the centre crop keeps (facts: released evaluation below 384 pixels)."""


def init_variables(model, key, *args, **kwargs) -> dict[str, PyTree]:
    """Return {"params", "codebook"} of a fresh model; the codebook is empty for models without one."""
    variables = model.init({"params": key, "drop_path": key}, *args, **kwargs)
    return {"params": variables["params"], "codebook": variables.get("codebook", {})}


def initial_variables(config, kind: str, model) -> dict[str, PyTree]:
    """Return what `config.init_from` gives a fresh model of `kind`, as the `initial` of a task; {} without it.

    Raises:
        UserError: there are no readable weights, or they do not fit the model.
    """
    if not config.init_from:
        return {}
    weights = for_run(read_weights(config.init_from), kind, _arguments(model))
    variables = {name: tree for name, tree in weights.variables.items() if tree}
    given = sum(array.size for array in jax.tree.leaves(variables))
    logging.info("%s numbers from %s (%s)", f"{given:,}", config.init_from, weights.layout)
    for reason in sorted(set(weights.dropped.values())):
        names = [name for name, why in weights.dropped.items() if why == reason]
        logging.info("not from there: %s%s (%s)", names[0], f" and {len(names) - 1} more" if names[1:] else "", reason)
    return variables


def _arguments(model) -> dict:
    fields = (field.name for field in dataclasses.fields(model))
    return {name: getattr(model, name) for name in fields if name not in ("parent", "name")}


def released_no_decay(path: str) -> bool:
    """Tell whether the released recipes exempt the parameter at `path` ('a/b/c') from weight decay.

    Exempt are all vectors (biases, norms, layer scale), `cls_token` and `pos_embed`. Relative position tables and the
    mask token are decayed, as released.
    """
    return re.search(r"(bias|scale|gamma_[12]|cls_token|pos_embed)$", path) is not None


def open_sources(config) -> tuple[Source, Source]:
    """Open the train and eval splits that `config.data` names."""
    data = config.data
    return tuple(open_source(data.source, split, data.data_dir) for split in (data.train_split, data.eval_split))


def train_batches(config, source: Source, *, mask: dict | None = None, targets: TargetReader | None = None):
    """Return the factory (process_index, process_count) -> iterator of training batches of random views.

    Each example comes with its mask (`mask`: arguments of `block_mask`) and its stored targets where asked for.
    """
    transform = pipeline.TrainTransform(seed=config.seed, mask=mask, targets=targets, **config.views)

    def batches(process_index: int, process_count: int):
        return pipeline.train_iterator(
            source,
            transform,
            batch_size=config.run.batch_size,
            seed=config.seed,
            num_threads=config.data.num_threads,
            process_index=process_index,
            process_count=process_count,
        )

    return batches


def view_pixels(batch: dict) -> jnp.ndarray:
    """Return the view's pixels, float32 0..255, after the colour jitter drawn for it (if any)."""
    if "jitter_factors" in batch:
        return preprocess.color_jitter(batch["images"], batch["jitter_factors"], batch["jitter_order"])
    return batch["images"].astype(jnp.float32)


def store_card(config, source: Source, part: str) -> dict:
    """Return what identifies the views of one part of a store: equal cards mean equal pixels per view.

    `part` is "views" (the `num_views` random views of the train split) or "centre" (one centre crop of the eval split).
    """
    views = config.views
    common = {"source": source.name, "split": source.split, "num_examples": len(source), "image_size": views.image_size}
    if part == "centre":
        return {**common, "num_views": 1, "crop_fraction": EVAL_CROP_FRACTION}
    drawn = {key: views[key] for key in ("num_views", "min_scale", "color_jitter", "interpolation")}
    return {**common, **drawn, "seed": config.seed}


def open_store(
    directory: str, config, sources: tuple[Source, Source], grid: tuple[int, int], made_with: dict | None = None
):
    """Open both parts of the store that an extract or tokenize stage left in `directory`: (views, centre).

    `made_with` holds further entries that its card must have.

    Raises:
        UserError: there is no finished store, or it was made from other views, other data, with other choices or on
            another grid.
    """
    readers = []
    for part, source in zip(("views", "centre"), sources, strict=True):
        reader = TargetReader(os.path.join(directory, part), source.split)
        reader.check({**store_card(config, source, part), "grid": list(grid), **(made_with or {})})
        readers.append(reader)
    return tuple(readers)


TEACHER_CHOICES = ("num_heads", "normalization", "output", "activation", "grid_match", "position_resize")
"""Keys of a config's `teacher` that say how its weights are used."""


def teacher_arguments(config, patch_size: int) -> dict:
    """Return what a config says of its teacher, as keyword arguments of `load_teacher`.

    `patch_size` is the tokenizer's: the teacher is to give one feature for each of its patches.
    """
    teacher = {key: config.teacher[key] for key in ("weights", *TEACHER_CHOICES)}
    grid = (config.views.image_size // patch_size,) * 2
    return {**teacher, "image_size": config.views.image_size, "grid": grid, "dtype": config.efficiency.dtype}


def teacher_card(teacher) -> dict:
    """Return what identifies the features of a teacher, in the card of their store."""
    return {
        "grid": list(teacher.grid),
        "teacher": teacher.name,
        "teacher_hash": teacher.weights_hash,
        "teacher_width": teacher.width,
        **{f"teacher_{key}": value for key, value in teacher.choices.items()},
    }


def stated_choices(config) -> dict:
    """Return the choices that a config states of its teacher, as a store's card has them; '' and 0 state nothing."""
    return {f"teacher_{key}": config.teacher[key] for key in TEACHER_CHOICES if config.teacher[key]}


def eval_batches(source: Source, config, process_index: int = 0, process_count: int = 1) -> pipeline.Batches:
    """Return every example of `source` once as a centre crop, padded to whole batches (`weight` 0 marks padding)."""
    return pipeline.eval_batches(
        source,
        image_size=config.views.image_size,
        batch_size=config.run.batch_size,
        crop_fraction=EVAL_CROP_FRACTION,
        num_threads=config.data.num_threads,
        process_index=process_index,
        process_count=process_count,
    )


def eval_batches_with(extra: Callable[[dict], dict], source: Source, config, process_index: int, process_count: int):
    """Yield `eval_batches` with entries added that `extra` computes from the batch on the host: targets, masks."""
    for batch in eval_batches(source, config, process_index, process_count):
        yield {**batch, **extra(batch)}


def stored_views(key: str, reader: TargetReader | None) -> Callable[[dict], dict]:
    """Return an `extra` for `eval_batches_with` that reads the stored targets of view 0 of each example under `key`."""

    def extra(batch: dict) -> dict:
        if reader is None:
            return {}
        return {key: np.stack([reader[int(i), 0] for i in batch["example_ids"]])}

    return extra


def eval_masks(config, grid: tuple[int, int], masking: dict) -> Callable[[dict], dict]:
    """Return an `extra` for `eval_batches_with` that adds one mask per example, a function of (seed, example id)."""

    def extra(batch: dict) -> dict:
        rngs = (host_rng(config.seed, "eval_mask", int(i)) for i in batch["example_ids"])
        return {"mask": np.stack([block_mask(rng, grid, **masking).reshape(-1) for rng in rngs])}

    return extra
