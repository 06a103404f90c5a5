"""``python launch/sweep.py``: see ``bigtrain/cli/sweep.py``."""

from bigtrain.cli import start

if __name__ == "__main__":
    start("sweep")
