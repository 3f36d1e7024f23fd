"""BEiT v2 in JAX/Flax: a visual tokenizer, masked image modelling on its codes, and their use."""

__version__ = "0.1.0"
