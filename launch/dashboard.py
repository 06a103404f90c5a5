"""``python launch/dashboard.py``: see ``bigtrain/cli/dashboard.py``."""

from bigtrain.cli import start

if __name__ == "__main__":
    start("dashboard")
