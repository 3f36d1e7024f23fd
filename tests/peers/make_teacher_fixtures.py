"""Write tests/golden/teachers.npz: a small teacher of every family, and its features.

PYTHONPATH=tests/helpers python tests/peers/make_teacher_fixtures.py
"""

import functools
from pathlib import Path

import numpy as np
import teacher_cases
import teacher_oracles as oracles

PATH = Path(__file__).parents[1] / "golden" / "teachers.npz"
SMALL = {"patch": 4}
BUILDERS = {
    "openai_clip": functools.partial(oracles.open_clip, quick_gelu=True, openai=True, **SMALL),
    "open_clip": functools.partial(oracles.open_clip, side=4, grid=3, **SMALL),
    "hf_clip": functools.partial(oracles.hf_clip, act="gelu", whole=True, grid=5, **SMALL),
    "hf_clip_tokens": functools.partial(oracles.hf_clip, projection=False, **SMALL),
    "hf_siglip": functools.partial(oracles.hf_siglip, patch=8, whole=True),
    "hf_dinov2": functools.partial(oracles.hf_dinov2, side=5, grid=3, **SMALL),
    "hf_dinov2_giant_registers": functools.partial(oracles.hf_dinov2, patch=14, grid=3, registers=4, swiglu=True),
    "hf_deit": functools.partial(oracles.hf_vit, distilled=True, grid=4, **SMALL),
    "dinov2": functools.partial(oracles.official_dinov2, name="vit_small_patch14_dinov2", **SMALL),
    "dinov2_giant_registers": functools.partial(
        oracles.official_dinov2, name="vit_giant_patch14_reg4_dinov2", side=3, **SMALL
    ),
    "timm_dinov2_registers": functools.partial(
        oracles.timm_vit, name="vit_small_patch14_reg4_dinov2", side=4, normalization="imagenet", **SMALL
    ),
    "timm_siglip": functools.partial(
        oracles.timm_vit, name="vit_base_patch16_siglip_224", options={"activation": "gelu"}, **SMALL
    ),
    "timm_deit": functools.partial(
        oracles.timm_vit,
        name="deit_base_distilled_patch16_224",
        normalization="imagenet",
        options={"normalization": "imagenet"},
        **SMALL,
    ),
    "timm_clip": functools.partial(
        oracles.timm_vit,
        name="vit_base_patch16_clip_quickgelu_224",
        normalization="clip",
        options={"activation": "quick_gelu"},
        **SMALL,
    ),
    "hf_dinov3": functools.partial(oracles.hf_dinov3, grid=5, **SMALL),
    "hf_dinov3_huge": functools.partial(oracles.hf_dinov3, gated=True, **SMALL),
    "hf_tips": functools.partial(oracles.hf_tips, side=5, grid=3, **SMALL),
    "hf_tips_published": functools.partial(oracles.hf_tips, side=3, grid=4, whole=True, published=True, **SMALL),
    "timm_tips": functools.partial(
        oracles.timm_vit, name="vit_base_patch14_reg1_tipsv2", side=4, normalization="unit", **SMALL
    ),
}

if __name__ == "__main__":
    teacher_cases.write(
        PATH, {name: build(np.random.default_rng(seed)) for seed, (name, build) in enumerate(BUILDERS.items())}
    )
    print(f"{PATH}: {PATH.stat().st_size} bytes")
