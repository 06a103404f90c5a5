"""``python launch/checkpoints.py``: see ``bigtrain/cli/checkpoints.py``."""

from bigtrain.cli import start

if __name__ == "__main__":
    start("checkpoints")
