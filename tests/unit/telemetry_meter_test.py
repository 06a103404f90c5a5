"""Step times come from the clock alone."""

import pytest
import torch

from bigtrain.config import TrainConfig
from bigtrain.config.check import resolve
from bigtrain.data.read.batch import Batch
from bigtrain.models.flops import TokenFlops, causal_pairs, flops_per_token
from bigtrain.models.sizes import model_sizes
from bigtrain.telemetry.gauges import find_flops, utilisation
from bigtrain.telemetry.meter import StepMeter
from bigtrain.telemetry.peak import Peak


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_step_lasts_from_the_end_of_the_one_before() -> None:
    clock = Clock()
    meter = StepMeter(1000, clock)
    clock.now += 2.0
    assert meter.step_done(1000) == {"tokens": 1000, "step_seconds": 2.0, "tokens_per_second": 500.0}
    clock.now += 0.5
    assert meter.step_done(2000) == {"tokens": 2000, "step_seconds": 0.5, "tokens_per_second": 2000.0}


def test_skipped_time_belongs_to_no_step() -> None:
    clock = Clock()
    meter = StepMeter(1000, clock)
    clock.now += 1.0
    meter.step_done(1000)
    clock.now += 60.0  # validation
    meter.skip()
    clock.now += 1.0
    assert meter.step_done(2000)["step_seconds"] == 1.0


def test_a_clock_that_stands_still_gives_finite_numbers() -> None:
    record = StepMeter(1000, lambda: 0.0).step_done(1000)
    assert record["tokens_per_second"] < float("inf")
    assert record["step_seconds"] == pytest.approx(0.0, abs=1e-6)


def test_phases_are_means_over_the_steps_since_they_were_read() -> None:
    clock = Clock()
    meter = StepMeter(1000, clock)
    for seconds in (1.0, 3.0):
        clock.now += seconds
        meter.data_ready([])
        clock.now += 0.5
        meter.mark("perf/forward_backward_seconds")
        meter.step_done(1000)
    phases = meter.phases()
    assert (phases["perf/data_seconds"], phases["perf/forward_backward_seconds"]) == (2.0, 0.5)
    assert "data/attention_pairs_per_token" not in phases
    assert set(meter.phases().values()) == {0.0}


def test_a_model_whose_shape_does_not_give_its_parameters_has_no_mfu() -> None:
    model = resolve(TrainConfig()).model
    num_parameters = model_sizes(model).total
    assert find_flops(model, 64, num_parameters) == flops_per_token(model, 64)
    assert find_flops(model, 64, 2 * num_parameters) is None


def test_what_a_document_mask_leaves_is_counted() -> None:
    batch = Batch(positions=torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1]]))
    meter = StepMeter(8, Clock())
    meter.data_ready([batch])
    meter.step_done(1000)
    pairs = causal_pairs(4) + 2 * causal_pairs(2)
    assert meter.phases()["data/attention_pairs_per_token"] == pairs / 8
    flops, peak = TokenFlops(causal=9.0, full_attention=12.0, products=6.0, pair=2.0), Peak(100.0, "")
    assert utilisation(flops, peak, 10.0, pairs / 8)["perf/mfu_documents"] == pytest.approx((6 + 2 * 2) / 10)
    assert "perf/mfu_documents" not in utilisation(flops, peak, 10.0)
    assert (
        utilisation(flops, None, 10.0).keys() == {"perf/causal_tflops_per_device"} and utilisation(None, peak, 1) == {}
    )
