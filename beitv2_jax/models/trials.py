"""What "auto" means on an accelerator: the fastest of the forms that are tried there when a run starts, at its sizes.

A form has to compile, to give what the plain one gives, and to be faster. So a kernel that a chip, a driver or a dtype
does not take costs a line of the log and no run. On a CPU, and for chips that are not there, `fast_paths.AUTO` stands.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from beitv2_jax.models.layers import Attention
from beitv2_jax.models.ops import implementations, nearest_code
from beitv2_jax.models.ops.attention import lengthened
from beitv2_jax.models.ops.cross_entropy import head_cross_entropy, rounded_cross_entropy
from beitv2_jax.models.ops.custom_vjp import product
from beitv2_jax.typing import PyTree

FORMS = {
    "attention": {"gpu": ("plain", "cudnn"), "tpu": ("plain", "pallas")},
    "nearest_code": {"gpu": ("scan", "plain", "pallas"), "tpu": ("plain", "scan", "pallas")},
    "cross_entropy": {"gpu": ("plain", "rounded", "tiled"), "tpu": ("plain", "rounded", "tiled")},
}
"""What is tried on a platform; the first is taken where another one is not faster by `GAIN`."""
GAIN = 1.03
MOST_IMAGES = 64
SAMPLES, CALLS = 5, 10
ROUNDED = 2e-2
"""How far outputs and gradients may lie from the plain form's, as a share of the largest: bfloat16 gives 0.6 %."""
EXACT = 1e-5


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """One computation in several forms, with its gradients.

    Attributes:
        run: (name of a form, *arguments) -> arrays, which `bound` compares.
        arguments: shapes and dtypes of the arrays it takes; integers are below `limit`.
        bound: the largest difference from the first form, as a share of its largest number.
    """

    run: Callable[..., PyTree]
    arguments: tuple[PyTree, ...]
    bound: float
    limit: int = 1

    def drawn(self) -> tuple[PyTree, ...]:
        """Return random arguments."""
        rng = np.random.default_rng(0)

        def draw(shape):
            if jnp.issubdtype(shape.dtype, jnp.integer):
                return jnp.asarray(rng.integers(0, self.limit, shape.shape, np.int32))
            return jnp.asarray(rng.standard_normal(shape.shape, np.float32)).astype(shape.dtype)

        return jax.tree.map(draw, self.arguments)


@functools.cache
def attention_trial(images: int, length: int, num_heads: int, width: int, dtype: Any, *, biased: bool = True) -> Trial:
    """Return the attention of one block, between norm and residual sum, with the gradients of all that it reads.

    Its linear maps belong to it: a form may want other tokens of them (`attention.lengthened`).
    """
    scale = width**-0.5

    def module(form):
        return Attention(num_heads, dtype=dtype, attention=form)

    def run(form, tokens, params, cotangent, *bias):
        def mixed(tokens, params, *bias):
            params = jax.tree.map(lambda leaf: scale * leaf, params)
            outputs = module(form).apply({"params": params}, lengthened(tokens, form), *bias or [None], length)
            return outputs[:, :length]

        outputs, backward = jax.vjp(mixed, tokens, params, *bias)
        return outputs, backward(cotangent)

    tokens, cotangent, bias = _shapes(
        ((images, length, width), jnp.float32),
        ((images, length, width), dtype),
        ((num_heads, length, length), jnp.float32),
    )
    params = jax.eval_shape(module("plain").init, jax.random.key(0), tokens)["params"]
    return Trial(run, (tokens, params, cotangent, *[bias] * biased), ROUNDED)


@functools.cache
def cross_entropy_trial(images: int, masked: int, width: int, codebook_size: int, dtype: Any) -> Trial:
    """Return output layer and cross entropy over hidden patches, with the gradients of tokens, kernel and bias."""

    def losses(form, tokens, kernel, bias, ids):
        kernel = kernel * width**-0.5
        if form == "tiled":
            return head_cross_entropy(tokens, kernel, bias, ids, dtype=dtype)[0]
        logits = product(tokens, kernel, dtype, jnp.float32, jnp.float32) + bias
        if form == "rounded":
            return rounded_cross_entropy(logits, ids, dtype)
        return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]

    def run(form, tokens, kernel, bias, ids):
        def loss(*arguments):
            found = losses(form, *arguments, ids)
            return found.sum(), found

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(tokens, kernel, bias)

    shapes = ((images, masked, width), dtype), ((width, codebook_size), jnp.float32), ((codebook_size,), jnp.float32)
    return Trial(run, _shapes(*shapes, ((images, masked), jnp.int32)), ROUNDED, limit=codebook_size)


@functools.cache
def nearest_code_trial(tokens: int, codebook_size: int, code_dim: int) -> Trial:
    """Return the lookup of tokens, as how far each is from its code: ids of equally near codes may differ."""

    def run(form, unit, codebook):
        ids = nearest_code.nearest_rows(unit, codebook, jnp.sum(codebook**2, axis=-1), implementation=form)
        return jnp.sum((unit - codebook[ids]) ** 2, axis=-1)

    shapes = ((tokens, code_dim), jnp.float32), ((codebook_size, code_dim), jnp.float32)
    return Trial(run, _shapes(*shapes), EXACT)


def trials(config, num_devices: int) -> dict[str, Trial]:
    """Return what there is to try for a training config, at the sizes of one of its devices, by key of FORMS."""
    network, dtype = config.model.get("encoder", config.model), jnp.dtype(config.efficiency.dtype)
    patches = (config.views.image_size // network.patch_size) ** 2
    parts = num_devices * config.efficiency.get("accumulation_steps", 1)
    images = min(MOST_IMAGES, max(1, config.run.batch_size // parts))
    biased = config.model.get("position", "absolute").startswith("relative")
    found = {"attention": attention_trial(images, patches + 1, network.num_heads, network.width, dtype, biased=biased)}
    if "codebook_size" not in config.model:
        return found
    if "code_dim" in config.model:
        sizes = config.model.codebook_size, config.model.code_dim
        return found | {"nearest_code": nearest_code_trial(images * patches, *sizes)}
    masked = config.masking.num_masked
    return found | {
        "cross_entropy": cross_entropy_trial(images, masked, network.width, config.model.codebook_size, dtype)
    }


def chosen(config, asked: Mapping[str, Any], platform: str) -> dict[str, Any]:
    """Return the settings of `asked` with every 'auto' replaced: by a trial on an accelerator, else by the table.

    All processes choose what process 0 found.
    """
    settings = implementations.resolved(asked, platform)
    if all(platform not in forms for forms in FORMS.values()):
        return settings
    for key, trial in trials(config, jax.device_count()).items():
        if asked.get(key) != "auto":
            continue
        forms = FORMS[key][platform]
        started = time.monotonic()
        seconds, refused = attempt(trial, forms)
        spent = time.monotonic() - started
        best = forms.index(fastest(seconds, forms))
        settings[key] = forms[int(multihost_utils.broadcast_one_to_all(np.int32(best)))]
        told = [
            f"{form} {1e3 * seconds[form]:.3f} ms" if form in seconds else f"{form}: {refused[form]}" for form in forms
        ]
        chip = jax.local_devices()[0].device_kind
        logging.info("tried for %s on %s, %.1f s: %s", key, chip, spent, "; ".join(told))
    return settings


@functools.cache
def attempt(trial: Trial, forms: tuple[str, ...]) -> tuple[dict[str, float], dict[str, str]]:
    """Return the seconds of a call of every form that works, and why the others do not; the first one is believed."""
    arguments, expected = trial.drawn(), None
    programs, refused = {}, {}
    for form in forms:
        try:
            program = jax.jit(functools.partial(trial.run, form)).lower(*arguments).compile()
            found = jax.block_until_ready(program(*arguments))
        except Exception as error:  # whatever a compiler or a driver says, the run goes on without this form
            refused[form] = (str(error).strip() or repr(error)).splitlines()[0][:200]
            continue
        expected = found if expected is None else expected
        distance = max(map(_distance, jax.tree.leaves(found), jax.tree.leaves(expected)))
        if distance <= trial.bound:
            programs[form] = program
        else:
            refused[form] = f"differs from {forms[0]} by {distance:.1e} of the largest number"
    samples: dict[str, list[float]] = {form: [] for form in programs}
    for _ in range(SAMPLES):
        for form, program in programs.items():
            samples[form].append(_seconds(program, arguments))
    return {form: statistics.median(found) for form, found in samples.items()}, refused


def fastest(seconds: Mapping[str, float], forms: tuple[str, ...]) -> str:
    """Return the fastest form; the first one unless another is faster by GAIN, or it did not work itself."""
    if not seconds:
        return forms[0]
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds.get(forms[0], float("inf")) >= GAIN * seconds[best] else forms[0]


def _shapes(*of: tuple[tuple[int, ...], Any]) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in of)


def _distance(found: jax.Array, expected: jax.Array) -> float:
    found, expected = (np.asarray(array, np.float32) for array in (found, expected))
    largest = np.abs(expected).max()
    distance = np.abs(found - expected).max() / (largest if largest else 1.0)
    return float(distance) if np.isfinite(distance) else float("inf")


def _seconds(program: Callable, arguments: tuple) -> float:
    started = time.perf_counter()
    for _ in range(CALLS):
        outputs = program(*arguments)
    jax.block_until_ready(outputs)
    return (time.perf_counter() - started) / CALLS
