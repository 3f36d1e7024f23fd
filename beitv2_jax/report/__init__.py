"""Pictures and tables people look at when a run has ended."""
