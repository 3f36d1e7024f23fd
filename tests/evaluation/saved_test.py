"""Protocols that are stopped in the middle and started again: the same figures, and nothing is done twice."""

import dataclasses

import numpy as np
import pytest

from beitv2_jax.evaluation import saved
from beitv2_jax.evaluation.features import Features
from beitv2_jax.evaluation.protocols import PROTOCOLS, capi, dinov3
from beitv2_jax.evaluation.saved import Saved, SavedParts
from tests.evaluation.protocols.dinov3_test import SETTINGS

KINDS = {
    "ours": ("cls", "mean"),
    "dinov3": ("cls", "cls_normed", "mean_normed"),
    "capi": ("cls_normed", "patches_normed"),
    "ep": ("cls", "cls_normed", "patches"),
    "beit": ("cls", "mean"),
}


def features(rng, count, names):
    labels = rng.integers(0, 3, count)
    shapes = {name: (count, 1, 2, 4) if name.startswith("patches") else (count, 1, 4) for name in names}
    arrays = {name: (labels + rng.normal(size=shape).T).T.astype(np.float32) for name, shape in shapes.items()}
    return Features(arrays, labels, (2,), 3)


class Stopped(Exception):
    """Raised in the middle of a protocol."""


@pytest.mark.parametrize(
    "protocol", ["beit", *(pytest.param(name, marks=pytest.mark.long) for name in ("ours", "dinov3", "capi", "ep"))]
)
def test_a_protocol_that_was_stopped_goes_on_and_finds_the_same(protocol, tmp_path, monkeypatch):
    monkeypatch.setattr(saved, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(capi, "KINDS", {"linear": ("cls_normed",), "attentive": ("patches_normed",)})
    monkeypatch.setattr(dinov3, "INVERSE_STRENGTHS", np.array([1e-3, 1e-1, 1e1, 1e3]))
    settings = dataclasses.replace(
        SETTINGS, num_steps=9, learning_rates=(0.1, 0.5), knn_neighbors=3, knn_temperature=0.1, validation_fraction=0.2
    )
    rng = np.random.default_rng(0)
    splits = [features(rng, count, KINDS[protocol]) for count in (30, 20)]

    def found(on_move, folder=None):
        return PROTOCOLS[protocol](*splits, settings, on_move, SavedParts(folder))

    moves = []
    expected = found(moves.append)
    budget = iter(range(4 * len(moves) // 5))

    def stop_near_the_end(phase):
        if next(budget, None) is None:
            raise Stopped

    with pytest.raises(Stopped):
        found(stop_near_the_end, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()].count(".npz") == 1
    steps, restored = [], Saved.restored

    def noted(of_part, state):
        done, state = restored(of_part, state)
        steps.append(done)
        return done, state

    monkeypatch.setattr(Saved, "restored", noted)
    left = []
    assert found(left.append, tmp_path) == expected
    assert steps[0] > 0 and 0 < len(left) < 0.7 * len(moves)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json"}
    left.clear()
    assert found(left.append, tmp_path) == expected and not left


def test_a_damaged_file_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(saved, "SAVE_SECONDS", 0.0)
    state = {"kernel": np.arange(3.0), "count": np.int32(7)}

    def part(of_part):
        done, found = of_part.restored(state)
        of_part.offer(done + 1, 2, {"kernel": found["kernel"] + 1, "count": found["count"]})
        return float(found["kernel"].sum())

    Saved(tmp_path / "head.npz").offer(1, 2, {"kernel": np.full(3, 5.0), "count": np.int32(8)})
    assert Saved(tmp_path / "head.npz").restored(state)[0] == 1
    assert SavedParts(tmp_path)("head", part) == 15.0
    assert [path.name for path in tmp_path.iterdir()] == ["head.json"]
    (tmp_path / "head.json").write_text('{"accur')
    (tmp_path / "head.npz").write_bytes(b"PK")
    assert SavedParts(tmp_path)("head", part) == 3.0
    assert SavedParts(tmp_path)("head", None) == 3.0
