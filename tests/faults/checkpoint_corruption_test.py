"""Damage of any kind to any file of a checkpoint is found and named, and the run falls back to the one before."""

import errno
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from bigtrain.checkpoint import manifest
from bigtrain.checkpoint.loader import load_checkpoint, verify_checkpoint
from bigtrain.checkpoint.manifest import MANIFEST_FILE, RUN_STATE_FILE
from bigtrain.checkpoint.store import checkpoint_path, checkpoints_directory, find_checkpoints, read_run_state
from bigtrain.config import RunConfig, TrainConfig, Verify
from bigtrain.config.convert import to_dict
from bigtrain.errors import CheckpointError
from bigtrain.run.directory import find_resume
from bigtrain.testing.ranks import run_ranks
from tests.distributed.launches import SMALL, Result, events, fork, trajectory
from tests.distributed.ranks import small_config
from tests.faults import saves

STEPS = (1, 2, 3)
SHARDS = ("rank-00000.safetensors", "rank-00001.safetensors")
FILES = (*SHARDS, RUN_STATE_FILE, MANIFEST_FILE)
BLOCK_BYTES = 4096
RUN = "damaged"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three checkpoints, written by two ranks."""
    directory = tmp_path_factory.mktemp("runs") / RUN
    run_ranks(saves.save_all, 2, directory, STEPS, {"keep": "all", "config": to_dict(small_config())})
    return directory


def newest(directory: Path) -> Path:
    return checkpoint_path(directory, STEPS[-1])


# Kinds of damage: each changes the newest checkpoint and returns the file that is to be named.


def flip_bit_of(name: str, *, header: bool = False) -> Callable[[Path, random.Random], str]:
    def damage(directory: Path, rng: random.Random) -> str:
        path = newest(directory) / name
        data = bytearray(path.read_bytes())
        header_bytes = 8 + int.from_bytes(data[:8], "little") if name in SHARDS else 0
        position = rng.randrange(header_bytes) if header else rng.randrange(header_bytes, len(data))
        data[position] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        return name

    return damage


def zero_a_block(directory: Path, rng: random.Random) -> str:
    name = rng.choice(FILES)
    path = newest(directory) / name
    data = bytearray(path.read_bytes())
    start = rng.randrange(0, len(data), BLOCK_BYTES)
    count = len(data[start : start + BLOCK_BYTES])
    data[start : start + count] = bytes(count)
    path.write_bytes(data)
    return name


def truncate(directory: Path, rng: random.Random) -> str:
    name = rng.choice(FILES)
    path = newest(directory) / name
    os.truncate(path, rng.choice([0, 1, path.stat().st_size - 1, rng.randrange(path.stat().st_size)]))
    return name


def lose(directory: Path, rng: random.Random) -> str:
    name = rng.choice(FILES)
    (newest(directory) / name).unlink()
    return name


def append(directory: Path, rng: random.Random) -> str:
    name = rng.choice(FILES)
    with (newest(directory) / name).open("ab") as file:
        file.write(rng.choice([b"\n", b"\0", bytes(BLOCK_BYTES), b"{}"]))
    return name


def swap(directory: Path, rng: random.Random) -> str:
    """Swap a file with that of the checkpoint before: both are damaged."""
    name = rng.choice([*FILES, ""])
    paths = [checkpoint_path(directory, step) / name for step in STEPS[-2:]]
    spare = directory / "spare"
    os.rename(paths[0], spare)
    os.rename(paths[1], paths[0])
    os.rename(spare, paths[1])
    # A manifest of another step is whole in itself; what it lists is not there. Nothing listed is wrong with
    # a checkpoint that has the name of another one.
    return {MANIFEST_FILE: RUN_STATE_FILE, "": newest(directory).name}.get(name, name)


def swap_ranks(directory: Path, rng: random.Random) -> str:
    """Swap the files of two ranks, which are not of the same size, or else look for the hash."""
    paths = [newest(directory) / name for name in SHARDS]
    data = [path.read_bytes() for path in paths]
    for path, other in zip(paths, reversed(data), strict=True):
        path.write_bytes(other)
    return rng.choice(SHARDS)


CASES = {
    **{f"bit of {name}": (flip_bit_of(name), 30) for name in FILES},
    **{f"bit of the header of {name}": (flip_bit_of(name, header=True), 20) for name in SHARDS},
    "zeroed block": (zero_a_block, 25),
    "truncated": (truncate, 25),
    "missing": (lose, 8),
    "extra bytes": (append, 12),
    "swapped steps": (swap, 15),
    "swapped ranks": (swap_ranks, 2),
}


def resume_config(directory: Path) -> TrainConfig:
    config = small_config()
    config.run = RunConfig(name=directory.name, root=str(directory.parent))
    return config


def fall_back(run: Path, scratch: Path, kind: str, number: int) -> str:
    """Damage a copy of the run and resume; return what is wrong with what happened."""
    directory = saves.copy_run(run, scratch / RUN)
    damage, _ = CASES[kind]
    file = damage(directory, random.Random(f"{kind} {number}"))
    problems = verify_checkpoint(newest(directory), Verify.full)
    chosen = find_resume(resume_config(directory))
    step = STEPS[0] if kind == "swapped steps" else STEPS[-2]
    aside = [f"step-{damaged:08d}.damaged-0" for damaged in STEPS if damaged > step]
    whole = [f"step-{kept:08d}" for kept in STEPS if kept <= step]
    right = (
        any(file in problem for problem in problems)
        and chosen == checkpoint_path(directory, step)
        and saves.whole_step(chosen) == step
        and saves.names(directory) == sorted([*aside, *whole])
    )
    shutil.rmtree(directory)
    return "" if right else f"{kind} {number}: {file}: {problems}, chosen {chosen}"


def fall_back_always(run: Path, scratch: Path) -> list[str]:
    saves.join()
    cases = [(kind, number) for kind, (_, count) in CASES.items() for number in range(count)]
    return [wrong for case in cases if (wrong := fall_back(run, scratch, *case))]


def test_all_damage_is_found_and_named_and_the_run_falls_back(run: Path, tmp_path: Path):
    assert sum(count for _, count in CASES.values()) >= 200
    assert run_ranks(fall_back_always, 1, run, tmp_path)[0] == []


def test_without_damage_nothing_is_found(run: Path):
    for path in find_checkpoints(run):
        assert [verify_checkpoint(path, verify) for verify in Verify] == [[], [], []]
        assert saves.whole_step(path) in STEPS


# What each level of verification notices


def test_sizes_notice_truncated_and_missing_files_but_no_bit(run: Path, tmp_path: Path):
    for number, (damage, expected) in enumerate([(truncate, 1), (lose, 1), (append, 1), (flip_bit_of(SHARDS[1]), 0)]):
        directory = saves.copy_run(run, tmp_path / str(number))
        file = damage(directory, random.Random(1))
        problems = verify_checkpoint(newest(directory), Verify.sizes)
        assert len(problems) == expected
        assert all(file in problem for problem in problems)


def test_off_loads_wrong_numbers_but_never_a_wrong_step(run: Path, tmp_path: Path):
    directory = saves.copy_run(run, tmp_path / RUN)
    flip_bit_of(SHARDS[0])(directory, random.Random(0))
    path = newest(directory)
    assert verify_checkpoint(path, Verify.off) == []
    load_checkpoint(path, saves.make_state(None, whole=True))
    for name in (RUN_STATE_FILE, MANIFEST_FILE):
        flip_bit_of(name)(directory, random.Random(0))
        (problem,) = verify_checkpoint(path, Verify.off)
        assert name in problem


@pytest.mark.parametrize("num_bytes", [None, 0, 1000])
def test_a_file_that_is_not_there_or_too_short_is_named_even_without_verification(
    num_bytes: int | None, run: Path, tmp_path: Path
):
    path = newest(saves.copy_run(run, tmp_path / RUN))
    os.truncate(path / SHARDS[1], num_bytes) if num_bytes is not None else (path / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=f"{SHARDS[1]}: damaged"):
        load_checkpoint(path, saves.make_state(None, whole=True))


def test_the_run_state_that_is_used_is_the_one_that_was_verified(run: Path, tmp_path: Path):
    path = newest(saves.copy_run(run, tmp_path / RUN))
    assert verify_checkpoint(path, Verify.full) == []
    state_file = path / RUN_STATE_FILE
    state_file.write_text(state_file.read_text().replace('"samples": 3', '"samples": 4'))
    with pytest.raises(CheckpointError, match=f"{RUN_STATE_FILE}: its hash is"):
        read_run_state(path)


def problems_on_all_ranks(path: Path) -> list[str]:
    saves.join()
    return verify_checkpoint(path, Verify.full)


def test_all_ranks_know_of_the_damage_that_one_of_them_has_found(run: Path, tmp_path: Path):
    for name in FILES:
        directory = saves.copy_run(run, tmp_path / name)
        flip_bit_of(name)(directory, random.Random(0))
        first, second = run_ranks(problems_on_all_ranks, 2, newest(directory))
        assert first == second
        assert len(first) == 1
        assert name in first[0]


# Nothing whole is left


def resume_twice(run: Path) -> list[str]:
    saves.join()
    found = []
    for resume in ("auto", "auto", "must", "never"):
        config = resume_config(run)
        config.checkpoint.resume = resume
        try:
            found.append(str(find_resume(config)))
        except CheckpointError as error:
            found.append(f"refused: {error}")
    return found


def test_with_no_whole_checkpoint_left_a_run_never_starts_from_scratch(run: Path, tmp_path: Path):
    directory = saves.copy_run(run, tmp_path / RUN)
    for path in find_checkpoints(directory):
        (path / SHARDS[0]).unlink()
    for answer in run_ranks(resume_twice, 1, directory)[0]:
        assert answer.startswith("refused: no whole checkpoint is left")
        for step in STEPS:
            assert f"step-{step:08d}.damaged-0" in answer
    # The negative control, and the way out that the message names.
    shutil.rmtree(checkpoints_directory(directory))
    first, *_ = run_ranks(resume_twice, 1, directory)[0]
    assert first == "None"


def test_a_checkpoint_that_is_damaged_again_is_set_aside_beside_the_first(run: Path, tmp_path: Path):
    directory = saves.copy_run(run, tmp_path / RUN)
    shutil.copytree(newest(directory), newest(directory).with_name("step-00000003.damaged-0"))
    flip_bit_of(MANIFEST_FILE)(directory, random.Random(0))
    assert run_ranks(resume_twice, 1, directory)[0][0].endswith("step-00000002")
    assert [name for name in saves.names(directory) if "damaged" in name] == [
        "step-00000003.damaged-0",
        "step-00000003.damaged-1",
    ]


def resume_from_a_stale_mount(run: Path) -> list[str]:
    """Return what is said when one rank's file system answers with ``errno.ESTALE``, and whether a retry works."""
    saves.join()
    hash_file = manifest.hash_file

    def stale(path: Path) -> str:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    said = []
    for read in (stale if dist.get_rank() == 1 else hash_file, hash_file):
        manifest.hash_file = read
        try:
            said.append(str(find_resume(resume_config(run))))
        except CheckpointError as error:
            said.append(f"refused: {error}")
    return said


def test_what_cannot_be_read_is_not_taken_for_damaged(run: Path, tmp_path: Path):
    directory = saves.copy_run(run, tmp_path / RUN)
    for refused, resumed in run_ranks(resume_from_a_stale_mount, 2, directory):
        assert refused.startswith("refused: ") and "nothing is known to be damaged" in refused
        assert resumed == str(newest(directory))
    assert find_checkpoints(directory) == [checkpoint_path(directory, step) for step in STEPS]


# As a user sees it


def train(cwd: Path, *args: str) -> Result:
    return fork("train.py", *SMALL, "checkpoint.every_steps=2", *args, cwd=cwd)


def test_a_run_continues_bitwise_from_the_checkpoint_before_the_damaged_one(tmp_path: Path):
    assert train(tmp_path, "run.name=whole").code == 0
    assert train(tmp_path, "run.stop_after_steps=5").code == 75
    directory = tmp_path / "runs/gpt_nano"
    shard = checkpoint_path(directory, 5) / SHARDS[0]
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 4
    shard.write_bytes(data)
    result = train(tmp_path)
    assert result.code == 0
    said = result.err + result.out
    assert "damaged checkpoint, set aside as" in said
    assert f"step-00000005/{SHARDS[0]}: its hash is" in said
    assert [event["step"] for event in events(directory, "resume")] == [4]
    assert trajectory(directory) == trajectory(tmp_path / "runs/whole")
    for path in find_checkpoints(directory):
        (path / RUN_STATE_FILE).write_text("{}")
    for _ in range(2):
        result = train(tmp_path)
        assert result.code == 2
        assert "no whole checkpoint is left" in result.err
        assert "Traceback" not in result.err


def test_every_kind_of_file_was_damaged(run: Path):
    """The negative control of the cases: the damage is where it should be, and a copy without it is whole."""
    assert sorted(path.name for path in newest(run).iterdir()) == sorted(FILES)
    assert Counter(kind.split()[0] for kind in CASES)["bit"] == len(FILES) + len(SHARDS)
    assert all((newest(run) / name).stat().st_size > BLOCK_BYTES for name in SHARDS)
