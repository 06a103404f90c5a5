"""The benchmark of the trainer's overhead runs, and both of its sides do the same work."""

import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks/overhead.py"


def test_the_trainer_and_the_bare_loop_do_the_same_work():
    command = [sys.executable, str(SCRIPT), "--engine=fsdp", "--ranks=2", "--no-op", "--steps=40"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    ours, bare = re.search(r"bigtrain ([\d.]+), bare ([\d.]+)", result.stdout).groups()
    assert abs(float(ours) - float(bare)) <= 1e-4 * float(bare)
    assert re.search(r"single step, median of 20 +[\d.]+ +[\d.]+ +[+-][\d.]+ +[\d.]+\n", result.stdout)
