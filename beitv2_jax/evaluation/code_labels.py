"""What codes mean: how much the code id of a patch says about its label, by arithmetic in NumPy."""

import numpy as np
from jaxtyping import Int, UInt8

NO_LABEL = 255
"""Number of a label map that is no label, in patches too."""


def contingency(code_ids: Int[np.ndarray, "..."], labels: Int[np.ndarray, "..."]) -> Int[np.ndarray, "k l"]:
    """Return how many patches have each code that occurs (rows) and each label that occurs (columns)."""
    _, rows = np.unique(np.asarray(code_ids).reshape(-1), return_inverse=True)
    _, columns = np.unique(np.asarray(labels).reshape(-1), return_inverse=True)
    counts = np.zeros((rows.max() + 1, columns.max() + 1), np.int64)
    np.add.at(counts, (rows, columns), 1)
    return counts


def mutual_information(counts: Int[np.ndarray, "k l"]) -> float:
    """Return I(code; label) / ((H(code) + H(label)) / 2), from 0 (a code says nothing of its label) to 1.

    Two variables of one value each have 1. Source: the arithmetic normalisation of scikit-learn.
    """
    joint = counts / counts.sum()
    codes, labels = joint.sum(axis=1), joint.sum(axis=0)
    present = joint > 0
    information = np.sum(joint[present] * np.log(joint[present] / np.outer(codes, labels)[present]))
    entropies = -np.sum(codes * np.log(codes)) - np.sum(labels * np.log(labels))
    return float(max(information, 0.0) / (entropies / 2)) if entropies > 0 else 1.0


def purity(counts: Int[np.ndarray, "k l"]) -> float:
    """Return the fraction of patches whose label is the most frequent one of their code."""
    return float(counts.max(axis=1).sum() / counts.sum())


def code_label_metrics(code_ids: Int[np.ndarray, "b n"], labels: dict[str, Int[np.ndarray, "b n"]]) -> dict[str, float]:
    """Return `nmi_NAME`, `purity_NAME` and `majority_NAME` for the patch labels of each name.

    The last is the fraction of patches with the most frequent label, which is the purity of a single code. Patches
    without a label (`NO_LABEL` or less than 0) do not count; a name without two labels is left out.
    """
    metrics = {}
    for name, of_patches in labels.items():
        known = (of_patches >= 0) & (of_patches != NO_LABEL)
        if len(np.unique(of_patches[known])) < 2:
            continue
        counts = contingency(code_ids[known], of_patches[known])
        metrics[f"nmi_{name}"] = mutual_information(counts)
        metrics[f"purity_{name}"] = purity(counts)
        metrics[f"majority_{name}"] = float(counts.sum(axis=0).max() / counts.sum())
    return metrics


def patch_labels(label_map: UInt8[np.ndarray, "S S"], grid: tuple[int, int]) -> Int[np.ndarray, "n"]:
    """Return the most frequent number in each patch of a label map, patches row-major; the lowest one wins a tie."""
    rows, columns = grid
    height, width = label_map.shape
    patches = label_map.reshape(rows, height // rows, columns, width // columns).swapaxes(1, 2)
    patches = patches.reshape(rows * columns, -1)
    return np.array([np.bincount(patch, minlength=256).argmax() for patch in patches])
