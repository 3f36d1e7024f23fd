"""How fast each step and each part of it is: every measurement in a fresh process, warmed, with its spread.

    python -m benchmarks.run --out=FILE.json [--quick] [--only=NAME,...] [--rounds=N] [--set KEY=VALUE] [--images=DIR]
    python -m benchmarks.run --list
    python -m benchmarks.report FILE.json

`--quick` takes small sizes in float32 and is over in minutes on two cores; only its ratios mean anything. A file that
exists is added to if it was made on the same device with the same versions and options: what is measured again
replaces what stood there. `--rounds` goes through the list several times, so that what is compared meets the same
machine. `--set`, any number of times, changes a value of every config that has it, as in
`--set efficiency.attention=cudnn`. `--images` names a folder of JPEGs, with train/ and validation/, for the input;
without it some are made. `pace` is measured only where `--only` names it.

The steps and parts need jax, flax, optax and NumPy alone; `torch_*` need torch and transformers, `input` and `loop`
what reads data. What cannot run says why in the file.
"""

import argparse
import ast
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beitv2_jax.errors import UserError, did_you_mean, nearest, print_error
from beitv2_jax.runtime.atomic_files import write_text

TIMEOUT = 900
"""Seconds after which a measurement is given up."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the arguments name; return 1 if a measurement failed."""
    from benchmarks import cases

    arguments = parser().parse_args(argv)
    if arguments.list:
        for name, case in cases.CASES.items():
            print(f"{name:22}{case.what}{' (only where --only names it)' * case.only_named}")
        return 0
    if not arguments.out:
        parser().error("--out=FILE.json is missing")
    every = [name for name, case in cases.CASES.items() if not case.only_named]
    names = arguments.only.split(",") if arguments.only else every
    for name in names:
        if name not in cases.CASES:
            raise UserError(
                f"There is no benchmark '{name}'.",
                did_you_mean(name, cases.CASES),
                "--list shows all of them.",
            )
    check_changes(arguments)
    if arguments.child:
        result = cases.measure(names[0], options(arguments))
        write_text(arguments.out, json.dumps(result))
        return 0
    return measure_all(names, arguments)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", help="JSON file of the results")
    found.add_argument("--quick", action="store_true", help="small sizes, for a CPU")
    found.add_argument("--only", default="", help="names, separated by commas")
    found.add_argument("--rounds", type=int, default=1, help="times to go through the list")
    found.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the configs")
    found.add_argument("--images", default="", help="folder of JPEGs for the input")
    found.add_argument("--list", action="store_true", help="show the names and what they measure")
    found.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return found


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what a measurement is to know of the command line."""
    return {"quick": arguments.quick, "changes": dict(map(change, arguments.set)), "images": arguments.images}


def check_changes(arguments: argparse.Namespace) -> None:
    """Raise UserError where `--set` names a key that no recipe has."""
    from benchmarks.configs import known_keys

    for key in options(arguments)["changes"]:
        if key not in known_keys():
            raise UserError(
                f"No config has the key '{key}'.",
                did_you_mean(key, known_keys()),
                f"Write --set KEY=VALUE, such as --set {nearest(key, known_keys()) or 'run.batch_size'}=VALUE.",
            )


def change(text: str) -> tuple[str, Any]:
    """Return key and value of `KEY=VALUE`; a value that is no Python literal is text."""
    key, _, value = text.partition("=")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def measure_all(names: Sequence[str], arguments: argparse.Namespace) -> int:
    """Run every measurement in a process of its own and keep each result at once; return 1 if one failed."""
    described = {"options": options(arguments), "environment": environment()}
    out = Path(arguments.out)
    results = _known(out, described)
    fresh: set[str] = set()
    command = ["python", "-m", "benchmarks.run", *(sys.argv[1:] if sys.argv else [])]
    for round_number in range(arguments.rounds):
        for name in names:
            started = time.monotonic()
            result = in_a_process(name, arguments)
            result["wall_seconds"] = round(time.monotonic() - started, 1)
            results.setdefault(name, {"rounds": []})
            if name not in fresh:
                fresh.add(name)
                results[name] = {"rounds": []}
            results[name]["rounds"].append(result)
            write_text(
                out, json.dumps({**described, "command": " ".join(command), "results": results}, indent=1) + "\n"
            )
            print(f"{name:22}{_said(result)}  ({result['wall_seconds']:.0f} s, round {round_number + 1})", flush=True)
    return int(any("failed" in result for name in names for result in results[name]["rounds"]))


def in_a_process(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the result of one measurement; {"failed": why} where its process ended badly."""
    command = [sys.executable, "-m", "benchmarks.run", "--child", f"--only={name}", f"--images={arguments.images}"]
    command += ["--quick"] * arguments.quick + [f"--set={text}" for text in arguments.set]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        # memory is taken as it is needed, so that the peak is that of the step
        variables = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        try:
            done = subprocess.run(
                [*command, f"--out={out}"], capture_output=True, text=True, timeout=TIMEOUT, env=variables
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not over after {TIMEOUT} s"}
        if done.returncode or not out.exists():
            return {"failed": "\n".join(done.stderr.strip().splitlines()[-5:]) or f"exit code {done.returncode}"}
        return json.loads(out.read_text())


def environment() -> dict[str, Any]:
    """Return device, versions, processor and date, asked in a process of its own, which leaves the device free."""
    program = "import json; from benchmarks.cases import describe; print(json.dumps(describe()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _known(out: Path, described: dict[str, Any]) -> dict[str, Any]:
    """Return the results of a file that is added to.

    Raises:
        UserError: it was made on another device, with other versions or other options.
    """
    if not out.exists():
        return {}
    known = json.loads(out.read_text())
    for section, values in described.items():
        for key, value in values.items():
            if key != "date" and known[section].get(key) != value:
                raise UserError(
                    f"{out} was made with {key} {known[section].get(key)!r}, this run has {value!r}.",
                    "results that cannot be compared were to go into one file.",
                    "another --out.",
                )
    return known["results"]


def _said(result: dict[str, Any]) -> str:
    for word in ("failed", "skipped"):
        if isinstance(result.get(word), str):
            return f"{word}: {result[word]}"
    if "images_per_second" in result:
        rate = result["images_per_second"]
        return f"{rate['median']:.1f} images/s ({rate['low']:.1f} to {rate['high']:.1f})"
    if "implementations" in result:
        medians = {name: found["seconds"]["median"] for name, found in result["implementations"].items()}
        return ", ".join(f"{name} {1e3 * median:.2f} ms" for name, median in medians.items())
    return "measured"


def today() -> str:
    """Return the date as the results carry it."""
    return datetime.date.today().isoformat()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print_error(f"Error: {error}")
        sys.exit(2)
