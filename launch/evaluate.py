"""``python launch/evaluate.py``: see ``bigtrain/cli/evaluate.py``."""

from bigtrain.cli import start

if __name__ == "__main__":
    start("evaluate")
