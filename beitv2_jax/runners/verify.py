"""The task verify: compute a random sample of a target cache again, live, and compare it with what is stored.

Beside `targets`, which wrote the cache: same network, same views, same size of batch.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from beitv2_jax.data.target_cache.encoding import CODE_IDS
from beitv2_jax.data.target_cache.reader import TargetReader
from beitv2_jax.data.view_stream import view_stream
from beitv2_jax.errors import UserError
from beitv2_jax.rng import host_rng
from beitv2_jax.runners.targets import on_local_devices
from beitv2_jax.runtime.atomic_files import write_json
from beitv2_jax.tasks import inputs
from beitv2_jax.tasks import targets as targets_lib
from beitv2_jax.tasks.api import TargetCacheTask

MIN_COSINE = {"int8": 0.9995, "bfloat16": 0.99999, "float16": 0.99999, "float32": 0.999999}
"""Least mean cosine over the tokens of any view of the sample, by the type of the stored features."""
MIN_AGREEMENT = 0.99
"""Least fraction of the sample's code ids that are equal. On the machine that made them all are; another one rounds the
projections otherwise, which decides between codes that are nearly as near."""
VERIFY_FILE = "verify.json"


def verify(task: TargetCacheTask, config, workdir: str) -> dict[str, Any]:
    """Compare `output.verify_examples` random views of each part with the network's live answer; write `verify.json`.

    Returns:
        part -> metrics: `sample` is the number of views, `bound` what the last one is held against. For features
        `mean_cosine`, `min_cosine` (of any token), `worst_view` (example id, view) and `worst_view_cosine`; for code
        ids `agreement`.

    Raises:
        UserError: there is no finished target cache of this config, or it does not hold what the network says.
    """
    readers = targets_lib.open_parts(workdir, task.sources)
    report = {}
    for part, source, reader in zip(targets_lib.PARTS, task.sources, readers, strict=True):
        reader.check({**targets_lib.cache_manifest(config, source, part), **task.manifest})
        pairs = _sample(config, part, reader)
        live = _live(task, config, part, source, pairs)
        stored = np.stack([reader[pair] for pair in pairs])
        if reader.feature == CODE_IDS:
            report[part] = _compare_ids(live, stored)
        else:
            report[part] = _compare_features(live, stored, pairs, MIN_COSINE[reader.manifest["dtype"]])
        logging.info("verify %s: %s", part, report[part])
    write_json(os.path.join(workdir, VERIFY_FILE), report)
    for part, metrics in report.items():
        _refuse_below(metrics, os.path.join(workdir, part))
    return report


def _sample(config, part: str, reader: TargetReader) -> list[tuple[int, int]]:
    """Draw different readable (example id, view) of a part, sorted by view."""
    readable = np.setdiff1d(np.arange(len(reader)), np.array(sorted(reader.unreadable), int))
    total = len(readable) * reader.num_views
    rng = host_rng(config.seed, "verify", targets_lib.PARTS.index(part))
    places = rng.choice(total, min(config.output.verify_examples, total), replace=False)
    pairs = [(int(readable[place // reader.num_views]), int(place % reader.num_views)) for place in places]
    return sorted(pairs, key=lambda pair: (pair[1], pair[0]))


def _live(task: TargetCacheTask, config, part: str, source, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return the network's float32 features or ids of the pairs, computed in batches of the stage's size."""
    load = targets_lib.view_rows(config, source, part, range(config.views.num_views if part == "views" else 1))
    size = config.run.batch_size
    batches = view_stream(
        lambda place: [load(pairs[place][0])[pairs[place][1]]],
        [range(first, min(first + size, len(pairs))) for first in range(0, len(pairs), size)],
        range(1),
        batch_size=size,
        **{**inputs.reading(config), "num_workers": 0},
    )
    outputs = on_local_devices(task, config, lambda targets: targets)(batches)
    return np.concatenate([targets[batch["example_ids"] >= 0] for batch, targets in outputs])


def _compare_features(
    live: np.ndarray, stored: np.ndarray, pairs: Sequence[tuple[int, int]], bound: float
) -> dict[str, Any]:
    live, stored = live.astype(np.float64), stored.astype(np.float64)
    norms = np.linalg.norm(live, axis=-1) * np.linalg.norm(stored, axis=-1)
    same_zeros = ~live.any(axis=-1) & ~stored.any(axis=-1)
    cosines = np.where(same_zeros, 1.0, (live * stored).sum(axis=-1) / np.where(norms > 0, norms, 1.0))
    of_views = cosines.mean(axis=-1)
    return {
        "sample": len(pairs),
        "bound": bound,
        "mean_cosine": float(cosines.mean()),
        "min_cosine": float(cosines.min()),
        "worst_view": list(pairs[int(of_views.argmin())]),
        "worst_view_cosine": float(of_views.min()),
    }


def _compare_ids(live: np.ndarray, stored: np.ndarray) -> dict[str, Any]:
    return {"sample": len(live), "bound": MIN_AGREEMENT, "agreement": float((live == stored).mean())}


def _refuse_below(metrics: dict[str, Any], directory: str) -> None:
    name = next(reversed(metrics))
    if not metrics[name] >= metrics["bound"]:
        raise UserError(
            f"The targets in {directory} differ from the output of the network for the same views: {name} is "
            f"{metrics[name]:.6f} over {metrics['sample']} of them, and must be at least {metrics['bound']}.",
            "Records may be damaged or mixed up, or the images may have changed after the targets were stored.",
            f"Delete {directory} and run the stage again; {VERIFY_FILE} has the metrics.",
        )
