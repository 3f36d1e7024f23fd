"""Host memory of the probe's protocols on features of the size of ImageNet-1k.

    python -m benchmarks.probe_memory --folder=DIR

Features of one random block of images, repeated, are written to DIR as the probe stores them, and deleted at the end.
Each part of the protocols runs for some steps; what it holds in memory does not grow with their number. Reported is the
largest memory that the process has for itself (RssAnon), in which pages of mapped files are not counted: the system
gives those away when another process asks for memory.
"""

import argparse
import dataclasses
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np

from beitv2_jax.evaluation.features import Features, ProbeSettings
from beitv2_jax.evaluation.knn import knn_accuracies
from beitv2_jax.evaluation.logistic import PIECE_ROWS, LogisticRegression
from beitv2_jax.evaluation.protocols import beit, dinov3, ours
from beitv2_jax.evaluation.saved import Saved, SavedParts

NAMES = ("cls", "mean")
BLOCK_ROWS = 4096


def main(argv: list[str] | None = None) -> int:
    """Write the features, run the parts and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe_memory", description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", required=True, help="where the features are written, on a disk with space for them")
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300, help="of the linear heads, in batches of 1024")
    parser.add_argument("--queries", type=int, default=300, help="of the nearest neighbours; `ours` holds out as many")
    flags = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        shape = (flags.images, flags.layers, flags.width)
        print(f"features {shape} x {len(NAMES)}, float32: {4e-9 * len(NAMES) * np.prod(shape):.1f} GB")
        train = _features(Path(folder), shape, flags.classes)
        arrays = {name: array[: flags.queries] for name, array in train.arrays.items()}
        test = Features(arrays, train.labels[: flags.queries], train.layers, train.num_classes)
        print(f"{'before':48} {_anonymous_memory() / 1e9:6.2f} GB")
        for title, run in _parts(train, test, flags.steps).items():
            started = time.monotonic()
            with _peak() as peak:
                run()
            print(f"{title:48} {peak[0] / 1e9:6.2f} GB {time.monotonic() - started:7.0f} s", flush=True)
    return 0


def _features(folder: Path, shape: tuple[int, ...], num_classes: int) -> Features:
    rng, arrays = np.random.default_rng(0), {}
    block = rng.normal(size=(BLOCK_ROWS, *shape[1:])).astype(np.float32)
    for name in NAMES:
        array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, shape)
        for start in range(0, shape[0], BLOCK_ROWS):
            array[start : start + BLOCK_ROWS] = block[: shape[0] - start]
        array.flush()
        arrays[name] = arrays[f"{name}_normed"] = np.load(folder / f"{name}.npy", mmap_mode="r")
    return Features(arrays, rng.integers(0, num_classes, shape[0]), tuple(range(1, shape[1] + 1)), num_classes)


def _parts(train: Features, test: Features, num_steps: int) -> dict[str, Callable]:
    settings = ProbeSettings(num_steps, 1024, (1e-3, 4e-3, 1.6e-2), 1e-4, 20, 0.07, 0.1, seed=0)

    def knn():
        tensors = (train.last("cls"), train.labels, test.last("cls"), test.labels)
        options = {"neighbors": dinov3.NEIGHBORS, "temperature": dinov3.TEMPERATURE, "on_move": _ignore}
        knn_accuracies(*tensors, num_classes=train.num_classes, **options)

    def logistic():
        # one step over eight pieces: those of a whole training set are as large, and there are more of them
        rows = np.random.default_rng(1).choice(len(train.labels), min(8 * PIECE_ROWS, len(train.labels)), replace=False)
        options = {"max_steps": 1, "tolerance": dinov3.TOLERANCE, "on_move": _ignore}
        LogisticRegression(train.last("cls"), train.labels, rows, **options).fit(1.0)

    def neighbors_of_held_out():
        fraction = len(test.labels) / len(train.labels)
        few = dataclasses.replace(settings, validation_fraction=fraction)
        ours.neighbor_accuracies("mean", train, test, few, _ignore, Saved())

    return {
        "kNN": knn,
        f"sweep of {len(dinov3.RATES)} linear heads (dinov3)": lambda: dinov3.sgd_accuracies(
            train, test, settings, _ignore, Saved()
        ),
        f"linear heads of {len(train.layers)} blocks (beit)": lambda: beit.evaluate(
            train, test, settings, _ignore, SavedParts()
        ),
        "logistic regression, one step": logistic,
        "standardised, linear heads of 3 rates (ours)": lambda: ours.linear_accuracies(
            "mean", train, test, settings, _ignore, Saved()
        ),
        "standardised, kNN also of held-out images (ours)": neighbors_of_held_out,
    }


def _ignore(phase: str) -> None:
    pass


def _anonymous_memory() -> int:
    """Return the bytes that this process has for itself."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@contextmanager
def _peak() -> Iterator[list[int]]:
    """Yield a list whose only entry grows to the largest memory seen until the end."""
    found, ended = [_anonymous_memory()], threading.Event()

    def watch():
        while not ended.wait(0.02):
            found[0] = max(found[0], _anonymous_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    sys.exit(main())
