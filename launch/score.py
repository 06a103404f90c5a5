"""``python launch/score.py``: see ``bigtrain/cli/score.py``."""

from bigtrain.cli import start

if __name__ == "__main__":
    start("score")
