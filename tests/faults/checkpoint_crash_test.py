"""Killed at any file operation of a save, a run has the old checkpoint or the new one, whole."""

import itertools
from pathlib import Path

import pytest

from bigtrain.testing.ranks import RankFailedError, run_ranks
from tests.faults import crashes, saves
from tests.faults.crashes import NEW, NEXT, OLD


def test_killed_at_any_file_operation_the_old_or_the_new_checkpoint_is_whole(tmp_path: Path):
    newest = run_ranks(crashes.enumerate_crashes, 1, tmp_path, crashes.save_and_die)[0]
    # mkdir, three files and two directories are opened, written, synchronised, closed; rename; one is deleted.
    assert len(newest) > 60
    assert newest == sorted(newest), "old until one moment, new from then on"
    assert set(newest) == {OLD[-1], NEW}
    assert min(newest.count(OLD[-1]), newest.count(NEW)) > 10


def test_a_protocol_that_writes_in_place_would_be_caught(tmp_path: Path):
    with pytest.raises(RankFailedError, match=r"step-00000003 is damaged"):
        run_ranks(crashes.enumerate_crashes, 1, tmp_path, crashes.save_in_place)


@pytest.mark.parametrize(("rank", "stride"), [(0, 4), (1, 1)])
def test_the_same_when_one_of_two_ranks_is_killed(rank: int, stride: int, tmp_path: Path):
    run_ranks(saves.save_all, 2, tmp_path / "old", OLD)
    newest = []
    for number in itertools.count(1, stride):
        directory = saves.copy_run(tmp_path / "old", tmp_path / str(number))
        try:
            run_ranks(crashes.save_and_die, 2, directory, number, rank)
        except RankFailedError:
            newest.append(crashes.newest_whole(directory))
        else:
            break
    assert len(newest) > 10
    assert newest == sorted(newest)
    assert set(newest) == ({OLD[-1], NEW} if rank == 0 else {OLD[-1]}), "without a rank's vote nothing is committed"
    run_ranks(saves.save_all, 2, directory, (NEXT,))
    assert crashes.newest_whole(directory) == NEXT
    assert saves.names(directory) == [f"step-{step:08d}" for step in (NEW, NEXT)]


def save_again(directory: Path) -> str | None:
    saves.join()
    (report,) = saves.save(directory, OLD[-1])
    return report.error


def test_a_checkpoint_is_never_overwritten(tmp_path: Path):
    run_ranks(saves.save_all, 1, tmp_path, OLD)
    before = {path: path.stat() for path in tmp_path.rglob("*.*")}
    assert "a checkpoint is never overwritten" in run_ranks(save_again, 1, tmp_path)[0]
    assert {path: path.stat() for path in tmp_path.rglob("*.*")} == before
    assert crashes.newest_whole(tmp_path) == OLD[-1]


# What a kill does not show: a machine that loses power keeps only what was synchronised.


def unsafe(log: list[tuple[str, str]]) -> list[str]:
    """Return in what order operations were done that a loss of power does not forgive."""
    renamed = next(i for i, (name, path) in enumerate(log) if name == "rename" and ".tmp-" in path)
    partial = log[renamed][1]
    last = {entry: i for i, entry in enumerate(log)}
    written = {path for name, path in log[:renamed] if name == "write" and path.startswith(partial)}
    problems = [p for p in written if not last["write", p] < last.get(("fsync", p), -1) < renamed]
    created = max(i for i, (name, path) in enumerate(log) if name == "open" and path in written)
    if not created < last.get(("fsync", partial), -1) < renamed:
        problems.append("the names in the directory before the rename")
    durable = last.get(("fsync", ""), -1)
    first_deletion = next(i for i, (name, path) in enumerate(log) if i > renamed and name in ("rename", "unlink"))
    if not renamed < durable < first_deletion:
        problems.append("the rename before anything is deleted")
    return problems


def test_everything_is_durable_before_it_counts(tmp_path: Path):
    run_ranks(saves.save_all, 1, tmp_path, OLD)
    log = run_ranks(crashes.record_operations, 1, tmp_path)[0]
    assert unsafe(log) == []
    synchronisations = [i for i, (name, _) in enumerate(log) if name == "fsync"]
    assert len(synchronisations) == 5
    for i in synchronisations:
        assert len(unsafe([*log[:i], *log[i + 1 :]])) == 1, f"{log[i]} would not be missed"
