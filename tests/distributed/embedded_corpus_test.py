"""The main job on real text: the embedded corpus, two processes under torchrun, two engines."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = Path(__file__).parents[2] / "launch/train.py"
STEPS = 40


def train(engine, directory):
    """Train a while and return the validation loss that the run reports."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(TRAIN)),
        *("+model=gpt_nano", f"engine={engine}", f"run.name={engine}", f"train.steps={STEPS}", "optimizer.lr=3e-3"),
        *("data.sequence_length=128", "train.global_batch_size=16", "train.micro_batch_size=8"),
        *("scheduler.warmup_steps=10", f"validation.every_steps={STEPS}", "validation.batches=4"),
    ]
    subprocess.run(command, cwd=directory, check=True, timeout=250, capture_output=True)
    events = [json.loads(line) for line in (directory / "runs" / engine / "events.jsonl").read_text().splitlines()]
    (loss,) = [event["loss"] for event in events if event["event"] == "validation"]
    return loss


@pytest.mark.timeout(600)
def test_fsdp_and_zero3_reach_the_same_validation_loss(tmp_path):
    fsdp, zero3 = (train(engine, tmp_path) for engine in ("fsdp", "zero3"))
    index = json.loads((tmp_path / "runs/fsdp/index.json").read_text())
    unigram = index["validation"]["unigram_nats_per_token"]
    print(f"fsdp {fsdp:.6f}, zero3 {zero3:.6f}, unigram entropy {unigram:.4f} nats per token")
    assert zero3 == pytest.approx(fsdp, rel=0.01)
    assert fsdp < unigram  # it has learned more than frequencies
