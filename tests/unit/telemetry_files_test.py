"""The files of a run survive kills, torn tails, full disks and numbers that JSON lacks."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy
import pytest

from bigtrain.telemetry.files import JsonLines, Tail, read_jsonl


def write_steps(path: Path, first: int, last: int, **fields: object) -> None:
    file = JsonLines(path)
    for step in range(first, last + 1):
        file.write({"step": step, **fields})
    file.close()


def steps_of(path: Path) -> list[int]:
    return [record["step"] for record in read_jsonl(path)]


def test_lines_appear_at_flush_and_reopening_appends(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "metrics.jsonl"
    file = JsonLines(path)
    file.write({"step": 1, "text": "ü\n"})
    assert read_jsonl(path) == []
    file.flush()
    assert read_jsonl(path) == [{"step": 1, "text": "ü\n"}]
    file.close()
    write_steps(path, 2, 3)
    assert steps_of(path) == [1, 2, 3]
    assert path.read_bytes().count(b"\n") == 3


def test_non_finite_numbers_become_null_with_a_note(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = JsonLines(path)
    file.write({"step": 1, "loss": float("nan"), "grad_norm": numpy.float32("inf"), "inner": {"x": [float("-inf")]}})
    file.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record["loss"] is None and record["grad_norm"] is None and record["inner"] == {"x": [None]}
    assert record["non_finite"] == {"loss": "nan", "grad_norm": "inf", "inner.x.0": "-inf"}


def test_scalars_of_numpy_and_foreign_objects_are_written(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    file = JsonLines(path)
    file.write({"a": numpy.float32(0.5), "b": numpy.int64(3), "c": Path("x/y"), "d": numpy.array(2.0), "e": True})
    file.close()
    assert read_jsonl(path) == [{"a": 0.5, "b": 3, "c": "x/y", "d": 2.0, "e": True}]


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"\0\0\0\0", b'{"step": 3, "text": "\xc3', b"x" * 200_000])
def test_a_torn_last_line_is_removed_on_opening(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 2)
    with path.open("ab") as file:
        file.write(torn)
    assert steps_of(path) == [1, 2]  # a reader does not mind
    write_steps(path, 3, 3)
    assert steps_of(path) == [1, 2, 3]
    assert torn not in path.read_bytes()


def test_a_whole_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    write_steps(path, 3, 3)
    assert steps_of(path) == [1, 2, 3]


def test_a_killed_writer_loses_at_most_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from bigtrain.telemetry.files import JsonLines
        file, step = JsonLines(Path(sys.argv[1])), 0
        while True:
            for _ in range(7):
                step += 1
                file.write({"step": step, "text": "x" * 3000})
            file.flush()
            print(step, flush=True)
        """
    )
    for attempt in range(3):
        process = subprocess.Popen([sys.executable, "-c", writer, path], stdout=subprocess.PIPE)
        flushed = [int(process.stdout.readline()) for _ in range(20 + attempt)][-1]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        file = JsonLines(path)
        steps = steps_of(path)
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) >= flushed
        file.remove(lambda record: record["step"] > 0)
        file.close()
        assert path.read_bytes() == b""


def test_steps_after_a_resume_are_superseded_not_doubled(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 120, launch=1)
    file = JsonLines(path)
    assert file.remove(lambda record: record["step"] > 100) == 20
    assert file.remove(lambda record: record["step"] > 100) == 0
    for step in range(101, 111):
        file.write({"step": step, "launch": 2})
    file.close()
    assert steps_of(path) == list(range(1, 111))
    assert {record["launch"] for record in read_jsonl(path)[100:]} == {2}
    assert list(tmp_path.iterdir()) == [path]


def test_removing_keeps_damaged_lines_and_pending_ones(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 9}\n')
    file = JsonLines(path)
    file.write({"step": 2})
    assert file.remove(lambda record: record["step"] > 5) == 1
    file.close()
    assert path.read_text() == '{"step": 1}\nnot json\n{"step": 2}\n'


def test_a_damaged_line_in_the_middle_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n{"torn')
    with caplog.at_level(logging.WARNING):
        assert steps_of(path) == [1, 3]
    assert [record.getMessage() for record in caplog.records] == [f"{path}: line 2 is damaged and ignored"]


def test_a_full_disk_costs_a_warning_and_no_line(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import resource, sys
        from pathlib import Path
        from bigtrain.telemetry.files import JsonLines
        path = Path(sys.argv[1])
        file = JsonLines(path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY))
        for step in range(1, 201):
            file.write({"step": step, "text": "x" * 80})
            file.flush()
        print(path.stat().st_size, path.read_bytes()[-1:])
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        file.close()
        """
    )
    path = tmp_path / "metrics.jsonl"
    result = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("b'\\n'\n")  # a refused write leaves no torn line
    assert result.stderr.count("cannot write") == 1
    assert steps_of(path) == list(range(1, 201))


def test_tail_follows_whole_lines_and_notices_a_replaced_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    with path.open("ab", buffering=0) as file:
        file.write(b'{"step": 1}\n{"st')
        assert tail.read() == [{"step": 1}]
        file.write(b'ep": 2}\n')
    assert tail.read() == [{"step": 2}]
    assert tail.read() == []
    other = tmp_path / "other"
    other.write_text('{"step": 1}\n{"step": 5}\n{"step": 6}\n')
    os.replace(other, path)
    assert [record["step"] for record in tail.read()] == [1, 5, 6]
