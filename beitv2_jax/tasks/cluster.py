"""Cluster: make a tokenizer of the teacher itself, from k-means clusters of its stored features.

No network is trained. With f the direction of a feature after the mean of all features is subtracted (and, if asked
for, projected onto principal components), Lloyd's rounds are a_i = argmax_k <f_i, c_k> and c_k = l2norm(sum of the f_i
with a_i = k).
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from beitv2_jax import config as config_lib
from beitv2_jax.convert.files import read_config
from beitv2_jax.convert.runs import is_run
from beitv2_jax.convert.teachers.load import read_teacher
from beitv2_jax.data.sources import Source
from beitv2_jax.data.target_cache.encoding import FEATURES
from beitv2_jax.data.target_cache.reader import TargetReader
from beitv2_jax.errors import UserError
from beitv2_jax.models.cluster import centred_directions, lloyd_step, principal_components
from beitv2_jax.models.ops.nearest_code import cluster_sums
from beitv2_jax.models.quantizer import l2_normalise, nearest_code
from beitv2_jax.models.teachers import Teacher
from beitv2_jax.rng import host_rng
from beitv2_jax.runtime.buckets import absolute
from beitv2_jax.tasks import inputs, targets
from beitv2_jax.tasks.losses import cosine_distillation
from beitv2_jax.typing import PyTree, TeacherFeatures

ROWS = 8192
"""Tokens that are coded at once."""
TOKENS_PER_VIEW = 16
"""Fewest tokens that are drawn from a view, where a part of all tokens is drawn: reading a view costs the same."""


@dataclasses.dataclass(frozen=True)
class Clustering:
    """What the cluster stage makes a tokenizer from.

    Attributes:
        sources: the train and the eval split.
        stored: their stored features.
        teacher: its description (`convert.teachers.load.read_teacher`).
        params: its weights.
    """

    sources: tuple[Source, Source]
    stored: tuple[TargetReader, TargetReader]
    teacher: dict[str, Any]
    params: PyTree


def build(config) -> Clustering:
    """Open the features and the teacher.

    Raises:
        UserError: there are no features of this data set and these views, or fewer than codes; their teacher is not
            there or has changed; or there are several processes.
    """
    if jax.process_count() > 1:
        raise UserError(
            f"The stage 'cluster' runs in one process, and there are {jax.process_count()}.",
            "Did you mean to extract the features with several, which the stage before this one can?",
            "Start the same command on one machine, without the flags of a launcher.",
        )
    folder = config.teacher.features
    manifest = targets.manifest_of(folder, FEATURES)
    check_features(config, manifest)
    sources = inputs.open_sources(config)
    grid = _grid(config)
    stored = targets.open_cache(folder, config, sources, FEATURES, grid)
    num_tokens = (len(stored[0]) - len(stored[0].unreadable)) * config.views.num_views * grid[0] * grid[1]
    if num_tokens < config.model.codebook_size:
        raise UserError(
            f"{folder} holds {num_tokens} features of patches, and model.codebook_size={config.model.codebook_size} "
            "codes need as many.",
            "Did you mean a codebook for a small data set, of about fifty patches a code?",
            f"Write --config.model.codebook_size={max(1, num_tokens // 50)}.",
        )
    width, components = manifest["teacher_width"], config.clustering.components
    if components > width:
        raise UserError(
            f"clustering.components={components} is more than the {width} numbers of a feature in {folder}.",
            "Did you mean the features as they are?",
            "Write --config.clustering.components=0.",
        )
    description, params = read_teacher(**_teacher_arguments(config))
    if description["weights_hash"] != manifest["teacher_hash"]:
        raise UserError(
            f"The features in {folder} were made by the teacher {manifest['teacher']} with other weights than those in "
            f"{_teacher_arguments(config)['weights']}.",
            "Was the teacher trained further or replaced after its features had been stored?",
            f"Write --config.teacher.weights=PATH with the former weights, or delete {folder} and run the stage "
            "extract again.",
        )
    return Clustering(sources, stored, description, params)


def check_features(config, manifest: Mapping[str, Any]) -> None:
    """Raise UserError unless the stored features that the config names are those of its views and patches."""
    targets.check_targets(manifest, config.teacher.features, config, FEATURES, _grid(config))


def _grid(config) -> tuple[int, int]:
    return (config.views.image_size // config.model.patch_size,) * 2


def _teacher_arguments(config) -> dict[str, Any]:
    """Return the arguments of `read_teacher` with which the extract stage has made the features.

    Raises:
        UserError: no extract stage has made them.
    """
    folder = config.teacher.features
    if not is_run(folder):
        raise UserError(
            f"{folder} does not say which weights its teacher has: no stage 'extract' has written it.",
            "Were the features computed by a program of your own? Its network cannot tokenize new images here.",
            "Write --config.teacher.features=DIR with the workdir of a stage 'extract'.",
        )
    made = config_lib.resolve(config_lib.from_json(read_config(folder)), os.path.dirname(absolute(folder)))
    arguments = targets.teacher_arguments(made, config.model.patch_size)
    del arguments["dtype"]
    return arguments | {"weights": config.teacher.weights or arguments["weights"]}


class TokensOfView(NamedTuple):
    """Tokens of one stored view that are to be clustered: the example, the view, and places of patches."""

    example_id: int
    view: int
    patches: Int[np.ndarray, "n"]


def drawn_tokens(reader: TargetReader, num_views: int, max_tokens: int, seed: int) -> list[TokensOfView]:
    """Return at most `max_tokens` tokens of the first `num_views` views of all readable examples, by example and view.

    All of them where they are not more. Otherwise views are drawn without replacement, and from each as many tokens, at
    least `TOKENS_PER_VIEW` where it has these: a function of (seed, ids of the readable examples).
    """
    readable = [number for number in range(len(reader)) if number not in reader.unreadable]
    total, count = len(readable) * num_views, reader.encoding.num_tokens
    chosen = np.arange(total)
    if total * count > max_tokens:
        count = min(count, max_tokens, max(TOKENS_PER_VIEW, max_tokens // total))
        chosen = np.sort(host_rng(seed, "cluster views").permutation(total)[: max_tokens // count])
    found = []
    for number in chosen.tolist():
        example_id, view = readable[number // num_views], number % num_views
        rng = host_rng(seed, "cluster tokens", example_id, view)
        found.append(TokensOfView(example_id, view, np.sort(rng.permutation(reader.encoding.num_tokens)[:count])))
    return found


def clustered(
    tokens: Float[np.ndarray, "m t"], *, codebook_size: int, iterations: int, components: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Yield the codebook after each round of k-means of the directions of `tokens`, as `ClusterTokenizer` has it.

    The first centroids are distinct tokens, drawn from `seed`.
    """
    mean = tokens.mean(axis=0, dtype=np.float64).astype(np.float32)
    codebook = {"mean": mean}
    if components:
        codebook["projection"] = principal_components(tokens - mean, components)
    unit = jax.jit(centred_directions)(codebook, tokens)
    first = np.sort(host_rng(seed, "cluster start").permutation(len(tokens))[:codebook_size])
    centroids = unit[first]
    for _ in range(iterations):
        centroids, _, _ = lloyd_step(unit, centroids)
        yield {**codebook, "quantizer": {"codebook": centroids}}


def code_ids_of(codebook: PyTree, features: Float[np.ndarray, "m t"]) -> Int[np.ndarray, "m"]:
    """Return the code ids of features."""
    coded = jax.jit(lambda rows: _coded(codebook, rows)[0])
    return np.concatenate([coded(features[start : start + ROWS]) for start in range(0, len(features), ROWS)])


def features_of_codes(codebook: PyTree, tokens: Float[np.ndarray, "m t"]) -> Float[np.ndarray, "k t"]:
    """Return the mean direction of the features of each code, and that of all features for a code without any."""
    num_codes = len(codebook["quantizer"]["codebook"])
    sums = np.zeros((num_codes, tokens.shape[1]))
    for start in range(0, len(tokens), ROWS):
        sums += _sums_of_codes(codebook, tokens[start : start + ROWS])
    sums = np.where(sums.any(axis=1, keepdims=True), sums, codebook["mean"])
    return np.asarray(l2_normalise(sums))


@jax.jit
def _sums_of_codes(codebook: PyTree, features: Float[Array, "m t"]) -> Float[Array, "k t"]:
    ids, _ = _coded(codebook, features)
    return cluster_sums(l2_normalise(features), ids, jnp.ones(len(features)), len(codebook["quantizer"]["codebook"]))[0]


def _coded(codebook: PyTree, features: Float[Array, "... t"]) -> tuple[Int[Array, "..."], Float[Array, "..."]]:
    """Return the code ids of features, and the squared distances of their directions from the codes."""
    unit, codes = centred_directions(codebook, features), codebook["quantizer"]["codebook"]
    ids = nearest_code(unit.reshape(-1, unit.shape[-1]), codes).reshape(unit.shape[:-1])
    return ids, jnp.sum((unit - codes[ids]) ** 2, axis=-1)


def cluster_evaluation(teacher: Teacher) -> Callable:
    """Return the `evaluate` of a cluster tokenizer, with the sums of `tasks.vqkd.vqkd_evaluation`."""

    def evaluate(params, codebook, frozen, batch):
        features = teacher.features(params, batch["images"])
        return evaluated(codebook, features, batch["weight"].astype(jnp.float32))

    return evaluate


@jax.jit
def evaluated(codebook: PyTree, features: TeacherFeatures, weight: Float[Array, "b"]) -> dict[str, Array]:
    """Return the sums of `tasks.vqkd.vqkd_evaluation` over the features of images."""
    ids, distance = _coded(codebook, features)
    loss = cosine_distillation(codebook["features"][ids], features)
    return {
        "examples": weight.sum(),
        "counts": jnp.zeros(len(codebook["features"])).at[ids].add(weight[:, None]),
        "reconstruction": jnp.sum(weight * loss.mean(axis=-1)),
        "distance": jnp.sum(weight * distance.mean(axis=-1)),
    }
