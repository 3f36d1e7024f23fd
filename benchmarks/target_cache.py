"""How fast a target cache is read at random and written, by encoding, and how near its features are.

    python -m benchmarks.target_cache

Features are drawn at the size of CLIP ViT-B/16 (196 x 512) with a few channels that stand out, as transformers have
them; `--features=FILE.npy` ('b n t') takes real ones for the cosines. Rates are records per second of processor time,
from the page cache: what one core can do, whatever the disk. The encodings take turns in several rounds; medians are
shown.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from beitv2_jax.data.target_cache.encoding import FEATURE_DTYPES, CodeEncoding, Encoding, FeatureEncoding
from beitv2_jax.data.target_cache.reader import TargetReader
from beitv2_jax.data.target_cache.writer import TargetCache
from benchmarks.target_storage import record_bytes

MANIFEST = {
    **{"part": "views", "compute_dtype": "float32", "source": "drawn", "split": "train", "image_size": 224},
    **{"num_views": 1, "interpolation": "bicubic", "augmentation_version": "0", "seed": 0, "min_scale": 0.2},
    **{"color_jitter": 0.0, "grid": [14, 14]},
}
TEACHER = {
    **{"teacher": "drawn", "teacher_hash": "", "teacher_width": 512, "teacher_normalization": "half"},
    **{"teacher_output": "tokens", "teacher_activation": "gelu", "teacher_num_heads": 8, "teacher_input_size": 224},
    **{"teacher_grid_match": "resize_input", "teacher_position_resize": "bicubic"},
}
TOKENIZER = {"tokenizer": "drawn", "tokenizer_hash": "", "codebook_size": 8192}
BATCH = 50


def drawn_features(count: int) -> np.ndarray:
    """Return features 'count 196 512', four channels six times above the others."""
    features = np.random.default_rng(0).normal(size=(count, 196, 512)).astype(np.float32)
    features[..., :4] *= 6
    return features


def cosines(encoding: Encoding, features: np.ndarray) -> np.ndarray:
    """Return the cosine of every token, stored and read, to itself."""
    read = encoding.decode(encoding.shrink(features)).astype(np.float64)
    norms = np.linalg.norm(read, axis=-1) * np.linalg.norm(features.astype(np.float64), axis=-1)
    return (read * features).sum(axis=-1) / norms


def write(encoding: Encoding, targets: np.ndarray, directory: Path) -> tuple[TargetReader, float]:
    """Write a target cache of one view; return its reader and the records written in a second of processor time."""
    network = TOKENIZER if isinstance(encoding, CodeEncoding) else TEACHER
    manifest = {**MANIFEST, **network, "target": encoding.target, "dtype": encoding.dtype, "num_examples": len(targets)}
    cache = TargetCache(directory, name="cache", manifest=manifest, shard_examples=len(targets))
    started = time.process_time()
    writer = cache.open_shard(0)
    for first in range(0, len(targets), BATCH):
        writer.write(0, encoding.pack(encoding.shrink(targets[first : first + BATCH])))
    writer.close([])
    rate = len(targets) / (time.process_time() - started)
    cache.finish()
    return TargetReader(directory, "train"), rate


def read_rate(reader: TargetReader, seconds: float) -> float:
    """Return the records read at random in a second of processor time."""
    places = np.random.default_rng(1).integers(0, len(reader), 1000).tolist()
    started, done = time.process_time(), 0
    while time.process_time() - started < seconds:
        reader.entries(places[done % len(places)], 0)
        done += 1
    return done / (time.process_time() - started)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--features", help="file of features 'b n t' whose cosines are shown")
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="of one of the rounds that all encodings take in turn"
    )
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    features = drawn_features(options.examples)
    shown = np.load(options.features) if options.features else features[:50]
    ids = np.random.default_rng(0).integers(0, 8192, (20 * options.examples, 196)).astype(np.int32)
    encodings = {dtype: FeatureEncoding(dtype, 196, 512) for dtype in reversed(FEATURE_DTYPES)}
    angles = {name: cosines(encoding, shown) for name, encoding in encodings.items()}
    encodings["13-bit code ids"] = CodeEncoding(8192, 196)
    with tempfile.TemporaryDirectory() as folder:
        caches = {
            name: write(encoding, features if name in angles else ids, Path(folder) / name)
            for name, encoding in encodings.items()
        }
        rounds = [
            {name: read_rate(reader, options.seconds) for name, (reader, _) in caches.items()}
            for _ in range(options.rounds)
        ]
    lines = [["stored as", "written/s", "read/s", "read MB/s", "to float32", "cosine mean", "min"], ["---"] * 7]
    for name, (reader, written) in caches.items():
        rate = statistics.median(one[name] for one in rounds)
        ratio = statistics.median(one[name] / one["float32"] for one in rounds)
        size = record_bytes(reader.encoding)
        near = [f"{angles[name].mean():.7f}", f"{angles[name].min():.7f}"] if name in angles else ["", ""]
        lines.append([name, f"{written:,.0f}", f"{rate:,.0f}", f"{rate * size / 1e6:,.0f}", f"{ratio:.2f}", *near])
    print("\n".join("| " + " | ".join(line) + " |" for line in lines))


if __name__ == "__main__":
    main()
