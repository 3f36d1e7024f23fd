"""metrics.jsonl, TensorBoard and the progress shown."""

import json
import math
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from beitv2_jax.training import writer


def write(path, steps, **kwargs):
    metrics = writer.MetricWriter(path, **kwargs)
    for step in steps:
        metrics.write(step, {"loss": 10.0 / step})
    metrics.close()


def test_metrics_of_one_step_are_one_line(tmp_path):
    metrics = writer.MetricWriter(tmp_path)
    metrics.write(3, {"loss": 0.5})
    metrics.write(3, {"eval/accuracy": 0.25})
    metrics.write(6, {"loss": math.nan, "count": 2})
    assert writer.read_metrics(tmp_path) == [{"step": 3, "loss": 0.5, "eval/accuracy": 0.25}]
    metrics.flush()
    assert writer.read_metrics(tmp_path)[1] == {"step": 6, "loss": None, "count": 2}
    metrics.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_metrics_that_come_after_the_flush_are_read_as_one_with_those_before(tmp_path):
    metrics = writer.MetricWriter(tmp_path)
    for step in (3, 6):
        metrics.write(step, {"loss": 0.5})
        metrics.flush()
    metrics.write(6, {"eval/accuracy": 0.25})
    metrics.close()
    expected = [{"step": 3, "loss": 0.5}, {"step": 6, "loss": 0.5, "eval/accuracy": 0.25}]
    assert writer.read_metrics(tmp_path) == expected
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    writer.MetricWriter(tmp_path, resume_step=6).close()
    assert [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()] == expected


@pytest.mark.parametrize(
    "garbage", [b"\0" * 40, b"\xff\xfe{\n", b"12\n", b'"step"\n', b'{"loss": 1}\n', b'{"step": null}\n']
)
def test_what_a_power_cut_leaves_at_the_end_is_left_out(tmp_path, garbage):
    write(tmp_path, [2, 4])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(garbage)
    write(tmp_path, [5], resume_step=4)
    assert [json.loads(text)["step"] for text in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [2, 4, 5]


def test_resume_drops_lines_beyond_the_step_and_a_corrupt_one(tmp_path):
    write(tmp_path, [2, 4, 6, 8])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    write(tmp_path, [5, 7], resume_step=4)
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5, 7]
    assert lines[2] == {"step": 5, "loss": 2.0}


def test_tensorboard_holds_the_same_scalars(tmp_path):
    write(tmp_path, [2, 4])
    (path,) = (tmp_path / "tensorboard").iterdir()
    scalars, data = [], path.read_bytes()
    while data:  # a record is its length, a checksum of that, the event, a checksum of that
        (length,) = struct.unpack("<Q", data[:8])
        event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
        scalars += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    assert scalars == [(2, "loss", 5.0), (4, "loss", 2.5)]


def test_only_the_enabled_process_writes(tmp_path):
    write(tmp_path / "none", [2, 4], enabled=False)
    assert not (tmp_path / "none").exists()
    assert writer.read_metrics(tmp_path / "none") == []


def test_progress_prints_plain_lines_away_from_a_terminal(capsys, monkeypatch):
    clock = iter([100.0, 130.0])
    monkeypatch.setattr(writer.time, "monotonic", lambda: next(clock))
    progress = writer.Progress(50, "mim", "steps", done=20)
    progress.advance(10)
    progress.show({"loss": 1.23456, "images/s": 512.0})
    progress.close()
    assert capsys.readouterr().out == "mim 30/50 steps  loss 1.235  images/s 512  eta 0:01:00\n"


def test_progress_is_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(writer.sys.stderr, "isatty", lambda: True, raising=False)
    progress = writer.Progress(50, "mim", "steps", done=20)
    progress.advance(10)
    progress.show({"loss": 1.23456})
    progress.close()
    captured = capsys.readouterr()
    assert captured.out == "" and "mim:  60%" in captured.err and "loss=1.235" in captured.err


@pytest.mark.parametrize("terminal", [False, True])
def test_an_evaluation_is_a_line_without_single_classes_that_stays(capsys, monkeypatch, terminal):
    monkeypatch.setattr(writer.sys.stderr, "isatty", lambda: terminal, raising=False)
    progress = writer.Progress(50, "mim", "steps", done=20)
    progress.show_evaluation({"eval/mean_iou": 0.51234, "eval/iou/3": 0.25, "eval/examples": 13})
    progress.close()
    assert capsys.readouterr().out == "mim 20/50 steps  eval/mean_iou 0.5123  eval/examples 13\n"


@pytest.mark.parametrize("total", [None, 50])
def test_silent_progress_says_nothing(capsys, total):
    progress = writer.Progress(total, "mim", "steps", enabled=False)
    progress.advance(1)
    progress.show({"loss": 1.0})
    progress.show_evaluation({"eval/loss": 1.0})
    progress.close()
    assert capsys.readouterr() == ("", "")
