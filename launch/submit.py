"""``python launch/submit.py``: see ``bigtrain/cli/submit.py``."""

from bigtrain.cli import start

if __name__ == "__main__":
    start("submit")
