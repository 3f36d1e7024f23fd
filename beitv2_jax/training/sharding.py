"""Where every array lives: the mesh, a table from parameter names to partition specs, and the activations' rules.

Used by everything that compiles or places arrays; models only say logical axis names and know no mesh.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import jax
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from beitv2_jax.errors import UserError
from beitv2_jax.typing import PyTree

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
ALL_DEVICES = "--config.mesh.data=-1 --config.mesh.fsdp=1 --config.mesh.tensor=1"
"""Flags of the mesh that fits any number of devices, for errors."""

# Matched against the end of a leaf's path, so that the optimizer's moments follow their parameters. First match wins.
PARTITION_RULES: tuple[tuple[str, P], ...] = (
    (r"(qkv|fc1)/kernel", P("fsdp", "tensor")),
    (r"(proj|fc2)/kernel", P("tensor", "fsdp")),
    (r"((\w+_)?head|projection)/kernel", P("fsdp", "tensor")),
    # of the segmentation model: rows, columns, in, out
    (r"(conv|fpn2|up_\d)/kernel", P(None, None, "fsdp")),
    (r"(patch_embed/(conv_\d/)?|classes/)kernel", P()),
    (r"bias|q_bias|v_bias|scale|gamma_\d|cls_token|mask_token|register_tokens|pos_embed|table|quantizer/\w+", P()),
)

ACTIVATION_RULES = (("batch", BATCH_AXES), ("length", None), ("width", None))


def path_name(path: tuple) -> str:
    """Return a leaf's key path as text, "blocks_0/attn/qkv/kernel": the form in which rules and masks see it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange the devices in a mesh with axes `data`, `fsdp`, `tensor`; -1 (one axis at most) takes what is left.

    Sizes whose product is smaller than the number of devices use the first devices only. Several slices of TPUs share
    the data axis: its first part lies on the first slice, and so on.

    Args:
        devices: by default those of all processes.

    Raises:
        UserError: the devices cannot be arranged so.
    """
    devices = devices or jax.devices()
    sizes = mesh_sizes(len(devices), data, fsdp, tensor)
    devices = devices[: math.prod(sizes.values())]
    axis_types = (AxisType.Auto,) * len(AXES)
    # what GPUs and CPUs call slices are hosts, whose order is right as it is
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices == 1:
        return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=axis_types, devices=devices)
    if sizes["data"] % slices:
        raise UserError(
            f"data={sizes['data']} cannot be divided over {slices} slices.",
            "The axes fsdp and tensor stay inside a slice, because the network between slices is slow.",
            f"Write a --config.mesh.data that is a multiple of {slices}.",
        )
    arranged = mesh_utils.create_hybrid_device_mesh(
        (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"]),
        (slices, 1, 1),
        devices,
        allow_split_physical_axes=True,
    )
    return Mesh(arranged, AXES, axis_types=axis_types)


def mesh_sizes(have: int, data: int = -1, fsdp: int = 1, tensor: int = 1) -> dict[str, int]:
    """Return the sizes of the axes of a mesh over `have` devices, as `make_mesh` takes them; raises as it does."""
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    known = math.prod(size for size in sizes.values() if size != -1)
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    wanted = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    if len(open_axes) > 1 or known < 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(
            f"The mesh {wanted} is not valid.",
            "Sizes must be at least 1, and at most one of them may be -1.",
            f"Write {ALL_DEVICES} for data parallelism over all devices.",
        )
    if known > have or (open_axes and have % known):
        raise UserError(
            f"The mesh {wanted} does not fit {have} device(s).",
            "Did you write this config for another machine?",
            f"Choose sizes whose product divides {have}, such as {ALL_DEVICES}.",
        )
    for axis in open_axes:
        sizes[axis] = have // known
    return sizes


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that is whole on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: leading axis over `data` and `fsdp`, the rest whole."""
    return NamedSharding(mesh, P(BATCH_AXES))


def param_shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """Return the tree of shardings that PARTITION_RULES give a tree of arrays or shapes, by their paths.

    A dimension that its mesh axis does not divide, and a leaf that no rule names, stays whole.
    """

    def one(path, leaf) -> NamedSharding:
        spec = _rule(path_name(path)) or P()
        axes = [
            axis if axis and leaf.shape[i] % mesh.shape[axis] == 0 else None
            for i, axis in enumerate(spec[: len(leaf.shape)])
        ]
        return NamedSharding(mesh, P(*axes))

    return jax.tree_util.tree_map_with_path(one, tree)


def placed_shapes(tree: PyTree, shardings: PyTree) -> PyTree:
    """Return the shapes and dtypes of a tree of arrays or shapes, with these shardings."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree, shardings
    )


def unmatched(tree: PyTree) -> list[str]:
    """Return the paths of the leaves that no rule names (they are replicated), to be shown in the log."""
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [path for path in paths if _rule(path) is None]


def check_micro_batches(batch_size: int, sizes: Mapping[str, int], accumulation_steps: int) -> None:
    """Check that a mesh of these sizes can cut its share of a batch into `accumulation_steps` equal parts.

    Raises:
        UserError: some device's share cannot be cut so.
    """
    share, rest = divmod(batch_size, math.prod(sizes[axis] for axis in BATCH_AXES))
    if rest == 0 and share % accumulation_steps:
        fitting = [steps for steps in range(1, share + 1) if share % steps == 0]
        raise UserError(
            f"The {share} rows that each device has of a batch of {batch_size} cannot be divided into "
            f"{accumulation_steps} micro-batches.",
            "Did you choose efficiency.accumulation_steps for another batch size or number of devices?",
            "Write --config.efficiency.accumulation_steps="
            f"{min(fitting, key=lambda steps: abs(steps - accumulation_steps))}.",
        )


def row_share(mesh: Mesh) -> tuple[int, int]:
    """Return (index, count): which of how many equal shares of each batch the devices of this process hold.

    There are as many shares as processes, unless `tensor` spans several: these hold the same rows, so each reads them.

    Raises:
        UserError: the mesh has no device of this process.
    """
    places = mesh.devices.reshape(-1, mesh.shape["tensor"])
    held = {device.process_index: set() for device in mesh.devices.flat}
    for row, devices in enumerate(places):
        for device in devices:
            held[device.process_index].add(row)
    if jax.process_index() not in held:
        raise UserError(
            f"The mesh of {mesh.size} devices has none of process {jax.process_index()}.",
            "Did you write this config for fewer machines?",
            f"Choose mesh sizes whose product is {jax.device_count()}, such as {ALL_DEVICES}.",
        )
    shares = sorted({tuple(sorted(rows)) for rows in held.values()})
    return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)


def check_rows(rows: int, mesh: Mesh) -> None:
    """Check that a global batch of so many rows can be divided over a mesh.

    Raises:
        UserError: it cannot.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise UserError(
            f"A batch of {rows} rows cannot be divided over {parts} devices (data x fsdp).",
            "Did you choose the batch size for another number of devices?",
            f"Choose a batch size that is a multiple of {parts}, or a smaller --config.mesh.data.",
        )


def place_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Put this process's host rows, its `row_share`, on the devices as one global batch; `faults`, words, stay behind.

    Raises:
        UserError: the rows cannot be divided evenly over the devices that share them.
    """
    sharding = batch_sharding(mesh)
    batch = {name: rows for name, rows in batch.items() if name != "faults"}
    _, shares = row_share(mesh)
    for rows in {leaf.shape[0] * shares for leaf in jax.tree.leaves(batch)}:
        check_rows(rows, mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def place_weights(tree: PyTree, mesh: Mesh) -> PyTree:
    """Put weights on the devices, each leaf as PARTITION_RULES say."""
    return jax.device_put(tree, param_shardings(tree, mesh))


@contextlib.contextmanager
def activation_rules(mesh: Mesh) -> Iterator[None]:
    """Give the models' logical axis names (`batch`, `length`, `width`) their meaning on this mesh while tracing.

    Without it XLA may keep activations whole on every device, which makes `fsdp` useless.
    """
    with jax.set_mesh(mesh), nn.logical_axis_rules(ACTIVATION_RULES):
        yield


def _rule(name: str) -> P | None:
    return next((spec for pattern, spec in PARTITION_RULES if re.search(rf"(^|/)({pattern})$", name)), None)
