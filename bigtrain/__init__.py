"""bigtrain: the same training run, anywhere."""

__version__ = "0.1.0"
