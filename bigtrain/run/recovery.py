"""What a launch starts from, what a run rolls back to, and whether it is trained on."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain import log
from bigtrain.checkpoint.loader import verify_checkpoint
from bigtrain.checkpoint.store import Origin, RunState, Standing, checkpoints_directory, read_run_state
from bigtrain.config import Load, TrainConfig, ValidationConfig, own_sets
from bigtrain.config.check import RESUME_WORDS
from bigtrain.config.convert import to_dict
from bigtrain.config.length import LENGTHS
from bigtrain.data.order.cursor import Cursor
from bigtrain.data.read.stream import SampleStream
from bigtrain.distributed.collectives import on_rank0
from bigtrain.engine.base import Engine
from bigtrain.engine.build import require_causal
from bigtrain.engine.state import MODEL, clear_optimizer, initialise
from bigtrain.errors import CheckpointError, ConfigError, NoRestartError, of_all_ranks, some
from bigtrain.models.freeze import frozen_names
from bigtrain.processes import RankInfo
from bigtrain.run.directory import find_resume, last_saved_step, newest_whole
from bigtrain.run.frozen import load_state, load_weights, parameters_of, starting_values
from bigtrain.run.pruning import require_zeros
from bigtrain.run.validation import WRITTEN_METRICS
from bigtrain.supervise.bad_numbers import RollBack
from bigtrain.tasks import build_objective
from bigtrain.tasks.base import sums_by_name
from bigtrain.tasks.causal_lm import CausalLM
from bigtrain.tasks.metrics import LESS_IS_BETTER

EARLY_STOPPING = "early_stopping"


@dataclass(frozen=True, slots=True)
class Start:
    """What a launch, or the training after a rollback, starts from."""

    origin: Origin = field(default_factory=Origin)  # of the run itself
    checkpoint: Path | None = None  # None for initial values
    weights_only: bool = False  # take only the weights of the checkpoint, and begin at step 0

    def read_state(self) -> RunState | None:
        """Return the run state that is continued; None at step 0."""
        return read_run_state(self.checkpoint) if self.checkpoint and not self.weights_only else None


def find_start(config: TrainConfig) -> Start:
    """Return what this launch starts from, by ``checkpoint.resume`` and ``checkpoint.load``; all ranks call this."""
    path = find_resume(config)
    if path is None:
        return Start(Origin(published=published_weights(to_dict(config.model))))
    if path.parent == checkpoints_directory(config.run.directory):
        state = read_run_state(path)
        if state.origin:
            return Start(state.origin, path)
        # A checkpoint from before origins were recorded: by its configuration.
        resume = state.config.get("checkpoint", {}).get("resume", "auto")
        published = published_weights(state.config.get("model", {}))
        return Start(Origin(published=published) if resume in RESUME_WORDS else Origin(checkpoint=resume), path)
    weights_only = config.checkpoint.load is Load.weights
    return Start(Origin(checkpoint=str(path.absolute()), weights_only=weights_only), path, weights_only)


def published_weights(model: dict[str, Any]) -> str | None:
    """Return the published weights that a model starts from."""
    return model.get("init_from") or (model.get("name") if model.get("pretrained") else None)


def fill_state(config: TrainConfig, engine: Engine, start: Start, info: RankInfo) -> Cursor:
    """Fill the engine's state and return how far the run is with it; ConfigError if the model then looks ahead."""
    state, entries = start.read_state(), engine.state.entries
    if start.checkpoint is None:
        values = starting_values(config.model, config.train.seed)
        initialise(engine.state, values, num_threads=max(1, (os.cpu_count() or 1) // info.local_world_size))
    else:
        if state:
            _require_same_frozen(config, parameters_of(entries), state, start.checkpoint)
            load_state(start.checkpoint, entries)
        else:
            clear_optimizer(engine.state)
            entries = {key: entry for key, entry in entries.items() if key.startswith(MODEL)}
            load_weights(start.checkpoint, entries, config)
        engine.state.commit()
    require_causal(engine, config)
    require_zeros(engine, config)
    return state.cursor if state else Cursor()


def _require_same_frozen(config: TrainConfig, names: list[str], state: RunState, checkpoint: Path) -> None:
    """Refuse to go on with other frozen weights: of what was trained the origin is gone, of the rest the optimizer state."""
    before = set(state.frozen.names) if state.frozen else set()
    now = set(frozen_names(names, config.model))
    is_own = checkpoint.parent == checkpoints_directory(config.run.directory)
    if changed := (before ^ now if is_own else before - now):
        was = "was" if changed <= before else "was not"
        problem = (
            f"model.freeze={config.model.freeze}: {some(sorted(changed), 3)} {was} frozen in {checkpoint}; go on as before, "
            f"or begin another run.name with checkpoint.resume={checkpoint} checkpoint.load=weights"
        )
        raise of_all_ranks(ConfigError(problem))


def go_back(
    config: TrainConfig, verdict: RollBack, stream: SampleStream, *, start: Start, begin: Cursor, rollbacks: int
) -> Start:
    """Return what to roll back to, and leave the samples of the bad steps out of ``stream``; all ranks call this.

    That is the newest whole checkpoint before them, or the run's origin; the caller discards newer checkpoints.
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
    place, num_samples = before.checkpoint or "the beginning", (last - first + 1) * batch
    log.get_logger().warning(f"{bad}: going back to {place}; their {num_samples} samples are left out from now on")
    stream.leave_out(*(begin.samples + (step - begin.step) * batch for step in (first - 1, last)))
    return before


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
        if origin.published != published_weights(to_dict(config.model)):
            raise CheckpointError(
                f"it began with {origin.published or 'random weights'}, which the model's settings no longer say"
            )
        return Start(origin)
    seed = Path(origin.checkpoint)
    if problems := verify_checkpoint(seed, config.checkpoint.verify):
        raise CheckpointError(f"the checkpoint that it began with is not whole: {problems[0]}")
    return Start(origin, seed, origin.weights_only)


def begin_standing(config: TrainConfig, state: RunState | None) -> Standing:
    """Return the standing that a launch begins with: the checkpoint's, unless it is by another metric."""
    objective, metric = build_objective(config.task), config.validation.metric
    known = ["loss"]
    if metric not in known:
        ones = {name: np.ones(shape) for name, shape in sums_by_name(objective, held_out=True).items()}
        known += objective.metrics(1.0, ones)
        known += ["bits_per_byte"] if isinstance(objective, CausalLM) else []
        known += WRITTEN_METRICS if config.validation.written_samples else ()
        known += ["frechet"] if config.validation.frechet else []
        known += [f"{name}/{other}" for name in own_sets(config.data, "validation") if name for other in known]
    known += [f"fgsm_{size:g}/accuracy" for size in config.validation.fgsm]
    known += [f"lm_eval/{task}/..." for task in config.validation.lm_eval]  # whose metrics the harness knows
    if metric not in known and not (metric.startswith("lm_eval/") and config.validation.lm_eval):
        raise ConfigError(f"validation.metric={metric}: task={config.task.kind} has {', '.join(known)}")
    if state and state.standing and state.standing.metric == metric:
        return state.standing
    return Standing(
        metric,
        less_is_better=metric.rpartition("/")[2] in LESS_IS_BETTER | set(getattr(objective, "less_is_better", ())),
    )


def why_ended(standing: Standing, config: ValidationConfig) -> str | None:
    """Return why a run with this standing is over before ``train.steps``, None if it is not."""
    if not config.every_steps:
        return None
    is_known = standing.best is not None and config.stop_at is not None
    if is_known and standing.order(standing.best) <= standing.order(config.stop_at):
        return f"reached {standing.metric} {standing.best:.6g}"
    return EARLY_STOPPING if config.patience is not None and standing.num_since >= config.patience else None


def explain_end(standing: Standing, reason: str) -> str:
    """Return ``reason`` with the best validation and the setting that decided."""
    if reason != EARLY_STOPPING:
        return f"{reason} (validation.stop_at)"
    if standing.best is None:
        return f"{standing.metric} was no number in {standing.num_since} validations (validation.patience)"
    best = f"{standing.metric} {standing.best:.6g} after step {standing.best_step}"
    return f"no validation was better than {best} in {standing.num_since} (validation.patience)"


def nothing_to_do(config: TrainConfig, state: RunState, standing: Standing) -> str | None:
    """Say why a run is not trained on, None if it is."""
    directory, step, wanted_steps = config.run.directory, state.step, config.train.steps
    if step < wanted_steps:
        ended = why_ended(standing, config.validation)
        return ended and f"{directory} is finished at step {step}: {explain_end(standing, ended)}"
    if step > wanted_steps:
        return f"{directory} is at step {step} already, beyond train.steps={wanted_steps}: nothing is trained"
    length = next(name for name in reversed(LENGTHS) if getattr(config.train, name) is not None)
    return f"{directory} is finished at step {step}; a larger train.{length} trains on, another run.name starts anew"
