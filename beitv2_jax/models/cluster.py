"""Spherical k-means of teacher features: the codebook of the cluster tokenizer, and its codes.

The cluster tokenizer trains no network: the code of a patch is the centroid nearest to its teacher feature. The cluster
stage makes it, and every stage that takes a tokenizer takes it too.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from beitv2_jax.models.ops.nearest_code import HIGHEST, cluster_sums
from beitv2_jax.models.quantizer import l2_normalise, nearest_code
from beitv2_jax.models.teachers import Teacher
from beitv2_jax.typing import ByteImages, Codebook, CodeIds, PyTree, TeacherFeatures


@dataclasses.dataclass(frozen=True)
class ClusterTokenizer:
    """A teacher and a codebook of directions of its features.

    Variables: `params` of the teacher; `codebook` with `quantizer/codebook` (unit rows), the `mean` of the features,
    `features` (for each code the mean direction of the teacher features that it stands for) and, where the features
    were projected, the `projection` onto their principal components.
    """

    teacher: Teacher
    nearest_code: str = "scan"

    def encode(self, variables: PyTree, images: ByteImages) -> CodeIds:
        """Return the code id of every patch of images 0..255, patches row-major."""
        directions = centred_directions(variables["codebook"], self.teacher.features(variables["params"], images))
        codebook = variables["codebook"]["quantizer"]["codebook"]
        samples = directions.reshape(-1, directions.shape[-1])
        return nearest_code(samples, codebook, implementation=self.nearest_code).reshape(directions.shape[:-1])

    def decode(self, variables: PyTree, code_ids: CodeIds) -> TeacherFeatures:
        """Return the mean direction of the teacher features of each code."""
        return variables["codebook"]["features"][code_ids]


def centred_directions(codebook: PyTree, features: Float[Array, "... t"]) -> Float[Array, "... c"]:
    """Return l2norm(P (f - m)) of teacher features f, with the mean m and, where there is one, the projection P."""
    centred = features.astype(jnp.float32) - codebook["mean"]
    if "projection" in codebook:
        centred = jnp.matmul(centred, codebook["projection"], precision=HIGHEST)
    return l2_normalise(centred)


def principal_components(centred: Float[np.ndarray, "m t"], count: int) -> Float[np.ndarray, "t c"]:
    """Return the `count` orthonormal directions of largest variance, the largest first; computed in float64."""
    covariance = np.zeros((centred.shape[1],) * 2)
    for start in range(0, len(centred), 8192):  # a float64 copy of all tokens would be the largest array
        rows = centred[start : start + 8192].astype(np.float64)
        covariance += rows.T @ rows
    _, vectors = np.linalg.eigh(covariance)  # in ascending order
    return vectors[:, ::-1][:, :count].astype(np.float32)


@jax.jit
def lloyd_step(unit: Float[Array, "m c"], centroids: Codebook) -> tuple[Codebook, Int[Array, "m"], Float[Array, "k"]]:
    """Assign every unit vector to its nearest centroid and move the centroids; return ids and counts before the move.

    a_i = argmax_k <f_i, c_k>, and c_k <- l2norm(sum of the f_i with a_i = k). Centroids without vectors take, in the
    order of their ids, the vectors with the smallest <f_i, c_a(i)>, the farthest first; the first vector wins a tie.
    """
    ids = nearest_code(unit, centroids)
    sums, counts = cluster_sums(unit, ids, jnp.ones(len(unit)), len(centroids))
    similarity = jnp.einsum("mc,mc->m", unit, centroids[ids], precision=HIGHEST)
    farthest = jnp.argsort(similarity, stable=True)
    is_empty = counts == 0
    rank = jnp.cumsum(is_empty) - 1
    replacements = unit[farthest[jnp.clip(rank, 0, len(unit) - 1)]]
    return jnp.where(is_empty[:, None], replacements, l2_normalise(sums)), ids, counts
