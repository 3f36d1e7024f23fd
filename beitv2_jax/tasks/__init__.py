"""The stages: one file each, with model, loss, metrics and evaluation. Imports models and data, never the loop."""
