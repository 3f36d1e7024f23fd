"""Processes that are lost, hang, fail or are only slow: who ends, with which code, and whom the message names."""

import json
import socket
import subprocess
import sys

import pytest
import watchdog_processes
from paths import ROOT

from beitv2_jax.errors import Preempted

AGAIN, HOST = Preempted.EXIT_CODE, socket.gethostname()
LIMIT = 3.0


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory):
    """Return {scenario: [(exit status, what was printed) of each of three processes]}, and the folder."""
    folder = tmp_path_factory.mktemp("scenarios")
    command = [sys.executable, watchdog_processes.__file__, str(folder), str(LIMIT)]
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), folder


def assert_all_name(ended, reason, *, but=None):
    """Check that all processes ended themselves for one reason, but the one that is lost (killed in the end)."""
    for index, (code, printed) in enumerate(ended):
        if index == but:
            assert code == -9
        else:
            assert code == AGAIN, printed
            assert f"process {index} on " in printed and f" ends: {reason}" in printed.replace(HOST, "HOST"), printed
            assert "the same command again" in printed


@pytest.mark.parametrize(
    "scenario, lost, reason",
    [
        ("killed", 1, "process 1 on HOST is dead, last seen "),
        ("stopped", 0, "process 0 on HOST has sent no heartbeat for "),
        ("hangs_in_its_input", None, "no progress for 3 s, behind: process 0 on HOST, waiting for data at step 8\n"),
        ("hangs_everywhere", None, "no progress for 3 s, behind: none of the processes, so a device or the network "),
        ("saves_for_ever", None, "no progress for 4 s, behind: process 1 on HOST, saving at step 8\n"),
        ("fails_with_another_dead", 2, "process 2 on HOST is dead, last seen "),
    ],
)
def test_all_end_and_name_the_one(scenarios, scenario, lost, reason):
    assert_all_name(scenarios[0][scenario], reason, but=lost)


def test_stacks_are_kept(scenarios):
    _, folder = scenarios
    for index, place in ((0, "hangs_in_its_input"), (1, "in wait")):
        stacks = (folder / "hangs_in_its_input" / "processes" / f"{index}.stacks.txt").read_text()
        assert place in stacks and "most recent call first" in stacks


def test_an_error_is_told_with_the_loss_that_explains_it(scenarios):
    for index in (0, 1):
        printed = scenarios[0]["fails_with_another_dead"][index][1]
        assert "RuntimeError: connection reset;" in printed and "Traceback" not in printed


def test_an_error_of_its_own_goes_its_way(scenarios):
    for code, printed in scenarios[0]["fails_like_all"]:
        assert code == 1 and printed.rstrip().endswith("RuntimeError: its own fault") and "ends:" not in printed
    first, second, failed = scenarios[0]["fails_alone"]
    assert failed[0] == 1 and "ends:" not in failed[1]
    for code, printed in (first, second):
        assert code == AGAIN and "process 2 on " in printed and "RuntimeError: its own fault" in printed


@pytest.mark.parametrize("scenario", ["saves_slowly", "evaluates_long", "paused", "unwatched"])
def test_slow_is_not_hung(scenarios, scenario):
    assert scenarios[0][scenario] == [[0, ""]] * 3


def test_a_process_that_goes_its_own_way_blames_itself(scenarios):
    for index, (code, printed) in enumerate(scenarios[0]["alone_hanging"]):
        assert code == AGAIN and printed.count(f"process {index} on ") == 2
        assert not any(f"process {other} on " in printed for other in range(3) if other != index)
