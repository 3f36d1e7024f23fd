"""Images with label maps: sources, random crops, and windows for evaluation."""
