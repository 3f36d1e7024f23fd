"""The law of block-wise masks: statistics of our draws against two independent sets of the released generator.

Every difference is measured in standard deviations of its sampling noise. The draws are fixed, so the outcome is too.
"""

import numpy as np
from golden_files import Golden
from scipy import ndimage

from beitv2_jax.data.masking import block_mask

NUM_DRAWS = 8000
# of the largest among some 600 correlated scores: chance exceeds it in about one of 200 draws of a true generator
BOUND = 4.5
MEANS = ("components", "largest_component", "largest_rectangle")


def check_masks(golden: Golden):
    for case, settings in golden.config["cases"].items():
        check_case(golden, case, settings)


def check_case(golden, case, settings):
    rows, columns = settings["grid"]
    packed = golden.take(f"{case}/masks")
    released = np.unpackbits(packed, axis=1, count=rows * columns).astype(bool).reshape(-1, rows, columns)
    for name, value in statistics(released).items():  # shows that these are the stored statistics
        if name.endswith("_hist"):
            value = np.pad(value, (0, golden.arrays[f"out/{case}/{name}"].size - value.size))
        golden.check(f"{case}/{name}", value, 1e-6)

    ours = draw(settings)
    counts = ours.sum(axis=(1, 2))
    golden.note(f"{case}/masks", int(np.sum(counts != settings["num_mask"])), 0, "unequal")
    found, expected = statistics(ours), statistics(released)
    replicate = {name: golden.take(f"{case}/replicate_{name}") for name in ("frequency", *map("{}_hist".format, MEANS))}
    frequency = (expected["frequency"] + replicate["frequency"]) / 2
    scores = {
        "frequency": score_of_shares(found["frequency"], NUM_DRAWS, frequency, 2 * len(released)),
        "pair_horizontal": score_of_shares(
            found["pair_horizontal"], NUM_DRAWS, expected["pair_horizontal"], len(released)
        ),
        "pair_vertical": score_of_shares(found["pair_vertical"], NUM_DRAWS, expected["pair_vertical"], len(released)),
    }
    for name in MEANS:
        mean = (expected[f"{name}_mean"] + golden.take(f"{case}/replicate_{name}_mean")) / 2
        error = np.hypot(found[f"{name}_se"], expected[f"{name}_se"] / np.sqrt(2))
        scores[f"{name}_mean"] = abs(found[f"{name}_mean"] - mean) / error
        histogram = expected[f"{name}_hist"]
        histogram = np.pad(histogram, (0, replicate[f"{name}_hist"].size - histogram.size))
        scores[f"{name}_hist"] = score_of_counts(found[f"{name}_hist"], histogram + replicate[f"{name}_hist"])
    for name, score in scores.items():
        golden.note(f"{case}/{name}", score, BOUND, "z", "statistics of masks")


def draw(settings):
    rng = np.random.default_rng(0)
    arguments = dict(
        min_patches=settings["min_num_patches"],
        max_patches=settings["max_num_patches"],
        min_aspect=settings["min_aspect"],
    )
    grid = tuple(settings["grid"])
    return np.stack([block_mask(rng, grid, settings["num_mask"], **arguments) for _ in range(NUM_DRAWS)])


def statistics(masks):
    components, largest = component_sizes(masks)
    found = {
        "frequency": masks.mean(axis=0),
        "pair_horizontal": (masks[:, :, 1:] & masks[:, :, :-1]).mean(axis=0),
        "pair_vertical": (masks[:, 1:] & masks[:, :-1]).mean(axis=0),
    }
    values = {"components": components, "largest_component": largest, "largest_rectangle": largest_rectangle(masks)}
    for name, value in values.items():
        found[f"{name}_mean"] = value.mean()
        found[f"{name}_se"] = value.std() / np.sqrt(len(value))
        found[f"{name}_hist"] = np.bincount(value)
    return found


def component_sizes(masks):
    """Return number of 4-connected components and size of the largest, mask by mask."""
    plane = ndimage.generate_binary_structure(2, 1)
    labels, count = ndimage.label(masks, np.stack([np.zeros_like(plane), plane, np.zeros_like(plane)]))
    sizes = np.bincount(labels.reshape(-1), minlength=count + 1)[1:]
    owners = np.zeros(count + 1, int)
    owners[labels] = np.arange(len(masks))[:, None, None]
    largest = np.zeros(len(masks), int)
    np.maximum.at(largest, owners[1:], sizes)
    return np.bincount(owners[1:], minlength=len(masks)), largest


def largest_rectangle(masks):
    """Return the area of the largest wholly hidden rectangle, mask by mask."""
    _, rows, columns = masks.shape
    sums = np.pad(masks.cumsum(axis=1).cumsum(axis=2), ((0, 0), (1, 0), (1, 0)))
    best = np.zeros(len(masks), int)
    for height in range(1, rows + 1):
        for width in range(1, columns + 1):
            inside = sums[:, height:, width:] - sums[:, :-height, width:] - sums[:, height:, :-width]
            full = (inside + sums[:, :-height, :-width] == height * width).any(axis=(1, 2))
            best[full] = np.maximum(best[full], height * width)
    return best


def score_of_shares(found, num_found, expected, num_expected):
    """Return the largest difference of two shares in standard deviations of both samplings."""
    pooled = (found * num_found + expected * num_expected) / (num_found + num_expected)
    error = np.sqrt(pooled * (1.0 - pooled) * (1.0 / num_found + 1.0 / num_expected))
    return np.max(np.abs(found - expected) / error)


def score_of_counts(found, expected, least=20):
    """Return the chi-square of two histograms, neighbouring bins joined up to `least` hits, as standard deviations."""
    size = max(found.size, expected.size)
    both = np.stack([np.pad(histogram, (0, size - histogram.size)) for histogram in (found, expected)])
    edges = np.unique(np.searchsorted(both.sum(axis=0).cumsum(), np.arange(0, both.sum() + 1, least), side="right"))
    joined = np.stack([np.add.reduceat(row, edges[edges < size]) for row in both]).astype(float)
    totals = joined.sum(axis=1, keepdims=True)
    expectation = joined.sum(axis=0) * totals / totals.sum()
    chi_square = np.sum((joined - expectation) ** 2 / expectation)
    freedom = joined.shape[1] - 1
    return (chi_square - freedom) / np.sqrt(2 * freedom)
