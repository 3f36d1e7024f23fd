"""Teacher weights (CLIP, DINO, DINOv2, ...) as one kind of frozen network."""
