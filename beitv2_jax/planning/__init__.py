"""What a run would need and take on chips that are not here: compiled ahead of time, or by arithmetic."""
