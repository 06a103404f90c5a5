"""From a configuration to an engine: the only place where ``engine.kind`` is looked at."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from bigtrain.config import EngineKind, Head, ModelKind, OptimizerKind, Precision, TrainConfig
from bigtrain.config.layout import layout_of
from bigtrain.distributed.collectives import broadcast_json
from bigtrain.distributed.mesh import Mesh, build_mesh
from bigtrain.engine.balance import balance_of
from bigtrain.engine.base import Engine
from bigtrain.engine.context import CONTEXTS
from bigtrain.engine.exchange import TensorExchange, TokenExchange
from bigtrain.engine.matrices import hand_over_matrices
from bigtrain.engine.state import add_averages
from bigtrain.engine.wrap import build_whole
from bigtrain.errors import ConfigError, of_all_ranks
from bigtrain.log import get_logger
from bigtrain.models.freeze import freeze
from bigtrain.models.hf.heads import HFNetwork
from bigtrain.models.partition import cut, share_experts, share_sequences
from bigtrain.models.transformer import Transformer
from bigtrain.processes import RankInfo
from bigtrain.tasks import build_objective
from bigtrain.tasks.base import Objective, TaskModel

CAPABILITIES = {Precision.tf32: (8, 0), Precision.fp8: (8, 9)}  # compute capability that it needs


def build_engine(
    config: TrainConfig,
    build_model: Callable[[], nn.Module],
    *,
    info: RankInfo,
    device: torch.device,
    objective: Objective | None = None,
) -> Engine:
    """Return the engine that ``config`` chooses; its weights are garbage until state is initialised or loaded.

    ``build_model`` builds on the current default device, without initialising; the process group runs. The objective is
    by default what ``config.task`` chooses. ConfigError: this device cannot compute in the configuration's precision.
    """
    precision = config.engine.precision
    require_hardware(precision, device)
    # Explicit, because containers change the default of a whole process by environment variables.
    torch.set_float32_matmul_precision("high" if precision is Precision.tf32 else "highest")

    layout = layout_of(
        config.engine, config.parallel, world_size=info.world_size, local_world_size=info.local_world_size
    )
    mesh = build_mesh(device, layout)

    def build_task() -> TaskModel:
        model = build_model()
        if isinstance(model, HFNetwork):
            freeze_unreached(model, config)
        freeze(model, config.model)
        if layout.tp > 1:
            assert isinstance(model, Transformer)
            cut(model, TensorExchange(mesh.tp))
        if mesh.experts is not None:
            assert isinstance(model, Transformer)
            share_experts(model, TokenExchange(mesh.experts.get_group("ep")))
        if mesh.cp is not None:
            assert isinstance(model, Transformer)
            share_sequences(model, CONTEXTS[config.parallel.cp_method](mesh.cp))
        if precision is Precision.fp8:
            from bigtrain.engine.float8 import use_float8

            use_float8(model, num_tokens=config.train.micro_batch_size * config.data.sequence_length)
        return TaskModel(model, minimised)

    minimised = objective or build_objective(config.task)
    engine = _build(config, build_task, info=info, mesh=mesh, device=device)
    engine.objective = minimised
    engine.balance = balance_of(engine.module, engine.state, engine.mesh)
    if config.optimizer.kind is OptimizerKind.muon:
        dtype = torch.float32 if precision in (Precision.fp32, Precision.tf32) else torch.bfloat16
        hand_over_matrices(engine, getattr(engine, "shard_group", None), dtype)
    if config.optimizer.average:
        engine.average_decay, engine.averages = config.optimizer.average, add_averages(engine.state)
    return engine


def freeze_unreached(model: HFNetwork, config: TrainConfig) -> None:
    """Freeze the parameters of a model on the meta device that the loss does not reach.

    Otherwise each engine treats them in its own way: DDP waits for their gradients, DeepSpeed lets them decay.
    ConfigError: the engine would not hear of gradients that the model computes in a backward pass of its own.
    """
    from bigtrain.models.probe import HiddenBackwardError, outermost, unreached_parameters

    kind, names = config.engine.kind, []
    try:
        names = unreached_parameters(model, config.data.sequence_length)
    except NotImplementedError as error:
        get_logger().warning(f"which parameters the loss reaches cannot be told before training: {error}")
    except HiddenBackwardError as error:
        if not kind.name.startswith("zero"):
            problem = f"this model computes gradients in a backward pass of its own ({error}), which it does not follow"
            raise of_all_ranks(ConfigError(f"engine={kind.name}: {problem}; use zero1 or zero2")) from error
        get_logger().warning(f"which parameters the loss reaches cannot be told: the model has its own {error}")
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    if names:
        shown = ", ".join(outermost(model, names))
        get_logger().info(f"the loss does not reach {len(names)} parameters, which stay as they are: {shown}")


def require_causal(engine: Engine, config: TrainConfig) -> None:
    """Make sure that a model of transformers, with its weights, does not see later tokens; all ranks call this.

    ConfigError: earlier logits move when later tokens change, or with a document mask those of another document.
    """
    model, data = config.model, config.data
    if model.kind is not ModelKind.hf or model.head is not Head.causal_lm or data.sequence_length < 2:
        return
    from bigtrain.models.probe import LONG_ENOUGH, direction_settings, leak, two_documents

    engine.module.eval()
    sizes = model.vocab_size, min(data.sequence_length, LONG_ENOUGH), engine.device
    logits_of = partial(engine.module, predicts=True)
    # Experts of a causal model compute a token beside others, which rounds otherwise.
    noise = 1e-4 if config.engine.precision is Precision.fp32 else 1e-2
    if data.document_mask and sizes[1] >= 4:
        positions_BT = two_documents(sizes[1], engine.device)
        across = leak(lambda tokens_BT: logits_of(tokens_BT, None, positions_BT), *sizes, from_later=False)
        if broadcast_json(across) > noise:
            problem = (
                f"data.document_mask=true, but model.name={model.name} sees across documents: its logits change when "
                "only the tokens of another document do; leave data.document_mask out, or choose an architecture of "
                "attention alone that takes position_ids"
            )
            raise of_all_ranks(ConfigError(problem))
    if broadcast_json(leak(logits_of, *sizes, from_later=True)) > noise:
        problem = (
            f"model.name={model.name} looks ahead: its logits of earlier tokens change when only later tokens "
            f"do, so it would learn to read the answer; its config.json has {direction_settings(engine.module)}; "
            "a decoder needs is_decoder=true, or whatever makes this architecture causal"
        )
        raise of_all_ranks(ConfigError(problem))


def _build(
    config: TrainConfig, build_model: Callable[[], TaskModel], *, info: RankInfo, mesh: Mesh, device: torch.device
) -> Engine:
    # DeepSpeed and Accelerate cost a second each to import: only who chooses them pays.
    kind = config.engine.kind
    if config.privacy.max_grad_norm:
        from bigtrain.engine.private import PrivateEngine

        return PrivateEngine(build_whole(build_model, config.engine, device), config, mesh, device)
    if config.sync.every_steps > 1:
        from bigtrain.engine.local import LocalEngine

        return LocalEngine(build_whole(build_model, config.engine, device), config, mesh, device)
    if config.parallel.pp > 1:
        from bigtrain.engine.pipeline import build_pipeline

        return build_pipeline(build_model, config, mesh=mesh, device=device)
    if kind in (EngineKind.ddp, EngineKind.fsdp, EngineKind.hsdp):
        from bigtrain.engine.native import build_native

        return build_native(build_model, config, mesh=mesh, device=device)
    if kind is EngineKind.accelerate:
        from bigtrain.engine.accelerated import build_accelerated as build
    else:
        from bigtrain.engine.deepspeed_zero import build_deepspeed as build
    return build(build_model, config, info=info, mesh=mesh, device=device)


def require_hardware(precision: Precision | None, device: torch.device) -> None:
    """Raise a ConfigError if ``device`` cannot compute in ``precision``."""
    needed = CAPABILITIES.get(precision)
    if needed and (device.type != "cuda" or torch.cuda.get_device_capability(device) < needed):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"a {device.type}"
        raise ConfigError(
            f"engine.precision={precision.name}: needs a GPU of compute capability {needed[0]}.{needed[1]} or more, but "
            f"this rank computes on {name}; use engine.precision={precision.base.name}"
        )
