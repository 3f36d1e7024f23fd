"""Implementations of attention, nearest-code lookup and cross entropy, and custom VJPs."""
