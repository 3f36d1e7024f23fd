"""Data sets prepared once, before training: ImageNet-1k from its archives, large sets by Apache Beam."""
