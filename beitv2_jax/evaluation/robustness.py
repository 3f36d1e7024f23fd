"""How classifiers of ImageNet-1k are compared on its successors: arithmetic on what they predict, in NumPy."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

SEVERITIES = (1, 2, 3, 4, 5)
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""The 15 corruptions of ImageNet-C -> mean top-1 error of AlexNet over their severities.

Source: the figures that Hendrycks and Dietterich published with the data set (github.com/hendrycks/robustness).
"""
PUBLISHED = {
    "base, 1k": (0.85596, 0.89271, 0.7647, 0.5364, 0.61487, 0.45998),
    "base, 22k to 1k": (0.86494, 0.89758, 0.7727, 0.6148, 0.65747, 0.49523),
    "large, 1k": (0.87414, 0.90112, 0.7860, 0.67627, 0.7044, 0.54165),
    "large, 22k to 1k": (0.88406, 0.90362, 0.8041, 0.7660, 0.7631, 0.58378),
}
"""Released classifier -> top-1 accuracy on the first six of `TITLES`.

Source: the result tables of timm, of images cropped as its configs say (0.9 of the shorter side, 0.95 for 'large, 1k').
"""
TITLES = {
    "imagenet": "ImageNet",
    "imagenet_real": "ImageNet-ReaL",
    "imagenet_v2": "ImageNet-V2",
    "imagenet_a": "ImageNet-A",
    "imagenet_r": "ImageNet-R",
    "imagenet_sketch": "ImageNet-Sketch",
    "imagenet_c": "ImageNet-C",
}
"""Benchmark -> its name in the table, in this order."""


def corruption_errors(errors: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the corruption error CE of each corruption, relative to AlexNet's.

        CE_c = sum_s E_(s, c) / sum_s E_(s, c, AlexNet),   s = 1 ... 5

    Args:
        errors: corruption -> top-1 errors from 0 to 1, one for each severity.

    Source: Hendrycks and Dietterich 2019, Benchmarking Neural Network Robustness to Common Corruptions and
        Perturbations; their mCE is the mean over the 15 corruptions.
    """
    return {name: sum(found) / (len(found) * ALEXNET_ERRORS[name]) for name, found in errors.items()}


def real_accuracy(predicted: Int[np.ndarray, "b"], labels: Sequence[Sequence[int]]) -> tuple[float, int]:
    """Return the accuracy by reassessed labels, and of how many images: a prediction among the labels of one is right.

    Images without labels do not count.

    Source: Beyer et al. 2020, Are we done with ImageNet?
    """
    hits: Float[np.ndarray, "n"] = np.array(
        [guess in of_image for guess, of_image in zip(predicted.tolist(), labels, strict=True) if len(of_image)], float
    )
    return float(hits.mean()) if len(hits) else float("nan"), len(hits)
