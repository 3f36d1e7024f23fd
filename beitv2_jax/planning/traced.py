"""What a traced step costs, by component: FLOPs, saved residuals and live bytes, read from its jaxpr.

Nothing here knows the architecture. Flax writes the path of each module into the name stack of the equations that it
traces, and jax marks the backward pass there with `transpose(...)`; both are read back.

The step is traced for `PROBE_BATCH` images, a prime that divides no size of a network: an array whose size it divides
grows with the batch, any other does not. So one trace, which takes seconds, gives the cost of every batch size.
"""

import dataclasses
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Literal
from jax.interpreters import partial_eval

from beitv2_jax.typing import PyTree

PROBE_BATCH = 1009
OUTSIDE = "outside the modules"
"""Component of the operations that no module contains, such as those of a loss."""
RECOMPUTED = "recomputed"
"""Name under which `flops_by_component` counts the products that rematerialisation runs again."""

_TRANSFORM = re.compile(r"\b(?:jvp|transpose|vmap|checkpoint|remat)\(|\)")
_REMATTED = "rematted_computation"
_NUMBERED = re.compile(r"_\d+$")


@dataclasses.dataclass(frozen=True)
class Component:
    """One part of the network, named by its modules (repeated blocks together), with its cost for one image.

    Attributes:
        name: the path of its modules, such as `backbone/blocks`; of a network that is not trained, its class.
        parameters: trained numbers.
        flops: FLOPs of an image in one step, forward and backward: 2 for each multiply-add of a product or convolution.
        exact_flops: those of `flops` that are products at the highest precision, for which chips are slower.
        saved_bytes: residuals, which the forward pass saves for the backward pass.
        frozen: whether it is not trained.
    """

    name: str
    parameters: int = 0
    flops: float = 0.0
    exact_flops: float = 0.0
    saved_bytes: float = 0.0
    frozen: bool = False


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What one step costs.

    Attributes:
        product_bytes: bytes that the products and convolutions of an image read and write, weights left out.
        num_products: how many of them a step runs.
        live_images, live_weights: bytes that live at each moment of the forward and backward pass: of one image, and of
            what does not grow with the batch (gradients, and weights in another element type).
        output_sizes: numbers that each trained module yields in its forward products for one image, by its path.
    """

    components: tuple[Component, ...]
    product_bytes: float
    num_products: int
    live_images: np.ndarray
    live_weights: np.ndarray
    output_sizes: Mapping[str, float]

    @property
    def flops(self) -> float:
        """FLOPs of an image in one step."""
        return sum(component.flops for component in self.components)

    @property
    def exact_flops(self) -> float:
        """Those of `flops` that are products at the highest precision."""
        return sum(component.exact_flops for component in self.components)

    @property
    def parameters(self) -> int:
        """Trained numbers."""
        return sum(component.parameters for component in self.components)

    def peak_live_bytes(self, images: float, weights_fraction: float = 1.0) -> float:
        """Return the peak of the live bytes, with `images` and `weights_fraction` of the weights on a chip."""
        return float(np.max(images * self.live_images + weights_fraction * self.live_weights))


class Product(NamedTuple):
    """A matrix product or convolution, its name stack, and how many times it runs."""

    equation: Any
    stack: str
    times: int

    @property
    def flops(self) -> int:
        """FLOPs of all its runs."""
        count = _dot_flops if self.equation.primitive.name == "dot_general" else _convolution_flops
        return self.times * count(self.equation)

    @property
    def is_exact(self) -> bool:
        """Whether it multiplies float32 numbers in full precision."""
        precision = self.equation.params["precision"]
        pair = precision if isinstance(precision, tuple) else (precision,)
        return jax.lax.Precision.HIGHEST in pair and self.equation.invars[0].aval.dtype == np.float32


def step_cost(function, params: PyTree, *arguments: PyTree) -> StepCost:
    """Trace `function(*arguments)` for a batch of `PROBE_BATCH` images and return its cost; `params` are trained."""
    jaxpr = trace(function, *arguments)
    found = list(products(jaxpr))
    sizes: dict[str, float] = defaultdict(float)
    trained = _trained_roots(found)
    for product in found:
        if not _is_backward(product.stack) and _root(product.stack) in trained:
            path = "/".join(_modules(product.stack))
            sizes[path] = max(sizes[path], product.equation.outvars[0].aval.size / PROBE_BATCH)
    return StepCost(
        _components(found, _saved_bytes(jaxpr), params, trained),
        sum(p.times * _image_bytes([*p.equation.invars, *p.equation.outvars]) for p in found),
        sum(product.times for product in found),
        *_live_bytes(jaxpr),
        dict(sizes),
    )


def traced_flops(function, *arguments: PyTree) -> int:
    """Return the FLOPs of the products and convolutions of `function(*arguments)`, in all rounds of its loops."""
    return sum(product.flops for product in products(trace(function, *arguments)))


def flops_by_component(function, *arguments: PyTree) -> dict[str, int]:
    """Return `traced_flops` by component; what rematerialisation runs again is counted under `RECOMPUTED`."""
    found = list(products(trace(function, *arguments)))
    trained = _trained_roots(found)
    sums: dict[str, int] = defaultdict(int)
    for product in found:
        name = RECOMPUTED if _REMATTED in product.stack else _component(product.stack, trained)
        sums[name] += product.flops
    return dict(sums)


def trace(function, *arguments: PyTree):
    """Return the jaxpr of `function` on arrays or shapes, without what no output needs, as a compiler leaves it out."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def products(jaxpr, stack: str = "", times: int = 1) -> Iterator[Product]:
    """Yield the products of a jaxpr and of all jaxprs inside it; of a `cond`, those of the most expensive branch."""
    for equation in jaxpr.eqns:
        name, inner_stack = equation.primitive.name, f"{stack}/{equation.source_info.name_stack}"
        if name in ("dot_general", "conv_general_dilated"):
            yield Product(equation, inner_stack, times)
        elif name == "cond":
            branches = [list(products(branch.jaxpr, inner_stack, times)) for branch in _branches(equation.params)]
            yield from max(branches, key=lambda found: sum(product.flops for product in found))
        else:
            rounds = _rounds(equation)
            for inner in _inner_jaxprs(equation.params):
                yield from products(inner, inner_stack, times * rounds)


def _rounds(equation) -> int:
    """Return how often an equation runs the jaxprs inside it; a loop of unknown length counts once."""
    if equation.primitive.name == "scan":
        return equation.params["length"]
    if equation.primitive.name == "pallas_call":
        return math.prod(equation.params["grid_mapping"].grid)
    return 1


def _branches(params: Mapping[str, Any]) -> list[Any]:
    """Return the branches that may run. Of a choice by platform that is the TPU's, or else the default."""
    branches, platforms = params["branches"], params.get("branches_platforms")
    if not platforms:
        return list(branches)
    named = [i for i, names in enumerate(platforms) if names is not None and "tpu" in names]
    return [branches[(named or [platforms.index(None)])[0]]]


def _inner_jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "jaxpr"):
                yield item.jaxpr
            elif hasattr(item, "eqns"):
                yield item


def _dot_flops(equation) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution_flops(equation) -> int:
    kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[numbers.rhs_spec[0]]


def _is_backward(stack: Any) -> bool:
    return "transpose(" in str(stack)


def _modules(stack: Any) -> list[str]:
    """Return the names of the modules in a name stack, the outermost first, without its class, methods and einsums."""
    names = [name for name in _TRANSFORM.sub("", str(stack)).split("/") if name and "->" not in name]
    root = _root(stack)
    # Rematerialisation repeats the stack outside the block: what follows the last class is the whole path.
    start = max((i + 1 for i, name in enumerate(names) if name.split(".")[0] == root), default=0)
    return [name for name in names[start:] if "." not in name and name != _REMATTED]


def _root(stack: Any) -> str:
    """Return the class of the network in a name stack, '' outside of any."""
    names = (name.split(".")[0] for name in _TRANSFORM.sub("", str(stack)).split("/"))
    return next((name for name in names if name[:1].isupper()), "")


def _trained_roots(found: Iterable[Product]) -> set[str]:
    """Return the classes of the networks that a backward pass goes through."""
    return {_root(product.stack) for product in found if _is_backward(product.stack)}


def _component(stack: Any, trained: set[str]) -> str:
    root = _root(stack)
    return _component_of(_modules(stack)) if root in trained or not root else root


def _component_of(modules: Iterable[str]) -> str:
    """Return the first two names of a path; a numbered one is the last and loses its number."""
    names = []
    for name in itertools.islice(modules, 2):
        names.append(_NUMBERED.sub("", name))
        if names[-1] != name:
            break
    return "/".join(names) or OUTSIDE


def _components(
    found: list[Product], saved: Mapping[str, float], params: PyTree, trained: set[str]
) -> tuple[Component, ...]:
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    frozen = set()
    for product in found:
        name = _component(product.stack, trained)
        sums[name]["flops"] += product.flops / PROBE_BATCH
        sums[name]["exact_flops"] += product.flops / PROBE_BATCH if product.is_exact else 0
        if name == _root(product.stack):
            frozen.add(name)
    for stack, size in saved.items():
        sums[_component(stack, trained)]["saved_bytes"] += size
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        *modules, _ = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        sums[_component_of(modules)]["parameters"] += leaf.size
    return tuple(
        Component(name, **{**values, "parameters": int(values["parameters"])}, frozen=name in frozen)
        for name, values in sums.items()
    )


def _image_bytes(variables: Iterable[Any]) -> float:
    """Return the bytes of one image in those of the variables that grow with the batch."""
    return sum(_bytes(variable) for variable in variables if _grows(variable)) / PROBE_BATCH


def _grows(variable: Any) -> bool:
    return variable.aval.size > 0 and variable.aval.size % PROBE_BATCH == 0


def _bytes(variable: Any) -> int:
    dtype = variable.aval.dtype
    # a random key is an extended type, which numpy does not know
    return variable.aval.size * (dtype.itemsize if hasattr(dtype, "itemsize") else np.dtype(dtype).itemsize)


def _saved_bytes(jaxpr) -> dict[str, float]:
    """Return the bytes of an image that cross from the forward to the backward pass, by the stack that made them."""
    made = {
        variable: str(equation.source_info.name_stack)
        for equation in jaxpr.eqns
        if not _is_backward(equation.source_info.name_stack)
        for variable in equation.outvars
    }
    read = {
        variable
        for equation in jaxpr.eqns
        if _is_backward(equation.source_info.name_stack)
        for variable in equation.invars
        if not isinstance(variable, Literal)
    }
    saved: dict[str, float] = defaultdict(float)
    for variable, stack in made.items():
        if variable in read:
            saved[stack] += _image_bytes([variable])
    return dict(saved)


def _live_bytes(jaxpr) -> tuple[np.ndarray, np.ndarray]:
    """Return what lives after each equation up to the end of the backward pass: of an image, and of the weights.

    The update of the weights comes after that, and writes into the memory of the old ones.
    """
    backward = [i for i, equation in enumerate(jaxpr.eqns) if _is_backward(equation.source_info.name_stack)]
    moments = np.array(list(_moments(jaxpr, max(backward, default=len(jaxpr.eqns)) + 1)))
    return moments[:, 0], moments[:, 1]


def _moments(jaxpr, end: int | None = None) -> Iterator[tuple[float, float]]:
    """Yield the live bytes at each equation, with those inside it; a result lives until it is last read."""
    last = {
        variable: i
        for i, variables in enumerate([*(equation.invars for equation in jaxpr.eqns), jaxpr.outvars])
        for variable in variables
        if not isinstance(variable, Literal)
    }
    dying = defaultdict(list)
    images, weights = 0.0, 0.0
    for i, equation in enumerate(jaxpr.eqns[:end]):
        for inner in _inner_jaxprs(equation.params):
            yield from ((images + more, weights + more_weights) for more, more_weights in _moments(inner))
        for variable in equation.outvars:
            if variable in last:
                dying[last[variable]].append(variable)
                grown = _image_bytes([variable])
                images, weights = images + grown, weights + (0 if grown else _bytes(variable))
        yield images, weights
        for variable in dying.pop(i, ()):
            grown = _image_bytes([variable])
            images, weights = images - grown, weights - (0 if grown else _bytes(variable))


def device_bytes(tree: PyTree) -> int:
    """Return the bytes that a tree of shapes with shardings takes on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
