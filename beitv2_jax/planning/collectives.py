"""Find the collectives of a compiled program: their kinds, their bytes, and the devices that take part.

Every device runs the same program, whose collectives name devices by their index in the flattened `mesh.devices`.
"""

import dataclasses
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from beitv2_jax.planning.program import Array, Instruction, Program, numbers, width

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_BETWEEN_SLICES = {"ALL_REDUCE": "all-reduce", "ONE_TO_ONE": "collective-permute"}
Groups = tuple[tuple[int, ...], ...]

_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\([^)]*\))?)\))? ?\{([^}]*)\}")
_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
        kind: one of `KINDS`.
        arrays: (element type, shape) of each result on one device; the compiler combines many collectives into one.
        groups: the devices that exchange with each other; for a permutation (source, target) pairs.
        count: how often a step runs it, above 1 inside loops.
    """

    kind: str
    arrays: tuple[Array, ...]
    groups: Groups
    count: int = 1

    @property
    def dtypes(self) -> dict[str, int]:
        """Return `bytes` by element type."""
        # the result of a scatter is one part of its operand
        factor = len(self.groups[0]) if self.kind == "reduce-scatter" else 1
        summed: dict[str, int] = defaultdict(int)
        for dtype, shape in self.arrays:
            summed[dtype] += math.prod(shape) * width(dtype) * factor
        return dict(summed)

    @property
    def bytes(self) -> int:
        """Return the bytes that are reduced, gathered or scattered on one device."""
        return sum(self.dtypes.values())

    def axes(self, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
        """Return the axes of the mesh along which the devices of a group differ, in the mesh's order."""
        sizes = tuple(mesh_shape.values())
        varying = set()
        for group in self.groups:
            places = np.array(np.unravel_index(group, sizes))
            varying |= {name for name, row in zip(mesh_shape, places, strict=True) if len(set(row.tolist())) > 1}
        return tuple(name for name in mesh_shape if name in varying)


def find_collectives(program: Program, num_devices: int, num_slices: int = 1) -> list[Collective]:
    """Return the collectives of a compiled program in the order of its text, without those of a single device.

    Args:
        num_devices: of all slices.
        num_slices: with several slices, what goes between them is sent to the hosts; those transfers are found too.
    """
    per_slice = num_devices // num_slices
    found = []
    for name, lines in program.computations.items():
        for line in lines:
            kind = _kind(line)
            if kind is None:
                continue
            between = line.opcode == "send"
            groups = _slice_groups(line, kind, per_slice, num_slices) if between else _groups(line.rest, per_slice)
            if all(len(set(group)) < 2 for group in groups):
                continue
            arrays = line.arrays[:1] if between else _arrays(kind, line.opcode.endswith("-start"), line.arrays)
            found.append(Collective(kind, arrays, groups, program.times[name]))
    return found


def _kind(line: Instruction) -> str | None:
    """Return which of KINDS an operation is or starts, None if it is no collective."""
    if line.opcode == "send":
        transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', line.rest)
        # of another kind only what is sent is known: it crosses the network once
        return _BETWEEN_SLICES.get(transfer[1], "all-to-all") if transfer else None
    kind = line.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _slice_groups(line: Instruction, kind: str, per_slice: int, num_slices: int) -> Groups:
    """Return which devices exchange between slices: those of the same index in each slice, or pairs.

    A device is written there as 100000 times its slice, counted from 1, plus its index in the slice.
    """
    if kind == "collective-permute":
        pairs = re.findall(r"(\d+)->(\d+)", line.rest)
        place = lambda device: (int(device) // 100_000 - 1) * per_slice + int(device) % 100_000  # noqa: E731
        return tuple((place(source), place(target)) for source, target in pairs)
    return _rows(np.arange(num_slices * per_slice).reshape(num_slices, per_slice).T)


def totals(collectives: Iterable[Collective]) -> dict[str, dict[str, Any]]:
    """Return {kind: {"count", "bytes", "bytes_by_type"}} of one step on one device."""
    sums: dict[str, dict[str, Any]] = defaultdict(lambda: {"count": 0, "bytes": 0, "bytes_by_type": defaultdict(int)})
    for collective in collectives:
        total = sums[collective.kind]
        total["count"] += collective.count
        total["bytes"] += collective.count * collective.bytes
        for dtype, size in collective.dtypes.items():
            total["bytes_by_type"][dtype] += collective.count * size
    return {kind: {**total, "bytes_by_type": dict(total["bytes_by_type"])} for kind, total in sums.items()}


def _arrays(kind: str, start: bool, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """Return the results of a collective among all that its start operation returns."""
    if start and kind == "collective-permute":
        return arrays[1:2]  # (operand, result, contexts)
    if start and kind != "all-reduce":
        return arrays[len(arrays) // 2 :]  # (operands, results)
    return arrays


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
        return _rows(_iota(source or shape, order).reshape(numbers(shape)))
    listed = re.match(r"\{((?:\{[\d,]*\},?)*)\}", written)
    groups = tuple(tuple(numbers(group)) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    return groups or everyone


def _mesh_groups(match: re.Match) -> Groups:
    """Return the groups of `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`: devices that differ in the named axes.

    `'b':(2)2` names a factor of an axis: the second one of 'b' split into 2 x 2 x rest.
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
        ids = _iota(iota[1], iota[3]) if iota else np.array(numbers(devices))
    flat = [(name, i) for name, cut in cuts.items() for i in range(len(cut))]
    inside = [place for place, (name, i) in enumerate(flat) if i in chosen[name]]
    outside = [place for place in range(len(flat)) if place not in inside]
    shaped = ids.reshape([size for cut in cuts.values() for size in cut])
    size = math.prod(shaped.shape[place] for place in inside)
    return _rows(shaped.transpose(outside + inside).reshape(-1, size))


def _iota(shape: str, order: str | None) -> np.ndarray:
    """Return the indices that `[4,2]T(1,0)` lists: counted from 0, reshaped, transposed, flattened."""
    sizes = numbers(shape)
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return (ids.transpose(numbers(order)) if order else ids).reshape(-1)


def _rows(array: np.ndarray) -> Groups:
    return tuple(tuple(row) for row in array.tolist())
