"""Run a program as several CPU processes of one run on this machine; when one is lost, stop all and start again.

python launch/processes.py COUNT RESTARTS ARGUMENTS_OF_PYTHON... (called by launch/local.sh) ends with 0 when all did,
else with the code of the first that did not (128 + n for signal n). After 75 (the run saved itself) and after a death
by signal all are started again, RESTARTS times at most. stderr is shared: each message is one write, unlike print's.
"""

import contextlib
import os
import signal
import socket
import sys
import time
from subprocess import Popen

GRACE = float(os.environ.get("GRACE") or 60)  # seconds from SIGTERM to SIGKILL: time to save
stop_requests: list[int] = []


def start(count: int, arguments: list[str]) -> list[Popen]:
    """Start the program `count` times, connected to each other by a free port of this machine."""
    command = [sys.executable, *arguments]
    if count == 1:
        return [Popen(command)]
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    shared = {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    return [Popen(command, env={**os.environ, **shared, "JAX_PROCESS_ID": str(number)}) for number in range(count)]


def run(processes: list[Popen]) -> int:
    """Wait for the processes, stop all when one fails or a signal arrives, and return the exit code of the run."""
    code, deadline = 0, float("inf")
    while None in [process.poll() for process in processes]:
        if deadline == float("inf") and (stop_requests or any(process.returncode for process in processes)):
            code, deadline = explain(processes), time.monotonic() + GRACE
            [process.terminate() for process in processes]
        if time.monotonic() > deadline:
            [process.kill() for process in processes]
        time.sleep(0.1)
    return code or explain(processes)


def explain(processes: list[Popen]) -> int:
    """Return the exit code of the process that failed; a signal (negative here) explains errors of the others."""
    ended = [(process.returncode, number) for number, process in enumerate(processes) if process.returncode]
    code, number = min(ended, default=(0, 0))
    code = 128 - code if code < 0 else code
    if code and len(processes) > 1:
        report(f"process {number} of {len(processes)} ended with exit code {code}; all are stopped\n")
    return code


def report(text: str) -> None:
    """Write to stderr; a full disk or a closed pipe does not stop the processes."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


if __name__ == "__main__":
    count, restarts, arguments = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda number, frame: stop_requests.append(number))
    code = run(start(count, arguments))
    while not stop_requests and restarts and (code == os.EX_TEMPFAIL or code > 128):
        restarts -= 1
        report(f"ended with exit code {code}: starting again, {restarts} restarts left\n")
        code = run(start(count, arguments))
    sys.exit(code)
