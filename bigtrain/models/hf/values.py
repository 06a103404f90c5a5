"""Initial values of Hugging Face models: their own rules, or their published files."""

import math
from functools import partial

import torch
from torch import nn

from bigtrain.config import ModelConfig
from bigtrain.errors import ConfigError
from bigtrain.log import get_logger
from bigtrain.models.construction import parameters_on_meta
from bigtrain.models.hf.build import HFCausalLM, build_hf_model
from bigtrain.models.hf.heads import HFNetwork, is_of_head
from bigtrain.models.hf.load import head_of, published
from bigtrain.models.init import Finite, Given, InitialValue, seed_of
from bigtrain.models.programs import recorded_values


def published_values(model: HFCausalLM | HFNetwork, config: ModelConfig, seed: int) -> dict[str, InitialValue]:
    """Return every parameter's value from the safetensors files of ``config.name``, fresh ones of a head they lack.

    Raises:
        ConfigError: there are no such files, or they are not those of this model.
    """
    where, in_head = f"model.name={config.name!r}", head_of(model.causal_lm, config)
    values = published(model.causal_lm, config.name, setting="model.name", is_of_head=in_head)
    names = {name: name.removeprefix("causal_lm.") for name, _ in model.named_parameters()}
    fresh = [name for name, own in names.items() if own not in values]
    if fresh:
        get_logger().info(f"{where}: fresh: {', '.join(names[name] for name in fresh)}")
    drawn = fresh_values(model, seed) if fresh else {}
    found = {name: Finite(values[own], f"{where}: {own}") for name, own in names.items() if own in values}
    return {name: drawn[name] if name in fresh else found[name] for name in names}


def fresh_values(model: HFCausalLM | HFNetwork, seed: int) -> dict[str, InitialValue]:
    """Return values distributed like those that ``transformers`` would start from.

    Matrices are played back in parts (:mod:`bigtrain.models.programs`); all else, such as norms, biases and decay
    rates, is initialised in one piece.
    """
    programs = recorded_values(model, lambda: _initialise_as_transformers(model.causal_lm, model.causal_lm), seed)
    values, others = {}, []
    for prefix, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            fqn = f"{prefix}.{name}"
            # Sinusoidal tables, without gradient, are not random.
            if param.requires_grad and _is_matrix(module, name, param) and fqn in programs:
                values[fqn] = programs[fqn]
            else:
                others.append((module, fqn))
    values |= _own_values(model, others, seed)
    return {name: values[name] for name, _ in model.named_parameters()}


def _is_matrix(module: nn.Module, name: str, param: nn.Parameter) -> bool:
    from transformers.pytorch_utils import Conv1D

    linear = isinstance(module, nn.Linear | nn.Embedding | Conv1D) and name == "weight"
    fused_experts = param.ndim >= 3 and not isinstance(module, nn.modules.conv._ConvNd)
    return linear or fused_experts


def _own_values(
    model: HFCausalLM | HFNetwork, owned: list[tuple[nn.Module, str]], seed: int
) -> dict[str, InitialValue]:
    """Run the model's own initialisation with real memory for the given parameters (of given modules)."""
    meta = {fqn: module.get_parameter(fqn.rpartition(".")[2]) for module, fqn in owned}
    for module, fqn in owned:
        real = nn.Parameter(torch.full(meta[fqn].shape, math.nan, device="cpu"))
        setattr(module, fqn.rpartition(".")[2], real)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed_of(seed, "transformers"))
        _initialise_as_transformers(model.causal_lm, model.causal_lm)
    values: dict[str, InitialValue] = {fqn: Given(model.get_parameter(fqn).detach()) for fqn in meta}
    for module, fqn in owned:
        setattr(module, fqn.rpartition(".")[2], meta[fqn])
    if unsaid := [fqn for fqn, value in values.items() if value.values.isnan().any()]:
        values |= _constructed(model, unsaid, seed)
    return values


def _constructed(model: HFCausalLM | HFNetwork, names: list[str], seed: int) -> dict[str, InitialValue]:
    """Return what constructors give to parameters that their initialisation leaves alone.

    Raises:
        ConfigError: they give nothing, so that ranks would start from whatever their memory held.
    """
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # unwritten memory is NaN then
    try:
        with parameters_on_meta(keep_elements=max(model.get_parameter(name).numel() for name in names)):
            again = type(model.causal_lm)(model.causal_lm.config)
    finally:
        torch.use_deterministic_algorithms(is_deterministic)
    own = {name: name.removeprefix("causal_lm.") for name in names}
    values = {name: getattr(again.get_parameter(own[name]), "constructed", None) for name in names}
    if None in values.values():  # a parametrisation, whose parameters are computed from others
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed_of(seed, "network"))
            whole = type(model.causal_lm)(model.causal_lm.config)
        values = {name: whole.get_parameter(own[name]).detach() for name in names}
    if unsaid := [name for name, value in values.items() if value.isnan().any()]:
        raise ConfigError(
            f"{type(model.causal_lm).__name__} does not say what {', '.join(unsaid)} start from; start from published "
            "weights (model.pretrained=true)"
        )
    return {name: Given(value.float()) for name, value in values.items()}


def _initialise_as_transformers(module: nn.Module, owner: nn.Module) -> None:
    """Let the innermost ``PreTrainedModel`` around each module initialise it, children first: parents overrule."""
    from transformers import PreTrainedModel

    owner = module if isinstance(module, PreTrainedModel) else owner
    for child in module.children():
        _initialise_as_transformers(child, owner)
    owner._init_weights(module)


def trunk_values(config: ModelConfig, seed: int) -> dict[str, InitialValue]:
    """Return values of which the trunk's are from the safetensors files of ``config.init_from``, others fresh.

    Raises:
        ConfigError: there are no such files, or their trunk is another one.
    """
    with torch.device("meta"):
        model = build_hf_model(config)
    where, network = f"model.init_from={config.init_from!r}", model.causal_lm
    found = published(network, config.init_from, setting="model.init_from", is_of_head=partial(is_of_head, network))
    own = {name: name.removeprefix("causal_lm.") for name, _ in model.named_parameters()}
    taken = [name for name in own if own[name] in found and not is_of_head(network, own[name])]
    get_logger().info(f"{where}: fresh: {', '.join(own[name] for name in own if name not in taken)}")
    return fresh_values(model, seed) | {name: Finite(found[own[name]], f"{where}: {own[name]}") for name in taken}
