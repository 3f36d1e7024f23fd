"""Logistic regression on frozen features: the whole training set in every step, read piece by piece."""

from collections.abc import Callable

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
        """Take the rows to fit on; nothing is read."""
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

        def objective(flat):
            params = flat.reshape(self._shape)
            loss, gradient = 0.0, np.zeros(self._shape)
            for start in range(0, len(self._rows), PIECE_ROWS):
                self._on_move("fitting a logistic regression")
                part = slice(start, start + PIECE_ROWS)
                value, slope = self._piece(params, self._features[self._rows[part]], self._labels[part])
                loss, gradient = loss + float(value), gradient + np.asarray(slope)
            loss, gradient = loss / len(self._rows), gradient / len(self._rows)
            gradient[:-1] += strength * params[:-1]
            return loss + 0.5 * strength * np.sum(params[:-1] ** 2), gradient.reshape(-1)

        import scipy.optimize  # here, so that other runs do not load it

        with jax.enable_x64(True):
            found = scipy.optimize.minimize(objective, self.start, jac=True, method="L-BFGS-B", options=self._options)
        self.start = found.x
        return found.x.reshape(self._shape)

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
