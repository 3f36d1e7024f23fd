"""Layouts of BEiT weights: the official release, timm and Hugging Face."""
