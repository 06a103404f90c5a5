"""The benchmarks run, in small: every side does the same work, and what is printed is complete."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *args: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=280, check=False)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.slow
def test_the_sides_of_a_step_take_turns_and_do_the_same_work(tmp_path: Path):
    small = ["--model=gpt_nano", "--sequence-length=32", "--batch=2", "--ranks=2", "--turns=2", "--steps=1"]
    output = run("step.py", *small, "--sides", "nanogpt", "--together=2", f"--json={tmp_path / 'figures'}")
    rows = json.loads((tmp_path / "figures").read_text())["rows"]
    assert len(rows) == 2, output
    for row in rows.values():
        assert len(row["seconds_per_step"]) == 2
        assert row["peak_bytes"] > 0
    assert len(re.findall(r"^\S.* +[\d,]+ +[\d.]+x .* +[\d.]+$", output, re.MULTILINE)) == 2


@pytest.mark.slow
def test_the_loss_in_chunks_is_that_of_all_logits_in_less_memory():
    output = run(
        "loss_memory.py", "--batch=1", "--sequence-length=2048", "--vocabulary=16000", "--width=4", "--turns=1"
    )
    ratio = re.search(r"of all logits +[\d.]+ +[\d.]+x +[\d,]+ +([\d.]+)x", output)
    assert float(ratio[1]) < 1, output


@pytest.mark.slow
def test_tensor_parallelism_sends_what_the_formula_says_and_does_the_work_of_dtensor():
    output = run("tensor_parallel.py", "--width=64", "--heads=4", "--layers=2", "--length=32", "--batch=4")
    assert float(re.search(r"DTensor / bigtrain +median ([\d.]+)", output)[1]) > 0, output
