"""``python launch/curve.py``: see ``bigtrain/cli/curve.py``."""

from bigtrain.cli import start

if __name__ == "__main__":
    start("curve")
