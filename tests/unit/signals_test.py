"""Signals set a flag, a second thought forces, and ranks agree on the step."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from bigtrain.distributed import init_process_group, pick_device, shut_down
from bigtrain.local_ranks import run_ranks
from bigtrain.rank_info import RankInfo
from bigtrain.resilience import signals
from bigtrain.resilience.signals import SIGNALS, StopAgreement, StopSignal


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # Python runs the handler between two instructions


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_sets_a_flag(number: signal.Signals):
    with StopSignal() as stop:
        assert stop.reason is None
        send(number)
        assert stop.reason == number.name


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ZeroDivisionError), StopSignal():
        assert [signal.getsignal(number) for number in SIGNALS] != before
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def test_a_repeated_signal_does_not_disturb_the_end():
    with StopSignal() as stop:
        send(signal.SIGINT)
    send(signal.SIGINT)
    send(signal.SIGTERM)
    assert stop.reason == "SIGINT"


def test_the_first_signal_gives_the_name():
    with StopSignal() as stop:
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert stop.reason == "SIGTERM"


def test_a_repeated_interrupt_forces_only_later(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(signals, "FORCE_AFTER_SECONDS", 0.2)
    with StopSignal() as stop:
        send(signal.SIGINT)
        send(signal.SIGINT)  # torchrun passes the terminal's Ctrl-C on at once
        time.sleep(0.25)
        send(signal.SIGTERM)  # a launcher's end, not a person's insistence
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert stop.reason == "SIGINT"


def poll_for_steps(wanting: dict[int, int], num_steps: int) -> list[bool]:
    """Return what each poll answered on this rank; ``wanting`` says which rank wants to stop at which poll."""
    info = RankInfo.from_env()
    init_process_group(info, pick_device(info), timeout_seconds=30)
    agreement, answers = StopAgreement(), []
    for step in range(num_steps):
        answers.append(agreement.poll(wanting.get(info.rank) == step))
    answers.append(agreement.settle())
    assert not agreement.settle()  # nothing is left to wait for
    shut_down()
    return answers


@pytest.mark.parametrize("rank", [0, 2])
def test_all_ranks_hear_of_a_stop_at_the_next_step(rank: int):
    answers = run_ranks(poll_for_steps, 3, {rank: 2}, 5)
    assert answers == [[False, False, False, True, False, False]] * 3


def test_a_wish_at_the_last_poll_is_heard_when_settling():
    assert run_ranks(poll_for_steps, 2, {1: 3}, 4) == [[False, False, False, False, True]] * 2


def test_a_single_process_stops_at_once():
    assert run_ranks(poll_for_steps, 1, {0: 1}, 3) == [[False, True, False, False]]
