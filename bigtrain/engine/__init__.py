"""Engines: interchangeable ways to compute the same run."""
