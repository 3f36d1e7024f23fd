"""Run the probe: cache the features of both splits, then evaluate them by a protocol."""

import dataclasses

import jax
import numpy as np

from beitv2_jax.data.sources import Source
from beitv2_jax.evaluation.features import Features, OnMove, ProbeSettings
from beitv2_jax.evaluation.protocols import PROTOCOLS
from beitv2_jax.evaluation.saved import SavedParts
from beitv2_jax.runners.feature_cache import FOLDER, cached_arrays
from beitv2_jax.runners.provenance import digest
from beitv2_jax.runtime import watchdog
from beitv2_jax.runtime.buckets import as_path
from beitv2_jax.tasks import inputs
from beitv2_jax.tasks.frozen import FeatureSet
from beitv2_jax.tasks.probe import Probe


def run(probe: Probe, config, workdir: str) -> dict[str, float]:
    """Probe every feature set and return its accuracies as {'pretrained/cls/linear': ..., ...}.

    `train_examples` and `eval_examples` say how many images they are of: those that could be read. What was chosen is
    in 'chosen/pretrained/cls/linear_rate', ....

    Features are cached in `features/<set>_<split>.<hash>/` under `workdir`, the hash of what they were made from: one
    array a file, which is mapped and not read as a whole. What is cached is not computed again. What a protocol has
    found by them is kept in `features/<set>_heads.<hash>/`, and so are heads that are not finished.

    Raises:
        Preempted: this process was asked to stop; cached features stay.
    """
    with watchdog.watched("probe", workdir, config.run.hang_timeout) as on_move:
        return _probe(probe, config, workdir, on_move)


def _probe(probe: Probe, config, workdir: str, on_move: OnMove) -> dict[str, float]:
    settings = dict(config.probe)
    protocol = settings.pop("protocol")
    del settings["layers"], settings["duration"]
    settings = ProbeSettings(num_steps=probe.num_steps, seed=config.seed, **settings)
    metrics = {}
    for feature_set in probe.feature_sets:
        train, test = (cached_features(feature_set, source, config, workdir, on_move) for source in probe.sources)
        metrics |= {"train_examples": len(train.labels), "eval_examples": len(test.labels)}
        found_by = digest([protocol, train.made_from, test.made_from, dataclasses.asdict(settings)])
        parts = SavedParts(as_path(workdir) / FOLDER / f"{feature_set.name}_heads.{found_by}")
        with jax.default_matmul_precision("highest"):  # accelerators round products of float32 further by default
            result = PROTOCOLS[protocol](train, test, settings, on_move, parts)
        metrics |= {f"{feature_set.name}/{name}": value for name, value in result.accuracies.items()}
        metrics |= {f"chosen/{feature_set.name}/{name}": value for name, value in result.chosen.items()}
    return metrics


def cached_features(
    feature_set: FeatureSet, source: Source, config, workdir: str, on_move: OnMove = lambda phase: None
) -> Features:
    """Return the features and labels of a whole split, cached as `cached_arrays` does it.

    Raises:
        UserError: as `cached_arrays`.
    """
    made_from, arrays = cached_arrays(
        feature_set,
        source,
        config,
        workdir,
        on_move,
        batches=inputs.eval_batches,
        beside=lambda batch: {"labels": batch["labels"]},
        made_from=[config.probe.protocol, feature_set.layers],
        smaller="--config.probe.protocol=dinov3, which keeps no patch tokens",
    )
    del arrays["example_ids"]
    labels = np.array(arrays.pop("labels"))  # read as a whole
    return Features(arrays, labels, feature_set.layers, source.num_classes, made_from)
