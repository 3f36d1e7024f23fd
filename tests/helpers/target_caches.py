"""Small finished caches for tests, written as the stages write them."""

import numpy as np

from beitv2_jax.data.target_cache.manifest import encoding_of
from beitv2_jax.data.target_cache.reader import TargetReader
from beitv2_jax.data.target_cache.writer import TargetCache

FEATURE_MANIFEST = {
    "part": "views",
    "target": "teacher_features",
    "dtype": "int8",
    "compute_dtype": "float32",
    "grid": [7, 3],
    "source": "folder:birds@12",
    "split": "train",
    "num_examples": 23,
    "image_size": 32,
    "num_views": 3,
    "interpolation": "bicubic",
    "augmentation_version": "1",
    "seed": 11,
    "min_scale": 0.2,
    "color_jitter": 0.0,
    "teacher": "small",
    "teacher_hash": "c0ffee",
    "teacher_width": 5,
    "teacher_normalization": "half",
    "teacher_output": "tokens",
    "teacher_activation": "gelu",
    "teacher_num_heads": 1,
    "teacher_grid_match": "resize_input",
    "teacher_position_resize": "bicubic",
    "teacher_input_size": 48,
}
CODE_MANIFEST = {name: value for name, value in FEATURE_MANIFEST.items() if not name.startswith("teacher_")} | {
    "target": "code_ids",
    "dtype": "uint4",
    "tokenizer": "vqkd@9",
    "tokenizer_hash": "decaf",
    "codebook_size": 13,
}
del CODE_MANIFEST["teacher"]


def fill(directory, manifest, targets, *, shard_examples=7, unreadable=()):
    """Write the views that the cache lacks; `targets(example id, view)` are the features or ids of one."""
    cache = TargetCache(directory, name="cache", manifest=manifest, shard_examples=shard_examples)
    encoding = encoding_of(manifest)
    for shard in cache.remaining():
        writer = cache.open_shard(shard)
        for view in cache.views:
            rows = np.stack([targets(example_id, view) for example_id in cache.shards[shard]])
            writer.write(view, encoding.pack(encoding.shrink(rows)))
        writer.close([bad for bad in unreadable if bad["example_id"] in cache.shards[shard]])
    if cache.views:
        cache.finish()
    return TargetReader(directory, manifest["split"])
