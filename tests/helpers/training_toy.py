"""A task small enough to train in a test: a perceptron, and a running state in place of a codebook.

Run as a program it trains in a fresh process: `python training_toy.py WORKDIR JSON`, where JSON overrides `config()`;
or in several at once, each in WORKDIR/<name>, where JSON is {"each": {name: JSON}}.
"""

import contextlib
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from forks import forked
from ml_collections import ConfigDict

from beitv2_jax.data.pipeline import train_iterator
from beitv2_jax.tasks.api import LossParts, Task

NUM_EXAMPLES, WIDTH, HIDDEN, CLASSES = 61, 12, 20, 7


def waves(key, shape, dtype):
    phase = jax.random.key_data(key)[0].astype(dtype) / 2.0**32
    return 0.3 * jnp.sin(7.0 * phase + jnp.arange(shape[0] * shape[1], dtype=dtype).reshape(shape) ** 1.5)


class Mlp(nn.Module):
    """Kernels with the names that the partition rules split; no axis divides `odd`. Starts at waves: compiles fast."""

    @nn.compact
    def __call__(self, tokens):
        tokens = nn.gelu(nn.Dense(HIDDEN, kernel_init=waves, name="fc1")(tokens))
        tokens = nn.with_logical_constraint(tokens[:, None], ("batch", "length", "width"))[:, 0]
        tokens = nn.Dense(WIDTH, kernel_init=waves, name="fc2")(tokens)
        return nn.Dense(CLASSES, kernel_init=waves, name="odd")(tokens)


class Source:
    name, split = "toy", "train"

    def __len__(self):
        return NUM_EXAMPLES

    def __getitem__(self, index):
        rng = np.random.default_rng(int(index))
        return {
            "images": rng.normal(size=WIDTH).astype(np.float32),
            "labels": np.int32(index % CLASSES),
            "example_ids": np.int64(index),
            "weight": np.float32(1),
            "faults": np.str_(""),
        }


class Interrupted:
    """Send the process `signals`, or raise, when batch `at` is drawn: the harshest moments a run can end at. Or hang.

    `limits` is {batch: how many bytes a file may have from then on}; `locked` the batches between which nothing of the
    workdir may be written. Both begin and end when no save is under way.
    """

    def __init__(self, inner, at, signals, pause, hang_at, limits, locked):
        self._inner, self._at, self._signals, self._pause = inner, at, signals, pause
        self._hang_at, self._limits, self._locked = hang_at, limits, locked

    def __next__(self):
        time.sleep(self._pause if self._inner.get_state()["next_batch"] != self._hang_at else 1000)
        batch = self._inner.get_state()["next_batch"]
        size = self._limits.get(str(batch))
        if size is not None or batch in self._locked:
            begins = batch in self._locked[:1] or (size is not None and size >= 0)
            await_saves(Path(sys.argv[1]), 60 if begins else 3)
        if size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        if batch in self._locked:
            lock(sys.argv[1], batch == self._locked[0])
        if batch == self._at:
            if not self._signals:
                raise KeyboardInterrupt
            for number in self._signals:
                os.kill(os.getpid(), number)
        return next(self._inner)

    def get_state(self):
        return self._inner.get_state()

    def set_state(self, state):
        self._inner.set_state(state)

    def close(self):
        self._inner.close()


def await_saves(workdir, seconds):
    """Wait until no save is under way, but no longer than `seconds`: a failed one is cleared away between batches."""
    until = time.monotonic() + seconds
    with contextlib.suppress(PermissionError):
        while any(workdir.glob("checkpoints/*tmp*")) and time.monotonic() < until:
            time.sleep(0.01)


def lock(folder, on):
    """Take the right to write from all in `folder`, or give it back; root, who always has it, becomes another user."""
    if os.getuid() == 0:
        os.seteuid(65534 if on else 0)
    else:
        for path in (folder, *Path(folder).rglob("*")):
            os.chmod(path, 0o500 if on else 0o700)


def batches(batch_size, seed, process_index=0, process_count=1, unreadable=()):
    def transform(example, epoch):
        if example["example_ids"] not in unreadable:
            return example
        fault = f"toy {example['example_ids']}: it is corrupt"
        return {**example, "weight": np.float32(0), "faults": np.str_(fault)}

    processes = {"process_index": process_index, "process_count": process_count}
    return train_iterator(Source(), transform, batch_size=batch_size, seed=seed, num_threads=2, **processes)


class Split:
    """A data set of which only the name of the split and the length matter."""

    def __init__(self, split, length):
        self.split, self._length = split, length

    def __len__(self):
        return self._length


def make_task(
    *,
    batch_size=8,
    seed=3,
    stop_at=-1,
    signals=(),
    pause=0.0,
    hang_at=-1,
    limits=None,
    locked=(),
    nan_steps=(),
    spike_steps=(),
    unreadable=(),
    on_trace=lambda: None,
    evaluation=True,
    codebook_starts=(0,),
    start_batches=1,
):
    model = Mlp()

    def init(key):
        params = model.init(key, jnp.zeros((1, WIDTH)))["params"]
        return {
            "params": params,
            "model_state": {"quantizer": {"codebook": jnp.zeros((5, WIDTH)), "seen": jnp.zeros(())}},
        }

    def loss(params, codebook, frozen, batch, key, step):
        on_trace()
        images = batch["images"] * frozen["scale"] + 0.3 * jax.random.uniform(key)
        logits = model.apply({"params": params}, images)
        targets = jax.nn.one_hot(batch["labels"], CLASSES)
        value = -jnp.sum(targets * jax.nn.log_softmax(logits))
        if spike_steps:
            value = value * jnp.where(jnp.isin(step, jnp.array(spike_steps)), 20.0, 1.0)
        if nan_steps:
            value = value * jnp.where(jnp.isin(step, jnp.array(nan_steps)), jnp.nan, 1.0)
        statistics = {"images": batch["images"][:5], "ids": batch["example_ids"].sum()}
        return value, LossParts(jnp.float32(len(images)), {}, statistics)

    def finish(codebook, statistics, step):
        state = codebook["quantizer"]
        new = {"codebook": 0.9 * state["codebook"] + 0.1 * statistics["images"], "seen": state["seen"] + 1.0}
        return {"quantizer": new}, {"ids": statistics["ids"]}

    def evaluate(params, codebook, frozen, batch):
        logits = model.apply({"params": params}, batch["images"] * frozen["scale"])
        right = (jnp.argmax(logits, axis=-1) == batch["labels"]) * batch["weight"]
        return {"right": right.sum(), "examples": batch["weight"].sum()}

    def eval_batches(process_index, process_count):
        rows = [Source()[i] for i in range(13)]
        rows += [dict(rows[0]) for _ in range(3)]
        rows[5]["faults"] = np.str_("toy 5: it was corrupt in the evaluation") if unreadable else np.str_("")
        weight = np.array([1.0] * 13 + [0.0] * 3, np.float32)
        weight[5] = not unreadable
        for start in (0, 8):
            batch = {key: np.stack([row[key] for row in rows[start : start + 8]]) for key in rows[0]}
            yield {**batch, "weight": weight[start : start + 8]}

    return Task(
        name="toy",
        sources=(Split("train", NUM_EXAMPLES), Split("validation", 13)),
        init=init,
        loss=loss,
        finish=finish,
        train_batches=lambda index, count: Interrupted(
            batches(batch_size, seed, index, count, unreadable), stop_at, signals, pause, hang_at, limits or {}, locked
        ),
        no_decay=lambda path: path.endswith("bias"),
        layer_of=lambda path: {"fc1": 0, "fc2": 1, "odd": None}[path.split("/")[0]],
        num_layers=1,
        frozen={"scale": np.float32(1.5)},
        eval_batches=eval_batches if evaluation else None,
        evaluate=evaluate,
        summarize=lambda sums: {"accuracy": sums["right"] / sums["examples"]},
        start_codebook=lambda params, codebook, frozen, batches, key: {
            "quantizer": {
                **codebook["quantizer"],
                "codebook": batches["images"][:, :5].mean(axis=0) + jax.random.uniform(key),
            }
        },
        codebook_starts=codebook_starts,
        start_batches=start_batches,
    )


def config(**overrides):
    values = ConfigDict(
        {
            "seed": 3,
            "data": {"num_threads": 2, "num_workers": 0, "max_bad_fraction": 0.1},
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "efficiency": {"accumulation_steps": 1},
            "optim": {
                "peak_lr": 0.05,
                "min_lr": 1e-3,
                "warmup": "3 steps",
                "betas": (0.9, 0.98),
                "eps": 1e-8,
                "weight_decay": 0.1,
                "weight_decay_end": 0.2,
                "clip_norm": 1.0,
                "spike_factor": 0.0,
                "layer_decay": 0.75,
                "weight_average": 0.9,
            },
            "run": {
                "batch_size": 8,
                "duration": "19 steps",
                "log_every": "1 steps",
                "checkpoint_every": "5 steps",
                "keep_every": "0 steps",
                "eval_every": "7 steps",
                "max_nonfinite_steps": 3,
                "on_failed_save": "continue",
                "hang_timeout": 600,
                "keep_best": "",
                "wandb": "",
            },
        }
    )
    values.update_from_flattened_dict(overrides)
    return values


def mesh_of(data, fsdp, tensor):
    return {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}


def run(workdir, options):
    """Train as the program does, and end the process."""
    from absl import flags

    from beitv2_jax.errors import Preempted
    from beitv2_jax.runtime.launch import leave
    from beitv2_jax.training.loop import train

    flags.FLAGS(["training_toy"])
    sys.argv[1] = workdir
    if "place" in options:
        jax.distributed.initialize(**options["place"])
    try:
        train(make_task(**options.get("task", {})), config(**options.get("config", {})), workdir)
    except Preempted as preempted:
        print(preempted)
        leave(Preempted.EXIT_CODE)
    except Exception:
        traceback.print_exc()
        leave(1)


def run_each(folder, plans):
    """Train in one process for each plan, with its `environment`; print {name: (exit status, what it printed)}."""
    import beitv2_jax.main
    import beitv2_jax.training.loop  # noqa: F401

    processes = {}
    for name, plan in plans.items():
        os.environ.update(plan.pop("environment", {}))
        # a pipe, as files have their limits here
        reading, writing = os.pipe()
        workdir = str(Path(folder, plan.pop("workdir", name)))
        with open(writing, "w") as output:
            processes[name] = forked(run, workdir, plan, output=output), reading
    ended = {}
    for name, (process, reading) in processes.items():
        with open(reading, errors="replace") as output:
            text = output.read()
        ended[name] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), text
    print(json.dumps(ended))


if __name__ == "__main__":
    options = json.loads(sys.argv[2])
    if "each" in options:
        run_each(sys.argv[1], options["each"])
    else:
        run(sys.argv[1], options)
