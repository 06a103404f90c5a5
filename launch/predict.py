"""``python launch/predict.py``: see ``bigtrain/cli/predict.py``."""

from bigtrain.cli import start

if __name__ == "__main__":
    start("predict")
