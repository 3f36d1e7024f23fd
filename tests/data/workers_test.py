"""Worker processes: gone soon after a run that is killed, deaf to the signals on which a run saves."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import HELPERS, ROOT

PROGRAM = """
import multiprocessing, os, signal, sys, threading, time

import numpy as np
from absl import flags
from beitv2_jax.data.pipeline import train_iterator
from beitv2_jax.data.view_stream import view_stream

class Source:
    name, split = "numbers", "train"

    def __len__(self):
        return 80

    def __getitem__(self, index):
        if sys.argv[2] == "dies" and index == 7:
            os.kill(os.getpid(), int(sys.argv[3]))
        return {"example_ids": np.int64(index)}

def transform(example, epoch):
    return example

def load(example_id):
    if sys.argv[2] == "dies" and example_id == 7:
        os.kill(os.getpid(), int(sys.argv[3]))
    return [{"images": np.float32(example_id)}]

if __name__ == "__main__":
    flags.FLAGS(["program"])
    if sys.argv[1] == "training":
        batches = train_iterator(Source(), transform, batch_size=8, seed=3, num_workers=2)
    else:
        chunks = [range(start, start + 2) for start in range(0, 20, 2)]
        batches = view_stream(load, chunks, range(1), batch_size=2, num_threads=0, num_workers=2)
    if sys.argv[2] == "signalled":
        received = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: received.append(number))

        def tell():  # as soon as there are workers, and again when they work
            for is_time in (multiprocessing.active_children, lambda: first):
                while not is_time():
                    time.sleep(0.001)
                for number in (signal.SIGTERM, signal.SIGINT):
                    os.killpg(0, number)

        first = []
        thread = threading.Thread(target=tell)
        thread.start()
        first.append(next(batches))
        thread.join()
        name = "example_ids" if sys.argv[1] == "training" else "images"
        print(sum(len(next(batches)[name]) for _ in range(5)), sorted(set(received)), flush=True)
        sys.exit()
    if sys.argv[2] == "dies":
        try:
            [next(batches) for _ in range(10)]
        except Exception as error:
            print(f"{type(error).__name__}: {error}")
        sys.exit()
    next(batches)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""

PATH = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HELPERS), *sys.path])}


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("stage", ["training", pytest.param("cache", marks=pytest.mark.long)])
def test_the_workers_of_a_killed_run_end(tmp_path, stage):
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = os.environ | PATH
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), stage, "killed"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert process.wait(60) == -9 and len(workers) == 2
    deadline = time.monotonic() + 20
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))


@pytest.mark.long
@pytest.mark.parametrize(("stage", "rows"), [("training", 40), ("cache", 10)])
def test_workers_stay_when_their_process_group_is_told_to_end(tmp_path, stage, rows):
    (tmp_path / "program.py").write_text(PROGRAM)
    process = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), stage, "signalled"],
        env=os.environ | PATH,
        capture_output=True,
        text=True,
        timeout=40,
        start_new_session=True,
    )
    assert process.returncode == 0, process.stderr
    # all batches came, and the process itself noticed both signals
    assert process.stdout.strip() == f"{rows} [2, 15]"


@pytest.mark.parametrize(
    ("stage", "number", "words"),
    [
        ("training", signal.SIGKILL, ["Resumable", "killed by signal 9", "memory", "data.num_workers"]),
        pytest.param(
            "training",
            signal.SIGBUS,
            ["UserError", "bus error", "/dev/shm", "--shm-size", "--config.data.num_workers=0"],
            marks=pytest.mark.long,
        ),
        pytest.param(
            "cache",
            signal.SIGKILL,
            ["Resumable", "killed", "memory", "data.num_workers"],
            marks=pytest.mark.long,
        ),
    ],
)
def test_the_death_of_a_worker_is_explained(tmp_path, stage, number, words):
    (tmp_path / "program.py").write_text(PROGRAM)
    process = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), stage, "dies", str(int(number))],
        env=os.environ | PATH,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 0, process.stderr
    kind, _, message = process.stdout.partition(": ")
    assert kind == words[0] and all(word in message for word in words[1:]), process.stdout
