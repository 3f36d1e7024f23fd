"""Random draws as pure functions of (seed, stream name, ids): no global generator, no key kept in state.

The host part is used by `beitv2_jax.data`, which must not import jax; jax is therefore imported where it is used.
"""

import hashlib

import numpy as np


def _digest(seed: int, stream: str, ids: tuple[int, ...]) -> bytes:
    text = "/".join([str(int(seed)), stream, *(str(int(i)) for i in ids)])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def host_rng(seed: int, stream: str, *ids: int) -> np.random.Generator:
    """Return the NumPy generator that belongs to (seed, stream, ids), the same on every machine.

    `stream` names the purpose ("view", "mask", ...), `ids` are example id, view index, epoch, ....
    """
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(seed, stream, ids), "little")))


def step_key(seed: int, stream: str, step=0):
    """Return the jax key that belongs to (seed, stream, step); `step` may be traced."""
    import jax

    root = jax.random.key(int.from_bytes(_digest(seed, stream, ())[:4], "little"))
    return jax.random.fold_in(root, step)
