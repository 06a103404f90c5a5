"""The checkpoints of a run: found by name, set aside when damaged, deleted when no longer kept."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bigtrain.checkpoint.manifest import (
    MANIFEST_FILE,
    RUN_STATE_FILE,
    Manifest,
    TensorRecord,
    encode_manifest,
    read_manifest,
    read_verified,
    verify_file,
)
from bigtrain.config import Verify
from bigtrain.config.convert import from_dict
from bigtrain.data.order.cursor import NO_SAMPLES, Cursor, DataState
from bigtrain.errors import CheckpointError, ConfigError, UnreadableError
from bigtrain.files import FileRecord, such_as_runs, sync, write_durably

MIN_KEPT = 2  # newest ones kept whatever ``keep`` says: the newest may turn out to be damaged


@dataclass(frozen=True, slots=True)
class Origin:
    """What a run began with, to which it rolls back when it has no checkpoint."""

    checkpoint: str | None = None  # another run's checkpoint; None for initial values
    weights_only: bool = False  # whether only its weights were loaded
    published: str | None = None  # published weights that it started from; None for random ones


@dataclass(frozen=True, slots=True)
class Frozen:
    """Weights that a checkpoint leaves out, because the run never changes what it began with."""

    names: list[str]
    hash: str  # of all of them, whole


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a run stands by ``validation.metric``."""

    metric: str
    less_is_better: bool
    value: float | None = None  # of the newest validation
    step: int = 0  # of that validation
    best: float | None = None  # NaN is never the best
    best_step: int = 0
    num_since: int = 0  # validations since the best one

    def after(self, step: int, value: float) -> "Standing":
        is_best = not math.isnan(value) and (self.best is None or self.order(value) < self.order(self.best))
        best = {"best": value, "best_step": step, "num_since": 0} if is_best else {"num_since": self.num_since + 1}
        return dataclasses.replace(self, value=value, step=step, **best)

    def order(self, value: float) -> float:
        """Return a number that is less for a better value."""
        return value if self.less_is_better else -value


@dataclass(frozen=True, slots=True)
class RunState:
    """Everything besides tensors that a run continues from."""

    step: int  # completed optimizer steps. Learning rate and random numbers follow from it and from the configuration
    tokens: int
    samples: int  # sequences trained on: the cursor of the data order
    data_fingerprint: str  # of the data that samples are indices into
    config: dict  # resolved
    versions: dict  # software that wrote the checkpoint
    world_size: int  # of the launch that wrote the checkpoint
    validation_loss: float | None = None  # loss of the validation at this step, if there was one
    data: DataState | None = None  # where it stands, with the proof; None in checkpoints from before there was one
    rollbacks: int = 0  # how often the run has gone back because of bad numbers
    origin: Origin | None = None  # None in checkpoints from before it was recorded
    frozen: Frozen | None = None
    standing: Standing | None = None  # None in checkpoints from before there was one

    @property
    def measured(self) -> Standing | None:
        """Standing with the validation at this step, None if there was none."""
        if self.standing is None and self.validation_loss is not None:
            return Standing("loss", less_is_better=True).after(self.step, self.validation_loss)
        return self.standing if self.standing and self.standing.step == self.step > 0 else None

    @property
    def cursor(self) -> Cursor:
        return Cursor(self.step, self.samples, self.data.digest if self.data else NO_SAMPLES)


def checkpoints_directory(run_directory: Path) -> Path:
    return run_directory / "checkpoints"


def checkpoint_path(run_directory: Path, step: int) -> Path:
    """Return the directory of the complete checkpoint of a step."""
    return checkpoints_directory(run_directory) / f"step-{step:08d}"


def find_checkpoints(run_directory: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted(filter(is_complete, _in_checkpoints(run_directory)), key=step_of)


def is_complete(path: Path) -> bool:
    """Return whether a directory has the name of a complete checkpoint."""
    return re.fullmatch(r"step-\d{8,}", path.name) is not None


def find_damaged(run_directory: Path) -> list[Path]:
    """Return the checkpoints of a run that were set aside."""
    return sorted(path for path in _in_checkpoints(run_directory) if ".damaged-" in path.name)


def find_leftovers(run_directory: Path) -> list[Path]:
    """Return what killed saves and deletions left behind."""
    found = _in_checkpoints(run_directory)
    return sorted(path for path in found if ".tmp-" in path.name or path.name.endswith(".deleting"))


def _in_checkpoints(run_directory: Path) -> list[Path]:
    """Return the entries of the checkpoints directory; an unreadable one is not taken for empty."""
    directory = checkpoints_directory(run_directory)
    try:
        return [directory / name for name in os.listdir(directory) if name.startswith("step-")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UnreadableError(f"{directory}: cannot be read: {error.strerror}") from error


def step_of(path: Path) -> int:
    """Return the step of a checkpoint's directory, also of one that was set aside."""
    return int(path.name.removeprefix("step-").partition(".")[0])


def newest_step(run_directory: Path) -> int:
    """Return the step of the newest complete checkpoint of a run; 0 if there is none."""
    return max(map(step_of, find_checkpoints(run_directory)), default=0)


def read_run_state(path: Path, manifest: Manifest | None = None) -> RunState:
    """Return the run state of a checkpoint, verified; CheckpointError if there is none, or it is damaged."""
    files = (manifest or read_manifest(path)).files
    text = read_verified(path, next(file for file in files if file.name == RUN_STATE_FILE))
    try:
        state = from_dict(RunState, json.loads(text))
    except (ValueError, RecursionError, ConfigError) as error:
        raise CheckpointError(f"{path / RUN_STATE_FILE}: damaged: {error}") from error
    if is_complete(path) and state.step != step_of(path):
        raise CheckpointError(f"{path} holds step {state.step}, expected step {step_of(path)}: it was renamed")
    return state


def find_problems(
    path: Path, verify: Verify, *, share: slice = slice(None), progress: Callable[[str], None] = lambda file: None
) -> list[str]:
    """Return how a checkpoint differs from its manifest in a ``share`` of its files (UnreadableError: unknown)."""
    try:
        manifest = read_manifest(path)
    except UnreadableError:
        raise
    except CheckpointError as error:
        return [str(error)]
    problems: list[str | None] = []
    try:
        read_run_state(path, manifest)
    except UnreadableError:
        raise
    except CheckpointError as error:
        problems.append(str(error))
    for file in manifest.files[share] if verify is not Verify.off else []:
        progress(f"{path / file.name}")
        problems.append(verify_file(path, file, content=verify is Verify.full))
    return list(dict.fromkeys(problem for problem in problems if problem))


def commit(
    partial: Path, final: Path, run_state: RunState, files: list[FileRecord], tensors: list[TensorRecord]
) -> None:
    """Make a directory that all ranks have written a complete checkpoint, by one rename (OSError, CheckpointError)."""
    if problems := [problem for file in files if (problem := verify_file(partial, file, content=False))]:
        raise CheckpointError(f"{problems[0]}; all nodes must share the file system of run.root")
    text = json.dumps(dataclasses.asdict(run_state), indent=1).encode()
    state_file = write_durably(partial / RUN_STATE_FILE, [memoryview(text)])
    merged: dict[str, TensorRecord] = {}
    for tensor in tensors:
        if (known := merged.setdefault(tensor.key, tensor)) is not tensor:
            known.chunks.extend(tensor.chunks)
    manifest = Manifest(files=[*files, state_file], tensors=list(merged.values()))
    write_durably(partial / MANIFEST_FILE, [memoryview(encode_manifest(manifest))])
    sync(partial)
    if final.exists():
        raise FileExistsError(f"{final} exists; a checkpoint is never overwritten")
    os.rename(partial, final)
    sync(final.parent)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint and return its new name; CheckpointError if it cannot be renamed."""
    names = (path.with_name(f"{path.name}.damaged-{number}") for number in itertools.count())
    aside = next(name for name in names if not name.exists())
    try:
        os.rename(path, aside)
    except OSError as error:
        raise CheckpointError(f"{path}: damaged, and cannot be set aside: {error.strerror}") from error
    return aside


def prune(run_directory: Path, keep: str) -> None:
    """Delete checkpoints that no rule of ``checkpoint.keep`` keeps, and leftovers; no save may be under way."""
    remove_leftovers(run_directory)
    found = find_checkpoints(run_directory)
    kept = {path for rule in keep.split(",") for path in _kept_by(rule.split(), found)} | set(found[-MIN_KEPT:])
    _delete(run_directory, [path for path in found if path not in kept])


def discard_after(run_directory: Path, step: int) -> None:
    """Delete the checkpoints of later steps; no save may be under way. CheckpointError if one cannot be deleted."""
    try:
        _delete(run_directory, [path for path in find_checkpoints(run_directory) if step_of(path) > step])
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be deleted: {error.strerror}") from error


def _delete(run_directory: Path, checkpoints: list[Path]) -> None:
    for path in checkpoints:
        # Deleting takes a while; what is half deleted must not look complete.
        os.rename(path, path.with_name(f"{path.name}.deleting"))
    remove_leftovers(run_directory)


def remove_leftovers(run_directory: Path) -> None:
    """Delete what killed saves and deletions left; no save may be under way."""
    for path in find_leftovers(run_directory):
        shutil.rmtree(path, ignore_errors=True)


def _kept_by(rule: list[str], found: list[Path]) -> list[Path]:
    match rule:
        case ["all"]:
            return found
        case ["latest", number]:
            return found[-int(number) :]
        case ["every", number]:
            return [path for path in found if step_of(path) % int(number) == 0]
        case ["best"]:
            return _best(found)
    raise AssertionError(rule)


def _best(found: list[Path]) -> list[Path]:
    """Return the best checkpoint by the newest one's metric, and unreadable ones, which might be it."""
    measured: dict[Path, Standing] = {}
    unreadable = []
    for path in found:
        try:
            standing = read_run_state(path).measured
        except CheckpointError:
            unreadable.append(path)
        else:
            if standing is not None and not math.isnan(standing.value):
                measured[path] = standing
    metric = next((standing.metric for standing in reversed(measured.values())), None)
    values = {path: s.order(s.value) for path, s in measured.items() if s.metric == metric}
    return [*unreadable, *([min(values, key=values.__getitem__)] if values else [])]


@dataclass(frozen=True, slots=True)
class Listed:
    """One directory among the checkpoints of a run."""

    path: Path
    step: int
    num_bytes: int  # size of its files
    run_state: RunState | None  # None if it cannot be read
    status: str  # ``complete``, ``set aside`` or ``unfinished``
    problems: list[str]  # what is damaged; never looked for in what is unfinished


def list_checkpoints(
    path: Path, verify: Verify, *, progress: Callable[[str], None] = lambda file: None
) -> list[Listed]:
    """Return what lies among the checkpoints of a run, or about one checkpoint; CheckpointError if there is nothing."""
    if (path / MANIFEST_FILE).is_file():
        return [_look_at(path, "complete", verify, progress)]
    found = {other: "complete" for other in checkpoints_directory(path).glob("step-*") if is_complete(other)}
    found |= dict.fromkeys(find_damaged(path), "set aside") | dict.fromkeys(find_leftovers(path), "unfinished")
    if not found:
        raise CheckpointError(f"{path} has no checkpoints; name the directory of a run{such_as_runs(path)}")
    listed = [_look_at(other, status, verify, progress) for other, status in found.items()]
    return sorted(listed, key=lambda one: (one.step, one.path.name))


def _look_at(path: Path, status: str, verify: Verify, progress: Callable[[str], None]) -> Listed:
    try:
        problems = [] if status == "unfinished" else find_problems(path, verify, progress=progress)
    except UnreadableError as error:
        problems = [str(error)]
    run_state = None
    with contextlib.suppress(CheckpointError):
        run_state = read_run_state(path)
    num_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    number = re.match(r"step-(\d+)", path.name)
    step = int(number[1]) if number else run_state.step if run_state else 0
    return Listed(path, step, num_bytes, run_state, status, problems)
