"""The parts of the step that a config describes, in formulas: parameters, FLOPs and bytes from its sizes alone."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from beitv2_jax.planning.parts import FLOAT32, HALF, Component, Transformer, join
from beitv2_jax.planning.pyramid import segmentation_heads


def components(config: Any, frozen_vit: Mapping[str, Mapping[str, int]] | None = None) -> list[Component]:
    """Return the parts of the step that a config describes, in the order in which an image passes them.

    Args:
        config: of a stage that trains.
        frozen_vit: sizes of the frozen transformer in the step, by the name of its weights, as
            `planning.abstract_task.Description` has them.
    """
    parts = {"mim": _mim, "vqkd": _vqkd, "finetune": _finetune, "segment": _segment}[config.stage](config)
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


def _bytes_of(blocks: Transformer) -> dict[str, int]:
    return {"kept": blocks.kept(), "held": blocks.held(), "passed": blocks.passed()}


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
        remat=config.efficiency.remat,
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
            **_bytes_of(blocks),
        ),
    ]
    head = _linear("output layer", masked, model.width, model.codebook_size)
    # logits and their softmax
    head = dataclasses.replace(head, params=head.params + 2 * model.width, kept=0, held=2 * head.kept)
    if model.patch_aggregation:
        more = dataclasses.replace(blocks, depth=model.head_depth)
        table = model.head_depth * table if model.position == "relative" else 0
        params = model.head_depth * more.block_params() + table
        parts.append(Component("aggregation head", params, more.flops(), **_bytes_of(more)))
        second = 0 if model.shared_head else head.params
        head = dataclasses.replace(head, flops=2 * head.flops, held=2 * head.held, params=head.params + second)
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
            **_bytes_of(encoding),
        ),
        join(
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
            **_bytes_of(decoding),
        ),
        join(
            "projection to features",
            _linear("", patches, decoder.width, decoder.width),
            _linear("", patches, decoder.width, teacher_width),
        ),
    ]


def _lookup(patches: int, codebook_size: int, code_dim: int) -> Component:
    flops = 2 * patches * codebook_size * code_dim
    return Component("code lookup", 0, flops, True, held=FLOAT32 * patches * codebook_size)


def _finetune(config) -> list[Component]:
    head = _linear("head", 1, config.model.width, config.model.num_classes)
    return [*_backbone(config), dataclasses.replace(head, params=head.params + 2 * config.model.width)]


def _backbone(config) -> list[Component]:
    model = config.model
    side = config.views.image_size // model.patch_size
    blocks = _transformer(model, side * side + 1, config, layer_scale=bool(model.layer_scale_init))
    table = ((2 * side - 1) ** 2 + 3) * model.num_heads
    positions = {"relative_shared": table, "relative": model.depth * table, "absolute": (side * side + 1) * model.width}
    params = model.depth * blocks.block_params() + model.width + positions.get(model.position, 0)
    return [_stem(model, side * side), Component("blocks", params, blocks.flops(), **_bytes_of(blocks))]


def _segment(config) -> list[Component]:
    return [*_backbone(config), *segmentation_heads(config)]


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
    parts = [Component(name, 0, flops, held=blocks.block_bytes(), frozen=True, passed=blocks.passed(frozen=True))]
    if name == "tokenizer":
        code_dim = sizes["code_dim"]
        projected = 2 * (tokens - 1) * width * (width + code_dim)
        lookup = _lookup(tokens - 1, config.model.codebook_size, code_dim)
        parts.append(dataclasses.replace(lookup, name="tokenizer's codes", flops=lookup.flops + projected, frozen=True))
    return parts
