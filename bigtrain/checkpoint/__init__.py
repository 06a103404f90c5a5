"""Checkpoints: the state of the run, not of an engine."""
