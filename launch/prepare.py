"""``python launch/prepare.py``: see ``bigtrain/cli/prepare.py``."""

from bigtrain.cli import start

if __name__ == "__main__":
    start("prepare")
