"""Erasing, mixup and CutMix: laws of their boxes and shares, targets that match the pixels, unreadable rows."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beitv2_jax.models import mixing

BATCH, HEIGHT, WIDTH = 6, 31, 37
SETTINGS = {"mixup": 0.8, "cutmix": 1.0, "probability": 1.0, "switch_probability": 0.5}


@functools.partial(jax.jit, static_argnums=(3, 4))
def _mix(images, targets, weight, mixup, cutmix, probability, switch_probability, key):
    return mixing.mix(
        images,
        targets,
        weight,
        key,
        mixup=mixup,
        cutmix=cutmix,
        probability=probability,
        switch_probability=switch_probability,
    )


def levels(batch=BATCH):
    """Return images of one level each, 1 .. batch, with one-hot targets: a pixel tells whose it is."""
    images = np.broadcast_to(np.arange(1.0, batch + 1)[:, None, None, None], (batch, HEIGHT, WIDTH, 3))
    return jnp.asarray(images, jnp.float32), jnp.eye(batch)


def mixed(seed, weight=None, images=None, targets=None, **changes):
    drawn_images, drawn_targets = levels()
    images, targets = (drawn_images, drawn_targets) if images is None else (images, targets)
    weight = jnp.ones(len(images)) if weight is None else jnp.asarray(weight, jnp.float32)
    settings = {**SETTINGS, **changes}
    return tuple(map(np.asarray, _mix(images, targets, weight, *settings.values(), jax.random.key(seed))))


def test_mixup_blends_images_and_targets_with_one_share():
    shares = []
    for seed in range(40):
        images, targets = mixed(seed, cutmix=0.0)
        share = targets[0, 0]
        own, partner = np.arange(1, BATCH + 1), np.arange(BATCH, 0, -1)
        expected = share * own + (1 - share) * partner
        np.testing.assert_allclose(images, np.broadcast_to(expected[:, None, None, None], images.shape), rtol=1e-5)
        np.testing.assert_allclose(targets, share * np.eye(BATCH) + (1 - share) * np.eye(BATCH)[::-1], atol=1e-6)
        shares.append(share)
    assert min(shares) < 0.2 and max(shares) > 0.8


def test_cutmix_pastes_one_box_and_counts_its_true_area():
    boxes = []
    for seed in range(60):
        images, targets = mixed(seed, mixup=0.0)
        pasted = images[..., 0] == np.arange(BATCH, 0, -1)[:, None, None]
        assert (pasted | (images[..., 0] == np.arange(1, BATCH + 1)[:, None, None])).all()
        assert (pasted == pasted[0]).all() and (images == images[..., :1]).all()
        rows, columns = pasted[0].any(1), pasted[0].any(0)
        np.testing.assert_array_equal(pasted[0], rows[:, None] & columns[None, :])
        assert np.count_nonzero(np.diff(rows.astype(int), prepend=0, append=0)) <= 2
        share = 1 - pasted[0].mean()
        np.testing.assert_allclose(targets, share * np.eye(BATCH) + (1 - share) * np.eye(BATCH)[::-1], atol=1e-6)
        boxes.append((rows.sum(), columns.sum(), pasted[0, 0].any() or pasted[0, -1].any()))
    boxes = np.array(boxes)
    assert boxes[:, 0].max() > 25 and boxes[:, 0].min() < 10
    whole = boxes[(boxes[:, 2] == 0) & (boxes[:, 1] > 5) & (boxes[:, 1] < 20)]
    # sides keep the proportions of the image where nothing is cut off
    assert np.median(np.abs(whole[:, 0] / HEIGHT - whole[:, 1] / WIDTH)) < 0.08


@pytest.mark.parametrize(("name", "alpha"), [("mixup", 0.8), ("cutmix", 1.0)])
def test_shares_are_beta_distributed(name, alpha):
    images, targets = levels(2)
    weight = jnp.ones(2)
    run = functools.partial(
        mixing.mix,
        images[:, :16, :16],
        targets,
        weight,
        probability=1.0,
        switch_probability=0.5,
        **{"mixup": 0.0, "cutmix": 0.0, name: alpha},
    )
    count = 3000
    keys = jax.random.split(jax.random.key(1), count)
    shares = np.asarray(jax.jit(jax.vmap(lambda key: run(key)[1][0, 0]))(keys))
    if name == "mixup":
        np.testing.assert_allclose(shares.mean(), 0.5, atol=4 * 0.31 / math.sqrt(count))
        np.testing.assert_allclose(shares.var(), 1 / (4 * (2 * alpha + 1)), rtol=0.08)
    else:
        # a side of 2 h pixels about a uniform one of 16 keeps on average what the border does not cut off
        def kept(half):
            centers = np.arange(16)
            return np.mean(np.minimum(centers + half, 16) - np.maximum(centers - half, 0)) / 16

        area = np.mean([kept(int(16 * math.sqrt(u)) // 2) ** 2 for u in np.linspace(0, 1, 1001)])
        np.testing.assert_allclose(1 - shares.mean(), area, atol=4 * 0.25 / math.sqrt(count))


def test_switch_and_probability():
    kinds = {"mixup": 0, "cutmix": 0}
    for seed in range(100):
        images, _ = mixed(seed, switch_probability=0.25)
        kinds["cutmix" if (images == np.round(images)).all() else "mixup"] += 1
    assert 12 <= kinds["cutmix"] <= 40
    untouched = sum(bool((mixed(seed, probability=0.3)[1] == np.eye(BATCH)).all()) for seed in range(100))
    assert 55 <= untouched <= 85
    images, targets = levels()
    same = mixed(0, probability=0.0)
    np.testing.assert_array_equal(same[0], images)
    np.testing.assert_array_equal(same[1], targets)


@pytest.mark.parametrize("changes", [{"mixup": 0.0}, {"cutmix": 0.0}])
def test_an_unreadable_partner_leaves_an_image_as_it_is(changes):
    weight = np.array([1, 0, 1, 1, 1, 0], np.float32)  # partners: 0-5, 1-4, 2-3
    for seed in range(8):
        images, targets = mixed(seed, weight, **changes)
        for row in (0, 4):
            np.testing.assert_array_equal(images[row], np.full((HEIGHT, WIDTH, 3), row + 1.0))
            np.testing.assert_array_equal(targets[row], np.eye(BATCH)[row])
        reference = mixed(seed, **changes)
        for row in (2, 3):
            np.testing.assert_array_equal(images[row], reference[0][row])
            np.testing.assert_array_equal(targets[row], reference[1][row])


def test_targets_stay_probabilities():
    rng = np.random.default_rng(0)
    targets = jnp.asarray(rng.dirichlet(np.ones(BATCH), BATCH), jnp.float32)
    images = jnp.asarray(rng.normal(size=(BATCH, HEIGHT, WIDTH, 3)), jnp.float32)
    for seed in range(6):
        new_images, new_targets = mixed(seed, images=images, targets=targets)
        np.testing.assert_allclose(new_targets.sum(1), 1.0, rtol=1e-5)
        assert (new_targets >= 0).all() and new_images.dtype == np.float32


def test_a_sharded_batch_mixes_the_same():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    images, targets = levels()
    weight = jnp.array([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    alone = mixed(3, weight)
    spread = mixed(3, *(jax.device_put(array, rows) for array in (weight, images, targets)))
    for first, second in zip(alone, spread, strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-6, atol=1e-6)


ERASED_BATCH = 2000


@pytest.fixture(scope="module")
def erased():
    """Return which pixels of many images were erased, and the pixels."""
    images = jnp.full((ERASED_BATCH, 24, 28, 3), 77.0)
    run = jax.jit(functools.partial(mixing.random_erasing, probability=0.25))
    pixels = np.asarray(run(images, jax.random.key(5)))
    return (pixels != 77.0).any(-1), pixels


def test_erasing_takes_one_box_of_lawful_size(erased):
    where, pixels = erased
    hit = where.any((1, 2))
    assert abs(hit.mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / ERASED_BATCH)
    assert (pixels[where] != 77.0).all()  # all three channels
    heights, widths = where.any(2).sum(1)[hit], where.any(1).sum(1)[hit]
    np.testing.assert_array_equal(where.sum((1, 2))[hit], heights * widths)
    assert (heights < 24).all() and (widths < 28).all()
    # rounding moves a side by half a pixel
    assert ((heights + 0.5) * (widths + 0.5) >= 0.02 * 24 * 28).all()
    assert ((heights - 0.5) * (widths - 0.5) <= 24 * 28 / 3).all()
    assert ((heights - 0.5) / (widths + 0.5) <= 1 / 0.3).all() and ((heights + 0.5) / (widths - 0.5) >= 0.3).all()
    share = heights * widths / (24 * 28)
    # uniform but for the large boxes that do not fit
    np.testing.assert_allclose(np.quantile(share, [0.25, 0.5, 0.75]), [0.1, 0.175, 0.25], atol=0.04)
    large = share > 0.1
    np.testing.assert_allclose(np.log(heights / widths)[large].mean(), 0, atol=0.15)


def test_erasing_reaches_every_place_and_fills_with_noise(erased):
    where, pixels = erased
    often = where[where.any((1, 2))].mean(0)
    assert often.min() > 0 and often[:, :2].mean() > 0.02 and often[12, 14] < 0.6
    noise = pixels[where]
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.02)
    assert len(np.unique(noise)) > 0.99 * noise.size


def test_without_room_nothing_is_erased():
    thin = jnp.full((50, 1, 400, 3), 3.0)  # every box is as high as the image
    run = jax.jit(functools.partial(mixing.random_erasing, probability=1.0))
    np.testing.assert_array_equal(run(thin, jax.random.key(0)), thin)
