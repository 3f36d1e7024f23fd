"""What flows in: sources, decoding, crops, masks, batches and the store of targets. Never imports jax."""
