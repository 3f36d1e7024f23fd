"""Per-pixel work done on the device inside the step: uint8 images in, each network's input range out."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from beitv2_jax.typing import ByteImages, Images

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
NORMALIZATIONS = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "clip": (CLIP_MEAN, CLIP_STD),
    "half": (HALF, HALF),
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""Arguments (mean, std) of `normalize` by the name that configs use."""


def normalize(images: Images, mean: tuple[float, ...], std: tuple[float, ...]) -> Float[Array, "b H W 3"]:
    """Return (images/255 − mean)/std in float32; images are 0..255, mean and std on the scale 0..1."""
    return (images.astype(jnp.float32) / 255.0 - jnp.asarray(mean)) / jnp.asarray(std)


def resize(images: Images, size: int) -> Float[Array, "b size size 3"]:
    """Return square images of `size` pixels, float32 0..255: cubic interpolation, antialiased where they shrink.

    Equal to Pillow's bicubic resize up to its rounding to whole levels; images of that size pass unchanged.
    """
    images = images.astype(jnp.float32)
    if images.shape[1] == size:
        return images
    resized = jax.image.resize(images, (images.shape[0], size, size, images.shape[-1]), "cubic")
    return jnp.clip(resized, 0.0, 255.0)


def patches_of(images: Images, grid: tuple[int, int]) -> Float[Array, "b n p"]:
    """Return the values of each patch as one vector, by row, column and channel; patches are row-major."""
    batch, height, width, channels = images.shape
    rows, columns = grid
    split = images.reshape(batch, rows, height // rows, columns, width // columns, channels)
    return split.swapaxes(2, 3).reshape(batch, rows * columns, -1)


def to_unit_range(images: Images) -> Float[Array, "b H W 3"]:
    """Return images/127.5 − 1, mapping 0..255 to the tokenizer's [−1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def color_jitter(
    images: ByteImages, factors: Float[Array, "b 3"], order: Int[Array, "b 3"], mean_gray: Float[Array, "b"]
) -> Float[Array, "b H W 3"]:
    """Change brightness, contrast and saturation of each image, in its own order; return whole levels 0..255, float32.

    `factors` holds the three strengths (1 changes nothing) in that sequence; `order` is the permutation of 0, 1, 2 in
    which they are applied. Each of them blends with a duller picture, out = dull + factor · (image − dull): black, the
    mean grey level of the picture as the preceding operations left it, or the grey picture. `mean_gray` is that level,
    0..255; the images may be crops of what it was taken from. Every step ends in [0, 255] rounded down, as Pillow's
    8-bit images do.

    Source: torchvision's ColorJitter on Pillow images, here applied to the resized crop.
    """
    images = images.astype(jnp.float32)
    mean_gray = jnp.floor(mean_gray + 0.5)[:, None, None, None]
    for step in range(3):
        operation = order[:, step]
        factor = jnp.take_along_axis(factors, operation[:, None], axis=1)[:, :, None, None]
        operation = operation[:, None, None, None]
        dull = jnp.where(operation == 0, 0.0, jnp.where(operation == 1, mean_gray, _gray(images)))
        images = jnp.floor(jnp.clip(dull + factor * (images - dull), 0.0, 255.0))
    return images


def photometric_distortion(images: ByteImages, drawn: Float[Array, "b 5"]) -> Float[Array, "b H W 3"]:
    """Change brightness, contrast, saturation and hue of each image; return whole levels 0..255, float32.

    `drawn` holds brightness shift (levels), contrast factor, saturation factor, hue shift (turns), and 1 where contrast
    comes last instead of second, as `data.segmentation.transforms.distortion_draw` draws them; 0, 1, 1, 0 change
    nothing. The saturation is that of HSV: it and the hue change with the largest channel fixed.

    Source: mmsegmentation's PhotoMetricDistortion, which goes through HSV of 8 bits and so rounds more coarsely.
    """
    images = images.astype(jnp.float32)
    brightness, contrast, saturation, hue, contrast_last = (drawn[:, index, None, None, None] for index in range(5))
    images = _whole(images + brightness)
    images = _whole(jnp.where(contrast_last > 0, images, images * contrast))
    value = images.max(axis=-1, keepdims=True)
    spread = value - images.min(axis=-1, keepdims=True)
    # saturation spread / value, at most 1
    factor = jnp.minimum(saturation, value / jnp.maximum(spread, 1.0))
    images = jnp.round(value - factor * (value - images))
    images = jnp.where(hue == 0, images, jnp.round(_turned(images, hue)))
    return _whole(jnp.where(contrast_last > 0, images * contrast, images))


def _whole(images: Float[Array, "b H W 3"]) -> Float[Array, "b H W 3"]:
    return jnp.floor(jnp.clip(images, 0.0, 255.0))


def _turned(images: Float[Array, "b H W 3"], hue: Float[Array, "b 1 1 1"]) -> Float[Array, "b H W 3"]:
    """Shift the hue by `hue` turns, with value and saturation of HSV kept."""
    red, green, blue = (images[..., channel, None] for channel in range(3))
    value = images.max(axis=-1, keepdims=True)
    spread = value - images.min(axis=-1, keepdims=True)
    safe = jnp.maximum(spread, 1.0)
    sixths = jnp.where(
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe),
    )
    # each channel is a trapezium over the hue: red is largest around 0, green around 2, blue around 4 sixths
    offset = jnp.mod(jnp.array([5.0, 3.0, 1.0]) + sixths + 6.0 * hue, 6.0)
    return value - spread * jnp.clip(jnp.minimum(offset, 4.0 - offset), 0.0, 1.0)


def _gray(images: Float[Array, "b H W 3"]) -> Float[Array, "b H W 1"]:
    """Return the grey level of 8-bit pixels by Pillow's 16-bit integer weights (ITU-R 601)."""
    red, green, blue = (images[..., channel, None].astype(jnp.int32) for channel in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(jnp.float32)
