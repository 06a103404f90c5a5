"""The loss of a run on held-out documents, in training and afterwards."""

import dataclasses
import math
from pathlib import Path

import torch

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


def validate_run(path: Path, *, batches: int | None = None) -> dict[str, float]:
    """Return loss and metrics of a checkpoint on its run's validation split, on all ranks of this world.

    Args:
        path: directory of a run, or of one of its checkpoints.
        batches: global batches; by default those of the run's own validations.

    Raises:
        CheckpointError: no whole checkpoint.
    """
    info = RankInfo.from_env()
    log.setup(info.rank)
    device = pick_device(info)
    directory, _ = locate(path)
    config = read_config(directory)
    # The engine does not matter to the loss; this one needs the least memory.
    engine_config = dataclasses.replace(config.engine, kind=EngineKind.fsdp, dp_shard=None, offload=Offload.none)
    config = dataclasses.replace(config, engine=engine_config)
    config.validation = dataclasses.replace(
        config.validation, batches=batches or config.validation.batches, every_steps=config.validation.every_steps or 1
    )
    config.train.micro_batch_size = None
    config = fit_micro_batch(config, info.world_size)
    if problems := check(config, world_size=info.world_size, local_world_size=info.local_world_size):
        raise ConfigError("\n".join(problems))
    init_process_group(info, device)
    _, checkpoint = find_whole(path)
    with elsewhere(config.data):
        streams = open_data(config)
    engine = build_engine(config, lambda: build_model(config.model), info=info, device=device)
    weights = {key: entry for key, entry in engine.state.entries.items() if key.startswith(MODEL)}
    load_state(checkpoint, weights)
    engine.state.commit()
    metrics = validate(engine, streams["validation"], config)
    shut_down()
    result = {"step": read_run_state(checkpoint).step, **metrics}
    if streams["validation"].tokenizer_directory and not config.data.mixture:
        index = read_index(directory, check_sizes=False)
        if not index.live:
            result["unigram_entropy"] = index.validation.unigram_nats_per_token
    return result
