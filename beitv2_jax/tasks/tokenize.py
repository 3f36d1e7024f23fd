"""Tokenize: write the code ids of every image's fixed views, so that MIM need not run the tokenizer.

Also the one way in which a tokenizer of any kind is loaded and called: `load_tokenizer`, `tokenizer_of`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from beitv2_jax.convert.runs import check_stage, read_run
from beitv2_jax.convert.teachers.load import build_teacher
from beitv2_jax.convert.weights import Weights, weights_of_run
from beitv2_jax.data.target_cache.encoding import CodeEncoding
from beitv2_jax.errors import UserError
from beitv2_jax.models.backbone import Compute
from beitv2_jax.models.cluster import ClusterTokenizer
from beitv2_jax.models.preprocess import to_unit_range
from beitv2_jax.models.vqkd import VQKD
from beitv2_jax.tasks import inputs
from beitv2_jax.tasks.api import TargetCacheTask
from beitv2_jax.tasks.common import view_pixels
from beitv2_jax.typing import Codebook, CodeIds, Images, PyTree, TeacherFeatures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer as functions of its variables, which are passed in and never closed over.

    Attributes:
        name: of the run.
        weights_hash: of its variables.
        image_size: side of the images that it reads, in pixels.
        grid: rows and columns of code ids of an image.
        codebook_size: number of codes.
        ids: (variables, images 0..255) -> code ids 'b n', patches row-major.
        features: (variables, code ids) -> the teacher features 'b n t' that they stand for.
        codebook: variables -> the codes 'k c'.
    """

    name: str
    weights_hash: str
    image_size: int
    grid: tuple[int, int]
    codebook_size: int
    ids: Callable[[PyTree, Images], CodeIds]
    features: Callable[[PyTree, CodeIds], TeacherFeatures]
    codebook: Callable[[PyTree], Codebook]

    def encode(self, variables: PyTree, images: Images) -> CodeIds:
        """Return the code id of every patch; no gradient passes."""
        return jax.lax.stop_gradient(self.ids(variables, images))


def tokenizer_of(weights: Weights, compute: Compute, *, name: str = "", weights_hash: str = "") -> Tokenizer:
    """Return the tokenizer whose variables are `weights.variables`, of which nothing but the arguments are used here.

    Raises:
        KeyError: weights of another kind than those in `TOKENIZERS`.
    """
    ids, features, codebook, grid = TOKENIZERS[weights.kind](weights.arguments, compute)
    return Tokenizer(
        name=name,
        weights_hash=weights_hash,
        image_size=weights.arguments["image_size"],
        grid=grid,
        codebook_size=weights.arguments["codebook_size"],
        ids=ids,
        features=features,
        codebook=codebook,
    )


def _vqkd(arguments: Mapping[str, Any], compute: Compute):
    model = VQKD.from_arguments(arguments, compute)

    def ids(variables, images):
        return model.apply(variables, to_unit_range(images), method=VQKD.encode)

    def features(variables, code_ids):
        codes = model.apply(variables, code_ids, method=VQKD.codes_of)
        return model.apply(variables, codes, method=VQKD.decode)

    def codebook(variables):
        return model.apply(variables, jnp.arange(model.quantizer.codebook_size), method=VQKD.codes_of)

    return ids, features, codebook, model.grid


def _cluster(arguments: Mapping[str, Any], compute: Compute):
    tokenizer = ClusterTokenizer(build_teacher(arguments["teacher"], compute.dtype), compute.nearest_code)

    def codebook(variables):
        return variables["codebook"]["quantizer"]["codebook"]

    return tokenizer.encode, tokenizer.decode, codebook, tokenizer.teacher.grid


TOKENIZERS = {"vqkd": _vqkd, "cluster": _cluster}
"""Kind of weights, which is also its stage -> its functions and its grid, from (arguments, compute)."""


def load_tokenizer(
    run_dir: str, image_size: int, dtype: str, size_key: str = "views.image_size"
) -> tuple[Tokenizer, PyTree]:
    """Load the tokenizer that a run left in `run_dir`, with its variables {"params", "codebook"}.

    `dtype` is that of its matrix products here; codes are always computed in float32. `size_key` is the config
    key of `image_size`.

    Raises:
        UserError: there is no finished run of a tokenizer, or it was made at another image size.
    """
    check_stage(run_dir, TOKENIZERS, "config.tokenizer.run")
    run = read_run(run_dir)
    weights = weights_of_run(run_dir, run)
    check_image_size(run_dir, weights.arguments["image_size"], image_size, size_key)
    tokenizer = tokenizer_of(weights, Compute(dtype=dtype), name=run.name, weights_hash=run.weights_hash)
    return tokenizer, weights.variables


def check_image_size(run_dir: str, trained_size: int, image_size: int, size_key: str = "views.image_size") -> None:
    """Raise UserError unless the tokenizer in `run_dir` is for images of this size; `size_key` is its config key."""
    if trained_size != image_size:
        raise UserError(
            f"The tokenizer in {run_dir} is trained at {trained_size} pixels, this run uses {image_size}.",
            "Did you mean the same image size for both?",
            f"Write --config.{size_key}={trained_size}.",
        )


class TokenizerSizes(NamedTuple):
    """What the config of a tokenizer's run says of it; attributes as those of `Tokenizer`."""

    name: str
    image_size: int
    grid: tuple[int, int]
    codebook_size: int


def sizes_of(config: Mapping[str, Any], name: str) -> TokenizerSizes:
    """Return the sizes of the tokenizer that a stage with this config makes; `name` is that of its run."""
    model, image_size = config["model"], config["views"]["image_size"]
    grid = (image_size // model.get("encoder", model)["patch_size"],) * 2
    return TokenizerSizes(name, image_size, grid, model["codebook_size"])


def check_tokenizer(config, tokenizer: Tokenizer | TokenizerSizes) -> None:
    """Raise UserError unless the tokenizer that the config of a tokenize stage names reads its views."""
    check_image_size(config.tokenizer.run, tokenizer.image_size, config.views.image_size)


def build(config) -> TargetCacheTask:
    """Build the stage that writes code ids for the `num_views` views of the train split and one centre crop of eval.

    Raises:
        UserError: the data set or the tokenizer run is missing.
    """
    tokenizer, variables = load_tokenizer(config.tokenizer.run, config.views.image_size, config.efficiency.dtype)
    sources = inputs.open_sources(config)

    def apply(frozen, batch):
        return tokenizer.encode(frozen, view_pixels(batch))

    encoding = CodeEncoding(tokenizer.codebook_size, tokenizer.grid[0] * tokenizer.grid[1])
    manifest = {
        "grid": list(tokenizer.grid),
        "codebook_size": tokenizer.codebook_size,
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
