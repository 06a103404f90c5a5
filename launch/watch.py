"""``python launch/watch.py``: see ``bigtrain/cli/watch.py``."""

from bigtrain.cli import start

if __name__ == "__main__":
    start("watch")
