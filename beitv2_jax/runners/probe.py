"""Run the probe: cache the features of both splits, then fit and vote on the cached arrays."""

import time
import zipfile
from collections.abc import Callable

import jax
import numpy as np

from beitv2_jax.convert.runs import weights_hash
from beitv2_jax.data.bad_records import BadRecords, refuse_too_many
from beitv2_jax.errors import UserError
from beitv2_jax.evaluation.probe import ProbeSettings, probe_features
from beitv2_jax.runners.provenance import describe_data, digest
from beitv2_jax.runtime import preemption, watchdog
from beitv2_jax.runtime.atomic_files import replacing
from beitv2_jax.runtime.buckets import AnyPath, as_path
from beitv2_jax.tasks import inputs
from beitv2_jax.tasks.probe import FeatureSet, Probe
from beitv2_jax.training.inference import run_batches
from beitv2_jax.training.sharding import make_mesh

POLL_SECONDS = 0.5
"""Time between two looks at what the other processes have written."""


def run(probe: Probe, config, workdir: str) -> dict[str, float]:
    """Probe every feature set and return its accuracies as {'pretrained/cls/linear': ..., ...}.

    `train_examples` and `eval_examples` say how many images they are of: those that could be read.

    Features are cached as `features/<set>_<split>.<hash>.npz` under `workdir`, the hash of what they were made from; a
    cached file is not computed again.

    Raises:
        Preempted: this process was asked to stop; cached features stay.
    """
    with (
        preemption.stops("probe") as stop_if_signalled,
        watchdog.Watch(workdir, config.run.hang_timeout, alone=True) as watch,
    ):
        return _probe(probe, config, workdir, watchdog.moving(watch, stop_if_signalled))


def _probe(probe: Probe, config, workdir: str, on_move: Callable[[str], None]) -> dict[str, float]:
    settings = dict(config.probe)
    del settings["layers"], settings["duration"]
    settings = ProbeSettings(num_steps=probe.num_steps, seed=config.seed, **settings)
    metrics = {}
    for feature_set in probe.feature_sets:
        train, test = (cached_features(feature_set, source, config, workdir, on_move) for source in probe.sources)
        metrics |= {"train_examples": len(train["labels"]), "eval_examples": len(test["labels"])}
        for name in (key for key in train if key != "labels"):
            on_move("fitting")
            result = probe_features(
                train[name], train["labels"], test[name], test["labels"], probe.sources[0].num_classes, settings
            )
            metrics |= {f"{feature_set.name}/{name}/{key}": value for key, value in result.items()}
    return metrics


def cached_features(
    feature_set: FeatureSet, source, config, workdir: str, on_move: Callable[[str], None] = lambda phase: None
) -> dict[str, np.ndarray]:
    """Return the features and labels of a whole split, computed once for its data and network and kept in the workdir.

    Of several processes each computes its part of the rows on its devices; process 0 concatenates what all have
    written, and the others wait for that.

    Raises:
        UserError: more images than `data.max_bad_fraction` allows were unreadable.
    """
    made_from = [
        weights_hash(feature_set.frozen),
        describe_data((source,)),
        config.views.image_size,
        config.probe.layers,
    ]
    name = f"{feature_set.name}_{source.split.replace('/', '_')}.{digest(made_from)}.npz"
    path = as_path(workdir) / "features" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        index, count = jax.process_index(), jax.process_count()
        parts = [path.with_name(f"{path.stem}.{number}-of-{count}.npz") for number in range(count)]
        if not parts[index].exists():
            _write(parts[index], _share_of_features(feature_set, source, config, workdir, on_move))
        awaited = parts if index == 0 else [path]
        while not all(file.exists() for file in awaited):
            on_move("waiting for other processes")
            time.sleep(POLL_SECONDS)
        if index == 0:
            _write(path, _joined([_read(part) for part in parts]))
            for part in parts:
                part.unlink()
    features = _read(path)
    refuse_too_many(
        len(source) - len(features["labels"]),
        len(source),
        config.data.max_bad_fraction,
        of=f"of split {source.split}",
        listed=f"listed in {as_path(workdir) / 'bad_records.jsonl'} and delete {path}",
    )
    return features


def _share_of_features(
    feature_set: FeatureSet, source, config, workdir: str, on_move: Callable[[str], None]
) -> dict[str, np.ndarray]:
    """Return the features, labels and example ids of the rows of every batch that are this process's."""
    batches = inputs.eval_batches(source, config, jax.process_index(), jax.process_count())
    rows = []
    for batch, outputs in run_batches(
        feature_set.apply,
        feature_set.frozen,
        BadRecords(workdir, jax.process_index()).noted(batches, source.split),
        make_mesh(**config.mesh, devices=jax.local_devices()),
        total=len(batches),
        label=f"features {feature_set.name}",
    ):
        on_move("computing features")
        real = batch["weight"] > 0
        arrays = {**outputs, **{name: batch[name] for name in ("labels", "example_ids")}}
        rows.append({name: array[real] for name, array in arrays.items()})
    return _concatenated(rows)


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the rows of all parts in the order of their example ids, without these."""
    rows = _concatenated(parts)
    order = np.argsort(rows.pop("example_ids"))
    return {name: array[order] for name, array in rows.items()}


def _concatenated(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _write(path: AnyPath, arrays: dict[str, np.ndarray]) -> None:
    with replacing(path, "wb") as file:
        np.savez(file, **arrays)


def _read(path: AnyPath) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"The cached features in {path} are damaged: {error}.",
            "The machine may have lost its power, or the disk may have been full.",
            f"Delete {path} and run the same command again.",
        ) from error
