"""Numbers that label maps and what learns from them agree on; imports nothing, so that losses need no image library."""

IGNORED = 255
"""Label of a pixel that counts neither in the loss nor in the evaluation."""
