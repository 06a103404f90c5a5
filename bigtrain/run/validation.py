"""The loss of a run on held-out documents, in training and afterwards."""

import dataclasses
import math
from pathlib import Path

import torch
import torch.distributed as dist

from bigtrain import log
from bigtrain.checkpoint.store import read_run_state
from bigtrain.config import EngineKind, Offload, TrainConfig
from bigtrain.config.check import check, fit_micro_batch
from bigtrain.data.read.index import read_index
from bigtrain.data.read.loader import count_targets, validation_batches
from bigtrain.data.read.stream import SampleStream
from bigtrain.distributed.collectives import init_process_group, pick_device, shut_down
from bigtrain.engine.base import Engine
from bigtrain.engine.build import build_engine
from bigtrain.engine.state import MODEL
from bigtrain.errors import ConfigError
from bigtrain.models import build_model
from bigtrain.processes import RankInfo
from bigtrain.run.data import elsewhere, open_data
from bigtrain.run.directory import find_whole, locate, read_config
from bigtrain.run.frozen import load_state
from bigtrain.run.written import write_validation, written_metrics
from bigtrain.tasks import build_objective
from bigtrain.tasks.base import split_sums


def validate(engine: Engine, stream: SampleStream, config: TrainConfig) -> dict[str, float]:
    """Return the mean loss per target over the validation batches, and the task's metrics, at any world size."""
    objective = build_objective(config.task)
    num_sums = sum(math.prod(shape) for shape in objective.sums.values())
    total = torch.zeros(2 + num_sums, dtype=torch.float64)
    steps = validation_batches(
        stream,
        batches=config.validation.batches,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=engine.mesh.dp_rank,
        dp_size=engine.mesh.dp_size,
        objective=objective,
    )
    for micro_batches in steps:
        for batch, sums in zip(micro_batches, engine.evaluate(micro_batches).tolist(), strict=True):
            total += torch.tensor([count_targets(objective, batch), *sums], dtype=torch.float64)
    num_targets, loss_sum, *sums = engine.mesh.total(total).tolist()
    loss = loss_sum / num_targets if num_targets else float("nan")  # all in shards that are skipped
    return {"loss": loss, **objective.metrics(loss, split_sums(objective, sums))}


def measure(engine: Engine, stream: SampleStream, config: TrainConfig) -> tuple[dict[str, float], list[dict[str, str]]]:
    """Return loss and metrics on the validation batches, and on rank 0 what was written of ``validation.written_samples``."""
    metrics = validate(engine, stream, config)
    if not config.validation.written_samples:
        return metrics, []
    texts = write_validation(engine, stream, config)
    return metrics | written_metrics(texts), texts


def evaluation_config(path: Path, *, batches: int | None = None) -> TrainConfig:
    """Return the configuration of a run for measuring and predicting on the ranks of this world.

    Args:
        path: directory of a run, or of one of its checkpoints.
        batches: global batches of a validation; by default those of the run's own.

    Raises:
        CheckpointError: no checkpoint.
        ConfigError: it is of no use in this world.
    """
    info = RankInfo.from_env()
    log.setup(info.rank)
    config = read_config(locate(path)[0])
    # The engine does not matter to the numbers; this one needs the least memory.
    engine = dataclasses.replace(config.engine, kind=EngineKind.fsdp, dp_shard=None, offload=Offload.none)
    every_steps, batches = config.validation.every_steps or 1, batches or config.validation.batches
    validation = dataclasses.replace(config.validation, batches=batches, every_steps=every_steps)
    train = dataclasses.replace(config.train, micro_batch_size=None)
    config = dataclasses.replace(config, engine=engine, validation=validation, train=train)
    config = fit_micro_batch(config, info.world_size)
    if problems := check(config, world_size=info.world_size, local_world_size=info.local_world_size):
        raise ConfigError("\n".join(problems))
    return config


def load_engine(path: Path, config: TrainConfig) -> tuple[Engine, Path]:
    """Return an engine with the weights of a run's newest whole checkpoint, and that; starts the process group.

    Raises:
        CheckpointError: no whole checkpoint.
    """
    info, device = _join_group()
    _, checkpoint = find_whole(path)
    engine = build_engine(config, lambda: build_model(config.model), info=info, device=device)
    load_state(checkpoint, {key: entry for key, entry in engine.state.entries.items() if key.startswith(MODEL)})
    engine.state.commit()
    return engine, checkpoint


def _join_group() -> tuple[RankInfo, torch.device]:
    """Start the process group, unless there is one."""
    info = RankInfo.from_env()
    device = pick_device(info)
    if not dist.is_initialized():
        init_process_group(info, device)
    return info, device


def validate_run(path: Path, *, batches: int | None = None) -> dict[str, float]:
    """Return loss and metrics of a checkpoint on its run's validation split, on all ranks of this world.

    Args:
        path: directory of a run, or of one of its checkpoints.
        batches: global batches; by default those of the run's own validations.

    Raises:
        CheckpointError: no whole checkpoint.
    """
    config, (directory, _) = evaluation_config(path, batches=batches), locate(path)
    _join_group()
    with elsewhere(config.data):
        streams = open_data(config)
    engine, checkpoint = load_engine(path, config)
    metrics, _ = measure(engine, streams["validation"], config)
    shut_down()
    result = {"step": read_run_state(checkpoint).step, **metrics}
    if streams["validation"].tokenizer_directory and not config.data.mixture:
        index = read_index(directory, check_sizes=False)
        if not index.live:
            result["unigram_entropy"] = index.validation.unigram_nats_per_token
    return result
