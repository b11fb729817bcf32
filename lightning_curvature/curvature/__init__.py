"""Linear algebra of curvature: pure functions."""
