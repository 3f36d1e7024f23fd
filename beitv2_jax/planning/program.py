"""Read a compiled program's text: its computations, how often a step runs each, its products and its memory access.

The text is that of `compiled.as_text()`. It is parsed here because jaxlib offers no other access: its `HloInstruction`
has a name, an opcode and operands, but neither shapes nor attributes nor called computations, and the serialized
`HloModuleProto` needs a schema that no dependency of this project installs. `compiled.cost_analysis()` counts the body
of a loop once, and takes arrays that stay in a TPU's on-chip memory for memory access. Whatever jax does offer in
structured form, such as `memory_analysis()`, is read there.
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
_ON_CHIP = re.compile(_SHAPE.pattern + r"\{[^}]*S\([1-9]\d*\)[^}]*\}")
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
    """One line of a computation, `name = result opcode(rest`; `result` is the text of its type."""

    name: str
    result: str
    opcode: str
    rest: str

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays that it returns: one, or those of a tuple."""
        return tuple((dtype, numbers(dims)) for dtype, dims in _SHAPE.findall(self.result))

    @property
    def memory_arrays(self) -> tuple[Array, ...]:
        """Those of `arrays` that are in the device's memory, not in on-chip memory."""
        return tuple((dtype, numbers(dims)) for dtype, dims in _SHAPE.findall(_ON_CHIP.sub("", self.result)))

    @property
    def operands(self) -> list[str]:
        """Names of the instructions whose results it reads."""
        return re.findall(r"%([\w.-]+)", self.rest.split(")", 1)[0])

    def attribute(self, name: str) -> str:
        """Return the value of an attribute without its braces; '' if it is not there."""
        match = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|([^,\s]+))", self.rest)
        return (match[1] or match[2] or "").lstrip("%") if match else ""


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name; that of the entry is ''.

    `times` is how often a step runs each. The body of a loop whose length the text does not state counts once.
    `fused` are the computations inside of fusions, whose results never reach the memory.
    """

    computations: Mapping[str, Sequence[Instruction]]
    times: Mapping[str, int]
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
    times, fused = _times(computations)
    return Program(computations, times, frozenset(fused))


def product_flops(program: Program) -> int:
    """Return the FLOPs of the matrix products and convolutions that a step runs on one device, in all rounds of loops.

    Those of a kernel are what it states itself.
    """
    return sum(flops_by_type(program).values())


def flops_by_type(program: Program) -> dict[str, int]:
    """Return what `product_flops` sums, by the element types of the factors; kernels have a row of their own."""
    found: dict[str, int] = defaultdict(int)
    for name, lines in program.computations.items():
        for types, flops in _products(lines):
            found[types] += program.times[name] * flops
    return dict(found)


def memory_bytes(program: Program) -> int:
    """Return the bytes that a step reads from and writes to the device's memory, with all rounds of loops."""
    total = 0
    for name, lines in program.computations.items():
        if name not in program.fused:
            sizes = {line.name: array_bytes(line.memory_arrays) for line in lines}
            total += program.times[name] * sum(moved_bytes(line, sizes, program) for line in lines)
    return total


def array_bytes(arrays: Iterable[Array]) -> int:
    """Return the bytes of arrays."""
    return sum(math.prod(shape) * width(dtype) for dtype, shape in arrays)


def width(dtype: str) -> int:
    """Return the bytes of one element of a type, at least 1."""
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return max(1, bits // 8)


def numbers(text: str) -> tuple[int, ...]:
    """Return the integers in a text."""
    return tuple(int(number) for number in re.findall(r"\d+", text))


def _times(computations: Mapping[str, Sequence[Instruction]]) -> tuple[dict[str, int], set[str]]:
    """Return how often a step runs each computation, and those inside of fusions."""
    callers: dict[str, list[tuple[str, int]]] = defaultdict(list)
    fused: set[str] = set()
    for name, lines in computations.items():
        for line in lines:
            called = _CALLED.findall(line.rest)
            for branches in _BRANCHES.findall(line.rest):
                called += [("branch", branch.strip().lstrip("%")) for branch in branches.split(",")]
            rounds = _rounds(line, computations) if line.opcode == "while" else 1
            for how, other in called:
                callers[other].append((name, rounds))
                if line.opcode == "fusion" or (how == "to_apply" and line.opcode != "call"):
                    fused.add(other)
    times = {"": 1}

    def resolve(name: str) -> int:
        if name not in times:
            times[name] = sum(resolve(caller) * rounds for caller, rounds in callers[name])
        return times[name]

    for name in computations:
        resolve(name)
    return times, fused


def _rounds(loop: Instruction, computations: Mapping[str, Sequence[Instruction]]) -> int:
    """Return how often a loop runs: as the compiler notes, or by its condition, since jax's loops count up from 0.

    Where neither states it, it counts once.
    """
    if noted := _TRIPS.search(loop.rest):
        return int(noted[1])
    lines = {line.name: line for line in computations.get(loop.attribute("condition"), ())}
    last = list(lines.values())[-1] if lines else None
    if last is None or last.opcode != "compare" or last.attribute("direction") != "LT":
        return 1
    counter, bound = (lines[name] for name in last.operands)
    known = counter.opcode == "get-tuple-element" and bound.opcode == "constant"
    return int(numbers(bound.rest)[0]) if known else 1


def _products(lines: Sequence[Instruction]) -> Iterator[tuple[str, int]]:
    """Yield the element types of each product's factors and its FLOPs, 2 for each multiply-add.

    Products with the zeros of a padding are left out. A kernel has the type "kernels".
    """
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

    Where a fusion reads or writes a slice of an array, only the slice is moved: a loop reads and writes its round's
    part of an array that holds all rounds.
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
        # it returns both sides; the smaller one is moved, and counts for each side that is in the device's memory
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
        # None: the parameter is not the sliced array but an index or the slice that is written
        uses = {line.opcode if line.operands[0] == parameter.name else None for line in users}
        if uses == {"dynamic-slice"} and read[place]:
            read[place] = sum(sizes[line.name] for line in users)
        elif uses == {"dynamic-update-slice"}:
            read[place] = 0
            written += sum(sizes[line.operands[1]] - sizes[line.name] for line in users)
    return read, written
