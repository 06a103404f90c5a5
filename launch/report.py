"""``python launch/report.py``: see ``bigtrain/cli/report.py``."""

from bigtrain.cli import start

if __name__ == "__main__":
    start("report")
