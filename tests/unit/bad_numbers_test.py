"""Which steps are bad, when they are too many, and what is left out then."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bigtrain.config import BadNumbersConfig
from bigtrain.data.order.cursor import extend, pieces
from bigtrain.engine.native import update_unless_bad
from bigtrain.supervise.bad_numbers import BadNumbers, RollBack


def records(losses: list[float], *, first: int = 1) -> list[dict[str, float]]:
    return [{"step": first + i, "loss": loss, "grad_norm": 1.0} for i, loss in enumerate(losses)]


def test_a_few_bad_steps_are_put_up_with_and_too_many_are_not():
    judge = BadNumbers(BadNumbersConfig(max_bad_steps=2))
    found, verdict = judge.judge(records([1.0, math.nan, 1.0, math.inf]))
    assert ([bad.step for bad in found], verdict) == ([2, 4], None)
    found, verdict = judge.judge([{"step": 5, "loss": 1.0, "grad_norm": math.nan}])
    assert ([bad.step for bad in found], verdict) == ([5], RollBack(2, 5))


def test_bad_steps_long_ago_are_forgotten():
    judge = BadNumbers(BadNumbersConfig(max_bad_steps=1))
    assert judge.judge(records([math.nan, *[1.0] * 99, math.nan]))[1] is None
    assert judge.judge(records([math.nan], first=102))[1] == RollBack(101, 102)


def test_spikes_count_only_when_asked_for_and_only_against_a_full_window():
    losses = [2.0 + 0.01 * (i % 5) for i in range(8)] + [2.5]
    assert BadNumbers(BadNumbersConfig(spike_window_steps=8)).judge(records(losses)) == ([], None)
    judge = BadNumbers(BadNumbersConfig(spike_zscore=6, spike_window_steps=8))
    (found,), verdict = judge.judge(records(losses))
    assert (found.step, verdict) == (9, None)
    assert found.why.startswith("spike: loss 2.5000, ")
    assert BadNumbers(BadNumbersConfig(spike_zscore=6, spike_window_steps=9)).judge(records(losses)) == ([], None)


def test_a_spike_does_not_become_the_measure_of_later_ones():
    judge = BadNumbers(BadNumbersConfig(spike_zscore=6, spike_window_steps=8, max_bad_steps=100))
    judge.judge(records([2.0 + 0.01 * (i % 5) for i in range(8)]))
    found, _ = judge.judge(records([3.0] * 20, first=9))
    assert len(found) == 20


def taken(first: int, count: int, skipped: list[list[int]]) -> list[int]:
    return [position for begin, end in pieces(first, count, skipped) for position in range(begin, end)]


ranges = st.lists(st.integers(1, 12), max_size=8).map(
    lambda gaps: [[sum(gaps[: 2 * i + 1]), sum(gaps[: 2 * i + 2])] for i in range(len(gaps) // 2)]
)


@given(ranges, st.integers(0, 40), st.integers(1, 20))
def test_what_is_left_out_is_not_there_and_everything_else_is_once_in_order(
    skipped: list[list[int]], first: int, count: int
):
    out = {position for begin, end in skipped for position in range(begin, end)}
    whole = [position for position in range(200) if position not in out]
    assert taken(first, count, skipped) == whole[first : first + count]


@given(ranges, st.integers(0, 40), st.integers(1, 20))
def test_leaving_out_more_leaves_out_what_the_run_counted_there(skipped: list[list[int]], first: int, count: int):
    more = extend(skipped, first, first + count)
    before, after = taken(0, 100, skipped), taken(0, 100 - count, more)
    assert after == before[:first] + before[first + count :]


@pytest.mark.parametrize("ask_host", [True, False])
@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_bad_gradient_changes_neither_weights_nor_moments(ask_host: bool, norm: float):
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)

    def step(norm: float) -> list[torch.Tensor]:
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, norm)
        update_unless_bad(optimizer, torch.tensor(norm), ask_host=ask_host)
        state = [value for values in optimizer.state.values() for value in values.values()]
        return [tensor.detach().clone() for tensor in [*layer.parameters(), *state]]

    good = step(1.0)
    assert all(map(torch.equal, step(norm), good))
    assert not any(map(torch.equal, step(1.0), good))
