"""Parameter groups and the optimizer, the same for every engine."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bigtrain.config import OptimizerConfig, OptimizerKind


def parameter_groups(named: Iterable[tuple[str, nn.Parameter, int]], *, weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into matrices, which decay, and vectors, which do not.

    Args:
        named: (name, parameter, number of dimensions of the whole parameter) triples; engines that
            flatten or empty their parameters pass the dimensions of the original.
        weight_decay: decay of the matrices.
    """
    decay, no_decay = [], []
    for _, parameter, num_dims in named:
        (decay if num_dims >= 2 else no_decay).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimizer over ``groups``; AdamW's fused kernel exists on CPU and GPU."""
    beta1, beta2 = config.betas
    if config.kind is OptimizerKind.sgd:
        return torch.optim.SGD(groups, lr=config.lr, momentum=beta1, nesterov=beta1 > 0, foreach=True)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True)


def set_lr(optimizer: Any, lr: float) -> None:
    """Give every parameter group the learning rate ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr
