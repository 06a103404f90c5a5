"""From a configuration to an engine: the only place where ``engine.kind`` is looked at."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from bigtrain.config import EngineKind, Head, ModelKind, OptimizerKind, Precision, TrainConfig
from bigtrain.config.layout import layout_of
from bigtrain.distributed.collectives import broadcast_json
from bigtrain.distributed.mesh import build_mesh
from bigtrain.engine.base import Engine
from bigtrain.engine.matrices import hand_over_matrices
from bigtrain.errors import ConfigError, of_all_ranks
from bigtrain.log import get_logger
from bigtrain.models.freeze import with_frozen
from bigtrain.processes import RankInfo
from bigtrain.tasks import build_objective
from bigtrain.tasks.base import Objective, TaskModel

CAPABILITIES = {Precision.tf32: (8, 0), Precision.fp8: (8, 9)}
"""Compute capability from which on GPUs have matrix products in these."""


def build_engine(
    config: TrainConfig,
    build_model: Callable[[], nn.Module],
    *,
    info: RankInfo,
    device: torch.device,
    objective: Objective | None = None,
) -> Engine:
    """Return the engine that ``config`` chooses; its weights are garbage until state is initialised or loaded.

    Args:
        config: resolved configuration with a precision.
        build_model: builds the model on the current default device, without initialising it.
        info: this rank's position; the process group runs.
        device: this rank's device.
        objective: what is minimised; by default what ``config.task`` chooses.

    Raises:
        ConfigError: this device or installation cannot compute in the precision.
    """
    precision = config.engine.precision
    require_hardware(precision, device)
    if config.model.kind is ModelKind.hf:
        build_model = with_unreached_frozen(build_model)
    if config.model.freeze or config.model.adapter:
        build_model = with_frozen(build_model, config.model)
    # Explicit, because containers change the default of a whole process by environment variables.
    torch.set_float32_matmul_precision("high" if precision is Precision.tf32 else "highest")
    if precision is Precision.fp8:
        from bigtrain.engine.float8 import with_float8

        num_tokens = config.train.micro_batch_size * config.data.sequence_length
        build_model = with_float8(build_model, num_tokens=num_tokens)
    objective = objective or build_objective(config.task)
    engine = _build(config, lambda: TaskModel(build_model(), objective), info=info, device=device)
    if config.optimizer.kind is OptimizerKind.muon:
        dtype = torch.float32 if precision in (Precision.fp32, Precision.tf32) else torch.bfloat16
        hand_over_matrices(engine, getattr(engine, "shard_group", None), dtype)
    return engine


def with_unreached_frozen(build_model: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return a builder of the same model, on the meta device, whose parameters that the loss does not reach are frozen.

    Otherwise each engine treats them in its own way: DDP waits for their gradients, DeepSpeed lets them decay.
    """
    from bigtrain.models.probe import outermost, unreached_parameters

    def build() -> nn.Module:
        model = build_model()
        try:
            names = unreached_parameters(model)
        except NotImplementedError as error:
            get_logger().warning(f"which parameters the loss reaches cannot be told before training: {error}")
            return model
        for name in names:
            model.get_parameter(name).requires_grad_(False)
        if names:
            get_logger().info(
                f"the loss does not reach {len(names)} parameters, which stay as they are: {', '.join(outermost(model, names))}"
            )
        return model

    return build


def require_causal(engine: Engine, config: TrainConfig) -> None:
    """Make sure that a model of transformers, with its weights, does not see later tokens; all ranks call this.

    Raises:
        ConfigError: earlier logits move when later tokens change.
    """
    if (
        config.model.kind is not ModelKind.hf
        or config.model.head is not Head.causal_lm
        or config.data.sequence_length < 2
    ):
        return
    from bigtrain.models.probe import LONG_ENOUGH, direction_settings, look_ahead

    engine.module.eval()
    length = min(config.data.sequence_length, LONG_ENOUGH)
    logits_of = partial(engine.module, predicts=True)
    moved = broadcast_json(look_ahead(logits_of, config.model.vocab_size, length, engine.device))
    # Experts of a causal model compute a token beside others, which rounds otherwise.
    noise = 1e-4 if config.engine.precision is Precision.fp32 else 1e-2
    if config.data.document_mask and length >= 4:
        _require_documents_apart(engine, config, logits_of, length, noise)
    if moved > noise:
        raise of_all_ranks(
            ConfigError(
                f"model.name={config.model.name} looks ahead: its logits of earlier tokens change when only later tokens "
                f"do, so it would learn to read the answer; its config.json has {direction_settings(engine.module)}; "
                "a decoder needs is_decoder=true, or whatever makes this architecture causal"
            )
        )


def _require_documents_apart(
    engine: Engine, config: TrainConfig, logits_of: Callable[..., torch.Tensor], length: int, noise: float
) -> None:
    from bigtrain.models.probe import look_across

    if broadcast_json(look_across(logits_of, config.model.vocab_size, length, engine.device)) > noise:
        raise of_all_ranks(
            ConfigError(
                f"data.document_mask=true, but model.name={config.model.name} sees across documents: its logits change when "
                "only the tokens of another document do; leave data.document_mask out, or choose an architecture of "
                "attention alone that takes position_ids"
            )
        )


def _build(
    config: TrainConfig, build_model: Callable[[], nn.Module], *, info: RankInfo, device: torch.device
) -> Engine:
    # DeepSpeed and Accelerate cost a second each to import: only who chooses them pays.
    kind = config.engine.kind
    layout = layout_of(config.engine, world_size=info.world_size, local_world_size=info.local_world_size)
    mesh = build_mesh(device, layout)
    if kind in (EngineKind.ddp, EngineKind.fsdp, EngineKind.hsdp):
        from bigtrain.engine.native import build_native

        return build_native(build_model, config, mesh=mesh, device=device)
    if kind is EngineKind.accelerate:
        from bigtrain.engine.accelerated import build_accelerated

        return build_accelerated(build_model, config, info=info, mesh=mesh, device=device)
    from bigtrain.engine.deepspeed_zero import build_deepspeed

    return build_deepspeed(build_model, config, info=info, mesh=mesh, device=device)


def require_hardware(precision: Precision | None, device: torch.device) -> None:
    """Make sure that ``device`` can compute in ``precision``.

    Raises:
        ConfigError: it cannot.
    """
    needed = CAPABILITIES.get(precision)
    if needed and (device.type != "cuda" or torch.cuda.get_device_capability(device) < needed):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"a {device.type}"
        raise ConfigError(
            f"engine.precision={precision.name}: needs a GPU of compute capability {needed[0]}.{needed[1]} or more, but "
            f"this rank computes on {name}; use engine.precision={precision.base.name}"
        )
