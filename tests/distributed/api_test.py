"""The commands as functions, in a process that lives on: a notebook, or somebody's program."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import bigtrain
from bigtrain.errors import BigtrainError
from bigtrain.testing.ranks import run_ranks
from tests.distributed.launches import SMALL, watchdogs_left

IMPORTED = "import sys, bigtrain; print(bigtrain.__version__, sorted({'torch', 'hydra', 'numpy'} & set(sys.modules)))"


def use(directory):
    import os

    os.chdir(directory)
    settings, before = [*SMALL, "train.steps=4", "checkpoint.every_steps=2"], signal.getsignal(signal.SIGTERM)
    run = bigtrain.train(*settings, "run.stop_after_steps=2")
    stopped, losses = run.ended(), [record["loss"] for record in run.metrics()]
    again = bigtrain.train(*settings)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not watchdogs_left(), "they would end a program that goes on"
    result = bigtrain.validate(again, batches=1)
    problems = []
    for mistake in (
        lambda: bigtrain.train(*settings, "optimizer.rl=1"),
        lambda: bigtrain.load_run("nowhere"),
        lambda: bigtrain.generate(again, "a"),
    ):
        with pytest.raises(BigtrainError) as caught:
            mistake()
        problems.append(str(caught.value))
    steps = [record["step"] for record in bigtrain.load_run(again.directory).metrics()]
    return stopped, losses, steps, again.ended(), [p.name for p in again.checkpoints()], result, problems


def test_a_run_is_trained_continued_and_validated_from_python(tmp_path: Path):
    stopped, losses, steps, ended, checkpoints, result, problems = run_ranks(use, 1, tmp_path, timeout_seconds=120)[0]
    assert (stopped["code"], stopped["step"], len(losses)) == (75, 2, 2)
    assert (ended["code"], ended["step"], steps) == (0, 4, [1, 2, 3, 4])
    assert checkpoints[-1] == "step-00000004"
    assert result["step"] == 4 and result["loss"] > 0 and result["perplexity"] > 1
    assert problems[0] == "optimizer.rl: unknown key; did you mean 'optimizer.lr'?"
    assert problems[1].startswith("nowhere: there is no such directory")
    assert "tokenizer" in problems[2]


def test_the_import_is_light():
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"{bigtrain.__version__} []\n"
