"""``launch/checkpoints.py``: what a run has, in what state, for a person who has to decide."""

import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain.checkpoint.store import checkpoint_path, checkpoints_directory, set_aside
from bigtrain.testing.ranks import run_ranks
from tests.distributed.launches import LAUNCH, Result, environment, launch
from tests.faults import saves

SCRIPT = str(LAUNCH / "checkpoints.py")
SHARD = "rank-00001.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "run"
    config = {"engine": {"kind": "zero2"}}
    run_ranks(saves.save_all, 2, directory, (1, 2, 3, 4), {"keep": "all", "config": config})
    return directory


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """1 and 4 are whole, 2 is damaged, 3 was set aside, and a save was killed."""
    directory = saves.copy_run(saved, tmp_path / "runs" / "x")
    flip(checkpoint_path(directory, 2) / SHARD)
    flip(checkpoint_path(directory, 3) / "run_state.json")
    set_aside(checkpoint_path(directory, 3))
    saves.forge_run_state(checkpoint_path(directory, 4), lambda state: state.update(validation_loss=3.25))
    partial = checkpoints_directory(directory) / "step-00000005.tmp-0a1b2c3d"
    shutil.copytree(checkpoint_path(directory, 1), partial)
    (partial / "manifest.json").unlink()
    return directory


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def call(cwd: Path, *args: str) -> Result:
    return launch([sys.executable, SCRIPT, *args], cwd, 60)


def rows(result: Result) -> dict[str, str]:
    """Return the lines of the table by step, without repeated blanks."""
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    return {line.split()[0]: line for line in lines if line[0].isdigit()}


def test_all_of_a_run_is_listed_with_its_state(run: Path, tmp_path: Path):
    result = call(tmp_path, "runs/x")
    assert (result.code, result.err) == (2, "1 of 3 checkpoints damaged; a launch that comes to one sets it aside\n")
    table = rows(result)
    assert list(table) == ["1", "2", "3", "4", "5"]
    assert re.fullmatch(r"1 16 0\.0\d MiB zero2 x 2 whole", table["1"])
    assert re.fullmatch(r"2 32 0\.0\d MiB zero2 x 2 DAMAGED", table["2"])
    assert re.fullmatch(r"3 0\.0\d MiB damaged, set aside as step-00000003\.damaged-0", table["3"])
    assert re.fullmatch(r"4 64 0\.0\d MiB zero2 x 2 3\.2500 whole", table["4"])
    assert re.fullmatch(r"5 0\.0\d MiB unfinished \(step-00000005\.tmp-0a1b2c3d\), deleted by .*", table["5"])
    assert f"step-00000002/{SHARD}: its hash is" in result.out
    assert "step-00000003.damaged-0/run_state.json: its hash is" in result.out
    assert saves.names(run) == [
        "step-00000001",
        "step-00000002",
        "step-00000003.damaged-0",
        "step-00000004",
        "step-00000005.tmp-0a1b2c3d",
    ], "looking changes nothing"


def test_what_was_not_verified_is_not_called_whole(run: Path, tmp_path: Path):
    for verify, expected in (("off", "not verified"), ("sizes", "sizes right")):
        result = call(tmp_path, "runs/x", f"verify={verify}")
        assert (result.code, result.err) == (0, "")
        assert all(rows(result)[step].endswith(expected) for step in "124")
        assert "damaged, set aside" in rows(result)["3"], "the small files are verified always"


def test_one_checkpoint_is_listed_by_its_own_path(run: Path, tmp_path: Path):
    result = call(tmp_path, f"run={checkpoint_path(run, 4)}")
    assert (result.code, list(rows(result))) == (0, ["4"])
    shutil.copytree(checkpoint_path(run, 4), tmp_path / "lr=3, best")
    assert list(rows(call(tmp_path, "lr=3, best"))) == ["4"]


def test_a_terminal_shows_what_is_being_verified(run: Path, tmp_path: Path):
    ours, theirs = pty.openpty()
    command = [sys.executable, SCRIPT, str(checkpoint_path(run, 1))]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=theirs, timeout=60)
    os.close(theirs)
    said = os.read(ours, 10_000).decode()
    os.close(ours)
    assert (done.returncode, b"whole" in done.stdout) == (0, True)
    assert f"verifying {checkpoint_path(run, 1)}/{SHARD}" in said
    assert said.endswith("\r\033[K")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "run: missing; write run=..."),
        (["runs/nowhere"], "runs/nowhere has no checkpoints"),
        (["runs/x", "verfy=off"], "verfy: unknown key; did you mean 'verify'?"),
        (["runs/x", "runs/y"], "one run at a time"),
        (["runs/x", "verify=ful"], "verify: unknown value 'ful'; did you mean 'full'?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(args: list[str], message: str, run: Path, tmp_path: Path):
    result = call(tmp_path, *args)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(message)
    assert result.err.count("\n") == 1


def test_help_and_a_listing_need_no_torch(run: Path, tmp_path: Path):
    result = call(tmp_path, "--help")
    assert result.code == 0
    assert "python launch/checkpoints.py runs/gpt_nano" in result.out
    assert "verify=full" in result.out
    command = [sys.executable, "-X", "importtime", SCRIPT, str(checkpoint_path(run, 1))]
    result = launch(command, tmp_path, 60)
    imported = set(re.findall(r"\| +([\w.]+)$", result.err, re.MULTILINE))
    assert "bigtrain.checkpoint.store" in imported
    assert not {"torch", "numpy", "transformers"} & imported
