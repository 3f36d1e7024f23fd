"""Every error of the planner: provoked, its advice followed, and then it is gone."""

import dataclasses

import pytest
from paths import CONFIGS
from user_errors import check_all_provoked, flag, provoked

from beitv2_jax import config as config_lib
from beitv2_jax.planning import abstract_task, planner, search, topologies
from beitv2_jax.planning.chips import CHIPS, find_chip
from tests.planning.small_configs import small


@pytest.mark.parametrize(
    "text",
    ["v5e", "v5e:0", "v5e:7", "v5e:2x2x2", "v5p:4x4", "v5p:7", "h100:12", "v5lite:8", "h10:8", "xyz:8"],
)
def test_targets(text):
    with provoked("--plan=") as caught:
        topologies.parse(text)
    advice = caught.value.instead
    for part in advice.split("--plan=")[1:]:
        topologies.parse(part.split()[0].rstrip(".,"))
    if caught.value.meant.startswith("Did you mean '"):
        guesses = {"h10:8": "h100", "v5lite:8": "v5e"}
        assert caught.value.meant == f"Did you mean {guesses[text]!r}?"


def test_every_chip_that_is_listed():
    with provoked("Pass one of ") as caught:
        find_chip("xyz")
    listed = caught.value.instead.removeprefix("Pass one of ").partition(", as in")[0].split(", ")
    assert listed == list(CHIPS) and all(topologies.parse(f"{name}:8") for name in listed)


def test_stages_and_data():
    with provoked("--config=configs/mim.py") as caught:
        abstract_task.complete(config_lib.load(f"{CONFIGS}/dense.py"))
    assert "what is fitted to its features is small" in caught.value.happened
    for name in caught.value.instead.partition("one stage of ")[2].partition(", such as")[0].split(", "):
        abstract_task.complete(config_lib.load(f"{CONFIGS}/{name}.py"))
    config = config_lib.load(f"{CONFIGS}/mim.py").unlock()
    config.data.source = "folder:/nowhere/of/mine"
    with provoked() as caught:
        abstract_task.count_examples(config)
    assert abstract_task.count_examples(config, int(flag(caught.value.instead, "plan_examples"))) == 1281167


@pytest.fixture(scope="module")
def step():
    return planner.prepare(small("mim", **{"run.batch_size": 64}), 10**9)


def with_batch(step, advice):
    return planner.varied(step, **{"run.batch_size": int(flag(advice, "run.batch_size"))})


def test_batches_on_chips(step):
    target = topologies.parse("v5e:256")
    with provoked("or choose a target with fewer chips") as caught:
        planner.predict(step, target)
    planner.predict(with_batch(step, caught.value.instead), target)
    planner.predict(step, topologies.parse("v5e:64"))
    with provoked("or a multiple of it") as caught:
        search.find_best(planner.varied(step, **{"run.batch_size": 7}), "v5e:8", make=None, minutes=0)
    assert search.find_best(with_batch(step, caught.value.instead), "v5e:8", make=None, minutes=0)


def test_batches_that_do_not_fit(step, monkeypatch):
    large = planner.varied(step, **{"run.batch_size": 3 * 2**20 + 1})
    with provoked() as caught:
        search.find_best(large, "v5e:1", make=None, minutes=0)
    assert search.find_best(with_batch(large, caught.value.instead), "v5e:1", make=None, minutes=0)
    v5e = dataclasses.replace(CHIPS["v5e"], hbm_bytes=10**5)
    with monkeypatch.context() as patch, provoked("no smaller batch fits either"):
        patch.setitem(CHIPS, "v5e", v5e)
        search.find_best(step, "v5e:1", make=None, minutes=0)


def test_plans_that_the_compiler_refuses(step):
    def make(stage, target):
        made = planner.predict(stage, target)
        fits = stage.config.run.batch_size < 64
        memory = dataclasses.replace(made.memory, peak=made.memory.peak if fits else made.memory.usable + 1)
        return dataclasses.replace(made, memory=memory, compiled=True, compile_s=0.0)

    with provoked("or choose another kind of chip") as caught:
        search.find_best(step, "v5e:1", make=make, minutes=9)
    assert search.find_best(with_batch(step, caught.value.instead), "v5e:1", make=make, minutes=9)


def test_compilers(step, monkeypatch):
    target = topologies.parse("v5e:2x4")
    with monkeypatch.context() as patch, provoked("Pass --noplan_compile to estimate from the traced step"):
        patch.setattr(topologies, "is_installed", lambda platform: False)
        planner.compile_and_predict(step, target)

    def unknown(**_):
        raise ValueError("no such topology")

    with monkeypatch.context() as patch, provoked("or pass --noplan_compile") as caught:
        patch.setattr(topologies, "is_installed", lambda platform: True)
        patch.setattr(topologies.topologies, "get_topology_desc", unknown)
        topologies.devices(target)
    for shape in caught.value.instead.partition("one of ")[2].partition(", or pass")[0].split(", "):
        topologies.parse(f"v5e:{shape}")
    planner.predict(step, target)  # what --noplan_compile does


def test_every_error_of_the_planner_was_provoked(request):
    check_all_provoked(request, "planning")
