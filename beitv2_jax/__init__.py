"""BEiT v2 in JAX/Flax: a visual tokenizer, masked image modelling on its codes, and their use."""

import importlib
from typing import Any

__version__ = "0.1.0"
_API = ("load_backbone", "load_classifier", "load_segmenter", "load_tokenizer")
__all__ = ["__version__", *_API]


def __getattr__(name: str) -> Any:
    # loaded when first used: importing the package stays cheap
    if name in _API:
        return getattr(importlib.import_module("beitv2_jax.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
