"""What "auto" means on an accelerator: forms that fail, differ or gain nothing are not taken, and the log says why."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from beitv2_jax.models import trials
from beitv2_jax.models.ops import implementations
from benchmarks.recipes import recipe

TRIALS = {
    "attention": trials.attention_trial(2, 5, 2, 16, jnp.float32),
    "attention without a bias": trials.attention_trial(2, 5, 2, 16, jnp.bfloat16, biased=False),
    "cross entropy": trials.cross_entropy_trial(2, 3, 8, 40, jnp.float32),
    "cross entropy, bfloat16": trials.cross_entropy_trial(2, 3, 8, 40, jnp.bfloat16),
    "nearest code": trials.nearest_code_trial(30, 40, 8),
}
FORMS = {
    "attention": ("plain", "pallas"),
    "cross": ("plain", "rounded", "tiled"),
    "nearest": ("scan", "plain", "pallas"),
}


@pytest.mark.parametrize("name", TRIALS)
def test_all_forms_of_every_trial_agree(name):
    forms = FORMS[name.split()[0]]
    seconds, refused = trials.attempt(TRIALS[name], forms)
    assert not refused and set(seconds) == set(forms) and min(seconds.values()) > 0


def test_a_trial_compares_all_that_training_needs():
    """Outputs and a gradient of every argument that is trained; none of them zero, so that none agrees by default."""

    def shapes(name, form):
        arguments = TRIALS[name].drawn()
        found = jax.tree.leaves(jax.jit(functools.partial(TRIALS[name].run, form))(*arguments))
        assert all(np.abs(np.asarray(array, np.float32)).max() > 1e-3 for array in found)
        return [array.shape for array in found]

    params = [(16,), (16, 16), (16,), (16, 48), (16,)]  # of the output projection, then q, qkv and v
    assert shapes("attention", "plain") == [(2, 5, 16), (2, 5, 16), *params, (2, 5, 5)]
    assert shapes("cross entropy", "tiled") == [(), (2, 3), (2, 3, 8), (8, 40), (40,)]
    assert shapes("nearest code", "scan") == [(30,)]


def altered(change):
    """Return a trial whose form "other" gives what `change` makes of the result."""
    trial = trials.nearest_code_trial(30, 40, 8)

    def run(form, *arguments):
        found = trial.run("scan", *arguments)
        return found if form == "scan" else change(found)

    return dataclasses.replace(trial, run=run)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda found: found * 1.01, "differs from scan by 1.0e-02"),
        (lambda found: found.at[3].set(jnp.nan), "differs from scan by inf"),
        (lambda found: 1 / 0, "division by zero"),
        (lambda found: jax.pure_callback(lambda x: 1 / 0, found, found), "error calling callback"),
    ],
    ids=["another result", "not a number", "fails to trace", "fails to run"],
)
def test_a_form_that_fails_or_differs_is_refused(change, reason):
    seconds, refused = trials.attempt(altered(change), ("scan", "other"))
    assert set(seconds) == {"scan"} and reason in refused["other"]


def test_the_first_form_is_taken_unless_another_is_clearly_faster():
    forms = "plain", "tiled"
    assert trials.fastest({"plain": 1.0, "tiled": 0.99}, forms) == "plain"
    assert trials.fastest({"plain": 1.0, "tiled": 0.96}, forms) == "tiled"
    assert trials.fastest({"tiled": 9.0}, forms) == "tiled"
    assert trials.fastest({}, forms) == "plain"


def test_auto_takes_the_faster_form_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(trials, "FORMS", {key: {"cpu": value["tpu"]} for key, value in trials.FORMS.items()})
    monkeypatch.setattr(trials, "attempt", lambda trial, forms: (dict.fromkeys(forms, 2e-3) | {forms[-1]: 1e-3}, {}))
    logging.use_python_logging()
    caplog.set_level("INFO")
    small = recipe("mim_base", quick=True)
    chosen = trials.chosen(small, small.efficiency, "cpu")
    assert (chosen["attention"], chosen["cross_entropy"], chosen["nearest_code"]) == ("pallas", "tiled", "scan")
    assert "tried for attention" in caplog.text and all(
        told in caplog.text for told in ("plain 2.000 ms; pallas 1.000 ms", "rounded 2.000 ms; tiled 1.000 ms")
    )
    named = {**small.efficiency, "attention": "plain"}
    assert trials.chosen(small, named, "cpu")["attention"] == "plain"


def test_a_cpu_tries_nothing(monkeypatch):
    monkeypatch.setattr(trials, "attempt", None)
    small = recipe("vqkd", quick=True)
    assert trials.chosen(small, small.efficiency, "cpu") == implementations.resolved(small.efficiency, "cpu")


def test_sizes_are_those_of_one_device():
    small = recipe("mim_base", changes={"run.batch_size": 256})
    found = trials.trials(small, num_devices=16)
    tokens, params, cotangent, bias = found["attention"].arguments
    assert tokens.shape == cotangent.shape == (16, 197, 768) and bias.shape == (12, 197, 197)
    assert params["qkv"]["kernel"].shape == (768, 2304)
    assert found["cross_entropy"].arguments[0].shape == (16, 75, 768)
    assert trials.trials(small, 1)["attention"].arguments[0].shape[0] == trials.MOST_IMAGES
    vqkd = trials.trials(recipe("vqkd"), num_devices=16)
    assert len(vqkd["attention"].arguments) == 3  # its positions are absolute: no bias
    assert vqkd["nearest_code"].arguments[0].shape == (16 * 196, 32)
    assert set(trials.trials(recipe("segment"), 1)) == set(trials.trials(recipe("finetune"), 1)) == {"attention"}


def test_what_is_tried_are_forms_that_exist():
    assert set(trials.FORMS) == set(implementations.AUTO)
    for key, platforms in trials.FORMS.items():
        for platform, forms in platforms.items():
            assert (
                set(forms) <= set(implementations.IMPLEMENTATIONS[key])
                and forms[0] == implementations.AUTO[key][platform]
            )
