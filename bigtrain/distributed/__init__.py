"""Ranks of a run: who this process is, how the ranks meet, and collectives on plain values."""
