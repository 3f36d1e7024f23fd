"""Where the time of a step goes: a trace of some steps, and the operations that take most of it.

    python -m benchmarks.profile NAME --out=DIR [--quick] [--steps=N] [--top=N] [--set KEY=VALUE]

NAME is a step of `python -m benchmarks.run --list`, as mim_base_stored. The trace goes into DIR for XProf or Perfetto;
DIR/kernels.json and the table that is printed say what takes how much. On a GPU or TPU the operations are the kernels
of the device, on a CPU the calls of compiled operations, whose times overlap where several threads work.
"""

import argparse
import collections
import gzip
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from beitv2_jax.errors import UserError, print_error
from beitv2_jax.runtime.atomic_files import write_text
from benchmarks import cases
from benchmarks.run import change

DEVICE_LINES = ("Stream", "XLA Ops")
"""Parts of the names of the lines on which a device's own operations stand."""
_NUMBER = re.compile(r"(\.\d+|_\d+)+$")


class Operation(NamedTuple):
    """An operation of a step: its name without number, calls and seconds of a step, share of all operations' time."""

    name: str
    calls: float
    seconds: float
    share: float


def main(argv: Sequence[str] | None = None) -> None:
    """Trace a step, print the table and write both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the step")
    parser.add_argument("--out", required=True, help="folder of the trace")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--steps", type=int, default=5, help="steps that are traced")
    parser.add_argument("--top", type=int, default=20, help="operations shown")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the config")
    arguments = parser.parse_args(argv)
    options = {"quick": arguments.quick, "changes": dict(map(change, arguments.set)), "images": ""}
    step = cases.step_of(arguments.name, options)
    trace(step, Path(arguments.out), arguments.steps)
    found = operations(events_of(Path(arguments.out)), arguments.steps)
    described = {"name": arguments.name, "options": options, "environment": cases.describe(), "steps": arguments.steps}
    metrics = {**described, "operations": [operation._asdict() for operation in found]}
    write_text(Path(arguments.out) / "kernels.json", json.dumps(metrics, indent=1) + "\n")
    print(table(found[: arguments.top]))


def trace(step: Any, folder: Path, count: int) -> None:
    """Run some steps, warmed, and leave their trace in `folder`."""
    run = step.start(step.lowered.compile())
    for _ in range(2):
        jax.block_until_ready(run())
    with jax.profiler.trace(folder):
        for _ in range(count):
            outputs = run()
        jax.block_until_ready(outputs)


def events_of(folder: Path) -> list[dict[str, Any]]:
    """Return the events of the newest trace in `folder`.

    Raises:
        UserError: there is none.
    """
    found = sorted(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"{folder} holds no trace.", "the profiler wrote nothing", "another --out, or this one again")
    with gzip.open(found[-1], "rt") as file:
        return json.load(file)["traceEvents"]


def operations(events: Iterable[Mapping[str, Any]], steps: int) -> list[Operation]:
    """Return what a step runs, the longest first, from the events of a trace of `steps` steps."""
    events = list(events)
    lines = {
        (event["pid"], event.get("tid")): event["args"]["name"]
        for event in events
        if event.get("ph") == "M" and event["name"] == "thread_name"
    }
    processes = {
        event["pid"]: event["args"]["name"]
        for event in events
        if event.get("ph") == "M" and event["name"] == "process_name"
    }
    calls, microseconds = collections.Counter(), collections.Counter()
    for event in events:
        if event.get("ph") != "X":
            continue
        on_device = "/device:" in processes.get(event["pid"], "")
        line = lines.get((event["pid"], event.get("tid")), "")
        # a CPU's operations are the events that name the program they belong to
        if any(part in line for part in DEVICE_LINES) if on_device else "hlo_op" in event.get("args", {}):
            name = _NUMBER.sub("", event["name"])
            calls[name] += 1
            microseconds[name] += event.get("dur", 0)
    total = sum(microseconds.values())
    return [
        Operation(name, calls[name] / steps, spent / 1e6 / steps, spent / total if total else 0.0)
        for name, spent in microseconds.most_common()
    ]


def table(found: Sequence[Operation]) -> str:
    """Return operations as a Markdown table."""
    rows = [f"| {one.name} | {one.calls:g} | {1e3 * one.seconds:.3f} | {one.share:.1%} |" for one in found]
    return "\n".join(["| operation | calls a step | ms a step | share |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print_error(f"Error: {error}")
        sys.exit(2)
