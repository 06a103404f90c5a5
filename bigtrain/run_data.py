"""The data of a run: prepared once, opened on every rank, continued where a checkpoint stopped."""

import datetime
from collections.abc import Mapping

from bigtrain.checkpoint.store import RunState
from bigtrain.config import DataConfig, DataSource, TrainConfig, component_data
from bigtrain.cursor import Cursor, DataState
from bigtrain.data import open_streams
from bigtrain.data.loader import TrainLoader
from bigtrain.data.prepare import prepare
from bigtrain.data.stream import SampleStream
from bigtrain.distributed import on_rank0
from bigtrain.engine.base import Engine
from bigtrain.errors import CheckpointError
from bigtrain.redact import redact
from bigtrain.schema import flatten, to_dict

PREPARATION = datetime.timedelta(days=7)
"""How long the other ranks wait while rank 0 prepares a corpus."""


def prepare_data(data: DataConfig) -> None:
    """Prepare whatever components have not been, in this process.

    Raises:
        DataError: as :func:`bigtrain.data.prepare.prepare`.
    """
    for part in component_data(data).values():
        if part.source is not DataSource.synthetic:
            prepare(part, progress=True)


def open_data(config: TrainConfig, previous: DataState | None = None) -> Mapping[str, SampleStream]:
    """Prepare the data on rank 0 if that has not been done, and open it on every rank.

    Args:
        config: of the run.
        previous: of the checkpoint that is continued.
    """
    on_rank0(lambda: prepare_data(config.data), patience=PREPARATION)
    train = config.train
    return open_streams(
        config.data,
        vocab_size=config.model.vocab_size,
        seed=train.seed,
        global_batch_size=train.global_batch_size,
        previous=previous,
    )


def train_loader(stream: SampleStream, config: TrainConfig, engine: Engine, *, start: Cursor) -> TrainLoader:
    """Return the loader of this rank's part of every step from ``start`` on."""
    return TrainLoader(
        stream,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=engine.dp_rank,
        dp_size=engine.dp_size,
        start=start,
        prefetch_steps=config.data.prefetch_steps,
        pin_memory=engine.device.type == "cuda",
    )


def check_continuation(state: RunState, config: TrainConfig, stream: SampleStream, world_size: int) -> list[str]:
    """Refuse to continue on other data or in another order; return what else has changed, a line each.

    Raises:
        CheckpointError: ``data.allow_change`` is not set, and the samples would not continue those of the checkpoint.
    """
    advice = "choose another run.name, or go on with data.allow_change=true"
    if not config.data.allow_change and state.data_fingerprint != stream.fingerprint:
        raise CheckpointError(
            f"the checkpoint was trained on other data ({state.data_fingerprint}, now {stream.fingerprint}); "
            f"restore the data, {advice}"
        )
    if not config.data.allow_change and state.data and not stream.continues(state.data):
        raise CheckpointError(
            f"step {state.step} would not have had the samples that the checkpoint has recorded: train.seed, "
            "data.sequence_length, data.packing or data.shuffle_window_shards is not what it was; "
            f"restore it, {advice}"
        )
    old = flatten(state.config) | {"world size": state.world_size}
    new = flatten(redact(to_dict(config))) | {"world size": world_size}
    changed = (key for key in sorted(new) if old.get(key) != new[key] and not key.startswith("run."))
    return [f"{key}: {old.get(key)} -> {new[key]}" for key in changed]


def first_text(config: TrainConfig) -> DataConfig | None:
    """Return the section of the data, or of the first component, that has a tokenizer."""
    texts = (part for part in component_data(config.data).values() if part.source is not DataSource.synthetic)
    return next(texts, None)
