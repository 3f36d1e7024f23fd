"""Common to several test files: compiling without optimisation, parameters drawn without running the model."""

import functools

import jax
import numpy as np

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""`jax.jit` for tests whose time goes into compiling; the arithmetic does not depend on the optimisation level."""


def drawn_variables(model, *args, seed=1, **kwargs):
    """Return variables of the model's tree with normal entries of visible size, so that no part hides at zero."""
    shapes = jax.eval_shape(functools.partial(model.init, **kwargs), jax.random.key(0), *args)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
