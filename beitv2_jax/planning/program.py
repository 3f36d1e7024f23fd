"""Read a compiled program's text: its computations, how often a step runs each, and what its loops add to the costs.

Used by the plan of a run. A compiler's own count takes the body of a loop once; `missed_flops` says what it leaves out.
The text is what `compiled.as_text()` gives.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

Shape = tuple[int, ...]
Array = tuple[str, Shape]
"""Element type and shape."""

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+(?:e\d+m\d+\w*)?|c\d+)\[([\d,<=]*)\]")
_ELSEWHERE = re.compile(_SHAPE.pattern + r"\{[^}]*S\([1-9]\d*\)[^}]*\}")
_ESTIMATE = re.compile(r'"cost_estimate":\{"flops":"?(\d+)')
_LIBRARY = re.compile(r'custom_call_target="__cublas\$.*"lhs_contracting_dimensions":\[([^\]]*)\]')
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_CALLED = re.compile(r"(calls|to_apply|body|condition|called_computations)=\{?%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id"),
    *("while", "conditional", "call"),
)
"""Operations that move no bytes themselves."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = arrays opcode(operands), rest`; `result` is the text of its type."""

    name: str
    result: str
    opcode: str
    rest: str

    @property
    def arrays(self) -> tuple[Array, ...]:
        """What it yields: one array, or those of a tuple."""
        return tuple((dtype, numbers(dims)) for dtype, dims in _SHAPE.findall(self.result))

    @property
    def memory_arrays(self) -> tuple[Array, ...]:
        """Those of the arrays that stand in the device's memory, not in a core's own."""
        return tuple((dtype, numbers(dims)) for dtype, dims in _SHAPE.findall(_ELSEWHERE.sub("", self.result)))

    @property
    def operands(self) -> list[str]:
        """Names of what it reads."""
        return re.findall(r"%([\w.-]+)", self.rest.split(")", 1)[0])

    def attribute(self, name: str) -> str:
        """Return what stands after `name=`, without its braces; '' if it is not there."""
        match = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|([^,\s]+))", self.rest)
        return (match[1] or match[2] or "").lstrip("%") if match else ""


@dataclasses.dataclass(frozen=True)
class Program:
    """Hold computations by name, that of the entry is ''.

    `times` a step runs each; `unknown` stand in a loop whose length the text does not tell, and are counted once;
    `fused` are the insides of operations, whose results never reach the memory.
    """

    computations: Mapping[str, Sequence[Instruction]]
    times: Mapping[str, int]
    unknown: frozenset[str]
    fused: frozenset[str]


def read_program(text: str) -> Program:
    """Return the computations of a program and how often each runs."""
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] | None = None
    for line in text.splitlines():
        if line.startswith("}"):
            current = None
        elif current is not None:
            if match := _INSTRUCTION.match(line):
                current.append(Instruction(*match.groups()))
        elif match := _COMPUTATION.match(line):
            current = computations.setdefault("" if match[1] else match[2], [])
    times, unknown, fused = _times(computations)
    return Program(computations, times, frozenset(unknown), frozenset(fused))


def product_flops(program: Program) -> int:
    """Return the FLOPs of the matrix products and convolutions that a step runs on one device, loops and all.

    Those of a kernel are what it states itself.
    """
    return sum(program.times[name] * _flops(lines) for name, lines in program.computations.items())


def flops_by_type(program: Program) -> dict[str, int]:
    """Return what `product_flops` sums, by the element types of the factors; what kernels state stands apart."""
    found: dict[str, int] = defaultdict(int)
    for name, lines in program.computations.items():
        for types, flops in _products(lines):
            found[types] += program.times[name] * flops
    return dict(found)


def memory_bytes(program: Program) -> int:
    """Return the bytes that a step reads from and writes to the device's memory, loops and all.

    A TPU's compiler keeps many arrays in a core's own memory, and its count of bytes takes those in.
    """
    total = 0
    for name, lines in program.computations.items():
        if name not in program.fused:
            sizes = {line.name: array_bytes(line.memory_arrays) for line in lines}
            total += program.times[name] * sum(moved_bytes(line, sizes, program) for line in lines)
    return total


def missed_flops(program: Program) -> int:
    """Return the FLOPs of the products of a step beyond a count that takes the body of each loop once."""
    return sum(
        (program.times[name] - 1) * _flops(lines)
        for name, lines in program.computations.items()
        if program.times[name] > 1
    )


def array_bytes(arrays: Iterable[Array]) -> int:
    """Return the bytes of arrays."""
    return sum(math.prod(shape) * width(dtype) for dtype, shape in arrays)


def width(dtype: str) -> int:
    """Return the bytes of a number of an element type, at least 1."""
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return max(1, bits // 8)


def numbers(text: str) -> tuple[int, ...]:
    """Return the numbers in a text."""
    return tuple(int(number) for number in re.findall(r"\d+", text))


def _times(computations: Mapping[str, Sequence[Instruction]]) -> tuple[dict[str, int], set[str], set[str]]:
    """Return how often a step runs each computation, those in a loop of unknown length, and the insides of fusions."""
    callers: dict[str, list[tuple[str, int, bool]]] = defaultdict(list)
    fused: set[str] = set()
    for name, lines in computations.items():
        for line in lines:
            called = _CALLED.findall(line.rest)
            for branches in _BRANCHES.findall(line.rest):
                called += [("branch", branch.strip().lstrip("%")) for branch in branches.split(",")]
            rounds = _rounds(line, computations) if line.opcode == "while" else 1
            for how, other in called:
                callers[other].append((name, rounds or 1, rounds is None))
                if line.opcode == "fusion" or (how == "to_apply" and line.opcode != "call"):
                    fused.add(other)
    times = {"": 1}
    unknown: set[str] = set()

    def resolve(name: str) -> int:
        if name not in times:
            times[name] = sum(resolve(caller) * factor for caller, factor, _ in callers[name])
            if any(lost or caller in unknown for caller, _, lost in callers[name]):
                unknown.add(name)
        return times[name]

    for name in computations:
        resolve(name)
    return times, unknown, fused


def _rounds(loop: Instruction, computations: Mapping[str, Sequence[Instruction]]) -> int | None:
    """Return how often a loop runs: as the compiler notes, or by its condition, in which jax's loops count from 0 on.

    None where neither tells.
    """
    if noted := _TRIPS.search(loop.rest):
        return int(noted[1])
    lines = {line.name: line for line in computations.get(loop.attribute("condition"), ())}
    if not lines:
        return None
    last = list(lines.values())[-1]
    if last.opcode != "compare" or last.attribute("direction") != "LT":
        return None
    counter, bound = (lines[name] for name in last.operands)
    known = counter.opcode == "get-tuple-element" and bound.opcode == "constant"
    return int(numbers(bound.rest)[0]) if known else None


def _flops(lines: Sequence[Instruction]) -> int:
    """Return the FLOPs of one computation's own products, 2 a multiply-add; those with padding zeros are left out."""
    return sum(flops for _, flops in _products(lines))


def _products(lines: Sequence[Instruction]) -> Iterator[tuple[str, int]]:
    """Yield what the element types of each product's factors are, and its FLOPs; kernels have no types."""
    arrays = {line.name: line.arrays[0] for line in lines if line.arrays}
    for line in lines:
        library = _LIBRARY.search(line.rest)
        if line.opcode == "custom-call" and (stated := _ESTIMATE.search(line.rest)):
            yield "kernels", int(stated[1])
        if line.opcode not in ("dot", "convolution") and not library:
            continue
        (left_type, left), (right_type, right) = (arrays[name] for name in line.operands[:2])
        _, out = arrays[line.name]
        if line.opcode != "convolution":
            axes = numbers(library[1] if library else line.attribute("lhs_contracting_dims"))
            flops = 2 * math.prod(out) * math.prod(left[axis] for axis in axes)
        else:
            flops = _convolution_flops(line, left, right, out)
        yield " x ".join(sorted({left_type, right_type})), flops


def _convolution_flops(line: Instruction, left: Shape, right: Shape, out: Shape) -> int:
    """Return 2 x batch x output channels x input channels of a group x pairs of output and kernel places that meet."""
    inside, kernel, outside = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.rest).groups()
    window = dict(part.split("=") for part in line.attribute("window").split())
    per_axis = {name: values.split("x") for name, values in window.items()}
    products = out[outside.index("b")] * out[outside.index("f")] * right[kernel.index("i")]
    for axis in range(len(out) - 2):

        def setting(name: str, default: str = "1", axis=axis) -> int:
            return int(per_axis[name][axis].split("_")[0]) if name in per_axis else int(default)

        places = np.arange(out[outside.index(str(axis))]) * setting("stride") - setting("pad", "0")
        places = places[:, None] + np.arange(setting("size")) * setting("rhs_dilate")
        apart = setting("lhs_dilate")
        last = (left[inside.index(str(axis))] - 1) * apart
        products *= int(np.sum((places >= 0) & (places <= last) & (places % apart == 0)))
    return 2 * products


def moved_bytes(line: Instruction, sizes: Mapping[str, int], program: Program) -> int:
    """Return the bytes that an operation reads and writes; `sizes` are those of its computation's results.

    Of an array from which a fusion takes a slice, and of one into which it writes one, the slice alone is moved: so a
    loop reads and writes its round's part of what stands for all rounds.
    """
    if line.opcode in _FREE or line.opcode.endswith("-done"):
        return 0
    read, written = [sizes.get(name, 0) for name in line.operands], sizes[line.name]
    if line.opcode == "fusion":
        inner = program.computations[line.attribute("calls")]
        read, written = _fusion_bytes(inner, read, written)
    elif line.opcode == "dynamic-slice":
        read = [min(read[0], written)]
    elif line.opcode == "dynamic-update-slice":
        read, written = [read[1]], read[1]
    elif line.opcode in ("copy-start", "slice-start"):
        # it yields both sides; the smaller one is moved, and counts on each side that has a size here
        moved = min(array_bytes([array]) for array in line.arrays[:2])
        return sum(min(moved, array_bytes([array])) for array in line.memory_arrays)
    return sum(read) + written


def _fusion_bytes(inner: Sequence[Instruction], read: list[int], written: int) -> tuple[list[int], int]:
    """Return the bytes of each operand that a fusion reads, and those that it writes."""
    sizes = {line.name: array_bytes(line.arrays) for line in inner}
    read = list(read)
    for parameter in (line for line in inner if line.opcode == "parameter"):
        place = int(parameter.rest.split(")")[0])
        users = [line for line in inner if parameter.name in line.operands]
        # None: it is no array that is sliced, but an index or what is written
        uses = {line.opcode if line.operands[0] == parameter.name else None for line in users}
        if uses == {"dynamic-slice"} and read[place]:
            read[place] = sum(sizes[line.name] for line in users)
        elif uses == {"dynamic-update-slice"}:
            read[place] = 0
            written += sum(sizes[line.operands[1]] - sizes[line.name] for line in users)
    return read, written
