"""Tokenize: write the code ids of every image's fixed views, so that MIM need not run the tokenizer.

Also the one way in which a trained tokenizer is loaded and called: `load_tokenizer`.
"""

import dataclasses

import jax

from beitv2_jax import config as config_lib
from beitv2_jax.convert.runs import check_stage, read_run
from beitv2_jax.data.target_cache.encoding import CodeEncoding
from beitv2_jax.errors import UserError
from beitv2_jax.models.backbone import Compute
from beitv2_jax.models.preprocess import to_unit_range
from beitv2_jax.models.vqkd import VQKD
from beitv2_jax.tasks import inputs, vqkd
from beitv2_jax.tasks.api import TargetCacheTask
from beitv2_jax.tasks.common import view_pixels
from beitv2_jax.typing import CodeIds, Images, PyTree


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A trained VQ-KD model as a function: images 0..255 -> code ids. Its weights are passed in, never closed over."""

    name: str
    model: VQKD
    grid: tuple[int, int]
    weights_hash: str

    def encode(self, variables: PyTree, images: Images) -> CodeIds:
        """Return the code id of every patch; no gradient passes."""
        ids = self.model.apply(variables, to_unit_range(images), method=VQKD.encode)
        return jax.lax.stop_gradient(ids)


def load_tokenizer(
    run_dir: str, image_size: int, dtype: str, size_key: str = "views.image_size"
) -> tuple[Tokenizer, PyTree]:
    """Load the tokenizer that a vqkd run left in `run_dir`, with its variables {"params", "codebook"}.

    `dtype` is that of its matrix products here; codes are always computed in float32. `size_key` is the config
    key of `image_size`.

    Raises:
        UserError: there is no finished vqkd run, or it was trained at another image size.
    """
    check_stage(run_dir, ("vqkd",), "config.tokenizer.run")
    run = read_run(run_dir)
    trained = config_lib.from_json(run.config)
    if trained.views.image_size != image_size:
        raise UserError(
            f"The tokenizer in {run_dir} was trained at {trained.views.image_size} pixels, this run uses {image_size}.",
            "Did you mean the same image size for both?",
            f"Write --config.{size_key}={trained.views.image_size}.",
        )
    teacher_width = run.params["decode_task"]["fc2"]["kernel"].shape[-1]
    model = vqkd.make_model(trained, Compute(dtype=dtype), teacher_width=teacher_width)
    side = image_size // trained.model.encoder.patch_size
    tokenizer = Tokenizer(name=run.name, model=model, grid=(side, side), weights_hash=run.weights_hash)
    return tokenizer, {"params": run.params, "codebook": run.model_state}


def build(config) -> TargetCacheTask:
    """Build the stage that writes code ids for the `num_views` views of the train split and one centre crop of eval.

    Raises:
        UserError: the data set or the tokenizer run is missing.
    """
    tokenizer, variables = load_tokenizer(config.tokenizer.run, config.views.image_size, config.efficiency.dtype)
    sources = inputs.open_sources(config)

    def apply(frozen, batch):
        return tokenizer.encode(frozen, view_pixels(batch))

    encoding = CodeEncoding(tokenizer.model.quantizer.codebook_size, tokenizer.grid[0] * tokenizer.grid[1])
    manifest = {
        "grid": list(tokenizer.grid),
        "codebook_size": tokenizer.model.quantizer.codebook_size,
        "tokenizer": tokenizer.name,
        "tokenizer_hash": tokenizer.weights_hash,
        "target": encoding.target,
        "dtype": encoding.dtype,
        "compute_dtype": config.efficiency.dtype,
    }
    return TargetCacheTask(
        name="tokenize",
        frozen=variables,
        apply=apply,
        encoding=encoding,
        manifest=manifest,
        sources=sources,
    )
