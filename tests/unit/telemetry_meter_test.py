"""Step times come from the clock alone."""

import pytest

from bigtrain.telemetry.meter import StepMeter


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_step_lasts_from_the_end_of_the_one_before() -> None:
    clock = Clock()
    meter = StepMeter(1000, clock)
    clock.now += 2.0
    assert meter.step_done(1) == {"tokens": 1000, "step_seconds": 2.0, "tokens_per_second": 500.0}
    clock.now += 0.5
    assert meter.step_done(2) == {"tokens": 2000, "step_seconds": 0.5, "tokens_per_second": 2000.0}


def test_skipped_time_belongs_to_no_step() -> None:
    clock = Clock()
    meter = StepMeter(1000, clock)
    clock.now += 1.0
    meter.step_done(1)
    clock.now += 60.0  # validation
    meter.skip()
    clock.now += 1.0
    assert meter.step_done(2)["step_seconds"] == 1.0


def test_a_clock_that_stands_still_gives_finite_numbers() -> None:
    record = StepMeter(1000, lambda: 0.0).step_done(1)
    assert record["tokens_per_second"] < float("inf")
    assert record["step_seconds"] == pytest.approx(0.0, abs=1e-6)
