"""The line on the start of a run: phases, whose seconds add up, and what XLA compiled; once a run, none without one."""

import logging
import os
import re
import subprocess
import sys
import time

import jax
import pytest
import training_toy as toy
from paths import ROOT

from beitv2_jax.runtime import startup_times
from beitv2_jax.training import loop

LINE = re.compile(
    r"first step done ([\d.]+) s after the start: (.*); XLA: (\d+) programs in ([\d.]+) s, (\d+) of them from the cache"
)


@pytest.fixture
def logged(caplog):
    """Return a function for the lines so far, each as (seconds, {phase: seconds}, programs, from the cache)."""
    caplog.set_level(logging.INFO, "absl")
    startup_times._marks.clear()

    def lines():
        found = [LINE.fullmatch(record.getMessage()) for record in caplog.records if "the start" in record.msg]
        return [
            (
                float(line[1]),
                {p.rpartition(" ")[0]: float(p.split()[-1]) for p in line[2].split(", ")},
                *line.group(3, 5),
            )
            for line in found
        ]

    return lines


def test_phases_add_up_and_a_timeline_that_runs_goes_on(logged):
    startup_times.begin(100.0)
    startup_times.ended("flags", 103.5)
    startup_times.begin(104.0)
    startup_times.ended("jax", 105.75)
    startup_times.report("first step", 112.0)
    startup_times.report("first step", 113.0)
    startup_times.ended("jax", 114.0)
    startup_times.begin(150.0)
    startup_times.drop()
    startup_times.report("first step", 160.0)
    startup_times.begin(200.0)
    startup_times.report("first step", 207.25)
    assert [line[:2] for line in logged()] == [
        (12.0, {"flags": 3.5, "jax": 2.2, "first step": 6.2}),
        (7.2, {"first step": 7.2}),
    ]


def test_a_run_says_once_where_its_start_went(logged, tmp_path):
    rhythm = {"run.duration": "3 steps", "run.log_every": "3 steps", "optim.warmup": "0 steps"}
    loop.train(toy.make_task(evaluation=False), toy.config(**rhythm), tmp_path)
    ((seconds, phases, *_),) = logged()
    assert list(phases) == ["first batch", "compiling", "state", "codebook", "first step"]
    assert seconds == pytest.approx(sum(phases.values()), abs=0.3)


def test_compilations_are_counted_and_those_from_the_cache(logged, tmp_path, monkeypatch):
    monkeypatch.setattr(jax.monitoring, "register_event_listener", lambda heard: events.append(heard))
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", lambda heard: durations.append(heard))
    events, durations = [], []
    startup_times.watch_compiler()
    startup_times.begin(0.0)
    durations[0](startup_times.COMPILED, 2.0)
    durations[0]("/jax/other", 2.0)
    durations[0](startup_times.COMPILED, 1.0)
    events[0](startup_times.FOUND_IN_CACHE)
    events[0]("/jax/other")
    startup_times.report("first step", 4.0)
    assert logged() == [(4.0, {"first step": 4.0}, "2", "1")]


def test_jax_tells_of_compilations_and_of_the_cache_by_these_names(tmp_path):
    program = f"""
import jax
from beitv2_jax.runtime import launch, startup_times
launch.start_jax(None, {str(tmp_path)!r})
add = lambda x: jax.jit(lambda x: x * 3 + 1)(x)
startup_times._compilations.clear()
add(1.0)
print(len(startup_times._compilations), len(startup_times._fetched))
jax.clear_caches()
add(1.0)
print(len(startup_times._compilations), len(startup_times._fetched))
"""
    environment = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment, cwd=ROOT
    )
    assert done.stdout.split() == ["1", "0", "2", "1"]


def test_the_start_of_a_process_is_before_its_imports():
    before = time.monotonic()
    program = """import time; time.sleep(0.3)
from beitv2_jax.runtime import startup_times
print(startup_times.process_start())"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    # the system counts in hundredths
    assert before - 0.02 <= float(done.stdout) < time.monotonic() - 0.3


def test_a_run_imports_nothing_large_that_it_may_not_need():
    large = {"scipy", "matplotlib", "sklearn", "tensorflow", "tensorflow_datasets", "apache_beam", "pandas"}
    program = "import sys, beitv2_jax.main, beitv2_jax.runners.stages; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not large & set(done.stdout.split())
