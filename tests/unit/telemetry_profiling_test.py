"""Profiles on demand, and what is said when memory runs out."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from bigtrain.config import DataConfig, DataSource, EngineConfig, ModelConfig, Precision, ProfileConfig, TrainConfig
from bigtrain.config.check import check, fit_micro_batch, resolve
from bigtrain.errors import PreflightError
from bigtrain.processes import RankInfo
from bigtrain.telemetry.profiling import Profiler, communication_seconds, explained

ALONE = RankInfo(0, 1, 0, 1)


def train(
    run: Path, steps: list[int], *, first_step: int = 0, last_step: int = 8, rank: int = 0
) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = []

    def say(kind: str, **fields: Any) -> None:
        said.append({"event": kind, **fields})

    with Profiler(ProfileConfig(steps=steps), run, rank=rank, first_step=first_step, say=say) as profiler:
        for step in range(first_step + 1, last_step + 1):
            with torch.profiler.record_function(f"my step {step}"):
                torch.ones(8, 8) @ torch.ones(8, 8)
            profiler.step_done(step)
    return said


def traced_steps(path: str) -> list[str]:
    events = json.loads(gzip.decompress(Path(path).read_bytes()))["traceEvents"]
    assert any(event["name"] == "aten::mm" for event in events)
    return sorted({event["name"] for event in events if event["name"].startswith("my step")})


def test_exactly_the_wanted_steps_are_traced(tmp_path: Path):
    (event,) = train(tmp_path, [3, 4])
    assert (event["event"], event["step"]) == ("profile", 4)
    assert traced_steps(event["path"]) == ["my step 3", "my step 4"]
    assert "aten::mm" in (tmp_path / "profile/steps-3-4.txt").read_text()


def span(name: str, start: float, end: float, device: DeviceType = DeviceType.CPU) -> SimpleNamespace:
    return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end))


def test_communication_is_told_with_what_of_it_nothing_hides():
    host = [span("aten::mm", 0, 10), span("gloo:all_reduce", 5, 20), span("gloo:all_reduce", 15, 30)]
    assert communication_seconds(host, 5) == {
        "communication_seconds": pytest.approx(25e-6 / 5),
        "exposed_communication_seconds": pytest.approx(20e-6 / 5),
    }
    device = [span("gemm", 0, 10, DeviceType.CUDA), span("ncclDevKernel_AllReduce", 8, 12, DeviceType.CUDA)]
    assert communication_seconds([*host, *device], 1)["communication_seconds"] == pytest.approx(4e-6)
    assert communication_seconds(host[:1], 1) == {}


def test_a_launch_may_begin_and_end_within(tmp_path: Path):
    (event,) = train(tmp_path, [6, 20], first_step=5)
    assert event["step"] == 8 and traced_steps(event["path"]) == ["my step 6", "my step 7", "my step 8"]


@pytest.mark.parametrize("options", [{"steps": []}, {"steps": [3, 4], "rank": 1}, {"steps": [3, 4], "first_step": 5}])
def test_otherwise_nothing_is_written(tmp_path: Path, options: dict[str, Any]):
    assert train(tmp_path, **options) == [] and list(tmp_path.iterdir()) == []


def test_memory_that_cannot_be_recorded_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    if torch.cuda.is_available():
        pytest.skip("here it can be recorded")
    with Profiler(ProfileConfig(memory=True), tmp_path, rank=0, first_step=0, say=print):
        pass
    assert "profile.memory is ignored without a GPU" in caplog.text


@pytest.mark.parametrize("steps", [[3], [4, 3], [0, 3], [1, 2, 3]])
def test_steps_that_make_no_sense_are_told(steps: list[int]):
    config = TrainConfig(profile=ProfileConfig(steps=steps))
    config.data.source = DataSource.synthetic
    (problem,) = check(resolve(config), world_size=1, local_world_size=1)
    assert problem.startswith("profile.steps[0]=0" if 0 in steps else "profile.steps=")


def test_memory_that_runs_out_is_a_message_with_what_to_change(tmp_path: Path):
    shape = ModelConfig(num_layers=12, hidden_dim=1024, num_heads=16, max_positions=1024)
    engine = EngineConfig(precision=Precision.fp32)
    config = TrainConfig(model=shape, data=DataConfig(source=DataSource.synthetic), engine=engine)
    with (
        pytest.raises(PreflightError) as caught,
        explained(fit_micro_batch(resolve(config), 1), tmp_path, ALONE, torch.device("cpu")),
    ):
        torch.empty(2**50)
    message = str(caught.value)
    assert message.startswith("memory has run out: ") and "These settings would fit:" in message
    assert "train.micro_batch_size=" in message and isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("no memory")])
def test_other_errors_stay_what_they_are(tmp_path: Path, error: Exception):
    with pytest.raises(type(error), match=str(error)), explained(TrainConfig(), tmp_path, ALONE, torch.device("cpu")):
        raise error
