"""SIGTERM while a launch is being set up, before it has taken the run: a line and the code of a stop."""

import json
import signal
import sys
from pathlib import Path

import psutil

from tests.distributed.launches import SMALL, TRAIN, Launch, Result, fork, torchrun
from tests.faults.injection import RUN

MESSAGE = "stopped by SIGTERM before the first step; the same command continues\n"
MESSAGE_OF_RANKS = (
    "stopped by SIGTERM before the first step; unless another rank has failed, the same command continues\n"
)


def has_mapped(process: psutil.Process, library: str) -> bool:
    try:
        return library in Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return False


def handles_sigterm(process: psutil.Process) -> bool:
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    return bool(int(status["SigCgt"], 16) & 1 << (signal.SIGTERM - 1))


def exit_record(cwd: Path) -> dict:
    return json.loads((cwd / RUN / "exit.json").read_text())


def test_a_process_that_is_importing_torch_says_so_and_leaves_its_record(tmp_path: Path):
    with Launch([sys.executable, TRAIN, *SMALL], tmp_path) as running:
        process = psutil.Process(running.process.pid)
        running.wait_until(lambda: has_mapped(process, "libtorch"))
        process.terminate()
        assert running.result() == Result(75, "", MESSAGE)
    found = exit_record(tmp_path)
    assert (found["code"], found["reason"], found["step"], found["attempt"]) == (75, "SIGTERM", 0, 1)
    assert fork("train.py", *SMALL, cwd=tmp_path).code == 0
    assert (exit_record(tmp_path)["code"], exit_record(tmp_path)["attempt"]) == (0, 2)


def test_a_process_that_does_not_know_its_run_yet_says_so(tmp_path: Path):
    with Launch([sys.executable, TRAIN, *SMALL], tmp_path) as running:
        process = psutil.Process(running.process.pid)
        running.wait_until(lambda: handles_sigterm(process))
        assert not has_mapped(process, "libtorch")
        process.terminate()
        assert running.result() == Result(75, "", MESSAGE)


def test_the_ranks_of_torchrun_say_so_once(tmp_path: Path):
    with Launch(torchrun(2, TRAIN, *SMALL), tmp_path) as running:

        def ranks() -> list[psutil.Process]:
            return [p for p in psutil.Process(running.process.pid).children() if TRAIN in p.cmdline()]

        running.wait_until(lambda: len(ranks()) == 2 and all(has_mapped(rank, "libtorch") for rank in ranks()))
        running.process.terminate()
        result = running.result()
    assert result.code != 0, "torchrun's own"
    assert result.err.count(MESSAGE_OF_RANKS) == 1
    assert not (tmp_path / RUN).exists()


def test_torchruns_answer_to_a_rank_that_fails_in_its_imports_is_not_recorded_as_a_stop(tmp_path: Path):
    script = tmp_path / "fails.py"
    script.write_text(
        f"import os, runpy; os.environ['RANK'] == '1' and os._exit(7); runpy.run_path({TRAIN!r}, run_name='__main__')"
    )
    with Launch(torchrun(2, str(script), *SMALL), tmp_path) as running:
        result = running.result()
    assert result.code == 1
    assert "exitcode  : 7" in result.err
    assert not (tmp_path / RUN).exists()
