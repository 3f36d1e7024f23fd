"""What is learned: one file a stage, pure functions; a task knows models and data, never the loop."""
