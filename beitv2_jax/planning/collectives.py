"""Read the collectives out of a compiled program's text: what is exchanged, how many bytes, between which devices.

Used by the plan of a run. The text is what `compiled.as_text()` gives: one program that every device runs, whose
collectives name devices by their place in the mesh (the flattened order of `mesh.devices`).
"""

import dataclasses
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
Groups = tuple[tuple[int, ...], ...]

_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+(?:e\d+m\d+\w*)?|c\d+)\[([\d,<=]*)\]")
_OPERATION = re.compile(rf"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computations)=\{?%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\([^)]*\))?)\))? ?\{([^}]*)\}")
_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
        kind: one of `KINDS`.
        arrays: (element type, shape) of what it yields on one device; the compiler joins many exchanges in one.
        groups: the devices that exchange with each other; for a permutation (source, target) pairs.
        count: times a step runs it: above 1 inside loops.
        source: the traced operation that it comes from, as the program's metadata have it.
        loop_unknown: it stands in a loop whose length the program does not tell, and was counted once.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    groups: Groups
    count: int = 1
    source: str = ""
    loop_unknown: bool = False

    @property
    def dtypes(self) -> dict[str, int]:
        """Return the bytes of its largest side on one device by element type."""
        # what a scatter yields is one part of what there was before
        factor = len(self.groups[0]) if self.kind == "reduce-scatter" else 1
        summed: dict[str, int] = defaultdict(int)
        for dtype, shape in self.arrays:
            summed[dtype] += math.prod(shape) * _width(dtype) * factor
        return dict(summed)

    @property
    def bytes(self) -> int:
        """Return the bytes of its largest side on one device: what is reduced, gathered or scattered."""
        return sum(self.dtypes.values())

    def axes(self, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
        """Return the axes of the mesh along which the devices of a group differ, in the mesh's order."""
        sizes = tuple(mesh_shape.values())
        varying = set()
        for group in self.groups:
            places = np.array(np.unravel_index(group, sizes))
            varying |= {name for name, row in zip(mesh_shape, places, strict=True) if len(set(row.tolist())) > 1}
        return tuple(name for name in mesh_shape if name in varying)


def find_collectives(text: str, num_devices: int) -> list[Collective]:
    """Return the collectives of a compiled program in the order of its text, but those between no two devices.

    Args:
        text: of the optimised program.
        num_devices: that run it, which an operation without groups means.
    """
    computations = _split(text)
    times, unknown = _times(computations)
    found = []
    for name, lines in computations.items():
        for line in lines:
            match = _OPERATION.match(line)
            if match is None:
                continue
            _, result, kind, start = match.groups()
            groups = _groups(line, num_devices)
            if all(len(set(group)) < 2 for group in groups):
                continue
            source = re.search(r'op_name="([^"]*)"', line)
            found.append(
                Collective(
                    kind,
                    _arrays(kind, bool(start), result),
                    groups,
                    times[name],
                    source[1] if source else "",
                    name in unknown,
                )
            )
    return found


def totals(collectives: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """Return {kind: {"count", "bytes"}} of one step on one device."""
    sums: dict[str, dict[str, int]] = defaultdict(lambda: {"count": 0, "bytes": 0})
    for collective in collectives:
        sums[collective.kind]["count"] += collective.count
        sums[collective.kind]["bytes"] += collective.count * collective.bytes
    return dict(sums)


def _split(text: str) -> dict[str, list[str]]:
    """Return the lines of each computation by its name; that of the entry is ''."""
    computations: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in text.splitlines():
        if line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
        elif match := _COMPUTATION.match(line):
            current = computations.setdefault("" if match[1] else match[2], [])
    return computations


def _times(computations: Mapping[str, list[str]]) -> tuple[dict[str, int], set[str]]:
    """Return how often a step runs each computation, and those that stand in a loop of unknown length."""
    callers: dict[str, list[tuple[str, int, bool]]] = defaultdict(list)
    for name, lines in computations.items():
        for line in lines:
            is_loop = " while(" in line
            trips = _TRIPS.search(line)
            factor = int(trips[1]) if is_loop and trips else 1
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += [branch.strip().lstrip("%") for branch in branches.split(",")]
            for other in called:
                callers[other].append((name, factor, is_loop and not trips))
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
    return times, unknown


def _arrays(kind: str, start: bool, result: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return types and shapes of what a collective yields, from the text of its result's type."""
    arrays = tuple((dtype, tuple(_numbers(dims))) for dtype, dims in _SHAPE.findall(result))
    if start and kind == "collective-permute":
        return arrays[1:2]  # (operand, result, contexts)
    if start and kind != "all-reduce":
        return arrays[len(arrays) // 2 :]  # (operands, results)
    return arrays


def _width(dtype: str) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return max(1, bits // 8)


def _groups(line: str, num_devices: int) -> Groups:
    everyone = (tuple(range(num_devices)),)
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", line):
        return tuple(tuple(map(int, pair.split(","))) for pair in re.findall(r"\{([\d,]+)\}", pairs[1]))
    match = re.search(r"replica_groups=(.*)", line)
    if match is None:
        return everyone
    written = match[1]
    if written.startswith("mesh"):
        return _mesh_groups(_MESH.match(written))
    if written.startswith("["):
        shape, source, order = _IOTA.match(written).groups()
        return _rows(_iota(source or shape, order).reshape(_numbers(shape)))
    listed = re.match(r"\{((?:\{[\d,]*\},?)*)\}", written)
    groups = tuple(tuple(_numbers(group)) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    return groups or everyone


def _mesh_groups(match: re.Match) -> Groups:
    """Return the groups of `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`: devices that differ in the axes named.

    An axis may be named in part, `'b':(2)2` is the middle factor of 'b' cut as 2 x 2 x rest.
    """
    axes, devices, named = match.groups()
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.]+)'?=(\d+)", axes)}
    cuts = {name: (size,) for name, size in sizes.items()}
    chosen: dict[str, set[int]] = defaultdict(set)
    parts = re.findall(r"'([\w.]+)'(?::\((\d+)\)(\d+))?", named)
    for name in sizes:
        borders = {1, sizes[name]}
        for other, before, size in parts:
            if other == name and size:
                borders |= {int(before), int(before) * int(size)}
        edges = sorted(borders)
        cuts[name] = tuple(high // low for low, high in itertools.pairwise(edges)) or (1,)
        for other, before, size in parts:
            if other == name:
                low, high = (int(before), int(before) * int(size)) if size else (1, sizes[name])
                chosen[name] |= {i for i, edge in enumerate(edges[:-1]) if low <= edge < high}
    count = math.prod(sizes.values())
    ids = np.arange(count)
    if devices:
        iota = _IOTA.match(devices)
        ids = _iota(iota[1], iota[3]) if iota else np.array(_numbers(devices))
    flat = [(name, i) for name, cut in cuts.items() for i in range(len(cut))]
    inside = [place for place, (name, i) in enumerate(flat) if i in chosen[name]]
    outside = [place for place in range(len(flat)) if place not in inside]
    shaped = ids.reshape([size for cut in cuts.values() for size in cut])
    size = math.prod(shaped.shape[place] for place in inside)
    return _rows(shaped.transpose(outside + inside).reshape(-1, size))


def _iota(shape: str, order: str | None) -> np.ndarray:
    """Return the numbers from 0 that `[4,2]T(1,0)` lists: shaped, transposed, flat."""
    sizes = _numbers(shape)
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return (ids.transpose(_numbers(order)) if order else ids).reshape(-1)


def _rows(array: np.ndarray) -> Groups:
    return tuple(tuple(row) for row in array.tolist())


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
