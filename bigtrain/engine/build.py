"""From a configuration to an engine: the only place where ``engine.kind`` is looked at."""

from collections.abc import Callable

import torch
from torch import nn

from bigtrain.config import EngineKind, OptimizerKind, Precision, TrainConfig
from bigtrain.distributed import build_mesh
from bigtrain.engine.base import Engine
from bigtrain.engine.matrices import hand_over_matrices
from bigtrain.rank_info import RankInfo


def dp_shard_size(config: TrainConfig, info: RankInfo) -> int:
    """Return how many ranks share one copy of the state under the native engines."""
    if config.engine.kind is EngineKind.ddp:
        return 1
    if config.engine.kind is EngineKind.hsdp:
        return config.engine.dp_shard or info.local_world_size
    return info.world_size


def build_engine(
    config: TrainConfig, build_model: Callable[[], nn.Module], *, info: RankInfo, device: torch.device
) -> Engine:
    """Return the engine that ``config`` chooses; its weights are garbage until state is initialised or loaded.

    Args:
        config: resolved configuration with a precision.
        build_model: builds the model on the current default device, without initialising it.
        info: this rank's position; the process group runs.
        device: this rank's device.
    """
    engine = _build(config, build_model, info=info, device=device)
    if config.optimizer.kind is OptimizerKind.muon:
        dtype = torch.bfloat16 if config.engine.precision is Precision.bf16 else torch.float32
        hand_over_matrices(engine, getattr(engine, "shard_group", None), dtype)
    return engine


def _build(
    config: TrainConfig, build_model: Callable[[], nn.Module], *, info: RankInfo, device: torch.device
) -> Engine:
    # DeepSpeed and Accelerate cost a second each to import: only who chooses them pays.
    kind = config.engine.kind
    if kind in (EngineKind.ddp, EngineKind.fsdp, EngineKind.hsdp):
        from bigtrain.engine.native import build_native

        mesh = build_mesh(device, world_size=info.world_size, dp_shard=dp_shard_size(config, info))
        return build_native(build_model, config.engine, config.optimizer, mesh=mesh, device=device)
    if kind is EngineKind.accelerate:
        from bigtrain.engine.accelerated import build_accelerated

        return build_accelerated(build_model, config, info=info, device=device)
    from bigtrain.engine.deepspeed_zero import build_deepspeed

    return build_deepspeed(build_model, config, info=info, device=device)
