"""What a person sees: a display in a terminal, lines in a pipe, the same lines in the log file."""

import errno
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import textwrap
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path

import pytest

from bigtrain import log
from bigtrain.telemetry.console import Console
from bigtrain.telemetry.text import describe, format_count, format_duration

STRAY = 'sys.stdout.write("a stray line\\n")'  # one write, also where PYTHONUNBUFFERED is set
SCRIPT = textwrap.dedent(
    f"""
    import sys
    from pathlib import Path
    from bigtrain import log
    from bigtrain.telemetry.console import Console

    log.setup(0)
    num_steps = int(sys.argv[2])
    with Console(num_steps, Path(sys.argv[1])) as console:
        console.message("hello [bold]you[/bold]")
        for step in range(1, num_steps + 1):
            console.metrics(dict(step=step, tokens=step * 4096, loss=10 / step, grad_norm=0.5, lr=3e-4,
                                 step_seconds=0.1, tokens_per_second=40960.0))
        log.get_logger().warning("a warning")
        {STRAY}
    log.get_logger().warning("after the end")
    print("rich" in sys.modules)
    """
)


def record(step: int, **changes: float) -> dict[str, float]:
    return {
        "step": step,
        "tokens": 1_234_567,
        "loss": 3.21449,
        "grad_norm": 0.8712,
        "lr": 3e-4,
        "step_seconds": 0.5,
        "tokens_per_second": 12_345.0,
        **changes,
    }


@pytest.fixture
def clock() -> Iterator[list[float]]:
    yield [0.0]


def read_terminal(log_file: Path, num_steps: int) -> str:
    """Run the script in a pseudo-terminal of 80 columns and return everything that it wrote."""
    parent, child = pty.openpty()
    ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, log_file, str(num_steps)],
        stdin=child,
        stdout=child,
        stderr=child,
        env={**os.environ, "TERM": "xterm-256color"},
    )
    os.close(child)
    output = b""
    while True:
        try:
            data = os.read(parent, 65536)
        except OSError as error:  # Linux: the other end is closed
            assert error.errno == errno.EIO
            break
        if not data:
            break
        output += data
    os.close(parent)
    assert process.wait() == 0
    return output.decode()


def test_plain_lines_go_to_the_output_and_to_the_log_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    log_file = tmp_path / "log" / "train.log"
    with Console(100, log_file, is_terminal=False, clock=lambda: clock[0]) as console:
        console.metrics(record(10))
        clock[0] = 20.0
        console.metrics(record(20, loss=math.nan))
        console.message("two\nlines")
    lines = capsys.readouterr().out.splitlines()
    numbers = "grad norm 0.871  lr 3.00e-04  1.23M tokens  12.3k tok/s"
    assert lines == [
        f"step 10/100  loss 3.2145  {numbers}  0:00:45 left",
        f"step 20/100  loss nan  {numbers}  0:02:40 left",  # 2 s a step, pauses included
        "two",
        "lines",
    ]
    in_file = log_file.read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in in_file] == lines
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ", in_file[0])


def test_project_log_messages_come_to_the_console_while_it_is_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = log.get_logger().handlers
    with Console(100, tmp_path / "train.log", is_terminal=False):
        log.get_logger().error("seen")
    assert log.get_logger().handlers == before
    assert capsys.readouterr().out == "seen\n"
    assert "seen" in (tmp_path / "train.log").read_text()


def test_a_pipe_gets_one_line_per_call_and_no_control_characters(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "train.log", "50"], capture_output=True, text=True, check=True
    )
    lines = result.stdout.splitlines()
    assert "\x1b" not in result.stdout and "\r" not in result.stdout
    assert sum(line.startswith("step ") for line in lines) == 50
    assert lines[-1] == "False"  # rich is not even imported
    assert "a stray line" in result.stdout  # printed by somebody else: anywhere
    assert (
        0
        <= result.stdout.find("hello [bold]you[/bold]\n")
        < result.stdout.find("step 1/50")
        < result.stdout.find("a warning\n")
    )
    assert result.stderr == "after the end\n"


def test_a_terminal_gets_a_bar_that_does_not_flood(tmp_path: Path) -> None:
    output = read_terminal(tmp_path / "train.log", 3000)
    frames = re.findall(r"step (\d+)/3000", output)
    assert frames[-1] == "3000"  # the last numbers stay on the screen
    assert len(frames) < 300  # redrawn at most ten times a second, whatever the steps do
    assert len(output) < 100_000
    for text in ("hello [bold]you[/bold]", "a warning", "a stray line", "loss 0.0033", "41.0k tok/s", "100%"):
        assert text in output
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") >= 1  # the cursor is given back
    assert len((tmp_path / "train.log").read_text().splitlines()) == 3002


def test_nothing_is_wider_than_80_columns() -> None:
    widest = record(123_456, loss=10.1234, grad_norm=1.23e-05, tokens=1e15)
    assert len(describe(widest)) <= 80


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_reader_that_goes_away_ends_neither_the_run_nor_its_exit_code(tmp_path: Path, is_terminal: bool) -> None:
    script = SCRIPT.replace("Path(sys.argv[1]))", f"Path(sys.argv[1]), is_terminal={is_terminal})")
    script = script.replace(STRAY, "")
    command = [sys.executable, "-c", script, tmp_path / "train.log", "300"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0, errors
    assert "Traceback" not in errors
    assert len((tmp_path / "train.log").read_text().splitlines()) >= 301


def test_a_terminal_that_hangs_up_does_not_end_the_run(tmp_path: Path) -> None:
    parent, child = pty.openpty()
    script = SCRIPT.replace("for step in", "import time; time.sleep(0.5)\n    for step in")
    command = [sys.executable, "-c", script, tmp_path / "train.log", "300"]
    environ = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdout=child, stderr=subprocess.PIPE, text=True, env=environ)
    os.close(child)
    os.read(parent, 10)
    os.close(parent)
    errors = process.communicate()[1]
    assert (process.returncode, errors) == (0, "after the end\n")
    assert "step 300/300" in (tmp_path / "train.log").read_text()


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_reader_that_does_not_read_stops_nobody(tmp_path: Path, is_terminal: bool) -> None:
    parent, child = pty.openpty() if is_terminal else os.pipe()
    script = SCRIPT.replace(STRAY, "[console.message('x' * 100) for _ in range(3000)]")
    script = script.replace('print("rich" in sys.modules)', "print('really', file=sys.stderr)")
    script = script.replace(
        "num_steps =", "from bigtrain.telemetry import console; console._CLOSE_SECONDS = 0.5\nnum_steps ="
    )
    command = [sys.executable, "-c", script, tmp_path / "train.log", "10"]
    process = subprocess.Popen(
        command, stdout=child, stderr=subprocess.PIPE, text=True, env={**os.environ, "TERM": "xterm-256color"}
    )
    try:
        errors = process.communicate(timeout=30)[1]
    finally:
        process.kill()
        os.close(child)
        os.close(parent)
    assert (process.returncode, errors) == (0, "after the end\nreally\n")
    assert len((tmp_path / "train.log").read_text().splitlines()) == 3012


def test_a_log_file_that_fails_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Console(10, Path("/dev/full"), is_terminal=False) as console:
        for step in range(1, 6):
            console.metrics(record(step))
    output = capsys.readouterr().out
    assert output.count("cannot write /dev/full") == 1
    assert output.count("step ") == 5


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.6, "1.00k"),
        (4096, "4.10k"),
        (12_345, "12.3k"),
        (999_499, "999k"),
        (999_600, "1.00M"),
        (1_234_567, "1.23M"),
        (15e12, "15.0T"),
        (2e18, "2000P"),
        (math.inf, "inf"),
    ],
)
def test_counts_have_three_digits_and_a_unit(number: float, text: str) -> None:
    assert format_count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (83.4, "0:01:23"), (59.7, "0:01:00"), (90_061, "1d 1:01:01"), (math.nan, "?"), (math.inf, "?")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
