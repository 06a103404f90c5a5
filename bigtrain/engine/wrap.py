"""What is done to the blocks before an engine shards them, in the only order that is right:

1. activation checkpointing, so that recomputation is inside what is compiled;
2. ``torch.compile`` of each block (one compilation serves all of them, because they are alike);
3. sharding, by the engine, so that gathering stays outside the compiled graph;
4. :func:`materialise`, when only the shards are left to allocate.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from bigtrain.config import ActivationCheckpointing, EngineConfig
from bigtrain.models.construction import find_stacks
from bigtrain.models.moe import MixtureOfExperts
from bigtrain.models.transformer import Vocabulary
from bigtrain.tasks.base import TaskModel


def find_blocks(model: TaskModel) -> list[nn.Module]:
    return [block for stack in find_stacks(model.network) for block in stack]


def wrap_blocks(model: TaskModel, config: EngineConfig) -> None:
    """Apply activation checkpointing and compilation to the blocks of ``model`` in place."""
    if config.activation_checkpointing is not ActivationCheckpointing.none:
        wrap: Callable[[nn.Module], nn.Module] = checkpoint_wrapper
        if config.activation_checkpointing is ActivationCheckpointing.selective:
            context_fn = partial(create_selective_checkpoint_contexts, _keep_expensive)
            wrap = partial(checkpoint_wrapper, context_fn=context_fn)
        places = [(stack, i) for stack in find_stacks(model.network) for i in range(len(stack))]
        for stack, i in places[:: config.activation_checkpointing_every]:
            stack[i] = wrap(stack[i])
    if config.compile:
        for block in find_blocks(model):
            block.compile()
        for module in model.modules():
            if isinstance(module, Vocabulary):
                module.compiles_loss = True
            if isinstance(module, MixtureOfExperts):  # sizes that depend on numbers; the meta kernel knows bf16 only
                module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]


def _keep_expensive(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """Keep what costs much to compute (matrix products, attention); recompute the rest."""
    aten = torch.ops.aten
    expensive = (
        aten.mm.default,
        aten.addmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.higher_order.flex_attention,
        aten._scaled_mm.default,
        aten._grouped_mm.default,
    )
    return CheckpointPolicy.MUST_SAVE if op in expensive else CheckpointPolicy.PREFER_RECOMPUTE


def build_whole(build_model: Callable[[], TaskModel], config: EngineConfig, device: torch.device) -> TaskModel:
    """Build a model on the meta device, wrap its blocks and give it memory, whole; weights are garbage."""
    with torch.device("meta"):
        model = build_model()
    wrap_blocks(model, config)
    materialise(model, device, buffers=device)
    return model


def materialise(module: nn.Module, device: torch.device, *, buffers: torch.device | None = None) -> None:
    """Give meta parameters (garbage) memory and move what is real, buffers to ``buffers``; shared ones stay shared."""
    first_name: dict[nn.Parameter, str] = {}
    aliases = {
        name: first_name[parameter]
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if first_name.setdefault(parameter, name) != name
    }
    module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    for alias, name in aliases.items():
        owner, _, attribute = alias.rpartition(".")
        setattr(module.get_submodule(owner), attribute, module.get_parameter(name))
    for parent in module.modules() if buffers else ():
        for name, buffer in parent.named_buffers(recurse=False):
            setattr(parent, name, buffer.to(buffers))
