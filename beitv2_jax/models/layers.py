"""The transformer's parts: linear maps with the released initialisations, attention, MLP, stochastic depth, block.

Every network of the project (tokenizer, masked image model, classifier, teachers) is a stack of these blocks.
Parameters are float32; `dtype` is the dtype of the matrix products. The residual stream, layer norms and the softmax
stay float32: a large model starts with a LayerScale of 1e-5, which bfloat16 addition would round away.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from beitv2_jax.typing import AttentionBias, Tokens

INIT_STD = 0.02
QKV_BIASES = ("qv", "full", "none")
ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def constrain(tokens: Tokens) -> Tokens:
    """Name the axes of an activation; the mesh axes behind the names are chosen by the training room."""
    return nn.with_logical_constraint(tokens, ("batch", "length", "width"))


def normal_init(init: str):
    """Return the initializer of kernels, position tables and special tokens for a named scheme.

    `normal` is N(0, 0.02²); `clipped` is the same cut at ±0.02 (std 0.0108), as in the released MIM model; `torch` is
    the framework default of the official code, U(±1/√fan_in), for tensors whose last axis is the output. `scaled` is
    N(0, 1/fan_in) for kernels and N(0, 0.02²) for tokens: the fixed 0.02 suits widths near 768, narrow networks start
    faster so.

    Raises:
        ValueError: unknown scheme.
    """
    if init == "normal":
        return nn.initializers.normal(INIT_STD)
    if init == "clipped":
        return lambda key, shape, dtype=jnp.float32: (
            INIT_STD * jax.random.truncated_normal(key, -1.0, 1.0, shape, dtype)
        )
    if init == "torch":
        return lambda key, shape, dtype=jnp.float32: uniform_init(np.prod(shape[:-1]))(key, shape, dtype)
    if init == "scaled":
        return _scaled_init
    raise ValueError(f"unknown init {init!r}: choose 'normal', 'clipped', 'torch' or 'scaled'")


def _scaled_init(key, shape, dtype=jnp.float32):
    is_token = shape[0] == 1
    std = INIT_STD if is_token else 1.0 / np.sqrt(np.prod(shape[:-1]))
    return std * jax.random.normal(key, shape, dtype)


def uniform_init(fan_in: int):
    """Return an initializer drawing from U(±1/√fan_in)."""
    bound = float(1.0 / np.sqrt(fan_in))
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32 whatever the input, with a two-pass variance."""

    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    use_fast_variance: bool = False


class Linear(nn.Module):
    """Apply y = x W + b, computed in `dtype`, returned in `out_dtype` (default `dtype`).

    The initial kernel is multiplied by `init_scale`.
    """

    features: int
    use_bias: bool = True
    param_init: str = "normal"
    init_scale: float = 1.0
    dtype: Any = jnp.float32
    out_dtype: Any = None

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
        fan_in = inputs.shape[-1]
        draw = normal_init(self.param_init)
        kernel = self.param("kernel", lambda key, shape: self.init_scale * draw(key, shape), (fan_in, self.features))
        out_dtype = self.out_dtype or self.dtype
        outputs = jnp.matmul(inputs.astype(self.dtype), kernel.astype(self.dtype), preferred_element_type=out_dtype)
        if self.use_bias:
            bias_init = uniform_init(fan_in) if self.param_init == "torch" else nn.initializers.zeros
            outputs = outputs + self.param("bias", bias_init, (self.features,)).astype(out_dtype)
        return outputs


def relative_position_index(grid: tuple[int, int]) -> Int[np.ndarray, "l l"]:
    """Return which table row biases the logit of query q and key k; entry 0 is [CLS], patches are row-major.

    Patch (r, c) to (r', c'): (r − r' + gh − 1)(2gw − 1) + (c − c' + gw − 1). The last three rows of the table serve
    [CLS] to anything, anything to [CLS], and [CLS] to [CLS].

    Source: released behaviour, `relative_position_index`.
    """
    gh, gw = grid
    rows, columns = (axis.reshape(-1) for axis in np.indices(grid))
    num_offsets = (2 * gh - 1) * (2 * gw - 1)
    index = np.empty((gh * gw + 1, gh * gw + 1), np.int32)
    index[1:, 1:] = (rows[:, None] - rows + gh - 1) * (2 * gw - 1) + (columns[:, None] - columns + gw - 1)
    index[0, :] = num_offsets
    index[:, 0] = num_offsets + 1
    index[0, 0] = num_offsets + 2
    return index


class RelativePositionBias(nn.Module):
    """Return one learned logit offset for each head, query and key, read from a table of 2-D offsets."""

    grid: tuple[int, int]
    num_heads: int

    @nn.compact
    def __call__(self) -> AttentionBias:
        gh, gw = self.grid
        shape = ((2 * gh - 1) * (2 * gw - 1) + 3, self.num_heads)
        table = self.param("table", nn.initializers.zeros, shape)
        return jnp.take(table, relative_position_index(self.grid), axis=0).transpose(2, 0, 1)


class DropPath(nn.Module):
    """Zero a whole branch of a sample with probability `rate`, dividing kept ones by 1 − rate (stream `drop_path`)."""

    rate: float

    @nn.compact
    def __call__(self, branch: Tokens, *, train: bool) -> Tokens:
        if not train or self.rate == 0.0:
            return branch
        keep = jax.random.bernoulli(self.make_rng("drop_path"), 1.0 - self.rate, (branch.shape[0], 1, 1))
        return jnp.where(keep, branch / (1.0 - self.rate), 0.0)


class Attention(nn.Module):
    """Attend over all tokens: softmax(q kᵀ / √hd + bias) v, then an output projection.

    `qkv_bias`: 'qv' learns biases of queries and values only (a key bias cancels in the softmax), 'full' one vector for
    all three, 'none' nothing. With `relative_grid` the layer owns a relative-position table.
    """

    num_heads: int
    qkv_bias: str = "qv"
    relative_grid: tuple[int, int] | None = None
    param_init: str = "normal"
    init_scale: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Tokens, bias: AttentionBias | None = None) -> Tokens:
        batch, length, width = tokens.shape
        if width % self.num_heads:
            raise ValueError(f"width {width} is not divisible by num_heads {self.num_heads}")
        if self.qkv_bias not in QKV_BIASES:
            raise ValueError(f"unknown qkv_bias {self.qkv_bias!r}: choose one of {', '.join(QKV_BIASES)}")
        head_dim = width // self.num_heads
        qkv = Linear(3 * width, self.qkv_bias == "full", self.param_init, dtype=self.dtype, name="qkv")(tokens)
        if self.qkv_bias == "qv":
            q_bias = self.param("q_bias", nn.initializers.zeros, (width,))
            v_bias = self.param("v_bias", nn.initializers.zeros, (width,))
            qkv = qkv + jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias]).astype(self.dtype)
        qkv = qkv.reshape(batch, length, 3, self.num_heads, head_dim)
        queries, keys, values = qkv[:, :, 0] * head_dim**-0.5, qkv[:, :, 1], qkv[:, :, 2]

        logits = jnp.einsum("bqhd,bkhd->bhqk", queries, keys, preferred_element_type=jnp.float32)
        if bias is not None:
            logits = logits + bias
        if self.relative_grid is not None:
            logits = logits + RelativePositionBias(self.relative_grid, self.num_heads, name="rel_pos_bias")()
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, values).reshape(batch, length, width)
        return Linear(width, True, self.param_init, self.init_scale, self.dtype, name="proj")(mixed)


class Mlp(nn.Module):
    """Apply two linear maps with an activation between them.

    With `activation` 'swiglu' the first map is twice as wide, a gate g and values v, and silu(g) · v goes on.
    """

    mlp_dim: int
    activation: str = "gelu"
    param_init: str = "normal"
    init_scale: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Tokens) -> Tokens:
        gated = self.activation == "swiglu"
        fan_out = 2 * self.mlp_dim if gated else self.mlp_dim
        expanded = Linear(fan_out, True, self.param_init, dtype=self.dtype, name="fc1")(tokens)
        if gated:
            gate, values = jnp.split(expanded, 2, axis=-1)
            activated = jax.nn.silu(gate) * values
        else:
            activated = ACTIVATIONS[self.activation](expanded)
        return Linear(tokens.shape[-1], True, self.param_init, self.init_scale, self.dtype, name="fc2")(activated)


class Block(nn.Module):
    """Apply one pre-norm transformer block.

        x ← x + drop(γ₁ · attention(norm₁ x)),   x ← x + drop(γ₂ · mlp(norm₂ x))

    `layer_scale_init` None or 0 leaves the γ out. `layer_index` counts from 1; the kernels that write to the residual
    stream start divided by √(2 · layer_index).

    Source: released behaviour of all BEiT v2 transformers.
    """

    num_heads: int
    mlp_dim: int
    norm_eps: float = 1e-6
    layer_scale_init: float | None = None
    drop_path_rate: float = 0.0
    qkv_bias: str = "qv"
    activation: str = "gelu"
    relative_grid: tuple[int, int] | None = None
    layer_index: int = 1
    param_init: str = "normal"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Tokens, bias: AttentionBias | None = None, *, train: bool = False) -> Tokens:
        output_scale = float(1.0 / np.sqrt(2.0 * self.layer_index))
        drop_path = DropPath(self.drop_path_rate)
        attention = Attention(
            self.num_heads, self.qkv_bias, self.relative_grid, self.param_init, output_scale, self.dtype, name="attn"
        )
        mlp = Mlp(self.mlp_dim, self.activation, self.param_init, output_scale, self.dtype, name="mlp")

        branch = attention(LayerNorm(self.norm_eps, name="norm1")(tokens), bias)
        tokens = tokens + drop_path(self._scaled("gamma_1", branch), train=train)
        branch = mlp(LayerNorm(self.norm_eps, name="norm2")(tokens))
        return tokens + drop_path(self._scaled("gamma_2", branch), train=train)

    def _scaled(self, name: str, branch: Tokens) -> Float[Array, "b l d"]:
        if not self.layer_scale_init:
            return branch
        return branch * self.param(name, nn.initializers.constant(self.layer_scale_init), (branch.shape[-1],))


def apply_block(block: Block, tokens: Tokens, bias: AttentionBias | None, *, train: bool, remat: bool) -> Tokens:
    """Run a block; with `remat` its activations are recomputed in the backward pass instead of kept."""

    def run(block: Block, tokens: Tokens, bias: AttentionBias | None) -> Tokens:
        return block(tokens, bias, train=train)

    return constrain((nn.remat(run) if remat else run)(block, tokens, bias))


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Return the stochastic-depth rate of each of `depth` blocks, rising linearly from 0 to `rate`."""
    return [float(r) for r in np.linspace(0.0, rate, depth)]
