"""What fine-tuning does to whole batches inside the compiled step: random erasing, mixup and CutMix.

They follow normalisation, in this order, and belong to the released recipes (facts of timm's classes of these names).
All are pure functions of the global batch and a key, so they do not depend on how many devices or processes hold it.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from beitv2_jax.typing import Scalar

NormalizedImages = Float[Array, "b H W 3"]
Targets = Float[Array, "b k"]
ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)
_ATTEMPTS = 10


def augmented(
    images: NormalizedImages,
    targets: Targets | None,
    weight: Float[Array, "b"],
    key_erase: PRNGKeyArray,
    key_mix: PRNGKeyArray,
    *,
    mixup: float,
    cutmix: float,
    mix_probability: float,
    switch_probability: float,
    erasing: float,
) -> tuple[NormalizedImages, Targets | None]:
    """Return images that are erased and mixed as a recipe says, and their targets, which mixing alone needs.

    `erasing` is the `probability` of `random_erasing`, `mix_probability` that of `mix`, whose arguments the others are.
    With an `erasing` of 0 nothing is erased, with a `mixup` and a `cutmix` of 0 nothing is mixed.
    """
    if erasing:
        images = random_erasing(images, key_erase, probability=erasing)
    if mixup or cutmix:
        images, targets = mix(
            images,
            targets,
            weight,
            key_mix,
            mixup=mixup,
            cutmix=cutmix,
            probability=mix_probability,
            switch_probability=switch_probability,
        )
    return images, targets


def random_erasing(images: NormalizedImages, key: PRNGKeyArray, *, probability: float) -> NormalizedImages:
    """Fill one random box of each image, with `probability`, with N(0, 1) noise of its own in every pixel and channel.

        area = s H W,  s ~ U(ERASED_AREA);   h / w = r,  ln r ~ U(ln ERASED_ASPECT)

    The first of ten boxes that is smaller than the image in both directions, at a uniform place; none, no change.

    Source: Zhong et al. 2017, mode "pixel" of timm's RandomErasing as the released recipes use it.
    """
    batch_size, height, width, _ = images.shape
    key_which, key_box, key_noise = jax.random.split(key, 3)
    chosen = jax.random.bernoulli(key_which, probability, (batch_size,))
    draws = jax.random.uniform(key_box, (4, batch_size, _ATTEMPTS))
    area = height * width * (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * draws[0])
    low, high = (math.log(aspect) for aspect in ERASED_ASPECT)
    aspect = jnp.exp(low + (high - low) * draws[1])
    box_height, box_width = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (box_height < height) & (box_width < width)
    first = jnp.argmax(fits, axis=1)[:, None]
    box_height, box_width, place_y, place_x = (
        jnp.take_along_axis(array, first, axis=1)[:, 0] for array in (box_height, box_width, draws[2], draws[3])
    )
    top = jnp.floor(place_y * (height - box_height + 1))
    left = jnp.floor(place_x * (width - box_width + 1))
    erased = _boxes(height, width, top, left, top + box_height, left + box_width)
    erased &= (chosen & fits.any(axis=1))[:, None, None]
    return jnp.where(erased[..., None], jax.random.normal(key_noise, images.shape, images.dtype), images)


def mix(
    images: NormalizedImages,
    targets: Targets,
    weight: Float[Array, "b"],
    key: PRNGKeyArray,
    *,
    mixup: float,
    cutmix: float,
    probability: float,
    switch_probability: float,
) -> tuple[NormalizedImages, Targets]:
    """Mix every image and its target with that of its partner, with one method and one lambda for the whole batch.

        partner of i = B - 1 - i;   lambda ~ Beta(a, a)
        mixup:   lambda image + (1 - lambda) partner
        CutMix:  a box of the partner in the image, its sides sqrt(1 - lambda) of the image's, its centre uniform, cut
                 at the border; lambda is then the fraction of the image that is left
        targets: lambda target + (1 - lambda) partner's target

    An image whose partner has weight 0 (it could not be read) stays as it is. `mixup` and `cutmix` are the parameters a
    of their distributions, 0 for never. Where both are given, CutMix is taken with `switch_probability`. With
    1 - `probability` the batch is not mixed.

    Source: Zhang et al. 2017 and Yun et al. 2019; timm's Mixup in batch mode as the released recipes use it.
    """
    key_apply, key_switch, key_share, key_box = jax.random.split(key, 4)
    cutmix_probability = switch_probability if mixup and cutmix else float(cutmix > 0)
    use_cutmix = jax.random.bernoulli(key_switch, cutmix_probability)
    shape = jnp.where(use_cutmix, cutmix, mixup)
    share = jnp.where(jax.random.bernoulli(key_apply, probability), jax.random.beta(key_share, shape, shape), 1.0)
    readable = (weight > 0)[::-1]
    partners = jnp.where(readable[:, None, None, None], images[::-1], images)
    partner_targets = jnp.where(readable[:, None], targets[::-1], targets)

    box = _cutmix_box(*images.shape[1:3], share, key_box)
    blended = jnp.where(use_cutmix, jnp.where(box[..., None], partners, images), partners + share * (images - partners))
    share = jnp.where(use_cutmix, 1.0 - box.mean(), share)
    return blended.astype(images.dtype), partner_targets + share * (targets - partner_targets)


def _cutmix_box(height: int, width: int, share: Scalar, key: PRNGKeyArray) -> Bool[Array, "1 H W"]:
    """Draw the box of CutMix that leaves `share` of the picture, before it is cut at the border."""
    sizes = jnp.array([height, width])
    half = jnp.floor(sizes * jnp.sqrt(1.0 - share)) // 2
    center = jax.random.randint(key, (2,), 0, sizes)
    (top, left), (bottom, right) = center - half, center + half
    return _boxes(height, width, *(edge[None] for edge in (top, left, bottom, right)))


def _boxes(height: int, width: int, top, left, bottom, right) -> Bool[Array, "b H W"]:
    """Return boxes, one a row of the arguments, as masks; what lies outside the image is cut off."""
    rows, columns = jnp.arange(height), jnp.arange(width)
    inside_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    inside_columns = (columns >= left[:, None]) & (columns < right[:, None])
    return inside_rows[:, :, None] & inside_columns[:, None, :]
