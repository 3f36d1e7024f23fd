"""The two published teachers against the released code: pixels in, regression targets out, at several image sizes."""

import tempfile
from pathlib import Path

import jax
import numpy as np
from golden_files import Golden, channels_last

from beitv2_jax.convert.teachers.load import load_teacher
from beitv2_jax.models.preprocess import NORMALIZATIONS, normalize, to_unit_range


def check_clip_teacher(golden: Golden):
    heads = golden.config["visual"]["heads"]
    teacher, params = check_teacher(golden, num_heads=heads, activation="quick_gelu", position_resize="offset")
    pixels = 255.0 * golden.images
    tokens = jax.jit(teacher.tokens)(params, normalize(pixels, *NORMALIZATIONS["clip"]))
    golden.check("pooled", tokens[:, 0])
    teacher, params = load(golden, pixels, num_heads=heads, activation="quick_gelu", output="tokens")
    golden.check("tokens_post_ln", jax.jit(teacher.features)(params, pixels))


def check_dino_teacher(golden: Golden):
    heads = golden.config["model"]["num_heads"]
    teacher, params = check_teacher(golden, num_heads=heads, normalization="imagenet")
    normalised = normalize(255.0 * golden.images, *NORMALIZATIONS["imagenet"])
    golden.check("all_tokens", jax.jit(teacher.tokens)(params, normalised))


def check_teacher(golden: Golden, **options):
    """Check the targets at the trained and at other image sizes; return the teacher of the former and its params."""
    assert golden.config["resized"]
    for size in golden.config["resized"]:
        resized = 255.0 * channels_last(golden.arrays[f"in/image_{size}"])
        teacher, params = load(golden, resized, **options)
        golden.check(f"target_{size}", jax.jit(teacher.features)(params, resized))
    pixels = 255.0 * golden.images
    teacher, params = load(golden, pixels, **options)
    golden.check("target", jax.jit(teacher.features)(params, pixels))
    golden.check("pre_processed", to_unit_range(pixels).transpose(0, 3, 1, 2))
    normalised = normalize(pixels, *NORMALIZATIONS[teacher.normalization])
    golden.check("normalised_input", normalised.transpose(0, 3, 1, 2))
    return teacher, params


def load(golden: Golden, pixels, **options):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.npz"
        np.savez(path, **golden.state)
        return load_teacher(str(path), image_size=pixels.shape[1], **options)
