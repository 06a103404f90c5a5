"""What shows that a run is the same anywhere: ranks on this machine, parity, kill and resume."""
