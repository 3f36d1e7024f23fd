"""How far colour jitter of a crop, on the device, is from the published jitter of the whole image before the crop.

    python -m benchmarks.jitter --images=DIR_OR_TAR

Prints the mean difference in levels of 255 over two random views of each photograph, for three choices of the grey
level that contrast blends with: that of the crop, the estimate of `jitter_gray`, and that of the whole image.
"""

import argparse

import numpy as np
from PIL import Image

from beitv2_jax.data import augment
from beitv2_jax.models.preprocess import color_jitter
from beitv2_jax.rng import host_rng
from benchmarks.photos import ENHANCERS, MIN_SCALE, STRENGTH, pillow_jitter, read_photos


def exact_gray(pixels: np.ndarray, factors: np.ndarray, order: np.ndarray) -> float:
    """Return the mean grey level in front of the contrast, from every pixel and by Pillow."""
    image = Image.fromarray(pixels)
    for operation in order:
        if operation == 1:
            break
        image = ENHANCERS[operation](image).enhance(float(factors[operation]))
    return float(np.asarray(image.convert("L"), np.float64).mean())


def main() -> None:
    """Compare the three grey levels and print their differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder or tar of JPEGs")
    apart, errors = {"crop": [], "estimate": [], "whole image": []}, []
    for photo in read_photos(parser.parse_args().images, 150):
        for index in range(2):
            view = augment.random_view(
                host_rng(0, "view", photo.index, index), *photo.pixels.shape[:2], min_scale=MIN_SCALE
            )
            factors, order = augment.jitter_draw(host_rng(0, "jitter", photo.index, index), STRENGTH)
            whole = np.asarray(pillow_jitter(Image.fromarray(photo.pixels), factors, order))
            box = whole[view.top : view.top + view.height, view.left : view.left + view.width]
            published = np.asarray(Image.fromarray(box).resize((224, 224), Image.Resampling.BICUBIC)).astype(float)
            crop = augment.crop_resize(photo.pixels, view._replace(flip=False), 224)
            levels = {
                "crop": exact_gray(crop, factors, order),
                "estimate": float(augment.jitter_gray(photo.pixels, factors, order)),
                "whole image": exact_gray(photo.pixels, factors, order),
            }
            errors.append(abs(levels["estimate"] - levels["whole image"]))
            for name, level in levels.items():
                gray = np.array([level], np.float32)
                ours = np.asarray(color_jitter(crop[None], factors[None], order[None], gray))[0]
                apart[name].append(np.abs(ours - published).mean())
    print(f"grey level, estimate against whole image: mean {np.mean(errors):.3f}, largest {np.max(errors):.3f}")
    for name, means in apart.items():
        print(f"contrast about the grey of the {name}: mean {np.mean(means):.3f}, worst view {np.max(means):.3f}")


if __name__ == "__main__":
    main()
