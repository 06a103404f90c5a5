"""``python launch/explain.py``: see ``bigtrain/cli/explain.py``."""

from bigtrain.cli import start

if __name__ == "__main__":
    start("explain")
