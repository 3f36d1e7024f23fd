"""Transformer layers: linear maps with the released initialisations, attention, MLP, stochastic depth, block.

Every network of the project (tokenizer, masked image model, classifier, teachers) is a stack of these blocks.
Parameters are float32 and matrix products are computed in `Compute.dtype`. The residual stream, layer norms and the
softmax stay float32: a large model starts with a LayerScale of 1e-5, which bfloat16 addition would round away.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.errors import ScopeParamShapeError
from jaxtyping import Array, Float, Int, PRNGKeyArray

from beitv2_jax.choices import QKV_BIASES
from beitv2_jax.models.backbone import Backbone, Compute
from beitv2_jax.models.ops.attention import attend, attention_weights, pad_tokens
from beitv2_jax.models.ops.custom_vjp import PRODUCT, add_bias, gelu, layer_norm, product
from beitv2_jax.typing import AttentionBias, Tokens

INIT_STD = 0.02
ROTARY_BASE = 100.0
ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
REMAT = {
    "full": None,  # saves the input of a block only
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),  # saves the outputs of its linear maps too
}
"""Rematerialisation policies: what a block saves for the backward pass; the rest is computed again."""


def constrain(tokens: Tokens) -> Tokens:
    """Name the axes of an activation; `training.sharding` maps them to mesh axes."""
    return nn.with_logical_constraint(tokens, ("batch", "length", "width"))


def normal_init(init: str):
    """Return the initializer of kernels, position tables and special tokens for a named scheme.

    `normal` is N(0, 0.02²); `clipped` is the same cut at ±0.02 (std 0.0108), as in the released MIM model; `torch` is
    the framework default of the official code, U(±1/√fan_in), for tensors whose last axis is the output. `scaled` is
    N(0, 1/fan_in) for kernels and N(0, 0.02²) for tokens: the fixed 0.02 suits widths near 768, and narrower networks
    learn faster from kernels scaled by their fan-in.

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


class Module(nn.Module):
    """A Flax module that compares the shape of a given parameter without tracing its initializer.

    Flax traces it at every call, which takes half of the time to trace a ViT-B.
    """

    def param(self, name, init_fn, shape):
        """Return the parameter `name` of this `shape`; as in Flax, it is drawn where it does not exist.

        Raises:
            flax.errors.ScopeParamShapeError: the given parameter has another shape.
        """
        if not self.has_variable("params", name):
            return super().param(name, init_fn, shape)
        value = self.get_variable("params", name)
        if np.shape(value) != tuple(shape):
            raise ScopeParamShapeError(name, self.scope.path_text, np.shape(value), tuple(shape))
        return value


class LayerNorm(Module):
    """Layer norm over the last axis in float32 whatever the input, with a two-pass variance."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        scale = self.param("scale", nn.initializers.ones, inputs.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, inputs.shape[-1:])
        return layer_norm(inputs.astype(jnp.float32), scale, bias, self.epsilon)


class Linear(Module):
    """Apply y = x W + b, computed in `compute.dtype` and returned in `out_dtype` (default: the same).

    The initial kernel is multiplied by `init_scale`; dW is accumulated in `compute.gradient_dtype`.
    """

    features: int
    use_bias: bool = True
    param_init: str = "normal"
    init_scale: float = 1.0
    compute: Compute = Compute()
    out_dtype: Any = None

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
        fan_in = inputs.shape[-1]
        draw = normal_init(self.param_init)
        kernel = self.param("kernel", lambda key, shape: self.init_scale * draw(key, shape), (fan_in, self.features))
        out_dtype = self.out_dtype or self.compute.dtype
        outputs = product(inputs, kernel, self.compute.dtype, out_dtype, self.compute.gradient_dtype)
        if self.use_bias:
            bias_init = uniform_init(fan_in) if self.param_init == "torch" else nn.initializers.zeros
            outputs = add_bias(outputs, self.param("bias", bias_init, (self.features,)))
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


class RelativePositionBias(Module):
    """Return one learned logit offset for each head, query and key, read from a table of 2-D offsets."""

    grid: tuple[int, int]
    num_heads: int

    @nn.compact
    def __call__(self) -> AttentionBias:
        gh, gw = self.grid
        shape = ((2 * gh - 1) * (2 * gw - 1) + 3, self.num_heads)
        table = self.param("table", nn.initializers.zeros, shape)
        return jnp.take(table, relative_position_index(self.grid), axis=0).transpose(2, 0, 1)


def rotary_angles(grid: tuple[int, int], head_dim: int) -> Float[np.ndarray, "n half"]:
    """Return the angles by which rotary position embedding turns pairs of features of each patch, row-major.

    With y and x the centre of a patch on a square from -1 to 1, and f_i = 100^(-4i/hd) for i < hd/4, they are
    2 pi y f_0, 2 pi y f_1, ..., 2 pi x f_0, 2 pi x f_1, ...

    Source: the released DINOv3 networks.
    """
    centres = [(2.0 * np.arange(size) + 1.0) / size - 1.0 for size in grid]
    places = np.stack(np.meshgrid(*centres, indexing="ij"), axis=-1).reshape(-1, 2, 1)
    frequencies = ROTARY_BASE ** -np.arange(0.0, 1.0, 4.0 / head_dim)
    return (2.0 * np.pi * places * frequencies).reshape(len(places), -1)


def rotate(qkv: Float[Array, "b l d3"], num_heads: int, grid: tuple[int, int], first: int) -> Float[Array, "b l d3"]:
    """Turn queries and keys of the patches, which begin at token `first`, by `rotary_angles`; others stay as they are.

    Feature i of a head is paired with feature i + hd/2.
    """
    batch, length, width = qkv.shape
    heads = qkv.reshape(batch, length, 3, num_heads, 2, -1)
    angles = rotary_angles(grid, 2 * heads.shape[-1])
    angles = np.pad(angles, ((first, length - first - len(angles)), (0, 0)))[:, None, None]
    cos, sin = np.cos(angles, dtype=np.float32), np.sin(angles, dtype=np.float32)
    low, high = (heads[:, :, :2, :, half].astype(jnp.float32) for half in (0, 1))
    turned = jnp.stack([low * cos - high * sin, high * cos + low * sin], axis=-2).astype(qkv.dtype)
    return jnp.concatenate([turned, heads[:, :, 2:]], axis=2).reshape(batch, length, width)


def drop_path(branch: Tokens, rate: float, key: PRNGKeyArray) -> Tokens:
    """Zero a whole branch of a sample with probability `rate`, dividing the others by 1 − rate."""
    keep = jax.random.bernoulli(key, 1.0 - rate, (branch.shape[0], 1, 1))
    return jnp.where(keep, branch / (1.0 - rate), 0.0)


class Attention(Module):
    """Attend over all tokens: softmax(q kᵀ / √hd + bias) v, then an output projection.

    `qkv_bias`: 'qv' learns biases of queries and values only (a key bias cancels in the softmax), 'full' one vector for
    all three, 'none' nothing. With `relative_grid` the layer owns a relative-position table; with `rotary_grid` it
    turns queries and keys of the patches, the last tokens, by `rotary_angles`.
    """

    num_heads: int
    qkv_bias: str = "qv"
    relative_grid: tuple[int, int] | None = None
    rotary_grid: tuple[int, int] | None = None
    param_init: str = "normal"
    init_scale: float = 1.0
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, tokens: Tokens, bias: AttentionBias | None = None, length: int | None = None) -> Tokens:
        width = tokens.shape[-1]
        if width % self.num_heads:
            raise ValueError(f"width {width} is not divisible by num_heads {self.num_heads}")
        if self.qkv_bias not in QKV_BIASES:
            raise ValueError(f"unknown qkv_bias {self.qkv_bias!r}: choose one of {', '.join(QKV_BIASES)}")
        linear = functools.partial(Linear, param_init=self.param_init, compute=self.compute)
        qkv = linear(3 * width, self.qkv_bias == "full", name="qkv")(tokens)
        if self.qkv_bias == "qv":
            q_bias = self.param("q_bias", nn.initializers.zeros, (width,))
            v_bias = self.param("v_bias", nn.initializers.zeros, (width,))
            qkv = add_bias(qkv, jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias]))
        if self.rotary_grid is not None:
            first = (length or tokens.shape[1]) - self.rotary_grid[0] * self.rotary_grid[1]
            qkv = rotate(qkv, self.num_heads, self.rotary_grid, first)
        if self.relative_grid is not None:
            own = RelativePositionBias(self.relative_grid, self.num_heads, name="rel_pos_bias")()
            bias = own if bias is None else bias + own
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "weights", attention_weights(qkv, bias, self.num_heads))
        mixed = attend(qkv, bias, self.num_heads, implementation=self.compute.attention, length=length)
        return linear(width, init_scale=self.init_scale, name="proj")(mixed)


class Mlp(Module):
    """Apply two linear maps with an activation between them.

    With `activation` 'swiglu' the output of the first map is twice as wide, a gate g and values v, and the second map
    reads silu(g) · v.
    """

    mlp_dim: int
    activation: str = "gelu"
    param_init: str = "normal"
    init_scale: float = 1.0
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, tokens: Tokens) -> Tokens:
        gated = self.activation == "swiglu"
        fan_out = 2 * self.mlp_dim if gated else self.mlp_dim
        linear = functools.partial(Linear, param_init=self.param_init, compute=self.compute)
        expanded = linear(fan_out, name="fc1")(tokens)
        if gated:
            gate, values = jnp.split(expanded, 2, axis=-1)
            activated = jax.nn.silu(gate) * values
        else:
            activated = ACTIVATIONS[self.activation](expanded)
        return linear(tokens.shape[-1], init_scale=self.init_scale, name="fc2")(activated)


class Block(Module):
    """Apply one pre-norm transformer block.

        x ← x + drop(γ₁ · attention(norm₁ x)),   x ← x + drop(γ₂ · mlp(norm₂ x))

    `backbone` gives its sizes; a `layer_scale_init` of None or 0 leaves the γ out. `layer_index` counts from 1; the
    kernels that write to the residual stream start divided by √(2 · layer_index). `param_init` replaces that of the
    backbone unless it is ''. Stochastic depth draws from the stream `drop_path`.

    Source: released behaviour of all BEiT v2 transformers.
    """

    backbone: Backbone
    compute: Compute = Compute()
    layer_index: int = 1
    drop_path_rate: float = 0.0
    param_init: str = ""

    @nn.compact
    def __call__(self, tokens: Tokens, bias: AttentionBias | None = None, *, train: bool = False) -> Tokens:
        backbone = self.backbone
        shared = dict(
            param_init=self.param_init or backbone.param_init,
            init_scale=float(1.0 / np.sqrt(2.0 * self.layer_index)),
            compute=self.compute,
        )
        grids = dict(
            relative_grid=backbone.grid if backbone.position == "relative" else None,
            rotary_grid=backbone.grid if backbone.rotary else None,
        )
        attention = Attention(backbone.num_heads, backbone.qkv_bias, **grids, **shared, name="attn")
        mlp = Mlp(backbone.mlp_dim, backbone.activation, **shared, name="mlp")
        drops = [lambda branch: branch] * 2
        if train and self.drop_path_rate > 0.0:
            keys = jax.random.split(self.make_rng("drop_path"))
            drops = [functools.partial(drop_path, rate=self.drop_path_rate, key=key) for key in keys]

        length = tokens.shape[1]
        branch = pad_tokens(LayerNorm(backbone.norm_eps, name="norm1")(tokens), self.compute.attention)
        branch = drops[0](self._scaled("gamma_1", attention(branch, bias, length)))
        tokens = tokens + branch[:, :length]
        branch = mlp(LayerNorm(backbone.norm_eps, name="norm2")(tokens))
        return tokens + drops[1](self._scaled("gamma_2", branch))

    def _scaled(self, name: str, branch: Tokens) -> Float[Array, "b l d"]:
        init = self.backbone.layer_scale_init
        return branch * self.param(name, nn.initializers.constant(init), (branch.shape[-1],)) if init else branch


def apply_block(block: Block, tokens: Tokens, bias: AttentionBias | None, *, train: bool, remat: str) -> Tokens:
    """Run a block; the backward pass recomputes what the policy `remat` (of `REMAT`, or 'none') does not save."""

    def run(block: Block, tokens: Tokens, bias: AttentionBias | None) -> Tokens:
        return block(tokens, bias, train=train)

    if remat != "none":
        run = nn.remat(run, policy=REMAT[remat])
    return constrain(run(block, tokens, bias))


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Return the stochastic-depth rate of each of `depth` blocks, rising linearly from 0 to `rate`."""
    return [float(r) for r in np.linspace(0.0, rate, depth)]
