"""A trained run, opened for what comes after training: to be measured, and to predict."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bigtrain import log
from bigtrain.checkpoint.store import read_run_state
from bigtrain.config import (
    EngineKind,
    Offload,
    ParallelConfig,
    Precision,
    PrivacyConfig,
    SetConfig,
    SyncConfig,
    TaskKind,
    TrainConfig,
    own_sets,
    set_data,
)
from bigtrain.config.check import check, fit_micro_batch
from bigtrain.data.read.index import read_index
from bigtrain.data.read.stream import SampleStream
from bigtrain.data.read.tokenizer import TOKENIZER_FILE
from bigtrain.distributed.collectives import init_process_group, pick_device, shut_down
from bigtrain.engine.base import Engine
from bigtrain.engine.build import build_engine
from bigtrain.engine.state import MODEL
from bigtrain.errors import ConfigError
from bigtrain.files import read_json
from bigtrain.models import build_model
from bigtrain.processes import RankInfo
from bigtrain.run.data import HELD_OUT, elsewhere, open_data, open_set, sets_of
from bigtrain.run.directory import FACTS_FILE, find_whole, label_names, locate, read_config
from bigtrain.run.frozen import load_state
from bigtrain.run.validation import Measured, validate

SETS = (HELD_OUT, "test")


@contextlib.contextmanager
def opened(path: Path, *, batches: int | None = None, tp: int = 1) -> Iterator[tuple[TrainConfig, Path]]:
    """Give the configuration of a run for the ranks of this world, and its directory, within a process group.

    ``tp`` ranks share every matrix. Validations have ``batches`` global batches, by default as many as the run's own.
    CheckpointError: no checkpoint. ConfigError: it is of no use in this world.
    """
    log.setup(RankInfo.from_env().rank)
    directory, _ = locate(path)
    config = read_config(directory)
    every_steps, batches = config.validation.every_steps or 1, batches or config.validation.batches
    validation = dataclasses.replace(config.validation, batches=batches, every_steps=every_steps)
    config = dataclasses.replace(config, validation=validation)
    with in_group(config, tp=tp) as fitted:
        yield fitted, directory


@contextlib.contextmanager
def in_group(config: TrainConfig, *, tp: int = 1) -> Iterator[TrainConfig]:
    """Give a configuration with which this world's ranks compute in a process group; ConfigError: of no use here."""
    info = RankInfo.from_env()
    device = pick_device(info)
    precision = config.engine.precision or (Precision.bf16 if device.type == "cuda" else Precision.fp32)
    # The engine does not matter to the numbers; this one needs the least memory.
    engine = dataclasses.replace(config.engine, kind=EngineKind.fsdp, dp_shard=None, offload=Offload.none)
    engine.precision = precision
    train = dataclasses.replace(config.train, micro_batch_size=None)
    of_training: dict[str, Any] = {"train": train, "privacy": PrivacyConfig(), "sync": SyncConfig()}
    whole = dataclasses.replace(config, engine=engine, parallel=ParallelConfig(tp=tp), **of_training)
    config = fit_micro_batch(whole, info.world_size)
    if problems := check(config, world_size=info.world_size, local_world_size=info.local_world_size):
        raise ConfigError("\n".join(problems))
    if not dist.is_initialized():
        init_process_group(info, device)
    try:
        yield config
    except BaseException:
        if info.world_size == 1:  # with other ranks, a collective could wait for ever
            shut_down()
        raise
    shut_down()


def load_engine(path: Path, config: TrainConfig) -> tuple[Engine, Path]:
    """Return an engine with the weights of a run's newest whole checkpoint, and that; CheckpointError if none is."""
    _, checkpoint = find_whole(path)
    info = RankInfo.from_env()
    engine = build_engine(config, lambda: build_model(config.model), info=info, device=pick_device(info))
    load_state(checkpoint, {key: entry for key, entry in engine.state.entries.items() if key.startswith(MODEL)})
    engine.state.commit()
    return engine, checkpoint


def validate_run(
    path: Path, *, batches: int | None = None, chosen: str = HELD_OUT, part: SetConfig | None = None, tp: int = 1
) -> Measured:
    """Return what a run, or one of its checkpoints, reaches on a set, with its ``step``, on all ranks of this world.

    ``chosen`` is ``validation`` or ``test``, or one of their sets such as ``test/news``; ``part`` another set in its
    place. ``tp`` ranks share every matrix. By default ``batches`` are those of the run's own validations, and all of
    other sets. CheckpointError: no whole checkpoint. ConfigError: the run has no such set.
    """
    is_usual = chosen == HELD_OUT and part is None
    with opened(path, batches=batches, tp=tp) as (config, directory):
        with elsewhere(config.data):
            sets = open_sets(config, directory, chosen, part)
        engine, checkpoint = load_engine(path, config)
        measured = validate(engine, sets, config, batches=config.validation.batches if is_usual else batches)
    is_usual &= config.task.kind == TaskKind.causal_lm
    if is_usual and sets.get("") and sets[""].tokenizer_directory and not config.data.mixture:
        index = read_index(directory, check_sizes=False)
        if not index.live and index.validation.num_documents:
            measured.metrics["unigram_entropy"] = index.validation.unigram_nats_per_token
    return dataclasses.replace(measured, metrics={"step": read_run_state(checkpoint).step, **measured.metrics})


def open_sets(config: TrainConfig, run: Path, chosen: str, part: SetConfig | None) -> dict[str, SampleStream]:
    """Return the sets that are measured on; those of their own need no training data."""
    which, _, name = chosen.partition("/")
    data = {"data": set_data(config.data, part)} if part else own_sets(config.data, which) if which in SETS else {}
    if name:
        data = {other: section for other, section in data.items() if other == name}
    if not data and chosen == HELD_OUT:
        return sets_of(open_data(config), HELD_OUT)
    if not data:
        known = [f"{w}/{n}" if n else w for w in SETS for n in own_sets(config.data, w)]
        raise ConfigError(
            f"set={chosen}: the run has {', '.join(dict.fromkeys([HELD_OUT, *known]))}; another one is data.path=..."
        )
    tokenizer = run if (run / TOKENIZER_FILE).is_file() else None
    where, facts = "data" if part else f"data.{which}", read_json(run / FACTS_FILE)
    places = {other: f"{where}.sets.{other}" if other else where for other in data}
    found = {
        other: open_set(
            config, section, where=places[other], tokenizer=tokenizer, label_names=label_names(run), facts=facts
        )
        for other, section in data.items()
    }
    return {"": next(iter(found.values()))} if part or name else found
