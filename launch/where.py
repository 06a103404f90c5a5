"""``python launch/where.py``: see ``bigtrain/cli/where.py``."""

from bigtrain.cli import start

if __name__ == "__main__":
    start("where")
