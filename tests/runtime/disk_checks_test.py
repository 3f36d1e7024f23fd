"""Full disks and lost permissions, in real processes: reported, survived where configured, never a corrupt checkpoint.

A limit on the size of files stands for the full disk: any user can set it, and writes fail in the same places.
"""

import json
import re
import socket
from pathlib import Path

import pytest
import training_toy as toy
from xla_flags import xla_flags

from beitv2_jax.training import loop
from beitv2_jax.training.writer import read_metrics
from tests.training.loop_test import assert_same_outcome, outcome, start_elsewhere

pytestmark = pytest.mark.long  # six whole runs

FULL, ROOM = {"6": 1200}, {"14": -1}
"""From batch 6 on there is no space for checkpoints, first for that of step 10, but still for metrics."""
RARELY = {"run.log_every": "5 steps"}
ONE_DEVICE = {"XLA_FLAGS": xla_flags(1)}


def failures(text):
    """Return the steps whose checkpoints could not be written, and what is said to be the newest."""
    return re.findall(r"checkpoint of step (\d+) could not be written to .*?: .*?; (.*)\n", text)


def folders(workdir):
    return sorted(path.name for path in (Path(workdir) / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """All runs of this file, started together: {name: (workdir, exit status, what it printed)}."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
    plans = {
        "full for a while": {"task": {"limits": {"11": 5000, "17": -1}}, "config": RARELY},
        "full": {"task": {"limits": {"6": 0}}},
        "full, stopping": {"task": {"limits": FULL}, "config": RARELY | {"run.on_failed_save": "stop"}},
        "locked": {"task": {"locked": [6, 14]}},
    }
    for index, limits in enumerate((FULL | ROOM, {})):
        place = {"coordinator_address": address, "num_processes": 2, "process_id": index}
        plans[f"process {index}"] = {"task": {"limits": limits}, "config": RARELY, "place": place, "workdir": "both"}
    plans["process 0"]["environment"] = ONE_DEVICE
    folder = tmp_path_factory.mktemp("each")
    process = start_elsewhere(folder, {"each": plans})
    ended = json.loads(process.communicate(timeout=200)[0])
    workdirs = {name: folder / ("both" if name.startswith("process") else name) for name in ended}
    return {name: (workdirs[name], status, text) for name, (status, text) in ended.items()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    loop.train(toy.make_task(), toy.config(), workdir)
    return outcome(workdir)


@pytest.mark.parametrize(
    ("name", "failed", "newest", "left"),
    [("full for a while", "15", "10", ["10", "19"]), ("locked", "10", "5", ["15", "19"])],
)
def test_the_run_says_so_and_goes_on(ran, unbroken, name, failed, newest, left):
    workdir, status, text = ran[name]
    assert status == 0, text
    assert failures(text) == [(failed, f"the newest valid one is of step {newest}.")]
    assert ("File too large" if "full" in name else "Permission denied") in text
    assert re.search(r"\(\d+\.\d+ GB of \d+\.\d+ GB free\)", text) or name == "locked"
    assert "The run continues and tries again at its next save" in text
    # neither what is left of the failed one, nor one that should have been deleted since
    assert folders(workdir) == left
    lines = {line["step"] for line in read_metrics(workdir)}
    assert lines == ({5, 7, 10, 14, 15, 19} if "full" in name else set(range(1, 20)))
    assert_same_outcome(outcome(workdir), (*unbroken[:3], [line for line in unbroken[3] if line["step"] in lines]))


def test_the_last_save_must_not_fail_and_the_run_can_be_continued(ran, unbroken):
    workdir, status, text = ran["full"]
    assert status == 1
    assert [step for step, _ in failures(text)] == ["10", "15", "19"]
    assert "The same command resumes the run." in text
    assert folders(workdir) == ["5"]
    # what a failed write left is gone; the lines since then would have been lost, so nothing was saved after them
    lines = (Path(workdir) / "metrics.jsonl").read_text()
    assert lines.endswith("}\n") and [line["step"] for line in read_metrics(workdir)] == list(range(1, 6))
    loop.train(toy.make_task(), toy.config(), workdir)
    assert_same_outcome(outcome(workdir), unbroken)


def test_where_configured_it_stops_within_a_step(ran):
    workdir, status, text = ran["full, stopping"]
    assert status == 1
    assert failures(text) == [("10", "the newest valid one is of step 5.")]
    assert "UserError" in text and "The same command resumes the run." in text
    assert folders(workdir) == ["5"]


def test_several_processes_decide_alike(ran):
    workdir, _, _ = ran["process 0"]
    for index in (0, 1):
        _, status, text = ran[f"process {index}"]
        assert status == 0, text
        assert failures(text) == [("10", "the newest valid one is of step 5.")]
        assert "File too large (process 0)" in text and "(process 1)" not in text
    assert folders(workdir) == ["15", "19"]
    assert [line["step"] for line in read_metrics(workdir)] == [5, 7, 10, 14, 15, 19]
