"""Logistic regression on frozen features: the whole training set in every step, read piece by piece."""

import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np
import optax
from jaxtyping import Float, Int, Num

from beitv2_jax.evaluation.features import OnMove

PIECE_ROWS = 2**13
"""Rows whose loss and gradient are computed at once."""
_LINE_SEARCH_STEPS = 50


class LogisticRegression:
    """Minimise the mean cross entropy + |W|² / (2 C n) over kernel W and bias, by L-BFGS in float64.

    For two classes |W|² counts twice, which makes it the regression with a single logit. The classes are those that
    occur among the labels.

    The search runs in coordinates in which the curvature at W = 0 is about the same in all directions. Features that
    are correlated or differ in scale take several times fewer steps in these, and the minimum is the same.

    Source: `LogisticRegression` of scikit-learn (solver lbfgs), whose objective and stopping rules these are.
    """

    def __init__(
        self,
        features: Num[np.ndarray, "n d"],
        labels: Int[np.ndarray, "n"],
        rows: Int[np.ndarray, "m"],
        *,
        max_steps: int,
        tolerance: float,
        on_move: OnMove,
    ):
        """Take the rows to fit on; no feature is read."""
        self._features, self._rows, self._on_move = features, np.sort(rows), on_move
        self._classes, self._labels = np.unique(labels[self._rows], return_inverse=True)
        self._options = {"maxiter": max_steps, "gtol": tolerance, "maxls": _LINE_SEARCH_STEPS}
        self._options["ftol"] = 64 * np.finfo(np.float64).eps
        self._shape = (features.shape[1] + 1, len(self._classes))
        self.start = np.zeros(self._shape).reshape(-1)
        self._piece: Callable = jax.jit(jax.value_and_grad(_sum_of_losses))

    def fit(self, inverse_strength: float) -> Float[np.ndarray, "d_and_bias k"]:
        """Return kernel and bias for C = `inverse_strength`; the search starts from the last ones that were found.

        The minimum is a single one, up to a constant in all biases, so the start changes the way and not the end.
        """
        strength = (2 if len(self._classes) == 2 else 1) / (inverse_strength * len(self._rows))
        eigenvalues, directions = self._curvature_at_zero
        scales = np.sqrt(eigenvalues + strength)[:, None]

        def objective(flat):
            params = directions @ (flat.reshape(self._shape) / scales)
            loss, gradient = 0.0, np.zeros(self._shape)
            for features, labels in self._pieces():
                value, slope = self._piece(params, features, labels)
                loss, gradient = loss + float(value), gradient + np.asarray(slope)
            loss, gradient = loss / len(self._rows), gradient / len(self._rows)
            gradient[:-1] += strength * params[:-1]
            return loss + 0.5 * strength * np.sum(params[:-1] ** 2), ((directions.T @ gradient) / scales).reshape(-1)

        import scipy.optimize  # here, so that other runs do not load it

        with jax.enable_x64(True):
            start = (scales * (directions.T @ self.start.reshape(self._shape))).reshape(-1)
            found = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=self._options)
        params = directions @ (found.x.reshape(self._shape) / scales)
        self.start = params.reshape(-1)
        return params

    def _pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the features and labels to fit on, `PIECE_ROWS` at a time, and call `on_move` before each."""
        for start in range(0, len(self._rows), PIECE_ROWS):
            self._on_move("fitting a logistic regression")
            part = slice(start, start + PIECE_ROWS)
            yield self._features[self._rows[part]], self._labels[part]

    @functools.cached_property
    def _curvature_at_zero(self) -> tuple[Float[np.ndarray, " p"], Float[np.ndarray, "p p"]]:
        """Return the eigenvalues and eigenvectors of the second derivative of the cross entropy at W = 0.

        With k classes of probability 1 / k it is E[x xᵀ] / k for each class, with a 1 behind the features in x, up to
        what the classes have in common.
        """
        size = self._shape[0]
        moments = np.zeros((size, size))
        for features, _ in self._pieces():
            inputs = np.concatenate([features.astype(np.float64), np.ones((len(features), 1))], axis=1)
            moments += inputs.T @ inputs
        eigenvalues, directions = np.linalg.eigh(moments / len(self._rows) / self._shape[1])
        return np.maximum(eigenvalues, size * np.finfo(np.float64).eps * eigenvalues[-1]), directions

    def accuracy(
        self, params: Float[np.ndarray, "d_and_bias k"], features: Num[np.ndarray, "q d"], labels: Int[np.ndarray, "q"]
    ) -> float:
        """Return the fraction of rows that are classified as their labels say."""
        hits = 0
        for start in range(0, len(labels), PIECE_ROWS):
            part = slice(start, start + PIECE_ROWS)
            logits = features[part].astype(np.float64) @ params[:-1] + params[-1]
            hits += int(np.sum(self._classes[logits.argmax(axis=1)] == labels[part]))
        return hits / len(labels)


def _sum_of_losses(params, features, labels):
    logits = features.astype(params.dtype) @ params[:-1] + params[-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()
