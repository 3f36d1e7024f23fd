"""Eight virtual CPU devices for every test, and flags marked parsed for grain's workers."""

import gc
import os

os.environ["JAX_PLATFORMS"] = "cpu"
# compiling is what takes the time in small tests, so the compiler is told not to optimise
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

from pathlib import Path

import hypothesis
import jax
import pytest
from absl import flags

# what jax traces lives long: to look through all of it again and again was a twentieth of the time
gc.set_threshold(20_000, 20, 50)

# the same examples in every run: a failure is one of the change, not of the draw
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption("--golden-dir", help="directory of the whole golden set; without it the chosen files are compared")
    parser.addoption("--long", action="store_true", help="run also what takes long and shows no more than its like")
    parser.addoption("--parity-table", help="write how close the golden checks came to this Markdown file")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: runs only with --long")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        left_out = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


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
def _compiled_programs_end_with_their_module():
    yield
    # a process that keeps all of them grows to gigabytes, in which sizes_test.py took seventeen times as long
    jax.clear_caches()


@pytest.fixture(scope="session")
def equality_runs(tmp_path_factory):
    """Return the small runs of every stage that the equality tests share."""
    from equality_runs import Runs

    return Runs(tmp_path_factory.mktemp("equality"))
