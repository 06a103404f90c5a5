"""``python launch/inspect_data.py``: see ``bigtrain/cli/inspect_data.py``."""

from bigtrain.cli import start

if __name__ == "__main__":
    start("inspect_data")
