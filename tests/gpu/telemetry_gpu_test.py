"""Telemetry on a GPU: phases are timed there without waiting, memory is known, an overflow leaves a snapshot."""

from pathlib import Path

import pytest
import torch

from bigtrain.config import DataConfig, DataSource, Precision, TrainConfig
from bigtrain.config.check import resolve
from bigtrain.errors import PreflightError
from bigtrain.models.sizes import model_sizes
from bigtrain.processes import RankInfo
from bigtrain.telemetry import names
from bigtrain.telemetry.gauges import Gauges
from bigtrain.telemetry.meter import StepMeter
from bigtrain.telemetry.profiling import explained

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none"),
]
BUSY_CYCLES = 50_000_000  # some tens of milliseconds


def configured() -> TrainConfig:
    config = resolve(TrainConfig(data=DataConfig(source=DataSource.synthetic)))
    config.engine.precision = Precision.bf16
    return config


def test_phases_are_timed_on_the_device_and_nobody_waits_for_it():
    meter = StepMeter(1000, device=torch.device("cuda", 0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            meter.data_ready([])
            torch.cuda._sleep(BUSY_CYCLES)
            meter.mark(names.FORWARD_BACKWARD_SECONDS)
            meter.mark(names.CHECKPOINT_STALL_SECONDS)
            meter.mark(names.OPTIMIZER_SECONDS)
            meter.step_done(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    phases = meter.phases()
    assert phases[names.FORWARD_BACKWARD_SECONDS] > 0.01 > phases[names.OPTIMIZER_SECONDS] >= 0


def test_gauges_know_memory_and_a_known_device_has_mfu():
    config, device = configured(), torch.device("cuda", 0)
    held = torch.zeros(2**20, device=device)
    gauges = Gauges(config, device, 1, model_sizes(config.model).total)
    record = {"step": 1, "tokens": 1000, "loss": 2.0, "step_seconds": 0.1, "tokens_per_second": 1e6}
    read = gauges.read([record], {}, step_seconds=0.1, rate=1e6)
    assert read[names.PEAK_BYTES] >= read[names.ALLOCATED_BYTES] >= held.nbytes
    assert read[names.RESERVED_BYTES] >= read[names.ALLOCATED_BYTES]
    assert (names.MFU_CAUSAL in read) == (gauges.peak is not None)


def test_an_overflow_leaves_a_snapshot_and_says_what_to_change(tmp_path: Path):
    device = torch.device("cuda", 0)
    with pytest.raises(PreflightError) as caught, explained(configured(), tmp_path, RankInfo(0, 1, 0, 1), device):
        torch.empty(2**44, device=device)
    assert (tmp_path / "profile/out-of-memory-rank-0.memory.pickle").stat().st_size > 0
    assert "snapshot: " in str(caught.value) and "reserved by this process" in str(caught.value)
