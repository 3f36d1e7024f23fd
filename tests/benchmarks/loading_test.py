"""The benchmark of real input makes its own JPEGs and runs the mim stage on them; no figure is checked."""

import pytest

from benchmarks import cases, loading

SIZES = {"views.image_size": 32, "run.batch_size": 2, "model.width": 16, "model.mlp_dim": 24, "model.num_heads": 2}
SIZES |= {"model.depth": 1, "model.early_layer": 1, "model.head_depth": 1, "model.codebook_size": 11}


def test_made_images_are_of_the_usual_size(tmp_path):
    mean = loading.make_images(tmp_path, 8)
    assert len(list(tmp_path.rglob("*.jpg"))) == 8 and 80_000 < mean < 120_000


@pytest.mark.long
def test_a_step_may_only_take_time(monkeypatch):
    monkeypatch.setitem(loading.NUM_IMAGES, True, 16)
    monkeypatch.setitem(loading.STEPS, True, 1)
    monkeypatch.setattr(loading, "PACES", (0.01,))
    found = cases.measure("pace", {"quick": True, "changes": SIZES, "images": ""})
    (pace,) = found["paces"]
    # so slow a step that the machine's load is nothing beside it
    assert 0 < pace["loop_images_per_second"] < 0.02 * found["input_images_per_second"]
    assert 0 <= pace["data_wait_share"] <= 1


@pytest.mark.long
def test_the_loop_runs_on_made_images(monkeypatch):
    monkeypatch.setitem(loading.NUM_IMAGES, True, 16)
    monkeypatch.setitem(loading.STEPS, True, 2)
    options = {"quick": True, "changes": SIZES, "images": ""}
    found = cases.measure("loop", options)
    assert found["loop_images_per_second"] > 0 and "16 made" in found["images"]
    assert found["cores_to_keep_the_step_busy"] == pytest.approx(
        found["step_images_per_second"] / found["input_images_per_second_per_core"]
    )
