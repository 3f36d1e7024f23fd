"""Evaluation protocols on frozen features, and exact metrics."""
