"""Weights & Biases without its service, for the extra "wandb": what a run, started twice, records for one run there."""

import json
import struct

import pytest
import training_toy as toy
from wandb.proto.wandb_internal_pb2 import Record

from beitv2_jax.training import loop
from beitv2_jax.training.writer import read_metrics


def records(data):
    """Yield the records of a log of LevelDB behind seven bytes: parts that do not cross the blocks of 32 KiB."""
    place, record = 7, b""
    while place < len(data):
        if (left := -place % 32768) and left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, last part
            yield Record.FromString(record)
            record = b""


def recorded(path):
    """Return what a file that `wandb sync` would send says: identities of runs, and {step: metrics} of its history."""
    identities, history = set(), {}
    for record in records(path.read_bytes()):
        if record.WhichOneof("record_type") == "run":
            identities.add((record.run.run_id, record.run.project))
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            history.setdefault(record.history.step.num, {})[name] = json.loads(item.value_json)
    return identities, history


def test_a_run_that_is_started_twice_is_one_run_there_with_all_metrics(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = toy.config(**{"run.wandb": "tests"})
    with pytest.raises(KeyboardInterrupt):
        loop.train(toy.make_task(stop_at=13), config, tmp_path)
    loop.train(toy.make_task(), config, tmp_path)
    identities, history = set(), {}
    for path in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb")):
        found, steps = recorded(path)
        identities |= found
        history |= steps
    assert identities == {((tmp_path / "wandb_id.txt").read_text(), "tests")}
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 20))
    for line in lines:
        shown = {name: value for name, value in history[line["step"]].items() if not name.startswith("_")}
        assert shown == {name: value for name, value in line.items() if name != "step"}
