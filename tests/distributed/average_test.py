"""The moving average of the weights is state: the same under every engine, and through a change of it."""

import pytest
import torch

from bigtrain.checkpoint.store import find_checkpoints
from bigtrain.engine.state import MODEL
from bigtrain.run.frozen import MovingAverage, WeightReader
from tests.distributed.launches import SMALL, fork

DECAY = 0.8
# The keys' biases have no gradient but noise, which a small eps would blow up.
SETTINGS = [
    *SMALL,
    "train.steps=6",
    "optimizer.eps=1e-4",
    f"optimizer.average={DECAY}",
    "checkpoint.keep=all",
    "checkpoint.every_steps=1",
]


def test_the_average_is_that_of_the_weights_after_each_step_under_every_engine_and_through_a_change(tmp_path):
    def train(engine: str, world_size: int, *more: str) -> None:
        done = fork("train.py", *SETTINGS, f"engine={engine}", *more, cwd=tmp_path, world_size=world_size)
        assert done.code in (0, 75), done.err

    train("ddp", 1, "run.name=whole")
    train("fsdp", 2, "run.name=changed", "run.stop_after_steps=2")
    train("zero1", 2, "run.name=changed", "run.stop_after_steps=2")
    train("zero3", 2, "run.name=changed")
    whole, changed = (find_checkpoints(tmp_path / "runs" / name) for name in ("whole", "changed"))
    weights = [WeightReader(path) for path in whole]
    average, other = MovingAverage(whole[-1]), MovingAverage(changed[-1])
    shares = torch.tensor([(1 - DECAY) * DECAY ** (5 - i) for i in range(6)], dtype=torch.float64) / (1 - DECAY**6)
    keys = [key for key in weights[-1].keys if key.startswith(MODEL)]
    for key in keys:
        parts = torch.stack([reader.read(key).double() for reader in weights], dim=-1)
        assert torch.allclose(average.read(key).double(), parts @ shares, rtol=1e-5, atol=1e-7), key
        assert torch.allclose(average.read(key), other.read(key), rtol=1e-4, atol=1e-6), key
    assert any(not torch.equal(average.read(key), weights[-1].read(key)) for key in keys)
    exported = fork("export.py", "checkpoint=runs/changed", "out=exported", "average=moving", cwd=tmp_path)
    assert exported.code == 0, exported.err


@pytest.mark.parametrize("before", ["null", "0.8"])
def test_it_is_not_switched_in_the_middle_of_a_run_in_silence(tmp_path, before):
    settings = [*SETTINGS, f"optimizer.average={before}", "run.name=run"]
    assert fork("train.py", *settings, "run.stop_after_steps=1", cwd=tmp_path).code == 75
    after = "0.8" if before == "null" else "null"
    done = fork("train.py", *settings, f"optimizer.average={after}", cwd=tmp_path)
    assert done.code == 2
    assert "optimizer.average" in done.err and "Traceback" not in done.err, done.err
