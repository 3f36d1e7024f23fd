"""Rows: every draw a function of (seed, ids); a tokenizer's own view; unreadable records grey, weightless, named."""

import chex
import numpy as np
import pytest
from listed_images import ListSource

from beitv2_jax.data import augment, decode, transform
from beitv2_jax.data.masking import block_mask
from beitv2_jax.data.transform import EvalTransform, TrainTransform
from beitv2_jax.rng import host_rng

MASK = {"grid": (5, 7), "num_masked": 13, "min_patches": 3}


@pytest.fixture(scope="module")
def source():
    return ListSource(23, corrupt=(11,))


def make(**changes):
    return TrainTransform(
        **{"seed": 3, "image_size": 8, "min_scale": 0.2, "color_jitter": 0.4, "mask": MASK, **changes}
    )


def test_every_draw_is_a_function_of_seed_and_ids(source):
    example, epoch = source[17], 4
    item = make(num_views=3)(example, epoch)
    image = decode.decode_image(example["image"])
    view = augment.random_view(host_rng(3, "view", 17, 1), *image.shape[:2], min_scale=0.2)
    factors, order = augment.jitter_draw(host_rng(3, "jitter", 17, 1), 0.4)
    mask = block_mask(host_rng(3, "mask", 17, 4), (5, 7), 13, min_patches=3)
    np.testing.assert_array_equal(item["images"], augment.crop_resize(image, view, 8))
    np.testing.assert_array_equal(item["jitter_factors"], factors)
    np.testing.assert_array_equal(item["jitter_order"], order)
    assert item["jitter_gray"] == augment.jitter_gray(image, factors, order)
    np.testing.assert_array_equal(item["mask"], mask.reshape(-1))
    assert (item["views"], item["weight"], item["faults"]) == (1, 1, "")
    # num_views 0: the view index is the epoch itself
    assert make()(example, 4)["views"] == 4
    assert (make()(example, 4)["images"] != item["images"]).any()


def test_views_repeat_while_masks_do_not(source):
    items = [make(num_views=2)(source[5], epoch) for epoch in range(4)]
    np.testing.assert_array_equal(items[0]["images"], items[2]["images"])
    np.testing.assert_array_equal(items[1]["images"], items[3]["images"])
    assert (items[0]["images"] != items[1]["images"]).any()
    for a in range(4):
        for b in range(a):
            assert (items[a]["mask"] != items[b]["mask"]).any()
    other = make(num_views=2, seed=4)(source[5], 0)
    assert all((other[key] != items[0][key]).any() for key in ("images", "mask", "jitter_factors"))


@pytest.mark.parametrize(
    ("changes", "size", "interpolation"),
    [
        ({"tokenizer_image_size": 5}, 5, "bicubic"),
        ({"tokenizer_interpolation": "lanczos"}, 8, "lanczos"),
        ({"tokenizer_image_size": 13, "tokenizer_interpolation": "bilinear"}, 13, "bilinear"),
    ],
)
def test_the_tokenizer_s_view_is_the_same_box_and_flip_of_one_decode(source, monkeypatch, changes, size, interpolation):
    decoded = []
    monkeypatch.setattr(
        decode, "decode_image", lambda *args, real=decode.decode_image: decoded.append(args) or real(*args)
    )
    flips = set()
    for epoch in range(6):
        decoded.clear()
        item = make(**changes)(source[17], epoch)
        assert len(decoded) == 1
        image = decode.decode_image(source[17]["image"])
        view = augment.random_view(host_rng(3, "view", 17, epoch), *image.shape[:2], min_scale=0.2)
        np.testing.assert_array_equal(item["images"], augment.crop_resize(image, view, 8))
        np.testing.assert_array_equal(item["tokenizer_images"], augment.crop_resize(image, view, size, interpolation))
        flips.add(view.flip)
    assert flips == {False, True}


def test_equal_views_are_resized_once(source, monkeypatch):
    resized = []
    monkeypatch.setattr(
        augment, "crop_resize", lambda *args, real=augment.crop_resize: resized.append(args) or real(*args)
    )
    for changes in ({}, {"tokenizer_image_size": 8}, {"tokenizer_interpolation": "bicubic"}):
        resized.clear()
        assert "tokenizer_images" not in make(**changes)(source[17], 0)
        assert len(resized) == 1


def test_randaugment_changes_the_first_view_alone_with_draws_of_its_own(source):
    def add_noise(image, rng):
        assert image.shape == (8, 8, 3) and image.dtype == np.uint8
        return image ^ rng.integers(0, 256, image.shape, np.uint8)

    plain = make(tokenizer_image_size=5, num_views=2)
    augmented = make(tokenizer_image_size=5, num_views=2, randaugment=add_noise)
    for epoch in (1, 3):  # the same view, other draws
        expected, item = plain(source[9], epoch), augmented(source[9], epoch)
        noise = host_rng(3, "randaugment", 9, epoch).integers(0, 256, (8, 8, 3), np.uint8)
        chex.assert_trees_all_equal(item, {**expected, "images": expected["images"] ^ noise})


def test_an_unreadable_record_is_grey_has_no_weight_and_is_named(source):
    item = make(tokenizer_image_size=5)(source[11], 4)
    good = make(tokenizer_image_size=5)(source[10], 4)
    assert {key: (np.shape(value), value.dtype.kind) for key, value in item.items()} == {
        key: (np.shape(value), value.dtype.kind) for key, value in good.items()
    }
    assert (item["images"] == transform.GREY).all() and (item["tokenizer_images"] == transform.GREY).all()
    assert item["weight"] == 0 and item["example_ids"] == 11 and item["labels"] == 23
    assert item["mask"].sum() == 13 and item["jitter_gray"] > 0
    with pytest.raises(decode.CorruptImageError) as caught:
        decode.decode_image(source[11]["image"], "list/11")
    assert item["faults"] == f"list/11: {caught.value.cause}" != "list/11: "


def test_evaluation_crops(source):
    item = EvalTransform(7, tokenizer_image_size=5)(source[20])
    image = decode.decode_image(source[20]["image"])
    np.testing.assert_array_equal(item["images"], augment.center_crop(image, 7))
    np.testing.assert_array_equal(item["tokenizer_images"], augment.center_crop(image, 5))
    assert (item["labels"], item["example_ids"], item["weight"], item["faults"]) == (41, 20, 1, "")
    for same in (0, 7):
        assert "tokenizer_images" not in EvalTransform(7, tokenizer_image_size=same)(source[20])
    bad = EvalTransform(7)(source[11])
    assert (bad["images"] == transform.GREY).all() and bad["images"].shape == (7, 7, 3)
    assert bad["weight"] == 0 and bad["faults"].startswith("list/11: ")


def test_a_record_that_its_source_finds_fault_with_does_not_count(source):
    example = source[20] | {"fault": "its label is none of the 3 classes"}
    for item in (make()(example, 0), EvalTransform(8)(example)):
        assert item["weight"] == 0 and item["faults"] == "list/20: its label is none of the 3 classes"
        assert (item["images"] == transform.GREY).all()
