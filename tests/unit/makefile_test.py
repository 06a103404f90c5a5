"""`make install` looks at the interpreter before it makes anything."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("version_check", "modules_check", "said"),
    [(1, 0, "is no Python 3.11, 3.12 or 3.13 (Python 3.9.2)"), (0, 1, "cannot make virtual environments")],
    ids=["too old", "no venv"],
)
def test_an_interpreter_that_will_not_do_is_named_first(
    version_check: int, modules_check: int, said: str, tmp_path: Path
):
    python = tmp_path / "python"
    python.write_text(
        f"#!/bin/sh\ncase $2 in *version*) exit {version_check};; *venv*) exit {modules_check};; esac\n"
        "[ $1 = --version ] && echo Python 3.9.2\n"
    )
    python.chmod(0o755)
    command = ["make", "install", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "make install PYTHON=" in ended.stderr or "apt install python3-venv" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["python"]
