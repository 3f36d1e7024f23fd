"""Parts of the steps alone, in all their implementations: lookup, attention, cross entropy, optimizer, jitter.

The implementations of a part take turns in one process, so that their ratios hold whatever else the machine does. One
that this device or dtype cannot run is left out with the reason. Forward and backward pass wherever there is one.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from beitv2_jax import choices
from beitv2_jax.models import preprocess
from beitv2_jax.models.ops import attention
from beitv2_jax.models.ops import nearest_code as nearest_code_lib
from beitv2_jax.models.ops.cross_entropy import head_cross_entropy, rounded_cross_entropy
from beitv2_jax.models.quantizer import (
    CodebookStatistics,
    QuantizerOptions,
    l2_normalise,
    nearest_code,
    updated_state,
)
from beitv2_jax.planning.traced import traced_flops
from beitv2_jax.tasks.api import Task
from beitv2_jax.tasks.common import released_no_decay
from beitv2_jax.tasks.losses import masked_cross_entropy, weighted_sum
from beitv2_jax.training import optim, sharding
from benchmarks import steps, timing

PALLAS = ("gpu", "tpu")
"""Platforms on which kernels run compiled; elsewhere they are interpreted, which says nothing of their speed."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Something to be computed in several implementations.

    Attributes:
        implementations: name -> (function, arguments), or why it cannot run here.
        count: what of it is done in a call, in `unit`.
        flops: of a call by arithmetic; the same for every implementation. 0 where moving memory is all that it does.
        sizes: what it was measured at.
    """

    implementations: Mapping[str, tuple[Callable, tuple] | str]
    count: int
    unit: str
    flops: int
    sizes: Mapping[str, Any]


def measure(part: Part, effort: timing.Effort) -> dict[str, Any]:
    """Return times, rates, memory and work of every implementation of a part."""
    compiled, skipped, counted = {}, {}, {}
    for name, implementation in part.implementations.items():
        if isinstance(implementation, str):
            skipped[name] = implementation
            continue
        function, arguments = implementation
        lowered = jax.jit(function).lower(*arguments)
        try:
            compiled[name] = lowered.compile()
        except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
            skipped[name] = str(error).splitlines()[0][:200]
            continue
        flops, source = timing.compiled_flops(compiled[name], lowered)
        counted[name] = {"traced": traced_flops(function, *arguments), "compiler": flops, "compiler_source": source}
    runs = {name: functools.partial(program, *part.implementations[name][1]) for name, program in compiled.items()}
    found = {}
    for name, seconds in timing.samples(runs, effort).items():
        found[name] = {
            "seconds": timing.spread(seconds),
            f"{part.unit}_per_second": timing.rates(seconds, part.count),
            "flops": timing.work(part.flops, counted[name]),
            "utilisation": timing.utilisation(part.flops, seconds) if part.flops else None,
            "planned_bytes": timing.planned_bytes(compiled[name]),
        }
    return {"sizes": dict(part.sizes), "implementations": found, "skipped": skipped}


def quantizer(config: ConfigDict) -> Part:
    """Return lookup, cluster sums and update of the codebook for one batch of a vqkd config."""
    size, width = config.model.codebook_size, config.model.code_dim
    tokens = config.run.batch_size * (config.views.image_size // config.model.encoder.patch_size) ** 2
    rng = np.random.default_rng(steps.SEED)
    state = {
        "codebook": l2_normalise(jnp.asarray(rng.standard_normal((size, width), np.float32))),
        **{name: jnp.zeros(size) for name in ("cluster_counts", "window_counts", "last_window_counts")},
    }
    unit = l2_normalise(jnp.asarray(rng.standard_normal((tokens, width), np.float32)))

    options = QuantizerOptions(codebook_size=size, code_dim=width, ema_decay=config.model.ema_decay)

    def run(state, unit, implementation):
        ids = nearest_code(unit, state["codebook"], implementation=implementation)
        statistics = CodebookStatistics(*nearest_code_lib.cluster_sums(unit, ids, jnp.ones(len(unit)), size))
        return ids, updated_state(state, statistics, options)

    return Part(
        _implementations(run, (state, unit), choices.NEAREST_CODE),
        tokens,
        "tokens",
        2 * tokens * size * width,
        {"tokens": tokens, "codebook_size": size, "code_dim": width},
    )


def attend(config: ConfigDict) -> Part:
    """Return attention with a learned bias as in one block of a mim config, with the gradients of q, k, v and bias."""
    model, count = config.model, config.run.batch_size
    length = (config.views.image_size // model.patch_size) ** 2 + 1
    dtype = jnp.dtype(config.efficiency.dtype)
    rng = np.random.default_rng(steps.SEED)
    shapes = (count, length, 3 * model.width), (count, length, model.width), (model.num_heads, length, length)
    qkv, cotangent, bias = (jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes)

    def run(qkv, bias, cotangent, implementation):
        attend = functools.partial(attention.attend, num_heads=model.num_heads, implementation=implementation)
        output, backward = jax.vjp(attend, qkv, bias)
        return output, backward(cotangent)

    implementations = _implementations(run, (qkv.astype(dtype), bias, cotangent.astype(dtype)), choices.ATTENTION)
    if jax.default_backend() != "gpu":
        implementations["cudnn"] = "needs an NVIDIA GPU"
    elif dtype == jnp.float32:
        implementations["cudnn"] = "takes 16-bit types only"
    # two products forward, four backward
    flops = 6 * 2 * count * length * length * model.width
    sizes = {"images": count, "length": length, "num_heads": model.num_heads, "width": model.width, "dtype": str(dtype)}
    return Part(implementations, count, "images", flops, sizes)


def cross_entropy(config: ConfigDict) -> Part:
    """Return output layer and cross entropy over the hidden patches of a mim config, with the gradients of both."""
    model, dtype = config.model, jnp.dtype(config.efficiency.dtype)
    rng = np.random.default_rng(steps.SEED)
    shape = config.run.batch_size, config.masking.num_masked
    tokens = jnp.asarray(rng.standard_normal((*shape, model.width), np.float32)).astype(dtype)
    kernel = jnp.asarray(0.02 * rng.standard_normal((model.width, model.codebook_size), np.float32))
    ids = jnp.asarray(rng.integers(0, model.codebook_size, shape, np.int32))

    bias = jnp.zeros(model.codebook_size)

    def reference(tokens, kernel, bias, ids):
        logits = jnp.matmul(tokens, kernel.astype(dtype), preferred_element_type=jnp.float32) + bias
        return masked_cross_entropy(logits, ids), jnp.argmax(logits, axis=-1) == ids

    def rounded(tokens, kernel, bias, ids):
        logits = jnp.matmul(tokens, kernel.astype(dtype), preferred_element_type=jnp.float32) + bias
        return rounded_cross_entropy(logits, ids, dtype), jnp.argmax(logits, axis=-1) == ids

    def tiled(tokens, kernel, bias, ids):
        return head_cross_entropy(tokens, kernel, bias, ids, dtype=dtype)

    def trained(loss, *arguments):
        def loss(tokens, kernel, bias, ids):
            losses, hits = loss(tokens, kernel, bias, ids)
            return weighted_sum(losses, jnp.ones(len(tokens))), hits.sum()

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*arguments)

    arguments = tokens, kernel, bias, ids
    functions = {"reference": reference, "rounded": rounded, "tiled": tiled}
    implementations = {name: (functools.partial(trained, function), arguments) for name, function in functions.items()}

    patches = shape[0] * shape[1]
    sizes = {"patches": patches, "width": model.width, "codebook_size": model.codebook_size, "dtype": str(dtype)}
    flops = 6 * patches * model.width * model.codebook_size
    return Part(implementations, patches, "patches", flops, sizes)


def optimizer(config: ConfigDict) -> Part:
    """Return the update of all parameters of a mim config, as in the step: norm, clipping, AdamW, decay, the guard.

    Implementations: leaf by leaf; all leaves of like treatment joined end to end; leaves of equal shape stacked.
    """
    shapes = _mim_params(config)
    rng = np.random.default_rng(steps.SEED)
    params, grads = (
        jax.tree.map(lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32)), shapes)
        for _ in range(2)
    )
    implementations = {}
    for name, transformation in optimizers(config).items():
        arguments = grads, transformation.init(params), params
        implementations[name] = functools.partial(guarded_update, transformation), arguments
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
    sizes = {"parameters": numbers, "leaves": len(jax.tree.leaves(params))}
    return Part(implementations, numbers, "parameters", 0, sizes)


def optimizers(config: ConfigDict) -> dict[str, optax.GradientTransformationExtraArgs]:
    """Return the optimizer of a mim recipe in its implementations."""

    def made(no_decay: Callable[[str], bool]):
        task = Task(name="mim", sources=(), init=None, loss=None, train_batches=None, no_decay=no_decay)
        return optim.for_task(task, config.optim, **steps.SCHEDULE)[0]

    reference, grouped = made(released_no_decay), made(lambda path: path.startswith("True"))
    return {
        "reference": reference,
        "joined": _in_groups(grouped, lambda leaf: (), jnp.ravel, jnp.concatenate),
        "stacked": _in_groups(grouped, jnp.shape, lambda leaf: leaf, jnp.stack),
    }


def guarded_update(transformation, grads, state, params):
    """Return parameters and moments after an update, or as they were if the norm of the gradients is not finite."""
    finite = jnp.isfinite(optax.tree.norm(grads))
    updates, moved = transformation.update(grads, state, params, step=jnp.int32(1))
    moved = optax.apply_updates(params, updates), moved
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, (params, state))


def _mim_params(config: ConfigDict):
    task = steps.describe(config, {"tokenizer.codes": "stored"}).task
    return jax.eval_shape(task.init, jax.random.key(0))["params"]


def _in_groups(
    inner: optax.GradientTransformationExtraArgs, like: Callable, reshape: Callable, join: Callable
) -> optax.GradientTransformationExtraArgs:
    """Return `inner` on groups of leaves with equal decay and equal `like(leaf)`, each one array by `join`."""

    def joined(tree):
        groups: dict[str, list[jax.Array]] = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            key = f"{released_no_decay(sharding.path_name(path))} {like(leaf)}"
            groups.setdefault(key, []).append(reshape(leaf))
        return {key: join(leaves) for key, leaves in groups.items()}

    def update(updates, state, params, **more):
        found, state = inner.update(joined(updates), state, joined(params), **more)
        (taken_apart,) = jax.linear_transpose(joined, params)(found)
        return taken_apart, state

    return optax.GradientTransformationExtraArgs(lambda params: inner.init(joined(params)), update)


def jitter(config: ConfigDict) -> Part:
    """Return the colour jitter of a batch, which the mim step does on the device and the steps here leave out."""
    count, size = config.run.batch_size, config.views.image_size
    rng = np.random.default_rng(steps.SEED)
    images = jnp.asarray(rng.integers(0, 256, (count, size, size, 3), np.uint8))
    factors = jnp.asarray(rng.uniform(0.6, 1.4, (count, 3)).astype(np.float32))
    order = jnp.asarray(rng.permuted(np.tile(np.arange(3, dtype=np.int32), (count, 1)), axis=1))
    gray = jnp.full(count, 117.0)
    sizes = {"images": count, "image_size": size}
    return Part({"reference": (preprocess.color_jitter, (images, factors, order, gray))}, count, "images", 0, sizes)


def _implementations(
    run: Callable, arguments: tuple, implementations: tuple[str, ...]
) -> dict[str, tuple[Callable, tuple] | str]:
    implementations: dict[str, tuple[Callable, tuple] | str] = {
        name: (functools.partial(run, implementation=name), arguments) for name in implementations
    }
    if "pallas" in implementations and jax.default_backend() not in PALLAS:
        implementations["pallas"] = f"is interpreted on a {jax.default_backend()}, which says nothing of its speed"
    return implementations
