"""What a compiler makes of a step: its operations by kind with counts and bytes. Nothing is run.

    python -m benchmarks.compiled NAME [--target=v5e:1] [--quick] [--set KEY=VALUE] [--top=N] [--text=FILE]

NAME is a step of `python -m benchmarks.run --list`, such as mim_base_stored, or a part and its implementation, such as
optimizer:reference.
TARGET is one chip as `--plan` names it, which need not be here (extra `plan` or `plan-gpu`); without it the step is
compiled for this machine. Bytes are those read from and written to the device's memory, not a core's own. --text keeps
the program.
"""

import argparse
import collections
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from beitv2_jax.errors import UserError, print_error
from beitv2_jax.planning import planner, topologies
from beitv2_jax.planning.program import (
    Instruction,
    Program,
    array_bytes,
    flops_by_type,
    memory_bytes,
    moved_bytes,
    read_program,
)
from beitv2_jax.report.page import markdown_table
from beitv2_jax.runtime.atomic_files import write_text
from benchmarks import cases
from benchmarks.run import change

PRODUCTS = {"dot", "convolution"}
LAYOUT = {"copy", "transpose", "reshape", "bitcast", "slice", "concatenate", "pad", "broadcast", "reverse"}
UNCOUNTED = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota"}
BETWEEN = {"copy-start", "slice-start"}
_SOURCE = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_NUMBER = re.compile(r"_\d+\b")
GIGA, TERA = 1e9, 1e12


class Operation(NamedTuple):
    """An operation of a program: its kind, what it yields, what it was traced from, its calls and bytes in a step."""

    kind: str
    result: str
    source: str
    calls: int
    bytes: int


def operations(program: Program) -> Iterator[Operation]:
    """Yield the operations of a program that move bytes to or from memory."""
    for name, lines in program.computations.items():
        if name in program.fused:
            continue
        sizes = {line.name: array_bytes(line.memory_arrays) for line in lines}
        for line in lines:
            if moved := moved_bytes(line, sizes, program):
                result = ", ".join(f"{dtype}[{','.join(map(str, shape))}]" for dtype, shape in line.arrays)
                source, calls = _SOURCE.search(line.rest), program.times[name]
                yield Operation(kind_of(line, program), result, source[1] if source else "", calls, calls * moved)


def kind_of(line: Instruction, program: Program) -> str:
    """Return the kind of an operation, by what it was fused from or by the kernel that it calls."""
    if line.opcode == "custom-call":
        return _TARGET.search(line.rest)[1]
    work = set(_opcodes(line, program)) - UNCOUNTED
    if work & PRODUCTS:
        return "products, with what is fused to them"
    if line.opcode in BETWEEN:
        return "to and from a core's own memory"
    if not work - LAYOUT:
        return "copies and transposes"
    if not work - LAYOUT - {"convert"}:
        return "conversions"
    return "sums, fused" if work & {"reduce", "reduce-window"} else "elementwise, fused"


def _opcodes(line: Instruction, program: Program) -> Iterator[str]:
    if line.opcode != "fusion":
        yield line.opcode
        return
    for inner in program.computations[line.attribute("calls")]:
        yield from _opcodes(inner, program)


def describe(compiled: Any, top: int) -> str:
    """Return the tables of a compiled program, with the `top` largest copies and conversions."""
    program, sizes = read_program(compiled.as_text()), compiled.memory_analysis()
    found, whole = list(operations(program)), memory_bytes(program)
    counted = (compiled.cost_analysis() or {}).get("bytes accessed", 0)
    calls, moved = collections.Counter(), collections.Counter()
    idle, idle_calls = collections.Counter(), collections.Counter()
    for one in found:
        calls[one.kind] += one.calls
        moved[one.kind] += one.bytes
        if one.kind in ("copies and transposes", "conversions"):
            place = one.result, "/".join(_NUMBER.sub("_N", one.source).split("/")[-3:])
            idle[place] += one.bytes
            idle_calls[place] += one.calls
    kinds = [
        (kind, str(calls[kind]), f"{size / GIGA:.2f}", f"{size / whole:.1%}") for kind, size in moved.most_common()
    ]
    products = ", ".join(f"{flops / TERA:.3f} {types}" for types, flops in sorted(flops_by_type(program).items()))
    largest = [(*place, str(idle_calls[place]), f"{size / GIGA:.3f}") for place, size in idle.most_common(top)]
    in_place = f"{sizes.alias_size_in_bytes / GIGA:.3f} of {sizes.output_size_in_bytes / GIGA:.3f} GB"
    lines = [
        f"memory traffic  {whole / GIGA:.2f} GB a step ({counted / GIGA:.2f} by the compiler, a core's own included)",
        f"temporaries     {sizes.temp_size_in_bytes / GIGA:.2f} GB",
        f"outputs         {in_place} in the place of arguments",
        f"products        {products or 'none in the text'} (TFLOPs, by the types of their factors)",
        "",
        markdown_table([("operations", "a step", "GB", "share"), *kinds]),
        "",
        markdown_table([("copied or converted alone", "traced from", "a step", "GB"), *largest]),
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Compile a step and print what it is made of."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the step, or part:implementation")
    parser.add_argument("--target", help="one chip, as v5e:1 or h100:1")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--top", type=int, default=10, help="copies and conversions shown")
    parser.add_argument("--text", help="file for the program's text")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the config")
    arguments = parser.parse_args(argv)
    options = {"quick": arguments.quick, "changes": dict(map(change, arguments.set)), "images": ""}
    compiler_options = {}
    if arguments.target:
        target = topologies.parse(arguments.target)
        planner.start_compilers()
        options["device"] = topologies.devices(target)[0]
        compiler_options = planner.COMPILER_OPTIONS[target.chip.platform]
    compiled = cases.lowered(arguments.name, options).compile(compiler_options=compiler_options)
    if arguments.text:
        write_text(Path(arguments.text), compiled.as_text())
    print(describe(compiled, arguments.top))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print_error(f"Error: {error}")
        sys.exit(2)
