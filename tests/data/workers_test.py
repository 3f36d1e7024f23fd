"""Worker processes of a run that is killed: they are gone soon after it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import HELPERS, ROOT

PROGRAM = """
import multiprocessing, os, signal, sys

import numpy as np
from absl import flags
from beitv2_jax.data.pipeline import train_iterator
from beitv2_jax.data.view_stream import view_stream

class Source:
    name, split = "numbers", "train"

    def __len__(self):
        return 80

    def __getitem__(self, index):
        return {"example_ids": np.int64(index)}

def transform(example, epoch):
    return example

def load(example_id):
    return [{"images": np.float32(example_id)}]

if __name__ == "__main__":
    flags.FLAGS(["program"])
    if sys.argv[1] == "training":
        batches = train_iterator(Source(), transform, batch_size=8, seed=3, num_workers=2)
    else:
        chunks = [range(start, start + 2) for start in range(0, 20, 2)]
        batches = view_stream(load, chunks, range(1), batch_size=2, num_threads=0, num_workers=2)
    next(batches)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("stage", ["training", "cache"])
def test_the_workers_of_a_killed_run_end(tmp_path, stage):
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HELPERS), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), stage], env=environment, stdout=subprocess.PIPE, text=True
    )
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert process.wait(60) == -9 and len(workers) == 2
    deadline = time.monotonic() + 20
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))
