"""What flows in: sources, decoding, crops, masks, batches and the target cache. Never imports jax."""
