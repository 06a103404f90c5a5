"""``python launch/verify_resume.py``: see ``bigtrain/cli/verify_resume.py``."""

from bigtrain.cli import start

if __name__ == "__main__":
    start("verify_resume")
