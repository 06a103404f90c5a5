"""The main job on real text: the embedded corpus, two processes, two engines, the first one under torchrun."""

import json

import pytest

from tests.distributed.launches import TRAIN, events, fork, launch, torchrun

STEPS = 40


def settings(engine):
    return [
        *("+model=gpt_nano", f"engine={engine}", f"run.name={engine}", f"train.steps={STEPS}", "optimizer.lr=3e-3"),
        *("data.sequence_length=128", "train.global_batch_size=16", "train.micro_batch_size=8"),
        *("scheduler.warmup_steps=10", f"validation.every_steps={STEPS}", "validation.batches=4"),
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fsdp_and_zero3_reach_the_same_validation_loss(tmp_path):
    assert launch(torchrun(2, TRAIN, *settings("fsdp")), tmp_path, 250).code == 0
    assert fork("train.py", *settings("zero3"), cwd=tmp_path, world_size=2, timeout_seconds=250).code == 0
    ((fsdp,), (zero3,)) = (
        [e["loss"] for e in events(tmp_path / "runs" / name, "validation")] for name in ("fsdp", "zero3")
    )
    index = json.loads((tmp_path / "runs/fsdp/index.json").read_text())
    unigram = index["validation"]["unigram_nats_per_token"]
    print(f"fsdp {fsdp:.6f}, zero3 {zero3:.6f}, unigram entropy {unigram:.4f} nats per token")
    assert zero3 == pytest.approx(fsdp, rel=0.01)
    assert fsdp < unigram  # it has learned more than frequencies
