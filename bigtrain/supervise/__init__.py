"""Surviving: signals, and ending a run together."""
