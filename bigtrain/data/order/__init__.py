"""Which samples, in which order: pure functions of seed and position."""
