"""Count a training step's work without running it: the FLOPs of the traced program, and bytes of shapes with shardings.

Knows nothing of the formulas of `planning.components`, which must give the same count.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.interpreters import partial_eval

from beitv2_jax.planning.parts import Component
from beitv2_jax.typing import PyTree


def traced_flops(function, *arguments: PyTree) -> int:
    """Trace `function` on arrays or shapes and count its matrix products over the whole global batch, loops and all.

    What nothing needs is left out, as a compiler does: the gradient of the pixels, for one. Of what differs between
    platforms, that of TPUs counts.
    """
    traced = jax.make_jaxpr(function)(*arguments).jaxpr
    needed, _ = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    return _count(needed)


def _count(jaxpr) -> int:
    counted = 0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            counted += _dot_flops(equation)
        elif name == "conv_general_dilated":
            counted += _conv_flops(equation)
        elif name == "scan":
            counted += parameters["length"] * _count(parameters["jaxpr"].jaxpr)
        elif name == "cond":
            counted += max(_count(branch.jaxpr) for branch in _branches(parameters))
        elif name == "pallas_call":
            counted += math.prod(parameters["grid_mapping"].grid) * _count(parameters["jaxpr"])
        else:
            counted += sum(_count(inner) for inner in _inner(parameters))
    return counted


def _branches(parameters: Mapping[str, Any]) -> list[Any]:
    """Return the branches that may run; of a choice by platform the TPU's, or that of all others."""
    branches, platforms = parameters["branches"], parameters.get("branches_platforms")
    if not platforms:
        return list(branches)
    named = [place for place, names in enumerate(platforms) if names is not None and "tpu" in names]
    return [branches[(named or [platforms.index(None)])[0]]]


def _inner(parameters: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the programs inside an operation: those of calls, derivatives and loops of unknown length (once)."""
    for value in parameters.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "jaxpr"):
                yield item.jaxpr
            elif hasattr(item, "eqns"):
                yield item


def _dot_flops(equation) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _conv_flops(equation) -> int:
    kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[numbers.rhs_spec[0]]


def device_bytes(tree: PyTree) -> int:
    """Return the bytes that a tree of shapes with shardings takes on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def temporary_bytes(parts: list[Component], images: float, params: PyTree, accumulation_steps: int = 1) -> int:
    """Estimate the temporary memory of a step on one device: gradients, what the forward pass keeps, and what is held.

    Of what is held for a while, the two widest are taken to be there together, as one follows on the other.

    Args:
        images: of one device.
        params: shapes with shardings; a gradient is as large as its parameter.
        accumulation_steps: parts of the batch that are done one after the other, their gradients added up.
    """
    gradients = device_bytes(params) * (1 if accumulation_steps == 1 else 2)
    held = sorted(part.held for part in parts)[-2:]
    return int(gradients + images / accumulation_steps * (sum(part.kept for part in parts) + sum(held)))
