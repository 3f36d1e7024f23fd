"""Weights of other layouts and of finished runs, as trees of this package."""
