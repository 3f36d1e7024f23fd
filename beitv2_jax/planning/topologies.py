"""Read the target of a plan (`v5e:16x16`, `v5p:64`, `v6e:16x16*2`, `h100:8`) and make the devices to compile for.

The devices are those of a topology, a description without hardware for which libtpu or the CUDA plugin compile.
"""

import dataclasses
import importlib.util
import math
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from beitv2_jax.errors import UserError
from beitv2_jax.planning.chips import Chip, Network, find_chip, grid_network, tpu_network

_TARGET = re.compile(r"([\w-]+):(\d+(?:x\d+)*)(?:\*(\d+))?")
PIP = {"tpu": "pip install -e '.[plan]'", "cuda": "pip install -e '.[plan-gpu]'"}
_PLUGIN = {"tpu": "libtpu", "cuda": "jax_plugins.xla_cuda13"}


@dataclasses.dataclass(frozen=True)
class Target:
    """A number of equal slices of one kind of chip; for GPUs a slice is a host and has one dimension."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def count(self) -> int:
        """Chips of all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def name(self) -> str:
        """The name that `parse` reads."""
        if self.chip.per_host:
            return f"{self.chip.name}:{self.count}"
        shape = "x".join(map(str, self.shape))
        return f"{self.chip.name}:{shape}" + (f"*{self.slices}" if self.slices > 1 else "")

    def network(self, devices: Sequence[jax.Device] | None = None) -> Network:
        """Return the network of the devices in their order; without devices, they are counted row by row."""
        if devices is None or self.chip.per_host:
            return grid_network(self.chip, self.shape, self.slices)
        return tpu_network(self.chip, self.shape, devices)


def parse(text: str) -> Target:
    """Read a target: a chip, then the shape of its slice or its number of chips, then '*' and the number of slices.

    A number of TPU chips means the slice of that size that is rented, or several of the largest one. A number of GPUs
    is a part of one host, or whole hosts.

    Raises:
        UserError: no such chip, no slice of that size, or another form.
    """
    match = _TARGET.fullmatch(text)
    if match is None:
        raise UserError(
            f"--plan={text} is not a target.",
            "Did you mean a chip with a number or a shape?",
            "Pass a target such as --plan=v5e:16x16 or --plan=h100:64.",
        )
    chip = find_chip(match[1])
    sizes, slices = tuple(map(int, match[2].split("x"))), int(match[3] or 1)
    if min(*sizes, slices) < 1:
        raise UserError(
            f"--plan={text} has no chips.",
            f"Did you mean {chip.name}:8?",
            f"Pass a target such as --plan={chip.name}:8.",
        )
    if chip.per_host:
        return _hosts(chip, math.prod(sizes) * slices)
    if len(sizes) == 1 < len(chip.shapes[0]):
        return _rented(chip, sizes[0], slices)
    if len(sizes) != len(chip.shapes[0]):
        example = "x".join(map(str, chip.shapes[-1]))
        raise UserError(
            f"A slice of {chip.name} has {len(chip.shapes[0])} dimensions, {match[2]} has {len(sizes)}.",
            f"Did you mean {chip.name}:{example}?",
            f"Pass --plan={chip.name}:{example}, or a number of chips such as --plan={chip.name}:8.",
        )
    return Target(chip, sizes, slices)


def chip_of(text: str) -> Chip:
    """Return the chip of a target, or of a kind given alone; raises as `parse` does."""
    return parse(text).chip if ":" in text else find_chip(text)


def _rented(chip: Chip, count: int, slices: int) -> Target:
    largest = chip.shapes[-1]
    shape = chip.shape_of(count)
    if shape is None and count % math.prod(largest) == 0:
        shape, slices = largest, slices * count // math.prod(largest)
    if shape is None:
        known = [math.prod(shape) for shape in chip.shapes]
        sizes = ", ".join(map(str, known))
        raise UserError(
            f"There is no slice of {count} chips of {chip.name}.",
            f"Did you mean {min(known, key=lambda size: abs(size - count))} chips?",
            f"Pass one of {sizes} chips or a multiple of the last, such as --plan={chip.name}:{known[-1]}.",
        )
    return Target(chip, shape, slices)


def _hosts(chip: Chip, count: int) -> Target:
    if count > chip.per_host and count % chip.per_host:
        raise UserError(
            f"{count} GPUs are not a whole number of hosts with {chip.per_host} GPUs each.",
            f"Did you mean {-(-count // chip.per_host) * chip.per_host} GPUs?",
            f"Pass --plan={chip.name}:{-(-count // chip.per_host) * chip.per_host}.",
        )
    per_host = min(count, chip.per_host)
    return Target(chip, (per_host,), count // per_host)


def is_installed(platform: str) -> bool:
    """Return whether the compiler of a platform is installed: libtpu, or the CUDA plugin."""
    try:
        return importlib.util.find_spec(_PLUGIN[platform]) is not None
    except ModuleNotFoundError:
        return False


def require(target: Target) -> None:
    """Raise UserError unless the compiler of the target's platform is installed."""
    platform = target.chip.platform
    if not is_installed(platform):
        raise UserError(
            f"The compiler for {target.chip.name} is missing: {_PLUGIN[platform].split('.')[-1]} is not installed.",
            "Did you mean to plan without compiling?",
            f"Pass --noplan_compile to estimate from the traced step, or install the compiler by {PIP[platform]}.",
        )


def devices(target: Target) -> list[jax.Device]:
    """Return the devices of a target's topology, for compiling only.

    Raises:
        UserError: the compiler is not installed, or knows no such topology.
    """
    require(target)
    chip = target.chip
    try:
        if chip.platform == "cuda":
            hosts, gpus = target.slices, target.shape[0]
            return topologies.get_topology_desc(
                platform="cuda", topology_name=chip.name, topology=f"1x{hosts}x{gpus}", target_config=gpu_target(chip)
            ).devices
        options = {"num_slices": target.slices} if target.slices > 1 else {}
        if chip.name == "v4":
            options["chip_config_name"] = "megacore"  # one device a chip
        if math.prod(target.shape) == 1:
            options["chips_per_host_bounds"] = (1,) * 3
        name = f"{chip.name}:" + "x".join(map(str, target.shape))
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except (ValueError, RuntimeError, NotImplementedError) as error:
        known = ", ".join("x".join(map(str, shape)) for shape in chip.shapes)
        raise UserError(
            f"The compiler has no topology {target.name}: {str(error).splitlines()[0].rstrip('.')}.",
            "Did you mean a slice that can be rented?",
            f"Pass a target with one of {known or '1 to 8 GPUs, or whole hosts'}, or pass --noplan_compile.",
        ) from error


_GPU_TARGETS = {
    # core_count, shared memory of a core, level 2 cache, clock in GHz, compute capability
    "h100": (132, 233472, 52428800, 1.98, (9, 0)),
    "h200": (132, 233472, 62914560, 1.98, (9, 0)),
    "a100": (108, 167936, 41943040, 1.41, (8, 0)),
}


def gpu_target(chip: Chip) -> str:
    """Return the description of a GPU that XLA compiles for when there is none: a text of `GpuTargetConfigProto`.

    Source: the properties that CUDA reports for these GPUs.
    """
    cores, shared, cache, clock, (major, minor) = _GPU_TARGETS[chip.name]
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32
          shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared - 1024}
          threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {128 if major == 9 else 64}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: {int(chip.hbm_rate)} l2_cache_size: {cache} clock_rate_ghz: {clock}
          device_memory_size: {int(chip.hbm_bytes)}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          cuda_compute_capability {{ major: {major} minor: {minor} }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 8 }}
        device_description_str: "NVIDIA {chip.name.upper()}"
    """


def rented(chip: Chip) -> list[Target]:
    """Return the targets of a chip that are rented, from one chip up."""
    if chip.per_host:
        return [_hosts(chip, count) for count in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    return [Target(chip, shape) for shape in chip.shapes if math.prod(shape) <= 256]
