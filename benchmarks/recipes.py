"""Sizes of what the benchmarks measure: those of the published recipes, and small ones for a CPU.

Plain nested dicts whose entries are attributes too, so that they stand where a config would although ml_collections
need not be installed. What belongs to data and schedules is left out.
"""

from collections.abc import Mapping
from typing import Any

from beitv2_jax.sizes import SIZES

TEACHER_WIDTH = 512
MASKED_SHARE = 75 / 196


class Recipe(dict):
    """A dict whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


def recipe(name: str, *, quick: bool = False, changes: Mapping[str, Any] | None = None, device: Any = None) -> Recipe:
    """Return a recipe: "mim_base", "mim_large", "vqkd", "finetune" or "segment".

    Args:
        quick: small numbers in float32, in the proportions of the large ones.
        changes: values in place of its own, by "section.key"; those of keys that it does not have change nothing.
        device: what its steps are made for, if not the first one here.
    """
    flat = {**_COMMON, **_RECIPES[name]}
    if quick:
        flat |= {**_QUICK_COMMON, **_QUICK[name]}
    flat |= {key: value for key, value in (changes or {}).items() if key in flat}
    found = Recipe()
    for key, value in flat.items():
        *sections, last = key.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, Recipe())
        place[last] = value
    if found.stage == "mim":
        patches = (found.views.image_size // found.model.patch_size) ** 2
        found["masking"] = Recipe(num_masked=max(1, round(MASKED_SHARE * patches)))
    if device is not None:
        found["device"] = device
    return found


def known_keys() -> set[str]:
    """Return every key that some recipe has."""
    return set(_COMMON).union(*_RECIPES.values())


def _size(prefix: str, size: Mapping[str, int], **more: Any) -> dict[str, Any]:
    return {f"{prefix}.{key}": value for key, value in {**size, **more}.items()}


def _blocks(size: Mapping[str, int]) -> dict[str, int]:
    return {key: value for key, value in size.items() if key != "patch_size"}


BASE, LARGE = SIZES["base"], SIZES["large"]
SMALL = {"patch_size": 16, "width": 192, "depth": 3, "num_heads": 3, "mlp_dim": 768}
SMALL_LARGE = {"patch_size": 16, "width": 256, "depth": 5, "num_heads": 4, "mlp_dim": 1024}

_COMMON = {
    "views.image_size": 224,
    "normalization": "imagenet",
    "efficiency.dtype": "bfloat16",
    "efficiency.gradient_dtype": "float32",
    "efficiency.remat": "none",
    "efficiency.attention": "auto",
    "efficiency.nearest_code": "auto",
    "efficiency.cross_entropy": "auto",
    "optim.peak_lr": 1.5e-3,
    "optim.min_lr": 1e-5,
    "optim.betas": (0.9, 0.999),
    "optim.eps": 1e-8,
    "optim.weight_decay": 0.05,
    "optim.weight_decay_end": 0.05,
    "optim.clip_norm": 0.0,
    "optim.layer_decay": 1.0,
    "torch.compile": True,
}
_TOKENIZER = {
    **_size("tokenizer.encoder", BASE, stem="linear"),
    **_size("tokenizer.decoder", _blocks(BASE), depth=3),
    "tokenizer.codebook_size": 8192,
    "tokenizer.code_dim": 32,
}
_MIM = {
    "stage": "mim",
    "model.stem": "linear",
    "model.codebook_size": 8192,
    "model.position": "relative_shared",
    "model.param_init": "clipped",
    "model.drop_path_rate": 0.1,
    "model.patch_aggregation": True,
    "model.head_depth": 2,
    "model.shared_head": True,
    "optim.clip_norm": 3.0,
    **_TOKENIZER,
}
_RECIPES = {
    "mim_base": {**_MIM, **_size("model", BASE, early_layer=9, layer_scale_init=0.1), "run.batch_size": 256},
    "mim_large": {**_MIM, **_size("model", LARGE, early_layer=21, layer_scale_init=1e-5), "run.batch_size": 128},
    "vqkd": {
        "stage": "vqkd",
        **_size("model.encoder", BASE, stem="linear"),
        **_size("model.decoder", _blocks(BASE), depth=3),
        "model.codebook_size": 8192,
        "model.code_dim": 32,
        "model.ema_decay": 0.99,
        "model.commitment_weight": 1.0,
        "teacher_width": TEACHER_WIDTH,
        **_size("teacher", BASE),
        "optim.peak_lr": 2e-4,
        "optim.betas": (0.9, 0.99),
        "optim.weight_decay": 1e-4,
        "optim.weight_decay_end": 1e-4,
        "run.batch_size": 256,
    },
    "finetune": {
        "stage": "finetune",
        **_size("model", BASE, stem="linear"),
        "model.position": "relative",
        "model.num_classes": 1000,
        "model.drop_path_rate": 0.2,
        "model.layer_scale_init": 0.1,
        "model.pooling": "mean",
        "model.head_init_scale": 0.001,
        "augment.mixup": 0.8,
        "augment.cutmix": 1.0,
        "augment.mix_probability": 1.0,
        "augment.switch_probability": 0.5,
        "augment.erasing": 0.25,
        "label_smoothing": 0.1,
        "optim.peak_lr": 5e-4,
        "optim.layer_decay": 0.6,
        "run.batch_size": 256,
    },
    "segment": {
        "stage": "segment",
        "views.image_size": 512,
        **_size("model", BASE, stem="linear"),
        "model.position": "relative",
        "model.layer_scale_init": 0.1,
        "model.drop_path_rate": 0.15,
        "model.num_classes": 150,
        "model.out_layers": (4, 6, 8, 12),
        "model.channels": 768,
        "model.aux_channels": 256,
        "model.dropout_rate": 0.1,
        "loss.auxiliary_weight": 0.4,
        "loss.count_unlabelled": True,
        "optim.peak_lr": 5e-5,
        "optim.layer_decay": 0.75,
        "run.batch_size": 16,
    },
}
# torch.compile takes a minute on two cores
_QUICK_COMMON = {
    "views.image_size": 112,
    "efficiency.dtype": "float32",
    "run.batch_size": 8,
    "torch.compile": False,
}
_QUICK_TOKENIZER = {
    **_size("tokenizer.encoder", SMALL),
    **_size("tokenizer.decoder", _blocks(SMALL), depth=1),
    "tokenizer.codebook_size": 1024,
}
_QUICK = {
    "mim_base": {**_size("model", SMALL, early_layer=2, head_depth=1), "model.codebook_size": 1024, **_QUICK_TOKENIZER},
    "mim_large": {
        **_size("model", SMALL_LARGE, early_layer=4, head_depth=1),
        "model.codebook_size": 1024,
        **_QUICK_TOKENIZER,
    },
    "vqkd": {
        **_size("model.encoder", SMALL),
        **_size("model.decoder", _blocks(SMALL), depth=1),
        "model.codebook_size": 1024,
        **_size("teacher", SMALL),
    },
    "finetune": {**_size("model", SMALL), "model.num_classes": 100},
    "segment": {
        **_size("model", SMALL),
        "views.image_size": 128,
        "model.num_classes": 20,
        "model.out_layers": (1, 2, 2, 3),
        "model.channels": 64,
        "model.aux_channels": 32,
        "run.batch_size": 2,
    },
}
