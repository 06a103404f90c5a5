"""Zeros in trained matrices: the smallest numbers of each, or two of every four inputs of a linear layer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bigtrain.models.adapters import bare, is_linear, matching
from bigtrain.models.construction import find_stacks
from bigtrain.models.moe import Router

TWO_OF_FOUR = "2:4"


def prunable(network: nn.Module, targets: Sequence[str], *, frozen: Sequence[str] = ()) -> list[str]:
    """Return the names of the trained matrices, tensors of two or more dimensions, that ``targets`` name.

    By default those of the blocks, or, where there are none, all but the last, which is the head; embeddings, and routers
    of a mixture of experts, are left alone. ConfigError: a pattern matches none.
    """
    matrices = {name: bare(name) for name, p in network.named_parameters() if p.ndim >= 2 and name not in frozen}
    if targets:
        return matching(matrices, targets, "targets", "matrix")
    stacks = [module for stack in find_stacks(network) for module in stack.modules()]
    spared = {id(p) for m in network.modules() if isinstance(m, nn.Embedding | Router) for p in m.parameters()}
    in_blocks = {id(p) for module in stacks for p in module.parameters()}
    parameters = {name: id(network.get_parameter(name)) for name in matrices}
    names = [name for name, key in parameters.items() if key not in spared and (key in in_blocks or not stacks)]
    return names if stacks else names[:-1]


def input_dims(network: nn.Module) -> dict[str, int]:
    """Return along which dimension the inputs lie, by name of the weight of each linear layer."""
    layers = {name: module for name, module in network.named_modules() if is_linear(module)}
    return {f"{name}.weight": 1 if isinstance(module, nn.Linear) else 0 for name, module in layers.items()}


def without_smallest(weight: Tensor, share: float) -> Tensor:
    """Return a tensor with ``share`` of its numbers 0, rounded: the smallest in magnitude, of equal ones the first."""
    flat = weight.flatten().clone()
    flat[flat.abs().argsort(stable=True)[: round(share * len(flat))]] = 0
    return flat.view_as(weight)


def two_of_four(weight: Tensor, inputs: int) -> Tensor:
    """Return a matrix with the two smallest of every four consecutive numbers along its dimension ``inputs`` 0.

    That is what the sparse tensor cores of NVIDIA's GPUs take (Mishra et al., arXiv 2104.08378).
    """
    fours = weight.movedim(inputs, -1).unflatten(-1, (-1, 4))
    smallest = fours.abs().argsort(dim=-1, stable=True)[..., :2]
    is_left_out = torch.zeros_like(fours, dtype=torch.bool).scatter(-1, smallest, True)
    return fours.masked_fill(is_left_out, 0.0).flatten(-2).movedim(-1, inputs)
