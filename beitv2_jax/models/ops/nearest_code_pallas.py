"""The search for the nearest code as Pallas kernels, for TPU and for GPU.

Chosen by `models.ops.nearest_code`; they return the same ids as its other implementations. On other chips they are
interpreted.

Experimental: compiled for TPU v5e and H100 and run interpreted, but never run on a chip, so they are not a default.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from beitv2_jax.models.ops.nearest_code import HIGHEST, better, whole_tiles
from beitv2_jax.typing import Codebook

TPU_BLOCK, TPU_TILE = 1024, 512
GPU_BLOCK, GPU_TILE = 128, 64


def nearest_rows(unit: Float[Array, "m c"], codebook: Codebook, offsets: Float[Array, "k"]) -> Int[Array, "m"]:
    """Return argmin_k offsets_k − 2⟨z, e_k⟩ for every row z of `unit`, by the kernel of the platform compiled for."""
    return jax.lax.platform_dependent(
        unit,
        codebook,
        offsets,
        tpu=tpu_kernel,
        cuda=gpu_kernel,
        default=functools.partial(tpu_kernel, interpret=True),
    )


def tpu_kernel(unit, codebook, offsets, *, interpret: bool = False) -> Int[Array, "m"]:
    """Run over row blocks and, inside, over tiles of the codebook; codes lie along sublanes, so minima are cheap."""
    num_rows, code_dim = unit.shape
    block = min(TPU_BLOCK, num_rows + -num_rows % 128)
    tile = min(TPU_TILE, len(codebook) + -len(codebook) % 8)
    codebook, offsets = whole_tiles(codebook, offsets, tile)
    columns = jnp.pad(unit.T, ((0, 0), (0, -num_rows % block)))

    def kernel(columns_ref, codebook_ref, offsets_ref, ids_ref, score_ref):
        index = pl.program_id(1)

        @pl.when(index == 0)
        def _():
            score_ref[...] = jnp.full_like(score_ref, jnp.inf)
            ids_ref[...] = jnp.zeros_like(ids_ref)

        products = jnp.dot(codebook_ref[...], columns_ref[...], precision=HIGHEST, preferred_element_type=jnp.float32)
        scores = offsets_ref[...] - 2.0 * products
        score_ref[...], ids_ref[...] = better(score_ref[...], ids_ref[...], scores, index * tile, axis=0)

    ids = pl.pallas_call(
        kernel,
        grid=(columns.shape[1] // block, len(offsets) // tile),
        in_specs=[
            pl.BlockSpec((code_dim, block), lambda row, code: (0, row)),
            pl.BlockSpec((tile, code_dim), lambda row, code: (code, 0)),
            pl.BlockSpec((tile, 1), lambda row, code: (code, 0)),
        ],
        out_specs=pl.BlockSpec((1, block), lambda row, code: (0, row)),
        out_shape=jax.ShapeDtypeStruct((1, columns.shape[1]), jnp.int32),
        scratch_shapes=[pltpu.VMEM((1, block), jnp.float32)],
        cost_estimate=pl.CostEstimate(
            flops=2 * columns.size * len(codebook),
            transcendentals=0,
            bytes_accessed=4 * (columns.size + columns.shape[1] // block * codebook.size + columns.shape[1]),
        ),
        name="nearest_code",
        interpret=interpret,
    )(columns, codebook, offsets[:, None])
    return ids[0, :num_rows]


def gpu_kernel(unit, codebook, offsets, *, interpret: bool = False) -> Int[Array, "m"]:
    """Give each program a block of rows, which passes over the whole codebook."""
    num_rows, code_dim = unit.shape
    width = max(16, 1 << (code_dim - 1).bit_length())  # the tensor units want powers of two; zeros add nothing
    codebook, offsets = whole_tiles(codebook, offsets, GPU_TILE)
    unit = jnp.pad(unit, ((0, -num_rows % GPU_BLOCK), (0, width - code_dim)))
    codebook = jnp.pad(codebook, ((0, 0), (0, width - code_dim)))

    def kernel(unit_ref, codebook_ref, offsets_ref, ids_ref):
        rows = unit_ref[...]

        def one_tile(index, best):
            here = pl.ds(index * GPU_TILE, GPU_TILE)
            products = jnp.dot(rows, codebook_ref[here, :].T, precision=HIGHEST, preferred_element_type=jnp.float32)
            return better(*best, offsets_ref[here][None, :] - 2.0 * products, index * GPU_TILE, axis=1)

        start = (jnp.full((GPU_BLOCK, 1), jnp.inf, jnp.float32), jnp.zeros((GPU_BLOCK, 1), jnp.int32))
        ids_ref[...] = jax.lax.fori_loop(0, offsets_ref.shape[0] // GPU_TILE, one_tile, start)[1]

    ids = pl.pallas_call(
        kernel,
        grid=(len(unit) // GPU_BLOCK,),
        in_specs=[
            pl.BlockSpec((GPU_BLOCK, width), lambda row: (row, 0)),
            pl.BlockSpec(codebook.shape, lambda row: (0, 0)),
            pl.BlockSpec(offsets.shape, lambda row: (0,)),
        ],
        out_specs=pl.BlockSpec((GPU_BLOCK, 1), lambda row: (row, 0)),
        out_shape=jax.ShapeDtypeStruct((len(unit), 1), jnp.int32),
        compiler_params=None if interpret else triton.CompilerParams(num_warps=4, num_stages=2),
        name="nearest_code",
        interpret=interpret,
    )(unit, codebook, offsets)
    return ids[:num_rows, 0]
