"""Exact metrics of a classifier from what it says of every example, by arithmetic in NumPy."""

import numpy as np
from jaxtyping import Float, Int

CALIBRATION_BINS = 15


def confusion_matrix(
    labels: Int[np.ndarray, "b"], predicted: Int[np.ndarray, "b"], classes: Int[np.ndarray, "k"]
) -> Int[np.ndarray, "k k_and_other"]:
    """Return how many examples of each class (rows) were predicted as which one (columns).

    `classes` are the classes that rows and columns stand for, in their order. The last column counts predictions of any
    other class.
    """
    place = {int(number): index for index, number in enumerate(classes)}
    columns = np.array([place.get(int(number), len(classes)) for number in predicted], int)
    rows = np.array([place[int(number)] for number in labels], int)
    counts = np.zeros((len(classes), len(classes) + 1), np.int64)
    np.add.at(counts, (rows, columns), 1)
    return counts


def class_accuracies(confusion: Int[np.ndarray, "k k_and_other"]) -> Float[np.ndarray, "k"]:
    """Return the fraction of hits of each class; NaN for a class without examples."""
    totals = confusion.sum(axis=1)
    return np.where(totals > 0, np.diagonal(confusion) / np.maximum(totals, 1), np.nan)


def calibration_error(confidence: Float[np.ndarray, "b"], hits: np.ndarray, num_bins: int = CALIBRATION_BINS) -> float:
    """Return the expected calibration error: the mean over examples of |accuracy - mean confidence| of their bin.

    The bins divide the confidences (probabilities of the predicted classes) from 0 to 1 into equal widths.

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks, which has 15 bins.
    """
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    bins = np.searchsorted(edges[1:-1], confidence, side="left")
    gaps = np.zeros(num_bins)
    np.add.at(gaps, bins, np.asarray(hits, np.float64) - np.asarray(confidence, np.float64))
    return float(np.abs(gaps).sum() / len(confidence))
