"""The published optimizer: AdamW with per-step warm-up and cosine rate, decay groups and layer-wise rates.

Rate and weight decay are functions of the state's step, not of a counter of their own, so a skipped step does not delay
the schedules.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from beitv2_jax.errors import UserError
from beitv2_jax.tasks.api import Task
from beitv2_jax.training.sharding import path_name


def learning_rate(step, *, peak_lr: float, min_lr: float, warmup_steps: int, num_steps: int, xp=np):
    """Return the rate of step `step` (0-based).

    With `W = warmup_steps` and `M = num_steps - W`:

        lr(i) = peak_lr * i / (W - 1)                                            for i < W
        lr(i) = min_lr + (peak_lr - min_lr) / 2 * (1 + cos(pi * (i - W) / M))    after

    so the first step of a warm-up has rate 0, the peak appears twice and the last rate is just above `min_lr`.

    Source: the released schedule of every stage.
    """
    warmup = peak_lr * (step / max(warmup_steps - 1, 1))
    after = cosine(step - warmup_steps, start=peak_lr, end=min_lr, num_steps=num_steps - warmup_steps, xp=xp)
    return xp.where(step < warmup_steps, warmup, after)


def linear_rate(step, *, peak_lr: float, min_lr: float, warmup_steps: int, num_steps: int, xp=np):
    """Return the rate of step `step` (0-based): a straight line down, multiplied by the warm-up.

        lr(i) = (min_lr + (peak_lr - min_lr) * (1 - i / N)) * (1 - (1 - i / W) * (1 - 1e-6) for i < W, 1 after)

    with `W = warmup_steps` and `N = num_steps`, so the peak is never quite reached.

    Source: mmcv's `poly` policy of power 1 with a linear warm-up, as the released segmentation uses it.
    """
    line = min_lr + (peak_lr - min_lr) * (1.0 - xp.clip(step / max(num_steps, 1), 0.0, 1.0))
    cold = xp.clip(1.0 - step / max(warmup_steps, 1), 0.0, 1.0) if warmup_steps else 0.0
    return line * (1.0 - cold * (1.0 - 1e-6))


def cosine(step, *, start: float, end: float, num_steps: int, xp=np):
    """Return end + (start - end) / 2 * (1 + cos(pi * step / num_steps)), and the ends outside 0..num_steps.

    Source: the released schedule; weight decay takes it without a warm-up, and is constant in every published recipe.
    """
    progress = xp.clip(step / max(num_steps, 1), 0.0, 1.0)
    return end + 0.5 * (start - end) * (1.0 + xp.cos(math.pi * progress))


SCHEDULES = {"cosine": learning_rate, "linear": linear_rate}
"""Value of `optim.schedule` -> learning rate by step."""


def layer_scale(layer: int | None, *, layer_decay: float, num_layers: int) -> float:
    """Return `layer_decay ** (num_layers + 1 - layer)`, the fraction of the rate for a layer; 1 for None.

    Source: released fine-tuning: layer 0 is the embeddings, `i + 1` is block i, `num_layers + 1` is everything after.
    """
    return 1.0 if layer is None else layer_decay ** (num_layers + 1 - layer)


def make_optimizer(
    *,
    schedule: Callable,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float | Callable,
    no_decay: Callable[[str], bool],
    clip_norm: float = 0.0,
    layer_decay: float = 1.0,
    layer_of: Callable[[str], int | None] = lambda path: None,
    num_layers: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Build AdamW; `update(grads, opt_state, params, step=step)` takes the rate from `schedule(step)`.

        m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2;   t = number of updates
        p = p - lr * scale(p) * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay(p) * p)

    `g` is the gradient, clipped to global norm `clip_norm` unless that is 0; `decay(p)` is `weight_decay` (a
    number, or a function of the step), or 0 where `no_decay(path of p)`; `scale(p)` is `layer_scale`.

    Raises:
        UserError: `layer_decay` is set for a task without layers.

    Source: torch.optim.AdamW, which decays by `p *= 1 - lr * weight_decay` and adds eps outside the root.
    """
    links = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    links.append(optax.scale_by_adam(b1=betas[0], b2=betas[1], eps=eps))
    decay = weight_decay if callable(weight_decay) else lambda step: weight_decay
    links.append(optax.masked(_add_decay(decay), lambda params: _by_path(lambda path: not no_decay(path), params)))
    if layer_decay != 1.0:
        if not num_layers:
            raise UserError(
                f"optim.layer_decay is {layer_decay}, but this stage has no layer ids.",
                "Did you copy it from a fine-tuning recipe?",
                "Write --config.optim.layer_decay=1.0.",
            )
        scale = functools.partial(layer_scale, layer_decay=layer_decay, num_layers=num_layers)
        links.append(_scale_by_path(lambda path: scale(layer_of(path))))
    return optax.chain(*links, _descend(schedule))


def for_task(
    task: Task, config: Any, warmup_steps: int, num_steps: int
) -> tuple[optax.GradientTransformationExtraArgs, Callable]:
    """Return the optimizer that the section `optim` of a config describes, and its learning rate by step."""
    schedule = functools.partial(
        SCHEDULES[config.get("schedule", "cosine")],
        peak_lr=config.peak_lr,
        min_lr=config.min_lr,
        warmup_steps=warmup_steps,
        num_steps=num_steps,
        xp=jnp,
    )
    weight_decay = functools.partial(
        cosine, start=config.weight_decay, end=config.weight_decay_end, num_steps=num_steps, xp=jnp
    )
    optimizer = make_optimizer(
        schedule=schedule,
        betas=tuple(config.betas),
        eps=config.eps,
        weight_decay=weight_decay,
        no_decay=task.no_decay,
        clip_norm=config.clip_norm,
        layer_decay=config.layer_decay,
        layer_of=task.layer_of,
        num_layers=task.num_layers,
    )
    return optimizer, schedule


def _by_path(function: Callable[[str], object], tree):
    return jax.tree_util.tree_map_with_path(lambda path, _: function(path_name(path)), tree)


def _scale_by_path(scale: Callable[[str], float]) -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda update, factor: update * factor, updates, _by_path(scale, updates))
    )


def _add_decay(weight_decay: Callable) -> optax.GradientTransformationExtraArgs:
    def update(updates, state, params, *, step, **_):
        decay = weight_decay(step)
        return jax.tree.map(lambda update, param: update + decay * param, updates, params), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _descend(schedule: Callable) -> optax.GradientTransformationExtraArgs:
    def update(updates, state, params=None, *, step, **_):
        rate = schedule(step)
        return jax.tree.map(lambda update: -rate * update, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
