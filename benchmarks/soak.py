"""Does a long run grow? Thousands of tiny steps through the real loop; memory, threads, handles, files against steps.

python -m benchmarks.soak [--steps=2000] [--workers=0] [--workdir=DIR]

Everything that a run does happens often: metrics of each step logged, a checkpoint every 100 steps, an evaluation every
200, pictures read by the real pipeline. The first 40 % are left out: there caches fill and programs are compiled.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from beitv2_jax.training.writer import read_metrics

FIGURES = ("MB", "threads", "handles", "shared memory files", "processes")
WARM_UP = 0.4


class Sampler:
    """Sample what this process and its worker processes hold, every `period` seconds, beside the steps of `workdir`."""

    def __init__(self, workdir: str | Path, period: float = 0.2):
        self._workdir, self._period = workdir, period
        self.samples: list[tuple[float, ...]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._period):
            if (lines := _last_step(self._workdir)) is not None:
                self.samples.append((lines, *held()))

    def growth(self) -> dict[str, dict[str, float]]:
        """Return {figure: {first, last, per_1000_steps}} after the warm-up: of 8 windows, and the slope of a line.

        Of a step it is the first sample, of a window the 10th percentile: what is held between evaluations, which start
        worker processes, end them, and may take longer than all steps of a window.
        """
        samples = np.array(self.samples)
        samples = samples[np.unique(samples[:, 0], return_index=True)[1]]
        step, last = samples[:, 0], samples[-1, 0]
        samples = samples[(step >= WARM_UP * last) & (step < last)]
        windows = np.array_split(samples, 8)
        steps = [window[:, 0].mean() for window in windows]
        growth = {}
        for place, name in enumerate(FIGURES, 1):
            held_in = [float(np.percentile(window[:, place], 10)) for window in windows]
            slope = float(1000 * np.polyfit(steps, held_in, 1)[0])
            growth[name] = {"first": held_in[0], "last": held_in[-1], "per_1000_steps": slope}
        return growth


def _last_step(workdir: str | Path) -> int | None:
    try:
        with open(Path(workdir) / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 2000))
            return json.loads(file.read().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError):
        return None


def held() -> tuple[float, ...]:
    """Return `FIGURES` of now, of this process and its descendants together."""
    memory, threads, handles, shared, processes = 0.0, 0, 0, set(), _descendants()
    for pid in processes:
        try:
            memory += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
            threads += len(os.listdir(f"/proc/{pid}/task"))
            handles += len(os.listdir(f"/proc/{pid}/fd"))
            maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
            shared |= {line.partition("/dev/shm/")[2] for line in maps if "/dev/shm/" in line}
        except (FileNotFoundError, ProcessLookupError):
            continue
    return memory, threads, handles, len(shared), len(processes)


def _descendants() -> list[int]:
    parents = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            parents[int(name)] = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = [os.getpid()]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def soak(workdir: str, steps: int, workers: int) -> Sampler:
    """Train a toy classifier on generated pictures for `steps` steps and return the samples."""
    from absl import flags

    from beitv2_jax import config as config_lib
    from beitv2_jax.runners import stages

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["soak"])  # grain's worker processes want them
    config = config_lib.load(f"{Path(__file__).parents[1] / 'configs/teacher.py'}:smoke").unlock()
    config.data.num_workers = workers
    config.views.image_size, config.model.width, config.model.depth, config.model.mlp_dim = 32, 32, 1, 64
    config.run.update(duration=f"{steps} steps", log_every="1 step", eval_every="200 steps")
    config.run.update(checkpoint_every="100 steps", keep_every="1000 steps")
    with Sampler(workdir) as sampler:
        stages.run_stage(config, workdir)
    assert [line["step"] for line in read_metrics(workdir)] == list(range(1, steps + 1))
    return sampler


def main() -> None:
    """Run the soak that the arguments describe and print what the process holds, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--workdir")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        sampler = soak(arguments.workdir or folder, arguments.steps, arguments.workers)
    print(f"\n{arguments.steps} steps, {arguments.workers} workers, {time.monotonic() - started:.0f} s")
    print("| held | after the warm-up | at the end | per 1000 steps |\n|---|---|---|---|")
    for name, row in sampler.growth().items():
        print(f"| {name} | {row['first']:.1f} | {row['last']:.1f} | {row['per_1000_steps']:+.2f} |")


if __name__ == "__main__":
    main()
