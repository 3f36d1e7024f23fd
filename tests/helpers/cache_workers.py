"""Workers that fill a small cache, as processes that can be killed; started by targets_test.py.

Reads lines `{"directory": ..., ...}` and prints the process id of a worker forked for each: loading the libraries once
saves seconds a worker. The network is a sum of pixels, the images are drawn, and loading one takes a few milliseconds.
"""

import json
import os
import signal
import sys
import time
import warnings

import numpy as np
from target_caches import FEATURE_MANIFEST

from beitv2_jax.data.target_cache.leases import Leases
from beitv2_jax.data.target_cache.manifest import encoding_of
from beitv2_jax.data.target_cache.writer import TargetCache
from beitv2_jax.runners.targets import Filler

MANIFEST = {**FEATURE_MANIFEST, "num_examples": 83, "num_views": 3}
SHARD_EXAMPLES, BATCH_SIZE = 11, 4
UNREADABLE = (5, 80)


def rows(example_id: int, views: range, seconds: float = 0.0) -> list[dict]:
    """Return the rows of an example's views; two examples are unreadable."""
    time.sleep(seconds)
    fault = "drawing: no such picture" if example_id in UNREADABLE else ""
    return [
        {
            "images": np.random.default_rng([example_id, view]).integers(0, 256, (21, 5, 3), dtype=np.uint8),
            "example_ids": np.int64(example_id),
            "weight": np.float32(not fault),
            "faults": np.str_(fault),
        }
        for view in views
    ]


def features(images: np.ndarray) -> np.ndarray:
    """Return the features 'b n t' of images 'b n t 3'."""
    return images.astype(np.float32).mean(axis=-1) - 127.5


def work(directory: str, *, num_views: int = 3, seconds: float = 0.0, stale_seconds: float = 60.0) -> None:
    """Take part in filling the cache until it is finished."""
    manifest = {**MANIFEST, "num_views": num_views}
    cache = TargetCache(directory, name="cache", manifest=manifest, shard_examples=SHARD_EXAMPLES)
    encoding = encoding_of(manifest)
    filler = Filler(
        cache,
        load=lambda example_id: rows(example_id, cache.views, seconds),
        apply=lambda batches: ((batch, encoding.shrink(features(batch["images"]))) for batch in batches),
        encoding=encoding,
        split="train",
        batch_size=BATCH_SIZE,
        reading={"num_threads": 2, "num_workers": 0},
        max_bad_fraction=0.1,
        label="toy",
    )
    with Leases(cache.work, heartbeat_seconds=stale_seconds / 8, stale_seconds=stale_seconds) as leases:
        filler.run(leases, poll_seconds=0.02)


def main() -> None:
    """Fork a worker for every line of input; dead ones are not kept as zombies."""
    warnings.simplefilter("ignore")
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module
    from tensorflow_datasets.core import dataset_info, example_serializer

    assert all((tfds, array_record_module, dataset_info, example_serializer))  # loaded once, for all workers
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 1
            try:
                work(**json.loads(line))
                status = 0
            finally:
                os._exit(status)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
