"""Kill a real run again and again, at moments drawn from a seed, and compare what it leaves with an undisturbed one.

`stages_killed_test.py` runs it with 20 kills; longer, and with metrics on the terminal:

    python tests/helpers/stages_killed.py /tmp/killed --kills=60

The run is VQ-KD with a live teacher, codebook by moving averages, averaged weights and two devices, through `main`. An
attempt is a process of its own, forked from this one, which has imported everything and started nothing of jax. Two
runs are killed at a time; one that reaches its end before its kills are used up is followed by another one.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

from xla_flags import xla_flags

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = xla_flags(2)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import numpy as np
import orbax.checkpoint as ocp
from forks import forked
from paths import ROOT
from safetensors.numpy import save_file

from beitv2_jax import config as config_lib
from beitv2_jax import main
from beitv2_jax.convert.runs import weights_hash
from beitv2_jax.runners import stages
from beitv2_jax.tasks import vqkd
from beitv2_jax.training.writer import read_metrics

STEPS, SAVE_EVERY, EVALUATE_EVERY = 31, 3, 7
WIDTH, HEADS, MLP, PATCH, IMAGE = 16, 2, 19, 16, 32
TIMING = ("images_per_second", "data_wait_share")
KINDS = ("save", "save", "save", "metrics", "anywhere", "save", "save", "save", "evaluation", "anywhere")
"""What the parent waits for before it kills, in this order again and again; the rest is drawn."""
POLL_SECONDS = 0.002


def write_teacher(path: Path) -> None:
    """Write a small ViT of random weights, in the layout of timm."""
    rng = np.random.default_rng(0)
    shapes = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, 1 + (IMAGE // PATCH) ** 2, WIDTH)}
    shapes |= {"patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,)}
    linear = {
        "attn.qkv": (3 * WIDTH, WIDTH),
        "attn.proj": (WIDTH, WIDTH),
        "mlp.fc1": (MLP, WIDTH),
        "mlp.fc2": (WIDTH, MLP),
    }
    for name, shape in linear.items():
        shapes |= {f"blocks.0.{name}.weight": shape, f"blocks.0.{name}.bias": shape[:1]}
    for name in ("blocks.0.norm1", "blocks.0.norm2", "norm"):
        shapes |= {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
    save_file({name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}, path)


def arguments(folder: Path, workdir: Path) -> list[str]:
    """Return the command line of the run in `workdir`."""
    vit = {"width": WIDTH, "num_heads": HEADS, "mlp_dim": MLP}
    keys = {f"model.{part}.{key}": value for part in ("encoder", "decoder") for key, value in vit.items()}
    keys |= {"model.encoder.depth": 1, "model.codebook_size": 13, "model.code_dim": 7, "views.image_size": IMAGE}
    keys |= {"teacher.weights": folder / "teacher.safetensors", "teacher.normalization": "half"}
    keys |= {"teacher.num_heads": HEADS, "optim.weight_average": 0.9, "optim.spike_factor": 50.0, "mesh.fsdp": 2}
    keys |= {"run.duration": f"{STEPS} steps", "run.checkpoint_every": f"{SAVE_EVERY} steps"}
    keys |= {"run.eval_every": f"{EVALUATE_EVERY} steps", "run.keep_every": "0 steps"}
    flags = [f"--config={ROOT}/configs/vqkd.py:smoke", *(f"--config.{key}={value}" for key, value in keys.items())]
    return [*flags, f"--workdir={workdir}", f"--compilation_cache={folder / 'cache'}"]


def started(folder: Path, function, *args) -> int:
    """Start a process that adds what it prints to `folder`/output."""
    with open(folder / "output", "a") as output:
        return forked(function, *args, output=output)


def attempt(folder: Path, workdir: Path) -> None:
    """Be the program that trains."""
    sys.argv = ["beitv2_jax", *arguments(folder, workdir)]
    main.main()


class Watched:
    """What the parent sees of a run: its unfinished saves and the length of its metrics."""

    def __init__(self, workdir: Path, process: int):
        self._checkpoints, self._metrics, self._process = workdir / "checkpoints", workdir / "metrics.jsonl", process
        self.code: int | None = None
        self.former = self.unfinished()

    def ended(self) -> bool:
        if self.code is None:
            process, status = os.waitpid(self._process, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if process else None
        return self.code is not None

    def unfinished(self) -> set[int]:
        """Return the inodes of the folders that are not renamed yet."""
        try:
            return {entry.inode() for entry in os.scandir(self._checkpoints) if ocp.utils.TMP_DIR_SUFFIX in entry.name}
        except FileNotFoundError:
            return set()

    def size(self) -> int:
        return self._metrics.stat().st_size if self._metrics.exists() else 0

    def wait(self, happened) -> bool:
        """Wait until `happened()`, False if the process ends before that."""
        while not happened():
            if self.ended():
                return False
            time.sleep(POLL_SECONDS)
        return True

    def kill(self) -> None:
        os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)


def await_moment(watched: Watched, workdir: Path, kind: str, rng, save_seconds: float, run_seconds: float) -> bool:
    """Wait for a moment of `kind`; False if the run ended by itself before it."""
    if kind == "anywhere":
        until = time.monotonic() + rng.uniform(0, run_seconds)
        return watched.wait(lambda: time.monotonic() > until)
    if kind == "save":
        for _ in range(rng.integers(1, 3)):
            before = watched.unfinished() | watched.former
            if not watched.wait(lambda before=before: watched.unfinished() - before):
                return False
        delay = rng.uniform(0, save_seconds)
    elif kind == "evaluation":  # the step's own line comes before it
        due = set(range(EVALUATE_EVERY, STEPS, EVALUATE_EVERY))
        done = {line["step"] for line in read_metrics(workdir)}
        if not watched.wait(lambda: (due - done) & {line["step"] for line in read_metrics(workdir)}):
            return False
        delay = rng.uniform(0, 0.1)
    else:
        for _ in range(rng.integers(1, 7)):
            before = watched.size()
            if not watched.wait(lambda before=before: watched.size() != before):
                return False
        delay = rng.uniform(0, 0.001)
    time.sleep(delay)
    return not watched.ended()


def undisturbed(folder: Path, workdir: Path) -> tuple[float, float]:
    """Run without a kill; return how long a save takes, and the run."""
    beginning = time.monotonic()
    watched, seconds = Watched(workdir, started(folder, attempt, folder, workdir)), []
    while watched.wait(watched.unfinished):
        begun = time.monotonic()
        watched.wait(lambda: not watched.unfinished())
        seconds.append(time.monotonic() - begun)
    assert watched.code == 0, (folder / "output").read_text()
    return statistics.median(seconds), time.monotonic() - beginning


def tear(workdir: Path) -> bool:
    """Change a byte of the newest checkpoint, where there is an older one."""
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal())
    if len(steps) < 2:
        return False
    files = [path for path in (workdir / "checkpoints" / str(steps[-1]) / "train").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    return True


def outcome(folder: Path, workdir: Path) -> dict:
    """Return what a finished run left, arrays by their checksum."""
    checkpoints = workdir / "checkpoints"
    steps = sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal())
    newest = checkpoints / str(steps[-1])
    handler = ocp.PyTreeCheckpointHandler()
    arrays = {
        name: weights_hash(handler.restore(newest / name))
        for name in ("params", "model_state", "averaged_params", "train")
    }
    handler.close()
    position = json.loads((newest / "data" / "metadata").read_text())
    iterator = vqkd.build(config_lib.from_json((workdir / "config.json").read_text())).train_batches(0, 1)
    iterator.set_state(position)
    ids = next(iterator)["example_ids"].tolist()
    iterator.close()
    metrics = [{key: value for key, value in line.items() if key not in TIMING} for line in read_metrics(workdir)]
    final = {
        key: value
        for key, value in stages.read_summary(str(workdir))["metrics"].items()
        if key not in (*TIMING, "seconds")
    }
    return {"steps": steps, **arrays, "position": position, "next ids": ids, "metrics": metrics, "summary": final}


def outcomes(folder: Path, workdirs: list[Path]) -> None:
    """Write the outcomes of `workdirs` to a file."""
    found = {workdir.name: outcome(folder, workdir) for workdir in workdirs}
    (folder / "outcomes.json").write_text(json.dumps(found))


def lane(folder: Path, name: str, kills: int, seed: list[int], tear_every: int, times: tuple[float, float]) -> None:
    """Kill runs in `folder`, let the last one come to its end; write counts and workdirs to a file."""
    rng = np.random.default_rng(seed)
    counts = {"kills": 0, "aimed at a save": 0, "in a save": 0, "corrupt": 0}
    workdirs, tear_next, (save_seconds, run_seconds) = [folder / f"{name}-1"], tear_every, times
    while True:
        workdir, left = workdirs[-1], counts["kills"] < kills
        kind = KINDS[counts["kills"] % len(KINDS)]
        begun = time.monotonic()
        watched = Watched(workdir, started(folder, attempt, folder, workdir))
        if left and await_moment(watched, workdir, kind, rng, save_seconds, run_seconds):
            watched.kill()
            counts["kills"] += 1
            counts["aimed at a save"] += kind == "save"
            counts["in a save"] += bool(watched.unfinished() - watched.former)
            if kind != "anywhere":
                run_seconds = time.monotonic() - begun
            if counts["kills"] >= tear_next and tear(workdir):
                counts["corrupt"] += 1
                tear_next = counts["kills"] + tear_every
            continue
        watched.wait(watched.ended)
        assert watched.code == 0, (folder / "output").read_text()
        if not left:
            break
        workdirs.append(folder / f"{name}-{len(workdirs) + 1}")
    (folder / f"{name}.json").write_text(json.dumps([counts, [str(workdir) for workdir in workdirs]]))


def killed(folder: Path, kills: int, seed: int, tear_every: int) -> dict:
    """Kill runs in two lanes at a time; return counts, times and the outcomes of all runs."""
    beginning = time.monotonic()
    folder.mkdir(parents=True)
    write_teacher(folder / "teacher.safetensors")
    save_seconds, cold_seconds = undisturbed(folder, folder / "undisturbed")
    shares, times = {"a": kills // 2, "b": kills - kills // 2}, (save_seconds, 0.3 * cold_seconds)
    tasks = [(name, share, [seed, number], tear_every, times) for number, (name, share) in enumerate(shares.items())]
    for process in [started(folder, lane, folder, *task) for task in tasks]:
        _, status = os.waitpid(process, 0)
        assert status == 0, (folder / "output").read_text()
    counts, workdirs = Counter(), [folder / "undisturbed"]
    for name in shares:
        of_lane, its_workdirs = json.loads((folder / f"{name}.json").read_text())
        counts.update(of_lane)
        workdirs += map(Path, its_workdirs)
    os.waitpid(started(folder, outcomes, folder, workdirs), 0)
    found = json.loads((folder / "outcomes.json").read_text())
    quarantined = len([path for workdir in workdirs for path in (workdir / "checkpoints").glob("*.corrupt*")])
    seconds = {"save seconds": save_seconds, "seconds": time.monotonic() - beginning}
    return {**counts, "quarantined": quarantined, **seconds, "seed": seed, "outcomes": found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="is made")
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--tear-every", type=int, default=4, help="kills of a lane after which a byte changes")
    given = parser.parse_args()
    seed = int.from_bytes(os.urandom(3)) if given.seed is None else given.seed
    report = killed(given.folder, given.kills, seed, given.tear_every)
    (given.folder / "report.json").write_text(json.dumps(report))
    found = report.pop("outcomes")
    differ = [name for name, outcome in found.items() if outcome != found["undisturbed"]]
    print(json.dumps({**report, "runs": len(found) - 1, "differ": differ}))
    sys.exit(1 if differ else 0)
