"""Tests of one's own objective and setup: ranks on this machine, parity of engines, kill and resume."""
