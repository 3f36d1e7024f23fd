"""Parameters, FLOPs and bytes of a training step by arithmetic: from a config's sizes, and from the traced program.

Two counts that know nothing of each other: `components` uses formulas for each part of the network, `traced_flops` adds
up the matrix products of the program that jax traced. Only matrix products and convolutions are counted, 2 FLOPs a
multiply-add; the rest of a transformer's arithmetic is some per cent and never what binds it.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from beitv2_jax.typing import PyTree

FLOAT32, HALF = 4, 2


@dataclasses.dataclass(frozen=True)
class Component:
    """One part of the network in one step, for one image.

    Attributes:
        name: as the plan prints it.
        params: its numbers; those of frozen parts are not trained. A part used twice counts them at its first place.
        flops: of one image in one step, forward and backward.
        exact: float32 products in full precision, for which chips are slower.
        kept: bytes that the forward pass keeps for the backward pass, or holds at its widest where there is none.
        frozen: not trained.
        passed: bytes of all that the forward pass makes, kept or not, weighted by how often a step runs through it:
            1 for a forward and a backward pass. 0 means `kept`.
    """

    name: str
    params: int
    flops: int
    exact: bool = False
    kept: int = 0
    frozen: bool = False
    passed: int = 0


@dataclasses.dataclass(frozen=True)
class Transformer:
    """The sizes of a stack of blocks; `tokens` counts [CLS]. `itemsize` is that of a number in its matrix products."""

    tokens: int
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    itemsize: int = HALF
    layer_scale: bool = False
    gated: bool = False
    remat: bool = False

    def block_flops(self) -> dict[str, int]:
        """Return the forward FLOPs of one block's matrix products by name."""
        length, width = self.tokens, self.width
        return {
            "qkv": 2 * length * width * 3 * width,
            "attention": 2 * (2 * length * length * width),
            "proj": 2 * length * width * width,
            "fc1": 2 * length * width * self.mlp_dim * (2 if self.gated else 1),
            "fc2": 2 * length * self.mlp_dim * width,
        }

    def flops(self, *, frozen: bool = False) -> int:
        """Return the FLOPs of all blocks in a step.

        The backward pass costs twice the forward pass. With `remat` the forward pass runs again, but for the last
        product where nothing needs its result: only the gradient of a layer scale does.
        """
        block = self.block_flops()
        forward = sum(block.values())
        if frozen:
            return self.depth * forward
        again = forward - (0 if self.layer_scale else block["fc2"])
        return self.depth * (3 * forward + (again if self.remat else 0))

    def block_params(self, *, qkv_biases: int = 2) -> int:
        """Return the numbers of one block: two norms, attention, MLP, layer scale."""
        width, mlp_dim = self.width, self.mlp_dim
        fan_out = mlp_dim * (2 if self.gated else 1)
        attention = 3 * width * width + qkv_biases * width + width * width + width
        mlp = width * fan_out + fan_out + mlp_dim * width + width
        return 4 * width + attention + mlp + (2 * width if self.layer_scale else 0)

    def kept(self) -> int:
        """Return the bytes that all blocks keep for the backward pass, for one image.

        A block keeps the residual stream twice in float32, what enters its matrix products, what leaves the attention
        and the MLP, and the attention weights in float32. With `remat` it keeps the residual stream once, and one
        block's all is there while that block is differentiated.
        """
        block, stream = self._block_bytes(), FLOAT32 * self.tokens * self.width
        return self.depth * stream + block if self.remat else self.depth * block

    def passed(self, *, frozen: bool = False) -> int:
        """Return the bytes of all that the blocks make: a third of a step's passes where frozen, four with `remat`."""
        passes = 1 if frozen else 4 if self.remat else 3
        return passes * self.depth * self._block_bytes() // 3

    def _block_bytes(self) -> int:
        stream = FLOAT32 * self.tokens * self.width
        entered = self.itemsize * self.tokens * (8 * self.width + (4 if self.gated else 2) * self.mlp_dim)
        weights = FLOAT32 * self.num_heads * self.tokens**2
        return 2 * stream + entered + weights


def components(config: Any, frozen_vit: Mapping[str, Mapping[str, int]] | None = None) -> list[Component]:
    """Return the parts of the step that a config describes, in the order in which an image passes them.

    Args:
        config: of a stage that trains.
        frozen_vit: sizes of the frozen transformer in the step, by the name of its weights, as
            `tasks.described.Description` has them.
    """
    parts = {"mim": _mim, "vqkd": _vqkd, "finetune": _finetune}[config.stage](config)
    for name, sizes in (frozen_vit or {}).items():
        parts += _frozen(name, sizes, config)
    return parts


def transformers(config: Any) -> list[Transformer]:
    """Return the stacks of trained blocks that a config describes; the aggregation head counts as more of the same."""
    model = config.model
    if config.stage == "vqkd":
        tokens = (config.views.image_size // model.encoder.patch_size) ** 2 + 1
        return [_transformer(part, tokens, config) for part in (model.encoder, model.decoder)]
    tokens = (config.views.image_size // model.patch_size) ** 2 + 1
    more = model.head_depth if model.get("patch_aggregation") else 0
    layer_scale = bool(model.layer_scale_init)
    return [_transformer(model, tokens, config, layer_scale=layer_scale, depth=model.depth + more)]


def total_flops(parts: list[Component], *, exact: bool | None = None) -> int:
    """Return the FLOPs of one image in a step, of all parts or of those that are `exact` or not."""
    return sum(part.flops for part in parts if exact is None or part.exact == exact)


def _itemsize(config) -> int:
    return FLOAT32 if config.efficiency.dtype == "float32" else HALF


def _transformer(model, tokens: int, config, *, layer_scale: bool = False, depth: int | None = None) -> Transformer:
    return Transformer(
        tokens=tokens,
        width=model.width,
        depth=model.depth if depth is None else depth,
        mlp_dim=model.mlp_dim,
        num_heads=model.num_heads,
        itemsize=_itemsize(config),
        layer_scale=layer_scale,
        remat=bool(config.efficiency.remat),
    )


def _linear(name: str, rows: int, fan_in: int, fan_out: int, *, passes: int = 3, exact: bool = False) -> Component:
    return Component(
        name, fan_in * fan_out + fan_out, passes * 2 * rows * fan_in * fan_out, exact, FLOAT32 * rows * fan_out
    )


def _stem(model, patches: int) -> Component:
    """Return the patch embedding; no gradient reaches the pixels."""
    if model.stem == "linear":
        return _linear("patch embedding", patches, 3 * model.patch_size**2, model.width, passes=2)
    params = flops = kept = 0
    channels, side = 3, model.patch_size
    while side > 1:
        side //= 2
        out = max(model.width // side, 1)
        forward = 2 * patches * side * side * 9 * channels * out
        params, flops = params + 9 * channels * out + out, flops + (3 if params else 2) * forward
        kept += HALF * 2 * patches * side * side * out
        channels = out
    last = _linear("", patches, model.width, model.width)
    return Component("patch embedding", params + last.params, flops + last.flops, kept=kept + last.kept)


def _mim(config) -> list[Component]:
    model = config.model
    side = config.views.image_size // model.patch_size
    patches, masked = side * side, config.masking.num_masked
    blocks = _transformer(model, patches + 1, config, layer_scale=bool(model.layer_scale_init))
    table = ((2 * side - 1) ** 2 + 3) * model.num_heads
    positions = {"relative_shared": table, "relative": model.depth * table, "absolute": (patches + 1) * model.width}
    tokens = 2 * model.width + positions.get(model.position, 0)  # [CLS], the mask token
    parts = [
        _stem(model, patches),
        Component(
            "blocks",
            model.depth * blocks.block_params() + tokens,
            blocks.flops(),
            kept=blocks.kept(),
            passed=blocks.passed(),
        ),
    ]
    head = _linear("output layer", masked, model.width, model.codebook_size)
    head = dataclasses.replace(
        head, params=head.params + 2 * model.width, kept=2 * head.kept
    )  # logits and their softmax
    if model.patch_aggregation:
        more = dataclasses.replace(blocks, depth=model.head_depth)
        table = model.head_depth * table if model.position == "relative" else 0
        params = model.head_depth * more.block_params() + table
        parts.append(Component("aggregation head", params, more.flops(), kept=more.kept(), passed=more.passed()))
        second = 0 if model.shared_head else head.params
        head = dataclasses.replace(head, flops=2 * head.flops, kept=2 * head.kept, params=head.params + second)
    return [*parts, head]


def _vqkd(config) -> list[Component]:
    model = config.model
    encoder, decoder = model.encoder, model.decoder
    patches = (config.views.image_size // encoder.patch_size) ** 2
    teacher_width = config.get("teacher_width", 512)
    encoding = _transformer(encoder, patches + 1, config)
    decoding = _transformer(decoder, patches + 1, config)
    extras = lambda part: (1 + patches + 1) * part.width + 2 * part.width  # noqa: E731 [CLS], positions, the last norm
    return [
        _stem(encoder, patches),
        Component(
            "encoder",
            encoder.depth * encoding.block_params() + extras(encoder),
            encoding.flops(),
            kept=encoding.kept(),
            passed=encoding.passed(),
        ),
        _join(
            "projection to codes",
            _linear("", patches, encoder.width, encoder.width, exact=True),
            _linear("", patches, encoder.width, model.code_dim, exact=True),
        ),
        _lookup(patches, model.codebook_size, model.code_dim),
        _linear("code embedding", patches, model.code_dim, decoder.width),
        Component(
            "decoder",
            decoder.depth * decoding.block_params() + extras(decoder),
            decoding.flops(),
            kept=decoding.kept(),
            passed=decoding.passed(),
        ),
        _join(
            "projection to features",
            _linear("", patches, decoder.width, decoder.width),
            _linear("", patches, decoder.width, teacher_width),
        ),
    ]


def _join(name: str, *parts: Component) -> Component:
    return Component(
        name,
        sum(part.params for part in parts),
        sum(part.flops for part in parts),
        parts[0].exact,
        sum(part.kept for part in parts),
    )


def _lookup(patches: int, codebook_size: int, code_dim: int) -> Component:
    flops = 2 * patches * codebook_size * code_dim
    return Component("code lookup", 0, flops, True, FLOAT32 * patches * codebook_size)


def _finetune(config) -> list[Component]:
    model = config.model
    side = config.views.image_size // model.patch_size
    blocks = _transformer(model, side * side + 1, config, layer_scale=bool(model.layer_scale_init))
    table = ((2 * side - 1) ** 2 + 3) * model.num_heads
    positions = {"relative_shared": table, "relative": model.depth * table, "absolute": (side * side + 1) * model.width}
    params = model.depth * blocks.block_params() + model.width + positions.get(model.position, 0)
    head = _linear("head", 1, model.width, model.num_classes)
    return [
        _stem(model, side * side),
        Component("blocks", params, blocks.flops(), kept=blocks.kept(), passed=blocks.passed()),
        dataclasses.replace(head, params=head.params + 2 * model.width),
    ]


def _frozen(name: str, sizes: Mapping[str, int], config) -> list[Component]:
    """Return a frozen transformer in the step: no backward pass, and nothing kept beyond the widest block."""
    tokens, width = sizes["tokens"], sizes["width"]
    blocks = Transformer(
        tokens=tokens,
        width=width,
        depth=sizes["depth"],
        mlp_dim=sizes["mlp_dim"],
        num_heads=width // 64,
        itemsize=_itemsize(config),
        gated=bool(sizes["gated"]),
    )
    flops = blocks.flops(frozen=True) + 2 * (tokens - 1) * sizes["patch_inputs"] * width
    flops += 2 * tokens * width * sizes["projection"]
    kept = dataclasses.replace(blocks, depth=1).kept()
    parts = [Component(name, 0, flops, kept=kept, frozen=True, passed=blocks.passed(frozen=True))]
    if name == "tokenizer":
        code_dim = sizes["code_dim"]
        projected = 2 * (tokens - 1) * width * (width + code_dim)
        lookup = _lookup(tokens - 1, config.model.codebook_size, code_dim)
        parts.append(dataclasses.replace(lookup, name="tokenizer's codes", flops=lookup.flops + projected, frozen=True))
    return parts


def traced_flops(function, *arguments: PyTree) -> "TracedFlops":
    """Trace `function` on arrays or shapes and count its matrix products over the whole global batch."""
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


@dataclasses.dataclass(frozen=True)
class TracedFlops:
    """FLOPs of a traced program: all of them, and those that a compiler misses which counts the body of a loop once."""

    total: int = 0
    missed: int = 0

    def __add__(self, other: "TracedFlops") -> "TracedFlops":
        return TracedFlops(self.total + other.total, self.missed + other.missed)


def _count(jaxpr) -> TracedFlops:
    counted = TracedFlops()
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            counted += TracedFlops(_dot_flops(equation))
        elif name == "conv_general_dilated":
            counted += TracedFlops(_conv_flops(equation))
        elif name == "scan":
            body = _count(parameters["jaxpr"].jaxpr)
            once, length = body.total - body.missed, parameters["length"]
            counted += TracedFlops(length * body.total, length * body.total - once)
        elif name == "cond":
            branches = [_count(branch.jaxpr) for branch in parameters["branches"]]
            counted += max(branches, key=lambda branch: branch.total)
        else:
            for inner in _inner(parameters):
                counted += _count(inner)
    return counted


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


def temporary_bytes(parts: list[Component], images: int, params: PyTree) -> int:
    """Estimate the temporary memory of a step on one device: gradients and what the forward pass keeps.

    Args:
        images: of one device.
        params: shapes with shardings; a gradient is as large as its parameter.
    """
    return device_bytes(params) + images * sum(part.kept for part in parts)
