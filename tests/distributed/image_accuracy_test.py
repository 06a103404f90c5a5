"""What the presets reach on images that packages ship."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.tasks_test import ROOT, records

FASHION = [
    *("task=classification", "task.num_labels=10", "data=fashion_mnist", "scheduler.warmup_steps=50"),
    *("train.global_batch_size=128", "train.micro_batch_size=64", "optimizer.lr=2e-3"),
]


def accuracy(place, run, *args):
    places = [f"run.root={place}/runs", f"data.root={place}/data", f"run.name={run}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "launch/train.py", *args, *places, "engine=ddp"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout + done.stderr
    return [e for e in records(place, run, "events") if e["event"] == "validation"][-1]["accuracy"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("network", "least"), [("mlp", 0.965), ("cnn", 0.985), ("vit", 0.94)])
def test_digits(network, least, tmp_path):
    if importlib.util.find_spec("sklearn") is None:
        pytest.skip("scikit-learn is not installed, which has the digits")
    assert accuracy(tmp_path, network, f"+model={network}_digits", f"+experiment=digits_{network}") >= least


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("network", "steps", "least"), [("mlp", 5000, 0.88), ("cnn", 2000, 0.9)])
def test_fashion(network, steps, least, tmp_path):
    if not Path("/usr/share/datasets/fashion-mnist").is_dir():
        pytest.skip("Fashion-MNIST is not installed: apt-get install dataset-fashion-mnist")
    args = [
        *FASHION,
        f"+model={network}_mnist",
        f"train.steps={steps}",
        "validation.batches=80",
        "validation.every_steps=1000",
    ]
    assert accuracy(tmp_path, network, *args) >= least
