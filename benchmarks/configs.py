"""The configs that the benchmarks measure: those of configs/, and small sizes for a CPU."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from beitv2_jax import config as config_lib
from beitv2_jax.models.ops import implementations
from beitv2_jax.sizes import MASKED_FRACTION

FOLDER = Path(__file__).parents[1] / "configs"
SMALL = {"patch_size": 16, "width": 192, "depth": 3, "num_heads": 3, "mlp_dim": 768}
SMALL_LARGE = {"patch_size": 16, "width": 256, "depth": 5, "num_heads": 4, "mlp_dim": 1024}

# name -> config file and presets, and the batch size of one accelerator
CONFIGS = {
    "mim_base": ("mim", 256),
    "mim_large": ("mim:large", 128),
    "vqkd": ("vqkd", 256),
    "finetune": ("finetune", 256),
    "segment": ("segment", 16),
}
# torch.compile takes a minute on two cores
_QUICK_COMMON = {"views.image_size": 112, "efficiency.dtype": "float32", "run.batch_size": 8, "torch.compile": False}
_QUICK_MIM = {"model.head_depth": 1, "model.codebook_size": 1024}


def _size(prefix: str, size: Mapping[str, int], **more: Any) -> dict[str, Any]:
    return {f"{prefix}.{key}": value for key, value in {**size, **more}.items()}


_QUICK = {
    "mim_base": {**_size("model", SMALL, early_layer=2), **_QUICK_MIM},
    "mim_large": {**_size("model", SMALL_LARGE, early_layer=4), **_QUICK_MIM},
    "vqkd": {
        **_size("model.encoder", SMALL),
        **_size("model.decoder", {**SMALL, "depth": 1}),
        "model.codebook_size": 1024,
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


def open_config(spec: str) -> ConfigDict:
    """Return a copy, to be changed, of the config that 'mim' or 'mim:large' names in configs/."""
    stem, _, presets = spec.partition(":")
    return config_lib.load(f"{FOLDER / stem}.py:{presets}").copy_and_resolve_references().unlock()


def load_config(
    name: str, *, quick: bool = False, changes: Mapping[str, Any] | None = None, device: Any = None
) -> ConfigDict:
    """Return a config of `CONFIGS` with every 'auto' resolved for its device.

    Args:
        quick: small sizes in float32, in the proportions of the large ones.
        changes: {"section.key": value}; keys that this config does not have are ignored.
        device: that its steps are made for, if not the first one here.
    """
    spec, batch_size = CONFIGS[name]
    config = open_config(spec)
    config.run.batch_size = batch_size
    config.torch = ConfigDict({"compile": True})
    config.device = device or jax.devices()[0]
    changes = {**(_QUICK_COMMON | _QUICK[name] if quick else {}), **(changes or {})}
    known = config_lib.flatten(config)
    config.update_from_flattened_dict({key: value for key, value in changes.items() if key in known})
    if config.stage == "mim":
        patches = (config.views.image_size // config.model.patch_size) ** 2
        config.masking.num_masked = max(1, round(MASKED_FRACTION * patches))
        config.masking.min_patches = min(config.masking.min_patches, config.masking.num_masked)
    config.efficiency.update(implementations.resolve_auto(config.efficiency, config.device.platform))
    return config.lock()


def known_keys() -> set[str]:
    """Return every key that some config has."""
    return set().union(*(config_lib.flatten(load_config(name)) for name in CONFIGS)) - {"device"}
