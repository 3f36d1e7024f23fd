"""Sizes of the model family, one row each; presets of the configs name them.

Any patch size that divides the image size works with every row: `model.patch_size` and `views.image_size` are settings
of their own, and the ones here are the usual ones.

Source: base, large, 24x544 and huge as registered by the released code; giant has its width, depth and mlp_dim, and
the 16 heads of ViT-g; tiny and small as in DeiT.
"""

SIZES = {
    "tiny": {"patch_size": 16, "width": 192, "depth": 12, "num_heads": 3, "mlp_dim": 768},
    "small": {"patch_size": 16, "width": 384, "depth": 12, "num_heads": 6, "mlp_dim": 1536},
    "base": {"patch_size": 16, "width": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072},
    "24x544": {"patch_size": 16, "width": 544, "depth": 24, "num_heads": 16, "mlp_dim": 2176},
    "large": {"patch_size": 16, "width": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 4096},
    "huge": {"patch_size": 14, "width": 1280, "depth": 32, "num_heads": 16, "mlp_dim": 5120},
    "giant": {"patch_size": 14, "width": 1408, "depth": 40, "num_heads": 16, "mlp_dim": 6144},
}

MASKED_FRACTION = 75 / 196
"""Fraction of the patches that the published pre-training hides."""
