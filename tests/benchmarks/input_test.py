"""The input benchmark runs on any task and says what follows from its three rates; no figure of it is checked."""

import jax
import pytest
import training_toy as toy
from paths import CONFIGS
from without_data import no_data

from beitv2_jax import config as config_lib
from benchmarks import input as benchmark


def test_three_rates_and_their_conclusion():
    config = toy.config(**{"run.eval_every": "0 steps"})
    metrics = benchmark.measure(config, toy.make_task(), steps=3)
    rates = {key: value for key, value in metrics.items() if "images_per_second" in key}
    assert len(rates) == 4 and min(rates.values()) > 0 and 0 <= metrics["data_wait_share"] <= 1
    faster = metrics["input_images_per_second"] >= metrics["step_images_per_second"]
    assert metrics["bound"] == ("step" if faster else "input")
    cores = metrics["step_images_per_second"] / metrics["input_images_per_second_per_core"]
    assert metrics["cores_to_keep_the_step_busy"] == pytest.approx(cores)
    text = benchmark.table(metrics, config)
    assert f"The bound is the {metrics['bound']}" in text and "input alone, 2 threads" in text


@pytest.mark.long
def test_a_mim_stage_without_tokenizer_gets_an_untrained_one():
    config = config_lib.load(f"{CONFIGS / 'mim'}.py:smoke")
    config.views.tokenizer_image_size = 48  # half the size, half the patch: as many codes as the student has patches
    with no_data(teacher_width=0):
        task = benchmark.build(config, f"{CONFIGS / 'vqkd'}.py:smoke")
    patch_embedding = task.frozen["tokenizer"]["params"]["encoder"]["patch_embed"]
    assert {leaf.shape for leaf in jax.tree.leaves(patch_embedding)} == {(8, 8, 3, 64), (64,)}
