"""``accelerate``: the user's own Accelerate configuration, as one more way to build DDP or ZeRO.

Accelerate reads what ``accelerate launch`` put into the environment and wraps the model. Then our own DDP and ZeRO code
drives it: Accelerate's loss scaling, schedules and checkpoints stay out of the run.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator, DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs
from accelerate.utils import DistributedDataParallelKwargs, parse_flag_from_env
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bigtrain.config import EngineKind, Precision, TrainConfig
from bigtrain.distributed.mesh import Mesh
from bigtrain.engine.base import Engine
from bigtrain.engine.deepspeed_zero import ZeroEngine, build_for_deepspeed, deepspeed_settings, import_deepspeed
from bigtrain.engine.native import build_native
from bigtrain.errors import ConfigError
from bigtrain.log import get_logger
from bigtrain.processes import RankInfo
from bigtrain.tasks.base import TaskModel


def build_accelerated(
    build_model: Callable[[], TaskModel], config: TrainConfig, *, info: RankInfo, mesh: Mesh, device: torch.device
) -> Engine:
    """Build the model, let Accelerate wrap it; ConfigError if it does otherwise than DDP or DeepSpeed ZeRO 1 to 3."""
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ConfigError("accelerate is configured for FSDP, which bigtrain builds itself: use engine=fsdp or hsdp")
    _name_ignored(config)
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return _build_zero(build_model, config, info=info, mesh=mesh, device=device)
    return _build_ddp(build_model, config, info=info, mesh=mesh, device=device)


def _build_ddp(
    build_model: Callable[[], TaskModel], config: TrainConfig, *, info: RankInfo, mesh: Mesh, device: torch.device
) -> Engine:
    info.publish()  # without it Accelerate wraps nothing in a world of one
    settings = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=settings)
    expected = DistributedType.MULTI_CPU if device.type == "cpu" else DistributedType.MULTI_GPU
    _assert_built(accelerator, expected, info.world_size)
    engine = build_native(build_model, config, mesh=mesh, device=device, wrap=accelerator.prepare_model)
    _assert_wrapped(engine.module, DistributedDataParallel)
    return engine


def _build_zero(
    build_model: Callable[[], TaskModel], config: TrainConfig, *, info: RankInfo, mesh: Mesh, device: torch.device
) -> Engine:
    deepspeed = import_deepspeed(info, device)
    plugin = DeepSpeedPlugin()  # the user's stage and offload, from the environment
    if plugin.zero_stage not in (1, 2, 3):
        raise ConfigError(
            f"accelerate is configured for ZeRO stage {plugin.zero_stage}; bigtrain trains with 1, 2 or 3"
        )
    kind = EngineKind[f"zero{plugin.zero_stage}"]
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, kind=kind))
    settings = deepspeed_settings(config, dp_size=mesh.dp_size, device=device)
    user_zero = plugin.deepspeed_config.get("zero_optimization", {})
    settings["zero_optimization"] |= {key: value for key, value in user_zero.items() if value not in ("auto", None)}
    with _without_deepspeed_variables():
        accelerator = Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings),
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo" if device.type == "cpu" else "nccl")],
            mixed_precision="no",
        )
    _assert_built(accelerator, DistributedType.DEEPSPEED, info.world_size)
    model, optimizer = build_for_deepspeed(deepspeed, build_model, config, settings=settings, device=device)
    module, _ = accelerator.prepare(model, optimizer)
    _assert_wrapped(module, deepspeed.DeepSpeedEngine)
    return ZeroEngine(module, mesh=mesh, device=device)


def _name_ignored(config: TrainConfig) -> None:
    """Warn of what accelerate was told and the run's own settings decide."""
    precision, steps = os.environ.get("ACCELERATE_MIXED_PRECISION"), "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    expected = "bf16" if config.engine.precision.base is Precision.bf16 else "no"
    if precision not in (None, expected):
        get_logger().warning(
            f"accelerate's mixed_precision={precision} is ignored: engine.precision={config.engine.precision.name} decides"
        )
    if os.environ.get(steps, "1") not in ("1", "auto"):
        get_logger().warning(
            f"accelerate's gradient_accumulation_steps={os.environ[steps]} is ignored: it follows from "
            "train.global_batch_size and train.micro_batch_size"
        )


@contextlib.contextmanager
def _without_deepspeed_variables() -> Iterator[None]:
    """Hide the user's settings, which ours contain by now: Accelerate refuses to be told twice."""
    hidden = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_DEEPSPEED_")}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def _assert_built(accelerator: Accelerator, kind: DistributedType, world_size: int) -> None:
    """Accelerate falls back in silence, on a CPU above all; training unsynchronised would go unnoticed."""
    if (accelerator.distributed_type, accelerator.num_processes) != (kind, world_size):
        raise ConfigError(
            f"accelerate is configured as {accelerator.distributed_type.value} with {accelerator.num_processes} "
            f"processes, but this run needs {kind.value} with {world_size}; run `accelerate config`, "
            "or use engine=ddp, fsdp, hsdp or zero1-3"
        )


def _assert_wrapped(module: nn.Module, kind: type[nn.Module]) -> None:
    if not isinstance(module, kind):
        raise AssertionError(f"accelerate wrapped the model as {type(module).__name__}, not {kind.__name__}")
