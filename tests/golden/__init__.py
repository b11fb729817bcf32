"""Readers of recorded trajectories."""
