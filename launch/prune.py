"""``python launch/prune.py``: see ``bigtrain/cli/prune.py``."""

from bigtrain.cli import start

if __name__ == "__main__":
    start("prune")
