"""``python launch/train.py``: see ``bigtrain/cli/train.py``."""

from bigtrain.cli import start

if __name__ == "__main__":
    start("train")
