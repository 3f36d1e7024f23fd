"""Run the probe: cache the features of both splits, then fit and vote on the cached arrays."""

import os
import uuid
from collections.abc import Callable

import numpy as np

from beitv2_jax import config as config_lib
from beitv2_jax.data.bad_records import BadRecords
from beitv2_jax.tasks import inputs
from beitv2_jax.tasks.probe import FeatureSet, Probe, ProbeSettings, probe_features
from beitv2_jax.training import liveness, preemption
from beitv2_jax.training.inference import run_batches
from beitv2_jax.training.sharding import make_mesh


def run(probe: Probe, config, workdir: str) -> dict[str, float]:
    """Probe every feature set and return its accuracies as {'pretrained/cls/linear': ..., ...}.

    Features are cached as `features/<set>_<split>.npz` under `workdir`; a cached file is not computed again.

    Raises:
        Preempted: this process was told to end; cached features stay.
    """
    with (
        preemption.stops("probe") as stop_if_told,
        liveness.Watch(workdir, config.run.hang_timeout, alone=True) as watch,
    ):
        return _probe(probe, config, workdir, liveness.moving(watch, stop_if_told))


def _probe(probe: Probe, config, workdir: str, on_move: Callable[[str], None]) -> dict[str, float]:
    mesh = make_mesh(**config.mesh)
    settings = dict(config.probe)
    settings.pop("layers")
    num_steps = config_lib.steps(
        settings.pop("duration"), batch_size=config.probe.batch_size, num_examples=len(probe.sources[0])
    )
    settings = ProbeSettings(num_steps=num_steps, seed=config.seed, **settings)
    figures = {}
    for feature_set in probe.feature_sets:
        train, test = (cached_features(feature_set, source, config, mesh, workdir, on_move) for source in probe.sources)
        for name in (key for key in train if key != "labels"):
            on_move("fitting")
            result = probe_features(
                train[name], train["labels"], test[name], test["labels"], probe.sources[0].num_classes, settings
            )
            figures |= {f"{feature_set.name}/{name}/{key}": value for key, value in result.items()}
    return figures


def cached_features(
    feature_set: FeatureSet, source, config, mesh, workdir: str, on_move: Callable[[str], None] = lambda phase: None
) -> dict[str, np.ndarray]:
    """Return the features and labels of a whole split, computed once and kept in the workdir."""
    path = os.path.join(workdir, "features", f"{feature_set.name}_{source.split.replace('/', '_')}.npz")
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        rows = []
        batches = inputs.eval_batches(source, config)
        for batch, outputs in run_batches(
            feature_set.apply,
            feature_set.frozen,
            BadRecords(workdir).noted(batches, source.split),
            mesh,
            total=len(batches),
            label=f"features {feature_set.name}",
        ):
            on_move("computing features")
            real = batch["weight"] > 0
            rows.append({key: value[real] for key, value in {**outputs, "labels": batch["labels"]}.items()})
        arrays = {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"  # a name of its own: several processes do the same
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    with np.load(path) as file:
        return dict(file)
