"""Windows joined on the device against plain loops: enlarge, average, resample, arg-max, count."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beitv2_jax.data.segmentation import windows as plan
from beitv2_jax.data.segmentation.labels import IGNORED
from beitv2_jax.models.sliding_window import segment

CROP, CELLS, CLASSES = 12, 4, 3


def logits_of(images, sizes):
    """Answer with something that depends on the pixels, on the place in the window and on the rows in use."""
    pooled = images.astype(jnp.float32).reshape(len(images), CELLS, 3, CELLS, 3, 3).mean((2, 4))
    place = jnp.arange(CELLS)[:, None] * jnp.array([0.7, -0.4, 0.2])
    return 0.3 * (pooled + place[:, None] - 2.0 * place[None]) * sizes[:, :1, None, None] / CROP


def interpolated(array, axis, length):
    source = array.shape[axis]
    places = np.clip((np.arange(length) + 0.5) * source / length - 0.5, 0, source - 1)
    low = np.floor(places).astype(int)
    share = (places - low).reshape([-1 if index == axis else 1 for index in range(array.ndim)])
    return array.take(low, axis) * (1 - share) + array.take(np.minimum(low + 1, source - 1), axis) * share


def merged_by_loops(view, cut, size):
    """Return the logits of one view of one image at the size of its label map."""
    height, width = view.size
    total, count = np.zeros((height, width, CLASSES)), np.zeros((height, width, 1))
    for (top, left), window in zip(view.corners, cut, strict=False):
        used = np.minimum(view.size, CROP)
        answer = np.asarray(logits_of(window[None], used[None]), np.float64)[0]
        answer = interpolated(interpolated(answer, 0, CROP), 1, CROP)[: used[0], : used[1]]
        total[top : top + CROP, left : left + CROP] += answer
        count[top : top + CROP, left : left + CROP] += 1
    merged = interpolated(interpolated(total / count, 0, size[0]), 1, size[1])
    return merged[:, ::-1] if view.mirrored else merged


SIZES = ((17, 31), (150, 131), (9, 60), (20, 20))


def made_batch(sliding, seed=0):
    rng = np.random.default_rng(seed)
    views = [sliding.views(*size) for size in SIZES]
    room = max(len(view.corners) for views_of_one in views for view in views_of_one)
    corners = np.zeros((len(SIZES), len(views[0]), room, 2), np.int32)
    for (image, views_of_one), number in itertools.product(enumerate(views), range(len(views[0]))):
        found = views_of_one[number].corners
        corners[image, number, : len(found)] = found
    labels = np.full((len(SIZES), 256, 256), IGNORED, np.uint8)
    for image, (height, width) in enumerate(SIZES):
        drawn = rng.integers(0, CLASSES + 1, (height, width))
        labels[image, :height, :width] = np.where(drawn == CLASSES, IGNORED, drawn)
    return views, {
        "windows": rng.integers(0, 40, (len(SIZES), len(views[0]), room, CROP, CROP, 3)).astype(np.uint8),
        "corners": corners,
        "num_windows": np.array([[len(view.corners) for view in one] for one in views], np.int32),
        "view_sizes": np.array([[view.size for view in one] for one in views], np.int32),
        "label_maps": labels,
        "sizes": np.array(SIZES, np.int32),
        "weight": np.array([1, 1, 1, 0], np.float32),
    }


@pytest.mark.parametrize("several", [False, True])
def test_every_pixel_is_classified_as_by_loops(several):
    sides = dict(crop=CROP, stride=7, long_side=40, short_side=19)
    sliding = plan.Sliding(**sides, scales=(1.0, 0.5), flip=True) if several else plan.Sliding(**sides)
    views, batch = made_batch(sliding)
    assert batch["num_windows"].max() > 6 and (batch["view_sizes"] < CROP).any()
    found = jax.jit(lambda batch: segment(logits_of, batch, sliding.mirrored))(batch)
    for image, (size, views_of_one) in enumerate(zip(SIZES, views, strict=True)):
        answers = [
            merged_by_loops(view, batch["windows"][image, number], size) for number, view in enumerate(views_of_one)
        ]
        if several:
            raised = [np.exp(answer - answer.max(-1, keepdims=True)) for answer in answers]
            answers = [sum(answer / answer.sum(-1, keepdims=True) for answer in raised)]
        predicted = found.label_maps[image, : size[0], : size[1]]
        ordered = np.sort(answers[0], axis=-1)
        clear = ordered[..., -1] - ordered[..., -2] > 1e-3
        assert clear.mean() > 0.97
        np.testing.assert_array_equal(predicted[clear], answers[0].argmax(-1)[clear])
        true = batch["label_maps"][image, : size[0], : size[1]]
        expected = np.zeros((CLASSES, CLASSES), int)
        if batch["weight"][image]:
            np.add.at(expected, (true[true != IGNORED], predicted[true != IGNORED]), 1)
        np.testing.assert_array_equal(found.confusion[image], expected)
        assert len(np.unique(predicted)) == CLASSES
