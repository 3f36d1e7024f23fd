"""Arithmetic of the robustness benchmarks, against results that were worked out by hand."""

import numpy as np
import pytest

from beitv2_jax.evaluation.robustness import ALEXNET_ERRORS, PUBLISHED, TITLES, corruption_errors, real_accuracy


def test_errors_are_relative_to_those_of_alexnet():
    found = corruption_errors({"brightness": [0.1, 0.2, 0.3, 0.4, 0.5], "snow": [1.0] * 5, "fog": [0.0] * 5})
    # 1.5 / (5 x 0.564592), 5 / (5 x 0.866816)
    assert found == pytest.approx({"brightness": 0.531357, "snow": 1.153647, "fog": 0.0}, abs=1e-6)
    assert corruption_errors({name: [error] * 5 for name, error in ALEXNET_ERRORS.items()}) == pytest.approx(
        dict.fromkeys(ALEXNET_ERRORS, 1.0)
    )


def test_the_fifteen_corruptions_have_the_published_errors():
    assert len(ALEXNET_ERRORS) == 15
    assert sum(ALEXNET_ERRORS.values()) == pytest.approx(11.834896)
    assert all(len(figures) == len(TITLES) - 1 for figures in PUBLISHED.values())


def test_any_of_the_reassessed_labels_is_right_and_images_without_one_do_not_count():
    predicted, labels = np.array([3, 5, 7, 1]), [[3], [4, 5], [], [2]]
    assert real_accuracy(predicted, labels) == (pytest.approx(2 / 3), 3)
