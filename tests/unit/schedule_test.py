"""The learning rate is a pure function of the step."""

import itertools

import pytest

from bigtrain.config import SchedulerConfig, SchedulerKind
from bigtrain.optim.schedule import lr_at


def rates(kind, num_steps=100, **kwargs):
    config = SchedulerConfig(kind=SchedulerKind[kind], **{"warmup_steps": 10, "min_lr_ratio": 0.1, **kwargs})
    return [lr_at(step, peak_lr=1.0, num_steps=num_steps, config=config) for step in range(num_steps)]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd", "inverse_sqrt"])
def test_warm_up_is_linear_and_starts_above_zero(kind):
    values = rates(kind)
    assert values[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(values) == pytest.approx(1.0)


@pytest.mark.parametrize(("kind", "last"), [("constant", 1.0), ("linear", 0.1), ("cosine", 0.1), ("wsd", 0.1)])
def test_the_last_step_has_the_final_rate(kind, last):
    assert rates(kind)[-1] == pytest.approx(last)


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd", "inverse_sqrt"])
def test_the_rate_never_rises_after_warm_up(kind):
    values = rates(kind)[10:]
    assert all(a >= b for a, b in itertools.pairwise(values))


def test_linear_and_cosine_are_half_way_down_in_the_middle():
    assert rates("linear", warmup_steps=0, min_lr_ratio=0.0)[49] == pytest.approx(0.5)
    assert rates("cosine", warmup_steps=0, min_lr_ratio=0.0)[49] == pytest.approx(0.5)


def test_the_inverse_square_root_is_half_at_four_times_the_warm_up():
    values = rates("inverse_sqrt")
    assert values[9] == values[8] / 0.9 == pytest.approx(1.0) and values[39] == pytest.approx(0.5)
    assert rates("inverse_sqrt", num_steps=1000)[:100] == values  # it has no end


def test_wsd_is_flat_until_its_decay():
    values = rates("wsd", decay_fraction=0.2)
    assert values[10:80] == pytest.approx([1.0] * 70)
    assert values[80] < 1.0


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
def test_more_warm_up_than_steps_is_no_error(kind):
    assert all(0 < value <= 1 for value in rates(kind, num_steps=5))
    assert lr_at(1000, peak_lr=1.0, num_steps=100, config=SchedulerConfig(kind=SchedulerKind[kind])) == pytest.approx(
        0.1
    )
