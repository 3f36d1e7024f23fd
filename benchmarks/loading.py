"""The mim stage with real JPEGs: its input alone, and the loop with the share of time that waits for data.

Sizes are those of a config, the code ids come from memory as from a target cache. Without a folder of JPEGs some are
made, of the size and the bytes of ImageNet's. Needs everything that reads data; `benchmarks.input` does the measuring.
"""

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from beitv2_jax.data.target_cache.encoding import CodeEncoding
from beitv2_jax.planning.abstract_task import ZeroTargets
from beitv2_jax.tasks import inputs, mim
from beitv2_jax.training import loop
from benchmarks import input as benchmark
from benchmarks.timing import Effort

NUM_IMAGES = {True: 64, False: 1024}
STEPS = {True: 6, False: 30}
PACES = (0.5, 0.8, 0.9)
"""Rates of a step over that of the input alone at which the loop is tried."""
WIDTH, HEIGHT, QUALITY = 500, 375, 90
GRAIN = 16.0
"""Standard deviation of the noise on the made pictures, in levels: with it a file has about 100 kB, as in ImageNet."""


def input_alone(config: ConfigDict, *, effort: Effort, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return how many images a second the pipeline prepares, by the clock and by processor time."""
    with _task(config, options) as (task, config, source):
        rate, core_rate = benchmark.input_alone(task, config, STEPS[options["quick"]])
    return {**source, "input_images_per_second": rate, "images_per_second_per_core": core_rate}


def whole_loop(config: ConfigDict, *, effort: Effort, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rates of input, step and loop, the share of waiting and the cores that keep the step busy."""
    with _task(config, options) as (task, config, source):
        return {**source, **benchmark.measure(config, task, STEPS[options["quick"]])}


def paced_loop(config: ConfigDict, *, effort: Effort, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the share of waiting with a step that computes nothing and lasts a set time, as if on a device elsewhere.

    So it is seen on any machine whether the loop keeps a device busy that asks for less than the cores can prepare.
    """
    steps = 4 * STEPS[options["quick"]]
    with _task(config, options) as (task, config, source):
        rate, core_rate = benchmark.input_alone(task, config, steps)
        found = []
        for pace in PACES:
            seconds = config.run.batch_size / (pace * rate)
            with mock.patch.object(loop, "compile_step", lambda *_, seconds=seconds: PacedStep(seconds)):
                loop_rate, share = benchmark.whole_loop(task, config, steps)
            found.append({"step_over_input": pace, "loop_images_per_second": loop_rate, "data_wait_share": share})
    rates = {"input_images_per_second": rate, "images_per_second_per_core": core_rate}
    return {**source, **rates, "paces": found}


class PacedStep:
    """A compiled step that returns the state as it is; its metrics are there `seconds` after the former step's."""

    def __init__(self, seconds: float):
        self._seconds, self._free = seconds, 0.0

    def __call__(self, state, frozen, batch):
        self._free = max(self._free, time.monotonic()) + self._seconds
        names = "loss", "grad_norm", "nonfinite_steps", "unreadable"
        return state, {name: _Zero(self._free) for name in names}


@dataclasses.dataclass(frozen=True)
class _Zero:
    there: float

    def block_until_ready(self):
        time.sleep(max(0.0, self.there - time.monotonic()))

    def __array__(self, dtype=None, copy=None):
        self.block_until_ready()
        return np.zeros((), dtype)


@contextlib.contextmanager
def _task(config: ConfigDict, options: Mapping[str, Any]) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
    with contextlib.ExitStack() as stack:
        folder = options["images"]
        source = {"images": "given", "threads": os.cpu_count()}
        if not folder:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            kilobytes = make_images(Path(folder), NUM_IMAGES[options["quick"]]) / 1000
            source["images"] = f"{NUM_IMAGES[options['quick']]} made, {WIDTH} x {HEIGHT}, {kilobytes:.0f} kB each"
        config = stage_config(config, folder)
        yield mim.make_task(config, opened(config)), config, source


def stage_config(config: ConfigDict, folder: str):
    """Return a mim config that reads the JPEGs of a folder, for training and evaluation alike."""
    config = config.copy_and_resolve_references().unlock()
    del config.device, config.torch
    config.views.num_views = 1
    config.mesh.data = 1  # as the steps are measured
    config.data.update(source=f"folder:{folder}", num_threads=os.cpu_count())
    return config.lock()


def opened(config) -> inputs.Opened:
    """Open the JPEGs with code ids of zero."""
    sources = inputs.open_sources(config)
    patches = (config.views.image_size // config.model.patch_size) ** 2
    manifest = {"codebook_size": config.model.codebook_size}
    encoding = CodeEncoding(config.model.codebook_size, patches)
    return inputs.Opened(sources, stored=tuple(ZeroTargets(encoding, len(source), 1, manifest) for source in sources))


def make_images(folder: Path, count: int) -> float:
    """Write JPEGs of smooth noise with grain, in classes of two splits; return their mean bytes."""
    rng, sizes = np.random.default_rng(0), []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
        pixels = np.clip(smooth + rng.normal(0, GRAIN, smooth.shape), 0, 255).astype(np.uint8)
        split = "validation" if number % 8 == 0 else "train"
        path = folder / split / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=QUALITY)
        sizes.append(path.stat().st_size)
    return float(np.mean(sizes))
