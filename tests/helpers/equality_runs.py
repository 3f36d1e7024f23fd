"""Every stage, small enough to be run on many meshes: published recipes, real tasks, the real loop, 12 steps each.

Each run starts with `stages.run_stage`. Its task is the stage's own with two metrics added to each step: `rows`, a sum
of hashes of each example id with its pixels, and `codes`, one of each (example id, patch, code id). They are whole
numbers, equal where all ids are. Run as a program it makes the runs of a JSON list of jobs, as one process or as one of
several.
"""

import collections
import contextlib
import dataclasses
import json
import pathlib
import re
import signal
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn
from paths import CONFIGS
from PIL import Image

from beitv2_jax import config as config_lib
from beitv2_jax.errors import Preempted
from beitv2_jax.models.quantizer import Quantizer
from beitv2_jax.runners import stages
from beitv2_jax.training import loop
from beitv2_jax.training.writer import read_metrics

STEPS, BATCH, CLASSES, CODES = 12, 16, 3, 22
VIT = {"patch_size": 8, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24}
TIMING = ("images_per_second", "data_wait_share")
CHANGES = {
    "finetune": {"model": {**VIT, "num_classes": CLASSES}, "evaluation": {"crop_fraction": 0.95}},
    "vqkd": {
        "model": {
            "encoder": {**VIT, "depth": 1},
            "decoder": {"width": 20, "depth": 1, "num_heads": 2, "mlp_dim": 28},
            "codebook_size": CODES,
            "code_dim": 6,
        },
        "usage_window": "3 steps",
    },
    "mim": {
        "model": {**VIT, "codebook_size": CODES, "early_layer": 1, "head_depth": 1},
        "masking": {"num_masked": 6, "min_patches": 2},
    },
    "segment": {
        "model": {**VIT, "num_classes": CLASSES, "out_layers": (1, 1, 2, 2), "channels": 6, "aux_channels": 4},
        "views": {"long_side": 64, "short_side": 48},
        "evaluation": {"long_side": 48, "short_side": 40, "stride": 24},
    },
    "extract": {"teacher": {"tokenizer_patch_size": 8}, "output": {"shard_examples": 11}},
    "tokenize": {"output": {"shard_examples": 11}},
}
TRAINED = tuple(stage for stage in CHANGES if stage not in stages.TARGET_CACHE_STAGES)
INPUTS = {
    "vqkd": ("teacher", "weights", "finetune"),
    "mim": ("tokenizer", "run", "vqkd"),
    "extract": ("teacher", "weights", "finetune"),
    "tokenize": ("tokenizer", "run", "vqkd"),
}
"""Stage -> section and key that name the run it builds on, and the stage of that run."""


BOUNDS = {"metrics": 2e-6, "arrays": 8e-6}
"""Three to six times the largest differences seen, a few units in the last place (6e-8) of the largest values: of a
figure at any step as a share of its largest value in the run, of a number as a share of the largest in its array."""
SEGMENT_BOUNDS = {"metrics": 1e-5, "arrays": 3e-5}
"""The same for the segment stage, where a number is compared with the largest of all arrays of its kind (parameters,
first moments, ...): biases that batch norm takes out again have a gradient of rounding alone, of which Adam makes whole
steps, and where two neighbours under a maximum hardly differ, rounding decides which of them gets the gradient."""
NEARLY_TIED = {"decode_accuracy": 2e-3, "auxiliary_accuracy": 2e-3}
"""Largest differences of shares of pixels; a new head gives two classes of many pixels nearly the same logit."""


def draw_images(folder: pathlib.Path) -> None:
    """Write small smooth pictures of two splits, in class folders and again with label maps; one file is cut off."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 18), ("validation", 7)):
        for part in ("images", "annotations"):
            (folder / "maps" / part / split).mkdir(parents=True)
        for number in range(CLASSES * count):
            label, size = number % CLASSES, (int(rng.integers(34, 52)), 41)
            low = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
            picture = Image.fromarray(low).resize(size, Image.Resampling.BICUBIC)
            (folder / "classes" / split / str(label)).mkdir(parents=True, exist_ok=True)
            picture.save(folder / "classes" / split / str(label) / f"{number:02d}.jpg", quality=95)
            picture.save(folder / "maps" / "images" / split / f"{number:02d}.jpg", quality=95)
            numbers = Image.fromarray((low[..., 0] % (CLASSES + 1)).astype(np.uint8))  # 0 is no class
            numbers.resize(size, Image.Resampling.NEAREST).save(
                folder / "maps" / "annotations" / split / f"{number:02d}.png"
            )
    for corrupt in ("classes/train/1/10.jpg", "maps/images/train/05.jpg"):
        (folder / corrupt).write_bytes((folder / corrupt).read_bytes()[:300])


def stage_config(stage: str, root: pathlib.Path, mesh: tuple[int, int, int], **sections):
    """Return the published recipe of a stage in the sizes of this module, on the pictures and former runs in `root`."""
    config = config_lib.load(f"{CONFIGS / stage}.py")
    source = root / ("maps" if stage == "segment" else "classes")
    config.data.update(source=f"folder:{source}", num_threads=2, max_bad_fraction=0.1)
    config.views.image_size = 32
    config.efficiency.dtype = "float32"
    config.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))
    config.run.batch_size = BATCH
    if stage in INPUTS:
        section, key, former = INPUTS[stage]
        config[section][key] = str(root / former)
    if stage in stages.TARGET_CACHE_STAGES:
        config.views.num_views = 2
    else:
        config.optim.update(weight_average=0.9, warmup="3 steps")
        config.run.update(duration=f"{STEPS} steps", log_every="1 step", eval_every=f"{STEPS} steps")
        config.run.update(checkpoint_every="0 steps", keep_every="0 steps")
    for changes in (CHANGES[stage], sections):
        config.update(changes)
    return config


def hashed(*numbers):
    """Return the sum, modulo 2^32, of one hash for each element of whole numbers that broadcast."""
    value = jnp.uint32(2166136261)
    for number in numbers:
        value = (value ^ jnp.asarray(number).astype(jnp.uint32)) * jnp.uint32(16777619)
        value = value ^ (value >> 15)
    return value.sum(dtype=jnp.uint32)


def observed(task, *, evaluates: bool, stop_after: int | None):
    """Return the task with `rows` and `codes` among its metrics."""

    def loss(params, codebook, frozen, batch, key, step):
        chosen = []

        def note(call, args, kwargs, context):
            output = call(*args, **kwargs)
            if isinstance(context.module, Quantizer) and context.method_name in ("__call__", "code_ids"):
                chosen.append(output.code_ids if context.method_name == "__call__" else output)
            return output

        with nn.intercept_methods(note):
            value, parts = task.loss(params, codebook, frozen, batch, key, step)
        examples = batch["example_ids"]
        sums = {"rows": hashed(examples, batch["images"].sum(axis=(1, 2, 3), dtype=jnp.uint32))}
        for code_ids in chosen:
            sums["codes"] = hashed(examples[:, None], jnp.arange(code_ids.shape[1]), code_ids)
        return value, parts._replace(statistics=(parts.statistics, sums))

    def finish(codebook, statistics, step):
        codebook, metrics = task.finish(codebook, statistics[0], step)
        return codebook, metrics | statistics[1]

    def merge(one, other):
        return task.merge(one[0], other[0]), jax.tree.map(jnp.add, one[1], other[1])

    def train_batches(process_index, process_count):
        return Stopped(task.train_batches(process_index, process_count), stop_after)

    changes = {} if stop_after is None else {"train_batches": train_batches}
    changes |= {} if evaluates else {"eval_batches": None}
    return dataclasses.replace(task, loss=loss, finish=finish, merge=merge, **changes)


class Stopped:
    """Send SIGTERM to this process when the batch of step `stop_after` is drawn: the loop does that step and ends."""

    def __init__(self, inner, stop_after):
        self._inner, self._stop_after = inner, stop_after

    def __next__(self):
        batch = next(self._inner)
        if self._inner.get_state()["next_batch"] == self._stop_after:
            signal.raise_signal(signal.SIGTERM)
        return batch

    def __getattr__(self, name):
        return getattr(self._inner, name)


def run(config, workdir, *, evaluates: bool = True, stop_after: int | None = None) -> None:
    """Run a stage to its end, or until `stop_after` steps are done and saved."""

    def train(task, config, workdir):
        return loop.train(observed(task, evaluates=evaluates, stop_after=stop_after), config, workdir)

    with contextlib.ExitStack() as stack:
        if config.stage not in stages.TARGET_CACHE_STAGES:
            stack.enter_context(mock.patch.dict(stages.RUNNERS, {config.stage: train}))
        # a gradient that jumps where an activation crosses zero would show rounding as large differences
        stack.enter_context(mock.patch.object(nn, "relu", nn.softplus))
        stack.enter_context(contextlib.suppress(Preempted))
        # a run that is not evaluated has nothing to report
        stack.enter_context(mock.patch.object(stages, "_report", lambda *arguments: None))
        stages.run_stage(config, str(workdir))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a training run leaves: the metrics of every step, and the arrays of its newest checkpoint by their path."""

    metrics: list[dict]
    arrays: dict[str, np.ndarray]

    @classmethod
    def read(cls, workdir: pathlib.Path) -> "Outcome":
        """Read metrics.jsonl as it is, and the checkpoint by Orbax alone."""
        manager = ocp.CheckpointManager(workdir / "checkpoints")
        newest = workdir / "checkpoints" / str(manager.latest_step())
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # where the devices that saved are not there
        names = [name for name in ("params", "model_state", "averaged_params", "train") if (newest / name).is_dir()]
        items = {name: ocp.args.StandardRestore(fallback_sharding=here) for name in names}
        found = manager.restore(int(newest.name), args=ocp.args.Composite(**items))
        manager.close()
        leaves = jax.tree_util.tree_leaves_with_path({name: found[name] for name in names})
        metrics = [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(workdir)]
        return cls(metrics, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves})


class Runs:
    """The runs below `root`, each made once; those on one device are named as their stage and are what others need.

    Attributes:
        compiled: run -> {name of a function: how often it was compiled during the run}.
    """

    def __init__(self, root: pathlib.Path):
        self.root, self.compiled, self._outcomes = root, {}, {}
        draw_images(root)

    def workdir(self, stage: str, mesh: tuple[int, int, int] = (1, 1, 1), *, variant: str = "", **options):
        """Return the folder of a run, made at the first call; `options` are those of `run` and sections of the config.

        Only runs on one device and on tensor > 1 evaluate.
        """
        sizes = "x".join(map(str, mesh))
        name = f"{stage}-{sizes}{variant}" if variant or sizes != "1x1x1" else stage
        if name not in self.compiled:
            if stage in INPUTS:
                self.workdir(INPUTS[stage][2])
            stop_after = options.pop("stop_after", None)
            evaluates = sizes == "1x1x1" or mesh[2] > 1
            with counted_compilations() as self.compiled[name]:
                config = stage_config(stage, self.root, mesh, **options)
                run(config, self.root / name, evaluates=evaluates, stop_after=stop_after)
        return self.root / name

    def outcome(self, *args, **kwargs) -> Outcome:
        """Return what the run in `workdir` left."""
        workdir = self.workdir(*args, **kwargs)
        if workdir not in self._outcomes:
            self._outcomes[workdir] = Outcome.read(workdir)
        return self._outcomes[workdir]


@contextlib.contextmanager
def counted_compilations():
    """Yield a count, by function name, of what is compiled inside."""
    counts = collections.Counter()

    def note(event, seconds, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            counts[details["fun_name"]] += 1

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def assert_same_run(stage: str, found: Outcome, expected: Outcome) -> None:
    """Compare two runs: lines, ids and counts are equal, metrics and arrays within the bounds of the stage."""
    bounds = SEGMENT_BOUNDS if stage == "segment" else BOUNDS
    assert [line["step"] for line in found.metrics] == [line["step"] for line in expected.metrics]
    for name in expected.metrics[0]:
        ours, theirs = ([line[name] for line in outcome.metrics] for outcome in (found, expected))
        if name in ("rows", "codes", "unreadable", "nonfinite_steps"):
            assert ours == theirs, name
        else:
            bound = NEARLY_TIED.get(name, bounds["metrics"] * np.abs(theirs).max())
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound, err_msg=name)
    for name in found.metrics[-1].keys() & expected.metrics[-1].keys() - NEARLY_TIED.keys():
        ours, theirs = found.metrics[-1][name], expected.metrics[-1][name]
        np.testing.assert_allclose(ours, theirs, rtol=bounds["metrics"], err_msg=name)
    assert found.arrays.keys() == expected.arrays.keys()
    largest = {path: np.abs(array).max() for path, array in expected.arrays.items()}
    for path, theirs in expected.arrays.items():
        ours, scale = found.arrays[path], largest[path]
        if stage == "segment":
            scale = max(value for other, value in largest.items() if kind_of(other) == kind_of(path))
        if theirs.dtype != np.float32 or "_counts" in path:
            np.testing.assert_array_equal(ours, theirs, err_msg=path)
        else:
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=bounds["arrays"] * scale, err_msg=path)


def kind_of(path: str) -> str:
    """Return the first part of a path in a checkpoint: parameters, codebook, averages, or moments of the optimizer."""
    return re.match(r"\['train'\]\['\w+'\](\[\d+\])?(\['\w+'\])?|\['\w+'\]", path)[0]


def stored(workdir: pathlib.Path) -> dict[str, bytes]:
    """Return every file of the two data sets that a target cache stage wrote."""
    files = (path for part in ("views", "centre") for path in (workdir / part).rglob("*") if path.is_file())
    return {str(path.relative_to(workdir)): path.read_bytes() for path in files}


if __name__ == "__main__":
    from absl import flags

    from beitv2_jax.runtime.launch import start_jax

    flags.FLAGS(["equality_runs"])
    start_jax(None, "")
    for job in json.loads(pathlib.Path(sys.argv[1]).read_text()):
        run(config_lib.from_json(job["config"]), job["workdir"], evaluates=job["evaluates"])
