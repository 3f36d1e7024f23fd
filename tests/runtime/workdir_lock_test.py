"""One run in a workdir at a time: real processes that hold it, end, or are killed."""

import fcntl
import os
import pwd
import signal
import socket
import subprocess
import sys
import threading

import pytest
from paths import ROOT

from beitv2_jax.errors import UserError
from beitv2_jax.runtime import workdir_lock

HOLD = """
import sys, time
from beitv2_jax.runtime.workdir_lock import held
with held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    with (
        pytest.raises(UserError, match=f"process {first.pid} on {socket.gethostname()}") as caught,
        workdir_lock.held(tmp_path),
    ):
        pass
    assert str(tmp_path) in caught.value.happened and caught.value.meant and "--workdir" in caught.value.instead
    first.send_signal(signal.SIGKILL)
    first.communicate()
    with workdir_lock.held(tmp_path):
        assert (tmp_path / "lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(UserError), workdir_lock.held(tmp_path):
            pass
    with workdir_lock.held(tmp_path):
        pass


@pytest.mark.parametrize("let_go_after", [0.2, None])
def test_the_lock_of_a_lost_machine_is_waited_for(tmp_path, monkeypatch, let_go_after):
    monkeypatch.setattr(workdir_lock, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(workdir_lock, "PATIENCE_SECONDS", 30.0 if let_go_after else 0.1)
    with open(tmp_path / "lock", "w") as file:
        file.write("process 7 on elsewhere")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        if let_go_after:
            timer = threading.Timer(let_go_after, fcntl.flock, (file, fcntl.LOCK_UN))
            timer.start()
            with workdir_lock.held(tmp_path):
                assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")
            timer.join()
        else:
            with pytest.raises(UserError, match="process 7 on elsewhere"), workdir_lock.held(tmp_path):
                pass


def test_without_locks_the_run_goes_on_with_a_warning(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with workdir_lock.held(tmp_path):
        pass
    assert "file system without locks" in caplog.text


def test_only_process_0_holds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir_lock.jax, "process_index", lambda: 3)
    with workdir_lock.held(tmp_path), workdir_lock.held(tmp_path):
        assert not (tmp_path / "lock").exists()


def test_the_lock_file_of_another_user_is_told(tmp_path, monkeypatch):
    (tmp_path / "lock").touch()
    owner = pwd.getpwuid(os.getuid()).pw_name

    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(workdir_lock, "open", refuse, raising=False)
    with pytest.raises(UserError, match=f"belongs to user {owner}") as caught, workdir_lock.held(tmp_path):
        pass
    assert f"chmod -R a+rwX {tmp_path}" in caught.value.instead
