"""How a launch takes a run, what it starts from, and how a run rolls back."""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigtrain import log
from bigtrain.checkpoint.loader import verify_checkpoint
from bigtrain.checkpoint.store import (
    Origin,
    RunState,
    Standing,
    checkpoints_directory,
    discard_after,
    read_run_state,
)
from bigtrain.config import Load, TrainConfig
from bigtrain.config.check import RESUME_WORDS
from bigtrain.config.convert import to_dict
from bigtrain.data.order.cursor import Cursor
from bigtrain.data.read.stream import SampleStream
from bigtrain.distributed.collectives import broadcast_json, gather_json, on_rank0
from bigtrain.engine.base import Engine
from bigtrain.engine.build import require_causal
from bigtrain.engine.state import MODEL, clear_optimizer, initialise
from bigtrain.errors import CheckpointError, ConfigError, NoRestartError, of_all_ranks, some
from bigtrain.models.freeze import frozen_names
from bigtrain.models.hf.files import stored_tensors
from bigtrain.processes import RankInfo
from bigtrain.run.directory import (
    find_resume,
    is_run,
    last_saved_step,
    newest_whole,
    reached_step,
    write_run_files,
    writing,
)
from bigtrain.run.frozen import load_state, load_weights, parameters_of, starting_values
from bigtrain.run.standing import explain_end, why_ended
from bigtrain.supervise.bad_numbers import RollBack
from bigtrain.supervise.launch import Launch


@dataclass(frozen=True, slots=True)
class Start:
    """What a launch, or the training after a rollback, starts from."""

    origin: Origin = field(default_factory=Origin)  # of the run itself
    checkpoint: Path | None = None  # None for initial values
    weights_only: bool = False  # take only the weights of the checkpoint, and begin at step 0

    def read_state(self) -> RunState | None:
        """Return the run state that is continued; None at step 0."""
        return read_run_state(self.checkpoint) if self.checkpoint and not self.weights_only else None


def require_same_imports(imports: dict[str, str]) -> None:
    """Refuse ranks that have imported different contents; all ranks call this.

    Raises:
        ConfigError: they differ; on all ranks.
    """
    found = gather_json(imports)
    differing = broadcast_json([number for number, other in enumerate(found) if other != found[0]])
    if differing:
        raise of_all_ranks(
            ConfigError(
                f"--import: rank {differing[0]} has imported other files than rank 0; copy the same to every node"
            )
        )


def require_place(config: TrainConfig, start: Start) -> None:
    """Raise a ConfigError, before anything slow, if the run cannot be written or its published weights are not whole."""
    directory = config.run.directory
    there = next(place for place in (directory.absolute(), *directory.absolute().parents) if os.path.lexists(place))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "read-only for you" if there.is_dir() else "not a directory"
        raise ConfigError(f"{directory} cannot be written: {there} is {what}; mend that or choose another run.root")
    if start.checkpoint is None and start.origin.published and not is_run(start.origin.published):
        setting = "model.init_from" if config.model.init_from else "model.name"
        stored_tensors(start.origin.published, setting=setting)


def claim(launch: Launch) -> None:
    """Take the run for this launch, unless it has it; all ranks call this.

    Raises:
        ConfigError: another launch has it, or its directory cannot be written.
        NoRestartError: it has failed too often without progress.
    """

    def take() -> int:
        with writing(launch.directory):
            return launch.claim(reached_step(launch.directory))

    if launch.attempt == 0:
        launch.begin(on_rank0(take))


def follow(config: TrainConfig, find: Callable[[], Path], stream: SampleStream) -> Path:
    """Return where the run's directory is now, by :meth:`Launch.follow`; all ranks call this.

    A directory that was removed becomes that of a run again.
    """

    def found() -> str:
        with writing(config.run.directory):
            place = find()
        if place != config.run.directory:
            settings = dataclasses.replace(config.run, root=str(place.parent), name=place.name)
            write_run_files(dataclasses.replace(config, run=settings), stream.tokenizer_directory, stream.facts)
        return str(place)

    return Path(on_rank0(found))


def nothing_to_do(config: TrainConfig, state: RunState, standing: Standing) -> str | None:
    """Say why a run is not trained on, None if it is."""
    directory, step, wanted_steps = config.run.directory, state.step, config.train.steps
    if step < wanted_steps:
        ended = why_ended(standing, config.validation)
        return ended and f"{directory} is finished at step {step}: {explain_end(standing, ended)}"
    if step > wanted_steps:
        return f"{directory} is at step {step} already, beyond train.steps={wanted_steps}: nothing is trained"
    return f"{directory} is finished at step {step}; a larger train.steps trains on, another run.name starts anew"


def has_moved(config: TrainConfig, place: Path) -> str:
    """Say how to go on with a run whose directory is now ``place``."""
    how = f"run.root={place.parent} run.name={place.name} continue from there"
    return f"{config.run.directory} was renamed or removed; {how}"


def find_start(config: TrainConfig) -> Start:
    """Return what this launch starts from, by ``checkpoint.resume`` and ``checkpoint.load``; all ranks call this."""
    path = find_resume(config)
    if path is None:
        return Start(Origin(published=_published(to_dict(config.model))))
    if path.parent == checkpoints_directory(config.run.directory):
        state = read_run_state(path)
        return Start(state.origin or _former_origin(state.config), path)
    weights_only = config.checkpoint.load is Load.weights
    return Start(Origin(checkpoint=str(path.absolute()), weights_only=weights_only), path, weights_only)


def _former_origin(config: dict[str, Any]) -> Origin:
    """Return the origin of a run from the configuration in an old checkpoint."""
    resume = config.get("checkpoint", {}).get("resume", "auto")
    published = _published(config.get("model", {}))
    return Origin(published=published) if resume in RESUME_WORDS else Origin(checkpoint=resume)


def _published(model: dict[str, Any]) -> str | None:
    return model.get("init_from") or (model.get("name") if model.get("pretrained") else None)


def fill_state(config: TrainConfig, engine: Engine, start: Start, info: RankInfo) -> Cursor:
    """Fill the engine's state and return how far the run is with it.

    Raises:
        ConfigError: with these weights the model looks ahead.
    """
    cursor = _fill(config, engine, start, info)
    require_causal(engine, config)
    return cursor


def _fill(config: TrainConfig, engine: Engine, start: Start, info: RankInfo) -> Cursor:
    entries = engine.state.entries
    if start.checkpoint is None:
        values = starting_values(config.model, config.train.seed)
        initialise(engine.state, values, num_threads=max(1, (os.cpu_count() or 1) // info.local_world_size))
        return Cursor()
    _require_same_frozen(config, parameters_of(entries), start)
    if start.weights_only:
        clear_optimizer(engine.state)
        entries = {key: entry for key, entry in entries.items() if key.startswith(MODEL)}
        load_weights(start.checkpoint, entries, config)
    else:
        load_state(start.checkpoint, entries)
    engine.state.commit()
    state = start.read_state()
    return state.cursor if state else Cursor()


def _require_same_frozen(config: TrainConfig, names: list[str], start: Start) -> None:
    """Refuse to go on with other frozen weights: of what was trained the origin is gone, of the rest the optimizer state."""
    if (state := start.read_state()) is None:
        return
    before = set(state.frozen.names) if state.frozen else set()
    now = set(frozen_names(names, config.model))
    is_own = start.checkpoint.parent == checkpoints_directory(config.run.directory)
    if changed := (before ^ now if is_own else before - now):
        raise of_all_ranks(
            ConfigError(
                f"model.freeze={config.model.freeze}: {some(sorted(changed), 3)} {'was' if changed <= before else 'was not'} "
                f"frozen in {start.checkpoint}; go on as before, or begin another run.name with "
                f"checkpoint.resume={start.checkpoint} checkpoint.load=weights"
            )
        )


def go_back(
    config: TrainConfig, verdict: RollBack, stream: SampleStream, *, start: Start, begin: Cursor, rollbacks: int
) -> Start:
    """Return what to roll back to: the newest whole checkpoint before the bad steps, or the run's origin.

    All ranks call this; the caller discards newer checkpoints.

    Args:
        config: of the run.
        verdict: the bad steps.
        stream: the samples of the run; those of the bad steps are left out from now on.
        start: what was trained from until now.
        begin: where that was.
        rollbacks: number of rollbacks before.

    Raises:
        NoRestartError: too many rollbacks, or what to roll back to is gone.
    """
    first, last, batch = verdict.first_step, verdict.last_step, config.train.global_batch_size
    bad = f"steps {first} to {last} of {config.run.directory} have bad numbers"
    if rollbacks >= config.bad_numbers.max_rollbacks:
        problem = (
            f"{bad}, and the run has gone back {rollbacks} times already (bad_numbers.max_rollbacks); it diverges: "
            "lower optimizer.lr, or look at the data; events.jsonl has every bad step"
        )
        raise of_all_ranks(NoRestartError(problem))
    try:
        before = _before(config, first, start.origin)
    except CheckpointError as error:
        raise of_all_ranks(NoRestartError(f"{bad}, and the run cannot go back: {error}")) from error
    log.get_logger().warning(
        f"{bad}: going back to {before.checkpoint or 'the beginning'}; their {(last - first + 1) * batch} samples are "
        "left out from now on"
    )
    bad_samples = [begin.samples + (step - begin.step) * batch for step in (first - 1, last)]
    stream.leave_out(*bad_samples)
    return before


def discard(directory: Path, verdict: RollBack) -> None:
    """Delete the checkpoints from the first bad step on; all ranks call this while no save is under way."""
    on_rank0(lambda: discard_after(directory, verdict.first_step - 1))


def _before(config: TrainConfig, step: int, origin: Origin) -> Start:
    """Return the newest checkpoint before ``step``, or the origin if there was none."""
    directory = config.run.directory
    if path := newest_whole(directory, config.checkpoint.verify, before=step):
        return Start(origin, path)
    if saved := on_rank0(lambda: last_saved_step(directory, before=step)):
        raise CheckpointError(
            f"its checkpoints of steps before are gone (step {saved} was saved; checkpoint.keep={config.checkpoint.keep})"
        )
    if origin.checkpoint is None:
        if origin.published != _published(to_dict(config.model)):
            raise CheckpointError(
                f"it began with {origin.published or 'random weights'}, which the model's settings no longer say"
            )
        return Start(origin)
    seed = Path(origin.checkpoint)
    if problems := verify_checkpoint(seed, config.checkpoint.verify):
        raise CheckpointError(f"the checkpoint that it began with is not whole: {problems[0]}")
    return Start(origin, seed, origin.weights_only)
