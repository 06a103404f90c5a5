"""``python launch/validate.py``: see ``bigtrain/cli/validate.py``."""

from bigtrain.cli import start

if __name__ == "__main__":
    start("validate")
