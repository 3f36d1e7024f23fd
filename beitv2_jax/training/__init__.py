"""How it runs: loop, state, optimizer, sharding, checkpoints; knows a task by its signature, never a model."""
