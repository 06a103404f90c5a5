"""How a launch takes a run, and how a run goes back."""

import os
from pathlib import Path

from bigtrain import log
from bigtrain.checkpoint.loader import load_checkpoint
from bigtrain.checkpoint.store import discard_after, find_checkpoints, newest_step, read_run_state
from bigtrain.config import TrainConfig
from bigtrain.cursor import Cursor
from bigtrain.data.stream import SampleStream
from bigtrain.distributed import on_rank0
from bigtrain.engine.base import Engine
from bigtrain.engine.state import initialise
from bigtrain.errors import NoRestartError, of_all_ranks
from bigtrain.models import build_initial_values
from bigtrain.rank_info import RankInfo
from bigtrain.resilience.bad_numbers import RollBack
from bigtrain.resilience.launch import Launch
from bigtrain.run_files import writing


def claim(launch: Launch) -> None:
    """Take the run for this launch; all ranks call this, a second call does nothing.

    Raises:
        ConfigError: another launch has it, or its directory cannot be written.
        NoRestartError: it has failed too often without progress.
    """

    def take() -> int:
        with writing(launch.directory):
            return launch.claim(newest_step(launch.directory))

    if launch.attempt == 0:
        launch.begin(on_rank0(take))


def fill_state(config: TrainConfig, engine: Engine, checkpoint: Path | None, info: RankInfo) -> Cursor:
    """Give the engine the state of a checkpoint, or initial values; return how far the run is with it."""
    if checkpoint is None:
        values = build_initial_values(config.model, config.train.seed)
        initialise(engine.state, values, num_threads=max(1, (os.cpu_count() or 1) // info.local_world_size))
        return Cursor()
    load_checkpoint(checkpoint, engine.state.entries)
    engine.state.commit()
    return read_run_state(checkpoint).cursor


def go_back(
    config: TrainConfig, directory: Path, verdict: RollBack, stream: SampleStream, *, start: Cursor, rollbacks: int
) -> Path | None:
    """Forget everything since the newest checkpoint before the bad steps; all ranks call this.

    Args:
        config: of the run.
        directory: of the run; nobody is saving into it.
        verdict: which steps are bad.
        stream: the samples of the run, which leaves out those of the bad steps from then on.
        start: where the launch, or what followed the last time, began.
        rollbacks: how often the run has gone back before.

    Returns:
        The checkpoint to go on from, None for the beginning.

    Raises:
        NoRestartError: the run has gone back too often.
    """
    first, last, batch = verdict.first_step, verdict.last_step, config.train.global_batch_size
    bad = f"steps {first} to {last} of {directory} have bad numbers"
    if rollbacks >= config.bad_numbers.max_rollbacks:
        problem = (
            f"{bad}, and the run has gone back {rollbacks} times already (bad_numbers.max_rollbacks); it diverges: "
            "lower optimizer.lr, or look at the data; events.jsonl has every bad step"
        )
        raise of_all_ranks(NoRestartError(problem))
    on_rank0(lambda: discard_after(directory, first - 1))
    left = on_rank0(lambda: [str(path) for path in find_checkpoints(directory)])
    log.get_logger().warning(
        f"{bad}: going back to {left[-1] if left else 'the beginning'}; their {(last - first + 1) * batch} samples are "
        "left out from now on"
    )
    bad_samples = [start.samples + (step - start.step) * batch for step in (first - 1, last)]
    stream.leave_out(*bad_samples)
    return Path(left[-1]) if left else None
