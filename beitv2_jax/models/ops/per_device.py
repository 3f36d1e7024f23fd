"""Functions that every device runs on its own rows of the batch.

For what XLA does not partition by itself (a Pallas kernel) or partitions badly (a sum gathered in a loop). Models know
no mesh: the axes that the rows are spread over come from the table of logical names that `layers.constrain` reads.
"""

import math
from collections.abc import Callable, Sequence

import jax
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from beitv2_jax.typing import PyTree


def on_own_rows(
    function: Callable, rows: Sequence[jax.Array], whole: Sequence[jax.Array] = (), *, summed: bool = False
) -> PyTree:
    """Return `function(*rows, *whole)`, computed by every device on its part of the leading axis of `rows`.

    The outputs have the same leading axis, or with `summed` are sums over it, which are added up over the devices.
    Gradients pass; those of `whole` are sums over the devices. Where no mesh is set, or rows cannot be divided
    over it, every device computes everything.
    """
    mesh = jax.sharding.get_abstract_mesh()
    own = {axis for axis in mesh.axis_names if axis not in mesh.manual_axes}
    if math.prod(mesh.shape[axis] for axis in own) == 1:
        return function(*rows, *whole)
    axes = tuple(axis for axis in _batch_axes() if axis in own)
    if len(rows[0]) % math.prod(mesh.shape[axis] for axis in axes):
        axes = ()

    def on_one_device(*arrays):
        outputs = function(*arrays)
        return jax.lax.psum(outputs, axes) if summed and axes else outputs

    return jax.shard_map(
        on_one_device,
        in_specs=(P(axes),) * len(rows) + (P(),) * len(whole),
        out_specs=P() if summed else P(axes),
        axis_names=own,
        check_vma=False,
    )(*rows, *whole)


def _batch_axes() -> tuple[str, ...]:
    axes = nn.logical_to_mesh_axes(("batch",))[0]
    return (axes,) if isinstance(axes, str) else tuple(axes or ())
