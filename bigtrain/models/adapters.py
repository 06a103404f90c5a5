"""Low-rank adapters beside the linear layers of a network, by peft; the network's own weights are frozen.

Parameters of an adapted layer ``x`` are ``x.weight``, as without adapters, and ``x.lora_A.default.weight`` and so on.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.config import AdapterConfig, AdapterKind, ModelConfig
from bigtrain.errors import ConfigError, some
from bigtrain.log import quiet_torchao
from bigtrain.models.construction import find_stacks
from bigtrain.models.init import InitialValue
from bigtrain.models.nf4 import NF4Linear, Quantised, is_nf4
from bigtrain.models.programs import Program, Recorder

_MAGNITUDE = ".lora_magnitude_vector.default.weight"


def plain_name(name: str) -> str:
    """Return the name of a parameter without what peft puts around an adapted layer."""
    return name.replace(".base_layer.", ".")


def is_of_adapter(name: str) -> bool:
    """Return whether a parameter belongs to an adapter."""
    return ".lora_" in name


def peft_config(config: AdapterConfig, modules: list[str]) -> Any:
    """Return peft's configuration of adapters beside ``modules``."""
    quiet_torchao()
    from peft import LoraConfig

    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides it, whatever it says
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        use_dora=config.kind is AdapterKind.dora,
        target_modules="|".join(map(re.escape, modules)),
    )


def add_adapters(network: nn.Module, config: AdapterConfig) -> None:
    """Add adapters to a network with parameters on the meta device, in place; ConfigError as :func:`adapted_modules`."""
    modules = adapted_modules(network, config)
    owners = Counter(id(parameter) for _, parameter in network.named_parameters(remove_duplicate=False))
    if tied := [name for name in modules if owners[id(network.get_submodule(name).weight)] > 1]:
        problem = f"model.adapter.targets: {bare(tied[0])} shares its weights with the token embedding"
        raise ConfigError(f"{problem}, so what it learnt could not be merged; name other layers")
    settings = peft_config(config, modules)
    in_blocks = adapted_modules(network, AdapterConfig()) if config.nf4 else []
    from peft import inject_adapter_in_model

    inject_adapter_in_model(settings, network)
    network.requires_grad_(True)  # what is frozen is said elsewhere
    for name in in_blocks:
        if not any(fnmatchcase(f"{bare(name)}.weight", pattern) for pattern in config.also_train):
            place = f"{name}.base_layer" if hasattr(network.get_submodule(name), "base_layer") else name
            network.set_submodule(place, NF4Linear(network.get_submodule(place)))


def adapted_modules(network: nn.Module, config: AdapterConfig) -> list[str]:
    """Return the linear layers of ``config.targets``, by default all in blocks; ConfigError: a pattern has none."""
    linear = {name: bare(name) for name, module in network.named_modules() if is_linear(module)}
    if not config.targets:
        in_blocks = {layer for stack in find_stacks(network) for layer in stack.modules()}
        return [name for name, module in network.named_modules() if name in linear and module in in_blocks]
    return matching(linear, config.targets, "model.adapter.targets", "linear layer")


def matching(own: Mapping[str, str], patterns: Sequence[str], setting: str, what: str) -> list[str]:
    """Return the names whose own one is of a pattern; ConfigError if a pattern has none."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in own.values()):
            raise ConfigError(
                f"{setting}: {pattern!r} matches no {what} of this model, which has {some(list(own.values()), 8)}"
            )
    return [name for name, bare in own.items() if any(fnmatchcase(bare, pattern) for pattern in patterns)]


def bare(name: str) -> str:
    """Return a name as it is in the model of transformers itself."""
    return name.removeprefix("causal_lm.")


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, also as GPT-2 of transformers has it."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def adapter_values(
    config: ModelConfig, build: Callable[[], nn.Module], base: Mapping[str, InitialValue], seed: int
) -> dict[str, InitialValue]:
    """Return the initial values of adapters, as peft draws them, and of what follows from the ``base`` values beside them.

    That is the norms of rows for DoRA, and weights in 4 bits.
    """
    with torch.device("meta"):
        network = build()
        with Recorder() as recorder, torch.no_grad():
            add_adapters(network, config.adapter)
    values: dict[str, InitialValue] = {}
    for name, parameter in network.named_parameters():
        if is_nf4(name):
            owner, _, part = name.rpartition(".")
            layer: Any = network.get_submodule(owner)
            values[plain_name(name)] = Quantised(base[plain_name(f"{owner}.weight")], layer.shape, part)
        elif name.endswith(_MAGNITUDE):
            owner = name.removesuffix(_MAGNITUDE)
            own = network.get_submodule(f"{owner}.base_layer")
            shape, is_transposed = own.get_parameter("weight").shape, not isinstance(own, nn.Linear)
            values[name] = RowNorms(base[f"{owner}.weight"], shape, is_transposed=is_transposed)
        elif is_of_adapter(name):
            values[name] = Program(recorder.of(parameter), seed, name)
    return values


@dataclass(frozen=True, slots=True)
class RowNorms:
    """The Euclidean norm of the weights of each output; an :class:`bigtrain.models.init.InitialValue`."""

    matrix: InitialValue
    shape: torch.Size
    is_transposed: bool  # whether outputs are columns

    def fill(self, start: int, out: Tensor) -> None:
        whole = torch.empty(self.shape.numel(), device="cpu")
        self.matrix.fill(0, whole)
        norms = torch.linalg.norm(whole.view(self.shape), dim=0 if self.is_transposed else 1)
        out.copy_(norms[start : start + len(out)])


def merged(network: nn.Module, name: str, read: Callable[[str], Tensor]) -> Tensor:
    """Return a weight with its adapter merged, fp32; the network is on the meta device, ``read`` returns parameters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer_name, _, attribute = name.rpartition(".")
    layer = network.get_submodule(layer_name)
    if attribute != "weight" or not isinstance(layer, BaseTunerLayer):
        return read(name)
    layer = copy.deepcopy(layer).to_empty(device="cpu")
    with torch.no_grad():
        for own, parameter in layer.named_parameters():
            parameter.copy_(read(plain_name(f"{layer_name}.{own}")))
    layer.merge()
    return layer.get_parameter("base_layer.weight").detach()
