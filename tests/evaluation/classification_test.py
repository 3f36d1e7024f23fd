"""Metrics of a classifier against scikit-learn and arithmetic by hand."""

import numpy as np
import pytest
import sklearn.metrics

from beitv2_jax.evaluation.classification import calibration_error, class_accuracies, confusion_matrix


def test_confusions_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    classes = np.array([7, 2, 40])
    labels, predicted = classes[rng.integers(0, 3, 60)], np.array([7, 2, 40, 5, 9])[rng.integers(0, 5, 60)]
    found = confusion_matrix(labels, predicted, classes)
    whole = sklearn.metrics.confusion_matrix(labels, predicted, labels=[7, 2, 40, 5, 9])
    np.testing.assert_array_equal(found[:, :3], whole[:3, :3])
    np.testing.assert_array_equal(found[:, 3], whole[:3, 3:].sum(axis=1))
    # the last two have no image, so that their recall is left to the caller
    recall = sklearn.metrics.recall_score(labels, predicted, labels=classes, average=None)
    np.testing.assert_allclose(class_accuracies(found), recall)


def test_a_class_without_images_has_no_accuracy():
    found = class_accuracies(confusion_matrix(np.array([1, 1]), np.array([1, 3]), np.array([3, 1])))
    assert np.isnan(found[0]) and found[1] == 0.5


def test_calibration_error_by_hand():
    # of three bins the first has a gap of |1/2 - 0.2|, the second none of its own, the last |2/3 - 0.9|
    confidence, hits = np.array([0.1, 0.3, 0.8, 0.9, 1.0]), np.array([True, False, True, False, True])
    expected = (2 * abs(0.5 - 0.2) + 3 * abs(2 / 3 - 0.9)) / 5
    assert calibration_error(confidence, hits, num_bins=3) == pytest.approx(expected)
    assert calibration_error(np.ones(4), np.array([True, True, True, False])) == pytest.approx(0.25)
    assert calibration_error(np.full(4, 0.75), np.array([True, True, True, False])) == pytest.approx(0.0)
