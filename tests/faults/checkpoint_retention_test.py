"""What is kept: what the rules say, always the two newest, and everything that somebody might still look into."""

import dataclasses
import json
import math
import shutil
import tempfile
from pathlib import Path

import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bigtrain.checkpoint.manifest import MANIFEST_FILE, RUN_STATE_FILE, Manifest, encode_manifest
from bigtrain.checkpoint.store import (
    checkpoint_path,
    checkpoints_directory,
    find_checkpoints,
    find_damaged,
    prune,
    set_aside,
)
from bigtrain.files import FileRecord
from tests.faults import saves

Losses = dict[int, float | None]
rules = st.one_of(
    st.just("all"),
    st.just("best"),
    st.integers(1, 5).map(lambda n: f"latest {n}"),
    st.integers(1, 6).map(lambda n: f"every {n}"),
)
losses = st.one_of(st.none(), st.sampled_from([0.5, 1.0, 2.0, math.nan, math.inf]))
runs = st.dictionaries(st.integers(1, 30), losses, max_size=8)


def make(directory: Path, step: int, loss: float | None = None) -> Path:
    """Make a checkpoint without tensors."""
    path = checkpoint_path(directory, step)
    path.mkdir(parents=True)
    text = json.dumps(dataclasses.asdict(saves.make_run_state(step, loss=loss))).encode()
    (path / RUN_STATE_FILE).write_bytes(text)
    record = FileRecord(name=RUN_STATE_FILE, num_bytes=len(text), xxh3=xxhash.xxh3_128_hexdigest(text))
    (path / MANIFEST_FILE).write_bytes(encode_manifest(Manifest(files=[record], tensors=[])))
    return path


def expected(run: Losses, keep: list[str]) -> set[int]:
    """Return the steps that are kept, by the words of ``checkpoint.keep``."""
    steps = sorted(run)
    kept = set(steps[-2:])
    for rule in keep:
        name, _, number = rule.partition(" ")
        if name == "all":
            kept |= set(steps)
        elif name == "latest":
            kept |= set(steps[-int(number) :])
        elif name == "every":
            kept |= {step for step in steps if step % int(number) == 0}
        elif validated := [step for step in steps if run[step] is not None and run[step] == run[step]]:
            kept.add(min(validated, key=lambda step: (run[step], step)))
    return kept


def kept_steps(run: Losses, keep: list[str]) -> list[int]:
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        for step, loss in run.items():
            make(directory, step, loss)
        prune(directory, ", ".join(keep))
        return [int(path.name.removeprefix("step-")) for path in find_checkpoints(directory)]


@settings(max_examples=150, deadline=None)
@example({1: 2.0, 2: 1.0, 3: 3.0, 4: 4.0}, ["best"])
@example({step: None for step in range(1, 9)}, ["latest 1", "every 4"])
@given(runs, st.lists(rules, min_size=1, max_size=3))
def test_the_rules_and_the_two_newest_are_kept_and_nothing_else(run: Losses, keep: list[str]):
    assert kept_steps(run, keep) == sorted(expected(run, keep))


def test_the_newest_count_by_number_not_by_name(tmp_path: Path):
    for step in (99_999_998, 99_999_999, 100_000_000):
        make(tmp_path, step)
    prune(tmp_path, "latest 1")
    assert saves.names(tmp_path) == ["step-100000000", "step-99999999"]


def test_what_kills_left_is_deleted_and_what_is_not_ours_stays(tmp_path: Path):
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    aside = set_aside(checkpoint_path(tmp_path, 3))
    make(tmp_path, 3)
    root = checkpoints_directory(tmp_path)
    for name in ("step-00000005.tmp-0a1b2c3d", "step-00000001.deleting"):
        shutil.copytree(checkpoint_path(tmp_path, 4), root / name)
    for name in ("step-5", "my-copy-of-step-00000002", "step-00000002.backup"):
        (root / name).mkdir()
    (root / "notes.txt").write_text("mine")
    prune(tmp_path, "latest 2")
    assert saves.names(tmp_path) == [
        "my-copy-of-step-00000002",
        "notes.txt",
        "step-00000002.backup",
        "step-00000003",
        "step-00000003.damaged-0",
        "step-00000004",
        "step-5",
    ]
    assert find_damaged(tmp_path) == [aside]
    for _ in range(3):
        prune(tmp_path, "latest 1")
    assert aside.is_dir(), "a person decides about what is damaged"


def test_what_is_half_deleted_is_never_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for step in (1, 2, 3):
        make(tmp_path, step)

    class Killed(BaseException):
        pass

    def delete_half(path: Path, **_: object) -> None:
        (path / RUN_STATE_FILE).unlink()
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", delete_half)
        prune(tmp_path, "latest 1")
    assert saves.names(tmp_path) == ["step-00000001.deleting", "step-00000002", "step-00000003"]
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    # Even when the run has come back to that step in the meantime.
    make(tmp_path, 1)
    prune(tmp_path, "latest 1")
    assert saves.names(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_checkpoint_that_cannot_be_read_might_be_the_best(tmp_path: Path):
    for step in (1, 2, 3, 4, 5):
        make(tmp_path, step, loss=float(step))
    (checkpoint_path(tmp_path, 2) / RUN_STATE_FILE).write_text("{}")
    prune(tmp_path, "best")
    assert saves.names(tmp_path) == [f"step-{step:08d}" for step in (1, 2, 4, 5)]
