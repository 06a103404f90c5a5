"""How a network is built without memory for its parameters, and where its blocks are."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import nn

from bigtrain.errors import ConfigError

SMALLEST_STACK = 0.01  # of the parameters: smaller lists of modules are no stacks of blocks


@contextlib.contextmanager
def parameters_on_meta(*, keep_elements: int = 0) -> Iterator[dict[nn.Parameter, torch.Tensor]]:
    """Construct modules with parameters on the meta device and buffers, which no checkpoint holds, on the CPU.

    Tied parameters stay tied; each exists for a moment, as untouched memory. The dict that is given gets what those
    with at most ``keep_elements`` held then.
    """
    register_parameter = nn.Module.register_parameter
    constructed: dict[nn.Parameter, torch.Tensor] = {}

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            held = param.detach()
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
            if held.numel() <= keep_elements:
                constructed[param] = held
        register_parameter(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        with torch.device("cpu"):
            yield constructed
    finally:
        nn.Module.register_parameter = register_parameter  # type: ignore[method-assign]


def outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """Yield the lists of modules that are not inside another list."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from outermost_lists(child)


def find_stacks(network: nn.Module) -> list[nn.ModuleList | nn.Sequential]:
    """Return the lists of blocks that are wrapped, compiled, recomputed and sharded one by one.

    By default the outermost lists with 1 % of the parameters or more, such as those of encoder and decoder, whose
    modules are called by themselves.
    """
    if isinstance(blocks := getattr(network, "blocks", None), nn.ModuleList | nn.Sequential):
        return [blocks]
    num_parameters = sum(p.numel() for p in network.parameters())
    return [
        stack
        for stack in outermost_lists(network)
        if sum(p.numel() for p in stack.parameters()) >= SMALLEST_STACK * num_parameters
        and all(type(block).forward is not nn.Module.forward for block in stack)
    ]


def batch_norms(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the batch normalisations of a network with their names."""
    modules = network.named_modules()
    return ((name, module) for name, module in modules if isinstance(module, nn.modules.batchnorm._BatchNorm))


def freeze_batch_statistics(network: nn.Module) -> None:
    """Let batch normalisation use its stored means and variances in training too; its factors are trained."""
    for _, module in batch_norms(network):
        module.eval()
        module.train = functools.partial(_stay, module)  # type: ignore[method-assign]


def _stay(module: nn.Module, _mode: bool = True) -> nn.Module:
    return module


def refuse_batch_statistics(network: nn.Module, where: str, advice: str) -> None:
    """Raise a ConfigError if a network has batch normalisation."""
    for name, module in batch_norms(network):
        raise ConfigError(
            f"{where}{name} ({type(module).__name__}) takes means over a micro-batch, so the run would depend on how "
            f"a step is cut; {advice}"
        )
