"""``python launch/generate.py``: see ``bigtrain/cli/generate.py``."""

from bigtrain.cli import start

if __name__ == "__main__":
    start("generate")
