"""The directory of a run: deterministic, so that the same command finds it again.

``config.yaml`` is the resolved configuration of the newest launch, without secrets.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import yaml

from bigtrain import log
from bigtrain.checkpoint.loader import verify_checkpoint
from bigtrain.checkpoint.store import RUN_STATE_FILE, find_checkpoints, find_damaged, read_run_state, set_aside
from bigtrain.config import TrainConfig, Verify
from bigtrain.data.index import INDEX_FILE, PUBLISHED_DIRECTORY
from bigtrain.data.tokenizer import TOKENIZER_FILE
from bigtrain.distributed import on_rank0
from bigtrain.errors import CheckpointError, ConfigError
from bigtrain.files import such_as_runs
from bigtrain.redact import redact
from bigtrain.resilience.attempt import now
from bigtrain.schema import from_dict, to_dict
from bigtrain.telemetry.files import EVENTS_FILE, JsonLines

CONFIG_FILE = "config.yaml"


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turn what the system refuses into a ConfigError that says what to do."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written: {error}; mend that or choose another run.root") from error


def write_config(directory: Path, config: TrainConfig) -> None:
    """Save the configuration of this launch, whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f"{CONFIG_FILE}.tmp"
    partial.write_text(yaml.safe_dump(redact(to_dict(config)), sort_keys=False))
    os.replace(partial, directory / CONFIG_FILE)


def keep_tokenizer(directory: Path, corpus_directory: Path) -> None:
    """Copy the tokenizer, whole, and the index that says how to use it: a run generates and exports without its data."""
    published = (corpus_directory / PUBLISHED_DIRECTORY).rglob("*")
    for path in (corpus_directory / INDEX_FILE, corpus_directory / TOKENIZER_FILE, *filter(Path.is_file, published)):
        copy = directory / path.relative_to(corpus_directory)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def locate(path: Path) -> tuple[Path, Path]:
    """Return the run directory and the checkpoint that ``path`` means: a run (its newest) or one checkpoint.

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    if (path / RUN_STATE_FILE).is_file():
        return path.parent.parent, path
    found = find_checkpoints(path)
    if not found:
        raise CheckpointError(
            f"{path} has no complete checkpoint; name the directory of a run that has one{such_as_runs(path)}"
        )
    return path, found[-1]


def find_whole(path: Path) -> tuple[Path, Path]:
    """Return the run, and its newest checkpoint that verifies or the one that ``path`` is; nothing is set aside.

    If there is a process group, all ranks call this.

    Raises:
        CheckpointError: none verifies.
    """
    run, newest = locate(path)
    candidates = [newest] if newest == path else on_rank0(lambda: [str(found) for found in find_checkpoints(run)])
    problems: list[str] = []
    for checkpoint in map(Path, reversed(candidates)):
        if not (found := verify_checkpoint(checkpoint, Verify.full)):
            if problems:
                log.get_logger().warning("\n  ".join([f"damaged, so {checkpoint} is taken:", *problems]))
            return run, checkpoint
        problems += found
    raise CheckpointError("\n  ".join([f"{path}: no whole checkpoint:", *problems]))


def read_config(directory: Path) -> TrainConfig:
    """Return the configuration of a run.

    Raises:
        CheckpointError: ``directory`` is not a run.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{directory} is not a run: it has no {CONFIG_FILE}; name the directory of a run{such_as_runs(directory)}"
        )
    return from_dict(TrainConfig, yaml.safe_load(path.read_text()))


def find_resume(config: TrainConfig) -> Path | None:
    """Return the checkpoint that this launch continues from, as ``checkpoint.resume`` says; all ranks call this.

    Every checkpoint is verified before it is chosen. A damaged one of this run is named and set aside, and
    the one before it is tried.

    Raises:
        CheckpointError: there is one where there must be none, none where there must be one, none that is
            whole, or one of another model.
    """
    directory, resume, verify = config.run.directory, config.checkpoint.resume, config.checkpoint.verify
    while found := on_rank0(lambda: [str(path) for path in find_checkpoints(directory)]):
        if resume == "never":
            raise CheckpointError(
                f"checkpoint.resume=never, but {found[-1]} exists; choose another run.name or delete {directory}"
            )
        path = Path(found[-1])
        if not (problems := verify_checkpoint(path, verify)):
            return _same_model(config, path)
        aside = on_rank0(lambda path=path, problems=problems: _set_aside(directory, path, problems))
        log.get_logger().warning("\n  ".join([f"damaged checkpoint, set aside as {aside}:", *problems]))
    if damaged := on_rank0(lambda: [str(path) for path in find_damaged(directory)]):
        raise CheckpointError(
            f"no whole checkpoint is left in {directory}, only damaged ones: {', '.join(damaged)}; to start anew, "
            "or from elsewhere with checkpoint.resume=<path>, choose another run.name or delete them"
        )
    if resume == "must":
        raise CheckpointError(f"checkpoint.resume=must, but {directory} has no complete checkpoint")
    if resume in ("auto", "never"):
        return None
    # Another run's checkpoint starts this one; later launches continue from this run's own.
    path = Path(on_rank0(lambda: str(locate(Path(resume))[1])))
    if problems := verify_checkpoint(path, verify):
        raise CheckpointError("\n  ".join([f"checkpoint.resume={resume}: damaged:", *problems]))
    return _same_model(config, path)


def _set_aside(directory: Path, path: Path, problems: list[str]) -> str:
    """Rename a damaged checkpoint, note it among the events, and return its new name."""
    with writing(directory):
        aside = str(set_aside(path))
        events = JsonLines(directory / EVENTS_FILE)
        events.write({"event": "damaged_checkpoint", "path": aside, "problems": problems, "time": now()})
        events.close()
    return aside


def _same_model(config: TrainConfig, path: Path) -> Path:
    saved, wanted = read_run_state(path).config.get("model", {}), to_dict(config.model)
    ignored = {"name", "pretrained", "init_from", "dropout", "init_std"}
    differences = [
        f"model.{key}: {saved.get(key)} in the checkpoint, {wanted[key]} now"
        for key in wanted
        if key not in ignored and saved.get(key) != wanted[key]
    ]
    if differences:
        raise CheckpointError(
            f"{path} holds another model; choose another run.name or the model of the checkpoint:\n  "
            + "\n  ".join(differences)
        )
    return path
