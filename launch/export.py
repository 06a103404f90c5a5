"""``python launch/export.py``: see ``bigtrain/cli/export.py``."""

from bigtrain.cli import start

if __name__ == "__main__":
    start("export")
