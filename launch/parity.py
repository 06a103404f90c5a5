"""``python launch/parity.py``: see ``bigtrain/cli/parity.py``."""

from bigtrain.cli import start

if __name__ == "__main__":
    start("parity")
