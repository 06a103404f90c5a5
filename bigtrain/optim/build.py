"""Parameter groups and the optimizer, the same for every engine."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bigtrain.config import OptimizerConfig, OptimizerKind
from bigtrain.distributed.collectives import local_part
from bigtrain.optim.muon import Muon, is_hidden_matrix
from bigtrain.tasks.base import canonical_name


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Split parameters into matrices, which decay, and vectors, which do not; Muon has its matrices apart.

    Frozen parameters are in none. Those without a dimension are apart, for FSDP does not shard them.
    """
    lists: list[list[nn.Parameter]] = [[], [], [], []]
    hidden, decay, no_decay, scalars = lists
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        num_dims = len(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 empties parameters
        by_muon = config.kind is OptimizerKind.muon and is_hidden_matrix(canonical_name(name), num_dims)
        (hidden if by_muon else decay if num_dims >= 2 else no_decay if num_dims else scalars).append(parameter)
    groups = [
        {"params": hidden, "weight_decay": config.weight_decay, "muon": True, "matrices": True},
        {"params": decay, "weight_decay": config.weight_decay, "l1": config.l1, "muon": False, "matrices": True},
        {"params": no_decay, "weight_decay": 0.0, "muon": False},
        {"params": scalars, "weight_decay": 0.0, "muon": False},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimizer over ``groups``; Adam's fused kernels exist on CPU and GPU."""
    beta1, beta2 = config.betas
    optimizer: torch.optim.Optimizer
    if config.kind is OptimizerKind.sgd:
        nesterov = config.nesterov and beta1 > 0
        optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=beta1, nesterov=nesterov, foreach=True)
    else:
        rule = {OptimizerKind.muon: Muon, OptimizerKind.adam: torch.optim.Adam}.get(config.kind, torch.optim.AdamW)
        optimizer = rule(groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True)
    if config.l1:
        optimizer.register_step_post_hook(_shrink)
    if config.keep_zeros:
        _keep_zeros(optimizer)
    return optimizer


@torch.no_grad()
def _shrink(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Take the proximal step of the L1 norm, soft thresholding (Daubechies et al., 2004), unless the update was skipped."""
    applied = 1 - getattr(optimizer, "found_inf", 0)
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("l1") else ():
            weight = local_part(parameter)
            weight.copy_(weight.sign() * (weight.abs() - group["lr"] * group["l1"] * applied).clamp(min=0))


def _keep_zeros(optimizer: torch.optim.Optimizer) -> None:
    """Let numbers of matrices that are 0 before an update be 0 after it: the zeros themselves are the mask."""
    zeros: dict[torch.Tensor, torch.Tensor] = {}

    def matrices() -> list[torch.Tensor]:
        return [p for group in optimizer.param_groups if group.get("matrices") for p in group["params"]]

    def remember(*_: Any) -> None:
        zeros.update({p: local_part(p.detach()) == 0 for p in matrices()})

    @torch.no_grad()
    def restore(*_: Any) -> None:
        for p in matrices():
            if p in zeros:  # Muon's step has one of AdamW's inside, with hooks of its own
                local_part(p).masked_fill_(zeros.pop(p), 0.0)

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(restore)


def set_lr(optimizer: Any, lr: float) -> None:
    """Give every parameter group the learning rate ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr
