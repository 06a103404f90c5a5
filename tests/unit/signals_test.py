"""Signals set a flag, a second thought forces, and ranks agree on the step."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bigtrain.config import SupervisionConfig
from bigtrain.distributed.collectives import init_process_group, pick_device, shut_down
from bigtrain.errors import StopError
from bigtrain.processes import STOP_SIGNALS, RankInfo
from bigtrain.supervise import signals
from bigtrain.supervise.agreement import StopAgreement
from bigtrain.supervise.launch import Launch
from bigtrain.supervise.signals import STOP_FILE, StopLimits, StopSignal
from bigtrain.testing.ranks import run_ranks


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def stop() -> StopSignal:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
    listening = StopSignal()
    listening.listen()
    return listening


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # Python runs the handler between two instructions


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_sets_a_flag(stop: StopSignal, number: signal.Signals):
    assert stop.reason is None
    send(number)
    assert stop.reason == number.name


def test_the_first_signal_gives_the_name_and_others_disturb_nothing(stop: StopSignal):
    send(signal.SIGTERM)
    send(signal.SIGINT)
    send(signal.SIGTERM)
    assert stop.reason == "SIGTERM"


def test_a_repeated_interrupt_forces_only_later(stop: StopSignal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(signals, "FORCE_AFTER_SECONDS", 0.2)
    send(signal.SIGINT)
    send(signal.SIGINT)  # torchrun passes the terminal's Ctrl-C on at once
    time.sleep(0.25)
    send(signal.SIGTERM)  # a launcher's end, not a person's insistence
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
    assert stop.reason == "SIGINT"


EARLY = """
import os, signal, sys, time
from bigtrain.supervise.signals import EarlyStop, StopSignal
early = EarlyStop()
early.leave_word = lambda reason: print("word of", reason, flush=True)
if "listen" in sys.argv:
    StopSignal().listen()
os.kill(os.getpid(), int(sys.argv[1]))
time.sleep(0.3)
print("lives")
"""


def with_signals_of_a_terminal() -> None:
    """Heed what a shell has ignored by the processes that it starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("number", "rank", "arguments", "expected"),
    [
        (signal.SIGTERM, 0, [], (75, "word of SIGTERM", "stopped by SIGTERM before the first step")),
        (signal.SIGINT, 0, [], (75, "word of SIGINT", "stopped by SIGINT before the first step")),
        (signal.SIGTERM, 1, [], (75, "", "")),
        (signal.SIGTERM, 0, ["listen"], (0, "lives", "")),
        (signal.SIGUSR1, 0, [], (0, "lives", "")),  # a batch script lets them ignore it
        (signal.SIGQUIT, 0, [], (75, "word of SIGQUIT", "stopped by SIGQUIT before the first step")),
        (signal.SIGHUP, 0, [], (0, "lives", "")),  # nohup
        (signal.SIGHUP, 0, ["listen"], (0, "lives", "")),
    ],
)
def test_an_early_signal_ends_the_process_with_a_word_of_rank_0(
    number: signal.Signals, rank: int, arguments: list[str], expected: tuple[int, str, str]
):
    command = [
        "bash",
        "-c",
        'trap "" USR1 HUP; exec "$@"',
        "-",
        sys.executable,
        "-c",
        EARLY,
        str(int(number)),
        *arguments,
    ]
    environ = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(rank + 1)}
    ended = subprocess.run(
        command,
        env=environ,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        preexec_fn=with_signals_of_a_terminal,
    )
    assert (ended.returncode, ended.stdout.strip(), ended.stderr.partition(";")[0]) == expected


def test_a_terminal_that_is_closed_early_ends_the_process_with_its_record():
    terminal, standard = os.openpty()
    script = "import time\n" + EARLY.replace("os.kill(os.getpid(), int(sys.argv[1]))", "print('ready'); time.sleep(20)")
    command = [sys.executable, "-u", "-c", script.replace('print("word of", reason, flush=True)', "os._exit(7)")]
    with subprocess.Popen(
        command, stdin=standard, stdout=standard, stderr=standard, preexec_fn=own_terminal
    ) as process:
        os.close(standard)
        assert b"ready" in os.read(terminal, 100)
        os.close(terminal)
        assert process.wait(30) == 7, "to write to the terminal fails, and the record is left all the same"


def own_terminal() -> None:
    """Make standard input the terminal of a session of this process's own, as a terminal emulator does."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_under_torchrun_an_early_stop_is_no_failure():
    environ = {**os.environ, "TORCHELASTIC_RUN_ID": "1"}
    command = [sys.executable, "-c", EARLY, str(int(signal.SIGTERM))]
    assert subprocess.run(command, env=environ, capture_output=True, timeout=30, check=False).returncode == 0


def poll_for_steps(wanting: dict[int, tuple[int, str]], num_steps: int) -> list[str | None]:
    """Return what each poll answered on this rank; ``wanting`` says at which poll and why a rank wants to stop."""
    info = RankInfo.from_env()
    init_process_group(info, pick_device(info), timeout_seconds=30)
    agreement, answers = StopAgreement(), []
    for step in range(num_steps):
        at, reason = wanting.get(info.rank, (None, None))
        answers.append(agreement.poll(reason if at == step else None))
    answers.append(agreement.settle())
    assert not agreement.settle()  # nothing is left to wait for
    shut_down()
    return answers


@pytest.mark.parametrize("rank", [0, 2])
def test_all_ranks_hear_of_a_stop_at_the_next_step(rank: int):
    answers = run_ranks(poll_for_steps, 3, {rank: (2, "SIGTERM")}, 5)
    assert answers == [[None, None, None, "SIGTERM", None, None]] * 3


def test_of_several_reasons_all_ranks_take_the_same():
    answers = run_ranks(poll_for_steps, 2, {0: (1, "stop file"), 1: (1, "SIGUSR1")}, 3)
    assert answers == [[None, None, "stop file", None]] * 2


def test_a_wish_at_the_last_poll_is_heard_when_settling():
    assert run_ranks(poll_for_steps, 2, {1: (3, "SIGINT")}, 4) == [[None, None, None, None, "SIGINT"]] * 2


def test_a_single_process_stops_at_once():
    assert run_ranks(poll_for_steps, 1, {0: (1, "SIGINT")}, 3) == [[None, "SIGINT", None, None]]


def test_a_stop_file_is_seen_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(StopLimits, "CHECK_SECONDS", 0.0)
    limits = StopLimits(tmp_path, None, started=time.monotonic())
    assert limits.reached() is None
    (tmp_path / STOP_FILE).touch()
    assert limits.reached() == "stop file"
    limits.honour()
    assert limits.reached() is None
    assert list(tmp_path.iterdir()) == []


def test_a_stop_file_costs_a_look_now_and_then(tmp_path: Path):
    limits = StopLimits(tmp_path, None, started=time.monotonic())
    assert limits.reached() is None
    (tmp_path / STOP_FILE).touch()
    assert limits.reached() is None


def test_the_time_limit_leaves_time_for_the_last_save(tmp_path: Path):
    limits = StopLimits(tmp_path, 1.0, started=time.monotonic() - 50)
    assert limits.reached() is None
    limits.save_seconds = 11.0
    assert limits.reached() == "run.max_minutes"


def test_a_stop_that_a_library_wraps_in_an_error_of_its_own_stays_a_stop(tmp_path: Path):
    launch = Launch(tmp_path, 0, SupervisionConfig())
    launch.attempt, launch.signal.reason = 1, "SIGTERM"
    with pytest.raises(StopError), launch:
        try:
            raise StopError("stopped by SIGTERM before the first step")
        except StopError as error:
            raise RuntimeError("propagation failed") from error
    ended = json.loads((tmp_path / "exit.json").read_text())
    assert (ended["code"], ended["reason"]) == (75, "SIGTERM")
    assert not (tmp_path / "failure.json").exists()
