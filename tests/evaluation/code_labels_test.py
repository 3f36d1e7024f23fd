"""What codes mean: mutual information and purity against scikit-learn and by hand, labels of patches by counting."""

import numpy as np
import pytest
import sklearn.metrics

from beitv2_jax.evaluation.code_labels import NO_LABEL, code_label_metrics, patch_labels


def test_mutual_information_is_that_of_scikit_learn_and_purity_is_counted():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, (40, 9))
    code_ids = np.where(rng.random((40, 9)) < 0.6, labels * 3, rng.integers(0, 20, (40, 9)))
    labels[3, :4] = NO_LABEL
    labels[7, 0] = -1
    known = (labels >= 0) & (labels != NO_LABEL)
    found = code_label_metrics(code_ids, {"part": labels})
    theirs = sklearn.metrics.normalized_mutual_info_score(labels[known], code_ids[known])
    assert found["nmi_part"] == pytest.approx(theirs, abs=1e-12) and 0.3 < theirs < 0.9
    table = sklearn.metrics.cluster.contingency_matrix(labels[known], code_ids[known])
    assert found["purity_part"] == pytest.approx(table.max(axis=0).sum() / known.sum())
    assert found["majority_part"] == pytest.approx(np.bincount(labels[known]).max() / known.sum())


def test_by_hand():
    """Code 4 stands for label 0, code 7 for 0 and 1 alike: I = ln 2 - (1/2) ln 2 of H(label) = H(3/4, 1/4)."""
    found = code_label_metrics(np.array([[4, 4], [7, 7]]), {"class": np.array([[0, 0], [0, 1]])})
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    information = entropy - 0.5 * np.log(2)
    assert found["nmi_class"] == pytest.approx(information / ((entropy + np.log(2)) / 2))
    assert found["purity_class"] == 0.75 and found["majority_class"] == 0.75
    assert code_label_metrics(np.array([[4, 7]]), {"class": np.array([[1, 1]])}) == {}


def test_the_label_of_a_patch_is_its_most_frequent_one():
    label_map = np.array(
        [
            [1, 1, 2, 0],
            [1, 3, 2, 0],
            [9, 9, 5, 5],
            [9, 9, 6, 5],
        ],
        np.uint8,
    )
    np.testing.assert_array_equal(patch_labels(label_map, (2, 2)), [1, 0, 9, 5])
