"""What the tests that start ranks share: small configurations and one way to build an engine in a rank."""

import dataclasses
from typing import Any

import torch

from bigtrain.config import (
    DataConfig,
    DataSource,
    EngineConfig,
    EngineKind,
    ModelConfig,
    Offload,
    ParallelConfig,
    Precision,
    TrainConfig,
    TrainingConfig,
)
from bigtrain.config.check import check, resolve
from bigtrain.distributed.collectives import init_process_group, pick_device
from bigtrain.engine.base import Engine
from bigtrain.engine.build import build_engine
from bigtrain.engine.state import initialise
from bigtrain.models import build_initial_values, build_model
from bigtrain.processes import RankInfo
from bigtrain.testing.parity import ZERO_STAGE, Case, configure

ENGINES = ("ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3")


def small_config(engine: str = "ddp", *, model: dict[str, Any] | None = None, **engine_fields: Any) -> TrainConfig:
    """A run of seconds: two odd-sized layers, ragged synthetic targets, fp32."""
    shape = {"vocab_size": 97, "num_layers": 2, "hidden_dim": 24, "num_heads": 3, "max_positions": 16}
    config = TrainConfig(
        model=ModelConfig(name="small", **{**shape, **(model or {})}),
        data=DataConfig(source=DataSource.synthetic, synthetic_ragged=True),
        engine=EngineConfig(kind=EngineKind[engine], **{"precision": Precision.fp32, **engine_fields}),
        train=TrainingConfig(steps=6, global_batch_size=8, micro_batch_size=1),
    )
    config.scheduler.warmup_steps = 2
    config.optimizer.lr = 1e-2
    return resolve(config)


def start_engine(config: TrainConfig) -> Engine:
    """Join the process group, unless it has been done, and build the engine with initial weights."""
    info = RankInfo.from_env()
    assert not check(config, world_size=info.world_size, local_world_size=info.local_world_size)
    device = pick_device(info)
    if not torch.distributed.is_initialized():
        init_process_group(info, device, timeout_seconds=60)
    engine = build_engine(config, lambda: build_model(config.model), info=info, device=device)
    values = build_initial_values(config.model, config.train.seed)
    initialise(engine.state, values, num_threads=1)
    return engine


def with_engine(config: TrainConfig, engine: str, *, offload: str = "none", **fields: Any) -> TrainConfig:
    """The same run under another engine."""
    fields["offload"] = Offload[offload]
    return dataclasses.replace(config, engine=dataclasses.replace(config.engine, kind=EngineKind[engine], **fields))


def laid_out(
    config: TrainConfig,
    engine: str,
    world_size: int,
    parallel: ParallelConfig,
    *,
    micro: int,
    dp_shard: int | None = None,
    **fields: Any,
) -> TrainConfig:
    """Return the configuration of a layout's case, which would be accepted."""
    found = configure(config, Case(EngineKind[engine], world_size, micro, dp_shard, parallel=parallel))
    found = dataclasses.replace(found, engine=dataclasses.replace(found.engine, **fields))
    assert check(found, world_size=world_size, local_world_size=world_size) == []
    return found


def zero_environ(stage: int) -> dict[str, str]:
    """Return what ``accelerate launch --use_deepspeed --zero_stage <stage>`` sets."""
    return {"ACCELERATE_USE_DEEPSPEED": "true", ZERO_STAGE: str(stage)}
