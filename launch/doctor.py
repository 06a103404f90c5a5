"""``python launch/doctor.py``: see ``bigtrain/cli/doctor.py``."""

from bigtrain.cli import start

if __name__ == "__main__":
    start("doctor")
