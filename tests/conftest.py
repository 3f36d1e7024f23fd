"""Eight virtual CPU devices for every test, and flags marked parsed for grain's workers."""

import atexit
import gc
import os
import shutil
import tempfile

from xla_flags import xla_flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}"

# one cache of compiled programs for the workers and every subprocess of a run of the suite
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="beitv2_jax_compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

from pathlib import Path

import hypothesis
import jax
import pytest
from absl import flags

# traced programs live long: with the default thresholds the collector takes a twentieth of the time
gc.set_threshold(20_000, 20, 50)

# the same examples in every run, so that a failure comes from the change and not from the draw
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")


SLOWEST_FIRST = (
    "equality/meshes_test",
    "runners/stages_test",
    "runners/stages_preempted_test",
    "golden_test",
    "training/loop_test",
    "training/step_test",
    "tasks/unreadable_test",
    "tasks/segment_test",
    "launch/processes_test",
    "models/vit_test",
    "runtime/disk_checks_test",
)
"""Modules that start first, so that no worker ends the run alone with one of them; launch/test.sh keeps this order."""


def pytest_addoption(parser):
    parser.addoption("--golden-dir", help="directory of the whole golden set; without it the chosen files are compared")
    parser.addoption("--long", action="store_true", help="also run the tests marked long (.ci/long)")
    parser.addoption("--parity-table", help="write how close the golden checks came to this Markdown file")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: runs only with --long")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        left_out = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    places = {f"tests/{module}.py": place for place, module in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))


@pytest.fixture(scope="session")
def golden_dir(request) -> Path:
    """Return the directory of golden files; opening one that is missing fails the test."""
    return Path(request.config.getoption("--golden-dir") or Path(__file__).parent / "golden")


@pytest.fixture(scope="session", autouse=True)
def _eight_devices():
    assert len(jax.devices()) == 8, "the suite needs 8 virtual CPU devices; jax was started before conftest.py"
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["pytest"])


@pytest.fixture(scope="module", autouse=True)
def _free_compiled_programs_after_each_module():
    yield
    # a process that keeps all of them grows to gigabytes and becomes slow
    jax.clear_caches()


@pytest.fixture(scope="session")
def server():
    """Return the buckets of a server that this process takes for Cloud Storage from now on: one, named `bucket`."""
    from fake_bucket import serving

    with serving("bucket") as buckets:
        os.environ.update(buckets.environment)
        yield buckets


@pytest.fixture
def bucket(server):
    """Return {name of an object: its bytes} of gs://bucket."""
    return server["bucket"]


@pytest.fixture(scope="session")
def equality_runs(tmp_path_factory):
    """Return the small runs of every stage that the equality tests share."""
    from equality_runs import Runs

    return Runs(tmp_path_factory.mktemp("equality"))
